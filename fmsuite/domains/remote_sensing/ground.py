"""Where the pixels of a raster are on the ground, and what is where among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

SEGMENTS = 32
"""Into so many parts at least the longer side of a polygon is cut before it is converted: a straight line in one
coordinate system is none in another."""


@dataclass(frozen=True)
class Frame:
    """The pixels of one raster.

    Attributes:
        height, width: in pixels.
        crs: coordinate system, as text that pyproj understands.
        transform: the six numbers of the affine map from (column, row) to coordinates.
    """

    height: int
    width: int
    crs: str
    transform: tuple[float, ...]

    @property
    def _matrix(self) -> np.ndarray:
        a, b, _, d, e, _ = self.transform[:6]
        return np.array([[a, b], [d, e]])

    @property
    def _corner(self) -> np.ndarray:
        return np.array([self.transform[2], self.transform[5]])

    def coordinates(self, positions: np.ndarray) -> np.ndarray:
        """(N, 2) float64 (x, y) in the CRS of (N, 2) positions (row, column) in pixels."""
        return positions[:, ::-1] @ self._matrix.T + self._corner

    def pixels(self, points: np.ndarray) -> np.ndarray:
        """(N, 2) float64 (column, row) in pixels of (N, 2) coordinates (x, y) in the CRS."""
        return (points - self._corner) @ np.linalg.inv(self._matrix).T

    def shapes(self, shapes: np.ndarray, systems: Sequence[str]) -> np.ndarray:
        """(N,) shapely shapes with coordinates (column, row) in pixels; ``None`` for one that has no place in the CRS.

        Args:
            shapes: (N,) points and polygons.
            systems: (N,) coordinate system of each.
        """
        import shapely

        found = np.full(len(shapes), None, dtype=object)
        names = np.array([str(name) for name in systems], dtype=object)
        for system in dict.fromkeys(names):
            members = np.flatnonzero(names == system)
            chosen = shapes[members]
            bounds = shapely.bounds(chosen)
            longest = np.maximum(bounds[:, 2] - bounds[:, 0], bounds[:, 3] - bounds[:, 1])
            chosen = shapely.segmentize(chosen, np.where(longest > 0, longest / SEGMENTS, 1.0))
            chosen = shapely.transform(chosen, lambda points, system=system: self._converted(points, system))
            placed = np.isfinite(shapely.bounds(chosen)).all(1)
            found[members[placed]] = shapely.make_valid(chosen[placed])
        return found

    def _converted(self, points: np.ndarray, system: str) -> np.ndarray:
        return self.pixels(np.stack(transformer(system, self.crs).transform(points[:, 0], points[:, 1]), axis=1))


@lru_cache(maxsize=64)
def transformer(source: str, target: str) -> Any:
    """From one coordinate system to another; x (or longitude) comes first, whatever order the systems declare."""
    import pyproj

    return pyproj.Transformer.from_crs(source, target, always_xy=True)
