"""Windows drawn anew lie on the grid, inside their source, every place as likely, by their key alone."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fmsuite.core.data.index import SampleIndex, Window
from fmsuite.core.data.pipeline import NoAugmentation, ViewPipeline, WindowDataset
from fmsuite.core.data.sample import ArraySample, SampleKey, ViewRequest
from fmsuite.core.data.sampling import BalancedWindows, RandomWindows, bounds_of, require_anywhere
from fmsuite.errors import ReadFailure, UsageError


def index_of(boxes: dict[str, list[tuple[float, ...]]], extent: tuple[float, ...]) -> SampleIndex:
    return SampleIndex.from_windows(
        [Window(source, "g", position, extent) for source, positions in boxes.items() for position in positions]
    )


lengths = st.integers(1, 9)
axes = st.integers(1, 3)


@st.composite
def volumes(draw: st.DrawFn) -> tuple[SampleIndex, tuple[int, ...], np.ndarray, np.ndarray, np.ndarray]:
    """An index of one source on an uneven grid: (index, size, low, step, places)."""
    count = draw(axes)
    size = tuple(draw(st.lists(lengths, min_size=count, max_size=count)))
    step = np.array(draw(st.lists(st.floats(0.01, 90), min_size=count, max_size=count)))
    low = np.array(draw(st.lists(st.floats(-500, 500), min_size=count, max_size=count)))
    places = np.array(draw(st.lists(st.integers(1, 6), min_size=count, max_size=count)))
    corners = [low, low + step * (places - 1)]
    extent = tuple((step * size).tolist())
    return index_of({"/s": [tuple(corner.tolist()) for corner in corners]}, extent), size, low, step, places


@settings(max_examples=60, deadline=None)
@given(made=volumes(), seed=st.integers(0, 2**32), share=st.floats(0, 1))
def test_windows_stay_inside_their_source_and_begin_on_its_grid(made, seed: int, share: float) -> None:
    index, size, low, step, places = made
    stream = np.random.default_rng(seed)
    points = {"/s": {1: low + stream.random((4, len(size))) * step * (places - 1 + size)}}
    for sampler in (RandomWindows(index, size), BalancedWindows(index, size, points, share)):
        for _ in range(5):
            drawn = sampler(index[0], 0, stream)
            start = (np.array(drawn.position) - low) / step
            np.testing.assert_allclose(start, np.round(start), atol=1e-6)
            assert ((np.round(start) >= 0) & (np.round(start) < places)).all()
            assert (drawn.source, drawn.extent, drawn.group) == ("/s", index[0].extent, "g")
            assert np.isnan(drawn.content)


def test_every_place_is_as_likely() -> None:
    index = index_of({"/s": [(0.5, -3.0), (2.5, 6.0)], "/t": [(9.0, 9.0)]}, (4.0, 6.0))
    sampler, stream = RandomWindows(index, (4, 2)), np.random.default_rng(0)
    drawn = [sampler(index[1], 1, stream).position for _ in range(4000)]
    places, counts = np.unique(drawn, axis=0, return_counts=True)
    assert places.tolist() == [[y, x] for y in (0.5, 1.5, 2.5) for x in (-3.0, 0.0, 3.0, 6.0)]
    assert stats.chisquare(counts).pvalue > 1e-3
    assert sampler(index[2], 2, stream).position == (9.0, 9.0)


def test_the_box_of_a_source_is_that_of_all_of_its_windows_whatever_their_extent() -> None:
    rows = [
        Window("/a", "g", (3.0, 1.0), (2.0, 2.0)),
        Window("/b", "g", (0.0, 0.0), (1.0, 1.0)),
        Window("/a", "g", (1.0, 4.0), (9.0, 3.0)),
    ]
    found = bounds_of(SampleIndex.from_windows(rows))
    assert found["/a"].low.tolist() == [1, 1]
    assert found["/a"].high.tolist() == [10, 7]
    assert found["/b"].high.tolist() == [1, 1]
    assert bounds_of(SampleIndex.from_windows([])) == {}


def test_labelled_points_are_centred_and_classes_are_drawn_evenly() -> None:
    """On points that are far from each other and from the borders: a window shows one class, or none."""
    index = index_of({"/s": [(0.0,), (9900.0,)]}, (100.0,))
    points = {"/s": {7: np.array([[2000.5]]), 2: np.linspace(8000, 8009, 40)[:, None], 5: np.empty((0, 1))}}
    sampler, stream = BalancedWindows(index, (10,), points, 0.4), np.random.default_rng(1)
    position = np.array([sampler(index[0], 0, stream).position[0] for _ in range(8000)])
    rare, common = position == 1950, (position >= 7950) & (position <= 7960)
    # Of 991 places on a grid of 10, 1 and 2 are drawn by chance as well.
    for shown, chance in ((rare, 0.2 + 0.6 / 991), (common, 0.2 + 0.6 * 2 / 991)):
        assert stats.binomtest(int(shown.sum()), len(position), chance).pvalue > 1e-3


def test_a_point_near_a_border_is_shown_by_the_last_window() -> None:
    index = index_of({"/s": [(0.0, 0.0), (8.0, 8.0)], "/empty": [(0.0, 0.0), (8.0, 8.0)]}, (8.0, 8.0))
    stream = np.random.default_rng(0)
    for point, expected in (((0.5, 15.5), (0, 8)), ((8.5, 3.5), (4, 0)), ((99.0, -99.0), (8, 0))):
        sampler = BalancedWindows(index, (8, 8), {"/s": {1: np.array([point])}}, 1.0)
        assert sampler(index[0], 0, stream).position == expected
    places = {sampler(index[2], 2, stream).position for _ in range(400)}
    assert len(places) > 70


def test_windows_of_one_group_stay_in_its_box() -> None:
    """Of two blocks of one source, nothing that is drawn for one shows the other."""
    rows = [
        Window("/s", group, (float(y), float(x)), (8.0, 8.0)) for group, y in (("a", 0), ("b", 40)) for x in (0, 30)
    ]
    rows.append(Window("/s", "a", (12.0, 5.0), (8.0, 8.0)))
    index, stream = SampleIndex.from_windows(rows), np.random.default_rng(0)
    points = {"/s": {1: np.array([[44.5, 20.5]]), 2: np.array([[4.5, 20.5], [47.5, 3.5]])}}
    for sampler in (RandomWindows(index, (8, 8)), BalancedWindows(index, (8, 8), points, 0.5)):
        for row, (low, high) in ((0, (0, 12)), (2, (40, 40)), (4, (0, 12))):
            tops = {sampler(index[row], row, stream).position[0] for _ in range(200)}
            assert low <= min(tops) <= max(tops) <= high
    shown = [sampler(index[0], 0, stream).position for _ in range(100)]
    assert shown.count((0, 16)) > 30


def test_bad_arguments_are_refused() -> None:
    index = index_of({"/s": [(0.0, 0.0)]}, (8.0, 8.0))
    with pytest.raises(UsageError, match="2 axes"):
        RandomWindows(index, (8, 8, 8))
    with pytest.raises(UsageError, match=r"1\.5"):
        BalancedWindows(index, (8, 8), {}, 1.5)
    with pytest.raises(ValueError, match=r"\(1, 3\)"):
        BalancedWindows(index, (8, 8), {"/s": {1: np.zeros((1, 3))}})
    with pytest.raises(ValueError, match="/other"):
        RandomWindows(index, (8, 8))(Window("/other", "g", (0.0, 0.0), (8.0, 8.0)), 0, np.random.default_rng(0))
    mixed = SampleIndex.from_windows([Window("/s", "g", (0.0,) * d, (1.0,) * d) for d in (2, 3)])
    with pytest.raises(UsageError, match="different numbers of axes"):
        bounds_of(mixed)


class Reader:
    """Writes a window's position into its pixels; cannot read what lies beyond ``broken``."""

    anywhere = True

    def __init__(self, broken: float = np.inf) -> None:
        self.broken = broken

    def read(self, window: Window) -> ArraySample:
        if window.position[0] >= self.broken:
            raise ReadFailure(window.source, "read", "damaged.")
        return ArraySample(np.full((2, 4, 4), np.array(window.position)[:, None, None]))


def test_a_dataset_draws_by_its_key_alone() -> None:
    index = index_of({f"/{n}": [(0.0, 0.0), (50.0, 50.0)] for n in range(3)}, (4.0, 4.0))
    pipeline = ViewPipeline([ViewRequest("a", (4, 4), augment="none")], NoAugmentation(), None, ("y", "x"), 5)

    def drawn(dataset: WindowDataset, key: SampleKey) -> tuple[float, ...]:
        return tuple(dataset[key].views["a"][0].values[:, 0, 0].tolist())

    made = WindowDataset(index, Reader(), pipeline, 5, sampler=RandomWindows(index, (4, 4)))
    again = pickle.loads(pickle.dumps(made))
    keys = [SampleKey(epoch, row) for epoch in range(4) for row in range(6)]
    places = [drawn(made, key) for key in keys]
    assert [drawn(again, SampleKey(key.epoch, key.index, 9, 3, 8)) for key in reversed(keys)] == places[::-1]
    assert len(set(places)) > 20
    other = WindowDataset(index, Reader(), pipeline, 6, sampler=RandomWindows(index, (4, 4)))
    assert [drawn(other, key) for key in keys] != places
    broken = WindowDataset(index, Reader(broken=25), pipeline, 5, sampler=RandomWindows(index, (4, 4)))
    for key, place in zip(keys, places, strict=True):
        assert bool(broken[key].skipped) == (place[0] >= 25)
        assert drawn(broken, key)[0] < 25


def test_a_reader_of_the_windows_of_an_index_only_is_refused() -> None:
    class Fixed:
        def read(self, window: Window) -> ArraySample:
            return ArraySample(np.zeros((1, 4, 4)))

    require_anywhere(Reader())
    with pytest.raises(UsageError, match=r"Fixed reads those of the index only .*training\.windows=random"):
        require_anywhere(Fixed())
