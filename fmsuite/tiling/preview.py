"""Pictures of where windows are: thumbnails with outlines of the tissue and of every window, and contact sheets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CONTOUR = (0, 130, 60)
WINDOW = (20, 60, 200)


def draw_windows(
    rgb: np.ndarray,
    starts: np.ndarray,
    extent: Sequence[float],
    mask: np.ndarray | None = None,
    caption: str = "",
    longest: int = 1600,
) -> Image.Image:
    """Windows and, where given, the outline of a mask, over a picture enlarged or reduced to ``longest`` pixels.

    Args:
        rgb: (H, W, 3) uint8.
        starts: (N, 2) corners (y, x) in pixels of ``rgb``; fractions count.
        extent: (height, width) of every window, in the same pixels.
        mask: (H, W) bool.
        caption: a line above the picture; none if empty.
        longest: length of the result's longer side, without the caption.
    """
    height, width = rgb.shape[:2]
    zoom = longest / max(height, width)
    size = (max(1, round(width * zoom)), max(1, round(height * zoom)))
    picture = Image.fromarray(rgb).resize(size, Image.Resampling.BICUBIC if zoom > 1 else Image.Resampling.BOX)
    # Where windows would be smaller than their own lines, a tint shows them better.
    if min(extent) * zoom < 6:
        picture = _tinted(picture, starts, extent, zoom)
    else:
        draw = ImageDraw.Draw(picture)
        for top, left in np.asarray(starts, dtype=np.float64) * zoom:
            draw.rectangle(
                (left, top, left + extent[1] * zoom - 1, top + extent[0] * zoom - 1), outline=WINDOW, width=1
            )
    if mask is not None:
        large = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BILINEAR)
        inside = np.asarray(large) >= 128
        pixels = np.array(picture)
        pixels[outline(inside, 2)] = CONTOUR
        picture = Image.fromarray(pixels)
    return with_caption(picture, caption) if caption else picture


def outline(mask: np.ndarray, width: int = 1) -> np.ndarray:
    """Pixels of a (H, W) mask within ``width`` steps of its outside; the picture's border is no edge."""
    inner = mask.copy()
    for _ in range(width):
        padded = np.pad(inner, 1, mode="edge")
        inner = inner & padded[2:, 1:-1] & padded[:-2, 1:-1] & padded[1:-1, 2:] & padded[1:-1, :-2]
    return mask & ~inner


def contact_sheet(
    pictures: Sequence[Image.Image],
    captions: Sequence[str] | None = None,
    columns: int = 8,
    cell: int = 192,
    background: tuple[int, int, int] = (255, 255, 255),
) -> Image.Image:
    """Pictures in rows, each above its caption, whatever their sizes; those larger than ``cell`` - 4 are reduced."""
    line = 0 if captions is None else 14
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (min(columns, len(pictures)) * cell, rows * (cell + line)), background)
    draw = ImageDraw.Draw(sheet)
    for number, (picture, caption) in enumerate(zip(pictures, captions or [""] * len(pictures), strict=True)):
        left, top = number % columns * cell, number // columns * (cell + line)
        small = picture.copy()
        small.thumbnail((cell - 4, cell - 4))
        sheet.paste(small, (left + 2, top + 2))
        draw.text((left + 2, top + cell), _ascii(caption)[: cell // 6], fill=(0, 0, 0))
    return sheet


def picture_path(folder: Path, number: int, name: str) -> Path:
    """Where the picture of the ``number``-th source goes: its name's end, of characters that suit any file system."""
    return folder / f"{number:05d}_{re.sub(r'[^A-Za-z0-9._-]+', '_', name)[-80:]}.png"


def with_caption(picture: Image.Image, caption: str) -> Image.Image:
    """The picture below a line of text."""
    result = Image.new("RGB", (picture.width, picture.height + 16), (255, 255, 255))
    result.paste(picture, (0, 16))
    ImageDraw.Draw(result).text((3, 2), _ascii(caption), fill=(0, 0, 0))
    return result


def _tinted(picture: Image.Image, starts: np.ndarray, extent: Sequence[float], zoom: float) -> Image.Image:
    covered = np.zeros((picture.height, picture.width), bool)
    for top, left in np.asarray(starts, dtype=np.float64):
        rows = slice(max(0, round(top * zoom)), max(1, round((top + extent[0]) * zoom)))
        columns = slice(max(0, round(left * zoom)), max(1, round((left + extent[1]) * zoom)))
        covered[rows, columns] = True
    pixels = np.asarray(picture).astype(np.float32)
    pixels[covered] = 0.75 * pixels[covered] + 0.25 * np.asarray(WINDOW, np.float32)
    return Image.fromarray(pixels.astype(np.uint8))


def _ascii(text: str) -> str:
    """Pillow's built-in font draws Latin letters only."""
    return text.encode("latin-1", "replace").decode("latin-1")
