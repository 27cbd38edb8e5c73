"""Values of windows as colours over a picture."""

from __future__ import annotations

import numpy as np
import pytest

from fmsuite.core.reports.heatmap import (
    HIGH_COLOUR,
    LOW_COLOUR,
    NEUTRAL,
    diverging,
    heatmap,
    oklab_to_srgb,
    scale_bar,
    window_means,
    with_legend,
)


def by_hand(
    shape: tuple[int, int],
    origin: tuple[float, float],
    pitch: tuple[float, float],
    positions: np.ndarray,
    extents: np.ndarray,
    values: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Every pixel against every window: the area that they share."""
    mean, covered = np.zeros(shape), np.zeros(shape)
    for row in range(shape[0]):
        for column in range(shape[1]):
            area = total = 0.0
            for position, extent, value in zip(positions, extents, values, strict=True):
                share = 1.0
                for axis, place in enumerate((row, column)):
                    low, high = origin[axis] + place * pitch[axis], origin[axis] + (place + 1) * pitch[axis]
                    inside = min(high, position[axis] + extent[axis]) - max(low, position[axis])
                    share *= max(0.0, inside) / pitch[axis]
                area += share
                total += share * value
            mean[row, column] = total / area if area else 0
            covered[row, column] = min(1, area)
    return mean, covered


@pytest.mark.parametrize("seed", range(6))
def test_pixels_show_the_area_weighted_mean_of_the_windows_over_them(seed: int) -> None:
    rng = np.random.default_rng(seed)
    origin, pitch = tuple(rng.uniform(-50, 50, 2)), tuple(rng.uniform(2, 9, 2))
    positions = rng.uniform(-60, 120, (12, 2))
    extents = rng.uniform(0.5, 60, (12, 2))
    values = rng.normal(size=12)
    arguments = ((13, 17), origin, pitch, positions, extents, values)
    expected_mean, expected_covered = by_hand(*arguments)
    mean, covered = window_means(*arguments)
    assert covered == pytest.approx(expected_covered, abs=1e-9)
    assert mean == pytest.approx(expected_mean, abs=1e-6)


def test_a_window_covers_just_its_own_pixels() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (6, 8, 3)).astype(np.uint8)
    drawn = heatmap(rgb, (100, 200), (10, 5), np.array([[120, 210]]), (20, 15), np.array([1.0]), (-1, 1), opacity=1)
    orange = np.rint(oklab_to_srgb(np.array(HIGH_COLOUR)))
    inside = np.zeros((6, 8), bool)
    inside[2:4, 2:5] = True
    assert (drawn[inside] == orange).all()
    assert np.array_equal(drawn[~inside], rgb[~inside])


def test_values_beyond_the_limits_get_the_last_colours() -> None:
    rgb = np.zeros((1, 4, 3), np.uint8)
    positions = np.array([[0, column] for column in range(4)])
    drawn = heatmap(rgb, (0, 0), (1, 1), positions, (1, 1), np.array([-9, -2, 2, 5]), (-2, 2), opacity=1)
    low, high = (np.rint(oklab_to_srgb(np.array(colour))) for colour in (LOW_COLOUR, HIGH_COLOUR))
    assert np.array_equal(drawn[0], [low, low, high, high])


def test_overlapping_windows_are_averaged_whatever_their_order() -> None:
    rgb = np.full((4, 6, 3), 200, np.uint8)
    positions, values = np.array([[0, 0], [0, 2]]), np.array([1.0, -1.0])
    drawn = heatmap(rgb, (0, 0), (1, 1), positions, (4, 4), values, (-1, 1), opacity=1)
    assert np.array_equal(
        drawn, heatmap(rgb, (0, 0), (1, 1), positions[::-1], (4, 4), values[::-1], (-1, 1), opacity=1)
    )
    assert (drawn[:, 2:4] == np.rint(oklab_to_srgb(np.array(NEUTRAL)))).all()
    assert not np.array_equal(drawn[0, 0], drawn[0, 5])


def test_windows_smaller_than_a_pixel_are_seen() -> None:
    rgb = np.full((3, 3, 3), 255, np.uint8)
    drawn = heatmap(rgb, (0, 0), (10, 10), np.array([[12, 12]]), (5, 5), np.array([1.0]), (-1, 1))
    changed = (drawn != rgb).any(axis=2)
    assert changed.sum() == 1
    assert changed[1, 1]


def test_what_lies_outside_the_picture_changes_nothing() -> None:
    rgb = np.full((4, 4, 3), 77, np.uint8)
    positions = np.array([[-20, 0], [0, 40], [4, 4], [0, -3]])
    assert np.array_equal(heatmap(rgb, (0, 0), (1, 1), positions, (3, 3), np.ones(4), (-1, 1)), rgb)


def test_nothing_but_finite_values_and_ordered_limits() -> None:
    rgb = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match="not finite"):
        heatmap(rgb, (0, 0), (1, 1), np.zeros((1, 2)), (1, 1), np.array([np.nan]), (-1, 1))
    with pytest.raises(ValueError, match="order"):
        heatmap(rgb, (0, 0), (1, 1), np.zeros((1, 2)), (1, 1), np.array([0.0]), (1, 1))


def test_oklab_agrees_with_published_pairs() -> None:
    # White, and the primaries as Ottosson's page gives them to three decimals.
    pairs = {
        (1.000, 0.000, 0.000): (255, 255, 255),
        (0.628, 0.225, 0.126): (255, 0, 0),
        (0.866, -0.234, 0.179): (0, 255, 0),
        (0.452, -0.032, -0.312): (0, 0, 255),
    }
    for lab, srgb in pairs.items():
        assert oklab_to_srgb(np.array(lab)) == pytest.approx(srgb, abs=4)


def cielab(srgb: np.ndarray) -> np.ndarray:
    """(N, 3) sRGB from 0 to 255 to CIE L*a*b* under D65."""
    share = srgb / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    xyz = linear @ np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]).T
    f = np.cbrt(xyz / [0.9505, 1, 1.089])
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)


def test_the_colours_darken_evenly_to_both_sides() -> None:
    lab = cielab(diverging(np.linspace(0, 1, 21)))
    lightness = lab[:, 0]
    assert (np.diff(lightness[:11]) > 0).all()
    assert (np.diff(lightness[10:]) < 0).all()
    assert lightness == pytest.approx(lightness[::-1], abs=4)
    down = np.abs(np.diff(lightness))
    assert down.max() < 1.1 * down.min()
    steps = np.linalg.norm(np.diff(lab, axis=0), axis=1)
    assert steps.max() < 1.6 * steps.min()


@pytest.mark.parametrize(
    "deficiency",
    [
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    ],
    ids=["protanopia", "deuteranopia"],
)
def test_the_ends_are_told_apart_without_red_or_green_cones(deficiency: list[list[float]]) -> None:
    # Machado et al. 2009, severity 1, in linear sRGB.
    share = diverging(np.array([0.0, 1.0])) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.array(deficiency).T, 0, 1)
    srgb = 255 * np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055)
    low, high = cielab(srgb)
    assert np.linalg.norm(low - high) > 60


@pytest.mark.parametrize(
    ("pixel", "unit", "length", "text"),
    [(4.0, "um", 50, "200 um"), (30.0, "um", 67, "2 mm"), (10.0, "m", 100, "1 km"), (0.8, "mm", 62, "50 mm")],
)
def test_scale_bars_are_round_and_as_long_as_fits(pixel: float, unit: str, length: int, text: str) -> None:
    assert scale_bar(pixel, unit, 100) == (length, text)
    assert length <= 100 < length * 2.6


def test_the_legend_stands_below_the_picture_with_bar_and_scale() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (60, 500, 3)).astype(np.uint8)
    plain, scaled = (
        np.asarray(with_legend(rgb, (-2, 2), "Margin", ("nearer to a", "nearer to b"), pixel, "um"))
        for pixel in (None, 4.0)
    )
    assert np.array_equal(plain[:60, :500], rgb)
    assert plain.shape == scaled.shape
    for page, length in ((plain, 360), (scaled, 354)):
        rows = [row for row in page[60:] if (row[8] == np.rint(diverging(np.array([0.5 / length])))[0]).all()]
        assert len(rows) == 14
        assert (
            np.abs(rows[0][8 : 8 + length].astype(float) - diverging((np.arange(length) + 0.5) / length)).max() <= 0.5
        )
    bar = (scaled[60:, 380:] == 30).all(axis=2).sum(axis=1).max()
    assert (bar, "200 um") == scale_bar(4.0, "um", 120)
    assert (plain[60:, 380:] == 255).all()


def test_narrow_pictures_and_long_names_fit() -> None:
    rgb = np.zeros((30, 20, 3), np.uint8)
    page = with_legend(rgb, (-1, 1), "Марж " * 40, ("nearer to " + "x" * 200, "nearer to é"), 1.0, "m")
    assert page.width == 440
    assert (np.asarray(page)[:30, 20:] == 255).all()
    assert (np.asarray(page)[30:, -4:] == 255).all()
