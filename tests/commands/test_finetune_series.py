"""An encoder of single images on series of rasters: features, changes, classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

rasterio = pytest.importorskip("rasterio")

from fmsuite.commands.contenders import contenders  # noqa: E402
from fmsuite.commands.embed import embed  # noqa: E402
from fmsuite.commands.finetune import finetune  # noqa: E402
from fmsuite.commands.predict import predict  # noqa: E402
from fmsuite.commands.setup import open_domain, open_index  # noqa: E402
from fmsuite.core.adaptation.network_files import load_network  # noqa: E402
from fmsuite.core.backbones.build import build_backbone  # noqa: E402
from fmsuite.core.backbones.config import ModelConfig  # noqa: E402
from fmsuite.core.backbones.datewise import Datewise, one_date  # noqa: E402
from fmsuite.core.data.sample import View  # noqa: E402
from fmsuite.core.data.skipped import SkippedLog  # noqa: E402
from fmsuite.core.encoders import load_encoder, save_encoder  # noqa: E402
from fmsuite.core.evaluation.cases import OVERALL  # noqa: E402
from fmsuite.core.features import FeatureStore  # noqa: E402
from fmsuite.domains.remote_sensing.options import RemoteSensingOptions  # noqa: E402

PLACES = 6
DATA = {"series": True, "size": 16, "stride": 8, "min_valid": 0.0, "labels": "none", "place_pattern": "^([a-z])_"}
TRAINING = {"steps": 40, "batch_size": 8, "workers": 0, "checkpoint_every": 1000}


def _write(path: Path, values: np.ndarray, **profile) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    transform = rasterio.transform.from_origin(500_000, 5_300_000, 10, 10)
    shape = {"width": values.shape[1], "height": values.shape[0], "count": 1, "dtype": values.dtype}
    with rasterio.open(path, "w", driver="GTiff", crs="EPSG:32632", transform=transform, **shape, **profile) as file:
        file.write(values, 1)


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    """Two dates of six places; in each something bright has come or gone in one of the four quarters, and of the last
    place a part of the second date is missing."""
    folder = tmp_path_factory.mktemp("places")
    for number in range(PLACES):
        draw = np.random.default_rng(number)
        name = "abcdef"[number]
        first = draw.integers(1000, 3000, (4, 4)).repeat(8, 0).repeat(8, 1)
        change = np.zeros((4, 4), np.uint8)
        change.flat[draw.choice(16, 5, replace=False)] = 1
        changed = change.repeat(8, 0).repeat(8, 1)
        second = np.where(changed == 1, 6000 - first, first)
        if number == PLACES - 1:
            second[:, 24:] = 0
        for date, values in (("20200101", first), ("20200601", second)):
            _write(folder / "images" / f"{name}_{date}.tif", values.astype(np.uint16), nodata=0)
        _write(folder / "changes" / f"{name}.tif", changed)
    lines = [f"{'abcdef'[n]},{'test' if n > 3 else 'train'}" for n in range(PLACES)]
    (folder / "sides.csv").write_text("\n".join(("path,split", *lines)))
    return folder


@pytest.fixture(scope="module")
def encoder(places: Path) -> Path:
    """Of single images, saved as a run would."""
    domain = open_domain("remote_sensing", RemoteSensingOptions(**DATA))
    domain, index = open_index(domain, [places / "images"], SkippedLog())
    index.write(places / "index.parquet")
    spec = one_date(domain.input_spec(index))
    torch.manual_seed(0)
    backbone = build_backbone(ModelConfig(width=24, depth=1, heads=2, patch_size=4, positions="sincos"), spec)
    save_encoder(places / "encoder", backbone, spec, "mean", {})
    return places / "encoder"


def test_embedding_takes_the_dates_one_by_one(places: Path, encoder: Path) -> None:
    embed(str(encoder), places / "index.parquet", places / "features.zarr", device="cpu", workers=0)
    domain, index = open_index(
        open_domain("remote_sensing", RemoteSensingOptions()), [places / "index.parquet"], SkippedLog()
    )
    images, reader = load_encoder(encoder), domain.reader(index)
    features, _ = FeatureStore.open(places / "features.zarr").read_all(range(4))
    for row, vector in enumerate(features.numpy()):
        sample = reader.read(index[row])
        pixels = torch.from_numpy(sample.values.astype(np.float32)).movedim(1, 0)
        # Every token of both dates counts alike.
        expected = images.embed(View(pixels)).mean(0)
        np.testing.assert_allclose(vector, expected.numpy(), atol=1e-5)


def test_changes_are_learned_judged_and_mapped(places: Path, encoder: Path) -> None:
    task = {
        "domain": "remote_sensing",
        "sources": str(places / "images"),
        "encoder": str(encoder),
        "data": {
            **DATA,
            "labels": str(places / "sides.csv"),
            "maps": {"label": str(places / "changes" / "{place}.tif")},
        },
        "task": {
            "name": "change",
            "classes": ["same", "changed"],
            "decoder": "linear",
            "dice_batch": True,
            "augment": "weak",
        },
        "scratch": False,
        "optim": {"lr": 1e-2},
        "training": {**TRAINING, "windows": "random", "foreground": 0.3},
        "judge": {"metrics": ["dice"], "replicates": 20},
    }
    file = places / "change.yaml"
    file.write_text(yaml.safe_dump(task))
    found = finetune(file, places / "change")
    assert found.results is not None
    assert not found.skipped
    assert found.results.cells[0].scores["dice"][OVERALL].mean > 0.6
    run = places / "change" / "runs" / "full" / "fraction-1" / "seed-0"
    network = load_network(run)
    assert isinstance(network.task.backbone, Datewise)
    assert load_encoder(run).spec.axes == ("time", "y", "x")
    written, page = predict(run, sorted((places / "images").glob("f_*.tif")), places / "maps").files
    assert page.name == "report.html"
    with rasterio.open(written) as dataset:
        assert dataset.shape == (32, 32)
        assert dataset.crs.to_epsg() == 32632
        labels, shown = dataset.read(1), dataset.read_masks(1) > 0
    # What one of the dates does not show has no answer.
    assert shown[:, :24].all()
    assert not shown[:, 24:].any()
    with rasterio.open(places / "changes" / "f.tif") as dataset:
        truth = dataset.read(1)
    assert (labels == truth)[:, :24].mean() > 0.85


def test_series_are_classified(places: Path, encoder: Path) -> None:
    """Whether the first date of a place is the brighter one is asked of no single date."""
    rows = ["path,label,split"]
    rows += [f"{'abcdef'[n]},{'even' if n % 2 else 'odd'},{'test' if n > 3 else 'train'}" for n in range(PLACES)]
    (places / "classes.csv").write_text("\n".join(rows))
    task = {
        "domain": "remote_sensing",
        "sources": str(places / "images"),
        "encoder": str(encoder),
        "data": {**DATA, "labels": str(places / "classes.csv")},
        "task": {"name": "classification", "tune": "frozen"},
        "scratch": False,
        "training": {**TRAINING, "steps": 2},
        "judge": {"replicates": 20},
    }
    file = places / "classes.yaml"
    file.write_text(yaml.safe_dump(task))
    found = finetune(file, places / "classes")
    assert found.results is not None
    assert len(found.results.runs[0].cases) == 2
    assert all(len(outputs) == 2 for outputs in found.results.runs[0].outputs)


def test_controls_of_an_encoder_of_images_take_series_too(places: Path, encoder: Path) -> None:
    domain, index = open_index(
        open_domain("remote_sensing", RemoteSensingOptions()), [places / "index.parquet"], SkippedLog()
    )
    found = contenders({"images": load_encoder(encoder)}, domain.input_spec(index), controls=True)
    assert [contender.kind for contender in found][:2] == ["encoder", "untrained"]
    sample = domain.reader(index).read(index[0])
    view = View(torch.from_numpy(sample.values.astype(np.float32))[None])
    vectors = [contender.embedder.embed(view) for contender in found]
    assert vectors[0].shape == vectors[1].shape == (1, 24)
    assert not torch.equal(vectors[0], vectors[1])
