"""The report's charts: curves with bands, curves over steps, and maps of points."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from fmsuite.core.evaluation.results import Estimate
from fmsuite.core.reports.svg import Axis, Plot, digits, drawing, mark_class, mark_path, path, short, spread, tag, text

WIDTH, HEIGHT = 460.0, 300.0
LEFT, TOP, BOTTOM = 48.0, 34.0, 46.0
LETTER, LONGEST_LABEL, LABEL_GAP = 7.4, 20, 15.0
STEPS_HEIGHT = 220.0
MOST_POINTS = 300
MAP_SIDE, MAP_MARGIN = 400.0, 12.0
DOTS_WIDTH, DOTS_TOP, ROW, DOT_GAP, LONGEST_ROW = 560.0, 22.0, 26.0, 11.0, 28
SHUFFLED = "shuffled labels"

Look = Literal["encoder", "control", "shuffled"]


@dataclass(frozen=True)
class Curve:
    """
    Attributes:
        name: written at its end.
        x, y: (P,) its points, x rising.
        low, high: (P,) the band, ``None`` where there is no interval; empty for no band at all.
        mark: colour and shape, see ``svg.mark_path``.
        look: controls are dashed with hollow marks, shuffled ones dotted without marks (a dot where there is only one
            point).
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()
    mark: int = 0
    look: Look = "encoder"

    @property
    def band(self) -> list[tuple[float, float, float]]:
        """(x, low, high) where there is an interval."""
        return [(x, a, b) for x, a, b in zip(self.x, self.low, self.high) if a is not None and b is not None]


def shot_curves(
    key: str,
    curves: Sequence[Curve],
    *,
    title: str,
    y_label: str,
    x_label: str,
    chance: float | None = None,
    written: Callable[[float], str] = digits,
) -> str:
    """A metric against the number, or share, of labelled items, which is on a doubling scale.

    All curves with shuffled labels share one name, ``SHUFFLED``, at the mean of their ends: they should lie together.

    Args:
        key: unique on the page.
        chance: where a line marks what guessing gives.
        written: how a number of items is written.
    """
    shown = [value for curve in curves for value in (*curve.y, *(end for _, *ends in curve.band for end in ends))]
    x = Axis.doubling(x_label, (value for curve in curves for value in curve.x), written)
    y = Axis.linear(y_label, shown if chance is None else [*shown, chance])
    named = [curve for curve in curves if curve.look != "shuffled"]
    shuffled = [(place, value) for *_, place, value in _ends([c for c in curves if c.look == "shuffled"])]
    names = [curve.name for curve in named] + [SHUFFLED] * bool(shuffled) + ["chance"] * (chance is not None)
    right = min(max(map(len, names), default=0), LONGEST_LABEL) * LETTER + 18
    height = max(HEIGHT, TOP + BOTTOM + LABEL_GAP * len(names))
    plot = Plot(x, y, LEFT, TOP, WIDTH - LEFT - right, height - TOP - BOTTOM)
    order = sorted(curves, key=lambda curve: ("shuffled", "control", "encoder").index(curve.look))
    parts = [plot.furniture(), *(_band(plot, curve) for curve in order)]
    if chance is not None:
        level = plot.at(x.low, chance)[1]
        parts.append(tag("line", class_="chance", x1=LEFT, x2=LEFT + plot.width, y1=level, y2=level))
    parts += [_curve(plot, curve) for curve in order]
    ends = [(name, look, mark, plot.at(last_x, last_y)) for name, look, mark, last_x, last_y in _ends(named)]
    if shuffled:
        furthest, level = max(place for place, _ in shuffled), sum(value for _, value in shuffled) / len(shuffled)
        ends.append((SHUFFLED, "shuffled", 0, plot.at(furthest, level)))
    if chance is not None:
        ends.append(("chance", "chance", 0, plot.at(x.high, chance)))
    parts.append(_labels(plot, ends))
    said = [f"{curve.name}: {_listed(curve, written)}." for curve in curves]
    if chance is not None:
        said.append(f"Chance is {chance:.3f}.")
    return drawing(key, WIDTH, height, title, f"{y_label} against {x_label}. {' '.join(said)}", "".join(parts))


def step_curves(
    key: str, curves: Sequence[Curve], *, title: str, y_label: str, marked: Sequence[int] = (), marked_as: str = ""
) -> str:
    """A quantity against training steps; long curves are thinned to means of equal numbers of neighbours.

    Args:
        marked: steps at which a vertical line stands, such as reports of a collapse.
        marked_as: what those lines mean.
    """
    thin = [thinned(curve) for curve in curves]
    x = Axis.linear("step", [0, *(value for curve in curves for value in curve.x), *marked], ticks=6)
    y = Axis.linear(y_label, (value for curve in thin for value in curve.y))
    named = len(curves) > 1
    right = min(max(len(curve.name) for curve in curves), LONGEST_LABEL) * LETTER + 18 if named else 14.0
    plot = Plot(x, y, LEFT, TOP, WIDTH - LEFT - right, STEPS_HEIGHT - TOP - BOTTOM)
    parts = [plot.furniture()]
    for step in marked:
        across, down = plot.at(step, y.high)
        parts.append(tag("line", class_="alarm", x1=across, x2=across, y1=down, y2=down + plot.height))
        parts.append(tag("text", "!", class_="alarm-text", x=across, y=down - 3, text_anchor="middle"))
    parts += [_curve(plot, curve, marks=len(curve.x) <= 12) for curve in thin]
    if named:
        ends = [(name, look, mark, plot.at(*last)) for name, look, mark, *last in _ends(thin)]
        parts.append(_labels(plot, ends))
    said = [f"{curve.name or y_label}: {_first_and_last(curve)}." for curve in curves]
    if marked:
        said.append(f"{marked_as} at step {', '.join(map(str, marked))}.")
    return drawing(key, WIDTH, STEPS_HEIGHT, title, " ".join(said), "".join(parts))


@dataclass(frozen=True)
class Dots:
    """
    Attributes:
        name: whose they are.
        mark: colour and shape.
        estimates: one for each row of the chart, ``None`` where there is none.
    """

    name: str
    mark: int
    estimates: Sequence[Estimate | None]


def dot_rows(
    key: str, rows: Sequence[str], dots: Sequence[Dots], *, title: str, x_label: str, chance: float | None = None
) -> str:
    """A line for each of several settings, with a mark and its interval for each encoder, one below the other.

    Args:
        key: unique on the page.
        chance: where a line marks what guessing gives.
    """
    shown = [e for each in dots for e in each.estimates if e is not None]
    ends = [value for e in shown for value in (e.mean, e.low, e.high) if value is not None]
    x = Axis.linear(x_label, ends if chance is None else [*ends, chance])
    left = min(max(map(len, rows)), LONGEST_ROW) * LETTER + 14
    band = max(ROW, DOT_GAP * (len(dots) + 1))
    height = DOTS_TOP + band * len(rows) + BOTTOM
    plot = Plot(x, Axis("", 0, 1, ()), left, DOTS_TOP, DOTS_WIDTH - left - 14, band * len(rows))
    parts = [plot.furniture()]
    for value, _ in x.ticks:
        across = plot.at(value, 0)[0]
        parts.append(tag("line", class_="grid", x1=across, x2=across, y1=DOTS_TOP, y2=DOTS_TOP + plot.height))
    if chance is not None:
        level = plot.at(chance, 0)[0]
        parts.append(tag("line", class_="chance", x1=level, x2=level, y1=DOTS_TOP, y2=DOTS_TOP + plot.height))
        parts.append(tag("text", "chance", class_="tick", x=level, y=DOTS_TOP - 5, text_anchor="middle"))
    said = []
    for number, row in enumerate(rows):
        top = DOTS_TOP + band * number
        if number:
            parts.append(tag("line", class_="grid", x1=left, x2=left + plot.width, y1=top, y2=top))
        name = tag("title", text(row)) + text(short(row, LONGEST_ROW))
        parts.append(tag("text", name, class_="tick", x=left - 8, y=top + band / 2 + 4, text_anchor="end"))
        for place, each in enumerate(dots):
            estimate = each.estimates[number]
            if estimate is None:
                continue
            y = top + band * (place + 1) / (len(dots) + 1)
            across = plot.at(estimate.mean, 0)[0]
            written = f"{each.name}, {row}: {estimate.mean:.3f}"
            drawn = []
            if estimate.low is not None and estimate.high is not None:
                bounds = [(plot.at(end, 0)[0], y) for end in (estimate.low, estimate.high)]
                drawn.append(tag("path", class_=f"whisker {mark_class(each.mark)}", d=path(bounds)))
                written += f" ({estimate.low:.3f} to {estimate.high:.3f})"
            drawn.append(tag("path", class_=f"solid {mark_class(each.mark)}", d=mark_path(each.mark, across, y, 4.0)))
            parts.append(tag("g", tag("title", text(written)), *drawn))
            said.append(f"{written}.")
    return drawing(key, DOTS_WIDTH, height, title, " ".join(said), "".join(parts))


@dataclass(frozen=True)
class Cloud:
    """The points of one class on a map: (P,) coordinates between -1 and 1, solid or hollow."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    solid: Sequence[bool]
    mark: int = 0


def feature_map(key: str, clouds: Sequence[Cloud], *, title: str) -> str:
    """Points in a square, equal lengths on both axes, y upwards. Every class has a colour and a shape of its own."""
    points = sum(len(cloud.x) for cloud in clouds)
    radius = 4.0 if points <= 200 else 3.2 if points <= 800 else 2.4
    reach = max((abs(value) for cloud in clouds for value in (*cloud.x, *cloud.y)), default=0.0) or 1.0
    axis = Axis("", -reach, reach, ())
    side = MAP_SIDE - 2 * MAP_MARGIN
    plot = Plot(axis, axis, MAP_MARGIN, MAP_MARGIN, side, side)
    parts = [tag("rect", class_="frame", x=0.5, y=0.5, width=MAP_SIDE - 1, height=MAP_SIDE - 1)]
    for solid in (False, True):
        for cloud in clouds:
            chosen = [
                mark_path(cloud.mark, *plot.at(x, y), radius)
                for x, y, kept in zip(cloud.x, cloud.y, cloud.solid, strict=True)
                if kept == solid
            ]
            if chosen:
                look = f"{'solid' if solid else 'hollow'} {mark_class(cloud.mark)}"
                parts.append(tag("path", tag("title", text(cloud.name)), class_=look, d="".join(chosen)))
    said = ", ".join(f"{len(cloud.x)} of {cloud.name}" for cloud in clouds)
    return drawing(key, MAP_SIDE, MAP_SIDE, title, f"{points} points: {said}.", "".join(parts), "chart map")


def swatch(mark: int, look: str = "solid") -> str:
    """A legend's mark; what it stands for is written beside it."""
    shape = tag("path", class_=f"{look} {mark_class(mark)}", d=mark_path(mark, 8, 8, 4.2))
    return tag("svg", shape, class_="swatch", viewBox="0 0 16 16", width=16, height=16, aria_hidden="true")


def thinned(curve: Curve, most: int = MOST_POINTS) -> Curve:
    """Means of equal numbers of neighbouring points, at most ``most`` of them; values that are not finite stay out of
    the means, and make a gap where there is nothing else."""
    size = math.ceil(len(curve.x) / most)
    if size <= 1:
        return curve
    across, down = [], []
    for start in range(0, len(curve.x), size):
        xs = list(curve.x[start : start + size])
        finite = [value for value in curve.y[start : start + size] if math.isfinite(value)]
        across.append(sum(xs) / len(xs))
        down.append(sum(finite) / len(finite) if finite else math.nan)
    return Curve(curve.name, across, down, mark=curve.mark, look=curve.look)


def _band(plot: Plot, curve: Curve) -> str:
    """The area between the bounds; a bar where there is only one point."""
    band = curve.band
    if curve.look == "shuffled" or not band:
        return ""
    colour = f"{mark_class(curve.mark)} {curve.look}"
    if len(band) == 1:
        x, low, high = band[0]
        return tag("path", class_=f"whisker {colour}", d=path([plot.at(x, low), plot.at(x, high)]))
    outline = [plot.at(x, high) for x, _, high in band] + [plot.at(x, low) for x, low, _ in reversed(band)]
    return tag("path", class_=f"band {colour}", d=path(outline, close=True))


def _curve(plot: Plot, curve: Curve, marks: bool = True) -> str:
    colour = f"{mark_class(curve.mark)} {curve.look}"
    parts = [
        tag("path", class_=f"line {colour}", d=path([plot.at(x, y) for x, y in run]))
        for run in _runs(curve)
        if len(run) > 1
    ]
    if marks and curve.look != "shuffled":
        solid = "hollow" if curve.look == "control" else "solid"
        shapes = [mark_path(curve.mark, *plot.at(x, y), 3.4) for run in _runs(curve) for x, y in run]
        if shapes:
            parts.append(tag("path", class_=f"{solid} {mark_class(curve.mark)}", d="".join(shapes)))
    if curve.look == "shuffled":
        lone = [mark_path(0, *plot.at(*run[0]), 1.8) for run in _runs(curve) if len(run) == 1]
        if lone:
            parts.append(tag("path", class_="solid muted", d="".join(lone)))
    return tag("g", tag("title", text(curve.name)) if curve.name else "", *parts)


def _runs(curve: Curve) -> Iterator[list[tuple[float, float]]]:
    """Neighbouring points without those that are not finite."""
    run: list[tuple[float, float]] = []
    for x, y in zip(curve.x, curve.y, strict=True):
        if math.isfinite(y):
            run.append((x, y))
        elif run:
            yield run
            run = []
    if run:
        yield run


def _ends(curves: Sequence[Curve]) -> Iterator[tuple[str, str, int, float, float]]:
    for curve in curves:
        finite = [point for run in _runs(curve) for point in run]
        if finite:
            yield curve.name, curve.look, curve.mark, *finite[-1]


def _labels(plot: Plot, ends: Sequence[tuple[str, str, int, tuple[float, float]]]) -> str:
    """Names to the right of the plot, moved apart, each tied to the end of its curve."""
    right = plot.left + plot.width
    places = spread([y for *_, (_, y) in ends], LABEL_GAP, plot.top, plot.top + plot.height)
    parts = []
    for (name, look, mark, (x, y)), place in zip(ends, places, strict=True):
        tie = path([(x + 5, y), (right + 7, place), (right + 10, place)])
        parts.append(tag("path", class_="tie", d=tie))
        colour = "muted" if look in ("chance", "shuffled") else mark_class(mark)
        shown = tag("title", text(name)) + text(short(name, LONGEST_LABEL))
        parts.append(tag("text", shown, class_=f"label {colour}", x=right + 13, y=place + 4))
    return "".join(parts)


def _listed(curve: Curve, written: Callable[[float], str]) -> str:
    bounds = {x: (low, high) for x, low, high in curve.band}
    said = []
    for x, y in zip(curve.x, curve.y, strict=True):
        interval = f" ({bounds[x][0]:.3f} to {bounds[x][1]:.3f})" if x in bounds else ""
        said.append(f"{y:.3f}{interval} at {written(x)}")
    return ", ".join(said)


def _first_and_last(curve: Curve) -> str:
    finite = [point for run in _runs(curve) for point in run]
    if not finite:
        return "no finite value"
    (first_x, first_y), (last_x, last_y) = finite[0], finite[-1]
    return f"{first_y:.4g} at step {first_x:g}, {last_y:.4g} at step {last_x:g}"
