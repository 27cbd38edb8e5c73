"""Feature maps of two dates as one: what a decoder of changes reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fmsuite.core.adaptation.feature_maps import (
    FeatureMaps,
    Level,
    MapSource,
    is_hierarchical,
    own_maps,
    padded_to_patches,
    token_map,
)
from fmsuite.core.backbones.base import Backbone
from fmsuite.core.backbones.datewise import TIME, Datewise
from fmsuite.core.data.sample import View
from fmsuite.errors import UsageError

Compare = Literal["difference", "concat", "both"]
"""``difference``: |second - first|, which is the same for both directions (Daudt et al. 2018, "Fully convolutional
siamese networks for change detection", FC-Siam-diff); ``concat``: one behind the other (FC-Siam-conc); ``both``."""
_TIMES = {"difference": 1, "concat": 2, "both": 3}


class PairSource(MapSource):
    """Feature maps of a series of two dates, of each date by itself, and then compared; the pixels too.

    An encoder of single images (``Datewise``) sees each date by itself, with the same weights; an encoder of series
    sees both, and its tokens of either date are compared. Where a date has no valid token its features are zero: what
    comes of it is to be left out. There are no class tokens: what they say is not of a place.

    Args:
        compare: see ``Compare``.

    Raises:
        UsageError: as ``MapSource``; for an input that is no series of two dates, or patches that span several.
    """

    def __init__(self, backbone: Backbone, layers: Sequence[int], norm_layers: bool, compare: Compare) -> None:
        super().__init__(backbone, layers, norm_layers)
        if TIME not in self.grid.axes:
            raise UsageError(
                f"Changes are found between two dates, and the input's axes are {', '.join(self.grid.axes)}.",
                "Give time series (remote sensing: data.series).",
            )
        axis = self.grid.axes.index(TIME)
        if self.grid.patch_size[axis] != 1:
            raise UsageError("Changes are found between two dates, and this encoder's patches span both.")
        dates = backbone.spec.size[axis]
        if dates != 2:
            raise UsageError(
                f"Changes are found between two dates, and these series have up to {dates}.",
                "Give series of two dates each.",
            )
        self.compare = compare
        self.levels = tuple(Level(level.width * _TIMES[compare], level.stride) for level in self.levels)
        self.in_chans = backbone.spec.in_chans * _TIMES[compare]

    def forward(self, view: View) -> FeatureMaps:
        """
        Raises:
            UsageError: for samples of more than two dates.
        """
        view = _of_two(padded_to_patches(view, self.grid), self.grid.axes.index(TIME))
        pixels = view.pixels if view.valid is None else torch.where(view.valid, view.pixels, 0.0)
        pixels = self._compared(pixels.movedim(2 + self.grid.axes.index(TIME), 2))
        if is_hierarchical(self.backbone):
            assert isinstance(self.backbone, Datewise)
            dates = self.backbone.dates(view)
            found = (dates.apart(level).movedim(1, 2) for level in own_maps(self.backbone.single, dates.view))
            return FeatureMaps(tuple(map(self._compared, found)), tuple(pixels.shape[2:]), pixels)
        features = self.backbone(view, layers=self.layers, norm_layers=self.norm_layers)
        axes = [axis for axis in self.grid.axes if axis in (TIME, *self.axes)]
        maps = (token_map(tokens, features.layout, axes) for tokens in features.intermediate)
        apart = (found.movedim(2 + axes.index(TIME), 2) for found in maps)
        return FeatureMaps(tuple(map(self._compared, apart)), tuple(pixels.shape[2:]), pixels)

    def _compared(self, maps: Tensor) -> Tensor:
        """(B, D, 2, *shape) to (B, D times what ``compare`` makes of it, *shape)."""
        first, second = maps.unbind(2)
        parts = [(second - first).abs()] if self.compare != "concat" else []
        if self.compare != "difference":
            parts += [first, second]
        return torch.cat(parts, dim=1)


def _of_two(view: View, axis: int) -> View:
    """A view of series of which none has a second date gets an invalid one.

    Raises:
        UsageError: for more than two.
    """
    dates = view.pixels.shape[2 + axis]
    if dates > 2:
        raise UsageError(f"Changes are found between two dates, and a sample has {dates}.", "Give series of two.")
    if dates == 2:
        return view
    rest = view.pixels.dim() - 3 - axis
    pad = (0, 0) * rest + (0, 1)
    valid = view.valid if view.valid is not None else torch.ones_like(view.pixels[:, :1], dtype=torch.bool)
    coords = {name: F.pad(v, (0, 1)) if name == TIME else v for name, v in view.coords.items()}
    return replace(view, pixels=F.pad(view.pixels, pad), valid=F.pad(valid, pad), coords=coords, mask=None, maps={})
