"""Position codes, computed axis by axis from the tokens' coordinates: sine-cosine, rotary, and learned tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fmsuite.core.backbones.calendar import calendar
from fmsuite.core.inputs import SPATIAL_AXES
from fmsuite.core.tokens import TokenLayout
from fmsuite.errors import UsageError

OMEGA = 10_000.0
TIME = "time"
TimeEncoding = Literal["days", "calendar"]
"""What of a date the sine-cosine code encodes: the days since 2000-01-01, or year, month and hour (``calendar``)."""


def axis_coordinates(
    layout: TokenLayout, physical: bool = False, scale: float = 1.0, options: str = "model."
) -> dict[str, Tensor]:
    """Each axis's coordinates in the unit in which positions are counted.

    Args:
        layout: the tokens.
        physical: count the spatial axes (z, y, x) in physical lengths of ``scale``; other axes (``time`` in days,
            ``group`` by number) have no spacing and stay as they are.
        scale: physical length that counts as one step.
        options: how the names of the options begin that asked, for messages.

    Returns:
        Axis name to (N,) or (B, N) float32, in the layout's axis order.

    Raises:
        UsageError: if physical positions are asked for and the spacing is unknown.
    """
    return {
        axis: layout.along(axis, physical=True, options=options) / scale
        if physical and axis in SPATIAL_AXES
        else layout.along(axis)
        for axis in layout.axes
    }


def axis_widths(
    axes: tuple[str, ...], width: int, given: Mapping[str, int] | None = None, options: str = "model."
) -> dict[str, int]:
    """How many of ``width`` features encode each axis.

    Without ``given``, every axis gets the same even number, the largest that fits; what is left over (at the end) stays
    zero. With it, the named axes get what is asked for and the others share the rest in the same way.

    Raises:
        UsageError: if a given width is odd or negative, names an axis the tokens do not have, or leaves no room.
    """
    given = dict(given or {})
    for axis, share in given.items():
        if axis not in axes:
            raise UsageError(f"{options}position_widths names '{axis}'.", f"The tokens' axes are {', '.join(axes)}.")
        if share < 2 or share % 2:
            raise UsageError(f"{options}position_widths: {axis} has {share} features.", "Give an even number.")
    others = [axis for axis in axes if axis not in given]
    rest = width - sum(given.values())
    equal = 2 * (rest // (2 * len(others))) if others else 0
    if rest < 0 or (others and equal == 0):
        raise UsageError(
            f"{options}width {width} is too narrow to encode the axes {', '.join(axes)}.",
            f"Give at least {sum(given.values()) + 2 * len(others)} features.",
        )
    return {axis: given.get(axis, equal) for axis in axes}


def sincos_positions(
    layout: TokenLayout,
    width: int,
    *,
    physical: bool = False,
    scale: float = 1.0,
    widths: Mapping[str, int] | None = None,
    time: TimeEncoding = "days",
    options: str = "model.",
) -> Tensor:
    """Fixed sine-cosine code of every token (Vaswani et al. 2017, section 3.5, once for each axis).

    The last axis comes first: for ``(y, x)`` the first half of the features encodes x and the second y, as in MAE's
    table; for ``(z, y, x)`` the order is x, y, z; for ``(group, y, x)`` it is x, y, group, as in SatMAE. An axis with w
    features holds ``sin(c / 10000^(2i/w))`` for i < w/2, then the cosines. See ``axis_widths`` for the division;
    features left over are zero.

    Args:
        time: ``calendar`` divides the features of the axis ``time`` into three equal parts, of the largest even width
            that fits, for year - 2002, month - 1 and hour, in this order: SatMAE's temporal code (Cong et al. 2022,
            section 3.2), which stands behind that of the place, as there.

    Returns:
        (N, width), or (B, N, width) if coordinates differ between samples; float32.

    Raises:
        UsageError: see ``axis_coordinates`` and ``axis_widths``; for a calendar of tokens that have no dates, or one
            with fewer than six features.
    """
    shares = axis_widths(layout.axes, width, widths, options)
    if time == "calendar":
        check_calendar(shares, options)
        if layout.coords.dim() == 2:
            raise UsageError(
                f"{options}time_encoding is calendar, and these samples bring no dates.",
                f"Set {options}time_encoding to days, which then counts them.",
            )
    columns = axis_coordinates(layout, physical, scale, options)
    parts = []
    for axis in reversed(layout.axes):
        if time == "calendar" and axis == TIME:
            each = 2 * (shares[axis] // 6)
            parts += [_waves(column, each) for column in calendar(columns[axis]).unbind(-1)]
            rest = shares[axis] - 3 * each
            parts.append(columns[axis].new_zeros((*columns[axis].shape, rest)))
        else:
            parts.append(_waves(columns[axis], shares[axis]))
    batched = max(part.dim() for part in parts) == 3
    if batched:
        rows = max(len(part) for part in parts if part.dim() == 3)
        parts = [part if part.dim() == 3 else part.expand(rows, -1, -1) for part in parts]
    code = torch.cat(parts, dim=-1)
    return F.pad(code, (0, width - code.shape[-1]))


def _waves(column: Tensor, width: int) -> Tensor:
    """(...) coordinates to (..., width): sines, then cosines."""
    half = width // 2
    # Made where they are used: for a copy from the host the host would wait.
    steps = torch.arange(half, dtype=torch.float64, device=column.device) / half
    angles = column[..., None] * (1.0 / OMEGA**steps).to(torch.float32)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def as_dated(layout: TokenLayout) -> TokenLayout:
    """The layout of one sample that has coordinates of its own, to try positions that need dates."""
    return layout if layout.coords.dim() == 3 else replace(layout, coords=layout.coords[None])


def check_calendar(shares: Mapping[str, int], options: str = "model.") -> None:
    """
    Args:
        shares: see ``axis_widths``.

    Raises:
        UsageError: if there is no axis ``time``, or it has not two features each for year, month and hour.
    """
    if TIME not in shares:
        raise UsageError(
            f"{options}time_encoding is calendar, and the tokens' axes are {', '.join(shares)}.",
            "Give the data as time series (remote sensing: data.series), or leave it out.",
        )
    if shares[TIME] < 6:
        raise UsageError(
            f"{options}time_encoding: {shares[TIME]} features cannot hold year, month and hour.",
            f"Give time at least 6 of them in {options}position_widths.",
        )


class Rotary(NamedTuple):
    """Cosines and sines of rotation angles, each (B or 1, 1, N, head_dim / 2)."""

    cos: Tensor
    sin: Tensor


def rotary_angles(
    layout: TokenLayout,
    head_dim: int,
    theta: float = 100.0,
    *,
    physical: bool = False,
    scale: float = 1.0,
    options: str = "model.",
) -> Tensor:
    """Rotation angles of axial rotary positions (Su et al. 2021, section 3.2; Heo et al. 2024, section 3.1).

    The ``head_dim / 2`` feature pairs are divided evenly between the axes, in the layout's order; the i-th of an axis's
    n pairs turns by ``coordinate * theta^(-i/n)``. Pairs left over do not turn. Attention logits then depend on
    coordinate differences only.

    Returns:
        (N, head_dim / 2), or (B, N, head_dim / 2); float32.

    Raises:
        UsageError: if the head is too narrow for the axes, or see ``axis_coordinates``.
    """
    pairs = head_dim // 2
    each = pairs // len(layout.axes)
    if head_dim % 2 or each == 0:
        raise UsageError(
            f"Heads of {head_dim} features cannot hold rotary positions over {', '.join(layout.axes)}.",
            f"Raise {options}width or lower {options}heads; the width of a head must be even.",
        )
    steps = torch.arange(each, dtype=torch.float64, device=layout.coords.device) / each
    frequencies = (theta**-steps).to(torch.float32)
    columns = axis_coordinates(layout, physical, scale, options)
    parts = [column[..., None] * frequencies for column in columns.values()]
    rows = max((len(part) for part in parts if part.dim() == 3), default=0)
    if rows:
        parts = [part if part.dim() == 3 else part.expand(rows, -1, -1) for part in parts]
    return F.pad(torch.cat(parts, dim=-1), (0, pairs - each * len(parts)))


def rotary(angles: Tensor, prefix: int = 0) -> Rotary:
    """The rotation for a sequence whose first ``prefix`` tokens (class token, registers) do not turn.

    Args:
        angles: (N, P) or (B, N, P).
    """
    if angles.dim() == 2:
        angles = angles[None]
    angles = F.pad(angles, (0, 0, prefix, 0))[:, None]
    return Rotary(angles.cos(), angles.sin())


def rotate(x: Tensor, by: Rotary) -> Tensor:
    """Turn feature pairs (i, i + head_dim / 2) of queries or keys.

    Args:
        x: (B, heads, N, head_dim); the dtype is kept.
    """
    cos, sin = by.cos.to(x.dtype), by.sin.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def resample_table(table: Tensor, old: tuple[int, ...], new: tuple[int, ...], axes: tuple[str, ...]) -> Tensor:
    """A learned table on another token grid.

    Along one axis linear, two bicubic with antialiasing (as timm and DINOv2 with offset 0), three trilinear. The group
    axis is never interpolated. For 2D the result is that of timm's ``resample_abs_pos_embed``.

    Args:
        table: (1, N, D) without entries for special tokens; N = product of ``old``.
        old, new: the grids.
        axes: their axes.

    Returns:
        (1, N', D), dtype of ``table``; ``table`` itself if the grids are equal.

    Raises:
        UsageError: if the number of groups differs, or there are more than three other axes.
    """
    if tuple(old) == tuple(new):
        return table
    fixed = 1 if axes[0] == "group" else 0
    if old[:fixed] != new[:fixed]:
        raise UsageError(f"A position table for {old[0]} channel groups does not fit {new[0]} groups.")
    modes = {1: "linear", 2: "bicubic", 3: "trilinear"}
    dims = len(old) - fixed
    if dims not in modes:
        raise UsageError(
            f"A learned position table over {', '.join(axes)} cannot be resized.", "Use positions: sincos."
        )
    width = table.shape[-1]
    groups = math.prod(old[:fixed])
    grid = table.to(torch.float32).reshape(groups, *old[fixed:], width).movedim(-1, 1)
    if dims == 2:
        grid = F.interpolate(grid, size=new[fixed:], mode="bicubic", antialias=True)
    else:
        grid = F.interpolate(grid, size=new[fixed:], mode=modes[dims])
    return grid.movedim(1, -1).reshape(1, -1, width).to(table.dtype)


def check_regular(layout: TokenLayout) -> tuple[int, ...]:
    """The layout's grid, for a table that knows tokens by their number.

    Raises:
        UsageError: if the tokens fill no grid, or stand at coordinates of their own (dates).
    """
    if layout.shape is None or layout.coords.dim() == 3:
        raise UsageError(
            "A learned position table counts tokens on an even grid; these tokens have coordinates of their own "
            f"along {', '.join(layout.axes)}.",
            "Set model.positions to sincos or rotary.",
        )
    return layout.shape
