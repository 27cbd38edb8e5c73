"""NIfTI files as arrays: checked, oriented to RAS, then resampled.

Coordinates. A volume's *own voxels* are those of the file after its axes have been swapped and reversed to RAS (the
first axis grows to the patient's right, the second to anterior, the third to superior); nothing has been resampled.
Arrays are handed on as (C, z, y, x), z growing to superior, y to anterior, x to the right. A coordinate counts voxel
edges: voxel i covers [i, i + 1), its centre is i + 0.5.

Resampling to another spacing keeps the centre of voxel 0 where it is. With ``ratio`` = spacing / own spacing, resampled
voxel k is centred on own coordinate ``k * ratio + 0.5`` and covers ``[k * ratio + (1 - ratio) / 2, + ratio)``. It is
linear, without a low-pass filter before a reduction.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from fmsuite.errors import ReadFailure, UsageError

SUFFIXES = (".nii", ".nii.gz")
SPACING_LIMITS = (0.005, 100.0)
"""Millimetres: from micro-CT to far beyond the thickest slice."""
SPACING_TOLERANCE = 1e-3
"""Millimetres; a volume this close to the asked spacing is not resampled."""
AXIS_LETTERS = (("L", "R"), ("P", "A"), ("I", "S"))
_SHEAR_TOLERANCE = 1e-2
_DEFLATE_MAX_RATIO = 1032


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
        ratio: (z, y, x) own voxels in one voxel of ``values``; ones if it was not resampled.
    """

    values: np.ndarray
    valid: np.ndarray | None
    affine: np.ndarray
    ratio: tuple[float, float, float] = (1.0, 1.0, 1.0)

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


def check_header(path: str, channels: int, assume_orientation: bool) -> None:
    """Refuse what the header alone shows to be unusable, before any voxel is read.

    Raises:
        ReadFailure: saying what is wrong and the way out.
    """
    import nibabel

    try:
        image: Any = nibabel.load(path)
        header, shape, affine = image.header, tuple(image.shape), np.asarray(image.affine, dtype=np.float64)
        kind, bytes_each = header.get_data_dtype().kind, header.get_data_dtype().itemsize
        codes = (int(header["sform_code"]), int(header["qform_code"]))
        length_unit = header.get_xyzt_units()[0]
    except FileNotFoundError as error:
        raise ReadFailure(path, "open", "the file does not exist.", "Check the path.") from error
    except (nibabel.filebasedimages.ImageFileError, nibabel.spatialimages.HeaderDataError) as error:
        raise ReadFailure(path, "open", "not a NIfTI image.", "Convert it to NIfTI, or leave it out.") from error
    except (OSError, EOFError, ValueError, KeyError, zlib.error) as error:
        raise ReadFailure(
            path, "open", f"the header cannot be read ({_first_line(error)}).", "Fetch or convert the file again."
        ) from error

    if 0 in shape:
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
    if found != channels:
        what = f"a 4D image of {found} volumes" if found > 1 else "a 3D image"
        raise ReadFailure(
            path,
            "metadata",
            f"{what}, where {channels} channel{'s are' if channels > 1 else ' is'} expected.",
            f"Name its {found} channels in data.channels, or split it into 3D volumes."
            if found > 1
            else "Merge the channels into one 4D file, or leave data.channels out.",
        )
    if kind not in "iuf":
        raise ReadFailure(path, "metadata", "voxels are not real numbers.", "Convert it to a scalar image.")
    if length_unit not in ("mm", "unknown"):
        raise ReadFailure(
            path, "metadata", f"lengths are in {length_unit}, not millimetres.", "Rewrite the header in millimetres."
        )
    if codes == (0, 0) and not assume_orientation:
        raise ReadFailure(
            path,
            "metadata",
            "sform and qform codes are 0: the file does not say which side of the patient is which.",
            "Set one of the codes, or use data.unknown_orientation=assume.",
        )
    _check_affine(path, affine)
    _check_length(path, int(np.prod(shape)) * bytes_each)


def _check_affine(path: str, affine: np.ndarray) -> None:
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


def _check_length(path: str, data_bytes: int) -> None:
    """A header that promises more voxels than the file can hold would otherwise ask for all that memory."""
    stored = Path(path).stat().st_size
    possible = stored * _DEFLATE_MAX_RATIO if path.lower().endswith(".gz") else stored
    if data_bytes > possible:
        raise ReadFailure(
            path,
            "open",
            f"the header promises {data_bytes} bytes of voxels, more than the file of {stored} bytes holds.",
            "The file is cut short: fetch it again.",
        )


def load_volume(path: str, spacing: Sequence[float] | None, channels: int, assume_orientation: bool) -> Volume:
    """Read, orient to RAS, then resample.

    Args:
        path: a ``.nii`` or ``.nii.gz`` file.
        spacing: (z, y, x) millimetres, or ``None`` for the file's own voxels.
        channels: how many volumes the file must hold.
        assume_orientation: accept a file whose sform and qform codes are 0.

    Raises:
        ReadFailure: for whatever is wrong with the file.
    """
    import torch

    transforms = monai_transforms()
    check_header(path, channels, assume_orientation)
    image = _read_ras(path, transforms)
    finite: Any = torch.isfinite(image).all(dim=0, keepdim=True)
    if not bool(finite.any()):
        raise ReadFailure(path, "read", "no voxel is a finite number.", "Leave the file out.")
    complete = bool(finite.all())
    if not complete:
        image = torch.nan_to_num(image, nan=0.0, posinf=0.0, neginf=0.0)

    own = np.linalg.norm(np.asarray(image.affine, dtype=np.float64)[:3, :3], axis=0)
    ratio, shape = resampling(tuple(image.shape[1:]), own, None if spacing is None else tuple(spacing)[::-1])
    valid = None if complete else finite.to(torch.float32)
    if ratio != (1.0, 1.0, 1.0):
        pixdim = [size * r for size, r in zip(own, ratio, strict=True)]
        resample = transforms.Spacing(pixdim, mode="bilinear", padding_mode="border", dtype=np.float32)
        if valid is not None:
            valid = resample(valid, output_spatial_shape=shape)
        image = resample(image, output_spatial_shape=shape)
    return Volume(
        _zyx(image),
        None if valid is None else _zyx(valid) > 0.999,
        np.asarray(image.affine, dtype=np.float64),
        (ratio[2], ratio[1], ratio[0]),
    )


def _read_ras(path: str, transforms: ModuleType) -> Any:
    """(C, x, y, z) float32 MetaTensor in RAS orientation; the affine is the one that nibabel reads."""
    import nibabel
    import torch
    from monai.data.meta_tensor import MetaTensor

    try:
        source: Any = nibabel.load(path)
        if path.lower().endswith(".gz"):
            needed = source.dataobj.offset + int(np.prod(source.shape)) * source.get_data_dtype().itemsize
            source = type(source).from_bytes(_decompress(path, needed))
        array = np.asarray(source.dataobj, dtype=np.float32)
        array = array.reshape((*array.shape[:3], -1))
        image = MetaTensor(torch.from_numpy(array), affine=torch.from_numpy(np.asarray(source.affine, np.float64)))
        return transforms.Orientation(axcodes="RAS", labels=AXIS_LETTERS)(
            transforms.EnsureChannelFirst(channel_dim=-1)(image)
        )
    except (
        OSError,
        EOFError,
        ValueError,
        RuntimeError,
        MemoryError,
        zlib.error,
        nibabel.filebasedimages.ImageFileError,
    ) as error:
        raise ReadFailure(
            path,
            "read",
            f"the voxels cannot be read; the file is damaged or cut short ({_first_line(error)}).",
            "Fetch the file again.",
        ) from error


def _decompress(path: str, needed: int) -> bytes:
    """The first ``needed`` bytes of a stream that is read to its end.

    nibabel stops at the last voxel and so never sees the checksum that follows it: a damaged file would give wrong
    voxels without an error.
    """
    with gzip.open(path) as file:
        content = file.read(needed)
        while file.read(1 << 20):
            pass
    return content


def _zyx(image: Any) -> np.ndarray:
    return np.ascontiguousarray(image.as_tensor().permute(0, 3, 2, 1).numpy())


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:200]
