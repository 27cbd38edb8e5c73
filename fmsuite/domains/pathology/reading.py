"""Reading windows: the nearest finer level, the exact region, one antialiased resampling."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image

from fmsuite.core.data.handles import HandleCache
from fmsuite.core.data.index import Window
from fmsuite.core.data.sample import ArraySample
from fmsuite.domains.pathology.slides import PixelSource, close_source, open_source
from fmsuite.errors import ReadFailure

LEVEL_TOLERANCE = 0.02
"""A level may be this much coarser than asked: pyramids are rarely exact powers of two."""
BLOCK_PIXELS = 16 * 2**20
"""Source pixels that are held at once; a larger region is read in parts."""
FILTER = Image.Resampling.BICUBIC
_WHOLE = 1e-6
"""Fractions of a pixel below this are rounding."""
_SUPPORT = 2.0
"""Of the bicubic filter, in pixels of the coarser side. The box filter never looks beyond the region."""


def best_level(source: PixelSource, scale: float) -> int:
    """The coarsest level that is still as fine as ``scale`` level-0 pixels per pixel, within ``LEVEL_TOLERANCE``."""
    fitting = [n for n, level in enumerate(source.levels) if max(level.downsample) <= scale * (1 + LEVEL_TOLERANCE)]
    return max(fitting, key=lambda n: max(source.levels[n].downsample), default=0)


def read_region(
    source: PixelSource,
    position: tuple[float, float],
    extent: tuple[float, float],
    size: tuple[int, int],
    resample: Image.Resampling = FILTER,
) -> tuple[np.ndarray, np.ndarray]:
    """A region of a source at any resolution.

    Args:
        source: an open source.
        position, extent: (y, x) corner and lengths in level-0 pixels; fractions count.
        size: (height, width) to come out.
        resample: bicubic, or box for means of areas.

    Returns:
        (height, width, 3) uint8, and (height, width) bool: False outside the source and where it was not scanned. There
        the colour is the source's background.

    Raises:
        ReadFailure: if any of it cannot be read.
    """
    blocks = list(_blocks(source, position, extent, size))
    if len(blocks) == 1:
        return _read_block(source, blocks[0], resample)
    rgb = np.empty((*size, 3), np.uint8)
    valid = np.empty(size, bool)
    for block in blocks:
        rgb[block.place], valid[block.place] = _read_block(source, block, resample)
    return rgb, valid


@dataclass(frozen=True)
class _Block:
    """A part of a region: where it goes in the output, and what it shows."""

    top: int
    left: int
    size: tuple[int, int]
    position: tuple[float, float]
    extent: tuple[float, float]

    @property
    def place(self) -> tuple[slice, slice]:
        return (slice(self.top, self.top + self.size[0]), slice(self.left, self.left + self.size[1]))

    def split(self, axis: int, length: int) -> Iterator[_Block]:
        """Pieces of at most ``length`` output pixels along an axis."""
        for start in range(0, self.size[axis], length):
            count = min(length, self.size[axis] - start)
            pitch = self.extent[axis] / self.size[axis]
            size, position, extent = list(self.size), list(self.position), list(self.extent)
            size[axis], extent[axis] = count, pitch * count
            position[axis] += pitch * start
            corner = [self.top, self.left]
            corner[axis] += start
            yield _Block(corner[0], corner[1], (size[0], size[1]), (position[0], position[1]), (extent[0], extent[1]))


def _blocks(
    source: PixelSource, position: tuple[float, float], extent: tuple[float, float], size: tuple[int, int]
) -> Iterator[_Block]:
    """Parts of a region that each need at most ``BLOCK_PIXELS`` of the level they are read from."""
    whole = _Block(0, 0, size, position, extent)
    level = source.levels[best_level(source, min(extent[0] / size[0], extent[1] / size[1]))]
    pixels = extent[0] * extent[1] / (level.downsample[0] * level.downsample[1])
    if pixels <= BLOCK_PIXELS:
        yield whole
        return
    share = BLOCK_PIXELS / pixels
    # Strips are decoded in full width anyway, so parts of a striped file are as wide as can be.
    rows = size[0] * share if source.striped else size[0] * math.sqrt(share)
    rows = min(max(int(rows), 1), size[0])
    columns = min(max(int(size[1] * share * size[0] / rows), 1), size[1])
    for band in whole.split(0, rows):
        yield from band.split(1, columns)


@dataclass(frozen=True)
class _Cut:
    """What to read for a block, along (y, x), in pixels of a level that is reduced by ``factor`` while it is read.

    Attributes:
        start, length: of the block, in fractions of pixels.
        first, last: whole pixels to read.
        before, after: pixels of the block that lie outside the level.
        copied: the block's pixels are the level's own: there is nothing to resample.
    """

    level: int
    factor: int
    start: tuple[float, float]
    length: tuple[float, float]
    first: tuple[int, int]
    last: tuple[int, int]
    before: tuple[int, int]
    after: tuple[int, int]
    copied: bool

    @classmethod
    def of(cls, source: PixelSource, block: _Block, level: int, factor: int, resample: Image.Resampling) -> _Cut | None:
        """``None`` if a reduced level would lack pixels at its far border, where it ends on a part of one."""
        shape, pitch = source.levels[level].shape, [d * factor for d in source.levels[level].downsample]
        start = (block.position[0] / pitch[0], block.position[1] / pitch[1])
        length = (block.extent[0] / pitch[0], block.extent[1] / pitch[1])
        copied = source.begins_on_pixels(level) and all(
            abs(start[a] - round(start[a])) < _WHOLE and abs(length[a] - block.size[a]) < _WHOLE for a in (0, 1)
        )
        first, last, before, after = [], [], [], []
        for axis in (0, 1):
            # The filter looks beyond the region, and OpenSlide may begin a fraction of a pixel off.
            margin = 0
            if resample == FILTER and not copied:
                margin = math.ceil(_SUPPORT * max(1.0, length[axis] / block.size[axis])) + 1
            low, high = math.floor(start[axis]), math.ceil(start[axis] + length[axis])
            if copied:
                low, high = round(start[axis]), round(start[axis]) + block.size[axis]
            whole = shape[axis] // factor
            if high > whole and shape[axis] % factor:
                return None
            begin, end = max(0, low - margin), min(whole, high + margin)
            first.append(begin)
            last.append(end)
            before.append(max(0, begin - low))
            after.append(max(0, high - end))
        pairs = [(pair[0], pair[1]) for pair in (first, last, before, after)]
        return cls(level, factor, start, length, pairs[0], pairs[1], pairs[2], pairs[3], copied)


def _cut(source: PixelSource, block: _Block, resample: Image.Resampling) -> _Cut:
    """From the best level, reduced as far as the source can while it decodes, if that is still fine enough."""
    scale = min(block.extent[a] / block.size[a] for a in (0, 1))
    number = best_level(source, scale)
    downsample = max(source.levels[number].downsample)
    for factor in (*source.factors(number)[::-1], 1) if downsample * 2 <= scale * (1 + LEVEL_TOLERANCE) else (1,):
        if factor == 1 or downsample * factor <= scale * (1 + LEVEL_TOLERANCE):
            cut = _Cut.of(source, block, number, factor, resample)
            if cut is not None:
                return cut
    raise AssertionError("a level that is not reduced lacks no pixels")


def _read_block(source: PixelSource, block: _Block, resample: Image.Resampling) -> tuple[np.ndarray, np.ndarray]:
    cut = _cut(source, block, resample)
    background = np.asarray(source.background, np.uint8)
    (top, left), (height, width) = cut.first, (cut.last[0] - cut.first[0], cut.last[1] - cut.first[1])
    if height <= 0 or width <= 0:
        return np.broadcast_to(background, (*block.size, 3)).copy(), np.zeros(block.size, bool)
    begins = (float(top), float(left))
    if cut.factor > 1:
        pixels = source.read_reduced(cut.level, cut.factor, top, left, height, width)
    else:
        pixels, begins = source.read(cut.level, top, left, height, width)
    rgb = pixels[..., :3]
    alpha = pixels[..., 3] if pixels.shape[2] == 4 and pixels[..., 3].min() < 255 else None
    if alpha is not None:
        weight = alpha[..., None].astype(np.float32) / 255
        rgb = np.rint(rgb * weight + background * (1 - weight)).astype(np.uint8)
    padding = [(cut.before[a], cut.after[a]) for a in (0, 1)]
    if any(map(any, padding)):
        # The border is repeated outwards, so that nothing foreign is mixed into the last valid pixels.
        alpha = np.pad(np.full(rgb.shape[:2], 255, np.uint8) if alpha is None else alpha, padding)
        rgb = np.pad(rgb, [*padding, (0, 0)], mode="edge")
    if cut.copied and begins == (top, left) and alpha is None:
        return rgb, np.ones(block.size, bool)
    offset = [cut.start[a] - begins[a] + cut.before[a] for a in (0, 1)]
    # Rounding must not push the box over the border by a hair, which Pillow refuses.
    y, x = (min(max(offset[a], 0.0), rgb.shape[a]) for a in (0, 1))
    box = (x, y, min(x + cut.length[1], rgb.shape[1]), min(y + cut.length[0], rgb.shape[0]))
    width_height = (block.size[1], block.size[0])
    picture = np.asarray(Image.fromarray(np.ascontiguousarray(rgb)).resize(width_height, resample, box))
    if alpha is None:
        return picture, np.ones(block.size, bool)
    cover = Image.fromarray(np.ascontiguousarray(alpha)).resize(width_height, Image.Resampling.BOX, box)
    valid = np.asarray(cover) >= 128
    return np.where(valid[..., None], picture, background), valid


@dataclass(frozen=True)
class Thumbnail:
    """A small picture of a whole source.

    Attributes:
        rgb: (H, W, 3) uint8.
        valid: (H, W) bool, False where nothing was scanned or nothing could be read.
        origin: (y, x) of its corner in level-0 pixels.
        pitch: level-0 pixels in one of its pixels along (y, x).
        unreadable: share of its area that could not be read, and the first reason.
    """

    rgb: np.ndarray
    valid: np.ndarray
    origin: tuple[float, float]
    pitch: tuple[float, float]
    unreadable: float = 0.0
    failure: ReadFailure | None = None


def thumbnail_pitch(source: PixelSource, mpp: tuple[float, float] | None, wanted: float) -> tuple[float, float]:
    """Level-0 pixels in one thumbnail pixel, for ``wanted`` um a pixel, between 512 and 4096 pixels on the long side.

    Without a resolution the thumbnail simply has 1024 pixels on its long side. It is never finer than level 0.
    """
    longest = max(source.bounds[2:])
    if mpp is None:
        pitch = max(1.0, longest / 1024)
        return (pitch, pitch)
    factor = min(max(wanted, longest * max(mpp) / 4096), longest * max(mpp) / 512)
    return (max(1.0, factor / mpp[0]), max(1.0, factor / mpp[1]))


def read_thumbnail(path: str, pitch: tuple[float, float], max_failures: int = 32) -> Thumbnail:
    """A thumbnail from the best level, in bounded memory, that survives damaged places.

    A part that cannot be read is tried again in quarters, down to 256 source pixels, until ``max_failures`` parts have
    failed; from then on a failing part is given up whole. OpenSlide's handle is dead after an error, so it is opened
    again each time.

    Raises:
        ReadFailure: if the file cannot be opened, or no part of it can be read.
    """
    source = open_source(path)
    try:
        top, left, height, width = source.bounds
        size = (max(1, math.ceil(height / pitch[0] - 1e-6)), max(1, math.ceil(width / pitch[1] - 1e-6)))
        extent = (size[0] * pitch[0], size[1] * pitch[1])
        rgb = np.empty((*size, 3), np.uint8)
        rgb[...] = source.background
        valid = np.zeros(size, bool)
        pending = list(_blocks(source, (top, left), extent, size))[::-1]
        lost, failures, first = 0, 0, None
        while pending:
            block = pending.pop()
            try:
                rgb[block.place], valid[block.place] = _read_block(source, block, Image.Resampling.BOX)
            except ReadFailure as failure:
                first = first or failure
                failures += 1
                source.close()
                source = open_source(path)
                level = source.levels[best_level(source, min(pitch))]
                large = [block.extent[a] / level.downsample[a] > 256 and block.size[a] > 1 for a in (0, 1)]
                if failures > max_failures or not any(large):
                    lost += block.size[0] * block.size[1]
                    continue
                parts = list(block.split(0, -(-block.size[0] // 2))) if large[0] else [block]
                if large[1]:
                    parts = [piece for part in parts for piece in part.split(1, -(-part.size[1] // 2))]
                pending.extend(parts[::-1])
    finally:
        source.close()
    if first is not None and lost == size[0] * size[1]:
        raise ReadFailure(path, "read", f"it opens, but nothing on it can be read: {first.reason}", first.hint)
    return Thumbnail(rgb, valid, (top, left), pitch, lost / (size[0] * size[1]), first)


class SlideReader:
    """Reads the windows of an index.

    Args:
        size: (height, width) of what comes out.
        limit: files kept open in each process.
    """

    anywhere: ClassVar[bool] = True

    def __init__(self, size: tuple[int, int], limit: int = 8) -> None:
        self.size = size
        self.handles: HandleCache[PixelSource] = HandleCache(open_source, close_source, limit)

    def read(self, window: Window) -> ArraySample:
        """(3, height, width) uint8 RGB; ``valid`` is False outside the slide and where it was not scanned.

        Raises:
            ReadFailure: if the window cannot be read. The file is opened anew for the next one.
        """
        position, extent = (window.position[0], window.position[1]), (window.extent[0], window.extent[1])
        try:
            rgb, valid = read_region(self.handles.get(window.source), position, extent, self.size)
        except ReadFailure as failure:
            self.handles.discard(window.source)
            where = f"window at y={position[0]:.0f}, x={position[1]:.0f}: " if failure.stage == "read" else ""
            raise ReadFailure(failure.path, failure.stage, where + failure.reason, failure.hint) from failure
        values = np.ascontiguousarray(np.moveaxis(rgb, -1, 0))
        spacing = None
        if window.spacing:
            # What one output pixel measures: the field of view divided by the pixels across it.
            spacing = tuple(s * e / n for s, e, n in zip(window.spacing, extent, self.size, strict=True))
        return ArraySample(values, valid=None if valid.all() else valid[None], spacing=spacing)
