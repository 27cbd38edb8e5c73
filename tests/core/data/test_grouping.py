"""Groups of windows: readable ids, in the order of the index, and folder names that nothing can escape from."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fmsuite.core.data.grouping import default_by, group_codes, group_ids, group_key
from fmsuite.core.data.index import SampleIndex, Window


def index_of(*sources: str, groups: str = "") -> SampleIndex:
    return SampleIndex.from_windows(
        Window(source, groups[number] if groups else "g", (float(number),), (1.0,))
        for number, source in enumerate(sources)
    )


@pytest.mark.parametrize(
    ("sources", "by", "ids"),
    [
        (["/d/b.svs", "/d/a.svs", "/d/b.svs"], "source", ["b.svs", "a.svs", "b.svs"]),
        (["/d/x/a.svs", "/d/y/a.svs", "/d/a.svs"], "source", ["x/a.svs", "y/a.svs", "a.svs"]),
        (["/d/only.svs"], "source", ["only.svs"]),
        (["/d/tumour/1.png", "/d/normal/1.png", "/d/tumour/2.png"], "folder", ["tumour", "normal", "tumour"]),
        (["/d/tiles/1.png", "/d/tiles/2.png"], "folder", ["tiles", "tiles"]),
        (["/d/a/1.png", "/d/a/b/1.png"], "folder", ["a", "a/b"]),
        (["/d/ab/1.png", "/d/a/1.png"], "folder", ["ab", "a"]),
        (["/s0", "/s1"], "source", ["s0", "s1"]),
    ],
)
def test_ids_are_paths_below_what_all_share(sources: list[str], by, ids: list[str]) -> None:
    assert group_ids(index_of(*sources), by) == ids


def test_groups_are_the_indexs_own() -> None:
    index = index_of("/a", "/b", "/c", "/d", groups="qpqr")
    names, codes = group_codes(index, "group")
    assert names == ["q", "p", "r"]
    assert codes.tolist() == [0, 1, 0, 2]


def test_a_selection_has_only_its_own_groups() -> None:
    index = index_of("/d/a", "/d/b", "/d/c", "/d/b").select([3, 2])
    assert group_codes(index, "source")[0] == ["b", "c"]


def test_the_default_follows_how_many_windows_sources_have() -> None:
    assert default_by(index_of("/d/a", "/d/a", "/d/b")) == "source"
    assert default_by(index_of("/d/a", "/d/b")) == "folder"


NAMES = st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=300)


@given(st.lists(NAMES, unique=True, min_size=2, max_size=2))
@example(["..", "%2E."])
@example([".", "%2E"])
@example(["", "%"])
@example(["a/b", "a%2Fb"])
@example(["zarr.json", "%7Aarr.json"])
@example(["__x", "%5F_x"])
@example(["ü" * 150 + "a", "ü" * 150 + "b"])
def test_folder_names_differ_and_stay_where_they_are_put(ids: list[str]) -> None:
    keys = [group_key(id) for id in ids]
    assert keys[0] != keys[1]
    for key in keys:
        assert os.path.normpath(os.path.join("/store", key)) == f"/store/{key}"
        assert key not in ("", "zarr.json", "index.parquet", "unreadable.json")
        assert not key.startswith((".", "__"))
        assert len(key.encode()) <= 200


def test_usual_names_are_kept() -> None:
    for id in ("slide 1 (copy).svs", "TCGA-01-0001-01Z.5a.svs", "Gewebe-ü", "patient_7"):
        assert group_key(id) == id


def test_a_million_rows_need_no_python_string_each() -> None:
    index = index_of("/d/a", "/d/b").select(np.arange(1_000_000) % 2)
    names, codes = group_codes(index, "source")
    assert names == ["a", "b"]
    assert np.array_equal(codes, np.arange(1_000_000) % 2)
