"""Label maps of folders in eo-learn's layout: ``mask_timeless/NAME.npy``, an array (rows, columns, 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fmsuite.core.data.sample import Array
from fmsuite.errors import ReadFailure


@dataclass(frozen=True)
class ArrayMap:
    """Labels on the very pixels of the source.

    Attributes:
        labels: (rows, columns) int16.
        unknown: where there is none.
    """

    labels: Array
    unknown: int

    def at(self, start: Sequence[float], step: Sequence[float], size: Sequence[int]) -> Array:
        """(*size) int16: those of the pixels in which the middles of samples lie."""
        rows, columns = (
            np.floor(begin + (np.arange(count) + 0.5) * length).astype(np.int64)
            for begin, length, count in zip(start, step, size, strict=True)
        )
        height, width = self.labels.shape
        inside = np.ix_((rows >= 0) & (rows < height), (columns >= 0) & (columns < width))
        found = np.full(tuple(size), self.unknown, np.int16)
        found[inside] = self.labels[rows[inside[0][:, 0]][:, None], columns[inside[1][0]]]
        return found

    def close(self) -> None:
        """Nothing: the array is let go of with it."""


def open_array_map(path: str, shape: tuple[int, int], ignore: Sequence[int], unknown: int, stage: str) -> ArrayMap:
    """
    Args:
        shape: (rows, columns) of the source.
        ignore: values that are not known.

    Raises:
        ReadFailure: if it is no array of whole numbers of 16 bits, or has another shape.
    """
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise ReadFailure(path, stage, f"not an array that numpy reads ({reason}).", "Fetch it again.") from error
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "biu" or values.shape != (*shape, 1):
        said = f"{values.dtype} of {values.shape}" if isinstance(values, np.ndarray) else "an archive"
        raise ReadFailure(path, stage, f"it is {said}, not whole numbers of {(*shape, 1)}.", "Correct data.maps.")
    limits = np.iinfo(np.int16)
    if int(values.min()) < limits.min or int(values.max()) > limits.max:
        raise ReadFailure(path, stage, f"it has labels up to {values.max()}.", f"Renumber them up to {limits.max}.")
    labels = np.where(np.isin(values[..., 0], ignore), unknown, values[..., 0].astype(np.int16))
    return ArrayMap(labels.astype(np.int16), unknown)
