"""Which parameters of a backbone train, and how fast."""

from __future__ import annotations

import re
from typing import Literal, get_args

from torch import nn

from fmsuite.core.adaptation.adapters import AdaptedLinear
from fmsuite.core.adaptation.lora import LoraLinear
from fmsuite.core.backbones.base import Backbone
from fmsuite.errors import UsageError

Part = Literal["all", "nothing", "attention", "norms", "biases", "added"]
"""What trains of a backbone.

``all``; ``nothing`` (the head alone learns); ``attention``: the attention's projections and the position table, as in
Touvron et al. 2022 ("Three things everyone should know about vision transformers", section 4, and its code); ``norms``:
gains and biases of normalisations (Frankle et al. 2021); ``biases``: every bias, those of normalisations included
(BitFit, Ben Zaken et al. 2022); ``added``: low-rank and bottleneck adapters.
"""

_ATTENTION = re.compile(r"(^|\.)attn\.|^(single\.)?(model\.)?pos_embed$|^(single\.)?rel_pos_bias\.")
_WINDOWS = re.compile(r"\.attn\.((offsets|scales|angles)\.(weight|bias)|rel_pos_[hw])$")
"""What ``RotatedWindowAttention`` adds to attention."""
_ADDED = re.compile(r"\.(lora_down|lora_up)$|\.adapter\.(down|up)\.(weight|bias)$")


def train_only(backbone: Backbone, part: Part, last_blocks: int | None = None) -> tuple[str, ...]:
    """Let a part of a backbone train, and nothing else of it.

    Weights that a low-rank or bottleneck adapter stands beside never train. Regressors of windows train with any part:
    they start at zero, and would stay there.

    Args:
        part: see ``Part``.
        last_blocks: of that part, only what is in the last so many blocks or behind them; ``None`` sets no bound.

    Returns:
        Names of the parameters that train.

    Raises:
        UsageError: if nothing would train though something was asked for, or for a bound that the depth does not allow.
    """
    if part not in get_args(Part):
        raise UsageError(f"There is no part '{part}' to train.", f"Use {', '.join(get_args(Part))}.")
    if last_blocks is not None and not 1 <= last_blocks <= backbone.depth:
        raise UsageError(f"The last {last_blocks} blocks of {backbone.depth} cannot train.", "Use 1 or more of them.")
    held = _beside_adapters(backbone)
    norms = _norm_parameters(backbone)
    chosen = []
    for name, parameter in backbone.named_parameters():
        picked = name not in held and _picks(part, name, name in norms)
        if last_blocks is not None:
            picked &= backbone.layer_of(name) > backbone.depth - last_blocks
        parameter.requires_grad_(picked)
        if picked:
            chosen.append(name)
    if not chosen and part != "nothing":
        raise UsageError(
            f"This {type(backbone).__name__} has nothing to train of '{part}'.",
            "Insert adapters first." if part == "added" else "Train another part of it.",
        )
    return tuple(chosen)


def layer_factors(backbone: Backbone, decay: float) -> dict[str, float]:
    """The learning-rate factor of each parameter that trains, ``decay ** (depth + 1 - layer)`` (Clark et al. 2020; Bao
    et al. 2022): what ``optim.layer_decay`` gives the groups of a run, for those who make their own optimiser."""
    return {
        name: decay ** (backbone.depth + 1 - backbone.layer_of(name))
        for name, parameter in backbone.named_parameters()
        if parameter.requires_grad
    }


def is_frozen(backbone: nn.Module) -> bool:
    """Whether nothing of a backbone trains."""
    return not any(parameter.requires_grad for parameter in backbone.parameters())


def _picks(part: Part, name: str, norm: bool) -> bool:
    if part == "all" or (part != "nothing" and _WINDOWS.search(name) is not None):
        return True
    if part == "attention":
        return _ATTENTION.search(name) is not None
    if part == "norms":
        return norm
    if part == "biases":
        return name.rpartition(".")[2] == "bias"
    return part == "added" and _ADDED.search(name) is not None


def _norm_parameters(backbone: nn.Module) -> set[str]:
    """A normalisation is told by its class's name: timm has many of its own."""
    return {
        f"{name}.{inner}"
        for name, module in backbone.named_modules()
        if "norm" in type(module).__name__.lower()
        for inner, _ in module.named_parameters(recurse=False)
    }


def _beside_adapters(backbone: nn.Module) -> set[str]:
    return {
        f"{name}.{part}"
        for name, module in backbone.named_modules()
        if isinstance(module, LoraLinear | AdaptedLinear)
        for part in ("weight", "bias")
    }
