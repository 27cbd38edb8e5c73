"""Any window of a raster, for notebooks: in pixels or in map units."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np

from fmsuite.core.config import validate
from fmsuite.core.data.index import Window
from fmsuite.core.inputs import Quantification
from fmsuite.domains.remote_sensing.grids import matrix
from fmsuite.domains.remote_sensing.options import RemoteSensingOptions
from fmsuite.domains.remote_sensing.reader import RasterReader
from fmsuite.domains.remote_sensing.region import bounds_box
from fmsuite.domains.remote_sensing.stack import open_stack
from fmsuite.errors import ReadFailure, UsageError

if TYPE_CHECKING:
    from affine import Affine

_EDGE = 1e-6


@dataclass(frozen=True)
class Patch:
    """A window of a raster.

    Attributes:
        values: (C, height, width) as stored, 0 where invalid.
        valid: bool, of the same shape.
        bands: their names.
        quantifications: of each band, from stored to physical values.
        transform: from (column, row) of the patch to map coordinates.
        crs: rasterio's CRS, or ``None``.
        metres: size of a pixel of the patch along (y, x); ``None`` where that is not known.
    """

    values: np.ndarray
    valid: np.ndarray
    bands: tuple[str, ...]
    quantifications: tuple[Quantification, ...]
    transform: Affine
    crs: Any
    metres: tuple[float, float] | None

    @property
    def physical(self) -> np.ndarray:
        """(C, height, width) float32: reflectance, decibels, kelvins; NaN where invalid, not clipped."""
        scale, offset = (
            np.array(column, dtype=np.float64)[:, None, None]
            for column in zip(*((q.scale, q.offset) for q in self.quantifications), strict=True)
        )
        return np.where(self.valid, offset + scale * self.values, np.nan).astype(np.float32)


def read_raster(
    path: str | PathLike | Sequence[str | PathLike],
    *,
    bounds: tuple[float, float, float, float] | None = None,
    crs: str | None = None,
    pixels: tuple[int, int, int, int] | None = None,
    bands: Sequence[str] | None = None,
    gsd: float | None = None,
    **options: Any,
) -> Patch:
    """A window of a raster, or all of it, as the suite's readers see it: masks, nodata, tags, several files.

    Args:
        path: a file, or the files of one scene.
        bounds: (left, bottom, right, top) in map units; without ``gsd``, every pixel that they touch is read.
        crs: of the bounds; the raster's own if not given.
        pixels: (row, column, height, width) instead. What lies outside of the raster is invalid.
        bands: in this order; all if not given.
        gsd: metres a pixel, to which the window is resampled.
        options: further ones of the ``data:`` section, such as ``sensor`` and ``palette``.

    Raises:
        UsageError: for wrong options, or a window beside the raster.
        ReadFailure: if a file cannot be read, or has no such band (the message names those that it has).
    """
    if bounds is not None and pixels is not None:
        raise UsageError("read_raster: both bounds and pixels.", "Give one of them.")
    if crs is not None and bounds is None:
        raise UsageError("read_raster: a crs without bounds.", "It is the coordinate system of the bounds.")
    given = [path] if isinstance(path, str | PathLike) else list(path)
    settings = validate(RemoteSensingOptions, {**options, "gsd": gsd}, "data", "read_raster")
    paths = tuple(str(each) for each in given)
    stack = open_stack(paths, settings)
    try:
        names = tuple(stack.bands) if bands is None else tuple(bands)
        if gsd is not None and stack.metres is None:
            raise ReadFailure(paths[0], "metadata", "it has no place on Earth, so its pixels have no known size.")
        top, left, height, width = _box(stack.grid, bounds, crs, pixels, gsd is None, paths[0])
        if min(top + height, stack.height) <= max(top, 0) or min(left + width, stack.width) <= max(left, 0):
            raise UsageError(f"{paths[0]}: the window lies beside it.", f"It has {stack.height}x{stack.width} pixels.")
        if gsd is None or stack.metres is None:
            values, valid = stack.read(names, round(top), round(left), round(height), round(width))
        else:
            # Whole samples: the last ones may reach a little beyond the bounds, or end before.
            height, width = (
                max(1, round(length * side / gsd)) * gsd / side
                for length, side in zip((height, width), stack.metres, strict=True)
            )
            reader = RasterReader(settings, names, "float32", files={paths[0]: ((None, paths),)})
            sample = reader.read(Window(paths[0], "", (top, left), (height, width), stack.metres))
            reader.close()
            assert sample.valid is not None
            values, valid = sample.values, sample.valid
        steps = height / values.shape[1], width / values.shape[2]
        return Patch(
            values,
            valid,
            names,
            tuple(settings.quantification_of_channel(name) for name in names),
            _moved(stack.transform, (top, left), steps),
            stack.crs,
            None if stack.metres is None else (stack.metres[0] * steps[0], stack.metres[1] * steps[1]),
        )
    finally:
        stack.close()


def _box(
    grid: tuple[Any, ...],
    bounds: tuple[float, float, float, float] | None,
    crs: str | None,
    pixels: tuple[int, int, int, int] | None,
    whole: bool,
    path: str,
) -> tuple[float, float, float, float]:
    """(top, left, height, width) in pixels."""
    if pixels is not None:
        if pixels[2] < 1 or pixels[3] < 1:
            raise UsageError(f"read_raster: pixels {pixels}.", "Give row, column, height and width.")
        return pixels
    if bounds is None:
        return 0, 0, grid[0], grid[1]
    top, left, bottom, right = bounds_box(grid, bounds, crs, path)
    if whole:
        top, left = math.floor(top + _EDGE), math.floor(left + _EDGE)
        bottom, right = math.ceil(bottom - _EDGE), math.ceil(right - _EDGE)
    return top, left, bottom - top, right - left


def _moved(transform: Affine, corner: tuple[float, float], step: tuple[float, float]) -> Affine:
    from rasterio.transform import Affine

    inside = np.array([[step[1], 0, corner[1]], [0, step[0], corner[0]], [0, 0, 1]])
    return Affine(*(matrix(transform[:6]) @ inside)[:2].ravel())
