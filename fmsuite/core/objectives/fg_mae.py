"""FG-MAE (Wang et al. 2023, "Feature Guided Masked Autoencoder for Self-Supervised Learning in Remote Sensing")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from fmsuite.core.backbones.base import Backbone
from fmsuite.core.data.sample import Batch, View
from fmsuite.core.inputs import InputSpec
from fmsuite.core.objectives.base import Card, ObjectiveConfig, StepContext, register
from fmsuite.core.objectives.decoders import DecoderConfig, MaskDecoder, init_linear
from fmsuite.core.objectives.group_heads import groups_of, project
from fmsuite.core.objectives.hog import BINS, CELL, GAUSSIAN, hog, hog_tokens
from fmsuite.core.objectives.mae import masked_mean_error, patch_statistics
from fmsuite.core.objectives.single_view import VIEW, masked_ids
from fmsuite.core.tokens import PatchGrid, take
from fmsuite.errors import UsageError, nearest

INDICES = {"ndvi": ("B8", "B4"), "ndwi": ("B3", "B8"), "ndbi": ("B11", "B8")}
"""Vegetation, water and built-up land in the bands of Sentinel-2 (section 3.2)."""


class FGMAEConfig(DecoderConfig):
    """The options of ``DecoderConfig``, and:

    Attributes:
        mask_ratio: share of tokens that the encoder does not see.
        bins, cell: orientations of a histogram, and side of its cell in pixels; it divides the patch.
        window: side of the Gaussian window that weighs gradients, see ``hog``; it divides the view. 0 is none.
        indices: names of normalised differences (a - b) / (a + b), and the names of their two channels. Those of
            Sentinel-2 as published; none (``{}``) for radar and for inputs without such channels.
        index_epsilon: added to a + b.
        norm_targets: predict the histograms of a patch, and its indices, normalised by their own mean and variance.
    """

    mask_ratio: float = Field(default=0.7, gt=0, lt=1)
    bins: int = Field(default=BINS, ge=1)
    cell: int = Field(default=CELL, ge=1)
    window: int = Field(default=GAUSSIAN, ge=0)
    indices: dict[str, tuple[str, str]] = Field(default_factory=lambda: dict(INDICES))
    index_epsilon: float = Field(default=1e-5, gt=0)
    norm_targets: bool = True


def normalised_differences(
    values: Tensor, pairs: Sequence[tuple[int, int]], epsilon: float, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Index maps (section 3.2): ``(max(a, 0) - max(b, 0)) / (max(a, 0) + max(b, 0) + epsilon)``, between -1 and 1.

    A reflectance below zero is noise, or too much correction of haze, and counts as zero. Without that the denominator
    has a zero at b = -a, and the index no bounds.

    Args:
        values: (B, C, ...) physical values.
        pairs: channel numbers of a and b, for each index.
        valid: (B, 1 or C, ...) bool; ``None`` means all.

    Returns:
        indices: (B, I, ...) float32, zero where not counted.
        counted: (B, I, ...) bool, where both channels are valid.
    """
    first, second = (values[:, [pair[side] for pair in pairs]].to(torch.float32).clamp(min=0) for side in (0, 1))
    indices = (first - second) / (first + second + epsilon)
    if valid is None:
        return indices, torch.ones_like(indices, dtype=torch.bool)
    full = valid.expand(-1, values.shape[1], *valid.shape[2:])
    counted = full[:, [a for a, _ in pairs]] & full[:, [b for _, b in pairs]]
    return torch.where(counted, indices, 0.0), counted


def channel_pairs(spec: InputSpec, indices: Mapping[str, tuple[str, str]]) -> list[tuple[int, int]]:
    """
    Raises:
        UsageError: naming the index and the channel that the input does not have.
    """
    names = spec.channel_names
    for index, pair in indices.items():
        for name in pair:
            if name not in names:
                raise UsageError(
                    f"objective.indices: {index} needs the channel '{name}', and the input has {', '.join(names)}.",
                    f"{nearest(name, names)} Set objective.indices='{{}}' to predict none.",
                )
    return [(names.index(first), names.index(second)) for first, second in indices.values()]


@register
class FGMAE(MaskDecoder):
    """MAE that predicts features instead of pixels: histograms of oriented gradients and spectral indices.

    One decoder with two linear heads. For masked tokens M with histograms h_i (``hog`` of every channel, under a
    Gaussian window) and index maps d_i (``normalised_differences`` of physical values, pixel by pixel),
    ``loss = mean_{i in M} mean_v (y_iv - h'_iv)^2 + mean_{i in M} mean_v (z_iv - d'_iv)^2``, where ' normalises each
    patch by its own mean and unbiased variance (section 3.3). Radar has histograms only. With channel groups, the
    tokens of a place all predict its indices. Cells without a valid gradient and pixels without valid channels do not
    count.

    Raises:
        UsageError: as ``MaskDecoder``; for cells or a window that do not fit, or channels that the input does not have.
    """

    name: ClassVar[str] = "fg_mae"
    Config: ClassVar[type[ObjectiveConfig]] = FGMAEConfig
    card: ClassVar[Card] = Card(
        family="pixels",
        paper="Wang et al. 2023, arXiv:2310.18653",
        predicts="histograms of oriented gradients and spectral indices of the masked patches, from the visible ones",
        masks="70% at random; the encoder never sees them",
        checked="public FG-MAE code: histograms, indices, both predictions, loss; loops",
    )
    config: FGMAEConfig
    mean: Tensor
    std: Tensor

    def __init__(self, config: FGMAEConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.pairs = channel_pairs(backbone.spec, config.indices)
        self.decoder_pred2 = nn.Linear(config.decoder_width, self._pixels * len(self.pairs)) if self.pairs else None
        if self.decoder_pred2 is not None:
            self.decoder_pred2.apply(init_linear)
        shape = (1, -1, *(1,) * len(self.grid.axes))
        for name in ("mean", "std"):
            values = torch.tensor([getattr(channel, name) for channel in backbone.spec.channels])
            self.register_buffer(name, values.view(shape), persistent=False)

    @property
    def _pixels(self) -> int:
        return torch.Size(self.grid.patch_size).numel()

    def outputs(self) -> list[int]:
        """Histograms of the cells of each group's patch."""
        config, grid = self.config, self.grid
        if grid.axes[-2:] != ("y", "x"):
            raise UsageError(
                f"Objective 'fg_mae' describes planes of y and x; this input's axes are {', '.join(grid.axes)}.",
                "Choose another objective.",
            )
        height, width = grid.patch_size[-2:]
        if height % config.cell or width % config.cell:
            raise UsageError(
                f"Cells of objective.cell={config.cell} pixels do not divide patches of {height} x {width}.",
                "Set objective.cell to a divisor of both sides.",
            )
        if config.window and any(length % config.window for length in self.size[-2:]):
            raise UsageError(
                f"A Gaussian window of objective.window={config.window} pixels does not divide a view of "
                f"{self.size[-2]} x {self.size[-1]}.",
                "Set objective.window to a divisor of both sides, or to 0 for none.",
            )
        cells = self._pixels // config.cell**2
        return [len(members) * config.bins * cells for members in grid.groups]

    def forward(self, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        view = batch.views[VIEW][0]
        visible = self.encode(view)
        ids, counted = masked_ids(visible.mask)
        tokens = self.decode_tokens(visible, ids)
        groups = groups_of(self.decoder_pred, ids, visible.layout.num_tokens)
        predictions = {"hog": project(self.decoder_pred, tokens, groups)}
        targets = {"hog": self.histograms(view)}
        if self.decoder_pred2 is not None:
            predictions["indices"] = self.decoder_pred2(tokens)
            targets["indices"] = self.index_maps(view)
        losses = {}
        for name, prediction in predictions.items():
            target, weight = (take(values, ids) for values in targets[name])
            losses[name] = masked_mean_error(prediction, target, weight, counted & (weight > 0).any(-1))
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    @torch.no_grad()
    def histograms(self, view: View) -> tuple[Tensor, Tensor]:
        """(B, N, H) float32 targets of the first head of a normalised view, and their weight; see ``hog_tokens``."""
        config = self.config
        with torch.autocast(view.pixels.device.type, enabled=False):
            maps, counted = hog(view.pixels, view.valid, bins=config.bins, cell=config.cell, window=config.window)
            return self._normalised(*hog_tokens(self.grid, maps, counted, config.cell))

    @torch.no_grad()
    def index_maps(self, view: View) -> tuple[Tensor, Tensor]:
        """(B, N, P) float32 targets of the second head, indices varying fastest, and their weight."""
        grid = self.grid
        planes = PatchGrid(grid.axes, grid.patch_size, (tuple(range(len(self.pairs))),))
        with torch.autocast(view.pixels.device.type, enabled=False):
            physical = view.pixels.to(torch.float32) * self.std + self.mean
            maps, counted = normalised_differences(physical, self.pairs, self.config.index_epsilon, view.valid)
            values, weight = (planes.patchify(part.to(torch.float32)) for part in (maps, counted))
            values, weight = self._normalised(values, weight)
        groups = len(grid.groups)
        return values.repeat(1, groups, 1), weight.repeat(1, groups, 1)

    def _normalised(self, values: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        if not self.config.norm_targets:
            return values, weight
        values = values * weight
        mean, spread = patch_statistics(values, weight)
        return weight * (values - mean) / spread, weight
