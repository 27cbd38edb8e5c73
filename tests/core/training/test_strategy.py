"""Parameters in parts (FSDP2) against whole ones (DDP), for every objective, on ranks that share a gloo group."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from fmsuite.core.distributed import active, rank, world_size
from fmsuite.core.encoders import save_encoder
from fmsuite.core.objectives.base import OBJECTIVES, Objective, StepContext
from fmsuite.core.training import strategy as module
from fmsuite.core.training.config import OptimConfig
from fmsuite.core.training.optim import OptimSchedules, apply_schedules, make_optimizer
from fmsuite.core.training.strategy import (
    MOMENTS,
    Strategy,
    choose_strategy,
    hidden_backbones,
    make_strategy,
    state_bytes,
)
from tests.core.objectives import conftest as toys
from tests.core.training.helpers import final_state, make_config, make_objective, run_toy
from tests.core.training.test_monitor import make_probe

STEPS = 2
CPU = torch.device("cpu")
CLIP = 0.5


def kind_of(name: str) -> str:
    return toys.FITS.get(name, ("rgb",))[0] if "rgb" not in toys.FITS.get(name, ("rgb",)) else "rgb"


def take_steps(
    name: str,
    how: str,
    optim: OptimConfig,
    compiled: bool = False,
    recomputed: bool = False,
    options: dict | None = None,
    **model: object,
) -> tuple[Strategy, dict[str, list[float]]]:
    """Two steps of an objective, each rank on samples of its own."""
    objective = toys._objective(name, kind_of(name), model=model, **(options or {}))
    # Batches of a rank have their own statistics here, which is the same for both strategies.
    module._synchronised = lambda objective, device: objective
    placed = make_strategy(how, objective, CPU, "float32")
    if compiled:
        objective.backbone.compile_blocks(backend="aot_eager")
    objective.backbone.set_activation_checkpointing(recomputed)
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
    for block in objective.backbone.transformer_blocks():
        assert isinstance(block, module.FSDPModule)


def compare(me: int, name: str, optim: OptimConfig) -> float:
    """The largest difference between the two strategies, relative to the tensor's largest value (at least 0.01: below,
    it would be that of roundings)."""
    found = {}
    for how in ("ddp", "fsdp2"):
        placed, measured = take_steps(name, how, optim)
        if how == "fsdp2":
            assert_parts(placed.objective)
        state = module.gather_state(placed.objective.state_dict(), CPU)
        found[how] = (measured, {key: value.clone() for key, value in state.items()})
    measured, expected = found["fsdp2"][0], found["ddp"][0]
    assert measured["loss"] == pytest.approx(expected["loss"], rel=2e-6, abs=1e-6), name
    assert measured["norm"] == pytest.approx(expected["norm"], rel=1e-5), name
    worst = 0.0
    for key, value in found["ddp"][1].items():
        other = found["fsdp2"][1][key]
        assert other.shape == value.shape, key
        if value.is_floating_point() and value.numel():
            worst = max(worst, ((other - value).abs().max() / value.abs().max().clamp(min=1e-2)).item())
    return worst


def compare_all(me: int, names: list[str], optim: OptimConfig) -> dict[str, float]:
    return {name: compare(me, name, optim) for name in names}


SGD = OptimConfig(name="sgd", lr=1e-3, warmup=0)
"""AdamW would turn gradients that are rounding errors (of a bias before a norm) into whole steps."""


@pytest.mark.parametrize("part", range(4))
def test_every_objective_is_trained_in_parts_as_it_is_whole(two_ranks, part: int) -> None:
    assert len(OBJECTIVES) >= 20
    worst = two_ranks(compare_all, sorted(OBJECTIVES)[part::4], SGD)[0]
    for name, difference in worst.items():
        # SimSiam's batch normalisation of four samples magnifies what float32 rounds; the others are at 1e-7.
        assert difference < (2e-5 if name == "simsiam" else 1e-6), name


def compare_optimizers(me: int) -> dict[str, float]:
    found = {}
    for name in MOMENTS:
        # With the usual eps, gradients that are rounding errors (of the keys' biases) become whole steps.
        eps = 1e-3 if name in ("adamw", "lamb") else None
        optim = OptimConfig(name=name, lr=1e-3, warmup=0, weight_decay=0.3, eps=eps, clip_per_parameter=name == "sgd")
        found[name] = compare(me, "mae", optim)
    return found


def test_every_optimiser_takes_norms_over_whole_tensors(two_ranks) -> None:
    for name, difference in two_ranks(compare_optimizers)[0].items():
        assert difference < 2e-6, name


def in_other_ways(me: int) -> list[dict[str, list[float]]]:
    """Plain, with blocks compiled, and with activations computed again."""
    found = []
    for how, changes in (("ddp", {}), ("fsdp2", {"compiled": True}), ("fsdp2", {"recomputed": True})):
        found.append(take_steps("dinov2", how, SGD, **changes, layer_scale=0.1)[1])
    return found


def test_blocks_in_parts_can_be_compiled_and_recomputed(two_ranks) -> None:
    plain, compiled, recomputed = two_ranks(in_other_ways)[0]
    for key in plain:
        assert compiled[key] == pytest.approx(plain[key], rel=2e-6)
        assert recomputed[key] == pytest.approx(plain[key], rel=2e-6)


def attentive(me: int) -> list[dict[str, list[float]]]:
    return [take_steps("ibot", how, SGD, options={"masking": "attention_high"})[1] for how in ("ddp", "fsdp2")]


def test_attention_can_be_asked_of_blocks_in_parts(two_ranks) -> None:
    whole, parts = two_ranks(attentive)[0]
    for key in whole:
        assert parts[key] == pytest.approx(whole[key], rel=2e-6)


def computed_and_windowed(me: int) -> list[list[dict[str, list[float]]]]:
    """Embeddings from wavelengths, and windowed attention."""
    models = {"mae": {"patch_embedding": "wavelength"}, "simmim": {"attention": "rvsa", "rvsa_window": 3}}
    return [[take_steps(name, how, SGD, **model)[1] for how in ("ddp", "fsdp2")] for name, model in models.items()]


def test_generators_and_windows_are_trained_in_parts_as_they_are_whole(two_ranks) -> None:
    for whole, parts in two_ranks(computed_and_windowed)[0]:
        for key in whole:
            assert parts[key] == pytest.approx(whole[key], rel=5e-6)


def look_and_export(me: int, folder: Path, how: str) -> None:
    placed, _ = take_steps("vqkd", how, SGD)
    view = toys._batch(placed.objective, "rgb").views["image"][0]
    with placed.whole(encoder_only=True) as objective:
        assert (objective is None) == (me > 0)
        if objective is not None:
            with torch.no_grad():
                seen = objective.encoder.eval()(view).patches
            assert all(not isinstance(p, DTensor) and not p.is_meta for p in objective.encoder.parameters())
    with placed.whole() as objective:
        if objective is not None:
            encoder = objective.encoder
            save_encoder(folder, encoder, encoder.spec, "mean", {})
            objective.export(folder)
            torch.save(seen, folder / "seen.pt")
    if how == "fsdp2" and me == 0:
        assert placed.hollow is not None
        assert all(parameter.is_meta for parameter in placed.hollow.parameters())


def test_the_first_rank_alone_looks_at_and_exports_whole_parameters(two_ranks, tmp_path: Path) -> None:
    found = []
    for how in ("ddp", "fsdp2"):
        two_ranks(look_and_export, tmp_path / how, how)
        files = [load_file(tmp_path / how / f"{name}.safetensors") for name in ("encoder", "tokenizer")]
        found.append({**files[0], **files[1], "seen": torch.load(tmp_path / how / "seen.pt")})
    whole, parts = found
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_one_process_may_train_in_parts_too(tmp_path: Path) -> None:
    results = {}
    for how in ("ddp", "fsdp2"):
        config = make_config(4, strategy=how, monitor={"every": 2}, precision="float32")
        results[how] = run_toy(tmp_path / how, config, probe=make_probe()).metrics
        assert not active()
    for name in ("loss", "grad_norm"):
        assert results["fsdp2"][name] == pytest.approx(results["ddp"][name], rel=1e-6)
    whole, parts = final_state(tmp_path / "ddp", 4), final_state(tmp_path / "fsdp2", 4)
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-5, atol=1e-7, msg=name)


def test_auto_shards_what_takes_more_than_half_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = make_objective(make_config())
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in objective.teacher.parameters())
    adamw, lion = OptimConfig(), OptimConfig(name="lion")
    # Parameter, gradient, DDP's copy of it and two moments; the teacher has none of these.
    assert state_bytes(objective, adamw) == 4 * (5 * trained + frozen)
    assert state_bytes(objective, lion) == 4 * (4 * trained + frozen)

    gpu, needed = torch.device("cuda", 0), state_bytes(objective, adamw)
    monkeypatch.setattr(module, "world_size", lambda: 8)
    for memory, chosen in ((2 * needed, "ddp"), (2 * needed - 2, "fsdp2")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, memory=memory: (0, memory))
        assert choose_strategy("auto", objective, adamw, gpu) == chosen
    assert choose_strategy("auto", objective, adamw, CPU) == "ddp"
    assert choose_strategy("ddp", objective, adamw, gpu) == "ddp"
    monkeypatch.setattr(module, "world_size", lambda: 1)
    assert choose_strategy("auto", objective, adamw, gpu) == "ddp"
    assert choose_strategy("fsdp2", objective, adamw, CPU) == "fsdp2"


def test_frozen_teachers_count_and_are_cut(two_ranks) -> None:
    objective = toys._objective("maskdistill")
    teachers = hidden_backbones(objective)
    assert len(teachers) == 1
    alone = 4 * sum(p.numel() for p in teachers[0].parameters())
    mine = sum(p.numel() * (20 if p.requires_grad else 4) for p in objective.parameters())
    assert state_bytes(objective, OptimConfig()) == mine + alone
    assert two_ranks(parts_of_teacher) == [True, True]


def parts_of_teacher(me: int) -> bool:
    placed, _ = take_steps("maskdistill", "fsdp2", SGD)
    (teacher,) = hidden_backbones(placed.objective)
    return all(isinstance(parameter, DTensor) for parameter in teacher.blocks.parameters())
