"""Example volumes: phantoms whose classes differ in structure and not in how much there is of anything."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from fmsuite.core.seeding import generator
from fmsuite.domains.medical.formats.base import require

PATIENTS = 48
SCANS = 2
FIELD = 36.0
"""Side of the field of view in millimetres."""
BODY = np.array([13.5, 14.5, 13.0])
"""Semi-axes of the body in millimetres along right, anterior, superior."""
RADIUS = 5.5
"""Of the one lesion, in millimetres."""
MANY = 9
TUBE = -8.0
"""Millimetres to the right of the middle: a landmark on the left."""
ORIENTATIONS = ("RAS", "LPS", "LAS", "PIR", "SRA", "AIL")
SPACINGS = ((1.0, 1.0, 1.0), (0.9, 0.9, 1.5), (1.2, 1.0, 1.2))
"""Millimetres along right, anterior, superior."""


def make_example(folder: Path, seed: int = 0) -> Path:
    """Write 48 patients with two scans each as small NIfTI files, and ``labels.csv``.

    A body with a smooth texture and a bright tube on the patient's left holds one large lesion (``solitary``) or nine
    small ones of the same total mass (``scattered``), so the mean intensity does not tell the classes apart. The two
    scans of a patient show the same anatomy with another orientation, spacing, gain and noise. Splits are by patient.

    Returns:
        The folder.
    """
    require("nibabel")
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for patient in range(PATIENTS):
        label = ("solitary", "scattered")[patient % 2]
        split = "test" if patient % 6 >= 4 else "train"
        anatomy = generator(seed, "medical example", "anatomy", patient)
        centres, radius = _lesions(label, anatomy)
        waves, phases = anatomy.normal(0, 0.25, (4, 3)), anatomy.uniform(0, 2 * np.pi, 4)
        for scan in range(SCANS):
            number = patient * SCANS + scan
            noise = generator(seed, "medical example", "scan", number)
            orientation = ORIENTATIONS[number % len(ORIENTATIONS)]
            spacing = np.array(SPACINGS[(number // len(ORIENTATIONS)) % len(SPACINGS)])
            affine, shape = _grid(orientation, spacing)
            world = _positions(affine, shape)
            values = _anatomy(world, centres, radius, waves, phases)
            values = np.abs(values + noise.normal(0, 3, shape)) * noise.uniform(0.5, 2.0)
            name = f"patient{patient:03d}_scan{scan}.nii.gz"
            _write(folder / name, values, affine)
            rows.append((name, label, f"patient{patient:03d}", split))
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "label", "patient", "split"))
        writer.writerows(rows)
    return folder


def _lesions(label: str, random: np.random.Generator) -> tuple[np.ndarray, float]:
    """(N, 3) centres that lie wholly in the body, apart from each other and from the tube, and their radius."""
    count = 1 if label == "solitary" else MANY
    # A sphere whose edge is linear over a millimetre has the mass 4/3 pi (r^3 + r/4).
    radius = float(np.roots([1, 0, 0.25, -(RADIUS**3 + RADIUS / 4) / count]).real.max())
    centres: list[np.ndarray] = []
    while len(centres) < count:
        centre = random.uniform(-1, 1, 3) * BODY
        inside = ((centre / (BODY - radius - 0.5)) ** 2).sum() < 1
        clear = np.hypot(centre[0] - TUBE, centre[1]) > radius + 2.5
        apart = all(np.linalg.norm(centre - other) > 2 * radius + 0.5 for other in centres)
        if inside and clear and apart:
            centres.append(centre)
    return np.array(centres), radius


def _grid(orientation: str, spacing: np.ndarray) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Affine and shape of a grid centred on the world's origin, its voxel axes as the three letters say.

    Args:
        spacing: millimetres along right, anterior, superior.
    """
    affine = np.eye(4)
    affine[:3, :3] = 0
    shape = []
    for axis, letter in enumerate(orientation):
        row = next(i for i, pair in enumerate(("RL", "AP", "SI")) if letter in pair)
        length = round(FIELD / spacing[row])
        affine[row, axis] = spacing[row] if letter in "RAS" else -spacing[row]
        affine[:3, 3] -= affine[:3, axis] * (length - 1) / 2
        shape.append(length)
    return affine, (shape[0], shape[1], shape[2])


def _positions(affine: np.ndarray, shape: tuple[int, int, int]) -> list[np.ndarray]:
    """Millimetres of voxel centres along right, anterior and superior, each of length 1 along two voxel axes: the
    grid is not oblique, so a coordinate depends on one of them."""
    world = []
    for row in range(3):
        axis = int(np.abs(affine[row, :3]).argmax())
        along = np.arange(shape[axis]) * affine[row, axis] + affine[row, 3]
        world.append(along.reshape([-1 if other == axis else 1 for other in range(3)]))
    return world


def _anatomy(
    world: list[np.ndarray], centres: np.ndarray, radius: float, waves: np.ndarray, phases: np.ndarray
) -> np.ndarray:
    """Intensities at world positions, edges one millimetre soft."""
    depth = (1 - _length([w / axis for w, axis in zip(world, BODY, strict=True)])) * BODY.min()
    texture = sum(
        8 * np.cos(sum(w * k for w, k in zip(world, wave, strict=True)) + phase)
        for wave, phase in zip(waves, phases, strict=True)
    )
    values = _soft(depth) * (100 + texture)
    tube = 2 - np.hypot(world[0] - TUBE, world[1])
    values += 30 * _soft(np.minimum(tube, depth))
    for centre in centres:
        values += 80 * _soft(radius - _length([w - c for w, c in zip(world, centre, strict=True)]))
    return values


def _length(parts: list[np.ndarray]) -> np.ndarray:
    return np.sqrt(sum(part**2 for part in parts))


def _soft(depth: np.ndarray) -> np.ndarray:
    """0 outside, 1 inside, linear over the millimetre at the edge."""
    return np.clip(depth + 0.5, 0, 1)


def _write(path: Path, values: np.ndarray, affine: np.ndarray) -> None:
    import nibabel

    image = nibabel.Nifti1Image(values.round().astype(np.int16), affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)
