"""Pairs: a second thing known about windows, a text or a vector, from a table that names them."""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from fmsuite.core.data.sample import Array, PairRequest
from fmsuite.errors import UsageError, nearest

FILE_NAME = "pairs.parquet"

Key = Literal["window", "source", "group"]
KEYS: dict[Key, tuple[str, ...]] = {
    "window": ("window",),
    "source": ("source", "path", "file", "filename", "slide", "slide_id", "image"),
    "group": ("group", "patient", "patient_id", "case", "case_id", "scene"),
}
"""Columns that name windows, the finest first, in any case; the first that a table has is its key."""
TEXT = "text"

START, END, PAD = 256, 257, 258
TOKENS = 259
"""Bytes, and the three tokens around them."""


def byte_tokens(text: str, length: int) -> Array:
    """(length,) int64: ``START``, the text's UTF-8 bytes as far as there is room, ``END``, then ``PAD``."""
    content = text.encode()[: length - 2]
    tokens = np.full(length, PAD, dtype=np.int64)
    tokens[0], tokens[len(content) + 1] = START, END
    tokens[1 : len(content) + 1] = np.frombuffer(content, dtype=np.uint8)
    return tokens


@dataclass(frozen=True)
class PairTable:
    """A table of pairs as it was given.

    Attributes:
        path: its file.
        key: what its lines name: ``window`` (rows of the index, from 0), ``source`` (files), or ``group``.
        names: what each line names, all different.
        values: a column of texts, or (R, D) float32.
        columns: names of the D numbers; empty for texts.
    """

    path: Path
    key: Key
    names: list[str]
    values: pa.Array | Array
    columns: tuple[str, ...] = ()


def read_pairs(path: str | os.PathLike) -> PairTable:
    """A CSV (UTF-8, commas) or Parquet file with a key column (``KEYS``) and a column ``text``, or numbers in all other
    columns. Beside ``text`` no other column is used; other columns of ``KEYS`` are never values.

    Raises:
        UsageError: if the file cannot be read, lacks a key or values, names something twice or nothing, or has values
            that are missing, no numbers, or not finite.
    """
    path = Path(path)
    table = _read(path)
    if not table.num_rows:
        raise UsageError(f"{path}: the table has no lines.", "Give one with a line for each pair.")
    key, named = _key_of(path, table.column_names)
    names = _names(path, named, table.column(named))
    values = [name for name in table.column_names if not any(name.lower() in usual for usual in KEYS.values())]
    if TEXT in values:
        return PairTable(path, key, names, _texts(path, table.column(TEXT), names))
    if not values:
        raise UsageError(
            f"{path}: beside '{named}' it has no column.", f"Add a column '{TEXT}', or columns of numbers."
        )
    numbers = np.empty((table.num_rows, len(values)), dtype=np.float32)
    for number, name in enumerate(values):
        numbers[:, number] = _numbers(path, name, table.column(name), names)
    return PairTable(path, key, names, numbers, tuple(values))


def read_targets(path: str | os.PathLike, columns: Sequence[str]) -> PairTable:
    """Numbers to predict, from a table as ``read_pairs`` reads it.

    Args:
        columns: which of its columns; an empty cell, and NaN, is NaN: not known.

    Raises:
        UsageError: as ``read_pairs``; if a column is missing, holds no numbers, infinite ones, or nothing at all.
    """
    path = Path(path)
    table = _read(path)
    if not table.num_rows:
        raise UsageError(f"{path}: the table has no lines.", "Give one with a line for each source or group.")
    key, named = _key_of(path, table.column_names)
    names = _names(path, named, table.column(named))
    numbers = np.empty((table.num_rows, len(columns)), dtype=np.float32)
    for number, name in enumerate(columns):
        if name not in table.column_names:
            raise UsageError(f"{path}: there is no column '{name}'.", nearest(name, table.column_names))
        column = table.column(name)
        if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type)):
            raise UsageError(
                f"{path}: the column '{name}' holds {column.type}, not numbers.", "Write numbers, or leave cells empty."
            )
        values = column.cast(pa.float64()).to_numpy(zero_copy_only=False).astype(np.float64)
        if np.isinf(values).any() or np.isnan(values).all():
            what = "has infinite values" if np.isinf(values).any() else "is empty"
            raise UsageError(f"{path}: the column '{name}' {what}.", "Correct it, or leave it out.")
        numbers[:, number] = values
    return PairTable(path, key, names, numbers, tuple(columns))


def _read(path: Path) -> pa.Table:
    try:
        if path.suffix.lower() == ".parquet":
            return pq.read_table(path)
        with path.open(newline="", encoding="utf-8-sig") as file:
            header = next(csv.reader(file), [])
        # Ids of digits alone stay what they are, and so do texts.
        as_text = {
            name: pa.string() for name in header if name == TEXT or any(name.lower() in k for k in KEYS.values())
        }
        return pa_csv.read_csv(
            path,
            # A line must fit a block, and a text may be longer than the usual one.
            read_options=pa_csv.ReadOptions(block_size=min(max(path.stat().st_size, 1 << 20), 1 << 30)),
            parse_options=pa_csv.ParseOptions(newlines_in_values=True),
            convert_options=pa_csv.ConvertOptions(column_types=as_text),
        )
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        hint = "Save it as UTF-8." if "utf-8" in reason.lower() else "Give --pairs a CSV or Parquet file."
        raise UsageError(f"{path}: not a readable table ({reason}).", hint) from error


def _key_of(path: Path, columns: Sequence[str]) -> tuple[Key, str]:
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise UsageError(f"{path}: there are several columns '{twice[0]}'.", "Rename all but one.")
    for key, usual in KEYS.items():
        for name in usual:
            found = next((column for column in columns if column.lower() == name), None)
            if found is not None:
                return key, found
    separated = len(columns) > 1 or not any(mark in "".join(columns) for mark in ";\t")
    raise UsageError(
        f"{path}: no column says what its lines are about; it has {', '.join(columns) or 'none'}.",
        "Call one source, group or window." if separated else "Separate the columns by commas.",
    )


def _names(path: Path, column: str, values: pa.ChunkedArray) -> list[str]:
    kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind)):
        raise UsageError(f"{path}: the column '{column}' holds {kind}, not names.", "Store it as text.")
    names = ["" if name is None else name.strip() for name in values.cast(pa.string()).to_pylist()]
    empty = names.count("")
    if empty:
        raise UsageError(f"{path}: {empty} of its {len(names)} lines have no '{column}'.", "Fill them in.")
    seen: set[str] = set()
    twice = sorted({name for name in names if name in seen or seen.add(name)})  # type: ignore[func-returns-value]
    if twice:
        raise UsageError(
            f"{path}: {len(twice)} of its names stand in several lines, such as '{twice[0]}'.", "Keep one line of each."
        )
    return names


def _texts(path: Path, values: pa.ChunkedArray, names: list[str]) -> pa.Array:
    try:
        texts = values.cast(pa.large_string()).combine_chunks()
    except pa.ArrowException as error:
        raise UsageError(f"{path}: the column '{TEXT}' holds {values.type}, not text.", "Store it as text.") from error
    empty = pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(pc.fill_null(texts, ""))), 0).to_numpy(zero_copy_only=False)
    if empty.any():
        raise UsageError(
            f"{path}: {int(empty.sum())} of its {len(names)} lines have no text, such as that of "
            f"'{names[int(empty.argmax())]}'.",
            "Fill them in, or remove these lines.",
        )
    return texts


def _numbers(path: Path, name: str, values: pa.ChunkedArray, names: list[str]) -> Array:
    if not (pa.types.is_floating(values.type) or pa.types.is_integer(values.type)):
        raise UsageError(
            f"{path}: the column '{name}' holds {values.type}, not numbers.",
            f"Remove it, write numbers, or call a column of texts '{TEXT}'.",
        )
    with np.errstate(over="ignore"):
        numbers = values.cast(pa.float64()).to_numpy().astype(np.float32)
    broken = ~np.isfinite(numbers)
    if broken.any():
        raise UsageError(
            f"{path}: {int(broken.sum())} values of the column '{name}' are missing or not finite, such as that of "
            f"'{names[int(broken.argmax())]}'.",
            "Fill them in, or remove these lines.",
        )
    return numbers


class Pairs:
    """The partner of every row of an index.

    Args:
        values: texts, or (R, D) float32.
        of_row: (N,) int64, for each row of the index its partner among these; -1 without one.
    """

    def __init__(self, values: pa.Array | Array, of_row: Array) -> None:
        self.values = values
        self.of_row = of_row

    @property
    def width(self) -> int | None:
        """D; ``None`` for texts."""
        return self.values.shape[1] if isinstance(self.values, np.ndarray) else None

    def select(self, rows: Array) -> Pairs:
        """The partners of some rows, in their order."""
        return Pairs(self.values, self.of_row[rows])

    def partner(self, request: PairRequest, row: int) -> Array:
        """(length,) int64 tokens, or (D,) float32."""
        value = self.values[int(self.of_row[row])]
        if isinstance(value, np.ndarray):
            return value
        assert request.tokens is not None
        return byte_tokens(value.as_py(), request.tokens)

    def check(self, request: PairRequest, objective: str) -> None:
        """
        Raises:
            UsageError: if these are not what the objective was built for.
        """
        if request.width == self.width:
            return
        found = "texts" if self.width is None else f"{self.width} numbers a line"
        wanted = "texts" if request.width is None else f"{request.width} numbers"
        option = "text" if self.width is None else self.width
        raise UsageError(
            f"The pairs are {found}, and objective '{objective}' is set up for {wanted}.",
            f"Set objective.partner={option}.",
        )

    @property
    def hash(self) -> str:
        """A digest of partners and rows, equal for equal pairs however they are stored."""
        digest = hashlib.sha256(np.ascontiguousarray(self.of_row, dtype="<i8").tobytes())
        if isinstance(self.values, np.ndarray):
            digest.update(np.ascontiguousarray(self.values, dtype="<f4").tobytes())
        else:
            for text in self.values:
                digest.update(text.as_py().encode() + b"\x00")
        return digest.hexdigest()[:16]

    def write(self, path: Path) -> None:
        """A line for each partner: the rows of the index that have it, and its text or vector. Atomic."""
        order = np.argsort(self.of_row, kind="stable")
        counts = np.bincount(self.of_row[self.of_row >= 0], minlength=len(self.values))
        offsets = np.concatenate([[0], counts.cumsum()]).astype(np.int64)
        windows = pa.LargeListArray.from_arrays(offsets, order[len(order) - counts.sum() :])
        if isinstance(self.values, np.ndarray):
            values = pa.FixedSizeListArray.from_arrays(self.values.reshape(-1), self.values.shape[1])
            table = pa.table({"windows": windows, "vector": values})
        else:
            table = pa.table({"windows": windows, TEXT: self.values})
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            pq.write_table(table, partial, compression="zstd")
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def read(cls, path: Path, rows: int) -> Pairs:
        """
        Args:
            rows: of the index.

        Raises:
            UsageError: if the file cannot be read, or belongs to another index.
        """
        try:
            table = pq.read_table(path)
            lists = table.column("windows").combine_chunks()
            owners = np.repeat(np.arange(len(lists)), lists.value_lengths().to_numpy())
            of_row = np.full(rows, -1, dtype=np.int64)
            of_row[lists.flatten().to_numpy()] = owners
            if TEXT in table.column_names:
                return cls(table.column(TEXT).cast(pa.large_string()).combine_chunks(), of_row)
            vectors = table.column("vector").combine_chunks()
            return cls(vectors.flatten().to_numpy().reshape(len(vectors), -1), of_row)
        except (OSError, KeyError, IndexError, pa.ArrowException) as error:
            raise UsageError(
                f"{path}: not the pairs of this run ({error}).", "Start a new run with --pairs."
            ) from error
