"""Window grids and mask shares against brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fmsuite.tiling.grid import box_shares, integral_image, window_grid, window_starts

lengths = st.integers(1, 60)
sizes = st.integers(1, 25)
edges = st.sampled_from(["inside", "cover", "shift"])


@given(lengths, sizes, sizes)
def test_inside_gives_every_window_of_the_raster_that_fits(length: int, size: int, stride: int) -> None:
    expected = [start for start in range(0, length, stride) if start + size <= length]
    assert window_starts(length, size, stride, "inside").tolist() == expected


@given(lengths, sizes, st.data(), st.sampled_from(["cover", "shift"]))
def test_cover_and_shift_leave_no_point_uncovered_and_have_no_spare_window(
    length: int, size: int, data: st.DataObject, edge: str
) -> None:
    stride = data.draw(st.integers(1, size))
    starts = window_starts(length, size, stride, edge)
    covered = np.zeros(length, bool)
    for start in starts.astype(int):
        assert start >= 0
        covered[start : start + size] = True
    assert covered.all()
    assert len(starts) == 1 or starts[-2] + size < length
    if edge == "shift" and length >= size:
        assert starts[-1] == length - size
    if edge == "cover":
        assert np.array_equal(starts, np.arange(len(starts)) * stride)


def test_a_division_that_is_a_hair_short_does_not_lose_the_last_window() -> None:
    size = 256 * 0.5 / 0.25 * (1 + 1e-12)
    assert len(window_starts(4 * 512, size)) == 4


def test_a_short_axis_has_one_window_that_reaches_beyond_it_unless_windows_stay_inside() -> None:
    assert window_starts(5, 8, edges="inside").tolist() == []
    assert window_starts(5, 8, edges="cover").tolist() == [0]
    assert window_starts(5, 8, edges="shift").tolist() == [0]
    assert window_starts(0, 8, edges="cover").tolist() == []


def test_grid_is_row_major_and_begins_at_the_origin() -> None:
    grid = window_grid((4, 6), (2, 3), origin=(10, 20))
    assert grid.tolist() == [[10, 20], [10, 23], [12, 20], [12, 23]]


def test_grid_has_as_many_axes_as_the_box() -> None:
    assert window_grid((4, 4, 4), (2, 2, 2), (1, 2, 2)).shape == (3 * 2 * 2, 3)
    with pytest.raises(ValueError, match="zip"):
        window_grid((4, 4), (2,))
    with pytest.raises(ValueError, match="not possible"):
        window_grid((4,), (0,))


@given(arrays(np.int8, (5, 7), elements=st.integers(0, 1)))
def test_integral_image_holds_every_prefix_sum(mask: np.ndarray) -> None:
    table = integral_image(mask)
    for i in range(6):
        for j in range(8):
            assert table[i, j] == mask[:i, :j].sum()


@settings(max_examples=60)
@given(
    st.integers(1, 3).flatmap(
        lambda axes: st.tuples(
            arrays(np.bool_, st.tuples(*[st.integers(1, 6)] * axes)),
            st.lists(st.tuples(*[st.integers(-8, 32)] * axes), min_size=1, max_size=4),
            st.tuples(*[st.integers(1, 30)] * axes),
        )
    )
)
def test_shares_of_boxes_equal_counting_on_a_four_times_finer_mask(
    case: tuple[np.ndarray, list[tuple[int, ...]], tuple[int, ...]],
) -> None:
    mask, corners, size = case
    fine = mask
    for axis in range(mask.ndim):
        fine = fine.repeat(4, axis=axis)
    shares = box_shares(mask, np.asarray(corners) / 4, np.asarray(size) / 4)
    for corner, share in zip(corners, shares, strict=True):
        box = tuple(slice(max(c, 0), max(c + s, 0)) for c, s in zip(corner, size, strict=True))
        assert share == pytest.approx(fine[box].sum() / np.prod(size), abs=1e-9)


def test_boxes_that_do_not_match_the_mask_are_refused() -> None:
    with pytest.raises(ValueError, match="do not match"):
        box_shares(np.ones((3, 3)), np.zeros((2, 3)), (1, 1, 1))
    with pytest.raises(ValueError, match="no volume"):
        box_shares(np.ones((3, 3)), np.zeros((2, 2)), (1, 0))
