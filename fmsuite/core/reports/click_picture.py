"""A picture of where somebody clicked, and of what is like it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fmsuite.core.data.sample import Array
from fmsuite.core.reports.case_slices import grey

SIDE, GAP, FOOT = 300, 6, 26
COLOUR = np.array([255.0, 150.0, 20.0])
STRONGEST = 0.8
"""Opacity of the highest value."""
_INK, _PAGE = (235, 235, 235), (18, 18, 18)


def click_picture(
    image: Array,
    scores: Array,
    liked: Sequence[Sequence[float]],
    disliked: Sequence[Sequence[float]],
    spacing: Sequence[float],
) -> Image.Image:
    """Above the image, below it with what is like the clicks in orange: clear at the median, strongest at the highest.

    Of a volume the three slices through the first click, each with its second axis up. A cross is a click, a ring one
    on what is not meant; those in other slices are not drawn.

    Args:
        image: (z, y, x) or (y, x) of any real values, or (y, x, 3) uint8.
        scores: (z, y, x) or (y, x), not a number where unknown.
        liked, disliked: clicks, in sample numbers along the axes of ``scores``.
        spacing: physical length of a sample along each axis.
    """
    known = scores[np.isfinite(scores)]
    low, high = (float(np.median(known)), float(known.max())) if known.size else (0.0, 1.0)
    shown = image if image.ndim > scores.ndim else np.repeat(grey(image)[..., None], 3, axis=-1)
    share = np.clip((np.nan_to_num(scores, nan=low) - low) / max(high - low, 1e-12), 0, 1)[..., None] * STRONGEST
    tinted = (shown * (1 - share) + COLOUR * share).round().astype(np.uint8)
    axes = scores.ndim
    cuts: list[int | None] = [None] if axes == 2 else [0, 1, 2]
    lengths = [size * step for size, step in zip(scores.shape, spacing, strict=True)]
    scale = SIDE / max(lengths)
    columns = []
    for cut in cuts:
        down, across = (axis for axis in range(axes) if axis != cut)
        size = (max(1, round(lengths[across] * scale)), max(1, round(lengths[down] * scale)))
        marks = []
        for places, mark in ((liked, "cross"), (disliked, "ring")):
            for place in places:
                if cut is None or round(place[cut]) == round(liked[0][cut]):
                    x = (place[across] + 0.5) * spacing[across] * scale
                    y = (place[down] + 0.5) * spacing[down] * scale
                    marks.append((x, y if cut is None else size[1] - y, mark))
        columns.append([_plane(values, cut, liked[0], size, marks) for values in (shown, tinted)])
    return _page(columns, f"clear: {low:.2f} (median); orange: {high:.2f} (highest)")


def _plane(
    values: Array,
    cut: int | None,
    place: Sequence[float],
    size: tuple[int, int],
    marks: Sequence[tuple[float, float, str]],
) -> Image.Image:
    plane = values if cut is None else np.take(values, round(place[cut]), axis=cut)[::-1]
    picture = Image.fromarray(np.ascontiguousarray(plane)).resize(size, Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(picture)
    for x, y, mark in marks:
        for colour, width in (((0, 0, 0), 4), ((255, 255, 255), 2)):
            if mark == "ring":
                pen.ellipse((x - 7, y - 7, x + 7, y + 7), outline=colour, width=width)
                continue
            for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1)):
                pen.line((x + 4 * dx, y + 4 * dy, x + 11 * dx, y + 11 * dy), fill=colour, width=width)
    return picture


def _page(columns: Sequence[Sequence[Image.Image]], said: str) -> Image.Image:
    widths = [column[0].width for column in columns]
    height = max(column[0].height for column in columns)
    font = ImageFont.load_default(13)
    page = Image.new("RGB", (max(sum(widths) + GAP * (len(widths) - 1), 260), 2 * height + GAP + FOOT), _PAGE)
    left = 0
    for column, width in zip(columns, widths, strict=True):
        for number, picture in enumerate(column):
            page.paste(picture, (left, number * (height + GAP) + (height - picture.height) // 2))
        left += width + GAP
    ImageDraw.Draw(page).text((4, page.height - FOOT + 5), said, fill=_INK, font=font)
    return page
