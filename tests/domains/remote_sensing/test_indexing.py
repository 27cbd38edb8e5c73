from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.transform import from_origin

from fmsuite.commands.indexing import build_index
from fmsuite.core.config import validate
from fmsuite.core.data.index import SampleIndex
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.domains.remote_sensing import RemoteSensingDomain
from fmsuite.domains.remote_sensing.options import RemoteSensingOptions
from fmsuite.domains.remote_sensing.sensors import BAND_GROUPS, SENSORS
from fmsuite.errors import FmsuiteError, UsageError


def only(skipped: SkippedLog):
    assert len(skipped) == 1, skipped.entries
    return skipped.entries[0]


def test_every_sensor_is_consistent():
    for sensor in SENSORS.values():
        assert len(set(sensor.band_names)) == len(sensor.bands)
        for layout in sensor.layouts:
            assert set(layout) <= set(sensor.band_names)
        assert len({len(layout) for layout in sensor.layouts}) == len(sensor.layouts)
        for band in sensor.bands:
            for text in (band.name, band.name.lower(), *band.aliases):
                assert sensor.recognise(text) == band.name
    assert [len(SENSORS[name].bands) for name in ("sentinel2-l1c", "sentinel2-l2a", "sentinel1")] == [13, 12, 2]
    assert SENSORS["sentinel2-l1c"].recognise("B08") == "B8"
    assert SENSORS["sentinel2-l1c"].recognise("B8A") == "B8A"
    assert SENSORS["sentinel2-l1c"].recognise("QA60") is None
    assert sum(len(members) for members in BAND_GROUPS["satmae"].values()) == 10


def test_a_text_file_named_tif_is_skipped_and_the_rest_is_used(write_raster, make_index, noise, tmp_path: Path):
    good = write_raster("data/good.tif", noise(1, 32, 32))
    bad = tmp_path / "data" / "bad.tif"
    bad.write_text("not a raster")
    _, index, skipped = make_index(tmp_path / "data", size=32)
    assert index.sources == [str(good)]
    assert only(skipped).path == str(bad)
    assert only(skipped).stage == "open"
    assert "fetch it again" in only(skipped).reason


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_a_truncated_file_loses_the_windows_that_are_gone_and_says_so(write_raster, make_index, noise, share):
    path = write_raster("a.tif", noise(1, 256, 256), tiled=True, blockxsize=64, blockysize=64)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    domain, index, skipped = make_index(path, size=64)
    assert only(skipped).path == str(path)
    assert only(skipped).stage in ("open", "read")
    assert "fetch it again" in only(skipped).reason
    assert len(index) < 16
    if len(index):
        assert f"{16 - len(index)} of 16 windows" in only(skipped).reason
        reader = domain.reader(index)
        for row in range(len(index)):
            assert reader.read(index[row]).valid.all()


def test_a_file_without_georeference_is_used_natively_and_refused_with_a_gsd(write_raster, make_index, noise):
    path = write_raster("a.tif", noise(1, 32, 32), crs=None, transform=None)
    domain, index, skipped = make_index(path, size=32)
    assert len(index) == 1
    assert not skipped.entries
    assert domain.input_spec(index).spacing is None
    assert domain.reader(index).read(index[0]).spacing is None
    _, index, skipped = make_index(path, size=32, gsd=10)
    assert len(index) == 0
    assert "no coordinate system" in only(skipped).reason
    assert "data.gsd" in only(skipped).reason


def test_a_raster_of_nodata_alone_is_skipped(write_raster, make_index):
    path = write_raster("a.tif", np.zeros((2, 64, 64), np.uint16), nodata=0)
    domain, index, skipped = make_index(path, size=32)
    assert len(index) == 0
    assert only(skipped).stage == "windows"
    assert "best has 0%" in only(skipped).reason
    with pytest.raises(UsageError, match="no windows"):
        domain.input_spec(index)


def test_a_wrong_band_count_names_both_counts_and_the_way_out(write_raster, make_index, noise):
    path = write_raster("a.tif", noise(5, 32, 32))
    _, index, skipped = make_index(path, sensor="sentinel2-l1c", size=32)
    assert len(index) == 0
    for words in ("5 undescribed bands", "13", "data.file_bands"):
        assert words in only(skipped).reason
    domain, index, _ = make_index(
        path, sensor="sentinel2-l1c", size=32, file_bands=("B2", "B3", "B4", "B8", "B12"), bands=("B12", "B2")
    )
    assert domain.input_spec(index).channel_names == ("B12", "B2")
    _, _, skipped = make_index(path, sensor="sentinel2-l1c", size=32, file_bands=("B2", "B3"))
    assert "5 bands and data.file_bands names 2" in only(skipped).reason


def test_unknown_or_repeated_descriptions_are_refused(write_raster, make_index, noise):
    path = write_raster("a.tif", noise(2, 32, 32), descriptions=("elevation", "slope"))
    _, _, skipped = make_index(path, sensor="sentinel2-l1c", size=32)
    assert "elevation, slope" in only(skipped).reason
    path = write_raster("b.tif", noise(2, 32, 32), descriptions=("B02", "blue"))
    _, _, skipped = make_index(path, sensor="sentinel2-l1c", size=32)
    assert "two of its bands call themselves B2" in only(skipped).reason


def test_the_band_set_of_most_files_decides_and_richer_files_are_read_by_name(write_raster, make_index, noise):
    first = noise(2, 32, 32, seed=1)
    write_raster("d/a.tif", first, descriptions=("B2", "B4"))
    write_raster("d/b.tif", noise(2, 32, 32, seed=2), descriptions=("B2", "B4"))
    rich = noise(3, 32, 32, seed=3)
    write_raster("d/c.tif", rich, descriptions=("B4", "B3", "B2"))
    poor = write_raster("d/d.tif", noise(1, 32, 32), descriptions=("B2",))
    domain, index, skipped = make_index(poor.parent, sensor="sentinel2-l1c", size=32)
    assert domain.input_spec(index).channel_names == ("B2", "B4")
    assert only(skipped).path == str(poor)
    assert "1 bands (B2) and not the 2" in only(skipped).reason
    np.testing.assert_array_equal(domain.reader(index).read(index[2]).values, rich[[2, 0]])


def test_bands_without_names_are_never_matched_by_position(write_raster, make_index, noise):
    for name in ("a", "b"):
        write_raster(f"d/{name}.tif", noise(2, 32, 32))
    other = write_raster("d/c.tif", noise(4, 32, 32))
    _, index, skipped = make_index(other.parent, size=32)
    assert len(index) == 2
    assert only(skipped).path == str(other)


def test_rasters_in_several_coordinate_systems_are_said_once_and_read_at_one_size(
    write_raster, make_index, noise, caplog
):
    geographic = from_origin(9, 48, 1e-4, 1e-4)
    for name in ("a", "b"):
        write_raster(f"d/{name}.tif", noise(1, 64, 64))
    path = write_raster("d/c.tif", noise(1, 128, 128), crs="EPSG:4326", transform=geographic)
    domain, index, skipped = make_index(path.parent, size=32)
    assert not skipped.entries
    assert index.metadata["crs"] == {"EPSG:32632": 2, "EPSG:4326": 1}
    (record,) = caplog.records
    assert "2 coordinate systems: EPSG:32632 (2), EPSG:4326 (1)" in record.getMessage()
    assert "set data.gsd" in record.getMessage()
    assert domain.input_spec(index).spacing is None
    caplog.clear()
    domain, index, _ = make_index(path.parent, size=32, gsd=15)
    assert domain.input_spec(index).spacing == (15, 15)
    assert "at 15 m" in caplog.records[0].getMessage()


def test_a_band_that_files_lack_is_named_beside_those_that_they_have(write_raster, make_index, noise):
    path = write_raster("a.tif", noise(2, 32, 32), descriptions=("B2", "B4"))
    _, index, skipped = make_index(path, sensor="sentinel2-l2a", size=32, bands=("B4", "B8"))
    assert len(index) == 0
    assert "it has 2 bands (B2, B4) and not the 2 asked for (B4, B8)" in only(skipped).reason


def test_palettes_and_complex_values_are_not_measurements(write_raster, make_index, noise):
    path = write_raster("a.tif", noise(1, 32, 32).astype(np.complex64))
    _, _, skipped = make_index(path, size=32)
    assert "complex" in only(skipped).reason
    entries = np.arange(32 * 32, dtype=np.uint16).reshape(1, 32, 32).astype(np.uint8)
    path = write_raster("b.tif", entries, nodata=7)
    table = {entry: (entry, 255 - entry, 9, 255) for entry in range(200)} | {3: (1, 2, 3, 0)}
    with rasterio.open(path, "r+") as dataset:
        dataset.write_colormap(1, table)
    _, _, skipped = make_index(path, size=32)
    assert "data.palette=rgb" in only(skipped).reason
    domain, index, _ = make_index(path, size=32, palette="rgb", bands=("blue", "red"), min_valid=0)
    sample = domain.reader(index).read(index[0])
    with rasterio.open(path) as dataset:
        colours = np.array([dataset.colormap(1)[entry] for entry in range(256)], np.uint8)[entries[0]]
    seen = (entries[0] != 7) & (colours[..., 3] > 0)
    np.testing.assert_array_equal(sample.valid, np.stack([seen, seen]))
    np.testing.assert_array_equal(sample.values, np.where(seen, colours[..., [2, 0]].transpose(2, 0, 1), 0))
    assert sample.values.dtype == np.uint8
    domain, index, _ = make_index(path, size=32, palette="index", min_valid=0)
    np.testing.assert_array_equal(domain.reader(index).read(index[0]).values, np.where(entries == 7, 0, entries))
    _, _, skipped = make_index(path, size=32, palette="rgb", sensor="sentinel1")
    assert "has no red, green, blue" in only(skipped).reason


def test_an_empty_folder_and_a_missing_path_are_usage_errors(make_index, tmp_path: Path):
    with pytest.raises(UsageError, match="no rasters"):
        make_index(tmp_path)
    with pytest.raises(UsageError, match="no such file"):
        make_index(tmp_path / "nowhere")


def test_strict_makes_a_skipped_file_an_error(tmp_path: Path):
    bad = tmp_path / "bad.tif"
    bad.write_text("not a raster")
    with pytest.raises(FmsuiteError, match=r"bad\.tif"):
        build_index(RemoteSensingDomain(), [bad], SkippedLog(strict=True))


def test_a_window_far_larger_than_the_raster_is_refused_unread(write_raster, make_index, noise):
    path = write_raster("a.tif", noise(1, 32, 32))
    _, index, skipped = make_index(path, size=64, gsd=100_000, min_valid=0)
    assert len(index) == 0
    assert "data.gsd" in only(skipped).reason


def test_mixed_dtypes_are_widened_without_loss(write_raster, make_index):
    high = np.full((1, 32, 32), 60_000, np.uint16)
    low = np.full((1, 32, 32), -30_000, np.int16)
    folder = write_raster("d/a.tif", high).parent
    write_raster("d/b.tif", low)
    domain, index, _ = make_index(folder, size=32)
    reader = domain.reader(index)
    assert [int(reader.read(index[row]).values[0, 0, 0]) for row in (0, 1)] == [60_000, -30_000]
    assert reader.read(index[0]).values.dtype == reader.read(index[1]).values.dtype


def test_an_index_reads_the_same_after_a_round_trip_and_refuses_another_domain(
    write_raster, make_index, noise, tmp_path
):
    path = write_raster("a.tif", noise(10, 64, 64))
    domain, index, _ = make_index(path, sensor="sentinel2-l2a", groups="satmae", size=32, gsd=20)
    index.write(tmp_path / "index.parquet")
    again = SampleIndex.read(tmp_path / "index.parquet")
    fresh = RemoteSensingDomain()
    assert again.hash == index.hash
    assert fresh.input_spec(again) == domain.input_spec(index)
    np.testing.assert_array_equal(fresh.reader(again).read(again[0]).values, domain.reader(index).read(index[0]).values)
    with pytest.raises(UsageError, match="medical"):
        fresh.reader(SampleIndex.from_windows([], {"domain": "medical"}))


def test_satmae_groups_drop_the_60_metre_bands(write_raster, make_index, noise):
    path = write_raster("a.tif", noise(13, 32, 32))
    domain, index, _ = make_index(path, sensor="sentinel2-l1c", groups="satmae", size=32)
    groups = {
        name: tuple(domain.input_spec(index).channel_names[i] for i in members)
        for name, members in domain.input_spec(index).groups
    }
    assert groups == {
        "visible-nir": ("B2", "B3", "B4", "B8"),
        "red-edge": ("B5", "B6", "B7", "B8A"),
        "swir": ("B11", "B12"),
    }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sensor": "sentinel2"}, "sentinel2-l"),
        ({"sensor": "sentinel2-l1c", "bands": ["B13"]}, "no band 'B13'"),
        ({"bands": ["a", "a"]}, "none twice"),
        ({"sensor": "sentinel1", "groups": "satmae"}, "Sentinel-2"),
        ({"bands": ["a", "b"], "groups": {"one": ["a"]}}, "bands are a, b"),
        ({"percentiles": [99, 1]}, "increasing"),
        ({"place_pattern": "("}, "regular expression"),
        ({"date_pattern": r"(?P<year>\d{4})", "series": True}, "month"),
        ({"date_pattern": r"(?P<year>\d{4})(?P<month>\d\d)(?P<day>\d\d)"}, "series"),
        ({"gds": 10}, "gsd"),
        ({"scale": 0}, "scale"),
    ],
)
def test_wrong_options_are_named(options, words):
    with pytest.raises(UsageError, match=words.replace("(", r"\(")):
        validate(RemoteSensingOptions, options, "data", "recipe")


def series(write_raster, noise, place: str, dates: list[str], seed: int = 0, **kwargs) -> dict[str, np.ndarray]:
    stack = {}
    for number, date in enumerate(dates):
        stack[date] = noise(2, 48, 48, seed=100 * seed + number)
        write_raster(f"series/{place}_{date}.tif", stack[date], **kwargs)
    return stack


def test_files_of_a_place_become_a_series_in_order_of_date(write_raster, make_index, noise, tmp_path):
    stack = series(write_raster, noise, "farm", ["20240301", "2000-01-31", "2023_12_31"])
    domain, index, _ = make_index(tmp_path / "series", series=True, size=24)
    assert len(index) == 4
    sample = domain.reader(index).read(index[3])
    expected = np.stack([stack[date] for date in ("2000-01-31", "2023_12_31", "20240301")], axis=1)
    np.testing.assert_array_equal(sample.values, expected[:, :, 24:, 24:])
    np.testing.assert_array_equal(sample.coords["time"], [30, 8765, 8826])
    assert sample.valid.shape == sample.values.shape
    spec = domain.input_spec(index)
    assert spec.axes == ("time", "y", "x")
    assert spec.size == (3, 24, 24)
    assert index[0].group == "farm"


def test_a_date_on_another_grid_and_a_doubled_date_are_skipped(write_raster, make_index, noise, tmp_path):
    series(write_raster, noise, "farm", ["20240101", "20240201"])
    shifted = from_origin(500_005, 5_300_000, 10, 10)
    write_raster("series/farm_20240301.tif", noise(2, 48, 48), transform=shifted)
    write_raster("series/farm_2024-01-01.tif", noise(2, 48, 48))
    write_raster("series/undated.tif", noise(2, 48, 48))
    write_raster("series/farm_20240231.tif", noise(2, 48, 48))
    domain, index, skipped = make_index(tmp_path / "series", series=True, size=48)
    reasons = {Path(entry.path).name: entry.reason for entry in skipped.entries}
    assert "coincide" in reasons["farm_20240301.tif"]
    assert "already has this date" in reasons["farm_20240101.tif"]
    assert "no date" in reasons["undated.tif"]
    assert "not a date" in reasons["farm_20240231.tif"]
    assert len(reasons) == 4
    assert domain.reader(index).read(index[0]).values.shape == (2, 2, 48, 48)


def test_a_damaged_date_is_taken_out_of_its_series(write_raster, make_index, noise, tmp_path):
    series(write_raster, noise, "farm", ["20240101", "20240201", "20240301"])
    damaged = tmp_path / "series" / "farm_20240201.tif"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[: len(whole) // 2])
    domain, index, skipped = make_index(tmp_path / "series", series=True, size=24)
    assert only(skipped).path == str(damaged)
    assert len(index) == 4
    np.testing.assert_array_equal(domain.reader(index).read(index[0]).coords["time"], [8766, 8826])


def test_place_pattern_groups_chips_of_one_scene(write_raster, make_index, noise, tmp_path):
    for name in ("T32_a_1", "T32_a_2", "T33_b_1"):
        write_raster(f"chips/{name}.tif", noise(1, 32, 32))
    _, index, _ = make_index(tmp_path / "chips", size=32, place_pattern=r"^(T\d\d)_")
    assert index.groups == ["T32", "T33"]
    _, _, skipped = make_index(tmp_path / "chips", size=32, place_pattern="T32")
    assert Path(only(skipped).path).name == "T33_b_1.tif"
