"""Outlines of regions of samples, as path data: exact, along the samples' edges."""

from __future__ import annotations

import numpy as np

from fmsuite.core.reports.svg import number

_TURNS = {(0, 1): ((1, 0), (0, 1), (-1, 0)), (0, -1): ((-1, 0), (0, -1), (1, 0)),
          (1, 0): ((0, -1), (1, 0), (0, 1)), (-1, 0): ((0, 1), (-1, 0), (0, -1))}  # fmt: skip
"""For a step (down, across) along an edge with the region on its right: the next step's candidates, right turn first,
so that samples which only meet at a corner have outlines of their own."""

Corner = tuple[int, int]


def loops(mask: np.ndarray) -> list[list[Corner]]:
    """The closed polygons around a region and its holes; filled by the even-odd rule they are the region.

    Args:
        mask: (H, W) bool.

    Returns:
        For each polygon its corners (row, column), 0 to H and 0 to W, without those in the middle of a straight line.
    """
    open_: dict[Corner, set[Corner]] = {}
    padded = np.pad(mask.astype(bool), 1)
    inner = padded[1:-1, 1:-1]
    # (a neighbour's offset, the edge's first corner, its step): the region lies to the right of the step.
    for (down, across), (first_down, first_across), step in (
        ((-1, 0), (0, 0), (0, 1)),
        ((1, 0), (1, 1), (0, -1)),
        ((0, 1), (0, 1), (1, 0)),
        ((0, -1), (1, 0), (-1, 0)),
    ):
        beyond = padded[1 + down : 1 + down + mask.shape[0], 1 + across : 1 + across + mask.shape[1]]
        for row, column in np.argwhere(inner & ~beyond).tolist():
            open_.setdefault((row + first_down, column + first_across), set()).add(step)
    found = []
    while open_:
        start = next(iter(open_))
        corners, place, step = [start], start, open_[start].pop()
        if not open_[start]:
            del open_[start]
        while (place := (place[0] + step[0], place[1] + step[1])) != start or _unfinished(place, step, open_):
            following = next(turn for turn in _TURNS[step] if turn in open_[place])
            open_[place].discard(following)
            if not open_[place]:
                del open_[place]
            if following != step:
                corners.append(place)
            step = following
        found.append(_without_straight_start(corners))
    return found


def _unfinished(place: Corner, step: Corner, open_: dict[Corner, set[Corner]]) -> bool:
    """Whether a walk that is back where it began has passed a corner at which two outlines meet, and turns off."""
    return place in open_ and _TURNS[step][0] in open_[place]


def _without_straight_start(corners: list[Corner]) -> list[Corner]:
    before, start, after = corners[-1], corners[0], corners[1]
    straight = before[0] == start[0] == after[0] or before[1] == start[1] == after[1]
    return corners[1:] if straight else corners


def outline_path(mask: np.ndarray, pitch: tuple[float, float] = (1.0, 1.0)) -> str:
    """SVG path data of ``loops``, empty for an empty region.

    Args:
        mask: (H, W) bool.
        pitch: length of a sample down and across.
    """
    parts = []
    for corners in loops(mask):
        (down, across), *others = corners
        parts.append(f"M{number(across * pitch[1])},{number(down * pitch[0])}")
        for row, column in others:
            parts.append(f"V{number(row * pitch[0])}" if column == across else f"H{number(column * pitch[1])}")
            down, across = row, column
        parts.append("Z")
    return "".join(parts)
