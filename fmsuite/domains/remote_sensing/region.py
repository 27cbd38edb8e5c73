"""Which part of rasters windows are cut from."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, model_validator

from fmsuite.domains.remote_sensing.grids import Grid, matrix
from fmsuite.errors import ReadFailure

_EDGE_POINTS = 21
"""Along each side of a region that is converted to another coordinate system, in which its sides are curves."""


class RegionOptions(BaseModel):
    """The part of rasters that windows are cut from.

    Attributes:
        region: (left, bottom, right, top); windows lie wholly inside. All of each raster if not given.
        region_unit: ``map`` for coordinates of ``region_crs``, ``pixel`` for columns and rows, of which the first row
            is 0: then top is smaller than bottom.
        region_crs: the coordinate system of the region, such as EPSG:4326 (longitude, latitude); each raster's own if
            not given. The region is then the box, along pixels, around what it is in the raster's own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    region: tuple[float, float, float, float] | None = None
    region_unit: Literal["map", "pixel"] = "map"
    region_crs: str | None = None

    @model_validator(mode="after")
    def _has_a_region(self) -> RegionOptions:
        if self.region is None:
            if self.region_crs is not None or self.region_unit != "map":
                raise ValueError("region_crs and region_unit have a meaning only with a region")
            return self
        left, bottom, right, top = self.region
        if self.region_unit == "pixel":
            bottom, top = top, bottom
            if self.region_crs is not None:
                raise ValueError("region_crs has no meaning for a region in pixels")
        if not (left < right and bottom < top):
            order = "top < bottom" if self.region_unit == "pixel" else "bottom < top"
            raise ValueError(f"region {self.region} is no (left, bottom, right, top) with left < right and {order}")
        if self.region_crs is not None:
            from rasterio.crs import CRS
            from rasterio.errors import CRSError

            try:
                CRS.from_user_input(self.region_crs)
            except CRSError as error:
                raise ValueError(f"region_crs '{self.region_crs}' is no coordinate system: {error}") from error
        return self


def region_box(grid: Grid, options: RegionOptions, path: str) -> tuple[float, float, float, float]:
    """(top, left, bottom, right) in pixels of a grid: the region within the raster, or all of the raster.

    Raises:
        ReadFailure: if the region needs a coordinate system that the raster does not have, or lies beside it.
    """
    height, width = grid[0], grid[1]
    if options.region is None:
        return 0.0, 0.0, float(height), float(width)
    left, bottom, right, top = options.region
    if options.region_unit == "map":
        top, left, bottom, right = bounds_box(grid, options.region, options.region_crs, path)
    box = max(top, 0.0), max(left, 0.0), min(bottom, float(height)), min(right, float(width))
    if box[0] >= box[2] or box[1] >= box[3]:
        raise ReadFailure(path, "windows", "data.region lies beside it.", "Leave the file out, or correct the region.")
    return box


def bounds_box(
    grid: Grid, bounds: tuple[float, float, float, float], crs: str | None, path: str
) -> tuple[float, float, float, float]:
    """(top, left, bottom, right) in pixels of the box around (left, bottom, right, top) in map units.

    Raises:
        ReadFailure: if the raster has no coordinate system to convert to, or the bounds have no place in it.
    """
    _, _, system, transform = grid
    if crs is not None:
        bounds = _converted(bounds, crs, system, path)
    left, bottom, right, top = bounds
    corners = np.array([[left, right, left, right], [bottom, bottom, top, top], [1, 1, 1, 1]])
    columns, rows, _ = np.linalg.solve(matrix(transform), corners)
    # Divisions leave rounding noise at pixels' edges.
    return (
        _whole(rows.min()),
        _whole(columns.min()),
        _whole(rows.max()),
        _whole(columns.max()),
    )


def _whole(value: float) -> float:
    nearest = round(value)
    return float(nearest) if abs(value - nearest) < 1e-6 else float(value)


def _converted(
    bounds: tuple[float, float, float, float], crs: str, system: str, path: str
) -> tuple[float, float, float, float]:
    from rasterio.crs import CRS
    from rasterio.errors import CRSError, RasterioError
    from rasterio.warp import transform_bounds

    try:
        own = CRS.from_string(system)
    except CRSError:
        raise ReadFailure(
            path,
            "windows",
            "it has no coordinate system, so a region in another has no place in it.",
            "Georeference it with `gdal_edit -a_srs`, or use data.region_unit=pixel.",
        ) from None
    try:
        found = transform_bounds(CRS.from_user_input(crs), own, *bounds, densify_pts=_EDGE_POINTS)
    except (RasterioError, ValueError) as error:
        found, reason = (math.inf,) * 4, f" ({error})"
    else:
        reason = ""
    if not np.isfinite(found).all():
        raise ReadFailure(path, "windows", f"the region has no place in its coordinate system{reason}.")
    return found
