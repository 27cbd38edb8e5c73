"""From a resampled grid back to the pixels of a file, box by box."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fmsuite.core.data.sample import Array

_SAME = 1e-9


def source_range(start: int, length: int, pitch: float, size: int) -> tuple[int, int]:
    """First sample of the grid, and the one after the last, that ``linear_back`` needs for pixels along an axis.

    Args:
        start, length: the pixels.
        pitch: pixels a sample. size: samples there are.
    """
    first, last = ((pixel + 0.5) / pitch - 0.5 for pixel in (start, start + length - 1))
    low = min(max(int(np.floor(first + _SAME)), 0), size - 1)
    return low, min(max(int(np.floor(last + _SAME)) + 2, low + 1), size)


def linear_back(
    values: Array, begin: Sequence[int], pitch: Sequence[float], start: Sequence[int], shape: Sequence[int]
) -> Array:
    """Linear interpolation at the centres of pixels; beyond the outermost samples their value goes on.

    Args:
        values: (K, y, x) float, a box of the grid.
        begin: where the box begins in the grid, samples.
        pitch: pixels a sample along (y, x); a sample covers ``k * pitch`` to ``(k + 1) * pitch``.
        start, shape: the box of pixels wanted.

    Returns:
        (K, *shape) of the values' dtype; where a pixel is a sample, the same bits.
    """
    found = values
    for axis in (0, 1):
        at = (start[axis] + np.arange(shape[axis]) + 0.5) / pitch[axis] - 0.5 - begin[axis]
        nearest = np.rint(at)
        at = np.where(np.abs(at - nearest) < _SAME * max(1.0, abs(start[axis])), nearest, at)
        at = at.clip(0, found.shape[axis + 1] - 1)
        low = np.floor(at).astype(np.int64)
        if (at == low).all():
            found = found if np.array_equal(low, np.arange(found.shape[axis + 1])) else found.take(low, axis + 1)
            continue
        share = (at - low).astype(found.dtype).reshape(-1, *[1] * (1 - axis))
        high = np.minimum(low + 1, found.shape[axis + 1] - 1)
        # Not low + share * (high - low): equal samples are to stay what they are, infinite ones too.
        found = np.where(
            share == 0,
            found.take(low, axis + 1),
            found.take(low, axis + 1) * (1 - share) + found.take(high, axis + 1) * share,
        )
    return np.ascontiguousarray(found)
