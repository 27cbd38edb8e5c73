"""Shards of Zarr v3 arrays, written and read window by window: one chunk a window, thousands of chunks a file.

The files are what Zarr's ``sharding_indexed`` codec describes (Zarr v3 core specification and ZEP 2), with chunks of
``blosc`` (LZ4) and ``crc32c``, so anything that reads Zarr reads them. zarr-python 3.1 itself holds a whole shard in
memory to write it and reads a shard's index again for every chunk, which makes it several times slower at reading
single windows than the decoding takes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Literal

import google_crc32c
import numcodecs.blosc
import numpy as np
import zarr
from numcodecs import Blosc
from zarr.codecs import BloscCodec, Crc32cCodec

from fmsuite.core.zarr_arrays import Damaged

# Blosc's pool of threads does not survive a fork, and a window is too small to share out.
numcodecs.blosc.use_threads = False

_ABSENT = np.iinfo(np.uint64).max
_ENTRY = 16
_CHECKSUM = 4


def create_array(folder: Path, rows: int, per_shard: int, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """The description of an array of ``rows`` windows of one shape, whose shards lie at ``shard_file``."""
    _describe(folder, (rows, *shape), (1, *shape), (per_shard, *shape), dtype)


def create_grid(folder: Path, shape: tuple[int, ...], chunk: tuple[int, ...], dtype: np.dtype) -> None:
    """The description of an array in chunks of any shape, all in the one shard at ``shard_file(folder, 0, ...)``."""
    shard = tuple(-(-length // edge) * edge for length, edge in zip(shape, chunk, strict=True))
    _describe(folder, shape, chunk, shard, dtype)


def _describe(
    folder: Path, shape: tuple[int, ...], chunk: tuple[int, ...], shard: tuple[int, ...], dtype: np.dtype
) -> None:
    shuffle: Literal["noshuffle", "shuffle"] = "noshuffle" if dtype.itemsize == 1 else "shuffle"
    zarr.create_array(
        str(folder),
        shape=shape,
        dtype=dtype,
        chunks=chunk,
        shards=shard,
        compressors=[BloscCodec(typesize=dtype.itemsize, cname="lz4", clevel=1, shuffle=shuffle), Crc32cCodec()],
    )


def shard_file(folder: Path, number: int, dims: int) -> Path:
    """Where a shard of an array lies whose windows have ``dims`` axes."""
    return folder.joinpath("c", str(number), *["0"] * dims)


class ShardWriter:
    """Writes one shard, a window at a time; the file is whole or absent.

    Args:
        path: the shard's.
        slots: windows that it has room for.
    """

    def __init__(self, path: Path, slots: int) -> None:
        self.path = path
        self._partial = path.with_name(f".{path.name}.{os.getpid()}")
        self._index = np.full((slots, 2), _ABSENT, dtype="<u8")
        self._digest = hashlib.sha256()
        self._length = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._partial.open("wb")

    def __enter__(self) -> ShardWriter:
        return self

    def add(self, slot: int, values: np.ndarray) -> None:
        """One window, at a slot that has none yet."""
        little = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
        shuffle = Blosc.NOSHUFFLE if values.itemsize == 1 else Blosc.SHUFFLE
        # Blosc takes the size of an element from the array.
        packed = bytes(Blosc("lz4", 1, shuffle).encode(little.reshape(-1)))
        packed += google_crc32c.value(packed).to_bytes(_CHECKSUM, "little")
        self._index[slot] = self._length, len(packed)
        self._write(packed)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._length += len(data)

    def finish(self) -> tuple[int, str]:
        """Close it and put it in its place.

        Returns:
            Its length in bytes and its SHA-256.
        """
        index = self._index.tobytes()
        self._write(index + google_crc32c.value(index).to_bytes(_CHECKSUM, "little"))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._partial, self.path)
        return self._length, self._digest.hexdigest()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        with suppress(FileNotFoundError):
            self._partial.unlink()


class ShardFile:
    """An open shard: a file descriptor and the shard's index.

    Raises:
        Damaged: if it is missing, or its index is not as it was written.
    """

    def __init__(self, path: Path, slots: int) -> None:
        self.path = path
        try:
            self._file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise Damaged(path, str(error.strerror)) from error
        try:
            length = slots * _ENTRY + _CHECKSUM
            start = os.fstat(self._file).st_size - length
            tail = os.pread(self._file, length, start) if start >= 0 else b""
            if len(tail) != length or not _sound(np.frombuffer(tail, dtype=np.uint8)):
                raise Damaged(path, "its table of chunks is damaged")
            self._index = np.frombuffer(tail, dtype="<u8", count=2 * slots).reshape(slots, 2)
        except OSError as error:
            self.close()
            raise Damaged(path, str(error.strerror)) from error
        except Damaged:
            self.close()
            raise

    def read(self, slot: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """The window at a slot.

        Raises:
            Damaged: if there is none, or it is not as it was written.
        """
        (values,) = self.read_each([slot], shape, dtype)
        return values

    def read_each(
        self, slots: Sequence[int], shape: tuple[int, ...], dtype: np.dtype, reuse: bool = False
    ) -> Iterator[np.ndarray]:
        """The windows at some slots, in order; those that follow each other in the file are read at once.

        Args:
            reuse: give each in the memory of the one before, which is then lost; fresh memory costs time.

        Raises:
            Damaged: as ``read``.
        """
        entries = self._index[np.asarray(slots)]
        for slot, (offset, _) in zip(slots, entries.tolist(), strict=True):
            if offset == _ABSENT:
                raise Damaged(self.path, f"it has no window at place {slot}")
        values = np.empty(shape, dtype=dtype.newbyteorder("<"))
        gaps = np.flatnonzero(entries[1:, 0] != entries[:-1].sum(axis=1)) + 1
        for run in np.split(np.arange(len(slots)), gaps):
            first, length = int(entries[run[0], 0]), int(entries[run, 1].sum())
            try:
                # An array's slices are no copies.
                data = np.frombuffer(os.pread(self._file, length, first), dtype=np.uint8)
            except OSError as error:
                raise Damaged(self.path, str(error.strerror)) from error
            for number in run.tolist():
                begin, length = int(entries[number, 0]) - first, int(entries[number, 1])
                self._decode(slots[number], data[begin : begin + length], length, values)
                yield values
                if not reuse:
                    values = np.empty_like(values)

    def _decode(self, slot: int, packed: np.ndarray, length: int, values: np.ndarray) -> None:
        if len(packed) != length or not _sound(packed):
            raise Damaged(self.path, f"the window at place {slot} is damaged")
        # Blosc fills what it is given as far as it has data, so its header is asked first (C-Blosc's chunk format).
        if int.from_bytes(packed[4:8].tobytes(), "little") != values.nbytes:
            raise Damaged(self.path, f"the window at place {slot} is not {values.dtype} {values.shape}")
        Blosc("lz4").decode(packed[:-_CHECKSUM], values.reshape(-1))

    def close(self) -> None:
        os.close(self._file)


def _sound(data: np.ndarray) -> bool:
    return google_crc32c.value(data[:-_CHECKSUM]) == int.from_bytes(data[-_CHECKSUM:].tobytes(), "little")


def file_digest(path: Path) -> tuple[int, str]:
    """Length in bytes and SHA-256 of a file.

    Raises:
        OSError: if it cannot be read.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest
