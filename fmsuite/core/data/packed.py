"""A packed copy of an index's windows: what a domain's reader gives, in shards, for file systems that hate small reads.

The folder:

- ``index.parquet``: the rows that could be read, in the index's order, with ``packed`` in its metadata;
- ``arrays/KIND/``: a Zarr array for each dtype and shape, of pixels and of validity, with a chunk for each row of the
  packed index's original;
- ``keys.npy``, ``rows.npy``, ``facts.npy``, ``facts.json``: where a window lies, and what is known of it;
- ``blocks/N.json``: what became of the rows of shard N, and the SHA-256 of its files;
- ``packing.json``: what was packed, and the SHA-256 of the tables.

No path in it is absolute but those of the sources.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

from fmsuite.core.data.handles import HandleCache
from fmsuite.core.data.index import SampleIndex, Window
from fmsuite.core.data.packed_files import AGAIN, INDEX, METADATA, PACKING, read_json, write_json, wrong_file
from fmsuite.core.data.packed_scenes import PackedScenes
from fmsuite.core.data.reader import Reader
from fmsuite.core.data.sample import Array, ArraySample, Sample
from fmsuite.core.data.shards import ShardFile, ShardWriter, create_array, file_digest, shard_file
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.zarr_arrays import Damaged
from fmsuite.errors import FmsuiteError, ReadFailure, UsageError

if TYPE_CHECKING:
    from fmsuite.domains.base import Domain

BLOCKS, ARRAYS, FACTS = "blocks", "arrays", "facts.json"
TABLES = ("keys.npy", "rows.npy", "facts.npy")
FORMAT = 1
OPEN_SHARDS = 16
MOST_KINDS = 256
_SLICE = 1 << 16


def open_reader(domain: Domain, index: SampleIndex) -> Reader:
    """What reads the windows of an index: the domain's own reader, or that of the packed copy that they lie in.

    Raises:
        UsageError: as ``Domain.reader``, or if the packed copy is not where the index says.
        FmsuiteError: if its tables are damaged.
    """
    if METADATA not in index.metadata:
        return domain.reader(index)
    copy = index.metadata[METADATA]
    folder = Path(copy["folder"])
    return PackedScenes(folder) if copy.get("whole") else PackedReader(folder)


def located(index: SampleIndex, path: Path) -> SampleIndex:
    """An index as read from a file, with the folder of its packed copy, if it has one, made absolute."""
    if METADATA not in index.metadata:
        return index
    folder = str((path.resolve().parent / index.metadata[METADATA]["folder"]).resolve())
    return SampleIndex(index.table, {**index.metadata, METADATA: {**index.metadata[METADATA], "folder": folder}})


@dataclass(frozen=True)
class Packing:
    """What is packed, and how.

    Attributes:
        rows, index_hash: of the index.
        domain: its domain.
        per_shard: rows of a shard.
    """

    rows: int
    index_hash: str
    domain: str
    per_shard: int

    @property
    def blocks(self) -> int:
        return -(-self.rows // self.per_shard)

    @classmethod
    def read(cls, folder: Path) -> Packing:
        """
        Raises:
            UsageError: if there is no packed copy in the folder, or a newer fmsuite made it.
            FmsuiteError: if its description is damaged.
        """
        path = folder / PACKING
        if not path.is_file():
            raise UsageError(f"{folder}: there is no packed copy here.", "Make one with `fmsuite pack`.")
        raw = read_json(path)
        if raw.get("format") != FORMAT:
            raise UsageError(f"{folder}: packed by another version of fmsuite.", "Upgrade fmsuite, or pack again.")
        return cls(**{name: raw[name] for name in cls.__dataclass_fields__})

    def write(self, folder: Path, **more: Any) -> None:
        write_json(folder / PACKING, {"format": FORMAT, **vars(self), **more})


def array_sample(sample: Sample) -> ArraySample:
    """
    Raises:
        UsageError: if it is not a plain array of pixels.
    """
    if type(sample) is not ArraySample:
        raise UsageError(
            f"The domain reads its windows as {type(sample).__name__}, which is drawn anew at the size of each view: "
            "there are no pixels to pack.",
            "Train on the files themselves.",
        )
    return sample


def pack_block(index: SampleIndex, reader: Reader, folder: Path, packing: Packing, number: int) -> None:
    """Read the rows of one shard, and write it. Its record is written last, and makes it count.

    Raises:
        UsageError: if samples are not plain arrays.
        OSError: if it cannot be written.
    """
    start = number * packing.per_shard
    placed, skipped, facts = [], [], _Facts()
    files: dict[str, tuple[int, str]] = {}
    with ExitStack() as stack:
        writers: dict[str, ShardWriter] = {}
        for row in range(start, min(start + packing.per_shard, packing.rows)):
            window = index[row]
            try:
                sample = array_sample(reader.read(window))
            except ReadFailure as failure:
                skipped.append([failure.path, failure.stage, f"{failure.reason} {failure.hint}".strip()])
                placed.append(-1)
                continue
            except UsageError:
                raise
            except Exception as error:
                error.add_note(f"This happened in row {row} of the index: {window.source} at {window.position}.")
                raise
            fact, arrays = described(sample)
            for kind, values in arrays.items():
                if kind not in writers:
                    path = shard_file(folder / ARRAYS / kind, number, values.ndim)
                    writers[kind] = stack.enter_context(ShardWriter(path, packing.per_shard))
                writers[kind].add(row - start, values)
            placed.append(facts.number(fact))
        for writer in writers.values():
            files[writer.path.relative_to(folder).as_posix()] = writer.finish()
    record = {"rows": placed, "facts": facts.list, "files": files, "skipped": skipped}
    write_json(folder / BLOCKS / f"{number}.json", record)


def unfinished(folder: Path, packing: Packing) -> list[int]:
    """The shards that are missing: without a record, or with a file that is gone or of another length."""
    return [number for number in range(packing.blocks) if not _is_done(folder, number)]


def _is_done(folder: Path, number: int) -> bool:
    path = folder / BLOCKS / f"{number}.json"
    if not path.is_file():
        return False
    try:
        files = read_json(path)["files"]
    except (FmsuiteError, KeyError):
        return False
    return all(
        (folder / file).is_file() and (folder / file).stat().st_size == size for file, (size, _) in files.items()
    )


def finish(index: SampleIndex, folder: Path, packing: Packing, skipped: SkippedLog) -> SampleIndex:
    """Write the tables, the arrays' descriptions and, last, the packed index.

    Raises:
        FmsuiteError: if no window could be read, or windows are of too many shapes.
    """
    facts, placed = _Facts(), np.full(packing.rows, -1, dtype="<i4")
    for number in range(packing.blocks):
        record = read_json(folder / BLOCKS / f"{number}.json")
        for entry in record["skipped"]:
            skipped.add(*entry)
        known = np.array([*(facts.number(fact) for fact in record["facts"]), -1], dtype="<i4")
        start = number * packing.per_shard
        placed[start : start + packing.per_shard] = known[record["rows"]]
    rows = np.flatnonzero(placed >= 0)
    if not len(rows):
        raise FmsuiteError(f"None of the {packing.rows} windows could be read. {skipped.summary()}")
    kinds = sorted({kind for fact in facts.list for kind in _kinds(fact)})
    if len(kinds) > MOST_KINDS:
        raise FmsuiteError(
            f"The windows have {len(kinds)} different shapes and types, each of which needs an array of its own.",
            "Make an index whose windows have one size.",
        )
    for kind in kinds:
        dtype, shape = _parse(kind)
        if not (folder / ARRAYS / kind / "zarr.json").exists():
            create_array(folder / ARRAYS / kind, packing.rows, packing.per_shard, shape, dtype)
    packed = index if len(rows) == len(index) else index.select(rows)
    keys = np.fromiter(_keys_of(packed), dtype="<u8", count=len(rows))
    order = np.argsort(keys, kind="stable")
    _refuse_collisions(packed, keys, order)
    for name, values in zip(TABLES, (keys[order], rows[order].astype("<i8"), placed[rows][order])):
        partial_ = folder / f".{name}"
        with partial_.open("wb") as file:
            np.save(file, values)
        os.replace(partial_, folder / name)
    write_json(folder / FACTS, facts.list)
    packing.write(folder, tables={name: file_digest(folder / name) for name in (*TABLES, FACTS)})
    packed = SampleIndex(packed.table, {**packed.metadata, METADATA: {"format": FORMAT, "folder": "."}})
    packed.write(folder / INDEX)
    return packed


def check_tables(folder: Path) -> Iterator[tuple[str, str | None]]:
    """The tables of a packed copy, each with what is wrong with it, or ``None``."""
    tables = read_json(folder / PACKING).get("tables")
    if tables is None or not (folder / INDEX).is_file():
        yield INDEX, "packing has not been finished"
    for name, (size, digest) in (tables or {}).items():
        yield name, wrong_file(folder / name, size, digest)


def verify(folder: Path) -> Iterator[tuple[str, str | None]]:
    """Every file of a packed copy, with what is wrong with it, or ``None``.

    Raises:
        UsageError, FmsuiteError: as ``Packing.read``.
    """
    packing = Packing.read(folder)
    yield from check_tables(folder)
    for number in range(packing.blocks):
        path = folder / BLOCKS / f"{number}.json"
        try:
            files = read_json(path)["files"]
        except (FmsuiteError, KeyError):
            yield path.relative_to(folder).as_posix(), "it is missing or damaged"
            continue
        for file, (size, digest) in files.items():
            yield file, wrong_file(folder / file, size, digest)


class PackedReader:
    """Reads windows of a packed copy: the arrays that the domain's own reader gave, bit for bit.

    Args:
        folder: the packed copy.

    Raises:
        UsageError: if it is not there.
        FmsuiteError: if it was not finished, or its tables are damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.packing = Packing.read(folder)
        for name, wrong in check_tables(folder):
            if wrong is not None:
                raise FmsuiteError(f"{folder / name}: {wrong}.", "Run the same `fmsuite pack` again.")
        self._shards: HandleCache[ShardFile] = HandleCache(
            partial(_open_shard, slots=self.packing.per_shard), ShardFile.close, OPEN_SHARDS
        )

    @cached_property
    def _tables(self) -> tuple[Array, Array, Array]:
        keys, rows, facts = (np.load(self.folder / name, mmap_mode="r") for name in TABLES)
        return keys, rows, facts

    @cached_property
    def _facts(self) -> list[dict[str, Any]]:
        facts: list[dict[str, Any]] = read_json(self.folder / FACTS)
        return facts

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_tables", "_facts")}

    def read(self, window: Window) -> ArraySample:
        """
        Raises:
            ReadFailure: if the window is not in the packed copy, or what is there is damaged.
        """
        keys, rows, facts = self._tables
        key = np.uint64(_key(window))
        place = int(np.searchsorted(keys, key))
        if place == len(keys) or keys[place] != key:
            raise ReadFailure(
                window.source, "read", f"a window is not in the packed copy {self.folder}.", "Pack again."
            )
        fact, row = self._facts[int(facts[place])], int(rows[place])

        def array(kind: str) -> Array:
            return self._array(window, kind, row)

        valid = fact["valid"]
        return ArraySample(
            array(fact["values"]),
            np.ones(valid, dtype=bool) if isinstance(valid, list) else None if valid is None else array(valid),
            {axis: np.array(values, dtype=dtype) for axis, (dtype, values) in fact["coords"].items()},
            None if fact["spacing"] is None else tuple(fact["spacing"]),
            {name: array(kind) for name, kind in fact["maps"].items()},
        )

    def _array(self, window: Window, kind: str, row: int) -> Array:
        dtype, shape = _parse(kind)
        number, slot = divmod(row, self.packing.per_shard)
        path = str(shard_file(self.folder / ARRAYS / kind, number, len(shape)))
        try:
            return self._shards.get(path).read(slot, shape, dtype)
        except Damaged as damage:
            self._shards.discard(path)
            raise ReadFailure(
                path, "read", f"{damage.reason} (of {window.source} at {window.position}).", AGAIN
            ) from damage

    def close(self) -> None:
        self._shards.close()


def _open_shard(path: str, slots: int) -> ShardFile:
    return ShardFile(Path(path), slots)


def described(sample: ArraySample) -> tuple[dict[str, Any], dict[str, Array]]:
    """What is known of a sample without its pixels, in JSON, and its arrays by kind."""
    arrays = {_kind("values", sample.values): sample.values}
    valid: Any = None
    if sample.valid is not None:
        valid = list(sample.valid.shape)
        if not sample.valid.all():
            valid = _kind("valid", sample.valid)
            arrays[valid] = sample.valid
    maps = {name: _kind(f"map.{quote(name, safe='')}", labels) for name, labels in sample.maps.items()}
    arrays |= {kind: sample.maps[name] for name, kind in maps.items()}
    coords = {axis: np.asarray(values) for axis, values in sample.coords.items()}
    fact = {
        "values": next(iter(arrays)),
        "valid": valid,
        "coords": {axis: [values.dtype.name, values.tolist()] for axis, values in coords.items()},
        "spacing": None if sample.spacing is None else [float(length) for length in sample.spacing],
        "maps": maps,
    }
    return fact, arrays


def _kind(role: str, values: Array) -> str:
    return f"{role}-{values.dtype.name}-{'x'.join(map(str, values.shape))}"


def _parse(kind: str) -> tuple[np.dtype, tuple[int, ...]]:
    _, dtype, shape = kind.rsplit("-", 2)
    return np.dtype(dtype), tuple(int(length) for length in shape.split("x"))


def _kinds(fact: dict[str, Any]) -> list[str]:
    valid = [fact["valid"]] if isinstance(fact["valid"], str) else []
    return [fact["values"], *valid, *fact["maps"].values()]


@dataclass
class _Facts:
    """Numbers equal facts, which windows of one source share."""

    list: list[dict[str, Any]] = field(default_factory=list)
    known: dict[str, int] = field(default_factory=dict)

    def number(self, fact: dict[str, Any]) -> int:
        text = json.dumps(fact, sort_keys=True)
        if text not in self.known:
            self.known[text] = len(self.list)
            self.list.append(fact)
        return self.known[text]


def _key(window: Window) -> int:
    """64 bits that name what a reader is asked for: the source, the place and its spacing."""
    numbers = (window.position, window.extent, window.spacing)
    flat = [value for part in numbers for value in (len(part), *part)]
    digest = hashlib.blake2b(window.source.encode(errors="surrogateescape"), digest_size=8)
    digest.update(struct.pack(f"<{len(flat)}d", *flat))
    return int.from_bytes(digest.digest(), "little")


def _keys_of(index: SampleIndex) -> Iterable[int]:
    for start in range(0, len(index), _SLICE):
        rows = index.table.slice(start, _SLICE).select(["source", "position", "extent", "spacing"]).to_pylist()
        for row in rows:
            position, extent, spacing = (tuple(row[name]) for name in ("position", "extent", "spacing"))
            yield _key(Window(row["source"], "", position, extent, spacing))


def _refuse_collisions(index: SampleIndex, keys: Array, order: Array) -> None:
    """
    Raises:
        FmsuiteError: if two different windows have one key.
    """
    for place in np.flatnonzero(np.diff(keys[order]) == 0):
        one, other = (index[int(order[place + step])] for step in (0, 1))
        if (one.source, one.position, one.extent, one.spacing) != (
            other.source,
            other.position,
            other.extent,
            other.spacing,
        ):
            raise FmsuiteError(f"Two windows have the same key: {one} and {other}.", "Leave one of them out.")
