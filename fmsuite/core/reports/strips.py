"""A chart with a dot for every case: one strip an arm, values to the right."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from fmsuite.core.reports.charts import LETTER, LONGEST_LABEL, WIDTH, Look
from fmsuite.core.reports.svg import Axis, Plot, drawing, mark_class, mark_path, path, short, tag, text

TOP, BOTTOM, ROW, RADIUS = 8.0, 46.0, 40.0, 3.0
MOST_NAMED = 400
"""Dots with a name of their own (a tooltip); with more the page grows too large."""


@dataclass(frozen=True)
class Strip:
    """
    Attributes:
        name: written to its left.
        values: (N,) finite.
        cases: (N,) their names.
        mark, look: as of a ``Curve``.
    """

    name: str
    values: Sequence[float]
    cases: Sequence[str]
    mark: int = 0
    look: Look = "encoder"


def strips(key: str, rows: Sequence[Strip], *, title: str, x_label: str) -> str:
    """Each case a dot, moved aside where dots would cover each other; a bar is the median.

    Args:
        key: unique on the page.
    """
    left = min(max(len(row.name) for row in rows), LONGEST_LABEL) * LETTER + 16
    x = Axis.linear(x_label, (value for row in rows for value in row.values))
    plot = Plot(x, Axis("", 0, 1, ()), left, TOP, WIDTH - left - 24, ROW * len(rows))
    parts = [
        tag("line", class_="grid", x1=at, x2=at, y1=TOP, y2=TOP + plot.height)
        for at in (plot.at(value, 0)[0] for value, _ in x.ticks)
    ]
    parts.append(plot.furniture())
    named = sum(len(row.values) for row in rows) <= MOST_NAMED
    for number, row in enumerate(rows):
        parts.append(_strip(plot, row, TOP + (number + 0.5) * ROW, named))
    said = " ".join(_said(row) for row in rows)
    return drawing(key, WIDTH, TOP + ROW * len(rows) + BOTTOM, title, f"{x_label} of each case. {said}", "".join(parts))


def _strip(plot: Plot, row: Strip, middle: float, named: bool) -> str:
    colour = mark_class(row.mark)
    label = tag("title", text(row.name)) + text(short(row.name, LONGEST_LABEL))
    parts = [tag("text", label, class_=f"label {colour}", x=plot.left - 12, y=middle + 4, text_anchor="end")]
    look = f"{'hollow' if row.look == 'control' else 'solid'} {colour}"
    places = [plot.at(value, 0)[0] for value in row.values]
    shapes = [
        mark_path(row.mark, place, middle + aside, RADIUS)
        for place, aside in zip(places, swarm(places, 2 * RADIUS, ROW / 2 - RADIUS - 1), strict=True)
    ]
    if named:
        for shape, case, value in zip(shapes, row.cases, row.values, strict=True):
            parts.append(tag("path", tag("title", text(f"{case}: {value:.3f}")), class_=look, d=shape))
    elif shapes:
        parts.append(tag("path", class_=look, d="".join(shapes)))
    if row.values:
        at = plot.at(statistics.median(row.values), 0)[0]
        bar = path([(at, middle - ROW / 2 + 4), (at, middle + ROW / 2 - 4)])
        parts += [tag("path", class_=f"median {part}", d=bar) for part in ("under", "over")]
    return tag("g", *parts)


def swarm(places: Sequence[float], apart: float, most: float) -> list[float]:
    """How far aside each dot goes so that neighbours are ``apart``: as little as it can, by turns up and down; where
    there is no room left within ``most``, dots lie over each other.

    Args:
        places: of the dots along the strip.
    """
    aside = [0.0] * len(places)
    placed: list[int] = []
    for dot in sorted(range(len(places)), key=places.__getitem__):
        near = [other for other in placed if places[dot] - places[other] < apart]
        steps = [sign * step * apart / 4 for step in range(1 + int(4 * most / apart)) for sign in (1, -1)]
        free = (
            step
            for step in steps
            if all(
                (places[dot] - places[other]) ** 2 + (step - aside[other]) ** 2 >= apart**2 * (1 - 1e-9)
                for other in near
            )
        )
        aside[dot] = next(free, 0.0)
        placed = [*near, dot]
    return aside


def _said(row: Strip) -> str:
    if not row.values:
        return f"{row.name}: none."
    low = min(range(len(row.values)), key=row.values.__getitem__)
    high = max(range(len(row.values)), key=row.values.__getitem__)
    return (
        f"{row.name}: {len(row.values)} cases, median {statistics.median(row.values):.3f}, "
        f"lowest {row.values[low]:.3f} ({row.cases[low]}), highest {row.values[high]:.3f} ({row.cases[high]})."
    )
