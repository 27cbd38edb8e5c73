"""Several files that are one scene: single-band files, pixels of several sizes, several sensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.transform import from_origin
from rasterio.windows import Window as RasterWindow

from fmsuite.core.config import validate
from fmsuite.core.data.index import Window
from fmsuite.core.inputs import Normalize, Quantification
from fmsuite.domains.remote_sensing.grids import pixel_ratio
from fmsuite.domains.remote_sensing.options import RemoteSensingOptions
from fmsuite.domains.remote_sensing.pictures import draw
from fmsuite.domains.remote_sensing.stack import open_stack
from fmsuite.errors import ReadFailure, UsageError

TWO = (
    {"sensor": "sentinel2-l2a", "pattern": "S2"},
    {"sensor": "sentinel1", "pattern": "S1", "required": False},
)
ALIKE = ({"sensor": "sentinel2-l2a", "pattern": "S2"}, {"sensor": "landsat8", "pattern": "L8"})


def at(size: float, left: float = 500_000, top: float = 5_300_000):
    return from_origin(left, top, size, size)


@pytest.fixture
def radar():
    return np.random.default_rng(5).normal(-14, 3, size=(2, 48, 48)).astype(np.float32)


def test_files_of_one_band_each_are_one_scene_and_read_as_each_of_them(write_raster, make_index, noise):
    names = {band: f"d/2018-10-13_S2B_L1C_{band}.tiff" for band in ("B08", "B02", "B8A", "B11")}
    paths = {band: write_raster(name, noise(1, 50, 70, seed=i)) for i, (band, name) in enumerate(names.items())}
    write_raster("d/2018-10-13_S2B_L1C_TCI.tiff", noise(1, 50, 70))
    folder = paths["B02"].parent
    domain, index, skipped = make_index(folder, sensor="sentinel2-l1c", size=32, bands=("B11", "B8", "B2"))
    assert [Path(entry.path).name for entry in skipped.entries] == ["2018-10-13_S2B_L1C_TCI.tiff"]
    assert index.groups == ["2018-10-13_S2B_L1C"]
    assert index.sources == [str(paths["B02"])]
    reader = domain.reader(index)
    (day, files), *others = reader.files_of(index.sources[0])
    # B8A is not asked for, so it is not opened.
    assert (day, files, others) == (None, tuple(str(paths[band]) for band in ("B02", "B08", "B11")), [])
    for row in range(len(index)):
        top, left = index[row].position
        sample = reader.read(index[row])
        for values, band in zip(sample.values, ("B11", "B08", "B02"), strict=True):
            with rasterio.open(paths[band]) as dataset:
                np.testing.assert_array_equal(values, dataset.read(1, window=RasterWindow(left, top, 32, 32)))
    beyond = reader.read(Window(index.sources[0], "", (40, 60), (32, 32)))
    assert beyond.valid[:, :10, :10].all()
    assert beyond.valid.sum() == 3 * 10 * 10


def test_all_bands_are_taken_in_the_sensors_order_and_a_pattern_finds_others(write_raster, make_index, noise):
    for band in ("red", "blue", "green"):
        path = write_raster(f"d/scene_{band}.tif", noise(1, 32, 32))
    domain, index, skipped = make_index(path.parent, sensor="naip", size=32, scale=1e-4)
    assert not skipped.entries
    assert domain.input_spec(index).channel_names == ("red", "green", "blue")
    for band in (1, 2):
        path = write_raster(f"e/x_band{band}.tif", noise(1, 32, 32, seed=band))
    pattern = r"_band(?P<band>\d)"
    domain, index, _ = make_index(path.parent, band_pattern=pattern, size=32)
    assert domain.input_spec(index).channel_names == ("1", "2")
    assert index.groups == ["x"]
    # Without it, nothing says that these are one scene.
    _, index, _ = make_index(path.parent, size=32)
    assert len(index.sources) == 2
    _, index, skipped = make_index(path.parent, band_pattern=r"band(?P<band>1)", size=32)
    assert "band_pattern is not found" in skipped.entries[0].reason
    _, index, skipped = make_index(path.parent, sensor="sentinel2-l2a", band_pattern=pattern, size=32)
    assert "the band '1'; sentinel2-l2a has B1, B2" in skipped.entries[0].reason


def test_bands_of_10_20_and_60_metres_are_read_on_the_finest_grid_by_repeating(write_raster, make_index, noise):
    parts = {"B02": 10, "B05": 20, "B09": 60}
    folder = "g/IMG_DATA"
    whole, paths = {}, {}
    for seed, (band, metres) in enumerate(parts.items()):
        whole[band] = noise(1, 600 // metres, 720 // metres, seed=seed)
        name = f"{folder}/R{metres}m/T32_20240101_{band}_{metres}m.jp2.tif"
        paths[band] = write_raster(name, whole[band], transform=at(metres), nodata=0)
    whole["B09"][0, 2, 3] = 0
    write_raster(f"{folder}/R60m/T32_20240101_B09_60m.jp2.tif", whole["B09"], transform=at(60), nodata=0)
    # The same band again, coarser: level-2 products have it.
    again = write_raster(f"{folder}/R20m/T32_20240101_B02_20m.jp2.tif", noise(1, 30, 36), transform=at(20))
    domain, index, skipped = make_index(paths["B02"].parents[2], sensor="sentinel2-l2a", size=17, min_valid=0)
    assert [entry.path for entry in skipped.entries] == [str(again)]
    assert "finer pixels" in skipped.entries[0].reason
    assert domain.input_spec(index).spacing == (10, 10)
    expected = np.stack([np.kron(whole[band][0], np.ones((m // 10, m // 10), np.uint16)) for band, m in parts.items()])
    reader = domain.reader(index)
    for row in range(len(index)):
        top, left = (int(place) for place in index[row].position)
        sample = reader.read(index[row])
        np.testing.assert_array_equal(sample.values, expected[:, top : top + 17, left : left + 17])
        np.testing.assert_array_equal(sample.valid, sample.values > 0)
    beyond = reader.read(Window(index.sources[0], "", (-5, 65), (17, 17)))
    np.testing.assert_array_equal(beyond.values[:, 5:, :7], expected[:, :12, 65:])
    assert not beyond.valid[:, :5].any()


@pytest.mark.parametrize("wrong", [at(10, left=500_004), at(15), at(20, top=5_300_010), "EPSG:32633"])
def test_a_band_on_another_grid_is_refused_with_both_grids_and_the_way_out(write_raster, make_index, noise, wrong):
    good = write_raster("d/x_B02.tif", noise(1, 48, 48))
    other = {"crs": wrong} if isinstance(wrong, str) else {"transform": wrong}
    bad = write_raster("d/x_B03.tif", noise(1, 48, 48), **other)
    _, index, skipped = make_index(good.parent, sensor="sentinel2-l2a", size=32)
    assert len(index) == 0
    reasons = {entry.path: entry.reason for entry in skipped.entries}
    finer = good if not isinstance(wrong, str) and wrong.a > 10 else min(good, bad)
    reason = reasons[str(bad if finer == good else good)]
    for words in (str(finer), "gdalwarp -t_srs 'EPSG:32632' -te 500000 5299520 500480 5300000 -ts 48 48", "48x48 of"):
        assert words in reason
    assert "another grid" in reasons[str(finer)]
    with pytest.raises(ReadFailure, match="gdalwarp"):
        open_stack((str(good), str(bad)), RemoteSensingOptions(sensor="sentinel2-l2a"))


def test_a_damaged_file_of_a_scene_costs_its_windows_and_is_named(write_raster, make_index, noise):
    blocks = {"tiled": True, "blockxsize": 32, "blockysize": 32}
    good = write_raster("d/x_B02.tif", noise(1, 96, 96), **blocks)
    bad = write_raster("d/x_B03.tif", noise(1, 96, 96), **blocks)
    whole = bad.read_bytes()
    # Compressed nothing, the last blocks are at the end: the middle one is gone too.
    bad.write_bytes(whole[: int(0.45 * len(whole))])
    domain, index, skipped = make_index(good.parent, sensor="sentinel2-l2a", size=32)
    (entry,) = skipped.entries
    assert (entry.path, entry.stage) == (str(bad), "read")
    assert 0 < len(index) < 9
    assert f"{9 - len(index)} of 9 windows left out" in entry.reason
    reader = domain.reader(index)
    assert all(reader.read(index[row]).valid.all() for row in range(len(index)))


def test_ratios_of_grids():
    fine = (60, 61, "EPSG:32632", (10.0, 0.0, 5e5, 0.0, -10.0, 5.3e6))
    assert pixel_ratio(fine, fine) == (1, 1)
    assert pixel_ratio(fine, (30, 31, "EPSG:32632", (20.0, 0.0, 5e5, 0.0, -20.0, 5.3e6))) == (2, 2)
    assert pixel_ratio(fine, (30, 61, "EPSG:32632", (10.0, 0.0, 5e5, 0.0, -20.0, 5.3e6))) == (2, 1)
    assert pixel_ratio(fine, (30, 29, "EPSG:32632", (20.0, 0.0, 5e5, 0.0, -20.0, 5.3e6))) is None
    assert pixel_ratio(fine, (30, 31, "EPSG:32632", (20.01, 0.0, 5e5, 0.0, -20.0, 5.3e6))) is None
    assert pixel_ratio(fine, (30, 31, "EPSG:32632", (20.0, 0.1, 5e5, 0.0, -20.0, 5.3e6))) is None
    wkt = rasterio.crs.CRS.from_epsg(32632).to_wkt()
    assert pixel_ratio(fine, (60, 61, wkt, fine[3])) == (1, 1)
    assert pixel_ratio(fine, (60, 61, "EPSG:32631", fine[3])) is None


def test_two_files_of_one_band_and_one_of_several_are_named(write_raster, make_index, noise):
    write_raster("d/x_B02.tif", noise(1, 32, 32))
    write_raster("d/x_B2.tif", noise(1, 32, 32))
    path = write_raster("d/x_B03.tif", noise(1, 32, 32))
    _, index, skipped = make_index(path.parent, sensor="sentinel2-l2a", size=32)
    assert len(index) == 1
    assert "already has the band B2, from" in skipped.entries[0].reason
    write_raster("d/x_B2.tif", noise(3, 32, 32))
    _, _, skipped = make_index(path.parent, sensor="sentinel2-l2a", size=32)
    assert "holds 3 bands" in skipped.entries[0].reason or "undescribed" in skipped.entries[0].reason


def optical(noise, seed: int = 0):
    values = noise(2, 48, 48, seed=seed)
    values[:, :8] = 0
    return values


def test_two_sensors_are_one_scene_and_a_missing_one_is_invalid(write_raster, make_index, noise, radar):
    power = radar.copy()
    power[:, -8:] = np.nan
    write_raster("d/one/a_S1.tif", power, descriptions=("VV", "VH"), nodata=np.nan)
    write_raster("d/one/a_S2.tif", optical(noise), descriptions=("B4", "B8"), nodata=0)
    write_raster("d/two/b_S2.tif", optical(noise, 1), descriptions=("B4", "B8"), nodata=0)
    lone = write_raster("d/two/c_S1.tif", radar, descriptions=("VV", "VH"))
    label = write_raster("d/two/c_label.tif", noise(1, 48, 48))
    domain, index, skipped = make_index(lone.parents[1], layers=TWO, groups="sensors", size=24, min_valid=0.3)
    reasons = {entry.path: entry.reason for entry in skipped.entries}
    assert set(reasons) == {str(lone), str(label)}
    assert "no file of sentinel2-l2a" in reasons[str(lone)]
    assert "none of the patterns of data.layers (S2, S1)" in reasons[str(label)]
    assert index.groups == ["one/a", "two/b"]
    spec = domain.input_spec(index)
    assert spec.groups == (("sentinel2-l2a", (0, 1)), ("sentinel1", (2, 3)))
    assert spec.channel_names == ("B4", "B8", "VV", "VH")
    assert [channel.quantification for channel in spec.channels[:2]] == [None, None]
    assert spec.channels[2].quantification == Quantification(clip=(-60, 40))
    reader = domain.reader(index)
    rows = {group: [r for r in range(len(index)) if index[r].group == group] for group in index.groups}
    for row in rows["one/a"]:
        top, left = (int(place) for place in index[row].position)
        box = np.s_[:, top : top + 24, left : left + 24]
        sample = reader.read(index[row])
        np.testing.assert_array_equal(sample.values[:2], optical(noise)[box])
        np.testing.assert_array_equal(sample.valid[:2], optical(noise)[box] > 0)
        np.testing.assert_array_equal(sample.values[2:], np.nan_to_num(power)[box])
        np.testing.assert_array_equal(sample.valid[2:], np.isfinite(power)[box])
    sample = reader.read(index[rows["two/b"][-1]])
    assert sample.valid[:2].all()
    assert not sample.valid[2:].any()
    kept = radar[:, :40]
    for channel, band in zip(spec.channels[2:], kept, strict=True):
        assert channel.mean == pytest.approx(band.mean(), abs=0.1)
        assert channel.std == pytest.approx(band.std(), rel=0.05)
    augmentation = domain.augmentation(spec)
    assert augmentation.kind == ("optical", "optical", "decibel", "decibel")
    assert augmentation.scale == (1e-4, 1e-4, 1.0, 1.0)
    view = domain.overview(index, index.sources[0])
    assert view.rgb.shape == (48, 48, 3)


def test_folders_that_tell_the_sensor_are_no_part_of_the_place(write_raster, make_index, noise, radar):
    write_raster("d/S1/a_x.tif", radar, descriptions=("VV", "VH"))
    path = write_raster("d/S2/a_x.tif", noise(2, 48, 48), descriptions=("B4", "B8"))
    domain, index, skipped = make_index(path.parents[1], layers=TWO, size=48)
    assert not skipped.entries
    assert index.groups == ["a_x"]
    assert domain.reader(index).read(index[0]).valid.all()
    assert domain.input_spec(index).groups == (("", (0, 1, 2, 3)),)


def test_bands_with_equal_names_are_told_apart_by_their_sensor(write_raster, make_index, noise):
    one, two = noise(2, 32, 32), noise(2, 32, 32, seed=1) + 7300
    write_raster("d/a_S2.tif", one, descriptions=("B4", "B8A"))
    path = write_raster("d/a_L8.tif", two, descriptions=("SR_B4", "ST_B10"))
    domain, index, _ = make_index(path.parent, layers=ALIKE, size=32)
    spec = domain.input_spec(index)
    assert spec.channel_names == ("sentinel2-l2a:B4", "B8A", "landsat8:B4", "B10")
    np.testing.assert_array_equal(domain.reader(index).read(index[0]).values, np.concatenate([one, two]))
    assert [q.scale for q in spec.quantifications] == [1e-4, 1e-4, 2.75e-5, 0.00341802]
    assert domain.augmentation(spec).kind[-1] == "kelvin"
    bands = ("landsat8:B4", "sentinel2-l2a:B4")
    domain, index, _ = make_index(path.parent, layers=ALIKE, size=32, bands=bands)
    np.testing.assert_array_equal(domain.reader(index).read(index[0]).values, np.stack([two[0], one[0]]))


def test_dates_of_two_sensors_make_a_series(write_raster, make_index, noise, radar):
    for day in ("20240101", "20240111"):
        write_raster(f"d/a_{day}_S2.tif", noise(2, 48, 48), descriptions=("B4", "B8"))
    path = write_raster("d/a_20240111_S1.tif", radar, descriptions=("VV", "VH"))
    domain, index, skipped = make_index(path.parent, layers=TWO, series=True, size=48)
    assert not skipped.entries
    sample = domain.reader(index).read(index[0])
    assert sample.values.shape == (4, 2, 48, 48)
    np.testing.assert_array_equal(sample.coords["time"], [8766, 8776])
    assert sample.valid.mean(axis=(2, 3)).tolist() == [[1, 1], [1, 1], [0, 1], [0, 1]]


def test_each_sensor_is_normalised_and_drawn_in_its_own_unit(write_raster, make_index, noise, radar):
    import torch

    write_raster("d/a_S1.tif", radar, descriptions=("VV", "VH"))
    path = write_raster("d/a_S2.tif", noise(3, 48, 48), descriptions=("B2", "B3", "B4"))
    domain, index, _ = make_index(path.parent, layers=TWO, size=48)
    spec = domain.input_spec(index)
    values = domain.reader(index).read(index[0]).values
    normal = Normalize(spec)(torch.from_numpy(values)[None])[0]
    assert normal.mean(dim=(1, 2)).abs().max() < 0.05
    assert (normal.std(dim=(1, 2)) - 1).abs().max() < 0.05
    alone = draw(values[:3], spec.model_copy(update={"channels": spec.channels[:3]}))
    np.testing.assert_array_equal(draw(values, spec), alone)
    dark = values.copy()
    dark[:3] = 0
    radar_only = spec.model_copy(update={"channels": spec.channels[3:]})
    np.testing.assert_array_equal(draw(dark, spec), draw(values[3:], radar_only))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": [], "sensor": "generic"}, "layers is empty"),
        ({"layers": [{"sensor": "sentinel1"}]}, "sentinel1 has no pattern"),
        ({"layers": [TWO[0], TWO[0]]}, "two are called sentinel2-l2a"),
        ({"layers": TWO, "sensor": "naip"}, "sensor beside layers"),
        ({"layers": TWO, "bands": ["B4", "VX"]}, "none of sentinel2-l2a, sentinel1 has 'VX'"),
        ({"layers": ALIKE, "bands": ["B4"]}, "has 'B4'"),
        ({"layers": [{"sensor": "sentinel1", "pattern": "("}]}, "not a regular expression"),
        ({"groups": "sensors"}, "several layers"),
        ({"band_pattern": "B(\\d)"}, "(?P<band>...)"),
    ],
)
def test_wrong_layers_are_named(options, words):
    with pytest.raises(UsageError) as caught:
        validate(RemoteSensingOptions, options, "data", "recipe")
    assert words in str(caught.value)


def test_options_of_layers_survive_the_index(write_raster, make_index, noise, radar):
    write_raster("d/a_S1.tif", radar, descriptions=("VV", "VH"))
    path = write_raster("d/a_S2.tif", noise(2, 48, 48), descriptions=("B4", "B8"))
    _, index, _ = make_index(path.parent, layers=TWO, size=48)
    options = RemoteSensingOptions.model_validate(index.metadata["options"])
    assert options.layers is not None
    assert [layer.title for layer in options.layers] == ["sentinel2-l2a", "sentinel1"]
