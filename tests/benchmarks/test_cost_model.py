"""The cost model's section is what its script computes, and the script's numbers are those of the things it counts."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.backbones.vit import VisionTransformer
from fmsuite.core.inputs import InputSpec, rgb_channels
from fmsuite.core.objectives.heads import DINOHead
from tests.scripts import load_script


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("cost_model")


def test_the_page_says_what_the_script_computes(script: ModuleType) -> None:
    page = script.PAGE.read_text(encoding="utf-8")
    made = script.tables(script.read_recipe(), script.UTILISATION)
    assert script.on_the_page(page) == made, "run benchmarks/cost_model.py --write"


def test_parameters_are_those_of_the_model(script: ModuleType) -> None:
    run = script.read_recipe()
    with torch.device("meta"):
        spec = InputSpec(axes=("y", "x"), size=(224, 224), channels=rgb_channels())
        model = VisionTransformer(ModelConfig(name="vit_large", patch_size=16, layer_scale=1e-5), spec)
        head = DINOHead(1024, 131072, 2048, 256, 3, False)
    blocks = sum(p.numel() for p in model.blocks.parameters())
    everything = sum(p.numel() for p in model.parameters())
    assert run.blocks == blocks
    assert run.rest == pytest.approx(everything - blocks, rel=0.01)
    assert run.heads == pytest.approx(2 * sum(p.numel() for p in head.parameters()), rel=0.01)
    assert (run.steps, run.batch, run.samples) == (125_000, 3072, 384_000_000)


def test_a_step_by_hand(script: ModuleType) -> None:
    run = script.read_recipe()
    step = script.step_on(run, 64, 0.45)
    assert step.compute == pytest.approx(48 * run.flops.total / (0.45 * 989e12))
    assert step.ddp == pytest.approx(2 * 63 / 64 * 4 * run.trained / (0.8 * 50e9))
    assert script.step_on(run, 8, 0.45).ddp == pytest.approx(2 * 7 / 8 * 4 * run.trained / (0.8 * 450e9))
    assert script.collective(1e9, 1, 2) == 0
    assert step.windows == pytest.approx(8 * 48 / step.compute)
