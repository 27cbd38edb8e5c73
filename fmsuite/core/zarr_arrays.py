"""Arrays in a Zarr folder, with a checksum in every chunk, so that damage is noticed and its file can be named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec


class Damaged(Exception):
    """A file of an array that is missing or not as it was written."""

    def __init__(self, file: Path, reason: str) -> None:
        self.file = file
        self.reason = reason
        super().__init__(f"{file}: {reason}")


def write_array(folder: Path, values: np.ndarray, rows_per_chunk: int) -> None:
    """A new array, uncompressed, cut along its first axis.

    Raises:
        OSError: if it cannot be written.
    """
    array = zarr.create_array(
        str(folder),
        shape=values.shape,
        dtype=values.dtype,
        chunks=(rows_per_chunk, *values.shape[1:]),
        compressors=[Crc32cCodec()],
        # Otherwise a chunk of zeros would have no file, and could not be told from a lost one.
        config={"write_empty_chunks": True},
    )
    array[:] = values


def read_array(folder: Path) -> np.ndarray:
    """All of an array that ``write_array`` made.

    Raises:
        Damaged: naming the file.
    """
    try:
        array = zarr.open_array(str(folder), mode="r")
        length, chunk = array.shape[0], array.chunks[0]
    except Exception as error:
        # zarr raises whatever JSON, the file system or its own checks meet.
        raise Damaged(folder / "zarr.json", _one_line(error)) from error
    files = [_chunk_file(folder, number, array.ndim) for number in range(-(-length // chunk))]
    for file in files:
        # zarr takes a chunk without a file for one of zeros.
        if not file.is_file():
            raise Damaged(file, "it is missing")
    try:
        return np.asarray(array[:])
    except Exception as error:
        for number, file in enumerate(files):
            try:
                array[number * chunk : (number + 1) * chunk]
            except Exception as reason:
                raise Damaged(file, _one_line(reason)) from error
        raise Damaged(folder, _one_line(error)) from error


def array_length(folder: Path) -> int:
    """Rows of an array, from its description alone.

    Raises:
        Damaged: naming the file.
    """
    file = folder / "zarr.json"
    try:
        return int(json.loads(file.read_text(encoding="utf-8"))["shape"][0])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise Damaged(file, _one_line(error)) from error


def _chunk_file(folder: Path, number: int, dims: int) -> Path:
    return folder.joinpath("c", str(number), *["0"] * (dims - 1))


def _one_line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__).rstrip(".")
