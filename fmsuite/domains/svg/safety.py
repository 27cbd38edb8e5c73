"""What a drawing must be before it is rendered: bounded, self-contained, and finite once its references are expanded.

Every check here is a bound known before drawing starts. Scripts, animations and ``foreignObject`` are harmless: the
renderer does not run or draw them. What no bound catches (a pathological dash pattern, say) is stopped by the clock:
see ``worker``.
"""

from __future__ import annotations

import gzip
import io
import re
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from xml.etree.ElementTree import Element, ParseError, TreeBuilder

from defusedxml.common import DefusedXmlException, EntitiesForbidden
from defusedxml.ElementTree import DefusedXMLParser
from PIL import Image

from fmsuite.domains.svg.render import Canvas, fetch_embedded, read_canvas
from fmsuite.errors import ReadFailure

_XLINK = "{http://www.w3.org/1999/xlink}href"
_URL = re.compile(r"url\(\s*['\"]?\s*([^'\")]*)", re.IGNORECASE)
_IMPORT = re.compile(r"@import\b", re.IGNORECASE)
_INHERITED = ("fill", "stroke", "marker", "marker-start", "marker-mid", "marker-end")
_DECLARATION = re.compile(r"([\w-]+)\s*:\s*([^;]*)")
_NOT_DRAWN = re.compile(
    r"foreignObject|fe(?!Offset$|Blend$|Flood$|Merge|Func|Point|Spot|Distant)[A-Z]\w*|animate\w*|set|script"
)


@dataclass(frozen=True)
class Limits:
    """Largest drawings that are taken.

    Attributes:
        max_bytes: of the file, and of what a compressed one unpacks to.
        max_elements: in the file.
        max_drawn: elements drawn after ``use``, patterns, masks, markers and clips are expanded.
        max_depth: of nesting, after expansion.
        max_side: of the canvas, in user units.
        max_image_pixels: of an embedded raster image.
    """

    max_bytes: int = 2_000_000
    max_elements: int = 20_000
    max_drawn: int = 100_000
    max_depth: int = 100
    max_side: float = 1e6
    max_image_pixels: int = 16_000_000


@dataclass(frozen=True)
class Document:
    """A drawing that passed.

    Attributes:
        source: its bytes, unpacked.
        canvas: where it lies.
        drawn: bound on the number of elements drawn.
        not_drawn: elements that the renderer leaves out, with counts: filter primitives, ``foreignObject``, animation.
    """

    source: bytes
    canvas: Canvas
    drawn: int
    not_drawn: dict[str, int]


class Refused(Exception):
    """A drawing that breaks a rule.

    Args:
        reason: which, in words.
        hint: the way out.
    """

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


def load(path: str, limits: Limits) -> Document:
    """Read and check one file.

    Raises:
        ReadFailure: for a file that cannot be read, is not SVG, or breaks a rule.
    """
    try:
        with open(path, "rb") as file:
            raw = file.read(limits.max_bytes + 1)
    except OSError as error:
        raise ReadFailure(
            path, "open", f"cannot be read ({error.strerror})", "Check the file and its rights."
        ) from error
    try:
        return check(_unpack(raw, limits), limits)
    except Refused as refused:
        raise ReadFailure(path, "open", refused.reason, refused.hint) from refused


def check(source: bytes, limits: Limits) -> Document:
    """Check a drawing's bytes.

    Raises:
        Refused: for bytes that are not SVG, or break a rule.
    """
    root = _parse(source, limits)
    if _local(root.tag) != "svg":
        raise Refused(f"its root element is <{_local(root.tag)[:40]}>, not <svg>", "Is it an SVG file?")
    try:
        canvas = read_canvas(root.get("width"), root.get("height"), root.get("viewBox"))
    except ValueError as error:
        raise Refused(str(error), "Give it a viewBox with a width and a height above zero.") from error
    extreme = max(abs(canvas.x), abs(canvas.y), canvas.side)
    if extreme > limits.max_side:
        raise Refused(
            f"its canvas reaches {extreme:.3g} user units, over the limit of {limits.max_side:.3g}",
            "Scale the drawing down, or raise data.max_side.",
        )
    embedded = _check_references(root, limits)
    drawn = _Expansion(root, limits).total + embedded
    if drawn > limits.max_drawn:
        raise _too_many(drawn, limits)
    left_out = Counter(name for name in map(_local, _tags(root)) if _NOT_DRAWN.fullmatch(name))
    return Document(source, canvas, drawn, dict(sorted(left_out.items())))


def _unpack(raw: bytes, limits: Limits) -> bytes:
    too_large = Refused(f"it is larger than {limits.max_bytes} bytes", "Simplify it, or raise data.max_bytes.")
    if len(raw) > limits.max_bytes:
        raise too_large
    if raw.startswith(b"\x1f\x8b"):
        try:
            with gzip.GzipFile(fileobj=io.BytesIO(raw)) as packed:
                raw = packed.read(limits.max_bytes + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise Refused(f"its compressed data are damaged ({error})", "Make the file again.") from error
        if len(raw) > limits.max_bytes:
            raise Refused(
                f"it unpacks to more than {limits.max_bytes} bytes", "A gzip bomb? If not, raise data.max_bytes."
            )
    if not raw.strip():
        raise Refused("the file is empty", "Download or export it again.")
    return raw


class _Bounded(TreeBuilder):
    """Builds the tree and stops as soon as it has too many elements or is nested too deeply."""

    def __init__(self, limits: Limits) -> None:
        super().__init__()
        self.limits = limits
        self.depth = 0
        self.count = 0

    def start(self, tag: str, attrs: dict[str, str]) -> Element:
        self.depth += 1
        self.count += 1
        if self.count > self.limits.max_elements:
            raise Refused(
                f"it has more than {self.limits.max_elements} elements", "Simplify it, or raise data.max_elements."
            )
        if self.depth > self.limits.max_depth:
            raise _too_deep(self.limits)
        return super().start(tag, attrs)

    def end(self, tag: str) -> Element:
        self.depth -= 1
        return super().end(tag)


def _parse(source: bytes, limits: Limits) -> Element:
    parser = DefusedXMLParser(target=_Bounded(limits), forbid_entities=True, forbid_external=True)
    try:
        parser.feed(source)
        return parser.close()
    except EntitiesForbidden as error:
        raise Refused(
            f"it declares the entity '{error.name}'", "Entities are refused; export the drawing as plain SVG."
        ) from error
    except DefusedXmlException as error:
        raise Refused(f"it refers to an external definition ({error})", "Export it as plain SVG.") from error
    except ParseError as error:
        raise Refused(f"it is not well-formed XML: {error}", "Is it an SVG file, and whole?") from error
    except (LookupError, ValueError) as error:
        raise Refused(f"its text encoding cannot be read ({error})", "Save it as UTF-8.") from error


def _check_references(root: Element, limits: Limits) -> int:
    """Refuse references that leave the file; the number of elements drawn from embedded drawings."""
    drawn = 0
    for element in root.iter():
        tag = _local(element.tag)
        for name in ("href", _XLINK):
            target = element.get(name, "").strip()
            if not target or target.startswith("#") or tag in ("a", "script"):
                continue
            if not target.startswith("data:") or tag not in ("image", "feImage"):
                raise _external(tag, target)
            drawn += _check_embedded(target, limits)
        texts = [*element.attrib.values(), element.text or ""] if tag == "style" else list(element.attrib.values())
        for text in texts:
            for target in _URL.findall(text):
                if not target.startswith("#"):
                    raise _external(tag, target)
        if tag == "style" and _IMPORT.search(element.text or ""):
            raise Refused("its style sheet imports another", "Put all of its rules into the file.")
    return drawn


def _check_embedded(url: str, limits: Limits) -> int:
    try:
        content = fetch_embedded(url, "image/*")
    except ValueError as error:
        raise Refused(f"an embedded image is damaged ({error})", "Export it again.") from error
    if b"<svg" in content[:4096] or content.startswith((b"<?xml", b"<!DOC")):
        inner = check(content, limits)
        return inner.drawn
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            width, height = Image.open(io.BytesIO(content)).size
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise Refused(f"an embedded image cannot be read ({type(error).__name__})", "Export it again.") from error
    if width * height > limits.max_image_pixels:
        raise Refused(f"an embedded image measures {width} x {height}", "Shrink it, or raise data.max_image_pixels.")
    return 1


class _Expansion:
    """How many elements are drawn once references are followed, in closed form: each element is costed once.

    An element draws itself and its children, what it refers to once, and what it refers to with an inherited property
    (``fill``, ``stroke``, ``marker``) once for each element below it. References made by style sheet rules are not
    counted.
    """

    def __init__(self, root: Element, limits: Limits) -> None:
        self.limits = limits
        self.by_id: dict[str, Element] = {}
        for element in root.iter():
            identifier = element.get("id")
            if identifier is not None:
                self.by_id.setdefault(identifier, element)
        self.known: dict[Element, tuple[int, int]] = {}
        self.open: set[Element] = set()
        self.total = self._cost(root, 1)[0]

    def _cost(self, element: Element, depth: int) -> tuple[int, int]:
        """(elements drawn, nesting depth) of one element."""
        if element in self.known:
            drawn, height = self.known[element]
            if depth + height > self.limits.max_depth:
                raise _too_deep(self.limits)
            return drawn, height
        if element in self.open:
            raise Refused(
                f"<{_local(element.tag)} id='{element.get('id', '')[:40]}'> refers to itself", "Remove the cycle."
            )
        if depth > self.limits.max_depth:
            raise _too_deep(self.limits)
        self.open.add(element)
        drawn, height = 1, 0
        for child in element:
            more, below = self._cost(child, depth + 1)
            drawn += more
            height = max(height, below + 1)
        own = drawn
        for target, inherited in self._references(element):
            more, below = self._cost(target, depth + 1)
            drawn += more * (own if inherited else 1)
            height = max(height, below + 1)
        self.open.discard(element)
        if drawn > self.limits.max_drawn:
            raise _too_many(drawn, self.limits)
        self.known[element] = drawn, height
        return drawn, height

    def _references(self, element: Element) -> Iterator[tuple[Element, bool]]:
        properties = [*element.attrib.items(), *_DECLARATION.findall(element.get("style", ""))]
        for name, value in properties:
            if name in ("href", _XLINK) and _local(element.tag) != "a":
                targets = [value.strip()] if value.strip().startswith("#") else []
            elif name == "style":
                continue
            else:
                targets = _URL.findall(value)
            for target in targets:
                found = self.by_id.get(target[1:].strip())
                if found is not None:
                    yield found, name in _INHERITED


def _tags(root: Element) -> Iterator[str]:
    return (element.tag for element in root.iter())


def _local(tag: object) -> str:
    """A tag without its namespace; comments and processing instructions have none."""
    return tag.rpartition("}")[2] if isinstance(tag, str) else ""


def _external(tag: str, target: str) -> Refused:
    return Refused(
        f"<{tag}> refers to {target[:80]}, outside the file", "Embed what it needs, or remove the reference."
    )


def _too_deep(limits: Limits) -> Refused:
    return Refused(
        f"it is nested more than {limits.max_depth} deep once references are expanded",
        "Flatten its groups, or raise data.max_depth.",
    )


def _too_many(drawn: int, limits: Limits) -> Refused:
    count = str(drawn) if drawn < 10**9 else "over a thousand million"
    return Refused(
        f"{count} elements would be drawn once references are expanded, over the limit of {limits.max_drawn}",
        "A bomb of nested references? If not, raise data.max_drawn.",
    )
