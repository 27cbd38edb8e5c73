"""Watching the encoder while it trains: feature rank, feature spread and a kNN probe on a fixed set of windows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fmsuite.core.data.sample import Batch, View
from fmsuite.core.evaluation.knn import knn_predict
from fmsuite.core.evaluation.metrics import balanced_accuracy
from fmsuite.core.evaluation.rank import STD_FLOOR, collapse_warning, feature_std, rankme
from fmsuite.core.objectives.base import Objective
from fmsuite.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger("fmsuite")


@dataclass
class ProbeSet:
    """A fixed set of windows without augmentation.

    Attributes:
        views: raw pixels on the CPU, in batches of any size.
        labels: (N,) int64 over all the batches in order, -1 where unlabelled.
        groups: (N,) int64, equal for windows of one slide, patient or scene.
    """

    views: list[View]
    labels: Tensor
    groups: Tensor

    def __post_init__(self) -> None:
        windows = sum(len(view) for view in self.views)
        if not windows == len(self.labels) == len(self.groups):
            raise ValueError(f"{windows} windows, {len(self.labels)} labels and {len(self.groups)} groups")
        if windows < 2:
            raise UsageError(
                f"Monitoring needs at least 2 windows and has {windows}.", "Set monitor.every=0 to switch it off."
            )

    @classmethod
    def collect(cls, batches: Iterable[Batch], view: str, group_of: Callable[[int], str], samples: int) -> ProbeSet:
        """The first windows of a stream of batches.

        Args:
            view: name of the view request whose first view is kept.
            group_of: the group of a row of the index.
            samples: how many windows at most.
        """
        views: list[View] = []
        labels: list[Tensor] = []
        groups: list[int] = []
        codes: dict[str, int] = {}
        for batch in batches:
            take = slice(0, samples - len(groups))
            views.append(batch.views[view][0][take])
            labels.append(batch.labels[take])
            groups += [codes.setdefault(group_of(row), len(codes)) for row in batch.indices[take].tolist()]
            if len(groups) == samples:
                break
        return cls(views, torch.cat(labels) if labels else torch.empty(0), torch.tensor(groups, dtype=torch.int64))


@dataclass
class FeatureReport:
    """What one look found.

    Attributes:
        rank, std: RankMe and feature spread.
        knn: balanced accuracy of a kNN whose neighbours are of other groups; ``None`` without labels to judge by.
        warning: in what way the features have collapsed, or ``None``.
    """

    rank: float
    std: float
    knn: float | None
    warning: str | None

    def metrics(self) -> dict[str, float | str]:
        """As a line of ``metrics.jsonl``."""
        values: dict[str, float | str] = {"features/rankme": self.rank, "features/std": self.std}
        if self.knn is not None:
            values["features/knn_balanced_accuracy"] = self.knn
        if self.warning is not None:
            values["features/collapse"] = self.warning
        return values


class Monitor:
    """Looks at the encoder's features and reports a collapse when it happens, in one warning until it is over.

    Features that are not finite or all point the same way are reported by the first look that finds them; a fall
    relative to the start by the second in a row, since healthy runs pass through a narrow space early on (a masked
    autoencoder first learns the mean patch). ``metrics.jsonl`` has what each look found.

    Args:
        probe: the windows to look at.
        knn_k: neighbours that vote.
        start: RankMe and spread before training, for a resumed run; the first look otherwise.
    """

    def __init__(self, probe: ProbeSet, knn_k: int, start: tuple[float, float] | None = None) -> None:
        self.probe = probe
        self.knn_k = knn_k
        self.start = start
        self.looks_collapsed = 0
        self.warned = False

    def look(self, objective: Objective, prepare: Callable[[View], View], step: int) -> FeatureReport:
        """Features of ``objective.encoder`` on the probe set, and what they say.

        Training is not disturbed: modes are restored, and no random numbers are drawn.

        Args:
            prepare: moves a view to the model's device and normalises it.
            step: for the warning.
        """
        features = encode(objective.encoder, self.probe.views, prepare, objective.pooling)
        if not bool(features.isfinite().all()):
            report = FeatureReport(0.0, 0.0, None, "some features are not finite")
        else:
            rank, std = rankme(features), feature_std(features)
            warning = collapse_warning(rank, std, *(self.start or (None, None)))
            report = FeatureReport(rank, std, self._knn(features), warning)
            self.start = self.start or (rank, std)
        self.looks_collapsed = self.looks_collapsed + 1 if report.warning is not None else 0
        sure = report.std < STD_FLOOR or self.looks_collapsed > 1
        if report.warning is not None and sure and not self.warned:
            logger.warning(
                "Step %d: the encoder seems to have collapsed: %s. Try a lower optim.lr or a longer optim.warmup.",
                step,
                report.warning,
            )
        self.warned = report.warning is not None and (sure or self.warned)
        return report

    def _knn(self, features: Tensor) -> float | None:
        labelled = self.probe.labels >= 0
        labels, groups, features = self.probe.labels[labelled], self.probe.groups[labelled], features[labelled]
        if len(labels.unique()) < 2 or len(groups.unique()) < 2:
            return None
        predicted = knn_predict(
            features, labels, features, self.knn_k, support_groups=groups, query_groups=groups, balance=True
        )
        return balanced_accuracy(predicted, labels)


@torch.no_grad()
def encode(encoder: nn.Module, views: Iterable[View], prepare: Callable[[View], View], pooling: str) -> Tensor:
    """(N, D) float32 features on the CPU, in evaluation mode; every module's mode is restored."""
    with evaluating(encoder):
        return torch.cat([encoder(prepare(view)).pooled(pooling).float().cpu() for view in views])


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every part's own mode again."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
