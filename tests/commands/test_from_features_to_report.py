"""The commands in a row, as a user types them: tile, embed an encoder and its controls, fewshot, bench, report."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.backbones.vit import VisionTransformer
from fmsuite.core.encoders import save_encoder
from fmsuite.core.features import FeatureStore
from fmsuite.core.inputs import InputSpec, rgb_channels

SIZE, IMAGES = 32, 16


@dataclass
class Cohort:
    """Images of four windows each, two classes that differ in brightness, a patient for every two images."""

    images: Path
    labels: Path
    encoder: Path


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    folder = tmp_path_factory.mktemp("cohort")
    images = folder / "images"
    images.mkdir()
    lines = ["file,grade,case,note"]
    for number in range(IMAGES):
        bright = number % 4 < 2
        noise = np.random.default_rng(number).integers(0, 120, (2 * SIZE, 2 * SIZE, 3))
        Image.fromarray((noise + (110 if bright else 20)).astype(np.uint8)).save(images / f"slide {number}.png")
        lines.append(f"slide {number}.png,{'high' if bright else 'low'},case {number // 2},-")
    labels = folder / "grades.csv"
    labels.write_text("\n".join(lines) + "\n", encoding="utf-8")
    spec = InputSpec(axes=("y", "x"), size=(SIZE, SIZE), channels=rgb_channels(), scale=1 / 255)
    torch.manual_seed(0)
    backbone = VisionTransformer(ModelConfig(name="vit_tiny", width=32, depth=1, heads=2, patch_size=8), spec)
    save_encoder(folder / "run", backbone, spec, "cls+mean", {})
    return Cohort(images, labels, folder / "run")


def test_from_slides_to_a_page(fmsuite: Callable, cohort: Cohort, tmp_path: Path) -> None:
    index = tmp_path / "index.parquet"
    fmsuite("tile", "--domain", "pathology", cohort.images, "--out", index, "--set", f"size={SIZE}")
    stores = []
    for name in (str(cohort.encoder), f"untrained:{cohort.encoder}", "histogram"):
        store = tmp_path / "features" / f"{len(stores)}.zarr"
        ran = fmsuite("embed", "--encoder", name, "--index", index, "--out", store, "--workers", 0)
        assert ran.code == 0, ran.text
        assert f"{4 * IMAGES} windows in {IMAGES} groups" in ran.text
        stores += ["--features", store]
    trained, untrained, histogram = (FeatureStore.open(path).facts for path in stores[1::2])
    assert untrained.identity != trained.identity
    assert untrained.provenance["control"] == "untrained"
    assert (trained.dim, untrained.dim, histogram.dim) == (64, 64, 96)

    out = tmp_path / "fewshot"
    columns = ["--path-column", "file", "--label-column", "grade", "--patient-column", "case"]
    draw = ["--shots", "1,2,64", "--episodes", 4, "--method", "mi_simpleshot", "--method", "knn", "--evidence", 1]
    ran = fmsuite("fewshot", *stores, "--labels", cohort.labels, *columns, *draw, "--out", out)
    assert ran.code == 0, ran.text
    results = json.loads((out / "results.json").read_text())
    assert [(e["name"], e["kind"]) for e in results["encoders"]] == [
        ("run", "encoder"),
        ("run untrained", "untrained"),
        ("histogram", "histogram"),
    ]
    assert results["classes"] == ["high", "low"]
    assert {item["group"] for item in results["items"]} == {f"case {n}" for n in range(IMAGES // 2)}
    best = [e for e in results["evaluations"] if e["encoder"] == "histogram" and e["shots"] == 2 and not e["shuffled"]]
    assert all(e["metrics"]["balanced_accuracy"]["mean"] == 1.0 for e in best)
    assert any("64" in note for note in results["notes"])
    with (out / "results.csv").open(newline="") as file:
        assert {row["method"] for row in csv.DictReader(file)} == {"mi_simpleshot", "knn"}
    assert len(json.loads((out / "predictions.json").read_text())) == len(results["evaluations"])
    assert "histogram" in (out / "report.html").read_text()

    page = tmp_path / "page.html"
    ran = fmsuite("report", out, "--out", page, "--title", "Grades & <cases>")
    assert ran.code == 0, ran.text
    assert "Grades &amp; &lt;cases&gt;" in page.read_text()


def test_bench_writes_its_page_beside_the_results(fmsuite: Callable, cohort: Cohort, tmp_path: Path) -> None:
    out = tmp_path / "bench"
    options = ["--set", f"size={SIZE}", "--set", f"labels={cohort.labels}", "--set", "label_column=grade"]
    options += ["--set", "group_column=case", "--task", "knn", "--task", "fewshot", "--shots", "1,2", "--episodes", 3]
    ran = fmsuite(
        "bench", "--domain", "pathology", "--encoder", cohort.encoder, "--data", cohort.images, *options, "--out", out
    )
    assert ran.code == 0, ran.text
    assert "knn, shuffled labels" in ran.text
    results = json.loads((out / "results.json").read_text())
    assert {e["kind"] for e in results["encoders"]} == {"encoder", "untrained", "histogram"}
    assert (out / "report.html").stat().st_size > 10_000


def test_a_csv_of_tiles_stands_for_its_folder(fmsuite: Callable, cohort: Cohort, tmp_path: Path) -> None:
    tiles = tmp_path / "tiles, all of them"
    shutil.copytree(cohort.images, tiles)
    table = shutil.copy(cohort.labels, tiles / "my grades.csv")
    options = ["--set", f"size={SIZE}", "--set", "label_column=grade", "--set", "group_column=case"]
    task = ["--encoder", cohort.encoder, "--task", "knn", "--no-controls", "--no-report"]
    ran = fmsuite("bench", "--domain", "pathology", *task, "--data", table, *options, "--out", tmp_path / "bench")
    assert ran.code == 0, ran.text
    results = json.loads((tmp_path / "bench" / "results.json").read_text())
    assert results["classes"] == ["high", "low"]
    assert len(results["items"]) == 4 * IMAGES
    twice = fmsuite(
        "bench", "--domain", "pathology", *task, "--data", table, "--set", f"labels={table}", "--out", tmp_path / "b"
    )
    assert twice.code == 2
    assert "one CSV" in twice.text


def test_an_encoder_called_histogram_does_not_meet_the_control_of_that_name(
    fmsuite: Callable, cohort: Cohort, tmp_path: Path
) -> None:
    shutil.copytree(cohort.encoder, tmp_path / "histogram")
    options = ["--set", f"size={SIZE}", "--set", f"labels={cohort.labels}", "--set", "label_column=grade"]
    options += ["--set", "group_column=case", "--task", "knn", "--no-report", "--encoder", str(tmp_path / "histogram")]
    ran = fmsuite("bench", "--domain", "pathology", "--data", cohort.images, *options, "--out", tmp_path / "bench")
    assert ran.code == 0, ran.text
    results = json.loads((tmp_path / "bench" / "results.json").read_text())
    kinds = {e["name"]: e["kind"] for e in results["encoders"]}
    assert kinds == {
        "histogram": "encoder",
        "untrained histogram": "untrained",
        "control histogram": "histogram",
    }


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["fewshot", "--features", "nowhere.zarr", "--out", "x"], 2, "nowhere.zarr"),
        (["fewshot", "--features", "nowhere.zarr", "--out", "x", "--shots", "1,b"], 2, "--shots '1,b'"),
        (["embed", "--encoder", "untrained:nowhere", "--index", "i.parquet", "--out", "x.zarr"], 2, "i.parquet"),
        (["bench", "--domain", "pathology", "--encoder", "nowhere", "--out", "x", "--task", "knnn"], 2, "knn"),
        (["report", "nowhere"], 2, "nowhere"),
    ],
)
def test_wrong_use_is_one_message_and_leaves_nothing(
    fmsuite: Callable,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    code: int,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = fmsuite(*arguments)
    assert ran.code == code
    assert said in ran.text
    assert "Traceback" not in ran.text
    assert not list(tmp_path.iterdir())
