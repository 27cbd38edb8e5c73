"""What objectives that predict pixels fill in, for people to look at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fmsuite.core.data.sample import View
from fmsuite.core.tokens import PatchGrid


@dataclass(frozen=True)
class Reconstruction:
    """Views before and after, in the view's normalised units.

    Attributes:
        pixels: (B, C, *size) float32, what there was.
        hidden: (B, C, *size) bool, the values of the masked tokens.
        filled: (B, C, *size) float32: hidden values as predicted, all others as they were.
        error: (B,) float32, root mean squared difference of the hidden valid values; not a number where there are none.
        given_statistics: predictions were of patches normalised each by itself, and were scaled back by the mean and
            deviation of what was hidden, which the network does not know.
    """

    pixels: Tensor
    hidden: Tensor
    filled: Tensor
    error: Tensor
    given_statistics: bool


def fill_in(
    grid: PatchGrid, view: View, prediction: Tensor, mask: Tensor, statistics: tuple[Tensor, Tensor] | None = None
) -> Reconstruction:
    """
    Args:
        view: normalised pixels.
        prediction: (B, N, P) of every token; only those of masked ones are looked at.
        mask: (B, N) bool.
        statistics: (B, N, 1) mean and deviation of each patch by which the targets were normalised.
    """
    size = tuple(view.pixels.shape[2:])
    pixels = view.pixels.to(torch.float32)
    patches, values = grid.patchify(pixels), prediction.to(torch.float32)
    if statistics is not None:
        mean, spread = statistics
        values = values * spread + mean
    chosen = mask[..., None].expand_as(patches)
    filled = grid.unpatchify(torch.where(chosen, values, patches), size)
    hidden = grid.unpatchify(chosen, size)
    counted = hidden if view.valid is None else hidden & view.valid
    square = torch.where(counted, (filled - pixels) ** 2, 0.0).flatten(1).sum(1)
    error = (square / counted.flatten(1).sum(1)).sqrt()
    return Reconstruction(pixels, hidden, filled, error, statistics is not None)
