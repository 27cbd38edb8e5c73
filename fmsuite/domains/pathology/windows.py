"""From files to index rows: what can be read, where its tissue is, and which windows are worth looking at."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fmsuite.core.data.skipped import Skipped
from fmsuite.core.seeding import generator
from fmsuite.domains.pathology.options import PathologyOptions
from fmsuite.domains.pathology.reading import Thumbnail, read_region, read_thumbnail, thumbnail_pitch
from fmsuite.domains.pathology.slides import PixelSource, open_source, true_mpp
from fmsuite.domains.pathology.tiff import TiffSource
from fmsuite.domains.pathology.tiles import ImageSource, tile_windows
from fmsuite.errors import ReadFailure
from fmsuite.tiling.grid import box_shares, window_grid
from fmsuite.tiling.tasks import SourceFacts, SourceRows, SourceTask
from fmsuite.tiling.tissue import TissueMask, find_tissue

SOURCE_FACTS_LIMIT = 10_000
"""Facts of each source go into the index's metadata up to so many sources."""
CHOSEN = "chosen"
"""The details of a file that stands for all files of its slide."""


@dataclass(frozen=True)
class SlideTissue:
    """A slide's thumbnail with its tissue.

    Attributes:
        thumbnail: the picture.
        tissue: the mask on it.
        mpp: (y, x) um per level-0 pixel.
    """

    thumbnail: Thumbnail
    tissue: TissueMask
    mpp: tuple[float, float]


def look_at_slide(source: PixelSource, options: PathologyOptions) -> SlideTissue:
    """Read a slide's thumbnail and find its tissue. The source itself is not read from.

    Raises:
        ReadFailure: if its resolution is unknown or implausible, or nothing on it can be read.
    """
    mpp = true_mpp(source, options.mpp_override)
    pitch = thumbnail_pitch(source, mpp, options.thumbnail_mpp)
    thumbnail = read_thumbnail(source.path, pitch)
    tissue = find_tissue(thumbnail.rgb, (pitch[0] * mpp[0], pitch[1] * mpp[1]), thumbnail.valid, options.tissue)
    return SlideTissue(thumbnail, tissue, mpp)


def index_source(task: SourceTask, options: PathologyOptions) -> SourceRows:
    """The windows of a slide or a tile image. A file of which others hold parts (a DICOM series) has none before it has
    been chosen among them: any one of them opens the whole slide.

    Raises:
        ReadFailure: if it cannot be used: naming the reason and the way out.
    """
    source = open_source(task.path)
    try:
        if source.identity and task.details != CHOSEN:
            return SourceRows(None, {"identity": [source.identity, os.path.dirname(task.path)]})
        small = max(source.levels[0].shape) <= options.largest_tile
        if isinstance(source, ImageSource) or (isinstance(source, TiffSource) and len(source.levels) == 1 and small):
            return _image_rows(source, task, options)
        return _slide_rows(source, task, options)
    finally:
        source.close()


def choose_files(found: Sequence[SourceFacts]) -> list[SourceTask] | None:
    """One file of each slide, the first; ``None`` if every file is a slide of its own."""
    tasks: list[SourceTask] = []
    seen: set[tuple[str, ...]] = set()
    for each in found:
        identity = tuple(each.facts.get("identity", ()))
        if not identity:
            tasks.append(each.task)
        elif identity not in seen:
            seen.add(identity)
            tasks.append(replace(each.task, details=CHOSEN))
    return tasks if seen else None


def _slide_rows(source: PixelSource, task: SourceTask, options: PathologyOptions) -> SourceRows:
    """Places that cannot be read are left out and noted."""
    path = task.path
    mpp = true_mpp(source, options.mpp_override)
    coarse = max(mpp) / options.mpp
    if coarse > options.max_upsampling:
        raise ReadFailure(
            path,
            "metadata",
            f"scanned at {max(mpp):.4g} um per pixel, {coarse:.3g} times coarser than the asked {options.mpp:g}.",
            "Ask for a coarser mpp, or raise max_upsampling.",
        )
    look = look_at_slide(source, options)
    if look.thumbnail.failure is None:
        return _slide_windows(source, look, task, options)
    note = Skipped(
        path,
        "tissue",
        f"{look.thumbnail.unreadable:.1%} of the slide cannot be read and is left out: {look.thumbnail.failure.reason}",
    )
    try:
        return replace(_slide_windows(source, look, task, options), notes=(note,))
    except ReadFailure as failure:
        return SourceRows.unused(note, Skipped.of(failure))


def _slide_windows(source: PixelSource, look: SlideTissue, task: SourceTask, options: PathologyOptions) -> SourceRows:
    path, mpp = task.path, look.mpp
    if not look.tissue:
        raise ReadFailure(path, "tissue", look.tissue.reason)
    extent = (options.size * options.mpp / mpp[0], options.size * options.mpp / mpp[1])
    stride = (options.step * options.mpp / mpp[0], options.step * options.mpp / mpp[1])
    top, left, height, width = source.bounds
    positions = window_grid((height, width), extent, stride, origin=(top, left), edges=options.edges)
    if not len(positions):
        raise ReadFailure(
            path,
            "tissue",
            f"{height:.0f} x {width:.0f} pixels hold no window of {extent[0]:.0f} x {extent[1]:.0f}.",
            "Set edges=cover to let windows reach beyond the slide, or ask for a smaller size or finer mpp.",
        )
    pitch = np.asarray(look.thumbnail.pitch)
    content = box_shares(look.tissue.mask, (positions - look.thumbnail.origin) / pitch, np.asarray(extent) / pitch)
    enough = (content >= options.min_tissue) & (content > 0)
    if not enough.any():
        raise ReadFailure(
            path,
            "tissue",
            f"tissue covers {look.tissue.shares['tissue']:.1%} of the slide, but no window holds "
            f"{options.min_tissue:.0%} of it; the fullest holds {content.max():.1%}.",
            "Lower min_tissue, or ask for smaller windows.",
        )
    positions, content = positions[enough], content[enough]
    chosen = choose(len(positions), options.max_windows, options.seed, task.name)
    positions, content = positions[chosen], content[chosen]
    probe(path, positions, extent, options.size)
    facts = {
        "kind": "slide",
        "mpp": [round(value, 6) for value in mpp],
        "vendor": source.vendor,
        "levels": len(source.levels),
        "shape": list(source.levels[0].shape),
        "slide": task.name,
    }
    return SourceRows(task.rows(positions, extent, mpp, content), facts)


def _image_rows(source: PixelSource, task: SourceTask, options: PathologyOptions) -> SourceRows:
    """All windows, since whoever cut the image out has already chosen."""
    mpp = None
    if options.mpp_override is not None or source.mpp is not None:
        mpp = true_mpp(source, options.mpp_override)
    shape = source.levels[0].shape
    scale = None if mpp is None else options.mpp / max(mpp)
    positions, extent = tile_windows(shape, options.size, options.step, scale)
    chosen = choose(len(positions), options.max_windows, options.seed, task.name)
    folder = task.name.rpartition("/")[0] or os.path.basename(os.path.dirname(task.path))
    rows = task.rows(positions[chosen], extent, mpp or (), group=task.known.group or folder)
    facts = {"kind": "image", "mpp": None if mpp is None else list(mpp), "shape": list(shape)}
    return SourceRows(rows, facts)


def choose(count: int, limit: int | None, seed: int, group: str) -> np.ndarray:
    """Which of ``count`` windows to keep: ascending, the same for the same seed and slide."""
    if limit is None or count <= limit:
        return np.arange(count)
    return np.sort(generator(seed, "windows", group).choice(count, limit, replace=False))


def probe(path: str, positions: np.ndarray, extent: tuple[float, float], size: int) -> None:
    """Read a few windows at the resolution they will be used at: thumbnails come from another level.

    Raises:
        ReadFailure: if none of them can be read.
    """
    places = dict.fromkeys((0, len(positions) // 2, len(positions) - 1))
    failures: list[ReadFailure] = []
    for place in places:
        source = open_source(path)
        try:
            read_region(source, (float(positions[place][0]), float(positions[place][1])), extent, (size, size))
            return
        except ReadFailure as failure:
            failures.append(failure)
        finally:
            source.close()
    raise ReadFailure(path, "read", f"it opens, but its windows cannot be read: {failures[0].reason}", failures[0].hint)
