"""Dates from names and tables, clouds, folders in eo-learn's layout, and how many dates a view shows."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from fmsuite.core.data.sample import ArraySample
from fmsuite.domains.remote_sensing.augment import RasterAugmentation
from fmsuite.domains.remote_sensing.dates import DATE, DATE_WITHOUT_TIME, carried, date_in_name, days_of
from fmsuite.domains.remote_sensing.options import RemoteSensingOptions
from fmsuite.errors import ReadFailure, UsageError


def _day(*date: int) -> float:
    return (datetime.datetime(*date) - datetime.datetime(2000, 1, 1)).total_seconds() / 86_400


def test_names_may_tell_the_hour() -> None:
    for name, day in (
        ("S2_20240229T101559_x.tif", _day(2024, 2, 29, 10, 15)),
        ("2024-02-29.tif", _day(2024, 2, 29)),
        ("x_20240229_1015.tif", _day(2024, 2, 29)),
        ("x_1999-12-31T23-05.tif", _day(1999, 12, 31, 23, 5)),
    ):
        assert date_in_name(name, name, DATE)[0] == pytest.approx(day, abs=1e-12)
    hours = r"(?P<year>\d{4})(?P<month>\d\d)(?P<day>\d\d)(?P<hour>\d\d)"
    assert date_in_name("", "2024022923.tif", hours)[0] == pytest.approx(_day(2024, 2, 29, 23))
    with pytest.raises(ReadFailure, match="is not a date"):
        date_in_name("", "20230229.tif", DATE)


def test_what_samples_carry_is_the_last_ten_minutes() -> None:
    draw = np.random.default_rng(0)
    minutes = draw.integers(-30_000_000, 90_000_000, size=500)
    found = carried([int(n) / 1440 for n in minutes])
    assert found.dtype == np.float32
    # float32's own rounding at 62,500 days is 2.8 minutes.
    np.testing.assert_allclose(found.astype(np.float64) * 1440, minutes // 10 * 10, rtol=0, atol=3)


@pytest.fixture
def series(write_raster, noise, tmp_path: Path) -> Path:
    """Two places of three dates each, whose names say nothing of when."""
    for place in ("north", "south"):
        for number in range(3):
            write_raster(f"{place}/image-{number}.tif", noise(1, 16, 16, seed=number))
    return tmp_path


def _table(folder: Path, *lines: str) -> Path:
    path = folder / "dates.csv"
    path.write_text("\n".join(("path,date,place", *lines)), encoding="utf-8")
    return path


def test_a_table_says_dates_and_places(series, make_index, tmp_path) -> None:
    table = _table(
        tmp_path,
        "north/image-2.tif,2020-01-01,",
        "north/image-0.tif,2020-03-01T10:59:59,",
        "north/image-1.tif,2020-02-01T23:30:00+02:00,",
        "south/image-0,2021-01-01,elsewhere",
        "south/image-1,2021-01-02,elsewhere",
        "gone.tif,2021-01-02,",
    )
    domain, index, skipped = make_index(series, series=True, dates=table, size=16)
    days = {Path(source).parent.name: dates for source, dates in index.metadata["files"].items()}
    assert [Path(paths[0]).name for _, paths in days["north"]] == ["image-2.tif", "image-1.tif", "image-0.tif"]
    assert [day for day, _ in days["north"]] == pytest.approx(
        [_day(2020, 1, 1), _day(2020, 2, 1, 21, 30), _day(2020, 3, 1, 10, 59, 59)]
    )
    assert set(index.table.column("group").to_pylist()) == {"north", "elsewhere"}
    left = {Path(entry.path).name: entry for entry in skipped.entries}
    assert "line 7" in left["gone.tif"].reason
    assert left["gone.tif"].stage == "dates"
    assert "no line for it" in left["image-2.tif"].reason
    sample = domain.reader(index).read(index[0])
    assert sample.coords["time"].dtype == np.float32
    assert sample.coords["time"][2] == pytest.approx(_day(2020, 3, 1, 10, 50), abs=1e-3)


def test_bad_tables_are_refused_with_the_lines(series, make_index, tmp_path) -> None:
    for lines, why in (
        (("north/image-0.tif,2020-13-01,", "north/image-1.tif,soon,"), r"line 2 \('2020-13-01' is no date\), line 3"),
        ((",2020-01-01,",), r"line 2 \(it names no file\)"),
        (("north/image-0.tif,2020-01-01,", "north/image-0.tif,2020-01-02,"), "line 3 says another date"),
        (("other.tif,2020-01-01,",), "none of its 1 lines names one of the 6 files"),
        ((), "no lines below"),
    ):
        with pytest.raises(UsageError, match=why):
            make_index(series, series=True, dates=_table(tmp_path, *lines), size=16)
    bare = tmp_path / "bare.csv"
    bare.write_text("file;date\n")
    with pytest.raises(UsageError, match="no column 'path'; it has file;date"):
        make_index(series, series=True, dates=bare, size=16)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"dates": "x.csv"}, "dates has a meaning only with series"),
        ({"dates_per_sample": 2}, "dates_per_sample has a meaning only with series"),
        ({"series": True, "date_pattern": r"(?P<year>\d)"}, "needs the named groups"),
        ({"clouds": "a", "cloud_band": "b"}, "give one"),
        ({"cloud_values": (3,)}, "cloud_values has no effect"),
        ({"clouds": "{path}/x.tif"}, "with some of {name}, {stem}, {folder}"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, why) -> None:
    with pytest.raises(ValidationError, match=why):
        RemoteSensingOptions(**options)


def test_clouds_beside_a_file_are_invalid_and_no_rasters(write_raster, noise, make_index, tmp_path) -> None:
    cloud = np.zeros((1, 12, 12), np.uint8)
    cloud[0, :4, :6], cloud[0, 10:, 10:] = 3, 1
    for number in range(2):
        write_raster(f"2020-01-0{number + 1}.tif", noise(2, 24, 24, seed=number))
    half = write_raster("2020-01-01_mask.tif", cloud)
    import rasterio

    with rasterio.open(half, "r+") as dataset:
        dataset.transform = dataset.transform @ dataset.transform.scale(2, 2)
    options = {"size": 16, "stride": 8, "min_valid": 0.1, "series": True}
    domain, index, skipped = make_index(tmp_path, clouds="{folder}/{stem}_mask.tif", cloud_values=(3,), **options)
    assert [(Path(entry.path).name, entry.stage) for entry in skipped.entries] == [("2020-01-02.tif", "clouds")]
    expected = np.kron(cloud[0] != 3, np.ones((2, 2), bool))
    for row in range(len(index)):
        top, left = (int(n) for n in index[row].position[-2:])
        sample = domain.reader(index).read(index[row])
        for band in sample.valid[:, 0]:
            np.testing.assert_array_equal(band, expected[top : top + 16, left : left + 16])
        assert not sample.values[~sample.valid].any()
    # A missing mask is reported; without the option the mask is a raster like others.
    _, plain, _ = make_index(tmp_path / "2020-01-01.tif", size=16)
    assert len(plain)


def test_a_band_may_tell_clouds_and_a_date_under_them_stays(write_raster, noise, make_index, tmp_path) -> None:
    for number in range(3):
        values = noise(3, 16, 16, seed=number)
        values[2] = 8 if number == 1 else 4
        write_raster(f"2020-01-0{number + 1}.tif", values, descriptions=("red", "nir", "SCL"))
    options = {"size": 16, "bands": ("red", "nir"), "series": True, "cloud_values": (8, 9)}
    for band in ("SCL", 3):
        domain, index, skipped = make_index(tmp_path, cloud_band=band, **options)
        assert not skipped.entries
        sample = domain.reader(index).read(index[0])
        assert sample.values.shape == (2, 3, 16, 16)
        assert [sample.valid[:, date].mean() for date in range(3)] == [1, 0, 1]
        assert index.table.column("content").to_pylist() == pytest.approx([2 / 3])
    _, index, skipped = make_index(tmp_path, cloud_band="QA", **options)
    assert not len(index)
    assert "the band 'QA' for clouds" in skipped.entries[0].reason


@pytest.fixture
def patch(tmp_path: Path) -> Path:
    """Three dates out of order, two features, a mask of data and one of clouds."""
    folder = tmp_path / "site" / "patch-1"
    draw = np.random.default_rng(0)
    (folder / "data").mkdir(parents=True)
    (folder / "mask").mkdir()
    np.save(folder / "data" / "NDVI.npy", draw.random((3, 20, 24, 1)).astype(np.float32))
    np.save(folder / "data" / "BANDS.npy", draw.integers(1, 9999, (3, 20, 24, 2)).astype(np.int16))
    shown = np.ones((3, 20, 24, 1), np.uint8)
    shown[0, :5] = 0
    np.save(folder / "mask" / "IS_DATA.npy", shown)
    np.save(folder / "mask" / "CLM.npy", (np.arange(3)[:, None, None, None] == 2) & (shown == 1))
    (folder / "timestamps.json").write_text(json.dumps(["2020-05-01T10:07:28", "2020-04-01T09:00:00", "2020-06-01"]))
    box = [[[500000, 5000000], [500000, 5000200], [500240, 5000200], [500240, 5000000], [500000, 5000000]]]
    crs = {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::32633"}}
    (folder / "bbox.geojson").write_text(json.dumps({"type": "Polygon", "crs": crs, "coordinates": box}))
    return folder


def test_a_folder_of_eolearn_is_a_series(patch, make_index) -> None:
    domain, index, skipped = make_index(patch.parent, series=True, size=16, stride=8, min_valid=0.1)
    assert not skipped.entries
    spec = domain.input_spec(index)
    assert spec.channel_names == ("BANDS_0", "BANDS_1", "NDVI")
    assert spec.size == (3, 16, 16)
    assert spec.spacing == pytest.approx((1, 10, 10))
    assert set(index.table.column("group").to_pylist()) == {"patch-1"}
    arrays = [np.load(patch / "data" / "BANDS.npy"), np.load(patch / "data" / "NDVI.npy")]
    whole = np.concatenate([array.astype(np.float32) for array in arrays], axis=3)[[1, 0, 2]].transpose(3, 0, 1, 2)
    shown = np.load(patch / "mask" / "IS_DATA.npy")[[1, 0, 2], ..., 0] > 0
    reader = domain.reader(index)
    for row in range(len(index)):
        _, top, left = (int(n) for n in index[row].position)
        sample = reader.read(index[row])
        box = np.s_[:, :, top : top + 16, left : left + 16]
        np.testing.assert_array_equal(sample.valid, np.broadcast_to(shown, whole.shape)[box])
        np.testing.assert_array_equal(sample.values, np.where(shown, whole, 0)[box])
    days = [days_of(datetime.datetime(2020, *date)) for date in ((4, 1, 9), (5, 1, 10), (6, 1))]
    np.testing.assert_allclose(sample.coords["time"], days, atol=1e-3)
    assert domain.overview(index, index.sources[0]).rgb.shape[:2] == (20, 24)


def test_bands_clouds_and_labels_of_a_folder(patch, make_index) -> None:
    (patch.parent / "labels.csv").write_text("path,label\npatch-1,forest\n")
    np.save(patch / "data" / "OTHER.npy", np.zeros(3))
    options = {"series": True, "size": 16, "min_valid": 0.1, "cloud_band": "CLM", "bands": ("BANDS_1", "NDVI")}
    domain, index, skipped = make_index(patch.parent, **options)
    assert not skipped.entries
    sample = domain.reader(index).read(index[0])
    assert sample.values.shape == (2, 3, 16, 16)
    assert not sample.valid[:, 2].any()
    assert set(index.table.column("label").to_pylist()) == {"forest"}
    named = {"file_bands": ("B4", "B8"), "sensor": "sentinel2-l2a", "series": True, "size": 16, "min_valid": 0.1}
    (patch / "data" / "OTHER.npy").unlink()
    domain, index, _ = make_index(patch.parent, **named)
    assert domain.input_spec(index).channel_names == ("B4", "B8")
    np.save(patch / "data" / "BANDS.npy", np.load(patch / "data" / "BANDS.npy") * np.float32(1e-4))
    _, index, skipped = make_index(patch.parent, **named)
    assert not len(index)
    assert "set data.values=reflectance" in skipped.entries[0].reason
    assert len(make_index(patch.parent, values="reflectance", **named)[1])


def test_damaged_folders_are_skipped_by_the_name_of_the_file(patch, make_index) -> None:
    def refused(**options) -> str:
        _, index, skipped = make_index(patch.parent, **{"series": True, "size": 16, "min_valid": 0.1, **options})
        assert not len(index)
        (entry,) = skipped.entries
        return f"{Path(entry.path).name}: {entry.reason}"

    assert "set data.series=true" in refused(series=False).lower()
    assert "CLOUDS.npy: there is no such mask; there are CLM, IS_DATA" in refused(cloud_band="CLOUDS")
    assert "data.cloud_band=CLM" in refused(clouds="{folder}/x.tif")
    ndvi = np.load(patch / "data" / "NDVI.npy")
    for broken, why in (
        (ndvi[:2], "it has 2 dates, and timestamps.json 3"),
        (ndvi[:, :10], "it has 10x24 pixels, and data/BANDS.npy 20x24"),
        (ndvi[..., 0], r"its shape is (3, 20, 24)"),
        (ndvi.astype(complex), "it is no array of numbers"),
        (np.array([{"a": 1}] * 3, dtype=object), "not an array that numpy reads"),
    ):
        np.save(patch / "data" / "NDVI.npy", broken)
        assert f"NDVI.npy: {why}" in refused()
    (patch / "data" / "NDVI.npy").write_bytes(b"\x93NUMPY")
    assert "NDVI.npy: not an array" in refused()
    np.save(patch / "data" / "NDVI.npy", ndvi)
    box = (patch / "bbox.geojson").read_text()
    (patch / "bbox.geojson").write_text(box.replace("32633", "999999"))
    assert "bbox.geojson: not a box with a coordinate system" in refused()
    (patch / "bbox.geojson").write_text(box)
    (patch / "timestamps.json").write_text('["2020-05-01", "2020-14-01", "2021-01-01"]')
    assert "timestamps.json: a date in it cannot be parsed" in refused()


def test_varied_views_show_some_dates_with_data_in_order() -> None:
    values = np.arange(5)[None, :, None, None] * np.ones((2, 5, 4, 4))
    valid = np.ones((1, 5, 4, 4), bool)
    valid[:, 1] = False
    sample = ArraySample(values, valid, {"time": np.arange(5) * 10.0}, maps={"m": np.zeros((4, 4), np.uint8)})
    augment = RasterAugmentation(dates=3)
    draw = np.random.default_rng(0)
    seen = set()
    for _ in range(40):
        cut = augment.before_crop(sample, "weak", draw)
        chosen = tuple(int(n) for n in cut.values[0, :, 0, 0])
        assert tuple(cut.coords["time"] / 10) == chosen == tuple(sorted(chosen))
        assert cut.size == (3, 4, 4)
        assert cut.maps["m"].shape == (4, 4)
        seen.add(chosen)
    assert seen == {(0, 2, 3), (0, 2, 4), (0, 3, 4), (2, 3, 4)}
    assert augment.before_crop(sample, "none", draw) is sample
    few = RasterAugmentation(dates=5).before_crop(sample, "weak", draw)
    assert few is sample


def test_what_earlier_versions_wrote_where_nobody_chose_a_pattern_is_no_choice() -> None:
    assert not RemoteSensingOptions(date_pattern=DATE_WITHOUT_TIME).series
