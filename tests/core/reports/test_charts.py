"""Charts against coordinates worked out by hand, and their parts against other libraries."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from sklearn.isotonic import IsotonicRegression

from fmsuite.core.reports.charts import Cloud, Curve, feature_map, shot_curves, step_curves, swatch, thinned
from fmsuite.core.reports.svg import MARKS, Axis, mark_class, mark_path, plain, short, spread, tag, tick_text

SVG = "{http://www.w3.org/2000/svg}"


def parts(drawing: str, name: str, *classes: str) -> list[ElementTree.Element]:
    """Elements that carry all the classes."""
    found = ElementTree.fromstring(drawing).iter(SVG + name)
    return [element for element in found if set(classes) <= set(element.get("class", "").split())]


def corners(element: ElementTree.Element) -> list[tuple[float, float]]:
    """The points of path data made of M and L."""
    return [(float(x), float(y)) for x, y in re.findall(r"(-?[\d.]+),(-?[\d.]+)", element.get("d", ""))]


def test_points_of_a_curve_lie_where_arithmetic_puts_them() -> None:
    drawing = shot_curves("k", [Curve("a", [1, 2, 4], [0.5, 0.75, 1.0])], title="t", y_label="y", x_label="x")

    # 460 wide less 48 on the left and a label of one letter (7.4 + 18); 300 high less 34 above and 46 below.
    (line,) = parts(drawing, "path", "line")
    np.testing.assert_allclose(corners(line), [(48, 254), (241.3, 144), (434.6, 34)])


def test_a_band_runs_along_the_upper_bounds_and_back_along_the_lower() -> None:
    curve = Curve("a", [1, 2, 4], [0.6, 0.7, 0.8], low=[0.5, None, 0.7], high=[0.7, None, 1.0])
    drawing = shot_curves("k", [curve], title="t", y_label="y", x_label="x")

    (band,) = parts(drawing, "path", "band")
    np.testing.assert_allclose(corners(band), [(48, 166), (434.6, 34), (434.6, 166), (48, 254)])


def test_a_band_of_one_point_is_a_bar() -> None:
    drawing = shot_curves("k", [Curve("a", [4], [0.6], [0.5], [0.7])], title="t", y_label="y", x_label="x")

    assert not parts(drawing, "path", "band")
    (bar,) = parts(drawing, "path", "whisker")
    np.testing.assert_allclose(corners(bar), [(241.3, 254), (241.3, 34)])


def test_the_chance_line_lies_at_chance_and_is_named() -> None:
    drawing = shot_curves("k", [Curve("a", [1, 4], [0.5, 1.0])], title="t", y_label="y", x_label="x", chance=0.5)

    (chance,) = parts(drawing, "line", "chance")
    assert float(chance.get("y1", "nan")) == float(chance.get("y2", "nan")) == pytest.approx(254)
    assert [label[0].tail for label in parts(drawing, "text", "label")] == ["a", "chance"]


def test_controls_and_shuffled_labels_differ_by_more_than_colour() -> None:
    curves = [
        Curve("mine", [1, 2], [0.8, 0.9], [0.7, 0.8], [0.9, 1.0], mark=0),
        Curve("control", [1, 2], [0.6, 0.7], [0.5, 0.6], [0.7, 0.8], mark=1, look="control"),
        Curve("shuffled", [1, 2], [0.3, 0.3], [0.2, 0.2], [0.4, 0.4], mark=0, look="shuffled"),
    ]
    drawing = shot_curves("k", curves, title="t", y_label="y", x_label="x")

    assert len(parts(drawing, "path", "line", "control")) == len(parts(drawing, "path", "line", "shuffled")) == 1
    assert len(parts(drawing, "path", "solid")) == len(parts(drawing, "path", "hollow")) == 1
    assert {frozenset(band.get("class", "").split()) for band in parts(drawing, "path", "band")} == {
        frozenset({"band", "c0", "encoder"}),
        frozenset({"band", "c1", "control"}),
    }


def test_shuffled_curves_share_one_name_at_the_mean_of_their_ends() -> None:
    curves = [
        Curve("mine", [1, 4], [0.5, 1.0]),
        Curve("mine, shuffled", [1, 4], [0.0, 0.4], look="shuffled"),
        Curve("other, shuffled", [1, 4], [0.2, 0.2], look="shuffled"),
    ]
    drawing = shot_curves("k", curves, title="t", y_label="y", x_label="x")

    assert [label[0].tail for label in parts(drawing, "text", "label")] == ["mine", "shuffled labels"]
    assert len(parts(drawing, "path", "line", "shuffled")) == 2
    # The plot is 220 high, from 0 to 1: 0.3 lies at 34 + 0.7 * 220.
    assert corners(parts(drawing, "path", "tie")[1])[0][1] == pytest.approx(188)
    assert "other, shuffled: 0.200 at 1, 0.200 at 4." in drawing


def test_a_shuffled_curve_of_one_point_is_a_dot() -> None:
    curves = [Curve("mine", [1, 4], [0.5, 1.0]), Curve("mine, shuffled", [4], [0.5], look="shuffled")]
    drawing = shot_curves("k", curves, title="t", y_label="y", x_label="x")

    assert not parts(drawing, "path", "line", "shuffled")
    assert len(parts(drawing, "path", "solid", "muted")) == 1


def test_a_drawing_says_in_words_what_it_shows() -> None:
    drawing = shot_curves(
        "k7", [Curve("a", [1, 2], [0.5, 0.75], [0.4, 0.7], [0.6, 0.8])], title="T", y_label="y", x_label="x"
    )
    root = ElementTree.fromstring(drawing)

    title, description = root.find(f"{SVG}title"), root.find(f"{SVG}desc")
    assert title is not None
    assert description is not None
    assert root.get("role") == "img"
    assert root.get("aria-labelledby") == f"{title.get('id')} {description.get('id')}" == "k7-title k7-desc"
    assert "0.500 (0.400 to 0.600) at 1, 0.750 (0.700 to 0.800) at 2" in str(description.text)


def test_a_curve_over_steps_breaks_where_values_are_not_finite() -> None:
    curve = Curve("", list(range(6)), [5.0, 4.0, math.nan, 3.0, math.inf, 1.0])
    drawing = step_curves("k", [curve], title="t", y_label="loss")

    # 460 less 48 and 14 wide, 220 less 34 and 46 high; steps 0 to 5, values 1 to 5.
    (first,) = parts(drawing, "path", "line")
    np.testing.assert_allclose(corners(first), [(48, 34), (127.6, 69)])
    (marks,) = parts(drawing, "path", "solid")
    assert marks.get("d", "").count("M") == 4


def test_reports_of_a_collapse_stand_at_their_steps() -> None:
    drawing = step_curves(
        "k", [Curve("", [0, 10], [1.0, 2.0])], title="t", y_label="y", marked=[5], marked_as="Collapse reported"
    )

    (alarm,) = parts(drawing, "line", "alarm")
    assert float(alarm.get("x1", "nan")) == pytest.approx(247)
    assert "Collapse reported at step 5." in drawing


def test_long_curves_are_thinned_to_means() -> None:
    values = np.random.default_rng(0).normal(size=1000)
    values[4] = math.nan
    thin = thinned(Curve("", list(range(1000)), values.tolist()), most=250)

    blocks = values.reshape(250, 4)
    np.testing.assert_allclose(thin.y, np.nanmean(blocks, axis=1))
    np.testing.assert_allclose(thin.x, np.arange(1000).reshape(250, 4).mean(1))


def test_a_block_without_finite_values_stays_a_gap() -> None:
    assert math.isnan(thinned(Curve("", [0, 1, 2, 3], [math.nan, math.nan, 1, 3]), most=2).y[0])


def test_points_of_a_map_lie_where_arithmetic_puts_them() -> None:
    clouds = [Cloud("a", [-1.0, 0.5], [1.0, 0.0], [True, False], 1), Cloud("b", [0.0], [-0.5], [True], 3)]
    drawing = feature_map("k", clouds, title="t")

    # A square of 376 inside margins of 12, y upwards; a square's corner is 0.89 radii off, a diamond's 1.26 above.
    first, second = parts(drawing, "path", "solid")
    (hollow,) = parts(drawing, "path", "hollow")
    assert corners(first)[0] == pytest.approx((12 - 3.56, 12 - 3.56), abs=0.01)
    assert corners(hollow)[0] == pytest.approx((294 - 3.56, 200 - 3.56), abs=0.01)
    assert corners(second)[0] == pytest.approx((200, 294 - 5.04), abs=0.01)


def test_a_map_of_equal_points_lies_in_the_middle() -> None:
    drawing = feature_map("k", [Cloud("a", [0.0, 0.0], [0.0, 0.0], [True, True], 1)], title="t")

    (marks,) = parts(drawing, "path", "solid")
    assert corners(marks)[0] == pytest.approx((196.44, 196.44), abs=0.01)


def test_every_pair_of_colour_and_shape_is_used_once_before_any_repeats() -> None:
    looks = {(mark_class(mark), mark_path(mark, 0, 0, 5)) for mark in range(MARKS**2)}

    assert len(looks) == MARKS**2
    assert len({mark_path(mark, 0, 0, 5) for mark in range(MARKS)}) == MARKS
    assert len({mark_class(mark) for mark in range(MARKS)}) == MARKS


def test_shapes_have_about_the_same_area() -> None:
    areas = []
    for mark in range(1, MARKS):
        points = np.array(re.findall(r"(-?[\d.]+),(-?[\d.]+)", mark_path(mark, 0, 0, 100)), dtype=float)
        x, y = points.T
        areas.append(abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2)

    np.testing.assert_allclose(areas, math.pi * 100**2, rtol=0.13)


@pytest.mark.parametrize("seed", range(20))
def test_labels_move_apart_as_little_as_possible(seed: int) -> None:
    random = np.random.default_rng(seed)
    places = random.uniform(0, 100, random.integers(1, 9))
    moved = np.array(spread(places.tolist(), 9.0, 0.0, 100.0))

    order = np.argsort(places, kind="stable")
    ranks = np.arange(len(places))
    bounds = {"y_min": 0.0, "y_max": 100.0 - 9.0 * (len(places) - 1)}
    wanted = IsotonicRegression(**bounds).fit_transform(ranks, places[order] - 9.0 * ranks) + 9.0 * ranks
    np.testing.assert_allclose(moved[order], wanted, atol=1e-9)


def test_labels_that_do_not_fit_share_the_room() -> None:
    assert spread([5.0, 5.0, 5.0], 20.0, 0.0, 10.0) == pytest.approx([0, 5, 10])
    assert spread([], 20.0, 0.0, 10.0) == []


def test_ticks_are_round_and_hold_the_values() -> None:
    axis = Axis.linear("y", [0.513, 0.962])
    assert [written for _, written in axis.ticks] == ["0.5", "0.6", "0.7", "0.8", "0.9", "1.0"]
    assert (axis.low, axis.high) == pytest.approx((0.5, 1.0))

    random = np.random.default_rng(0)
    for _ in range(300):
        values = random.normal(size=2) * 10 ** random.uniform(-6, 6)
        axis = Axis.linear("y", values.tolist())
        assert axis.low <= values.min() + 1e-9 * abs(values).max()
        assert axis.high >= values.max() - 1e-9 * abs(values).max()
        assert 3 <= len(axis.ticks) <= 8
        assert len({written for _, written in axis.ticks}) == len(axis.ticks)


def test_an_axis_needs_neither_spread_nor_values() -> None:
    assert Axis.linear("y", [0.4, 0.4]).share(0.4) == pytest.approx(0.5)
    assert Axis.linear("y", [math.nan]).low == 0
    assert Axis.doubling("x", [4]).share(4) == 0.5


def test_equal_ratios_are_equal_lengths() -> None:
    axis = Axis.doubling("x", [16, 1, 4, 4])
    assert [axis.share(value) for value in (1, 2, 4, 16)] == pytest.approx([0, 0.25, 0.5, 1])
    assert [written for _, written in axis.ticks] == ["1", "4", "16"]


@pytest.mark.parametrize(
    ("value", "step", "written"),
    [
        (0.0, 0.1, "0"),
        (0.30000000000000004, 0.1, "0.3"),
        (-0.05, 0.05, "−0.05"),
        (20000, 5000, "20k"),
        (5e-4, 1e-4, "5e−4"),
        (1.5e-4, 5e-5, "1.5e−4"),
        (12.0, 2.0, "12"),
        (1e-3, 2e-4, "1e−3"),
    ],
)
def test_ticks_are_written_briefly(value: float, step: float, written: str) -> None:
    assert tick_text(value, step) == written


def test_hostile_names_leave_the_drawing_well_formed() -> None:
    name = "<script>alert('x')</script> & \"q\" \x00\x1b\ud800 ünïcödé"
    drawing = shot_curves("k", [Curve(name, [1, 2], [0.5, 0.6])], title=name, y_label=name, x_label=name)
    drawing += feature_map("m", [Cloud(name, [0.1], [0.2], [True])], title=name)

    root = ElementTree.fromstring(f"<div>{drawing}</div>")
    assert not list(root.iter("script")) + list(root.iter(f"{SVG}script"))
    titles = [element.text for element in root.iter(f"{SVG}title")]
    assert name.replace("\x00\x1b\ud800", "���") in titles


def test_long_names_lose_their_middle() -> None:
    assert short("abcdefghij", 7) == "abc…hij"
    assert short("abcdefg", 7) == "abcdefg"
    assert plain("a\tb\nc") == "a\tb\nc"


def test_attributes_are_escaped() -> None:
    assert tag("a", class_='"><b', x_y=None) == '<a class="&quot;&gt;&lt;b"/>'
    assert ElementTree.fromstring(swatch(3)).get("aria-hidden") == "true"
