"""Parameters in parts (FSDP2) against whole ones (DDP), for every objective, on ranks that share a gloo group."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from fmsuite.core.distributed import rank, world_size
from fmsuite.core.encoders import save_encoder
from fmsuite.core.objectives.base import OBJECTIVES, Objective, StepContext
from fmsuite.core.training import strategy as module
from fmsuite.core.training.config import OptimConfig
from fmsuite.core.training.optim import OptimSchedules, apply_schedules, make_optimizer
from fmsuite.core.training.strategy import Sharded, Strategy, blocks_of, choose_strategy, make_strategy, state_bytes
from tests.core.objectives import conftest as toys
from tests.core.training.helpers import make_config, make_objective

STEPS = 2
CPU = torch.device("cpu")
CLIP = 0.5


def kind_of(name: str) -> str:
    return toys.FITS.get(name, ("rgb",))[0] if "rgb" not in toys.FITS.get(name, ("rgb",)) else "rgb"


def take_steps(name: str, how: str, optim: OptimConfig, **model: object) -> tuple[Strategy, dict[str, list[float]]]:
    """Two steps of an objective, each rank on samples of its own."""
    objective = toys._objective(name, kind_of(name), model=model)
    # Batches of a rank have their own statistics here, which is the same for both strategies.
    module._synchronised = lambda objective, device: objective
    placed = make_strategy(how, objective, CPU, "float32")
    objective = placed.place().train()
    optimizer = make_optimizer(optim, objective)
    schedules = OptimSchedules.build(optim, 4, STEPS, 1)
    called = placed.begin()
    measured: dict[str, list[float]] = {"loss": [], "norm": []}
    for step in range(STEPS):
        context = StepContext(step, 8, 1, 4 * world_size())
        apply_schedules(optimizer, schedules.lr(step), schedules.weight_decay(step), schedules.peak)
        torch.manual_seed(step)
        with placed.accumulating(last=True):
            loss = called(toys._batch(objective, kind_of(name), step=step, seed=rank()), context)["loss"]
            loss.backward()
        placed.average_rest()
        objective.before_update(context)
        measured["norm"].append(placed.clip(CLIP, optim.clip_per_parameter).item())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        objective.after_update(context)
        measured["loss"].append(loss.item())
    return placed, measured


def assert_parts(objective: Objective) -> None:
    """Everything that has an axis to cut along is cut, the blocks each for themselves."""
    for name, parameter in objective.named_parameters():
        assert isinstance(parameter, DTensor) == (parameter.dim() > 0), name
        if isinstance(parameter, DTensor):
            assert parameter.to_local().numel() <= -(-len(parameter) // world_size()) * parameter[0].numel()
    for block in blocks_of(objective.backbone):
        assert isinstance(block, module.FSDPModule)


def compare(me: int, name: str, optim: OptimConfig) -> float:
    """The largest difference between the two strategies, relative to the largest weight."""
    found = {}
    for how in ("ddp", "fsdp2"):
        placed, measured = take_steps(name, how, optim)
        if how == "fsdp2":
            assert_parts(placed.objective)
        state = module.gather_state(placed.objective.state_dict(), CPU)
        found[how] = (measured, {key: value.clone() for key, value in state.items()})
    for key in ("loss", "norm"):
        assert found["fsdp2"][0][key] == pytest.approx(found["ddp"][0][key], rel=2e-6), (name, key)
    worst = 0.0
    for key, value in found["ddp"][1].items():
        other = found["fsdp2"][1][key]
        assert other.shape == value.shape, key
        if value.is_floating_point() and value.numel():
            worst = max(worst, ((other - value).abs().max() / value.abs().max().clamp(min=1e-3)).item())
    return worst


def compare_all(me: int, names: list[str], optim: OptimConfig) -> dict[str, float]:
    return {name: compare(me, name, optim) for name in names}


ADAMW = OptimConfig(lr=1e-3, warmup=0)


@pytest.mark.parametrize("part", range(4))
def test_every_objective_is_trained_in_parts_as_it_is_whole(two_ranks, part: int) -> None:
    assert len(OBJECTIVES) >= 20
    worst = two_ranks(compare_all, sorted(OBJECTIVES)[part::4], ADAMW)[0]
    for name, difference in worst.items():
        assert difference < 2e-5, name
