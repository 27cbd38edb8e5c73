from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import rasterio

from fmsuite.commands.indexing import build_index
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.domains.base import load_domain
from fmsuite.domains.remote_sensing import RemoteSensingDomain
from fmsuite.domains.remote_sensing.options import RemoteSensingOptions


@pytest.fixture(scope="module")
def example(tmp_path_factory) -> Path:
    return RemoteSensingDomain().example_data(tmp_path_factory.mktemp("example"), seed=3)


def digest(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.glob("*.tif")):
        with rasterio.open(path) as dataset:
            found[path.name] = hashlib.sha256(dataset.read().tobytes()).hexdigest()
    return found


def test_the_same_seed_makes_the_same_pixels(example, tmp_path):
    assert digest(RemoteSensingDomain().example_data(tmp_path / "again", seed=3)) == digest(example)
    assert digest(RemoteSensingDomain().example_data(tmp_path / "other", seed=4)) != digest(example)
    assert sum(path.stat().st_size for path in example.iterdir()) < 8e6


def test_every_scene_is_used_and_the_classes_differ_in_shape_but_not_in_spectrum(example):
    domain = RemoteSensingDomain(RemoteSensingOptions(sensor="sentinel2-l1c"))
    skipped = SkippedLog()
    index = build_index(domain, [example], skipped)
    assert not skipped.entries
    assert len(index.sources) == 8
    assert index.label_names == ["fields", "settlement"]
    assert {index[row].split for row in range(len(index))} == {"train", "test"}
    assert domain.input_spec(index).in_chans == 13
    means: dict[str, list] = {"fields": [], "settlement": []}
    edges: dict[str, list] = {"fields": [], "settlement": []}
    for source in index.sources:
        with rasterio.open(source) as dataset:
            values = dataset.read().astype(float)
            assert dataset.nodata == 0
        valid = (values > 0).all(0)
        assert 0.6 < valid.mean() < 0.97
        label = index.where("source", source)[0].label
        means[label].append(values[:, valid].mean(1))
        steps = np.abs(np.diff(values[3], axis=1))[valid[:, 1:] & valid[:, :-1]]
        edges[label].append((steps < 0.05 * values[3].std()).mean())
    fields, settlement = (np.array(means[name]) for name in ("fields", "settlement"))
    within = np.sqrt((fields.var(0, ddof=1) + settlement.var(0, ddof=1)) / 2)
    # Four scenes a class: a difference of the means below two within-class deviations separates nothing.
    assert (np.abs(fields.mean(0) - settlement.mean(0)) < 2 * within).all()
    assert np.mean(edges["fields"]) != pytest.approx(np.mean(edges["settlement"]), rel=0.05)


def test_two_indexes_of_the_same_files_are_equal(example):
    domain = RemoteSensingDomain(RemoteSensingOptions(sensor="sentinel2-l1c", gsd=20, size=32))
    first, second = (build_index(domain, [example], SkippedLog()) for _ in range(2))
    assert first.hash == second.hash
    assert first.metadata == second.metadata


def test_the_domain_is_installed_under_its_name():
    assert load_domain("remote_sensing") is RemoteSensingDomain
