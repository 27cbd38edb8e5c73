"""NIfTI-1 and NIfTI-2, ``.nii`` and ``.nii.gz``, with nibabel.

MONAI's NibabelReader reads with nibabel too, but stops at the last voxel of a compressed stream, so that damage which
only the checksum behind it shows goes unnoticed, and it accepts a file that does not say how it lies in the patient.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from fmsuite.domains.medical.formats.base import (
    Grid,
    Stored,
    check_affine,
    check_shape,
    first_line,
    unknown_orientation,
)
from fmsuite.errors import ReadFailure

SUFFIXES = (".nii", ".nii.gz")
_DEFLATE_MAX_RATIO = 1032


def read(path: str, channels: int, assume_orientation: bool) -> Stored:
    """
    Args:
        channels: how many volumes the file must hold.
        assume_orientation: accept a file whose sform and qform codes are 0.

    Raises:
        ReadFailure: for whatever is wrong with the file.
    """
    import nibabel

    check_header(path, channels, assume_orientation)
    try:
        source: Any = nibabel.load(path)
        if path.lower().endswith(".gz"):
            needed = source.dataobj.offset + int(np.prod(source.shape)) * source.get_data_dtype().itemsize
            source = type(source).from_bytes(_decompress(path, needed))
        # Beyond single precision a voxel becomes infinite, which is looked at below.
        with np.errstate(over="ignore", invalid="ignore"):
            array = np.asarray(source.dataobj, dtype=np.float32)
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
            f"the voxels cannot be read; the file is damaged or cut short ({first_line(error)}).",
            "Fetch the file again.",
        ) from error
    if source.get_data_dtype().kind in "iu" and not np.isfinite(array).all():
        raise ReadFailure(path, "read", "values overflow when rescaled.", "Correct scl_slope and scl_inter.")
    array = array.reshape((*array.shape[:3], -1))
    shape = (array.shape[0], array.shape[1], array.shape[2])
    header = source.header.copy()
    assumed = not (int(header["sform_code"]) or int(header["qform_code"]))
    return Stored(array, Grid(shape, np.asarray(source.affine, dtype=np.float64), header, assumed))


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
    except nibabel.filebasedimages.ImageFileError as error:
        raise ReadFailure(path, "open", "not a NIfTI image.", "Convert it to NIfTI, or leave it out.") from error
    except (nibabel.spatialimages.HeaderDataError, OSError, EOFError, ValueError, KeyError, zlib.error) as error:
        raise ReadFailure(
            path, "open", f"the header cannot be read ({first_line(error)}).", "Fetch or convert the file again."
        ) from error
    check_shape(path, shape, channels)
    if kind not in "iuf":
        raise ReadFailure(path, "metadata", "voxels are not real numbers.", "Convert it to a scalar image.")
    if length_unit not in ("mm", "unknown"):
        raise ReadFailure(
            path, "metadata", f"lengths are in {length_unit}, not millimetres.", "Rewrite the header in millimetres."
        )
    if codes == (0, 0) and not assume_orientation:
        raise unknown_orientation(path, "sform and qform codes are 0")
    check_affine(path, affine)
    _check_length(path, int(np.prod(shape, dtype=object)) * bytes_each)


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


def write(path: Path, values: np.ndarray, grid: Grid) -> Path:
    """Write so that it lies over the file that ``grid`` is of, voxel on voxel, in any viewer.

    Of a NIfTI file, affine, sform, qform, their codes and the units are the input's own bytes; of another format, both
    forms are its affine, with the code of scanner coordinates. Header extensions are left out: they may name the
    patient.

    Args:
        path: without a suffix; ``.nii.gz`` is added.
        values: (I, J, K), or (I, J, K, K') for several maps, along the file's own axes; bool and integers stay
            integers, real numbers become float32.

    Returns:
        The file's path.
    """
    import nibabel

    values = _storable(values)
    if grid.header is None:
        image: Any = nibabel.Nifti1Image(values, grid.affine)
        image.set_sform(grid.affine, code="scanner")
        # A quaternion holds no shear: what is left of one after rounding stays in the sform, which goes first.
        image.set_qform(grid.affine, code="scanner", strip_shears=True)
        image.header.set_xyzt_units("mm")
    else:
        header = grid.header.copy()
        header.set_data_dtype(values.dtype)
        header.set_slope_inter(1, 0)
        header["cal_min"], header["cal_max"] = 0, 0
        header["descrip"], header["aux_file"], header["intent_name"] = b"", b"", b""
        header["intent_code"] = 0
        kind = nibabel.Nifti2Image if header["magic"].item().startswith(b"n+2") else nibabel.Nifti1Image
        image = kind(values, header.get_best_affine(), header)
        image.header.extensions.clear()
    target = path.with_name(f"{path.name}.nii.gz")
    partial = target.with_name(f".{target.name}.partial.nii.gz")
    nibabel.save(image, partial)
    partial.replace(target)
    return target


def _storable(values: np.ndarray) -> np.ndarray:
    """In a type that every reader of NIfTI knows: real numbers as float32, integers in the smallest that holds them."""
    if values.dtype.kind == "f":
        return values.astype(np.float32, copy=False)
    if values.dtype.kind == "b":
        return values.astype(np.uint8)
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    kinds = (np.uint8, np.int16, np.int32, np.int64)
    return values.astype(next(k for k in kinds if np.iinfo(k).min <= low and high <= np.iinfo(k).max), copy=False)
