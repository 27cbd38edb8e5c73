"""Crops of several sizes in one run of tokens: equal to separate calls, by every way of attention."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fmsuite.core.backbones import packing
from fmsuite.core.backbones.base import Features
from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.backbones.packing import Group, attend, attend_varlen, fits_varlen
from fmsuite.core.backbones.positions import Rotary
from fmsuite.core.backbones.vit import VisionTransformer
from fmsuite.core.data.sample import View
from fmsuite.core.inputs import InputSpec, rgb_channels

RGB = InputSpec(axes=("y", "x"), size=(32, 32), channels=rgb_channels(), scale=1 / 255)
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def _vit(**changes: object) -> VisionTransformer:
    torch.manual_seed(0)
    shape = {"width": 48, "depth": 3, "heads": 3, "patch_size": 8}
    return VisionTransformer(ModelConfig.model_validate({**shape, **changes}), RGB).train()


def _crops(invalid: bool = False) -> list[View]:
    """Two large views and three small ones, of several batch sizes."""
    rng = torch.Generator().manual_seed(5)
    views = []
    for number, (samples, side) in enumerate(((3, 32), (5, 16), (3, 32), (2, 16), (4, 24))):
        pixels = torch.randn(samples, 3, side, side, generator=rng)
        tokens = torch.rand(samples, 1, side // 8, side // 8, generator=rng) > 0.3
        valid = tokens.repeat_interleave(8, 2).repeat_interleave(8, 3)
        # The last small crop has no data at all in one sample, and the second large view is valid everywhere.
        if number == 3:
            valid[0] = False
        shown = valid if invalid and number != 2 else None
        views.append(View(pixels, shown, keys=torch.arange(samples) + 10 * number))
    return views


def _loss(features: list[Features]) -> Tensor:
    rng = torch.Generator().manual_seed(9)
    parts = []
    for each in features:
        weight = torch.randn(each.sequence.shape, generator=rng).to(each.sequence.device)
        if each.layout.valid is not None:
            prefix = each.sequence.shape[1] - each.patches.shape[1]
            weight[:, prefix:] *= each.layout.valid[..., None]
        parts.append((each.sequence.float() * weight).sum())
    return torch.stack(parts).sum()


def _gradients(model: nn.Module, features: list[Features]) -> dict[str, Tensor]:
    model.zero_grad()
    _loss(features).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


CASES = {
    "registers": ({"registers": 2, "layer_scale": 0.3}, False, False),
    "rotary": ({"positions": "rotary"}, False, False),
    "relative": ({"positions": "relative"}, False, False),
    "sincos_swiglu": ({"positions": "sincos", "norm": "rms", "mlp": "swiglu", "cls_token": False}, False, False),
    "drop_path": ({"drop_path": 0.5, "registers": 1}, False, False),
    "invalid": ({"registers": 1}, True, False),
    "invalid_rotary_drop": ({"positions": "rotary", "drop_path": 0.5}, True, False),
    "invalid_relative_drop": ({"positions": "relative", "drop_path": 0.5}, True, False),
    "keep": ({"positions": "rotary", "drop_path": 0.3}, False, True),
    "keep_invalid": ({}, True, True),
}


@pytest.mark.parametrize("case", CASES)
def test_packed_crops_equal_separate_calls(case: str) -> None:
    changes, invalid, keep = CASES[case]
    model, views = _vit(**changes), _crops(invalid)
    rng = torch.Generator().manual_seed(2)
    masks = [torch.rand(3, 16, generator=rng) > 0.6, None, None, torch.rand(2, 4, generator=rng) > 0.5, None]
    kept: list[Tensor | None] = [None] * 5
    shown: list[Tensor | None] = [None] * 5
    if keep:
        kept[2] = torch.rand(3, 16, generator=rng).argsort(1)[:, :7]
        shown[2] = torch.arange(7) < torch.tensor([[7], [5], [6]])
    calls: list[int] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, arguments, output: calls.append(output.dim()))
    together = model.forward_crops(views, masks, kept, shown)
    assert calls == [2] * 3, "each block is called once, on a run of tokens"
    apart = [
        model(view, mask=mask, keep=ids, keep_valid=valid)
        for view, mask, ids, valid in zip(views, masks, kept, shown, strict=True)
    ]
    for number, (found, expected) in enumerate(zip(together, apart, strict=True)):
        there = torch.ones_like(found.usable) if expected.layout.valid is None else found.usable
        torch.testing.assert_close(found.sequence[there], expected.sequence[there], atol=2e-6, rtol=1e-5)
        assert found.patches.shape == expected.patches.shape
        assert (found.layout.valid is None) <= (expected.layout.valid is None), number
    gradients, wanted = _gradients(model, together), _gradients(model, apart)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], atol=5e-5, rtol=1e-4, msg=name)


def test_backbones_without_packing_take_crops_all_the_same() -> None:
    model, views = _vit(registers=1).eval(), _crops()
    packed = model.forward_crops(views)
    simple = super(VisionTransformer, model).forward_crops(views)
    for found, expected in zip(packed, simple, strict=True):
        torch.testing.assert_close(found.sequence, expected.sequence, atol=2e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="2 masks for 5 views"):
        model.forward_crops(views, [None, None])


def _block_diagonal(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, same: Tensor, longest: int, also: int) -> Tensor:
    """What variable-length attention is by definition: one softmax over all tokens, none but the own sequence's."""
    assert bounds.dtype == same.dtype == torch.int32
    assert longest == also == int(bounds.diff().max())
    owner = torch.bucketize(torch.arange(len(q)), bounds[1:].long(), right=True)
    logits = torch.einsum("qhd,khd->hqk", q.double(), k.double()) * q.shape[-1] ** -0.5
    logits = logits.masked_fill(owner[:, None] != owner[None], float("-inf"))
    return torch.einsum("hqk,khd->qhd", logits.softmax(-1), v.double()).to(q.dtype)


@pytest.mark.parametrize("case", ["registers", "rotary", "drop_path", "keep"])
def test_the_varlen_path_equals_the_path_by_groups(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bookkeeping as on a GPU, with attention by definition in the place of the kernel."""
    changes, _, keep = CASES[case]
    model, views = _vit(**changes), _crops()
    kept = [None, None, torch.arange(7).expand(3, -1), None, None] if keep else None
    by_groups = model.forward_crops(views, None, kept)
    wanted = _gradients(model, by_groups)
    used: list[int] = []
    monkeypatch.setattr(packing, "fits_varlen", lambda qkv, groups: used.append(len(groups)) or True)
    monkeypatch.setattr(packing, "varlen_attn", _block_diagonal)
    at_once = model.forward_crops(views, None, kept)
    assert used == [4 if keep else 3] * 3
    for found, expected in zip(at_once, by_groups, strict=True):
        torch.testing.assert_close(found.sequence, expected.sequence, atol=2e-6, rtol=1e-5)
    for name, gradient in _gradients(model, at_once).items():
        torch.testing.assert_close(gradient, wanted[name], atol=5e-5, rtol=1e-4, msg=name)


def test_which_attention_is_taken() -> None:
    groups = (Group(2, 5), Group(3, 4))
    qkv = torch.zeros(22, 3, 2, 8, dtype=torch.bfloat16)
    assert not fits_varlen(qkv, groups), "a CPU has no such kernel"
    on_gpu = _OnGpu(qkv)
    assert fits_varlen(on_gpu, groups)
    assert not fits_varlen(on_gpu, groups[:1]), "one length is a plain batch"
    assert not fits_varlen(_OnGpu(qkv.float()), groups)
    assert not fits_varlen(_OnGpu(qkv[..., :6]), groups)
    masked = groups[0]._replace(key_mask=torch.ones(2, 5, dtype=torch.bool))
    biased = groups[0]._replace(position_bias=torch.zeros(2, 5, 5))
    assert not fits_varlen(on_gpu, (masked, groups[1]))
    assert not fits_varlen(on_gpu, (biased, groups[1]))


class _OnGpu:
    """What the rule asks of a tensor on a GPU of this century."""

    is_cuda = True

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _capable(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        monkeypatch.setattr(packing, "_has_kernels", lambda device: True)


@cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("turned", [False, True])
def test_the_kernel_equals_the_path_by_groups(dtype: torch.dtype, turned: bool) -> None:
    rng = torch.Generator().manual_seed(1)
    groups = []
    for samples, tokens in ((4, 201), (7, 41), (2, 130)):
        angles = torch.randn(samples, 1, tokens, 32, generator=rng).cuda()
        groups.append(Group(samples, tokens, Rotary(angles.cos(), angles.sin()) if turned else None))
    total = sum(group.samples * group.tokens for group in groups)
    values = torch.randn(total, 3, 6, 64, generator=rng).cuda().to(dtype)
    weight = torch.randn(total, 6 * 64, generator=rng).cuda()
    assert fits_varlen(values, groups)
    results = []
    for inputs, function in ((values, attend_varlen), (values.float(), attend)):
        leaf = inputs.clone().requires_grad_()
        out = function(leaf, groups)
        (out.float() * weight).sum().backward()
        results.append((out.float(), leaf.grad.float()))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=3e-2, rtol=3e-2)


@cuda
@pytest.mark.parametrize("compiled", [False, True])
def test_packed_crops_equal_separate_calls_on_a_gpu(compiled: bool) -> None:
    model = _vit(registers=1, drop_path=0.4).cuda()
    views = [replace(view, keys=view.keys).to("cuda") for view in _crops()]
    if compiled:
        model.compile_blocks(backend="aot_eager")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        together = model.forward_crops(views)
        apart = [model(view) for view in views]
    for found, expected in zip(together, apart, strict=True):
        torch.testing.assert_close(found.sequence.float(), expected.sequence.float(), atol=5e-2, rtol=5e-2)
    assert all(gradient.isfinite().all() for gradient in _gradients(model, together).values())
