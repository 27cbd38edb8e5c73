"""``bench --folds``: every window asked once, classes of one group left out, controls and targets with folds."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fmsuite.commands.bench import bench
from fmsuite.commands.bench_targets import bench_targets
from fmsuite.commands.comparison import Compared
from fmsuite.commands.targets import Target
from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.backbones.vit import VisionTransformer
from fmsuite.core.encoders import save_encoder
from fmsuite.core.evaluation.results import Results
from fmsuite.core.inputs import InputSpec, rgb_channels
from fmsuite.core.reports.answer import answer
from fmsuite.core.reports.page import render
from fmsuite.core.reports.sources import read_sources
from fmsuite.errors import UsageError

SIDE = 16
COLOURS = {"pink": (190, 100, 140), "violet": (150, 90, 170), "lone": (60, 160, 60)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """18 groups of two tiles in two classes, one more group of a third class, a number, and sides."""
    folder = tmp_path_factory.mktemp("folds") / "tiles"
    folder.mkdir()
    lines = [("path", "label", "group", "split", "size")]
    for number in range(38):
        group = number // 2
        label = "lone" if group == 18 else ("pink", "violet")[group % 2]
        random = np.random.default_rng(number)
        pixels = np.array(COLOURS[label]) + random.normal(0, 12, 3) + random.normal(0, 20, (SIDE, SIDE, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number:02d}.png")
        side = "test" if group % 3 == 2 else "train"
        lines.append((f"{number:02d}.png", label, f"g{group:02d}", side, f"{pixels.mean():.2f}"))
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(lines)
    return folder


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> str:
    spec = InputSpec(axes=("y", "x"), size=(SIDE, SIDE), channels=rgb_channels(), scale=1 / 255)
    torch.manual_seed(0)
    config = ModelConfig.model_validate({"width": 24, "depth": 1, "heads": 2, "patch_size": 8})
    folder = tmp_path_factory.mktemp("net") / "net"
    save_encoder(folder, VisionTransformer(config, spec), spec, "mean", {})
    return str(folder)


TASKS = ("knn", "linear_sklearn", "fewshot")
QUICK = {"overrides": ("data.size=16", "data.min_tissue=0"), "workers": 0, "device": "cpu", "episodes": 3}


def run(data: Path, net: str, out: Path, **changes: object) -> Compared:
    return bench("pathology", [net], [data], out, **{**QUICK, "shots": (1,), **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def compared(data: Path, net: str, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    return run(data, net, tmp_path_factory.mktemp("out") / "out", folds=3, tasks=TASKS)


def test_every_window_is_asked_once_and_what_was_left_out_is_said(compared: Compared) -> None:
    results = compared.results
    assert results.folds == 3
    assert [item.split for item in results.items] == [None] * 36
    assert results.classes == ["pink", "violet"]
    whole = [e for e in results.evaluations if e.shots is None and not e.shuffled]
    assert len(whole) == 2 * 3
    assert all(min(e.episodes[0].predictions) >= 0 and sum(map(sum, e.confusion)) == 36 for e in whole)
    assert "3 folds by group" in results.split
    assert "each of 36 tiles of 18 groups is asked once" in results.split
    said = " ".join(results.notes)
    assert "2 tiles of 'lone', all of one group ('g18')" in said
    assert "sides of the split that the data name were not kept to" in said
    assert "answers of all folds are put together" in said


def test_controls_and_paired_comparisons_work_with_folds(compared: Compared) -> None:
    results = compared.results
    assert {known.kind for known in results.encoders} == {"encoder", "untrained", "histogram"}
    shuffled = [e for e in results.evaluations if e.shuffled]
    assert len(shuffled) == 2
    assert all(len(e.episodes) == 20 for e in shuffled)
    said = answer(results)
    assert "cross-validation by group (3 folds)" in said.headline
    assert any("on the same items" in finding.text for finding in said.findings)


def test_the_page_speaks_of_folds(compared: Compared) -> None:
    assert Results.read(compared.out) == compared.results
    page = render(read_sources(compared.out))
    assert "cross-validation by group (3 folds)" in page
    assert "asked once" in page
    assert "whole training side" not in page.split("<h3>Encoders and methods</h3>")[0]


def test_leaving_one_group_out_needs_the_features_only(data: Path, net: str, compared: Compared, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("embedded again")

    monkeypatch.setattr("fmsuite.core.encoders.Encoder.embed", refuse)
    results = run(data, net, compared.out, folds="groups", tasks=["knn"], controls=False).results
    assert results.folds == 18
    assert "18 folds, each of which leaves one group out" in results.split


def test_columns_are_asked_with_folds_too(data: Path, net: str, tmp_path: Path) -> None:
    targets = [Target("number", ("size",)), Target("classes", ("label",))]
    number, classes = bench_targets(
        "pathology",
        [net],
        [data],
        tmp_path,
        targets,
        folds=4,
        tasks=["ridge", "knn"],
        fractions=(0.1,),
        controls=False,
        **QUICK,
    )  # type: ignore[arg-type]
    assert (number.results.folds, len(number.results.items)) == (4, 38)
    assert (classes.results.folds, len(classes.results.items)) == (4, 36)
    assert "everything of 'lone', which is of one group ('g18')" in " ".join(classes.results.notes)
    [ridge] = [e for e in number.results.evaluations if (e.method, e.fraction) == ("ridge", None)]
    assert ridge.metrics["r2"].mean > 0.5
    assert all(len(one) == 1 for one in ridge.episodes[0].answers)
    shares = [e for e in number.results.evaluations if e.fraction == 0.1]
    assert all(e.settings["folds"] == 4 for e in shares)
    assert "training groups" in " ".join(number.results.notes)


def test_more_folds_than_groups_are_refused(data: Path, net: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="19 folds of 18 groups"):
        run(data, net, tmp_path / "out", folds=19)
    with pytest.raises(UsageError, match="--folds 1 divides nothing"):
        run(data, net, tmp_path / "out", folds=1)
