"""From feature stores to labelled bags: stores that can be compared, and the groups that all of them have."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fmsuite.core.evaluation.bags import Bags
from fmsuite.core.features import FeatureStore
from fmsuite.errors import UsageError

_NAMED = 3


@dataclass(frozen=True)
class StoredBags:
    """Bags, and where their vectors come from.

    Attributes:
        rows: (T,) int64 row of the index of each vector of ``bags.features``.
    """

    bags: Bags
    rows: np.ndarray

    def rows_of(self, bag: int) -> np.ndarray:
        """(N,) int64 rows of the index of one bag's vectors."""
        return self.rows[int(self.bags.offsets[bag]) : int(self.bags.offsets[bag + 1])]


def open_comparable(paths: Sequence[str | os.PathLike], unit: str | None = None) -> list[FeatureStore]:
    """Stores of the same windows in the same groups, each with every group that could be read.

    Args:
        unit: what a group is called in messages, in the singular.

    Raises:
        UsageError: if there is none; if one is missing, no store, named twice or not finished; if two are of other
            windows or other groups.
        FmsuiteError: if one is damaged.
    """
    if not paths:
        raise UsageError(
            "No feature store was named.", "Name at least one with --features; `fmsuite embed` makes them."
        )
    unit = unit or "group"
    stores: dict[str, FeatureStore] = {}
    for path in paths:
        real = os.path.realpath(path)
        if real in stores:
            raise UsageError(f"{path}: this store is named twice.", "Name each once.")
        stores[real] = FeatureStore.open(path)
    found = list(stores.values())
    first = found[0]
    for other in found[1:]:
        if (other.facts.domain, other.facts.index_hash) != (first.facts.domain, first.facts.index_hash):
            raise UsageError(
                f"{other.path} is of other windows than {first.path}: index {other.facts.index_hash} "
                f"({other.facts.domain}) against {first.facts.index_hash} ({first.facts.domain}).",
                "Embed one index with every encoder, so that all are asked about the same.",
            )
        if other.facts.by != first.facts.by:
            raise UsageError(
                f"{other.path} is grouped by {other.facts.by}, and {first.path} by {first.facts.by}.",
                "Embed again with the same --by.",
            )
    for store in found:
        missing = store.missing()
        if missing:
            more = ", ..." if len(missing) > _NAMED else ""
            raise UsageError(
                f"{store.path}: {len(missing)} of {len(store.keys())} {unit}s have no features yet "
                f"({', '.join(missing[:_NAMED])}{more}).",
                "Run the same `fmsuite embed` again: it adds what is missing.",
            )
    return found


def without_features(stores: Sequence[FeatureStore]) -> dict[str, str]:
    """Groups of which a store could read no window, each to a sentence that says which store and why."""
    found: dict[str, str] = {}
    for store in stores:
        for id, reason in store.unreadable().items():
            found.setdefault(id, f"{store.path} has no features of it: {reason}")
    return found


def stored_bags(
    store: FeatureStore, ids: Sequence[str], labels: Sequence[int], groups: Sequence[int], classes: int
) -> StoredBags:
    """Read groups as bags, one group at a time.

    Args:
        ids: (S,) groups of the store.
        labels: (S,) below ``classes``.
        groups: (S,) equal for bags that must stay on one side of a split.

    Raises:
        UsageError: if the store lacks a group.
        FmsuiteError: if a group is damaged, or one of its features is not finite: the message names group and row.
    """
    # As if every window had been read; the rest of the memory is never touched.
    room = sum(len(store.rows_of(id)) for id in ids)
    features = np.empty((room, store.facts.dim), dtype=np.float32)
    rows = np.empty(room, dtype=np.int64)
    offsets = [0]
    for id in ids:
        group = store[id]
        start, stop = offsets[-1], offsets[-1] + len(group.rows)
        features[start:stop], rows[start:stop] = group.features, group.rows
        offsets.append(stop)
    bags = Bags(
        torch.from_numpy(features[: offsets[-1]]),
        torch.tensor(offsets),
        torch.tensor(list(labels)),
        torch.tensor(list(groups)),
        classes,
    )
    return StoredBags(bags, rows[: offsets[-1]])
