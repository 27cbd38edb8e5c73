"""The other tasks of ``fmsuite finetune``, on tiles; and what a task's file is refused for."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from fmsuite.commands.finetune import finetune
from fmsuite.commands.finetune_file import TASK_FILES, read_finetune
from fmsuite.core.adaptation.network_files import load_network
from fmsuite.core.backbones.build import build_backbone
from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.encoders import save_encoder
from fmsuite.core.evaluation.cases import OVERALL, FinetuneResults
from fmsuite.errors import UsageError

TILES = 24


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiles of two kinds and a dozen patients, and an encoder of such tiles."""
    folder = tmp_path_factory.mktemp("tasks")
    tiles = folder / "tiles"
    tiles.mkdir()
    lines, targets = ["path,label,group,age"], ["path,age,weight,dark,round"]
    for number in range(TILES):
        random = np.random.default_rng(number)
        level = 90 if number % 2 else 150
        Image.fromarray(random.integers(level - 20, level + 20, (32, 32, 3)).astype(np.uint8)).save(
            tiles / f"{number}.png"
        )
        lines.append(f"{number}.png,{'dark' if number % 2 else 'pale'},p{number // 2:02d},{level + number / 10}")
        weight = "" if number % 5 == 0 else f"{number}"
        targets.append(f"{number}.png,{level},{weight},{number % 2},{'' if number % 3 == 0 else number // 4 % 2}")
    (tiles / "labels.csv").write_text("\n".join(lines) + "\n")
    (folder / "targets.csv").write_text("\n".join(targets) + "\n")
    write(folder, "index")
    from fmsuite.commands.setup import open_domain, open_index
    from fmsuite.core.data.skipped import SkippedLog

    options = read_finetune(folder / "index.yaml").data_options()
    domain, index = open_index(open_domain("pathology", options), [tiles], SkippedLog())
    spec = domain.input_spec(index)
    torch.manual_seed(0)
    save_encoder(
        folder / "encoder", build_backbone(ModelConfig(width=24, depth=1, heads=1, patch_size=8), spec), spec, "cls", {}
    )
    return folder


def write(folder: Path, name: str, **changes: object) -> Path:
    raw = {
        "domain": "pathology",
        "sources": str(folder / "tiles"),
        "data": {"size": 32},
        "encoder": str(folder / "encoder"),
        "task": {"name": "classification", "augment": "none", "scale": [1.0, 1.0]},
        "optim": {"lr": 0.01, "warmup": 0},
        "training": {"steps": 2, "batch_size": 8, "workers": 0},
        "split": {"test": 0.5},
        "judge": {"replicates": 50, "batch": 8},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**raw, **changes}))
    return path


def test_classes(place: Path, tmp_path: Path, fmsuite):
    task = write(place, "classes", few={"fractions": [0.1, 1.0]}, training={"steps": 8, "batch_size": 8, "workers": 0})
    results = finetune(task, tmp_path).results
    assert results is not None
    assert results.labels == ["dark", "pale"]
    assert results.primary == "auroc"
    cell = results.cell("full", 1.0)
    assert cell is not None
    assert cell.scores["auroc"][OVERALL].mean == pytest.approx(1.0)
    assert results.cell("full", 0.1).groups == (1, 1)
    run = results.runs[1]
    right = [
        results.cases[number].truth == [results.labels[int(np.argmax(said))]]
        for number, said in zip(run.cases, run.outputs, strict=True)
    ]
    assert cell.scores["accuracy"][OVERALL].mean == pytest.approx(np.mean(right))
    [said] = results.facts.normalisations.values()
    assert "the encoder's own" in said
    assert "What raw values became" in (tmp_path / "report.html").read_text(encoding="utf-8")
    ran = fmsuite("predict", "--model", tmp_path / run.folder, "--out", tmp_path / "new", place / "tiles")
    assert ran.code == 0, ran.text
    with (tmp_path / "new" / "predictions.csv").open() as file:
        said = {Path(row["path"]).name: float(row["dark"]) for row in csv.DictReader(file)}
    for number, shares in zip(run.cases, run.outputs, strict=True):
        assert said[results.cases[number].id] == pytest.approx(shares[0], abs=1e-6)


def test_an_encoder_is_given_windows_and_predicts_with_them(place: Path, tmp_path: Path, fmsuite):
    options = {"name": "classification", "augment": "none", "pooling": "mean", "attention": "rvsa", "rvsa_window": 3}
    results = finetune(write(place, "windows", task=options), tmp_path).results
    assert results is not None
    assert [run.arm for run in results.runs] == ["full", "scratch"]
    run = results.runs[0]
    state = load_network(tmp_path / run.folder).task.backbone.state_dict()
    assert state["blocks.0.attn.angles.weight"].any()
    ran = fmsuite("predict", "--model", tmp_path / run.folder, "--out", tmp_path / "new", place / "tiles")
    assert ran.code == 0, ran.text
    with (tmp_path / "new" / "predictions.csv").open() as file:
        said = {Path(row["path"]).name: float(row["dark"]) for row in csv.DictReader(file)}
    for number, shares in zip(run.cases, run.outputs, strict=True):
        assert said[results.cases[number].id] == pytest.approx(shares[0], abs=1e-6)
    wrong = write(place, "frozen", task={**options, "tune": "frozen"})
    with pytest.raises(UsageError, match="nothing of the backbone learns with tune: frozen"):
        finetune(wrong, tmp_path / "frozen")


def test_numbers_from_the_label_column_and_from_a_table(place: Path, tmp_path: Path):
    task = write(place, "age", task={"name": "regression", "augment": "none"}, scratch=False)
    results = finetune(task, tmp_path / "one", overrides=["data.label_column=age"]).results
    assert results is not None
    assert results.primary == "r2"
    run = results.runs[0]
    error = [abs(said[0] - results.cases[n].truth[0]) for n, said in zip(run.cases, run.outputs, strict=True)]
    assert results.cells[0].scores["mae"][OVERALL].mean == pytest.approx(np.mean(error))
    # The head starts at nearly nothing, so that answers begin near the mean of the training cases.
    assert np.mean(error) < 60

    task = write(
        place,
        "two",
        task={"name": "regression", "classes": ["age", "weight"], "augment": "none"},
        targets=str(place / "targets.csv"),
        scratch=False,
    )
    results = finetune(task, tmp_path / "two").results
    assert results is not None
    assert results.labels == ["age", "weight"]
    assert {case.id: case.truth for case in results.cases}["10.png"] == [150.0, None]
    assert set(results.cells[0].scores["mae"]) == {"age", "weight"}


def test_findings_with_gaps(place: Path, tmp_path: Path):
    task = write(
        place,
        "findings",
        task={"name": "multilabel", "classes": ["dark", "round"], "augment": "none"},
        targets=str(place / "targets.csv"),
        split={"folds": 3},
        scratch=False,
    )
    results = finetune(task, tmp_path).results
    assert results is not None
    assert sorted(n for run in results.runs for n in run.cases) == list(range(TILES))
    truth = {case.id: case.truth for case in results.cases}
    assert (truth["3.png"], truth["4.png"]) == ([1.0, None], [0.0, 1.0])
    assert set(results.cells[0].scores["auroc"]) == {OVERALL, "dark", "round"}
    assert FinetuneResults.read(tmp_path) == results


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tsak": {}}, "unknown key 'tsak'. Did you mean 'task'"),
        ({"task": {"name": "segmentaton"}}, "no task 'segmentaton'. Did you mean 'segmentation'"),
        ({"task": {"name": "segmentation"}}, "must name the values of the label map"),
        ({"task": {"name": "classification", "decoder": "unetr"}}, "unknown key 'task.decoder'"),
        ({"task": {"name": "classification", "lora_rank": 4}}, "lora_rank has no effect without tune: lora"),
        ({"compare": ["scartch"]}, "Did you mean 'scratch'"),
        ({"compare": ["lora", "lora"]}, "two arms called 'lora'"),
        ({"compare": ["scratch"], "scratch": False}, "compare names scratch, and scratch is false"),
        ({"few": {"fractions": [0.0]}}, "above 0 and at most 1"),
        ({"split": {"folds": 3, "test": 0.2}}, "split.test has no effect with split.folds"),
        ({"training": {"steps": 2, "foreground": 0.5}}, "no effect without training.windows: random"),
        ({"training": {"steps": 2, "split": "train"}}, "training.split has no effect"),
        ({"targets": "t.csv"}, "'targets' has no effect on a classification"),
        ({"judge": {"metrics": ["nsd"]}}, "must hold dice"),
        ({"data": {"sze": 3}}, "unknown key 'data.sze'"),
        ({"encoder": None}, "'encoder' is missing"),
    ],
)
def test_a_wrong_file_is_refused(place: Path, changes: dict, said: str):
    with pytest.raises(UsageError, match=said):
        read_finetune(write(place, "wrong", **changes))


def test_tasks_that_come_with_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert {path.stem for path in TASK_FILES.glob("*.yaml")} == {
        "msd-hippocampus",
        "sen1floods11-sample",
        "sentinel2-landcover",
    }
    monkeypatch.setenv("FMSUITE_DATA", str(tmp_path))
    config = read_finetune(Path("sentinel2-landcover"))
    assert config.paths == [tmp_path / "remote_sensing" / "sentinel2_rcr"]
    assert len(config.classes) == 6
    assert [arm.name for arm in config.arms] == ["frozen", "scratch"]
    config = read_finetune(Path("msd-hippocampus"))
    assert config.paths == [tmp_path / "medical" / "msd_hippocampus" / "images"]
    assert [arm.name for arm in config.arms] == ["full", "scratch", "frozen"]
    # The backbone learns as slowly from scratch; frozen it does not learn.
    learns = [config.arm_task(arm, classes=3).backbone_lr for arm in config.arms]
    assert learns == [0.25, 0.25, 1.0]
    monkeypatch.delenv("FMSUITE_DATA")
    with pytest.raises(UsageError, match="FMSUITE_DATA is not set"):
        read_finetune(Path("msd-hippocampus"))
    with pytest.raises(UsageError, match="Did you mean 'msd-hippocampus'"):
        read_finetune(Path("msd-hipocampus"))


def test_wrong_data_are_refused(place: Path, tmp_path: Path):
    def refused(number: int, **changes: object) -> str:
        with pytest.raises(UsageError) as error:
            finetune(write(place, f"bad{number}", **changes), tmp_path / str(number))
        return str(error.value)

    assert "is no number" in refused(0, task={"name": "regression"})
    assert "The labels are dark, pale" in refused(1, task={"name": "classification", "classes": ["dark", "grey"]})
    assert "the data name no sides" in refused(2, split={"test": "column"})
    assert "there is no column 'dork'. Did you mean 'dark'" in refused(
        3, task={"name": "multilabel", "classes": ["dork"]}, targets=str(place / "targets.csv")
    )
    assert "cannot be cut into 13 folds" in refused(4, split={"folds": 13})


def test_a_patient_on_both_sides_is_refused(place: Path, tmp_path: Path):
    lines = ["path,label,group,split"]
    lines += [
        f"{n}.png,{'dark' if n % 2 else 'pale'},p{n // 2:02d},{'train' if n < 13 else 'test'}" for n in range(TILES)
    ]
    labels = tmp_path / "sides.csv"
    labels.write_text("\n".join(lines) + "\n")
    task = write(place, "leak", split={"test": "column"})
    with pytest.raises(UsageError, match="p06"):
        finetune(task, tmp_path / "out", overrides=[f"data.labels={labels}"])
