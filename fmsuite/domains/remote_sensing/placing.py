"""Labelled places become windows: which, and of two places that claim one window, whose it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fmsuite.core.data.skipped import SkippedLog
from fmsuite.domains.remote_sensing.ground import Frame
from fmsuite.domains.remote_sensing.places import PlaceOptions, Places, read_places, report_places
from fmsuite.errors import UsageError
from fmsuite.tiling.grid import window_starts
from fmsuite.tiling.labels import refuse_shared_groups
from fmsuite.tiling.table import spread_rows

OUTSIDE = "it lies outside of every raster. Check the coordinate system, or name the right one with data.places_crs."
THIN = (
    "no window of the grid is covered by it as far as asked. Lower data.place_overlap or data.size, or set "
    "data.place_windows=centre."
)
LOST = "each of its windows belongs to another place that covers more of it. Draw places apart."
_SAME = 1e-9
"""Shares of a window that differ by less than this are alike."""
_INSET = 0.01
"""Pixels by which windows are shrunk on each side before they are asked whether they share any."""


@dataclass(frozen=True)
class Cut:
    """How windows are cut from a raster.

    Attributes:
        shape: of the part of the raster that windows are cut from, pixels.
        extent, stride: of windows, the same pixels, along (y, x).
        step: of one pixel of a window.
        native: windows begin at whole pixels.
        origin: (row, column) of the part's corner.
    """

    shape: tuple[float, float]
    extent: tuple[float, float]
    stride: tuple[float, float]
    step: tuple[float, float] = (1.0, 1.0)
    native: bool = True
    origin: tuple[float, float] = (0.0, 0.0)

    @property
    def room(self) -> np.ndarray:
        """(2,) the furthest corner of a window."""
        return np.maximum(np.array(self.shape) - np.array(self.extent), 0.0)

    def around(self, points: np.ndarray) -> np.ndarray:
        """(N, 2) corners of the windows around (N, 2) points (row, column), moved inside the raster.

        At native pixels the one that holds the point becomes the window's number ``size // 2`` along each axis.
        """
        extent = np.array(self.extent)
        corners = np.floor(points) - extent // 2 if self.native else points - extent / 2
        return np.clip(corners, 0.0, self.room)


@dataclass(frozen=True)
class Claims:
    """Windows that places ask for, in the order of the places.

    Attributes:
        corners: (N, 2) rows and columns.
        places: (N,) int64.
        shares: (N,) of the window that the place covers; 1 for a point.
    """

    corners: np.ndarray
    places: np.ndarray
    shares: np.ndarray

    @classmethod
    def joined(cls, parts: Sequence[tuple[int, np.ndarray, np.ndarray]]) -> Claims:
        corners = [part for _, part, _ in parts] or [np.zeros((0, 2))]
        numbers = [np.full(len(part), place, np.int64) for place, part, _ in parts] or [np.zeros(0, np.int64)]
        shares = [part for _, _, part in parts] or [np.zeros(0)]
        return cls(np.concatenate(corners), np.concatenate(numbers), np.concatenate(shares))

    def settled(self, labels: Sequence[str | None]) -> tuple[Claims, list[tuple[int, int]]]:
        """Each window once: the largest share has it, of equal ones the first place.

        Returns:
            What is left, and the pairs of places with different labels whose shares were alike.
        """
        order = np.lexsort([self.places, -self.shares])
        _, inverse = np.unique(self.corners, axis=0, return_inverse=True)
        best: dict[int, int] = {}
        ties = []
        for claim in order:
            winner = best.setdefault(int(inverse.reshape(-1)[claim]), int(claim))
            first, second = int(self.places[winner]), int(self.places[claim])
            if labels[first] != labels[second] and self.shares[winner] - self.shares[claim] < _SAME:
                ties.append((first, second))
        kept = np.array(sorted(best.values()), dtype=np.int64)
        return Claims(self.corners[kept], self.places[kept], self.shares[kept]), ties


@dataclass
class Laid:
    """The windows of one raster.

    Attributes:
        corners: (N, 2) rows and columns, pixels.
        labels, groups, splits: (N,).
    """

    corners: np.ndarray
    labels: list[str | None]
    groups: list[str]
    splits: list[str | None]


def claim_windows(shapes: np.ndarray, cut: Cut, options: PlaceOptions) -> tuple[Claims, list[int]]:
    """The windows that each place asks for.

    Args:
        shapes: (P,) points and polygons, coordinates (column, row) in pixels; ``None`` for one that is elsewhere.

    Returns:
        The claims, and the polygons within the raster of which no window is covered far enough.
    """
    import shapely

    height, width = cut.shape
    outline = shapely.box(0, 0, width, height)
    shapely.prepare(outline)
    if any(cut.origin):
        shapes = shapely.transform(shapes, lambda points: points - np.array(cut.origin)[::-1])
    parts: list[tuple[int, np.ndarray, np.ndarray]] = []
    thin = []
    for place in np.flatnonzero(shapely.intersects(outline, shapes)).tolist():
        shape = shapes[place]
        if shape.area == 0:
            points = shapely.get_coordinates(shape)[:, ::-1]
            points = points[((points >= 0) & (points < cut.shape)).all(1)]
            corners = np.unique(cut.around(points), axis=0)
            shares = np.ones(len(corners))
        else:
            corners = _around_pixels(shape, cut) if options.place_windows == "centre" else _of_grid(shape, cut)
            shares = _shares(shape, corners, cut)
            # A polygon that only touches the raster's outline claims nothing.
            enough = shares > _SAME
            if options.place_windows == "overlap" and not _is_small(shape, cut):
                enough = shares >= options.place_overlap - _SAME
            corners, shares = corners[enough], shares[enough]
            if not len(corners) and shape.intersection(outline).area > _SAME:
                thin.append(place)
            if options.place_limit is not None:
                spread = spread_rows(len(corners), options.place_limit)
                corners, shares = corners[spread], shares[spread]
        if len(corners):
            parts.append((place, corners + cut.origin, shares))
    return Claims.joined(parts), thin


def lay_places(
    frames: Mapping[str, Frame], cuts: Mapping[str, Cut], options: PlaceOptions, skipped: SkippedLog
) -> tuple[dict[str, Laid], dict[str, Any]]:
    """The windows of all rasters, from the places of ``options.places``.

    Args:
        frames, cuts: by raster.

    Returns:
        The windows of each raster that has any, and facts for the index's metadata.

    Raises:
        UsageError: as ``read_places``; if no place is inside a raster; if a group is on several sides of the split, or
            windows of different sides share pixels.
    """
    places = read_places(options, skipped)
    inside: set[int] = set()
    given: set[int] = set()
    thin: set[int] = set()
    ties: set[tuple[int, int]] = set()
    claims: dict[str, Claims] = {}
    for source, frame in frames.items():
        claimed, without = claim_windows(frame.shapes(places.shapes, places.systems), cuts[source], options)
        claims[source], alike = claimed.settled(places.labels)
        inside |= {*claimed.places.tolist(), *without}
        given |= {*claims[source].places.tolist()}
        thin |= {*without}
        ties |= {*alike}
    if not inside:
        raise UsageError(
            f"{places.file}: none of its {len(places)} places lies inside one of the {len(frames)} rasters.",
            "Check its coordinate system, or name the right one with data.places_crs.",
        )
    everything = range(len(places))
    troubles = {
        OUTSIDE: [places.numbers[place] for place in everything if place not in inside],
        THIN: [places.numbers[place] for place in sorted(thin - given)],
        LOST: [places.numbers[place] for place in sorted(inside - given - thin)],
    }
    for first, second in sorted(ties):
        reason = (
            f"it covers as much of a window as place {places.numbers[first]}, '{places.labels[first]}', which has the "
            f"window; this one is '{places.labels[second]}'. Draw places apart."
        )
        troubles[reason] = [places.numbers[second]]
    report_places(skipped, places.file, troubles)
    meeting = set().union(*(_meeting(claims[source], cuts[source]) for source in claims))
    groups = _groups(places, meeting)
    refuse_shared_groups(zip(groups, places.splits, strict=True), str(places.file), "place_split")
    _refuse_shared_pixels(places, meeting)
    laid = {
        source: Laid(
            found.corners,
            [places.labels[place] for place in found.places],
            [groups[place] for place in found.places],
            [places.splits[place] for place in found.places],
        )
        for source, found in claims.items()
        if len(found.places)
    }
    facts = {
        "file": str(places.file),
        "places": len(places),
        "used": len(given),
        "grouped": places.grouped or any(places.shapes[place].area > 0 for place in given),
        "meeting": sum(groups[first] != groups[second] for first, second in meeting),
    }
    return laid, facts


def _is_small(shape: Any, cut: Cut) -> bool:
    left, top, right, bottom = shape.bounds
    return bottom - top <= cut.extent[0] and right - left <= cut.extent[1]


def _of_grid(shape: Any, cut: Cut) -> np.ndarray:
    """(N, 2) corners of the windows of the raster's grid that meet a polygon's bounding box, or the one around it."""
    left, top, right, bottom = shape.bounds
    if _is_small(shape, cut):
        return cut.around(np.array([[(top + bottom) / 2, (left + right) / 2]]))
    axes = []
    for length, extent, stride, low, high in zip(
        cut.shape, cut.extent, cut.stride, (top, left), (bottom, right), strict=True
    ):
        starts = window_starts(length, extent, stride, edges="shift")
        axes.append(starts[(starts < high) & (starts + extent > low)])
    return np.stack([axis.reshape(-1) for axis in np.meshgrid(*axes, indexing="ij")], axis=1)


def _around_pixels(shape: Any, cut: Cut) -> np.ndarray:
    """(N, 2) corners of the windows around a polygon's pixels; if it holds no pixel's middle, around a point of it."""
    import shapely

    left, top, right, bottom = shape.bounds
    axes = []
    for length, stride, low, high in zip(cut.shape, cut.stride, (top, left), (bottom, right), strict=True):
        first = max(int(np.floor(low / stride)) - 1, 0)
        last = min(int(np.ceil(high / stride)) + 1, int(np.ceil(length / stride)))
        axes.append(np.arange(first, last) * stride)
    lattice = np.stack([axis.reshape(-1) for axis in np.meshgrid(*axes, indexing="ij")], axis=1)
    lattice = lattice + np.array(cut.step) / 2
    shapely.prepare(shape)
    within = lattice[shapely.contains_xy(shape, lattice[:, 1], lattice[:, 0])]
    within = within[((within >= 0) & (within < cut.shape)).all(1)]
    if not len(within):
        point = shapely.point_on_surface(shape.intersection(shapely.box(0, 0, cut.shape[1], cut.shape[0])))
        within = np.array([[point.y, point.x]])
    return np.unique(cut.around(within), axis=0)


def _shares(shape: Any, corners: np.ndarray, cut: Cut) -> np.ndarray:
    """(N,) of each window that a polygon covers."""
    import shapely

    boxes = _boxes(corners, cut)
    shapely.prepare(shape)
    shares = shapely.contains_properly(shape, boxes).astype(np.float64)
    partly = np.flatnonzero(shares == 0)
    shares[partly] = shapely.area(shapely.intersection(boxes[partly], shape)) / (cut.extent[0] * cut.extent[1])
    return shares


def _boxes(corners: np.ndarray, cut: Cut, inset: float = 0.0) -> np.ndarray:
    import shapely

    top, left = corners[:, 0] + inset, corners[:, 1] + inset
    boxes = shapely.box(left, top, left + cut.extent[1] - 2 * inset, top + cut.extent[0] - 2 * inset)
    return np.asarray(boxes, dtype=object).reshape(-1)


def _meeting(claims: Claims, cut: Cut) -> set[tuple[int, int]]:
    """Pairs of places whose windows share pixels."""
    import shapely

    # Claims come in the order of the places.
    numbers, first = np.unique(claims.places, return_index=True)
    boxes = np.split(_boxes(claims.corners, cut, _INSET), first[1:])
    covered = np.array([shapely.union_all(own) for own in boxes[: len(numbers)]], dtype=object)
    one, other = shapely.STRtree(covered).query(covered, predicate="intersects")
    return {(int(numbers[a]), int(numbers[b])) for a, b in zip(one, other, strict=True) if a < b}


def _groups(places: Places, meeting: Iterable[tuple[int, int]]) -> list[str]:
    """Of each place: what the file says, or its own; points that share pixels have one together."""
    leader = list(range(len(places)))

    def lead(place: int) -> int:
        while leader[place] != place:
            leader[place] = leader[leader[place]]
            place = leader[place]
        return place

    if not places.grouped:
        for pair in sorted(meeting):
            if all(places.shapes[place].area == 0 for place in pair):
                first, second = sorted(map(lead, pair))
                leader[second] = first
    return [given or places.name(lead(place)) for place, given in enumerate(places.groups)]


def _refuse_shared_pixels(places: Places, meeting: Iterable[tuple[int, int]]) -> None:
    """
    Raises:
        UsageError: if windows of places on different sides of the split share pixels.
    """
    parted = sorted(pair for pair in meeting if len({places.splits[place] for place in pair} - {None}) > 1)
    if parted:
        first, second = parted[0]
        raise UsageError(
            f"{places.file}: windows of places {places.numbers[first]} ({places.splits[first]}) and "
            f"{places.numbers[second]} ({places.splits[second]}) share pixels, as do those of {len(parted) - 1} more "
            "pairs on different sides of the split.",
            "Put neighbours on one side, or make data.size smaller.",
        )
