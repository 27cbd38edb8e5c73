"""``fmsuite tile``: the index, what could not be used, and pictures of both."""

from __future__ import annotations

import csv
import shutil
import signal
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
from PIL import Image

from fmsuite.core.data.index import SampleIndex
from fmsuite.domains.pathology.example import write_slide
from fmsuite.domains.pathology.slides import open_source

MPP = 0.5


@pytest.fixture(scope="module")
def tissue() -> np.ndarray:
    """(512, 512, 3) uint8: stained structure that fills the slide."""
    random = np.random.default_rng(3)
    coarse = random.random((32, 32, 1)).repeat(16, 0).repeat(16, 1)
    picture = np.where(coarse < 0.4, (110, 80, 140), (215, 140, 180)).astype(np.int16)
    return np.clip(picture + random.integers(-12, 13, picture.shape), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def slide(tissue: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slide") / "good.tif"
    write_slide(path, tissue, MPP)
    return path


@pytest.fixture
def folder(tmp_path: Path, slide: Path) -> Path:
    """A folder with one good slide."""
    made = tmp_path / "slides"
    made.mkdir()
    shutil.copy(slide, made / "good.tif")
    return made


def tile(fmsuite, *arguments: object):
    return fmsuite("tile", "--domain", "pathology", *arguments, "--set", "size=128")


def test_the_index_lists_the_windows_and_opens_in_a_data_frame(fmsuite, folder: Path, tmp_path: Path) -> None:
    ran = tile(fmsuite, folder, "--out", tmp_path / "index.parquet")
    assert ran.code == 0, ran.text
    assert f"16 windows from 1 sources: {tmp_path / 'index.parquet'}" in ran.text
    index = SampleIndex.read(tmp_path / "index.parquet")
    assert index.sources == [str(folder / "good.tif")]
    assert {index[row].position for row in range(len(index))} == {
        (128.0 * y, 128.0 * x) for y in range(4) for x in range(4)
    }
    assert index.metadata["domain"] == "pathology"
    assert index.metadata["options"]["size"] == 128
    table = pq.read_table(tmp_path / "index.parquet")
    assert table.num_rows == 16
    assert {"source", "group", "position", "extent", "content", "label", "split"} <= set(table.column_names)
    assert not (tmp_path / "skipped.csv").exists()
    assert not (tmp_path / "preview").exists()


def test_out_may_be_a_folder_and_options_may_be_prefixed(fmsuite, folder: Path, tmp_path: Path) -> None:
    arguments = [folder, "--out", tmp_path / "made" / "here", "--set", "data.max_windows=3"]
    assert tile(fmsuite, *arguments).code == 0
    assert len(SampleIndex.read(tmp_path / "made" / "here" / "index.parquet")) == 3


def test_tiling_twice_gives_the_same_index(fmsuite, folder: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert tile(fmsuite, folder, "--out", tmp_path / name, "--set", "max_windows=5").code == 0
    first, second = (SampleIndex.read(tmp_path / name / "index.parquet") for name in "ab")
    assert first.hash == second.hash


def test_a_preview_shows_the_slide_with_its_windows(fmsuite, folder: Path, tmp_path: Path) -> None:
    ran = tile(fmsuite, folder, "--out", tmp_path / "index.parquet", "--preview")
    assert ran.code == 0, ran.text
    assert f"1 previews: {tmp_path / 'preview'}" in ran.text
    (picture,) = (tmp_path / "preview").iterdir()
    with Image.open(picture) as image:
        colours = np.asarray(image.convert("RGB")).astype(np.uint32) @ np.array([1, 2**8, 2**16], np.uint32)
    assert len(np.unique(colours)) > 10


def test_what_cannot_be_used_is_on_record_and_ends_with_3(fmsuite, folder: Path, tmp_path: Path) -> None:
    (folder / "text.svs").write_text("this is no slide", encoding="utf-8")
    (folder / "empty.svs").touch()
    (folder / "cut.tif").write_bytes((folder / "good.tif").read_bytes()[:20_000])
    write_slide(folder / "glass.tif", np.full((512, 512, 3), 243, np.uint8), MPP)
    ran = tile(fmsuite, folder, "--out", tmp_path / "index.parquet")
    assert ran.code == 3, ran.text
    assert "4 skipped" in ran.text
    assert f"See {tmp_path / 'skipped.csv'}" in ran.text
    with (tmp_path / "skipped.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert {Path(line["path"]).name for line in lines} == {"text.svs", "empty.svs", "cut.tif", "glass.tif"}
    assert min(len(line["reason"]) for line in lines) > 10
    assert len(SampleIndex.read(tmp_path / "index.parquet")) == 16


def test_a_second_try_begins_a_new_record(fmsuite, folder: Path, tmp_path: Path) -> None:
    (folder / "text.svs").write_text("this is no slide", encoding="utf-8")
    assert tile(fmsuite, folder, "--out", tmp_path / "index.parquet").code == 3
    (folder / "text.svs").unlink()
    assert tile(fmsuite, folder, "--out", tmp_path / "index.parquet").code == 0
    assert not (tmp_path / "skipped.csv").exists()


def test_strict_makes_it_an_error_that_names_the_file(fmsuite, folder: Path, tmp_path: Path) -> None:
    (folder / "text.svs").write_text("this is no slide", encoding="utf-8")
    ran = tile(fmsuite, folder, "--out", tmp_path / "index.parquet", "--strict")
    assert ran.code == 1
    assert str(folder / "text.svs") in ran.text
    assert "--strict" in ran.text
    assert not (tmp_path / "index.parquet").exists()


def test_slides_of_one_name_in_different_folders_are_both_used(fmsuite, slide: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "in" / name).mkdir(parents=True)
        shutil.copy(slide, tmp_path / "in" / name / "slide.tif")
    for number, paths in enumerate([[tmp_path / "in"], [tmp_path / "in" / "a", tmp_path / "in" / "b"]]):
        out = tmp_path / str(number)
        ran = tile(fmsuite, *paths, "--out", out, "--preview")
        assert ran.code == 0, ran.text
        index = SampleIndex.read(out / "index.parquet")
        assert len(index) == 32
        assert len(index.sources) == len(index.groups) == 2
        assert len(list((out / "preview").iterdir())) == 2


def test_a_slide_without_a_resolution_needs_mpp(fmsuite, tissue: np.ndarray, tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "unknown.tif") as file:
        for level in (tissue, tissue[::2, ::2]):
            file.write(
                level, tile=(256, 256), photometric="rgb", compression="deflate", subfiletype=level is not tissue
            )
    out = tmp_path / "index.parquet"
    ran = tile(fmsuite, tmp_path / "unknown.tif", "--out", out)
    assert ran.code == 2, ran.text
    assert "unknown.tif" in ran.text
    assert "--mpp" in ran.text
    assert not out.exists()
    ran = tile(fmsuite, tmp_path / "unknown.tif", "--out", out, "--mpp", MPP / 2)
    assert ran.code == 0, ran.text
    index = SampleIndex.read(out)
    assert index[0].spacing == (MPP / 2, MPP / 2)
    assert index[0].extent == (256.0, 256.0)


@pytest.mark.parametrize("mpp", ["0", "-1", "nan"])
def test_an_impossible_resolution_is_refused(fmsuite, folder: Path, tmp_path: Path, mpp: str) -> None:
    ran = tile(fmsuite, folder, "--out", tmp_path / "index.parquet", f"--mpp={mpp}")
    assert ran.code == 2, ran.text
    assert "mpp_override" in ran.text


def test_mpp_is_refused_where_it_means_nothing(fmsuite, tmp_path: Path) -> None:
    ran = fmsuite("tile", "--domain", "svg", tmp_path, "--out", tmp_path / "index.parquet", "--mpp", "0.5")
    assert ran.code == 2
    assert "mpp_override" in ran.text


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("empty", "empty: this folder holds no"), ("nowhere", "nowhere: there is no such file or folder")],
)
def test_nothing_to_tile_is_wrong_use(fmsuite, tmp_path: Path, name: str, sentence: str) -> None:
    (tmp_path / "empty").mkdir()
    ran = tile(fmsuite, tmp_path / name, "--out", tmp_path / "index.parquet")
    assert ran.code == 2
    assert sentence in ran.text


def test_when_nothing_could_be_used_the_first_reason_is_shown(fmsuite, tmp_path: Path) -> None:
    (tmp_path / "text.svs").write_text("this is no slide", encoding="utf-8")
    ran = tile(fmsuite, tmp_path, "--out", tmp_path / "out" / "index.parquet")
    assert ran.code == 2
    assert "No usable window" in ran.text
    assert "text.svs: not a slide" in ran.text


def test_an_index_of_another_domain_is_refused(fmsuite, settings, folder: Path, tmp_path: Path) -> None:
    assert tile(fmsuite, folder, "--out", tmp_path / "index.parquet").code == 0
    arguments = ["--data", tmp_path / "index.parquet", "--out", tmp_path / "run"]
    ran = fmsuite("pretrain", "--domain", "svg", *settings("mae"), *arguments)
    assert ran.code == 2
    assert "an index of the domain 'pathology', not 'svg'" in ran.text


def test_a_damaged_index_is_refused(fmsuite, settings, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "index.parquet"
    assert tile(fmsuite, folder, "--out", path).code == 0
    whole = path.read_bytes()
    for number, damaged in enumerate([b"", whole[: len(whole) // 2], b"PAR1" + whole[100:], b"x" * 500]):
        path.write_bytes(damaged)
        arguments = ["--data", path, "--out", tmp_path / f"run{number}"]
        ran = fmsuite("pretrain", "--domain", "pathology", *settings("mae"), *arguments)
        assert ran.code == 2, ran.text
        assert f"{path}: not a readable Parquet file" in ran.text


def test_an_index_whose_slide_was_moved_says_which(fmsuite, settings, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "index.parquet"
    assert tile(fmsuite, folder, "--out", path).code == 0
    (folder / "good.tif").rename(folder / "moved.tif")
    ran = fmsuite("pretrain", "--domain", "pathology", *settings("mae"), "--data", path, "--out", tmp_path / "run")
    assert ran.code == 1, ran.text
    assert str(folder / "good.tif") in ran.text
    assert "unexpected" not in ran.text


def test_an_interrupted_tiling_goes_on_with_what_is_missing(
    fmsuite, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source,) = folder.glob("*.tif")
    cohort = tmp_path / "cohort"
    cohort.mkdir()
    for name in "abcd":
        shutil.copy(source, cohort / f"{name}.tif")
    (cohort / "broken.svs").write_text("no slide")
    opened: list[str] = []

    def open_counted(path: str):
        if Path(path).name not in opened:
            opened.append(Path(path).name)
        if stops and "c.tif" in opened:
            raise KeyboardInterrupt
        return open_source(path)

    monkeypatch.setattr("fmsuite.domains.pathology.windows.open_source", open_counted)
    out = tmp_path / "out" / "index.parquet"
    stops = True
    assert tile(fmsuite, cohort, "--out", out).code == 130
    assert not out.exists()
    assert opened == ["a.tif", "b.tif", "broken.svs", "c.tif"]

    opened.clear()
    stops = False
    assert tile(fmsuite, cohort, "--out", out).code == 3
    assert opened == ["broken.svs", "c.tif", "d.tif"]
    assert sorted(path.name for path in out.parent.iterdir()) == ["index.parquet", "skipped.csv"]
    whole = tmp_path / "whole" / "index.parquet"
    tile(fmsuite, cohort, "--out", whole)
    assert SampleIndex.read(out).hash == SampleIndex.read(whole).hash
    assert SampleIndex.read(out).metadata == SampleIndex.read(whole).metadata
    assert (out.parent / "skipped.csv").read_text() == (whole.parent / "skipped.csv").read_text()


def test_a_killed_command_goes_on_with_what_is_missing(launcher, until, folder: Path, tmp_path: Path, fmsuite) -> None:
    cohort = tmp_path / "cohort"
    cohort.mkdir()
    for number in range(12):
        shutil.copy(folder / "good.tif", cohort / f"{number:02}.tif")
    whole, out = tmp_path / "whole" / "index.parquet", tmp_path / "out" / "index.parquet"
    assert tile(fmsuite, cohort, "--out", whole).code == 0
    parts = out.parent / ".index.parts"
    arguments = ["--domain", "pathology", str(cohort), "--out", str(out), "--set", "size=128"]
    command = launcher.start("tile", *arguments, "--processes", "0")
    until(lambda: list(parts.glob("*.parquet")))
    command.send(signal.SIGKILL)
    command.wait()
    assert not out.exists()
    assert tile(fmsuite, cohort, "--out", out).code == 0
    assert out.read_bytes() == whole.read_bytes()
    assert not parts.exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"), [(["--processes", "-1"], "-1"), (["--ray", "nowhere:1"], "nowhere:1")]
)
def test_workers_that_cannot_be_are_wrong_use(
    fmsuite, folder: Path, tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    ran = tile(fmsuite, folder, "--out", tmp_path / "index.parquet", *arguments)
    assert ran.code == 2, ran.text
    assert sentence in ran.text
