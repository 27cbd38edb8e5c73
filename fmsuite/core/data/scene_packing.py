"""Making a packed copy of whole sources (``packed_scenes``): source by source, so that it can be gone on with."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from fmsuite.core.data.boxes import chunk_of
from fmsuite.core.data.index import SampleIndex, Window
from fmsuite.core.data.packed_files import INDEX, METADATA, read_json, write_json, wrong_file
from fmsuite.core.data.packed_scenes import (
    FORMAT,
    RECORD,
    SOURCES,
    TABLE,
    PackedSource,
    SceneFacts,
    SourcePacking,
    check_table,
)
from fmsuite.core.data.reader import Reader, is_piecewise
from fmsuite.core.data.sample import Array, ArraySample, Sample
from fmsuite.core.data.sampling import bounds_of
from fmsuite.core.data.scene import Scene
from fmsuite.core.data.shards import file_digest
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.data.source_writer import SourceWriter
from fmsuite.errors import FmsuiteError, ReadFailure, UsageError

PIECE_BYTES = 128 * 2**20
"""Of values, that are read at once of a source that can be read in pieces."""


@dataclass(frozen=True)
class Origins:
    """Where whole sources come from.

    Attributes:
        index: their windows.
        size: samples of a window, as in ``InputSpec.size``.
        reader: reads windows at any place, of any extent.
        scene: ``Domain.scene`` of the index, where the domain has scenes.
        half: keep floating-point values in half precision.
    """

    index: SampleIndex
    size: tuple[int, ...]
    reader: Reader
    scene: Callable[[str], Scene] | None = None
    half: bool = False


@dataclass(frozen=True)
class _Whole:
    """A source on the grid of its windows.

    Attributes:
        low, pitch, size: as in ``PackedSource``.
        scene: its scene, if the domain has them.
        read: a box of it, from its first sample and its size.
    """

    low: Array
    pitch: Array
    size: tuple[int, ...]
    scene: Scene | None
    read: Callable[[tuple[int, ...], tuple[int, ...]], Sample]


def pack_source(origins: Origins, folder: Path, number: int) -> None:
    """Write one source whole, in pieces if its reader gives them. Its record is written last, and makes it count.

    Raises:
        UsageError: if samples are not plain arrays, or the reader cannot read so much at once.
        OSError: if it cannot be written.
    """
    home = folder / SOURCES / str(number)
    if home.exists():
        shutil.rmtree(home)
    source = origins.index.sources[number]
    try:
        kept, files = _packed(origins, home, source, number)
    except ReadFailure as failure:
        shutil.rmtree(home, ignore_errors=True)
        skipped = [failure.path, failure.stage, f"{failure.reason} {failure.hint}".strip()]
        write_json(home / RECORD, {"source": source, "skipped": skipped, "files": {}})
        return
    except UsageError:
        raise
    except Exception as error:
        error.add_note(f"This happened in {source}.")
        raise
    named = {path.relative_to(folder).as_posix(): facts for path, facts in files.items()}
    write_json(home / RECORD, {**asdict(kept), "files": named})


def _packed(origins: Origins, home: Path, source: str, number: int) -> tuple[PackedSource, dict[Path, tuple[int, str]]]:
    whole = _whole(origins, source)
    with SourceWriter(source, home, whole.size, origins.half) as writer:
        for start, sample in _pieces(whole, origins.reader):
            writer.add(start, sample)
        files = writer.finish()
    first = writer.first
    assert first is not None
    kept = PackedSource(
        source,
        number,
        tuple(whole.low.tolist()),
        tuple(whole.pitch.tolist()),
        whole.size,
        None if first.spacing is None else tuple(map(float, first.spacing)),
        first.values.dtype.name,
        writer.names,
        None if whole.scene is None else SceneFacts.of(whole.scene),
        {name: (values.dtype.name, tuple(values.tolist())) for name, values in first.coords.items()},
        is_piecewise(origins.reader),
    )
    return kept, files


def _whole(origins: Origins, source: str) -> _Whole:
    """The box around a source's windows and its scene."""
    rows = origins.index.where("source", source)
    window, bounds = rows[0], bounds_of(rows)[source]
    extents = {tuple(extent) for extent in rows.table.column("extent").to_pylist()}
    if len(extents) > 1:
        raise UsageError(f"{source} has windows of {len(extents)} extents.", "Pack an index of one window size.")
    size = origins.size
    if is_piecewise(origins.reader):
        # Of a series that is shorter than others, the input's size is not the window's.
        size = getattr(origins.reader.read(window), "size", size)
    pitch = np.asarray(window.extent) / size
    low, high = bounds.low.copy(), bounds.high.copy()
    scene = None if origins.scene is None else origins.scene(source)
    if scene is not None:
        axes = slice(len(pitch) - len(scene.pitch), None)
        if not np.allclose(scene.pitch, pitch[axes], rtol=1e-6):
            raise ValueError(f"a sample of the scene of {source} measures {scene.pitch}, one of its windows {pitch}")
        low[axes] = np.minimum(low[axes], scene.origin)
        high[axes] = np.maximum(high[axes], scene.place(np.asarray(scene.size)))
    whole = tuple(np.round((high - low) / pitch).astype(int).tolist())
    if scene is not None and whole == tuple(scene.size):
        # Opening a scene has read the source already, if it is not read in pieces.
        return _Whole(low, pitch, whole, scene, scene.read)

    def read(start: tuple[int, ...], extent: tuple[int, ...]) -> Sample:
        position = tuple((low + np.asarray(start) * pitch).tolist())
        return origins.reader.read(
            Window(source, window.group, position, tuple((np.asarray(extent) * pitch).tolist()), window.spacing)
        )

    return _Whole(low, pitch, whole, scene, read)


def _pieces(whole: _Whole, reader: Reader) -> Iterator[tuple[tuple[int, ...], ArraySample]]:
    """All of a source at once, or strips of whole chunks of about ``PIECE_BYTES`` along its last axis but one.

    Raises:
        UsageError: if samples are not plain arrays, or the reader cannot read so much at once.
    """
    axis = max(0, len(whole.size) - 2)
    edge = chunk_of(whole.size)[axis] if is_piecewise(reader) else whole.size[axis]
    begin, length = 0, edge
    while begin < whole.size[axis]:
        start, extent = [0] * len(whole.size), list(whole.size)
        start[axis], extent[axis] = begin, min(length, whole.size[axis] - begin)
        sample = whole.read(tuple(start), tuple(extent))
        if type(sample) is not ArraySample or any(values.shape != (extent[0],) for values in sample.coords.values()):
            raise UsageError(
                f"{type(reader).__name__} gives more than plain arrays on a grid (drawings, bags), and no whole "
                "sources.",
                "Pack its windows, without --whole.",
            )
        if sample.size != tuple(extent):
            raise UsageError(
                f"{type(reader).__name__} reads windows of one size only, and no whole sources: {tuple(extent)} "
                f"samples came as {sample.size}.",
                "Pack its windows, without --whole.",
            )
        yield tuple(start), sample
        begin += extent[axis]
        length = edge * max(1, PIECE_BYTES * extent[axis] // (sample.values.nbytes * edge))


def unfinished_sources(folder: Path, packing: SourcePacking) -> list[int]:
    """The sources that are missing: without a record, or with a file that is gone or of another length."""
    return [number for number in range(packing.sources) if not _is_done(folder, number)]


def _is_done(folder: Path, number: int) -> bool:
    try:
        files = read_json(folder / SOURCES / str(number) / RECORD)["files"]
        return all((folder / file).stat().st_size == size for file, (size, _) in files.items())
    except (FmsuiteError, LookupError, OSError):
        return False


def finish_sources(index: SampleIndex, folder: Path, packing: SourcePacking, skipped: SkippedLog) -> SampleIndex:
    """Write the table of sources and, last, the packed index.

    Raises:
        FmsuiteError: if no source could be read.
    """
    table, lost = [], []
    for number in range(packing.sources):
        record = read_json(folder / SOURCES / str(number) / RECORD)
        record.pop("files")
        if "skipped" in record:
            skipped.add(*record["skipped"])
            lost.append(record["source"])
        else:
            table.append(record)
    if not table:
        raise FmsuiteError(f"None of the {packing.sources} sources could be read. {skipped.summary()}")
    write_json(folder / TABLE, table)
    packing.write(folder, tables={TABLE: file_digest(folder / TABLE)})
    packed = index
    if lost:
        column = index.table.column("source").to_pylist()
        gone = set(lost)
        packed = index.select([row for row, source in enumerate(column) if source not in gone])
    packed = SampleIndex(packed.table, {**packed.metadata, METADATA: {"format": FORMAT, "whole": True, "folder": "."}})
    packed.write(folder / INDEX)
    return packed


def verify_sources(folder: Path) -> Iterator[tuple[str, str | None]]:
    """Every file of a packed copy, with what is wrong with it, or ``None``.

    Raises:
        UsageError, FmsuiteError: as ``SourcePacking.read``.
    """
    packing = SourcePacking.read(folder)
    yield from check_table(folder)
    for number in range(packing.sources):
        path = folder / SOURCES / str(number) / RECORD
        try:
            files = read_json(path)["files"]
        except (FmsuiteError, KeyError):
            yield path.relative_to(folder).as_posix(), "it is missing or damaged"
            continue
        for file, (size, digest) in files.items():
            yield file, wrong_file(folder / file, size, digest)
