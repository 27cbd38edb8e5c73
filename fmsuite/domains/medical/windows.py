"""The box of a volume that is worth looking at, and windows over it, in the volume's own voxels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fmsuite.tiling.grid import box_shares, window_grid


def bounding_box(mask: np.ndarray) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """(z, y, x) of the first and of the last own voxel of the foreground along each axis.

    Args:
        mask: (z, y, x) bool, at least one voxel.
    """
    ends = []
    for axis in range(3):
        present = np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != axis)))
        ends.append((int(present[0]), int(present[-1])))
    return (ends[0][0], ends[1][0], ends[2][0]), (ends[0][1], ends[1][1], ends[2][1])


def resampled_box(
    box: Sequence[Sequence[int]],
    own_spacing: Sequence[float],
    ratio: Sequence[float],
    shape: Sequence[int],
    margin: float | None,
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Where a box of own voxels and a margin around it lie in the resampled volume, in whole voxels inside it.

    Args:
        box: first and last own voxel along (z, y, x).
        own_spacing: (z, y, x) millimetres of own voxels.
        shape: of the resampled volume.
        margin: millimetres; ``None`` for the whole volume.

    Returns:
        start and length along (z, y, x).
    """
    if margin is None:
        return (0, 0, 0), (int(shape[0]), int(shape[1]), int(shape[2]))
    start, length = [], []
    for axis in range(3):
        reach = margin / own_spacing[axis]
        low = max(0, int(np.floor((box[0][axis] - reach) / ratio[axis])))
        high = min(shape[axis], int(np.ceil((box[1][axis] + reach) / ratio[axis])) + 1)
        low = min(low, high - 1)
        start.append(low)
        length.append(high - low)
    return (start[0], start[1], start[2]), (length[0], length[1], length[2])


def windows_over(
    mask: np.ndarray,
    ratio: Sequence[float],
    shape: Sequence[int],
    covered: tuple[Sequence[int], Sequence[int]],
    size: Sequence[int],
    stride: Sequence[int],
) -> tuple[np.ndarray, np.ndarray]:
    """A grid of windows that covers a box.

    Windows begin at whole voxels of the resampled volume and stay inside it. Along an axis where the volume is
    shorter than a window, the one window is centred on the volume and reaches beyond both ends; where only the box is
    shorter, the one window is centred on the box.

    Args:
        mask: (z, y, x) bool, the foreground in own voxels.
        ratio: own voxels in one resampled voxel, along (z, y, x).
        shape: of the resampled volume.
        covered: start and length of the box in the resampled volume, inside it.
        size, stride: of the windows, in resampled voxels.

    Returns:
        (N, 3) float64 corners in own voxel edges, and (N,) the foreground's share of the part of each window that lies
        inside the volume.
    """
    origin, lengths = [], []
    for axis in range(3):
        low, high = covered[0][axis], covered[0][axis] + covered[1][axis]
        room = shape[axis] - size[axis]
        if room < 0:
            origin.append(-((-room) // 2))
            lengths.append(size[axis])
        elif high - low <= size[axis]:
            origin.append(min(max(low - (size[axis] - (high - low)) // 2, 0), room))
            lengths.append(size[axis])
        else:
            origin.append(low)
            lengths.append(high - low)
    starts = window_grid(lengths, size, stride, origin=origin, edges="shift")
    scale = np.asarray(ratio, dtype=np.float64)
    corners = to_own(starts, scale)
    extents = np.asarray(size) * scale
    inside = box_shares(np.ones(mask.shape, dtype=bool), corners, extents)
    return corners, box_shares(mask, corners, extents) / inside


def to_own(starts: np.ndarray, ratio: np.ndarray) -> np.ndarray:
    """Where resampled voxels begin, in own voxel edges."""
    return starts * ratio + (1 - ratio) / 2


def to_resampled(corners: np.ndarray, ratio: np.ndarray) -> np.ndarray:
    """The inverse of ``to_own``, rounded to whole voxels, int64."""
    return np.round((corners - (1 - ratio) / 2) / ratio).astype(np.int64)
