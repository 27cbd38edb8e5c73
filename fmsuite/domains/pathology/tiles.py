"""Folders of tile images: each is a source of its own, with one window or a grid of them."""

from __future__ import annotations

import numpy as np
from PIL import Image

from fmsuite.domains.pathology.slides import Level, PixelSource, unreadable
from fmsuite.errors import ReadFailure
from fmsuite.tiling.grid import Edges, window_grid

MAX_PIXELS = 100_000_000
"""An image that can only be decoded whole may have this many pixels."""


class ImageSource(PixelSource):
    """A PNG, JPEG or other image that is decoded whole, at the first read."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._pixels: np.ndarray | None = None
        # Pillow's decoders raise whatever their formats can go wrong with; all of it means a file that is no use.
        try:
            with Image.open(path) as image:
                width, height = image.size
                mode = image.mode
        except Exception as error:
            raise ReadFailure(
                path, "open", f"not a readable image ({error}).", "Check that the file is what its name says."
            ) from error
        if width * height > MAX_PIXELS:
            raise ReadFailure(
                path,
                "open",
                f"{width} x {height} pixels are too many for an image that can only be read whole.",
                "Convert it to a tiled, pyramidal TIFF (for instance with vips tiffsave --tile --pyramid).",
            )
        if mode.startswith(("I", "F")):
            raise ReadFailure(
                path, "open", f"pixels of type '{mode}' are not 8-bit colour.", "Convert it to 8-bit RGB."
            )
        self.levels = (Level((height, width), (1.0, 1.0)),)
        self.bounds = (0.0, 0.0, float(height), float(width))
        self.vendor = "image"

    def read(self, level: int, top: int, left: int, height: int, width: int) -> tuple[np.ndarray, tuple[float, float]]:
        if self._pixels is None:
            try:
                with Image.open(self.path) as image:
                    self._pixels = np.asarray(image.convert("RGBA"))
            except Exception as error:
                raise unreadable(self.path, error) from error
        return self._pixels[top : top + height, left : left + width], (float(top), float(left))

    def close(self) -> None:
        self._pixels = None


def tile_windows(
    shape: tuple[int, int], size: int, stride: int, scale: float | None, edges: Edges = "shift"
) -> tuple[np.ndarray, tuple[float, float]]:
    """The windows of one tile image.

    With a known scale, a window covers the asked field of view, and an image smaller than that gets one window that
    reaches beyond it (what lies outside is invalid). Without one, a window is ``size`` of the image's own pixels, or
    the largest square that fits a smaller image, which the reader then enlarges to ``size``.

    Args:
        shape: (height, width) of the image.
        size, stride: in pixels of the window that is to come out.
        scale: image pixels in one pixel of the window; ``None`` where the image's resolution is unknown.
        edges: the rule at the far ends of a larger image.

    Returns:
        (N, 2) corners in the image's pixels, and the window's extent there.
    """
    if scale is None:
        scale = min(1.0, min(shape) / size)
    extent = size * scale
    return window_grid(shape, (extent, extent), (stride * scale,) * 2, edges=edges), (extent, extent)
