"""Low-rank adapters: the identity at first, merged equal to unmerged, and nothing but themselves in their state."""

from __future__ import annotations

import pytest
import torch

from fmsuite.core.adaptation.lora import (
    fold_lora,
    insert_lora,
    load_lora_state,
    lora_layers,
    lora_state,
    merge_lora,
    unmerge_lora,
)
from fmsuite.errors import UsageError
from tests.core.adaptation.factory import out, shake, small

ALL = ("qkv", "proj", "fc1", "fc2")


@pytest.mark.parametrize("targets", [("q", "v"), ("k",), ALL, ("q", "fc1")])
@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_identity_merge_unmerge_and_fold(targets, mlp):
    backbone = small(mlp=mlp)
    names, weights, before = list(backbone.state_dict()), {}, out(backbone)
    insert_lora(backbone, rank=2, alpha=6.0, targets=targets)
    assert torch.equal(out(backbone), before)
    shake(backbone)
    adapted = out(backbone)
    assert (adapted - before).abs().max() > 1e-2
    weights = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    merge_lora(backbone)
    torch.testing.assert_close(out(backbone), adapted, rtol=1e-5, atol=1e-5)
    merge_lora(backbone)
    unmerge_lora(backbone)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in backbone.state_dict().items())
    fold_lora(backbone)
    assert list(backbone.state_dict()) == names
    torch.testing.assert_close(out(backbone), adapted, rtol=1e-5, atol=1e-5)


def test_delta_is_the_scaled_product_at_the_rows_of_q_and_v():
    backbone = small()
    insert_lora(backbone, rank=2, alpha=6.0, targets=("v", "q"))
    shake(backbone)
    layer = lora_layers(backbone)["blocks.1.attn.qkv"]
    delta = layer.delta()
    down, up = layer.lora_down, layer.lora_up
    torch.testing.assert_close(delta[:24], 3.0 * up[0] @ down[:2])
    torch.testing.assert_close(delta[48:], 3.0 * up[1] @ down[2:])
    assert not delta[24:48].any()
    assert torch.linalg.matrix_rank(delta[:24]) == 2


def test_state_holds_adapters_alone_and_moves_them():
    first, second = small(), small()
    for backbone in (first, second):
        insert_lora(backbone, rank=2)
    shake(first)
    state = {name: tensor.clone() for name, tensor in lora_state(first).items()}
    assert sorted({name.rpartition(".")[2] for name in state}) == ["lora_down", "lora_up"]
    load_lora_state(second, state)
    assert torch.equal(out(first), out(second))
    with pytest.raises(UsageError, match="do not fit"):
        load_lora_state(second, dict(list(state.items())[1:]))
    other = small()
    insert_lora(other, rank=3)
    with pytest.raises(UsageError, match="do not fit"):
        load_lora_state(other, state)


def test_merged_adapters_do_not_train():
    backbone = small().train()
    insert_lora(backbone, rank=2)
    merge_lora(backbone)
    with pytest.raises(RuntimeError, match="unmerge"):
        out(backbone)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ("w",)}, "no target w"),
        ({"targets": ()}, "at least one"),
        ({"targets": ("qkv", "q")}, "part of it"),
        ({"rank": 0}, "rank 0"),
        ({"rank": 25}, "rank 25"),
    ],
)
def test_bad_options_are_refused(options, message):
    backbone = small()
    with pytest.raises(UsageError, match=message):
        insert_lora(backbone, **options)
    assert not lora_layers(backbone)


def test_a_backbone_that_cannot_place_new_parameters_is_left_as_it_was(monkeypatch):
    backbone = small()
    known = {name: backbone.layer_of(name) for name, _ in backbone.named_parameters()}
    monkeypatch.setattr(backbone, "layer_of", known.__getitem__)
    before = list(backbone.named_parameters())
    with pytest.raises(UsageError, match="cannot tell which layer"):
        insert_lora(backbone, rank=2, targets=("fc2", "proj"))
    assert not lora_layers(backbone)
    after = dict(backbone.named_parameters())
    assert all(after[name] is parameter and parameter.requires_grad for name, parameter in before)
