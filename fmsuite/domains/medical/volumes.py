"""Volumes in memory: read by their format, oriented to RAS, then resampled.

Coordinates. A volume's *own voxels* are those of the file after its axes have been swapped and reversed to RAS (the
first axis grows to the patient's right, the second to anterior, the third to superior); nothing has been resampled.
Arrays are handed on as (C, z, y, x), z growing to superior, y to anterior, x to the right. A coordinate counts voxel
edges: voxel i covers [i, i + 1), its centre is i + 0.5.

Resampling to another spacing keeps the centre of voxel 0 where it is. With ``ratio`` = spacing / own spacing, resampled
voxel k is centred on own coordinate ``k * ratio + 0.5`` and covers ``[k * ratio + (1 - ratio) / 2, + ratio)``. It is
linear, without a low-pass filter before a reduction. (MONAI's ``Spacing`` keeps voxel 0 of upright volumes only: of an
oblique one, rounding decides whether it keeps the centre of the whole volume instead. So its ``SpatialResample`` is
told where voxels are to lie.)
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np

from fmsuite.domains.medical.formats import dicom, itk, nifti
from fmsuite.domains.medical.formats.base import Grid, Stored, check_shape, require
from fmsuite.errors import ReadFailure

SPACING_TOLERANCE = 1e-3
"""Millimetres; a volume this close to the asked spacing is not resampled."""
SUFFIXES = (*nifti.SUFFIXES, *itk.SUFFIXES, *dicom.SUFFIXES)
AXIS_LETTERS = (("L", "R"), ("P", "A"), ("I", "S"))


def monai_transforms() -> ModuleType:
    """``monai.transforms``.

    Raises:
        UsageError: if MONAI or nibabel is not installed.
    """
    require("nibabel")
    return require("monai.transforms")


@dataclass
class Volume:
    """A volume in memory.

    Attributes:
        values: (C, z, y, x) float32; non-finite voxels have been replaced by 0.
        valid: (1, z, y, x) bool, False where any channel was not finite; ``None`` if all are.
        affine: (4, 4) float64, from (x, y, z) voxel numbers of ``values`` to millimetres in RAS world coordinates.
        native: the grid of the file.
        ratio: (z, y, x) own voxels in one voxel of ``values``; ones if it was not resampled.
        maps: (z, y, x) int16 label maps on the same grid.
    """

    values: np.ndarray
    valid: np.ndarray | None
    affine: np.ndarray
    native: Grid
    ratio: tuple[float, float, float] = (1.0, 1.0, 1.0)
    maps: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(z, y, x)."""
        return self.values.shape[1], self.values.shape[2], self.values.shape[3]

    @property
    def spacing(self) -> tuple[float, float, float]:
        """(z, y, x) millimetres."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(z), float(y), float(x)


def resampling(
    shape: Sequence[int], own: Sequence[float], spacing: Sequence[float] | None
) -> tuple[tuple[float, float, float], tuple[int, int, int]]:
    """How a volume of ``shape`` voxels, ``own`` millimetres each, changes when resampled.

    Returns:
        ratio and resampled shape, along the same axes as the arguments. The shape is the number of voxel centres that
        fit, the last one rounded to the nearest (as MONAI's ``Spacing``).
    """
    if spacing is None:
        spacing = own
    ratio = [
        1.0 if abs(new - old) <= SPACING_TOLERANCE else float(new / old) for new, old in zip(spacing, own, strict=True)
    ]
    length = [n if r == 1.0 else int(np.round((n - 1) / r + 1)) for n, r in zip(shape, ratio, strict=True)]
    return (ratio[0], ratio[1], ratio[2]), (length[0], length[1], length[2])


def read_stored(
    path: str, channels: int, assume_orientation: bool, pieces: Sequence[tuple[str, int | None]] | None = None
) -> Stored:
    """A source's voxels along its own axes, by its format.

    Args:
        path: a file, or a folder of one DICOM series.
        channels: how many volumes it must hold.
        assume_orientation: accept a file that does not say how it lies in the patient.
        pieces: the slices of a DICOM series, as ``formats.dicom.Stack.pieces``; found out if not given.

    Raises:
        ReadFailure: for whatever is wrong with it.
    """
    name = os.path.basename(path).lower()
    if pieces is not None or os.path.isdir(path) or name.endswith(dicom.SUFFIXES):
        stored = dicom.read(path, pieces)
        check_shape(path, (*stored.grid.shape, 1), channels)
        return stored
    if name.endswith(itk.SUFFIXES):
        return itk.read(path, channels, assume_orientation)
    return nifti.read(path, channels, assume_orientation)


def load_volume(
    path: str,
    spacing: Sequence[float] | None,
    channels: int,
    assume_orientation: bool,
    pieces: Sequence[tuple[str, int | None]] | None = None,
) -> Volume:
    """Read, orient to RAS, then resample.

    Args:
        path: a source.
        spacing: (z, y, x) millimetres, or ``None`` for the file's own voxels.
        channels: how many volumes the file must hold.
        assume_orientation: accept a file that does not say how it lies in the patient.
        pieces: the slices of a DICOM series, see ``read_stored``.

    Raises:
        ReadFailure: for whatever is wrong with the file.
    """
    import torch

    transforms = monai_transforms()
    stored = read_stored(path, channels, assume_orientation, pieces)
    image = _to_ras(stored, transforms)
    finite: Any = torch.isfinite(image).all(dim=0, keepdim=True)
    if not bool(finite.any()):
        raise ReadFailure(path, "read", "no voxel is a finite number.", "Leave the file out.")
    complete = bool(finite.all())
    if not complete:
        image = torch.nan_to_num(image, nan=0.0, posinf=0.0, neginf=0.0)

    affine = np.asarray(image.affine, dtype=np.float64)
    own = np.linalg.norm(affine[:3, :3], axis=0)
    ratio, shape = resampling(tuple(image.shape[1:]), own, None if spacing is None else tuple(spacing)[::-1])
    valid = None if complete else finite.to(torch.float32)
    if ratio != (1.0, 1.0, 1.0):
        affine = affine @ np.diag([*ratio, 1.0])
        resample = transforms.SpatialResample(mode="bilinear", padding_mode="border", dtype=np.float32)
        if valid is not None:
            valid = resample(valid, dst_affine=affine, spatial_size=shape)
        image = resample(image, dst_affine=affine, spatial_size=shape)
    return Volume(
        _zyx(image),
        None if valid is None else _zyx(valid) > 0.999,
        affine,
        stored.grid,
        (ratio[2], ratio[1], ratio[0]),
    )


def _to_ras(stored: Stored, transforms: ModuleType) -> Any:
    """(C, x, y, z) float32 MetaTensor in RAS orientation."""
    import torch
    from monai.data.meta_tensor import MetaTensor

    image = MetaTensor(torch.from_numpy(stored.values), affine=torch.from_numpy(stored.grid.affine))
    return transforms.Orientation(axcodes="RAS", labels=AXIS_LETTERS)(
        transforms.EnsureChannelFirst(channel_dim=-1)(image)
    )


def _zyx(image: Any) -> np.ndarray:
    return np.ascontiguousarray(image.as_tensor().permute(0, 3, 2, 1).numpy())
