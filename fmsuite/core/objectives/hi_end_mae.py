"""Hi-End-MAE (Tang et al. 2025, "Hi-End-MAE: Hierarchical encoder-driven masked autoencoders are stronger vision
learners for medical image segmentation")."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from fmsuite.core.backbones.base import Backbone, Features
from fmsuite.core.backbones.cross_attention import CrossAttention
from fmsuite.core.backbones.layers import Attention, Mlp, key_mask_of, layer_norm, mlp_hidden
from fmsuite.core.data.sample import Batch, View
from fmsuite.core.objectives.base import Card, ObjectiveConfig, StepContext, register
from fmsuite.core.objectives.decoders import DecoderConfig, MaskDecoder, init_linear
from fmsuite.core.objectives.mae import EPSILON, masked_mean_error, patch_targets
from fmsuite.core.objectives.reconstruction import Reconstruction, fill_in
from fmsuite.core.objectives.single_view import VIEW, Visible, masked_ids
from fmsuite.core.tokens import PatchGrid, take
from fmsuite.errors import UsageError


class HiEndMAEConfig(DecoderConfig):
    """The options of ``DecoderConfig``, and:

    Attributes:
        mask_ratio: share of tokens that the encoder does not see.
        norm_pix: predict each patch after a layer norm without gain.
        decoder_depth: blocks of self-attention at the decoder's start.
        read_layers: the encoder blocks, counted from 0, whose outputs the blocks after those read, one block for each,
            in this order. If not given, the blocks at 3/4, 1/2 and 1/4 of the encoder's depth: 9, 6 and 3 of 12, as
            published.
    """

    mask_ratio: float = Field(default=0.75, gt=0, lt=1)
    norm_pix: bool = True
    decoder_width: int = Field(default=528, ge=2)
    decoder_depth: int = Field(default=2, ge=0)
    read_layers: tuple[int, ...] | None = Field(default=None, min_length=1)


class ReadingBlock(nn.Module):
    """A pre-norm block of self-attention, cross-attention to a context and an MLP, with the public code's names:
    ``norm0 self_attn norm1 cross_attn norm2 mlp``. The context is read as it is.

    Args:
        width, heads: of both attentions; the context is of the same width.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm0 = layer_norm(width)
        self.self_attn = Attention(width, heads)
        self.norm1 = layer_norm(width)
        self.cross_attn = CrossAttention(width, heads)
        self.norm2 = layer_norm(width)
        self.mlp = Mlp(width, mlp_hidden(width, 4.0, "gelu"))

    def forward(
        self, x: Tensor, context: Tensor, key_mask: Tensor | None = None, context_mask: Tensor | None = None
    ) -> Tensor:
        """(B, M, D) and (B, N, D) to (B, M, D); the masks say which tokens may be read, see ``key_mask_of``."""
        x = x + self.self_attn(self.norm0(x), key_mask=key_mask)
        x = x + self.cross_attn(self.norm1(x), context, key_mask=context_mask)
        return x + self.mlp(self.norm2(x))


def biased_statistics(values: Tensor, weight: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """``mean`` and ``sqrt(var + 1e-6)`` of each patch with the biased variance, as in a layer norm, where MAE takes the
    unbiased one. (B, N, 1) each, of what ``patch_targets`` gives."""
    square = (weight * (values - mean) ** 2).sum(-1, keepdim=True)
    return mean, (square / weight.sum(-1, keepdim=True).clamp(min=1) + EPSILON).sqrt()


def normalised_patches(grid: PatchGrid, view: View, ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(B, N, P) float32 ``(x - mean) / spread`` of each patch's valid values, see ``biased_statistics``; and their
    weight, see ``patch_targets``."""
    with torch.autocast(view.pixels.device.type, enabled=False):
        values, weight, mean, _ = patch_targets(grid, view, ids)
        mean, spread = biased_statistics(values, weight, mean)
        return weight * (values - mean) / spread, weight


@register
class HiEndMAE(MaskDecoder):
    """MAE whose decoder looks from all places at what the encoder made of the visible ones at several depths.

    The decoder's input is MAE's: ``E_0 f_L + p`` at visible tokens, ``m + p`` elsewhere, where f_L is the encoder's
    output, m the mask token and p a fixed position code. It goes through ``decoder_depth`` blocks of self-attention;
    then block j does ``x += self(norm(x)); x += cross(norm(x), E_j f_{l_j}); x += mlp(norm(x))``, where f_l is what
    encoder block l gives before any norm, class token included, and visible tokens are the only keys (section 3.2). The
    deepest is read first. Every E is a linear map of its own. For masked tokens M,
    ``loss = mean_{i in M} mean_v (y_iv - layer_norm(x_i)_v)^2``.

    Raises:
        UsageError: as MAE; for ``read_layers`` that the encoder does not have.
    """

    name: ClassVar[str] = "hi_end_mae"
    Config: ClassVar[type[ObjectiveConfig]] = HiEndMAEConfig
    card: ClassVar[Card] = Card(
        family="pixels",
        paper="Tang et al. 2025, arXiv:2502.08347",
        predicts="pixels of the masked patches, layer-normalised, from three depths of the visible ones",
        masks="75% at random; the encoder never sees them",
        checked="the public modules: what the decoder reads, its output, the loss; loops",
    )
    config: HiEndMAEConfig

    def __init__(self, config: HiEndMAEConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        depth = backbone.depth
        self.read_layers = config.read_layers or (3 * depth // 4, depth // 2, depth // 4)
        unknown = [layer for layer in self.read_layers if not 0 <= layer < depth]
        if unknown:
            raise UsageError(
                f"objective.read_layers names block {unknown[0]}, and the encoder has {depth}, counted from 0.",
                "Choose others, or leave the option out.",
            )
        width = config.decoder_width
        self.reading_embeds = nn.ModuleList(nn.Linear(backbone.width, width) for _ in self.read_layers)
        self.reading_blocks = nn.ModuleList(ReadingBlock(width, config.decoder_heads) for _ in self.read_layers)
        for part in (self.reading_embeds, self.reading_blocks):
            part.apply(init_linear)

    def forward(self, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        view = batch.views[VIEW][0]
        visible = self.encode(view, self.read_layers, norm_layers=False)
        ids, counted = masked_ids(visible.mask)
        return {"loss": self.reconstruction_loss(view, self.decode(visible, ids), counted, ids)}

    def predict(self, view: View) -> tuple[Tensor, Tensor]:
        visible = self.encode(view, self.read_layers, norm_layers=False)
        return self.decode(visible), visible.mask

    @torch.no_grad()
    def reconstruct(self, batch: Batch) -> Reconstruction:
        """With ``norm_pix``, scaled back by the mean and deviation of the patch that was hidden."""
        view = batch.views[VIEW][0]
        prediction, mask = self.predict(view)
        statistics = biased_statistics(*patch_targets(self.grid, view)[:3]) if self.config.norm_pix else None
        return fill_in(self.grid, view, prediction, mask, statistics)

    def contexts(self, features: Features) -> list[Tensor]:
        """What each reading block reads: (B, P + K, decoder_width), class token and registers first."""
        layers = zip(features.intermediate_prefix, features.intermediate, strict=True)
        wholes = [torch.cat([prefix, patches], dim=1) for prefix, patches in layers]
        return [embed(whole) for embed, whole in zip(self.reading_embeds, wholes, strict=True)]

    def decode_tokens(self, visible: Visible, wanted: Tensor | None = None) -> Tensor:
        tokens, key_mask = self.place_tokens(visible)
        for block in self.decoder_blocks:
            tokens = block(tokens, key_mask=key_mask)
        features = visible.features
        contexts = self.contexts(features)
        context_mask = key_mask_of(features.layout.valid, contexts[0].shape[1] - visible.ids.shape[1])
        for block, context in zip(self.reading_blocks, contexts, strict=True):
            tokens = block(tokens, context, key_mask, context_mask)
        tokens = tokens[:, int(features.cls is not None) :]
        return self.decoder_norm(tokens if wanted is None else take(tokens, wanted))

    def reconstruction_loss(self, view: View, prediction: Tensor, mask: Tensor, ids: Tensor | None = None) -> Tensor:
        """The equation in the class's docstring, over the masked tokens of all ranks; see ``MAE``."""
        if self.config.norm_pix:
            target, weight = normalised_patches(self.grid, view, ids)
        else:
            target, weight, _, _ = patch_targets(self.grid, view, ids)
        return masked_mean_error(prediction, target, weight, mask)
