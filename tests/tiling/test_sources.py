"""Files of a domain, and their ids."""

from __future__ import annotations

from pathlib import Path

import pytest

from fmsuite.errors import UsageError
from fmsuite.tiling.sources import find_files


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_folders_are_searched_through_in_the_order_of_names(tmp_path: Path) -> None:
    touch(tmp_path, "b.svs", "a/z.SVS", "a/notes.txt", "a/.hidden.svs", ".cache/x.svs", "c/d/e.svs")
    assert [file.relative for file in find_files([tmp_path], [".svs"])] == ["b.svs", "a/z.SVS", "c/d/e.svs"]


def test_same_names_in_different_folders_stay_apart(tmp_path: Path) -> None:
    touch(tmp_path, "one/slide.svs", "two/slide.svs")
    assert [file.group for file in find_files([tmp_path], [".svs"])] == ["one/slide", "two/slide"]
    both = find_files([tmp_path / "one", tmp_path / "two"], [".svs"])
    assert [file.group for file in both] == ["one/slide.svs", "two/slide.svs"]


def test_ids_grow_only_where_they_must(tmp_path: Path) -> None:
    touch(tmp_path, "a.svs", "a.tif", "b.nii.gz", "x/in/s.svs", "y/in/s.svs")
    found = find_files([tmp_path / "a.svs", tmp_path / "a.tif", tmp_path / "b.nii.gz"], [".svs", ".tif", ".nii.gz"])
    assert [file.group for file in found] == ["a.svs", "a.tif", "b"]
    deep = find_files([tmp_path / "x" / "in", tmp_path / "y" / "in"], [".svs"])
    assert [file.group for file in deep] == [(tmp_path / f"{n}/in/s.svs").as_posix() for n in "xy"]
    assert len({file.group for file in deep}) == 2


def test_a_file_that_two_paths_lead_to_counts_once(tmp_path: Path) -> None:
    touch(tmp_path, "a/s.svs")
    (tmp_path / "link").symlink_to(tmp_path / "a", target_is_directory=True)
    (tmp_path / "a" / "loop").symlink_to(tmp_path, target_is_directory=True)
    assert len(find_files([tmp_path, tmp_path / "a" / "s.svs"], [".svs"])) == 1


def test_a_file_given_by_name_is_taken_whatever_its_suffix(tmp_path: Path) -> None:
    touch(tmp_path, "odd.bin")
    (file,) = find_files([tmp_path / "odd.bin"], [".svs"])
    assert (file.path, file.group, file.root) == (tmp_path / "odd.bin", "odd", tmp_path)


def test_missing_paths_and_empty_folders_are_wrong_use(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere: there is no such"):
        find_files([tmp_path / "nowhere"], [".svs"])
    touch(tmp_path, "notes.txt")
    with pytest.raises(UsageError, match=r"holds no slides.*\.ndpi, \.svs"):
        find_files([tmp_path], [".svs", ".ndpi"], what="slides")
    with pytest.raises(UsageError, match="No path given"):
        find_files([], [".svs"])
