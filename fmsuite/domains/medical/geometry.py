"""Between the three grids of a volume: the file's own (native), the same turned to RAS, and the resampled one.

The resampled grid has the axes of the RAS one, and the RAS one those of the file in another order and direction, so
every step works axis by axis: swapping and reversing is exact, and linear interpolation in three dimensions is one in
each. MONAI's ``Spacing`` and ``SpatialResample`` interpolate along all axes at once in a grid of float coordinates,
three numbers a voxel, which rounds positions and takes several times a volume's memory for each of K score maps; its
``Invertd`` holds both. So the way back is done here, and the way there, which training uses, is MONAI's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fmsuite.domains.medical.formats.base import Grid


def turn_to_ras(native: Grid) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """How a file's axes become RAS.

    Returns:
        for each of the RAS axes (x, y, z), the file's axis that becomes it, and whether it is reversed.
    """
    import nibabel

    orientation = nibabel.orientations.io_orientation(native.affine).astype(int)
    order = tuple(int(np.flatnonzero(orientation[:, 0] == axis)[0]) for axis in range(3))
    reverse = tuple(bool(orientation[axis, 1] < 0) for axis in order)
    return (order[0], order[1], order[2]), (reverse[0], reverse[1], reverse[2])


def to_own(values: np.ndarray, native: Grid) -> np.ndarray:
    """(..., I, J, K) on the file's grid to (..., z, y, x) own voxels; a view."""
    order, reverse = turn_to_ras(native)
    lead = values.ndim - 3
    turned = values.transpose(*range(lead), *(lead + axis for axis in reversed(order)))
    return np.flip(turned, tuple(lead + 2 - axis for axis in range(3) if reverse[axis]))


def to_native(values: np.ndarray, native: Grid) -> np.ndarray:
    """The inverse of ``to_own``: (..., z, y, x) own voxels to (..., I, J, K); a view."""
    order, reverse = turn_to_ras(native)
    lead = values.ndim - 3
    turned = np.flip(values, tuple(lead + 2 - axis for axis in range(3) if reverse[axis]))
    # File axis order[i] is RAS axis i, which is axis 2 - i of (z, y, x).
    places = [0, 0, 0]
    for axis, file_axis in enumerate(order):
        places[file_axis] = lead + 2 - axis
    return turned.transpose(*range(lead), *places)


def nearest(values: np.ndarray, ratio: Sequence[float], shape: Sequence[int]) -> np.ndarray:
    """(z, y, x) own voxels to the resampled grid, each voxel that of the nearest centre.

    MONAI's nearest mode goes through float32 values and coordinates, and a label that lies half-way is then decided by
    rounding errors; here by ``numpy.rint``.
    """
    for axis in range(3):
        places = np.rint(np.arange(shape[axis]) * ratio[axis]).astype(int).clip(max=values.shape[axis] - 1)
        values = values.take(places, axis=axis)
    return values


def linear_back(
    scores: np.ndarray, start: Sequence[int], ratio: Sequence[float], shape: Sequence[int], outside: float
) -> np.ndarray:
    """A box of the resampled grid, interpolated linearly at the own voxels' centres.

    A centre up to half a resampled voxel beyond the first or last of the box gets its value; where the ratio is 1 along
    all axes, values are copied.

    Args:
        scores: (K, z, y, x) float32, the box.
        start: (z, y, x) where it begins, in resampled voxels.
        ratio: (z, y, x) own voxels in one resampled.
        shape: (z, y, x) own voxels of the volume.
        outside: value of own voxels beyond the box.

    Returns:
        (K, *shape) float32.
    """
    inside = []
    for axis in range(3):
        places = np.arange(shape[axis]) / ratio[axis] - start[axis]
        last = scores.shape[1 + axis] - 1
        near = np.flatnonzero((places >= -0.5 - 1e-9) & (places <= last + 0.5 + 1e-9))
        inside.append(slice(int(near[0]), int(near[-1]) + 1) if len(near) else slice(0, 0))
        scores = _along(scores, 1 + axis, places[near].clip(0, last))
    whole = np.full((len(scores), *shape), outside, dtype=np.float32)
    whole[(slice(None), *inside)] = scores
    return whole


def _along(values: np.ndarray, axis: int, places: np.ndarray) -> np.ndarray:
    """Linear interpolation along one axis, at positions between its first and last sample."""
    low = np.floor(places).astype(int)
    share = (places - low).astype(np.float32)
    below = values.take(low, axis=axis)
    if not share.any():
        return below
    above = values.take(np.minimum(low + 1, values.shape[axis] - 1), axis=axis)
    share = share.reshape([-1 if other == axis else 1 for other in range(values.ndim)])
    # Not below + share * (above - below), which makes NaN of equal infinite neighbours.
    with np.errstate(invalid="ignore"):
        return np.where(share == 0, below, below * (1 - share) + above * share)
