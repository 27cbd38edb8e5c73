"""Rotated varied-size windows: against plain windows, against full attention, and against loops over points."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.backbones.layers import Attention
from fmsuite.core.backbones.packing import Group
from fmsuite.core.backbones.rvsa import RotatedWindowAttention
from fmsuite.core.backbones.timm_layout import to_timm
from fmsuite.core.backbones.vit import VisionTransformer
from fmsuite.core.data.sample import View
from fmsuite.core.inputs import Channel, InputSpec
from fmsuite.errors import UsageError

WIDTH, HEADS = 24, 2


def spec_of(height: int, width: int) -> InputSpec:
    return InputSpec(axes=("y", "x"), size=(2 * height, 2 * width), channels=(Channel(name="a"), Channel(name="b")))


def vit(height: int, width: int, **options) -> VisionTransformer:
    torch.manual_seed(0)
    config = {"width": WIDTH, "depth": 2, "heads": HEADS, "patch_size": 2, "init": "xavier"}
    return VisionTransformer(ModelConfig(**{**config, **options}), spec_of(height, width)).eval()


def windowed(window: int = 3, prefix: int = 0, outside: str = "left_out", seed: int = 0) -> RotatedWindowAttention:
    torch.manual_seed(seed)
    plain = Attention(WIDTH, HEADS).double()
    return RotatedWindowAttention(plain, window, prefix, outside)


def shaken(attention: RotatedWindowAttention) -> RotatedWindowAttention:
    """With regressors that move, stretch and turn windows by a good part of their size."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in attention.named_parameters():
            if not name.startswith(("qkv", "proj")):
                parameter.normal_(std=0.3)
    return attention


def run(attention: RotatedWindowAttention, x: torch.Tensor, shape: tuple[int, int], valid=None) -> torch.Tensor:
    keys = None if valid is None else F.pad(valid, (attention.prefix, 0), value=True)
    return attention.attend(x.flatten(0, 1), (Group(len(x), x.shape[1], key_mask=keys, shape=shape),)).view(x.shape)


def plain_windows(attention: Attention, x: torch.Tensor, shape: tuple[int, int], window: int) -> torch.Tensor:
    """Full attention within each window, window by window; those at the border have fewer tokens."""
    height, width = shape
    top, left = (-height % window) // 2, (-width % window) // 2
    grid = x.view(len(x), height, width, -1)
    out = torch.zeros_like(grid)
    for y in range(-top, height, window):
        for x0 in range(-left, width, window):
            box = (slice(None), slice(max(y, 0), y + window), slice(max(x0, 0), x0 + window))
            tokens = grid[box]
            mixed = Attention.forward(_plain(attention), tokens.flatten(1, 2))
            out[box] = mixed.view(tokens.shape)
    return out.view(x.shape)


def _plain(attention: Attention) -> Attention:
    plain = Attention(WIDTH, HEADS).to(attention.proj.weight.dtype)
    plain.load_state_dict({k: v for k, v in attention.state_dict().items() if k.startswith(("qkv", "proj"))})
    return plain


@pytest.mark.parametrize(("shape", "window"), [((14, 21), 7), ((5, 8), 3), ((2, 4), 7)])
@pytest.mark.parametrize("double", [True, False])
@torch.no_grad()
def test_without_regressors_it_is_window_attention(shape: tuple[int, int], window: int, double: bool):
    attention = windowed(window)
    x = torch.randn(2, shape[0] * shape[1], WIDTH, dtype=torch.float64)
    if not double:
        attention, x = attention.float(), x.float()
    tolerance = 1e-12 if double else 1e-6
    expected = plain_windows(attention, x, shape, window)
    torch.testing.assert_close(run(attention, x, shape), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize(("side", "special"), [(7, {}), (7, {"registers": 2, "positions": "sincos"}), (5, {})])
@torch.no_grad()
def test_on_a_grid_of_one_window_it_is_the_pretrained_network(side: int, special: dict):
    plain, rotated = vit(side, side, **special), vit(side, side, attention="rvsa", **special)
    rotated.load_state_dict(plain.state_dict(), strict=False)
    assert [type(block.attn) for block in rotated.blocks] == [RotatedWindowAttention] * 2
    view = View(torch.randn(2, 2, 2 * side, 2 * side))
    found, expected = rotated(view, attention=True), plain(view, attention=True)
    torch.testing.assert_close(found.sequence, expected.sequence, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found.attention, expected.attention, atol=1e-6, rtol=1e-6)
    some = torch.ones(2, 1, 2 * side, 2 * side, dtype=torch.bool)
    some[0, :, :6] = False
    holed = replace(view, valid=some)
    torch.testing.assert_close(rotated(holed).sequence, plain(holed).sequence, atol=1e-6, rtol=1e-6)


def by_loops(attention: RotatedWindowAttention, x: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """The definition, point by point, of one sequence without tokens before the patches."""
    height, width = shape
    n, heads, size = attention.window, attention.heads, WIDTH // attention.heads
    rows, columns = -(-height // n), -(-width // n)
    top, left = (rows * n - height) // 2, (columns * n - width) // 2
    state = attention.state_dict()
    q, k, v = (
        part.view(height, width, heads, size)
        for part in (x @ state["qkv.weight"].T + state["qkv.bias"]).chunk(3, dim=-1)
    )
    tokens = x.view(height, width, WIDTH)
    out = torch.zeros(height, width, heads, size, dtype=x.dtype)

    def bilinear(plane: torch.Tensor, y: float, at: float) -> tuple[torch.Tensor, float]:
        total, share = torch.zeros(size, dtype=x.dtype), 0.0
        for row in (math.floor(y), math.floor(y) + 1):
            for column in (math.floor(at), math.floor(at) + 1):
                weight = (1 - abs(y - row)) * (1 - abs(at - column))
                if 0 <= row < height and 0 <= column < width:
                    total, share = total + weight * plane[row, column], share + weight
        return total, share

    for r in range(rows):
        for c in range(columns):
            inside = [
                (i, j, r * n + i - top, c * n + j - left)
                for i in range(n)
                for j in range(n)
                if 0 <= r * n + i - top < height and 0 <= c * n + j - left < width
            ]
            mean = torch.stack([tokens[y, x0] for _, _, y, x0 in inside]).mean(0)
            read = F.leaky_relu(mean, 0.01)
            offset, scale, angle = (
                (read @ state[f"{name}.weight"].T + state[f"{name}.bias"]).view(heads, -1)
                for name in ("offsets", "scales", "angles")
            )
            for head in range(heads):
                turn = float(angle[head, 0])
                points = []
                for i in range(n):
                    for j in range(n):
                        dx = (j - (n - 1) / 2) * (1 + float(scale[head, 0]))
                        dy = (i - (n - 1) / 2) * (1 + float(scale[head, 1]))
                        px = c * n + (n - 1) / 2 - left + dx * math.cos(turn) - dy * math.sin(turn)
                        py = r * n + (n - 1) / 2 - top + dx * math.sin(turn) + dy * math.cos(turn)
                        px, py = px + float(offset[head, 0]) * n / 2, py + float(offset[head, 1]) * n / 2
                        key, share = bilinear(k[:, :, head], py, px)
                        value, _ = bilinear(v[:, :, head], py, px)
                        points.append((i, j, key, value, share))
                for i, j, y, x0 in inside:
                    query = q[y, x0, head]
                    weights, total = 0.0, torch.zeros(size, dtype=x.dtype)
                    for a, b, key, value, share in points:
                        left_out = attention.outside == "left_out"
                        if left_out and share < 1e-6:
                            continue
                        part = share if left_out else 1.0
                        logit = query @ (key / part) / size**0.5
                        logit = logit + query @ state["rel_pos_h"][i - a + n - 1]
                        logit = logit + query @ state["rel_pos_w"][j - b + n - 1]
                        weights = weights + part * logit.exp()
                        total = total + part * logit.exp() * (value / part)
                    out[y, x0, head] = total / weights
    return out.view(1, height * width, WIDTH) @ state["proj.weight"].T + state["proj.bias"]


@pytest.mark.parametrize("outside", ["left_out", "zeros"])
@torch.no_grad()
def test_windows_that_move_stretch_and_turn_are_the_definition(outside: str):
    attention = shaken(windowed(3, outside=outside))
    x = torch.randn(1, 4 * 6, WIDTH, dtype=torch.float64)
    found = run(attention, x, (4, 6))
    torch.testing.assert_close(found, by_loops(attention, x[0], (4, 6)), atol=1e-10, rtol=1e-10)
    assert float((found - plain_windows(attention, x, (4, 6), 3)).abs().max()) > 0.01


@torch.no_grad()
def test_an_invalid_token_changes_no_other():
    attention = shaken(windowed(3, prefix=1))
    x = torch.randn(2, 1 + 5 * 7, WIDTH, dtype=torch.float64)
    valid = torch.rand(2, 35) > 0.3
    wild = x.clone()
    wild[:, 1:][~valid] = 1e3
    calm, moved = run(attention, x, (5, 7), valid), run(attention, wild, (5, 7), valid)
    torch.testing.assert_close(moved[:, 1:][valid], calm[:, 1:][valid], atol=1e-12, rtol=0)
    torch.testing.assert_close(moved[:, 0], calm[:, 0], atol=1e-12, rtol=0)
    nothing = run(attention, x, (5, 7), torch.zeros_like(valid))
    assert nothing.isfinite().all()
    alone = run(shaken(windowed(3)), x[:, 1:], (5, 7), torch.arange(35).expand(2, -1) < 3)
    assert alone.isfinite().all()


def test_gradients_reach_the_regressors_from_zero():
    attention = windowed(3)
    x = torch.randn(1, 36, WIDTH, dtype=torch.float64)
    run(attention, x, (6, 6)).square().sum().backward()
    for name, parameter in attention.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name


def test_every_third_block_keeps_full_attention_and_training_works_with_drop_path_and_checkpointing():
    model = vit(6, 6, depth=3, attention="rvsa", rvsa_window=3, drop_path=0.5).train()
    assert [isinstance(block.attn, RotatedWindowAttention) for block in model.blocks] == [True, True, False]
    for parameter in (model.blocks[0].attn.angles.weight, model.blocks[0].attn.rel_pos_h):
        assert not parameter.any()
    view = View(torch.randn(6, 2, 12, 12), keys=torch.arange(6))
    whole = model(view).sequence
    model.set_activation_checkpointing(True)
    again = model(view).sequence
    torch.testing.assert_close(again, whole)
    again.square().mean().backward()
    assert model.blocks[0].attn.qkv.weight.grad is not None


@torch.no_grad()
def test_crops_of_two_sizes_go_through_together():
    model = vit(6, 6, attention="rvsa", rvsa_window=3)
    for block in model.blocks:
        shaken(block.attn)
    views = [View(torch.randn(2, 2, 12, 12)), View(torch.randn(3, 2, 8, 6))]
    for found, view in zip(model.forward_crops(views), views):
        torch.testing.assert_close(found.sequence, model(view).sequence, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_compiled_blocks_and_half_precision_give_what_plain_ones_do():
    model = vit(6, 6, attention="rvsa", rvsa_window=3, depth=1)
    shaken(model.blocks[0].attn)
    view = View(torch.randn(2, 2, 12, 12))
    expected = model(view).sequence
    with torch.autocast("cpu", torch.bfloat16):
        assert float((model(view).sequence - expected).abs().mean()) < 0.03
    names = list(model.state_dict())
    model.compile_blocks(backend="eager")
    torch.testing.assert_close(model(view).sequence, expected)
    assert list(model.state_dict()) == names


def test_what_windows_cannot_do_is_refused_by_name():
    with pytest.raises(UsageError, match="no place for positions: rotary"):
        vit(6, 6, attention="rvsa", positions="rotary")
    series = InputSpec(axes=("time", "y", "x"), size=(2, 4, 4), channels=(Channel(name="a"),))
    with pytest.raises(UsageError, match="tokens along y and x alone; these have time, y, x"):
        VisionTransformer(ModelConfig(width=24, heads=2, depth=1, patch_size=2, attention="rvsa"), series)
    with pytest.raises(ValueError, match="rvsa_window has no effect without attention: rvsa"):
        ModelConfig(rvsa_window=5)
    model = vit(6, 6, attention="rvsa")
    assert model.lacks("can_drop_tokens") == "cannot drop tokens"
    with pytest.raises(UsageError, match="needs all tokens of its windows"):
        model(View(torch.randn(1, 2, 12, 12)), keep=torch.zeros(1, 3, dtype=torch.long))
    assert vit(6, 6, attention="rvsa", cls_token=False).lacks("can_show_attention") is not None
    with pytest.raises(UsageError, match=r"no windowed attention.*native"):
        to_timm(vit(6, 6, attention="rvsa"))
