"""What SatMAE (Cong et al. 2022, "SatMAE: Pre-training Transformers for Temporal and Multi-Spectral Satellite Imagery")
has beside MAE's tokens of channel groups: see the options of ``GroupOptions``."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from fmsuite.core.backbones.positions import axis_widths, sincos_positions
from fmsuite.core.objectives.decoders import DecoderConfig
from fmsuite.core.tokens import PatchGrid, TokenLayout
from fmsuite.errors import UsageError


class GroupOptions(DecoderConfig):
    """The options of ``DecoderConfig``, and those that only tokens of channel groups have:

    Attributes:
        norm_over: with ``norm_pix``, whose mean and variance normalise a patch: its own token's, or those of all
            channels at its ``place`` together, as in SatMAE's public code.
        decoder_cls_group: the decoder's class token has the position code of a channel group of its own, after the
            others, as in SatMAE's public code; otherwise zero.
        reference_channels: compare predictions with channels as SatMAE's public code does, which numbers the heads'
            outputs one head after the other and the channels as they stand in the array. Unless the groups follow each
            other in the array, some outputs are then compared with channels of other groups. Only for comparisons with
            that code.
    """

    norm_over: Literal["token", "place"] = "token"
    decoder_cls_group: bool = False
    reference_channels: bool = False


def check_groups(config: GroupOptions, grid: PatchGrid, norm_pix: bool, has_cls: bool) -> None:
    """
    Raises:
        UsageError: for an option that would have no effect on this input.
    """
    asked = {
        "norm_over=place": config.norm_over == "place",
        "decoder_cls_group": config.decoder_cls_group,
        "reference_channels": config.reference_channels,
    }
    for option, wanted in asked.items():
        if wanted and len(grid.groups) == 1:
            raise UsageError(
                f"objective.{option} has no effect on tokens of a single channel group.",
                "Remove it, or put the channels into groups.",
            )
    if config.norm_over == "place" and not norm_pix:
        raise UsageError("objective.norm_over=place has no effect without norm_pix.", "Remove it, or set norm_pix.")
    if config.decoder_cls_group and not has_cls:
        raise UsageError(
            "objective.decoder_cls_group has no effect on a backbone without a class token.",
            "Remove it, or set model.cls_token.",
        )


def cls_group_code(grid: PatchGrid, config: DecoderConfig) -> Tensor:
    """(decoder_width,) float32 sine-cosine code of the channel group after the last; zero along all other axes."""
    shares = axis_widths(grid.token_axes, config.decoder_width, config.decoder_position_widths, "objective.decoder_")
    own = shares[grid.group_axis]
    after = TokenLayout((grid.group_axis,), torch.tensor([[float(len(grid.groups))]]))
    # Groups are the first axis, and the code begins with the last.
    before = sum(shares.values()) - own
    return functional.pad(sincos_positions(after, own)[0], (before, config.decoder_width - before - own))


def misplaced_channels(grid: PatchGrid, prediction: Tensor) -> Tensor:
    """Predictions in the places where SatMAE's public code reads them; see ``GroupOptions.reference_channels``.

    Args:
        prediction: (B, N, P) of all tokens, from each group's own head.

    Returns:
        (B, N, P): what is compared with channel c is the c-th of all heads' outputs, in the order of the groups.
    """
    pixels = torch.Size(grid.patch_size).numel()
    heads = prediction.unflatten(1, (len(grid.groups), -1)).unbind(1)
    outputs = [
        head[..., : pixels * len(members)].unflatten(-1, (pixels, len(members)))
        for head, members in zip(heads, grid.groups, strict=True)
    ]
    numbered = torch.cat(outputs, dim=-1)
    parts = [numbered[..., list(members)].flatten(2) for members in grid.groups]
    return torch.cat([functional.pad(part, (0, prediction.shape[-1] - part.shape[-1])) for part in parts], dim=1)
