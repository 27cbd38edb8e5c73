"""Headers of MetaImage and NRRD: what a file promises of its voxels, before any is read."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from fmsuite.domains.medical.formats.base import first_line
from fmsuite.errors import ReadFailure

META = (".mha", ".mhd")
NRRD = (".nrrd", ".nhdr")
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


@dataclass(frozen=True)
class Promise:
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


def promise_of(path: str) -> Promise:
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


def _meta_image(path: str, head: bytes) -> Promise:
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
    return Promise(
        (*sizes, several) if several > 1 else sizes,
        _META_BYTES[element],
        "zlib" if fields.get("CompressedData", "False").lower() == "true" else "raw",
        None if fields["ElementDataFile"].upper() == "LOCAL" else fields["ElementDataFile"],
        start,
        matrix is not None,
        times=len(sizes) == 4,
    )


def _nrrd(path: str, head: bytes) -> Promise:
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
    return Promise(
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
