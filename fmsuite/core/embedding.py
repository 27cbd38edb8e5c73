"""Features of every window of an index: embedded in fixed batches by any number of workers, stored by group."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch

from fmsuite import __version__
from fmsuite.core.data.grouping import By
from fmsuite.core.data.index import SampleIndex
from fmsuite.core.data.loader import WORKERS_ADVICE, default_workers, explained_deaths
from fmsuite.core.data.reader import Reader
from fmsuite.core.data.skipped import Skipped, SkippedLog
from fmsuite.core.embedding_plan import BATCHING, UNIT_BATCHES, Plan, WindowsUnit
from fmsuite.core.embedding_work import Embedder, Failures, MakeWork, UnitFeatures
from fmsuite.core.features import FeatureStore, StoreFacts
from fmsuite.core.pool import ONE_CORE, Outcome, Resources, run_units
from fmsuite.core.training.precision import Precision
from fmsuite.core.training.progress import ProgressReport, silent
from fmsuite.core.versions import package_versions
from fmsuite.errors import FmsuiteError

__all__ = ["Embedder", "Pool", "embed", "left_out_of", "store_facts"]

DEFAULT_BATCH_SIZE = 64
WORKER_STAGE = "worker"
"""In ``skipped.csv``: of windows that ended the processes that worked on them."""
_PACKAGES = ("torch", "timm", "numpy", "zarr")
_LEFT_OUT = re.compile(r"\d+ of \d+ windows of '(.*?)' left out: ")


def left_out_of(entry: Skipped) -> str | None:
    """The group, its spaces made single, of which a line of ``embed`` says that windows are left out."""
    found = _LEFT_OUT.match(entry.reason)
    return found.group(1) if found else None


@dataclass(frozen=True)
class Pool:
    """Who works; see ``pool.run_units``.

    Attributes:
        processes: of this machine, or actors of ``ray``; 0 works in this process.
        ray: address of a Ray cluster.
        resources: of one of its actors.
    """

    processes: int = 0
    ray: str | None = None
    resources: Resources = ONE_CORE

    @property
    def inline(self) -> bool:
        return self.ray is None and self.processes == 0


INLINE = Pool()


def store_facts(
    embedder: Embedder,
    index: SampleIndex,
    *,
    name: str,
    by: By,
    batch_size: int = DEFAULT_BATCH_SIZE,
    precision: Precision = "float32",
    command: Sequence[str] = (),
) -> StoreFacts:
    """The facts of a store of this embedder's features of these windows; see ``StoreFacts``."""
    return StoreFacts(
        domain=str(index.metadata.get("domain", "")),
        identity=embedder.identity,
        name=name,
        provenance=dict(embedder.provenance),
        pooling=embedder.pooling,
        normalisation=embedder.normalisation,
        dim=embedder.dim,
        size=embedder.spec.size,
        axes=embedder.spec.axes,
        index_hash=index.hash,
        by=by,
        batch_size=batch_size,
        batching=BATCHING,
        precision=precision,
        versions={"fmsuite": __version__, **package_versions(_PACKAGES)},
        command=list(command),
    )


def embed(
    embedder: Embedder,
    index: SampleIndex,
    reader: Reader,
    store: FeatureStore,
    *,
    workers: int = -1,
    device: torch.device | str = "cpu",
    skipped: SkippedLog,
    progress: ProgressReport = silent,
    batch_size: int = DEFAULT_BATCH_SIZE,
    pool: Pool = INLINE,
) -> None:
    """Add to a store the groups that are missing, those included of which nothing could be read before.

    Batches are those of ``embedding_plan.batch_edges``, which depend on the index and the batch size alone. The last
    bits of a feature depend on the batch that it was computed in (and, on a CPU, on the number of threads); a batch
    that holds a window of a missing group is therefore computed whole, and what is stored does not depend on who
    computed it, or on how often the work was interrupted. Only groups of which a part is done are held in memory.

    A window that cannot be read is left out of its group; ``skipped`` gets a line for each source and stage, with how
    many and the first reason, when the group is finished. So are the windows of a unit that ended its workers.

    Args:
        embedder: moved to ``device``, if this process works itself.
        index, batch_size: the store's.
        reader: of the index; what it reads meets ``embedder.spec``, the size aside.
        store: open for writing; written by this process alone.
        workers: processes of each worker that read ahead; 0 reads in the worker, -1 chooses, and takes at least one.
        device: ``cuda`` without a number is each worker's own.
        progress: told of every window.

    Raises:
        FmsuiteError: if a feature is not finite (naming slide and row), the store cannot be written, a loader process
            of this process dies, or nothing at all can be read; in strict mode, at the first window that cannot be
            read. The groups that are finished stay.
        ValueError: if the index or the batch size is not the store's.
    """
    facts = store.facts
    if len(index) != len(store.index) or batch_size != facts.batch_size or embedder.identity != facts.identity:
        raise ValueError(f"{store.path} was made for another index, batch size or embedder")
    wanted = [*store.missing(), *store.unreadable()]
    if not wanted:
        return
    place = torch.device(device)
    # A slow encoder is watched batch by batch; a GPU is not waited for after every one.
    plan = Plan(store, wanted, 1 if pool.inline and place.type == "cpu" else UNIT_BATCHES)
    make = MakeWork(
        embedder,
        reader,
        place,
        cast(Precision, facts.precision),
        batch_size,
        _ahead(pool) if workers < 0 else workers,
        skipped.strict,
    )
    groups = _Groups(store, skipped, plan.wanted)

    def run() -> Iterator[None]:
        with closing(_outcomes(make, plan, pool)) as outcomes:
            for outcome in outcomes:
                groups.take(outcome.unit, outcome.result or _given_up(outcome, facts.dim))
                yield from [None] * len(outcome.unit)

    # torch tells of a reader's death in whatever runs then, which may be the writing here.
    with explained_deaths(WORKERS_ADVICE):
        for _ in progress(run(), plan.windows, "Embedding windows"):
            pass
    if not store.stored():
        first = next(iter(store.unreadable().values()))
        raise FmsuiteError(
            f"None of the {len(index)} windows could be read: {first}",
            "Check that the files still lie where the index says, or make another with `fmsuite tile`.",
        )


def _outcomes(make: MakeWork, plan: Plan, pool: Pool) -> Generator[Outcome[WindowsUnit, UnitFeatures], None, None]:
    return run_units(make, plan, processes=pool.processes, ray=pool.ray, resources=pool.resources)


def _ahead(pool: Pool) -> int:
    """Processes that read ahead for each worker."""
    if pool.ray is not None:
        return max(1, int(pool.resources.cpus) - 1)
    return max(1, default_workers() // max(1, pool.processes))


def _given_up(outcome: Outcome[WindowsUnit, UnitFeatures], dim: int) -> UnitFeatures:
    """All windows of a unit as failures."""
    reason = outcome.failure or ""
    failures: dict[str, Failures] = {}
    for place, source in enumerate(outcome.unit.windows.table.column("source").to_pylist()):
        failures.setdefault(source, Failures(source, WORKER_STAGE, reason)).places.append(place)
    return UnitFeatures(np.empty(0, dtype=np.int64), np.empty((0, dim), dtype=np.float32), list(failures.values()))


@dataclass
class _OpenGroup:
    """A group of which not all windows have been seen.

    Attributes:
        features: (N, D), and (N,) which of them are there.
        left: how many have not been seen.
        failures: (source, stage) to how many windows failed there.
        reasons: (source, stage) to why, with the place of the window that failed first.
    """

    features: np.ndarray
    there: np.ndarray
    left: int
    failures: Counter[tuple[str, str]] = field(default_factory=Counter)
    reasons: dict[tuple[str, str], tuple[int, str]] = field(default_factory=dict)


class _Groups:
    """Takes what became of units, in any order, and writes every group as soon as all of it has been seen."""

    def __init__(self, store: FeatureStore, skipped: SkippedLog, wanted: np.ndarray) -> None:
        self.store = store
        self.skipped = skipped
        self.wanted = wanted
        self.ids = store.keys()
        self.open: dict[int, _OpenGroup] = {}

    def take(self, unit: WindowsUnit, found: UnitFeatures) -> None:
        codes = self.store.codes[unit.first : unit.first + len(unit)]
        for code in np.unique(codes[self.wanted[codes]]).tolist():
            first, last = np.searchsorted(codes, [code, code + 1])
            group = self._group(code)
            offset = unit.first - self.store.start_of(code)
            low, high = np.searchsorted(found.places, [first, last])
            places, features = found.places[low:high] + offset, found.features[low:high]
            self.store.refuse_non_finite(self.ids[code], unit.rows[found.places[low:high]], features)
            group.features[places], group.there[places] = features, True
            for failures in found.failures:
                mine = [place + offset for place in failures.places if first <= place < last]
                if mine:
                    where = failures.source, failures.stage
                    group.failures[where] += len(mine)
                    said = mine[0], failures.reason
                    group.reasons[where] = min(group.reasons.get(where, said), said)
            group.left -= int(last - first)
            if not group.left:
                self._close(code)

    def _group(self, code: int) -> _OpenGroup:
        if code not in self.open:
            size = len(self.store.rows_of(self.ids[code]))
            features = np.empty((size, self.store.facts.dim), dtype=np.float32)
            self.open[code] = _OpenGroup(features, np.zeros(size, dtype=bool), size)
        return self.open[code]

    def _close(self, code: int) -> None:
        group, id = self.open.pop(code), self.ids[code]
        # In the order of the windows, whoever was first.
        for where, (_, reason) in sorted(group.reasons.items(), key=lambda item: item[1][0]):
            # Before the group appears, so that none is there without its line.
            source, stage = where
            left = f"{group.failures[where]} of {len(group.there)} windows of '{id}' left out"
            self.skipped.add(source, stage, f"{left}: {reason}")
        rows = self.store.rows_of(id)
        if group.there.all():
            self.store.write(id, rows, group.features)
        elif group.there.any():
            self.store.write(id, rows[group.there], group.features[group.there])
        else:
            (source, _), (_, reason) = min(group.reasons.items(), key=lambda item: item[1][0])
            self.store.mark_unreadable(id, f"{source}: {reason}")
