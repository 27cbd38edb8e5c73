"""From files to an index: each source by its domain, the rest here: order, resuming, processes, what goes wrong."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import pyarrow as pa

from fmsuite.core.data.index import SampleIndex
from fmsuite.core.data.skipped import Skipped, SkippedLog
from fmsuite.core.pool import run_units
from fmsuite.domains.base import Domain, Progress, no_progress
from fmsuite.errors import ReadFailure, UsageError
from fmsuite.tiling.parts import PartStore
from fmsuite.tiling.table import join_tables
from fmsuite.tiling.tasks import SourceFacts, SourceRows, SourceTask

MAX_PROCESSES = 8
"""At most so many are started unasked: beyond, disks and memory are more often the limit than cores."""
MOVE_AFTER_S = 2.0
WORTH_S = 20.0
"""Unasked, the work moves to processes after so many seconds, if it would take so many more here: starting processes
costs three to five seconds, the import of the libraries."""
BUNDLE_BYTES = 4 << 20
BUNDLE_SOURCES = 64
"""Small files are handed out together, up to so many bytes and files: each is looked at faster than it is sent."""
WORKER = "worker"
"""The stage of a source whose process died."""
_AGAIN = 1
_JOINED = "rows.arrow"

Looked = SourceRows | ReadFailure


def build_index(
    domain: Domain,
    paths: Sequence[Path],
    skipped: SkippedLog,
    progress: Progress = no_progress,
    *,
    parts: Path | None = None,
    processes: int | None = 0,
    ray: str | None = None,
) -> SampleIndex:
    """The windows of the given files and folders (folders are searched through).

    A source that cannot be used goes to ``skipped`` and never stops the rest. The index is the same, whoever looked at
    which source and in whatever order they finished; so are the lines of ``skipped``.

    Args:
        parts: a folder for what is finished; the next call with the same folder does only what is missing. The caller
            removes it once the index is written (``parts.discard_parts``); rows are read from there until then, so
            that they need not fit in memory.
        processes: that look at sources; 0 looks at them here. ``None`` begins here and moves to processes, a core each,
            if that is worth their start; they import the caller's main module, which must not begin anything by that.
            A source that kills its process costs only itself, where it has one.
        ray: address of a Ray cluster that looks at them instead; every machine must see the files under their paths.

    Raises:
        UsageError: as ``Domain.find_sources``; for a bad number of processes.
    """
    if processes is not None and processes < 0:
        raise UsageError(f"{processes} processes.", "Give 0 to look at sources in this process, or a number of them.")
    options = domain.options.model_dump(mode="json", exclude=set(domain.free_options))
    store = PartStore(parts, [domain.name, options])
    looking = _Looking(domain, skipped, store, processes, ray)
    with looking.log() as log:
        sources = domain.find_sources(paths, log)
    tasks = sources.tasks
    looking.look(tasks, progress, f"{domain.units.source}s")
    with looking.log() as log:
        settled = domain.settle_sources(looking.found(tasks), log)
    if settled is not None:
        tasks = settled
        looking.look(tasks, progress, f"{domain.units.source}s, second look")
    found = looking.found(tasks)
    for source in found:
        if looking.rows_of(source.task) is None:
            raise RuntimeError(f"the domain '{domain.name}' gave no rows for {source.task.path} and did not settle it")
    index = join_tables(looking.tables(found), {}, parts / _JOINED if parts is not None and found else None)
    with looking.log() as log:
        metadata = domain.index_metadata(index, found, log)
    skipped.put_first(looking.lines)
    index.metadata = {"domain": domain.name, "options": options, **sources.metadata, **metadata}
    return index


class IndexWork:
    """What a worker does with bundles of sources; see ``core.pool.Work``.

    Args:
        domain: whose sources they are.
        threads: bundles to work on at the same time.
    """

    def __init__(self, domain: Domain, threads: int = 1) -> None:
        self.domain = domain
        self.threads = threads

    def __call__(self, bundles: Iterator[Sequence[SourceTask]]) -> Iterator[list[Looked]]:
        with closing(self.domain):
            if self.threads == 1:
                yield from map(self._look, bundles)
            else:
                yield from self._threaded(bundles)

    def _threaded(self, bundles: Iterator[Sequence[SourceTask]]) -> Iterator[list[Looked]]:
        pool = ThreadPoolExecutor(self.threads)
        ahead: deque[Future[list[Looked]]] = deque()
        try:
            for bundle in bundles:
                ahead.append(pool.submit(self._look, bundle))
                if len(ahead) > 2 * self.threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _look(self, bundle: Sequence[SourceTask]) -> list[Looked]:
        return [self._look_at(task) for task in bundle]

    def _look_at(self, task: SourceTask) -> Looked:
        try:
            return self.domain.index_source(task)
        except ReadFailure as failure:
            return failure
        except MemoryError:
            return ReadFailure(task.path, WORKER, "it needs more memory than there is.", "Use fewer processes.")


class _Looking:
    """The state of ``build_index``: what is known of each source, and the lines of ``skipped`` in their order."""

    def __init__(
        self, domain: Domain, skipped: SkippedLog, store: PartStore, processes: int | None, ray: str | None
    ) -> None:
        self.domain = domain
        self.skipped = skipped
        self.store = store
        self.processes = processes
        self.ray = ray
        self.lines: list[Skipped] = []
        self._keys: dict[int, str] = {}

    @contextmanager
    def log(self) -> Iterator[SkippedLog]:
        """For the domain to write to."""
        log = SkippedLog(strict=self.skipped.strict)
        try:
            yield log
        finally:
            self._record(log.entries)
            self.lines += log.entries

    def look(self, tasks: Sequence[SourceTask], progress: Progress, title: str) -> None:
        """Look at all that is not in the store."""
        said: dict[int, Sequence[Skipped]] = {}
        with closing(self._looks(tasks, said)) as steps:
            for _ in progress(steps, len(tasks), title):
                pass
        self.lines += [line for number in sorted(said) for line in said[number]]

    def found(self, tasks: Sequence[SourceTask]) -> list[SourceFacts]:
        """Those that could be used, in order."""
        known = ((task, self.store.get(self._key(task))) for task in tasks)
        return [SourceFacts(task, kept.facts) for task, kept in known if kept is not None]

    def rows_of(self, task: SourceTask) -> int | None:
        """How many; ``None`` for one that depends on others."""
        kept = self.store.get(self._key(task))
        return None if kept is None else kept.rows

    def tables(self, found: Sequence[SourceFacts]) -> Iterator[pa.Table]:
        return self.store.tables(self._key(source.task) for source in found)

    def _looks(self, tasks: Sequence[SourceTask], said: dict[int, Sequence[Skipped]]) -> Generator[None, None, None]:
        """Yields as often as there are tasks, whenever one is done."""
        missing = []
        for number, task in enumerate(tasks):
            kept = self.store.get(self._key(task))
            if kept is None:
                missing.append(number)
                continue
            said[number] = kept.notes
            self._record(kept.notes)
            yield
        self._forget_lines_about([tasks[number] for number in missing])
        try:
            with closing(self._results([tasks[number] for number in missing])) as results:
                for place, looked in results:
                    number = missing[place]
                    said[number] = [Skipped.of(looked)] if isinstance(looked, ReadFailure) else looked.notes
                    self._record(said[number])
                    if isinstance(looked, SourceRows) and (looked.rows is None or len(looked.rows)):
                        self.store.add(self._key(tasks[number]), looked)
                    yield
        finally:
            self.store.flush()

    def _results(self, tasks: Sequence[SourceTask]) -> Generator[tuple[int, Looked], None, None]:
        """What was found for each, with its place, in any order."""
        left = range(len(tasks))
        if self.ray is None and not self.processes:
            done = 0
            with closing(self._here(tasks, may_move=self.processes is None)) as found:
                for looked in found:
                    yield done, looked
                    done += 1
            left = left[done:]
        count = min(self.processes or (0 if self.ray else _spare_cores()), len(left))
        lost: list[int] = []
        for group, results, _ in self._elsewhere(tasks, bundled(tasks, left, count or MAX_PROCESSES), count, 0):
            if results is None:
                lost += group
            else:
                yield from zip(group, results, strict=True)
        # Of a bundle whose process died it is not known which source was to blame.
        for (number,), results, death in self._elsewhere(tasks, [[number] for number in lost], count, _AGAIN):
            if results is None:
                yield number, _killed(tasks[number], death)
            else:
                yield number, results[0]

    def _here(self, tasks: Sequence[SourceTask], may_move: bool) -> Generator[Looked, None, None]:
        """In this process, in order; ends early where the rest is better done elsewhere."""
        threads = max(1, min(self.domain.at_once, len(tasks)))
        may_move = may_move and threads == 1 and _spare_cores() > 1
        started = time.monotonic()
        groups = (
            bundled(tasks, range(len(tasks)), threads) if threads > 1 else [[number] for number in range(len(tasks))]
        )
        work = partial(IndexWork, self.domain, threads)
        done = 0
        with closing(run_units(work, [[tasks[number] for number in group] for group in groups])) as outcomes:
            for outcome in outcomes:
                yield from outcome.result or ()
                done += len(outcome.unit)
                taken = time.monotonic() - started
                if may_move and taken > MOVE_AFTER_S and taken / done * (len(tasks) - done) > WORTH_S:
                    return

    def _elsewhere(
        self, tasks: Sequence[SourceTask], groups: Sequence[list[int]], processes: int, retries: int
    ) -> Generator[tuple[list[int], list[Looked] | None, str], None, None]:
        """In other processes: each group, with what was found, or without and how its process died."""
        if not groups:
            return
        units = [[tasks[number] for number in group] for group in groups]
        work: Callable[[], IndexWork] = partial(IndexWork, self.domain)
        with closing(run_units(work, units, processes=processes, ray=self.ray, retries=retries)) as outcomes:
            for outcome in outcomes:
                yield groups[outcome.number], outcome.result, outcome.failure or ""

    def _forget_lines_about(self, tasks: Sequence[SourceTask]) -> None:
        """Take out what an interrupted run said about sources that are now tried again."""
        if len(self.skipped):
            said, paths = set(self.lines), {path for task in tasks for path in (task.path, *task.others)}
            self.skipped.forget(lambda entry: entry not in said and entry.path in paths)

    def _record(self, lines: Sequence[Skipped]) -> None:
        for line in lines:
            self.skipped.add(line.path, line.stage, line.reason)

    def _key(self, task: SourceTask) -> str:
        # Once each: a file that changes while it is looked at is not what was asked for.
        if id(task) not in self._keys:
            self._keys[id(task)] = PartStore.key(task)
        return self._keys[id(task)]


def bundled(tasks: Sequence[SourceTask], numbers: Sequence[int], processes: int) -> list[list[int]]:
    """Which sources are handed out together: neighbours, small ones only, and no fewer bundles than four a process."""
    most = max(1, min(BUNDLE_SOURCES, len(numbers) // (4 * max(1, processes))))
    bundles: list[list[int]] = []
    space = 0
    for number in numbers:
        size = _size(tasks[number].path) if most > 1 else 0
        if not bundles or len(bundles[-1]) >= most or size > space:
            bundles.append([])
            space = BUNDLE_BYTES
        bundles[-1].append(number)
        space -= size
    return bundles


def _killed(task: SourceTask, death: str) -> ReadFailure:
    hint = "Leave the file out, or give each process more memory by using fewer."
    return ReadFailure(task.path, WORKER, f"the process that looked at it died: {death}.", hint)


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def _spare_cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MAX_PROCESSES, cores)
