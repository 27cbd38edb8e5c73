"""SimMIM (Xie et al. 2022, "SimMIM: A Simple Framework for Masked Image Modeling") over any token layout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fmsuite.core.backbones.base import Backbone
from fmsuite.core.backbones.layers import init_transformer
from fmsuite.core.data.sample import Array, Batch, MaskContext, MaskSampler
from fmsuite.core.distributed import all_mean
from fmsuite.core.inputs import SPATIAL_AXES
from fmsuite.core.masking import RatioMasking
from fmsuite.core.masking.places import check_count
from fmsuite.core.objectives.base import Card, ObjectiveConfig, Share, StepContext, register
from fmsuite.core.objectives.group_heads import group_heads
from fmsuite.core.objectives.mae import patch_targets
from fmsuite.core.objectives.masks import MASK_RATIO, pattern_for
from fmsuite.core.objectives.reconstruction import Reconstruction, fill_in
from fmsuite.core.objectives.single_view import VIEW, MaskedViewConfig, MaskTokenEncoder
from fmsuite.core.tokens import PatchGrid
from fmsuite.errors import UsageError


class SimMIMConfig(MaskedViewConfig):
    """The options of ``MaskedViewConfig``, and:

    Attributes:
        mask_unit: length, in samples of the array, of the squares or cubes in which tokens are masked together along
            the spatial axes; ``null`` masks single tokens.
    """

    mask_ratio: float = Field(default=0.6, gt=0, lt=1)
    mask_unit: int | None = Field(default=32, ge=1)
    scale: Share = (0.67, 1.0)


@dataclass(frozen=True)
class CoarseMasking:
    """Another sampler's pattern, drawn on a coarser grid and repeated (section 3.2, "masked patch size").

    A cell of the coarse grid is available if any of its tokens is valid.

    Attributes:
        sampler: draws the pattern; it sees the coarse grid as its own.
        factors: tokens in a cell along each axis of the token grid.
    """

    sampler: MaskSampler
    factors: tuple[int, ...]

    def __call__(self, context: MaskContext) -> Array:
        shape = tuple(n // f for n, f in zip(context.shape, self.factors, strict=True))
        split = [length for pair in zip(shape, self.factors, strict=True) for length in pair]
        within = tuple(range(1, 2 * len(shape), 2))
        available = context.valid.reshape(split).any(within).reshape(-1)
        hidden = self.sampler(replace(context, shape=shape, valid=available)).reshape(shape)
        repeated = np.broadcast_to(np.expand_dims(hidden, within), split)
        return repeated.reshape(-1) & context.valid


def unit_factors(grid: PatchGrid, size: Sequence[int], unit: int) -> tuple[int, ...]:
    """How many tokens a mask unit spans along each token axis: 1 along those that are not spatial.

    Raises:
        UsageError: if the patches do not divide the unit, or the unit not the size.
    """
    factors = [1] * (len(grid.token_axes) - len(grid.axes))
    for axis, length, patch in zip(grid.axes, size, grid.patch_size, strict=True):
        if axis not in SPATIAL_AXES:
            factors.append(1)
            continue
        if unit % patch or length % unit:
            raise UsageError(
                f"objective.mask_unit {unit} is no multiple of the patch size {patch}, or does not divide the size "
                f"{length}, along '{axis}'.",
                "Change it, or set it to null to mask single patches.",
            )
        factors.append(unit // patch)
    return tuple(factors)


def masked_l1_loss(prediction: Tensor, target: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """``sum_{i in M} |y_i - x_i| / |M|`` over the values of the masked patches of all ranks (equation 1).

    Args:
        prediction, target: (B, N, P).
        weight: (B, N, P), 1 at values that exist and are valid, else 0.
        mask: (B, N) bool, the masked patches.
    """
    hidden = weight * mask[..., None]
    count = all_mean(hidden.sum())
    error = (hidden * (prediction.to(torch.float32) - target).abs()).sum()
    return error / torch.where(count > 0, count, 1.0)


@register
class SimMIM(MaskTokenEncoder):
    """The encoder sees mask tokens in place of masked patches; a linear map of its output predicts their pixels.

    With the values of the masked patches x_M and the predictions y_M, ``loss = |y_M - x_M|_1 / |x_M|`` (equation 1), on
    pixels normalised as the input is. Invalid values do not count, and invalid patches are neither seen nor predicted.

    Raises:
        UsageError: for a backbone that cannot mask tokens, a bag of vectors, a size that the patches do not divide, a
            mask unit that they do not divide, or a ratio that masks none or leaves none.
    """

    name: ClassVar[str] = "simmim"
    Config: ClassVar[type[ObjectiveConfig]] = SimMIMConfig
    card: ClassVar[Card] = Card(
        family="pixels",
        paper="Xie et al. 2022, arXiv:2111.09886",
        predicts="pixels of the masked patches by a linear map, from the visible ones and mask tokens",
        masks="60% at random in squares of 32 pixels; the encoder sees mask tokens there",
        checked="public SimMIM code: loss, gradient norms, mask statistics",
    )
    config: SimMIMConfig

    def __init__(self, config: SimMIMConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        if config.mask_unit is not None:
            self.sampler = self._coarse(config.mask_unit)
        self.head = group_heads(backbone.width, self.grid.element_mask().sum(1).tolist())
        self.head.apply(init_transformer)

    def _coarse(self, unit: int) -> CoarseMasking:
        config, grid = self.config, self.grid
        factors = unit_factors(grid, self.size, unit)
        pattern = pattern_for(self, config, self.size)
        shape = tuple(length // factor for length, factor in zip(grid.shape(self.size), factors, strict=True))
        places = pattern.places(grid.token_axes, shape, np.ones(math.prod(shape), bool))
        try:
            check_count(config.mask_ratio, places, MASK_RATIO)
        except UsageError as error:
            raise UsageError(
                f"objective.mask_ratio {config.mask_ratio} of the {places} units of {unit} (objective.mask_unit) "
                "leaves none visible, or masks none.",
                "Lower objective.mask_unit, or set it to null to mask single patches; or use a larger input.",
            ) from error
        return CoarseMasking(RatioMasking(config.mask_ratio, pattern), factors)

    def target_count(self, batch: Batch) -> Tensor:
        """The values of the masked patches."""
        view = batch.views[VIEW][0]
        _, weight, _, _ = patch_targets(self.grid, view)
        return (weight * self.masked(view)[0][..., None]).sum()

    @torch.no_grad()
    def reconstruct(self, batch: Batch) -> Reconstruction:
        view = batch.views[VIEW][0]
        return fill_in(self.grid, view, *self.predict(view))

    def forward(self, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        view = batch.views[VIEW][0]
        prediction, ids, counted = self.predict_masked(view)
        with torch.autocast(prediction.device.type, enabled=False):
            target, weight, _, _ = patch_targets(self.grid, view, ids)
            return {"loss": masked_l1_loss(prediction, target, weight, counted)}
