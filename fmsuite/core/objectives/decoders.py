"""MAE's decoder of hidden tokens (He et al. 2021, section 3), from what the encoder makes of the visible ones."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fmsuite.core.backbones.base import Backbone
from fmsuite.core.backbones.layers import Block, key_mask_of, layer_norm
from fmsuite.core.backbones.positions import TimeEncoding, as_dated, sincos_positions
from fmsuite.core.data.sample import View
from fmsuite.core.objectives.base import check_heads
from fmsuite.core.objectives.group_heads import group_heads, groups_of, project
from fmsuite.core.objectives.single_view import MaskedView, MaskedViewConfig, Visible, VisibleEncoder
from fmsuite.core.tokens import TokenLayout


class DecoderConfig(MaskedViewConfig):
    """The options of ``MaskedViewConfig``, and:

    Attributes:
        decoder_width, decoder_depth, decoder_heads: the decoder, which is thrown away after training.
        decoder_position_units, decoder_position_scale, decoder_position_widths, decoder_time_encoding: as the model's
            options of these names.
    """

    decoder_width: int = Field(default=512, ge=2)
    decoder_depth: int = Field(default=8, ge=1)
    decoder_heads: int = Field(default=16, ge=1)
    decoder_position_units: Literal["index", "physical"] = "index"
    decoder_position_scale: float = Field(default=1.0, gt=0)
    decoder_position_widths: dict[str, int] | None = None
    decoder_time_encoding: TimeEncoding = "days"


def check_decoder(objective: MaskedView, config: DecoderConfig) -> None:
    """Refuse, in the constructor and not in the first step, a decoder that does not fit.

    Raises:
        UsageError: for heads that do not divide the width, positions that do not fit the axes, or an unknown spacing
            where positions are physical.
    """
    check_heads(config, "decoder")
    decoder_positions(as_dated(objective.whole_layout()), config)


def decoder_positions(layout: TokenLayout, config: DecoderConfig) -> Tensor:
    """(N, D) or (B, N, D) float32 fixed sine-cosine code of the decoder's tokens."""
    return sincos_positions(
        layout,
        config.decoder_width,
        physical=config.decoder_position_units == "physical",
        scale=config.decoder_position_scale,
        widths=config.decoder_position_widths,
        time=config.decoder_time_encoding,
        options="objective.decoder_",
    )


def init_linear(module: nn.Module) -> None:
    """Xavier uniform, as MAE initialises its linear layers (appendix A.1). For ``module.apply``."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class MaskDecoder(VisibleEncoder):
    """Base of the objectives with MAE's decoder: features of the visible tokens, and a learned mask token in each other
    place, go through self-attention blocks at a width of their own.

    Parameters ``decoder_embed mask_token decoder_blocks decoder_norm decoder_pred``, the names of the public MAE code.
    Positions are fixed sine-cosine codes of the layout, zero for the class token unless a subclass sets ``cls_code``. A
    subclass that predicts something other than pixels says in ``outputs`` how many values each channel group's head
    has.

    Raises:
        UsageError: as ``VisibleEncoder`` and ``check_decoder``.
    """

    config: DecoderConfig
    cls_code: Tensor | None
    """(decoder_width,) position code of the class token; ``None`` is zero."""

    def __init__(self, config: DecoderConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        check_decoder(self, config)
        self.register_buffer("cls_code", None, persistent=False)
        width, heads = config.decoder_width, config.decoder_heads
        self.decoder_embed = nn.Linear(backbone.width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_blocks = nn.ModuleList(Block(width, heads, index=i) for i in range(config.decoder_depth))
        self.decoder_norm = layer_norm(width)
        self.decoder_pred = group_heads(width, self.outputs())
        for part in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            part.apply(init_linear)
        nn.init.normal_(self.mask_token, std=0.02)

    def outputs(self) -> list[int]:
        """How many values each channel group's head predicts at a token; by default those of a patch."""
        return self.grid.element_mask().sum(1).tolist()

    def predict(self, view: View) -> tuple[Tensor, Tensor]:
        """
        Args:
            view: normalised pixels with a mask.

        Returns:
            (B, N, P) predictions for every token and the (B, N) bool mask without invalid tokens.
        """
        visible = self.encode(view)
        return self.decode(visible), visible.mask

    def decode(self, visible: Visible, wanted: Tensor | None = None) -> Tensor:
        """(B, N, P) predictions from the features of the visible tokens.

        Args:
            visible: what the encoder made of them.
            wanted: (B, M) int64, the only tokens to predict, (B, M, P): the last block's queries and MLP, the norm and
                the heads are then computed for these alone.
        """
        tokens = self.decode_tokens(visible, wanted)
        groups = None if wanted is None else groups_of(self.decoder_pred, wanted, visible.layout.num_tokens)
        return project(self.decoder_pred, tokens, groups)

    def decode_tokens(self, visible: Visible, wanted: Tensor | None = None) -> Tensor:
        """(B, N or M, decoder_width) tokens before the prediction heads; see ``decode``."""
        tokens, key_mask = self.place_tokens(visible)
        prefix = int(visible.features.cls is not None)
        *blocks, last = self.decoder_blocks
        for block in blocks:
            tokens = block(tokens, key_mask=key_mask)
        if wanted is not None:
            return self.decoder_norm(last(tokens, key_mask=key_mask, queries=wanted + prefix))
        return self.decoder_norm(last(tokens, key_mask=key_mask))[:, prefix:]

    def place_tokens(self, visible: Visible) -> tuple[Tensor, Tensor | None]:
        """What goes into the decoder's first block: (B, S, decoder_width), the class token first if there is one, then
        all N tokens in the order of the layout; and which of them attention may read, see ``key_mask_of``."""
        features, ids, keep_valid, layout = visible.features, visible.ids, visible.keep_valid, visible.layout
        prefix = 0 if features.cls is None else 1
        # One product for the class token and the patches; registers are left behind.
        read = features.patches if features.cls is None else torch.cat([features.cls[:, None], features.patches], dim=1)
        embedded = self.decoder_embed(read)
        shown = embedded[:, prefix:]
        hidden = self.mask_token.to(shown.dtype)
        if keep_valid is not None:
            shown = torch.where(keep_valid[..., None], shown, hidden)
        tokens = hidden.expand(len(shown), layout.num_tokens, -1)
        tokens = tokens.scatter(1, ids[..., None].expand_as(shown), shown)
        tokens = tokens + self._positions(layout).to(tokens.dtype)
        if prefix:
            first = embedded[:, :1]
            if self.cls_code is not None:
                first = first + self.cls_code.to(first.dtype)
            tokens = torch.cat([first, tokens], dim=1)
        return tokens, key_mask_of(layout.valid, prefix)

    def _positions(self, layout: TokenLayout) -> Tensor:
        return decoder_positions(layout, self.config)
