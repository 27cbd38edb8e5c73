"""What goes with a mode of compilation, and what is refused in time."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.backbones.vit import VisionTransformer
from fmsuite.core.inputs import InputSpec, rgb_channels
from fmsuite.core.objectives.mae import MAE, MAEConfig
from fmsuite.core.training.backbones import set_up_backbones
from fmsuite.core.training.config import TrainingConfig
from fmsuite.errors import UsageError

GPU = torch.device("cuda", 0)


def _objective(**model: object) -> MAE:
    shape = {"width": 24, "depth": 1, "heads": 2, "patch_size": 8, "positions": "sincos"}
    spec = InputSpec(axes=("y", "x"), size=(16, 16), channels=rgb_channels())
    backbone = VisionTransformer(ModelConfig.model_validate({**shape, **model}), spec)
    return MAE(MAEConfig(decoder_width=24, decoder_depth=1, decoder_heads=2), backbone)


def _training(mode: str) -> TrainingConfig:
    return TrainingConfig(steps=1, compile=True, compile_mode=mode)


@pytest.mark.parametrize(
    ("mode", "device", "strategy", "drop_path", "message"),
    [
        ("reduce-overhead", torch.device("cpu"), "ddp", 0.0, "this run is on the CPU"),
        ("max-autotune-no-cudagraphs", torch.device("cpu"), "ddp", 0.0, "this run is on the CPU"),
        ("reduce-overhead", GPU, "fsdp2", 0.0, "fsdp2 gathers them"),
        ("max-autotune", GPU, "ddp", 0.1, "drop_path"),
    ],
)
def test_modes_that_do_not_fit_are_refused(mode, device, strategy, drop_path, message):
    with pytest.raises(UsageError, match=message):
        set_up_backbones(_objective(drop_path=drop_path), _training(mode), device, strategy)


def test_modes_reach_the_compiler(monkeypatch):
    asked: list[str | None] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, backend, mode: asked.append(mode))
    for mode, drop_path in (("reduce-overhead", 0.0), ("max-autotune-no-cudagraphs", 0.3), ("default", 0.3)):
        set_up_backbones(_objective(drop_path=drop_path), _training(mode), GPU, "ddp")
    assert asked == ["reduce-overhead", "max-autotune-no-cudagraphs", "default"]


def test_a_mode_without_compilation_is_refused():
    with pytest.raises(ValidationError, match=r"without training\.compile=true"):
        TrainingConfig(steps=1, compile_mode="reduce-overhead")
