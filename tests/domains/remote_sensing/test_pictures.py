from __future__ import annotations

import numpy as np
from PIL import Image

from fmsuite.core.inputs import Channel, InputSpec
from fmsuite.domains.remote_sensing import RemoteSensingDomain
from fmsuite.domains.remote_sensing.pictures import INVALID, colour_bands
from fmsuite.domains.remote_sensing.sensors import SENSORS
from fmsuite.tiling.preview import WINDOW


def spec(*names: str, sensor: str | None = None) -> InputSpec:
    known = {} if sensor is None else {band.name: band for band in SENSORS[sensor].bands}
    channels = tuple(Channel(name=n, wavelength=known[n].wavelength if n in known else None) for n in names)
    return InputSpec(axes=("y", "x"), size=(16, 16), channels=channels)


def test_colours_are_found_by_wavelength_or_name():
    sentinel = SENSORS["sentinel2-l1c"]
    assert colour_bands(spec(*sentinel.band_names, sensor="sentinel2-l1c").channels) == (3, 2, 1)
    assert colour_bands(spec("B2", "B3", "B4", sensor="landsat8").channels) == (2, 1, 0)
    assert colour_bands(spec("nir", "R", "G", "B").channels) == (1, 2, 3)
    assert colour_bands(spec("red", "green").channels) is None


def test_true_colour_keeps_the_order_of_colours():
    ramp = np.broadcast_to(np.linspace(1, 100, 16), (16, 16))
    values = np.stack([np.full((16, 16), 1.0), ramp, np.full((16, 16), 100.0)])
    picture = RemoteSensingDomain().to_rgb(values, spec("blue", "green", "red"))
    assert picture.shape == (16, 16, 3)
    assert picture.dtype == np.uint8
    assert (picture[..., 0] == 255).all()
    assert (picture[..., 2] == 0).all()
    assert (np.diff(picture[0, :, 1].astype(int)) >= 0).all()
    assert picture[0, -1, 1] > 240


def test_radar_is_shown_in_false_colour_and_one_band_in_grey():
    random = np.random.default_rng(0)
    values = random.normal(-15, 3, size=(2, 16, 16))
    radar = RemoteSensingDomain().to_rgb(values, spec("VV", "VH"))
    assert np.corrcoef(radar[..., 0].ravel(), values[0].ravel())[0, 1] > 0.97
    assert np.corrcoef(radar[..., 2].ravel(), (values[0] - values[1]).ravel())[0, 1] > 0.97
    grey = RemoteSensingDomain().to_rgb(values, spec("elevation", "slope"))
    assert (grey[..., 0] == grey[..., 1]).all()
    assert np.corrcoef(grey[..., 0].ravel(), values[0].ravel())[0, 1] > 0.97


def test_missing_pixels_are_chequered_and_do_not_decide_the_contrast():
    values = np.random.default_rng(0).uniform(1000, 2000, size=(1, 16, 16))
    plain = RemoteSensingDomain().to_rgb(values, spec("a"))
    for nothing in (0.0, np.nan, np.inf):
        holed = values.copy()
        holed[:, :8] = nothing
        picture = RemoteSensingDomain().to_rgb(holed, spec("a"))
        assert {tuple(pixel) for pixel in picture[:8].reshape(-1, 3)} == set(INVALID)
        assert (picture[8:, :, 0] == picture[8:, :, 1]).all()
        assert np.abs(picture[8:].astype(int) - plain[8:]).max() < 12
    everything = RemoteSensingDomain().to_rgb(np.zeros((3, 16, 16)), spec("red", "green", "blue"))
    assert {tuple(pixel) for pixel in everything.reshape(-1, 3)} == set(INVALID)


def test_dates_stand_side_by_side():
    values = np.random.default_rng(0).uniform(1, 2, size=(1, 6, 16, 16))
    series = InputSpec(axes=("time", "y", "x"), size=(6, 16, 16), channels=(Channel(name="a"),))
    picture = RemoteSensingDomain().to_rgb(values, series)
    assert picture.shape == (16, 4 * 16 + 3 * 2, 3)
    assert np.corrcoef(picture[:, 18:34, 0].ravel(), values[0, 1].ravel())[0, 1] > 0.97
    two = RemoteSensingDomain().to_rgb(values[:, :2], series)
    assert two.shape == (16, 34, 3)


def test_preview_draws_every_window_of_a_reduced_raster(write_raster, make_index, tmp_path):
    values = np.random.default_rng(0).integers(1000, 2000, size=(1, 64, 2048)).astype(np.uint16)
    path = write_raster("a/b.tif", values)
    domain, index, _ = make_index(path, size=32, stride=64)
    pictures = domain.preview(index, tmp_path / "preview")
    assert [p.name for p in pictures] == ["00000_b.png"]
    picture = np.asarray(Image.open(pictures[0]))
    assert picture.shape == (32, 1024, 3)
    outline = (picture == WINDOW).all(-1)
    assert outline[:, 0].all() or outline[:16, 0].all()
    rows = {index[row].position[1] for row in range(len(index))}
    assert {int(left) // 2 for left in rows} <= set(np.flatnonzero(outline.any(0)))
    assert not outline[:, 20].any()
