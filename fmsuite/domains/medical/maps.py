"""Label maps beside volumes: where each lies, and that it lies over its volume."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fmsuite.domains.medical.formats.base import Grid, Stored
from fmsuite.domains.medical.geometry import to_native, to_own, turn_to_ras
from fmsuite.domains.medical.volumes import SUFFIXES, read_stored
from fmsuite.errors import ReadFailure, UsageError
from fmsuite.tiling.templates import is_template

FIELDS = ("name", "stem", "folder")
SAME_PLACE = 0.05
"""Of the smallest voxel: how far a corner of a map may lie from that of its volume. Headers round affines."""
_LIMITS = np.iinfo(np.int16)


def stem(name: str) -> str:
    """A file's name without the suffix of a volume."""
    lower = name.lower()
    return next((name[: -len(s)] for s in sorted(SUFFIXES, key=len, reverse=True) if lower.endswith(s)), name)


def map_path(source: str, template: str) -> str:
    """Where the map of a source lies."""
    folder, name = os.path.split(source)
    if not is_template(template):
        return os.path.join(template, name)
    return os.path.normpath(template.format(name=name, stem=stem(name), folder=folder))


def check_folders(maps: Mapping[str, str]) -> None:
    """
    Raises:
        UsageError: if a folder of maps does not exist.
    """
    for name, template in maps.items():
        fixed = not is_template(template)
        if fixed and not Path(template).is_dir():
            raise UsageError(
                f"data.maps.{name}: there is no folder {template}.",
                "Name the folder of the label maps, or a path with {name} or {stem} in it.",
            )


def read_map(source: str, native: Grid, name: str, template: str) -> np.ndarray:
    """The map of a source, (z, y, x) int16 in own voxels.

    It may be stored along other axes than the volume, as long as its voxels are the volume's.

    Raises:
        ReadFailure: about the source, if the map is missing, cannot be read, has another shape, lies elsewhere, or
            holds anything but whole numbers.
    """
    path = map_path(source, template)
    if not Path(path).exists():
        raise ReadFailure(
            source, "maps", f"its map '{name}' is missing: there is no {path}.", "Correct data.maps, or leave it out."
        )
    try:
        # What does not say how it lies is refused, for a map too: it could be the mirror image.
        stored = read_stored(path, 1, assume_orientation=native.assumed)
    except ReadFailure as failure:
        raise ReadFailure(
            source, "maps", f"its map '{name}', {path}, is not usable: {failure.reason}", failure.hint
        ) from failure
    _check_place(source, name, path, native, stored)
    values = to_own(stored.values[..., 0], stored.grid)
    if not np.isfinite(values).all() or (values != np.rint(values)).any():
        raise ReadFailure(
            source,
            "maps",
            f"its map '{name}', {path}, holds numbers that are not whole.",
            "Give label maps, not images or probabilities.",
        )
    if values.min() < _LIMITS.min or values.max() > _LIMITS.max:
        raise ReadFailure(
            source,
            "maps",
            f"its map '{name}', {path}, has labels from {values.min():.0f} to {values.max():.0f}.",
            f"Renumber them within {_LIMITS.min} to {_LIMITS.max}.",
        )
    return np.ascontiguousarray(values, dtype=np.int16)


def native_map(source: str, native: Grid, name: str, template: str) -> np.ndarray:
    """The map of a source along the source's own axes, (I, J, K) int16.

    Raises:
        ReadFailure: as ``read_map``.
    """
    return np.ascontiguousarray(to_native(read_map(source, native, name, template), native))


def _check_place(source: str, name: str, path: str, native: Grid, stored: Stored) -> None:
    mine, its = _ras_corners(native), _ras_corners(stored.grid)
    if mine[0] != its[0]:
        shapes = ["x".join(map(str, shape)) for shape in (its[0], mine[0])]
        raise ReadFailure(
            source,
            "maps",
            f"its map '{name}', {path}, has {shapes[0]} voxels (right, anterior, superior) and the volume {shapes[1]}.",
            "Resample the map onto the volume's grid, with nearest neighbour.",
        )
    away = float(np.linalg.norm(mine[1] - its[1], axis=1).max())
    if away > SAME_PLACE * min(native.spacing):
        raise ReadFailure(
            source,
            "maps",
            f"its map '{name}', {path}, lies elsewhere: corners are up to {away:.4g} mm apart.",
            "Resample the map onto the volume's grid, or correct the header that is wrong.",
        )


def _ras_corners(grid: Grid) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape along the RAS axes, and (8, 3) the world positions of the corner voxels in an order that is the same for
    every way of storing them."""
    order, reverse = turn_to_ras(grid)
    shape = tuple(grid.shape[axis] for axis in order)
    corners = []
    for number in range(8):
        voxel = np.zeros(3)
        for axis in range(3):
            far = bool(number >> axis & 1) != reverse[axis]
            voxel[order[axis]] = (shape[axis] - 1) * far
        corners.append(grid.affine[:3, :3] @ voxel + grid.affine[:3, 3])
    return shape, np.array(corners)
