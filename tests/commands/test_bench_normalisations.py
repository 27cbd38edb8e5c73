"""``bench --normalisations`` and ``--band-means`` on made rasters: what is judged, kept, said and shown."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from rasterio.transform import from_origin
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from fmsuite.commands.bench import bench
from fmsuite.commands.comparison import Compared
from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.backbones.vit import VisionTransformer
from fmsuite.core.encoders import Encoder, save_encoder
from fmsuite.core.evaluation.results import Results
from fmsuite.core.features import FeatureStore
from fmsuite.core.inputs import Channel, InputSpec
from fmsuite.core.reports.answer import answer
from fmsuite.core.reports.page import render
from fmsuite.core.reports.sources import read_sources
from fmsuite.errors import UsageError

SIDE = 16
SPECTRA = {"sand": (2600, 2900, 3200, 3300), "water": (900, 700, 400, 200)}
NAMES = ("two-sigma", "window")
OPTIONS = ("data.size=16", "data.scale=0.0001", "data.bands=[B2,B3,B4,B8]")
QUICK = {"overrides": OPTIONS, "workers": 0, "device": "cpu", "tasks": ["linear_sklearn"]}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 scenes of one window each, of which every third is asked."""
    folder = tmp_path_factory.mktemp("bench") / "scenes"
    folder.mkdir()
    lines = [("path", "label", "group", "split")]
    for number in range(30):
        label = ("sand", "water")[number % 2]
        random = np.random.default_rng(number)
        values = np.array(SPECTRA[label])[:, None, None] * random.normal(1, 0.5, (4, 1, 1))
        values = values + random.normal(0, 150, (4, SIDE, SIDE))
        path = folder / f"{number:02d}.tif"
        kind = {"driver": "GTiff", "height": SIDE, "width": SIDE, "count": 4, "dtype": "uint16", "crs": "EPSG:32633"}
        with rasterio.open(path, "w", transform=from_origin(5e5, 6e6, 10, 10), **kind) as file:
            file.write(values.clip(1, 10_000).astype(np.uint16))
            file.descriptions = ("B2", "B3", "B4", "B8")
        lines.append((path.name, label, f"s{number:02d}", "test" if number % 3 == 2 else "train"))
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(lines)
    return folder


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], str]:
    folder = tmp_path_factory.mktemp("nets")
    bands = tuple(Channel(name=name, mean=0.2, std=0.1) for name in ("B2", "B3", "B4", "B8"))
    spec = InputSpec(axes=("y", "x"), size=(SIDE, SIDE), channels=bands, scale=1e-4)

    def made(seed: int) -> str:
        path = folder / f"net{seed}"
        if not path.exists():
            torch.manual_seed(seed)
            config = ModelConfig.model_validate({"width": 24, "depth": 1, "heads": 2, "patch_size": 8})
            save_encoder(path, VisionTransformer(config, spec), spec, "mean", {})
        return str(path)

    return made


@pytest.fixture(scope="module")
def compared(data: Path, net: Callable[[int], str], tmp_path_factory: pytest.TempPathFactory) -> Compared:
    out = tmp_path_factory.mktemp("out") / "out"
    return bench("remote_sensing", [net(0), net(1)], [data], out, normalisations=NAMES, **QUICK)  # type: ignore[arg-type]


def test_every_encoder_is_judged_under_each_and_is_no_rival_of_itself(compared: Compared) -> None:
    results = compared.results
    variants = {known.name: known for known in results.encoders if known.kind == "normalised"}
    assert list(variants) == ["net0, two-sigma", "net0, window", "net1, two-sigma", "net1, window"]
    assert (variants["net1, window"].variant_of, variants["net1, window"].normalisation) == ("net1", "window")
    assert len({known.identity for known in results.encoders}) == len(results.encoders)
    judged = [(e.encoder, e.method, e.shuffled) for e in results.evaluations if e.encoder in variants]
    assert judged == [(name, "linear_sklearn", False) for name in variants]
    assert answer(results).headline.startswith("Of 2 encoders, ")
    assert len(FeatureStore.open(next((compared.out / "features").glob("net0-two-sigma-*.zarr"))).read_all()[1]) == 30


def test_each_encoders_normalisation_is_said_in_results_csv_and_page(compared: Compared) -> None:
    said = compared.results.facts.normalisations
    assert list(said) == [known.name for known in compared.results.encoders]
    assert said["net0"] == "Raw values x 0.0001; minus 0.2, divided by 0.1 (the encoder's own)."
    assert said["untrained net0"] == said["net0"]
    assert "(the data's)" in said["histogram"]
    assert "(20 of 20 training windows)" not in said["net0, two-sigma"]
    assert (
        "mean ± 2 standard deviations of the data (all 20 training windows) become 0 and 1" in said["net0, two-sigma"]
    )
    assert said["band means"].endswith("averaged over the valid values of each channel.")
    with (compared.out / "encoders.csv").open(newline="", encoding="utf-8") as file:
        rows = {row["encoder"]: row for row in csv.DictReader(file)}
    assert {name: row["normalisation"] for name, row in rows.items()} == said
    assert rows["net0, window"]["kind"] == "normalised"
    page = render(read_sources(compared.out))
    assert "What raw values became" in page
    assert "a spread of" in page
    assert "Balanced accuracy of net1 by normalisation, whole training side" in page
    assert Results.read(compared.out) == compared.results


def test_the_means_of_the_channels_are_the_figure_of_scikit_learn(compared: Compared, data: Path) -> None:
    features = FeatureStore.open(compared.out / "features" / "band-means.zarr").read_all()[0].numpy()
    expected = []
    for path in sorted(data.glob("*.tif")):
        with rasterio.open(path) as file:
            expected.append(file.read().mean((1, 2), dtype=np.float64) * 1e-4)
    np.testing.assert_allclose(features, expected, rtol=1e-5)
    labels = np.array([item.label for item in compared.results.items])
    train = np.array([item.split == "train" for item in compared.results.items])
    scaler = StandardScaler().fit(features[train])
    model = LogisticRegression(C=4 * 2 / 100, tol=1e-10, max_iter=10_000)
    predicted = model.fit(scaler.transform(features[train]), labels[train]).predict(scaler.transform(features[~train]))
    [found] = [e for e in compared.results.evaluations if e.encoder == "band means"]
    assert np.array(found.episodes[0].predictions)[~train].tolist() == predicted.tolist()
    assert any("means of the channels" in finding.text for finding in answer(compared.results).findings)


def test_a_second_run_embeds_what_is_new_only(
    data: Path, net: Callable[[int], str], compared: Compared, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides: list[str] = []
    usual = Encoder.embed
    monkeypatch.setattr(Encoder, "embed", lambda self, view: (sides.append(self.normalisation), usual(self, view))[1])
    again = bench(
        "remote_sensing",
        [net(0), net(1)],
        [data],
        compared.out,
        normalisations=(*NAMES, "raw"),
        means="none",
        **QUICK,  # type: ignore[arg-type]
    ).results
    assert len(sides) == 2
    assert all(side.startswith("Raw values as they are") for side in sides)
    assert "means" not in {known.kind for known in again.encoders}
    before = {e.encoder: e for e in compared.results.evaluations if not e.shuffled}
    for e in again.evaluations:
        assert e.shuffled or e.encoder not in before or e == before[e.encoder]


def test_what_does_not_apply_is_refused_before_anything_is_embedded(
    data: Path, net: Callable[[int], str], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"'imagenet' does not apply to 'net0'.*4 channels"):
        bench("remote_sensing", [net(0)], [data], tmp_path / "out", normalisations=["imagenet"], **QUICK)  # type: ignore[arg-type]
    assert not list((tmp_path / "out").glob("features/*"))
    with pytest.raises(UsageError, match="no normalisation 'sigma'"):
        bench("remote_sensing", [net(0)], [data], tmp_path / "out", normalisations=["sigma"], **QUICK)  # type: ignore[arg-type]
