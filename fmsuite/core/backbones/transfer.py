"""Weights of one backbone as the start of another: another size, fewer channels, other position bookkeeping."""

from __future__ import annotations

import torch
from torch import Tensor

from fmsuite.core.backbones.base import Backbone
from fmsuite.core.backbones.datewise import Datewise
from fmsuite.core.backbones.layers import mlp_hidden
from fmsuite.core.backbones.positions import resample_table
from fmsuite.core.backbones.relative_bias import resample_offsets
from fmsuite.core.backbones.swin_unetr import SwinUNETR, load_swin
from fmsuite.core.backbones.timm_backbone import TimmBackbone
from fmsuite.core.backbones.timm_layout import load_equal
from fmsuite.core.backbones.vit import VisionTransformer
from fmsuite.core.backbones.wavelengths import carry_over
from fmsuite.core.backbones.weights import is_sincos, recognise
from fmsuite.errors import UsageError

_OFFSETS = "rel_pos_bias.relative_position_bias_table"
_SHAPE = ("patch_embedding", "mlp", "norm", "qkv_bias", "bias", "cls_token", "registers")


def transfer(source: Backbone, target: Backbone, origin: str) -> None:
    """Copy weights, in place.

    Between vision transformers, a learned table, of positions or of their differences, is resampled to the target's
    grid; a class token's position is added to the token where the target has no row for it; a stored table that is the
    sine-cosine one serves a target that computes it; kernel slices are picked by channel name (see
    ``encoders.select_channels``), and an embedding from wavelengths takes any bands. Everything else has to be equal. A
    timm transformer can start a ``VisionTransformer``.

    Args:
        origin: the source's name in messages.

    Raises:
        UsageError: naming what does not fit.
    """
    if isinstance(source, Datewise):
        source = source.single
    if isinstance(target, TimmBackbone):
        if not isinstance(source, TimmBackbone) or source.config.name != target.config.name:
            raise UsageError(f"{origin}: cannot start '{target.config.name}'.", "Name weights of the same model.")
        state = _timm_state(source, target, origin)
        target.model.load_state_dict(state)
        return
    if isinstance(target, SwinUNETR):
        if not isinstance(source, SwinUNETR):
            raise UsageError(f"{origin}: cannot start a Swin UNETR.", "Name weights of a Swin UNETR.")
        have, want = source.spec.channel_names, target.spec.channel_names
        if len(have) != len(want):
            raise UsageError(f"{origin}: it has {len(have)} channels, the input {len(want)}.", "Make them equal.")
        load_swin(target, source.state_dict(), origin)
        return
    if not isinstance(target, VisionTransformer):
        raise UsageError(f"{origin}: weights cannot be copied into a {type(target).__name__}.")
    if isinstance(source, TimmBackbone):
        source = _as_vit(source, origin)
    if not isinstance(source, VisionTransformer):
        raise UsageError(f"{origin}: a {type(source).__name__} cannot start a vision transformer.")
    _check_shape(source, target, origin)
    state = source.state_dict()
    _positions(state, source, target, origin)
    if target.grid is not None:
        _channels(state, source, target, origin)
    load_equal(target, state, origin)


def _widths(model: VisionTransformer) -> tuple[int, int, int, int]:
    size = model.config.size
    return size.width, size.depth, size.heads, mlp_hidden(size.width, size.mlp_ratio, model.config.mlp)


def _check_shape(source: VisionTransformer, target: VisionTransformer, origin: str) -> None:
    pairs: list[tuple[str, object, object]] = [("shape (width, depth, heads, MLP)", _widths(source), _widths(target))]
    pairs += [(key, getattr(source.config, key), getattr(target.config, key)) for key in _SHAPE]
    pairs.append(("layer_scale", source.config.layer_scale is not None, target.config.layer_scale is not None))
    pairs.append(("axes", source.spec.axes, target.spec.axes))
    if source.grid is not None and target.grid is not None:
        pairs.append(("patch_size", source.grid.patch_size, target.grid.patch_size))
    for key, old, new in pairs:
        if old != new:
            raise UsageError(f"{origin}: its {key} is {old}, the model's is {new}.", "Change the model section to fit.")


def _positions(state: dict[str, Tensor], source: VisionTransformer, target: VisionTransformer, origin: str) -> None:
    kinds = source.config.positions, target.config.positions
    if kinds == ("learned", "sincos") and source.pos_embed is not None and source.config.position_units == "index":
        if is_sincos(source.pos_embed.detach(), source.config, source.spec):
            del state["pos_embed"]
            return
        raise UsageError(f"{origin}: its position table is not the sine-cosine one.", "Set model.positions to learned.")
    if kinds[0] != kinds[1]:
        raise UsageError(f"{origin}: its positions are {kinds[0]}, the model's are {kinds[1]}.", "Make them equal.")
    if not source.config.learned and kinds[0] != "relative":
        return
    assert source.grid is not None
    assert target.grid is not None
    old, new = source.grid.shape(source.spec.size), target.grid.shape(target.spec.size)
    if kinds[0] == "relative":
        state[_OFFSETS] = resample_offsets(state[_OFFSETS], old, new, target.grid.token_axes)
        return
    table = state["pos_embed"]
    first = int(source.positions_for_cls)
    row, table = table[:, :first], table[:, first:]
    table = resample_table(table, old, new, target.grid.token_axes)
    if target.positions_for_cls:
        row = row if first else torch.zeros_like(table[:, :1])
        table = torch.cat([row, table], dim=1)
    elif first:
        state["cls_token"] = state["cls_token"] + row
    state["pos_embed"] = table


def _channels(state: dict[str, Tensor], source: VisionTransformer, target: VisionTransformer, origin: str) -> None:
    have, want = source.spec.channel_names, target.spec.channel_names
    if target.config.patch_embedding == "wavelength":
        carry_over(state, source.spec, target.spec, origin)
        return
    if have == want and source.spec.groups == target.spec.groups:
        return
    missing = [name for name in want if name not in have]
    if missing or len(source.spec.groups) > 1 or len(target.spec.groups) > 1:
        reason = f"it has no channel {', '.join(missing)}" if missing else "channels are grouped differently"
        raise UsageError(f"{origin}: {reason}.", f"Its channels: {', '.join(have)}.")
    picked = [have.index(name) for name in want]
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"][:, picked] * (len(have) / len(want))


def _as_vit(source: TimmBackbone, origin: str) -> VisionTransformer:
    """A timm transformer as ours, if it is a plain one."""
    heads = getattr(source.model.blocks[0].attn, "num_heads", None) if hasattr(source.model, "blocks") else None
    found = recognise(source.model.state_dict(), origin, heads=heads, spec=source.spec)
    model = VisionTransformer(found.config, found.spec)
    load_equal(model, found.state, origin)
    return model


def _timm_state(source: TimmBackbone, target: TimmBackbone, origin: str) -> dict[str, Tensor]:
    state, own = source.model.state_dict(), target.model.state_dict()
    grids = [tuple(s // p for s, p in zip(b.spec.size, b.grid.patch_size)) for b in (source, target) if b.grid]
    table = state.get("pos_embed")
    if table is not None and table.dim() == 3 and table.shape != own["pos_embed"].shape:
        special = table.shape[1] - grids[0][0] * grids[0][1]
        patches = resample_table(table[:, special:], grids[0], grids[1], ("y", "x"))
        state["pos_embed"] = torch.cat([table[:, :special], patches], dim=1)
    wrong = [key for key, value in own.items() if key not in state or state[key].shape != value.shape]
    if wrong:
        raise UsageError(f"{origin}: does not fit '{target.config.name}' for this input: {', '.join(wrong[:5])}.")
    return state
