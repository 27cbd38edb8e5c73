"""Relative position bias (Raffel et al. 2020, section 2.1; Bao et al. 2021): attention by the distance of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fmsuite.core.backbones.positions import resample_table

SPECIAL = 3
"""Values that are not of an offset."""


class RelativePositionBias(nn.Module):
    """A learned value for each head and each offset of two tokens of a grid, shared by all blocks.

    For a grid of lengths n_a there are prod(2 n_a - 1) offsets; three further values stand for class token or register
    to patch, patch to those, and those among themselves. Parameters and their order are BEiT's.

    Args:
        shape, axes: the grid that the table is for.
        heads: H.
        prefix: tokens before the patches.
    """

    def __init__(self, shape: Sequence[int], axes: tuple[str, ...], heads: int, prefix: int) -> None:
        super().__init__()
        self.shape, self.axes, self.prefix = tuple(shape), axes, prefix
        self.relative_position_bias_table = nn.Parameter(torch.zeros(self._offsets(self.shape) + SPECIAL, heads))

    @staticmethod
    def _offsets(shape: Sequence[int]) -> int:
        return math.prod(2 * length - 1 for length in shape)

    def forward(self, shape: Sequence[int]) -> Tensor:
        """(heads, prefix + N, prefix + N) for the tokens of a grid, row-major. Between grids the table is interpolated
        as learned positions are."""
        table = resample_offsets(self.relative_position_bias_table, self.shape, shape, self.axes)
        index = relative_index(shape, self.prefix, table.device)
        return table[index.flatten()].view(*index.shape, -1).permute(2, 0, 1)


def resample_offsets(table: Tensor, old: Sequence[int], new: Sequence[int], axes: tuple[str, ...]) -> Tensor:
    """(prod(2 n_a - 1) + 3, heads) for the offsets of one grid to those of another; ``table`` itself if equal.

    Raises:
        UsageError: see ``resample_table``.
    """
    if tuple(old) == tuple(new):
        return table
    sides = [tuple(2 * length - 1 for length in grid) for grid in (old, new)]
    patches = resample_table(table[None, :-SPECIAL], sides[0], sides[1], axes)[0]
    return torch.cat([patches, table[-SPECIAL:]])


def relative_index(shape: Sequence[int], prefix: int, device: torch.device | str = "cpu") -> Tensor:
    """(prefix + N, prefix + N) int64 rows of the table for query i and key j."""
    steps = torch.meshgrid(*(torch.arange(length, device=device) for length in shape), indexing="ij")
    places = torch.stack([step.flatten() for step in steps])
    offsets = places[:, :, None] - places[:, None, :]
    index = torch.zeros(offsets.shape[1:], dtype=torch.int64, device=device)
    for length, offset in zip(shape, offsets, strict=True):
        index = index * (2 * length - 1) + offset + length - 1
    total = math.prod(2 * length - 1 for length in shape)
    full = torch.full((prefix + len(index),) * 2, total + 2, device=device)
    full[:prefix, prefix:] = total
    full[prefix:, :prefix] = total + 1
    full[prefix:, prefix:] = index
    return full
