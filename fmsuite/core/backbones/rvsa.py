"""Rotated varied-size window attention (Wang et al. 2022, "Advancing plain vision transformer towards remote sensing
foundation model", arXiv 2208.03987, section III-C)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from fmsuite.core.backbones.layers import Attention, Block
from fmsuite.core.backbones.packing import Group, starts_of
from fmsuite.errors import UsageError

Outside = Literal["left_out", "zeros"]
_NO_SHARE = 1e-6
"""A point whose share of tokens is less has none: what rounding leaves of an exact zero."""


class Shape(NamedTuple):
    """Of each window and head: what is done to its grid of points, in this order.

    Attributes:
        scale: (..., 2) x and y, added to 1.
        angle: (...,) radians, from x towards y.
        offset: (..., 2) x and y, in halves of a window.
    """

    scale: Tensor
    angle: Tensor
    offset: Tensor


class RotatedWindowAttention(Attention):
    """Attention of each window of tokens to a window of points that is moved, scaled and turned for each head.

    The mean of a window's tokens, through LeakyReLU and a linear layer (a 1 x 1 convolution over windows), gives
    offset, scale and angle for each head. Keys and values are sampled bilinearly at the resulting points. All
    regressors start at zero: the points are then the window's own tokens, and this is window attention. Terms for the
    relative position of query and point within their windows, one table an axis and shared by all heads, start at zero
    as well.

    As published: which layers there are, their inputs, the order of scale, rotation and offset, tables, and padding of
    the grid to whole windows on both sides. What differs:

    - Class token and registers, which the published network does not have, read all tokens, and every window reads
      them. On a grid that is one window, this is the full attention that the weights were trained for.
    - Points outside of the grid or on invalid tokens. ``left_out``: a point counts by the share of it that lies on
      valid tokens, and those outside not at all. ``zeros``, as published: what is outside has a key and a value of
      zero, and keeps its part of the softmax, which draws the output of windows at the border towards zero.
    - The published regressors start with random weights, and there is a further table of random start added to the
      logits, which would change what a pretrained network computes.
    - Offsets are in halves of a window, and angles turn on the grid of tokens; the published ones are in units of an
      image of equal sides, which agree where it is one.

    Args:
        attention: its projections are taken over, under the same names.
        window: side, in tokens.
        prefix: tokens before the patches.
        outside: see above.
    """

    distance: Tensor

    def __init__(self, attention: Attention, window: int, prefix: int, outside: Outside) -> None:
        nn.Module.__init__(self)
        self.heads, self.qkv, self.proj = attention.heads, attention.qkv, attention.proj
        self.window, self.prefix, self.outside = window, prefix, outside
        weight = self.proj.weight
        width = weight.shape[0]

        def regressor(outputs: int) -> nn.Module:
            # Without a draw of random numbers: what is built next starts as it would beside plain attention.
            return skip_init(nn.Linear, width, outputs, device=weight.device, dtype=weight.dtype)

        self.offsets, self.scales = regressor(2 * self.heads), regressor(2 * self.heads)
        self.angles = regressor(self.heads)
        self.rel_pos_h = nn.Parameter(weight.new_empty(2 * window - 1, width // self.heads))
        self.rel_pos_w = nn.Parameter(weight.new_empty(2 * window - 1, width // self.heads))
        steps = torch.arange(window, device=weight.device)
        self.register_buffer("distance", steps[:, None] - steps + window - 1, persistent=False)
        self.init_regressors()

    def init_regressors(self) -> None:
        """Everything that the plain attention does not have, to zero."""
        for name, parameter in self.named_parameters():
            if not name.startswith(("qkv.", "proj.")):
                nn.init.zeros_(parameter)

    def attend(self, x: Tensor, groups: Sequence[Group]) -> Tensor:
        """(T, D) to (T, D), the tokens of several groups of sequences.

        Raises:
            ValueError: for a group whose patches fill no grid.
        """
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        starts = starts_of(groups)
        parts = [
            self._attend(x[start:stop], qkv[start:stop], group)
            for group, start, stop in zip(groups, starts, starts[1:])
        ]
        return self.proj(torch.cat(parts) if len(parts) > 1 else parts[0])

    def attend_queries(self, x: Tensor, queries: Tensor, key_mask: Tensor | None) -> Tensor:
        """
        Raises:
            ValueError: always; windows are of all tokens.
        """
        raise ValueError("windowed attention has no output of some tokens alone")

    def weights(
        self,
        x: Tensor,
        queries: slice,
        rotary: object = None,
        key_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
    ) -> Tensor:
        """As in the base class, of tokens before the patches: these read all others.

        Raises:
            ValueError: for patches.
        """
        if any(number >= self.prefix for number in range(*queries.indices(x.shape[1]))):
            raise ValueError("patches attend to points of their windows, which are no tokens")
        return super().weights(x, queries, None, key_mask, None)

    def shapes(self, windows: Tensor) -> Shape:
        """The windows of (..., D) means of their tokens; (..., heads) each."""
        read = F.leaky_relu(windows)
        scale, offset = (layer(read).unflatten(-1, (self.heads, 2)) for layer in (self.scales, self.offsets))
        return Shape(scale, self.angles(read), offset)

    def points(self, shape: Shape, before: tuple[int, int]) -> Tensor:
        """Where keys and values are read.

        Args:
            shape: (B, rows, columns, heads) windows.
            before: rows and columns of padding before the grid's first token.

        Returns:
            (B, heads, rows * window, columns * window, 2) x and y in tokens from the centre of the grid's first one, in
            float32 or wider.
        """
        scale, angle, offset = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in shape)
        window, half = self.window, (self.window - 1) / 2
        rows, columns = angle.shape[1:3]
        inner, down, across = (
            torch.arange(length, device=angle.device, dtype=angle.dtype) for length in (window, rows, columns)
        )
        inner = inner - half
        # (B, rows, i, columns, j, heads)
        stretch = 1 + scale[:, :, None, :, None]
        x, y = inner[:, None] * stretch[..., 0], inner[:, None, None, None] * stretch[..., 1]
        cos, sin = angle.cos()[:, :, None, :, None], angle.sin()[:, :, None, :, None]
        shift = offset[:, :, None, :, None] * (window / 2)
        middle_x = (across * window + half - before[1])[:, None, None]
        middle_y = (down * window + half - before[0])[:, None, None, None, None]
        found = torch.stack(
            [middle_x + (x * cos - y * sin) + shift[..., 0], middle_y + (x * sin + y * cos) + shift[..., 1]], dim=-1
        )
        return found.flatten(3, 4).flatten(1, 2).movedim(3, 1)

    def _attend(self, x: Tensor, qkv: Tensor, group: Group) -> Tensor:
        if group.shape is None or len(group.shape) != 2 or group.rotary is not None or group.position_bias is not None:
            raise ValueError("windowed attention takes all tokens of a (y, x) grid, and no other positions")
        q, k, v = qkv.unflatten(0, (group.samples, group.tokens)).permute(2, 0, 3, 1, 4).unbind(0)
        prefix = self.prefix
        valid = None if group.key_mask is None else group.key_mask[:, prefix:]
        patches = self._windows(
            x.unflatten(0, (group.samples, group.tokens))[:, prefix:],
            [part[:, :, prefix:] for part in (q, k, v)],
            (k[:, :, :prefix], v[:, :, :prefix]),
            valid,
            (group.shape[0], group.shape[1]),
        )
        if prefix == 0:
            return patches.flatten(0, 1)
        mask = None if group.key_mask is None else group.key_mask[:, None, None, :]
        special = F.scaled_dot_product_attention(q[:, :, :prefix], k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        return torch.cat([special, patches], dim=1).flatten(0, 1)

    def _windows(
        self,
        x: Tensor,
        qkv: Sequence[Tensor],
        special: tuple[Tensor, Tensor],
        valid: Tensor | None,
        grid: tuple[int, int],
    ) -> Tensor:
        """(B, N, heads * d) of the patches.

        Args:
            x: (B, N, D) what the regressors read.
            qkv: (B, heads, N, d) each.
            special: keys and values that every window reads as well, (B, heads, P, d) each.
            valid: (B, N) bool.
        """
        q, k, v = qkv
        batch, heads, _, width = q.shape
        window = self.window
        rows, columns = (-(-length // window) for length in grid)
        extra = rows * window - grid[0], columns * window - grid[1]
        before = extra[0] // 2, extra[1] // 2
        pad = before[1], extra[1] - before[1], before[0], extra[0] - before[0]

        there = x.new_ones(len(x), 1, *grid) if valid is None else valid.to(x.dtype).view(-1, 1, *grid)
        plane = torch.where(there > 0, x.transpose(1, 2).unflatten(2, grid), 0.0)
        counted = F.avg_pool2d(F.pad(there, pad), window)
        means = F.avg_pool2d(F.pad(plane, pad), window) / counted.clamp(min=window**-2)
        points = self.points(self.shapes(means.permute(0, 2, 3, 1)), before)
        # From -1 to 1 across the grid's outer edges, as grid_sample counts.
        places = torch.stack([(2 * points[..., n] + 1) / grid[1 - n] - 1 for n in (0, 1)], dim=-1)

        planes = torch.cat([k, v], dim=-1).transpose(2, 3).unflatten(3, grid).to(points.dtype)
        share = there[:, None].to(points.dtype).expand(-1, heads, -1, -1, -1)
        if valid is not None:
            planes = torch.where(there[:, None] > 0, planes, 0.0)
        planes = torch.cat([planes, share], dim=2)
        read = F.grid_sample(planes.flatten(0, 1), places.flatten(0, 1), padding_mode="zeros", align_corners=False)
        read = self._cut(read.unflatten(0, (batch, heads)))
        keys, values, share = read.split([width, width, 1], dim=-1)
        queries = self._cut(F.pad(q.transpose(2, 3).unflatten(3, grid), pad))
        bias = self._relative(queries)
        if self.outside == "left_out":
            share = share.clamp(min=0.0)
            seen = share > _NO_SHARE
            safe = share.clamp(min=_NO_SHARE)
            keys, values = keys / safe, values / safe
            log_share = torch.where(seen | ~seen.any(-2, keepdim=True), safe.log(), float("-inf"))
            bias = bias + log_share.transpose(-1, -2).to(bias.dtype)
        keys, values = keys.to(q.dtype), values.to(q.dtype)
        if self.prefix:
            repeats = rows * columns
            first = [part.repeat_interleave(repeats, dim=0) for part in special]
            keys, values = torch.cat([first[0], keys], dim=2), torch.cat([first[1], values], dim=2)
            bias = F.pad(bias, (self.prefix, 0))
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias.to(q.dtype))
        # (B * rows * columns, heads, window * window, d) to the grid.
        out = out.unflatten(2, (window, window)).unflatten(0, (batch, rows, columns))
        out = out.permute(0, 1, 4, 2, 5, 3, 6).flatten(5).flatten(3, 4).flatten(1, 2)
        out = out[:, before[0] : before[0] + grid[0], before[1] : before[1] + grid[1]]
        return out.flatten(1, 2)

    def _cut(self, planes: Tensor) -> Tensor:
        """(B, heads, C, rows * window, columns * window) to (B * rows * columns, heads, window * window, C)."""
        split = planes.unflatten(4, (-1, self.window)).unflatten(3, (-1, self.window))
        return split.permute(0, 3, 5, 1, 4, 6, 2).flatten(4, 5).flatten(0, 2)

    def _relative(self, queries: Tensor) -> Tensor:
        """(W, heads, n, n) of (W, heads, n, d): each query times the rows of its distances to a point."""
        grid = queries.unflatten(2, (self.window, self.window))
        down = torch.einsum("whyxd,ykd->whyxk", grid, self.rel_pos_h[self.distance].to(queries.dtype))
        across = torch.einsum("whyxd,xkd->whyxk", grid, self.rel_pos_w[self.distance].to(queries.dtype))
        return (down[..., :, None] + across[..., None, :]).flatten(4, 5).flatten(2, 3)


def window_blocks(blocks: Iterable[nn.Module], window: int, full_every: int, prefix: int, outside: Outside) -> None:
    """Give all blocks but each ``full_every``-th windowed attention, in place."""
    for number, block in enumerate(blocks, start=1):
        assert isinstance(block, Block)
        if number % full_every:
            block.attn = RotatedWindowAttention(block.attn, window, prefix, outside)


def check_windows(axes: Sequence[str], positions: str) -> None:
    """
    Args:
        axes: of the tokens.
        positions: as in ``ModelConfig``.

    Raises:
        UsageError: for tokens or positions that windows cannot have.
    """
    if tuple(axes) != ("y", "x"):
        raise UsageError(
            f"attention: rvsa needs tokens along y and x alone; these have {', '.join(axes)}.",
            "Use images of one date with a single channel group, or leave attention as it is.",
        )
    if positions not in ("learned", "sincos", "none"):
        raise UsageError(
            f"attention: rvsa has no place for positions: {positions}, which are of pairs of tokens.",
            "Use a model with learned or sincos positions, or leave attention as it is.",
        )
