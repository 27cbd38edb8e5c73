"""Label maps of rasters: a raster in the same coordinate system, or polygons in any, read at any place."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fmsuite.core.data.handles import HandleCache
from fmsuite.core.data.sample import Array
from fmsuite.domains.remote_sensing.eopatch_maps import open_array_map
from fmsuite.domains.remote_sensing.grids import Grid
from fmsuite.domains.remote_sensing.names import layer_of
from fmsuite.domains.remote_sensing.options import RemoteSensingOptions
from fmsuite.domains.remote_sensing.raster import reason_of
from fmsuite.domains.remote_sensing.vector_maps import open_polygons, text_classes
from fmsuite.errors import ReadFailure
from fmsuite.tiling.templates import is_template

STAGE = "maps"
"""Of a source whose label map cannot be used."""
VECTORS = (".shp", ".geojson", ".json", ".gpkg", ".fgb", ".kml", ".gml", ".parquet")
UNKNOWN = -1
_LIMITS = np.iinfo(np.int16)
_AT_ONCE = 16


class OpenMap(Protocol):
    def at(self, start: Sequence[float], step: Sequence[float], size: Sequence[int]) -> Array:
        """(*size) int16 labels at the middles of samples, ``UNKNOWN`` where there is none.

        Args:
            start, step: in pixels of the raster along (y, x): where the first sample begins, and how long one is.

        Raises:
            ReadFailure: if it cannot be decoded, or holds anything but whole numbers of 16 bits.
        """
        ...

    def close(self) -> None: ...


class MapReader:
    """The label maps of the options.

    Args:
        options: of the index.
    """

    def __init__(self, options: RemoteSensingOptions) -> None:
        self._options = options
        self._open: HandleCache[OpenMap] = HandleCache(partial(_open, options=options), _close, _AT_ONCE)

    def read(
        self, source: str, grid: Grid, start: Sequence[float], step: Sequence[float], size: Sequence[int]
    ) -> dict[str, Array]:
        """By name; see ``OpenMap.at``.

        Args:
            grid: of the source, as ``Stack.grid``.

        Raises:
            ReadFailure: about the source, if a map is missing or cannot be used.
        """
        return {name: self.read_one(name, source, grid, start, step, size) for name in self._options.maps}

    def read_one(
        self, name: str, source: str, grid: Grid, start: Sequence[float], step: Sequence[float], size: Sequence[int]
    ) -> Array:
        key = (name, source, grid)
        try:
            return self._open.get(key).at(start, step, size)
        except ReadFailure as failure:
            self._open.discard(key)
            path = map_path(source, self._options.maps[name], self._options)
            raise ReadFailure(
                source, STAGE, f"its map '{name}', {path}, is not usable: {failure.reason}", failure.hint
            ) from failure

    def check(self, source: str, grid: Grid) -> None:
        """
        Raises:
            ReadFailure: about the source, if a map is missing, or lies elsewhere.
        """
        self.read(source, grid, (0.0, 0.0), (1.0, 1.0), (1, 1))

    def close(self) -> None:
        self._open.close()


def map_path(source: str, template: str, options: RemoteSensingOptions) -> str:
    """Where the map of a source lies."""
    folder, name = os.path.split(source)
    if not is_template(template):
        return os.path.join(template, name) if Path(template).is_dir() else template
    stem = Path(name).stem
    fields = {"name": name, "stem": stem, "folder": folder}
    if "{place}" in template:
        fields["place"] = _place(source, stem, options)
    return os.path.normpath(template.format(**fields))


def class_texts(options: RemoteSensingOptions) -> dict[str, list[str]]:
    """Of the maps whose column holds text, what the classes are called, class 0 first."""
    found = {name: list(classes) for name, classes in options.map_classes.items()}
    for name, column in options.map_column.items():
        if name not in found and not is_template(options.maps[name]):
            texts = text_classes(options.maps[name], column)
            found |= {name: texts} if texts else {}
    return found


def _place(source: str, stem: str, options: RemoteSensingOptions) -> str:
    if options.place_pattern is not None:
        found = re.search(options.place_pattern, posixpath.basename(source))
        if found is None:
            raise ReadFailure(source, STAGE, "data.place_pattern is not found in its name.", "Correct the pattern.")
        return found[1] if found.re.groups else found[0]
    _, match = layer_of(source, options)
    if match is None:
        return stem
    return (match.string[: match.start()] + match.string[match.end() :]).rpartition(".")[0].strip("_-. ")


def _open(key: tuple[str, str, Grid], options: RemoteSensingOptions) -> OpenMap:
    name, source, grid = key
    path = map_path(source, options.maps[name], options)
    if not Path(path).exists():
        raise ReadFailure(path, STAGE, "there is no such file.", "Correct data.maps, or leave the raster out.")
    ignore = options.map_ignore.get(name, ())
    if Path(path).suffix.lower() == ".npy":
        return open_array_map(path, (grid[0], grid[1]), ignore, UNKNOWN, STAGE)
    if Path(path).suffix.lower() in VECTORS:
        several = is_template(options.maps[name])
        return open_polygons(
            path, grid, options.map_column.get(name), options.map_classes.get(name), ignore, several=several
        )
    if name in options.map_column:
        raise ReadFailure(
            path, STAGE, f"data.map_column.{name} is for polygons, and this is none of {', '.join(VECTORS)}."
        )
    return _open_raster(path, grid, ignore)


def _close(opened: OpenMap) -> None:
    opened.close()


@dataclass
class RasterMap:
    """Labels from a raster of any pixel size: those of the pixel in which the middle of a sample lies.

    Attributes:
        to_map: from (column, row) of the raster to that of the map.
        ignore: values that are not known.
    """

    path: str
    dataset: Any
    to_map: Any
    ignore: tuple[float, ...]

    def at(self, start: Sequence[float], step: Sequence[float], size: Sequence[int]) -> Array:
        y, x = (s + (np.arange(n) + 0.5) * p for s, p, n in zip(start, step, size, strict=True))
        go = self.to_map
        columns = np.floor(go.a * x[None] + go.b * y[:, None] + go.c + _ROUNDING).astype(np.int64)
        rows = np.floor(go.d * x[None] + go.e * y[:, None] + go.f + _ROUNDING).astype(np.int64)
        inside = (rows >= 0) & (rows < self.dataset.height) & (columns >= 0) & (columns < self.dataset.width)
        found = np.full(tuple(size), UNKNOWN, np.int16)
        if not inside.any():
            return found
        top, left = int(rows[inside].min()), int(columns[inside].min())
        bottom, right = int(rows[inside].max()) + 1, int(columns[inside].max()) + 1
        labels = self._labels(top, left, bottom - top, right - left)
        found[inside] = labels[rows[inside] - top, columns[inside] - left]
        return found

    def _labels(self, top: int, left: int, height: int, width: int) -> Array:
        from rasterio.errors import RasterioError
        from rasterio.windows import Window

        try:
            values = self.dataset.read(1, window=Window(left, top, width, height))
        except (RasterioError, OSError, ValueError) as error:
            raise ReadFailure(self.path, STAGE, f"it cannot be decoded ({reason_of(error)}).") from error
        known = np.isfinite(values) & ~np.isin(values, self.ignore)
        labels = np.where(known, values, UNKNOWN)
        if (labels != np.rint(labels)).any():
            raise ReadFailure(
                self.path, STAGE, "it holds numbers that are not whole.", "Give label maps, not images or scores."
            )
        if labels.min() < _LIMITS.min or labels.max() > _LIMITS.max:
            raise ReadFailure(
                self.path,
                STAGE,
                f"it has labels from {labels.min():.0f} to {labels.max():.0f}.",
                f"Renumber them within {_LIMITS.min} to {_LIMITS.max}.",
            )
        return labels.astype(np.int16)

    def close(self) -> None:
        self.dataset.close()


_ROUNDING = 1e-6
"""Of a pixel: headers round their transforms."""


def _open_raster(path: str, grid: Grid, ignore: Sequence[int]) -> RasterMap:
    """
    Raises:
        ReadFailure: if it is no raster, is in another coordinate system, or lies elsewhere.
    """
    import rasterio
    from affine import Affine
    from rasterio.crs import CRS
    from rasterio.errors import RasterioError

    height, width, system, transform = grid
    try:
        dataset = rasterio.open(path)
    except (RasterioError, OSError, ValueError) as error:
        raise ReadFailure(path, STAGE, f"not a raster that GDAL can open ({reason_of(error)}).") from error
    try:
        mine = None if system in ("", "None") else CRS.from_string(system)
        if mine != (dataset.crs or None):
            raise ReadFailure(
                path,
                STAGE,
                f"it is in another coordinate system ({dataset.crs or 'none'}) than the raster ({mine or 'none'}).",
                "Warp it onto the raster with `gdalwarp -r near -te -tr -t_srs`.",
            )
        if not mine and (dataset.height, dataset.width) != (height, width):
            raise ReadFailure(
                path,
                STAGE,
                f"it has {dataset.height}x{dataset.width} pixels and the raster {height}x{width}, and neither says "
                "where it lies.",
            )
        ignored = [float(value) for value in ignore]
        ignored += [] if dataset.nodata is None else [float(dataset.nodata)]
        found = RasterMap(path, dataset, _product(~dataset.transform, Affine(*transform)), tuple(ignored))
        if not _touches(found, height, width):
            raise ReadFailure(path, STAGE, "it lies outside of the raster.", "Give the map of this raster.")
        return found
    except BaseException:
        dataset.close()
        raise


def _product(one: Any, other: Any) -> Any:
    return type(one)(
        one.a * other.a + one.b * other.d,
        one.a * other.b + one.b * other.e,
        one.a * other.c + one.b * other.f + one.c,
        one.d * other.a + one.e * other.d,
        one.d * other.b + one.e * other.e,
        one.d * other.c + one.e * other.f + one.f,
    )


def _touches(found: RasterMap, height: int, width: int) -> bool:
    """Whether the boxes around both, on the map's grid, have a part in common."""
    go = found.to_map
    corners = [(0, 0), (width, 0), (0, height), (width, height)]
    across = [go.a * x + go.b * y + go.c for x, y in corners]
    down = [go.d * x + go.e * y + go.f for x, y in corners]
    return min(across) < found.dataset.width and max(across) > 0 and min(down) < found.dataset.height and max(down) > 0
