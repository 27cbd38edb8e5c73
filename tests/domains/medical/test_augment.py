"""Augmentation: deterministic, valid for anatomy, and validity and maps move with the values."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from fmsuite.core.data.adjust import Adjustment, adjusted, stacked
from fmsuite.core.data.sample import ArraySample, View
from fmsuite.core.inputs import Channel, InputSpec, Normalize
from fmsuite.domains.medical.augment import VolumeAugmentation
from fmsuite.errors import UsageError

SPEC = InputSpec(
    axes=("z", "y", "x"), size=(12, 14, 16), channels=(Channel(name="mr"),), spacing=(1.0, 1.0, 1.0), spacing_unit="mm"
)


def sample(**changes: object) -> ArraySample:
    random = np.random.default_rng(0)
    values = random.normal(size=(1, 12, 14, 16)).astype(np.float32)
    return ArraySample(values, spacing=(1.0, 1.0, 1.0)).replace(**changes)


CT = SPEC.model_copy(
    update={"channels": (Channel(name="ct", mean=0.4, std=0.25),), "scale": 1 / 2000, "offset": 0.5, "clip": (0.0, 1.0)}
)


def seen(sample: ArraySample) -> np.ndarray:
    """(C, z, y, x) float32: what the model sees of a sample, before normalisation."""
    valid = None if sample.valid is None else torch.from_numpy(sample.valid)[None]
    view = View(torch.from_numpy(sample.values)[None], valid, adjust=stacked([sample.adjust]))
    return adjusted(view).pixels[0].numpy()


def draws(augmentation: VolumeAugmentation, given: ArraySample, strength: str, count: int = 24, second: bool = False):
    return [augmentation.after_crop(given, strength, second, np.random.default_rng(seed)) for seed in range(count)]


@pytest.mark.parametrize("strength", ["weak", "strong"])
def test_the_generator_alone_decides(strength) -> None:
    given = sample(maps={"organ": np.random.default_rng(1).integers(0, 5, (12, 14, 16))})
    augmentation = VolumeAugmentation(SPEC)
    first = draws(augmentation, given, strength, 6)
    copied = pickle.loads(pickle.dumps(augmentation))
    backwards = [copied.after_crop(given, strength, False, np.random.default_rng(seed)) for seed in reversed(range(6))]
    second = backwards[::-1]
    for a, b in zip(first, second):
        np.testing.assert_array_equal(seen(a), seen(b))
        np.testing.assert_array_equal(a.maps["organ"], b.maps["organ"])
    assert len({seen(a).tobytes() for a in first}) > 1


def test_the_global_generators_are_left_alone() -> None:
    before, before_torch = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    for draw in draws(VolumeAugmentation(SPEC), sample(), "strong", 6):
        seen(draw)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before_torch)


def test_the_input_is_not_changed_and_none_returns_it() -> None:
    given = sample()
    before = given.values.copy()
    draws(VolumeAugmentation(SPEC), given, "strong", 6)
    np.testing.assert_array_equal(given.values, before)
    assert VolumeAugmentation(SPEC).after_crop(given, "none", False, np.random.default_rng(0)) is given
    with pytest.raises(UsageError, match="mild"):
        VolumeAugmentation(SPEC).after_crop(given, "mild", False, np.random.default_rng(0))


@pytest.mark.parametrize("mirrored", [False, True])
def test_weak_gives_every_mirror_image_that_is_allowed_and_no_other(mirrored) -> None:
    given = sample()
    axes = [(z, y, x) for z in (0, 1) for y in (0, 1) for x in ((0, 1) if mirrored else (0,))]
    allowed = {np.flip(given.values, [1 + i for i in range(3) if chosen[i]]).tobytes() for chosen in axes}
    seen = {draw.values.tobytes() for draw in draws(VolumeAugmentation(SPEC, mirrored), given, "weak", 80)}
    assert seen == allowed


def test_valid_and_maps_move_with_the_values() -> None:
    marked = np.zeros((1, 12, 14, 16), dtype=np.float32)
    marked[0, 2:6, 3:9, 4:12] = 1
    given = sample(values=marked, valid=marked > 0, maps={"organ": (7 * marked[0]).astype(np.int64)})
    for draw in draws(VolumeAugmentation(SPEC), given, "weak", 8):
        np.testing.assert_array_equal(draw.valid, draw.values > 0)
        np.testing.assert_array_equal(draw.maps["organ"], 7 * draw.values[0])
        assert draw.maps["organ"].dtype == np.int64


def test_strong_moves_valid_and_maps_to_the_same_place() -> None:
    marked = np.zeros((1, 12, 14, 16), dtype=np.float32)
    marked[0, 3:9, 4:10, 4:12] = 1
    given = sample(valid=marked > 0, maps={"organ": marked[0].astype(np.int32)})
    for draw in draws(VolumeAugmentation(SPEC), given, "strong", 16):
        inside, organ = draw.valid[0], draw.maps["organ"] == 1
        assert inside.any()
        assert (organ | ~inside).all(), "a voxel is valid only where the organ is"
        assert set(np.unique(draw.maps["organ"])) <= {0, 1}


def test_what_a_rotation_brings_in_from_outside_is_invalid() -> None:
    constant = sample(values=np.full((1, 12, 14, 16), 2.0, dtype=np.float32))
    results = draws(VolumeAugmentation(SPEC), constant, "strong", 24)
    assert any(draw.valid is not None and not draw.valid.all() for draw in results)
    assert any(draw.valid is None for draw in results)
    for draw in results:
        assert draw.values.shape == constant.values.shape
        assert np.isfinite(seen(draw)).all()
        assert draw.valid is None or draw.valid.mean() > 0.5


def test_only_planes_of_equal_spacing_are_rotated() -> None:
    augmentation = VolumeAugmentation(SPEC)
    assert np.count_nonzero(augmentation._turns(sample())) == 3
    thick = augmentation._turns(sample(spacing=(5.0, 0.7, 0.7)))
    assert [bool(turn) for turn in thick] == [True, False, False]


def test_a_rotation_about_z_keeps_every_slice_its_own() -> None:
    """With thick slices, values that depend on z alone must stay so: nothing mixes slices but a zoom along z."""
    from fmsuite.domains.medical import augment

    slices = np.broadcast_to(np.arange(12, dtype=np.float32)[:, None, None], (1, 12, 14, 16)).copy()
    augmentation = VolumeAugmentation(SPEC)
    keys = ("values",)
    pipeline = augmentation._build(True, keys, (augment.TURN, 0.0, 0.0))
    affine = next(step for step in pipeline.transforms if type(step).__name__ == "RandAffined")
    affine.set_random_state(seed=1)
    for _ in range(6):
        out = np.asarray(affine({"values": torch.from_numpy(slices)})["values"])[0]
        assert np.ptp(out, axis=(1, 2)).max() < 1e-4


def test_blur_draws_no_frame_around_the_view_or_around_what_is_invalid() -> None:
    blur = Adjustment(blur=np.float32([1.0, 0.7, 1.0]))
    constant = np.full((1, 12, 14, 16), -3.0, dtype=np.float32)
    np.testing.assert_allclose(seen(ArraySample(constant, adjust=blur)), -3.0, atol=1e-5)
    valid = np.ones((1, 12, 14, 16), dtype=bool)
    valid[:, :3] = valid[:, 6, 6, 6:9] = False
    holed = ArraySample(np.where(valid, constant, 1e6).astype(np.float32), valid, adjust=blur)
    np.testing.assert_allclose(seen(holed)[valid], -3.0, atol=1e-5)


@pytest.mark.parametrize("sigma", [0.5, 0.75, 1.0])
def test_blur_has_the_strength_of_monais(sigma) -> None:
    """MONAI's kernel integrates the Gaussian over each voxel, ours samples one that is wider by a voxel's own width."""
    from monai.transforms import GaussianSmooth

    from fmsuite.domains.medical.augment import VOXEL_VARIANCE

    given = sample()
    expected = np.asarray(GaussianSmooth(sigma)(torch.from_numpy(given.values)))
    found = seen(given.replace(adjust=Adjustment(blur=np.full(3, np.sqrt(sigma**2 + VOXEL_VARIANCE), np.float32))))
    inner = (slice(None), *(slice(4, -4),) * 3)
    assert np.abs(found - expected)[inner].max() < 0.03 * given.values.std()
    assert found[inner].std() == pytest.approx(expected[inner].std(), rel=0.03)


def test_gamma_is_monais_and_invalid_voxels_do_not_set_its_range() -> None:
    from monai.transforms import AdjustContrast

    given = sample()
    for gamma in (0.7, 1.5):
        expected = np.asarray(AdjustContrast(gamma)(torch.from_numpy(given.values)))
        np.testing.assert_allclose(seen(given.replace(adjust=Adjustment(gamma=gamma))), expected, atol=1e-5)
        valid = np.ones((1, 12, 14, 16), dtype=bool)
        valid[0, 0, 0, :2] = False
        wild = given.values.copy()
        wild[0, 0, 0, :2] = -50, 80
        inside = np.asarray(AdjustContrast(gamma)(torch.from_numpy(given.values[valid])))
        found = seen(given.replace(values=wild, valid=valid, adjust=Adjustment(gamma=gamma)))
        np.testing.assert_allclose(found[valid], inside, atol=1e-5)


def test_intensities_vary_in_network_units() -> None:
    """Hounsfield values: their window first, then a factor and a shift of normalised values."""
    normalise = Normalize(CT)
    given = sample(values=np.random.default_rng(0).uniform(-1500, 1500, (1, 12, 14, 16)).astype(np.float32))
    slopes, shifts = [], []
    for draw in draws(VolumeAugmentation(CT), given, "strong", 80):
        assert draw.values.dtype == np.float32
        assert draw.adjust.limits.tolist() == [[-1000, 1000], [-np.inf, np.inf]]
        plain = draw.replace(adjust=replace(draw.adjust, blur=None, noise=None, seed=None, gamma=None))
        inside = slice(None) if draw.valid is None else draw.valid
        before = normalise(torch.from_numpy(draw.values)[None])[0].numpy()[inside].ravel()
        after = ((seen(plain) * CT.scale + CT.offset - 0.4) / 0.25)[inside].ravel()
        slope, shift = np.polyfit(before, after, 1)
        assert np.abs(slope * before + shift - after).max() < 1e-4
        slopes.append(slope - 1)
        shifts.append(shift)
    for drawn in (np.array(slopes), np.array(shifts)):
        assert 0.1 < np.abs(drawn).max() < 0.2001
        assert 0.3 < (np.abs(drawn) < 1e-5).mean() < 0.7


def test_noise_has_the_drawn_spread_in_network_units_and_its_own_seed() -> None:
    given = sample(values=np.zeros((1, 12, 14, 16), np.float32))
    spreads = []
    for draw in draws(VolumeAugmentation(CT), given, "strong", 60):
        only = replace(draw.adjust, blur=None, gamma=None, maps=None, limits=None)
        noise = seen(draw.replace(adjust=only)) * CT.scale / 0.25
        factor = draw.adjust.maps[0, 0, 0]
        assert noise.std() == pytest.approx(float(only.noise[0]) * CT.scale / 0.25, rel=0.05)
        spreads.append(noise.std() / factor)
        other = replace(only, seed=only.seed + 1)
        assert not only.noise.any() or not np.array_equal(
            seen(draw.replace(adjust=other)), seen(draw.replace(adjust=only))
        )
    drawn = np.array(spreads)
    assert 0.15 < (drawn > 0).mean() < 0.45
    assert 0.06 < drawn.max() < 0.105


def test_the_second_view_is_blurred_less_often() -> None:
    def blurred(second: bool) -> int:
        results = draws(VolumeAugmentation(SPEC), sample(), "strong", 40, second)
        return sum(bool(result.adjust.blur.any()) for result in results)

    assert 12 <= blurred(False) <= 28
    assert blurred(True) <= 9
