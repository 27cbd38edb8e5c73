"""CairoSVG as a function from a drawing and a region to pixels, taken straight from cairo's memory."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

import numpy as np

from fmsuite.errors import UsageError

try:
    import cairocffi
    from cairosvg.colors import color as parse_color
    from cairosvg.parser import Tree
    from cairosvg.surface import PNGSurface
except OSError as error:
    raise UsageError(
        f"The svg domain draws with the cairo library, which was not found ({str(error).splitlines()[0]}).",
        "Install it: `apt install libcairo2`, `dnf install cairo`, `brew install cairo`, or `conda install cairo`.",
    ) from error

Rgba = tuple[float, float, float, float]
Matrix = tuple[float, float, float, float, float, float]
"""An affine map as cairo and SVG write it, (a, b, c, d, e, f): x' = ax + cy + e, y' = bx + dy + f."""

DEFAULT_VIEWPORT = (300.0, 150.0)
"""Width and height of a drawing that states none and has no viewBox (CSS 2.1, section 10.3.2)."""

_UNITS = {"": 1.0, "px": 1.0, "in": 96.0, "cm": 96 / 2.54, "mm": 96 / 25.4, "pt": 96 / 72, "pc": 16.0}
_LENGTH = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([a-zA-Z]*|%)\s*$")


@dataclass(frozen=True)
class Canvas:
    """Where a drawing lies, in the user units of its root element.

    The window is the square around the drawing: side is the longer of width and height, the drawing is in the middle
    of it, and what is left (the letterbox) shows the background.

    Attributes:
        x, y: the viewport's corner.
        width, height: the viewport's size.
    """

    x: float
    y: float
    width: float
    height: float

    @property
    def side(self) -> float:
        return max(self.width, self.height)

    @property
    def corner(self) -> tuple[float, float]:
        """(y, x) of the square window."""
        return self.y - (self.side - self.height) / 2, self.x - (self.side - self.width) / 2


def read_canvas(width: str | None, height: str | None, view_box: str | None) -> Canvas:
    """The canvas that the root element's attributes describe.

    Relative lengths (``%``, ``em``) count as not given, since a file on its own has no surroundings. A viewBox gives
    the user units; width and height then only decide the viewport's shape.

    Raises:
        ValueError: for a viewBox that is not four finite numbers, or a viewport without an area.
    """
    across, down = _length(width, "width"), _length(height, "height")
    if view_box is None or not view_box.strip():
        across = DEFAULT_VIEWPORT[0] if across is None else across
        down = DEFAULT_VIEWPORT[1] if down is None else down
        return Canvas(0.0, 0.0, across, down)
    try:
        x, y, box_width, box_height = (float(part) for part in re.split(r"[\s,]+", view_box.strip()))
    except ValueError:
        raise ValueError(f"the viewBox '{view_box[:60]}' is not four numbers") from None
    if not all(map(math.isfinite, (x, y, box_width, box_height))) or min(box_width, box_height) <= 0:
        raise ValueError(f"the viewBox '{view_box[:60]}' has no area")
    # A missing side follows from the viewBox's shape.
    if across is None:
        across = box_width if down is None else down * box_width / box_height
    if down is None:
        down = across * box_height / box_width
    unit = min(across / box_width, down / box_height)
    wide, high = across / unit, down / unit
    return Canvas(x - (wide - box_width) / 2, y - (high - box_height) / 2, wide, high)


def _length(text: str | None, name: str) -> float | None:
    """CSS pixels of an absolute length; ``None`` for one that is missing, relative, or not a length."""
    match = _LENGTH.match(text or "")
    if match is None or match[2].lower() not in _UNITS:
        return None
    value = float(match[1]) * _UNITS[match[2].lower()]
    if not math.isfinite(value) or value <= 0:
        raise ValueError(f"its {name} is {text}: there is nothing to draw on")
    return value


def colour(text: str) -> Rgba:
    """A CSS colour as red, green, blue, alpha from 0 to 1.

    Raises:
        ValueError: if it is not one.
    """
    parsed = parse_color(text)
    # CairoSVG answers an unknown colour with opaque or transparent black.
    if tuple(parsed[:3]) == (0, 0, 0) and not re.fullmatch(r"black|#0{3,8}|(rgba?|hsla?)\(.*\)", text.strip().lower()):
        raise ValueError(f"'{text}' is not a colour")
    red, green, blue, alpha = parsed
    return red, green, blue, alpha


def fetch_embedded(url: str, resource_type: str) -> bytes:
    """CairoSVG's url_fetcher: the bytes of a ``data:`` URL, without any library that could open another.

    Raises:
        ValueError: for every other URL.
    """
    if not url.startswith("data:"):
        raise ValueError(f"refers to {url[:80]}, outside the file")
    header, _, payload = url[5:].partition(",")
    raw = unquote_to_bytes(payload)
    return base64.b64decode(raw) if header.endswith(";base64") else raw


class _RegionSurface(PNGSurface):
    """A cairo image of one region of a drawing.

    The region is a transform above the root element, so nothing inside the drawing can tell which region is drawn:
    percentages, masks and patterns resolve against the canvas.
    """

    def __init__(
        self,
        tree: Tree,
        canvas: Canvas,
        size: tuple[int, int],
        to_pixels: Matrix,
        background: Rgba | None,
        map_rgba: Callable[[Rgba], Rgba] | None,
    ) -> None:
        self._canvas = canvas
        self._pixels = size
        self._to_pixels = to_pixels
        self._background = background
        self._root = tree
        super().__init__(tree, None, 96, map_rgba=map_rgba)

    def _create_surface(self, width: float, height: float) -> tuple[cairocffi.ImageSurface, float, float]:
        rows, columns = self._pixels
        image = cairocffi.ImageSurface(cairocffi.FORMAT_ARGB32, columns, rows)
        return image, self._canvas.width, self._canvas.height

    def set_context_size(self, width: float, height: float, viewbox: tuple[float, ...], tree: Tree) -> None:
        if tree is not self._root:
            super().set_context_size(width, height, viewbox, tree)
            return
        if self._background is not None:
            self.context.set_source_rgba(*self._background)
            self.context.paint()
        self.context.transform(cairocffi.Matrix(*self._to_pixels))
        self.context.translate(self._canvas.x, self._canvas.y)
        if not tree.get("viewBox"):
            viewbox = (0.0, 0.0, self._canvas.width, self._canvas.height)
        super().set_context_size(self._canvas.width, self._canvas.height, viewbox, tree)


def render_region(
    source: bytes,
    canvas: Canvas,
    start: tuple[float, float],
    extent: tuple[float, float],
    size: tuple[int, int],
    background: Rgba | None = (1.0, 1.0, 1.0, 1.0),
    transform: Matrix | None = None,
    map_rgba: Callable[[Rgba], Rgba] | None = None,
) -> np.ndarray:
    """Draw one region of a drawing.

    Args:
        source: the file's bytes, checked by ``safety.check``.
        canvas: its canvas.
        start, extent: (y, x) of the region in root user units; it may reach beyond the canvas.
        size: rows and columns of the result.
        background: painted first; ``None`` leaves it transparent.
        transform: an affine map of the drawing in root user units, applied before the region is cut.
        map_rgba: changes each colour of the drawing (not of embedded images).

    Returns:
        (rows, columns, 3) uint8 RGB over an opaque background; (rows, columns, 4) RGBA, colours not multiplied by
        alpha, otherwise.

    Raises:
        Exception: whatever CairoSVG raises for a drawing that it cannot render; the caller turns it into a reason.
    """
    scale_y, scale_x = size[0] / extent[0], size[1] / extent[1]
    region = cairocffi.Matrix(scale_x, 0, 0, scale_y, -start[1] * scale_x, -start[0] * scale_y)
    matrix = region if transform is None else cairocffi.Matrix(*transform).multiply(region)
    tree = Tree(bytestring=source, url_fetcher=fetch_embedded)
    surface = _RegionSurface(tree, canvas, size, matrix.as_tuple(), background, map_rgba)
    image = surface.cairo
    image.flush()
    rows, columns = size
    stored = np.frombuffer(image.get_data(), dtype=np.uint32).reshape(rows, image.get_stride() // 4)[:, :columns]
    channels = [(stored >> shift).astype(np.uint8) for shift in (16, 8, 0, 24)]
    if background is not None and background[3] == 1.0:
        return np.stack(channels[:3], axis=-1)
    pixels = np.stack(channels, axis=-1)
    alpha = pixels[..., 3:].astype(np.float32)
    plain = np.divide(pixels[..., :3] * 255.0, alpha, out=np.zeros((rows, columns, 3), np.float32), where=alpha > 0)
    pixels[..., :3] = np.clip(np.rint(plain), 0, 255)
    return pixels
