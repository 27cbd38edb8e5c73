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


def test_a_byte_order_mark_is_no_part_of_a_column_name(folder, make_index):
    path = table(folder, "﻿file,label\na.tif,water\n")
    _, index, _ = make_index(folder / "a.tif", size=32, labels=path)
    assert index[0].label == "water"


def test_a_place_on_two_sides_of_the_split_is_refused(folder, make_index):
    table(folder, "file,label,group,split\na.tif,water,lake,train\nb.tif,land,lake,test\n")
    with pytest.raises(UsageError, match="'lake' stands on two sides"):
        make_index(folder, size=32)


def test_contradicting_ambiguous_and_malformed_tables_are_refused(folder, make_index, write_raster, noise):
    table(folder, "file,label\na.tif,water\na,land\n")
    with pytest.raises(UsageError, match="'water' and 'land'"):
        make_index(folder, size=32)
    table(folder, "name,class\na.tif,water\n")
    with pytest.raises(UsageError, match="has name, class"):
        make_index(folder, size=32)
    write_raster("d/sub/b.tif", noise(1, 32, 32))
    write_raster("d/other/b2.tif", noise(1, 32, 32))
    write_raster("d/other/a2.tif", noise(1, 32, 32))
    table(folder, "file,label\na2.tif,water\n")
    with pytest.raises(UsageError, match="names 2 files"):
        make_index(folder, size=32)
    with pytest.raises(UsageError, match="cannot be read"):
        make_index(folder, size=32, labels=folder / "missing.csv")
