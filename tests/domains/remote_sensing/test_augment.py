from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from fmsuite.core.data.sample import ArraySample
from fmsuite.core.seeding import generator
from fmsuite.domains.remote_sensing.augment import RasterAugmentation, blurred


def marked(height: int, width: int, bands: int = 3, dates: int | None = None, seed: int = 0) -> ArraySample:
    """``valid`` and ``maps`` say of every pixel what its value says, so that they can only move together."""
    random = np.random.default_rng(seed)
    lead = (bands,) if dates is None else (bands, dates)
    values = random.integers(1, 5000, size=(*lead, height, width)).astype(np.uint16)
    valid = values % 3 > 0
    classes = values[(0,) * len(lead)].astype(np.int64)
    return ArraySample(values, valid, spacing=(10.0, 20.0), maps={"classes": classes})


@given(seed=st.integers(0, 10_000), square=st.booleans(), dates=st.sampled_from([None, 2]))
@settings(max_examples=40, deadline=None)
def test_weak_moves_values_validity_and_maps_together(seed, square, dates):
    sample = marked(12, 12 if square else 8, dates=dates)
    turned = RasterAugmentation().after_crop(sample, "weak", False, generator(seed))
    assert turned.values.shape == sample.values.shape
    assert turned.values.dtype == sample.values.dtype
    np.testing.assert_array_equal(turned.valid, turned.values % 3 > 0)
    np.testing.assert_array_equal(turned.maps["classes"], turned.values[(0,) * (turned.values.ndim - 2)])
    assert sorted(turned.values.ravel()) == sorted(sample.values.ravel())


def test_all_eight_symmetries_of_a_square_occur_and_spacing_turns_along():
    sample = marked(8, 8)
    seen = {}
    for seed in range(100):
        turned = RasterAugmentation().after_crop(sample, "weak", False, generator(seed))
        seen[turned.values.tobytes()] = turned
    assert len(seen) == 8
    assert sorted(s.spacing for s in seen.values()) == [(10.0, 20.0)] * 4 + [(20.0, 10.0)] * 4


def test_strong_is_a_function_of_the_generator_and_survives_pickling():
    augmentation = RasterAugmentation("optical", 1e-4, -0.1, band_dropout=0.3)
    sample = marked(16, 16)
    first = augmentation.after_crop(sample, "strong", False, generator(7))
    again = pickle.loads(pickle.dumps(augmentation)).after_crop(sample, "strong", False, generator(7))
    other = augmentation.after_crop(sample, "strong", False, generator(8))
    np.testing.assert_array_equal(first.values, again.values)
    np.testing.assert_array_equal(first.valid, again.valid)
    assert not np.array_equal(first.values, other.values)
    assert augmentation.after_crop(sample, "none", False, generator(7)) is sample


def unturned(sample: ArraySample) -> list[tuple]:
    """The eight ways in which a plane may have been turned."""
    plane = sample.values
    return [np.rot90(p, k, (-2, -1)) for k in range(4) for p in (plane, plane[..., ::-1])]


def test_reflectance_varies_by_an_affine_map_of_each_band():
    augmentation = RasterAugmentation("optical", 1e-4, -0.1)
    sample = marked(16, 16).replace(valid=None)
    sharp = 0
    for seed in range(40):
        out = augmentation.after_crop(sample, "strong", False, generator(seed)).values
        for plane in unturned(sample):
            fits = [np.polyfit(p.ravel(), o.ravel(), 1) for p, o in zip(plane, out)]
            misfit = max(np.abs(np.polyval(f, p) - o).max() for f, p, o in zip(fits, plane, out))
            if misfit < 1.0:
                sharp += 1
                assert all(0.5 < fit[0] < 2 for fit in fits)
                assert len({round(float(fit[0]), 6) for fit in fits}) == 3
    assert sharp > 10  # half of the views are blurred as well


def test_backscatter_varies_by_a_shift_in_decibels():
    sample = ArraySample(np.random.default_rng(0).normal(-15, 4, size=(2, 16, 16)).astype(np.float32))
    augmentation = RasterAugmentation("decibel")
    sharp = 0
    for seed in range(40):
        out = augmentation.after_crop(sample, "strong", False, generator(seed)).values
        for plane in unturned(sample):
            shift = out - plane
            if shift.std(axis=(1, 2)).max() < 1e-4:
                sharp += 1
                assert np.abs(shift).max() < 8
                assert np.abs(shift).min() > 0
    assert sharp > 10


def test_a_dropped_band_is_invalid_and_one_band_always_stays():
    sample = ArraySample(np.ones((4, 8, 8), np.float32))
    counts = []
    for seed in range(200):
        out = RasterAugmentation(band_dropout=0.6).after_crop(sample, "strong", False, generator(seed))
        whole = out.valid.reshape(4, -1)
        assert (whole.all(1) | ~whole.any(1)).all()
        counts.append(whole.all(1).sum())
    assert min(counts) == 1
    assert np.mean(counts) == pytest.approx(4 * 0.4 + 0.6**4, abs=0.2)


def test_invalid_pixels_never_enter_a_neighbour():
    sample = marked(16, 16)
    wild = sample.replace(values=np.where(sample.valid, sample.values, 65_535).astype(np.uint16))
    for seed in range(20):
        calm_out = RasterAugmentation(scale=1e-4).after_crop(sample, "strong", False, generator(seed))
        wild_out = RasterAugmentation(scale=1e-4).after_crop(wild, "strong", False, generator(seed))
        np.testing.assert_array_equal(calm_out.values, wild_out.values)


def test_blur_equals_scipys_away_from_the_border():
    values = np.random.default_rng(0).normal(size=(2, 40, 40)).astype(np.float32)
    expected = gaussian_filter(values, (0, 0.9, 0.9), truncate=3 / 0.9)
    np.testing.assert_allclose(blurred(values, None, 0.9)[:, 4:-4, 4:-4], expected[:, 4:-4, 4:-4], atol=1e-5)
    np.testing.assert_allclose(blurred(np.ones((1, 9, 9), np.float32), None, 1.2), 1, atol=1e-6)
