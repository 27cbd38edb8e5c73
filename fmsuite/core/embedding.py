"""Features of every window of an index: read ahead in other processes, embedded in fixed batches, stored by group."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from fmsuite import __version__
from fmsuite.core.data.grouping import By
from fmsuite.core.data.index import SampleIndex
from fmsuite.core.data.loader import WORKERS_ADVICE, default_workers, explained_deaths, load_windows
from fmsuite.core.data.pipeline import IMAGE, WholeWindows
from fmsuite.core.data.reader import Reader
from fmsuite.core.data.sample import Batch, SkippedWindow, View
from fmsuite.core.data.skipped import Skipped, SkippedLog
from fmsuite.core.encoders import Encoder
from fmsuite.core.features import FeatureStore, StoreFacts
from fmsuite.core.inputs import InputSpec
from fmsuite.core.tokens import PatchGrid
from fmsuite.core.training.precision import Precision, autocast
from fmsuite.core.training.progress import ProgressReport, silent
from fmsuite.core.versions import package_versions
from fmsuite.errors import FmsuiteError

DEFAULT_BATCH_SIZE = 64
_PACKAGES = ("torch", "timm", "numpy", "zarr")


_LEFT_OUT = re.compile(r"\d+ of \d+ windows of '(.*?)' left out: ")


def left_out_of(entry: Skipped) -> str | None:
    """The group, its spaces made single, of which a line of ``embed`` says that windows are left out."""
    found = _LEFT_OUT.match(entry.reason)
    return found.group(1) if found else None


class Embedder(Protocol):
    """What makes one vector of one window: an ``Encoder``, or a control in its place."""

    @property
    def identity(self) -> str:
        """Equal identities give equal vectors."""
        ...

    @property
    def dim(self) -> int: ...

    @property
    def pooling(self) -> str: ...

    @property
    def spec(self) -> InputSpec: ...

    @property
    def provenance(self) -> Mapping[str, Any]: ...

    def to(self, device: torch.device) -> Any:
        """Move to a device, in place."""
        ...

    def embed(self, view: View, /) -> Tensor:
        """(B, dim) float32 of raw values."""
        ...


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
        dim=embedder.dim,
        size=embedder.spec.size,
        axes=embedder.spec.axes,
        index_hash=index.hash,
        by=by,
        batch_size=batch_size,
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
) -> None:
    """Add to a store the groups that are missing, those included of which nothing could be read before.

    Batches are consecutive runs of ``store.order``, so they hold windows of several groups where these are small, and
    depend on the index and the batch size alone. The last bits of a feature depend on the batch that it was computed
    in; a batch that holds a window of a missing group is therefore computed whole, and what is stored does not depend
    on how often the work was interrupted. Only the groups of the current batch are held in memory.

    A window that cannot be read is left out of its group; ``skipped`` gets a line for each source and stage, with how
    many and the first reason, when the group is finished.

    Args:
        embedder: moved to ``device``.
        index, batch_size: the store's.
        reader: of the index; what it reads meets ``embedder.spec``, the size aside.
        store: open for writing.
        workers: processes that read ahead; 0 reads in this one, -1 chooses, and takes at least one.
        progress: told of every window.

    Raises:
        FmsuiteError: if a feature is not finite (naming slide and row), the store cannot be written, a loader process
            dies, or nothing at all can be read; in strict mode, at the first window that cannot be read. The groups
            that are finished stay.
        ValueError: if the index or the batch size is not the store's.
    """
    facts = store.facts
    if len(index) != len(store.index) or batch_size != facts.batch_size or embedder.identity != facts.identity:
        raise ValueError(f"{store.path} was made for another index, batch size or embedder")
    wanted = [*store.missing(), *store.unreadable()]
    if not wanted:
        return
    plan = _Plan.of(store, wanted)
    windows = WholeWindows(index, reader, embedder.spec, embedder.spec.size, _patch_grid(embedder))
    place = torch.device(device)
    embedder.to(place)
    work = _Work(embedder, store, skipped, place, plan)
    ahead = max(1, default_workers()) if workers < 0 else workers

    def run() -> Iterator[None]:
        with closing(load_windows(windows, plan, ahead)) as loaded:
            for number, (batch, failed) in zip(plan.batches, loaded, strict=True):
                work.take(int(number), batch, failed)
                yield from [None] * len(plan.rows(int(number)))

    with explained_deaths(WORKERS_ADVICE):
        for _ in progress(run(), plan.windows, "Embedding windows"):
            pass
    if not store.stored():
        first = next(iter(store.unreadable().values()))
        raise FmsuiteError(
            f"None of the {len(index)} windows could be read: {first}",
            "Check that the files still lie where the index says, or make another with `fmsuite tile`.",
        )


@dataclass
class _Plan:
    """Which batches have to be computed for the groups that are wanted; iterating yields their rows.

    Attributes:
        wanted: (G,) bool.
        batches: numbers of batches, ascending.
    """

    store: FeatureStore
    wanted: np.ndarray
    batches: np.ndarray

    @classmethod
    def of(cls, store: FeatureStore, wanted: Sequence[str]) -> _Plan:
        names = set(wanted)
        flags = np.array([id in names for id in store.keys()])  # noqa: SIM118
        needed = np.flatnonzero(flags[store.codes]) // store.facts.batch_size
        return cls(store, flags, np.unique(needed))

    @property
    def windows(self) -> int:
        size, total = self.store.facts.batch_size, len(self.store.order)
        return int(np.minimum(size, total - self.batches * size).sum())

    def places(self, number: int) -> slice:
        size = self.store.facts.batch_size
        return slice(number * size, (number + 1) * size)

    def rows(self, number: int) -> np.ndarray:
        return self.store.order[self.places(number)]

    def __iter__(self) -> Iterator[list[int]]:
        return (self.rows(int(number)).tolist() for number in self.batches)


@dataclass
class _OpenGroup:
    """A group of which not all windows have been seen. The arrays are as long as the group could become.

    Attributes:
        failures: (source, stage) to how many windows failed there.
        reasons: and why the first of them did.
    """

    rows: np.ndarray
    features: np.ndarray
    count: int = 0
    failures: Counter[tuple[str, str]] = field(default_factory=Counter)
    reasons: dict[tuple[str, str], str] = field(default_factory=dict)

    def add(self, rows: np.ndarray, features: np.ndarray) -> None:
        stop = self.count + len(rows)
        self.rows[self.count : stop], self.features[self.count : stop] = rows, features
        self.count = stop

    def fail(self, window: SkippedWindow) -> None:
        where = window.source, window.stage
        self.failures[where] += 1
        self.reasons.setdefault(where, window.reason)


class _Work:
    """Takes batches in order and writes every group as soon as its last window has been seen."""

    def __init__(
        self, embedder: Embedder, store: FeatureStore, skipped: SkippedLog, device: torch.device, plan: _Plan
    ) -> None:
        self.embedder = embedder
        self.store = store
        self.skipped = skipped
        self.device = device
        self.plan = plan
        self.ids = store.keys()
        self.open: dict[int, _OpenGroup] = {}

    def take(self, number: int, batch: Batch | None, failed: Sequence[SkippedWindow]) -> None:
        places = self.plan.places(number)
        rows, codes = self.store.order[places], self.store.codes[places]
        read = np.empty(0, dtype=np.int64) if batch is None else batch.indices.numpy()
        vectors = np.empty((0, self.store.facts.dim), dtype=np.float32) if batch is None else self._embed(batch)
        for code in np.unique(codes[self.plan.wanted[codes]]):
            mine = rows[codes == code]
            group = self._group(int(code))
            for window in failed:
                if window.index in mine:
                    if self.skipped.strict:
                        self.skipped.add(window.source, window.stage, window.reason)
                    group.fail(window)
            chosen = np.isin(read, mine)
            self.store.refuse_non_finite(self.ids[code], read[chosen], vectors[chosen])
            group.add(read[chosen], vectors[chosen])
            if mine[-1] == self.store.rows_of(self.ids[code])[-1]:
                self._close(int(code))

    @torch.no_grad()
    def _embed(self, batch: Batch) -> np.ndarray:
        facts = self.store.facts
        view = batch.views[IMAGE][0].to(self.device)
        try:
            with autocast(cast(Precision, facts.precision), self.device):
                vectors = self.embedder.embed(view)
        except torch.cuda.OutOfMemoryError as error:
            raise FmsuiteError(
                f"The GPU's memory does not hold batches of {facts.batch_size} windows of {facts.size}.",
                "Use a smaller --batch-size.",
            ) from error
        if vectors.shape != (len(batch), facts.dim):
            raise ValueError(f"the embedder gave {tuple(vectors.shape)} for {len(batch)} windows of {facts.dim}")
        return vectors.float().cpu().numpy()

    def _group(self, code: int) -> _OpenGroup:
        if code not in self.open:
            size = len(self.store.rows_of(self.ids[code]))
            features = np.empty((size, self.store.facts.dim), dtype=np.float32)
            self.open[code] = _OpenGroup(np.empty(size, dtype=np.int64), features)
        return self.open[code]

    def _close(self, code: int) -> None:
        group, id = self.open.pop(code), self.ids[code]
        for (source, stage), count in group.failures.items():
            # Before the group appears, so that none is there without its line.
            reason = group.reasons[source, stage]
            self.skipped.add(source, stage, f"{count} of {len(group.rows)} windows of '{id}' left out: {reason}")
        if group.count:
            self.store.write(id, group.rows[: group.count], group.features[: group.count])
        else:
            (source, _), reason = next(iter(group.reasons.items()))
            self.store.mark_unreadable(id, f"{source}: {reason}")


def _patch_grid(embedder: Embedder) -> PatchGrid | None:
    """How an encoder cuts its input into tokens; a control does not."""
    return embedder.backbone.grid if isinstance(embedder, Encoder) else None
