"""A vision transformer as timm holds it: which timm model, with which arguments, and its state dict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor

from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.backbones.layers import mlp_hidden
from fmsuite.core.backbones.positions import sincos_positions
from fmsuite.core.backbones.timm_backbone import refuse_input
from fmsuite.core.backbones.vit import VisionTransformer
from fmsuite.errors import UsageError

_GELU_MODEL = "vit_base_patch16_224"
_SWIGLU_MODEL = "vit_giant_patch14_reg4_dinov2"
"""timm's MLP is a class, which no JSON holds: the model's name chooses it, and arguments set everything else."""


@dataclass(frozen=True)
class TimmLayout:
    """How to rebuild an encoder with ``timm.create_model(name, **arguments)``.

    Attributes:
        name, arguments: for ``timm.create_model``.
        state: its complete state dict.
        config: the configuration whose ``VisionTransformer`` loads ``state`` (``mask_token`` is not in it).
        folded: what was added up to fit: positions into tokens, a formula into a table.
    """

    name: str
    arguments: dict[str, Any]
    state: dict[str, Tensor]
    config: ModelConfig
    folded: tuple[str, ...]


def to_timm(model: VisionTransformer, pooling: str = "cls") -> TimmLayout:
    """Describe a model in timm's terms; outputs stay equal.

    Sine-cosine positions become the table they are at ``model.spec.size``. timm has no row for a class token that
    stands before registers without rows, so with registers the class token's position is added to the token.

    Args:
        pooling: ``mean`` makes timm average the patches after the final norm; otherwise it takes the class token.

    Raises:
        UsageError: naming why timm cannot hold the model: its input, an embedding from wavelengths, windowed attention,
            rotary, relative or physical positions, RMS normalisation, or layers without biases.
    """
    way_out = "Export it with the layout 'native' (--layout native)."
    try:
        refuse_input(model.spec, "timm's VisionTransformer")
    except UsageError as error:
        raise UsageError(error.message, way_out) from error
    config = model.config
    if config.rotary or config.position_units == "physical":
        what = "rotary" if config.rotary else "physical"
        raise UsageError(f"timm's VisionTransformer has no {what} positions like this model's.", way_out)
    for unknown, what in (
        (config.patch_embedding != "linear", "patch embedding from wavelengths"),
        (config.attention != "full", "windowed attention"),
        (config.positions == "relative", "relative positions"),
        (config.norm != "layer", "RMS normalisation by name"),
        (not config.bias, "blocks without biases"),
    ):
        if unknown:
            raise UsageError(f"timm's VisionTransformer has no {what}, as this model has.", way_out)
    folded = []
    state = {key: value.detach().clone() for key, value in model.state_dict().items() if key != "mask_token"}
    cls_row = model.positions_for_cls
    if config.positions == "sincos":
        assert model.grid is not None
        layout = model.grid.layout(model.spec.size, device=model.norm.weight.device)
        table = sincos_positions(layout, model.width, widths=config.position_widths).to(model.norm.weight.dtype)
        state["pos_embed"] = table[None]
        folded.append("sine-cosine positions, as a table")
    if cls_row and config.registers:
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
        cls_row = False
        folded.append("the class token's position, added to the token")
    layer_scale = config.layer_scale
    if config.mlp == "swiglu" and layer_scale is None:
        # create_model drops arguments that are None, so that a model made with LayerScale keeps it.
        layer_scale = 1.0
        one = torch.ones(model.width, dtype=model.norm.weight.dtype, device=model.norm.weight.device)
        state |= {f"blocks.{i}.ls{branch}.gamma": one.clone() for i in range(model.depth) for branch in (1, 2)}
        folded.append("LayerScale of 1, which timm's gated model always has")
    equal = config.model_copy(
        update={
            "positions": "none" if config.positions == "none" else "learned",
            "positions_cls": cls_row,
            "position_widths": None,
            "layer_scale": layer_scale,
            "weights": None,
        }
    )
    return TimmLayout(_name(model), _arguments(model, equal, pooling), state, equal, tuple(folded))


def _name(model: VisionTransformer) -> str:
    if model.config.mlp == "swiglu":
        return _SWIGLU_MODEL
    assert model.grid is not None
    (patch, *_), (side, *_) = model.grid.patch_size, model.spec.size
    name = f"{model.config.name}_patch{patch}_{side}"
    return name if timm.is_model(name) else _GELU_MODEL


def _arguments(model: VisionTransformer, config: ModelConfig, pooling: str) -> dict[str, Any]:
    size = config.size
    assert model.grid is not None
    hidden = mlp_hidden(size.width, size.mlp_ratio, config.mlp) * (2 if config.mlp == "swiglu" else 1)
    return {
        "img_size": list(model.spec.size),
        "patch_size": list(model.grid.patch_size),
        "in_chans": model.spec.in_chans,
        "num_classes": 0,
        "global_pool": "avg" if pooling == "mean" else "token",
        "fc_norm": False,
        "embed_dim": size.width,
        "depth": size.depth,
        "num_heads": size.heads,
        # timm truncates ratio * width; half a feature more keeps rounding from losing one.
        "mlp_ratio": (hidden + 0.5) / size.width,
        "qkv_bias": config.qkv_bias,
        "init_values": config.layer_scale,
        "class_token": config.cls_token,
        "reg_tokens": config.registers,
        "pos_embed": "none" if config.positions == "none" else "learn",
        "no_embed_class": not config.positions_cls,
    }


def load_equal(model: VisionTransformer, state: dict[str, Tensor], origin: str) -> list[str]:
    """Load a state dict whose names are this package's; only the mask token may be missing.

    Returns:
        The missing names (which keep their starting values).

    Raises:
        UsageError: naming the first keys or shapes that do not fit.
    """
    own = model.state_dict()
    wrong = [key for key, value in state.items() if key in own and own[key].shape != value.shape]
    if wrong:
        key = wrong[0]
        raise UsageError(f"{origin}: {key} is {tuple(state[key].shape)} where {tuple(own[key].shape)} is needed.")
    missing = [key for key in own if key not in state]
    odd = [key for key in state if key not in own] + [key for key in missing if key != "mask_token"]
    if odd:
        raise UsageError(f"{origin}: does not fit the model: {', '.join(odd[:5])}{', ...' if len(odd) > 5 else ''}.")
    with torch.no_grad():
        model.load_state_dict(state, strict=False)
    return missing
