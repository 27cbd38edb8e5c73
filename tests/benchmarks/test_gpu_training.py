"""The benchmark for GPUs runs, on small models without one; utilisation is what it is said to be."""

from __future__ import annotations

import argparse
import sys
from types import ModuleType

import pytest
import torch

from tests.scripts import load_script

GIVEN = argparse.Namespace(
    drop_path=0.2, no_compile=True, checkpoint=False, batch=None, steps=1, warm_up=1, profile=True, ranks=1
)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("gpu_training")


@pytest.mark.parametrize(("name", "way"), [("dinov2", "plain"), ("dinov2", "ddp"), ("mae", "plain"), ("mae", "ddp")])
def test_steps_are_taken_and_timed(script: ModuleType, name: str, way: str) -> None:
    case = script.cases(tiny=True)[name]
    found = script.one(name, case, way, GIVEN)
    assert 0 < found["seconds"] <= found["slowest"]
    assert found["batch"] == case.batch
    assert "aten::" in found["profile"]


def test_processes_of_torchrun_report_back(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--tiny", "--no-compile", "--steps", "1", "--warm-up", "1"]
    monkeypatch.setattr(sys, "argv", ["gpu_training.py", *options])
    found = script.launch("mae", "fsdp2", GIVEN)
    assert "failed" not in found, found
    assert found["seconds"] > 0


def test_utilisation_is_operations_over_time_over_the_peak(script: ModuleType) -> None:
    case = script.cases(tiny=False)["dinov2"]
    found = {"seconds": 2.0, "slowest": 2.5, "batch": 64, "memory_gib": 9.0}
    line = script.row("dinov2", "ddp", case, found, 100.0, 0.5)
    done = case.flops.total * 0.5 * 64 / 2 / 1e12
    assert f"{done:.2f}" in line
    assert f"{done:.1f}%" in line
    assert script.peak_of("NVIDIA H100 PCIe", None) == 756
    assert script.peak_of("NVIDIA H200", None) == 989
    assert script.peak_of("NVIDIA H200", 123.0) == 123.0
    assert script.peak_of("an unknown device", None) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_training.py"])
    script.main()
    printed = capsys.readouterr().out
    assert "Nothing was measured: PyTorch sees no GPU here." in printed
    assert "dinov2" in printed
