"""Labels files: which line is about which source, and what is refused."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmsuite.core.data.skipped import SkippedLog
from fmsuite.errors import FmsuiteError, UsageError
from fmsuite.tiling.labels import Assigned, LabelOptions, SourceLabel, assign_labels
from fmsuite.tiling.sources import SourceFile, find_files

SUFFIXES = (".svs", ".nii.gz", ".tif")


def touch(root: Path, *names: str) -> list[SourceFile]:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return find_files([root], SUFFIXES)


def table(root: Path, text: str, name: str = "labels.csv") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text, encoding="utf-8")
    return root / name


def assign(root: Path, files: list[SourceFile], **options: Any) -> Assigned:
    skipped = SkippedLog()
    assigned = assign_labels(LabelOptions(**options), [root], files, skipped)
    assert not skipped.entries
    return assigned


def names(assigned: Assigned, root: Path) -> dict[str, str | None]:
    return {path.relative_to(root).as_posix(): known.label for path, known in assigned.by_path.items()}


def test_a_line_names_a_source_by_any_form_of_its_path_or_name(tmp_path: Path) -> None:
    files = touch(tmp_path, "in/a.svs", "b.svs", "in/c.nii.gz", "in/d.svs", "e.svs", "in/f.tif", "g.svs", "h.v1.svs")
    forms = ["in/a.svs", "in\\b.svs", "c", "in/d", f"{tmp_path}/e.svs", "f.tif", "./g", "h.v1"]
    forms[1] = ".\\b.svs"
    table(tmp_path, "path,label\n" + "".join(f"{form},{number}\n" for number, form in enumerate(forms)))
    found = names(assign(tmp_path, files), tmp_path)
    assert [found[file] for file in ("in/a.svs", "b.svs", "in/c.nii.gz", "in/d.svs")] == ["0", "1", "2", "3"]
    assert [found[file] for file in ("e.svs", "in/f.tif", "g.svs", "h.v1.svs")] == ["4", "5", "6", "7"]


def test_paths_count_from_the_labels_files_folder_too_and_links_are_followed(tmp_path: Path) -> None:
    files = touch(tmp_path / "data", "x/a.svs", "y/a.svs")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    path = table(tmp_path / "tables", "path,label\n../data/x/a.svs,one\n../link/y/a,two\n", "mine.csv")
    found = names(assign(tmp_path / "data", files, labels=path), tmp_path / "data")
    assert found == {"x/a.svs": "one", "y/a.svs": "two"}


def test_a_source_that_is_a_link_is_found_by_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "0001.svs").touch()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.svs").symlink_to(tmp_path / "store" / "0001.svs")
    path = table(tmp_path, f"path,label\n{tmp_path}/store/0001.svs,x\n", "mine.csv")
    assigned = assign(tmp_path / "data", find_files([tmp_path / "data"], SUFFIXES), labels=path)
    assert names(assigned, tmp_path / "data") == {"a.svs": "x"}


def test_the_most_exact_form_decides(tmp_path: Path) -> None:
    files = touch(tmp_path, "a.svs", "sub/a.svs", "b.svs", "b.tif", "sub/b.svs.tif")
    table(tmp_path, "path,label\na.svs,top\nsub/a,below\nb.svs,slide\nb.tif,image\n")
    found = names(assign(tmp_path, files), tmp_path)
    assert found == {"a.svs": "top", "sub/a.svs": "below", "b.svs": "slide", "b.tif": "image"}


@pytest.mark.parametrize("form", ["c.svs", "c", "b"])
def test_a_name_that_fits_several_sources_is_refused(tmp_path: Path, form: str) -> None:
    files = touch(tmp_path, "x/c.svs", "y/c.svs", "b.svs", "b.tif")
    table(tmp_path, f"path,label\n{form},one\n")
    with pytest.raises(UsageError, match=f"'{form}' names 2 files, such as .* and .*below the given folder"):
        assign(tmp_path, files)


NAME = st.sampled_from(["a", "b", "a.b", "a.svs"])


@given(
    st.sets(st.tuples(st.lists(NAME, max_size=2), NAME, st.sampled_from(SUFFIXES)).map(lambda t: (*t[0], t[1] + t[2]))),
    st.data(),
)
@settings(max_examples=60, deadline=None)
def test_every_source_that_a_line_names_uniquely_gets_it(tree: set[tuple[str, ...]], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        made = set()
        for parts in sorted(tree):
            path = root.joinpath(*parts)
            # A file and a folder of one name cannot both be.
            if not any(parent.is_file() for parent in path.parents) and not path.is_dir():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
                made.add(path)
        if not made:
            return
        given_folders = [root, *sorted(entry for entry in root.iterdir() if entry.is_dir())]
        given_folders = data.draw(st.permutations([f for f in given_folders if any(p.is_relative_to(f) for p in made)]))
        files = find_files(given_folders, SUFFIXES)
        tables = data.draw(st.sampled_from([root, root.parent]))

        def calls(file: SourceFile) -> set[str]:
            bare = next(file.path.name[: -len(end)] for end in SUFFIXES if file.path.name.endswith(end))
            spelled = {str(file.path), file.relative, os.path.relpath(file.path, tables), file.path.name}
            spelled |= {text[: -len(file.path.name)] + bare for text in spelled} | {file.group}
            return spelled | {text.replace("/", "\\") for text in spelled} | {f"./{file.relative}"}

        file = data.draw(st.sampled_from(files))
        form = data.draw(st.sampled_from(sorted(calls(file))))
        fitting = [other.path for other in files if form in calls(other)]
        with tempfile.NamedTemporaryFile("w", dir=tables, suffix=".csv", newline="") as lines:
            lines.write(f'path,label\n"{form}",x\n')
            lines.flush()
            options = LabelOptions(labels=Path(lines.name))
            try:
                assigned = assign_labels(options, given_folders, files, SkippedLog()).by_path
            except UsageError:
                if len(fitting) < 2:
                    raise
                return
        assert len(assigned) == 1
        assert set(assigned) <= set(fitting)
        if len(fitting) == 1:
            assert assigned == {file.path: SourceLabel("x")}


def test_columns_have_usual_names_in_any_case(tmp_path: Path) -> None:
    files = touch(tmp_path, "a.svs")
    table(tmp_path, "\ufeffSlide, Diagnosis ,Patient_ID,FOLD,age\na,x,P1,train,60\n")
    assert assign(tmp_path, files).of(files[0]) == SourceLabel("x", "P1", "train")


def test_columns_with_other_names_are_named_in_the_options(tmp_path: Path) -> None:
    files = touch(tmp_path, "a.svs")
    table(tmp_path, "scan,dx,who,part\na,x,p1,train\n")
    columns = {"path_column": "scan", "label_column": "dx", "group_column": "who", "split_column": "part"}
    assert assign(tmp_path, files, **columns).of(files[0]) == SourceLabel("x", "p1", "train")
    with pytest.raises(UsageError, match=r"labels.csv: no column names the sources; it has scan, dx, who, part"):
        assign(tmp_path, files)
    with pytest.raises(UsageError, match=r"no column 'dxx'.*Did you mean 'dx'"):
        assign(tmp_path, files, path_column="scan", label_column="dxx")


def test_a_column_that_is_named_for_one_role_does_not_play_its_usual_one(tmp_path: Path) -> None:
    files = touch(tmp_path, "a.svs", "b.svs")
    table(tmp_path, "path,group,patient\na,faces,p1\nb,faces,p2\n")
    assigned = assign(tmp_path, files, label_column="group")
    assert [assigned.of(file) for file in files] == [SourceLabel("faces", "p1"), SourceLabel("faces", "p2")]


def test_sides_can_be_ignored(tmp_path: Path) -> None:
    files = touch(tmp_path, "a.svs", "b.svs")
    table(tmp_path, "path,label,patient,split\na,x,p1,train\na,x,p1,val\nb,y,p1,test\n")
    with pytest.raises(UsageError, match="split"):
        assign(tmp_path, files)
    assigned = assign(tmp_path, files, split_column="none")
    assert [assigned.of(file) for file in files] == [SourceLabel("x", "p1"), SourceLabel("y", "p1")]


def test_labels_are_found_in_given_folders_named_or_switched_off(tmp_path: Path) -> None:
    files = touch(tmp_path / "data", "a.svs", "sub/b.svs")
    found = table(tmp_path / "data", "path,label\na,x\n")
    table(tmp_path / "data" / "sub", "path,label\nb,deeper\n")
    assigned = assign(tmp_path / "data", files)
    assert assigned.summary() == {"files": [str(found)], "rows": 1, "matched": 1}
    other = table(tmp_path, "path,label\nb,y\n", "other.csv")
    assert names(assign(tmp_path / "data", files, labels=other), tmp_path / "data") == {"sub/b.svs": "y"}
    assert assign(tmp_path / "data", files, labels="none") == Assigned()
    single = find_files([tmp_path / "data" / "a.svs"], SUFFIXES)
    assert assign(tmp_path / "data" / "a.svs", single) == Assigned()


def test_each_folders_own_labels_are_about_the_sources_below_it(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        touch(folder, "a.svs")
        table(folder, f"path,label\na,{folder.name}\n")
    files = find_files(folders, SUFFIXES)
    assigned = assign_labels(LabelOptions(), [*folders, folders[0]], files, SkippedLog())
    assert [assigned.of(file).label for file in files] == ["one", "two"]
    assert assigned.rows == 2


def test_lines_that_agree_complete_each_other_and_empty_cells_say_nothing(tmp_path: Path) -> None:
    files = touch(tmp_path, "a.svs", "b.svs")
    table(tmp_path, "path,label,patient,split\na,x,,\na.svs,,p1,\n,,,\na,x,p1,test\nb,,\n")
    assigned = assign(tmp_path, files)
    assert [assigned.of(file) for file in files] == [SourceLabel("x", "p1", "test"), SourceLabel()]


@pytest.mark.parametrize("column", ["label", "group", "split"])
def test_lines_that_contradict_each_other_are_refused(tmp_path: Path, column: str) -> None:
    files = touch(tmp_path, "a.svs")
    table(tmp_path, f"path,{column}\na,x\na.svs,y\n")
    with pytest.raises(UsageError, match=rf"labels.csv: 'a.svs': lines contradict each other, {column} 'x' and 'y'"):
        assign(tmp_path, files)


def test_a_group_on_two_sides_of_the_split_is_refused_by_name(tmp_path: Path) -> None:
    files = touch(tmp_path, "a.svs", "b.svs", "c.svs")
    table(tmp_path, "path,patient,split\na,P-17,train\nb,P-17,test\nc,P-2,test\n")
    with pytest.raises(UsageError, match=r"labels.csv: on several sides of the split: 'P-17' \(test and train\)\."):
        assign(tmp_path, files)
    rows = "".join(f"{name},P-{n},{side}\n" for n in range(5) for name, side in (("a", "train"), ("zz", "test")))
    with pytest.raises(UsageError, match="contradict"):
        assign(tmp_path, files, labels=table(tmp_path, f"path,patient,split\n{rows}", "l.csv"))


def test_the_other_side_of_a_split_may_be_in_a_line_without_a_source_or_in_another_file(tmp_path: Path) -> None:
    files = touch(tmp_path / "one", "a.svs")
    path = table(tmp_path, "path,patient,split\na,P1,train\nelsewhere,P1,test\n", "all.csv")
    with pytest.raises(UsageError, match=r"'P1' \(test and train\)"):
        assign_labels(LabelOptions(labels=path), [tmp_path / "one"], files, SkippedLog())
    touch(tmp_path / "two", "b.svs")
    table(tmp_path / "one", "path,patient,split\na,P1,train\n")
    table(tmp_path / "two", "path,patient,split\nb,P1,test\n")
    folders = [tmp_path / "one", tmp_path / "two"]
    with pytest.raises(UsageError, match=r"one/labels.csv, .*two/labels.csv: .*'P1'"):
        assign_labels(LabelOptions(), folders, find_files(folders, SUFFIXES), SkippedLog())


def test_many_shared_groups_are_counted(tmp_path: Path) -> None:
    files = touch(tmp_path, "a.svs")
    rows = "".join(f"x{n}{side},P-{n},{side}\n" for n in range(5) for side in ("train", "test"))
    table(tmp_path, f"path,patient,split\na,,\n{rows}")
    with pytest.raises(UsageError, match=r"'P-0' .*'P-1' .*'P-2' \(test and train\) and 2 more"):
        assign_labels(LabelOptions(), [tmp_path], files, SkippedLog())


def test_lines_without_a_source_are_reported(tmp_path: Path) -> None:
    files = touch(tmp_path, "a.svs")
    path = table(tmp_path, "path,label\na,x\ngone/b.svs,y\nc,z\n")
    skipped = SkippedLog()
    assigned = assign_labels(LabelOptions(), [tmp_path], files, skipped)
    assert (assigned.rows, len(assigned.by_path)) == (3, 1)
    assert [(entry.path, entry.stage) for entry in skipped.entries] == [("gone/b.svs", "labels"), ("c", "labels")]
    assert str(path) in skipped.entries[0].reason
    with pytest.raises(FmsuiteError, match=r"gone/b\.svs"):
        assign_labels(LabelOptions(), [tmp_path], files, SkippedLog(strict=True))


def test_a_table_that_fits_nothing_is_refused_with_both_names(tmp_path: Path) -> None:
    files = touch(tmp_path, "a.svs")
    table(tmp_path, "path,label\nzzz,x\n")
    with pytest.raises(UsageError, match=r"none of its 1 lines.*'zzz'.*'a\.svs'"):
        assign(tmp_path, files)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"path,label\n\xff\xfe,x\n", "not a CSV file in UTF-8"),
        (b'path,label\n"a"b,x\n', "not a CSV file, from line 2 on .*quote"),
        (b'path,label\n"a,x\nb,y\n', "not a CSV file, from line 3 on .*quote"),
        (b"path;label\na;x\n", "not separated by commas; the first line is 'path;label'"),
        (b"path\tlabel\na\tx\n", "not separated by commas"),
        (b"", "no column names the sources; it has none"),
        (b"path,label\n", "no lines below the names of its columns"),
        (b"path,label\na,x\n,y\n", r"line 3 names no source\. Fill in its 'path'"),
        (b'path,label\n"a",x\n\nb,x,y\n', "line 4 has 3 cells, and the first line names 2 columns"),
        (b"path,label,label\na,x,y\n", "2 columns 'label'"),
    ],
)
def test_malformed_tables_are_wrong_use(tmp_path: Path, content: bytes, message: str) -> None:
    files = touch(tmp_path, "a.svs", "b.svs")
    (tmp_path / "labels.csv").write_bytes(content)
    with pytest.raises(UsageError, match=f"labels.csv: .*{message}"):
        assign(tmp_path, files)


def test_a_missing_labels_file_is_wrong_use(tmp_path: Path) -> None:
    files = touch(tmp_path, "a.svs")
    for missing in ("none.csv", "."):
        with pytest.raises(UsageError, match="the labels cannot be read"):
            assign(tmp_path, files, labels=tmp_path / missing)


def test_a_line_may_name_a_place_and_is_about_all_of_its_sources(tmp_path: Path) -> None:
    files = touch(tmp_path, "lake_1.tif", "lake_2.tif", "wood_1.tif", "lake.svs")
    places = {file.path: file.path.stem.split("_")[0] for file in files if "_" in file.path.name}
    table(tmp_path, "path,label,group,split\nlake,water,north,train\nwood_1.tif,land,,test\n")
    assigned = assign_labels(LabelOptions(), [tmp_path], files, SkippedLog(), places)
    assert {path.name: known for path, known in assigned.by_path.items()} == {
        "lake_1.tif": SourceLabel("water", "north", "train"),
        "lake_2.tif": SourceLabel("water", "north", "train"),
        "wood_1.tif": SourceLabel("land", None, "test"),
    }


def test_a_place_is_a_group(tmp_path: Path) -> None:
    files = touch(tmp_path, "lake_1.tif", "lake_2.tif")
    places = {file.path: "lake" for file in files}
    table(tmp_path, "path,split\nlake_1,train\nlake_2,test\n")
    with pytest.raises(UsageError, match=r"'lake' \(test and train\)"):
        assign_labels(LabelOptions(), [tmp_path], files, SkippedLog(), places)
    table(tmp_path, "path,split,scene\nlake_1,train,east\nlake_2,test,west\n")
    assert len(assign_labels(LabelOptions(), [tmp_path], files, SkippedLog(), places).by_path) == 2


def test_sources_that_are_one_thing_share_what_is_known_of_any(tmp_path: Path) -> None:
    files = touch(tmp_path, "lake_1.tif", "lake_2.tif", "lake_3.tif")
    table(tmp_path, "path,label,split\nlake_1,water,\nlake_3,,test\n")
    assigned = assign(tmp_path, files)
    assert assigned.of(*files) == SourceLabel("water", None, "test")
    assert assigned.of(files[1]) == SourceLabel()
    table(tmp_path, "path,label\nlake_1,water\nlake_3,land\n")
    with pytest.raises(UsageError, match=r"labels.csv: 'lake_3.tif' and files of the same place.*'water' and 'land'"):
        assign(tmp_path, files).of(*files)


def test_the_index_groups_and_a_stem_with_part_of_the_suffix_name_sources(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        touch(tmp_path / folder, "a.nii.gz", f"{folder}.nii.gz")
    folders = [tmp_path / "one", tmp_path / "two"]
    files = find_files(folders, SUFFIXES)
    assert [file.group for file in files][::2] == ["one/a.nii.gz", "two/a.nii.gz"]
    path = table(tmp_path / "else", "path,label\none/a.nii.gz,x\ntwo/a.nii.gz,y\none.nii,z\n", "l.csv")
    assigned = assign_labels(LabelOptions(labels=path), folders, files, SkippedLog())
    assert {file.group: assigned.of(file).label for file in files} == {
        "one/a.nii.gz": "x",
        "one": "z",
        "two/a.nii.gz": "y",
        "two": None,
    }


def test_a_folders_labels_reach_sources_that_were_found_through_a_link_into_it(tmp_path: Path) -> None:
    touch(tmp_path / "data", "in/a.svs")
    (tmp_path / "link").symlink_to(tmp_path / "data" / "in")
    table(tmp_path / "data", "path,label\nin/a.svs,x\n")
    folders = [tmp_path / "link", tmp_path / "data"]
    files = find_files(folders, SUFFIXES)
    assert [file.path for file in files] == [tmp_path / "link" / "a.svs"]
    assert assign_labels(LabelOptions(), folders, files, SkippedLog()).of(files[0]).label == "x"
