"""The example volumes: honest, deterministic, and what they claim to be."""

from __future__ import annotations

import csv
from pathlib import Path

import nibabel
import numpy as np
import pytest

from fmsuite.commands.indexing import build_index
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.domains.medical import MedicalDomain, MedicalOptions
from fmsuite.domains.medical.example import FIELD, PATIENTS, SCANS
from fmsuite.domains.medical.volumes import load_volume


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MedicalDomain(MedicalOptions()).example_data(tmp_path_factory.mktemp("example"))


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "labels.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_same_seed_makes_the_same_voxels_and_another_one_others(example: Path, tmp_path: Path) -> None:
    domain = MedicalDomain(MedicalOptions())
    again, other = domain.example_data(tmp_path / "again", 0), domain.example_data(tmp_path / "other", 1)
    assert sorted(p.name for p in again.iterdir()) == sorted(p.name for p in example.iterdir())
    for row in rows(example)[:8]:
        first = nibabel.load(example / row["path"])
        second = nibabel.load(again / row["path"])
        np.testing.assert_array_equal(first.dataobj, second.dataobj)
        np.testing.assert_array_equal(first.affine, second.affine)
        assert not np.array_equal(np.asarray(first.dataobj), np.asarray(nibabel.load(other / row["path"]).dataobj))


def test_every_volume_gives_labelled_windows_and_splits_are_by_patient(example: Path) -> None:
    skipped = SkippedLog()
    index = build_index(MedicalDomain(MedicalOptions()), [example], skipped)
    assert not skipped.entries
    assert len(index.sources) == PATIENTS * SCANS
    assert index.label_names == ["scattered", "solitary"]
    splits: dict[str, set] = {}
    labels: dict[tuple, int] = {}
    for row in range(len(index)):
        window = index[row]
        splits.setdefault(window.group, set()).add(window.split)
        labels[window.label, window.split] = labels.get((window.label, window.split), 0) + 1
    assert all(len(found) == 1 for found in splits.values())
    assert labels["solitary", "train"] == labels["scattered", "train"]
    assert labels["solitary", "test"] == labels["scattered", "test"] > 0


def test_orientations_and_spacings_differ_between_the_scans_of_a_patient(example: Path) -> None:
    images = [nibabel.load(example / row["path"]) for row in rows(example)]
    assert len({"".join(nibabel.aff2axcodes(image.affine)) for image in images}) >= 5
    assert len({tuple(sorted(np.round(image.header.get_zooms(), 3))) for image in images}) >= 3
    pairs = [images[number : number + SCANS] for number in range(0, len(images), SCANS)]
    assert all(nibabel.aff2axcodes(a.affine) != nibabel.aff2axcodes(b.affine) for a, b in pairs)


def test_the_scans_of_a_patient_show_one_anatomy_and_those_of_two_patients_do_not(example: Path) -> None:
    def standard(row: dict[str, str]) -> np.ndarray:
        volume = load_volume(str(example / row["path"]), (1.0, 1.0, 1.0), 1, False)
        middle = np.round(np.linalg.solve(volume.affine, [0, 0, 0, 1])[:3]).astype(int)[::-1]
        cube = volume.values[0][tuple(slice(m - 10, m + 11) for m in middle)].astype(np.float64)
        return (cube - cube.mean()) / cube.std()

    listed = rows(example)
    for first in range(0, 12, SCANS):
        same = (standard(listed[first]) * standard(listed[first + 1])).mean()
        other = (standard(listed[first]) * standard(listed[first + SCANS])).mean()
        assert same > 0.7
        assert same > other + 0.2


def test_both_classes_have_the_same_mass_in_one_or_many_pieces(example: Path) -> None:
    from scipy.ndimage import label

    mass: dict[str, list[float]] = {}
    for row in rows(example):
        image = nibabel.load(example / row["path"])
        values = np.asarray(image.dataobj, dtype=np.float64)
        values /= np.median(values[values > 0.3 * np.percentile(values, 99.5)]) / 100
        pieces, count = label(values > 165)
        largest = np.bincount(pieces.ravel())[1:].max() / (pieces > 0).sum()
        assert largest > 0.9 if row["label"] == "solitary" else largest < 0.5 and count >= 4
        voxel = np.prod(image.header.get_zooms())
        mass.setdefault(row["label"], []).append(float(values[values > 15].sum() * voxel))
    solitary, scattered = (np.mean(mass[name]) for name in ("solitary", "scattered"))
    assert abs(solitary - scattered) / solitary < 0.02


def test_the_landmark_is_on_the_patients_left(example: Path) -> None:
    """A mean over patients: the tube is the only structure that they share, at x = -8 mm."""
    domain = MedicalDomain(MedicalOptions())
    index = build_index(domain, [example], SkippedLog())
    reader = domain.reader(index)
    mean = np.mean([reader.volume(source).values[0][8:24, 16:20].mean((0, 1))[:30] for source in index.sources], axis=0)
    middle = FIELD / 2
    profile = dict(zip(np.round(np.arange(len(mean)) - middle + 0.5), mean))
    assert mean.argmax() < middle
    assert profile[-8.0] > profile[8.0] + 0.3
