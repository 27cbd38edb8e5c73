from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pyproj
import pytest
import rasterio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rasterio.crs import CRS
from rasterio.transform import Affine, from_origin
from rasterio.windows import Window as RasterWindow

from fmsuite.core.data.index import Window
from fmsuite.domains.remote_sensing import read_raster
from fmsuite.domains.remote_sensing.metres import metres_per_pixel
from fmsuite.errors import ReadFailure


def test_native_windows_equal_rasterios_own_windowed_read(write_raster, make_index, noise):
    path = write_raster("a.tif", noise(4, 100, 130), tiled=True, blockxsize=32, blockysize=32)
    domain, index, _ = make_index(path, size=32, stride=24)
    reader = domain.reader(index)
    assert len(index) == 4 * 6
    with rasterio.open(path) as dataset:
        for row in range(len(index)):
            window = index[row]
            top, left = window.position
            expected = dataset.read(window=RasterWindow(left, top, 32, 32))
            sample = reader.read(window)
            assert sample.values.dtype == np.uint16
            np.testing.assert_array_equal(sample.values, expected)
            assert sample.valid.all()
    corners = {index[row].position for row in range(len(index))}
    assert max(corners) == (100 - 32, 130 - 32)


def test_bands_come_in_the_order_asked_for_whatever_the_file_calls_them(write_raster, make_index, noise):
    values = noise(4, 32, 32)
    path = write_raster("a.tif", values, descriptions=("B08", "QA60", "b_02", "Red"))
    domain, index, _ = make_index(path, sensor="sentinel2-l2a", bands=("B4", "B2", "B8"), size=32)
    np.testing.assert_array_equal(domain.reader(index).read(index[0]).values, values[[3, 2, 0]])
    assert domain.input_spec(index).channel_names == ("B4", "B2", "B8")
    assert domain.input_spec(index).channels[0].wavelength == pytest.approx(664.6)


@pytest.mark.parametrize("gsd", [20.0, 13.7, 10.0, 4.0])
def test_resampling_a_ramp_gives_the_ramp_at_the_new_pixel_centres(write_raster, make_index, gsd):
    rows, columns = np.mgrid[:110, :130]
    ramp = np.stack([3.0 * rows + 0.5, 2.0 * columns - rows]).astype(np.float32) + 1000
    path = write_raster("a.tif", ramp)
    domain, index, _ = make_index(path, size=16, gsd=gsd)
    reader, step = domain.reader(index), gsd / 10
    limit = np.array([110, 130])
    seen = 0
    for row in range(len(index)):
        window = index[row]
        assert window.extent == pytest.approx((16 * step, 16 * step))
        sample = reader.read(window)
        assert sample.spacing == (gsd, gsd)
        start = np.array(window.position)
        if (start < 2 * step + 2).any() or (start + 16 * step > limit - 2 * step - 2).any():
            continue  # at the raster's own edge the filter is cut off
        centres = [s + (np.arange(16) + 0.5) * step - 0.5 for s in start]
        y, x = np.meshgrid(*centres, indexing="ij")
        expected = np.stack([3.0 * y + 0.5, 2.0 * x - y]) + 1000
        # A triangle sampled at whole pixels is not perfectly centred where the step is no whole number.
        slack = 1e-3 if step in (1.0, 2.0, 0.4) else 3.0 * 0.1
        np.testing.assert_allclose(sample.values, expected, atol=slack)
        seen += 1
    assert seen > 0


def test_neighbouring_resampled_windows_are_one_resampling_of_the_whole_raster(write_raster, make_index, noise):
    values = noise(1, 120, 120).astype(np.float32)
    path = write_raster("a.tif", values)
    domain, index, _ = make_index(path, size=20, gsd=20)
    whole_domain, whole, _ = make_index(path, size=60, gsd=20)
    expected = whole_domain.reader(whole).read(whole[0]).values
    reader, step = domain.reader(index), 2.0
    for row in range(len(index)):
        top, left = (round(place / step) for place in index[row].position)
        sample = reader.read(index[row])
        np.testing.assert_allclose(sample.values, expected[:, top : top + 20, left : left + 20], rtol=1e-5)


@given(latitude=st.floats(-80, 80), longitude=st.floats(-170, 170), size=st.floats(1e-5, 1e-3))
@settings(max_examples=60, deadline=None)
def test_degrees_become_metres_as_geodesics_say(latitude, longitude, size):
    transform = from_origin(longitude - 50 * size, latitude + 40 * size, size, size / 2)
    height, width = 160, 100
    along_y, along_x = metres_per_pixel(CRS.from_epsg(4326), transform, height, width)
    geod = pyproj.Geod(ellps="WGS84")
    _, _, east = geod.inv(longitude - size / 2, latitude, longitude + size / 2, latitude)
    _, _, north = geod.inv(longitude, latitude - size / 4, longitude, latitude + size / 4)
    assert along_x == pytest.approx(east, rel=2e-6)
    assert along_y == pytest.approx(north, rel=2e-6)


def test_projected_pixels_count_at_their_nominal_size_and_web_mercator_is_put_right():
    utm = metres_per_pixel(CRS.from_epsg(32632), from_origin(400_000, 5_300_000, 10, 20), 100, 100)
    assert utm == (20, 10)
    feet = metres_per_pixel(CRS.from_epsg(2263), from_origin(980_000, 200_000, 10, 10), 100, 100)
    assert feet == pytest.approx((10 * 0.3048006096,) * 2)
    turned = Affine(10 * 0.75**0.5, 10, 400_000, 5, -20 * 0.75**0.5, 5_300_000)
    assert metres_per_pixel(CRS.from_epsg(32632), turned, 100, 100) == pytest.approx((20, 10))
    geod = pyproj.Geod(ellps="WGS84")
    x, y = pyproj.Transformer.from_crs(4326, 3857, always_xy=True).transform(9.0, 60.0)
    mercator = metres_per_pixel(CRS.from_epsg(3857), from_origin(x - 500, y + 500, 10, 10), 100, 100)
    left, right = pyproj.Transformer.from_crs(3857, 4326, always_xy=True).transform([x - 5, x + 5], [y, y])
    _, _, east = geod.inv(left[0], right[0], left[1], right[1])
    assert mercator == pytest.approx((east, east), rel=5e-3)
    assert metres_per_pixel(None, UTM, 10, 10) is None
    assert metres_per_pixel(CRS.from_epsg(4326), Affine.identity(), 10, 10) is None


UTM = from_origin(500_000, 5_300_000, 10, 10)


def test_a_geographic_raster_is_read_at_square_metres(write_raster, make_index, noise):
    size = 1e-4
    path = write_raster("a.tif", noise(1, 200, 200), crs="EPSG:4326", transform=from_origin(9, 48, size, size))
    domain, index, _ = make_index(path, size=32, gsd=10)
    geod = pyproj.Geod(ellps="WGS84")
    latitude = 48 - 100 * size
    _, _, east = geod.inv(9, latitude, 9 + size, latitude)
    _, _, north = geod.inv(9, latitude, 9, latitude + size)
    assert index[0].extent == pytest.approx((320 / north, 320 / east), rel=1e-6)
    assert index[0].spacing == pytest.approx((north, east), rel=1e-6)
    spec = domain.input_spec(index)
    assert spec.spacing == (10, 10)
    assert spec.spacing_unit == "m"


def test_native_spacing_keeps_non_square_pixels(write_raster, make_index, noise):
    path = write_raster("a.tif", noise(1, 64, 64), transform=from_origin(500_000, 5_300_000, 10, 20))
    domain, index, _ = make_index(path, size=64)
    assert domain.input_spec(index).spacing == (20, 10)
    assert domain.reader(index).read(index[0]).spacing == (20, 10)


@given(data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_nodata_reaches_neither_valid_pixels_nor_statistics(data, write_raster, make_index):
    seed = data.draw(st.integers(0, 2**31))
    share = data.draw(st.floats(0.0, 0.9))
    gsd = data.draw(st.sampled_from([None, 10.0, 17.0, 30.0, 6.0]))
    kind = data.draw(st.sampled_from(["declared", "option", "nan", "mask"]))
    random = np.random.default_rng(seed)
    truth = random.uniform(100, 200, size=(2, 60, 70)).astype(np.float32)
    blocks = np.kron(random.random((6, 7)) < share, np.ones((10, 10), dtype=bool))
    missing = np.stack([blocks, blocks if kind == "mask" else np.roll(blocks, 10, axis=1)])
    wild = np.float32(np.nan if kind == "nan" else -32768)
    values = np.where(missing, wild, truth)
    profile = {"declared": {"nodata": -32768.0}, "option": {}, "nan": {}, "mask": {}}[kind]
    mask = None if kind != "mask" else np.where(blocks, 0, 255).astype(np.uint8)
    path = write_raster("a.tif", values, mask=mask, **profile)
    options = {"nodata": -32768.0} if kind == "option" else {}
    domain, index, skipped = make_index(path, size=16, gsd=gsd, min_valid=0.3, **options)
    if not len(index):
        assert "valid values" in skipped.entries[0].reason or "fill" in skipped.entries[0].reason
        return
    reader = domain.reader(index)
    for row in range(len(index)):
        sample = reader.read(index[row])
        assert sample.values[sample.valid].min() >= 100
        assert sample.values[sample.valid].max() <= 200
        assert (sample.values[~sample.valid] == 0).all()
        assert sample.valid.mean() == pytest.approx(index[row].content, abs=1e-6)
        assert index[row].content >= 0.3
    for channel in domain.input_spec(index).channels:
        assert 100 <= channel.mean <= 200
        assert channel.std <= 50


def test_scale_and_offset_tags_are_expressed_in_the_sensors_counts(write_raster, make_index, noise):
    counts = noise(2, 32, 32)
    path = write_raster("a.tif", counts, descriptions=("B4", "B8"), scales=(1e-4, 1e-4), offsets=(-0.1, -0.1), nodata=0)
    domain, index, _ = make_index(path, sensor="sentinel2-l2a", size=32)
    sample, spec = domain.reader(index).read(index[0]), domain.input_spec(index)
    np.testing.assert_allclose(spec.scale * sample.values + spec.offset, counts * 1e-4 - 0.1, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "declared", "gone"),
    [
        ("float32", 3.40282347e38, np.float32(3.4028235e38)),
        ("float32", -9999.1, np.float32(-9999.1)),
        ("uint8", 7.0, 7),
        ("int16", -32768.0, -32768),
        # A value that the type cannot hold declares nothing, whatever it wraps to.
        ("uint8", 7.5, None),
        ("uint8", 263.0, None),
    ],
)
def test_nodata_is_what_the_type_can_hold(write_raster, dtype, declared, gone):
    values = np.full((2, 32, 32), 7 if dtype == "uint8" else 5, dtype)
    if gone is not None:
        values[1, :, 3] = gone
    profile = {"nodata": declared} if declared == int(declared) < 256 or dtype == "float32" else {}
    path = write_raster("a.tif", values, **profile)
    patch = read_raster(path, **({} if profile else {"nodata": declared}))
    expected = np.ones(values.shape, dtype=bool) if gone is None else values != gone
    np.testing.assert_array_equal(patch.valid, expected)
    with rasterio.open(path) as dataset:
        np.testing.assert_array_equal(patch.valid, dataset.read_masks() > 0)


def test_linear_backscatter_becomes_decibels_and_zero_power_is_no_data(write_raster, make_index):
    power = np.random.default_rng(0).gamma(4, 0.02, size=(2, 32, 32)).astype(np.float32)
    power[:, :4] = 0
    path = write_raster("a.tif", power, descriptions=("VV", "VH"))
    domain, index, _ = make_index(path, sensor="sentinel1-linear", size=32)
    sample = domain.reader(index).read(index[0])
    np.testing.assert_allclose(sample.values[:, 4:], 10 * np.log10(power[:, 4:]), rtol=1e-5)
    assert not sample.valid[:, :4].any()
    assert sample.valid[:, 4:].all()


def test_alpha_is_a_mask_and_not_a_band(write_raster, make_index, noise):
    values = (noise(4, 32, 32) % 255 + 1).astype(np.uint8)
    values[3] = 255
    values[3, :8] = 0
    path = write_raster("a.tif", values, photometric="RGB", alpha="YES")
    domain, index, _ = make_index(path, size=32)
    sample = domain.reader(index).read(index[0])
    assert domain.input_spec(index).channel_names == ("red", "green", "blue")
    assert not sample.valid[:, :8].any()
    assert sample.valid[:, 8:].all()


def test_a_small_raster_is_padded_with_invalid_pixels(write_raster, make_index, noise):
    values = noise(2, 40, 50)
    path = write_raster("a.tif", values)
    domain, index, _ = make_index(path, size=64, min_valid=0.4)
    sample = domain.reader(index).read(index[0])
    assert len(index) == 1
    np.testing.assert_array_equal(sample.values[:, :40, :50], values)
    assert sample.valid[:, :40, :50].all()
    assert sample.valid.sum() == 2 * 40 * 50
    _, empty, skipped = make_index(path, size=64, min_valid=0.6)
    assert len(empty) == 0
    assert "49%" in skipped.entries[0].reason
    assert "data.size" in skipped.entries[0].reason


def test_a_reader_survives_pickling_and_a_file_that_comes_back(write_raster, make_index, noise, tmp_path: Path):
    path = write_raster("a.tif", noise(1, 32, 32))
    domain, index, _ = make_index(path, size=32)
    reader = pickle.loads(pickle.dumps(domain.reader(index)))
    expected = domain.reader(index).read(index[0]).values
    away = tmp_path / "away"
    path.rename(away)
    with pytest.raises(ReadFailure, match=r"a\.tif"):
        reader.read(index[0])
    away.rename(path)
    np.testing.assert_array_equal(reader.read(index[0]).values, expected)


def test_a_file_replaced_by_one_without_the_band_is_a_read_failure(write_raster, make_index, noise):
    path = write_raster("a.tif", noise(3, 32, 32))
    domain, index, _ = make_index(path, size=32)
    write_raster("a.tif", noise(1, 32, 32))
    with pytest.raises(ReadFailure, match="band2, band3"):
        domain.reader(index).read(index[0])


def test_a_window_outside_the_raster_is_wholly_invalid(write_raster, make_index, noise):
    path = write_raster("a.tif", noise(1, 32, 32))
    domain, index, _ = make_index(path, size=32)
    sample = domain.reader(index).read(Window(str(path), "a", (500.0, 500.0), (32.0, 32.0)))
    assert not sample.valid.any()
