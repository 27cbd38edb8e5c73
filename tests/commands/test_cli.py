"""The command line: exit codes, and errors that name what is wrong and the way out."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.utils.data import DataLoader, Dataset

from fmsuite import __version__
from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.backbones.vit import VisionTransformer
from fmsuite.core.encoders import load_encoder, save_encoder
from fmsuite.core.inputs import Channel, InputSpec


def test_version_is_shown(fmsuite: Callable) -> None:
    ran = fmsuite("--version")
    assert ran.code == 0
    assert __version__ in ran.text


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("recipes", ["uni", "medical-mae", "svg-mae", "remote-sensing-mae"]),
        ("objectives", ["mae", "dino", "ibot", "dinov2", "objective.tokenizer", "--pairs", "labels"]),
        ("models", ["vit_tiny", "vit_giant2", "timm:NAME"]),
        ("domains", ["pathology", "medical", "remote_sensing", "svg"]),
        ("methods", ["simpleshot", "mi_simpleshot", "logistic", "knn", "abmil"]),
        (
            "tasks",
            [
                "knn",
                "linear_torch",
                "linear_sklearn",
                "prototypes",
                "fewshot",
                "ridge (--regress)",
                "linear (--findings)",
            ],
        ),
    ],
)
def test_list_names_what_there_is(fmsuite: Callable, what: str, expected: list[str]) -> None:
    ran = fmsuite("list", what)
    assert ran.code == 0
    for name in expected:
        assert name in ran.text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pretrian"], "'pretrain'"),
        (["embed", "--chanels", "red"], "--channels"),
        (["embed", "-e", "x", "--index", "y", "--out", "z", "--batch-size", "0"], "--batch-size"),
        (["pretrain"], "--domain"),
        (["tile", "--domain", "svg", "--out", "x"], "paths"),
    ],
)
def test_a_line_that_does_not_fit_is_wrong_use(fmsuite: Callable, arguments: list[str], words: str) -> None:
    ran = fmsuite(*arguments)
    assert ran.code == 2
    assert words in ran.text


@pytest.mark.parametrize(
    ("arguments", "suggestion"),
    [
        (["list", "recipe"], "'recipes'"),
        (["pretrain", "--domain", "patology"], "'pathology'"),
        (["pretrain", "--domain", "pathology", "--recipe", "unii"], "'uni'"),
        (["pretrain", "--domain", "pathology", "--objective", "dinov3"], "'dino"),
        (["pretrain", "--domain", "pathology", "--set", "model.patchsize=8"], "'patch_size'"),
        (["pretrain", "--domain", "pathology", "--set", "modell.depth=2"], "'model'"),
        (["pretrain", "--domain", "pathology", "--set", "data.mp=1"], "'mpp'"),
        (["pretrain", "--domain", "pathology", "--set", "model.name=vit_smal"], "'vit_small'"),
        (["bench", "--domain", "svg", "-e", "x", "--out", "y", "--task", "linear_torc"], "'linear_torch'"),
        (["tile", "--domain", "svg", "x", "--out", "y", "--set", "sice=3"], "'size'"),
    ],
)
def test_a_misspelt_name_is_answered_with_the_nearest_right_one(
    fmsuite: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], suggestion: str
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = fmsuite(*arguments)
    assert ran.code == 2
    assert f"Did you mean {suggestion}" in ran.text
    assert "Traceback" not in ran.text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["pretrain", "--domain", "medical", "--recipe", "uni"], "is for --domain pathology, not medical"),
        (["pretrain", "--domain", "pathology", "--set", "training.batch_size=many"], "training.batch_size"),
        (["pretrain", "--domain", "pathology", "--set", "training.steps"], "expected key=value"),
        (["pretrain", "--domain", "pathology", "--resume"], "--resume needs --out"),
        (["fewshot", "--features", "f.zarr", "--out", "o", "--shots", "0,2"], "--shots '0,2' has a number below 1"),
        (["fewshot", "--features", "f.zarr", "--out", "o", "--shots", "abc"], "--shots 'abc' is no list of numbers"),
        (["pretrain", "--domain", "pathology", "--data", "nowhere"], "nowhere: there is no such file or folder"),
        (["pretrain", "--domain", "pathology", "--data", "empty"], "empty: this folder holds no"),
        (["pretrain", "--domain", "pathology", "--data", "nowhere.parquet"], "there is no such index"),
        (["export", "nowhere", "--out", "x.safetensors"], "nowhere"),
    ],
)
def test_wrong_use_exits_with_two_and_says_what_is_wrong(
    fmsuite: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    ran = fmsuite(*arguments)
    assert ran.code == 2
    assert sentence in ran.text
    assert "Traceback" not in ran.text


def test_an_unexpected_error_is_one_line_unless_debugging(fmsuite: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(what: str) -> None:
        raise RuntimeError("the roof fell in")

    monkeypatch.setattr("fmsuite.commands.catalogue.catalogue", broken)
    plain = fmsuite("list", "models")
    assert plain.code == 1
    assert "unexpected RuntimeError: the roof fell in" in plain.text
    assert "Traceback" not in plain.text
    assert "Traceback" in fmsuite("list", "models", "--debug").text


def test_an_unexpected_error_in_a_data_worker_is_one_line_unless_debugging(
    fmsuite: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(what: str) -> None:
        next(iter(DataLoader(FallingRoof(), num_workers=1)))

    monkeypatch.setattr("fmsuite.commands.catalogue.catalogue", broken)
    plain = fmsuite("list", "models")
    assert plain.code == 1
    assert "unexpected RuntimeError: RuntimeError: the roof fell in This was row 3." in plain.text
    assert "Traceback" not in plain.text
    assert "Original Traceback" in fmsuite("list", "models", "--debug").text


class FallingRoof(Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, row: int) -> None:
        error = RuntimeError("the roof fell in")
        error.add_note("This was row 3.")
        raise error


def test_an_interrupted_command_says_so_and_exits_with_130(fmsuite: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed(*_: object) -> None:
        raise KeyboardInterrupt

    ignored = []
    monkeypatch.setattr("fmsuite.cli.signal.signal", lambda *given: ignored.append(given))
    monkeypatch.setattr("fmsuite.commands.report.report", pressed)
    ran = fmsuite("report", "somewhere")
    assert (ran.code, ran.text) == (130, "interrupted")
    assert ignored == [(signal.SIGINT, signal.SIG_IGN)]


def test_a_system_error_names_the_file_and_is_no_defect(fmsuite: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(what: str) -> None:
        raise OSError(28, "No space left on device", "index.parquet")

    monkeypatch.setattr("fmsuite.commands.catalogue.catalogue", full)
    ran = fmsuite("list", "models")
    assert ran.code == 1
    assert "error: index.parquet: No space left on device." in ran.text
    assert "defect" not in ran.text


def test_an_encoder_that_timm_cannot_hold_is_exported_in_the_native_layout(fmsuite: Callable, tmp_path: Path) -> None:
    spec = InputSpec(axes=("z", "y", "x"), size=(8, 8, 8), channels=(Channel(name="CT"),))
    model = VisionTransformer(ModelConfig(width=16, depth=1, heads=2, patch_size=4), spec)
    save_encoder(tmp_path / "run", model, spec, "cls", {})
    out = tmp_path / "new" / "model.safetensors"
    refused = fmsuite("export", tmp_path / "run", "--out", out)
    assert refused.code == 2
    assert "--layout native" in refused.text
    assert not out.exists()
    assert fmsuite("export", tmp_path / "run", "--out", out, "--layout", "native").code == 0
    assert load_encoder(out).identity == load_encoder(tmp_path / "run").identity
