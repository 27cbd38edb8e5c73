"""Parts of an index that is being built."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from fmsuite.tiling.parts import PartStore, discard_parts
from fmsuite.tiling.table import window_table

FACTS = {"mpp": 0.25, "vendor": "aperio"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "slide.svs"
    path.write_bytes(b"pixels")
    return path


def rows(source: Path):
    return window_table(str(source), "slide", np.array([[0.0, 1.5], [2.0, 3.5]]), (4.0, 4.0), label="tumour")


def test_a_finished_source_is_found_again_as_it_was(tmp_path: Path, source: Path) -> None:
    PartStore(tmp_path / "parts", {"size": 4}).save(source, ["tumour"], rows(source), FACTS)
    found = PartStore(tmp_path / "parts", {"size": 4}).load(source, ["tumour"])
    assert found is not None
    assert found[0].to_pylist() == rows(source).to_pylist()
    assert found[0].schema == rows(source).schema
    assert found[1] == FACTS


@pytest.mark.parametrize("change", ["options", "label", "bytes", "time", "damage"])
def test_what_changed_is_looked_at_again(tmp_path: Path, source: Path, change: str) -> None:
    folder = tmp_path / "parts"
    PartStore(folder, {"size": 4}).save(source, ["tumour"], rows(source), FACTS)
    if change == "bytes":
        source.write_bytes(b"other pixels")
    if change == "time":
        os.utime(source, (1, 1))
    if change == "damage":
        (part,) = folder.iterdir()
        part.write_bytes(part.read_bytes()[:40])
    store = PartStore(folder, {"size": 8 if change == "options" else 4})
    assert store.load(source, ["stroma" if change == "label" else "tumour"]) is None


def test_without_a_folder_nothing_is_kept(tmp_path: Path, source: Path) -> None:
    store = PartStore(None, {})
    store.save(source, None, rows(source), FACTS)
    assert store.load(source, None) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["slide.svs"]


def test_parts_are_removed_when_they_have_served(tmp_path: Path, source: Path) -> None:
    PartStore(tmp_path / "parts", {}).save(source, None, rows(source), FACTS)
    discard_parts(tmp_path / "parts")
    assert not (tmp_path / "parts").exists()
