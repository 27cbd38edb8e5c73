"""Augmentation: deterministic, valid for anatomy, and validity and maps move with the values."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from fmsuite.core.data.sample import ArraySample
from fmsuite.core.inputs import Channel, InputSpec
from fmsuite.domains.medical.augment import VolumeAugmentation
from fmsuite.errors import UsageError

SPEC = InputSpec(
    axes=("z", "y", "x"), size=(12, 14, 16), channels=(Channel(name="mr"),), spacing=(1.0, 1.0, 1.0), spacing_unit="mm"
)


def sample(**changes: object) -> ArraySample:
    random = np.random.default_rng(0)
    values = random.normal(size=(1, 12, 14, 16)).astype(np.float32)
    return ArraySample(values, spacing=(1.0, 1.0, 1.0)).replace(**changes)


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
        np.testing.assert_array_equal(a.values, b.values)
        np.testing.assert_array_equal(a.maps["organ"], b.maps["organ"])
    assert len({a.values.tobytes() for a in first}) > 1


def test_the_global_generators_are_left_alone() -> None:
    import torch

    before, before_torch = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    draws(VolumeAugmentation(SPEC), sample(), "strong", 6)
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
        assert np.isfinite(draw.values).all()
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
    pipeline = augmentation._build(True, False, keys, (12, 14, 16), (augment.TURN, 0.0, 0.0))
    affine = next(step for step in pipeline.transforms if type(step).__name__ == "RandAffined")
    affine.set_random_state(seed=1)
    import torch

    for _ in range(6):
        out = np.asarray(affine({"values": torch.from_numpy(slices)})["values"])[0]
        assert np.ptp(out, axis=(1, 2)).max() < 1e-4


def test_blur_draws_no_frame_around_the_view() -> None:
    constant = sample(values=np.full((1, 12, 14, 16), -3.0, dtype=np.float32))
    augmentation = VolumeAugmentation(SPEC)
    pipeline = augmentation._build(True, False, ("values",), (12, 14, 16), (0.0,) * 3)
    names = [type(step).__name__ for step in pipeline.transforms]
    first = names.index("BorderPadd")
    import torch

    data = {"values": torch.from_numpy(constant.values)}
    for step in pipeline.transforms[first : first + 3]:
        if hasattr(step, "prob"):
            step.prob = 1.0
        data = step(data)
    np.testing.assert_allclose(np.asarray(data["values"]), -3.0, atol=1e-3)


def test_hounsfield_values_vary_in_network_units() -> None:
    ct = SPEC.model_copy(
        update={
            "channels": (Channel(name="ct", mean=0.5, std=0.25),),
            "scale": 1 / 2000,
            "offset": 0.5,
            "clip": (0.0, 1.0),
        }
    )
    given = sample(values=np.random.default_rng(0).uniform(-900, 900, (1, 12, 14, 16)).astype(np.float32))
    for draw in draws(VolumeAugmentation(ct), given, "strong", 12):
        assert draw.values.dtype == np.float32
        assert 50 < np.abs(draw.values).mean() < 1500


def test_the_second_view_is_blurred_less_often() -> None:
    def roughness(second: bool) -> float:
        results = draws(VolumeAugmentation(SPEC), sample(), "strong", 40, second)
        return float(np.median([np.abs(np.diff(d.values, axis=-1)).mean() / d.values.std() for d in results]))

    assert roughness(second=True) > roughness(second=False)
