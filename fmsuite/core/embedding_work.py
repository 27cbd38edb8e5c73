"""Inside a worker: windows are read ahead across units, and each unit's become features."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fmsuite.core.data.index import SampleIndex, Window
from fmsuite.core.data.loader import load_windows
from fmsuite.core.data.pipeline import IMAGE, WholeWindows, joined
from fmsuite.core.data.reader import Reader
from fmsuite.core.data.sample import Batch, SkippedWindow, View
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.embedding_plan import WindowsUnit
from fmsuite.core.encoders import Encoder
from fmsuite.core.inputs import InputSpec
from fmsuite.core.pool import slot
from fmsuite.core.training.precision import Precision, autocast, choose_precision
from fmsuite.errors import FmsuiteError, UsageError


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

    @property
    def normalisation(self) -> str:
        """One sentence on what raw values become before they are looked at."""
        ...

    def to(self, device: torch.device) -> Any:
        """Move to a device, in place."""
        ...

    def embed(self, view: View, /) -> Tensor:
        """(B, dim) float32 of raw values."""
        ...


@dataclass
class Failures:
    """Windows of one source that failed at one stage.

    Attributes:
        places: which of the unit's.
        reason: why the first of them did.
    """

    source: str
    stage: str
    reason: str
    places: list[int] = field(default_factory=list)


@dataclass
class UnitFeatures:
    """What became of a unit.

    Attributes:
        places: (M,) int64, ascending, which of the unit's windows could be read.
        features: (M, D) float32.
        failures: the others.
    """

    places: np.ndarray
    features: np.ndarray
    failures: list[Failures]


@dataclass
class MakeWork:
    """Builds the work in each worker. The embedder is sent as it is, so that all compute with the same weights.

    Attributes:
        reader: of the index; what it reads meets ``embedder.spec``, the size aside.
        device: ``cuda`` without a number stands for the worker's own.
        ahead: processes of each worker that read ahead; 0 reads in the worker.
        strict: a window that cannot be read is an error.
    """

    embedder: Embedder
    reader: Reader
    device: torch.device
    precision: Precision
    batch_size: int
    ahead: int
    strict: bool

    def __call__(self) -> EmbeddingWork:
        return EmbeddingWork(self)


class EmbeddingWork:
    """Units of windows to their features. A loader reads ahead across units, so that encoding waits for none."""

    def __init__(self, what: MakeWork) -> None:
        self.what = what
        self.device = what.device
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", slot())
        if self.device.type == "cuda" and what.precision != choose_precision("auto", self.device):
            raise UsageError(
                f"The GPU of this worker ({torch.cuda.get_device_name(self.device)}) does not compute in "
                f"{what.precision} as the first one does.",
                "Use GPUs of one generation.",
            )
        self.embedder = what.embedder
        self.embedder.to(self.device)
        self.windows = _GivenWindows(what.embedder, what.reader)

    def __call__(self, units: Iterator[WindowsUnit]) -> Iterator[UnitFeatures]:
        open_units: deque[_OpenUnit] = deque()

        def requests() -> Iterator[list[tuple[int, Window]]]:
            for unit in units:
                open_units.append(_OpenUnit(unit, self.embedder.dim, self.device))
                yield from unit.requests()

        with closing(self._loaded(requests())) as loaded:
            for batch, failed in loaded:
                unit = open_units[0]
                if failed and self.what.strict:
                    SkippedLog(strict=True).add(failed[0].source, failed[0].stage, failed[0].reason)
                unit.add(batch, None if batch is None else self._embed(batch), failed)
                if unit.complete:
                    yield open_units.popleft().result()

    def _loaded(
        self, requests: Iterator[list[tuple[int, Window]]]
    ) -> Generator[tuple[Batch | None, list[SkippedWindow]], None, None]:
        return load_windows(self.windows, requests, self.what.ahead)

    @torch.no_grad()
    def _embed(self, batch: Batch) -> Tensor:
        view = batch.views[IMAGE][0].to(self.device)
        try:
            with autocast(self.what.precision, self.device):
                vectors = self.embedder.embed(view)
        except torch.cuda.OutOfMemoryError as error:
            raise FmsuiteError(
                f"The GPU's memory does not hold batches of {self.what.batch_size} windows of "
                f"{self.embedder.spec.size}.",
                "Use a smaller --batch-size.",
            ) from error
        if vectors.shape != (len(batch), self.embedder.dim):
            raise ValueError(
                f"the embedder gave {tuple(vectors.shape)} for {len(batch)} windows of {self.embedder.dim}"
            )
        return vectors


class _GivenWindows:
    """Reads windows that come with the request."""

    def __init__(self, embedder: Embedder, reader: Reader) -> None:
        # A control does not cut its input into tokens.
        grid = embedder.backbone.grid if isinstance(embedder, Encoder) else None
        nothing = SampleIndex.from_windows([])
        self.windows = WholeWindows(nothing, reader, embedder.spec, embedder.spec.size, grid)

    def __getitem__(self, asked: Sequence[tuple[int, Window]]) -> tuple[Batch | None, list[SkippedWindow]]:
        return joined(self.windows.item_of(window, row) for row, window in asked)


class _OpenUnit:
    """A unit of which not all batches have been seen. Features stay on the device until all have, so that it need not
    be waited for batch by batch."""

    def __init__(self, unit: WindowsUnit, dim: int, device: torch.device) -> None:
        self.place = {int(row): place for place, row in enumerate(unit.rows)}
        self.features = torch.empty((len(unit), dim), dtype=torch.float32, device=device)
        self.places = np.empty(len(unit), dtype=np.int64)
        self.count = 0
        self.left = len(unit.batches)
        self.failures: dict[tuple[str, str], Failures] = {}

    def add(self, batch: Batch | None, vectors: Tensor | None, failed: Sequence[SkippedWindow]) -> None:
        if batch is not None and vectors is not None:
            stop = self.count + len(batch)
            self.places[self.count : stop] = [self.place[row] for row in batch.indices.tolist()]
            self.features[self.count : stop] = vectors
            self.count = stop
        for window in failed:
            key = window.source, window.stage
            found = self.failures.setdefault(key, Failures(window.source, window.stage, window.reason))
            found.places.append(self.place[window.index])
        self.left -= 1

    @property
    def complete(self) -> bool:
        return self.left == 0

    def result(self) -> UnitFeatures:
        features = self.features[: self.count].cpu().numpy()
        return UnitFeatures(self.places[: self.count], features, list(self.failures.values()))
