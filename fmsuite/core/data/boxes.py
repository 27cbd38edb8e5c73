"""Whole arrays as Zarr v3 in one shard each, cut into small chunks, so that a box at any place touches few of them."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from fmsuite.core.data.shards import ShardFile, ShardWriter, create_grid, file_digest, shard_file
from fmsuite.core.zarr_arrays import Damaged

ABOUT = "zarr.json"
CHUNK_SAMPLES = 2**15
"""In a chunk at most, along the axes that are cut: 32^3 of a volume, so that a crop of 96^3 decodes 2.3 times what it
keeps."""
CHUNK_BYTES = 2**18
"""In a chunk at most, of all channels: 64^2 pixels of 13 bands of 16 bits. Where more are decoded at once, what the
processor has to do for each chunk is outweighed by what is decoded and not kept."""


def chunk_of(size: Sequence[int], sample_bytes: int = 1) -> tuple[int, ...]:
    """Edges of a chunk of an array that is cut along all of these axes: powers of two, equal but along axes that are
    shorter, which leave more to the others.

    Args:
        sample_bytes: of all channels together. An array of more has edges that divide those of one that has less.
    """
    chunk, left = list(size), max(1, min(CHUNK_SAMPLES, CHUNK_BYTES // sample_bytes))
    axes = sorted(range(len(size)), key=lambda axis: size[axis])
    for number, axis in enumerate(axes):
        edge = 2 ** int(math.log2(left) / (len(size) - number) + 1e-9)
        if size[axis] > edge:
            for longer in axes[number:]:
                chunk[longer] = edge
            break
        left //= size[axis]
    return tuple(chunk)


class BoxWriter:
    """A new array, written box by box: in one go, or in pieces that are whole chunks.

    Args:
        folder: its own.
        shape, dtype: of the array.
        cut: how many of its last axes are cut into chunks; the others (channels) stay together.

    Attributes:
        chunk: edges of a chunk along all axes.

    Raises:
        OSError: if it cannot be written; so do its methods.
    """

    def __init__(self, folder: Path, shape: Sequence[int], dtype: np.dtype, cut: int) -> None:
        self.folder, self.shape, self.dtype = folder, tuple(shape), np.dtype(dtype)
        self._whole = len(self.shape) - cut
        together = self.dtype.itemsize * math.prod(self.shape[: self._whole])
        self.chunk = (*self.shape[: self._whole], *chunk_of(self.shape[self._whole :], together))
        self._grid = tuple(-(-length // edge) for length, edge in zip(self.shape, self.chunk, strict=True))
        self._path = shard_file(folder, 0, len(self.shape) - 1)
        self._writer = ShardWriter(self._path, math.prod(self._grid))

    def __enter__(self) -> BoxWriter:
        return self

    def add(self, start: Sequence[int], values: np.ndarray) -> None:
        """A box that has not been written yet.

        Args:
            start: where it begins along the axes that are cut.
            values: (*all of the others, *size of the box).

        Raises:
            ValueError: unless it consists of whole chunks, those at the array's end apart.
        """
        first = (0,) * self._whole + tuple(start)
        ends = [a + n for a, n in zip(first, values.shape, strict=True)]
        fits = all(
            a % edge == 0 and a < end <= length and (end % edge == 0 or end == length)
            for a, end, edge, length in zip(first, ends, self.chunk, self.shape, strict=True)
        )
        if not fits or values.dtype != self.dtype:
            raise ValueError(
                f"a {values.dtype} box at {first} of {values.shape} in a {self.dtype} array of {self.shape} in chunks "
                f"of {self.chunk}"
            )
        numbers = [range(a // edge, -(-end // edge)) for a, end, edge in zip(first, ends, self.chunk, strict=True)]
        for place in itertools.product(*numbers):
            box = values[
                tuple(
                    slice(k * edge - a, (k + 1) * edge - a) for k, edge, a in zip(place, self.chunk, first, strict=True)
                )
            ]
            missing = [(0, edge - length) for edge, length in zip(self.chunk, box.shape, strict=True)]
            slot = int(np.ravel_multi_index(place, self._grid))
            self._writer.add(slot, np.pad(box, missing) if any(map(any, missing)) else box)

    def finish(self) -> dict[Path, tuple[int, str]]:
        """Put it in its place.

        Returns:
            Its files, each with its length in bytes and its SHA-256.
        """
        files = {self._path: self._writer.finish()}
        create_grid(self.folder, self.shape, self.chunk, self.dtype)
        return files | {self.folder / ABOUT: file_digest(self.folder / ABOUT)}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.__exit__(kind, error, trace)


def write_boxes(folder: Path, values: np.ndarray, cut: int) -> dict[Path, tuple[int, str]]:
    """A whole array; see ``BoxWriter``."""
    with BoxWriter(folder, values.shape, values.dtype, cut) as writer:
        writer.add((0,) * cut, values)
        return writer.finish()


class BoxArray:
    """An open array that ``BoxWriter`` made: one file descriptor and the places of its chunks.

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
        for cell, decoded in zip(cells, self._shard.read_each(slots, self.chunk, self.dtype, reuse=True), strict=True):
            out[tuple(part[2] for part in cell)] = decoded[tuple(part[1] for part in cell)]
        return out

    def close(self) -> None:
        self._shard.close()


def _part(number: int, edge: int, start: int, length: int) -> tuple[int, slice, slice]:
    begin = number * edge
    low, high = max(start, begin), min(start + length, begin + edge)
    return number, slice(low - begin, high - begin), slice(low - start, high - start)
