"""Windows at the asked resolution: geometry, levels, edges, damage."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

from fmsuite.commands.indexing import build_index
from fmsuite.core.data.index import SampleIndex, Window
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.domains.pathology import PathologyDomain, PathologyOptions
from fmsuite.domains.pathology.example import write_slide
from fmsuite.domains.pathology.reading import (
    SlideReader,
    best_level,
    read_region,
    read_thumbnail,
    thumbnail_pitch,
)
from fmsuite.domains.pathology.slides import Level, OpenSlideSource, PixelSource, open_source, stated_mpp, true_mpp
from fmsuite.errors import ReadFailure


class ArraySource(PixelSource):
    """A pyramid in memory, read without any library."""

    def __init__(self, levels: list[np.ndarray], mpp: float = 0.5) -> None:
        self.path = "memory"
        full = levels[0].shape
        self.pixels = levels
        self.levels = tuple(Level(a.shape[:2], (full[0] / a.shape[0], full[1] / a.shape[1])) for a in levels)
        self.mpp = (mpp, mpp)
        self.bounds = (0.0, 0.0, float(full[0]), float(full[1]))
        self.reads: list[tuple[int, int, int]] = []

    def read(self, level: int, top: int, left: int, height: int, width: int) -> tuple[np.ndarray, tuple[float, float]]:
        self.reads.append((level, height, width))
        assert top >= 0
        assert left >= 0
        region = self.pixels[level][top : top + height, left : left + width]
        assert region.shape[:2] == (height, width)
        return region, (float(top), float(left))

    def close(self) -> None:
        pass


def opaque(rgb: np.ndarray) -> np.ndarray:
    return np.concatenate([rgb, np.full((*rgb.shape[:2], 1), 255, np.uint8)], axis=2)


def ramp(height: int = 400, width: int = 500, step: int = 1) -> np.ndarray:
    """Red is x / 2, green is y / 2, at pixel centres."""
    y, x = np.mgrid[0:height:step, 0:width:step] + (step - 1) / 2
    return opaque(np.stack([x / 2, y / 2, 0 * x], axis=-1).round().astype(np.uint8))


def test_a_window_at_the_sources_own_resolution_is_its_pixels() -> None:
    source = ArraySource([ramp()])
    rgb, valid = read_region(source, (30.0, 40.0), (64.0, 96.0), (64, 96))
    assert np.array_equal(rgb, source.pixels[0][30:94, 40:136, :3])
    assert valid.all()


@pytest.mark.parametrize("scale", [1.002, 1.6, 2.0, 3.7])
def test_positions_are_exact_to_a_fraction_of_a_pixel(scale: float) -> None:
    source = ArraySource([ramp()])
    size = 64
    rgb, _ = read_region(source, (20.3, 31.7), (size * scale, size * scale), (size, size))
    centres = (np.arange(size) + 0.5) * scale - 0.5
    inner = slice(4, -4)
    assert np.abs(rgb[inner, inner, 0] - ((31.7 + centres) / 2)[None, inner]).max() <= 1.01
    assert np.abs(rgb[inner, inner, 1] - ((20.3 + centres) / 2)[inner, None]).max() <= 1.01


def test_reading_is_antialiased() -> None:
    checker = opaque(np.tile(np.array([[0, 255], [255, 0]], np.uint8)[..., None], (100, 100, 3)))
    rgb, _ = read_region(ArraySource([checker]), (0.0, 0.0), (200.0, 200.0), (50, 50))
    assert np.abs(rgb.astype(int) - 127).max() <= 2


def test_the_nearest_finer_level_is_read() -> None:
    pyramid = [ramp(), ramp(step=2), ramp(step=4)]
    source = ArraySource(pyramid)
    for scale, level in ((1.0, 0), (1.9, 0), (1.97, 1), (2.0, 1), (3.5, 1), (4.0, 2), (30.0, 2), (0.5, 0)):
        assert best_level(source, scale) == level
    coarse, _ = read_region(source, (40.0, 80.0), (256.0, 256.0), (64, 64))
    fine, _ = read_region(ArraySource(pyramid[:1]), (40.0, 80.0), (256.0, 256.0), (64, 64))
    assert source.reads[0][0] == 2
    assert np.abs(coarse.astype(int) - fine)[2:-2, 2:-2].max() <= 1


def test_neighbouring_windows_join_without_a_seam() -> None:
    rng = np.random.default_rng(0)
    source = ArraySource([opaque(rng.integers(0, 256, (300, 300, 3), dtype=np.uint8))])
    whole, _ = read_region(source, (10.0, 10.0), (240.0, 240.0), (80, 80))
    left, _ = read_region(source, (10.0, 10.0), (240.0, 120.0), (80, 40))
    right, _ = read_region(source, (10.0, 130.0), (240.0, 120.0), (80, 40))
    assert np.array_equal(np.concatenate([left, right], axis=1), whole)


def test_a_large_region_is_read_in_parts_that_join_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    source = ArraySource([opaque(rng.integers(0, 256, (500, 400, 3), dtype=np.uint8))])
    whole, _ = read_region(source, (3.0, 5.0), (480.0, 380.0), (60, 50))
    monkeypatch.setattr("fmsuite.domains.pathology.reading.BLOCK_PIXELS", 10_000)
    for striped in (False, True):
        source.striped = striped
        source.reads.clear()
        parts, _ = read_region(source, (3.0, 5.0), (480.0, 380.0), (60, 50))
        assert np.abs(parts.astype(int) - whole).max() <= 1
        assert len(source.reads) > 10
        assert max(width for _, _, width in source.reads) == (400 if striped else pytest.approx(100, abs=60))


def test_outside_is_invalid_and_of_background_colour_and_does_not_bleed_in() -> None:
    pixels = opaque(np.full((100, 100, 3), 120, np.uint8))
    source = ArraySource([pixels])
    source.background = (200, 210, 220)
    rgb, valid = read_region(source, (-20.0, 60.0), (80.0, 80.0), (40, 40))
    assert not valid[:10].any()
    assert not valid[:, 20:].any()
    assert valid[10:, :20].all()
    assert (rgb[valid] == 120).all()
    assert (rgb[~valid] == (200, 210, 220)).all()
    rgb, valid = read_region(source, (500.0, 500.0), (80.0, 80.0), (40, 40))
    assert not valid.any()
    assert (rgb == (200, 210, 220)).all()


def test_transparent_pixels_become_background_never_black() -> None:
    pixels = opaque(np.full((100, 100, 3), 90, np.uint8))
    pixels[:, 50:] = 0
    source = ArraySource([pixels])
    rgb, valid = read_region(source, (0.0, 0.0), (100.0, 100.0), (50, 50))
    assert np.array_equal(valid, np.tile(np.arange(50) < 25, (50, 1)))
    assert (rgb[:, 26:] == 255).all()
    # The filter undershoots a little at a hard edge.
    assert rgb.min() >= 70


def test_pixels_that_are_not_square_come_out_square() -> None:
    source = ArraySource([ramp()])
    rgb, _ = read_region(source, (10.0, 20.0), (64.0, 128.0), (64, 64))
    assert np.abs(rgb[5:-5, 5:-5, 0] - (20 + (np.arange(64) + 0.5) * 2 - 0.5)[None, 5:-5] / 2).max() <= 1.01


def test_properties_give_the_resolution_and_magnification_does_not() -> None:
    assert stated_mpp({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.26"}) == (0.26, 0.25)
    assert stated_mpp({"openslide.mpp-x": "0,2629"}) == (0.2629, 0.2629)
    assert stated_mpp({"aperio.MPP": "0.499"}) == (0.499, 0.499)
    inch = {"tiff.XResolution": "50800", "tiff.YResolution": "25400", "tiff.ResolutionUnit": "inch"}
    assert stated_mpp(inch) == (1.0, 0.5)
    assert stated_mpp({"openslide.objective-power": "40"}) is None
    for nonsense in ("0", "-1", "nan", "inf", "abc", ""):
        assert stated_mpp({"openslide.mpp-x": nonsense}) is None


def test_implausible_and_missing_resolutions_are_refused_with_the_way_out() -> None:
    source = ArraySource([ramp()])
    for mpp in (352.8, 0.01):
        source.mpp = (mpp, mpp)
        with pytest.raises(ReadFailure, match=r"claims .* um per pixel.*--mpp"):
            true_mpp(source, None)
        assert true_mpp(source, 0.4) == (0.4, 0.4)
    source.mpp = (0.25, 0.75)
    with pytest.raises(ReadFailure, match="too far from square"):
        true_mpp(source, None)
    source.mpp = (0.25, 0.26)
    assert true_mpp(source, None) == (0.25, 0.26)


def test_a_window_at_one_um_from_a_slide_at_a_quarter(tmp_path: Path, tissue: np.ndarray) -> None:
    path = tmp_path / "quarter.tif"
    write_slide(path, tissue, 0.25, downsamples=(2, 4))
    source = open_source(str(path))
    assert isinstance(source, OpenSlideSource)
    assert source.mpp == pytest.approx((0.25, 0.25))
    window = Window(str(path), "s", (256.0, 128.0), (512.0, 512.0), (0.25, 0.25))
    values = SlideReader((128, 128)).read(window).values
    expected = tissue[256:768, 128:640].reshape(128, 4, 128, 4, 3).mean((1, 3))
    # The level is stored as JPEG, which keeps colour at half the resolution but brightness at the full one.
    difference = np.moveaxis(values, 0, -1).mean(-1) - expected.mean(-1)
    assert np.abs(difference).mean() < 3
    assert values.shape == (3, 128, 128)


def test_reader_is_pickled_without_its_open_files(example_index: SampleIndex) -> None:
    reader = SlideReader((64, 64))
    first = reader.read(example_index[0]).values
    again = pickle.loads(pickle.dumps(reader))
    assert np.array_equal(again.read(example_index[0]).values, first)


def damaged(path: Path, tiles: list[int], page: int = 0) -> None:
    """Overwrite the data of some tiles of a TIFF."""
    with tifffile.TiffFile(path) as file:
        places = [(file.pages[page].dataoffsets[n], file.pages[page].databytecounts[n]) for n in tiles]
    with path.open("r+b") as handle:
        for offset, count in places:
            handle.seek(offset)
            handle.write(b"\xff\xd9" + b"\x00" * (count - 2))


def test_a_corrupt_tile_fails_its_windows_and_no_other(tmp_path: Path, tissue: np.ndarray) -> None:
    path = tmp_path / "corrupt.tif"
    write_slide(path, tissue, 0.5)
    damaged(path, [5, 6])
    reader = SlideReader((128, 128))
    failures: dict[tuple[int, int], ReadFailure] = {}
    for top in range(0, 1024, 128):
        for left in range(0, 1024, 128):
            window = Window(str(path), "s", (float(top), float(left)), (128.0, 128.0))
            try:
                values = np.moveaxis(reader.read(window).values, 0, -1)
            except ReadFailure as failure:
                failures[top, left] = failure
            else:
                # JPEG noise; white paint would be 100 off.
                assert np.abs(values.astype(int) - tissue[top : top + 128, left : left + 128]).mean() < 8
    for (top, left), failure in failures.items():
        assert (failure.path, failure.stage) == (str(path), "read")
        assert f"y={top}, x={left}" in failure.reason
    inside = {(top, left) for top in (256, 384) for left in range(256, 768, 128)}
    assert inside <= set(failures)
    # The filter's margin reaches a few pixels into the neighbours.
    around = {(top, left) for top in (128, 256, 384, 512) for left in range(128, 896, 128)}
    assert set(failures) <= around


def test_a_slide_with_a_corrupt_finest_level_is_skipped_by_the_probe(tmp_path: Path, tissue: np.ndarray) -> None:
    path = tmp_path / "base.tif"
    write_slide(path, tissue, 0.5)
    damaged(path, list(range(16)))
    skipped = SkippedLog()
    index = build_index(PathologyDomain(PathologyOptions(thumbnail_mpp=4.0)), [path], skipped)
    assert len(index) == 0
    (entry,) = skipped.entries
    assert "its windows cannot be read" in entry.reason


def test_a_corrupt_place_on_the_thumbnails_level_is_left_out_and_recorded(tmp_path: Path, tissue: np.ndarray) -> None:
    path = tmp_path / "single.tif"
    write_slide(path, tissue, 0.5, downsamples=())
    damaged(path, [5])
    skipped = SkippedLog()
    index = build_index(PathologyDomain(PathologyOptions(size=128)), [path], skipped)
    (entry,) = skipped.entries
    assert entry.stage == "tissue"
    assert "cannot be read and is left out" in entry.reason
    positions = {index[row].position for row in range(len(index))}
    assert len(positions) == 60
    assert not positions & {(256.0, 256.0), (256.0, 384.0), (384.0, 256.0), (384.0, 384.0)}


def test_thumbnail_survives_damage_and_reports_its_share(tmp_path: Path, tissue: np.ndarray) -> None:
    path = tmp_path / "single.tif"
    write_slide(path, tissue, 0.5, downsamples=())
    damaged(path, [0])
    thumbnail = read_thumbnail(str(path), (8.0, 8.0))
    assert thumbnail.failure is not None
    assert thumbnail.unreadable == 1 / 16
    assert not thumbnail.valid[:32, :32].any()
    assert thumbnail.valid.mean() == 15 / 16
    truth = tissue.reshape(128, 8, 128, 8, 3).mean((1, 3))
    assert np.abs(thumbnail.rgb[96:, 96:] - truth[96:, 96:]).mean() < 2


def test_thumbnail_pitch_keeps_the_picture_between_its_limits() -> None:
    source = ArraySource([ramp()])
    source.bounds = (0.0, 0.0, 100_000.0, 80_000.0)
    assert thumbnail_pitch(source, (0.25, 0.25), 8.0) == (32.0, 32.0)
    source.bounds = (0.0, 0.0, 400_000.0, 80_000.0)
    assert thumbnail_pitch(source, (0.25, 0.25), 8.0)[0] == pytest.approx(400_000 / 4096)
    source.bounds = (0.0, 0.0, 2048.0, 100.0)
    assert thumbnail_pitch(source, (0.25, 0.25), 8.0) == (4.0, 4.0)
    source.bounds = (0.0, 0.0, 100.0, 100.0)
    assert thumbnail_pitch(source, (0.25, 0.25), 8.0) == (1.0, 1.0)


@pytest.mark.realdata
def test_a_real_slide_at_half_a_micron_equals_an_independent_resampling(real_data: Path) -> None:
    path = str(real_data / "pathology" / "slides" / "CMU-1-Small-Region.svs")
    index = build_index(PathologyDomain(PathologyOptions()), [Path(path)], SkippedLog())
    assert index[0].extent == pytest.approx((256 * 0.5 / 0.499,) * 2)
    reader = SlideReader((256, 256))
    whole = openslide.OpenSlide(path).read_region((0, 0), 0, (2220, 2967)).convert("RGB")
    for row in range(0, len(index), 7):
        (top, left), (height, width) = index[row].position, index[row].extent
        box = (left, top, left + width, top + height)
        expected = np.asarray(whole.resize((256, 256), Image.Resampling.BICUBIC, box))
        values = np.moveaxis(reader.read(index[row]).values, 0, -1)
        # One grey level: the filter's fixed-point weights depend on where the picture begins.
        assert np.abs(values.astype(int) - expected).max() <= 1


@pytest.mark.realdata
def test_a_real_slide_at_its_own_resolution_is_its_pixels(real_data: Path) -> None:
    path = real_data / "pathology" / "slides" / "CMU-1-Small-Region.svs"
    index = build_index(PathologyDomain(PathologyOptions(mpp=0.499)), [path], SkippedLog())
    slide = openslide.OpenSlide(str(path))
    reader = SlideReader((256, 256))
    for row in range(0, len(index), 5):
        window = index[row]
        assert window.extent == (256.0, 256.0)
        region = slide.read_region((int(window.position[1]), int(window.position[0])), 0, (256, 256)).convert("RGB")
        assert np.array_equal(np.moveaxis(reader.read(window).values, 0, -1), np.asarray(region))
