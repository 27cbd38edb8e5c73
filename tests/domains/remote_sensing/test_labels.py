from __future__ import annotations

from pathlib import Path

import pytest

from fmsuite.errors import UsageError


@pytest.fixture
def folder(write_raster, noise) -> Path:
    for name in ("a", "b", "c"):
        write_raster(f"d/{name}.tif", noise(1, 32, 32))
    return write_raster("d/sub/a2.tif", noise(1, 32, 32)).parents[1]


def table(folder: Path, text: str) -> Path:
    path = folder / "labels.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_labels_are_found_beside_the_files_and_match_by_path_name_or_stem(folder, make_index):
    table(folder, "file,label,split\na.tif,water,train\nb,land,test\nsub/a2.tif,water,train\nnowhere.tif,land,\n")
    _, index, skipped = make_index(folder, size=32)
    found = {Path(index[row].source).name: (index[row].label, index[row].split) for row in range(len(index))}
    assert found == {
        "a.tif": ("water", "train"),
        "b.tif": ("land", "test"),
        "c.tif": (None, None),
        "a2.tif": ("water", "train"),
    }
    assert index.label_names == ["land", "water"]
    assert [(entry.path, entry.stage) for entry in skipped.entries] == [("nowhere.tif", "labels")]


def test_a_line_about_a_raster_that_cannot_be_used_is_not_reported(folder, make_index):
    (folder / "bad.tif").write_text("not a raster")
    table(folder, "file,label\na.tif,water\nbad.tif,land\n")
    _, index, skipped = make_index(folder, size=32)
    assert index.label_names == ["water"]
    assert [entry.stage for entry in skipped.entries] == ["open"]


def test_a_place_on_two_sides_of_the_split_is_refused(folder, make_index):
    table(folder, "file,label,group,split\na.tif,water,lake,train\nb.tif,land,lake,test\n")
    with pytest.raises(UsageError, match=r"'lake' \(test and train\)"):
        make_index(folder, size=32)
    table(folder, "file,split\na.tif,train\na2.tif,test\n")
    with pytest.raises(UsageError, match=r"'a' \(test and train\)"):
        make_index(folder, size=32, place_pattern="^[a-z]")


@pytest.fixture
def series(write_raster, noise) -> Path:
    for name in ("lake_20240101", "lake_20240201", "wood_20240101", "wood_20240201"):
        path = write_raster(f"s/{name}.tif", noise(1, 32, 32))
    return path.parent


@pytest.mark.parametrize("line", ["lake", "lake_20240201", "lake_20240101.tif"])
def test_a_line_may_name_a_place_of_a_series_or_one_of_its_files(series, make_index, line):
    table(series, f"file,label,group,split\n{line},water,north,train\nwood,land,south,test\n")
    _, index, skipped = make_index(series, size=32, series=True)
    assert not skipped.entries
    windows = [index[row] for row in range(len(index))]
    assert [(w.label, w.group, w.split) for w in windows] == [("water", "north", "train"), ("land", "south", "test")]


def test_a_folder_of_files_named_by_date_is_a_place(write_raster, noise, make_index, tmp_path):
    for place in ("lake", "wood"):
        for date in ("20240101", "20240201"):
            write_raster(f"s/{place}/{date}.tif", noise(1, 32, 32))
    table(tmp_path / "s", "file,label\nlake,water\n")
    _, index, _ = make_index(tmp_path / "s", size=32, series=True)
    assert [(index[row].group, index[row].label) for row in range(2)] == [("lake", "water"), ("wood", None)]
    _, alone, _ = make_index(tmp_path / "s" / "wood", size=32, series=True)
    assert alone.groups == ["wood"]


def test_dates_of_a_place_that_contradict_each_other_are_refused(series, make_index):
    table(series, "file,label\nlake_20240101,water\nlake_20240201,land\n")
    with pytest.raises(UsageError, match="'water' and 'land'"):
        make_index(series, size=32, series=True)
    _, index, _ = make_index(series, size=32)
    assert index.label_names == ["land", "water"]


def test_contradicting_ambiguous_and_malformed_tables_are_refused(folder, make_index, write_raster, noise):
    table(folder, "file,label\na.tif,water\na,land\n")
    with pytest.raises(UsageError, match="'water' and 'land'"):
        make_index(folder, size=32)
    table(folder, "name,class\na.tif,water\n")
    with pytest.raises(UsageError, match="has name, class"):
        make_index(folder, size=32)
    write_raster("d/other/a2.tif", noise(1, 32, 32))
    table(folder, "file,label\na2.tif,water\n")
    with pytest.raises(UsageError, match="names 2 files"):
        make_index(folder, size=32)
    with pytest.raises(UsageError, match="cannot be read"):
        make_index(folder, size=32, labels=folder / "missing.csv")
