"""A drawing as a sample: cut by rendering, and varied before it is rendered."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from xml.etree import ElementTree

import defusedxml.ElementTree
import numpy as np

from fmsuite.core.data.handles import HandleCache
from fmsuite.core.data.index import Window
from fmsuite.core.data.sample import ArraySample, Sample
from fmsuite.domains.svg.render import Canvas, Matrix, Rgba, render_region
from fmsuite.domains.svg.safety import Document, Limits, load
from fmsuite.domains.svg.worker import render_failure
from fmsuite.errors import ReadFailure

_STROKE_WIDTH = re.compile(r"(stroke-width\s*:\s*)(\d*\.?\d+(?:[eE][+-]?\d+)?)")
_LEADING_NUMBER = re.compile(r"\s*(\d*\.?\d+(?:[eE][+-]?\d+)?)")


@dataclass(frozen=True)
class ColourMap:
    """An affine map of colours: ``matrix @ rgb + offset``, clipped to 0-1; alpha is kept.

    Attributes:
        matrix: nine numbers, row-major.
        offset: three numbers.
    """

    matrix: tuple[float, ...]
    offset: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def __call__(self, rgba: Sequence[float]) -> Rgba:
        m, rgb = self.matrix, rgba[:3]
        red, green, blue = (
            min(1.0, max(0.0, sum(m[3 * row + i] * rgb[i] for i in range(3)) + self.offset[row])) for row in range(3)
        )
        return red, green, blue, rgba[3]


@dataclass(frozen=True)
class VectorSample(Sample):
    """One drawing, seen through its square window.

    Its units are the root's user units, counted from the window's corner; ``crop`` renders, so a crop has as much
    detail as its size can show.

    Attributes:
        path: for error messages.
        document: the checked drawing.
        background: opaque.
        transform: an affine map of the drawing in root user units, or ``None``.
        colours: a map of its colours, or ``None``.
        stroke_factor: multiplies every stroke width.
        failed: told the path if the drawing cannot be rendered.
    """

    path: str
    document: Document
    background: Rgba
    transform: Matrix | None = None
    colours: ColourMap | None = None
    stroke_factor: float = 1.0
    failed: Callable[[str], object] | None = None

    @property
    def size(self) -> tuple[float, ...]:
        return (self.canvas.side, self.canvas.side)

    @property
    def canvas(self) -> Canvas:
        return self.document.canvas

    def crop(self, start: tuple[float, ...], extent: tuple[float, ...], size: tuple[int, ...]) -> ArraySample:
        """The region rendered at ``size``: (3, *size) uint8 RGB. What lies beyond the canvas shows the background.

        Raises:
            ReadFailure: if CairoSVG fails.
        """
        source = self.document.source
        top, left = self.canvas.corner
        try:
            if self.stroke_factor != 1.0:
                source = scale_strokes(source, self.stroke_factor)
            pixels = render_region(
                source,
                self.canvas,
                (top + start[0], left + start[1]),
                (extent[0], extent[1]),
                (size[0], size[1]),
                self.background,
                self.transform,
                self.colours,
            )
        except Exception as error:
            if self.failed is not None:
                self.failed(self.path)
            raise render_failure(self.path, error) from error
        return ArraySample(np.ascontiguousarray(pixels.transpose(2, 0, 1)))

    def vary(self, **changes: object) -> VectorSample:
        return replace(self, **changes)  # type: ignore[arg-type]


def scale_strokes(source: bytes, factor: float) -> bytes:
    """The same drawing with every stroke width multiplied: in attributes, ``style`` and style sheets.

    Where the root gives no width the initial value of 1 is multiplied, and inherited.
    """
    root = defusedxml.ElementTree.fromstring(source)

    def scaled(match: re.Match[str]) -> str:
        return f"{match[1]}{float(match[2]) * factor:.6g}"

    for element in root.iter():
        width = element.get("stroke-width")
        number = _LEADING_NUMBER.match(width) if width else None
        if width and number:
            element.set("stroke-width", f"{float(number[1]) * factor:.6g}{width[number.end() :]}")
        if "style" in element.attrib:
            element.set("style", _STROKE_WIDTH.sub(scaled, element.attrib["style"]))
        if isinstance(element.tag, str) and element.tag.endswith("style") and element.text:
            element.text = _STROKE_WIDTH.sub(scaled, element.text)
    root.attrib.setdefault("stroke-width", f"{factor:.6g}")
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)


class _Opener:
    """Loads a document; a class rather than a closure, so that the reader can be pickled."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits

    def __call__(self, path: str) -> Document:
        return load(path, self.limits)


def _nothing_to_close(document: Document) -> None:
    """A document holds no file open."""


class SvgReader:
    """Reads the drawings of an index. Each is checked again before it is used, and the last few are kept.

    Args:
        background: opaque.
        limits: as when the index was built.
    """

    def __init__(self, background: Rgba, limits: Limits) -> None:
        self.background = background
        self._documents: HandleCache[Document] = HandleCache(_Opener(limits), _nothing_to_close, limit=256)

    def read(self, window: Window) -> VectorSample:
        """
        Raises:
            ReadFailure: for a file that is gone, breaks a rule, or has another canvas than the index says.
        """
        document = self._documents.get(window.source)
        canvas = document.canvas
        found = (*canvas.corner, canvas.side, canvas.side)
        if not np.allclose(found, (*window.position, *window.extent), rtol=1e-6, atol=1e-6):
            # Should the file be put right, it is to be read again.
            self._documents.discard(window.source)
            raise ReadFailure(
                window.source, "read", "the drawing has changed since the index was made", "Build the index again."
            )
        return VectorSample(window.source, document, self.background, failed=self._documents.discard)
