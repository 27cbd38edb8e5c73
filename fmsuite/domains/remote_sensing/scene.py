"""A whole raster on the grid of a model's input, and the way back to its file's own grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fmsuite.core.data.index import Window
from fmsuite.core.data.sample import Array, ArraySample
from fmsuite.core.data.scene import Scene
from fmsuite.core.data.scene_maps import MapKind, SceneWriter
from fmsuite.domains.remote_sensing.cog import Ground, write_cog
from fmsuite.domains.remote_sensing.eopatch import PatchDate
from fmsuite.domains.remote_sensing.map_writer import RasterWriter
from fmsuite.domains.remote_sensing.reader import RasterReader, open_date
from fmsuite.domains.remote_sensing.resampling import linear_back
from fmsuite.domains.remote_sensing.stack import Stack
from fmsuite.errors import UsageError

_WHOLE = 1e-6
_ROWS = 512
"""Rows of labels that are read at a time."""


def raster_scene(reader: RasterReader, source: str) -> RasterScene:
    """
    Raises:
        ReadFailure: if its files, or those of the first date of a series, cannot be opened.
    """
    stack = open_date(reader.files_of(source)[0][1], reader.options)
    try:
        return RasterScene(source, reader, ground_of(stack), stack.metres, reader.options.gsd)
    finally:
        stack.close()


def ground_of(stack: Stack | PatchDate) -> Ground:
    points, crs = stack.grid_of.dataset.gcps if isinstance(stack, Stack) else ((), None)
    gcps = (points, crs) if points and stack.transform.is_identity else None
    return Ground((stack.height, stack.width), stack.crs, stack.transform, gcps)


class RasterScene(Scene):
    """A raster, or a series of them: as it is stored, or resampled to ``data.gsd`` from its first corner on.

    Its axes are (y, x). Dates are no axis of a scene: a box of a series is read with all of them, (C, time, y, x). The
    last row and column of a resampled grid are those that lie within the raster.

    Args:
        source: the raster, or the first file of a series.
        reader: of the index.
        ground: the file's grid.
        metres: size of its pixels along (y, x), or ``None`` where that is not known.
        gsd: metres of a sample, or ``None`` to keep the pixels.
    """

    def __init__(
        self, source: str, reader: RasterReader, ground: Ground, metres: tuple[float, float] | None, gsd: float | None
    ) -> None:
        self.source = source
        self.ground = ground
        self.pitch: tuple[float, float] = (1.0, 1.0)
        if gsd is not None and metres is not None:
            self.pitch = (gsd / metres[0], gsd / metres[1])
        self.origin: tuple[float, float] = (0.0, 0.0)
        self.native_size: tuple[int, int] = ground.shape
        self.size: tuple[int, int] = (
            max(1, int(ground.shape[0] / self.pitch[0] + _WHOLE)),
            max(1, int(ground.shape[1] / self.pitch[1] + _WHOLE)),
        )
        self.native_spacing: tuple[float, float] = metres or (1.0, 1.0)
        self._spacing = metres or ()
        self._reader = reader

    def read(self, start: Sequence[int], extent: Sequence[int]) -> ArraySample:
        """(C, y, x), or (C, time, y, x) of a series.

        Raises:
            ValueError: for a box that is empty or reaches out of the scene.
            ReadFailure: if it cannot be decoded.
        """
        box = np.asarray(start), np.asarray(extent)
        if box[0].shape != (2,) or (box[0] < 0).any() or (box[1] < 1).any() or (box[0] + box[1] > self.size).any():
            raise ValueError(f"a box at {tuple(start)} of {tuple(extent)} in a scene of {self.size}")
        position, length = self.place(box[0]), box[1] * np.asarray(self.pitch)
        return self._reader.read(Window(self.source, "", tuple(position), tuple(length), self._spacing))

    def native_map(self, name: str) -> Array:
        """(height, width) int16, on the raster's own pixels; -1 where the raster has no data."""
        return self.native_map_part(name, (0, 0), self.native_size)

    def native_map_part(self, name: str, start: Sequence[int], extent: Sequence[int]) -> Array:
        known = self._reader.options.maps
        if name not in known:
            raise UsageError(
                f"There is no label map '{name}'; data.maps names {', '.join(known) or 'none'}.",
                "Name it in data.maps.",
            )
        found = np.empty(tuple(extent), np.int16)
        for row in range(0, extent[0], _ROWS):
            rows = min(_ROWS, extent[0] - row)
            found[row : row + rows] = self._reader.native_labels(
                name, self.source, (start[0] + row, start[1]), (rows, extent[1])
            )
        return found

    def scores_to_native(self, scores: Array, outside: float = 0.0) -> Array:
        """A pixel gets what linear interpolation gives at its centre; where nothing is resampled, the same bits. All of
        a raster is shown, so there is no outside.

        Raises:
            ValueError: if the scores are not on this scene's grid.
        """
        if scores.ndim != 3 or scores.shape[1:] != self.size:
            raise ValueError(f"scores of shape {scores.shape} for a scene of {self.size}")
        return linear_back(scores, (0, 0), self.pitch, (0, 0), self.native_size)

    def native_box(self, start: Sequence[int], extent: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        low, high = [], []
        for s, n, pitch, whole, size in zip(start, extent, self.pitch, self.native_size, self.size, strict=True):
            low.append(min(math.ceil(s * pitch - 0.5 - _WHOLE), whole - 1))
            # What is left of a pixel behind the last sample belongs to it.
            end = whole if s + n == size else math.ceil((s + n) * pitch - 0.5 - _WHOLE)
            high.append(min(max(end, low[-1] + 1), whole))
        return tuple(low), tuple(h - b for h, b in zip(high, low, strict=True))

    def part_to_native(
        self,
        scores: Array,
        start: Sequence[int],
        native_start: Sequence[int],
        native_extent: Sequence[int],
        outside: float = 0.0,
    ) -> Array:
        return linear_back(scores, start, self.pitch, native_start, native_extent)

    def locate(self, place: Sequence[int]) -> tuple[float, ...]:
        """A raster is shown whole; in the rest of a pixel that is left at its far sides, the last sample's place."""
        at = (np.asarray(place) + 0.5) / self.pitch - 0.5
        return tuple(float(value) for value in at.clip(0, np.asarray(self.size) - 1))

    def from_file(self, place: Sequence[int]) -> tuple[int, ...]:
        """
        Args:
            place: (x, y), that is column and row.
        """
        if len(place) != 2:
            raise UsageError(f"A pixel of a raster has two numbers, not {len(place)}.", "Give X,Y: column and row.")
        return place[1], place[0]

    def from_world(self, place: Sequence[float]) -> tuple[int, ...]:
        """The pixel (row, column) that holds a point (x, y) of the raster's own coordinate system: eastings and
        northings, or longitude and latitude.

        Raises:
            UsageError: unless two numbers are given, or if the raster has no place on Earth.
        """
        if len(place) != 2:
            raise UsageError(f"A point of a raster has two coordinates, not {len(place)}.", "Give X,Y.")
        if self.ground.transform.is_identity:
            raise UsageError(f"{self.source}: has no world coordinates.", "Name pixels of the file, without --world.")
        back, (x, y) = ~self.ground.transform, place
        return math.floor(back.d * x + back.e * y + back.f), math.floor(back.a * x + back.b * y + back.c)

    def write(self, values: Array, path: Path) -> Path:
        """A Cloud-optimised GeoTIFF: whole numbers of 8 bits as classes, others as scores in float32, NaN where there
        are none.

        Raises:
            ValueError: if the values are not on the file's grid.
        """
        if values.shape[-2:] != self.native_size or values.ndim not in (2, 3):
            raise ValueError(f"values of shape {values.shape} for a file of {self.native_size}")
        return write_cog(path, values if values.ndim == 3 else values[None], self.ground)

    def writer(self, path: Path, what: MapKind) -> SceneWriter:
        """Of a Cloud-optimised GeoTIFF; memory does not depend on its size."""
        return RasterWriter(path, self.ground, what, self.pitch, self.size)

    def coarse_writer(self, path: Path, what: MapKind, step: Sequence[int]) -> SceneWriter:
        """Of a Cloud-optimised GeoTIFF whose pixels are as many samples wide and high."""
        size = -(-self.size[0] // step[0]), -(-self.size[1] // step[1])
        down, across = self.pitch[0] * step[0], self.pitch[1] * step[1]
        fine = self.ground.transform
        coarse = type(fine)(fine.a * across, fine.b * down, fine.c, fine.d * across, fine.e * down, fine.f)
        return RasterWriter(path, Ground(size, self.ground.crs, coarse), what, (1.0, 1.0), size)

    def close(self) -> None:
        self._reader.close()
