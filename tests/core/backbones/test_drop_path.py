"""Drop-path that skips: equal to multiplying every sample's branch by its factor, whatever else is asked."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.backbones.drop_path import LEAST, DropPath, draw_kept
from fmsuite.core.backbones.layers import Block
from fmsuite.core.backbones.vit import VisionTransformer
from fmsuite.core.data.sample import Batch, View
from fmsuite.core.inputs import InputSpec, rgb_channels
from fmsuite.core.seeding import uniform_from_keys

CPU = torch.device("cpu")
RGB = InputSpec(axes=("y", "x"), size=(32, 32), channels=rgb_channels(), scale=1 / 255)
SHAPE = {"width": 48, "depth": 3, "heads": 3, "patch_size": 8, "drop_path": 0.5, "drop_path_uniform": True}


def _vit(spec: InputSpec = RGB, **changes: object) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(ModelConfig.model_validate({**SHAPE, **changes}), spec).train()


def _factor(path: DropPath, keys: Tensor) -> Tensor:
    """By definition: zero where dropped, 1 / (1 - rate) elsewhere."""
    return ((uniform_from_keys(keys, path.salt) >= path.rate).float() / (1 - path.rate))[:, None, None]


def _by_mask(model: VisionTransformer, view: View, **options: Tensor) -> Tensor:
    """(B, S, D) of the blocks, every branch computed for all samples and multiplied."""
    x, _, group = model._embed(view, **options)
    for block in model.blocks:
        mixed = block.attn(block.norm1(x), group.rotary, group.key_mask, group.position_bias)
        x = x + _factor(block.drop_path1, view.keys) * block.ls1(mixed)
        x = x + _factor(block.drop_path2, view.keys) * block.ls2(block.mlp(block.norm2(x)))
    return model.norm(x)


def _gradients(model: VisionTransformer, output: Tensor) -> dict[str, Tensor]:
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    model.zero_grad()
    (output * weight).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("changes", "invalid", "keep"),
    [
        ({"registers": 2, "layer_scale": 0.3}, False, False),
        ({"positions": "rotary"}, True, False),
        ({"positions": "rotary"}, False, True),
        ({"positions": "relative"}, True, False),
        ({"positions": "relative", "norm": "rms", "mlp": "swiglu"}, False, True),
        ({"drop_path": 0.9}, True, False),
    ],
)
def test_values_and_gradients_equal_multiplying_by_a_mask(changes: dict, invalid: bool, keep: bool) -> None:
    model = _vit(**changes)
    rng = torch.Generator().manual_seed(1)
    valid = torch.rand(7, 1, 4, 4, generator=rng).repeat_interleave(8, 2).repeat_interleave(8, 3) > 0.3
    view = View(torch.randn(7, 3, 32, 32, generator=rng), valid if invalid else None, keys=torch.arange(7) * 31 + 4)
    options = {"keep": torch.rand(7, 16, generator=rng).argsort(1)[:, :9]} if keep else {}
    expected = _by_mask(model, view, **options)
    wanted = _gradients(model, expected)
    found = model(view, **options).sequence
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    gradients = _gradients(model, model(view, **options).sequence)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], atol=2e-5, rtol=1e-4, msg=name)
    assert not torch.equal(found, model.eval()(view, **options).sequence)


def test_a_branch_is_computed_for_what_is_kept_only() -> None:
    model = _vit(depth=4)
    seen: list[int] = []
    for block in model.blocks:
        block.attn.qkv.register_forward_hook(lambda module, arguments, output: seen.append(len(output) // 17))
        block.mlp.fc1.register_forward_hook(lambda module, arguments, output: seen.append(len(output)))
    keys = torch.arange(40)
    model(View(torch.randn(40, 3, 32, 32), keys=keys))
    paths = [path for block in model.blocks for path in (block.drop_path1, block.drop_path2)]
    assert seen == [int((uniform_from_keys(keys, path.salt) >= 0.5).sum()) for path in paths]
    assert len(set(seen)) > 1


def test_kept_rows_depend_on_the_keys_alone() -> None:
    paths = [DropPath(0.4, salt).train() for salt in (3, 8)]
    keys = torch.arange(64)
    together = draw_kept(paths, [(64, keys)], CPU)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1)).split(5)
    for number in range(2):
        whole = set(together[number].rows[0].tolist())
        apart = set()
        for part in order:
            kept = draw_kept(paths, [(len(part), keys[part])], CPU)[number]
            apart |= set(part[kept.rows[0][kept.counted[0] == 1].long()].tolist())
        assert apart == whole == set((uniform_from_keys(keys, paths[number].salt) >= 0.4).nonzero().flatten().tolist())


def test_drawn_shares_and_independence() -> None:
    paths = [DropPath(0.3, 0).train(), DropPath(0.0, 5).train(), DropPath(0.3, 1).train()]
    kept = draw_kept(paths, [(20_000, torch.arange(20_000))], CPU)
    assert kept[1] is None
    first, second = (set(each.rows[0].tolist()) for each in (kept[0], kept[2]))
    # Binomial standard deviation 0.0032; four of them.
    assert abs(len(first) / 20_000 - 0.7) < 0.013
    assert abs(len(first & second) / 20_000 - 0.49) < 0.015


def test_small_batches_are_filled_with_samples_that_do_not_count() -> None:
    path = DropPath(0.99, 0).train()
    for samples in (1, 2, 5):
        kept = draw_kept([path], [(samples, torch.arange(samples))], CPU)[0]
        assert len(kept.rows[0]) == len(set(kept.rows[0].tolist())) == min(samples, LEAST)
        assert kept.counted[0].sum() == 0
    block = Block(8, 2, drop_path=0.99).train()
    x = torch.randn(5, 3, 8, requires_grad=True)
    kept = draw_kept([block.drop_path1, block.drop_path2], [(5, torch.arange(5))], CPU)
    output = block(x, kept=tuple(kept))
    assert torch.equal(output, x)
    output.sum().backward()
    assert all(not p.grad.any() for p in block.parameters())


def test_without_keys_the_generator_draws_and_evaluation_drops_nothing() -> None:
    path = DropPath(0.5, 0)
    torch.manual_seed(0)
    counts = [len(draw_kept([path.train()], [(200, None)], CPU)[0].rows[0]) for _ in range(2)]
    assert counts[0] != counts[1]
    assert all(60 < count < 140 for count in counts)
    assert draw_kept([path.eval()], [(200, None)], CPU) == [None]
    block = Block(8, 2, drop_path=0.5)
    block.eval()(torch.randn(2, 3, 8))
    with pytest.raises(ValueError, match="which samples are kept"):
        block.train()(torch.randn(2, 3, 8))


def test_recomputed_activations_change_no_gradient_of_packed_crops() -> None:
    views = [View(torch.randn(6, 3, side, side), keys=torch.arange(6)) for side in (32, 16)]

    def gradients(enabled: bool) -> dict[str, Tensor]:
        model = _vit()
        model.set_activation_checkpointing(enabled)
        first, second = model.forward_crops(views)
        return _gradients(model, torch.cat([first.sequence, second.sequence], dim=1))

    plain, recomputed = gradients(False), gradients(True)
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


@pytest.mark.parametrize("crops", [False, True])
def test_compiled_blocks_share_a_bounded_number_of_graphs(crops: bool) -> None:
    """Rates, salts and numbers of kept samples differ between blocks and steps; the code does not."""
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager" if crops else "eager")
    model, plain = _vit(depth=3, drop_path_uniform=False), _vit(depth=3, drop_path_uniform=False)
    model.compile_blocks(backend=graphs)

    def step(module: VisionTransformer, number: int) -> Tensor:
        rng = torch.Generator().manual_seed(number)
        keys = torch.arange(9) + 100 * number
        views = [
            View(torch.randn(9, 3, side, side, generator=rng), keys=keys) for side in ((32, 16) if crops else (32,))
        ]
        parts = [features.sequence for features in module.forward_crops(views)]
        return torch.cat(parts, dim=1)

    counts = []
    for number in range(4):
        output, expected = step(model, number), step(plain, number)
        torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-5)
        output.sum().backward()
        counts.append(graphs.frame_count)
    assert counts[-1] == counts[1] <= 3, counts


def test_keys_stay_on_the_host() -> None:
    view = View(torch.zeros(2, 3, 4, 4), torch.ones(2, 1, 4, 4, dtype=torch.bool), keys=torch.arange(2))
    batch = Batch({"image": [view]}, torch.arange(2), torch.zeros(2))
    moved = replace(batch, support=batch).to("meta")
    for each in (moved.views["image"][0], moved.support.views["image"][0]):
        assert (each.pixels.device.type, each.valid.device.type, each.keys.device.type) == ("meta", "meta", "cpu")
    assert moved.indices.device.type == "meta"
