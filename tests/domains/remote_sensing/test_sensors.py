"""Specifications of sensors, and values that contradict them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fmsuite.commands.catalogue import catalogue
from fmsuite.core.config import validate
from fmsuite.core.data.index import SampleIndex
from fmsuite.domains.remote_sensing import RemoteSensingDomain
from fmsuite.domains.remote_sensing.options import RemoteSensingOptions
from fmsuite.domains.remote_sensing.sensors import SENSORS, read_sensor
from fmsuite.errors import UsageError

OWN = """
name: drone
title: a camera
scale: 0.001
clip: [0, 1]
layouts: [[G, R, N]]
bands:
  - {name: G, wavelength: 550, gsd: 0.1, aliases: [green]}
  - {name: R, wavelength: 660, gsd: 0.1, aliases: [red]}
  - {name: N, wavelength: 840, gsd: 0.1, mean: 0.3, std: 0.1}
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "drone.yaml"
    path.write_text(OWN, encoding="utf-8")
    return path


def test_files_of_the_package_are_named_as_their_sensors_and_are_listed():
    assert {sensor.name for sensor in SENSORS.values()} == set(SENSORS)
    headings, rows = catalogue("sensors")
    assert [row[0] for row in rows] == sorted(SENSORS)
    assert len(headings) == len(rows[0])
    with pytest.raises(KeyError):
        SENSORS["nothing"]


@pytest.mark.parametrize(
    ("sensor", "band", "stored", "physical"),
    [
        # USGS, "How do I use a scale factor with Landsat Level-2 science products?": 18639 is 0.313, 44177 is 300 K.
        ("landsat8", "B4", 18639, 0.3125725),
        ("landsat9", "B10", 44177, 299.99786954),
        ("landsat5", "B6", 44177, 299.99786954),
        ("landsat7", "B7", 18639, 0.3125725),
        ("landsat8-l1", "B8", 20000, 0.3),
        ("sentinel2-l2a", "B8", 3000, 0.3),
        ("sentinel2-l2a-n0400", "B8", 4000, 0.3),
        ("sentinel2-l1c-n0400", "B12", 1000, 0.0),
        ("naip", "nir", 255, 1.0),
    ],
)
def test_stored_values_become_physical_ones(sensor, band, stored, physical):
    of = SENSORS[sensor].quantification_of(band)
    assert of.offset + of.scale * stored == pytest.approx(physical, abs=1e-9)
    assert of.clip is None or of.clip[0] <= physical <= of.clip[1]


def test_wavelengths_are_in_nanometres_and_published_means_are_reflectances():
    for sensor in SENSORS.values():
        for band in sensor.bands:
            assert band.wavelength is None or 400 < band.wavelength < 13_000
            kind = sensor.kind_of(band.name)
            assert (band.wavelength is None) == (kind == "decibel")
            assert (kind == "kelvin") == (band.wavelength is not None and band.wavelength > 5000)
            if band.mean is not None and kind == "optical":
                assert 0 < band.mean < 0.4


def test_a_sensor_of_ones_own_is_read_from_yaml_and_kept_in_the_index(own, write_raster, make_index, noise, tmp_path):
    values = noise(3, 32, 32) // 20 + 1
    path = write_raster("a.tif", values)
    domain, index, skipped = make_index(path, sensor=str(own), size=32, bands=("N", "G"))
    assert not skipped.entries
    spec = domain.input_spec(index)
    assert spec.channel_names == ("N", "G")
    assert spec.channels[0].wavelength == 840
    assert (spec.scale, spec.clip) == (0.001, (0, 1))
    np.testing.assert_array_equal(domain.reader(index).read(index[0]).values, values[[2, 0]])
    own.unlink()
    index.write(tmp_path / "index.parquet")
    again = SampleIndex.read(tmp_path / "index.parquet")
    assert RemoteSensingDomain().input_spec(again) == spec
    domain, index, _ = make_index(path, sensor=again.metadata["options"]["sensor"], size=32, bands=("N",))
    assert index.metadata["statistics"] != [[0.3, 0.1]]
    published = {"sensor": again.metadata["options"]["sensor"], "statistics": "sensor", "size": 32}
    _, index, _ = make_index(path, bands=("N",), **published)
    assert index.metadata["statistics"] == [[0.3, 0.1]]
    with pytest.raises(UsageError, match="no published mean and std of G"):
        make_index(path, **published)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("wavelength: 660", "wavelenght: 660", "unknown key 'bands.R.wavelenght'. Did you mean 'wavelength'"),
        ("wavelength: 550", "wavelength: green", "bands.G.wavelength: Input should be a valid number"),
        ("gsd: 0.1, mean", "mean", "'bands.N.gsd' is missing"),
        ("name: R", "name: G", "two bands are called 'G'"),
        ("aliases: [red]", "aliases: [green]", "'green' is a name of both G and R"),
        ("[[G, R, N]]", "[[G, R, X]]", "layouts name the band 'X'"),
        (", std: 0.1", "", "has a mean or a std, and not the other"),
        ("title: a camera", "like: landsat88", "there is no sensor 'landsat88'. Did you mean"),
        ("scale: 0.001", "scale: 0", "a scale of 0"),
        ("name: drone", "name: [", "not valid YAML"),
    ],
)
def test_what_is_wrong_with_a_sensor_is_named_with_file_and_key(own, old, new, words):
    assert old in OWN
    own.write_text(OWN.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        validate(RemoteSensingOptions, {"sensor": str(own)}, "data", "recipe")
    assert str(own) in str(caught.value)
    assert words in str(caught.value)


def test_a_sensor_may_be_like_a_known_one(own):
    own.write_text("name: mine\nlike: sentinel2-l2a\noffset: -0.1\n", encoding="utf-8")
    sensor = read_sensor(own)
    assert (sensor.name, sensor.offset, sensor.scale) == ("mine", -0.1, 1e-4)
    assert sensor.bands == SENSORS["sentinel2-l2a"].bands
    with pytest.raises(UsageError, match="Or name a YAML file"):
        RemoteSensingOptions(sensor="mine")


def values(low: float, high: float, dtype: str, count: int = 2) -> np.ndarray:
    return np.random.default_rng(0).uniform(low, high, size=(count, 32, 32)).astype(dtype)


@pytest.mark.parametrize(
    ("sensor", "stored", "options", "words"),
    [
        ("sentinel2-l2a", values(0, 0.6, "float32"), {}, "set data.values=reflectance"),
        ("sentinel2-l2a", values(0, 6000, "uint16"), {"values": "reflectance"}, "set data.values=counts"),
        ("landsat8", values(0, 0.6, "float32"), {}, "set data.values=reflectance"),
        ("sentinel2-l2a", values(0, 255, "uint8"), {}, "data.scale, such as 0.003922"),
        ("sentinel1", values(0.01, 0.4, "float32"), {}, "sentinel1-linear"),
        ("sentinel2-l2a", values(0, 0.6, "float32"), {"values": "reflectance"}, None),
        ("sentinel2-l2a", values(0, 6000, "float32"), {}, None),
        ("sentinel2-l2a", values(0, 255, "uint8"), {"scale": 1 / 255}, None),
        ("sentinel1", values(-25, -4, "float32"), {}, None),
        ("sentinel1-linear", values(0.01, 0.4, "float32"), {}, None),
        ("naip", values(0, 255, "uint8", 4), {}, None),
    ],
)
def test_values_that_contradict_the_sensor_are_refused(write_raster, make_index, sensor, stored, options, words):
    names = {"sentinel1": ("VV", "VH"), "sentinel1-linear": ("VV", "VH"), "naip": ("red", "green", "blue", "nir")}
    path = write_raster("a.tif", stored, descriptions=names.get(sensor, ("B4", "B3")))
    domain, index, skipped = make_index(path, sensor=sensor, size=32, **options)
    if words is not None:
        assert len(index) == 0
        assert words in skipped.entries[0].reason
        return
    assert not skipped.entries
    spec = domain.input_spec(index)
    if options.get("values") == "reflectance":
        assert (spec.scale, spec.offset, spec.clip) == (1.0, 0.0, (0.0, 2.0))
        assert spec.channels[0].mean == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sensor": "sentinel1", "values": "reflectance"}, "has no meaning for sentinel1"),
        ({"sensor": "naip", "values": "reflectance", "scale": 2}, "beside scale and offset"),
        ({"sensor": "sentinel3"}, "Did you mean 'sentinel1'"),
        ({"sensor": "nowhere.yaml"}, "cannot be read"),
        ({"sensor": "naip", "statistics": "sensor"}, "naip has no published mean and std"),
    ],
)
def test_wrong_options_of_sensors_are_named(options, words):
    with pytest.raises(UsageError, match=words):
        validate(RemoteSensingOptions, options, "data", "recipe")
