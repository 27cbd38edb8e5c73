from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from fmsuite.core.data.adjust import adjusted, stacked
from fmsuite.core.data.sample import ArraySample, View
from fmsuite.core.seeding import generator
from fmsuite.domains.remote_sensing.augment import BLUR, BLUR_PROBABILITY, RasterAugmentation
from fmsuite.domains.remote_sensing.dropout import Dropout
from fmsuite.tiling.symmetry import turned


def seen(sample: ArraySample) -> np.ndarray:
    """(C, ...) float32: what the model sees of a sample, before normalisation."""
    valid = None if sample.valid is None else torch.from_numpy(sample.valid)[None]
    return (
        adjusted(View(torch.from_numpy(sample.values)[None], valid, adjust=stacked([sample.adjust]))).pixels[0].numpy()
    )


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


def test_bands_of_several_sensors_vary_each_in_their_own_way():
    kinds = ("optical", "decibel", "kelvin", "optical")
    augmentation = RasterAugmentation(kinds, (1e-4, 1.0, 0.01, 2e-4), (0.0, 0.0, 149.0, -0.2))
    maps = np.stack([augmentation._jitter(4, generator(seed)) for seed in range(400)])
    linear, shift = maps[:, :, :4], maps[:, :, -1]
    assert (linear[:, [1, 2], [1, 2]] == 1).all()
    assert (maps[:, [1, 2], [5, 6]] == 0).all()
    assert shift[:, 1].std() == pytest.approx(2**0.5, rel=0.1)
    assert 0.01 * shift[:, 2].std() == pytest.approx(2 * 2**0.5, rel=0.1)
    factors = np.log(linear[:, [0, 3], [0, 3]])
    assert factors.std(axis=0) == pytest.approx(0.1 * 2**0.5, rel=0.1)
    # Half of the variance is what bands of one kind share; other kinds share nothing with them.
    assert np.corrcoef(factors.T)[0, 1] == pytest.approx(0.5, abs=0.1)
    assert abs(np.corrcoef(factors[:, 0], shift[:, 1])[0, 1]) < 0.15
    # A factor acts on reflectance, not on counts with an offset.
    np.testing.assert_allclose(shift[:, 3], (linear[:, 3, 3] + maps[:, 3, 7] - 1) * -0.2 / 2e-4, rtol=1e-3, atol=0.5)


def test_strong_is_a_function_of_the_generator_and_survives_pickling():
    augmentation = RasterAugmentation("optical", 1e-4, -0.1, Dropout(bands=0.3))
    sample = marked(16, 16)
    first = augmentation.after_crop(sample, "strong", False, generator(7))
    again = pickle.loads(pickle.dumps(augmentation)).after_crop(sample, "strong", False, generator(7))
    other = augmentation.after_crop(sample, "strong", False, generator(8))
    assert first.values.dtype == sample.values.dtype
    np.testing.assert_array_equal(seen(first), seen(again))
    np.testing.assert_array_equal(first.valid, again.valid)
    assert not np.array_equal(seen(first), seen(other))
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
        out = seen(augmentation.after_crop(sample, "strong", False, generator(seed)))
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
        out = seen(augmentation.after_crop(sample, "strong", False, generator(seed)))
        for plane in unturned(sample):
            shift = out - plane
            if shift.std(axis=(1, 2)).max() < 1e-4:
                sharp += 1
                assert np.abs(shift).max() < 8
                assert np.abs(shift).min() > 0
    assert sharp > 10


def test_invalid_pixels_never_enter_a_neighbour():
    sample = marked(16, 16)
    wild = sample.replace(values=np.where(sample.valid, sample.values, 65_535).astype(np.uint16))
    for seed in range(20):
        calm_out = RasterAugmentation(scale=1e-4).after_crop(sample, "strong", False, generator(seed))
        wild_out = RasterAugmentation(scale=1e-4).after_crop(wild, "strong", False, generator(seed))
        np.testing.assert_array_equal(seen(calm_out) * calm_out.valid, seen(wild_out) * wild_out.valid)


@pytest.mark.parametrize("kind", ["optical", "decibel"])
@pytest.mark.parametrize("dates", [None, 2])
def test_jitter_and_blur_are_the_written_formulas_in_physical_values(kind, dates):
    """The same draws, in numpy on floats: as this was done before it moved to the device."""
    scale, offset = 1e-4, -0.1
    augmentation, given, blurs = RasterAugmentation(kind, scale, offset), marked(20, 16, 4, dates), 0
    for seed in range(12):
        draw = generator(seed)
        sample = turned(given, int(draw.integers(4)), bool(draw.integers(2)))
        valid, physical = sample.valid, sample.values.astype(np.float64) * scale + offset
        per_band = (4, *(1,) * (physical.ndim - 1))
        shared, own, shift = draw.normal(), draw.normal(size=4), draw.normal(size=4)
        if kind == "decibel":
            physical = physical + (1.0 * (shared + own)).reshape(per_band)
        else:
            mean = np.array([band[ok].mean() for band, ok in zip(physical, valid)]).reshape(per_band)
            factor = np.exp(0.1 * (shared + own)).reshape(per_band)
            physical = physical * factor + 0.02 * shift.reshape(per_band) * mean
        share, sigma = draw.random(), draw.uniform(*BLUR)
        if share < BLUR_PROBABILITY[0]:
            blurs += 1
            width = (0,) * (physical.ndim - 2) + (sigma, sigma)
            reach = {"mode": "constant", "radius": [0] * (physical.ndim - 2) + [int(np.ceil(3 * sigma))] * 2}
            weight = gaussian_filter(valid.astype(np.float64), width, **reach)
            physical = gaussian_filter(np.where(valid, physical, 0), width, **reach) / np.maximum(weight, 1e-6)
        found = seen(augmentation.after_crop(given, "strong", False, generator(seed))) * scale + offset
        np.testing.assert_allclose(found[valid], physical[valid], atol=2e-6 * np.abs(physical[valid]).max())
    assert 2 < blurs < 10


def test_reflectance_backscatter_and_temperature_vary_each_in_its_own_way_and_unit():
    """A factor of physical reflectance whatever its offset; shifts of decibels and kelvins whatever their scale."""
    kinds, scales, offsets = ("optical", "decibel", "kelvin", "optical"), (1e-4, 0.01, 0.02, 2e-4), (-0.1, 0, 150, 0)
    sample = ArraySample(np.random.default_rng(0).uniform(1000, 9000, (4, 16, 16)).astype(np.float32))
    augmentation, sharp = RasterAugmentation(kinds, scales, offsets), 0
    per_band = (4, 1, 1)
    to_physical = np.array(scales).reshape(per_band), np.array(offsets).reshape(per_band)
    for seed in range(30):
        out = seen(augmentation.after_crop(sample, "strong", False, generator(seed))) * to_physical[0] + to_physical[1]
        for plane in unturned(sample):
            plane = plane * to_physical[0] + to_physical[1]
            fits = [np.polyfit(p.ravel(), o.ravel(), 1) for p, o in zip(plane, out)]
            misfit = max(np.abs(np.polyval(f, p) - o).max() / p.std() for f, p, o in zip(fits, plane, out))
            if misfit < 1e-3:
                sharp += 1
                assert [abs(fit[0] - 1) < 1e-4 for fit in fits] == [False, True, True, False]
                assert 0.01 < abs(fits[1][1]) < 8
                assert 0.01 < abs(fits[2][1]) < 16
                # The additive part of reflectance is a small share of the band's mean.
                assert abs(fits[0][1]) < 0.1 * plane[0].mean()
    assert sharp > 8
