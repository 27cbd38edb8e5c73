"""MetaImage (``.mha``, ``.mhd``) and NRRD (``.nrrd``, ``.nhdr``), with ITK.

Headers are read here first, since ITK believes them: it asks for all the memory that they promise, reads any file that
they name, takes a spacing of 0 for 1, and takes a file that says nothing of its orientation for one in LPS. ITK itself
is used rather than MONAI's ITKReader, which averages several channels into one when it is asked for real numbers, and
has no type for some integers when it is not.
"""

from __future__ import annotations

import os
import re
import zlib
from dataclasses import dataclass
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
from fmsuite.errors import ReadFailure

META = (".mha", ".mhd")
NRRD = (".nrrd", ".nhdr")
SUFFIXES = (*META, *NRRD)
HEADERS = (".mhd", ".nhdr")
"""Whose voxels usually are in another file."""
BESIDE = (".raw", ".zraw", ".raw.gz", ".img")
"""Of the files that hold the voxels of a header beside them."""
_HEADER_BYTES = 1 << 20
_MATRICES = ("TransformMatrix", "Rotation", "Orientation")
_META_BYTES = {
    "CHAR": 1,
    "UCHAR": 1,
    "SHORT": 2,
    "USHORT": 2,
    "INT": 4,
    "UINT": 4,
    "LONG": 4,
    "ULONG": 4,
    "LONG_LONG": 8,
    "ULONG_LONG": 8,
    "FLOAT": 4,
    "DOUBLE": 8,
}
_NRRD_BYTES = {
    1: ("signed char", "int8", "int8_t", "uchar", "unsigned char", "uint8", "uint8_t"),
    2: (
        *("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
        *("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    ),
    4: ("int", "signed int", "int32", "int32_t", "uint", "unsigned int", "uint32", "uint32_t", "float"),
    8: (
        *("longlong", "long long", "long long int", "signed long long", "signed long long int", "int64", "int64_t"),
        *("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t", "double"),
    ),
}
_NRRD_SPACES = ("right-anterior-superior", "left-anterior-superior", "left-posterior-superior", "ras", "las", "lps")
"""What ITK turns into LPS; it takes any other for LPS as it is."""
_EXPANSION = {"raw": 1, "gzip": 1032, "gz": 1032, "bzip2": 50_000, "bz2": 50_000, "zlib": 1032}
"""How many bytes one stored byte can stand for at most."""


@dataclass(frozen=True)
class _Promise:
    """What a header says of its voxels.

    Attributes:
        shape: space first, then channels or times.
        bytes_each: of a number.
        encoding: as the header names it.
        file: with the voxels; ``None`` for the header's own.
        start: of the voxels in the header's own file.
        oriented: it says how the voxels lie in the patient.
        times: the last axis is one of the file's, and not several numbers a voxel.
    """

    shape: tuple[int, ...]
    bytes_each: int
    encoding: str
    file: str | None
    start: int
    oriented: bool
    times: bool = False


def read(path: str, channels: int, assume_orientation: bool) -> Stored:
    """
    Args:
        channels: how many volumes the file must hold.
        assume_orientation: accept a file that does not say how it lies, as LPS, which ITK takes it for.

    Raises:
        ReadFailure: for whatever is wrong with the file.
    """
    promise = _promise(path)
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


def _promise(path: str) -> _Promise:
    """
    Raises:
        ReadFailure: if there is no header, or it cannot be.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(_HEADER_BYTES)
    except FileNotFoundError as error:
        raise ReadFailure(path, "open", "the file does not exist.", "Check the path.") from error
    except OSError as error:
        raise ReadFailure(path, "open", f"it cannot be read ({error.strerror}).", "Check its permissions.") from error
    try:
        return _meta_image(path, head) if path.lower().endswith(META) else _nrrd(path, head)
    except KeyError as error:
        raise ReadFailure(
            path, "open", f"not a MetaImage or NRRD header: it lacks {error}.", "Write the file again."
        ) from error
    except ValueError as error:
        raise ReadFailure(
            path, "open", f"the header cannot be read ({first_line(error)}).", "Write the file again."
        ) from error


def _meta_image(path: str, head: bytes) -> _Promise:
    fields: dict[str, str] = {}
    start = 0
    while "ElementDataFile" not in fields:
        end = head.find(b"\n", start)
        key, equals, value = head[start : end if end >= 0 else len(head)].decode("latin-1").partition("=")
        if not equals and key.strip():
            raise KeyError("ElementDataFile")
        fields[key.strip()] = value.strip()
        if end < 0:
            break
        start = end + 1
    sizes = tuple(int(n) for n in fields["DimSize"].split())
    if len(sizes) != int(fields["NDims"]):
        raise ValueError(f"NDims = {fields['NDims']} and {len(sizes)} sizes")
    several = int(fields.get("ElementNumberOfChannels", 1))
    _check_spacing(path, [float(mm) for mm in fields.get("ElementSpacing", fields.get("ElementSize", "")).split()[:3]])
    matrix = next((fields[key] for key in _MATRICES if key in fields), None)
    if matrix is not None:
        _check_directions(path, np.array([float(cosine) for cosine in matrix.split()]).reshape(len(sizes), -1))
    element = fields["ElementType"].removeprefix("MET_").removesuffix("_ARRAY")
    if element not in _META_BYTES:
        raise ValueError(f"ElementType = {fields['ElementType']}")
    return _Promise(
        (*sizes, several) if several > 1 else sizes,
        _META_BYTES[element],
        "zlib" if fields.get("CompressedData", "False").lower() == "true" else "raw",
        None if fields["ElementDataFile"].upper() == "LOCAL" else fields["ElementDataFile"],
        start,
        matrix is not None,
        times=len(sizes) == 4,
    )


def _nrrd(path: str, head: bytes) -> _Promise:
    if not head.startswith(b"NRRD"):
        raise KeyError("NRRD")
    ends = [at + len(mark) for mark in (b"\n\n", b"\r\n\r\n") if (at := head.find(mark)) >= 0]
    start = min(ends, default=len(head))
    fields: dict[str, str] = {}
    for line in head[:start].decode("latin-1").splitlines()[1:]:
        key, colon, value = line.partition(":")
        if colon and not line.startswith("#") and not value.startswith("="):
            fields[key.strip().lower()] = value.strip()
    sizes = [int(n) for n in fields["sizes"].split()]
    if len(sizes) != int(fields["dimension"]):
        raise ValueError(f"dimension: {fields['dimension']} and {len(sizes)} sizes")
    space = fields.get("space", "").lower()
    # Vectors may be written with blanks inside: "(1, 0, 0)".
    directions = re.findall(r"none|\([^)]*\)", fields.get("space directions", "").lower())
    inside = list(range(len(sizes)))
    if directions:
        if len(directions) != len(sizes):
            raise ValueError(f"{len(directions)} space directions for {len(sizes)} axes")
        inside = [axis for axis, text in enumerate(directions) if text != "none"]
        vectors = np.array([[float(x) for x in directions[axis].strip("()").split(",")] for axis in inside])
        _check_spacing(path, list(np.linalg.norm(vectors, axis=1)))
        _check_directions(path, vectors)
    elif "spacings" in fields:
        _check_spacing(path, [float(mm) for mm in fields["spacings"].split() if mm.lower() != "nan"])
    units = {unit.strip().strip('"') for unit in fields.get("space units", "").split()} - {"mm", "", "none", "???"}
    if units:
        raise ReadFailure(
            path,
            "metadata",
            f"lengths are in {', '.join(sorted(units))}, not millimetres.",
            "Rewrite the header in millimetres.",
        )
    kind = fields["type"].lower()
    bytes_each = next((size for size, names in _NRRD_BYTES.items() if kind in names), None)
    if bytes_each is None:
        raise ValueError(f"type: {fields['type']}")
    return _Promise(
        (*(sizes[axis] for axis in inside), *(n for axis, n in enumerate(sizes) if axis not in inside)),
        bytes_each,
        fields["encoding"].lower(),
        fields.get("data file", fields.get("datafile")),
        start,
        space in _NRRD_SPACES and bool(directions),
    )


def _check_spacing(path: str, spacing: list[float]) -> None:
    if not np.isfinite(spacing).all() or min(spacing, default=1.0) <= 0:
        listed = " x ".join(f"{mm:.4g}" for mm in spacing)
        raise ReadFailure(path, "metadata", f"voxels of {listed} mm.", "Correct the header's spacing.")


def _check_directions(path: str, vectors: np.ndarray) -> None:
    if not np.isfinite(vectors).all() or np.linalg.matrix_rank(vectors) < len(vectors):
        raise ReadFailure(
            path, "metadata", "axes whose directions are not those of a volume.", "Correct the header's directions."
        )


def _data_file(path: str, promise: _Promise) -> str:
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


def _check_length(path: str, data: str, promise: _Promise) -> None:
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


def _check_stream(path: str, data: str, promise: _Promise) -> None:
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
