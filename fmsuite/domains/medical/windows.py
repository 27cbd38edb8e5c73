"""Windows over a volume's foreground, in the volume's own voxels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fmsuite.tiling.grid import box_shares, window_grid


def windows_over(
    mask: np.ndarray, ratio: Sequence[float], shape: Sequence[int], size: Sequence[int], stride: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """A grid of windows that covers the box around the foreground.

    Windows begin at whole voxels of the resampled volume and stay inside it. Along an axis where the volume is
    shorter than a window, the one window is centred on the volume and reaches beyond both ends; where only the
    foreground is shorter, the one window is centred on the foreground.

    Args:
        mask: (z, y, x) bool, the foreground in own voxels; at least one voxel.
        ratio: own voxels in one resampled voxel, along (z, y, x).
        shape: of the resampled volume.
        size, stride: of the windows, in resampled voxels.

    Returns:
        (N, 3) float64 corners in own voxel edges, and (N,) the foreground's share of the part of each window that lies
        inside the volume.
    """
    origin, lengths = [], []
    for axis in range(3):
        present = np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != axis)))
        low = max(0, int(np.floor(present[0] / ratio[axis])))
        high = min(shape[axis], int(np.ceil(present[-1] / ratio[axis])) + 1)
        low = min(low, high - 1)
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
