"""CrossMAE (Fu et al. 2024, "Rethinking Patch Dependence for Masked Autoencoders")."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from fmsuite.core.backbones.base import Backbone
from fmsuite.core.backbones.cross_attention import CrossBlock
from fmsuite.core.backbones.layers import key_mask_of, layer_norm
from fmsuite.core.data.sample import Batch, View
from fmsuite.core.objectives.base import Card, ObjectiveConfig, StepContext, register
from fmsuite.core.objectives.decoders import DecoderConfig, check_decoder, decoder_positions, init_linear
from fmsuite.core.objectives.group_heads import group_heads, groups_of, project
from fmsuite.core.objectives.mae import masked_mean_error, patch_targets, pixel_targets
from fmsuite.core.objectives.reconstruction import Reconstruction, fill_in
from fmsuite.core.objectives.single_view import VIEW, Visible, VisibleEncoder, masked_ids
from fmsuite.core.seeding import uniform_from_keys
from fmsuite.core.tokens import take
from fmsuite.errors import UsageError

_STRIDE = 0x9E3779B97F4A7C15 - (1 << 64)
"""The golden ratio of 64 bits: keeps the keys of one sample's tokens apart from those of other samples."""


class CrossMAEConfig(DecoderConfig):
    """The options of ``DecoderConfig``, and:

    Attributes:
        mask_ratio: share of tokens that the encoder does not see.
        prediction_ratio: share of all tokens (not of the masked ones) that is predicted, drawn among the masked: 0.25
            of all are a third of the masked 0.75. Equal to ``mask_ratio``, all masked tokens are predicted.
        norm_pix: predict each patch normalised by its own mean and variance.
        mix_depths: every decoder block reads its own learned sum of the outputs of all encoder blocks; otherwise all of
            them read the encoder's output.
        mix_input: count the first encoder block's input among them.
    """

    mask_ratio: float = Field(default=0.75, gt=0, lt=1)
    prediction_ratio: float = Field(default=0.25, gt=0, lt=1)
    norm_pix: bool = True
    decoder_depth: int = Field(default=12, ge=1)
    mix_depths: bool = True
    mix_input: bool = True


def draw_predicted(mask: Tensor, share: float, keys: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A random subset of each sample's masked tokens (Fu et al. 2024, section 3.3).

    Args:
        mask: (B, N) bool.
        share: of the masked tokens, rounded to whole tokens, and at least one where there is one.
        keys: (B,) int64, a number for each sample and draw, on which the choice then depends alone; ``None`` draws from
            PyTorch's generator.

    Returns:
        ids: (B, Q) int64, Q the largest number of a sample; no number appears twice in a row.
        chosen: (B, Q) bool, False at the filling of shorter rows.
    """
    if keys is None:
        noise = torch.rand(mask.shape, device=mask.device)
    else:
        places = torch.arange(mask.shape[1], device=keys.device)
        noise = uniform_from_keys(keys[:, None] + places * _STRIDE, salt=0).to(mask.device, non_blocking=True)
    masked = mask.sum(1)
    count = torch.minimum((masked * share).round().clamp(min=1).long(), masked)
    length = max(1, int(count.max()))
    ids = noise.masked_fill(~mask, torch.inf).argsort(1)[:, :length]
    return ids, torch.arange(length, device=mask.device) < count[:, None]


def mix(maps: Tensor, weights: Tensor) -> Tensor:
    """What decoder blocks read: ``sum_k w_jk f_k`` (Fu et al. 2024, section 3.4, "Inter-block attention").

    Args:
        maps: (K, B, S, D) feature maps f of K encoder depths.
        weights: (J, K), for J blocks; or (K,) for one.

    Returns:
        (J, B, S, D), or (B, S, D) for one.
    """
    return torch.tensordot(weights.to(maps.dtype), maps, dims=1)


class _Depths:
    """Keeps what goes into the first of some blocks and what comes out of each, whole sequences, while it is open."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        self.blocks = blocks
        self.maps: list[Tensor] = []

    def __enter__(self) -> _Depths:
        self._open = ExitStack()
        self._open.enter_context(self.blocks[0].register_forward_pre_hook(self._before))
        for block in self.blocks:
            self._open.enter_context(block.register_forward_hook(self._after))
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def _before(self, block: nn.Module, arguments: tuple[Any, ...]) -> None:
        self.maps.append(arguments[0])

    def _after(self, block: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        self.maps.append(output)


@register
class CrossMAE(VisibleEncoder):
    """MAE whose decoder only looks from some of the masked tokens at the visible ones.

    A query is the mask token plus the position of a masked token; each of the decoder's blocks is cross-attention to
    the encoder's tokens (class token and registers included) and an MLP. Queries do not see each other, so only a
    random share gamma of all tokens need be predicted (section 3.3), and a prediction does not depend on the rest.
    Block j reads ``norm_j(sum_k w_jk f_k)`` over the outputs f of the encoder's blocks and the first one's input, with
    learned w, normal with variance 1/K at the start (section 3.4). Target and loss are MAE's, over what is predicted.

    With ``mix_depths`` nothing reads the encoder's final norm, and it stays as it is, as in the public code.

    Raises:
        UsageError: as MAE; for a prediction ratio above the mask ratio, or a backbone without blocks to read.
    """

    name: ClassVar[str] = "crossmae"
    Config: ClassVar[type[ObjectiveConfig]] = CrossMAEConfig
    card: ClassVar[Card] = Card(
        family="pixels",
        paper="Fu et al. 2024, arXiv:2401.14391",
        predicts="pixels of a third of the masked patches, each on its own, from all depths of the visible ones",
        masks="75% at random; the encoder never sees them",
        checked="the public modules, transcribed: loss, prediction, every gradient; loops",
    )
    config: CrossMAEConfig

    def __init__(self, config: CrossMAEConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        check_decoder(self, config)
        if config.prediction_ratio > config.mask_ratio:
            raise UsageError(
                f"objective.prediction_ratio {config.prediction_ratio} is a share of all tokens, and only "
                f"objective.mask_ratio {config.mask_ratio} of them are masked.",
                "Lower the prediction ratio, or mask more.",
            )
        if not config.mix_depths and "mix_input" in config.model_fields_set:
            raise UsageError("objective.mix_input has no effect without objective.mix_depths.", "Leave it out.")
        width, depth = config.decoder_width, config.decoder_depth
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_blocks = nn.ModuleList(
            CrossBlock(width, config.decoder_heads, backbone.width) for _ in range(depth)
        )
        self.decoder_norm = layer_norm(width)
        self.decoder_pred = group_heads(width, self.grid.element_mask().sum(1).tolist())
        for part in (self.decoder_blocks, self.decoder_pred):
            part.apply(init_linear)
        nn.init.normal_(self.mask_token, std=0.02)
        self.mixing: nn.Parameter | None = None
        self.context_norms = nn.ModuleList()
        if config.mix_depths:
            depths = len(self._blocks()) + int(config.mix_input)
            self.mixing = nn.Parameter(torch.randn(depth, depths) * depths**-0.5)
            self.context_norms.extend(layer_norm(backbone.width) for _ in range(depth))
            for parameter, tensor in backbone.named_parameters():
                if backbone.layer_of(parameter) == backbone.depth + 1:
                    tensor.requires_grad_(False)

    def _blocks(self) -> nn.ModuleList:
        blocks = getattr(self.backbone, "blocks", None)
        if not isinstance(blocks, nn.ModuleList):
            raise UsageError(
                f"Objective 'crossmae' reads every block of the encoder; {type(self.backbone).__name__} has no "
                "list of them.",
                "Set objective.mix_depths=false.",
            )
        return blocks

    def forward(self, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        view = batch.views[VIEW][0]
        visible, maps = self.encode_depths(view)
        share = self.config.prediction_ratio / self.config.mask_ratio
        ids, chosen = draw_predicted(visible.mask, share, view.keys)
        prediction = self.decode(visible, maps, ids)
        return {"loss": self.reconstruction_loss(view, prediction, ids, chosen)}

    @torch.no_grad()
    def reconstruct(self, batch: Batch) -> Reconstruction:
        """Of all masked tokens: a prediction does not depend on which others are asked for. With ``norm_pix``, scaled
        back by the mean and deviation of the patch that was hidden."""
        view = batch.views[VIEW][0]
        visible, maps = self.encode_depths(view)
        ids, counted = masked_ids(visible.mask)
        asked = self.decode(visible, maps, ids).to(torch.float32) * counted[..., None]
        prediction = asked.new_zeros(*visible.mask.shape, asked.shape[-1])
        prediction.scatter_(1, ids[..., None].expand_as(asked), asked)
        statistics = patch_targets(self.grid, view)[2:] if self.config.norm_pix else None
        return fill_in(self.grid, view, prediction, visible.mask, statistics)

    def encode_depths(self, view: View) -> tuple[Visible, Tensor]:
        """The encoder's features, and (K, B, S, D) what the decoder's blocks can read: with ``mix_depths`` the sequence
        (class token, registers, visible patches) at K depths, otherwise the output alone (K = 1)."""
        if self.mixing is None:
            visible = self.encode(view)
            return visible, visible.features.sequence[None]
        with _Depths(self._blocks()) as depths:
            visible = self.encode(view)
        maps = depths.maps if self.config.mix_input else depths.maps[1:]
        if len(maps) != self.mixing.shape[1]:
            raise RuntimeError(f"read {len(maps)} depths of the encoder instead of {self.mixing.shape[1]}")
        return visible, torch.stack(maps)

    def decode(self, visible: Visible, maps: Tensor, ids: Tensor) -> Tensor:
        """(B, Q, P) predictions of some tokens.

        Args:
            visible, maps: see ``encode_depths``.
            ids: (B, Q) numbers of the tokens.
        """
        layout = visible.layout
        positions = decoder_positions(layout, self.config).expand(len(ids), -1, -1)
        tokens = self.mask_token + take(positions, ids).to(self.mask_token.dtype)
        key_mask = key_mask_of(visible.features.layout.valid, maps.shape[2] - visible.ids.shape[1])
        if self.mixing is None:
            reads = [maps[0]] * len(self.decoder_blocks)
        else:
            # All mixtures in one product: one by one, each would go through all maps again, and so would its gradient.
            mixed = mix(maps, self.mixing)
            reads = [norm(each) for norm, each in zip(self.context_norms, mixed, strict=True)]
        for block, read in zip(self.decoder_blocks, reads, strict=True):
            tokens = block(tokens, read, key_mask=key_mask)
        groups = groups_of(self.decoder_pred, ids, layout.num_tokens)
        return project(self.decoder_pred, self.decoder_norm(tokens), groups)

    def reconstruction_loss(self, view: View, prediction: Tensor, ids: Tensor, chosen: Tensor) -> Tensor:
        """MAE's loss over the predicted tokens of all ranks.

        Args:
            view: normalised pixels.
            prediction: (B, Q, P).
            ids, chosen: see ``draw_predicted``.
        """
        target, weight = pixel_targets(self.grid, view, self.config.norm_pix, ids)
        return masked_mean_error(prediction, target, weight, chosen)
