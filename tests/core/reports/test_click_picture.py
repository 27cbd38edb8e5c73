"""Pictures of clicks: marks lie where the click is, colour where the scores are high."""

from __future__ import annotations

import numpy as np
import pytest

from fmsuite.core.reports.click_picture import FOOT, GAP, SIDE, click_picture


def orange(picture: np.ndarray) -> np.ndarray:
    """How much redder than blue each pixel is."""
    return picture[..., 0].astype(int) - picture[..., 2]


@pytest.mark.parametrize("colour", [False, True])
def test_a_plane_has_its_first_row_on_top(colour: bool) -> None:
    image = np.full((20, 30, 3), 90, np.uint8) if colour else np.random.default_rng(0).normal(size=(20, 30))
    scores = np.zeros((20, 30))
    scores[:10, 20:] = 1
    scores[0, 0] = np.nan

    picture = np.asarray(click_picture(image, scores, [(4, 25)], [(15, 5)], (1.0, 1.0)))

    assert picture.shape == (2 * 200 + GAP + FOOT, SIDE, 3)
    above, below = picture[:200], picture[200 + GAP : 400 + GAP]
    # A cross leaves its middle free and a ring as well; ten pixels to a sample.
    assert (above[45, 255 + 8] == 255).all()
    assert (above[155, 55 + 7] >= 200).any()
    assert abs(orange(above)).max() == 0
    assert orange(below)[60:99, 205:299].min() > 30
    assert abs(orange(below)[110:]).max() == 0
    assert abs(orange(below)[:9, :9]).max() == 0


def test_a_volume_is_cut_through_the_first_click_with_its_second_axis_up() -> None:
    scores = np.zeros((6, 12, 8))
    scores[5, 11, 7] = 1
    picture = np.asarray(click_picture(scores * 0.0, scores, [(5, 11, 7), (0, 0, 0)], [], (2.0, 1.0, 1.0)))

    # Lengths are 12, 12 and 8: axial 8 x 12, coronal 8 x 12, sagittal 12 x 12 units of 25 pixels.
    assert picture.shape == (2 * 300 + GAP + FOOT, 200 + 200 + 300 + 2 * GAP, 3)
    below = picture[300 + GAP :]
    for left, width, height in ((0, 200, 25), (206, 200, 50), (412, 300, 50)):
        part = orange(below[:300, left : left + width])
        assert part[2 : height - 2, width - 22 : width - 2].max() > 100
        assert abs(part[height + 2 :]).max() == 0
        assert abs(part[:, : width - 28]).max() == 0


def test_scores_that_are_not_known_anywhere_leave_the_image_as_it_is() -> None:
    picture = np.asarray(click_picture(np.eye(8), np.full((8, 8), np.nan), [(1, 1)], [], (1.0, 1.0)))

    assert abs(orange(picture)).max() == 0
