"""Fine-tuning with rotated varied-size windows: what trains, what is stored, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from fmsuite.core.adaptation.network_files import load_network, save_network
from fmsuite.core.adaptation.task import TASKS
from fmsuite.core.adaptation.tuning import TuningOptions, tuned
from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.backbones.datewise import Datewise, over_dates
from fmsuite.core.backbones.rvsa import RotatedWindowAttention
from fmsuite.core.backbones.timm_backbone import TimmBackbone
from fmsuite.core.data.sample import View
from fmsuite.core.encoders import load_encoder
from fmsuite.core.inputs import InputSpec, rgb_channels
from fmsuite.errors import UsageError
from tests.core.adaptation.factory import SPEC, out, small

RVSA = {"attention": "rvsa", "rvsa_window": 2}


def windows(backbone: torch.nn.Module) -> list[RotatedWindowAttention]:
    return [module for module in backbone.modules() if isinstance(module, RotatedWindowAttention)]


def regressors(backbone: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    plain = dict(small().named_parameters())
    return {
        name: parameter
        for name, parameter in backbone.named_parameters()
        if name not in plain and "lora" not in name and "adapter" not in name
    }


@torch.no_grad()
def test_pretrained_weights_are_kept():
    plain, backbone = small(), tuned(small(), TuningOptions(**RVSA))
    # The grid of 2 x 2 tokens is one window.
    torch.testing.assert_close(out(backbone), out(plain), atol=1e-6, rtol=1e-6)
    assert len(windows(backbone)) == 2
    for name, parameter in plain.named_parameters():
        assert torch.equal(dict(backbone.named_parameters())[name], parameter)
    assert backbone.config.rvsa_window == 2


@pytest.mark.parametrize("tune", ["full", "attention", "norms", "biases", "lora", "adapters"])
def test_regressors_train_with_every_way_to_tune(tune: str):
    backbone = tuned(small(), TuningOptions(tune=tune, **RVSA))
    added = regressors(backbone)
    assert len(added) == 2 * 8
    assert all(parameter.requires_grad for parameter in added.values())
    assert backbone.blocks[0].mlp.fc1.weight.requires_grad is (tune == "full")
    assert {backbone.layer_of(name) for name in added} == {1, 2}
    last = tuned(small(), TuningOptions(tune=tune, last_blocks=1, **RVSA))
    assert not any(p.requires_grad for name, p in regressors(last).items() if name.startswith("blocks.0."))


@pytest.mark.parametrize("kind", ["classification", "segmentation"])
@pytest.mark.parametrize("tune", ["full", "lora"])
@torch.no_grad()
def test_a_network_with_windows_answers_as_it_did(tmp_path: Path, kind: str, tune: str):
    options = {"classes": 3, "tune": tune, **RVSA}
    if kind == "segmentation":
        options |= {"label_map": "m", "decoder_options": {"base": 2}}
    task = TASKS[kind](TASKS[kind].Config(**options), small()).eval()
    for parameter in task.backbone.parameters():
        if parameter.requires_grad:
            parameter.normal_(std=0.3)
    view = View(torch.randn(2, 1, 12, 20))
    before = task.predict(view)
    save_network(tmp_path, task, SPEC, ["a", "b", "c"], "field", {}, {})
    network = load_network(tmp_path)
    torch.testing.assert_close(network.task.predict(view), before, rtol=1e-4, atol=1e-5)
    encoder = load_encoder(tmp_path)
    assert len(windows(encoder.backbone)) == 2
    assert encoder.embed(torch.randn(2, 1, 8, 8)).shape == (2, 24)
    # An encoder that has windows keeps them, whether they are asked for again or not.
    for again in ({}, RVSA):
        assert len(windows(tuned(load_encoder(tmp_path).backbone, TuningOptions(**again)))) == 2
    with pytest.raises(UsageError, match="windows of another kind"):
        tuned(encoder.backbone, TuningOptions(attention="rvsa", rvsa_window=3))


@torch.no_grad()
def test_dates_that_are_seen_one_by_one_may_have_windows(tmp_path: Path):
    series = Datewise(small(), over_dates(SPEC, 2))
    task = TASKS["classification"](TASKS["classification"].Config(classes=2, **RVSA), series).eval()
    for parameter in regressors(task.backbone.single).values():
        parameter.normal_(std=0.3)
    view = View(torch.randn(2, 1, 2, 8, 8))
    before = task.predict(view)
    save_network(tmp_path, task, series.spec, ["a", "b"], "field", {}, {})
    network = load_network(tmp_path)
    assert len(windows(network.task)) == 2
    torch.testing.assert_close(network.task.predict(view), before, rtol=1e-5, atol=1e-6)


def test_the_control_from_scratch_has_windows_too():
    control = tuned(small(), TuningOptions(scratch=True, **RVSA))
    assert len(windows(control)) == 2
    assert not any(parameter.any() for parameter in regressors(control).values())
    assert not torch.equal(control.blocks[0].attn.qkv.weight, small().blocks[0].attn.qkv.weight)


def test_what_cannot_have_windows_is_refused_and_left_as_it_was():
    with pytest.raises(ValidationError, match="nothing of the backbone learns with tune: frozen"):
        TuningOptions(tune="frozen", attention="rvsa")
    with pytest.raises(ValidationError, match="rvsa_window has no effect without attention: rvsa"):
        TuningOptions(rvsa_window=3)
    backbone = small(positions="rotary")
    with pytest.raises(UsageError, match="no place for positions: rotary"):
        tuned(backbone, TuningOptions(**RVSA))
    assert backbone.config.attention == "full"
    assert not windows(backbone)
    rgb = InputSpec(axes=("y", "x"), size=(32, 32), channels=rgb_channels())
    with pytest.raises(UsageError, match="plain vision transformers, not for a TimmBackbone"):
        tuned(TimmBackbone(ModelConfig(name="timm:test_vit"), rgb), TuningOptions(**RVSA))
