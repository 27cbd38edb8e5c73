"""Windows beside those that an encoder finds alike."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image

from fmsuite.core.reports.neighbours import choose_queries, directions, nearest_of_other_groups, neighbours
from fmsuite.errors import FmsuiteError


def squares(unreadable: Sequence[int] = ()) -> object:
    """Pictures whose colour tells the row."""

    def read(rows: Sequence[int]) -> dict[int, Image.Image]:
        return {row: Image.new("RGB", (4, 4), (row, 0, 0)) for row in rows if row not in unreadable}

    return read


@pytest.fixture
def windows() -> dict:
    """24 windows of 4 groups and 2 classes, with an offset far larger than their differences."""
    rng = np.random.default_rng(5)
    return {
        "features": torch.from_numpy(300 + rng.normal(size=(24, 6))).float(),
        "rows": np.arange(24) + 100,
        "labels": np.arange(24) % 2,
        "groups": torch.arange(24) // 6,
    }


def by_hand(windows: dict, query: int, k: int) -> list[tuple[int, float]]:
    values = windows["features"].double().numpy()
    values = values - values.mean(axis=0)
    found = []
    for place, value in enumerate(values):
        if windows["groups"][place] != windows["groups"][query]:
            cosine = value @ values[query] / np.linalg.norm(value) / np.linalg.norm(values[query])
            found.append((place, 1 - cosine))
    return sorted(found, key=lambda pair: pair[1])[:k]


def test_nearest_windows_are_those_of_a_search_by_hand(windows: dict) -> None:
    places, distances = nearest_of_other_groups(windows["features"], windows["groups"], [0, 9, 23], 5)
    for row, query in enumerate([0, 9, 23]):
        expected = by_hand(windows, query, 5)
        assert places[row].tolist() == [place for place, _ in expected]
        assert distances[row] == pytest.approx([distance for _, distance in expected], abs=1e-4)


def test_other_groups_may_have_fewer_windows() -> None:
    features = torch.tensor([[1.0, 0], [0, 1], [1, 1], [3, -1]])
    places, distances = nearest_of_other_groups(features, torch.tensor([0, 0, 0, 1]), [0, 3], 3)
    assert places[0].tolist() == [3, -1, -1]
    assert np.isnan(distances[0, 1:]).all()
    assert sorted(places[1]) == [0, 1, 2]


def test_a_feature_at_the_mean_has_no_direction() -> None:
    assert directions(torch.full((5, 3), 0.1) + 1000).abs().max() == 0
    assert directions(torch.tensor([[0.0, 0], [2, 0], [1, 0]])).tolist() == [[-1, 0], [1, 0], [0, 0]]


def test_directions_of_some_are_from_the_mean_of_all() -> None:
    features = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)) + 3
    places = np.array([7, 2, 29])
    assert torch.equal(directions(features, places), directions(features)[places])


def test_queries_are_held_out_and_alternate_between_right_and_wrong() -> None:
    labels = np.repeat([0, 1, 2], 20)
    held_out = np.arange(60) % 2 == 1
    predicted = np.where(np.arange(60) % 10 == 1, (labels + 1) % 3, labels)
    chosen = choose_queries(labels, held_out, predicted, count=9, seed=1)
    assert held_out[chosen].all()
    assert labels[chosen].tolist() == [0, 1, 2] * 3
    assert (labels != predicted)[chosen].tolist() == [False] * 3 + [True] * 3 + [False] * 3
    assert len(set(chosen)) == 9
    assert np.array_equal(chosen, choose_queries(labels, held_out, predicted, count=9, seed=1))
    assert not np.array_equal(chosen, choose_queries(labels, held_out, predicted, count=9, seed=2))


def test_classes_without_mistakes_give_what_they_have() -> None:
    chosen = choose_queries(np.array([0, 0, 1]), np.ones(3), np.array([0, 0, 0]), count=10)
    assert sorted(chosen) == [0, 1, 2]
    assert chosen[1] == 2


def test_without_a_held_out_side_and_labels_any_window_is_asked() -> None:
    assert len(choose_queries(np.full(10, -1), np.zeros(10), count=4)) == 4
    assert choose_queries(np.array([-1, -1, 0]), np.zeros(3), count=4).tolist() == [2]


def test_pictures_and_captions_belong_to_the_windows_found(windows: dict) -> None:
    notes: list[str] = []
    predicted = np.full(24, -1)
    predicted[[0, 9]] = [1, 1]
    [first, second] = neighbours(
        **windows,
        queries=[0, 9],
        pictures=squares(),
        encoder="vit",
        classes=["benign", "tumour"],
        names=[f"slide {place // 6}" for place in range(24)],
        notes=notes,
        predicted=predicted,
    )
    assert first.query.caption == "slide 0 (taken for tumour)"
    assert second.query.caption == "slide 1"
    for shown, query in ((first, 0), (second, 9)):
        expected = by_hand(windows, query, 5)
        assert [picture.image.getpixel((0, 0))[0] for picture in shown.nearest] == [p + 100 for p, _ in expected]
        assert [picture.label for picture in shown.nearest] == [windows["labels"][p] for p, _ in expected]
        assert shown.distances == pytest.approx([distance for _, distance in expected], abs=1e-4)
        assert shown.query.image.getpixel((0, 0))[0] == query + 100
    assert first.nearest[0].alt.startswith("Neighbour 1: ")
    assert notes == []


def test_what_cannot_be_shown_is_left_out_and_noted(windows: dict) -> None:
    notes: list[str] = []
    expected = by_hand(windows, 9, 5)
    gone = [107, expected[1][0] + 100]
    names = ["s"] * 24
    found = neighbours(
        **windows, queries=[7, 9], pictures=squares(gone), encoder="vit", classes=["a", "b"], names=names, notes=notes
    )
    [shown] = found
    assert [picture.image.getpixel((0, 0))[0] - 100 for picture in shown.nearest] == [
        place for rank, (place, _) in enumerate(expected) if rank != 1
    ]
    assert len(shown.distances) == 4
    assert notes == ["vit: 2 of the neighbours' windows could not be read and are not shown."]

    windows["groups"] = torch.zeros(24, dtype=torch.int64)
    assert not neighbours(
        **windows, queries=[0], pictures=squares(), encoder="vit", classes=["a", "b"], names=names, notes=notes
    )
    assert "all windows are of one group" in notes[-1]


def test_a_feature_that_is_not_finite_is_named(windows: dict) -> None:
    windows["features"][3] = torch.inf
    names = [f"file {place}" for place in range(24)]
    with pytest.raises(FmsuiteError, match=r"Feature 3 of 'vit' \(file 3\) is not finite"):
        neighbours(**windows, queries=[0], pictures=squares(), encoder="vit", classes=["a", "b"], names=names, notes=[])
