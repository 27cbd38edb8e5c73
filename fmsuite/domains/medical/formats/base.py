"""What every format is read into, and the checks that all formats share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np

from fmsuite.errors import ReadFailure, UsageError

SPACING_LIMITS = (0.005, 100.0)
"""Millimetres: from micro-CT to far beyond the thickest slice."""
_SHEAR_TOLERANCE = 1e-2


def require(module: str) -> ModuleType:
    """Import a library of this domain when it is first needed: MONAI's import takes seconds.

    Raises:
        UsageError: if it is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"The domain 'medical' needs {error.name}, which is not installed.",
            "Install it with `pip install 'fmsuite[medical]'`.",
        ) from error


@dataclass(frozen=True)
class Grid:
    """Where the voxels of a file lie: its *native grid*.

    Attributes:
        shape: voxels along the file's own axes, in the file's order.
        affine: (4, 4) float64, from voxel numbers along these axes to millimetres in RAS world coordinates.
        header: a NIfTI file's own header, so that what is written back has the same bytes there; ``None`` for other
            formats.
        assumed: the file does not say how it lies in the patient, and its format's fallback was taken.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray
    header: Any = None
    assumed: bool = False

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Millimetres between voxels along the file's own axes."""
        i, j, k = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(i), float(j), float(k)


@dataclass(frozen=True)
class Stored:
    """A file's voxels, as its format means them.

    Attributes:
        values: (I, J, K, C) float32 along the file's own axes, rescaled to the unit that the file says.
        grid: where they lie.
    """

    values: np.ndarray
    grid: Grid


def check_shape(path: str, shape: Sequence[int], channels: int) -> None:
    """Refuse what is not a volume of so many channels.

    Args:
        shape: as the file says it, space first; trailing axes of length 1 do not count.

    Raises:
        ReadFailure: saying what it is instead.
    """
    shape = tuple(int(length) for length in shape)
    if any(length <= 0 for length in shape):
        raise ReadFailure(path, "metadata", f"an image without voxels, of size {shape}.", "Convert it again.")
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) < 3 or min(shape[:3]) == 1:
        raise ReadFailure(
            path, "metadata", f"a 2D image of size {shape}, not a volume.", "Stack the slices into one volume."
        )
    if len(shape) > 4:
        raise ReadFailure(
            path, "metadata", f"an image of {len(shape)} dimensions, {shape}.", "Split it into 3D volumes."
        )
    found = shape[3] if len(shape) == 4 else 1
    if found == channels:
        return
    what = f"a 4D image of {found} volumes" if found > 1 else "a 3D image"
    raise ReadFailure(
        path,
        "metadata",
        f"{what}, where {channels} channel{'s are' if channels > 1 else ' is'} expected.",
        f"Name its {found} channels in data.channels, or split it into 3D volumes."
        if found > 1
        else "Merge the channels into one 4D file, or leave data.channels out.",
    )


def check_affine(path: str, affine: np.ndarray) -> None:
    """Refuse voxels of no believable size, and axes that are not at right angles.

    Raises:
        ReadFailure: naming the sizes.
    """
    matrix = affine[:3, :3]
    sizes = np.linalg.norm(matrix, axis=0)
    low, high = SPACING_LIMITS
    if not np.isfinite(affine).all() or not ((sizes >= low) & (sizes <= high)).all():
        listed = " x ".join(f"{size:.4g}" for size in sizes)
        raise ReadFailure(
            path,
            "metadata",
            f"voxels of {listed} mm (believable: {low} to {high}).",
            "Correct the header's affine.",
        )
    cosines = np.abs((matrix / sizes).T @ (matrix / sizes) - np.eye(3))
    if cosines.max() > _SHEAR_TOLERANCE:
        raise ReadFailure(
            path,
            "metadata",
            "the voxel axes are not at right angles (a tilted gantry?).",
            "Resample it to a rectangular grid first.",
        )


def unknown_orientation(path: str, why: str) -> ReadFailure:
    """For a file that does not say how it lies in the patient."""
    return ReadFailure(
        path,
        "metadata",
        f"{why}: the file does not say which side of the patient is which.",
        "Write the orientation into it, or use data.unknown_orientation=assume.",
    )


def first_line(error: BaseException) -> str:
    """What a library said, short enough for a line of a table."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:200]
