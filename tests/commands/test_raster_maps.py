"""Maps of whole rasters from the command line: where they lie, what they say where there is no data, and what is left
of a damaged raster."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from rasterio.transform import from_origin

from fmsuite.commands.feature_pictures import Colours
from fmsuite.commands.indexing import build_index
from fmsuite.core.adaptation.network_files import save_network
from fmsuite.core.adaptation.task import Segmentation, SegmentationConfig
from fmsuite.core.backbones.build import build_backbone
from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.class_colours import class_colours
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.reports.class_maps import read_maps
from fmsuite.domains.remote_sensing import RemoteSensingDomain
from fmsuite.domains.remote_sensing.options import RemoteSensingOptions

TRANSFORM = from_origin(500_000, 5_300_000, 10, 10)
BORDER = 9
BLOCK = (slice(48, 64), slice(32, 48))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raster with a border of nodata and a damaged block, a sound one, and networks with random weights."""
    folder = tmp_path_factory.mktemp("maps")
    values = np.random.default_rng(0).integers(1, 200, (2, 112, 80)).astype(np.uint8)
    values[:, :BORDER] = 0
    (folder / "images").mkdir()
    profile = {"driver": "GTiff", "dtype": "uint8", "count": 2, "height": 112, "width": 80, "crs": "EPSG:32632"}
    tiles = {"tiled": True, "blockxsize": 16, "blockysize": 16, "compress": "deflate", "interleave": "pixel"}
    for name in ("damaged", "sound"):
        with rasterio.open(
            folder / "images" / f"{name}.tif", "w", nodata=0, transform=TRANSFORM, **profile, **tiles
        ) as file:
            file.write(values)
    with rasterio.open(folder / "images" / "damaged.tif") as file:
        offset = int(file.get_tag_item("BLOCK_OFFSET_2_3", "TIFF", bidx=1))
        size = int(file.get_tag_item("BLOCK_SIZE_2_3", "TIFF", bidx=1))
    with (folder / "images" / "damaged.tif").open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * size)
    for name, gsd in (("native", None), ("coarse", 25.0)):
        options = RemoteSensingOptions(size=16, gsd=gsd, min_valid=0)
        domain = RemoteSensingDomain(options)
        index = build_index(domain, [folder / "images" / "sound.tif"], SkippedLog())
        spec = domain.input_spec(index)
        torch.manual_seed(0)
        task = Segmentation(
            SegmentationConfig(classes=3, label_map="m", decoder="linear"),
            build_backbone(ModelConfig(width=24, depth=1, heads=1, patch_size=4, positions="sincos"), spec),
        ).eval()
        data = options.model_dump(mode="json")
        save_network(folder / name, task, spec, ("land", "water", "ice"), "remote_sensing", data, {})
    return folder


@pytest.mark.parametrize("network", ["native", "coarse"])
def test_a_map_lies_over_its_raster_and_says_nothing_where_there_is_nothing(fmsuite, made, tmp_path, network) -> None:
    ran = fmsuite("predict", made / "images", "--model", made / network, "--out", tmp_path, "--probabilities")
    assert ran.code == 3, ran.text
    valid = {}
    for name in ("damaged", "sound"):
        with (
            rasterio.open(tmp_path / f"{name}.tif") as classes,
            rasterio.open(tmp_path / f"{name}-probabilities.tif") as scores,
        ):
            for file in (classes, scores):
                assert file.crs == "EPSG:32632"
                assert file.transform == TRANSFORM
                assert file.shape == (112, 80)
                assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
            assert classes.tags()["CLASS_1"] == "water"
            assert scores.descriptions == ("land", "water", "ice")
            labels, said = classes.read(1), scores.read()
        valid[name] = labels != 255
        np.testing.assert_array_equal(np.isnan(said).all(0), ~valid[name])
        np.testing.assert_allclose(said[:, valid[name]].sum(0), 1, atol=1e-5)
        np.testing.assert_array_equal(said[:, valid[name]].argmax(0), labels[valid[name]])
        assert not valid[name][:BORDER].any()
    assert not valid["damaged"][BLOCK].any()
    if network == "native":
        assert valid["sound"][BORDER:].all()
        # Squares of 32 around the block, and no more.
        assert valid["damaged"][BORDER:32].all()
        assert valid["damaged"][64:].all()
        assert valid["damaged"][BORDER:, 64:].all()
    else:
        # A sample that mixes pixels without data has none.
        assert valid["sound"][BORDER + 6 :].all()
    with (tmp_path / "skipped.csv").open(newline="") as file:
        lines = [line for line in csv.DictReader(file) if "squares of 32" in line["reason"]]
    assert [Path(line["path"]).name for line in lines] == ["damaged.tif"]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [
        ".csv",
        ".html",
        ".json",
        *[".png"] * 2,
        *[".tif"] * 4,
    ]


def test_maps_do_not_take_the_names_of_rasters(fmsuite, made) -> None:
    ran = fmsuite("predict", made / "images", "--model", made / "native", "--out", made / "images")
    assert ran.code == 2
    assert "maps would take the names of the files here" in ran.text


def test_features_as_colours_lie_over_the_raster_one_pixel_a_patch(fmsuite, made, tmp_path) -> None:
    reading = ("--domain", "remote_sensing", "--set", "data.size=16", "--set", "data.min_valid=0")
    ran = fmsuite("map", made / "images" / "sound.tif", "--encoder", made / "native", "--out", tmp_path, *reading)
    assert ran.code == 0, ran.text
    with rasterio.open(tmp_path / "sound-features.tif") as file:
        assert file.crs == "EPSG:32632"
        assert file.transform == from_origin(500_000, 5_300_000, 40, 40)
        assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert (file.count, file.shape, file.nodata) == (3, (28, 20), 0)
        colours = file.read()
    # Of the border of 9 rows, two rows of patches have no data, and a third has some.
    assert (colours[:, :2] == 0).all()
    assert (colours[:, 3:] > 0).all()
    assert all(len(np.unique(band)) > 50 for band in colours)


def test_colours_are_principal_components() -> None:
    """NumPy's singular value decomposition, whatever its signs."""
    stream = np.random.default_rng(0)
    features = (stream.normal(size=(500, 8)) * [9, 1, 5, 1, 3, 1, 1, 1] + 7) @ np.linalg.qr(stream.normal(size=(8, 8)))[
        0
    ]
    colours = Colours.of(torch.from_numpy(features))
    _, values, rows = np.linalg.svd(features - features.mean(0), full_matrices=False)
    found = colours.components.numpy()
    np.testing.assert_allclose(np.abs(np.sum(found * rows[:3].T, axis=0)), 1, atol=1e-5)
    np.testing.assert_allclose(colours.shares, (values**2 / (values**2).sum())[:3], rtol=1e-5)
    drawn = colours.drawn((torch.from_numpy(features).float() @ colours.components).T)
    np.testing.assert_allclose([(drawn <= 1).mean(), (drawn >= 255).mean()], 0.02, atol=0.005)


def test_maps_are_pictures_on_a_page_with_the_share_of_each_class(fmsuite, made, tmp_path) -> None:
    ran = fmsuite("predict", made / "images", "--model", made / "native", "--out", tmp_path / "maps")
    assert ran.code == 3, ran.text
    found = read_maps(tmp_path / "maps").found
    assert [Path(one.source).name for one in found.maps] == ["damaged.tif", "sound.tif"]
    for one in found.maps:
        with rasterio.open(tmp_path / "maps" / one.file) as file:
            labels = file.read(1)
        known = labels != 255
        assert one.known == pytest.approx(known.mean())
        np.testing.assert_allclose(one.shares, [(labels[known] == label).mean() for label in range(3)])
        with Image.open(tmp_path / "maps" / one.picture) as picture:
            drawn = np.asarray(picture)[:, -80:]
        colours = np.array([*class_colours(3), (255, 255, 255)])
        np.testing.assert_array_equal(drawn, colours[np.where(known, labels, 3)])
    page = (tmp_path / "maps" / "report.html").read_text()
    assert "2 maps of 3 classes" in page
    assert page.count("data:image/png") == 2
    assert page.count('<svg class="swatch"') == 3
    assert "damaged.tif" in page
    (tmp_path / "maps" / "sound.png").unlink()
    ran = fmsuite("report", tmp_path / "maps", "--out", tmp_path / "again.html")
    assert ran.code == 0, ran.text
    assert "sound.png is missing" in (tmp_path / "again.html").read_text()


def test_similarity_to_a_pixel_lies_over_the_raster(fmsuite, made, tmp_path) -> None:
    file = made / "images" / "sound.tif"
    shared = ("similar", file, "--encoder", made / "native", "--domain", "remote_sensing", "--set", "data.size=16",
              "--set", "data.min_valid=0")  # fmt: skip
    ran = fmsuite(*shared, "--at", "70,30", "--out", tmp_path / "pixel.tif")
    assert ran.code == 0, ran.text
    ran = fmsuite(*shared, "--at", "500705,5299695", "--world", "--out", tmp_path / "world")
    assert ran.code == 0, ran.text
    with rasterio.open(tmp_path / "pixel.tif") as pixel, rasterio.open(tmp_path / "world.tif") as world:
        assert pixel.transform == TRANSFORM
        scores = pixel.read(1)
        np.testing.assert_array_equal(scores, world.read(1))
    assert scores[30, 70] >= np.nanquantile(scores, 0.97)
    ran = fmsuite(*shared, "--at", "80,30", "--out", tmp_path / "b")
    assert ran.code == 2
    assert "samples go from 0 to 79, 0 to 111" in ran.text
