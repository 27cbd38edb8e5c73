"""Pictures of windows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from fmsuite.tiling.preview import CONTOUR, WINDOW, contact_sheet, draw_windows, outline, picture_path


def test_windows_and_contour_stand_where_they_should() -> None:
    rgb = np.full((40, 80, 3), 250, np.uint8)
    mask = np.zeros((40, 80), bool)
    mask[10:30, 50:70] = True
    picture = np.asarray(draw_windows(rgb, np.array([[5.0, 10.0]]), (20, 20), mask, longest=800))
    assert picture.shape == (400, 800, 3)
    assert tuple(picture[50, 200]) == WINDOW
    assert tuple(picture[150, 100]) == WINDOW
    assert tuple(picture[150, 200]) == (250, 250, 250)
    green = (picture == CONTOUR).all(axis=-1)
    rows, columns = np.flatnonzero(green.any(axis=1)), np.flatnonzero(green.any(axis=0))
    assert abs(rows[0] - 100) <= 2
    assert abs(rows[-1] - 299) <= 2
    assert abs(columns[0] - 500) <= 2
    assert abs(columns[-1] - 699) <= 2


def test_windows_smaller_than_their_lines_become_a_tint() -> None:
    rgb = np.full((1000, 1000, 3), 250, np.uint8)
    picture = np.asarray(draw_windows(rgb, np.array([[100.0, 100.0]]), (20, 20), longest=200))
    assert (picture[22, 22] < 250).all()
    assert (picture[40, 40] == 250).all()


def test_outline_leaves_the_pictures_border_open() -> None:
    mask = np.zeros((5, 5), bool)
    mask[:, :3] = True
    assert np.array_equal(outline(mask), np.tile([False, False, True, False, False], (5, 1)))


def test_contact_sheet_holds_every_picture() -> None:
    pictures = [Image.new("RGB", (50, 30), (n, 0, 0)) for n in (10, 20, 30)]
    sheet = np.asarray(contact_sheet(pictures, ["a", "b", "Ж"], columns=2, cell=64))
    assert sheet.shape == (2 * 78, 128, 3)
    assert {10, 20, 30} <= set(np.unique(sheet[..., 0]))


def test_contact_sheet_without_captions_has_no_room_for_them() -> None:
    pictures = [Image.new("RGB", (100, 100), (n, 0, 0)) for n in (10, 20, 30)]
    sheet = np.asarray(contact_sheet(pictures, None, 2, 64, (128, 128, 128)))
    assert sheet.shape == (128, 128, 3)
    assert (sheet[2:62, 2:62] == (10, 0, 0)).all()
    assert (sheet[64:, 64:] == 128).all()
    assert (sheet[:2] == 128).all()


def test_pictures_have_names_that_suit_any_file_system(tmp_path: Path) -> None:
    assert picture_path(tmp_path, 7, "a b/c:é.svs") == tmp_path / "00007_a_b_c_.svs.png"
    assert len(picture_path(tmp_path, 7, "x" * 300).name) == 90
