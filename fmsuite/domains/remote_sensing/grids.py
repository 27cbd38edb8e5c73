"""Whether pixels of one raster coincide with those of another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

Grid = tuple[Any, ...]
"""(height, width, CRS as text, six numbers of the transform), as ``Raster.grid``."""

TOLERANCE = 0.01
"""Corners may lie so many pixels apart, and pixels still coincide."""


def pixel_ratio(fine: Grid, coarse: Grid) -> tuple[int, int] | None:
    """How many pixels of the fine grid one of the coarse measures along (y, x), where the grids have the same corner
    and extent and these are whole numbers; otherwise ``None``. Grids are as ``Raster.grid``."""
    height, width, system, fine_transform = fine
    rows, columns, other_system, coarse_transform = coarse
    if system != other_system and not _same_system(system, other_system):
        return None
    if (height, width, fine_transform) == (rows, columns, coarse_transform):
        return 1, 1
    to_fine = np.linalg.solve(matrix(fine_transform), matrix(coarse_transform))
    down, across = max(1, round(to_fine[1, 1])), max(1, round(to_fine[0, 0]))
    # Where the extent is no multiple, the coarse grid's last pixels reach beyond it or are left out.
    if not (abs(rows * down - height) < down and abs(columns * across - width) < across):
        return None
    for column, row in ((0, 0), (columns, 0), (0, rows), (columns, rows)):
        x, y, _ = to_fine @ (column, row, 1)
        if math.hypot(x - column * across, y - row * down) > TOLERANCE:
            return None
    return down, across


def crs_text(crs: Any) -> str:
    """A rasterio CRS as the shortest text that means it; ``"None"`` for none."""
    return "None" if crs is None else _shortest(crs.to_wkt())


@lru_cache(maxsize=256)
def _shortest(wkt: str) -> str:
    # To find a code among thousands takes a fifth of a second.
    from rasterio.crs import CRS

    return str(CRS.from_wkt(wkt).to_string())


def matrix(transform: Sequence[float]) -> np.ndarray:
    """(3, 3), from (column, row, 1) to map coordinates."""
    return np.array([*transform, 0, 0, 1], dtype=np.float64).reshape(3, 3)


def misfit(path: str, grid: Grid, other: Grid) -> str:
    """Says that the second grid does not go with the first, which is that of ``path``, and how to warp onto it."""
    height, width, system, (a, _, left, _, e, top) = grid[0], grid[1], grid[2], grid[3]
    box = " ".join(f"{value:.10g}" for value in sorted((left, left + a * width)) + sorted((top, top + e * height)))
    west, east, south, north = box.split()
    return (
        f"its pixels ({_said(other)}) do not coincide with those of {path} ({_said(grid)}), nor are they whole "
        "multiples with the same corner. Warp it: "
        f"gdalwarp -t_srs '{system}' -te {west} {south} {east} {north} -ts {width} {height}."
    )


def _said(grid: Grid) -> str:
    height, width, system, (a, b, left, d, e, top) = grid
    turned = "" if b == d == 0 else ", turned"
    return f"{height}x{width} of {abs(a):.6g} by {abs(e):.6g} from {left:.10g}, {top:.10g}{turned} in {system}"


def _same_system(one: str, other: str) -> bool:
    from rasterio.crs import CRS
    from rasterio.errors import CRSError

    try:
        return bool(CRS.from_string(one) == CRS.from_string(other))
    except CRSError:
        return False
