"""The predictor of features at places that the encoder has not seen (Assran et al. 2023, section 3)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fmsuite.core.backbones.base import Features
from fmsuite.core.backbones.layers import Block, init_transformer, key_mask_of, layer_norm, rescale_by_depth
from fmsuite.core.backbones.positions import TimeEncoding, as_dated, sincos_positions
from fmsuite.core.objectives.base import ObjectiveConfig, check_heads
from fmsuite.core.objectives.stochastic_positions import stochastic_positions
from fmsuite.core.tokens import TokenLayout, take


class PredictorConfig(ObjectiveConfig):
    """
    Attributes:
        predictor_width, predictor_depth, predictor_heads: the predictor, which is thrown away after training. The
            publications give it as many heads as the encoder has.
        predictor_position_units, predictor_position_scale, predictor_position_widths, predictor_time_encoding: as the
            model's options of these names.
        stochastic_positions: variance of the noise from which the positions of masked tokens are drawn (Bar et al.
            2024); 0 leaves them where they are.
    """

    predictor_width: int = Field(default=384, ge=2)
    predictor_depth: int = Field(default=12, ge=1)
    predictor_heads: int = Field(default=12, ge=1)
    predictor_position_units: Literal["index", "physical"] = "index"
    predictor_position_scale: float = Field(default=1.0, gt=0)
    predictor_position_widths: dict[str, int] | None = None
    predictor_time_encoding: TimeEncoding = "days"
    stochastic_positions: float = Field(default=0.0, ge=0)


class Predictor(nn.Module):
    """Context tokens and mask tokens at the targets' positions, through transformer blocks together.

    With context features s_i, position codes p and a learned mask token m, the blocks see
    ``W s_i + b + p_i`` for every context token i and ``m + p_j`` for every token j of one target; what they make of the
    latter is normalised and projected to the encoder's width. Targets of one context never see each other.

    Weights start as a truncated normal of standard deviation 0.02; those of ``attn.proj`` and ``mlp.fc2`` of block
    l = 1, 2, ... are divided by sqrt(2 l).

    Args:
        encoder_width: D.
        config: its shape.
        layout: of a whole view, to refuse positions that do not fit it.
        masks: number of mask tokens, where there are several kinds of masks.

    Raises:
        UsageError: for heads that do not divide the width, or positions that do not fit.
    """

    def __init__(self, encoder_width: int, config: PredictorConfig, layout: TokenLayout, masks: int = 1) -> None:
        super().__init__()
        check_heads(config, "predictor")
        width, heads = config.predictor_width, config.predictor_heads
        self.config = config
        self._positions(as_dated(layout))
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(masks, 1, width))
        self.blocks = nn.ModuleList(Block(width, heads, index=number) for number in range(config.predictor_depth))
        self.norm = layer_norm(width)
        self.proj = nn.Linear(width, encoder_width)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        self.apply(init_transformer)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        rescale_by_depth(self.blocks)

    def forward(
        self,
        context: Features,
        layout: TokenLayout,
        targets: Tensor,
        targets_valid: Tensor | None = None,
        mask: int = 0,
    ) -> Tensor:
        """
        Args:
            context: of the encoder on a subset of tokens, (B, K, D); padding is marked in ``context.layout.valid``.
            layout: of all N tokens.
            targets: (B, T, J) int64, the tokens of T targets.
            targets_valid: (B, T, J) bool, False at padding.
            mask: which mask token.

        Returns:
            (B, T, J, D) predictions; of no meaning at padding.
        """
        count, each = targets.shape[1:]
        shown = self.embed(context.patches)
        shown = shown + self._positions(context.layout).to(shown.dtype)
        places = self._positions(layout).expand(len(targets), -1, -1)
        places = take(places, targets.flatten(1))
        if self.training:
            places = stochastic_positions(places, self.embed.weight, self.config.stochastic_positions)
        hidden = (self.mask_token[mask] + places).to(shown.dtype).unflatten(1, (count, each)).flatten(0, 1)
        tokens = torch.cat([shown.repeat_interleave(count, dim=0), hidden], dim=1)
        keys = self._keys(context, targets_valid, targets.shape)
        for block in self.blocks:
            tokens = block(tokens, key_mask=keys)
        return self.proj(self.norm(tokens[:, -each:])).unflatten(0, (-1, count))

    def _keys(self, context: Features, targets_valid: Tensor | None, shape: torch.Size) -> Tensor | None:
        """(B * T, K + J) bool, or ``None`` if every token may be attended to."""
        shown = context.layout.valid
        if shown is None and targets_valid is None:
            return None
        device = context.patches.device
        if shown is None:
            shown = torch.ones(context.patches.shape[:2], dtype=torch.bool, device=device)
        if targets_valid is None:
            targets_valid = torch.ones(shape, dtype=torch.bool, device=device)
        keys = torch.cat([shown.repeat_interleave(shape[1], dim=0), targets_valid.flatten(0, 1)], dim=1)
        return key_mask_of(keys)

    def _positions(self, layout: TokenLayout) -> Tensor:
        return sincos_positions(
            layout,
            self.config.predictor_width,
            physical=self.config.predictor_position_units == "physical",
            scale=self.config.predictor_position_scale,
            widths=self.config.predictor_position_widths,
            time=self.config.predictor_time_encoding,
            options="objective.predictor_",
        )
