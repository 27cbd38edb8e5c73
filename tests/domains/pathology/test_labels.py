"""Labels files."""

from __future__ import annotations

from pathlib import Path

import pytest

from fmsuite.domains.pathology.labels import Annotation, Columns, Labels
from fmsuite.errors import UsageError
from fmsuite.tiling.sources import SourceFile, find_files


def files(root: Path, *names: str) -> list[SourceFile]:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return find_files([root], [".svs"])


def table(root: Path, text: str) -> Path:
    path = root / "labels.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_rows_name_files_by_path_name_or_stem(tmp_path: Path) -> None:
    found = files(tmp_path, "in/a.svs", "b.svs", "c.svs", "d.svs")
    path = table(
        tmp_path,
        "slide,label,patient,split\nin/a.svs,x,p1,train\nb.svs,y,p2,test\nc,x,,\n" + f"{tmp_path}/d.svs,z,p3,\n",
    )
    notes = Labels(path).match(found)
    assert notes == {
        tmp_path / "in/a.svs": Annotation("x", "p1", "train"),
        tmp_path / "b.svs": Annotation("y", "p2", "test"),
        tmp_path / "c.svs": Annotation("x"),
        tmp_path / "d.svs": Annotation("z", "p3"),
    }


def test_columns_with_other_names_are_named(tmp_path: Path) -> None:
    found = files(tmp_path, "a.svs")
    path = table(tmp_path, "scan,dx,who,part\na,x,p1,train\n")
    notes = Labels(path, Columns("scan", "dx", "who", "part")).match(found)
    assert notes == {tmp_path / "a.svs": Annotation("x", "p1", "train")}
    with pytest.raises(UsageError, match="no column says which file"):
        Labels(path)
    with pytest.raises(UsageError, match=r"no column 'dxx'.*Did you mean 'dx'"):
        Labels(path, Columns("scan", "dxx"))


def test_one_patient_on_two_splits_is_refused_by_name(tmp_path: Path) -> None:
    path = table(tmp_path, "slide,label,patient,split\na,x,P-17,train\nb,y,P-17,test\nc,x,P-2,test\n")
    with pytest.raises(UsageError, match=r"'P-17' \(test and train\)"):
        Labels(path)


def test_ambiguous_and_contradicting_rows_are_refused(tmp_path: Path) -> None:
    found = files(tmp_path, "one/a.svs", "two/a.svs")
    with pytest.raises(UsageError, match=r"'a' fits several files"):
        Labels(table(tmp_path, "slide,label\na,x\n")).match(found)
    notes = Labels(table(tmp_path, "slide,label\none/a,x\ntwo/a.svs,y\n")).match(found)
    assert [notes[file.path].label for file in found] == ["x", "y"]
    with pytest.raises(UsageError, match="twice with different labels"):
        Labels(table(tmp_path, "slide,label\na,x\na,y\n"))


def test_a_file_that_fits_nothing_is_refused_with_both_names(tmp_path: Path) -> None:
    found = files(tmp_path, "a.svs")
    with pytest.raises(UsageError, match=r"none of its 1 rows.*'zzz'.*'a\.svs'"):
        Labels(table(tmp_path, "slide,label\nzzz,x\n")).match(found)


def test_unreadable_labels_are_wrong_use(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_bytes(b"slide,label\n\xff\xfe,x\n")
    with pytest.raises(UsageError, match="cannot be read"):
        Labels(path)
    with pytest.raises(UsageError, match="cannot be read"):
        Labels(tmp_path / "missing.csv")
    with pytest.raises(UsageError, match="line 3 names no file"):
        Labels(table(tmp_path, "slide,label\na,x\n,y\n"))
