"""Example slides: two tissues that differ in architecture and in nothing else.

Both have the same stains, the same number of nuclei for an area and the same round lumens. In ``glandular`` tissue
nuclei stand in rings around the lumens, with loose stroma between; in ``solid`` tissue they are spread evenly. Stains
vary within a slide and hardly between slides, and slides come in pairs, one of each class, that share artefacts, so
that none of these tells the class. What a network learns about it, it has learnt from structure.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image, ImageDraw, ImageFilter

from fmsuite.core.seeding import generator

LABELS = ("glandular", "solid")
VERSION = 7
_MPP = 0.4942
_PAIR_SPLIT = ("train",) * 4 + ("test",) * 4
_PENS = {1: (30, 60, 170), 5: (20, 130, 90)}
_DARK_EDGES = (2, 6)
_LUMEN_SHARE = 0.10
_AREA_PER_NUCLEUS = 100.0
_LUMEN_RADIUS = (10.0, 19.0)
_RINGS = (5.5, 11.5)
_NUCLEUS_STEP = 7.0
_STAMPS = 96


@dataclass(frozen=True)
class _Look:
    """How a slide was stained and scanned."""

    mpp: float
    haematoxylin: np.ndarray
    eosin: np.ndarray
    glass: np.ndarray
    pen: tuple[int, int, int] | None
    dark_edge: bool


def make_example(folder: Path, seed: int = 0, side_um: float = 1200.0) -> Path:
    """Sixteen pyramidal TIFF slides of about 2400 x 2400 pixels at 0.4942 um per pixel, with ``labels.csv``.

    A folder that already holds the example of this seed is left as it is.

    Args:
        folder: where to write; made if need be.
        seed: the same seed makes the same pixels.
        side_um: length of each slide's side.

    Returns:
        The folder: give it to ``--data``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stamp = folder / "example.json"
    identity = {"domain": "pathology", "seed": seed, "side_um": side_um, "version": VERSION}
    rows = _rows()
    whole = stamp.is_file() and all((folder / row["slide"]).is_file() for row in rows)
    if whole and json.loads(stamp.read_text(encoding="utf-8")) == identity and (folder / "labels.csv").is_file():
        return folder
    stamp.unlink(missing_ok=True)
    for number, row in enumerate(rows):
        look = _look(number, seed)
        rng = generator(seed, "pathology example", "slide", number)
        write_slide(folder / row["slide"], _paint(row["label"], look, side_um, rng), look.mpp)
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["slide", "label", "patient", "split"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    stamp.write_text(json.dumps(identity), encoding="utf-8")
    return folder


def write_slide(path: Path, rgb: np.ndarray, mpp: float, downsamples: tuple[int, ...] = (2, 4, 8)) -> None:
    """A tiled, JPEG-compressed pyramid that OpenSlide opens and knows the resolution of.

    Args:
        path: the TIFF to write.
        rgb: (H, W, 3) uint8.
        mpp: um per pixel.
        downsamples: of the levels below the first, each a whole multiple of the one before.
    """
    per_cm = 1e4 / mpp
    with tifffile.TiffWriter(path) as file:
        level, factor = rgb, 1
        for downsample in (1, *downsamples):
            step = downsample // factor
            height, width = level.shape[0] // step * step, level.shape[1] // step * step
            if step > 1:
                reduced = Image.fromarray(level[:height, :width])
                level = np.asarray(reduced.reduce(step))
            factor = downsample
            file.write(
                level,
                tile=(256, 256),
                photometric="rgb",
                compression="jpeg",
                compressionargs={"level": 92},
                resolution=(per_cm / factor, per_cm / factor),
                resolutionunit="CENTIMETER",
                subfiletype=0 if factor == 1 else 1,
                metadata=None,
                software="fmsuite example",
            )


def _rows() -> list[dict[str, str]]:
    """One row of ``labels.csv`` a slide. The first two glandular slides are one patient's."""
    rows = []
    for pair, split in enumerate(_PAIR_SPLIT):
        for offset, label in enumerate(LABELS):
            number = 2 * pair + offset
            patient = "P01" if label == LABELS[0] and pair < 2 else f"P{number + 1:02d}"
            rows.append({"slide": f"slide_{number:02d}.tif", "label": label, "patient": patient, "split": split})
    return rows


def _look(number: int, seed: int) -> _Look:
    """Stains and glass vary from slide to slide, whatever the class; artefacts are a pair's."""
    rng = generator(seed, "pathology example", "look", number)
    pair = number // 2
    # Far less than within a slide: among few slides, any trait of a whole slide would by accident favour one class.
    strength = rng.uniform(0.995, 1.005, 2)
    return _Look(
        mpp=_MPP,
        haematoxylin=np.array([0.85, 0.95, 0.42]) * strength[0],
        eosin=np.array([0.10, 0.62, 0.30]) * strength[1],
        glass=rng.uniform(241.5, 242.5) + rng.uniform(-0.3, 0.3, 3),
        pen=_PENS.get(pair),
        dark_edge=pair in _DARK_EDGES,
    )


def _paint(label: str, look: _Look, side_um: float, rng: np.random.Generator) -> np.ndarray:
    """(H, W, 3) uint8 of one slide."""
    unit = 1.0 / look.mpp
    side = round(side_um * unit)
    tissue = _tissue(side, rng)
    lumens = _lumens(tissue, unit, rng)
    count = int(tissue.sum() * look.mpp**2 / _AREA_PER_NUCLEUS)
    nuclei = _nuclei(label, count, tissue, lumens, unit, rng)

    inside = _disc_mask(side, lumens)
    texture = 1 + 0.22 * _noise(side, side // 12, rng) + 0.12 * _noise(side, side // 4, rng)
    eosin = np.clip(np.float32(0.62) * texture, 0.05, 1.0) * (tissue & ~inside)
    haematoxylin = 0.08 * (tissue & ~inside).astype(np.float32)
    _stamp(haematoxylin, nuclei, unit, rng)
    # Amounts of stain as bytes, so that Beer-Lambert becomes one table.
    amounts = np.linspace(0, 1.2, 256)
    absorbed = amounts[:, None, None] * look.haematoxylin + amounts[None, :, None] * look.eosin
    table = np.rint(look.glass * np.exp(-absorbed)).astype(np.int16)
    to_byte = 255 / 1.2
    rgb = table[_byte(haematoxylin * to_byte), _byte(eosin * to_byte)]
    grain = np.rint(rng.normal(0, 2.2, (509, 499, 3))).astype(np.int16)
    for top in range(0, side, 509):
        for left in range(0, side, 499):
            place = rgb[top : top + 509, left : left + 499]
            place += grain[: place.shape[0], : place.shape[1]]
    np.clip(rgb, 0, 255, out=rgb)
    return _artefacts(rgb.astype(np.uint8), look, unit, rng)


def _byte(values: np.ndarray) -> np.ndarray:
    return np.clip(values, 0, 255).astype(np.uint8)


def _noise(side: int, cells: int, rng: np.random.Generator) -> np.ndarray:
    """(side, side) float32 smooth noise of unit variance at its nodes."""
    nodes = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
    return np.asarray(nodes.resize((side, side), Image.Resampling.BICUBIC))


def _tissue(side: int, rng: np.random.Generator) -> np.ndarray:
    """(side, side) bool: a piece of tissue with an uneven outline, about half of the slide."""
    coarse = 256
    y, x = np.mgrid[0:coarse, 0:coarse] / coarse - 0.5
    angle = rng.uniform(0, np.pi)
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    a = rng.uniform(0.40, 0.44)
    b = rng.uniform(0.36, 0.40)
    field = 1 - np.sqrt((u / a) ** 2 + (v / b) ** 2) + 0.07 * _noise(coarse, 9, rng)
    picture = Image.fromarray(field.astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(picture) > 0


def _lumens(tissue: np.ndarray, unit: float, rng: np.random.Generator) -> np.ndarray:
    """(N, 3) of (y, x, radius) in pixels: round, apart from each other, a fixed share of the tissue."""
    side = len(tissue)
    wanted = _LUMEN_SHARE * float(tissue.sum())
    # Rings of two neighbours may touch, never overlap.
    gap = 2 * (_RINGS[1] + 3.5) * unit
    found = np.zeros((0, 3))
    area, misses = 0.0, 0
    while area < wanted and misses < 4000:
        y, x = rng.uniform(0, side, 2)
        radius = rng.uniform(*_LUMEN_RADIUS) * unit
        reach = radius + gap / 2
        corners = [(y - reach, x), (y + reach, x), (y, x - reach), (y, x + reach), (y, x)]
        if not all(0 <= cy < side and 0 <= cx < side and tissue[int(cy), int(cx)] for cy, cx in corners):
            misses += 1
            continue
        if len(found) and (np.hypot(found[:, 0] - y, found[:, 1] - x) < found[:, 2] + radius + gap).any():
            misses += 1
            continue
        found = np.vstack([found, (y, x, radius)])
        area += np.pi * radius**2
    return found


def _nuclei(
    label: str, count: int, tissue: np.ndarray, lumens: np.ndarray, unit: float, rng: np.random.Generator
) -> np.ndarray:
    """(N, 3) of (y, x, angle): ``count`` nuclei at most, in rings first if the tissue is glandular."""
    rings = np.zeros((0, 3))
    reach = 4.0 * unit
    if label == LABELS[0]:
        pieces = []
        for y, x, radius in lumens:
            for ring in _RINGS:
                distance = radius + ring * unit
                number = int(2 * np.pi * distance / (_NUCLEUS_STEP * unit))
                angle = rng.uniform(0, 2 * np.pi) + np.arange(number) * 2 * np.pi / number
                angle = angle + rng.normal(0, 0.1 * 2 * np.pi / number, number)
                away = distance + rng.normal(0, 0.5 * unit, number)
                pieces.append(np.stack([y + away * np.sin(angle), x + away * np.cos(angle), angle], axis=1))
        rings = np.concatenate(pieces)
        reach = (_RINGS[1] + 6.0) * unit
    step = _NUCLEUS_STEP * unit
    axis = np.arange(step, len(tissue) - step, step)
    y, x = (grid.reshape(-1) for grid in np.meshgrid(axis, axis, indexing="ij"))
    y, x = y + rng.uniform(-0.3, 0.3, len(y)) * step, x + rng.uniform(-0.3, 0.3, len(x)) * step
    free = tissue[y.astype(int), x.astype(int)]
    for centre_y, centre_x, radius in lumens:
        free &= np.hypot(y - centre_y, x - centre_x) > radius + reach
    places = np.flatnonzero(free)
    rest = min(len(places), max(0, count - len(rings)))
    places = rng.choice(places, rest, replace=False)
    scattered = np.stack([y[places], x[places], rng.uniform(0, 2 * np.pi, rest)], axis=1)
    return np.concatenate([rings, scattered])


def _disc_mask(side: int, discs: np.ndarray) -> np.ndarray:
    picture = Image.new("1", (side, side))
    draw = ImageDraw.Draw(picture)
    for y, x, radius in discs:
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=1)
    return np.asarray(picture)


def _stamp(field: np.ndarray, nuclei: np.ndarray, unit: float, rng: np.random.Generator) -> None:
    """Draw every nucleus into a stain field, from a stock of shapes; where two meet, the darker shows."""
    half = int(np.ceil(4.5 * unit))
    y, x = np.mgrid[-half : half + 1, -half : half + 1] / unit
    stock = []
    for number in range(_STAMPS):
        angle = np.pi * number / _STAMPS
        along, across = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
        a, b = rng.uniform(2.9, 3.5), rng.uniform(2.0, 2.6)
        edge = np.clip((1 - np.sqrt((along / a) ** 2 + (across / b) ** 2)) * 5, 0, 1)
        chromatin = np.clip(0.85 + 0.18 * rng.standard_normal(x.shape), 0.4, 1.2)
        stock.append((edge * chromatin * rng.uniform(0.8, 1.0)).astype(np.float32))
    chosen = (nuclei[:, 2] % np.pi / np.pi * _STAMPS).astype(int) % _STAMPS
    for (top, left), number in zip(nuclei[:, :2].astype(int) - half, chosen, strict=True):
        place = field[max(top, 0) : top + 2 * half + 1, max(left, 0) : left + 2 * half + 1]
        shape = stock[number][max(-top, 0) :, max(-left, 0) :][: place.shape[0], : place.shape[1]]
        np.maximum(place, shape, out=place)


def _artefacts(rgb: np.ndarray, look: _Look, unit: float, rng: np.random.Generator) -> np.ndarray:
    """Dust on every slide; a marker stroke or a dark border on some, the same in both slides of a pair."""
    side = len(rgb)
    veil = Image.new("RGB", (side, side), (255, 255, 255))
    draw = ImageDraw.Draw(veil)
    for y, x, radius in rng.uniform((0, 0, 1), (side, side, 4), (25, 3)):
        size = radius * unit
        draw.ellipse((x - size, y - size, x + size, y + size), fill=(90, 90, 90))
    if look.dark_edge:
        draw.rectangle((0, 0, side, int(25 * unit)), fill=(12, 12, 12))
    if look.pen is not None:
        width = 70 * unit
        points = [(side * (0.04 + 0.03 * np.sin(5 * t)), side * (0.1 + 0.7 * t)) for t in np.linspace(0, 1, 60)]
        draw.line(points, fill=look.pen, width=int(width), joint="curve")
    small = veil.resize((side // 8, side // 8), Image.Resampling.BOX).filter(ImageFilter.GaussianBlur(1.0))
    shade = np.asarray(small.resize((side, side), Image.Resampling.BILINEAR))
    return (rgb.astype(np.uint16) * shade // 255).astype(np.uint8)
