"""Labelled windows of an index: their classes, sides and groups."""

from __future__ import annotations

from fmsuite.commands.labelled_windows import LabelledWindows
from fmsuite.core.data.index import SampleIndex, Window


def test_grades_are_in_the_order_of_their_numbers() -> None:
    """Which quadratic kappa takes for the order of the classes."""
    grades = ("10", "2", "1", "-1", "unsure")
    names = [f"{grade}-{number}" for grade in grades for number in range(4)]
    windows = [Window(f"{name}.png", name, (0.0, 0.0), (8.0, 8.0), label=name.rpartition("-")[0]) for name in names]
    found = LabelledWindows.of(SampleIndex.from_windows(windows, {"domain": "svg"}), 0, "drawing", "here")
    assert found.classes == ["-1", "1", "2", "10", "unsure"]
    assert [found.classes[label] for label in found.labels.tolist()] == [grade for grade in grades for _ in range(4)]
