"""``fmsuite pretrain`` on every domain: what a run leaves behind, and that it can be used."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fmsuite.commands.setup import resolve_run
from fmsuite.core.data.index import SampleIndex
from fmsuite.core.encoders import load_encoder
from fmsuite.core.reports.reconstructions import Reconstructions
from fmsuite.core.training.checkpoint import load_checkpoint
from fmsuite.domains.base import domain_names

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "runs.md"
STEPS = 24
SOMETIMES = ("skipped.csv", "reconstructions/", "pairs.parquet", "tokenizer.safetensors", "tokenizer.json", "logs/")
"""Files of runs that skipped something, of some objectives, and of several processes."""
METRICS = {"loss", "lr", "weight_decay", "grad_norm", "samples_per_second", "data_wait"}


def slope(seed: int, *shape: int) -> np.ndarray:
    """Values from 0 to 1 that grow along every axis, in steps of 4, with a texture: what is hidden can be guessed."""
    random = np.random.default_rng(seed)
    ramp = sum(np.indices(shape) // 4 * 4 / np.reshape(shape, (-1, *[1] * len(shape)))) / len(shape)
    return 0.8 * ramp + 0.2 * random.random(shape)


def make_drawings(folder: Path) -> None:
    lines = ["path,label,group"]
    for number in range(12):
        colour = f"hsl({30 * number}, 70%, 50%)"
        shape = (
            f'<circle cx="50" cy="50" r="{20 + number}"'
            if number % 2
            else f'<rect x="20" y="{10 + number}" width="50" height="40"'
        )
        text = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 100 100">{shape} fill="{colour}"/></svg>'
        (folder / f"{number}.svg").write_text(text, encoding="utf-8")
        lines.append(f"{number}.svg,{'round' if number % 2 else 'square'},{number // 2}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_tiles(folder: Path) -> None:
    for number in range(4):
        pixels = np.stack([slope(3 * number + band, 64, 64) for band in range(3)], -1)
        Image.fromarray((60 + 180 * pixels).astype(np.uint8)).save(folder / f"{number}.png")


def make_volumes(folder: Path) -> None:
    import nibabel

    for number in range(3):
        values = (100 + 80 * slope(number, 32, 32, 16)).astype(np.float32)
        image = nibabel.Nifti1Image(values, np.diag([1.0, 1.0, 1.0 + number % 2, 1.0]))
        image.set_sform(image.affine, code=1)
        image.header.set_xyzt_units("mm")
        nibabel.save(image, folder / f"{number}.nii.gz")


def write_raster(path: Path, values: np.ndarray, nodata: float) -> None:
    import rasterio
    from rasterio.transform import from_origin

    count, height, width = values.shape
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        width=width,
        height=height,
        count=count,
        dtype=values.dtype,
        crs="EPSG:32632",
        transform=from_origin(500_000, 5_300_000, 10, 10),
        nodata=nodata,
    ) as dataset:
        dataset.write(values)


def make_multispectral(folder: Path) -> None:
    for number in range(3):
        values = (500 + 3000 * np.stack([slope(20 * number + band, 64, 64) for band in range(13)])).astype(np.uint16)
        values[:, :20, :30] = 0
        write_raster(folder / f"{number}.tif", values, 0)


def make_radar(folder: Path) -> None:
    for number in range(3):
        values = (-20 + 15 * np.stack([slope(2 * number + band, 64, 64) for band in range(2)])).astype(np.float32)
        values[:, :10, :10] = np.nan
        write_raster(folder / f"{number}.tif", values, np.nan)


def make_series(folder: Path) -> None:
    for place, dates in (("a", 2), ("b", 3)):
        for date in range(dates):
            values = (500 + 3000 * np.stack([slope(10 * date + band, 64, 64) for band in range(4)])).astype(np.uint16)
            write_raster(folder / f"{place}_2024{date + 1:02d}15.tif", values, 0)


@dataclass(frozen=True)
class Case:
    """A domain with some data of its own.

    Attributes:
        make: writes the data.
        changes: settings beyond those of every case.
        shape: (C, *size) of what the encoder takes.
        labelled: windows have labels, so there is a kNN probe.
    """

    domain: str
    make: Callable[[Path], None]
    changes: dict[str, Any]
    shape: tuple[int, ...]
    labelled: bool = False


S1 = {"data.sensor": "sentinel1", "data.size": 32}
S2 = {"data.sensor": "sentinel2-l1c", "data.size": 32}
SERIES = {"data.series": True, "data.size": 32, "model.width": 48}
CASES = {
    "drawings": Case("svg", make_drawings, {"data.size": 32, "data.workers": 1}, (3, 32, 32), labelled=True),
    "tiles": Case("pathology", make_tiles, {"data.size": 32, "model.input_size": 32}, (3, 32, 32)),
    "volumes": Case("medical", make_volumes, {"data.size": 16, "model.width": 48}, (1, 16, 16, 16)),
    "radar": Case("remote_sensing", make_radar, S1, (2, 32, 32)),
    "multispectral": Case("remote_sensing", make_multispectral, S2, (13, 32, 32)),
    "series": Case("remote_sensing", make_series, SERIES, (4, 3, 32, 32)),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a case's data, made once."""
    folders: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            CASES[name].make(folders[name])
        return folders[name]

    return get


def documented_files() -> list[str]:
    """Names in the first column of the table of a run folder's files."""
    table = re.findall(r"^\| (`[^|]+) \|", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    return [name for cell in table for name in re.findall(r"`([^`]+)`", cell)]


def read_metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def check_files(run: Path, folder: Path) -> None:
    names = documented_files()
    assert {"config.yaml", "metrics.jsonl", "encoder.json", "checkpoints/"} <= set(names)
    for name in names:
        assert (run / name).exists() or name in SOMETIMES, name
    assert any((run / "tensorboard").iterdir())
    assert all((path / "checkpoint.json").is_file() for path in (run / "checkpoints").iterdir())
    with Image.open(run / "views.png") as picture:
        assert len(np.unique(np.asarray(picture).astype(np.uint32) @ np.array([1, 2**8, 2**16], np.uint32))) > 20
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert facts["seed"] == 0
    assert len(facts["index_hash"]) == 16
    (start,) = facts["starts"]
    assert str(folder) in start["command"]
    assert {"fmsuite", "torch", "timm", "numpy"} <= start["versions"].keys()


def check_metrics(run: Path, labelled: bool, steps: int) -> None:
    lines = read_metrics(run)
    losses = [line for line in lines if "loss" in line]
    assert [line["step"] for line in losses] == list(range(1, steps + 1))
    looks = [line for line in lines if "features/rankme" in line]
    assert looks[0]["step"] == 0
    assert looks[-1]["step"] == steps
    for line in losses:
        assert set(line) >= METRICS
        assert all(np.isfinite(value) for value in line.values())
    for line in looks:
        assert line["features/rankme"] >= 1
        assert line["features/std"] >= 0
        assert ("features/knn_balanced_accuracy" in line) == labelled


def check_encoder(run: Path, shape: tuple[int, ...]) -> None:
    encoder = load_encoder(run)
    raw = torch.rand(2, *shape) * 200
    embedding = encoder.embed(raw)
    assert embedding.shape == (2, encoder.dim)
    assert embedding.isfinite().all()
    assert not torch.equal(embedding[0], embedding[1])
    assert (encoder.spec.in_chans, *encoder.spec.size) == shape
    assert encoder.provenance["run"] == str(run.resolve())
    newest = max((run / "checkpoints").glob("step-*"))
    trained = load_checkpoint(newest).state
    name = "objective.teacher" if any(key.startswith("objective.teacher.") for key in trained) else "objective.backbone"
    for key, weight in encoder.backbone.state_dict().items():
        assert torch.equal(weight, trained[f"{name}.{key}"]), key


def check_config(run: Path, domain: str) -> None:
    path = run / "config.yaml"
    config = resolve_run(domain, str(path))
    assert config.to_yaml() == path.read_text(encoding="utf-8")
    newest = max((run / "checkpoints").glob("step-*"))
    saved = load_checkpoint(newest).checkpoint
    assert resolve_run(domain, str(path)).model_dump(mode="json")["seed"] == saved.config["seed"]


@pytest.mark.parametrize("objective", ["mae", "dino"])
@pytest.mark.parametrize("name", list(CASES))
def test_a_run_leaves_what_the_documentation_promises(
    fmsuite, settings, made, tmp_path: Path, name: str, objective: str
) -> None:
    case, folder = CASES[name], made(name)
    steps = STEPS if objective == "mae" else 4
    changes = {**case.changes, "training.steps": steps, "training.checkpoint_every": 8, "optim.lr": 4e-3}
    if objective == "mae":
        changes["objective.augment"] = "none"
    run = tmp_path / "run"
    ran = fmsuite("pretrain", "--domain", case.domain, "--data", folder, "--out", run, *settings(objective, changes))
    assert ran.code == 0, ran.text
    assert f"Done at step {steps} of {steps}. Run folder: {run}" in ran.text
    check_files(run, folder)
    check_metrics(run, case.labelled, steps)
    check_encoder(run, case.shape)
    check_config(run, case.domain)
    losses = [line["loss"] for line in read_metrics(run) if "loss" in line]
    if objective == "mae":
        assert np.mean(losses[-4:]) < 0.9 * np.mean(losses[:4]), losses
    filled = Reconstructions.read(run)
    assert (filled is not None) == (objective == "mae")
    if filled is not None:
        assert (filled.step, len(filled.samples)) == (steps, min(4, len(SampleIndex.read(run / "index.parquet"))))
        assert all(0 < float(sample.error or 0) < 4 for sample in filled.samples)
        assert all(Image.open(run / sample.file).width >= 160 for sample in filled.samples)


@pytest.mark.parametrize("domain", domain_names())
def test_the_default_recipe_of_each_domain_can_be_resolved(domain: str) -> None:
    assert resolve_run(domain).domain == domain


def test_the_configuration_that_a_run_wrote_repeats_it(fmsuite, tile_settings, tiles, facts_of, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    arguments = tile_settings("mae", {"seed": 3, "objective.mask_ratio": 0.6, "optim.lr": 2e-3})
    assert fmsuite("pretrain", *arguments, "--data", tiles, "--out", first).code == 0
    recipe = ["--recipe", first / "config.yaml"]
    ran = fmsuite("pretrain", "--domain", "pathology", *recipe, "--data", first / "index.parquet", "--out", second)
    assert ran.code == 0, ran.text
    assert (second / "config.yaml").read_text() == (first / "config.yaml").read_text()
    found, expected = facts_of(second), facts_of(first)
    assert found.losses == expected.losses
    assert all(torch.equal(found.weights[key], weight) for key, weight in expected.weights.items())


def test_another_seed_gives_another_run(fmsuite, tile_settings, tiles, facts_of, tmp_path: Path) -> None:
    losses = []
    for seed in (0, 1):
        arguments = tile_settings("mae", {"seed": seed, "training.steps": 2})
        assert fmsuite("pretrain", *arguments, "--data", tiles, "--out", tmp_path / str(seed)).code == 0
        losses.append(facts_of(tmp_path / str(seed)).losses)
    assert losses[0] != losses[1]


def test_a_finished_encoder_is_a_start_for_another_run(fmsuite, tile_settings, tiles, facts_of, tmp_path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert fmsuite("pretrain", *tile_settings("mae"), "--data", tiles, "--out", first).code == 0
    changes = {"model.weights": str(first), "optim.lr": 1e-12, "training.steps": 1}
    ran = fmsuite("pretrain", *tile_settings("mae", changes), "--data", tiles, "--out", second)
    assert ran.code == 0, ran.text
    found, expected = facts_of(second).weights, facts_of(first).weights
    for key, weight in expected.items():
        assert torch.allclose(found[key], weight, atol=1e-6), key


def test_windows_that_cannot_be_read_are_on_record_and_end_with_3(fmsuite, tile_settings, tiles, tmp_path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for path in tiles.glob("*.png"):
        (folder / path.name).write_bytes(path.read_bytes())
    index = tmp_path / "index.parquet"
    assert fmsuite("tile", "--domain", "pathology", folder, "--out", index, "--set", "size=32").code == 0
    (folder / "0.png").write_bytes((folder / "0.png").read_bytes()[:300])
    changes = {"training.max_skipped": 0.5, "monitor.every": 0}
    run = tmp_path / "run"
    ran = fmsuite("pretrain", *tile_settings("mae", changes), "--data", index, "--out", run)
    assert ran.code == 3, ran.text
    assert "skipped" in ran.text
    skipped = (run / "skipped.csv").read_text(encoding="utf-8").splitlines()
    assert skipped[0] == "path,stage,reason"
    assert 2 <= len(skipped) <= 5
    assert all(line.startswith(f"{folder / '0.png'},read,") for line in skipped[1:])
    ran = fmsuite("pretrain", *tile_settings("mae", changes), "--data", index, "--out", tmp_path / "strict", "--strict")
    assert ran.code == 1
    assert str(folder / "0.png") in ran.text


def test_too_many_unreadable_windows_stop_the_run(fmsuite, tile_settings, tiles, tmp_path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for path in tiles.glob("*.png"):
        (folder / path.name).write_bytes(path.read_bytes())
    index = tmp_path / "index.parquet"
    assert fmsuite("tile", "--domain", "pathology", folder, "--out", index, "--set", "size=32").code == 0
    for number in range(3):
        (folder / f"{number}.png").write_bytes(b"gone")
    changes = {"training.max_skipped": 0.01, "monitor.every": 0}
    ran = fmsuite("pretrain", *tile_settings("mae", changes), "--data", index, "--out", tmp_path / "run")
    assert ran.code == 1
    assert "training.max_skipped = 0.01" in ran.text


def test_without_data_the_example_data_is_used_and_said(fmsuite, settings, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = settings("mae", {"data.size": 32, "training.steps": 1, "monitor.every": 0})
    ran = fmsuite("pretrain", "--domain", "svg", "--out", "run", *arguments)
    assert ran.code == 0, ran.text
    assert "example data in example-data/svg-0" in ran.text
    assert len(list((tmp_path / "example-data" / "svg-0").glob("*.svg"))) == 160


def test_a_batch_of_more_windows_than_there_are_is_said(fmsuite, tile_settings, tiles, tmp_path) -> None:
    settings = tile_settings("mae", {"training.batch_size": 32, "training.steps": 1, "monitor.every": 0})
    ran = fmsuite("pretrain", *settings, "--data", tiles, "--out", tmp_path / "run")
    assert ran.code == 0, ran.text
    assert "training.batch_size 32 is more than the 24 windows" in ran.text


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model.patch_size": 7}, "7"),
        ({"model.width": 33}, "model.width 33 is not a multiple of model.heads 2"),
        ({"training.accumulate": 3}, "training.accumulate 3"),
        ({"model.name": "timm:resnet10t", "model.width": None}, "timm"),
        ({"training.workers": -2}, "training.workers"),
    ],
)
def test_what_cannot_work_is_refused_before_training(
    fmsuite, tile_settings, tiles, tmp_path, changes: dict[str, Any], sentence: str
) -> None:
    ran = fmsuite("pretrain", *tile_settings("mae", changes), "--data", tiles, "--out", tmp_path / "run")
    assert ran.code == 2, ran.text
    assert sentence in ran.text
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
