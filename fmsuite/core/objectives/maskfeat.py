"""MaskFeat (Wei et al. 2022, "Masked Feature Prediction for Self-Supervised Visual Pre-Training")."""

from __future__ import annotations

from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fmsuite.core.backbones.base import Backbone
from fmsuite.core.backbones.layers import init_transformer
from fmsuite.core.data.sample import Batch, View
from fmsuite.core.objectives.base import Card, ObjectiveConfig, Share, StepContext, register
from fmsuite.core.objectives.group_heads import group_heads
from fmsuite.core.objectives.hog import BINS, CELL, centre_planes, hog, hog_tokens
from fmsuite.core.objectives.mae import masked_mean_error
from fmsuite.core.objectives.masks import Masking
from fmsuite.core.objectives.single_view import VIEW, MaskedViewConfig, MaskTokenEncoder
from fmsuite.core.tokens import take
from fmsuite.errors import UsageError


class MaskFeatConfig(MaskedViewConfig):
    """The options of ``MaskedViewConfig``, and:

    Attributes:
        mask_ratio, masking, min_block: of the tokens that are replaced by the mask token: 40% in blocks of at least 16.
        bins: number of orientations of a histogram.
        cell: side of a histogram's cell in pixels; it divides the patch.
        planes: of a patch that spans several (y, x) planes (slices, frames), describe the ``centre`` one, as published
            for video, or ``all``, one after the other.
    """

    mask_ratio: float = Field(default=0.4, gt=0, lt=1)
    masking: Masking = "block"
    min_block: int | None = Field(default=16, ge=1)
    bins: int = Field(default=BINS, ge=1)
    cell: int = Field(default=CELL, ge=1)
    planes: Literal["centre", "all"] = "centre"
    scale: Share = (0.5, 1.0)


@register
class MaskFeat(MaskTokenEncoder):
    """Predict the histograms of oriented gradients of masked patches from a view in which they are mask tokens.

    The encoder sees all tokens, the masked ones M replaced by its mask token; a linear head predicts the histograms t_i
    of each token's cells: ``hog`` of every channel, with the local contrast normalisation that the paper finds vital.
    ``loss = mean_{i in M} mean_v (y_iv - t_iv)^2``.

    A patch of several frames has the histograms of its centre frame; slices of a volume are treated like frames. Cells
    without a valid gradient do not count, nor do tokens without a cell that counts.

    Raises:
        UsageError: for a backbone that cannot mask tokens, a bag of vectors, an input whose last axes are not y and x,
            cells that do not divide the patch, a size that the patches do not divide, or masks that do not fit.
    """

    name: ClassVar[str] = "maskfeat"
    Config: ClassVar[type[ObjectiveConfig]] = MaskFeatConfig
    card: ClassVar[Card] = Card(
        family="pixels",
        paper="Wei et al. 2022, arXiv:2112.09133",
        predicts="histograms of oriented gradients of the masked patches, from all patches with mask tokens among them",
        masks="40% in blocks, by mask tokens inside the encoder",
        checked="public FG-MAE code: the same histograms under a Gaussian window; SciPy and NumPy without one",
    )
    config: MaskFeatConfig

    def __init__(self, config: MaskFeatConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        if self.grid.axes[-2:] != ("y", "x"):
            raise UsageError(
                f"Objective 'maskfeat' describes planes of y and x; this input's axes are {', '.join(self.grid.axes)}.",
                "Choose another objective.",
            )
        patch = self.grid.patch_size[-2:]
        if any(length % config.cell for length in patch):
            raise UsageError(
                f"Cells of objective.cell={config.cell} pixels do not divide patches of {patch[0]} x {patch[1]}.",
                "Set objective.cell to a divisor of both sides.",
            )
        cells = (patch[0] // config.cell) * (patch[1] // config.cell)
        if config.planes == "all":
            cells *= torch.Size(self.grid.patch_size[:-2]).numel()
        self.head = group_heads(backbone.width, [len(members) * config.bins * cells for members in self.grid.groups])
        self.head.apply(partial(init_transformer, law="normal"))

    def forward(self, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        view = batch.views[VIEW][0]
        prediction, ids, counted = self.predict_masked(view)
        target, weight = (take(values, ids) for values in self.targets(view))
        return {"loss": masked_mean_error(prediction, target, weight, counted & (weight > 0).any(-1))}

    @torch.no_grad()
    def targets(self, view: View) -> tuple[Tensor, Tensor]:
        """(B, N, H) float32 histograms of a normalised view, and their weight; see ``hog_tokens``."""
        config = self.config
        pixels, valid = view.pixels, view.valid
        if config.planes == "centre":
            pixels = centre_planes(self.grid, pixels)
            valid = None if valid is None else centre_planes(self.grid, valid)
        with torch.autocast(pixels.device.type, enabled=False):
            histograms, counted = hog(pixels, valid, bins=config.bins, cell=config.cell)
            return hog_tokens(self.grid, histograms, counted, config.cell, config.planes)
