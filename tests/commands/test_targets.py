"""Columns of a labels file as classes, numbers and findings, and the windows, sources or patients that have them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from fmsuite.commands.bench_targets import parse_fractions, parse_targets
from fmsuite.commands.target_items import TargetItems
from fmsuite.commands.targets import Target, Values, parse, read_columns
from fmsuite.core.data.index import SampleIndex, Window
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.domains.base import Units
from fmsuite.errors import UsageError
from fmsuite.tiling.labels import SourceLabel

UNITS = Units(source="volume", group="patient")
AGE = Target("number", ("age",))


class Store:
    """Features that are the row numbers, and their squares."""

    def read_all(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        values = torch.from_numpy(rows).float()
        return torch.stack([values, values**2], dim=1), torch.from_numpy(rows)


def table(folder: Path, rows: Sequence[Sequence[str]], name: str = "labels.csv") -> Path:
    with (folder / name).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return folder / name


def volumes(folder: Path, patients: int, each: int = 2, windows: int = 3, split: bool = False) -> SampleIndex:
    rows = []
    for patient in range(patients):
        side = ("test" if patient % 3 == 2 else "train") if split else None
        for number in range(each):
            source = str(folder / f"p{patient:02d}_{number}.nii.gz")
            for z in range(windows):
                rows.append(Window(source, f"p{patient:02d}", (8.0 * z, 0, 0), (8.0, 8, 8), split=side))
    return SampleIndex.from_windows(rows, {"domain": "medical"})


def asked(index: SampleIndex, target: Target, cells: Sequence[str | None], **changes) -> TargetItems:
    known = changes.pop("known", [SourceLabel() for _ in cells])
    options = {"by": "source", "seed": 0, "units": UNITS, **changes}
    return TargetItems.asked(index, target, parse(target, [cells]), known, **options)


@pytest.mark.parametrize("kind", ["list", "columns"])
def test_findings_are_the_same_from_a_list_and_from_columns(kind: str) -> None:
    if kind == "list":
        cells: list[list[str | None]] = [["b | a", "a", "No Finding", None, "none"]]
        target = Target("findings", ("findings",))
    else:
        cells = [["1", "1.0", "0", None, "No"], ["true", "0", "0", "-1", "0.0"]]
        target = Target("findings", ("a", "b"))
    values = parse(target, cells)
    assert values.names == ["a", "b"]
    expected = torch.tensor([[1, 1], [1, 0], [0, 0], [torch.nan, torch.nan], [0, 0]], dtype=torch.float64)
    assert torch.equal(values.target.nan_to_num(9), expected.nan_to_num(9))
    assert values.known.tolist() == [True, True, True, False, True]


def test_numbers_and_ages_of_dicom_are_read_and_classes_are_in_order() -> None:
    numbers = parse(AGE, [["45", None, "063Y", "018M", "1e2", "026W"]]).target
    assert numbers.tolist()[::2] == [45, 63, 100]
    assert numbers[3].item() == 1.5
    assert numbers[5].item() == pytest.approx(0.4983, abs=1e-4)
    assert numbers[1].isnan()
    classes = parse(Target("classes", ("grade",)), [["10", "2", None, "2"]])
    assert (classes.names, classes.target.tolist()) == (["2", "10"], [1, 0, -1, 0])


@pytest.mark.parametrize(
    ("target", "cells", "message"),
    [
        (AGE, [["45", "old"]], "column 'age' has 'old', which is no number"),
        (AGE, [["inf"]], "which is no number"),
        (AGE, [[None, None]], "Nothing is known of age"),
        (Target("findings", ("a", "b")), [["1"], ["2"]], "column 'b' of findings has '2'"),
        (Target("findings", ("a",)), [["none", None]], "Nothing is known of a"),
    ],
)
def test_cells_that_say_something_else_are_refused(target: Target, cells: list, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(target, cells)


def test_columns_are_read_for_every_source_also_by_patient(tmp_path: Path) -> None:
    index = volumes(tmp_path, 3)
    file = table(tmp_path, [["patient_id", "sex", "age", "set"], ["p00", "F", "30", "test"], ["p02", "M", "", "train"]])
    index.metadata["options"] = {"path_column": "patient_id"}
    index.metadata["labels"] = {"files": [str(file)]}
    found = read_columns(index, ["sex", "age"], None, SkippedLog(None))
    assert [known.label for known in found["sex"]] == ["F", "F", None, None, "M", "M"]
    assert [known.label for known in found["age"]] == ["30", "30", None, None, None, None]
    assert [known.split for known in found["age"]] == ["test", "test", None, None, "train", "train"]
    with pytest.raises(UsageError, match="no column 'gender'"):
        read_columns(index, ["gender"], None, SkippedLog(None))
    other = table(tmp_path, [["file", "age"], ["p01_1.nii.gz", "7"], ["gone.nii.gz", "8"]], "other.csv")
    log = SkippedLog(None)
    found = read_columns(index, ["age"], other, log)
    assert [known.label for known in found["age"]] == [None, None, None, "7", None, None]
    assert [entry.path for entry in log.entries] == ["gone.nii.gz"]
    del index.metadata["labels"]
    with pytest.raises(UsageError, match="without a labels file"):
        read_columns(index, ["age"], None, log)
    with pytest.raises(UsageError, match=r"gone\.csv: there is no such labels file"):
        read_columns(index, ["age"], tmp_path / "gone.csv", log)


def test_features_are_means_over_the_windows_of_what_is_asked_about(tmp_path: Path) -> None:
    index = volumes(tmp_path, 12)
    cells = [str(20 + source // 2) for source in range(24)]
    rows = torch.arange(72).float()
    for by, size, unit in (("window", 1, "window"), ("source", 3, "volume"), ("group", 6, "patient")):
        items = asked(index, AGE, cells, by=by)
        expected = torch.stack([rows, rows**2], dim=1).unflatten(0, (-1, size)).mean(1)
        torch.testing.assert_close(items.features(Store()), expected)  # type: ignore[arg-type]
        assert (len(items), items.unit) == (72 // size, unit)
        assert [item.windows for item in items.items()] == [size] * len(items)
        assert items.labels.tolist() == [20 + number * size // 6 for number in range(len(items))]
        assert not set(items.groups[items.split.train].tolist()) & set(items.groups[items.split.test].tolist())
    assert items.items()[3].id == "p03"
    assert asked(index, AGE, cells, by="source").items()[3].id == "p01_1.nii.gz"
    assert asked(index, AGE, cells, by="window").items()[4].id == "p00_1.nii.gz (8, 0, 0)"


def test_windows_that_could_not_be_read_leave_the_mean_and_then_the_item(tmp_path: Path) -> None:
    items = asked(volumes(tmp_path, 12, each=1, split=True), AGE, [str(number) for number in range(12)])
    stored = torch.tensor([row for row in range(36) if row not in (1, 6, 7, 8)])
    left = items.restricted([stored, torch.arange(36)])
    assert len(left) == 11
    assert left.features(Store())[0].tolist() == [1.0, 2.0]  # type: ignore[arg-type]
    assert [item.id for item in left.items()][1:3] == ["p01_0.nii.gz", "p03_0.nii.gz"]
    assert [item.split for item in left.items()][:4] == ["train", "train", "train", "train"]
    assert "4 windows and 1 volume that could not be read" in left.notes[-1]
    assert items.restricted([torch.arange(36)]) is items


def test_sides_are_those_of_the_file_then_of_the_index_then_made(tmp_path: Path) -> None:
    cells: list[str | None] = [str(number % 7) for number in range(30)]
    index = volumes(tmp_path, 30, each=1, windows=1, split=True)
    items = asked(index, AGE, cells)
    assert items.split.test.tolist() == list(range(2, 30, 3))
    assert items.said.startswith("As the data give it")
    given = [SourceLabel(split=side) for side in ["test"] * 10 + ["train"] * 18 + ["val", None]]  # type: ignore[list-item]
    items = asked(index, AGE, cells, known=given)
    assert (items.split.test.tolist(), len(items)) == (list(range(10)), 28)
    assert items.notes == ["Left out: 2 volumes of which nothing is known, or on no side."]
    items = asked(volumes(tmp_path, 30, each=1, windows=1), AGE, cells)
    assert items.split.made
    assert "small and large numbers alike on both" in items.said
    assert abs(items.labels[items.split.test].mean() - items.labels[items.split.train].mean()) < 0.5


def test_a_made_split_has_rare_findings_on_both_sides(tmp_path: Path) -> None:
    cells: list[str | None] = [
        "rare|often" if number % 10 == 0 else "often" if number % 2 else "none" for number in range(60)
    ]
    items = asked(volumes(tmp_path, 60, each=1, windows=1), Target("findings", ("f",)), cells)
    assert items.classes == ["often", "rare"]
    shares = [(items.labels[side, 1] == 1).double().mean().item() for side in (items.split.train, items.split.test)]
    assert shares[0] == pytest.approx(shares[1], abs=0.03)
    assert items.items()[0].findings == [1, 1]


def test_contradictions_and_sides_without_contrast_are_refused(tmp_path: Path) -> None:
    index = volumes(tmp_path, 12, windows=1, split=True)
    ages: list[str | None] = [str(number) for number in range(24)]
    with pytest.raises(UsageError, match="sources of patient 'p00' have several values of age"):
        asked(index, AGE, ages, by="group")
    with pytest.raises(UsageError, match="'test' of the split no number differs"):
        asked(index, AGE, ["5" if number // 2 % 3 == 2 else str(number) for number in range(24)])
    with pytest.raises(UsageError, match="'train' of the split no finding is both"):
        asked(index, Target("findings", ("f",)), ["a" if number // 2 % 3 == 2 else "none" for number in range(24)])
    with pytest.raises(UsageError, match="'test' of the split has no window of 'M'"):
        asked(index, Target("classes", ("sex",)), ["F" if n // 2 % 3 == 2 else "FM"[n // 2 % 2] for n in range(24)])
    with pytest.raises(UsageError, match="Everything is of one class, 'F'"):
        asked(index, Target("classes", ("sex",)), ["F"] * 24)
    with pytest.raises(UsageError, match="of one group, 'p00'"):
        asked(volumes(tmp_path, 1, each=4), AGE, ["1", "2", "3", "4"])
    sides = [SourceLabel(split="train" if number % 2 else "test") for number in range(24)]
    with pytest.raises(UsageError, match="both sides of the split: 'p00'"):
        asked(index, AGE, ages, known=sides)


def test_the_command_line_names_targets_and_shares() -> None:
    assert parse_targets(["sex"], ["age"], ["a, b", "list"]) == [
        Target("classes", ("sex",)),
        AGE,
        Target("findings", ("a", "b")),
        Target("findings", ("list",)),
    ]
    assert [target.name for target in parse_targets([], [], ["a b,c/d"])] == ["a-b+c-d"]
    assert len(Target("findings", tuple(f"finding number {n}" for n in range(9))).name) <= 60
    assert parse_fractions("1%, 0.1,100%") == [0.01, 0.1, 1.0]
    for wrong in ("a,,b", "a,a"):
        with pytest.raises(UsageError, match="empty column, or one twice"):
            parse_targets([], [], [wrong])
    with pytest.raises(UsageError, match="no list of shares"):
        parse_fractions("few")


def test_values_know_what_is_known() -> None:
    assert Values(torch.tensor([0, -1]), ["a"]).known.tolist() == [True, False]
