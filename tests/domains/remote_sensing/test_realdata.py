"""Real rasters: an optical and a radar chip, a drawer of unusual GeoTIFFs, a MODIS series."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import numpy as np
import pyproj
import pytest
import rasterio
import torch
from rasterio.windows import Window

from fmsuite.commands.pretrain import pretrain
from fmsuite.commands.setup import open_index
from fmsuite.core.backbones.build import build_backbone
from fmsuite.core.backbones.calendar import calendar
from fmsuite.core.data.sample import View
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.encoders import Encoder, load_encoder
from fmsuite.domains.base import load_domain
from fmsuite.domains.remote_sensing import read_raster
from fmsuite.domains.remote_sensing.eopatch_files import TIMESTAMPS
from fmsuite.domains.remote_sensing.options import RemoteSensingOptions
from fmsuite.domains.remote_sensing.raster import SUFFIXES

pytestmark = pytest.mark.realdata


def test_a_sentinel2_chip_of_thirteen_bands(real_data, make_index):
    folder = real_data / "remote_sensing" / "sen1floods11_sample" / "S2"
    domain, index, skipped = make_index(folder, sensor="sentinel2-l1c")
    assert not skipped.entries
    assert len(index) == 64
    spec = domain.input_spec(index)
    assert spec.channel_names[:3] == ("B1", "B2", "B3")
    with rasterio.open(next(folder.glob("*.tif"))) as dataset:
        whole = dataset.read().astype(float)
        middle = dataset.xy(255.5, 255.5)
        degrees = dataset.res
    reflectance = np.where(whole != 0, whole, np.nan) * 1e-4
    for channel, band in zip(spec.channels, reflectance):
        assert channel.mean == pytest.approx(np.nanmean(band), rel=0.02)
    geod = pyproj.Geod(ellps="WGS84")
    east = geod.inv(middle[0], middle[1], middle[0] + degrees[0], middle[1])[2]
    north = geod.inv(middle[0], middle[1] - degrees[1] / 2, middle[0], middle[1] + degrees[1] / 2)[2]
    assert spec.spacing == pytest.approx((north, east), rel=1e-5)


def test_a_sentinel1_chip_of_two_bands(real_data, make_index):
    folder = real_data / "remote_sensing" / "sen1floods11_sample" / "S1"
    domain, index, skipped = make_index(folder, sensor="sentinel1", gsd=10)
    assert not skipped.entries
    spec = domain.input_spec(index)
    assert spec.channel_names == ("VV", "VH")
    assert -30 < spec.channels[1].mean < spec.channels[0].mean < 0
    reader = domain.reader(index)
    assert all(np.isfinite(reader.read(index[row]).values).all() for row in range(len(index)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gsd": 1000.0, "size": 32},
        {"sensor": "sentinel2-l1c"},
        {"sensor": "naip"},
        {"bands": ("red", "blue")},
    ],
    ids=["generic", "gsd", "sentinel2", "naip", "red-blue"],
)
@pytest.mark.parametrize("folder", ["geotiff_formats", "sen1floods11_sample", "eolearn_patch"])
def test_every_file_is_indexed_or_skipped_with_a_reason(real_data, make_index, folder, options):
    root = real_data / "remote_sensing" / folder
    domain, index, skipped = make_index(root, **options)
    files = {str(path) for path in root.rglob("*") if path.suffix in SUFFIXES or path.name == TIMESTAMPS}
    reader = domain.reader(index)
    used = {path for source in index.sources for _, paths in reader.files_of(source) for path in paths}
    assert used | {entry.path for entry in skipped.entries} == files
    assert all(len(entry.reason) > 30 for entry in skipped.entries)
    for row in range(0, len(index), max(1, len(index) // 20)):
        sample = reader.read(index[row])
        assert sample.valid.mean() >= 0.5
        assert np.isfinite(sample.values).all()


def test_a_file_with_an_internal_mask(real_data, make_index):
    path = real_data / "remote_sensing" / "geotiff_formats" / "riotiler_cog_rgb_mask.tif"
    domain, index, _ = make_index(path, size=32, min_valid=0.1)
    with rasterio.open(path) as dataset:
        mask = dataset.dataset_mask() > 0
    reader = domain.reader(index)
    for row in range(len(index)):
        window = index[row]
        top, left = (int(place) for place in window.position)
        sample = reader.read(window)
        np.testing.assert_array_equal(sample.valid.all(0), mask[top : top + 32, left : left + 32])


FORMATS = [
    ("RGB.byte", None),
    ("riotiler_blue", None),
    ("riotiler_cog", None),
    ("riotiler_cog_cmap", "rgb"),
    ("riotiler_cog_cmap", "index"),
    ("riotiler_cog_hirise_mars", None),
    ("riotiler_cog_nodata", None),
    ("riotiler_cog_rgb_mask", None),
    ("riotiler_green", None),
    ("riotiler_red", None),
    ("riotiler_scene_band1", None),
    ("riotiler_scene_band2", None),
]


@pytest.mark.parametrize(("name", "palette"), FORMATS)
def test_windows_equal_rasterios_own_at_borders_and_with_bands_in_another_order(real_data, name, palette):
    path = real_data / "remote_sensing" / "geotiff_formats" / f"{name}.tif"
    with rasterio.open(path) as dataset:
        height, width = dataset.shape
        for row, column in ((-20, -13), (height // 2, width // 2), (height - 30, width - 41), (7, width - 5)):
            top, left, bottom, right = max(row, 0), max(column, 0), min(row + 48, height), min(column + 64, width)
            raw = dataset.read(window=Window(left, top, right - left, bottom - top), masked=True)
            values, valid = raw.data, ~np.ma.getmaskarray(raw)
            if palette == "rgb":
                colours = np.array([dataset.colormap(1)[entry] for entry in range(256)], np.uint8)[values[0]]
                values, valid = colours[..., :3].transpose(2, 0, 1), np.repeat(valid & (colours[..., 3] > 0), 3, axis=0)
            beside = ((0, 0), (top - row, row + 48 - bottom), (left - column, column + 64 - right))
            values, valid = np.pad(np.where(valid, values, 0), beside), np.pad(valid, beside)
            patch = read_raster(path, palette=palette, pixels=(row, column, 48, 64))
            np.testing.assert_array_equal(patch.valid, valid)
            np.testing.assert_array_equal(patch.values, values)
            turned = read_raster(path, palette=palette, pixels=(row, column, 48, 64), bands=patch.bands[::-1])
            np.testing.assert_array_equal(turned.values, values[::-1])
            np.testing.assert_array_equal(turned.valid, valid[::-1])
        assert patch.metres is not None
        assert patch.values.dtype == dataset.dtypes[0]


def test_eight_files_of_one_date_are_one_scene(real_data, make_index):
    folder = real_data / "remote_sensing" / "sentinel2_rcr"
    region = {"region": (900, 1000, 1156, 744), "region_unit": "pixel"}
    options = {"sensor": "sentinel2-l1c", "scale": 1 / 255, "nodata": 255, "size": 128}
    domain, index, skipped = make_index(folder, **options, **region)
    assert not skipped.entries
    assert index.groups == ["2018-10-13_Sentinel-2B_L1C"]
    assert domain.input_spec(index).channel_names == tuple(f"B{n}" for n in range(1, 9))
    assert len(index) == 4
    reader = domain.reader(index)
    for row in range(4):
        top, left = index[row].position
        sample = reader.read(index[row])
        for number in range(1, 9):
            with rasterio.open(next(folder.glob(f"*_B0{number}.tiff"))) as dataset:
                expected = dataset.read(1, window=Window(left, top, 128, 128))
            np.testing.assert_array_equal(sample.valid[number - 1], expected != 255)
            np.testing.assert_array_equal(sample.values[number - 1], np.where(expected != 255, expected, 0))


def test_two_sensors_over_each_other_keep_each_ones_nodata(real_data, make_index):
    folder = real_data / "remote_sensing" / "sen1floods11_sample"
    layers = (
        {"sensor": "sentinel2-l1c", "pattern": "S2Hand"},
        {"sensor": "sentinel1", "pattern": "S1Hand", "required": False},
    )
    domain, index, skipped = make_index(folder, layers=layers, groups="sensors", size=128)
    assert [entry.path.endswith("LabelHand.tif") for entry in skipped.entries] == [True]
    spec = domain.input_spec(index)
    assert [(name, len(members)) for name, members in spec.groups] == [("sentinel2-l1c", 13), ("sentinel1", 2)]
    assert -30 < spec.channels[14].mean < spec.channels[13].mean < 0 < spec.channels[0].mean < 1
    with rasterio.open(next(folder.glob("S2/*.tif"))) as s2, rasterio.open(next(folder.glob("S1/*.tif"))) as s1:
        optical, radar = s2.read(), s1.read()
    expected = np.concatenate([optical.astype(np.float32), radar])
    valid = np.concatenate([optical != 0, np.isfinite(radar)])
    reader = domain.reader(index)
    for row in range(len(index)):
        top, left = (int(place) for place in index[row].position)
        box = np.s_[:, top : top + 128, left : left + 128]
        sample = reader.read(index[row])
        np.testing.assert_array_equal(sample.valid, valid[box])
        np.testing.assert_array_equal(sample.values, np.where(valid, expected, 0)[box])


def test_twelve_months_of_modis_in_sinusoidal_coordinates(real_data, make_index):
    domain, index, skipped = make_index(real_data / "remote_sensing" / "modis_ndvi_series", series=True, size=32)
    assert not skipped.entries
    assert index.groups == ["TERRA_MODIS_012010_NDVI"]
    sample = domain.reader(index).read(index[0])
    assert sample.values.shape == (1, 12, 32, 32)
    assert sample.coords["time"][0] == 5005  # 2013-09-14
    assert (np.diff(sample.coords["time"]) > 0).all()
    assert domain.input_spec(index).spacing == pytest.approx((1.0, 231.656, 231.656), abs=1e-3)


def test_land_cover_polygons_give_the_patches_that_were_cut_by_other_code(real_data, make_index):
    folder = real_data / "remote_sensing" / "sentinel2_rcr"
    domain, index, skipped = make_index(
        folder,
        sensor="sentinel2-l1c",
        scale=1 / 255,
        size=16,
        places=folder / "rcr_landcover.shp",
        place_windows="centre",
    )
    assert not skipped.entries
    assert len(index.groups) == 23
    reader = domain.reader(index)
    windows = {(window.group, window.position): window for window in map(index.__getitem__, range(len(index)))}
    patches = np.load(folder / "patches16_8band.npz")
    for x, y, polygon, (row, column) in zip(*(patches[name] for name in ("x", "y", "polygon", "rowcol")), strict=True):
        window = windows.pop((f"rcr_landcover/{polygon}", (row - 8.0, column - 8.0)))
        assert window.label == y
        np.testing.assert_array_equal(reader.read(window).values, x)
    # The patches are at most 30 of a polygon, and all pixels of the smaller ones.
    assert {group for group, _ in windows} == {f"rcr_landcover/{number}" for number in (0, 1, 4, 13, 14)}


def test_points_of_a_series_lie_in_its_sinusoidal_grid(real_data, make_index):
    folder = real_data / "remote_sensing" / "modis_ndvi_series"
    file = folder / "samples_sinop_crop.csv"
    _, index, skipped = make_index(folder, size=8, series=True, places=file)
    assert not skipped.entries
    labels = [line.split(",")[-1] for line in file.read_text().split()[1:]]
    assert sorted(index[row].label for row in range(len(index))) == sorted(labels)
    with rasterio.open(next(folder.glob("*.jp2"))) as dataset:
        # The sphere's own formula: x = R longitude cos(latitude), y = R latitude.
        for row, line in enumerate(file.read_text().split()[1:]):
            longitude, latitude = np.radians([float(cell) for cell in line.split(",")[1:3]])
            column, line_of = ~dataset.transform @ (
                6371007.181 * longitude * np.cos(latitude),
                6371007.181 * latitude,
            )
            _, top, left = index[row].position
            assert 0 <= column < 255
            assert 0 <= line_of < 147
            assert top <= line_of < top + 8
            assert left <= column < left + 8
            if 4 <= column < 251 and 4 <= line_of < 143:
                assert (top + 4, left + 4) == (int(line_of), int(column))


def test_eolearn_folder_of_68_dates(real_data, make_index):
    folder = real_data / "remote_sensing" / "eolearn_patch"
    options = {"series": True, "bands": ("NDVI",), "size": 32, "stride": 64}
    domain, index, skipped = make_index(folder, cloud_band="CLM", **options)
    assert [Path(entry.path).name for entry in skipped.entries] == ["import-tiff-test1.tiff"]
    spec = domain.input_spec(index)
    assert (spec.size, spec.channel_names) == ((68, 32, 32), ("NDVI",))
    # As bbox.geojson has it: 999.5 by 1009.7 m.
    assert spec.spacing == pytest.approx((1, 9.9974, 9.9948), abs=1e-4)
    stamps = [datetime.fromisoformat(text) for text in json.loads((folder / "timestamps.json").read_text())]
    values, clouds = (np.load(folder / file)[..., 0] for file in ("data/NDVI.npy", "mask/CLM.npy"))
    reader = domain.reader(index)
    for row in range(len(index)):
        sample = reader.read(index[row])
        _, top, left = (int(place) for place in index[row].position)
        box = np.s_[:, top : top + 32, left : left + 32]
        np.testing.assert_array_equal(sample.valid[0], clouds[box] != 1)
        np.testing.assert_array_equal(sample.values[0], np.where(clouds[box] != 1, values[box], 0))
    found = calendar(torch.from_numpy(sample.coords["time"]))
    assert found.tolist() == [[stamp.year - 2002, stamp.month - 1, stamp.hour] for stamp in stamps]
    maps = {"cover": "{folder}/mask_timeless/LULC.npy"}
    domain, index, _ = make_index(folder, maps=maps, **options)
    (cover,) = domain.reader(index).read(index[0]).maps.values()
    _, top, left = (int(place) for place in index[0].position)
    expected = np.load(folder / "mask_timeless" / "LULC.npy")[top : top + 32, left : left + 32, 0]
    np.testing.assert_array_equal(cover, expected)


@pytest.mark.parametrize("data", ["modis_ndvi_series", "eolearn_patch"])
def test_masked_training_on_series_and_what_dates_tell(real_data, tmp_path, data):
    """With dates on other images the features are others, unless the positions know nothing of time."""
    folder, bands = real_data / "remote_sensing" / data, ["data.bands=[NDVI]"] if data == "eolearn_patch" else []
    small = ["width=24", "depth=1", "heads=2", "patch_size=16", "input_size=[4,32,32]", "position_widths={time: 12}"]
    decoder = ["width=24", "depth=1", "heads=2", "position_widths={time: 12}"]
    overrides = [
        *bands,
        *("data.size=32", "data.stride=96", "data.dates_per_sample=4"),
        *(f"model.{item}" for item in small),
        *(f"objective.decoder_{item}" for item in decoder),
        *("training.epochs=null", "training.steps=6", "training.batch_size=4", "training.workers=0"),
        *("optim.lr=1.0e-2", "optim.lr_scaling=none", "monitor.every=0", "training.device=cpu"),
    ]
    run = pretrain("remote_sensing", [folder], recipe="satmae-temporal", out=tmp_path / "run", overrides=overrides)
    losses = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["loss"]) for line in losses if "loss" in line)
    encoder = load_encoder(run.folder)
    assert encoder.backbone.config.time_encoding == "calendar"
    domain, index = open_index(
        load_domain("remote_sensing")(RemoteSensingOptions()), [run.folder / "index.parquet"], SkippedLog()
    )
    sample = domain.reader(index).read(index[0])
    values = torch.from_numpy(np.ascontiguousarray(sample.values[None], np.float32))
    valid = torch.from_numpy(sample.valid[None])
    days = torch.from_numpy(sample.coords["time"][None])
    order = torch.randperm(days.shape[1], generator=torch.Generator().manual_seed(0))
    told, other = (View(values, valid, coords={"time": dates}) for dates in (days, days[:, order]))
    assert (encoder.embed(told) - encoder.embed(other)).abs().max() > 1e-4
    blind = encoder.backbone.config.model_copy(
        update={"positions": "none", "position_widths": None, "time_encoding": "days"}
    )
    for config in (blind, blind.model_copy(update={"datewise": True})):
        timeless = Encoder(build_backbone(config, encoder.backbone.spec), encoder.spec, "mean", {})
        assert torch.equal(timeless.embed(told), timeless.embed(other))
