"""How a backbone is tuned to a task: in full, in parts, by what is added to it, or not at all; or from scratch."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator

from fmsuite.core.adaptation.adapters import insert_adapters
from fmsuite.core.adaptation.freezing import Part, train_only
from fmsuite.core.adaptation.lora import insert_lora
from fmsuite.core.backbones.base import Backbone
from fmsuite.core.backbones.build import build_backbone
from fmsuite.core.backbones.datewise import Datewise
from fmsuite.core.backbones.rvsa import Outside
from fmsuite.core.backbones.swin_unetr import SwinUNETR
from fmsuite.core.backbones.timm_backbone import TimmBackbone
from fmsuite.core.backbones.vit import VisionTransformer
from fmsuite.core.objectives.base import ObjectiveConfig
from fmsuite.errors import UsageError

Tune = Literal["full", "frozen", "attention", "norms", "biases", "lora", "adapters"]
_PARTS: dict[Tune, Part] = {
    "full": "all",
    "frozen": "nothing",
    "attention": "attention",
    "norms": "norms",
    "biases": "biases",
    "lora": "added",
    "adapters": "added",
}


_WINDOWS = ("rvsa_window", "rvsa_full_every", "rvsa_outside")


class TuningOptions(ObjectiveConfig):
    """
    Attributes:
        tune: what of the backbone trains: see ``freezing.Part``; ``lora`` and ``adapters`` add parameters and train
            these.
        last_blocks: of that, only what is in the last so many blocks and behind them.
        lora_rank, lora_alpha, lora_targets, lora_dropout: see ``insert_lora``.
        adapter_width: see ``insert_adapters``.
        attention: ``rvsa`` gives most blocks rotated varied-size windows in the place of full attention (Wang et al.
            2022); their regressors train whatever ``tune`` says. The backbone's own attention otherwise.
        rvsa_window, rvsa_full_every, rvsa_outside: see ``ModelConfig``.
        scratch: the control: the same network with fresh weights, all of which train, whatever ``tune`` says.
    """

    tune: Tune = "full"
    last_blocks: int | None = Field(default=None, ge=1)
    lora_rank: int = Field(default=8, ge=1)
    lora_alpha: float | None = Field(default=None, gt=0)
    lora_targets: tuple[str, ...] = ("q", "v")
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    adapter_width: int = Field(default=64, ge=1)
    attention: Literal["rvsa"] | None = None
    rvsa_window: int = Field(default=7, ge=2)
    rvsa_full_every: int = Field(default=3, ge=2)
    rvsa_outside: Outside = "left_out"
    scratch: bool = False

    @model_validator(mode="after")
    def _tuning_used(self) -> TuningOptions:
        for key, needed in (
            *((f"lora_{name}", "lora") for name in ("rank", "alpha", "targets", "dropout")),
            ("adapter_width", "adapters"),
        ):
            if self.tune != needed and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} has no effect without tune: {needed}")
        for key in _WINDOWS:
            if self.attention is None and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} has no effect without attention: rvsa")
        if self.attention is not None and self.tune == "frozen":
            raise ValueError(
                "attention: rvsa has windows to learn, and nothing of the backbone learns with tune: frozen"
            )
        if self.tune == "frozen" and self.last_blocks is not None:
            raise ValueError("last_blocks has no effect with tune: frozen")
        return self


def tuned(backbone: Backbone, options: TuningOptions) -> Backbone:
    """The backbone, changed in place so that it trains as the options say; with ``scratch`` another one.

    Raises:
        UsageError: if the backbone cannot be tuned so.
    """
    if options.attention == "rvsa":
        use_windows(backbone, options)
    if options.scratch:
        return from_scratch(backbone)
    if options.tune == "lora":
        insert_lora(backbone, options.lora_rank, options.lora_alpha, options.lora_targets, options.lora_dropout)
    elif options.tune == "adapters":
        insert_adapters(backbone, options.adapter_width)
    train_only(backbone, _PARTS[options.tune], options.last_blocks)
    return backbone


def use_windows(backbone: Backbone, options: TuningOptions) -> None:
    """Put rotated varied-size windows into a plain vision transformer, in place; of a network that sees dates one by
    one, into that of one date.

    Raises:
        UsageError: for another backbone, one with other windows, or one whose tokens or positions cannot have any.
    """
    if isinstance(backbone, Datewise):
        use_windows(backbone.single, options)
        backbone.can_show_attention = backbone.single.can_show_attention
        return
    if not isinstance(backbone, VisionTransformer):
        raise UsageError(
            f"attention: rvsa is for plain vision transformers, not for a {type(backbone).__name__}.",
            "Use an encoder with a vit_* model, or leave attention out.",
        )
    changes = {"attention": "rvsa", **{key: getattr(options, key) for key in _WINDOWS}}
    if backbone.config.attention == "rvsa":
        if backbone.config.model_copy(update=changes) != backbone.config:
            raise UsageError("This encoder has windows of another kind already.", "Leave attention out to keep them.")
        return
    before = backbone.config
    backbone.config = before.model_copy(update=changes)
    try:
        backbone.insert_windows()
    except UsageError:
        backbone.config = before
        raise


def from_scratch(backbone: Backbone) -> Backbone:
    """A backbone of the same options and input with fresh weights, drawn from PyTorch's global generator, which is
    afterwards as it was: what is drawn next is equal in both arms of the comparison.

    Raises:
        UsageError: for a backbone of a kind that cannot be made again from its options.
    """
    if not isinstance(backbone, VisionTransformer | TimmBackbone | SwinUNETR | Datewise):
        raise UsageError(
            f"A {type(backbone).__name__} cannot be made again without its weights.", "Leave the control out."
        )
    with torch.random.fork_rng(devices=[]):
        return build_backbone(backbone.config.model_copy(update={"weights": None}), backbone.spec)
