"""Case panels: the regions drawn are the labels, to the sample; slices go through what is labelled."""

from __future__ import annotations

import base64
import io
import math
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fmsuite.core.reports.case_slices import CaseSlices, grey
from fmsuite.core.reports.outlines import loops, outline_path
from fmsuite.core.reports.volume_panels import CasePanel, case_panel, draw_case
from fmsuite.errors import UsageError

NAMES = ("background", "front", "back")


def filled(polygons: list[list[tuple[int, int]]], shape: tuple[int, ...]) -> np.ndarray:
    """Even-odd rule at the samples' centres: how many edges a ray to the right crosses."""
    inside = np.zeros(shape, bool)
    for row, column in np.ndindex(*shape):
        crossed = 0
        for corners in polygons:
            for (top, x), (bottom, other) in zip(corners, corners[1:] + corners[:1], strict=True):
                crossed += x == other and min(top, bottom) <= row < max(top, bottom) and x > column
        inside[row, column] = crossed % 2 == 1
    return inside


def test_outlines_enclose_exactly_the_region() -> None:
    stream = np.random.default_rng(0)
    for share in (0.15, 0.5, 0.8, 1.0):
        mask = stream.random((7, 9)) < share
        polygons = loops(mask)
        assert (filled(polygons, mask.shape) == mask).all()
        for corners in polygons:
            steps = [np.subtract(b, a) for a, b in zip(corners, corners[1:] + corners[:1], strict=True)]
            assert all((a == 0).sum() == 1 and a @ b == 0 for a, b in zip(steps, steps[1:] + steps[:1], strict=True))


def test_samples_that_meet_at_a_corner_have_outlines_of_their_own() -> None:
    assert sorted(map(len, loops(np.eye(3, dtype=bool)))) == [4, 4, 4]
    assert outline_path(np.zeros((4, 4), bool)) == ""
    assert outline_path(np.array([[False, True]]), (2.0, 3.0)) in {
        "M3,0H6V2H3Z", "M6,0V2H3V0Z", "M6,2H3V0H6Z", "M3,2V0H6V2Z"
    }  # fmt: skip


def volume() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    image = np.random.default_rng(1).normal(40, 10, (6, 8, 10))
    truth = np.zeros(image.shape, int)
    # Two blocks far apart: their common centre of mass lies in neither.
    truth[1:3, 1:3, 1:4] = 1
    truth[4, 6, 8] = 2
    prediction = np.roll(truth, 1, axis=2)
    return image, truth, prediction


def test_slices_cut_what_is_labelled_with_the_second_axis_up() -> None:
    image, truth, prediction = volume()
    slices = CaseSlices.of(image, truth, prediction, (3.0, 2.0, 1.0), 3).slices

    places = [shown.place for shown in slices]
    assert all(place is not None for place in places)
    z, y, x = (place[0] for place in places if place is not None)
    assert truth[z, y, x] > 0
    axial, coronal, sagittal = slices
    assert axial.truth is not None
    assert (axial.truth == truth[z, ::-1]).all()
    assert (coronal.prediction == prediction[::-1, y]).all()
    assert (sagittal.image == grey(image)[::-1, :, x]).all()
    assert (axial.pitch, coronal.pitch, sagittal.pitch) == ((2.0, 1.0), (3.0, 1.0), (3.0, 2.0))


def test_dice_is_of_the_whole_case_and_leaves_out_what_is_not_known() -> None:
    image, truth, prediction = volume()
    truth[:, :, 4] = -1
    dice = CaseSlices.of(image, truth, prediction, (1, 1, 1), 4).dice

    # 2*2*3 voxels; moved by one, 2*2*1 of the prediction fall where nothing is known.
    assert dice[1] == pytest.approx(2 * 8 / (12 + 8))
    assert dice[2] == 0
    assert math.isnan(dice[3])
    assert CaseSlices.of(image, None, prediction, (1, 1, 1), 3).dice == []


def test_without_labels_the_middle_is_shown_and_large_pictures_are_thinned() -> None:
    empty = np.zeros((5, 6, 800), np.uint8)
    slices = CaseSlices.of(empty + 0.0, None, empty, (1, 1, 0.5), 2).slices

    assert [shown.place for shown in slices] == [(2, 5), (3, 6), (400, 800)]
    assert slices[0].image.shape == (2, 267)
    assert slices[0].pitch == (3.0, 1.5)
    assert not slices[0].image.any()


def test_grey_values_span_the_percentiles_of_what_is_finite() -> None:
    values = np.concatenate([np.arange(1000.0), [np.nan, np.inf, -np.inf]])
    low, high = np.percentile(values[:1000], (0.5, 99.5))
    shades = grey(values)

    assert shades[0] == 0
    assert shades[999] == 255
    assert shades[1000] == 0
    assert abs(int(shades[500]) - 255 * (500 - low) / (high - low)) <= 0.5
    assert not grey(np.full(4, 3.0)).any()
    assert not grey(np.full(4, np.nan)).any()


def test_slices_survive_a_file(tmp_path: Path) -> None:
    image, truth, prediction = volume()
    for known in (truth, None):
        slices = CaseSlices.of(image, known, prediction, (3.0, 2.0, 1.0), 3)
        slices.save(tmp_path / "case.npz")
        again = CaseSlices.load(tmp_path / "case.npz")
        assert again.dice == slices.dice
        for one, other in zip(again.slices, slices.slices, strict=True):
            assert (one.name, one.pitch, one.place) == (other.name, other.pitch, other.place)
            assert (one.image == other.image).all()
            assert (one.prediction == other.prediction).all()
            assert (one.truth is None) == (other.truth is None)

    (tmp_path / "case.npz").write_bytes((tmp_path / "case.npz").read_bytes()[:200])
    with pytest.raises(UsageError, match="cannot be read"):
        CaseSlices.load(tmp_path / "case.npz")


def pictures(panel: CasePanel) -> list[np.ndarray]:
    found = re.findall(r"base64,([^\"]+)", "".join(svg for row in panel.rows for _, svg in row.panels))
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(each)))) for each in found]


def test_a_panel_shows_both_maps_on_one_copy_of_the_picture_and_says_the_scores() -> None:
    image, truth, prediction = volume()
    panel = case_panel(image, truth, prediction, (3, 2, 1), NAMES, caption="case <7>", orientation="RAS")

    assert [row.heading.partition(" (")[2] for row in panel.rows] == [
        "A up, R right)", "S up, R right)", "S up, A right)"
    ]  # fmt: skip
    assert [name for row in panel.rows for name, _ in row.panels] == ["truth", "prediction"] * 3
    assert [shown.shape for shown in pictures(panel)] == [(8, 10), (6, 10), (6, 8)]
    true, said = (svg for _, svg in panel.rows[0].panels)
    assert "case &lt;7&gt;" in true
    assert "front 0.667" in said
    assert "truth-over" in said
    assert "truth-over" not in true
    assert [(name, dice) for _, name, dice in panel.legend] == [("front", "0.667"), ("back", "0.000")]
    boxes = {match[1] for row in panel.rows for _, svg in row.panels if (match := re.search(r'viewBox="([^"]+)"', svg))}
    assert boxes == {"0 0 355.56 400"}


def test_a_colour_picture_is_shown_as_it_is_and_unnamed_labels_are_not_drawn() -> None:
    rgb = np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    labels = np.zeros((5, 7), int)
    labels[1:3, 2:4], labels[4, 4] = 1, 9
    panel = case_panel(rgb, None, labels, (1, 1), NAMES)

    assert (pictures(panel)[0] == rgb).all()
    assert panel.rows[0].panels[0][1].count("<path") == 1
    assert not panel.dashed


def test_ids_are_unique_for_unique_keys() -> None:
    image, truth, prediction = volume()
    slices = CaseSlices.of(image, truth, prediction, (1, 1, 1), 3)
    drawn = [draw_case(slices, NAMES, key=key) for key in ("one", "two")]
    ids = re.findall(r' id="([^"]+)"', "".join(svg for panel in drawn for row in panel.rows for _, svg in row.panels))
    used = re.findall(
        r'href="#([^"]+)"', "".join(svg for panel in drawn for row in panel.rows for _, svg in row.panels)
    )

    assert len(ids) == len(set(ids))
    assert set(used) <= set(ids)


@pytest.mark.parametrize("shape", [(6, 8), (6, 8, 9), (1, 6, 8, 10)])
def test_shapes_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        CaseSlices.of(np.zeros(shape), None, np.zeros((6, 8, 10), int), (1, 1, 1), 2)
