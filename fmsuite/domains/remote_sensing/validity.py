"""Which values of a file are data: nodata values, masks, numbers that are none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def nodata_values(declared: Sequence[float | None], stored: np.dtype) -> tuple[float, ...]:
    """Of what is declared, each value once that a type can hold. What is not finite is no data in any case."""
    return tuple(dict.fromkeys(value for value in declared if value is not None and _holds(stored, value)))


def mask_of(flags: list[Any], number: int) -> int:
    """How a file marks pixels of a band beside nodata values: 0 for not at all; the band's number for a mask of its
    own; -1 for one of all bands.

    Args:
        flags: rasterio's, of the band.
    """
    from rasterio.enums import MaskFlags

    if MaskFlags.all_valid in flags or flags == [MaskFlags.nodata]:
        return 0
    # One mask, whichever band it is asked of.
    return -1 if MaskFlags.per_dataset in flags else number


def valid_values(
    values: np.ndarray,
    numbers: Sequence[int],
    nodata: Mapping[int, tuple[float, ...]],
    masked: Mapping[int, int],
    masks: Mapping[int, np.ndarray],
) -> np.ndarray:
    """Which values are data.

    Args:
        values: (C, h, w) of the bands with these numbers.
        nodata: by band number, as ``nodata_values`` has them.
        masked: by band number, as ``mask_of`` says.
        masks: by what ``mask_of`` says, (h, w) bool.
    """
    of_type = values.dtype.type
    shared = nodata[numbers[0]] if len({nodata[number] for number in numbers}) == 1 else None
    if values.dtype.kind == "f":
        valid = np.isfinite(values)
    elif shared:
        valid, shared = values != of_type(shared[0]), shared[1:]
    else:
        valid = np.ones(values.shape, dtype=bool)
    for value in shared or ():
        valid &= values != of_type(value)
    for place, number in enumerate(numbers):
        if masked[number]:
            valid[place] &= masks[masked[number]]
        for value in nodata[number] if shared is None else ():
            valid[place] &= values[place] != of_type(value)
    return valid


def _holds(stored: np.dtype, value: float) -> bool:
    """Whether values of a type can equal a nodata value. Values that are not finite are invalid in any case."""
    if not math.isfinite(value):
        return False
    if stored.kind == "f":
        # Rounded as the file's values are: the largest number is often written a little too large.
        with np.errstate(over="ignore"):
            return bool(np.isfinite(stored.type(value)))
    limits = np.iinfo(stored)
    return value == int(value) and limits.min <= value <= limits.max
