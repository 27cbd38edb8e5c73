"""Layers against timm's and against their definitions."""

from __future__ import annotations

from functools import partial

import pytest
import timm.layers
import torch
from timm.models.vision_transformer import Block as TimmBlock
from torch import nn

from fmsuite.core.backbones.config import VIT_SIZES
from fmsuite.core.backbones.layers import Attention, Block, Mlp, SwiGlu, mlp_hidden


@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
def test_block_equals_timms_with_the_same_weights(kind: str) -> None:
    torch.manual_seed(0)
    ours = Block(48, 3, 4.0, mlp=kind, layer_scale=0.5)
    theirs = TimmBlock(
        48,
        3,
        mlp_ratio=4.0 if kind == "gelu" else 2 * mlp_hidden(48, 4.0, "swiglu") / 48,
        qkv_bias=True,
        init_values=0.1,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        act_layer=nn.GELU if kind == "gelu" else nn.SiLU,
        mlp_layer=timm.layers.Mlp if kind == "gelu" else timm.layers.SwiGLUPacked,
    )
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 7, 48)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-6, rtol=1e-6)


def test_masked_keys_have_no_influence() -> None:
    torch.manual_seed(0)
    attention = Attention(16, 2)
    x = torch.randn(2, 6, 16)
    mask = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    changed = x.clone()
    changed[0, 4:] = 1e3
    first, second = attention(x, key_mask=mask), attention(changed, key_mask=mask)
    torch.testing.assert_close(first[0, :4], second[0, :4], atol=0, rtol=0)
    torch.testing.assert_close(first[0, :4], attention(x[:1, :4])[0], atol=1e-6, rtol=1e-6)


def test_published_mlp_widths() -> None:
    assert mlp_hidden(1536, 4.0, "swiglu") == 4096  # DINOv2 ViT-g
    assert mlp_hidden(1408, VIT_SIZES["vit_giant"].mlp_ratio, "gelu") == 6144
    assert mlp_hidden(64, 4.0, "swiglu") == 176
    assert Mlp(8, 32).fc1.weight.shape == (32, 8)
    assert SwiGlu(8, 16).fc1.weight.shape == (32, 8)


def test_queries_give_the_same_as_all_tokens_do() -> None:
    torch.manual_seed(0)
    block, x = Block(24, 3, layer_scale=0.7, qkv_bias=False).train(), torch.randn(4, 9, 24)
    mask = torch.rand(4, 9) > 0.3
    ids = torch.rand(4, 9).argsort(1)[:, :5]
    expected = block(x, key_mask=mask).gather(1, ids[..., None].expand(-1, -1, 24))
    torch.testing.assert_close(block(x, key_mask=mask, queries=ids), expected, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="plain attention only"):
        block(x, position_bias=torch.zeros(3, 9, 9), queries=ids)
