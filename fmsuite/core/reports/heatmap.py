"""Values of windows as colours over the picture of what the windows were cut from."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

LOW_COLOUR, NEUTRAL, HIGH_COLOUR = (0.60, -0.030, -0.125), (0.95, 0.0, 0.0), (0.60, 0.080, 0.100)
"""Ends and middle of the colour map in Oklab: blue, light grey and orange, which every common deficiency of colour
vision tells apart. Straight lines between them, so that equal steps of a value look equally large."""
OPACITY = 0.62

_PAGE, _INK = (255, 255, 255), (30, 30, 30)
_BAR, _LINE, _MARGIN, _NARROWEST = 14, 17, 8, 440
_LUMA = np.array([0.299, 0.587, 0.114])
_DARKEST, _CONTRAST = 100.0, 0.6
_LARGER_UNIT = {"um": ("mm", 1000.0), "m": ("km", 1000.0)}


def heatmap(
    rgb: np.ndarray,
    origin: Sequence[float],
    pitch: Sequence[float],
    positions: np.ndarray,
    extent: Sequence[float] | np.ndarray,
    values: np.ndarray,
    limits: tuple[float, float],
    opacity: float = OPACITY,
) -> np.ndarray:
    """Colours the windows' share of every pixel.

    A pixel shows the mean of the values of the windows over it, each weighted by the area of the pixel that it covers;
    colour is laid on as densely as the pixel is covered. Under the colour the picture is a light grey of low contrast,
    so that neither its colours nor its shadows are read as values; where no window lies it is as it was.

    Args:
        rgb: (H, W, 3) uint8; pixel (i, j) covers ``origin + (i, j) * pitch`` to ``origin + (i + 1, j + 1) * pitch``.
        origin, pitch: (y, x), in the coordinates of the positions.
        positions: (N, 2) corners (y, x) of the windows.
        extent: (2,) size of every window, or (N, 2) of each.
        values: (N,) finite.
        limits: values that get the first and the last colour; those beyond get the nearer one.
        opacity: of the colour over a pixel that is covered whole, 0 to 1.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ValueError: if the limits are not in order, or a value is not finite.
    """
    if not np.isfinite(values).all():
        raise ValueError("a window's value is not finite")
    mean, covered = window_means(rgb.shape[:2], origin, pitch, positions, extent, values)
    low, high = limits
    if not low < high:
        raise ValueError(f"limits {limits} are not in order")
    share = (covered * opacity)[..., None]
    grey = (_DARKEST + _CONTRAST * (rgb @ _LUMA))[..., None]
    # A pixel that is covered in part keeps that much of its own colour.
    below = rgb + (grey - rgb) * covered[..., None]
    veiled = below * (1 - share) + diverging((mean - low) / (high - low)) * share
    return np.rint(veiled).astype(np.uint8)


def window_means(
    shape: tuple[int, ...],
    origin: Sequence[float],
    pitch: Sequence[float],
    positions: np.ndarray,
    extent: Sequence[float] | np.ndarray,
    values: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Area-weighted mean of the windows over each pixel, whatever the number of windows.

    The area of pixels that a window covers is a box convolved with a pixel, so its mixed second difference has 16
    entries, four at each corner; those of all windows are added up and summed back along both axes.

    Args:
        shape: (H, W) of the picture; otherwise as in ``heatmap``.

    Returns:
        Means (H, W) float64, 0 where nothing covers, and the covered share (H, W) float64 from 0 to 1 (the sum of the
        windows' areas within the pixel, at most 1).
    """
    scale = np.asarray(pitch, dtype=np.float64)
    starts = (np.asarray(positions, dtype=np.float64).reshape(-1, 2) - np.asarray(origin, dtype=np.float64)) / scale
    ends = starts + np.asarray(extent, dtype=np.float64) / scale
    # One more row and column takes what leaves the picture at its far borders.
    areas = np.zeros((2, shape[0] + 2, shape[1] + 2))
    weights = np.stack([np.ones(len(starts)), np.asarray(values, dtype=np.float64)])
    for sign_y, edge_y in ((1, starts[:, 0]), (-1, ends[:, 0])):
        for sign_x, edge_x in ((1, starts[:, 1]), (-1, ends[:, 1])):
            row, rest_y = _split(edge_y, shape[0])
            column, rest_x = _split(edge_x, shape[1])
            for down, part_y in ((0, 1 - rest_y), (1, rest_y)):
                for across, part_x in ((0, 1 - rest_x), (1, rest_x)):
                    part = sign_y * sign_x * part_y * part_x
                    for area, weight in zip(areas, weights, strict=True):
                        np.add.at(area, (row + down, column + across), part * weight)
    covered, total = areas.cumsum(axis=1).cumsum(axis=2)[:, : shape[0], : shape[1]]
    # Sums of many differences leave crumbs where nothing lies.
    inside = covered > 1e-6
    mean = np.divide(total, covered, out=np.zeros(shape), where=inside)
    return mean, np.where(inside, covered, 0).clip(max=1)


def diverging(places: np.ndarray) -> np.ndarray:
    """Colours from blue over light grey to orange, see ``HIGH_COLOUR``.

    Args:
        places: any shape, 0 for blue to 1 for orange; beyond, the nearer end.

    Returns:
        (..., 3) float64 sRGB, 0 to 255.
    """
    side = np.clip(np.asarray(places, dtype=np.float64), 0, 1)[..., None] * 2 - 1
    neutral = np.array(NEUTRAL)
    end = np.where(side < 0, np.array(LOW_COLOUR), np.array(HIGH_COLOUR))
    return oklab_to_srgb(neutral + np.abs(side) * (end - neutral))


def oklab_to_srgb(lab: np.ndarray) -> np.ndarray:
    """(..., 3) Oklab (Ottosson 2020, "A perceptual color space for image processing") to sRGB from 0 to 255."""
    to_cones = np.array(
        [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.2914855480]]
    )
    to_linear = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = np.clip((lab @ to_cones.T) ** 3 @ to_linear.T, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def with_legend(
    rgb: np.ndarray,
    limits: tuple[float, float],
    title: str,
    ends: tuple[str, str],
    pixel: float | None = None,
    unit: str = "",
) -> Image.Image:
    """The picture above its legend: a colour bar with numbers, what its ends mean, and a scale bar.

    Args:
        rgb: (H, W, 3) uint8, as ``heatmap`` gives it.
        limits: as given to it.
        title: what the numbers are.
        ends: what low and high values mean.
        pixel: length of one pixel of the picture in ``unit``; no scale bar without.
    """
    height, width = rgb.shape[:2]
    page = max(width, _NARROWEST)
    legend = Image.new("RGB", (page, 4 * _LINE + _BAR + 2 * _MARGIN), _PAGE)
    pen, font = ImageDraw.Draw(legend), ImageFont.load_default(13)
    bar = min(360, page - 2 * _MARGIN - (130 if pixel else 0))
    pen.text((_MARGIN, _MARGIN), _fitted(pen, title, font, page - 2 * _MARGIN), fill=_INK, font=font)
    top = _MARGIN + _LINE + 4
    colours = diverging((np.arange(bar) + 0.5) / bar)
    strip = np.broadcast_to(np.rint(colours).astype(np.uint8), (_BAR, bar, 3))
    legend.paste(Image.fromarray(np.ascontiguousarray(strip)), (_MARGIN, top))
    below = top + _BAR + 2
    middle = (limits[0] + limits[1]) / 2
    for value, left, anchor in ((limits[0], 0, "la"), (middle, bar // 2, "ma"), (limits[1], bar, "ra")):
        pen.text((_MARGIN + left, below), f"{value:+.3g}" if value else "0", fill=_INK, font=font, anchor=anchor)
    half = bar // 2 - 6
    pen.text((_MARGIN, below + _LINE), _fitted(pen, ends[0], font, half), fill=_INK, font=font)
    pen.text((_MARGIN + bar, below + _LINE), _fitted(pen, ends[1], font, half), fill=_INK, font=font, anchor="ra")
    if pixel:
        length, text = scale_bar(pixel, unit, min(width // 3, 120))
        right = page - _MARGIN
        pen.rectangle((right - length, top + 4, right - 1, top + 8), fill=_INK)
        middle_of_bar = right - max(length, pen.textlength(text, font=font)) / 2
        pen.text((middle_of_bar, below), text, fill=_INK, font=font, anchor="ma")
    result = Image.new("RGB", (page, height + legend.height), _PAGE)
    result.paste(Image.fromarray(rgb), (0, 0))
    result.paste(legend, (0, height))
    return result


def scale_bar(pixel: float, unit: str, longest: int) -> tuple[int, str]:
    """The longest bar of 1, 2 or 5 times a power of ten that fits.

    Args:
        pixel: length of a pixel in ``unit``.
        longest: room, in pixels.

    Returns:
        Its length in pixels, at least 1, and the length that it stands for.
    """
    room = pixel * longest
    power = 10.0 ** math.floor(math.log10(room))
    value = max(step * power for step in (1, 2, 5) if step * power <= room * (1 + 1e-9))
    larger = _LARGER_UNIT.get(unit)
    shown, name = (value / larger[1], larger[0]) if larger and value >= larger[1] else (value, unit)
    return max(1, round(value / pixel)), f"{shown:g} {name}"


def _split(edges: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Whole pixels and rest of each edge, edges beyond the picture moved to its border."""
    clipped = np.clip(edges, 0, length)
    whole = np.floor(clipped).astype(np.int64)
    return whole, clipped - whole


def _fitted(pen: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Shortened to fit, in ASCII, which is all that Pillow's built-in font has: accents go, other letters become ?."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    shown = plain.encode("ascii", "replace").decode("ascii")
    while len(shown) > 1 and pen.textlength(shown, font=font) > width:
        shown = shown.rstrip(".")[:-1] + "..."
        if shown == "...":
            break
    return shown
