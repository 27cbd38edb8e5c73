"""Crops against PIL, torch, closed forms and a dense filter written out; nodata never bleeds."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fmsuite.core.data.crop import random_box
from fmsuite.core.data.sample import ArraySample

DTYPES = ["uint8", "int16", "uint16", "int32", "float16", "float32", "float64", "bool"]


def noise(shape: tuple[int, ...], dtype: str = "float32", seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, 200 if dtype != "bool" else 2, shape).astype(dtype)


def pil(values: np.ndarray, box: tuple[float, float, float, float], size: tuple[int, int]) -> np.ndarray:
    """PIL's antialiased bilinear resize of (H, W) values; ``box`` is (top, left, height, width) and the filter sees
    nothing outside the pixels that it touches."""
    top, left, height, width = box
    y, x = math.floor(top), math.floor(left)
    touched = values[y : math.ceil(top + height), x : math.ceil(left + width)]
    inner = (left - x, top - y, left - x + width, top - y + height)
    return np.asarray(Image.fromarray(touched).resize(size[::-1], Image.Resampling.BILINEAR, box=inner))


def eighths(low: int, high: int) -> st.SearchStrategy[float]:
    """Fractions that floating point holds exactly: which samples a box touches is then beyond doubt."""
    return st.integers(8 * low, 8 * high).map(lambda n: n / 8)


boxes = st.tuples(eighths(0, 20), eighths(0, 20), eighths(4, 40), eighths(4, 40))


@settings(deadline=None, max_examples=60)
@given(box=boxes, size=st.tuples(st.integers(1, 50), st.integers(1, 50)), seed=st.integers(0, 99))
def test_fractional_boxes_agree_with_pil(box: tuple, size: tuple, seed: int) -> None:
    values = noise((2, 60, 61), seed=seed)
    got = ArraySample(values).crop(box[:2], box[2:], size).values
    # PIL computes in float32 from float64 weights: 1e-5 of the range of 200.
    for channel, expected in zip(got, values, strict=True):
        np.testing.assert_allclose(channel, pil(expected, box, size), atol=3e-3)


@settings(deadline=None, max_examples=40)
@given(
    box=st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(1, 40), st.integers(1, 40)),
    size=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    channels=st.sampled_from([1, 3, 4, 10]),
)
def test_eight_bit_boxes_agree_with_pil_within_one_level(box: tuple, size: tuple, channels: int) -> None:
    values = noise((channels, 60, 61), "uint8")
    got = ArraySample(values).crop(box[:2], box[2:], size).values
    assert got.dtype == np.uint8
    for channel, expected in zip(got.astype(int), values, strict=True):
        assert np.abs(channel - pil(expected, box, size)).max() <= 1


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_planes_one_sample_wide_agree_with_pil(dtype: str, channels: int) -> None:
    for height, width, new_height, new_width in itertools.product((1, 4), (1, 5), (1, 2, 6), (1, 3, 7)):
        values = noise((channels, height, width), dtype)
        got = ArraySample(values).crop((0, 0), (height, width), (new_height, new_width)).values
        for channel, expected in zip(got.astype(float), values, strict=True):
            reference = pil(expected, (0, 0, height, width), (new_height, new_width))
            assert np.abs(channel - reference).max() <= (1 if dtype == "uint8" else 1e-3)


def dense(length: int, start: float, extent: float, size: int) -> np.ndarray:
    """The filter, sample by sample."""
    scale = extent / size
    low, high = math.floor(start), math.ceil(start + extent)
    matrix = np.zeros((size, length))
    for out in range(size):
        centre = start + (out + 0.5) * scale
        for sample in range(low, high):
            matrix[out, sample] = max(0.0, 1 - abs(sample + 0.5 - centre) / max(scale, 1.0))
    return matrix / matrix.sum(1, keepdims=True)


@settings(deadline=None, max_examples=25)
@given(
    start=st.tuples(*[eighths(0, 3)] * 3),
    extent=st.tuples(*[eighths(2, 8)] * 3),
    size=st.tuples(*[st.integers(1, 12)] * 3),
    whole=st.booleans(),
)
def test_volumes_agree_with_the_filter_written_out(start: tuple, extent: tuple, size: tuple, whole: bool) -> None:
    if whole:  # Takes torch's kernel in the plane.
        start, extent = tuple(float(int(s)) for s in start), tuple(float(int(e)) for e in extent)
    values = noise((2, 11, 12, 13), "float64")
    matrices = [dense(n, s, e, m) for n, s, e, m in zip(values.shape[1:], start, extent, size, strict=True)]
    expected = np.einsum("czyx,iz,jy,kx->cijk", values, *matrices)
    np.testing.assert_allclose(ArraySample(values).crop(start, extent, size).values, expected, atol=1e-4)


def test_volumes_agree_with_torch_in_the_plane_and_along_depth() -> None:
    values = noise((1, 12, 20, 20))
    got = ArraySample(values).crop((2, 3, 4), (8, 14, 12), (4, 7, 9)).values
    box = torch.from_numpy(values[:, 2:10, 3:17, 4:16])
    plane = torch.nn.functional.interpolate(box.transpose(0, 1), (7, 9), mode="bilinear", antialias=True)
    depth = plane.transpose(0, 1).reshape(1, 1, 8, 63)
    expected = torch.nn.functional.interpolate(depth, (4, 63), mode="bilinear", antialias=True).reshape(1, 4, 7, 9)
    np.testing.assert_allclose(got, expected.numpy(), atol=1e-3)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_linear_ramps_are_reproduced_away_from_the_borders(dims: int) -> None:
    shape, extent, size = (40,) * dims, 30.0, 20
    grid = np.indices(shape).astype(np.float64) + 0.5
    slopes = np.array([1.0, -2.0, 0.5])[:dims]
    ramp = np.tensordot(slopes, grid, 1)[None]
    got = ArraySample(ramp).crop((3.25,) * dims, (extent,) * dims, (size,) * dims).values[0]
    centres = 3.25 + (np.indices((size,) * dims) + 0.5) * (extent / size)
    inner = (slice(2, -2),) * dims
    # The sampled triangle is a partition of unity with a first moment that is exact only for whole reductions, so a
    # fractional reduction may be off by a fraction of a sample.
    np.testing.assert_allclose(got[inner], np.tensordot(slopes, centres, 1)[inner], atol=0.15)
    whole = ArraySample(ramp).crop((4,) * dims, (32,) * dims, (16,) * dims).values[0]
    centres = 4 + (np.indices((16,) * dims) + 0.5) * 2
    np.testing.assert_allclose(whole[inner], np.tensordot(slopes, centres, 1)[inner], atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_boxes_on_whole_samples_are_copied_exactly(dtype: str, dims: int) -> None:
    values = noise((2, 9, 10, 11)[: dims + 1], dtype)
    valid = noise((1, *values.shape[1:])) < 100
    labels = np.arange(math.prod(values.shape[1:])).reshape(values.shape[1:])
    sample = ArraySample(values, valid, spacing=(0.5,) * dims, maps={"layer": labels})
    inner = (slice(2, 7),) * dims
    got = sample.crop((2.0,) * dims, (5.0,) * dims, (5,) * dims)
    assert got.values.dtype == values.dtype
    assert (got.values == values[(slice(None), *inner)]).all()
    assert (got.valid == valid[(slice(None), *inner)]).all()
    assert (got.maps["layer"] == labels[inner]).all()
    assert got.spacing == (0.5,) * dims


def test_an_exact_copy_does_not_alias_the_source() -> None:
    values = noise((1, 6, 6))
    got = ArraySample(values).crop((0, 0), (6, 3), (6, 3))
    got.values[:] = -1
    assert (values >= 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 13, 17), (1, 7, 13, 17)])
def test_dtypes_are_kept_and_integers_rounded(dtype: str, shape: tuple[int, ...]) -> None:
    values = noise(shape, dtype)
    size = tuple(n - 2 for n in shape[1:])
    args = ((0.0,) * len(size), shape[1:], size)
    got = ArraySample(values).crop(*args).values
    exact = ArraySample(values.astype(np.float64)).crop(*args).values
    assert got.dtype == values.dtype
    if dtype == "bool":
        clear = np.abs(exact - 0.5) > 1e-6
        assert (got == (exact > 0.5))[clear].all()
    else:
        tolerance = {"float16": 0.1, "float32": 1e-3, "float64": 1e-9}.get(dtype, 0.501)
        assert np.abs(got.astype(np.float64) - exact).max() <= (1.001 if dtype == "uint8" else tolerance)


@pytest.mark.parametrize("dtype", ["int16", "uint16", "int32", "int64", "uint8"])
def test_the_largest_and_smallest_integers_do_not_wrap(dtype: str) -> None:
    limits = np.iinfo(dtype)
    for value in (limits.min, limits.max):
        got = ArraySample(np.full((1, 9, 9), value, dtype=dtype)).crop((0, 0), (9, 9), (6, 14)).values
        assert np.abs(got.astype(np.float64) - float(value)).max() <= max(1.0, abs(float(value)) * 1e-9)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    box=st.tuples(eighths(0, 5), eighths(0, 5), eighths(3, 14), eighths(3, 14)),
    size=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    bad=st.sampled_from([float("nan"), float("inf"), -9999.0, 1e30]),
    per_channel=st.booleans(),
)
def test_nodata_never_bleeds(seed: int, box: tuple, size: tuple, bad: float, per_channel: bool) -> None:
    rng = np.random.default_rng(seed)
    clean = rng.uniform(10, 20, (2, 20, 20)).astype(np.float32)
    valid = rng.random((2 if per_channel else 1, 20, 20)) < 0.9
    spoilt = np.where(valid, clean, np.float32(bad))
    got = ArraySample(spoilt, valid).crop(box[:2], box[2:], size)
    assert got.valid is not None
    assert got.valid.shape == (len(valid), *size)
    assert np.isfinite(got.values).all()
    reference = ArraySample(clean).crop(box[:2], box[2:], size).values
    kept = np.broadcast_to(got.valid, got.values.shape)
    np.testing.assert_allclose(got.values[kept], reference[kept], rtol=1e-5)
    # Validity, by brute force: no invalid sample has any weight.
    rows, columns = dense(20, box[0], box[2], size[0]), dense(20, box[1], box[3], size[1])
    weight = np.einsum("cyx,iy,jx->cij", (~valid).astype(float), rows, columns)
    clear = (weight == 0) | (weight > 1e-6)
    assert (got.valid == (weight == 0))[clear].all()


@pytest.mark.parametrize(("length", "size"), [(11, 21), (33, 63), (1500, 900), (2200, 4200)])
def test_rounding_does_not_take_nodata_beside_an_output_for_mixed_in(length: int, size: int) -> None:
    # Outputs whose centres fall on a sample's take nothing of its neighbours, exactly; binary fractions cannot say so.
    valid = np.ones((1, 3, length), dtype=bool)
    valid[..., 6::7] = False
    got = ArraySample(noise((1, 3, length)), valid).crop((0, 0), (3, length), (2, size)).valid
    assert got is not None
    scale, half = Fraction(length, size), max(Fraction(length, size), Fraction(1))
    for out in range(size):
        centre = (out + Fraction(1, 2)) * scale
        near = range(max(0, math.floor(centre - half) - 1), min(length, math.ceil(centre + half) + 1))
        touched = [sample for sample in near if abs(sample + Fraction(1, 2) - centre) < half]
        assert (got[0, :, out] == all(sample % 7 != 6 for sample in touched)).all(), out


def test_eight_bit_nodata_never_bleeds_either() -> None:
    clean = noise((3, 40, 40), "uint8") // 4
    valid = np.ones((1, 40, 40), dtype=bool)
    valid[:, 10:14, 20:30] = False
    got = ArraySample(np.where(valid, clean, np.uint8(255)), valid).crop((0, 0), (40, 40), (25, 25))
    reference = ArraySample(clean).crop((0, 0), (40, 40), (25, 25)).values
    kept = np.broadcast_to(got.valid, got.values.shape)
    assert (got.values[kept] == reference[kept]).all()
    assert 0 < (~got.valid).sum() < 120
    assert got.values.max() <= 50


def test_all_valid_stays_all_valid() -> None:
    got = ArraySample(noise((2, 20, 20)), np.ones((1, 20, 20), dtype=bool)).crop((0.5, 0.5), (10, 10), (7, 7))
    assert got.valid is not None
    assert got.valid.shape == (1, 7, 7)
    assert got.valid.all()


def test_label_maps_keep_their_labels_and_follow_the_box() -> None:
    labels = np.repeat(np.repeat(np.array([[3, 7], [11, 200]], dtype=np.uint16), 8, 0), 8, 1)
    got = ArraySample(noise((1, 16, 16)), maps={"organ": labels}).crop((4, 4), (8, 8), (4, 6)).maps["organ"]
    assert got.dtype == labels.dtype
    assert got.tolist() == [[3] * 3 + [7] * 3] * 2 + [[11] * 3 + [200] * 3] * 2


def test_spacing_follows_the_box_and_other_axes_are_untouched() -> None:
    dates = np.array([0.0, 5.0, 90.0])
    values = noise((2, 3, 20, 30))
    sample = ArraySample(values, coords={"time": dates}, spacing=(1.0, 10.0, 20.0))
    got = sample.crop((0, 5, 3), (3, 10, 24), (3, 5, 48))
    assert got.size == (3, 5, 48)
    assert got.spacing == (1.0, 20.0, 10.0)
    assert got.coords["time"] is dates
    for date in range(3):
        alone = ArraySample(values[:, date]).crop((5, 3), (10, 24), (5, 48)).values
        np.testing.assert_allclose(got.values[:, date], alone, atol=1e-4)


def test_a_bag_is_returned_whole() -> None:
    bag = ArraySample(noise((5, 7)), np.ones(5, dtype=bool), coords={"y": np.arange(5.0), "x": np.arange(5.0)})
    assert bag.crop((), (), ()) is bag


@pytest.mark.parametrize(
    ("start", "extent", "size"),
    [
        ((-1, 0), (5, 5), (5, 5)),
        ((0, 6), (5, 5), (5, 5)),
        ((0, 0), (0, 5), (5, 5)),
        ((0, 0), (5, 5), (0, 5)),
        ((0,), (5,), (5,)),
    ],
)
def test_boxes_that_leave_the_array_are_refused(start: tuple, extent: tuple, size: tuple) -> None:
    with pytest.raises(ValueError, match=r"the array|an array"):
        ArraySample(noise((1, 10, 10))).crop(start, extent, size)


def draws(count: int, *args, **options) -> list:
    rng = np.random.default_rng(0)
    return [random_box(*args, generator=rng, **options) for _ in range(count)]


def test_plane_boxes_have_the_law_of_random_resized_crop() -> None:
    real = draws(4000, (1000, 1000), (0.1, 0.5), (3 / 4, 4 / 3), (0, 1), whole=False)
    area = np.array([e[0] * e[1] for _, e in real]) / 1e6
    ratio = np.array([e[1] / e[0] for _, e in real])
    assert 0.1 <= area.min() < 0.11
    assert 0.49 < area.max() <= 0.5
    # Uniform area and log-uniform ratio: Kolmogorov-Smirnov below the 0.1% critical value 1.95 / sqrt(n).
    for values, low, high in ((area, 0.1, 0.5), (np.log(ratio), math.log(3 / 4), math.log(4 / 3))):
        ranks = (np.sort(values) - low) / (high - low)
        assert np.abs(ranks - (np.arange(4000) + 0.5) / 4000).max() < 1.95 / math.sqrt(4000)
    starts = np.array([s for s, _ in real]) / (1000 - np.array([e for _, e in real]))
    assert np.abs(starts.mean(0) - 0.5).max() < 0.03
    assert starts.min() >= 0
    assert starts.max() <= 1


def test_plane_boxes_agree_with_torchvision_in_distribution() -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    torch.manual_seed(0)
    image = torch.empty(3, 60, 90)
    theirs = np.array([transforms.RandomResizedCrop.get_params(image, (0.2, 1.0), (0.75, 4 / 3)) for _ in range(1500)])
    ours = np.array([(*s, *e) for s, e in draws(1500, (60, 90), (0.2, 1.0), (0.75, 4 / 3), (0, 1))])
    # Means of top, left, height, width over 1500 draws have a standard error below 0.5.
    assert np.abs(theirs.mean(0) - ours.mean(0)).max() < 1.6
    assert np.abs(theirs.std(0) - ours.std(0)).max() < 1.6


@settings(deadline=None, max_examples=80)
@given(
    size=st.lists(st.integers(1, 80), min_size=1, max_size=3),
    scale=st.tuples(st.floats(0.001, 1), st.floats(0.001, 1)).map(sorted).map(tuple),
    ratio=st.tuples(st.floats(0.2, 5), st.floats(0.2, 5)).map(sorted).map(tuple),
    whole=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_boxes_always_lie_inside(size: list, scale: tuple, ratio: tuple, whole: bool, seed: int) -> None:
    start, extent = random_box(size, scale, ratio, tuple(range(len(size))), np.random.default_rng(seed), whole)
    for begin, side, length in zip(start, extent, size, strict=True):
        assert begin >= 0
        assert side > 0
        assert begin + side <= length + 1e-9
        if whole:
            assert begin == int(begin)
            assert side == int(side)
            assert side >= 1


def test_volume_boxes_have_the_documented_law() -> None:
    size = (32, 200, 200)
    real = draws(3000, size, (0.05, 0.4), (3 / 4, 4 / 3), (0, 1, 2), whole=False)
    relative = np.array([e for _, e in real]) / np.array(size)
    share = relative.prod(1)
    ranks = (np.sort(share) - 0.05) / 0.35
    assert np.abs(ranks - (np.arange(3000) + 0.5) / 3000).max() < 1.95 / math.sqrt(3000)
    ratio = relative.max(1) / relative.min(1)
    assert ratio.max() <= 4 / 3 + 1e-9
    assert ratio.max() > 1.25


def test_the_whole_window_is_taken_at_scale_one_whatever_its_shape() -> None:
    rng = np.random.default_rng(0)
    assert random_box((10, 300), (1, 1), (1, 1), (0, 1), rng) == ((0, 0), (10, 300))
    assert rng.random() == np.random.default_rng(0).random()


def test_a_window_too_narrow_for_the_ratio_gives_the_largest_central_box() -> None:
    assert random_box((300, 10), (0.9, 1), (0.5, 2), (0, 1), np.random.default_rng(0)) == ((140, 0), (20, 10))
    assert random_box((10, 300), (0.9, 1), (0.5, 2), (0, 1), np.random.default_rng(0)) == ((0, 140), (10, 20))


def test_time_is_never_cropped() -> None:
    for start, extent in draws(50, (7, 64, 64), (0.1, 0.5), (3 / 4, 4 / 3), (1, 2)):
        assert (start[0], extent[0]) == (0, 7)
        assert extent[1] < 64
