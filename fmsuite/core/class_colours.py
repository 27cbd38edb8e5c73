"""Colours of classes, the same in maps, pictures and legends."""

from __future__ import annotations

import colorsys

_OKABE_ITO = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)
_BACKGROUND = (38, 38, 38)


def class_colours(classes: int) -> list[tuple[int, int, int]]:
    """Red, green and blue of each class, 0 to 255: dark grey for the first, which often is the background, then those
    of Okabe and Ito (2008), then hues that are far from each other."""
    colours = [_BACKGROUND, *_OKABE_ITO]
    for number in range(len(colours), classes):
        turn = (number * 0.6180339887) % 1
        red, green, blue = colorsys.hsv_to_rgb(turn, 0.5 + 0.4 * (number % 2), 0.95 - 0.3 * (number % 3 == 0))
        colours.append((round(red * 255), round(green * 255), round(blue * 255)))
    return colours[:classes]
