"""Feature stores as labelled bags: what belongs together stays together, and only comparable stores are taken."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from fmsuite.core.data.index import SampleIndex, Window
from fmsuite.core.evaluation.store_bags import open_comparable, stored_bags, without_features
from fmsuite.core.features import FeatureStore, StoreFacts
from fmsuite.errors import UsageError

NAMES = ["b", "a", "b", "c", "a", "a"]


def make_index(names: Sequence[str] = NAMES) -> SampleIndex:
    windows = [Window(f"/d/{name}.svs", name, (float(row),), (1.0,)) for row, name in enumerate(names)]
    return SampleIndex.from_windows(windows, {"domain": "pathology"})


def make_store(path: Path, index: SampleIndex, skip: Sequence[str] = (), **changes: object) -> Path:
    """A store in which the vector of row r is (r, 10 r)."""
    facts = StoreFacts(
        domain="pathology",
        identity="e",
        name="e",
        pooling="cls",
        dim=2,
        size=(4,),
        axes=("x",),
        index_hash=index.hash,
        by="source",
        batch_size=2,
    ).model_copy(update=changes)
    with FeatureStore.create_or_resume(path, facts, index) as store:
        for id in store.keys():  # noqa: SIM118
            if id not in skip:
                rows = store.rows_of(id)
                store.write(id, rows, np.stack([rows, 10 * rows], axis=1).astype(np.float32))
    return path


def test_bags_have_the_asked_groups_in_the_asked_order_with_the_rows_they_come_from(tmp_path: Path) -> None:
    store = FeatureStore.open(make_store(tmp_path / "f.zarr", make_index()))
    stored = stored_bags(store, ["a.svs", "c.svs", "b.svs"], [1, 0, 1], [4, 4, 7], 2)
    assert stored.bags.offsets.tolist() == [0, 3, 4, 6]
    assert stored.rows.tolist() == [1, 4, 5, 3, 0, 2]
    assert stored.bags.features.tolist() == [[row, 10.0 * row] for row in stored.rows.tolist()]
    assert stored.bags.labels.tolist() == [1, 0, 1]
    assert stored.bags.groups.tolist() == [4, 4, 7]
    assert [stored.rows_of(bag).tolist() for bag in range(3)] == [[1, 4, 5], [3], [0, 2]]


def test_windows_that_were_not_stored_are_not_in_the_bag(tmp_path: Path) -> None:
    index = make_index()
    path = make_store(tmp_path / "f.zarr", index, skip=["a.svs"])
    with FeatureStore.create_or_resume(path, FeatureStore.open(path).facts, index) as store:
        store.write("a.svs", np.array([1, 5]), np.ones((2, 2), np.float32))
    stored = stored_bags(FeatureStore.open(path), ["a.svs", "b.svs"], [0, 1], [0, 1], 2)
    assert stored.rows.tolist() == [1, 5, 0, 2]
    assert stored.bags.sizes.tolist() == [2, 2]


def test_groups_without_a_readable_window_are_named_with_store_and_reason(tmp_path: Path) -> None:
    index = make_index()
    whole = make_store(tmp_path / "a.zarr", index)
    path = make_store(tmp_path / "b.zarr", index, skip=["c.svs"], identity="other")
    with FeatureStore.create_or_resume(path, FeatureStore.open(path).facts, index) as store:
        store.mark_unreadable("c.svs", "torn")
    stores = open_comparable([whole, path])
    assert without_features(stores) == {"c.svs": f"{path} has no features of it: torn"}


def test_only_finished_stores_of_the_same_windows_and_groups_are_compared(tmp_path: Path) -> None:
    index = make_index()
    one = make_store(tmp_path / "one.zarr", index)
    two = make_store(tmp_path / "two.zarr", index, identity="other")
    assert [store.path for store in open_comparable([one, two])] == [one, two]
    moved = make_store(tmp_path / "moved.zarr", make_index(NAMES[::-1]))
    grouped = make_store(tmp_path / "grouped.zarr", index, by="group")
    begun = make_store(tmp_path / "begun.zarr", index, skip=["a.svs", "c.svs"])
    with pytest.raises(UsageError, match=rf"moved.zarr is of other windows than .*one.zarr: index .*{index.hash}"):
        open_comparable([one, moved])
    with pytest.raises(UsageError, match=r"grouped.zarr is grouped by group, and .*one.zarr by source"):
        open_comparable([one, grouped])
    with pytest.raises(UsageError, match=r"begun.zarr: 2 of 3 groups have no features yet \(a.svs, c.svs\)"):
        open_comparable([begun])
    link = tmp_path / "link.zarr"
    link.symlink_to(one)
    with pytest.raises(UsageError, match=r"link.zarr: this store is named twice"):
        open_comparable([one, link])
