"""Exhibits as files, and pictures of windows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fmsuite.core.data.index import SampleIndex, Window
from fmsuite.core.data.sample import ArraySample
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.inputs import InputSpec, rgb_channels
from fmsuite.core.reports.exhibits import EXHIBITS, PICTURES, Evidence, Exhibits, FeatureMap, Neighbours, Picture
from fmsuite.core.reports.pictures import window_pictures
from fmsuite.errors import FmsuiteError, ReadFailure, UsageError


def square(shade: int) -> Picture:
    return Picture.of(np.full((16, 16, 3), shade, np.uint8), f"A square of shade {shade}", f"shade {shade}", 1)


@pytest.fixture
def exhibits() -> Exhibits:
    return Exhibits(
        maps=[
            FeatureMap(
                encoder="vit",
                method="t-SNE",
                x=[0, 1],
                y=[1, 0],
                labels=[0, -1],
                held_out=[True, False],
                sampled_from=9,
            )
        ],
        neighbours=[
            Neighbours(encoder="vit", query=square(10), nearest=[square(90), square(10)], distances=[0.1, 0.2])
        ],
        evidence=[
            Evidence(
                encoder="vit",
                method="mi_simpleshot",
                item="../slide é/1",
                true=0,
                predicted=1,
                scores=[0.4, 0.6],
                heatmap=square(200),
                top={"a/b": [square(90)], "c": []},
            )
        ],
        notes=["One slide could not be read."],
    )


def test_what_is_written_is_read_back(exhibits: Exhibits, tmp_path: Path) -> None:
    exhibits.write(tmp_path)
    again = Exhibits.read(tmp_path)
    assert again.model_dump() == exhibits.model_dump()
    shades = [10, 90, 10, 200, 90]
    for picture, shade in zip(again.pictures(), shades, strict=True):
        assert picture.image is None
        with Image.open(tmp_path / picture.file) as image:
            assert image.format == "JPEG"
            assert np.asarray(image) == pytest.approx(shade, abs=3)
        assert picture.content(tmp_path) == (tmp_path / picture.file).read_bytes()


def test_equal_pictures_are_one_file_with_a_safe_name(exhibits: Exhibits, tmp_path: Path) -> None:
    exhibits.write(tmp_path)
    names = {path.name for path in (tmp_path / PICTURES).iterdir()}
    assert len(names) == 3
    assert all(name.isascii() and name.replace("-", "").replace(".", "").isalnum() for name in names)
    assert {path.name for path in tmp_path.iterdir()} == {EXHIBITS, PICTURES}


def test_writing_again_removes_only_pictures_that_are_not_needed_any_more(exhibits: Exhibits, tmp_path: Path) -> None:
    exhibits.write(tmp_path)
    (tmp_path / PICTURES / "mine.jpg").write_bytes(b"x")
    kept = exhibits.neighbours[0].query.file
    exhibits.evidence = []
    exhibits.neighbours[0].nearest.clear()
    exhibits.neighbours[0].distances.clear()
    exhibits.write(tmp_path)
    assert {path.name for path in (tmp_path / PICTURES).iterdir()} == {Path(kept).name, "mine.jpg"}


def test_exhibits_that_were_read_can_be_written_again(exhibits: Exhibits, tmp_path: Path) -> None:
    exhibits.write(tmp_path)
    Exhibits.read(tmp_path).write(tmp_path)
    assert Exhibits.read(tmp_path).model_dump() == exhibits.model_dump()
    with pytest.raises(FmsuiteError, match="'shade 10' has no pixels"):
        Exhibits.read(tmp_path).write(tmp_path / "elsewhere")


def edited(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        raw = json.loads((folder / EXHIBITS).read_text())
        change(raw)
        (folder / EXHIBITS).write_text(json.dumps(raw))

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / EXHIBITS).unlink(), "exhibits.json: No such file"),
        (lambda folder: (folder / EXHIBITS).write_text("{"), "damaged exhibits"),
        (lambda folder: (folder / EXHIBITS).write_text("[]"), "damaged exhibits"),
        (edited(lambda raw: raw.update(format=99)), "newer fmsuite"),
        (edited(lambda raw: raw.update(extra=1)), "extra_forbidden"),
        (edited(lambda raw: raw["maps"][0]["x"].pop()), "differ in length"),
        (edited(lambda raw: raw["neighbours"][0]["distances"].pop()), "differ in length"),
        (edited(lambda raw: raw["neighbours"][0]["query"].update(file="../../secret")), "outside exhibits/"),
        (edited(lambda raw: raw["neighbours"][0]["query"].update(file="/etc/passwd")), "outside exhibits/"),
        (edited(lambda raw: raw["neighbours"][0]["query"].update(file="exhibits/..")), "outside exhibits/"),
        (edited(lambda raw: raw["neighbours"][0]["query"].update(file="exhibits/gone.jpg")), "gone.jpg' is missing"),
        (edited(lambda raw: raw["neighbours"][0]["query"].update(file="")), "'shade 10' is missing"),
    ],
)
def test_damage_is_named(exhibits: Exhibits, tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    exhibits.write(tmp_path)
    damage(tmp_path)
    with pytest.raises(UsageError, match=message) as error:
        Exhibits.read(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_picture_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Write the exhibits first"):
        square(1).content(tmp_path)
    with pytest.raises(UsageError, match=r"gone\.jpg: this picture of exhibits\.json cannot be read"):
        Picture(file="exhibits/gone.jpg", alt="a", caption="b").content(tmp_path)


def test_a_folder_that_cannot_be_written_to_is_named(exhibits: Exhibits, tmp_path: Path) -> None:
    (tmp_path / PICTURES).write_text("in the way")
    with pytest.raises(FmsuiteError, match="cannot be written"):
        exhibits.write(tmp_path)


class Shades:
    """Windows whose shade is their row; those of 'bad.png' cannot be read."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size
        self.read_sources: list[str] = []

    def read(self, window: Window) -> ArraySample:
        self.read_sources.append(window.source)
        if window.source == "bad.png":
            raise ReadFailure("bad.png", "read", "it is damaged.", "Copy it again.")
        return ArraySample(np.full((3, *self.size), int(window.position[0]), np.uint8))


def pictures_of(size: tuple[int, int], rows: list[int], skipped: SkippedLog) -> tuple[dict[int, Image.Image], Shades]:
    sources = ["a.png", "bad.png", "c.png"]
    index = SampleIndex.from_windows(
        [Window(source, source, (10.0 * row, 0.0), (8.0, 8.0)) for row, source in enumerate(sources)]
    )
    reader = Shades(size)
    spec = InputSpec(axes=("y", "x"), size=size, channels=rgb_channels(), scale=1 / 255)
    found = window_pictures(
        index, reader, lambda values, spec: np.ascontiguousarray(values.transpose(1, 2, 0)), spec, rows, 64,
        skipped=skipped,
    )  # fmt: skip
    return found, reader


def test_window_pictures_are_read_once_and_reduced() -> None:
    skipped = SkippedLog()
    found, reader = pictures_of((128, 128), [2, 0, 2], skipped)
    assert list(found) == [2, 0]
    assert [found[row].getpixel((5, 5)) for row in (2, 0)] == [(20, 20, 20), (0, 0, 0)]
    assert found[0].size == (64, 64)
    assert reader.read_sources == ["c.png", "a.png"]
    assert not skipped.entries


def test_windows_that_cannot_be_read_are_recorded_and_left_out() -> None:
    skipped = SkippedLog()
    found, _ = pictures_of((32, 32), [1, 2], skipped)
    assert list(found) == [2]
    assert [(entry.path, entry.stage) for entry in skipped.entries] == [("bad.png", "read")]
    assert pictures_of((32, 32), [1], SkippedLog())[0] == {}
    with pytest.raises(FmsuiteError, match="it is damaged"):
        pictures_of((32, 32), [1], SkippedLog(strict=True))


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        ((20, 20), (60, 60)),
        ((33, 33), (33, 33)),
        ((128, 384), (192, 64)),
        ((10, 100), (100, 10)),
        ((64, 800), (192, 15)),
    ],
)
def test_small_windows_get_whole_squares_for_pixels_and_wide_ones_more_room(
    size: tuple[int, int], shown: tuple[int, int]
) -> None:
    assert pictures_of(size, [0], SkippedLog())[0][0].size == shown
