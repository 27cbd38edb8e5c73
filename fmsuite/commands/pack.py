"""``fmsuite pack``: an index's windows in a few large files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from fmsuite.commands.setup import domain_options, open_domain, open_index
from fmsuite.core.data.index import SampleIndex
from fmsuite.core.data.packed import (
    Packing,
    array_sample,
    check_tables,
    described,
    finish,
    open_reader,
    pack_block,
    unfinished,
    verify,
)
from fmsuite.core.data.packed_files import INDEX, PACKING
from fmsuite.core.data.packed_scenes import SourcePacking, check_table, is_whole, open_scene
from fmsuite.core.data.reader import Reader
from fmsuite.core.data.scene_packing import (
    Origins,
    finish_sources,
    pack_source,
    unfinished_sources,
    verify_sources,
)
from fmsuite.core.data.skipped import FILE_NAME, SkippedLog
from fmsuite.core.lock import WriterLock
from fmsuite.core.pool import run_units
from fmsuite.domains.base import Domain, Progress, no_progress
from fmsuite.errors import FmsuiteError, ReadFailure, UsageError

SHARD_BYTES = 512 * 2**20
"""Of pixels before compression, that a shard holds at most."""
MOST_WINDOWS = 4096
TRIALS = 50


@dataclass(frozen=True)
class Packed:
    """What was packed.

    Attributes:
        index, path: the packed index and its file.
        shards: how many were written now, of how many.
        skipped: what could not be read.
    """

    index: SampleIndex
    path: Path
    shards: tuple[int, int]
    skipped: SkippedLog


def pack(
    index: Path,
    out: Path,
    *,
    whole: bool = False,
    half: bool = False,
    shard_windows: int | None = None,
    processes: int = 0,
    strict: bool = False,
    progress: Progress = no_progress,
) -> Packed:
    """Copy an index's windows, or its sources whole, as the domain's reader gives them, into shards. After an
    interruption the same call goes on with the shards that are missing.

    Args:
        index: of ``fmsuite tile``.
        out: a folder; its ``index.parquet`` then stands for the index.
        whole: keep all of each source that its windows cover, so that windows at any place can be read.
        half: keep floating-point values of whole sources in half precision: half of the disk, and other last digits.
        shard_windows: windows in a shard; as many as ``SHARD_BYTES`` hold, if not given.
        processes: that read and write, a shard (or a source) each; 0 does it in this one.

    Raises:
        UsageError: if the folder holds another packed copy, or the domain's samples are not plain arrays.
        FmsuiteError: if nothing could be read, or the disk is full.
    """
    domain, windows = _opened(index)
    if (out / INDEX).exists() and (out / INDEX).resolve() == index.resolve():
        raise UsageError(f"{index}: this is the packed copy itself.", "Choose another folder with --out.")
    if whole and shard_windows is not None:
        raise UsageError("A shard of --whole is a source.", "Leave out --shard-windows.")
    if half and not whole:
        raise UsageError("--half is for whole sources.", "Add --whole, or leave it out.")
    reader = open_reader(domain, windows)
    if whole and not getattr(reader, "anywhere", False):
        raise UsageError(
            f"{type(reader).__name__} reads the index's windows only, and so no whole sources.",
            "Give the index of the files themselves, or leave out --whole.",
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{out}: cannot be made ({error.strerror}).", "Choose another folder with --out.") from error
    lock = WriterLock(out / ".lock", str(out))
    try:
        _refuse_other_kind(out, whole)
        copy: _Windows | _Sources
        if whole:
            copy = _Sources(index, windows, out, _source_packing(windows, domain.name, half, out))
        else:
            copy = _Windows(index, windows, out, _packing(windows, reader, domain.name, out, shard_windows))
        todo = copy.unfinished()
        log = out / FILE_NAME
        skipped = SkippedLog(log, strict)
        if todo or any(wrong for _, wrong in copy.check_tables()):
            (out / INDEX).unlink(missing_ok=True)
            log.unlink(missing_ok=True)
            skipped = SkippedLog(log, strict)
            with closing(run_units(copy.work, todo, processes=min(processes, len(todo)))) as outcomes:
                for outcome in progress(outcomes, len(todo), "packing shards"):
                    if outcome.failure is not None:
                        raise FmsuiteError(f"Shard {outcome.unit} could not be packed: {outcome.failure}")
            copy.finish(skipped)
        return Packed(SampleIndex.read(out / INDEX), out / INDEX, (len(todo), copy.shards), skipped)
    except OSError as error:
        raise _unwritable(out, error) from error
    finally:
        lock.close()


def check(out: Path, progress: Progress = no_progress) -> list[tuple[str, str]]:
    """The files of a packed copy that are not as they were written, each with what is wrong.

    Raises:
        UsageError: if there is no packed copy.
    """
    if is_whole(out):
        total, files = SourcePacking.read(out).sources, verify_sources(out)
    else:
        total, files = Packing.read(out).blocks, verify(out)
    return [(name, wrong) for name, wrong in progress(files, total, "checking shards") if wrong is not None]


@dataclass(frozen=True)
class _Windows:
    """A packed copy of windows, being made."""

    path: Path
    index: SampleIndex
    out: Path
    packing: Packing

    @property
    def shards(self) -> int:
        return self.packing.blocks

    def unfinished(self) -> list[int]:
        return unfinished(self.out, self.packing)

    def check_tables(self) -> Iterable[tuple[str, str | None]]:
        return check_tables(self.out)

    @property
    def work(self) -> Callable[[], _Packer]:
        return partial(_window_packer, self.path, self.out, self.packing)

    def finish(self, skipped: SkippedLog) -> None:
        finish(self.index, self.out, self.packing, skipped)


@dataclass(frozen=True)
class _Sources:
    """A packed copy of whole sources, being made."""

    path: Path
    index: SampleIndex
    out: Path
    packing: SourcePacking

    @property
    def shards(self) -> int:
        return self.packing.sources

    def unfinished(self) -> list[int]:
        return unfinished_sources(self.out, self.packing)

    def check_tables(self) -> Iterable[tuple[str, str | None]]:
        return check_table(self.out)

    @property
    def work(self) -> Callable[[], _Packer]:
        return partial(_source_packer, self.path, self.out, self.packing.half)

    def finish(self, skipped: SkippedLog) -> None:
        finish_sources(self.index, self.out, self.packing, skipped)


class _Packer:
    """Packs shards in a worker."""

    def __init__(self, out: Path, pack_one: Callable[[int], None]) -> None:
        self.out = out
        self.pack_one = pack_one

    def __call__(self, units: Iterator[int], /) -> Iterator[int]:
        for number in units:
            try:
                self.pack_one(number)
            except OSError as error:
                raise _unwritable(self.out, error) from error
            yield number


def _window_packer(index: Path, out: Path, packing: Packing) -> _Packer:
    domain, windows = _opened(index)
    return _Packer(out, partial(pack_block, windows, open_reader(domain, windows), out, packing))


def _source_packer(index: Path, out: Path, half: bool) -> _Packer:
    domain, windows = _opened(index)
    # A domain without scenes has the base class's method, which only refuses.
    scene = None if type(domain).scene is Domain.scene else partial(open_scene, domain, windows)
    origins = Origins(windows, domain.input_spec(windows).size, open_reader(domain, windows), scene, half)
    return _Packer(out, partial(pack_source, origins, out))


def _unwritable(out: Path, error: OSError) -> FmsuiteError:
    return FmsuiteError(
        f"{out}: cannot be written ({error}).", "Make room, and run the same command again: it goes on."
    )


def _opened(path: Path) -> tuple[Domain, SampleIndex]:
    name = SampleIndex.read(path).metadata.get("domain")
    if not isinstance(name, str):
        raise UsageError(f"{path}: this index does not say which domain made it.", "Make it with `fmsuite tile`.")
    return open_index(open_domain(name, domain_options(name, [])), [path], SkippedLog(None))


def _refuse_other_kind(out: Path, whole: bool) -> None:
    if (out / PACKING).exists() and is_whole(out) != whole:
        found = "whole sources" if is_whole(out) else "windows"
        raise UsageError(f"{out}: a packed copy of {found} is in this folder.", "Choose another folder with --out.")


def _source_packing(index: SampleIndex, domain: str, half: bool, out: Path) -> SourcePacking:
    """That of the folder, or a new one.

    Raises:
        UsageError: if the folder's is of another index, or of another precision.
    """
    wanted = SourcePacking(len(index.sources), index.hash, domain, half)
    if not (out / PACKING).exists():
        _refuse_other_files(out)
        wanted.write(out)
        return wanted
    found = SourcePacking.read(out)
    if (found.index_hash, found.domain) != (wanted.index_hash, wanted.domain):
        raise UsageError(f"{out}: the packed copy of another index is in this folder.", "Choose another with --out.")
    if found.half != half:
        raise UsageError(
            f"{out}: its values are kept in {'half' if found.half else 'full'} precision.",
            f"{'Add' if found.half else 'Leave out'} --half, or choose another folder with --out.",
        )
    return found


def _refuse_other_files(out: Path) -> None:
    if any(path.name != ".lock" for path in out.iterdir()):
        raise UsageError(f"{out}: there are other files in this folder.", "Choose an empty or a new one with --out.")


def _packing(index: SampleIndex, reader: Reader, domain: str, out: Path, shard_windows: int | None) -> Packing:
    """That of the folder, or a new one.

    Raises:
        UsageError: if the folder's is of another index, or of shards of another size.
    """
    if not (out / PACKING).exists():
        _refuse_other_files(out)
        packing = Packing(len(index), index.hash, domain, shard_windows or _windows_of_a_shard(index, reader))
        packing.write(out)
        return packing
    packing = Packing.read(out)
    if (packing.index_hash, packing.domain) != (index.hash, domain):
        raise UsageError(f"{out}: the packed copy of another index is in this folder.", "Choose another with --out.")
    if shard_windows not in (None, packing.per_shard):
        raise UsageError(
            f"{out}: its shards hold {packing.per_shard} windows, not {shard_windows}.",
            "Leave out --shard-windows, or choose another folder with --out.",
        )
    return packing


def _windows_of_a_shard(index: SampleIndex, reader: Reader) -> int:
    """As many as ``SHARD_BYTES`` hold of a window that can be read; a power of two.

    Raises:
        UsageError: if samples are not plain arrays.
        FmsuiteError: if none of some can be read.
    """
    last = ""
    for row in np.linspace(0, len(index) - 1, min(TRIALS, len(index))).astype(int):
        try:
            sample = array_sample(reader.read(index[int(row)]))
        except ReadFailure as failure:
            last = f"{failure.path}: {failure.reason}"
            continue
        size = sum(values.nbytes for values in described(sample)[1].values())
        return int(2 ** np.floor(np.log2(np.clip(SHARD_BYTES / max(size, 1), 1, MOST_WINDOWS))))
    raise FmsuiteError(f"None of {TRIALS} windows of the index could be read, the last because of {last}")
