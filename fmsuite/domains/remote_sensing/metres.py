"""How large a pixel is on the ground."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any


def metres_per_pixel(crs: Any, transform: Any, height: int, width: int) -> tuple[float, float] | None:
    """The size of the raster's middle pixel on the ground along (y, x), in metres.

    Geographic coordinates are converted with the radii of curvature of the CRS's own ellipsoid at that latitude:
    north-south by the meridian's ``M = a (1 - e^2) / (1 - e^2 sin^2 phi)^(3/2)``, east-west by the parallel's
    ``N cos phi = a cos phi / (1 - e^2 sin^2 phi)^(1/2)`` (Snyder 1987, "Map Projections: A Working Manual", equations
    4-18 to 4-21). Projected coordinates count at their nominal size, as a grid's users do, unless the projection
    inflates areas by more than 1 % there (Web Mercator away from the equator); both sides then shrink by the root of
    that factor.

    Args:
        crs: rasterio's CRS, or ``None``.
        transform: pixel to CRS coordinates, possibly rotated.

    Returns:
        ``None`` if there is no CRS, no transform, or one without metres (a local engineering system).
    """
    if crs is None or transform.is_identity:
        return None
    from pyproj.exceptions import ProjError

    try:
        system = _system(crs.to_wkt())
        ellipsoid = system.ellipsoid
        unit = system.axis_info[0].unit_conversion_factor if system.axis_info else 1.0
    except ProjError:
        return None
    x = transform.a * width / 2 + transform.b * height / 2 + transform.c
    y = transform.d * width / 2 + transform.e * height / 2 + transform.f
    if system.is_geographic:
        if ellipsoid is None:
            return None
        squared = 1 - (ellipsoid.semi_minor_metre / ellipsoid.semi_major_metre) ** 2
        latitude = y * unit
        bend = 1 - squared * math.sin(latitude) ** 2
        north = ellipsoid.semi_major_metre * (1 - squared) / bend**1.5 * unit
        east = ellipsoid.semi_major_metre / math.sqrt(bend) * math.cos(latitude) * unit
    elif system.is_projected:
        north = east = unit / math.sqrt(area_inflation(system, x, y))
    else:
        return None
    along_x = math.hypot(transform.a * east, transform.d * north)
    along_y = math.hypot(transform.b * east, transform.e * north)
    if not (math.isfinite(along_x) and math.isfinite(along_y) and along_x > 0 and along_y > 0):
        return None
    return along_y, along_x


@lru_cache(maxsize=256)
def _system(wkt: str) -> Any:
    import pyproj

    return pyproj.CRS.from_wkt(wkt)


def area_inflation(system: Any, x: float, y: float) -> float:
    """Areal scale of a projection at a point; 1 where it is within 1 % or cannot be told."""
    import pyproj
    from pyproj.exceptions import ProjError

    try:
        projection = pyproj.Proj(system)
        longitude, latitude = projection(x, y, inverse=True)
        factor = float(projection.get_factors(longitude, latitude).areal_scale)
    except ProjError:
        return 1.0
    return factor if math.isfinite(factor) and factor > 0 and abs(factor - 1) > 0.01 else 1.0
