"""What a prototype classifier saw on a slide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

from fmsuite.core.data.index import SampleIndex, Window
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.reports.evidence import LONGEST, Judged, class_margins, slide_evidence
from fmsuite.core.reports.exhibits import Evidence
from fmsuite.core.reports.heatmap import diverging, scale_bar
from fmsuite.errors import FmsuiteError, ReadFailure, UsageError

CLASSES = ["benign", "tumour"]


@dataclass(frozen=True)
class White:
    """An overview of 4 by 8 windows of 50 units, at 10 units a pixel."""

    rgb: np.ndarray
    origin: tuple[float, float] = (1000.0, 0.0)
    pitch: tuple[float, float] = (10.0, 10.0)


def overview(source: str) -> White:
    if source == "gone.tif":
        raise ReadFailure(source, "open", "the file is gone.")
    return White(np.full((20, 40, 3), 255, np.uint8))


def squares(rows: Sequence[int]) -> dict[int, Image.Image]:
    return {row: Image.new("RGB", (4, 4), (row, 0, 0)) for row in rows if row != 3}


def cohort(sources: Sequence[str] = ("a.tif", "b.tif"), windows: int = 32) -> tuple[SampleIndex, list[Judged]]:
    """Slides of ``windows`` windows side by side, eight in a row; the left half of each lies nearer to tumour."""
    rows, judged = [], []
    rng = np.random.default_rng(2)
    for number, source in enumerate(sources):
        start = len(rows)
        places = [(1000 + 50 * (k // 8), 50 * (k % 8)) for k in range(windows)]
        rows += [Window(source, source, place, (50, 50), (0.5, 0.5)) for place in places]
        left = np.array([place[1] < 200 for place in places])
        distances = 1 + 0.05 * rng.random((windows, 2))
        distances[:, 1] += np.where(left, -0.5, 0.5)
        judged.append(Judged(f"slide {number}", start + np.arange(windows), distances, number % 2, 1, [0.4, 0.6]))
    return SampleIndex.from_windows(rows), judged


def shown(index: SampleIndex, judged: list[Judged], notes: list[str], **changes: object) -> list[Evidence]:
    arguments = {
        "classes": CLASSES,
        "pictures": squares,
        "overview": overview,
        "encoder": "vit",
        "method": "mi_simpleshot",
        "unit": "um",
        "skipped": SkippedLog(),
        "notes": notes,
    }
    return slide_evidence(judged, index, **{**arguments, **changes})


def test_windows_nearest_to_each_prototype_come_first() -> None:
    index, judged = cohort()
    notes: list[str] = []
    for evidence in shown(index, judged, notes, top=4):
        one = judged[int(evidence.item[-1])]
        assert list(evidence.top) == CLASSES
        for code, name in enumerate(CLASSES):
            order = sorted(range(32), key=lambda place, c=code, one=one: one.distances[place, c])[:4]
            expected = [int(one.rows[place]) for place in order if one.rows[place] != 3]
            assert [picture.image.getpixel((0, 0))[0] for picture in evidence.top[name]] == expected
            assert f"{one.distances[order[-1], code]:.3f}" in evidence.top[name][-1].caption
    assert notes == []


def test_the_heatmap_colours_each_half_by_its_class() -> None:
    index, judged = cohort()
    found = shown(index, judged, [])
    for evidence in found:
        page = np.asarray(evidence.heatmap.image).astype(int)
        assert page.shape[1] == LONGEST
        left, right = page[: LONGEST // 2, : LONGEST // 2], page[: LONGEST // 2, LONGEST // 2 :]
        assert (left[..., 0] > left[..., 2] + 30).all()
        assert (right[..., 2] > right[..., 0] + 30).all()
        assert "50% of 32 windows nearer to tumour" in evidence.heatmap.caption
        assert "blue (nearer to benign)" in evidence.heatmap.alt
        assert evidence.heatmap.label == evidence.true
        # 40 pixels of 10 units of 0.5 um became LONGEST.
        bar = (page[LONGEST // 2 :, 400:] == 30).all(axis=2).sum(axis=1).max()
        assert bar == scale_bar(0.5 * 10 * 40 / LONGEST, "um", 120)[0]
    assert {evidence.item for evidence in found} == {"slide 0", "slide 1"}
    assert found[0].scores == [0.4, 0.6]


def test_colours_mean_the_same_on_every_slide() -> None:
    index, judged = cohort()
    judged[1] = Judged("slide 1", judged[1].rows, 1 + (judged[1].distances - 1) * 0.1, 1, 1, [0.4, 0.6])
    strong, weak = (
        next(evidence for evidence in shown(index, judged, []) if evidence.item == item)
        for item in ("slide 0", "slide 1")
    )
    tints = [np.ptp(np.asarray(one.heatmap.image)[10, 10].astype(int)) for one in (strong, weak)]
    assert tints[0] > 5 * tints[1]
    assert np.ptp(diverging(np.array(1.0))) > tints[0]


def test_slides_come_from_every_class_right_and_wrong() -> None:
    index, judged = cohort([f"{n}.tif" for n in range(12)], windows=2)
    found = shown(index, judged, [], limit=4)
    assert [(one.true, one.predicted) for one in found] == [(0, 1), (1, 1), (0, 1), (1, 1)]
    assert len({one.item for one in found}) == 4
    assert [one.item for one in found] == [one.item for one in shown(index, judged, [], limit=4)]


def test_margins_of_two_classes_do_not_depend_on_the_prediction() -> None:
    distances = np.array([[1.0, 3.0], [2.0, 0.5]])
    for predicted in (0, 1):
        margins = class_margins(distances, predicted, CLASSES)
        assert margins.values.tolist() == [-2, 1.5]
        assert margins.ends == ("nearer to benign", "nearer to tumour")


def test_margins_of_more_classes_set_the_predicted_one_against_the_best_other() -> None:
    distances = np.array([[1.0, 3.0, 2.0], [2.0, 0.5, 0.7]])
    margins = class_margins(distances, 2, ["a", "b", "c"])
    assert margins.values == pytest.approx([-1, -0.2])
    assert margins.ends == ("nearer to another", "nearer to c")
    with pytest.raises(UsageError, match="only one"):
        class_margins(distances[:, :1], 0, ["a"])


def test_single_windows_have_no_heatmap() -> None:
    index, judged = cohort(windows=1)
    [first, second] = shown(index, judged, [])
    assert first.heatmap is second.heatmap is None
    assert len(first.top["benign"]) == 1


def test_the_source_with_most_windows_stands_for_a_patient_with_several() -> None:
    index, (first, second) = cohort()
    both = Judged(
        "patient",
        np.concatenate([first.rows[:5], second.rows]),
        np.concatenate([first.distances[:5], second.distances]),
        0,
        0,
        [0.6, 0.4],
    )
    [evidence] = shown(index, [both], [])
    assert evidence.heatmap.caption.startswith("patient (one of its 2 files): 50% of 32 windows")


def test_slides_that_are_gone_or_cannot_be_drawn_are_noted() -> None:
    index, judged = cohort(["a.tif", "gone.tif"])
    notes: list[str] = []
    skipped = SkippedLog()
    found = {one.item: one for one in shown(index, judged, notes, skipped=skipped)}
    assert found["slide 1"].heatmap is None
    assert found["slide 0"].heatmap is not None
    assert [entry.path for entry in skipped.entries] == ["gone.tif"]
    assert notes == ["slide 1: no heatmap, because gone.tif can no longer be read."]
    with pytest.raises(FmsuiteError, match="file is gone"):
        shown(index, judged, notes, skipped=SkippedLog(strict=True))

    def none(source: str) -> White:
        raise UsageError("The domain 'spectra' draws no overview of a source.")

    notes.clear()
    assert all(one.heatmap is None for one in shown(index, judged, notes, overview=none))
    assert notes == ["No heatmaps: The domain 'spectra' draws no overview of a source."]


def test_no_slide_asked_is_noted() -> None:
    index, _ = cohort()
    notes: list[str] = []
    assert shown(index, [], notes) == []
    assert "nothing was asked" in notes[0]


def test_equal_distances_are_drawn_neutral() -> None:
    index, judged = cohort(["a.tif"])
    [evidence] = shown(index, [Judged("s", judged[0].rows, np.ones((32, 2)), 0, 0, [0.5, 0.5])], [])
    assert np.ptp(np.asarray(evidence.heatmap.image)[5, 5].astype(int)) <= 2
