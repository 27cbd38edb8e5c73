"""Labelled bags of feature vectors: slides with their tiles, or single tiles as bags of one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

_ROWS = 1 << 14
"""Vectors that are widened to float64 at once."""


@dataclass
class Bags:
    """What every classifier of frozen features is given.

    Attributes:
        features: (T, D) float32, the vectors of bag after bag.
        offsets: (S + 1,) int64; bag s is ``features[offsets[s] : offsets[s + 1]]``, and no bag is empty.
        labels: (S,) int64, 0 to classes - 1.
        groups: (S,) int64, equal for bags that must stay on one side of a split (one patient's slides).
        classes: how many classes there are.
    """

    features: Tensor
    offsets: Tensor
    labels: Tensor
    groups: Tensor
    classes: int

    def __post_init__(self) -> None:
        sizes = self.offsets.diff()
        if not len(self.offsets) - 1 == len(self.labels) == len(self.groups):
            raise ValueError(f"{len(self.offsets) - 1} bags, {len(self.labels)} labels and {len(self.groups)} groups")
        if int(self.offsets[0]) != 0 or int(self.offsets[-1]) != len(self.features) or bool((sizes < 1).any()):
            raise ValueError("offsets must rise from 0 to the number of features")
        if len(self.labels) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < self.classes:
            raise ValueError(f"labels must lie between 0 and {self.classes - 1}")

    @classmethod
    def of_single(cls, features: Tensor, labels: Tensor, groups: Tensor, classes: int) -> Bags:
        """Every vector a bag of its own."""
        return cls(features, torch.arange(len(features) + 1), labels, groups, classes)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def sizes(self) -> Tensor:
        """(S,) int64 vectors in each bag."""
        return self.offsets.diff()

    @cached_property
    def bag_of(self) -> Tensor:
        """(T,) int64 the bag of each vector."""
        return torch.repeat_interleave(torch.arange(len(self)), self.sizes)

    @cached_property
    def means(self) -> Tensor:
        """(S, D) float32 mean vector of each bag."""
        if len(self.features) == len(self):
            return self.features
        total = torch.zeros(len(self), self.features.shape[1], dtype=torch.float64)
        for features, bag_of in zip(self.features.split(_ROWS), self.bag_of.split(_ROWS), strict=True):
            total.index_add_(0, bag_of, features.double())
        return (total / self.sizes[:, None]).float()

    def rows(self, bags: Tensor) -> Tensor:
        """(R,) int64 rows of ``features`` that belong to the given bags, bag after bag."""
        if len(self.features) == len(self):
            return bags
        sizes = self.sizes[bags]
        starts = torch.repeat_interleave(self.offsets[bags] - (sizes.cumsum(0) - sizes), sizes)
        return starts + torch.arange(int(sizes.sum()))

    def with_labels(self, labels: Tensor) -> Bags:
        """The same bags under other labels, with what has been computed of their features."""
        other = Bags(self.features, self.offsets, labels, self.groups, self.classes)
        # Computed here if they were not: many relabellings of the same bags share them.
        other.__dict__["means"] = self.means
        return other
