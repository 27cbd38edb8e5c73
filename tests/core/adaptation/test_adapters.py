"""Bottleneck adapters: the identity at first, and their place in a block."""

from __future__ import annotations

import pytest
import torch

from fmsuite.core.adaptation.adapters import adapter_state, insert_adapters, load_adapter_state
from fmsuite.errors import UsageError
from tests.core.adaptation.factory import out, shake, small


def test_adapters_start_as_the_identity_and_hold_only_themselves():
    first, second = small(), small()
    before = out(first)
    for backbone in (first, second):
        insert_adapters(backbone, 3)
    assert torch.equal(out(first), before)
    shake(first)
    assert not torch.allclose(out(first), before, atol=1e-2)
    load_adapter_state(second, adapter_state(first))
    assert torch.equal(out(first), out(second))
    assert sum(t.numel() for t in adapter_state(first).values()) == 4 * (24 * 3 + 3 + 3 * 24 + 24)
    with pytest.raises(UsageError, match="already"):
        insert_adapters(first, 3)


def test_bottleneck_is_computed_before_layer_scale_and_residual():
    backbone = small(depth=1)
    block = backbone.blocks[0]
    x = torch.randn(1, 3, 24)
    insert_adapters(backbone, 3)
    shake(backbone)
    middle = x + 0.5 * block.attn(block.norm1(x))
    inner = block.mlp.fc2
    hidden = torch.nn.functional.gelu(block.mlp.fc1(block.norm2(middle)))
    plain = hidden @ inner.weight.T + inner.bias
    bottle = plain + inner.adapter.up(torch.nn.functional.gelu(inner.adapter.down(plain)))
    torch.testing.assert_close(block(x), middle + 0.5 * bottle)
