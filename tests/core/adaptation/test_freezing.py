"""Which parameters train."""

from __future__ import annotations

import pytest

from fmsuite.core.adaptation.freezing import is_frozen, layer_factors, train_only
from fmsuite.core.adaptation.lora import insert_lora, lora_state
from fmsuite.errors import UsageError
from tests.core.adaptation.factory import small


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("attention", {"pos_embed", "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias"}),
        ("norms", {"norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "norm.weight", "norm.bias"}),
        ("nothing", set()),
    ],
)
def test_parts_that_train(part, expected):
    backbone = small()
    chosen = train_only(backbone, part)
    assert {name.removeprefix("blocks.0.").removeprefix("blocks.1.") for name in chosen} == expected
    assert {name for name, parameter in backbone.named_parameters() if parameter.requires_grad} == set(chosen)
    assert is_frozen(backbone) == (part == "nothing")


def test_biases_and_bounds():
    backbone = small()
    assert all(name.endswith(".bias") for name in train_only(backbone, "biases"))
    last = train_only(backbone, "all", last_blocks=1)
    assert last
    assert all(name.startswith(("blocks.1.", "norm.")) for name in last)
    assert set(train_only(backbone, "all")) == {name for name, _ in backbone.named_parameters()}
    with pytest.raises(UsageError, match="last 3 blocks"):
        train_only(backbone, "all", last_blocks=3)
    with pytest.raises(UsageError, match="nothing to train"):
        train_only(backbone, "added")


def test_adapted_weights_stay_frozen_and_layers_are_known():
    backbone = small()
    insert_lora(backbone, rank=2)
    assert set(train_only(backbone, "added")) == set(lora_state(backbone))
    assert "blocks.0.attn.qkv.weight" not in train_only(backbone, "all")
    factors = layer_factors(backbone, 0.5)
    assert factors["blocks.0.attn.qkv.lora_up"] == 0.25
    assert factors["norm.weight"] == 1.0
    assert factors["patch_embed.proj.weight"] == 0.125
