"""Labels of the groups of a feature store: who is named, by which names, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from fmsuite.commands.group_labels import IGNORE, IndexGroup, LabelColumns, index_groups, labelled_groups
from fmsuite.core.data.index import SampleIndex, Window
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.errors import FmsuiteError, UsageError


def group(id: str, *, labels=(), patients=(), splits=(), sources=None) -> IndexGroup:
    return IndexGroup(id, 4, tuple(sources or (f"/data/{id}.svs",)), tuple(labels), tuple(patients), tuple(splits))


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def find(groups, file: Path | None = None, by: str = "source", log: SkippedLog | None = None, **columns):
    chosen = LabelColumns(file, **columns)
    return labelled_groups(groups, by, "slide", chosen, SkippedLog() if log is None else log, "store.zarr")


FOUR = [group(name, patients=(name,)) for name in "abcd"]


def test_an_index_is_summed_up_group_by_group_in_the_order_of_its_rows() -> None:
    windows = [
        Window("/x/b.svs", "P2", (0.0,), (1.0,), label="sick", split="test"),
        Window("/x/a.svs", "P1", (0.0,), (1.0,), label="well"),
        Window("/x/b.svs", "P2", (1.0,), (1.0,), label="well", split="test"),
        Window("/x/c.svs", "P3", (1.0,), (1.0,)),
    ]
    index = SampleIndex.from_windows(windows)
    assert index_groups(index, "source") == [
        IndexGroup("b.svs", 2, ("/x/b.svs",), ("sick", "well"), ("P2",), ("test",)),
        IndexGroup("a.svs", 1, ("/x/a.svs",), ("well",), ("P1",), ()),
        IndexGroup("c.svs", 1, ("/x/c.svs",), (), ("P3",), ()),
    ]
    assert [(g.id, g.rows) for g in index_groups(index, "group")] == [("P2", 2), ("P1", 1), ("P3", 1)]


def test_without_a_file_the_labels_patients_and_sides_of_the_index_are_taken() -> None:
    groups = [
        group("a", labels=["x"], patients=["P1"], splits=["train"]),
        group("b", labels=["y"], patients=["P1"], splits=["train"]),
        group("c", labels=["y"], patients=["P2"], splits=["test"]),
    ]
    found = find(groups)
    assert [(g.id, g.label, g.patient, g.split) for g in found] == [
        ("a", "x", "P1", "train"),
        ("b", "y", "P1", "train"),
        ("c", "y", "P2", "test"),
    ]
    assert {g.split for g in find(groups, split=IGNORE)} == {None}


def test_a_file_gives_labels_and_what_it_does_not_say_comes_from_the_index(tmp_path: Path) -> None:
    groups = [
        group("a", labels=["old"], patients=["P1"], splits=["train"]),
        group("b", labels=["old"], patients=["P2"], splits=["test"]),
    ]
    file = written(tmp_path / "l.csv", "slide,label\na.svs,x\nb,y\n")
    assert [(g.label, g.patient, g.split) for g in find(groups, file)] == [("x", "P1", "train"), ("y", "P2", "test")]
    file = written(tmp_path / "m.csv", "slide,label,patient,split\na.svs,x,Q1,test\nb,y,Q2,train\n")
    assert [(g.label, g.patient, g.split) for g in find(groups, file)] == [("x", "Q1", "test"), ("y", "Q2", "train")]
    assert {g.split for g in find(groups, file, split=IGNORE)} == {None}


def test_columns_can_be_named(tmp_path: Path) -> None:
    lines = ["wsi_x,case,grade,label,part", "a,C1,g1,same,train", "b,C1,g2,same,train", "c,C2,g1,same,test"]
    file = written(tmp_path / "l.csv", "\n".join([*lines, "d,C3,g2,same,test"]))
    found = find(FOUR, file, path="wsi_x", label="grade", patient="case", split="part")
    assert [(g.label, g.patient, g.split) for g in found] == [
        ("g1", "C1", "train"),
        ("g2", "C1", "train"),
        ("g1", "C2", "test"),
        ("g2", "C3", "test"),
    ]


def test_unknown_slides_and_slides_without_labels_are_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    file = written(tmp_path / "l.csv", "slide,label\na,x\nb,y\nzz,x\nc,\n")
    log = SkippedLog(tmp_path / "skipped.csv")
    assert [g.id for g in find(FOUR, file, log=log)] == ["a", "b"]
    assert {(entry.path, entry.stage) for entry in log.entries} == {("zz", "labels"), ("c", "labels"), ("d", "labels")}
    assert "no such source was found" in next(entry.reason for entry in log.entries if entry.path == "zz")
    assert "This slide has no label" in next(entry.reason for entry in log.entries if entry.path == "c")
    with pytest.raises(FmsuiteError, match=r"zz: .*--strict"):
        find(FOUR, file, log=SkippedLog(strict=True))


def test_a_line_may_name_a_patient_or_a_folder_for_all_that_belongs_to_it(tmp_path: Path) -> None:
    slides = [group(name, patients=[patient]) for name, patient in zip("abc", ("P1", "P1", "P2"), strict=True)]
    file = written(tmp_path / "l.csv", "slide,label\nP1,x\nP2,y\n")
    assert [g.label for g in find(slides, file)] == ["x", "x", "y"]
    patients = [
        group("P1", patients=["P1"], sources=["/d/a.svs", "/d/b.svs"]),
        group("P2", patients=["P2"], sources=["/d/c.svs"]),
    ]
    assert [(g.id, g.label) for g in find(patients, file, by="group")] == [("P1", "x"), ("P2", "y")]
    named = written(tmp_path / "n.csv", "slide,label\na,x\nb,x\nc,y\n")
    assert [(g.id, g.label) for g in find(patients, named, by="group")] == [("P1", "x"), ("P2", "y")]
    folders = [
        group("s/one", patients=["i1", "i2"], sources=["/d/s/one/1.png", "/d/s/one/2.png"]),
        group("t/two", patients=["i3"], sources=["/d/t/two/1.png"]),
    ]
    for text in ("s/one,x\nt/two,y\n", "one,x\ntwo,y\n", "/d/s/one,x\n/d/t/two,y\n", "s/one/2.png,x\nt/two/1.png,y\n"):
        file = written(tmp_path / "f.csv", "slide,label\n" + text)
        assert [(g.id, g.label) for g in find(folders, file, by="folder")] == [("s/one", "x"), ("t/two", "y")]


def test_files_of_two_suffixes_are_named_without_either(tmp_path: Path) -> None:
    groups = [group(name, sources=[f"/d/{name}"]) for name in ("a.nii.gz", "b.OME.TIF", "c.1.svs")]
    file = written(tmp_path / "l.csv", "file,label\na,x\nb,y\nc.1,x\n")
    assert [g.label for g in find(groups, file)] == ["x", "y", "x"]


def test_slides_that_share_a_patient_anywhere_belong_together() -> None:
    groups = [
        group("a", labels=["x"], patients=["P1", "P2"]),
        group("b", labels=["y"], patients=["P2"]),
        group("c", labels=["x"], patients=["P3"]),
        group("d", labels=["x"]),
    ]
    found = find(groups)
    assert found[0].patient == found[1].patient
    assert len({g.patient for g in found}) == 3
    assert [g.patient for g in found[2:]] == ["P3", "d"]


def test_windows_of_several_labels_or_sides_in_one_group_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"slide 'b' have several labels: 'x', 'y'.*--labels"):
        find([group("a", labels=["x"]), group("b", labels=["x", "y"])])
    mixed = [group("a", labels=["x"], splits=["train", "test"]), group("b", labels=["y"])]
    with pytest.raises(UsageError, match=r"slide 'a' are on several sides of the split: 'train', 'test'"):
        find(mixed)
    assert len(find(mixed, split=IGNORE)) == 2


def test_one_patient_on_two_sides_is_refused_by_name(tmp_path: Path) -> None:
    sides = [
        group("a", labels=["x"], patients=["P1"], splits=["train"]),
        group("b", labels=["y"], patients=["P1"], splits=["test"]),
    ]
    with pytest.raises(UsageError, match=r"store.zarr: on several sides of the split: 'P1' \(test and train\)"):
        find(sides)
    file = written(tmp_path / "l.csv", "slide,label,patient\na,x,Q\nb,y,Q\n")
    with pytest.raises(UsageError, match=r"l.csv: on several sides of the split: 'Q'"):
        find(sides, file)
    file = written(tmp_path / "m.csv", "slide,label,patient,split\na,x,Q,train\nb,y,Q,test\n")
    with pytest.raises(UsageError, match=r"m.csv: on several sides of the split: 'Q'"):
        find(FOUR, file)


def test_one_class_or_no_label_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"all 2 labelled slides are of one class, 'x'.*--label-column"):
        find([group("a", labels=["x"]), group("b", labels=["x"])])
    with pytest.raises(UsageError, match=r"store.zarr: none of the 4 slides has a label. Give a CSV .*--labels"):
        find(FOUR)
    file = written(tmp_path / "l.csv", "slide,grade\na,x\nb,y\n")
    with pytest.raises(UsageError, match=r"l.csv: none of the 4 slides has a label.*--label-column"):
        find(FOUR, file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x00\x01\xff\xfe\x89PNG", r"l.csv: not a CSV file in UTF-8"),
        ("slide,label\na,größe\n".encode("latin-1"), r"l.csv: not a CSV file in UTF-8.*Save the table as CSV in UTF-8"),
        (b"", r"l.csv: no column names the sources; it has none.*--path-column"),
        (b"slide,label\n", r"l.csv: it has no lines.*Leave out --labels"),
        (b"slide,label\nq,x\nr,y\n", r"none of its 2 lines names one of the 4 sources.*leave out --labels"),
        (b"wsi,label\na,x\n", r"no column names the sources; it has wsi, label.*--path-column"),
        (b"slide,label\na,x\na,y\n", r"'a': lines contradict each other, label 'x' and 'y'"),
    ],
)
def test_an_unreadable_or_wrong_file_is_refused_with_the_way_out(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "l.csv"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        find(FOUR, file)


def test_a_file_or_column_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"missing.csv: the labels cannot be read.*--labels"):
        find(FOUR, tmp_path / "missing.csv")
    file = written(tmp_path / "l.csv", "slide,diagnosis\na,x\n")
    with pytest.raises(UsageError, match=r"there is no column 'diagnoses'. Did you mean 'diagnosis'\?"):
        find(FOUR, file, label="diagnoses")
    with pytest.raises(UsageError, match=r"--label-column names a column of a labels file.*--labels"):
        LabelColumns(None, label="x")
