"""Making a packed copy of whole sources (``packed_scenes``): source by source, so that it can be gone on with."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np

from fmsuite.core.data.boxes import write_boxes
from fmsuite.core.data.index import SampleIndex, Window
from fmsuite.core.data.packed_files import INDEX, METADATA, read_json, write_json, wrong_file
from fmsuite.core.data.packed_scenes import (
    FORMAT,
    MAP,
    RECORD,
    SOURCES,
    TABLE,
    VALID,
    VALUES,
    PackedSource,
    SceneFacts,
    SourcePacking,
    check_table,
)
from fmsuite.core.data.reader import Reader
from fmsuite.core.data.sample import Array, ArraySample
from fmsuite.core.data.sampling import bounds_of
from fmsuite.core.data.scene import Scene
from fmsuite.core.data.shards import file_digest
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.errors import FmsuiteError, ReadFailure, UsageError


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


def pack_source(origins: Origins, folder: Path, number: int) -> None:
    """Read one source whole, and write it. Its record is written last, and makes it count.

    Raises:
        UsageError: if samples are not plain arrays, or the reader cannot read so much at once.
        OSError: if it cannot be written.
    """
    home = folder / SOURCES / str(number)
    if home.exists():
        shutil.rmtree(home)
    source = origins.index.sources[number]
    try:
        kept, sample = _whole(origins, source, number)
    except ReadFailure as failure:
        skipped = [failure.path, failure.stage, f"{failure.reason} {failure.hint}".strip()]
        write_json(home / RECORD, {"source": source, "skipped": skipped, "files": {}})
        return
    except UsageError:
        raise
    except Exception as error:
        error.add_note(f"This happened in {source}.")
        raise
    files: dict[Path, tuple[int, str]] = {}
    for name, values in _arrays(sample).items():
        files |= write_boxes(home / name, _halved(source, values) if origins.half else values, len(kept.size))
    named = {path.relative_to(folder).as_posix(): facts for path, facts in files.items()}
    write_json(home / RECORD, {**asdict(kept), "files": named})


def _whole(origins: Origins, source: str, number: int) -> tuple[PackedSource, ArraySample]:
    """A source on the grid of its windows: the box around them and its scene."""
    rows = origins.index.where("source", source)
    window, bounds = rows[0], bounds_of(rows)[source]
    extents = {tuple(extent) for extent in rows.table.column("extent").to_pylist()}
    if len(extents) > 1:
        raise UsageError(f"{source} has windows of {len(extents)} extents.", "Pack an index of one window size.")
    pitch = np.asarray(window.extent) / origins.size
    low, high = bounds.low, bounds.high
    scene = None if origins.scene is None else origins.scene(source)
    if scene is not None:
        if not np.allclose(scene.pitch, pitch, rtol=1e-6):
            raise ValueError(f"a sample of the scene of {source} measures {scene.pitch}, one of its windows {pitch}")
        low = np.minimum(low, scene.origin)
        high = np.maximum(high, scene.place(np.asarray(scene.size)))
    size = tuple(np.round((high - low) / pitch).astype(int).tolist())
    if scene is not None and size == tuple(scene.size):
        # Opening a scene has read the source already.
        sample = scene.read((0,) * len(size), size)
    else:
        whole = Window(source, window.group, tuple(low.tolist()), tuple((high - low).tolist()), window.spacing)
        read = origins.reader.read(whole)
        if type(read) is not ArraySample or read.coords:
            raise UsageError(
                f"{type(origins.reader).__name__} gives more than plain arrays on a grid (drawings, dates), and "
                "no whole sources.",
                "Pack its windows, without --whole.",
            )
        sample = read
    if sample.size != size:
        raise UsageError(
            f"{type(origins.reader).__name__} reads windows of one size only, and no whole sources: {size} samples "
            f"of {source} came as {sample.size}.",
            "Pack its windows, without --whole.",
        )
    kept = PackedSource(
        source,
        number,
        tuple(low.tolist()),
        tuple(pitch.tolist()),
        size,
        None if sample.spacing is None else tuple(map(float, sample.spacing)),
        sample.values.dtype.name,
        tuple(_arrays(sample)),
        None if scene is None else SceneFacts.of(scene),
    )
    return kept, sample


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


def _arrays(sample: ArraySample) -> dict[str, Array]:
    arrays = {VALUES: sample.values}
    if sample.valid is not None and not sample.valid.all():
        arrays[VALID] = sample.valid
    return arrays | {MAP + quote(name, safe=""): labels for name, labels in sample.maps.items()}


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
