"""Whole arrays as Zarr v3 in one shard each, cut into small chunks, so that a box at any place touches few of them."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fmsuite.core.data.shards import ShardFile, ShardWriter, create_grid, file_digest, shard_file
from fmsuite.core.zarr_arrays import Damaged

ABOUT = "zarr.json"
CHUNK_SAMPLES = 2**15
"""In a chunk, along the axes that are cut: 32^3 of a volume, so that a crop of 96^3 decodes 2.3 times what it keeps."""


def chunk_of(size: Sequence[int]) -> tuple[int, ...]:
    """Edges of a chunk of an array that is cut along all of these axes: equal powers of two, no longer than they."""
    edge = 2 ** int(math.log2(CHUNK_SAMPLES) // len(size))
    return tuple(min(edge, length) for length in size)


def write_boxes(folder: Path, values: np.ndarray, cut: int) -> dict[Path, tuple[int, str]]:
    """A new array.

    Args:
        folder: its own.
        values: of any shape.
        cut: how many of its last axes are cut into chunks; the others (channels) stay together.

    Returns:
        Its files, each with its length in bytes and its SHA-256.

    Raises:
        OSError: if it cannot be written.
    """
    whole = values.shape[: values.ndim - cut]
    chunk = (*whole, *chunk_of(values.shape[values.ndim - cut :]))
    grid = tuple(-(-length // edge) for length, edge in zip(values.shape, chunk, strict=True))
    path = shard_file(folder, 0, values.ndim - 1)
    with ShardWriter(path, math.prod(grid)) as writer:
        for slot, place in enumerate(itertools.product(*map(range, grid))):
            box = values[tuple(slice(k * edge, (k + 1) * edge) for k, edge in zip(place, chunk, strict=True))]
            missing = [(0, edge - length) for edge, length in zip(chunk, box.shape, strict=True)]
            writer.add(slot, np.pad(box, missing) if any(map(any, missing)) else box)
        files = {path: writer.finish()}
    create_grid(folder, values.shape, chunk, values.dtype)
    return files | {folder / ABOUT: file_digest(folder / ABOUT)}


class BoxArray:
    """An open array that ``write_boxes`` made: one file descriptor and the places of its chunks.

    Attributes:
        shape, dtype, chunk: as it was written.

    Raises:
        Damaged: if a file of it is missing or not as it was written.
    """

    def __init__(self, folder: Path) -> None:
        about = folder / ABOUT
        try:
            raw = json.loads(about.read_text(encoding="utf-8"))
            self.shape = tuple(map(int, raw["shape"]))
            self.dtype = np.dtype(raw["data_type"])
            (sharding,) = raw["codecs"]
            self.chunk = tuple(map(int, sharding["configuration"]["chunk_shape"]))
            self._grid = tuple(-(-n // edge) for n, edge in zip(self.shape, self.chunk, strict=True))
        except (OSError, ValueError, LookupError, TypeError, ZeroDivisionError) as error:
            raise Damaged(about, f"it does not describe an array ({error})") from error
        self._shard = ShardFile(shard_file(folder, 0, len(self.shape) - 1), math.prod(self._grid))

    def read(self, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
        """A box along the last axes, (*all of the others, *size), from the chunks that it touches.

        Raises:
            ValueError: if it does not lie inside the array.
            Damaged: if a chunk is not as it was written.
        """
        whole = self.shape[: len(self.shape) - len(size)]
        start, size = (0,) * len(whole) + tuple(start), whole + tuple(size)
        if any(a < 0 or n < 1 or a + n > limit for a, n, limit in zip(start, size, self.shape, strict=True)):
            raise ValueError(f"a box at {start} of {size} in an array of {self.shape}")
        out = np.empty(size, dtype=self.dtype)
        # For each axis: number of a chunk, what of it is wanted, and where that goes.
        parts = [
            [_part(k, edge, a, n) for k in range(a // edge, -(-(a + n) // edge))]
            for a, n, edge in zip(start, size, self.chunk, strict=True)
        ]
        cells = list(itertools.product(*parts))
        places = np.array([[number for number, _, _ in cell] for cell in cells])
        slots = np.ravel_multi_index(tuple(places.T), self._grid).tolist()
        for cell, decoded in zip(cells, self._shard.read_each(slots, self.chunk, self.dtype), strict=True):
            out[tuple(part[2] for part in cell)] = decoded[tuple(part[1] for part in cell)]
        return out

    def close(self) -> None:
        self._shard.close()


def _part(number: int, edge: int, start: int, length: int) -> tuple[int, slice, slice]:
    begin = number * edge
    low, high = max(start, begin), min(start + length, begin + edge)
    return number, slice(low - begin, high - begin), slice(low - start, high - start)
