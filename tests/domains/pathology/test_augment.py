"""Variations of stained tissue."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fmsuite.commands.setup import open_index
from fmsuite.core.data.adjust import Adjustment, adjusted, stacked
from fmsuite.core.data.index import SampleIndex
from fmsuite.core.data.sample import ArraySample, View
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.seeding import generator
from fmsuite.domains.base import load_domain
from fmsuite.domains.pathology.augment import (
    STAINS,
    StainedTissueAugmentation,
    brightness,
    contrast,
    hed_to_rgb,
    rgb_to_hed,
    saturation,
    stain_map,
)
from fmsuite.domains.pathology.options import PathologyOptions


def seen(sample: ArraySample) -> np.ndarray:
    """(3, H, W) float32: what the model sees of a sample, before normalisation."""
    view = View(torch.from_numpy(sample.values)[None], adjust=stacked([sample.adjust]))
    return adjusted(view).pixels[0].numpy()


def jittered(rgb: np.ndarray, gain: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 to float32, with the stain's change and the limits of 8 bits."""
    limits = np.float32([[0, 255]])
    adjust = Adjustment(absorbance=stain_map(gain, shift), limits=limits)
    return np.moveaxis(seen(ArraySample(np.ascontiguousarray(np.moveaxis(rgb, -1, 0)), adjust=adjust)), 0, -1)


@pytest.fixture
def every_colour() -> np.ndarray:
    axis = np.arange(0, 256, 5)
    return np.stack(np.meshgrid(axis, axis, axis), -1).reshape(52, -1, 3).astype(np.uint8)


def test_deconvolution_solves_the_absorbance_equation_of_each_pixel() -> None:
    matrix = STAINS / np.sqrt((STAINS**2).sum(axis=1))[:, None]
    for pixel in ((215, 140, 180), (110, 80, 140), (0, 0, 0), (255, 255, 255), (120, 90, 40)):
        absorbance = [-np.log((v + 1) / 256) for v in pixel]
        assert np.allclose(rgb_to_hed(np.array(pixel)), np.linalg.solve(matrix.T, absorbance), atol=1e-12)


def test_a_pure_stain_has_no_part_in_the_others() -> None:
    for number in range(3):
        amount = np.zeros(3)
        amount[number] = 0.8
        assert np.allclose(rgb_to_hed(hed_to_rgb(amount)), amount, atol=1e-12)


def test_round_trip_is_exact_for_every_byte(every_colour: np.ndarray) -> None:
    assert np.array_equal(np.rint(hed_to_rgb(rgb_to_hed(every_colour))), every_colour)
    assert np.abs(hed_to_rgb(rgb_to_hed(every_colour)) - every_colour).max() < 1e-9


def test_jitter_with_gain_one_and_no_shift_changes_nothing(every_colour: np.ndarray) -> None:
    assert np.abs(jittered(every_colour, np.ones(3), np.zeros(3)) - every_colour).max() < 1e-3


def test_jitter_is_the_written_formula(every_colour: np.ndarray) -> None:
    gain, shift = np.array([1.15, 0.9, 1.02]), np.array([0.02, -0.01, 0.005])
    expected = np.clip(hed_to_rgb(rgb_to_hed(every_colour) * gain + shift), 0, 255)
    assert np.abs(jittered(every_colour, gain, shift) - expected).max() < 2e-3


def test_gain_leaves_glass_white_and_darkens_only_its_stain() -> None:
    white = np.full((2, 2, 3), 255, np.uint8)
    assert np.abs(jittered(white, np.array([1.3, 0.7, 1.2]), np.zeros(3)) - 255).max() < 1e-3
    eosin = np.rint(hed_to_rgb(np.array([0.0, 0.6, 0.0]))).astype(np.uint8).reshape(1, 1, 3)
    assert np.abs(jittered(eosin, np.array([1.5, 1.0, 1.0]), np.zeros(3)) - eosin).max() < 1
    assert jittered(eosin, np.array([1.0, 1.5, 1.0]), np.zeros(3))[0, 0, 1] < eosin[0, 0, 1] - 20


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_colours_change_as_albumentations_does_in_bytes_and_torchvision_in_floats(
    order: tuple[int, ...], tissue: np.ndarray
) -> None:
    from albumentations.augmentations.pixel import functional
    from torchvision.transforms.v2 import functional as v2

    exact = (v2.adjust_brightness, v2.adjust_contrast, v2.adjust_saturation)
    picture = np.ascontiguousarray(tissue[:96, :96])
    theirs = (
        functional.adjust_brightness_torchvision,
        functional.adjust_contrast_torchvision,
        functional.adjust_saturation_torchvision,
    )
    ours, factors = (brightness, contrast, saturation), (1.09, 0.91, 1.07)
    expected = picture
    for number in order:
        expected = theirs[number](expected, factors[number])
    maps = np.stack([ours[number](factors[number]) for number in order] + [saturation(0.0)])
    for count in (3, 4):
        if count == 4:
            expected = functional.to_gray_weighted_average(expected)[..., None].repeat(3, axis=2)
        limits = np.tile(np.float32([0, 255]), (count + 1, 1))
        sample = ArraySample(np.ascontiguousarray(np.moveaxis(picture, -1, 0)))
        found = seen(sample.replace(adjust=Adjustment(maps=maps[:count], limits=limits)))
        off = np.abs(np.moveaxis(found, 0, -1) - expected)
        # Their bytes are cut off, or rounded, after each of the steps.
        assert off.max() < 3
        assert off.mean() < 1.2
        floats = torch.from_numpy(np.ascontiguousarray(np.moveaxis(picture, -1, 0))) / 255
        for number in order:
            floats = exact[number](floats, factors[number])
        floats = v2.rgb_to_grayscale(floats, 3) if count == 4 else floats
        assert np.abs(found - 255 * floats.numpy()).max() < 0.06  # its grey has weights of four digits


def test_a_strong_view_differs_from_its_8_bit_form_by_rounding(tissue: np.ndarray) -> None:
    """Stain, colour and blur as they were done in 8 bits with OpenCV, with the same draws."""
    import cv2
    from albumentations.augmentations.pixel import functional

    picture = np.ascontiguousarray(tissue[:96, :96])
    sample = ArraySample(np.ascontiguousarray(np.moveaxis(picture, -1, 0)))
    gain, shift, factor, sigma = np.array([1.1, 0.9, 1.05]), np.array([0.01, -0.015, 0.0]), 0.93, 0.8
    expected = np.clip(np.rint(hed_to_rgb(rgb_to_hed(picture) * gain + shift)), 0, 255).astype(np.uint8)
    expected = functional.adjust_contrast_torchvision(expected, factor)
    expected = cv2.GaussianBlur(expected, (5, 5), sigma)
    adjust = Adjustment(
        absorbance=stain_map(gain, shift),
        maps=contrast(factor)[None],
        limits=np.float32([[0, 255]] * 2),
        blur=np.float32([sigma] * 2),
    )
    off = np.abs(np.moveaxis(seen(sample.replace(adjust=adjust)), 0, -1) - expected)[3:-3, 3:-3]
    assert off.max() < 2.5
    assert off.mean() < 0.8


def marked(height: int = 24, width: int = 24) -> ArraySample:
    """Every pixel differs, and the validity and the map say so too."""
    number = np.arange(height * width).reshape(height, width)
    values = np.stack([number % 256, number // 256, (number * 7) % 256]).astype(np.uint8)
    return ArraySample(values, valid=(number % 5 > 0)[None], maps={"id": number})


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([(24, 24), (16, 24)]))
def test_turns_move_validity_and_maps_with_the_pixels(seed: int, size: tuple[int, int]) -> None:
    sample = marked(*size)
    turned = StainedTissueAugmentation().after_crop(sample, "weak", False, generator(seed))
    assert turned.size == size
    number = turned.maps["id"]
    assert sorted(number.reshape(-1)) == list(range(size[0] * size[1]))
    assert np.array_equal(turned.values[0], number % 256)
    assert np.array_equal(turned.values[1], number // 256)
    assert turned.valid is not None
    assert np.array_equal(turned.valid[0], number % 5 > 0)


def test_all_eight_symmetries_of_a_square_appear_and_four_of_a_rectangle() -> None:
    augmentation = StainedTissueAugmentation()
    for size, count in (((24, 24), 8), ((16, 24), 4)):
        turns = {
            augmentation.after_crop(marked(*size), "weak", False, generator(seed)).maps["id"].tobytes()
            for seed in range(120)
        }
        assert len(turns) == count


def test_strong_moves_geometry_like_weak_and_keeps_type_and_size(tissue: np.ndarray) -> None:
    sample = ArraySample(np.moveaxis(tissue[:64, :64], -1, 0), maps={"id": np.arange(64 * 64).reshape(64, 64)})
    augmentation = StainedTissueAugmentation()
    for seed in range(10):
        weak = augmentation.after_crop(sample, "weak", False, generator(seed))
        strong = augmentation.after_crop(sample, "strong", False, generator(seed))
        assert np.array_equal(weak.maps["id"], strong.maps["id"])
        assert strong.values.dtype == np.uint8
        assert np.array_equal(weak.values, strong.values)
        varied = seen(strong)
        assert varied.dtype == np.float32
        assert varied.min() >= 0
        assert varied.max() <= 255
        assert np.abs(varied - weak.values).max() > 1
        # Structure stays: the varied picture is still a monotone image of the same tissue.
        assert np.corrcoef(weak.values.mean(0).ravel(), varied.mean(0).ravel())[0, 1] > 0.9


def test_none_changes_nothing() -> None:
    sample = marked()
    assert StainedTissueAugmentation().after_crop(sample, "none", False, generator(0)) is sample


def test_same_generator_same_picture_whatever_came_before(tissue: np.ndarray) -> None:
    sample = ArraySample(np.ascontiguousarray(np.moveaxis(tissue[:64, :64], -1, 0)))
    first = StainedTissueAugmentation()
    pictures = [seen(first.after_crop(sample, "strong", False, generator(1, seed))) for seed in range(12)]
    second = StainedTissueAugmentation()
    for seed in reversed(range(12)):
        np.random.seed(seed)  # noqa: NPY002 - the global state must not matter
        again = seen(second.after_crop(sample, "strong", False, generator(1, seed)))
        assert np.array_equal(pictures[seed], again)
    assert len({picture.tobytes() for picture in pictures}) == 12


def test_colour_stays_near_and_no_picture_is_inverted(tissue: np.ndarray) -> None:
    sample = ArraySample(np.ascontiguousarray(np.moveaxis(tissue[:64, :64], -1, 0)))
    before = sample.values.mean(axis=(1, 2))
    for seed in range(60):
        after = seen(StainedTissueAugmentation().after_crop(sample, "strong", bool(seed % 2), generator(seed)))
        assert np.abs(after.mean(axis=(1, 2)) - before).max() < 50
        assert after[1].mean() < after[0].mean()


def test_greyscale_is_off_unless_asked_for(tissue: np.ndarray) -> None:
    sample = ArraySample(np.ascontiguousarray(np.moveaxis(tissue[:32, :32], -1, 0)))

    def grey(augmentation: StainedTissueAugmentation) -> int:
        pictures = [seen(augmentation.after_crop(sample, "strong", False, generator(s))) for s in range(30)]
        return sum(bool(np.ptp(picture, axis=0).max() < 1e-3) for picture in pictures)

    assert grey(StainedTissueAugmentation()) == 0
    assert grey(StainedTissueAugmentation(greyscale=1.0)) == 30


def test_the_second_view_is_blurred_less_often(tissue: np.ndarray) -> None:
    sample = ArraySample(np.ascontiguousarray(np.moveaxis(tissue[:64, :64], -1, 0)))
    augmentation = StainedTissueAugmentation(stain_gain=0, stain_shift=0, colour=0, blur_sigma=(1.0, 1.0))

    def blurred(second: bool) -> int:
        changed = 0
        for seed in range(60):
            weak = augmentation.after_crop(sample, "weak", second, generator(seed)).values
            strong = seen(augmentation.after_crop(sample, "strong", second, generator(seed)))
            changed += int(np.abs(weak - strong).max() > 1e-2)
        return changed

    assert 18 <= blurred(False) <= 42
    assert blurred(True) <= 15


def test_the_plugin_is_found_by_its_name() -> None:
    assert load_domain("pathology").name == "pathology"


def test_jitter_scales_the_spread_of_colours_and_greyscale_drops_them() -> None:
    tissue = np.tile(np.array([[[180]], [[120]], [[160]]], np.uint8), (1, 24, 24))

    def means(augmentation: StainedTissueAugmentation) -> np.ndarray:
        drawn = [
            augmentation.after_crop(ArraySample(tissue), "strong", False, generator(0, number)) for number in range(60)
        ]
        return np.stack([seen(sample).mean((1, 2)) for sample in drawn])

    still, usual, strong = (means(StainedTissueAugmentation.jittered(factor)) for factor in (0.0, 1.0, 2.5))
    assert np.abs(still - [180, 120, 160]).max() < 1
    assert np.array_equal(usual, means(StainedTissueAugmentation()))
    assert 1 < usual.std(0).mean() < strong.std(0).mean() / 1.8
    grey = means(StainedTissueAugmentation.jittered(1.0, greyscale=1.0))
    assert np.ptp(grey, axis=1).max() < 1e-3


def test_options_of_augmentation_may_differ_from_those_that_the_index_was_made_with(
    example_index: SampleIndex, tmp_path: Path
) -> None:
    example_index.write(tmp_path / "index.parquet")
    other = load_domain("pathology")(PathologyOptions(stain_jitter=3.0, greyscale=0.5))
    asked = {"stain_jitter", "greyscale"}
    domain, _ = open_index(other, [tmp_path / "index.parquet"], SkippedLog(None), asked=asked)
    assert domain.options.stain_jitter == 3.0
    assert domain.options.greyscale == 0.5
