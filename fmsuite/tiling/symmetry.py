"""Right-angle turns and mirror images of what is seen from above, where no direction means anything."""

from __future__ import annotations

import numpy as np

from fmsuite.core.data.sample import Array, ArraySample


def turned(sample: ArraySample, quarters: int, mirrored: bool) -> ArraySample:
    """One of the eight symmetries of the square, or of the four of a rectangle; the last two axes are (y, x).

    Args:
        quarters: quarter turns, anticlockwise; of a rectangle, an odd one is left out.
        mirrored: mirror along x afterwards.

    Returns:
        A sample with values, validity, maps and spacing turned together.
    """
    height, width = sample.size[-2:]
    if height != width:
        quarters -= quarters % 2

    def move(array: Array) -> Array:
        array = np.rot90(array, quarters, axes=(-2, -1))
        return np.ascontiguousarray(array[..., ::-1] if mirrored else array)

    spacing = sample.spacing
    if spacing is not None and quarters % 2:
        spacing = (*spacing[:-2], spacing[-1], spacing[-2])
    return sample.replace(
        values=move(sample.values),
        valid=None if sample.valid is None else move(sample.valid),
        spacing=spacing,
        maps={name: move(labels) for name, labels in sample.maps.items()},
    )
