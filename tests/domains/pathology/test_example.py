"""The example slides: read like real ones, and separable by architecture, not by colour."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import openslide
import pytest
from scipy import ndimage

from fmsuite.core.data.index import SampleIndex
from fmsuite.domains.pathology.example import make_example
from fmsuite.domains.pathology.reading import SlideReader


def test_openslide_reads_the_true_resolution_of_every_level(example: Path) -> None:
    stated = []
    for path in sorted(example.glob("*.tif")):
        slide = openslide.OpenSlide(str(path))
        assert slide.level_count == 4
        assert slide.level_downsamples == pytest.approx((1, 2, 4, 8), rel=0.01)
        mpp = float(slide.properties["openslide.mpp-x"])
        assert slide.dimensions[0] * mpp == pytest.approx(640.0, abs=0.5)
        stated.append(round(mpp, 4))
    assert set(stated) == {0.4942}
    assert stated[0::2] == stated[1::2]


def test_labels_are_balanced_and_patients_stay_on_one_side(example: Path) -> None:
    with (example / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16
    for split, count in (("train", 4), ("test", 4)):
        labels = [row["label"] for row in rows if row["split"] == split]
        assert labels.count("glandular") == labels.count("solid") == count
    patients = {row["patient"] for row in rows}
    assert len(patients) == 15
    assert all(len({row["split"] for row in rows if row["patient"] == p}) == 1 for p in patients)


def test_the_same_seed_makes_the_same_pixels_and_another_others(tmp_path: Path) -> None:
    first = make_example(tmp_path / "first", seed=0, side_um=200.0)
    same = make_example(tmp_path / "same", seed=0, side_um=200.0)
    other = make_example(tmp_path / "other", seed=1, side_um=200.0)
    name = "slide_03.tif"
    assert (same / name).read_bytes() == (first / name).read_bytes()
    assert (other / name).read_bytes() != (first / name).read_bytes()
    before = (same / name).stat().st_mtime_ns
    assert make_example(same, seed=0, side_um=200.0) == same
    assert (same / name).stat().st_mtime_ns == before
    (same / name).unlink()
    make_example(same, seed=0, side_um=200.0)
    assert (same / name).read_bytes() == (first / name).read_bytes()


def full_windows(index: SampleIndex) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels of windows that are all tissue, their class, and whether they are for training."""
    reader = SlideReader((128, 128))
    rows = [index[row] for row in range(len(index))]
    rows = [row for row in rows if row.content > 0.99]
    pixels = np.stack([np.moveaxis(reader.read(row).values, 0, -1) for row in rows])
    return (
        pixels,
        np.array([row.label == "glandular" for row in rows]),
        np.array([row.split == "train" for row in rows]),
    )


def ring_share(picture: np.ndarray) -> float:
    """Of the nuclear area within 20 um of a lumen, the share that lies between 3 and 14 um from it."""
    brightness = picture.astype(float).min(axis=-1)
    lumen = ndimage.binary_opening(brightness > 215, iterations=4)
    if not lumen.any():
        return 0.5
    distance = ndimage.distance_transform_edt(~lumen) * 0.5
    nuclei = picture[..., 0] < 0.7 * np.median(picture[..., 0][~lumen])
    near, area = (distance > 3) & (distance < 14), (distance > 14) & (distance < 20)
    dense, sparse = nuclei[near].mean(), nuclei[area].mean() if area.any() else 0.0
    return float(dense / (dense + sparse + 1e-9))


def test_colour_does_not_tell_the_class_and_architecture_does(example_index: SampleIndex) -> None:
    pixels, glandular, train = full_windows(example_index)
    assert min(glandular.sum(), (~glandular).sum()) > 25

    def histogram(picture: np.ndarray) -> np.ndarray:
        counts, _ = np.histogramdd(picture.reshape(-1, 3), bins=(8, 8, 8), range=[(0, 256)] * 3)
        return np.sqrt(counts.ravel() / counts.sum())

    colour = np.stack([histogram(picture) for picture in pixels])
    distance = ((colour[~train][:, None] - colour[train][None]) ** 2).sum(-1)
    told = glandular[train][distance.argmin(1)] == glandular[~train]
    by_class = np.mean([told[glandular[~train] == side].mean() for side in (True, False)])
    assert 0.25 < by_class < 0.72

    means = np.stack([picture.mean((0, 1)) for picture in pixels])
    gap = np.abs(means[glandular].mean(0) - means[~glandular].mean(0)).max()
    assert gap < 0.5 * means.std(0).max()

    statistic = np.array([ring_share(picture) for picture in pixels])
    cut = (np.median(statistic[train & glandular]) + np.median(statistic[train & ~glandular])) / 2
    right = (statistic[~train] > cut) == glandular[~train]
    assert np.mean([right[glandular[~train] == side].mean() for side in (True, False)]) > 0.85
