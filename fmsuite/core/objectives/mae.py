"""Masked autoencoders (He et al. 2021, "Masked Autoencoders Are Scalable Vision Learners") over any token layout; with
3D patches those of volumes and series (Feichtenhofer et al. 2022, "Masked Autoencoders As Spatiotemporal Learners")."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fmsuite.core.backbones.base import Backbone
from fmsuite.core.data.sample import Batch, View
from fmsuite.core.distributed import mean_over
from fmsuite.core.objectives.base import Card, ObjectiveConfig, StepContext, register
from fmsuite.core.objectives.decoders import MaskDecoder
from fmsuite.core.objectives.reconstruction import Reconstruction, fill_in
from fmsuite.core.objectives.satmae import (
    GroupOptions,
    check_groups,
    cls_group_code,
    misplaced_channels,
)
from fmsuite.core.objectives.single_view import VIEW, Visible, masked_ids
from fmsuite.core.tokens import PatchGrid, take

EPSILON = 1e-6


class MAEConfig(GroupOptions):
    """The options of ``GroupOptions``, and:

    Attributes:
        mask_ratio: share of tokens that the encoder does not see: 0.75 of an image, 0.9 of a volume or a series.
        norm_pix: predict each patch normalised by its own mean and variance.
    """

    mask_ratio: float = Field(default=0.75, gt=0, lt=1)
    norm_pix: bool = True


def patch_targets(grid: PatchGrid, view: View, ids: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What masked patches are compared with, over their valid values only (He et al. 2021, section 3).

    Args:
        grid: cuts the view into N patches of up to P values.
        view: normalised pixels.
        ids: (B, M) int64, the only patches that are wanted; N is then M.

    Returns:
        values: (B, N, P) float32, zero where not counted.
        weight: (B, N, P) float32, 1 at values that exist and are valid, else 0.
        mean, spread: (B, N, 1) float32, mean and ``sqrt(variance + 1e-6)`` (unbiased) of each patch's counted values.
    """
    pixels = grid.patchify(view.pixels.to(torch.float32))
    exists = grid.element_mask(pixels.device)
    counted = exists.repeat_interleave(pixels.shape[1] // len(exists), dim=0).expand_as(pixels)
    if view.valid is not None:
        full = view.valid.expand(-1, view.pixels.shape[1], *view.pixels.shape[2:])
        counted = counted & (grid.patchify(full.to(torch.float32)) > 0)
    if ids is not None:
        pixels, counted = take(pixels, ids), take(counted, ids)
    pixels = torch.where(counted, pixels, 0.0)
    weight = counted.to(torch.float32)
    return pixels, weight, *patch_statistics(pixels, weight)


def patch_statistics(values: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and ``sqrt(variance + 1e-6)`` (unbiased) of the counted values along the last axis, which stays with length
    one.

    Args:
        values: float32, zero where not counted.
        weight: of the same shape, 1 at values that count, else 0.
    """
    number = weight.sum(-1, keepdim=True)
    mean = values.sum(-1, keepdim=True) / number.clamp(min=1)
    square = (weight * (values - mean) ** 2).sum(-1, keepdim=True)
    return mean, (square / (number - 1).clamp(min=1) + EPSILON).sqrt()


def place_statistics(grid: PatchGrid, values: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """``patch_statistics`` over all channel groups at each place together.

    Args:
        values, weight: (B, N, P) of all tokens, see ``patch_targets``.

    Returns:
        (B, N, 1) float32 each, equal for all tokens of a place.
    """
    groups = len(grid.groups)
    places = [part.unflatten(1, (groups, -1)).transpose(1, 2).flatten(2) for part in (values, weight)]
    mean, spread = (part.repeat(1, groups, 1) for part in patch_statistics(*places))
    return mean, spread


def masked_mean_error(prediction: Tensor, target: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """Mean over the masked tokens of all ranks of each token's mean squared error (He et al. 2021, section 3).

    ``loss = mean_{i in M} sum_v w_iv (y_iv - t_iv)^2 / sum_v w_iv``.

    Args:
        prediction, target: (B, M, P), y and t.
        weight: (B, M, P) float32, w: 1 at values that count, else 0.
        mask: (B, M) bool, tokens that count.

    Returns:
        A float32 scalar; its mean over ranks is the loss of the global batch.
    """
    with torch.autocast(prediction.device.type, enabled=False):
        square = weight * (prediction.to(torch.float32) - target) ** 2
        error = square.sum(-1) / weight.sum(-1).clamp(min=1)
        return mean_over(error, mask)


def pixel_targets(grid: PatchGrid, view: View, norm_pix: bool, ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(B, N, P) float32 targets, with ``norm_pix`` ``(x - mean) / spread``, and their weight; see ``patch_targets``."""
    with torch.autocast(view.pixels.device.type, enabled=False):
        target, weight, mean, spread = patch_targets(grid, view, ids)
        return (target - mean) / spread if norm_pix else target, weight


@register
class MAE(MaskDecoder):
    """Encode the visible tokens, decode the masked ones, compare them with their pixels.

    For masked tokens M with pixels x_i (valid values V_i) and predictions y_i,
    ``loss = mean_{i in M} mean_{v in V_i} (y_iv - t_iv)^2``, where t = x, or with ``norm_pix``
    ``t = (x - mean_V x) / sqrt(var_V x + 1e-6)`` with the unbiased variance (section 3, "Reconstruction target").
    Masked and invalid patches never reach the encoder; invalid ones are no keys in the decoder either, and no targets.
    Channel groups are tokens of their own, each with its own prediction head (Cong et al. 2022, section 3.3).

    Raises:
        UsageError: for a backbone that cannot drop tokens, a bag of vectors, a size that the patches do not divide, a
            ratio that masks none or leaves none, or a decoder whose heads do not divide its width.
    """

    name: ClassVar[str] = "mae"
    Config: ClassVar[type[ObjectiveConfig]] = MAEConfig
    card: ClassVar[Card] = Card(
        family="pixels",
        paper="He et al. 2021, arXiv:2111.06377; channel groups: Cong et al. 2022, arXiv:2207.08051",
        predicts="pixels of the masked patches, each normalised by its own statistics, from the visible ones",
        masks="75% at random; the encoder never sees them",
        checked="public MAE code: loss, prediction, every gradient; public SatMAE code, in four modes",
    )
    config: MAEConfig

    def __init__(self, config: MAEConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        check_groups(config, self.grid, config.norm_pix, backbone.has_cls)
        if config.decoder_cls_group:
            self.cls_code = cls_group_code(self.grid, config)

    def target_count(self, batch: Batch) -> Tensor:
        """The masked tokens."""
        return self.masked(batch.views[VIEW][0])[0].sum()

    def forward(self, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        view = batch.views[VIEW][0]
        return {"loss": self.decoder_loss(view, self.encode(view))}

    def decoder_loss(self, view: View, visible: Visible) -> Tensor:
        """The loss of what is decoded at the masked tokens, and at no others but with ``reference_channels``."""
        if self.config.reference_channels:
            prediction = misplaced_channels(self.grid, self.decode(visible))
            return self.reconstruction_loss(view, prediction, visible.mask)
        ids, counted = masked_ids(visible.mask)
        return self.reconstruction_loss(view, self.decode(visible, ids), counted, ids)

    def reconstruction_loss(self, view: View, prediction: Tensor, mask: Tensor, ids: Tensor | None = None) -> Tensor:
        """The equation in the class's docstring, over the masked tokens of all ranks.

        Args:
            view: normalised pixels.
            prediction: (B, N, P).
            mask: (B, N) bool.
            ids: (B, N) int64, which tokens these are; ``None`` means all of the view's.
        """
        if self.config.norm_over == "place":
            target, weight = self._place_targets(view, ids)
        else:
            target, weight = pixel_targets(self.grid, view, self.config.norm_pix, ids)
        return masked_mean_error(prediction, target, weight, mask)

    def _place_targets(self, view: View, ids: Tensor | None) -> tuple[Tensor, Tensor]:
        with torch.autocast(view.pixels.device.type, enabled=False):
            target, weight, _, _ = patch_targets(self.grid, view)
            mean, spread = place_statistics(self.grid, target, weight)
            target = (target - mean) / spread
            return (target, weight) if ids is None else (take(target, ids), take(weight, ids))

    def statistics(self, view: View) -> tuple[Tensor, Tensor] | None:
        """(B, N, 1) mean and deviation by which each patch is normalised as a target; ``None`` without ``norm_pix``."""
        if not self.config.norm_pix:
            return None
        values, weight, mean, spread = patch_targets(self.grid, view)
        if self.config.norm_over == "place":
            return place_statistics(self.grid, values, weight)
        return mean, spread

    @torch.no_grad()
    def reconstruct(self, batch: Batch) -> Reconstruction:
        """With ``norm_pix``, scaled back by the mean and deviation of what was hidden."""
        view = batch.views[VIEW][0]
        prediction, mask = self.predict(view)
        if self.config.reference_channels:
            prediction = misplaced_channels(self.grid, prediction)
        return fill_in(self.grid, view, prediction, mask, self.statistics(view))
