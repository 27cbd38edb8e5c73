"""Maps of whole rasters, written box by box: straight onto the file's grid, or through the grid that was resampled."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fmsuite.core.data.sample import Array
from fmsuite.core.data.scene_maps import MapKind, SceneWriter
from fmsuite.domains.remote_sensing.cog import NO_CLASS, NO_COLOUR, TILE, CogFile, Ground
from fmsuite.domains.remote_sensing.resampling import linear_back, source_range

_MISSING = {"classes": NO_CLASS, "scores": np.nan, "picture": NO_COLOUR}


class RasterWriter(SceneWriter):
    """Writes a Cloud-optimised GeoTIFF on a raster's own grid.

    Where the input's grid is another than the raster's, what comes is kept in a file beside the map until all of it is
    there: a pixel near the border of a box needs the next box too. A pixel has no data where the sample that it lies in
    has none; others are mixed from samples with data only.

    Args:
        path: without a suffix.
        pitch: pixels a sample, along (y, x).
        size: samples of the input's grid.
    """

    def __init__(
        self, path: Path, ground: Ground, what: MapKind, pitch: tuple[float, float], size: tuple[int, int]
    ) -> None:
        self._path, self._ground, self._what, self._pitch, self._size = path, ground, what, pitch, size
        self._direct = pitch == (1.0, 1.0)
        self._file: CogFile | None = None
        self._kept: _Kept | None = None

    def add(self, start: Sequence[int], values: Array, valid: Array | None = None) -> None:
        if self._direct:
            self._write(values, valid, start)
            return
        if self._kept is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._kept = _Kept(self._path.with_name(f".{self._path.name}.grid"), len(values), self._size)
        self._kept.write(start, values, valid)

    def finish(self) -> Path:
        try:
            if self._kept is not None:
                self._convert(self._kept)
            if self._file is None:
                self._file = self._opened(1)
            return self._file.finish()
        finally:
            self.discard()

    def discard(self) -> None:
        if self._file is not None:
            self._file.discard()
        if self._kept is not None:
            self._kept.close()
        self._kept = None

    def _convert(self, kept: _Kept) -> None:
        height, width = self._ground.shape
        for top in range(0, height, TILE):
            for left in range(0, width, TILE):
                shape = min(TILE, height - top), min(TILE, width - left)
                ranges = [source_range(*box) for box in zip((top, left), shape, self._pitch, self._size, strict=True)]
                values, valid = kept.read(ranges)
                begin = [low for low, _ in ranges]
                if valid.all():
                    self._write(linear_back(values, begin, self._pitch, (top, left), shape), None, (top, left))
                    continue
                weight = linear_back(valid[None].astype(np.float32), begin, self._pitch, (top, left), shape)
                mixed = linear_back(np.where(valid, values, 0), begin, self._pitch, (top, left), shape)
                known = valid[np.ix_(*(
                    np.minimum(((first + np.arange(length) + 0.5) / pitch).astype(np.int64), size - 1) - low
                    for first, length, pitch, size, low in zip(
                        (top, left), shape, self._pitch, self._size, begin, strict=True
                    )
                ))]  # fmt: skip
                self._write(np.where(known, mixed / np.where(weight > 0, weight, 1), 0), known, (top, left))

    def _write(self, values: Array, valid: Array | None, start: Sequence[int]) -> None:
        stored = self._what.stored(values)
        if self._what.kind == "picture":
            # 0 is taken.
            stored = np.maximum(stored, 1)
        if valid is not None and not valid.all():
            stored = np.where(valid, stored, np.asarray(_MISSING[self._what.kind], dtype=stored.dtype))
        if self._file is None:
            self._file = self._opened(len(stored))
        self._file.write(stored, start[0], start[1])

    def _opened(self, bands: int) -> CogFile:
        return CogFile(self._path, self._ground, self._what, bands)


class _Kept:
    """(K, y, x) float32 and their validity in a file, of which boxes are written and read."""

    def __init__(self, path: Path, count: int, size: tuple[int, int]) -> None:
        self._size, self._count = size, count
        handle, name = tempfile.mkstemp(prefix=path.name, dir=path.parent)
        os.close(handle)
        self._path = Path(name)
        self._file = self._path.open("r+b")
        # A file of zeros that takes no room until it is written.
        self._file.truncate(4 * (count + 1) * size[0] * size[1])

    def write(self, start: Sequence[int], values: Array, valid: Array | None) -> None:
        shown = np.ones((1, *values.shape[1:]), np.float32) if valid is None else valid[None].astype(np.float32)
        rows = np.concatenate([values.astype(np.float32, copy=False), shown]).transpose(1, 0, 2)
        for row, planes in enumerate(rows, start=start[0]):
            for plane, line in enumerate(planes):
                self._file.seek(4 * ((row * (self._count + 1) + plane) * self._size[1] + start[1]))
                self._file.write(np.ascontiguousarray(line).data)

    def read(self, ranges: Sequence[tuple[int, int]]) -> tuple[Array, Array]:
        (top, bottom), (left, right) = ranges
        found = np.empty((self._count + 1, bottom - top, right - left), np.float32)
        for row in range(top, bottom):
            for plane in range(self._count + 1):
                self._file.seek(4 * ((row * (self._count + 1) + plane) * self._size[1] + left))
                found[plane, row - top] = np.frombuffer(self._file.read(4 * (right - left)), np.float32)
        return found[:-1], found[-1] > 0

    def close(self) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)
