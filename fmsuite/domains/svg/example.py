"""Example drawings: classes that differ in geometry, with colours and strokes that tell nothing about the class."""

from __future__ import annotations

import colorsys
import csv
import math
from pathlib import Path

import numpy as np

from fmsuite.core.seeding import generator

CLASSES = ("star", "gear", "arrow", "spiral", "house")
PER_CLASS = 32
GROUP_SIZE = 2
"""Drawings of one group share their geometry and differ in colours: a split must keep them together."""


def write_example(folder: Path, seed: int) -> None:
    """160 drawings of 5 classes with ``labels.csv``; three quarters of each class's groups are for training."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    groups = PER_CLASS // GROUP_SIZE
    for kind in CLASSES:
        for number in range(PER_CLASS):
            group = number // GROUP_SIZE
            shape = _shape(kind, generator(seed, "svg example", kind, group))
            name = f"{kind}_{number:02d}.svg"
            (folder / name).write_text(_drawing(shape, generator(seed, "svg style", kind, number)), encoding="utf-8")
            split = "train" if group < groups * 3 // 4 else "test"
            rows.append((name, kind, f"{kind}_{group:02d}", split))
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "group", "split"])
        writer.writerows(rows)


def _drawing(shape: tuple[str, bool], style: np.random.Generator) -> str:
    path, closed = shape
    stroke, fill = _colour(style, 0.45), _colour(style, 0.75)
    filled = closed and style.random() < 0.6
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 100 100">\n'
        f'  <path d="{path}" fill="{fill if filled else "none"}" stroke="{stroke}" '
        f'stroke-width="{style.uniform(2.5, 6):.2f}" stroke-linejoin="round" stroke-linecap="round"/>\n'
        "</svg>\n"
    )


def _colour(style: np.random.Generator, lightness: float) -> str:
    red, green, blue = colorsys.hls_to_rgb(style.random(), lightness, style.uniform(0.5, 1.0))
    return f"#{round(red * 255):02x}{round(green * 255):02x}{round(blue * 255):02x}"


def _shape(kind: str, draw: np.random.Generator) -> tuple[str, bool]:
    """Path data in a box of 100 x 100, and whether the path is closed."""
    centre = (50 + draw.uniform(-5, 5), 50 + draw.uniform(-5, 5))
    size = draw.uniform(26, 38)
    turn = draw.uniform(-0.4, 0.4)
    if kind == "star":
        points, inner = int(draw.integers(5, 9)), draw.uniform(0.35, 0.55)
        ring = [(size if k % 2 == 0 else size * inner, turn + k * math.pi / points) for k in range(2 * points)]
        return _closed(_polar(centre, ring)), True
    if kind == "gear":
        teeth, depth = int(draw.integers(8, 14)), draw.uniform(0.72, 0.84)
        step = 2 * math.pi / teeth
        ring = []
        for k in range(teeth):
            angles = (turn + k * step + share * step for share in (0.0, 0.5, 0.5, 1.0))
            ring += list(zip((size, size, size * depth, size * depth), angles, strict=True))
        hole = [(size * 0.35, -turn - k * math.pi / 12) for k in range(24)]
        return _closed(_polar(centre, ring)) + _closed(_polar(centre, hole)), True
    if kind == "arrow":
        shaft, head = draw.uniform(0.16, 0.28), draw.uniform(0.5, 0.75)
        neck = draw.uniform(0.0, 0.3)
        outline = [(-1, -shaft), (neck, -shaft), (neck, -head), (1, 0), (neck, head), (neck, shaft), (-1, shaft)]
        return _closed(_turned(centre, size, draw.uniform(0, 2 * math.pi), outline)), True
    if kind == "spiral":
        turns = draw.uniform(2.0, 3.5)
        steps = 60
        ring = [(size * k / steps, turn * 8 + 2 * math.pi * turns * k / steps) for k in range(steps + 1)]
        return _line(_polar(centre, ring)), False
    eaves, peak, door = draw.uniform(-0.25, 0.0), draw.uniform(-1.0, -0.75), draw.uniform(0.15, 0.25)
    wall = draw.uniform(0.6, 0.8)
    outline = [(-wall, 0.9), (-wall, eaves), (-1, eaves), (0, peak), (1, eaves), (wall, eaves), (wall, 0.9)]
    opening = [(-door, 0.9), (-door, 0.35), (door, 0.35), (door, 0.9)]
    return _closed(_turned(centre, size, turn / 4, outline)) + _closed(_turned(centre, size, turn / 4, opening)), True


def _polar(centre: tuple[float, float], ring: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(centre[0] + r * math.sin(a), centre[1] - r * math.cos(a)) for r, a in ring]


def _turned(
    centre: tuple[float, float], size: float, angle: float, outline: list[tuple[float, float]]
) -> list[tuple[float, float]]:
    cosine, sine = math.cos(angle), math.sin(angle)
    return [
        (centre[0] + size * (x * cosine - y * sine), centre[1] + size * (x * sine + y * cosine)) for x, y in outline
    ]


def _line(points: list[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in points)


def _closed(points: list[tuple[float, float]]) -> str:
    return _line(points) + "Z"
