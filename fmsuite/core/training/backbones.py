"""What a run asks of its backbones: compiled blocks, and activations that are computed twice."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fmsuite.core.backbones.base import Backbone
from fmsuite.core.objectives.base import Objective
from fmsuite.core.training.config import TrainingConfig
from fmsuite.errors import UsageError

GRAPH_MODES = ("reduce-overhead", "max-autotune")
"""Modes of ``torch.compile`` that record CUDA graphs and replay them."""


def set_up_backbones(objective: Objective, training: TrainingConfig, device: torch.device, strategy: str) -> None:
    """Compile every backbone's blocks (a teacher's too); recompute activations in those that are trained.

    Args:
        objective: not yet on the device.
        strategy: ``ddp`` or ``fsdp2``.

    Raises:
        UsageError: for a backbone that can do neither, or a mode of compilation that does not go with it, with the
            device or with the strategy.
    """
    backbones = [module for module in objective.modules() if isinstance(module, Backbone)]
    trained = [backbone for backbone in backbones if any(p.requires_grad for p in backbone.parameters())]
    if training.activation_checkpointing:
        for backbone in trained:
            _method(backbone, "set_activation_checkpointing", "training.activation_checkpointing")(True)
    if not training.compile:
        return
    mode = training.compile_mode
    if mode != "default":
        _check_mode(mode, trained, device, strategy)
    for backbone in backbones:
        _method(backbone, "compile_blocks", "training.compile")(mode=mode)


def _check_mode(mode: str, trained: list[Backbone], device: torch.device, strategy: str) -> None:
    default = "Set training.compile_mode=default."
    if device.type != "cuda":
        raise UsageError(f"training.compile_mode '{mode}' is made for GPUs, and this run is on the CPU.", default)
    if mode not in GRAPH_MODES:
        return
    if strategy == "fsdp2":
        raise UsageError(
            f"training.compile_mode '{mode}' replays CUDA graphs, which know parameters by their address; fsdp2 "
            "gathers them at another each time.",
            "Set training.compile_mode=default, or training.strategy=ddp.",
        )
    if any(getattr(getattr(backbone, "config", None), "drop_path", 0.0) for backbone in trained):
        raise UsageError(
            f"training.compile_mode '{mode}' replays CUDA graphs, whose shapes are fixed; with model.drop_path the "
            "number of samples in a block differs from step to step.",
            "Set training.compile_mode=default, or model.drop_path=0.",
        )


def _method(backbone: Backbone, name: str, key: str) -> Callable:
    method = getattr(backbone, name, None)
    if method is None:
        raise UsageError(f"{type(backbone).__name__} does not support {key}.", f"Set {key}=false.")
    return method
