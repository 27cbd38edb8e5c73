from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from fmsuite.core.training.config import OptimConfig
from fmsuite.core.training.optim import (
    OptimSchedules,
    apply_schedules,
    clip_gradients,
    describe_groups,
    effective_lr,
    is_decayed,
    make_optimizer,
)
from tests.core.training.helpers import make_config, make_objective


def settings_by_name(optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, float]]:
    return {
        name: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for name in group["param_names"]
    }


def test_every_parameter_gets_the_rate_and_decay_of_its_name() -> None:
    objective = make_objective(make_config())
    optimizer = make_optimizer(OptimConfig(layer_decay=0.5, patch_embed_lr_scale=0.2), objective)
    apply_schedules(optimizer, lr=1.0, weight_decay=0.1)
    decayed = {
        "backbone.patch_embed.weight",
        "backbone.blocks.0.fc.weight",
        "backbone.blocks.1.fc.weight",
        "head.weight",
    }
    expected = {}
    for name, parameter in objective.named_parameters():
        if name.startswith("teacher."):
            assert not parameter.requires_grad
            continue
        # Depth 2: embeddings are three layers below the final norm, block i is 2 - i below it.
        rate = {"patch_embed": 0.125 * 0.2, "cls_token": 0.125, "pos_embed": 0.125, "unused_token": 0.125, "norm": 1.0}
        key = name.removeprefix("backbone.").split(".")[0]
        block = re.match(r"backbone\.blocks\.(\d)", name)
        lr = 0.5 ** (2 - int(block[1])) if block else rate.get(key, 1.0)
        expected[name] = (lr, 0.1 if name in decayed else 0.0)
    found = settings_by_name(optimizer)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name] == pytest.approx(values), name


@pytest.mark.parametrize(
    ("name", "shape", "decayed"),
    [
        ("backbone.blocks.0.attn.qkv.weight", (12, 4), True),
        ("backbone.patch_embed.proj.weight", (4, 3, 2, 2), True),
        ("decoder.mask_token", (1, 1, 4), False),
        ("backbone.reg_token", (1, 4, 4), False),
        ("backbone.pos_embed", (1, 9, 4), False),
        ("decoder_pos_embed", (1, 9, 4), False),
        ("backbone.relative_position_bias_table", (9, 4), False),
        ("head.bias", (2, 3), False),
        ("backbone.norm.weight", (4,), False),
        ("backbone.blocks.0.ls1.gamma", (4,), False),
        ("token_head.fc.weight", (4, 4), True),
    ],
)
def test_decay_goes_by_the_last_part_of_the_name_and_the_shape(name: str, shape: tuple, decayed: bool) -> None:
    assert is_decayed(name, torch.zeros(shape)) is decayed


def test_groups_are_the_same_each_time_and_merge_equal_settings() -> None:
    objective = make_objective(make_config())
    first, second = (make_optimizer(OptimConfig(layer_decay=0.9), objective) for _ in range(2))
    names = [[group["param_names"] for group in optimizer.param_groups] for optimizer in (first, second)]
    assert names[0] == names[1]
    assert len(make_optimizer(OptimConfig(), objective).param_groups) == 2


def test_the_table_names_layers_factors_and_counts() -> None:
    objective = make_objective(make_config())
    table = describe_groups(make_optimizer(OptimConfig(layer_decay=0.5, patch_embed_lr_scale=0.2), objective))
    line = next(line for line in table.splitlines() if "patch embedding" in line and " yes " in line)
    assert "0.025" in line
    assert line.split()[3] == str(12 * 16)
    assert "heads" in table


@pytest.mark.parametrize(("scaling", "lr"), [("none", 1e-3), ("linear", 4e-3), ("sqrt", 2e-3)])
def test_learning_rate_scales_with_the_batch(scaling: str, lr: float) -> None:
    config = OptimConfig(lr=1e-3, lr_scaling=scaling, lr_reference_batch=256)  # type: ignore[arg-type]
    assert effective_lr(config, 1024) == pytest.approx(lr)


def test_schedules_reach_peak_end_and_weight_decay_end() -> None:
    config = OptimConfig(
        lr=1e-3, lr_scaling="linear", lr_end=1e-6, warmup="10%", weight_decay=0.04, weight_decay_end=0.4
    )
    schedules = OptimSchedules.build(config, 512, total_steps=100, steps_per_epoch=10)
    assert (schedules.lr(0), schedules.lr(9), schedules.lr(10)) == pytest.approx((0, 2e-3, 2e-3))
    assert schedules.lr(100) == 1e-6
    assert (schedules.weight_decay(0), schedules.weight_decay(50)) == pytest.approx((0.04, 0.22))
    assert OptimSchedules.build(OptimConfig(), 512, 100, 10).weight_decay(73) == 0.05


def random_gradients() -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 3), (7,), (2, 2, 2)]
    first = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    second = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for number, (a, b) in enumerate(zip(first, second, strict=True)):
        a.grad = torch.randn(a.shape, generator=generator) * 10.0**number
        b.grad = a.grad.clone()
    without = nn.Parameter(torch.zeros(2))
    return [*first, without], [*second, without]


def test_clipping_the_total_norm_equals_torch() -> None:
    ours, theirs = random_gradients()
    norm = clip_gradients(ours, 3.0)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(theirs, 3.0))
    for a, b in zip(ours[:3], theirs[:3], strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_clipping_per_parameter_bounds_each_and_leaves_small_ones() -> None:
    ours, before = random_gradients()
    total = clip_gradients(ours, 6.0, per_parameter=True)
    norms = [b.grad.norm().item() for b in before[:3]]
    assert total.item() == pytest.approx(sum(n * n for n in norms) ** 0.5, rel=1e-5)
    assert norms[0] < 6.0 < norms[1]
    torch.testing.assert_close(ours[0].grad, before[0].grad)
    for a, b, norm in zip(ours[1:3], before[1:3], norms[1:], strict=True):
        # DINO's clip_gradients: multiply by clip / (norm + 1e-6) where that is below one.
        torch.testing.assert_close(a.grad, b.grad * 6.0 / (norm + 1e-6))


def test_without_a_limit_gradients_are_only_measured() -> None:
    ours, before = random_gradients()
    clip_gradients(ours, None)
    for a, b in zip(ours[:3], before[:3], strict=True):
        assert torch.equal(a.grad, b.grad)
