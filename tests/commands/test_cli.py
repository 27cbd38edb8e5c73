"""The command line: exit codes, and errors that name what is wrong and the way out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fmsuite import __version__


def test_version_is_shown(fmsuite: Callable) -> None:
    ran = fmsuite("--version")
    assert ran.code == 0
    assert __version__ in ran.text


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("recipes", ["uni", "medical-mae", "svg-mae", "remote-sensing-mae"]),
        ("objectives", ["mae", "dino", "ibot", "dinov2"]),
        ("models", ["vit_tiny", "vit_giant2", "timm:NAME"]),
        ("domains", ["pathology", "medical", "remote_sensing", "svg"]),
    ],
)
def test_list_names_what_there_is(fmsuite: Callable, what: str, expected: list[str]) -> None:
    ran = fmsuite("list", what)
    assert ran.code == 0
    for name in expected:
        assert name in ran.text


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
