"""DICOM series as volumes, with pydicom: one slice a file, or frames of one file with a position each.

MONAI's PydicomReader is not used: it takes a folder for one series, sorts by InstanceNumber, leaves out slices without
one, averages distances over gaps, and reads a tilted stack as a straight one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fmsuite.core.data.skipped import Skipped
from fmsuite.domains.medical.formats.base import Grid, Stored, check_affine
from fmsuite.domains.medical.formats.dicom_files import SUFFIXES, header_of, many, quiet, slices_of, voxels_of
from fmsuite.domains.medical.formats.stacks import (
    Slice,
    by_phase,
    check_slices,
    in_order,
    lay_out,
    straightened,
)
from fmsuite.errors import ReadFailure

_OTHER_NAMES = (
    "authors",
    "changelog",
    "changes",
    "citation",
    "copying",
    "dicomdir",
    "license",
    "licence",
    "makefile",
    "md5sums",
    "notice",
    "readme",
    "sha256sums",
    "version",
)
"""Names without a suffix that are no images; in any case."""


@dataclass(frozen=True)
class Stack:
    """A volume within a folder.

    Attributes:
        path: that names it as a source: the folder if it is the only one there, else its first file by name.
        patient: its PatientID; may be empty.
        pieces: file name and frame number (``None`` for a file of one slice), in the order of the volume's slices.
    """

    path: str
    patient: str
    pieces: tuple[tuple[str, int | None], ...]

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for name, _ in self.pieces))


def is_candidate(name: str) -> bool:
    """Whether a file may be DICOM, by its name: a usual suffix, none, or a number (parts of a UID)."""
    suffix = Path(name).suffix.lower()
    if suffix in SUFFIXES:
        return True
    return (suffix == "" and name.lower() not in _OTHER_NAMES) or suffix[1:].isdigit()


@quiet()
def find_stacks(folder: str, names: Iterable[str]) -> tuple[list[Stack], list[Skipped]]:
    """The volumes in a folder, from headers alone, and why other files are in none."""
    notes: list[Skipped] = []
    strangers: list[str] = []
    series: dict[str, list[tuple[Slice, str, bool]]] = {}
    seen: dict[str, str] = {}
    for name in sorted(names):
        path = os.path.join(folder, name)
        try:
            header = header_of(path)
            if header is None:
                strangers.append(name)
                continue
            uid = str(header.get("SOPInstanceUID", "") or path)
            if uid in seen:
                notes.append(Skipped(path, "metadata", f"a copy of {seen[uid]}. Delete one of them."))
                continue
            seen[uid] = name
            patient = str(header.get("PatientID", "") or "").strip()
            scout = "LOCALIZER" in [str(part).upper() for part in many(header.get("ImageType"))]
            for piece in slices_of(path, name, header):
                series.setdefault(str(header.get("SeriesInstanceUID", "") or path), []).append((piece, patient, scout))
        except ReadFailure as failure:
            notes.append(Skipped.of(failure))
    if strangers:
        more = f" and {len(strangers) - 1} more" if len(strangers) > 1 else ""
        notes.append(Skipped(folder, "open", f"not DICOM: {strangers[0]}{more}. It is left out."))
    stacks = []
    for found in series.values():
        if any(not scout for _, _, scout in found):
            left_out = sum(scout for _, _, scout in found)
            if left_out:
                where = os.path.join(folder, min(piece.file for piece, _, scout in found if scout))
                reason = f"{left_out} localizer images in a series of slices. They are left out."
                notes.append(Skipped(where, "metadata", reason))
            found = [each for each in found if not each[2]]
        path = folder if len(series) == 1 else os.path.join(folder, min(piece.file for piece, _, _ in found))
        try:
            stacks += _stacked(path, folder, [piece for piece, _, _ in found], found[0][1])
        except ReadFailure as failure:
            notes.append(Skipped.of(failure))
    if len(stacks) == 1 and len(series) == 1:
        stacks = [Stack(folder, stacks[0].patient, stacks[0].pieces)]
    return stacks, notes


def _stacked(path: str, folder: str, slices: Sequence[Slice], patient: str) -> list[Stack]:
    """
    Raises:
        ReadFailure: if they make no volume.
    """
    check_slices(path, slices)
    phases = by_phase(slices) or [list(slices)]
    stacks = []
    for phase in phases:
        check_slices(path, phase)
        ordered = in_order(phase)
        name = min(piece.file for piece in ordered)
        if len(phases) > 1 and any(piece.frame is not None for piece in ordered):
            raise ReadFailure(
                path,
                "metadata",
                f"frames of {len(phases)} phases in one file.",
                "Convert it to one NIfTI file a phase, with dcm2niix.",
            )
        lay_out(path, ordered)
        stacks.append(
            Stack(
                os.path.join(folder, name),
                patient,
                tuple((piece.file, piece.frame) for piece in ordered),
            )
        )
    return stacks


@quiet()
def read(path: str, pieces: Sequence[tuple[str, int | None]] | None) -> Stored:
    """A stack, rescaled to the unit that its headers say, in float arithmetic.

    Args:
        path: the source: its folder, or a file of it.
        pieces: as ``Stack.pieces``; found again if not given.

    Raises:
        ReadFailure: for whatever is wrong with it.
    """
    if pieces is None:
        pieces = _search(path)
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    slices: list[Slice] = []
    arrays: list[np.ndarray] = []
    opened: tuple[str, list[Slice], np.ndarray] = ("", [], np.zeros(0))
    for name, frame in pieces:
        if opened[0] != name:
            opened = (name, *voxels_of(os.path.join(folder, name)))
        if (frame or 0) >= len(opened[1]):
            raise ReadFailure(path, "read", f"{name} has fewer frames than when it was indexed.", "Tile again.")
        slices.append(opened[1][frame or 0])
        arrays.append(opened[2][frame or 0])
    check_slices(path, slices)
    ordered = in_order(slices)
    if ordered != slices:
        raise ReadFailure(path, "read", "slices have changed places since the series was indexed.", "Tile again.")
    layout = lay_out(path, slices)
    check_affine(path, layout.affine)
    values = straightened(np.stack([array.T for array in arrays], axis=-1), layout)
    return Stored(values[..., None], Grid(layout.shape, layout.affine))


def _search(path: str) -> tuple[tuple[str, int | None], ...]:
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    try:
        names = [name for name in os.listdir(folder) if is_candidate(name) and not name.startswith(".")]
    except OSError as error:
        raise ReadFailure(path, "open", f"it cannot be listed ({error.strerror}).", "Check the path.") from error
    names = [name for name in names if os.path.isfile(os.path.join(folder, name))]
    stacks, notes = find_stacks(folder, names)
    for stack in stacks:
        if path == stack.path or (not os.path.isdir(path) and os.path.basename(path) in stack.files):
            return stack.pieces
    if stacks:
        listed = ", ".join(os.path.basename(stack.path) for stack in stacks[:4])
        raise ReadFailure(path, "open", f"{len(stacks)} series.", f"Name a file of one of them, such as {listed}.")
    reason = notes[0].reason if notes else "no DICOM image."
    raise ReadFailure(path, "open", reason)
