"""MetaImage (``.mha``, ``.mhd``) and NRRD (``.nrrd``, ``.nhdr``), with ITK.

Headers are read here first, since ITK believes them: it asks for all the memory that they promise, reads any file that
they name, and takes a file that says nothing of its orientation for one in LPS. ITK itself is used rather than MONAI's
ITKReader, which makes one number of a voxel's several when it is asked for real numbers, and has no type for some
integers when it is not.
"""

from __future__ import annotations

import os
import zlib
from typing import Any

import numpy as np

from fmsuite.domains.medical.formats.base import (
    Grid,
    Stored,
    check_affine,
    check_shape,
    first_line,
    require,
    unknown_orientation,
)
from fmsuite.domains.medical.formats.itk_headers import META, NRRD, Promise, promise_of
from fmsuite.errors import ReadFailure

SUFFIXES = (*META, *NRRD)
HEADERS = (".mhd", ".nhdr")
"""Whose voxels usually are in another file."""
BESIDE = (".raw", ".zraw", ".raw.gz", ".img")
"""Of the files that hold the voxels of a header beside them."""
_EXPANSION = {"raw": 1, "gzip": 1032, "gz": 1032, "bzip2": 50_000, "bz2": 50_000, "zlib": 1032}
"""How many bytes one stored byte can stand for at most."""


def read(path: str, channels: int, assume_orientation: bool) -> Stored:
    """
    Args:
        channels: how many volumes the file must hold.
        assume_orientation: accept a file that does not say how it lies, as LPS, which ITK takes it for.

    Raises:
        ReadFailure: for whatever is wrong with the file.
    """
    promise = promise_of(path)
    check_shape(path, promise.shape, channels)
    if not promise.oriented and not assume_orientation:
        raise unknown_orientation(path, "no TransformMatrix" if path.lower().endswith(META) else "no space")
    data = _data_file(path, promise)
    _check_length(path, data, promise)
    if promise.encoding == "zlib":
        _check_stream(path, data, promise)
    values, affine = _loaded(path, promise.times)
    check_affine(path, affine)
    shape = (values.shape[0], values.shape[1], values.shape[2])
    return Stored(values, Grid(shape, affine, assumed=not promise.oriented))


def _data_file(path: str, promise: Promise) -> str:
    """The file that holds the voxels.

    Raises:
        ReadFailure: if it lies outside of the header's folder, is missing, or is several.
    """
    if promise.file is None:
        return path
    if "%" in promise.file or promise.file.upper().startswith("LIST"):
        raise ReadFailure(
            path, "open", "a header over several data files.", "Write it as one file, such as .nrrd or .mha."
        )
    folder = os.path.dirname(os.path.abspath(path))
    data = os.path.normpath(os.path.join(folder, promise.file))
    if os.path.isabs(promise.file) or os.path.commonpath([folder, data]) != folder:
        raise ReadFailure(
            path,
            "open",
            f"its voxels are said to be in {promise.file}, outside of its folder.",
            "Put the file beside the header, and name it there without a path.",
        )
    if not os.path.isfile(data):
        raise ReadFailure(path, "open", f"its voxels are missing: there is no {data}.", "Fetch the file.")
    return data


def _check_length(path: str, data: str, promise: Promise) -> None:
    """A header that promises more voxels than the file can hold would otherwise ask for all that memory."""
    stored = os.path.getsize(data) - (promise.start if data == path else 0)
    numbers = int(np.prod(promise.shape, dtype=object))
    if promise.encoding in ("ascii", "text", "txt"):
        needed, possible = 2 * numbers - 1, stored
    elif promise.encoding == "hex":
        needed, possible = 2 * numbers * promise.bytes_each, stored
    else:
        needed, possible = numbers * promise.bytes_each, stored * _EXPANSION.get(promise.encoding, 1)
    if needed > possible:
        raise ReadFailure(
            path,
            "open",
            f"the header promises {numbers * promise.bytes_each} bytes of voxels, more than the file of {stored} bytes "
            "holds.",
            "The file is cut short: fetch it again.",
        )


def _check_stream(path: str, data: str, promise: Promise) -> None:
    """ITK fills a volume with whatever a damaged MetaImage stream gives, says so on the terminal and goes on.

    Raises:
        ReadFailure: if the stream's checksum is not that of what it holds, or it is too short.
    """
    needed = int(np.prod(promise.shape)) * promise.bytes_each
    inflate = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)
    held = 0
    try:
        with open(data, "rb") as file:
            file.seek(promise.start if data == path else 0)
            while not inflate.eof and (chunk := inflate.unconsumed_tail or file.read(1 << 20)):
                held += len(inflate.decompress(chunk, 1 << 22))
    except zlib.error as error:
        raise _damaged(path, error) from error
    if not inflate.eof or held != needed:
        raise _damaged(path, ValueError(f"{held} of {needed} bytes"))


def _loaded(path: str, times: bool) -> tuple[np.ndarray, np.ndarray]:
    """(I, J, K, C) float32, and the affine in RAS.

    Raises:
        ReadFailure: if the voxels cannot be read.
    """
    itk: Any = require("itk")
    try:
        reader = itk.ImageFileReader[itk.Image[itk.F, 4] if times else itk.VectorImage[itk.F, 3]].New(FileName=path)
        reader.Update()
        image = reader.GetOutput()
        array = itk.array_from_image(image)
    except (RuntimeError, MemoryError, ValueError) as error:
        raise _damaged(path, error) from error
    lps = np.eye(4)
    direction = itk.array_from_matrix(image.GetDirection())[:3, :3]
    lps[:3, :3] = direction * np.array(image.GetSpacing())[:3]
    lps[:3, 3] = np.array(image.GetOrigin())[:3]
    values = array.transpose(3, 2, 1, 0) if times else array.transpose(2, 1, 0, 3)
    return np.ascontiguousarray(values, dtype=np.float32), np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps


def _damaged(path: str, error: Exception) -> ReadFailure:
    return ReadFailure(
        path,
        "read",
        f"the voxels cannot be read; the file is damaged or cut short ({first_line(error)}).",
        "Fetch the file again.",
    )
