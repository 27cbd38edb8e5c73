"""Regular window grids in any number of dimensions, and the share of each window that a mask covers.

Pure functions of numbers and arrays: they know no file, no unit and no field. Lengths may be fractional, because a
window of 256 pixels at 0.5 um/px measures 256.513 pixels of a slide scanned at 0.499 um/px.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Literal

import numpy as np

Edges = Literal["inside", "cover", "shift"]
"""What happens at the far end of an axis whose length is not a whole number of strides.

inside: only windows that lie wholly inside; a strip narrower than one stride may stay uncovered at the far end.
cover: as many windows as it takes to reach the far end; the last may reach beyond it.
shift: as many windows as ``cover``, the last moved back to end exactly at the far end, so that windows lie inside and
    overlap more there. An axis shorter than a window has one window, at its start, which reaches beyond the end.

``cover`` and ``shift`` leave no point uncovered as long as the stride is not larger than the window.
"""

_SLACK = 1e-6
"""Lengths that differ by less than this, in units of the axis, count as equal: they come out of divisions."""


def window_starts(length: float, size: float, stride: float | None = None, edges: Edges = "inside") -> np.ndarray:
    """Where windows begin along one axis of the given length, ascending from 0.

    Args:
        length: of the axis, any unit.
        size: of a window, same unit.
        stride: from one start to the next; ``size`` if not given.
        edges: the rule at the far end.

    Returns:
        (N,) float64; empty for ``inside`` where no window fits, and for an axis of no length.

    Raises:
        ValueError: if size or stride is not positive.
    """
    stride = size if stride is None else stride
    if not (size > 0 and stride > 0):
        raise ValueError(f"a window of size {size} with stride {stride} is not possible")
    room = length - size
    if length <= 0 or (edges == "inside" and room < -_SLACK):
        return np.zeros(0)
    if edges == "inside":
        count = int(np.floor((room + _SLACK) / stride)) + 1
    else:
        count = max(0, int(np.ceil((room - _SLACK) / stride))) + 1
    starts = np.arange(count, dtype=np.float64) * stride
    if edges == "shift":
        starts = np.minimum(starts, max(room, 0.0))
    return starts


def window_grid(
    lengths: Sequence[float],
    sizes: Sequence[float],
    strides: Sequence[float] | None = None,
    *,
    origin: Sequence[float] | None = None,
    edges: Edges = "inside",
) -> np.ndarray:
    """Corners of all windows of a box, in row-major order (the last axis fastest).

    Args:
        lengths: of the box along each of its A axes.
        sizes: of a window.
        strides: from one window to the next; ``sizes`` if not given. The overlap is ``size - stride``.
        origin: the box's corner, added to every position; zeros if not given.
        edges: the rule at the far ends.

    Returns:
        (N, A) float64.

    Raises:
        ValueError: if the arguments differ in length, or a size or stride is not positive.
    """
    strides = sizes if strides is None else strides
    origin = [0.0] * len(lengths) if origin is None else origin
    axes = [
        window_starts(length, size, stride, edges) + start
        for length, size, stride, start in zip(lengths, sizes, strides, origin, strict=True)
    ]
    mesh = np.meshgrid(*axes, indexing="ij")
    return np.stack([axis.reshape(-1) for axis in mesh], axis=1)


def integral_image(mask: np.ndarray) -> np.ndarray:
    """Sums over all boxes that begin at the origin (Crow 1984, "Summed-area tables for texture mapping").

    Args:
        mask: A-dimensional, bool or numeric.

    Returns:
        float64, one longer along each axis: entry ``[i, j]`` is the sum of ``mask[:i, :j]``.
    """
    table = np.zeros([n + 1 for n in mask.shape])
    inner = table[(slice(1, None),) * mask.ndim]
    inner[...] = mask
    for axis in range(mask.ndim):
        np.cumsum(inner, axis=axis, out=inner)
    return table


def box_shares(mask: np.ndarray, starts: np.ndarray, sizes: Sequence[float] | np.ndarray) -> np.ndarray:
    """The mean of a mask over each box; boxes may begin and end inside a cell and reach beyond the mask.

    The mask is taken as constant over each cell and zero outside, so the integral image is multilinear within a cell
    and interpolating it is exact.

    Args:
        mask: A-dimensional, bool or numeric.
        starts: (N, A) corners, in cells of the mask.
        sizes: (A,) or (N, A) lengths of the boxes, in cells of the mask.

    Returns:
        (N,) float64: for a bool mask the share of the box that is True, 0 to 1.

    Raises:
        ValueError: if a box has no volume or the shapes do not match.
    """
    starts = np.asarray(starts, dtype=np.float64)
    extents = np.broadcast_to(np.asarray(sizes, dtype=np.float64), starts.shape)
    if starts.ndim != 2 or starts.shape[1] != mask.ndim:
        raise ValueError(f"boxes of shape {starts.shape} do not match a mask of {mask.ndim} axes")
    if (extents <= 0).any():
        raise ValueError("a box has no volume")
    table = integral_image(mask)
    limits = np.asarray(mask.shape, dtype=np.float64)
    corners = (np.clip(starts, 0, limits), np.clip(starts + extents, 0, limits))
    total = np.zeros(len(starts))
    for choice in product((0, 1), repeat=mask.ndim):
        corner = np.stack([corners[side][:, axis] for axis, side in enumerate(choice)], axis=1)
        sign = -1 if (mask.ndim - sum(choice)) % 2 else 1
        total += sign * _interpolate(table, corner)
    # Differences of large sums leave rounding noise of either sign.
    return np.where(total > 1e-9, total, 0.0) / extents.prod(axis=1)


def _interpolate(table: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Multilinear interpolation of ``table`` at (N, A) points inside it."""
    last = np.asarray(table.shape) - 1
    lower = np.minimum(np.floor(points).astype(np.int64), last)
    upper = np.minimum(lower + 1, last)
    weight = points - lower
    result = np.zeros(len(points))
    for choice in product((0, 1), repeat=table.ndim):
        place = tuple((upper if side else lower)[:, axis] for axis, side in enumerate(choice))
        share = np.prod([weight[:, a] if side else 1 - weight[:, a] for a, side in enumerate(choice)], axis=0)
        result += share * table[place]
    return result
