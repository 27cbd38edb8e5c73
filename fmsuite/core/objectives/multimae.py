"""MultiMAE (Bachmann et al. 2022, "MultiMAE: Multi-modal Multi-task Masked Autoencoders") over sensors."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from fmsuite.core.backbones.base import Backbone
from fmsuite.core.backbones.cross_attention import CrossAttention
from fmsuite.core.backbones.layers import Block, Mlp, key_mask_of, layer_norm, mlp_hidden
from fmsuite.core.backbones.positions import as_dated
from fmsuite.core.data.sample import Batch, MaskSampler, View
from fmsuite.core.distributed import mean_over
from fmsuite.core.masking import DirichletMasking
from fmsuite.core.masking.places import check_count
from fmsuite.core.objectives.base import Card, ObjectiveConfig, StepContext, check_heads, register
from fmsuite.core.objectives.decoders import DecoderConfig, decoder_positions, init_linear
from fmsuite.core.objectives.mae import patch_targets, pixel_targets
from fmsuite.core.objectives.masks import MASK_RATIO, pattern_for
from fmsuite.core.objectives.reconstruction import Reconstruction, fill_in
from fmsuite.core.objectives.single_view import VIEW, Visible, VisibleEncoder, masked_ids
from fmsuite.core.tokens import TokenLayout, take
from fmsuite.errors import UsageError


class MultiMAEConfig(DecoderConfig):
    """The options of ``DecoderConfig`` (those of positions for one modality's axes), and:

    Attributes:
        mask_ratio: share of all modalities' tokens that the encoder does not see.
        alpha: concentration of the Dirichlet distribution by which modalities share the visible tokens, see
            ``DirichletMasking``.
        masking: which tokens of one modality are hidden.
        norm_pix: predict each patch normalised by its own mean and variance.
        decoder_depth: of each modality's decoder, blocks of self-attention after the cross-attention.
    """

    mask_ratio: float = Field(default=0.8333, gt=0, lt=1)
    alpha: float = Field(default=1.0, gt=0)
    norm_pix: bool = True
    decoder_width: int = Field(default=256, ge=2)
    decoder_depth: int = Field(default=2, ge=1)
    decoder_heads: int = Field(default=8, ge=1)


class ModalityDecoder(nn.Module):
    """Predicts one modality's patches from all visible tokens (section 3.4 and the public code).

    Encoder tokens f are mapped to ``c = E f``; patches, not the class token, get ``+ p + e_m``, the position code and
    a learned embedding of the token's modality m. Queries are what the modality has: c at its visible tokens, the mask
    token ``+ p + e_m`` at the others. Then ``x = cross(norm(queries), norm(c))`` without a residual,
    ``x += mlp(norm(x))``, and blocks of self-attention.

    Args:
        encoder_width: of the tokens that it reads.
        width, heads, depth: its own.
        modalities: how many there are.
        values: how many it predicts at a token.
    """

    def __init__(self, encoder_width: int, width: int, heads: int, depth: int, modalities: int, values: int) -> None:
        super().__init__()
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.modality_embed = nn.Parameter(torch.zeros(modalities, width))
        self.query_norm, self.context_norm, self.out_norm = (layer_norm(width) for _ in range(3))
        self.cross = CrossAttention(width, heads)
        self.mlp = Mlp(width, mlp_hidden(width, 4.0, "gelu"))
        self.blocks = nn.ModuleList(Block(width, heads, index=number) for number in range(depth))
        self.pred = nn.Linear(width, values)
        self.apply(init_linear)
        nn.init.normal_(self.mask_token, std=0.02)
        nn.init.normal_(self.modality_embed, std=0.02)

    def forward(self, visible: Visible, modality: int, positions: Tensor, wanted: Tensor | None = None) -> Tensor:
        """
        Args:
            visible: what the encoder made of the visible tokens of all modalities.
            modality: number of this one.
            positions: (B or 1, L, width) codes of one modality's places.
            wanted: (B, M) int64, the only places to predict; all L if not given.

        Returns:
            (B, M or L, values).
        """
        features, layout = visible.features, visible.layout
        places = positions.shape[1]
        mine = slice(modality * places, (modality + 1) * places)
        read = self.embed(features.sequence)
        prefix = read.shape[1] - visible.ids.shape[1]
        codes = (positions[:, None] + self.modality_embed[:, None]).flatten(1, 2).to(read.dtype)
        shown = read[:, prefix:] + take(codes.expand(len(read), -1, -1), visible.ids)
        queries = (self.mask_token + codes[:, mine]).expand(len(read), -1, -1).to(read.dtype)
        queries = self._with_own(queries, shown, visible, mine)
        context = torch.cat([read[:, :prefix], shown], dim=1)
        context_mask = key_mask_of(features.layout.valid, prefix)
        x = self.cross(self.query_norm(queries), self.context_norm(context), key_mask=context_mask)
        x = x + self.mlp(self.out_norm(x))
        key_mask = None if layout.valid is None else key_mask_of(layout.valid[:, mine])
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x, key_mask=key_mask)
        x = last(x, key_mask=key_mask) if wanted is None else last(x, key_mask=key_mask, queries=wanted)
        return self.pred(x)

    @staticmethod
    def _with_own(queries: Tensor, shown: Tensor, visible: Visible, mine: slice) -> Tensor:
        """The queries, (B, L, D), with the modality's own visible tokens in their places."""
        places = queries.shape[1]
        own = (visible.ids >= mine.start) & (visible.ids < mine.stop)
        if visible.keep_valid is not None:
            own = own & visible.keep_valid
        # Other tokens are written to a place behind the last, which is cut off.
        target = torch.where(own, visible.ids - mine.start, places)
        padded = functional.pad(queries, (0, 0, 0, 1))
        return padded.scatter(1, target[..., None].expand_as(shown), shown)[:, :places]


@register
class MultiMAE(VisibleEncoder):
    """A masked autoencoder of several modalities: channel groups, such as the bands of two sensors.

    Every modality has a patch embedding of its own, and all visible tokens go through one encoder together. How many of
    them each modality has is drawn anew for every sample (``DirichletMasking``), so that one is often predicted from
    the other alone. A decoder for each modality (``ModalityDecoder``) predicts its masked tokens. With e_i the mean
    squared error of token i over valid values, as in MAE, and M_bm the masked tokens of modality m in sample b,
    ``loss = sum_m mean_{b: M_bm not empty} mean_{i in M_bm} e_i``, as in the public code.

    A modality that a sample does not have consists of invalid tokens: it is neither read nor predicted, the sample does
    not count in its mean, and all visible tokens are the others'.

    Raises:
        UsageError: as ``VisibleEncoder``; for an input without channel groups, or a decoder that does not fit.
    """

    name: ClassVar[str] = "multimae"
    Config: ClassVar[type[ObjectiveConfig]] = MultiMAEConfig
    card: ClassVar[Card] = Card(
        family="pixels",
        paper="Bachmann et al. 2022, arXiv:2204.01678",
        predicts="pixels of every modality's masked patches, from the visible ones of all",
        masks="5 of 6 tokens, shared out among the modalities by a Dirichlet distribution; the encoder never sees them",
        checked="its equations written as loops; moments of the shares; a missing modality",
    )
    config: MultiMAEConfig

    def __init__(self, config: MultiMAEConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        check_heads(config, "decoder")
        decoder_positions(self._places(as_dated(self.whole_layout())), config)
        values = self.grid.element_mask().sum(1).tolist()
        self.names = tuple(name for name, _ in backbone.spec.groups)
        self.decoders = nn.ModuleList(
            ModalityDecoder(
                backbone.width, config.decoder_width, config.decoder_heads, config.decoder_depth, len(values), each
            )
            for each in values
        )

    def make_sampler(self) -> MaskSampler:
        config, grid = self.config, self.grid
        if len(grid.groups) < 2:
            raise UsageError(
                f"Objective '{self.name}' predicts one channel group from another, and this input has a single one.",
                "Put the channels into groups (data.groups), or choose another objective.",
            )
        pattern = pattern_for(self, config, self.size, one_group=True)
        shape = grid.shape(self.size)
        whole = np.ones(math.prod(shape[1:]), dtype=bool)
        check_count(
            config.mask_ratio, len(grid.groups) * pattern.places(grid.token_axes[1:], shape[1:], whole), MASK_RATIO
        )
        return DirichletMasking(config.mask_ratio, config.alpha, pattern)

    def forward(self, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        view = batch.views[VIEW][0]
        visible = self.encode(view)
        positions = self._positions(visible.layout)
        places = positions.shape[1]
        losses = {}
        for number, (name, decoder) in enumerate(zip(self.names, self.decoders, strict=True)):
            mine = slice(number * places, (number + 1) * places)
            ids, counted = masked_ids(visible.mask[:, mine])
            prediction = decoder(visible, number, positions, ids)
            losses[f"loss_{name}"] = self.modality_loss(view, prediction, ids + mine.start, counted)
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    def modality_loss(self, view: View, prediction: Tensor, ids: Tensor, counted: Tensor) -> Tensor:
        """Mean over the samples of all ranks, of those that have one, of the mean error of a modality's masked tokens.

        Args:
            view: normalised pixels.
            prediction: (B, M, V) of the modality's decoder.
            ids: (B, M) int64 numbers of these tokens in the view's layout.
            counted: (B, M) bool.
        """
        with torch.autocast(prediction.device.type, enabled=False):
            target, weight = pixel_targets(self.grid, view, self.config.norm_pix, ids)
            values = prediction.shape[-1]
            square = weight[..., :values] * (prediction.to(torch.float32) - target[..., :values]) ** 2
            error = square.sum(-1) / weight.sum(-1).clamp(min=1)
            number = counted.sum(1)
            return mean_over(torch.where(counted, error, 0.0).sum(1) / number.clamp(min=1), number > 0)

    def predict(self, view: View) -> tuple[Tensor, Tensor]:
        """
        Args:
            view: normalised pixels with a mask.

        Returns:
            (B, N, P) predictions for every token, zero beyond a smaller modality's values, and the (B, N) bool mask
            without invalid tokens.
        """
        visible = self.encode(view)
        positions = self._positions(visible.layout)
        outputs = [decoder(visible, number, positions) for number, decoder in enumerate(self.decoders)]
        width = self.grid.patch_values
        padded = [functional.pad(output, (0, width - output.shape[-1])) for output in outputs]
        return torch.cat(padded, dim=1), visible.mask

    @torch.no_grad()
    def reconstruct(self, batch: Batch) -> Reconstruction:
        """With ``norm_pix``, scaled back by the mean and deviation of the patch that was hidden."""
        view = batch.views[VIEW][0]
        prediction, mask = self.predict(view)
        statistics = patch_targets(self.grid, view)[2:] if self.config.norm_pix else None
        return fill_in(self.grid, view, prediction, mask, statistics)

    def _positions(self, layout: TokenLayout) -> Tensor:
        """(B or 1, L, decoder_width) of one modality's places; all modalities stand at the same."""
        codes = decoder_positions(self._places(layout), self.config)
        return codes if codes.dim() == 3 else codes[None]

    def _places(self, layout: TokenLayout) -> TokenLayout:
        """The tokens of one modality, without the group axis."""
        places = layout.num_tokens // len(self.grid.groups)
        return replace(
            layout,
            axes=layout.axes[1:],
            coords=layout.coords[..., :places, 1:],
            shape=None if layout.shape is None else layout.shape[1:],
            pitch=None if layout.pitch is None else layout.pitch[..., 1:],
            valid=None,
        )
