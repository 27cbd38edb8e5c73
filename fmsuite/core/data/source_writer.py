"""The arrays of one source, written piece by piece: values, where they are valid, label maps."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

import numpy as np

from fmsuite.core.data.boxes import BoxWriter
from fmsuite.core.data.packed_scenes import MAP, VALID, VALUES
from fmsuite.core.data.sample import Array, ArraySample
from fmsuite.errors import UsageError


class SourceWriter:
    """Writes the arrays of a source. What all pieces must agree on is known from the first.

    Args:
        source: its path, for messages.
        home: the folder of its arrays.
        size: samples along each axis.
        half: keep floating-point values in half precision.
    """

    def __init__(self, source: str, home: Path, size: Sequence[int], half: bool) -> None:
        self.source, self.home, self.size, self.half = source, home, tuple(size), half
        self.first: ArraySample | None = None
        self._open = ExitStack()
        self._arrays: dict[str, BoxWriter] = {}
        self._all_valid: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def __enter__(self) -> SourceWriter:
        return self

    def add(self, start: Sequence[int], sample: ArraySample) -> None:
        """A piece of whole chunks (``BoxWriter.add``).

        Raises:
            UsageError: if a value is too large for half precision.
            ValueError: if it does not go with the first.
            OSError: if it cannot be written.
        """
        if self.first is None:
            none = {name: labels[:0].copy() for name, labels in sample.maps.items()}
            self.first = sample.replace(values=sample.values[:, :0].copy(), valid=None, maps=none)
        elif not _alike(self.first, sample):
            raise ValueError(f"a piece of {self.source} at {tuple(start)} is not of the same kind as its first")
        self._write(VALUES, start, _halved(self.source, sample.values) if self.half else sample.values)
        self._write_valid(tuple(start), sample)
        for name, labels in sample.maps.items():
            # A map that is alike for all dates is kept with each: then a piece is whole chunks of it as of the values.
            self._write(MAP + quote(name, safe=""), start, np.ascontiguousarray(np.broadcast_to(labels, sample.size)))

    def _write_valid(self, start: tuple[int, ...], sample: ArraySample) -> None:
        """Where every piece is valid throughout, there is no such array: it begins with the first that is not."""
        valid = None if sample.valid is None or sample.valid.all() else sample.valid
        if valid is None and VALID not in self._arrays:
            self._all_valid.append((start, sample.size))
            return
        if valid is None:
            valid = np.ones((self._arrays[VALID].shape[0], *sample.size), dtype=bool)
        for earlier, size in self._all_valid:
            self._write(VALID, earlier, np.ones((len(valid), *size), dtype=bool))
        self._all_valid.clear()
        self._write(VALID, start, valid)

    def _write(self, name: str, start: Sequence[int], values: Array) -> None:
        if name not in self._arrays:
            shape = (*values.shape[: values.ndim - len(self.size)], *self.size)
            writer = BoxWriter(self.home / name, shape, values.dtype, len(self.size))
            self._arrays[name] = self._open.enter_context(writer)
        self._arrays[name].add(start, values)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the arrays."""
        return tuple(sorted(self._arrays, key=lambda name: (name != VALUES, name != VALID)))

    def finish(self) -> dict[Path, tuple[int, str]]:
        """Put all arrays in their places.

        Returns:
            Their files, each with its length in bytes and its SHA-256.
        """
        files: dict[Path, tuple[int, str]] = {}
        for name in self.names:
            files |= self._arrays[name].finish()
        return files

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()


def _alike(one: ArraySample, other: ArraySample) -> bool:
    return (
        (one.values.dtype, len(one.values), one.spacing) == (other.values.dtype, len(other.values), other.spacing)
        and one.maps.keys() == other.maps.keys()
        and one.coords.keys() == other.coords.keys()
        and all(np.array_equal(values, other.coords[name]) for name, values in one.coords.items())
    )


def _halved(source: str, values: Array) -> Array:
    """
    Raises:
        UsageError: if a value is too large for half precision.
    """
    if values.dtype.kind != "f":
        return values
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    finite = np.isfinite(values)
    if not np.isfinite(half[finite]).all():
        raise UsageError(
            f"{source} has values of up to {np.abs(values[finite]).max():g}, and half precision ends at "
            f"{np.finfo(np.float16).max:g}.",
            "Pack it without --half.",
        )
    return half
