"""Slices to stacks: which belong together, in which order, and whether none is missing. Positions alone decide.

DICOM world coordinates grow to the patient's left, posterior and superior (LPS). A slice's place in its stack is its
position projected on the normal of its plane: instance numbers, slice locations and file names follow the acquisition
or the export, and SliceThickness is how thick a slice is, not how far the next one lies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from fmsuite.errors import ReadFailure

UNEVEN = 0.05
"""Of the distance of slices: how much one may differ from the others. Positions are rounded when they are written."""
TILT_DEGREES = 0.1
"""Beyond, slices that are shifted against each other are moved onto a rectangular grid."""
SAME_MM = 1e-3
"""Positions closer than this are the same."""
_SAME_DIRECTION = 1e-3


@dataclass(frozen=True)
class Slice:
    """What the header of a slice, or of a frame, says.

    Attributes:
        file: name within its folder.
        frame: number within a file of several.
        position: (3,) millimetres, LPS, of the centre of the first voxel.
        orientation: (6,) direction of growing columns, then of growing rows.
        spacing: millimetres between rows, between columns.
        shape: rows, columns.
        phase: what may differ between slices of one place: times, echoes, kinds of image.
    """

    file: str
    frame: int | None
    position: tuple[float, ...]
    orientation: tuple[float, ...]
    spacing: tuple[float, ...]
    shape: tuple[int, int]
    phase: Mapping[str, Hashable] = field(default_factory=dict)

    @property
    def normal(self) -> np.ndarray:
        """(3,) of length 1."""
        normal = np.cross(self.orientation[:3], self.orientation[3:])
        return normal / np.linalg.norm(normal)


@dataclass(frozen=True)
class Layout:
    """How the slices of a stack lie.

    Attributes:
        affine: (4, 4) float64 from (column, row, slice) numbers to RAS millimetres; its axes are at right angles.
        shape: columns, rows, slices.
        shifts: (slices, 2) columns and rows that each slice lies further than the first; ``None`` if they lie straight
            above each other.
    """

    affine: np.ndarray
    shape: tuple[int, int, int]
    shifts: np.ndarray | None


def check_slices(path: str, slices: Sequence[Slice]) -> None:
    """Refuse slices that cannot be one volume, whatever their order.

    Raises:
        ReadFailure: for a single slice; if sizes, spacings or orientations differ or cannot be.
    """
    if len(slices) < 2:
        raise ReadFailure(path, "metadata", "a single slice, not a volume.", "Put all slices into one folder.")
    for what, kinds in (
        ("sizes", Counter(f"{s.shape[1]}x{s.shape[0]} voxels" for s in slices)),
        ("spacings", Counter(" x ".join(f"{mm:.4g}" for mm in s.spacing) + " mm" for s in slices)),
        ("orientations", _directions(slices)),
    ):
        if len(kinds) > 1:
            listed = ", ".join(f"{count} of {kind}" for kind, count in kinds.most_common(4))
            raise ReadFailure(
                path,
                "metadata",
                f"slices of different {what} in one series: {listed}.",
                "Move those that belong together into a folder of their own.",
            )
    first = slices[0]
    if not np.isfinite(first.spacing).all() or min(first.spacing) <= 0:
        listed = " x ".join(f"{mm:.4g}" for mm in first.spacing)
        raise ReadFailure(path, "metadata", f"pixels of {listed} mm.", "Correct PixelSpacing, or leave it out.")
    if not np.isfinite([s.position for s in slices]).all():
        raise ReadFailure(path, "metadata", "positions that are not numbers.", "Correct ImagePositionPatient.")
    row, column = np.array(first.orientation[:3]), np.array(first.orientation[3:])
    lengths = np.linalg.norm([row, column], axis=1)
    if not (np.abs(lengths - 1) < 1e-2).all() or abs(row @ column) > 1e-2:
        raise ReadFailure(
            path, "metadata", "rows and columns are not at right angles.", "Correct ImageOrientationPatient."
        )


def by_phase(slices: Sequence[Slice]) -> list[list[Slice]] | None:
    """Slices of several phases, each apart: where places repeat, the tag (or pair of tags) by which every phase has
    each place exactly once. One list if none repeats; ``None`` if no tag tells them apart."""
    places = _places(slices)
    if len(set(places)) == len(slices):
        return [list(slices)]
    wanted = Counter(places)
    keys = [
        key for key in dict.fromkeys(k for s in slices for k in s.phase) if len({s.phase.get(key) for s in slices}) > 1
    ]
    for names in (*((key,) for key in keys), *combinations(keys, 2)):
        phases: dict[tuple, list[Slice]] = {}
        where: dict[tuple, list[int]] = {}
        for piece, place in zip(slices, places, strict=True):
            value = tuple(piece.phase.get(name) for name in names)
            phases.setdefault(value, []).append(piece)
            where.setdefault(value, []).append(place)
        if all(sorted(found) == sorted(wanted) for found in where.values()):
            return list(phases.values())
    return None


def in_order(slices: Sequence[Slice]) -> list[Slice]:
    """Along the normal of their plane."""
    normal = slices[0].normal
    return sorted(slices, key=lambda s: float(np.dot(s.position, normal)))


def lay_out(path: str, slices: Sequence[Slice]) -> Layout:
    """Where the voxels of slices in order lie.

    Raises:
        ReadFailure: if places repeat, a slice is missing, or distances differ.
    """
    first, last = slices[0], slices[-1]
    along = np.array([np.dot(s.position, first.normal) for s in slices])
    _check_distances(path, slices, np.diff(along))
    row, column = (np.array(first.orientation[at : at + 3]) for at in (0, 3))
    row, column = row / np.linalg.norm(row), column / np.linalg.norm(column)
    step = (np.array(last.position) - np.array(first.position)) / (len(slices) - 1)
    distance = float(step @ first.normal)
    lean = np.array([step @ row, step @ column])
    shape = (first.shape[1], first.shape[0], len(slices))
    lps = np.eye(4)
    lps[:3, 0], lps[:3, 1] = row * first.spacing[1], column * first.spacing[0]
    lps[:3, 3] = first.position
    shifts = None
    if np.degrees(np.arctan2(np.linalg.norm(lean), distance)) > TILT_DEGREES:
        offsets = np.array([s.position for s in slices]) - np.array(first.position)
        shifts = np.stack([offsets @ row / first.spacing[1], offsets @ column / first.spacing[0]], axis=1)
        lps[:3, 2] = first.normal * distance
        # The rectangular grid begins and ends with the outermost slice.
        low, high = np.floor(shifts.min(0)), np.ceil(shifts.max(0))
        lps[:3, 3] += lps[:3, :2] @ low
        shape = (shape[0] + int(high[0] - low[0]), shape[1] + int(high[1] - low[1]), shape[2])
        shifts = shifts - low
    else:
        lps[:3, 2] = step
    return Layout(np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps, shape, shifts)


def straightened(values: np.ndarray, layout: Layout) -> np.ndarray:
    """Slices that are shifted against each other on the rectangular grid, interpolated linearly within each.

    Args:
        values: (columns, rows, slices) float32 as they were taken.

    Returns:
        (*layout.shape) float32, NaN where there is no slice.
    """
    if layout.shifts is None:
        return values
    straight = np.full(layout.shape, np.nan, dtype=np.float32)
    for number, shift in enumerate(layout.shifts):
        piece = values[..., number]
        begin = np.floor(shift).astype(int)
        for axis, share in enumerate((shift - begin).astype(np.float32)):
            if share > 0:
                # Between a voxel and the one before; the first has none before it.
                edge = np.full_like(piece.take([0], axis=axis), np.nan)
                padded = np.concatenate([edge, piece, edge], axis=axis)
                count = padded.shape[axis]
                before, after = padded.take(range(count - 1), axis=axis), padded.take(range(1, count), axis=axis)
                piece = share * before + (1 - share) * after
        columns, rows = begin
        target = straight[columns : columns + piece.shape[0], rows : rows + piece.shape[1], number]
        target[...] = piece[: target.shape[0], : target.shape[1]]
    return straight


def _check_distances(path: str, slices: Sequence[Slice], distances: np.ndarray) -> None:
    usual = float(np.median(distances))
    if (distances < SAME_MM).any():
        at = int(np.flatnonzero(distances < SAME_MM)[0])
        raise ReadFailure(
            path,
            "metadata",
            f"{int((distances < SAME_MM).sum())} of {len(slices)} slices lie where another one does, such as "
            f"{slices[at].file} and {slices[at + 1].file}, and neither time, echo nor kind of image tells them apart.",
            "Move each phase into a folder of its own, or delete the copies.",
        )
    uneven = np.flatnonzero(np.abs(distances - usual) > UNEVEN * usual)
    if not len(uneven):
        return
    at = int(np.abs(distances - usual).argmax())
    between = f"between {slices[at].file} and {slices[at + 1].file}"
    counts = distances[uneven] / usual
    if (np.abs(counts - np.rint(counts)) <= 2 * UNEVEN).all() and (np.rint(counts) >= 2).all():
        missing = int(np.rint(counts).sum() - len(counts))
        raise ReadFailure(
            path,
            "metadata",
            f"{missing} of {len(slices) + missing} slices missing, the widest gap {between}: {distances[at]:.4g} mm "
            f"where others are {usual:.4g} mm apart.",
            "Fetch the missing slices, or move the parts into folders of their own.",
        )
    raise ReadFailure(
        path,
        "metadata",
        f"slices {distances.min():.4g} to {distances.max():.4g} mm apart, the most unusual {between}.",
        "Resample them to even distances, or move the parts into folders of their own.",
    )


def _places(slices: Sequence[Slice]) -> list[int]:
    """A number for each slice, equal for slices that lie in one place."""
    along = np.array([np.dot(s.position, slices[0].normal) for s in slices])
    order = np.argsort(along, kind="stable")
    new = np.concatenate([[0], np.diff(along[order]) > SAME_MM]).cumsum()
    places = np.empty(len(slices), dtype=int)
    places[order] = new
    return [int(place) for place in places]


def _directions(slices: Sequence[Slice]) -> Counter[str]:
    kinds: list[tuple[float, ...]] = []
    counts: Counter[str] = Counter()
    for piece in slices:
        known = next((k for k in kinds if np.abs(np.subtract(k, piece.orientation)).max() < _SAME_DIRECTION), None)
        if known is None:
            known = piece.orientation
            kinds.append(known)
        counts["(" + ", ".join(f"{cosine:.3g}" for cosine in known) + ")"] += 1
    return counts
