"""Windows of a part of rasters, and single windows for notebooks."""

from __future__ import annotations

import numpy as np
import pytest
import rasterio
from rasterio.transform import from_origin, xy
from rasterio.warp import transform_bounds
from rasterio.windows import from_bounds

from fmsuite.core.config import validate
from fmsuite.domains.remote_sensing import read_raster
from fmsuite.domains.remote_sensing.options import RemoteSensingOptions
from fmsuite.errors import ReadFailure, UsageError


@pytest.fixture
def scene(write_raster, noise):
    """200 x 160 pixels of 10 m, from 500000, 5300000 on."""
    return write_raster("a.tif", noise(2, 160, 200), nodata=0)


@pytest.mark.parametrize("gsd", [None, 20.0, 7.0])
@pytest.mark.parametrize("unit", ["map", "pixel"])
def test_windows_lie_inside_the_region_and_fill_it(scene, make_index, unit, gsd):
    left, bottom, right, top = 500_315.0, 5_298_805.0, 501_400.0, 5_299_700.0
    box = (30, 31.5, 119.5, 140)  # top, left, bottom, right in pixels
    region = (left, bottom, right, top) if unit == "map" else (box[1], box[2], box[3], box[0])
    domain, index, _ = make_index(scene, size=16, region=region, region_unit=unit, gsd=gsd)
    corners = np.array([index[row].position for row in range(len(index))])
    ends = corners + index[0].extent
    # On whole samples of the raster, counted from its corner.
    step = (gsd or 10) / 10
    assert corners.min(0) == pytest.approx([np.ceil(place / step) * step for place in box[:2]])
    assert ends.max(0) == pytest.approx([np.floor(place / step) * step for place in box[2:]])
    assert domain.reader(index).read(index[0]).valid.all()


def test_a_region_in_degrees_is_the_box_around_it(scene, make_index):
    with rasterio.open(scene) as dataset:
        inner = (500_500, 5_298_900, 501_500, 5_299_600)
        degrees = transform_bounds(dataset.crs, "EPSG:4326", *inner)
        around = transform_bounds("EPSG:4326", dataset.crs, *degrees)
        expected = from_bounds(*around, transform=dataset.transform)
    _, index, _ = make_index(scene, size=16, region=degrees, region_crs="EPSG:4326")
    corners = np.array([index[row].position for row in range(len(index))])
    assert corners.min(0).tolist() == [np.ceil(expected.row_off), np.ceil(expected.col_off)]
    assert (corners.max(0) + 16).tolist() == [
        np.floor(expected.row_off + expected.height),
        np.floor(expected.col_off + expected.width),
    ]


def test_rasters_beside_the_region_and_regions_smaller_than_a_window_are_named(scene, make_index, write_raster, noise):
    far = write_raster("b.tif", noise(2, 32, 32), transform=from_origin(700_000, 5_300_000, 10, 10))
    plain = write_raster("c.tif", noise(2, 32, 32), crs=None, transform=None)
    region = (500_000, 5_299_000, 501_000, 5_300_000)
    _, index, skipped = make_index(scene, far, size=32, region=region)
    assert index.sources == [str(scene)]
    assert "lies beside it" in skipped.entries[0].reason
    _, index, skipped = make_index(scene, size=64, region=(500_000, 5_299_700, 501_000, 5_300_000))
    assert len(index) == 0
    assert "30x100 of its pixels are in data.region" in skipped.entries[0].reason
    _, _, skipped = make_index(plain, size=16, region=(9, 47, 9.1, 47.1), region_crs="EPSG:4326")
    assert "no coordinate system" in skipped.entries[0].reason


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"region": (1, 5, 0, 9)}, "left < right"),
        ({"region": (0, 5, 1, 2)}, "bottom < top"),
        ({"region": (0, 2, 1, 5), "region_unit": "pixel"}, "top < bottom"),
        ({"region": (0, 5, 1, 2), "region_unit": "pixel", "region_crs": "EPSG:4326"}, "in pixels"),
        ({"region": (0, 2, 1, 5), "region_crs": "EPSG:0"}, "no coordinate system"),
        ({"region_crs": "EPSG:4326"}, "only with a region"),
    ],
)
def test_wrong_regions_are_named(options, words):
    with pytest.raises(UsageError, match=words):
        validate(RemoteSensingOptions, options, "data", "recipe")


def test_any_window_is_read_in_pixels_or_map_units(scene):
    with rasterio.open(scene) as dataset:
        whole = dataset.read()
        patch = read_raster(scene)
        np.testing.assert_array_equal(patch.values, whole)
        assert patch.transform == dataset.transform
        patch = read_raster(scene, pixels=(100, 150, 40, 30), bands=("band2", "band1"))
        np.testing.assert_array_equal(patch.values, whole[::-1, 100:140, 150:180])
        assert (patch.transform.c, patch.transform.f) == xy(dataset.transform, 100, 150, offset="ul")
        bounds = (500_105, 5_299_000, 500_495, 5_299_395)
        patch = read_raster(scene, bounds=bounds)
        np.testing.assert_array_equal(patch.values, whole[:, 60:100, 10:50])
        assert (patch.transform.c, patch.transform.f) == (500_100, 5_299_400)
        assert patch.crs == dataset.crs
        degrees = transform_bounds(dataset.crs, "EPSG:4326", *bounds)
        wider = read_raster(scene, bounds=degrees, crs="EPSG:4326")
        column, row = ~wider.transform * (patch.transform.c, patch.transform.f)
        at = round(row), round(column)
        np.testing.assert_array_equal(wider.values[:, at[0] : at[0] + 40, at[1] : at[1] + 40], patch.values)
    outside = read_raster(scene, pixels=(-3, 195, 10, 10))
    assert outside.valid.sum() == 2 * 7 * 5
    assert np.isnan(outside.physical[:, 0]).all()


def test_a_window_is_resampled_as_windows_of_an_index_are(scene, make_index):
    domain, index, _ = make_index(scene, size=16, gsd=25)
    sample = domain.reader(index).read(index[0])
    patch = read_raster(scene, pixels=(0, 0, 40, 40), gsd=25)
    np.testing.assert_array_equal(patch.values, sample.values)
    assert patch.metres == pytest.approx((25, 25))
    assert (patch.transform.a, patch.transform.e) == (25, -25)


def test_physical_values_follow_the_sensor(write_raster, noise):
    counts = noise(2, 32, 32)
    counts[0, 0, 0] = 0
    path = write_raster("b.tif", counts, descriptions=("SR_B4", "ST_B10"), nodata=0)
    found = read_raster(path, sensor="landsat8").physical
    np.testing.assert_allclose(found[0].ravel()[1:], counts[0].ravel()[1:] * 2.75e-5 - 0.2, rtol=1e-6)
    np.testing.assert_allclose(found[1], counts[1] * 0.00341802 + 149, rtol=1e-6)
    assert np.isnan(found[0, 0, 0])


def test_what_cannot_be_read_is_named(scene, write_raster, noise):
    with pytest.raises(ReadFailure, match=r"no band band9; it has band1, band2"):
        read_raster(scene, bands=("band9",))
    with pytest.raises(UsageError, match="lies beside it"):
        read_raster(scene, bounds=(0, 0, 10, 10))
    with pytest.raises(UsageError, match="both bounds and pixels"):
        read_raster(scene, bounds=(0, 0, 1, 1), pixels=(0, 0, 1, 1))
    with pytest.raises(UsageError, match="crs without bounds"):
        read_raster(scene, crs="EPSG:4326")
    with pytest.raises(UsageError, match="height and width"):
        read_raster(scene, pixels=(0, 0, 0, 1))
    with pytest.raises(UsageError, match=r"unknown key 'data\.sensr'"):
        read_raster(scene, sensr="naip")
    plain = write_raster("c.tif", noise(2, 32, 32), crs=None, transform=None)
    with pytest.raises(ReadFailure, match="no place on Earth"):
        read_raster(plain, gsd=10)
