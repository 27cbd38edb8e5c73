"""Supports are a function of seed and step: whoever loads them, wherever a run starts, whatever cannot be read."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from fmsuite.core.data.index import SampleIndex, Window
from fmsuite.core.data.loader import SampleStream, make_loader
from fmsuite.core.data.pipeline import NoAugmentation, ViewPipeline, WindowDataset
from fmsuite.core.data.sample import ArraySample, Batch, SupportRequest, ViewRequest
from fmsuite.core.data.supports import Supports
from fmsuite.core.training.loop import split_batch
from fmsuite.errors import FmsuiteError, ReadFailure, UsageError

LABELS = [None, "a", "b", None, "c", "a", "b", "c", "a", "b", None, "d", "a", "c"]
"""Four windows of class a, three of b and c, one of d, three without a label."""
UNREADABLE = 5


class Reader:
    def __init__(self, broken: tuple[int, ...] = ()) -> None:
        self.broken = broken

    def read(self, window: Window) -> ArraySample:
        number = int(window.source[2:])
        if number in self.broken:
            raise ReadFailure(window.source, "read", "damaged")
        return ArraySample(np.random.default_rng(number).normal(size=(1, 12, 12)).astype(np.float32))


INDEX = SampleIndex.from_windows(
    Window(f"/s{number}", "g", (0.0, 0.0), (12.0, 12.0), label=label) for number, label in enumerate(LABELS)
)
CODES = INDEX.label_codes


def supports(rank: int = 0, ranks: int = 1, broken: tuple[int, ...] = (), **changes) -> Supports:
    views = (ViewRequest("support", (8, 8), scale=(0.2, 0.9)),)
    request = SupportRequest(**{"classes": 2, "per_class": 3, "views": views, **changes})
    pipeline = ViewPipeline(request.views, NoAugmentation(), None, ("y", "x"), 7)
    return Supports(INDEX, Reader(broken), pipeline, request, 7, rank, ranks)


def load(start: int = 0, stop: int = 6, workers: int = 0, rank: int = 0, ranks: int = 1, **others) -> list[Batch]:
    pipeline = ViewPipeline([ViewRequest("image", (8, 8))], NoAugmentation(), None, ("y", "x"), 5)
    dataset = WindowDataset(INDEX, Reader(), pipeline, 5)
    stream = SampleStream(len(INDEX), 6, 5, rank, ranks)
    return list(make_loader(dataset, stream, start, stop, workers, supports(rank, ranks, **others)))


def same(first: Batch, second: Batch) -> bool:
    views = zip(first.views["support"], second.views["support"], strict=True)
    return (
        torch.equal(first.indices, second.indices)
        and torch.equal(first.labels, second.labels)
        and all(torch.equal(a.pixels, b.pixels) for a, b in views)
    )


def test_codes_of_all_rows_are_those_of_each_row() -> None:
    assert CODES.tolist() == [INDEX.label_code(row) for row in range(len(INDEX))]
    part = INDEX.select([4, 0, 11])
    assert part.label_codes.tolist() == [0, -1, 1]
    assert INDEX.select([0, 3]).label_codes.tolist() == [-1, -1]
    assert INDEX.select([]).label_codes.shape == (0,)


def test_a_step_has_whole_classes_of_different_labelled_windows() -> None:
    source, classes = supports(), set()
    for step in range(30):
        batch = source.batch(step)
        rows = batch.indices.tolist()
        assert len(set(rows)) == 6
        assert batch.labels.tolist() == [CODES[row] for row in rows]
        assert set(Counter(batch.labels.tolist()).values()) == {3}
        classes |= set(batch.labels.tolist())
    assert classes == {0, 1, 2}  # class d has one window only


def test_every_window_of_a_class_has_its_turn_and_views_change_from_step_to_step() -> None:
    source = supports()
    batches = [source.batch(step) for step in range(40)]
    drawn = {row for batch in batches for row in batch.indices.tolist()}
    assert drawn == set(np.flatnonzero((CODES >= 0) & (CODES < 3)).tolist())
    pixels = [b.views["support"][0].pixels[i] for b in batches for i in range(6) if b.indices[i] == 1]
    assert not any(torch.equal(pixels[0], other) for other in pixels[1:])


def test_they_depend_on_seed_and_step_alone() -> None:
    whole = load()
    for batches, first in ((load(workers=2), 0), (load(start=4), 4)):
        for step, batch in enumerate(batches, start=first):
            assert same(batch.support, whole[step].support)
            assert torch.equal(batch.indices, whole[step].indices)
    assert same(supports().batch(3), whole[3].support)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_one_set(ranks: int) -> None:
    whole = [batch.support for batch in load()]
    shares = [[batch.support for batch in load(rank=rank, ranks=ranks)] for rank in range(ranks)]
    for step, batch in enumerate(whole):
        assert torch.equal(torch.cat([share[step].indices for share in shares]), batch.indices)
        assert torch.equal(torch.cat([share[step].labels for share in shares]), batch.labels)
        pixels = torch.cat([share[step].views["support"][0].pixels for share in shares])
        assert torch.equal(pixels, batch.views["support"][0].pixels)


def test_an_uneven_share_is_filled_up_with_rows_that_do_not_count() -> None:
    whole = supports().batch(2)
    parts = [supports(rank, 4).batch(2) for rank in range(4)]
    assert [len(part) for part in parts] == [2, 2, 2, 2]
    labels = torch.cat([part.labels for part in parts])
    assert labels.tolist() == [*whole.labels.tolist(), -1, -1]
    assert torch.cat([part.indices for part in parts])[:6].tolist() == whole.indices.tolist()


def test_an_unreadable_support_is_replaced_by_another_of_its_class_and_reported() -> None:
    clean, batches = load(), load(broken=(UNREADABLE,))
    replaced = 0
    for before, after in zip(clean, batches, strict=True):
        assert after.support.labels.tolist() == before.support.labels.tolist()
        assert UNREADABLE not in after.support.indices
        assert [CODES[row] for row in after.support.indices.tolist()] == after.support.labels.tolist()
        hit = UNREADABLE in before.support.indices
        assert bool(after.skipped) == hit
        assert not after.support.skipped
        replaced += hit
    assert replaced
    assert [b.skipped for b in load(broken=(UNREADABLE,), workers=1)] == [b.skipped for b in batches]
    with pytest.raises(FmsuiteError, match="windows in a row"):
        load(broken=tuple(range(len(LABELS))))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"classes": 4}, "needs 4 classes with at least 3 labelled windows each, and 3 of the 4 labelled classes"),
        ({"per_class": 4}, r"1 of the 4 labelled classes have that many \(11 of the 14 windows to train on"),
    ],
)
def test_too_few_are_refused_with_how_many_there_are(changes: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        supports(**changes)


def test_micro_batches_see_all_supports_and_every_tensor_is_mapped() -> None:
    batch = load(stop=1)[0]
    parts = split_batch(batch, 3)
    assert [len(part) for part in parts] == [2, 2, 2]
    assert all(same(part.support, batch.support) for part in parts)
    seen = []
    mapped = batch.map(lambda tensor: seen.append(tensor) or tensor + 1)
    keys = [view.keys for group in (batch, batch.support) for views in group.views.values() for view in views]
    # Of each view pixels, keys and box; of each batch indices and labels.
    assert len(seen) == 3 * len(keys) + 4
    assert torch.equal(mapped.support.labels, batch.support.labels + 1)
    assert torch.equal(mapped.support.views["support"][0].keys, batch.support.views["support"][0].keys + 1)
    doubled = batch.map_views(lambda view: view.map(lambda tensor: 2 * tensor))
    assert torch.equal(doubled.support.views["support"][0].pixels, 2 * batch.support.views["support"][0].pixels)
    assert torch.equal(doubled.support.labels, batch.support.labels)
