"""Example X-rays: drawn chests whose classes differ in structure and not in how much there is of anything."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from fmsuite.core.seeding import generator

PATIENTS = 60
IMAGES = 2
HEIGHT, WIDTH = 72, 64
RADIUS = 7.0
"""Pixels, of the one opacity."""
MANY = 9
LUNGS = ((-14.0, 0.0), (14.0, 0.0))
"""Centres (right, down) from the middle of the image; the first is the patient's right lung."""
LUNG = np.array([10.5, 22.0])
"""Semi-axes of a lung."""
HEART = np.array([6.0, 12.0])


def make_xrays(folder: Path, seed: int = 0) -> Path:
    """Write 60 patients with two 8-bit PNG images each, and ``labels.csv``.

    Two lungs, ribs and a heart on the patient's left (the image's right); in the lungs lies one large opacity
    (``solitary``) or nine small ones of the same total area (``scattered``), so the mean does not tell the classes
    apart. A patient's two images show the same anatomy with other exposure, place and noise. Splits are by patient.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for patient in range(PATIENTS):
        label = ("solitary", "scattered")[patient % 2]
        split = "test" if patient % 6 >= 4 else "train"
        anatomy = generator(seed, "x-ray example", "anatomy", patient)
        opacities, radius = _opacities(label, anatomy)
        tilt = anatomy.uniform(-0.15, 0.15)
        for view in range(IMAGES):
            random = generator(seed, "x-ray example", "image", patient, view)
            chest = _chest(opacities, radius, tilt, random.uniform(-2, 2, 2))
            chest = (chest - chest.min()) / np.ptp(chest)
            exposed = chest ** random.uniform(0.8, 1.25) * random.uniform(150, 220) + random.normal(10, 3, chest.shape)
            name = f"patient{patient:03d}_{view}.png"
            Image.fromarray(np.clip(exposed, 0, 255).round().astype(np.uint8)).save(folder / name)
            rows.append((name, label, f"patient{patient:03d}", split))
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "label", "patient", "split"), *rows])
    return folder


def _opacities(label: str, random: np.random.Generator) -> tuple[np.ndarray, float]:
    """(N, 2) centres in the lungs, apart from each other, and their radius."""
    count = 1 if label == "solitary" else MANY
    radius = RADIUS / count**0.5
    centres: list[np.ndarray] = []
    while len(centres) < count:
        lung = np.array(LUNGS[int(random.integers(2))])
        centre = lung + random.uniform(-1, 1, 2) * LUNG
        inside = (((centre - lung) / (LUNG - radius)) ** 2).sum() < 1
        if inside and all(np.linalg.norm(centre - other) > 2 * radius + 1 for other in centres):
            centres.append(centre)
    return np.array(centres), radius


def _chest(opacities: np.ndarray, radius: float, tilt: float, shift: np.ndarray) -> np.ndarray:
    """(HEIGHT, WIDTH) absorption, edges a pixel soft."""
    down, right = np.indices((HEIGHT, WIDTH)).astype(np.float64)
    place = np.stack([right - (WIDTH - 1) / 2 - shift[0], down - (HEIGHT - 1) / 2 - shift[1]], axis=-1)
    values = 1.0 * _ellipse(place, (0.0, 0.0), np.array([29.0, 34.0]))
    for lung in LUNGS:
        shape = _ellipse(place, lung, LUNG)
        ribs = np.sin((place[..., 1] + tilt * np.abs(place[..., 0])) * 2 * np.pi / 9) > 0.7
        values += shape * (0.12 * ribs - 0.65)
    values += 0.4 * _ellipse(place, (5.0, 9.0), HEART)
    for centre in opacities:
        values += 0.35 * _ellipse(place, centre, np.array([radius, radius]))
    return values


def _ellipse(place: np.ndarray, centre: np.ndarray | tuple[float, float], axes: np.ndarray) -> np.ndarray:
    """1 inside, 0 outside."""
    depth = (1 - np.linalg.norm((place - np.asarray(centre)) / axes, axis=-1)) * axes.min()
    return np.clip(depth + 0.5, 0, 1)
