"""``fmsuite finetune`` on tiny volumes: what it trains, what it judges, and that it goes on where it was stopped."""

from __future__ import annotations

import csv
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

nibabel = pytest.importorskip("nibabel")
pytest.importorskip("monai")

from fmsuite.commands import finetune as command  # noqa: E402
from fmsuite.commands.finetune_file import read_finetune  # noqa: E402
from fmsuite.commands.finetune_points import read_points  # noqa: E402
from fmsuite.core.adaptation.network_files import load_network  # noqa: E402
from fmsuite.core.backbones.build import build_backbone  # noqa: E402
from fmsuite.core.backbones.config import ModelConfig  # noqa: E402
from fmsuite.core.data.skipped import SkippedLog  # noqa: E402
from fmsuite.core.encoders import load_encoder, save_encoder  # noqa: E402
from fmsuite.core.evaluation.cases import OVERALL, FinetuneResults  # noqa: E402
from fmsuite.core.inputs import Channel, InputSpec  # noqa: E402
from fmsuite.core.reports.case_slices import CaseSlices  # noqa: E402
from fmsuite.errors import UsageError  # noqa: E402

SPEC = InputSpec(
    axes=("z", "y", "x"),
    size=(8, 8, 8),
    channels=(Channel(name="mr"),),
    spacing=(1.0, 1.0, 1.0),
    spacing_unit="mm",
    orientation="RAS",
)
PATIENTS = 8
CLASSES = ["background", "low", "high"]


def make_volumes(folder: Path) -> None:
    """A bright ball in noise, its lower half one label and its upper half the other; stored in two orientations, one
    of them at another spacing than the network's."""
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    lines = ["path,label,group"]
    for number in range(PATIENTS):
        random = np.random.default_rng(number)
        shape = np.array([11, 12, 10])
        middle = shape / 2 + random.uniform(-1, 1, 3)
        places = np.indices(shape).transpose(1, 2, 3, 0)
        inside = np.linalg.norm(places - middle, axis=-1) < 3.2
        labels = np.where(inside, np.where(places[..., 2] < middle[2], 1, 2), 0).astype(np.uint8)
        values = (100 + 60 * inside + random.normal(0, 4, shape)).astype(np.float32)
        affine = np.diag([-1.0, -1.0, 1.25, 1.0] if number % 2 else [1.0, 1.0, 1.0, 1.0])
        for kind, array in (("images", values), ("labels", labels)):
            image = nibabel.Nifti1Image(array, affine)
            image.header.set_xyzt_units("mm")
            nibabel.save(image, folder / kind / f"v{number}.nii.gz")
        lines.append(f"v{number}.nii.gz,{'old' if number % 2 else 'young'},patient{number}")
    (folder / "images" / "labels.csv").write_text("\n".join(lines) + "\n")


def make_encoder(folder: Path) -> None:
    torch.manual_seed(5)
    backbone = build_backbone(ModelConfig(width=24, depth=1, heads=1, patch_size=4), SPEC)
    save_encoder(folder, backbone, SPEC, "cls", {})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finetune")
    make_volumes(folder)
    make_encoder(folder / "encoder")
    return folder


def write_task(folder: Path, name: str = "task", **changes: object) -> Path:
    raw = {
        "domain": "medical",
        "sources": str(folder / "images"),
        "data": {"size": 8, "stride": 4, "min_foreground": 0.0, "maps": {"label": str(folder / "labels")}},
        "encoder": str(folder / "encoder"),
        "task": {
            "name": "segmentation",
            "classes": CLASSES,
            "decoder_options": {"base": 4},
            "augment": "none",
        },
        "optim": {"lr": 0.005, "layer_decay": 0.5},
        "training": {"steps": 3, "batch_size": 2, "windows": "random", "foreground": 0.5, "workers": 0},
        "few": {"fractions": [0.2, 1.0]},
        "split": {"test": 0.25},
        "judge": {
            "overlap": 0.25,
            "write": True,
            "replicates": 50,
            "metrics": ["dice", "nsd", "hd95", "iou", "precision"],
        },
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**raw, **changes}))
    return path


@pytest.fixture(scope="module")
def whole(place: Path) -> FinetuneResults:
    """An uninterrupted fine-tuning in ``place / "whole"``."""
    outcome = command.finetune(write_task(place), place / "whole")
    assert outcome.results is not None
    assert outcome.skipped == ""
    return outcome.results


def test_every_arm_has_every_fraction_and_a_report(place: Path, whole: FinetuneResults):
    assert [arm.name for arm in whole.arms] == ["full", "scratch"]
    assert [arm.control for arm in whole.arms] == [False, True]
    assert {(cell.arm, cell.fraction) for cell in whole.cells} == {
        (arm, fraction) for arm in ("full", "scratch") for fraction in (0.2, 1.0)
    }
    assert FinetuneResults.read(place / "whole") == whole
    assert "scratch" in (place / "whole" / "report.html").read_text()
    assert [panel.rank for panel in whole.panels] == ["best", "worst"]
    cell, control = whole.cell("full", 1.0), whole.cell("scratch", 1.0)
    assert cell is not None
    assert control is not None
    for label in (OVERALL, "low", "high"):
        less = cell.scores["dice"][label].mean - control.scores["dice"][label].mean
        assert cell.differences["dice"][label].mean == pytest.approx(less, abs=1e-12)
    assert control.differences == {}


def test_fractions_are_nested_patients_and_nobody_is_on_both_sides(whole: FinetuneResults):
    few, all_of_them = (set(run.groups) for run in whole.runs[:2])
    assert (len(few), len(all_of_them)) == (2, 6)
    assert few < all_of_them
    for run in whole.runs:
        assert not set(run.groups) & {whole.cases[number].group for number in run.cases}
    assert {tuple(run.groups) for run in whole.runs if run.arm == "scratch"} == {
        tuple(run.groups) for run in whole.runs if run.arm == "full"
    }


def test_cases_are_judged_on_the_files_own_grids(place: Path, whole: FinetuneResults):
    """What is in the table is what nibabel and the definition make of the files that were written."""
    run, both, either, said = whole.runs[1], np.zeros(2), np.zeros(2), np.zeros(2)
    for number, dice in zip(run.cases, run.scores["dice"], strict=True):
        case = whole.cases[number]
        written = next((place / "whole" / "predictions" / "full" / "fraction-1" / "seed-0").glob(f"{case.id[:2]}*"))
        predicted, truth = nibabel.load(written), nibabel.load(place / "labels" / case.id)
        assert np.allclose(predicted.affine, truth.affine)
        one, other = np.asarray(predicted.dataobj), np.asarray(truth.dataobj)
        assert one.shape == other.shape
        for label, value in zip((1, 2), dice, strict=True):
            sizes = (one == label).sum() + (other == label).sum()
            assert value == pytest.approx(2 * ((one == label) & (other == label)).sum() / sizes)
            both[label - 1] += ((one == label) & (other == label)).sum()
            either[label - 1] += ((one == label) | (other == label)).sum()
            said[label - 1] += (one == label).sum()
    cell = whole.cell("full", 1.0)
    assert cell is not None
    for place_of, label in enumerate(whole.labels):
        assert cell.scores["iou"][label].mean == pytest.approx(both[place_of] / either[place_of])
        if said[place_of]:
            assert cell.scores["precision"][label].mean == pytest.approx(both[place_of] / said[place_of])
    assert cell.scores["iou"][OVERALL].mean == pytest.approx((both / either).mean())
    rows = list(csv.DictReader((place / "whole" / "cases.csv").open()))
    assert len(rows) == sum(len(run.cases) for run in whole.runs)
    assert float(rows[0]["dice/low"]) == whole.runs[0].scores["dice"][0][0]


def test_points_lie_on_their_labels(place: Path, whole: FinetuneResults):
    """In the coordinates of windows: voxels along (z, y, x) of the volume turned to RAS."""
    points = read_points(place / "whole" / "points.npz")
    train = {group for run in whole.runs for group in run.groups}
    assert {Path(source).name for source in points} == {case.id for case in whole.cases if case.group in train}
    for source, classes in points.items():
        image = nibabel.as_closest_canonical(nibabel.load(place / "labels" / Path(source).name))
        labels = np.asarray(image.dataobj).transpose(2, 1, 0)
        assert sorted(classes) == [1, 2]
        for label, places in classes.items():
            assert (labels[tuple(np.floor(places).astype(int).T)] == label).all()
            if image.affine[2, 2] == 1.0:
                assert len(places) == (labels == label).sum()


def test_from_scratch_differs_in_the_backbones_weights_alone(place: Path, tmp_path: Path):
    config = read_finetune(write_task(place), ["compare=[frozen]"])
    setup, _ = command.set_up(config, tmp_path, SkippedLog())
    full, scratch, frozen = (setup.objective(arm, setup.data.folds[0].train, 0) for arm in config.arms)
    states = [task.state_dict() for task in (full, scratch, frozen)]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[2][name])
        assert tensor.shape == states[1][name].shape
        assert name.startswith("backbone.") or torch.equal(tensor, states[1][name])
    kernel = "backbone.patch_embed.proj.weight"
    assert not torch.equal(states[0][kernel], states[1][kernel])
    assert all(p.requires_grad for p in scratch.parameters())
    assert not any(p.requires_grad for p in frozen.backbone.parameters())
    assert [config.arm_optim(arm).layer_decay for arm in config.arms] == [0.5, 1.0, 0.5]


def test_a_stopped_fine_tuning_goes_on(
    place: Path, whole: FinetuneResults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """First by Ctrl-C in the first run, then between a run and its judgement."""
    task, judge = write_task(place), command._judge

    def pressed(items, total, title):
        for item in items:
            if "training" in title:
                os.kill(os.getpid(), signal.SIGINT)
            yield item

    def stopped(setup, plan):
        if plan.arm.name == "scratch":
            raise KeyboardInterrupt
        return judge(setup, plan)

    assert command.finetune(task, tmp_path, progress=pressed).stopped_by == signal.SIGINT
    with monkeypatch.context() as patched:
        patched.setattr(command, "_judge", stopped)
        with pytest.raises(KeyboardInterrupt):
            command.finetune(task, tmp_path)
    assert not (tmp_path / "results.json").exists()
    outcome = command.finetune(task, tmp_path)
    assert outcome.results is not None
    assert [run.scores for run in outcome.results.runs] == [run.scores for run in whole.runs]
    assert outcome.results.cells == whole.cells
    starts = [len(json.loads((tmp_path / run.folder / "run.json").read_text())["starts"]) for run in whole.runs]
    assert starts == [2, 1, 1, 1]
    with pytest.raises(UsageError, match="begun with another optim"):
        command.finetune(task, tmp_path, overrides=["optim.lr=0.1"])
    other = "compare=[{name: scratch, optim: {lr: 0.1}}]"
    with pytest.raises(UsageError, match="this run was begun with another optim"):
        command.finetune(task, tmp_path, overrides=[other])


def test_further_arms_folds_and_an_unreadable_case(place: Path, tmp_path: Path, fmsuite):
    """Five-fold by the console script, with a test case whose file breaks after indexing."""
    data = tmp_path / "data"
    make_volumes(data)
    make_encoder(data / "encoder")
    task = write_task(data, split={"folds": 2}, few={"fractions": [1.0]}, scratch=False)
    broken = data / "images" / "v3.nii.gz"
    good = broken.read_bytes()
    setup = ("finetune", task, "--out", tmp_path / "out", "--set", "training.steps=1", "--set", "training.foreground=0")
    config = read_finetune(task, ["training.steps=1", "training.foreground=0"])
    (tmp_path / "out").mkdir()
    command.index_of(config, load_encoder(config.encoder), tmp_path / "out", SkippedLog())
    broken.write_bytes(good[: len(good) // 2])
    ran = fmsuite(*setup)
    assert ran.code == 3, ran.text
    results = FinetuneResults.read(tmp_path / "out")
    assert [arm.name for arm in results.arms] == ["full"]
    assert results.cells[0].cases == PATIENTS - 1
    assert any("could not be judged" in note and "v3" in note for note in results.notes)
    assert "v3.nii.gz" in (tmp_path / "out" / "skipped.csv").read_text()
    judged = sorted(number for run in results.runs for number in run.cases)
    assert judged == [n for n in range(PATIENTS) if results.cases[n].id != "v3.nii.gz"]
    assert results.cells[0].differences == {}


@pytest.mark.parametrize("tune", ["lora", "adapters"])
def test_networks_and_encoders_that_are_left(place: Path, tmp_path: Path, tune: str, fmsuite):
    task = write_task(place, tune)
    outcome = command.finetune(
        task, tmp_path / "out", overrides=[f"task.tune={tune}", "few.fractions=[1.0]", "scratch=false"]
    )
    assert outcome.results is not None
    run = outcome.results.runs[0]
    folder = tmp_path / "out" / run.folder
    assert (folder / "encoder.safetensors").exists() == (tune == "lora")
    if tune == "lora":
        before, after = load_encoder(place / "encoder"), load_encoder(folder)
        changed = {
            name
            for name, tensor in after.backbone.state_dict().items()
            if not torch.equal(tensor, before.backbone.state_dict()[name])
        }
        assert changed == {"blocks.0.attn.qkv.weight"}
    network = load_network(folder)
    assert network.classes == tuple(CLASSES)
    number = run.cases[0]
    source = Path(outcome.results.cases[number].sources[0])
    ran = fmsuite("predict", "--model", folder, "--out", tmp_path / "new", "--overlap", "0.25", source)
    assert ran.code == 0, ran.text
    written = np.asarray(nibabel.load(tmp_path / "new" / source.name).dataobj)
    judged = np.asarray(
        nibabel.load(tmp_path / "out" / "predictions" / run.folder.removeprefix("runs/") / source.name).dataobj
    )
    assert np.array_equal(written, judged)


def test_without_a_background_class_0_is_judged_drawn_and_looked_for_like_the_others(place: Path, tmp_path: Path):
    judge = {"background": False, "overlap": 0.25, "metrics": ["dice", "iou"], "write": True, "replicates": 50}
    outcome = command.finetune(
        write_task(place, "land", judge=judge, scratch=False, few={"fractions": [1.0]}), tmp_path / "out"
    )
    assert outcome.results is not None
    assert outcome.results.labels == CLASSES
    (run,) = outcome.results.runs
    for number, dice in zip(run.cases, run.scores["dice"], strict=True):
        case = outcome.results.cases[number]
        written = next((tmp_path / "out" / "predictions").rglob(f"{case.id[:2]}*"))
        said, true = (np.asarray(nibabel.load(path).dataobj) for path in (written, place / "labels" / case.id))
        expected = [2 * ((said == n) & (true == n)).sum() / ((said == n).sum() + (true == n).sum()) for n in range(3)]
        assert dice == pytest.approx(expected)
    points = read_points(tmp_path / "out" / "points.npz")
    assert all(sorted(classes) == [0, 1, 2] for classes in points.values())
    best = CaseSlices.load(tmp_path / "out" / "panels" / "best.npz")
    assert {n for shown in best.slices for n in np.unique(shown.truth)} <= {1, 2, 3}
    assert len(best.dice) == 4
