"""The view pipeline: keyed randomness, masks, ragged batches, replacement of unreadable windows."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from fmsuite.core.data.index import SampleIndex, Window
from fmsuite.core.data.pipeline import (
    MAX_REPLACEMENTS,
    Item,
    NoAugmentation,
    SampleView,
    ViewPipeline,
    WindowDataset,
    collate,
    plain_views,
)
from fmsuite.core.data.sample import ArraySample, MaskContext, Sample, SampleKey, ViewRequest
from fmsuite.core.inputs import Channel, InputSpec, Normalize
from fmsuite.core.seeding import generator
from fmsuite.core.tokens import PatchGrid
from fmsuite.errors import FmsuiteError, ReadFailure, UsageError

SPEC = InputSpec(axes=("y", "x"), size=(16, 16), channels=(Channel(name="a"), Channel(name="b")))
GRID = PatchGrid.build(SPEC, 4)
SERIES = InputSpec(axes=("time", "y", "x"), size=(4, 8, 8), channels=(Channel(name="a"), Channel(name="b", group="g")))


def half(context: MaskContext) -> np.ndarray:
    mask = np.zeros(context.valid.shape, dtype=bool)
    ids = context.generator.permutation(np.flatnonzero(context.valid))
    mask[ids[: len(ids) // 2]] = True
    return mask


class Flip(NoAugmentation):
    def after_crop(
        self, sample: ArraySample, strength: str, second: bool, generator: np.random.Generator
    ) -> ArraySample:
        if strength == "none" or generator.random() < 0.5:
            return sample
        return sample.replace(values=sample.values[..., ::-1])


@dataclass
class Record:
    """Keeps what a mask sampler was shown."""

    seen: list[MaskContext] = field(default_factory=list)

    def __call__(self, context: MaskContext) -> np.ndarray:
        self.seen.append(context)
        return np.zeros(context.valid.shape, dtype=bool)


def image(seed: int = 0, shape: tuple[int, ...] = (2, 24, 24)) -> ArraySample:
    return ArraySample(np.random.default_rng(seed).integers(0, 255, shape).astype(np.uint8))


def pipeline(*requests: ViewRequest, grid: PatchGrid | None = GRID, axes: tuple[str, ...] = ("y", "x"), seed: int = 0):
    return ViewPipeline(requests, Flip(), grid, axes, seed)


def same(a: SampleView, b: SampleView) -> bool:
    return np.array_equal(a.values, b.values) and np.array_equal(a.mask, b.mask) and a.key == b.key


CROP = ViewRequest("crop", (16, 16), count=2, scale=(0.2, 0.8), mask=half)


def test_a_view_is_a_function_of_seed_epoch_index_and_attempt() -> None:
    key = SampleKey(3, 5, step=7, slot=2, slots=8)
    first = pipeline(CROP)(image(), key)["crop"]
    again = pickle.loads(pickle.dumps(pipeline(CROP)))(image(), replace(key, step=9, slot=0, slots=64))["crop"]
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    for change in ({"epoch": 4}, {"index": 6}, {"attempt": 1}):
        other = pipeline(CROP)(image(), replace(key, **change))["crop"]
        assert not any(same(a, b) for a, b in zip(first, other, strict=True))
    assert not same(first[0], pipeline(CROP, seed=1)(image(), key)["crop"][0])
    assert not same(*first)


def test_adding_a_view_or_a_mask_changes_no_other_view() -> None:
    key = SampleKey(0, 1)
    alone = pipeline(CROP)(image(), key)["crop"]
    beside = pipeline(ViewRequest("other", (8, 8), mask=half), CROP)(image(), key)["crop"]
    unmasked = pipeline(replace(CROP, mask=None))(image(), key)["crop"]
    for a, b, c in zip(alone, beside, unmasked, strict=True):
        assert same(a, b)
        assert np.array_equal(a.values, c.values)


def test_samplers_are_told_their_number_among_the_masked_views() -> None:
    record = Record()
    requests = [
        ViewRequest("a", (16, 16), count=2, mask=record),
        ViewRequest("plain", (8, 8), count=3),
        ViewRequest("b", (8, 8), mask=record),
    ]
    key = SampleKey(0, 1, slot=3, slots=4)
    pipeline(*requests)(image(), key)
    assert [(c.view, c.views) for c in record.seen] == [(0, 3), (1, 3), (2, 3)]
    assert [c.shape for c in record.seen] == [(4, 4), (4, 4), (2, 2)]
    assert all(c.key == key and c.axes == ("y", "x") for c in record.seen)
    assert len({c.generator.random() for c in record.seen}) == 3


def test_a_mask_does_not_repeat_the_numbers_that_placed_its_crop() -> None:
    record = Record()
    pipeline(ViewRequest("a", (16, 16), mask=record), seed=4)(image(), SampleKey(2, 1))
    drawn = record.seen[0].generator.random()
    assert drawn == generator(4, "mask", 2, 1, 0, "a", 0).random()
    assert drawn != generator(4, "view", 2, 1, 0, "a", 0).random()


def test_samplers_see_token_validity_and_cropped_maps() -> None:
    record = Record()
    valid = np.ones((1, 16, 16), dtype=bool)
    valid[0, :8, :4] = False
    valid[0, 8:10, :4] = False  # Half of a patch, which is enough.
    labels = np.arange(256).reshape(16, 16)
    sample = ArraySample(np.zeros((2, 16, 16), dtype=np.uint8), valid, maps={"layer": labels})
    pipeline(ViewRequest("a", (16, 16), mask=record, augment="none"))(sample, SampleKey(0, 0))
    assert np.flatnonzero(~record.seen[0].valid).tolist() == [0, 4]
    assert (record.seen[0].maps["layer"] == labels).all()


def everything(context: MaskContext) -> np.ndarray:
    return np.ones(context.valid.shape, dtype=bool)


def counts(context: MaskContext) -> np.ndarray:
    return np.ones(context.valid.shape, dtype=int)


@pytest.mark.parametrize(("sampler", "words"), [(everything, "invalid tokens"), (counts, "not bool")])
def test_samplers_that_break_their_contract_are_caught(sampler, words: str) -> None:
    sample = ArraySample(np.zeros((2, 16, 16), dtype=np.uint8), np.zeros((1, 16, 16), dtype=bool))
    with pytest.raises(ValueError, match=words):
        pipeline(ViewRequest("a", (16, 16), mask=sampler))(sample, SampleKey(0, 0))


class Shrink(NoAugmentation):
    def after_crop(
        self, sample: ArraySample, strength: str, second: bool, generator: np.random.Generator
    ) -> ArraySample:
        return sample.replace(values=sample.values[:, 1:])


def test_an_augmentation_that_changes_the_size_is_caught() -> None:
    with pytest.raises(ValueError, match="'crop' changed its shape"):
        ViewPipeline([CROP], Shrink(), GRID, ("y", "x"), 0)(image(), SampleKey(0, 0))


@pytest.mark.parametrize("request_", [replace(CROP, size=(16,)), replace(CROP, size=(18, 16))])
def test_requests_that_fit_neither_axes_nor_patches_are_refused(request_: ViewRequest) -> None:
    with pytest.raises(UsageError):
        pipeline(request_)


@dataclass
class Drawing(Sample):
    """Drawn at whatever resolution is asked for: a ramp in its own units."""

    size: tuple[float, ...] = (10.5, 10.0)

    def crop(self, start: tuple[float, ...], extent: tuple[float, ...], size: tuple[int, ...]) -> ArraySample:
        across = start[1] + (np.arange(size[1]) + 0.5) * extent[1] / size[1]
        return ArraySample(np.broadcast_to(across.astype(np.float32), (2, *size)).copy())


def test_sources_that_draw_themselves_get_boxes_between_units() -> None:
    view = pipeline(replace(CROP, augment="none"))(Drawing(), SampleKey(0, 0))["crop"][0]
    step = np.diff(view.values[0, 0]).mean() * 16
    assert 0 < step < 10
    assert abs(step - round(step)) > 1e-3


def series(dates: int, seed: int) -> ArraySample:
    rng = np.random.default_rng(seed)
    return ArraySample(
        rng.normal(size=(2, dates, 10, 10)).astype(np.float32), coords={"time": np.sort(rng.integers(0, 9000, dates))}
    )


@pytest.mark.parametrize("patch", [(1, 4, 4), (2, 4, 4)])
def test_series_of_different_length_share_a_batch(patch: tuple[int, ...]) -> None:
    grid = PatchGrid.build(SERIES, patch)
    views = pipeline(ViewRequest("a", (4, 8, 8), mask=half), grid=grid, axes=SERIES.axes)
    samples = [series(3, 0), series(7, 1), series(7, 2)]
    single = [views(sample, SampleKey(0, i))["a"][0] for i, sample in enumerate(samples)]
    batch = collate([Item({"a": [view]}, i, -1) for i, view in enumerate(single)])
    view = batch.views["a"][0]
    longest = 8 if patch[0] == 2 else 7
    assert view.pixels.shape == (3, 2, longest, 8, 8)
    assert view.valid is not None
    assert view.valid[0, 0, :, 0, 0].tolist() == [True] * 3 + [False] * (longest - 3)
    assert view.valid[1, 0, :, 0, 0].tolist() == [True] * 7 + [False] * (longest - 7)
    assert not view.pixels[0, :, 3:].any()
    assert view.coords["time"][0, :3].tolist() == samples[0].coords["time"].tolist()
    # A sample's mask is where it was before padding, token by token, and never in the padding.
    shape = grid.shape((longest, 8, 8))
    masks = view.mask.reshape(3, *shape)
    for padded, alone in zip(masks, single, strict=True):
        times = alone.mask.shape[1]
        assert np.array_equal(padded[:, :times].numpy(), alone.mask)
        assert not padded[:, times:].any()
    assert not (view.mask & ~grid.valid_tokens(view.valid)).any()
    assert view.mask.sum(1).min() > 0
    # The network finds every date where it belongs.
    layout = grid.layout((longest, 8, 8), view.coords)
    first = layout.along("time")[0].reshape(shape)[0, :, 0, 0]
    dates = torch.from_numpy(samples[0].coords["time"]).float()
    expected = dates if patch[0] == 1 else torch.stack([dates[:2].mean(), dates[2]])
    assert torch.equal(first[: len(expected)], expected)


def bag(count: int, seed: int) -> ArraySample:
    rng = np.random.default_rng(seed)
    coords = {axis: rng.uniform(0, 100, count) for axis in ("y", "x")}
    return ArraySample(rng.normal(size=(count, 5)).astype(np.float32), coords=coords)


def test_bags_of_different_size_share_a_batch() -> None:
    record = Record()
    views = ViewPipeline([ViewRequest("a", (), mask=record)], NoAugmentation(), None, ("y", "x"), 0)
    bags = [bag(3, 0), bag(6, 1)]
    batch = collate([Item(views(sample, SampleKey(0, i)), i, i) for i, sample in enumerate(bags)])
    view = batch.views["a"][0]
    assert view.pixels.shape == (2, 6, 5)
    assert view.valid is not None
    assert view.valid.tolist() == [[True] * 3 + [False] * 3, [True] * 6]
    assert view.mask.shape == (2, 6)
    assert [context.shape for context in record.seen] == [(3,), (6,)]
    torch.testing.assert_close(view.coords["y"][0, :3], torch.from_numpy(bags[0].coords["y"]).float())
    assert view.coords["y"][0, 3:].tolist() == [0, 0, 0]
    assert torch.equal(view.pixels[0, :3], torch.from_numpy(bags[0].values))
    channels = tuple(Channel(name=str(i), mean=float(i)) for i in range(5))
    spec = InputSpec(axes=("y", "x"), size=(), channels=channels, bag=True)
    assert Normalize(spec)(view.pixels, view.valid[..., None]).shape == (2, 6, 5)


def one(values: np.ndarray, **changes: object) -> Item:
    return Item({"a": [SampleView(values, **changes)]}, 0, -1)  # type: ignore[arg-type]


def test_validity_of_some_samples_makes_the_others_all_valid() -> None:
    flags = np.zeros((2, 3, 3), dtype=bool)
    batch = collate([one(np.ones((2, 3, 3))), one(np.ones((2, 3, 3)), valid=flags)])
    assert batch.views["a"][0].valid.shape == (2, 2, 3, 3)
    assert batch.views["a"][0].valid[0].all()
    assert not batch.views["a"][0].valid[1].any()
    assert collate([one(np.ones((2, 3, 3)))]).views["a"][0].valid is None


def test_spacing_known_for_some_samples_is_nan_for_the_others() -> None:
    spacing = collate([one(np.ones((1, 3, 3))), one(np.ones((1, 3, 3)), spacing=(0.5, 2.0))]).views["a"][0].spacing
    assert torch.isnan(spacing[0]).all()
    assert spacing[1].tolist() == [0.5, 2.0]
    assert collate([one(np.ones((1, 3, 3)))]).views["a"][0].spacing is None


@pytest.mark.parametrize(
    "dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int64", "float16", "float64", ">i2", ">f4"]
)
def test_every_dtype_keeps_its_values(dtype: str) -> None:
    values = np.array([[[0, 1], [100, 127]]]).astype(dtype)
    pixels = collate([one(values), one(values)]).views["a"][0].pixels
    assert pixels.to(torch.float64).tolist() == [values.astype(float).tolist()] * 2
    assert pixels.element_size() == values.dtype.itemsize


def test_dtypes_that_differ_are_widened_without_loss() -> None:
    pixels = collate([one(np.array([[[60000]]], "uint16")), one(np.array([[[-3]]], "int16"))]).views["a"][0].pixels
    assert pixels.dtype == torch.int32
    assert pixels.flatten().tolist() == [60000, -3]


def test_samples_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match="numbers of channels"):
        collate([one(np.ones((1, 3, 3))), one(np.ones((2, 3, 3)))])
    with pytest.raises(TypeError, match="complex"):
        collate([one(np.ones((1, 3, 3), dtype=complex))])


@dataclass
class Files:
    """Reads a constant image of the window's number; some files are broken."""

    broken: set[str] = field(default_factory=set)
    bug: str = ""

    def read(self, window: Window) -> ArraySample:
        if window.source in self.broken:
            raise ReadFailure(window.source, "read", "a damaged tile.", "Copy it again.")
        if window.source == self.bug:
            raise KeyError("oops")
        return ArraySample(np.full((2, 16, 16), int(window.source[2:]), dtype=np.uint8))


def index_of(length: int) -> SampleIndex:
    rows = [
        Window(f"/s{i}", f"g{i}", (0.0, 0.0), (16.0, 16.0), label="ab"[i % 2] if i else None) for i in range(length)
    ]
    return SampleIndex.from_windows(rows)


def dataset(reader: Files, length: int = 6) -> WindowDataset:
    return WindowDataset(index_of(length), reader, pipeline(ViewRequest("a", (16, 16))), 0)


def test_items_carry_their_row_and_label() -> None:
    items = [dataset(Files())[SampleKey(0, row)] for row in range(3)]
    batch = collate(items)
    assert batch.indices.tolist() == [0, 1, 2]
    assert batch.labels.tolist() == [-1, 1, 0]
    assert batch.views["a"][0].pixels[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert batch.skipped == []


def test_an_unreadable_window_is_reported_and_replaced_by_the_same_one_every_time() -> None:
    broken = {"/s1", "/s2", "/s3"}
    items = [dataset(Files(broken))[SampleKey(epoch, 1)] for epoch in (0, 0, *range(1, 12))]
    assert same(items[0].views["a"][0], items[1].views["a"][0])
    assert items[0].index == items[1].index
    for item in items:
        assert item.index in {0, 4, 5}
        assert item.views["a"][0].values[0, 0, 0] == item.index
        assert item.label == index_of(6).label_code(item.index)
        assert (item.skipped[0].source, item.skipped[0].index) == ("/s1", 1)
        assert {s.source for s in item.skipped} <= broken
        assert item.skipped[0].reason == "a damaged tile. Copy it again."
    assert {item.index for item in items} == {0, 4, 5}
    assert collate(items[:2]).skipped == items[0].skipped + items[1].skipped


def test_a_run_of_unreadable_windows_stops_with_the_file_and_the_way_out() -> None:
    reader = Files({f"/s{i}" for i in range(6)})
    with pytest.raises(FmsuiteError, match=r"/s\d.*skipped\.csv") as caught:
        dataset(reader)[SampleKey(0, 0)]
    assert str(MAX_REPLACEMENTS + 1) in str(caught.value)


def test_a_bug_in_a_reader_passes_through_with_the_window_in_a_note() -> None:
    with pytest.raises(KeyError) as caught:
        dataset(Files(bug="/s4"))[SampleKey(0, 4)]
    assert "/s4" in caught.value.__notes__[0]


def test_plain_views_are_whole_windows_in_order() -> None:
    batches = list(plain_views(index_of(6), Files(), SPEC, [4, 0, 2, 5, 1], 8, batch_size=2))
    assert [batch.indices.tolist() for batch in batches] == [[4, 0], [2, 5], [1]]
    view = batches[0].views["image"][0]
    assert view.pixels.shape == (2, 2, 8, 8)
    assert (view.pixels[0] == 4).all()
    assert view.mask is None
    assert batches[0].labels.tolist() == [0, -1]


@pytest.mark.parametrize(
    ("broken", "indices"), [({"/s0"}, [[1, 2], [3]]), ({"/s3"}, [[0, 1], [2]]), ({"/s2", "/s3"}, [[0, 1]])]
)
def test_plain_views_leave_out_and_report_what_cannot_be_read(broken: set[str], indices: list) -> None:
    batches = list(plain_views(index_of(4), Files(broken), SPEC, range(4), 8, batch_size=2))
    assert [batch.indices.tolist() for batch in batches] == indices
    assert {skipped.source for batch in batches for skipped in batch.skipped} == broken
    assert sum(len(batch.skipped) for batch in batches) == len(broken)


def test_plain_views_of_nothing_readable_stop() -> None:
    with pytest.raises(FmsuiteError, match="None of 2 windows"):
        list(plain_views(index_of(2), Files({"/s0", "/s1"}), SPEC, [0, 1], 8))
    assert list(plain_views(index_of(2), Files(), SPEC, [], 8)) == []


class Bags:
    def read(self, window: Window) -> ArraySample:
        return bag(3 + int(window.source[2:]), 0)


def test_plain_views_of_bags_need_no_size() -> None:
    spec = InputSpec(axes=("y", "x"), size=(), channels=tuple(Channel(name=str(i)) for i in range(5)), bag=True)
    (batch,) = plain_views(index_of(3), Bags(), spec, range(3), 8)
    assert batch.views["image"][0].pixels.shape == (3, 5, 5)


def boxes(views: list[SampleView]) -> np.ndarray:
    return np.stack([view.box for view in views if view.box is not None])


def test_cells_tile_the_sample_and_random_views_are_of_their_size() -> None:
    values = np.arange(2 * 12 * 18, dtype=np.float32).reshape(2, 12, 18)
    requests = [
        ViewRequest("base", (8, 8), count=6, cells=(2, 3), tiled=True, augment="none"),
        ViewRequest("random", (6, 6), count=200, cells=(2, 3), augment="none"),
        ViewRequest("scaled", (6, 6), scale=(0.2, 0.4), augment="none"),
    ]
    pipeline = ViewPipeline(requests, NoAugmentation(), None, SPEC.axes, seed=0)
    views = pipeline(ArraySample(values), SampleKey(0, 0))
    found = boxes(views["base"])
    corners = [(row / 2, column / 3) for row in range(2) for column in range(3)]
    np.testing.assert_allclose(found[:, 0], corners, atol=1e-7)
    np.testing.assert_allclose(found[:, 1], [(1 / 2, 1 / 3)] * 6, atol=1e-7)
    starts = set()
    for view in views["random"]:
        assert view.box is not None
        top, left = np.rint(view.box[0] * (12, 18)).astype(int).tolist()
        np.testing.assert_allclose(view.box[0] * (12, 18), (top, left), atol=1e-5)
        np.testing.assert_allclose(view.box[1], (1 / 2, 1 / 3), atol=1e-7)
        assert np.array_equal(view.values, values[:, top : top + 6, left : left + 6])
        starts.add((top, left))
    assert {top for top, _ in starts} == set(range(7))
    assert {left for _, left in starts} == set(range(13))
    scaled = boxes(views["scaled"])[0]
    assert 0.15 < scaled[1].prod() < 0.45
    assert (scaled.sum(0) <= 1).all()


def test_cells_that_do_not_divide_the_sample_lie_between_its_pixels() -> None:
    values = np.broadcast_to(np.arange(16, dtype=np.float32), (2, 16, 16)).copy()
    request = ViewRequest("base", (4, 4), count=3, cells=(1, 3), tiled=True, augment="none")
    views = ViewPipeline([request], NoAugmentation(), None, SPEC.axes, seed=0)(ArraySample(values), SampleKey(0, 0))
    means = [view.values.mean() for view in views["base"]]
    # A ramp's mean over a third of the width; what is beyond its edges counts as the edge.
    np.testing.assert_allclose(means, [16 / 6 - 0.5, 7.5, 15.5 - 16 / 6], atol=0.2)
    random = replace(request, tiled=False, count=50)
    views = ViewPipeline([random], NoAugmentation(), None, SPEC.axes, seed=0)(ArraySample(values), SampleKey(0, 0))
    assert (boxes(views["base"]).sum(1) <= 1 + 1e-6).all()


def test_the_boxes_of_a_batch_follow_its_samples() -> None:
    request = ViewRequest("random", (4, 4), cells=(2, 2))
    pipeline = ViewPipeline([request], NoAugmentation(), None, SPEC.axes, seed=0)
    sample = ArraySample(np.zeros((2, 16, 16), dtype=np.float32))
    items = [Item(pipeline(sample, SampleKey(0, index)), index, -1) for index in range(3)]
    view = collate(items).views["random"][0]
    assert view.box is not None
    assert view.box.dtype == torch.float32
    expected = np.concatenate([boxes(item.views["random"]) for item in items])
    np.testing.assert_array_equal(view.box.numpy(), expected)
    assert torch.equal(view[1:].box, view.box[1:])
    assert torch.equal(view.cat([view, view]).box, torch.cat([view.box, view.box]))


@pytest.mark.parametrize(
    "change",
    [{"cells": (2,)}, {"cells": (0, 2)}, {"cells": (2, 2), "tiled": True, "count": 3}, {"tiled": True}],
)
def test_cells_that_cannot_be_are_refused(change: dict) -> None:
    request = replace(ViewRequest("image", (4, 4)), **change)
    with pytest.raises(ValueError, match="cells"):
        ViewPipeline([request], NoAugmentation(), None, SPEC.axes, seed=0)


def test_time_is_not_divided() -> None:
    with pytest.raises(ValueError, match="divides the axes"):
        ViewPipeline([ViewRequest("a", (4, 4, 4), cells=(2, 1, 1))], NoAugmentation(), None, SERIES.axes, seed=0)


def test_a_view_brings_the_label_maps_that_its_request_names() -> None:
    request = ViewRequest("crop", (8, 8), scale=(0.2, 0.8), augment="none", maps=("organ",))

    def sample(seed: int) -> ArraySample:
        values = image(seed).values
        return ArraySample(values, maps={"organ": values[0].copy(), "unasked": values[1]})

    items = []
    for seed in range(2):
        views = pipeline(request)(sample(seed), SampleKey(0, seed))
        items.append(Item(views, seed, -1))
    view = collate(items).views["crop"][0]
    assert list(view.maps) == ["organ"]
    assert view.maps["organ"].shape == (2, 8, 8)
    assert view[1:].maps["organ"].shape == (1, 8, 8)
    for row, item in enumerate(items):
        cut = sample(row).crop(*_box(request, sample(row), SampleKey(0, row)), (8, 8))
        assert np.array_equal(view.maps["organ"][row].numpy(), cut.maps["organ"])
        assert np.array_equal(item.views["crop"][0].values, cut.values)


def _box(request: ViewRequest, sample: ArraySample, key: SampleKey):
    from fmsuite.core.data.crop import random_box

    draw = generator(0, "view", key.epoch, key.index, key.attempt, request.name, 0)
    return random_box(sample.size, request.scale, request.ratio, (0, 1), draw)


def test_label_maps_of_shorter_series_are_padded_and_marked() -> None:
    def item(length: int) -> Item:
        values = np.ones((2, length, 8, 8), dtype=np.uint8)
        sample = ArraySample(values, maps={"water": np.full(values.shape[1:], 3, dtype=np.int16)})
        request = ViewRequest("crop", (0, 8, 8), augment="none", maps=("water",))
        return Item(ViewPipeline([request], NoAugmentation(), None, SERIES.axes, 0)(sample, SampleKey(0, 0)), 0, -1)

    view = collate([item(2), item(4)]).views["crop"][0]
    assert view.maps["water"].dtype == torch.int16
    assert view.valid is not None
    assert torch.equal(view.maps["water"] == 3, view.valid[:, 0])


@pytest.mark.parametrize(
    ("maps", "words"),
    [
        ({}, "asks for the label map 'organ', and the reader gave: none"),
        ({"organ": np.zeros((24, 24))}, "is float64, not integers"),
    ],
)
def test_label_maps_that_are_missing_or_no_labels_are_caught(maps: dict, words: str) -> None:
    request = ViewRequest("crop", (24, 24), augment="none", maps=("organ",))
    with pytest.raises(ValueError, match=words):
        pipeline(request)(replace(image(), maps=maps), SampleKey(0, 0))
