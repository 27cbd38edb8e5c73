"""Tags, axes and marks of the report's charts: SVG text whose colours come from the page's style sheet."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")

MARKS = 8
"""Colours, and shapes, before they repeat; the pairs of both repeat after the square of it."""


def plain(text: object) -> str:
    """``text`` with what neither XML nor a file in UTF-8 can hold (control characters, lone surrogates) replaced."""
    return _CONTROL.sub("\ufffd", str(text))


def tag(name: str, *content: str, **attributes: object) -> str:
    """An element. Underscores in attribute names become hyphens (``class_`` is ``class``); ``None`` leaves one out.

    Args:
        content: markup, not escaped; text goes through ``text``.
    """
    written = []
    for key, value in attributes.items():
        if value is not None:
            key = key.rstrip("_").replace("_", "-")
            written.append(f' {key}="{html.escape(plain(number(value) if isinstance(value, float) else value))}"')
    inner = "".join(content)
    return f"<{name}{''.join(written)}>{inner}</{name}>" if inner else f"<{name}{''.join(written)}/>"


def text(value: object) -> str:
    """Escaped for the inside of an element."""
    return html.escape(plain(value))


def number(value: float) -> str:
    """A coordinate: two decimals at most."""
    written = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if written == "-0" else written


def short(name: str, most: int) -> str:
    """At most that many characters: the middle goes first, since names differ at their ends."""
    if len(name) <= most:
        return name
    tail = (most - 1) // 2
    return f"{name[: most - 1 - tail]}…{name[len(name) - tail :]}"


def digits(value: float) -> str:
    """Without decimals where it is whole."""
    return f"{value:.0f}" if value == round(value) else f"{value:g}"


@dataclass(frozen=True)
class Axis:
    """One direction of a chart.

    Attributes:
        low, high: values at its ends.
        ticks: value and what is written there.
        log2: equal ratios are equal lengths.
    """

    label: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    log2: bool = False

    @classmethod
    def linear(cls, label: str, values: Iterable[float], ticks: int = 5) -> Axis:
        """From the tick below the lowest to the tick above the highest of the finite values."""
        finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
        low, high = min(finite), max(finite)
        if low == high:
            low, high = low - (abs(low) or 1.0) / 10, high + (abs(high) or 1.0) / 10
        step = _nice((high - low) / ticks)
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        places = [place * step for place in range(first, last + 1)]
        return cls(label, places[0], places[-1], tuple((place, tick_text(place, step)) for place in places))

    @classmethod
    def doubling(cls, label: str, values: Iterable[float], written: Callable[[float], str] = digits) -> Axis:
        """A tick at each of the values (all above 0), equal ratios at equal lengths.

        Args:
            written: what stands at a tick.
        """
        places = sorted(set(map(float, values)))
        return cls(label, places[0], places[-1], tuple((place, written(place)) for place in places), log2=True)

    def share(self, value: float) -> float:
        """Where it lies, 0 at ``low`` and 1 at ``high``; 0.5 where both are the same."""
        low, high = self.low, self.high
        if self.log2:
            low, high, value = math.log2(low), math.log2(high), math.log2(value)
        return (value - low) / (high - low) if high > low else 0.5


def _nice(rough: float) -> float:
    """The next of 1, 2, 5, 10, 20, ... (times any power of ten)."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))


def tick_text(value: float, step: float) -> str:
    """With as many decimals as the step needs; thousands as 20k, tiny steps as powers of ten."""
    if abs(value) < step / 1e6:
        return "0"
    if step >= 1000:
        return f"{value / 1000:g}k"
    if step < 1e-3:
        digits, power = f"{value:.{max(0, math.floor(math.log10(abs(value) / step)) + 1)}e}".split("e")
        digits = digits.rstrip("0").rstrip(".") if "." in digits else digits
        return f"{digits}e{int(power)}".replace("-", "−")
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:.{decimals}f}".replace("-", "−")


@dataclass(frozen=True)
class Plot:
    """Where the two axes lie on the drawing, in its units, y downwards."""

    x: Axis
    y: Axis
    left: float
    top: float
    width: float
    height: float

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point lies."""
        return self.left + self.width * self.x.share(x), self.top + self.height * (1 - self.y.share(y))

    def furniture(self) -> str:
        """Horizontal rules, tick labels and axis titles."""
        right, bottom = self.left + self.width, self.top + self.height
        parts = []
        for value, written in self.y.ticks:
            y = self.at(self.x.low, value)[1]
            parts.append(tag("line", class_="grid", x1=self.left, x2=right, y1=y, y2=y))
            parts.append(tag("text", text(written), class_="tick", x=self.left - 6, y=y + 4, text_anchor="end"))
        for value, written in self.x.ticks:
            x = self.at(value, self.y.low)[0]
            parts.append(tag("line", class_="axis", x1=x, x2=x, y1=bottom, y2=bottom + 4))
            parts.append(tag("text", text(written), class_="tick", x=x, y=bottom + 17, text_anchor="middle"))
        parts.append(tag("line", class_="axis", x1=self.left, x2=right, y1=bottom, y2=bottom))
        middle = self.left + self.width / 2
        parts.append(tag("text", text(self.x.label), class_="name", x=middle, y=bottom + 35, text_anchor="middle"))
        parts.append(tag("text", text(self.y.label), class_="name", x=4, y=self.top - 15))
        return "".join(parts)


def drawing(
    key: str, width: float, height: float, title: str, description: str, content: str, class_: str = "chart"
) -> str:
    """A whole SVG that says in words what it shows.

    Args:
        key: unique on the page; ids derive from it.
    """
    return tag(
        "svg",
        tag("title", text(title), id=f"{key}-title"),
        tag("desc", text(description), id=f"{key}-desc"),
        content,
        xmlns="http://www.w3.org/2000/svg",
        class_=class_,
        role="img",
        viewBox=f"0 0 {number(width)} {number(height)}",
        width=number(width),
        height=number(height),
        aria_labelledby=f"{key}-title {key}-desc",
    )


def path(points: Sequence[tuple[float, float]], close: bool = False) -> str:
    """Path data through the points."""
    return "M" + "L".join(f"{number(x)},{number(y)}" for x, y in points) + ("Z" if close else "")


def mark_class(mark: int) -> str:
    """The style sheet's class of a colour."""
    return f"c{mark % MARKS}"


def mark_path(mark: int, x: float, y: float, radius: float) -> str:
    """Path data of a shape around a point: circle, square, triangles up and down, diamond, plus, cross, bar. All have
    about the same area, so that none looks heavier."""
    shape = (mark + mark // MARKS) % MARKS
    if shape == 0:
        r, across = number(radius), number(2 * radius)
        return f"M{number(x - radius)},{number(y)}a{r},{r} 0 1,0 {across},0a{r},{r} 0 1,0 -{across},0Z"
    outline = [(x + radius * across, y + radius * down) for across, down in _OUTLINES[shape]]
    return path(outline, close=True)


def _turned(outline: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    half = math.sqrt(0.5)
    return [(half * (across - down), half * (across + down)) for across, down in outline]


_PLUS = [
    (-0.4, -1.3), (0.4, -1.3), (0.4, -0.4), (1.3, -0.4), (1.3, 0.4), (0.4, 0.4),
    (0.4, 1.3), (-0.4, 1.3), (-0.4, 0.4), (-1.3, 0.4), (-1.3, -0.4), (-0.4, -0.4),
]  # fmt: skip
_OUTLINES: dict[int, Sequence[tuple[float, float]]] = {
    1: [(-0.89, -0.89), (0.89, -0.89), (0.89, 0.89), (-0.89, 0.89)],
    2: [(0, -1.45), (1.25, 0.85), (-1.25, 0.85)],
    3: [(0, -1.26), (1.26, 0), (0, 1.26), (-1.26, 0)],
    4: [(0, 1.45), (1.25, -0.85), (-1.25, -0.85)],
    5: _PLUS,
    6: _turned(_PLUS),
    7: [(-1.6, -0.5), (1.6, -0.5), (1.6, 0.5), (-1.6, 0.5)],
}


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The places moved apart, as little as that needs in the least-squares sense, so that neighbours keep ``gap`` and
    all lie between the bounds; where they do not all fit, the gap shrinks.

    With ranks taken off (place - rank * gap) the wanted places only have to rise, which pooling adjacent violators
    gives.
    """
    if not places:
        return []
    gap = min(gap, (high - low) / max(len(places) - 1, 1))
    order = sorted(range(len(places)), key=places.__getitem__)
    blocks: list[tuple[float, int]] = []
    for rank, place in enumerate(order):
        total, size = places[place] - rank * gap, 1
        while blocks and blocks[-1][0] / blocks[-1][1] > total / size:
            before, members = blocks.pop()
            total, size = total + before, size + members
        blocks.append((total, size))
    level = [total / size for total, size in blocks for _ in range(size)]
    highest = high - gap * (len(places) - 1)
    moved = [0.0] * len(places)
    for rank, place in enumerate(order):
        moved[place] = max(low, min(highest, level[rank])) + rank * gap
    return moved
