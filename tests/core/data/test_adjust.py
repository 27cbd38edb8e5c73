"""Adjustments: in float32 and of each row alone; they travel beside pixels that stay as they are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from scipy.ndimage import gaussian_filter1d

from fmsuite.core.data.adjust import Adjustment, adjusted, affine, stacked
from fmsuite.core.data.index import SampleIndex, Window
from fmsuite.core.data.loader import SampleStream, make_loader
from fmsuite.core.data.pipeline import ViewPipeline, WindowDataset, collate
from fmsuite.core.data.sample import ArraySample, Sample, SampleKey, View, ViewRequest
from fmsuite.core.inputs import InputSpec, Normalize, rgb_channels
from fmsuite.core.reports.views import draw_views

SPEC = InputSpec(axes=("y", "x"), size=(16, 16), channels=rgb_channels(), scale=1 / 255)
EVERYTHING = Adjustment(
    absorbance=np.float32([[1.1, 0.05, 0, 0.01], [0, 0.9, 0.02, 0], [0.03, 0, 1, -0.01]]),
    maps=np.stack([affine(0.9 * np.eye(3), 0.1 * np.eye(3)), affine(np.full((3, 3), 0.3), offset=np.arange(3))]),
    limits=np.float32([[0, 255], [0, 250], [5, 255]]),
    blur=np.float32([0.8, 0.6]),
    noise=np.float32([2, 0, 1]),
    seed=5,
    gamma=1.2,
)


def pictures(count: int, size: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 3, size, size)).astype(np.uint8))


def apply(values: torch.Tensor, *adjustments: Adjustment | None, valid: torch.Tensor | None = None) -> torch.Tensor:
    return adjusted(View(values, valid, adjust=stacked(adjustments))).pixels


def test_every_part_in_order_is_the_formula_written_out() -> None:
    quiet = replace(EVERYTHING, noise=None, seed=None)
    image = pictures(1)
    v = image[0].numpy().astype(np.float64)
    a, b = EVERYTHING.absorbance[:, :3], EVERYTHING.absorbance[:, 3]
    v = 256 * np.exp(-(np.einsum("ij,jyx->iyx", a, -np.log((v + 1) / 256)) + b[:, None, None])) - 1
    v = np.clip(v, 0, 255)
    for part, limits in zip(EVERYTHING.maps, EVERYTHING.limits[1:]):
        means = v.mean((1, 2))
        constant = part[:, 3:6] @ means + part[:, 6]
        v = np.clip(np.einsum("ij,jyx->iyx", part[:, :3], v) + constant[:, None, None], *limits)
    for axis, sigma in ((1, 0.8), (2, 0.6)):
        around = {"axis": axis, "mode": "constant", "radius": int(np.ceil(3 * sigma))}
        v = gaussian_filter1d(v, sigma, **around) / gaussian_filter1d(np.ones_like(v), sigma, **around)
    v = ((v - v.min()) / (v.max() - v.min())) ** 1.2 * (v.max() - v.min()) + v.min()
    np.testing.assert_allclose(apply(image, quiet)[0].numpy(), v, atol=2e-3)


def test_blur_agrees_with_pillow_away_from_the_border() -> None:
    """Pillow's filter is three box blurs on bytes, so on smooth pictures only."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3)).astype(np.uint8)).resize(
        (96, 96), Image.Resampling.BICUBIC
    )
    expected = np.asarray(coarse.filter(ImageFilter.GaussianBlur(1.0)), dtype=np.float32)
    values = torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(coarse), -1, 0)))[None]
    found = apply(values, Adjustment(blur=np.float32([1, 1])))[0].permute(1, 2, 0).numpy()
    off = np.abs(found - expected)[4:-4, 4:-4]
    assert off.max() < 3
    assert off.mean() < 0.8


def test_what_is_invalid_changes_nothing_that_is_valid() -> None:
    image = pictures(2).to(torch.float32)
    valid = torch.ones(2, 1, 16, 16, dtype=torch.bool)
    valid[0, :, 3:7, 4:9] = False
    quiet = replace(EVERYTHING, noise=None, seed=None)
    found = apply(image, quiet, quiet, valid=valid)
    assert found.isfinite().all()
    for wild in (1e6, float("nan")):
        other = torch.where(valid, image, wild)
        again = apply(other, quiet, quiet, valid=valid)
        assert torch.equal(again[valid.expand_as(again)], found[valid.expand_as(found)])
    # All valid and no validity are the same.
    torch.testing.assert_close(found[1:], apply(image[1:], quiet), atol=1e-3, rtol=0)


def test_a_row_does_not_depend_on_its_batch_and_neutral_rows_keep_their_values() -> None:
    image = pictures(4)
    strong = replace(EVERYTHING, blur=np.float32([1.4, 0]), seed=9, gamma=0.8)
    together = apply(image, EVERYTHING, None, strong, Adjustment(blur=np.float32([0, 2.5])))
    assert torch.equal(together[1], image[1].float())
    for row, alone in ((0, EVERYTHING), (2, strong), (3, Adjustment(blur=np.float32([0, 2.5])))):
        torch.testing.assert_close(together[row], apply(image[row : row + 1], alone)[0], atol=1e-4, rtol=0)
    assert float((together[0] - image[0]).abs().max()) > 1


def test_the_result_is_float32_whatever_autocast_says_and_the_input_is_left_alone() -> None:
    image = pictures(2).to(torch.float32)
    before = image.clone()
    expected = apply(image, EVERYTHING, EVERYTHING)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = apply(image, EVERYTHING, EVERYTHING)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert torch.equal(image, before)


def test_noise_is_a_function_of_its_seed_and_leaves_the_global_generator_alone() -> None:
    image, state = pictures(3), torch.get_rng_state()
    loud = Adjustment(noise=np.float32([3, 0, 3]), seed=7)
    found = apply(image, loud, loud, replace(loud, seed=8)) - image
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=0)
    assert float((found[0] - found[2]).abs().max()) > 1
    assert not found[:, 1].any()
    assert float(found[:, ::2].std()) == pytest.approx(3, rel=0.1)
    assert torch.equal(torch.get_rng_state(), state)


def test_rows_are_taken_and_joined_with_their_adjustments_which_stay_on_the_host() -> None:
    view = View(pictures(3), adjust=stacked([EVERYTHING, None, replace(EVERYTHING, gamma=0.5)]))
    expected = adjusted(view).pixels
    torch.testing.assert_close(adjusted(view[1:]).pixels, expected[1:], atol=1e-4, rtol=0)
    torch.testing.assert_close(adjusted(View.cat([view[:1], view[1:]])).pixels, expected, atol=1e-4, rtol=0)
    assert adjusted(view).adjust is None
    assert view.to("meta").adjust is view.adjust
    assert view.to("meta").pixels.is_meta
    with pytest.raises(ValueError, match="different adjustments"):
        View.cat([view, View(pictures(1))])


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"noise": np.ones(3)}, "seed"),
        ({"blur": np.ones((1, 2))}, "'blur' has shape"),
        ({"maps": np.ones((1, 3, 4))}, r"\(K, C, 2C \+ 1\)"),
        ({"limits": np.ones((2, 2))}, "a pair more"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Adjustment(**parts)


def test_samples_whose_parts_differ_in_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="'blur' has different shapes"):
        stacked([Adjustment(blur=np.zeros(2)), Adjustment(blur=np.zeros(3))])
    assert stacked([None, None]) is None


class Reader:
    def read(self, window: Window) -> ArraySample:
        return ArraySample(pictures(1, 24, int(window.position[0]))[0].numpy())


class Jitter:
    """Adjusts some of the samples."""

    def before_crop(self, sample: Sample, strength: str, generator: np.random.Generator) -> Sample:
        return sample

    def after_crop(
        self, sample: ArraySample, strength: str, second: bool, generator: np.random.Generator
    ) -> ArraySample:
        if strength != "strong" or generator.random() < 0.3:
            return sample
        changes = {"gamma": float(generator.uniform(0.5, 2)), "seed": int(generator.integers(2**60))}
        return sample.replace(adjust=replace(EVERYTHING, **changes))


def dataset() -> WindowDataset:
    index = SampleIndex.from_windows(Window("/s", "g", (float(i), 0.0), (24.0, 24.0)) for i in range(9))
    requests = [ViewRequest("a", (16, 16), 2, (0.3, 1.0), augment="strong"), ViewRequest("plain", (16, 16))]
    return WindowDataset(index, Reader(), ViewPipeline(requests, Jitter(), None, ("y", "x"), 3), 3)


def test_workers_and_the_first_step_change_nothing_and_pixels_travel_as_bytes() -> None:
    stream, normalise = SampleStream(9, 4, seed=3), Normalize(SPEC)
    batches = {key: list(make_loader(dataset(), stream, key[0], 3, key[1])) for key in ((0, 0), (0, 2), (1, 0))}
    for batch in batches[0, 0]:
        assert {view.pixels.dtype for group in batch.views.values() for view in group} == {torch.uint8}
        assert batch.views["plain"][0].adjust is None
        assert any(view.adjust is not None for view in batch.views["a"])
    for other, first in ((batches[0, 2], 0), (batches[1, 0], 1)):
        for one, two in zip(batches[0, 0][first:], other, strict=True):
            for a, b in zip(one.views["a"], two.views["a"], strict=True):
                assert torch.equal(normalise.view(a).pixels, normalise.view(b).pixels)


def test_pages_show_adjusted_views(tmp_path) -> None:
    data = dataset()
    batch = collate([data[SampleKey(0, row)] for row in range(4)])
    shown: list[np.ndarray] = []

    def to_rgb(values: np.ndarray) -> np.ndarray:
        shown.append(values)
        return np.moveaxis(np.clip(values, 0, 255).astype(np.uint8), 0, -1)

    draw_views(batch, None, to_rgb, tmp_path / "views.png")
    expected = [adjusted(view).pixels[row] for row in range(4) for view in [*batch.views["a"], *batch.views["plain"]]]
    assert len(shown) == len(expected)
    assert all(np.array_equal(a, b.numpy()) for a, b in zip(shown, expected, strict=True))


def test_a_bag_of_vectors_cannot_be_adjusted() -> None:
    pipeline = ViewPipeline([ViewRequest("bag", (), augment="strong")], Jitter(), None, ("x",), 3)
    bag, drawn = ArraySample(np.zeros((5, 4), np.float32)), 0
    for row in range(9):
        try:
            pipeline(bag, SampleKey(0, row))
        except ValueError as error:
            assert "bag of vectors" in str(error)  # noqa: PT017 - only some draws adjust
            drawn += 1
    assert 3 <= drawn < 9


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_numbers() -> None:
    quiet = replace(EVERYTHING, noise=None, seed=None)
    view = View(pictures(3), adjust=stacked([quiet, None, quiet]))
    torch.testing.assert_close(adjusted(view.to("cuda")).pixels.cpu(), adjusted(view).pixels, atol=2e-3, rtol=1e-5)
