"""Whole networks as files: they answer as they did, and say what they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fmsuite.core.adaptation.adapters import adapter_state
from fmsuite.core.adaptation.lora import lora_state
from fmsuite.core.adaptation.network_files import load_network, save_network
from fmsuite.core.adaptation.task import TASKS
from fmsuite.core.data.sample import View
from fmsuite.core.encoders import load_encoder
from fmsuite.errors import FmsuiteError, UsageError
from tests.core.adaptation.factory import SPEC, small

OPTIONS = {
    "classification": {"classes": 3, "pooling": "cls+mean"},
    "multilabel": {"labels": 2, "tune": "norms", "last_blocks": 1},
    "regression": {"outputs": 2, "target_mean": (1.0, 2.0), "target_std": (2.0, 4.0), "tune": "adapters"},
    "segmentation": {"classes": 2, "label_map": "m", "decoder_options": {"base": 2}, "tune": "lora", "lora_rank": 3},
}


@pytest.mark.parametrize("kind", list(OPTIONS))
@torch.no_grad()
def test_a_network_answers_as_it_did(tmp_path: Path, kind: str):
    task = TASKS[kind](TASKS[kind].Config(**OPTIONS[kind]), small()).eval()
    for tensor in (*lora_state(task.backbone).values(), *adapter_state(task.backbone).values()):
        tensor.normal_(std=0.3)
    view = View(torch.randn(2, 1, 8, 8))
    before = task.predict(view)
    notes = save_network(tmp_path, task, SPEC, ["a", "b", "c"], "field", {"size": 8}, {"steps": 3})
    network = load_network(tmp_path)
    torch.testing.assert_close(network.task.predict(view), before, rtol=1e-5, atol=1e-6)
    assert network.task.config.tune == ("adapters" if kind == "regression" else "full")
    assert (network.classes, network.domain, network.data) == (("a", "b", "c"), "field", {"size": 8})
    assert network.provenance["tune"] == task.config.tune
    assert network.spec == SPEC
    if kind == "regression":
        assert "Bottleneck adapters" in notes[0]
        assert not (tmp_path / "encoder.safetensors").exists()
    else:
        assert notes == []
        own = network.task.backbone.state_dict()
        for name, tensor in load_encoder(tmp_path).backbone.state_dict().items():
            assert torch.equal(tensor, own[name])


def test_what_is_no_network_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="Make one with `fmsuite finetune`"):
        load_network(tmp_path)
    inner = tmp_path / "runs" / "full"
    task = TASKS["classification"](TASKS["classification"].Config(classes=2), small())
    save_network(inner, task, SPEC, ["a", "b"], "field", {}, {})
    with pytest.raises(UsageError, match=r"Name one of the runs in it: .*full"):
        load_network(tmp_path)
    weights = inner / "network.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(FmsuiteError, match="not a network of `fmsuite finetune`"):
        load_network(inner)
