"""Views and batches: the same rows of everything, joined view-major."""

from __future__ import annotations

import pickle

import pytest
import torch

from fmsuite.core.data.sample import Batch, SkippedWindow, View


def view(offset: int, valid: bool = False) -> View:
    flags = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(offset)) < 0.5
    return View(
        torch.arange(3 * 2 * 16).view(3, 2, 4, 4) + offset,
        flags if valid else None,
        torch.arange(12).view(3, 4) % (offset + 2) == 0,
        {"time": torch.arange(6.0).view(3, 2) + offset},
        torch.ones(3, 2) * offset,
        torch.arange(3) + offset,
    )


def test_rows_are_taken_from_every_tensor() -> None:
    whole = view(1, valid=True)
    for rows in (slice(1, 3), torch.tensor([1, 2])):
        part = whole[rows]
        assert len(part) == 2
        assert torch.equal(part.pixels, whole.pixels[1:])
        assert torch.equal(part.valid, whole.valid[1:])
        assert torch.equal(part.mask, whole.mask[1:])
        assert torch.equal(part.coords["time"], whole.coords["time"][1:])
        assert torch.equal(part.spacing, whole.spacing[1:])
        assert torch.equal(part.keys, whole.keys[1:])


def test_views_are_joined_one_after_the_other() -> None:
    first, second = view(0), view(5)
    joined = View.cat([first, second])
    for name in ("pixels", "mask", "spacing", "keys"):
        assert torch.equal(getattr(joined[:3], name), getattr(first, name))
        assert torch.equal(getattr(joined[3:], name), getattr(second, name))
    assert joined.valid is None
    assert torch.equal(joined.coords["time"][3:], second.coords["time"])


def test_a_view_without_validity_is_all_valid_beside_one_that_has_it() -> None:
    partly = view(1, valid=True)
    joined = View.cat([view(0), partly])
    assert joined.valid is not None
    assert joined.valid[:3].all()
    assert torch.equal(joined.valid[3:], partly.valid)


def test_bags_without_validity_are_all_valid_too() -> None:
    bag = View(torch.zeros(2, 5, 7))
    flags = torch.zeros(2, 5, dtype=torch.bool)
    joined = View.cat([bag, View(torch.zeros(2, 5, 7), flags)])
    assert joined.valid is not None
    assert joined.valid.tolist() == [[True] * 5] * 2 + [[False] * 5] * 2


def test_views_with_and_without_masks_are_not_joined() -> None:
    plain = view(0)
    plain.mask = None
    with pytest.raises(ValueError, match="cannot be joined"):
        View.cat([plain, view(1)])


def test_a_batch_maps_its_views_and_keeps_the_rest() -> None:
    skipped = [SkippedWindow("/a", "read", "damaged", 3)]
    batch = Batch({"a": [view(0), view(1)]}, torch.arange(3), torch.tensor([-1, 0, 1]), skipped)
    doubled = batch.map_views(lambda v: View(v.pixels * 2))
    assert torch.equal(doubled.views["a"][1].pixels, batch.views["a"][1].pixels * 2)
    assert doubled.skipped == skipped
    assert len(doubled) == 3
    assert len(pickle.loads(pickle.dumps(batch))) == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_pinned_batch_holds_the_same_values() -> None:
    batch = Batch({"a": [view(0, valid=True)]}, torch.arange(3), torch.tensor([-1, 0, 1]))
    pinned = batch.pin_memory()
    assert pinned.views["a"][0].pixels.is_pinned()
    assert pinned.indices.is_pinned()
    assert torch.equal(pinned.views["a"][0].pixels, batch.views["a"][0].pixels)
    assert torch.equal(pinned.views["a"][0].coords["time"], batch.views["a"][0].coords["time"])


def test_label_maps_follow_their_view() -> None:
    views = [view(0), view(1)]
    for number, each in enumerate(views):
        each.maps = {"organ": torch.full((3, 4, 4), number)}
    joined = View.cat(views)
    assert joined.maps["organ"][:, 0, 0].tolist() == [0, 0, 0, 1, 1, 1]
    assert joined[2:4].map(lambda tensor: tensor + 1).maps["organ"][:, 0, 0].tolist() == [1, 2]
