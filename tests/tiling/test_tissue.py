"""The tissue mask on pictures whose answer is known, and on real tiles."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from fmsuite.tiling.tissue import TissueConfig, find_tissue, glass_colour

MPP = (8.0, 8.0)
EOSIN = (215, 140, 180)
HAEMATOXYLIN = (110, 80, 140)
INKS = {"blue": (40, 60, 180), "green": (30, 140, 90), "red": (215, 30, 45), "black": (25, 25, 28)}


def slide(glass: tuple[int, int, int] = (242, 242, 242), seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A round piece of stained tissue with dark nuclei on noisy glass, and where it is."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:160, 0:200]
    tissue = np.hypot(y - 80, (x - 110) * 0.9) < 50
    picture = np.empty((160, 200, 3))
    picture[...] = glass
    picture[tissue] = EOSIN
    picture[tissue & (rng.random(tissue.shape) < 0.3)] = HAEMATOXYLIN
    picture += rng.normal(0, 2, picture.shape)
    return np.clip(picture, 0, 255).astype(np.uint8), tissue


def overlap(found: np.ndarray, truth: np.ndarray) -> float:
    return float((found & truth).sum() / (found | truth).sum())


@pytest.mark.parametrize("glass", [(255, 255, 255), (242, 242, 242), (200, 202, 198), (165, 165, 168), (246, 243, 236)])
def test_tissue_is_found_on_white_grey_and_tinted_glass(glass: tuple[int, int, int]) -> None:
    picture, truth = slide(glass)
    found = find_tissue(picture, MPP)
    assert found
    assert overlap(found.mask, truth) > 0.93
    assert np.abs(found.background - glass).max() <= 3


@pytest.mark.parametrize("quality", [20, 50, 85])
def test_jpeg_noise_makes_neither_specks_nor_holes(quality: int) -> None:
    picture, truth = slide()
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=quality)
    found = find_tissue(np.asarray(Image.open(buffer)), MPP)
    assert overlap(found.mask, truth) > 0.9
    assert ndimage.label(found.mask)[1] == 1


@pytest.mark.parametrize("ink", sorted(INKS))
def test_marker_beside_tissue_is_left_out(ink: str) -> None:
    picture, truth = slide()
    picture[10:150, 8:28] = INKS[ink]
    found = find_tissue(picture, MPP)
    assert not found.mask[:, :40].any()
    assert overlap(found.mask, truth) > 0.93
    assert found.shares["dark" if ink == "black" else "ink"] > 0.05


@pytest.mark.parametrize("ink", ["blue", "green", "red"])
def test_soft_edges_of_a_stroke_are_ink_too(ink: str) -> None:
    picture, _ = slide()
    veil = np.zeros((160, 200))
    veil[20:140, 10:30] = 1
    veil = ndimage.gaussian_filter(veil, 2.5)[..., None]
    picture = (picture * (1 - veil) + np.asarray(INKS[ink]) * veil).astype(np.uint8)
    assert not find_tissue(picture, MPP).mask[:, :45].any()


def test_the_filter_can_be_switched_off() -> None:
    picture, _ = slide()
    picture[10:150, 8:28] = INKS["blue"]
    assert find_tissue(picture, MPP, config=TissueConfig(artefacts=False)).mask[80, 18]


def test_dark_borders_and_black_padding_are_no_tissue() -> None:
    picture, truth = slide()
    picture[:12] = 0
    picture[-10:] = (18, 16, 20)
    found = find_tissue(picture, MPP)
    assert not found.mask[:12].any()
    assert not found.mask[-10:].any()
    assert found.shares["outside"] == pytest.approx(12 / 160)
    assert overlap(found.mask, truth) > 0.9


def test_what_was_not_scanned_is_no_tissue_whatever_its_colour() -> None:
    picture, truth = slide()
    valid = np.ones(truth.shape, bool)
    valid[:, 120:] = False
    picture[:, 120:] = EOSIN
    found = find_tissue(picture, MPP, valid)
    assert not found.mask[:, 120:].any()
    assert found.mask[80, 100]


def test_small_specks_go_and_small_holes_are_filled_by_physical_size() -> None:
    picture, truth = slide()
    picture[20:28, 20:28] = EOSIN  # 64 um square: 4096 um^2
    picture[76:84, 106:114] = (242, 242, 242)
    coarse = find_tissue(picture, MPP)
    assert not coarse.mask[:40, :40].any()
    assert coarse.mask[80, 110]
    # Read as four times coarser, the same speck is 65,536 um^2, and the hole is as large.
    large = find_tissue(picture, (32.0, 32.0), config=TissueConfig(smoothing=0))
    assert large.mask[24, 24]
    assert not large.mask[80, 110]
    assert truth[80, 110]


def test_an_empty_slide_says_why() -> None:
    rng = np.random.default_rng(0)
    glass = np.clip(rng.normal(240, 2, (100, 100, 3)), 0, 255).astype(np.uint8)
    found = find_tissue(glass, MPP)
    assert not found
    assert "nothing is more coloured than glass" in found.reason
    assert not found.mask.any()


def test_a_filter_that_removes_everything_says_so_and_names_its_switch() -> None:
    picture = np.full((100, 100, 3), 242, np.uint8)
    picture[30:70, 30:70] = INKS["green"]
    found = find_tissue(picture, MPP)
    assert not found
    assert "ink" in found.reason
    assert "tissue.artefacts=false" in found.reason


def test_only_specks_and_nothing_scanned_are_told_apart() -> None:
    picture = np.full((100, 100, 3), 242, np.uint8)
    picture[30:36, 30:36] = EOSIN
    assert "tissue.min_area" in find_tissue(picture, MPP).reason
    assert "nothing on this slide was scanned" in find_tissue(picture, MPP, np.zeros((100, 100), bool)).reason


def test_a_picture_full_of_tissue_is_all_tissue() -> None:
    rng = np.random.default_rng(1)
    picture = np.where(rng.random((80, 80, 1)) < 0.3, HAEMATOXYLIN, EOSIN).astype(np.uint8)
    assert find_tissue(picture, MPP).mask.all()
    assert glass_colour(picture).tolist() == [245, 245, 245]


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="uint8"):
        find_tissue(np.zeros((4, 4, 3), np.float32), MPP)
    with pytest.raises(ValueError, match="valid has shape"):
        find_tissue(np.zeros((4, 4, 3), np.uint8), MPP, np.ones((3, 4), bool))
    with pytest.raises(ValueError, match="not possible"):
        find_tissue(np.zeros((4, 4, 3), np.uint8), (0.0, 8.0))


REAL = TissueConfig(min_area=2000, max_hole=2000)
"""The tiles are 512 px of levels 0 to 2: areas scaled to their field of view, 1 um a pixel assumed."""


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("almost-white-1", 0, 0),
        ("almost-white-2", 0.005, 0.05),
        ("no-tissue", 0, 0),
        ("no-tissue2", 0, 0),
        ("no-tissue-line", 0, 0),
        ("no-tissue-green-pen", 0, 0),
        ("no-tissue-red-pen", 0, 0.02),
        ("high-nuclei-score-level0", 0.95, 1),
        ("high-nuclei-score-level2", 0.1, 0.25),
        ("very-low-nuclei-score-level0", 0.98, 1),
        ("medium-nuclei-score-level2", 0.7, 0.9),
        ("tissue-level2-3000-7666-7096-11763", 0.6, 0.85),
        ("liver-level2-10907-7808-11707-8608", 0.98, 1),
        ("liver-level2-38626-13514-39426-14315", 0, 0),
    ],
)
def test_real_tiles(real_data: Path, name: str, low: float, high: float) -> None:
    with Image.open(real_data / "pathology" / "histolab_tiles" / f"{name}.png") as image:
        picture = np.asarray(image.convert("RGB"))
    assert low <= find_tissue(picture, (1.0, 1.0), config=REAL).shares["tissue"] <= high


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("name", "inked", "clean"),
    [
        ("high-nuclei-score-red-pen-level1", (slice(60, 200), slice(260, 310)), (slice(350, 500), slice(50, 400))),
        ("medium-nuclei-score-green-pen-level1", (slice(50, 180), slice(300, 500)), (slice(350, 500), slice(350, 500))),
    ],
)
def test_ink_over_real_tissue_is_cut_out_and_the_rest_stays(
    real_data: Path, name: str, inked: tuple[slice, slice], clean: tuple[slice, slice]
) -> None:
    with Image.open(real_data / "pathology" / "histolab_tiles" / f"{name}.png") as image:
        picture = np.asarray(image.convert("RGB"))
    found = find_tissue(picture, (1.0, 1.0), config=REAL)
    assert found.mask[inked].mean() < 0.1
    assert found.mask[clean].mean() > 0.85
