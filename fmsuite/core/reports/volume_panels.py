"""One segmented case for the page: slices with truth and prediction side by side, each label in a colour of its own."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from fmsuite.core.data.sample import Array
from fmsuite.core.reports.case_slices import CaseSlices, Slice
from fmsuite.core.reports.outlines import outline_path
from fmsuite.core.reports.svg import drawing, tag, text
from fmsuite.core.reports.wording import decimal

LONGEST_SIDE = 400.0
"""Of a drawing, in its units."""
COLOURS = 7
"""Label colours of the style sheet, ``l0`` and so on, before they repeat: on grey pictures they are the same on light
and on dark pages (Okabe and Ito 2008, without black)."""
_PIXELATED = 192
"""Pictures with fewer samples along their longer side show each as a square."""


@dataclass(frozen=True)
class PanelRow:
    """A slice, or a whole picture: each panel with what it shows, "truth" or "prediction"."""

    heading: str
    panels: list[tuple[str, str]]


@dataclass(frozen=True)
class CasePanel:
    """
    Attributes:
        caption: one line, such as the case's name and score.
        rows: one a slice.
        legend: swatch, label, and its Dice in this case; empty without truth.
        dashed: the dashed outline of the truth over the prediction needs explaining.
    """

    caption: str
    rows: list[PanelRow]
    legend: list[tuple[str, str, str]]
    dashed: bool


def case_panel(
    image: Array,
    truth: Array | None,
    prediction: Array,
    spacing: Sequence[float],
    names: Sequence[str],
    *,
    key: str = "case",
    caption: str = "",
    orientation: str | None = None,
    planes: Sequence[str] = ("axial", "coronal", "sagittal"),
    ignore: int = -1,
) -> CasePanel:
    """Slices of one case through the middle of what is labelled; see ``CaseSlices.of`` and ``draw_case``.

    Args:
        image: (z, y, x) float, any real values; or a picture, (y, x), or (y, x, 3) uint8.
        truth, prediction: (z, y, x), or (y, x), integers.
        spacing: physical length of a sample along each axis.
        names: of the labels, that of the background first.
    """
    slices = CaseSlices.of(image, truth, prediction, spacing, len(names), planes, ignore)
    return draw_case(slices, names, key=key, caption=caption, orientation=orientation)


def draw_case(
    slices: CaseSlices, names: Sequence[str], *, key: str, caption: str = "", orientation: str | None = None
) -> CasePanel:
    """Truth and prediction of every slice, side by side and all to one scale.

    Labels are translucent with an outline; over the prediction the truth's outline is dashed, in white on black, so
    that it shows on any colour. The alternative text says the Dice of each label.

    Args:
        names: of the labels, that of the background first, which is not drawn.
        key: unique on the page; ids derive from it.
        orientation: where the x, y and z axes of a volume point, such as "RAS".
    """
    present = _labels(slices, len(names))
    sides = [_lengths(shown) for shown in slices.slices]
    box = tuple(max(own[axis] for own in sides) for axis in (0, 1))
    scale = LONGEST_SIDE / max(box)
    dice = {label: decimal(slices.dice[label]) for label in present if label < len(slices.dice)}
    said = ", ".join(f"{names[label]} {value}" for label, value in dice.items())
    about = f"{caption}. Dice: {said}." if said else f"{caption}."
    rows = []
    for number, shown in enumerate(slices.slices):
        heading = _heading(shown, orientation, number)
        canvas = _Canvas(
            shown, (box[0] * scale, box[1] * scale), scale, names, f"{key}-{number}", f"{heading}. {about}"
        )
        panels = [] if shown.truth is None else [("truth", canvas.truth(shown.truth))]
        rows.append(PanelRow(heading, [*panels, ("prediction", canvas.prediction())]))
    dashed = any(shown.truth is not None and (shown.truth > 0).any() for shown in slices.slices)
    legend = [(label_swatch(label), names[label], dice.get(label, "")) for label in present]
    return CasePanel(caption, rows, legend, dashed)


def label_swatch(label: int) -> str:
    """A legend's mark of a label, its outline as on the pictures."""
    shape = tag("rect", class_=f"region {_look(label)}", x=2, y=2, width=12, height=12)
    return tag("svg", shape, class_="swatch", viewBox="0 0 16 16", width=16, height=16, aria_hidden="true")


def _look(label: int) -> str:
    """The style sheet's classes of a label: its colour, and from the second round of colours on a broken outline."""
    number = label - 1
    return f"l{number % COLOURS}" + (f" broken{min(number // COLOURS, 2)}" if number >= COLOURS else "")


def _labels(slices: CaseSlices, count: int) -> list[int]:
    """Those that are seen or scored; what lies outside of the named ones is not drawn."""
    found = {label for label, value in enumerate(slices.dice) if np.isfinite(value)}
    for shown in slices.slices:
        for labels in (shown.truth, shown.prediction):
            if labels is not None:
                found |= set(np.unique(labels).tolist())
    return sorted(label for label in found if 0 < label < count)


def _heading(shown: Slice, orientation: str | None, number: int) -> str:
    heading = shown.name
    if shown.place is not None:
        heading += f", slice {shown.place[0] + 1} of {shown.place[1]}"
        if orientation is not None:
            # The slice cuts the number-th of the axes z, y, x; of the two left the first points up.
            up, right = (letter for axis, letter in enumerate(reversed(orientation)) if axis != number)
            heading += f" ({up} up, {right} right)"
    return heading


def _lengths(shown: Slice) -> tuple[float, float]:
    height, width = shown.prediction.shape
    return height * shown.pitch[0], width * shown.pitch[1]


@dataclass(frozen=True)
class _Canvas:
    """Draws the panels of one slice in the middle of a box, on one copy of its picture.

    Attributes:
        box: height and width of every panel, in units of the drawing.
        scale: units to a unit of the slice's pitch.
        key: unique on the page.
    """

    shown: Slice
    box: tuple[float, float]
    scale: float
    names: Sequence[str]
    key: str
    about: str

    def truth(self, truth: Array) -> str:
        return self._drawing("truth", self._image() + self._regions(truth))

    def prediction(self) -> str:
        truth = self.shown.truth
        if truth is None:
            return self._drawing("prediction", self._image() + self._regions(self.shown.prediction))
        outline = "".join(self._outline(truth == label) for label in self._labels(truth))
        over = "".join(tag("path", class_=look, d=outline) for look in ("truth-under", "truth-over") if outline)
        again = tag("use", href=f"#{self.key}-image")
        return self._drawing("prediction", again + self._regions(self.shown.prediction) + over)

    def _drawing(self, what: str, content: str) -> str:
        height, width = (length * self.scale for length in _lengths(self.shown))
        across, down = (self.box[1] - width) / 2, (self.box[0] - height) / 2
        moved = tag("g", content, transform=f"translate({across:.2f} {down:.2f})")
        return drawing(f"{self.key}-{what}", self.box[1], self.box[0], what.capitalize(), self.about, moved, "slice")

    def _labels(self, labels: Array) -> list[int]:
        return [label for label in np.unique(labels).tolist() if 0 < label < len(self.names)]

    def _regions(self, labels: Array) -> str:
        parts = []
        for label in self._labels(labels):
            name = tag("title", text(self.names[label]))
            parts.append(tag("path", name, class_=f"region {_look(label)}", d=self._outline(labels == label)))
        return "".join(parts)

    def _outline(self, mask: Array) -> str:
        down, across = self.shown.pitch
        return outline_path(mask, (down * self.scale, across * self.scale))

    def _image(self) -> str:
        height, width = (length * self.scale for length in _lengths(self.shown))
        return _picture(f"{self.key}-image", self.shown.image, width, height)


def _picture(key: str, pixels: Array, width: float, height: float) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    uri = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
    look = "squares" if max(pixels.shape[:2]) < _PIXELATED else None
    return tag("image", id=key, class_=look, href=uri, width=width, height=height, preserveAspectRatio="none")
