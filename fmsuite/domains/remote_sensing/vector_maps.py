"""Polygons as label maps: in any coordinate system, of any column, rasterised where they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fmsuite.core.data.sample import Array
from fmsuite.domains.remote_sensing.grids import Grid
from fmsuite.errors import ReadFailure

STAGE = "maps"
UNKNOWN = -1
_LIMITS = np.iinfo(np.int16)


@dataclass
class PolygonMap:
    """Labels of the polygons in which the middles of samples lie; of several, the last one's in the file.

    Attributes:
        shapes: shapely geometries in pixels of the raster, (x, y).
        labels: of each, int16.
        boxes: (N, 4) around each: left, top, right, bottom.
    """

    shapes: list[Any]
    labels: Array
    boxes: Array

    def at(self, start: Sequence[float], step: Sequence[float], size: Sequence[int]) -> Array:
        from affine import Affine
        from rasterio.features import rasterize

        (top, left), (bottom, right) = start, [s + n * p for s, n, p in zip(start, size, step, strict=True)]
        near = np.flatnonzero(
            (self.boxes[:, 0] < right)
            & (self.boxes[:, 2] > left)
            & (self.boxes[:, 1] < bottom)
            & (self.boxes[:, 3] > top)
        )
        if not len(near):
            return np.full(tuple(size), UNKNOWN, np.int16)
        return rasterize(  # type: ignore[no-any-return]
            [(self.shapes[n], int(self.labels[n])) for n in near],
            out_shape=tuple(size),
            fill=UNKNOWN,
            transform=Affine(step[1], 0, left, 0, step[0], top),
            dtype="int16",
        )

    def close(self) -> None:
        """Nothing is open."""


def open_polygons(
    path: str,
    grid: Grid,
    column: str | None,
    classes: Sequence[str] | None,
    ignore: Sequence[int],
    *,
    several: bool,
) -> PolygonMap:
    """
    Args:
        grid: of the raster, as ``Stack.grid``.
        classes: texts of the column, class 0 first.
        ignore: numbers that mean "not known".
        several: other rasters have files of their own, so that sorting this one's texts would number them otherwise.

    Raises:
        ReadFailure: if it cannot be read, or says nothing of the raster's ground.
    """
    import shapely
    from pyogrio import read_info
    from pyogrio.errors import DataLayerError, DataSourceError
    from pyogrio.raw import read

    try:
        known = [str(name) for name in read_info(path)["fields"]]
        if column is None or column not in known:
            said = "data.map_column does not name its column" if column is None else f"it has no column '{column}'"
            raise ReadFailure(path, STAGE, f"{said}; there are {', '.join(known) or 'none'}.", "Set data.map_column.")
        facts, _, geometries, (values,) = read(path, columns=[column])
    except (DataSourceError, DataLayerError, ValueError) as error:
        raise ReadFailure(path, STAGE, f"GDAL cannot read its polygons ({error}).") from error
    shapes = shapely.from_wkb(geometries)
    labels = _numbers(path, column, values, classes, several)
    usable = np.array([shape is not None and shape.area > 0 for shape in shapes], dtype=bool)
    usable &= ~np.isin(labels, [*ignore, UNKNOWN])
    shapes = _on_grid(path, shapes[usable], facts["crs"], grid)
    boxes = shapely.bounds(shapes).reshape(-1, 4)
    height, width = grid[:2]
    touching = (boxes[:, 0] < width) & (boxes[:, 2] > 0) & (boxes[:, 1] < height) & (boxes[:, 3] > 0)
    if not touching.any():
        raise ReadFailure(
            path,
            STAGE,
            f"none of its {len(shapes)} polygons lies on the raster.",
            "Give the labels of this raster, or correct the coordinate system that is wrong.",
        )
    return PolygonMap(list(shapes[touching]), labels[usable][touching], boxes[touching])


def _on_grid(path: str, shapes: Array, system: str | None, grid: Grid) -> Array:
    """In pixels (x, y) of the raster."""
    import shapely
    from pyproj import CRS, Transformer
    from pyproj.exceptions import ProjError

    _, _, own, transform = grid
    if system is None or own in ("", "None"):
        whose = "it" if system is None else "the raster"
        raise ReadFailure(path, STAGE, f"{whose} does not say which coordinate system it is in.", "Set one.")
    try:
        turn = Transformer.from_crs(CRS.from_user_input(system), CRS.from_user_input(own), always_xy=True)
    except ProjError as error:
        raise ReadFailure(path, STAGE, f"its coordinate system is not usable ({error}).") from error
    back = np.linalg.inv(np.array([*transform[:6], 0, 0, 1], dtype=np.float64).reshape(3, 3))

    def to_pixels(points: Array) -> Array:
        x, y = turn.transform(points[:, 0], points[:, 1])
        pixels: Array = np.stack([x, y, np.ones(len(points))], axis=1) @ back.T
        return pixels[:, :2]

    return shapely.transform(shapes, to_pixels)  # type: ignore[no-any-return]


def _numbers(path: str, column: str, values: Array, classes: Sequence[str] | None, several: bool) -> Array:
    """(N,) int16; ``UNKNOWN`` where a polygon has no value."""
    if values.dtype.kind in "iuf":
        if classes is not None:
            raise ReadFailure(path, STAGE, f"'{column}' holds numbers, which data.map_classes does not name.")
        numbers = np.where(np.isfinite(values), values, UNKNOWN)
        if (numbers != np.rint(numbers)).any() or numbers.min() < _LIMITS.min or numbers.max() > _LIMITS.max:
            raise ReadFailure(path, STAGE, f"'{column}' holds numbers that are no whole ones of 16 bits.")
        return numbers.astype(np.int16)
    texts = [None if value is None else str(value) for value in values]
    named = sorted({text for text in texts if text is not None})
    if classes is None and several:
        raise ReadFailure(
            path,
            STAGE,
            f"'{column}' holds text, and every raster has polygons of its own.",
            f"Say with data.map_classes which class has which number: {', '.join(named)}.",
        )
    order = {text: number for number, text in enumerate(named if classes is None else classes)}
    unknown = [text for text in named if text not in order]
    if unknown:
        raise ReadFailure(
            path,
            STAGE,
            f"'{column}' has '{unknown[0]}', which data.map_classes does not name.",
            f"It holds {', '.join(named)}.",
        )
    return np.array([UNKNOWN if text is None else order[text] for text in texts], dtype=np.int16)


def text_classes(path: str, column: str) -> list[str]:
    """The texts of a column, sorted; none of one that holds numbers.

    Raises:
        ReadFailure: if the file cannot be read.
    """
    from pyogrio.errors import DataLayerError, DataSourceError
    from pyogrio.raw import read

    try:
        _, _, _, (values,) = read(path, columns=[column], read_geometry=False)
    except (DataSourceError, DataLayerError, ValueError) as error:
        raise ReadFailure(path, STAGE, f"GDAL cannot read its polygons ({error}).") from error
    return [] if values.dtype.kind in "iuf" else sorted({str(value) for value in values if value is not None})
