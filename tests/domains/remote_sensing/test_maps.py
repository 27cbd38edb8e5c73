"""Label maps beside rasters: rasters of any pixel size, polygons in any coordinate system, and what is no label."""

from __future__ import annotations

import json

import numpy as np
import pytest
import rasterio
import shapely
from pydantic import ValidationError
from pyogrio.raw import write as write_vectors
from rasterio.transform import Affine, from_origin
from rasterio.warp import transform_geom

from fmsuite.core.data.skipped import SkippedLog
from fmsuite.domains.remote_sensing import RemoteSensingDomain
from fmsuite.domains.remote_sensing.options import RemoteSensingOptions
from fmsuite.errors import UsageError
from fmsuite.tiling.tasks import SourceFacts

UTM = from_origin(500_000, 5_300_000, 10, 10)
TURNED = Affine.translation(500_000, 5_300_000) * Affine.rotation(30) * Affine.scale(10, -10)


@pytest.fixture
def scene(write_raster, noise):
    """A raster whose upper rows have no data, and labels on its grid with every kind of gap."""
    values = noise(2, 60, 70)
    values[:, :4] = 0
    labels = np.random.default_rng(1).integers(-1, 4, (60, 70)).astype(np.int16)
    return write_raster("images/chip.tif", values, nodata=0), labels


def test_labels_follow_windows_and_scenes(scene, write_raster, make_index):
    """As they lie on the raster, with -1 for what is ignored, declared as nodata, or has no data in the raster."""
    image, labels = scene
    write_raster("labels/chip.tif", labels[None], nodata=3)
    folder = str(image.parent.parent / "labels")
    domain, index, skipped = make_index(image.parent, size=16, min_valid=0, maps={"m": folder}, map_ignore={"m": [2]})
    assert not skipped.entries
    expected = np.where((labels >= 2) | (np.arange(60) < 4)[:, None], -1, labels)
    reader, whole = domain.reader(index), domain.scene(index, str(image))
    for row in range(len(index)):
        top, left = (int(place) for place in index[row].position)
        found = reader.read(index[row]).maps["m"]
        assert found.dtype == np.int16
        np.testing.assert_array_equal(found, expected[top : top + 16, left : left + 16])
    np.testing.assert_array_equal(whole.native_map("m"), expected)
    np.testing.assert_array_equal(whole.native_map_part("m", (3, 60), (20, 10)), expected[3:23, 60:])
    np.testing.assert_array_equal(whole.read((1, 2), (30, 40)).maps["m"], expected[1:31, 2:42])
    with pytest.raises(UsageError, match=r"no label map 'other'; data\.maps names m"):
        whole.native_map("other")


@pytest.mark.parametrize("gsd", [None, 20.0, 6.0])
@pytest.mark.parametrize("pixel", [10.0, 25.0, 4.0])
def test_a_map_of_other_pixels_gives_the_label_under_each_samples_middle(
    scene, write_raster, make_index, gsd, pixel, tmp_path
):
    image, _ = scene
    count = int(1000 // pixel)
    fine = np.random.default_rng(2).integers(0, 5, (1, count, count)).astype(np.uint8)
    # It begins elsewhere and ends inside of the raster.
    path = write_raster("labels/chip.tif", fine, transform=from_origin(500_103, 5_300_050, pixel, pixel))
    template = str(tmp_path / "labels" / "{stem}.tif")
    domain, index, _ = make_index(image.parent, size=16, gsd=gsd, min_valid=0, maps={"m": template})
    sample = domain.reader(index).read(index[len(index) - 1])
    step = np.array(index[len(index) - 1].extent) / 16
    y, x = (p + (np.arange(16) + 0.5) * s for p, s in zip(index[len(index) - 1].position, step, strict=True))
    with rasterio.open(path) as dataset:
        rows, columns = np.meshgrid(y, x, indexing="ij")
        places = zip((500_000 + columns * 10).ravel(), (5_300_000 - rows * 10).ravel(), strict=True)
        expected = np.array([v[0] for v in dataset.sample(places, masked=True)])
        box = dataset.bounds
    px, py = 500_000 + columns * 10, 5_300_000 - rows * 10
    inside = (px >= box.left) & (px < box.right) & (py > box.bottom) & (py <= box.top)
    expected = np.where(inside, expected.reshape(16, 16), -1)
    seen = sample.valid.any(0)
    assert inside.any()
    np.testing.assert_array_equal(sample.maps["m"][seen], expected[seen])
    assert (sample.maps["m"][~seen] == -1).all()


@pytest.mark.parametrize("transform", [UTM, TURNED])
@pytest.mark.parametrize("gsd", [None, 15.0])
def test_polygons_in_other_coordinates_label_the_samples_whose_middles_they_hold(
    write_raster, make_index, noise, tmp_path, transform, gsd
):
    """Against shapely's own point in polygon, in the raster's coordinates."""
    image = write_raster("images/a.tif", noise(1, 64, 64), transform=transform)

    def place(column, row):
        return transform.a * column + transform.b * row + transform.c, (
            transform.d * column + transform.e * row + transform.f
        )

    rings = [
        [(5, 5), (40, 9), (30, 41), (8, 30)],
        [(33, 35), (60, 33), (61, 62), (20, 50)],
        [(70, 5), (75, 5), (75, 9)],
    ]
    polygons = [shapely.Polygon([place(*corner) for corner in ring]) for ring in rings]
    features = [
        {
            "type": "Feature",
            "properties": {"cover": cover, "code": code},
            "geometry": transform_geom("EPSG:32632", "EPSG:4326", shapely.geometry.mapping(polygon), precision=12),
        }
        for polygon, cover, code in zip(polygons, ("water", "forest", "water"), (7, 2, 2), strict=True)
    ]
    (tmp_path / "cover.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    options = {"size": 16, "gsd": gsd, "maps": {"m": str(tmp_path / "cover.geojson")}}
    domain, index, _ = make_index(image.parent, **options, map_column={"m": "cover"})
    assert index.metadata["map_classes"] == {"m": ["forest", "water"]}
    numbers, numbered, _ = make_index(image.parent, **options, map_column={"m": "code"}, map_ignore={"m": [7]})
    for row in range(len(index)):
        window = index[row]
        step = np.array(window.extent) / 16
        y, x = (p + (np.arange(16) + 0.5) * s for p, s in zip(window.position, step, strict=True))
        rows, columns = np.meshgrid(y, x, indexing="ij")
        points = shapely.points(*place(columns, rows))
        expected = np.full((16, 16), -1)
        for polygon, code in zip(polygons, (1, 0, 1), strict=True):
            expected[shapely.contains(polygon, points)] = code
        # Where a middle lies on a border, to a millionth of a pixel, either is right.
        near = np.min([shapely.distance(polygon.boundary, points) for polygon in polygons], axis=0) < 1e-5
        found = domain.reader(index).read(window).maps["m"]
        np.testing.assert_array_equal(found[~near], expected[~near])
        codes = numbers.reader(numbered).read(numbered[row]).maps["m"]
        np.testing.assert_array_equal(codes[~near], np.where(expected == 0, 2, -1)[~near])


def test_a_shapefile_and_named_classes(write_raster, make_index, noise, tmp_path):
    image = write_raster("images/a.tif", noise(1, 32, 32))
    shapes = [shapely.box(500_000, 5_299_840, 500_160, 5_300_000), shapely.box(500_160, 5_299_680, 500_320, 5_299_840)]
    write_vectors(
        tmp_path / "a.shp",
        geometry=np.array([shapely.to_wkb(shape) for shape in shapes]),
        field_data=[np.array(["ice", "land"], dtype=object)],
        fields=["kind"],
        crs="EPSG:32632",
        geometry_type="Polygon",
    )
    maps = {"maps": {"m": str(tmp_path / "{stem}.shp")}, "map_column": {"m": "kind"}}
    domain, index, _ = make_index(image.parent, size=32, **maps, map_classes={"m": ("sea", "land", "ice")})
    found = domain.reader(index).read(index[0]).maps["m"]
    expected = np.full((32, 32), -1)
    expected[:16, :16], expected[16:, 16:] = 2, 1
    np.testing.assert_array_equal(found, expected)
    _, _, skipped = made(image, size=32, **maps)
    assert "every raster has polygons of its own. Say with data.map_classes" in skipped.entries[0].reason
    _, _, skipped = made(image, size=32, **maps, map_classes={"m": ("ice",)})
    assert "'kind' has 'land', which data.map_classes does not name" in skipped.entries[0].reason


def made(image, **options):
    domain = RemoteSensingDomain(RemoteSensingOptions(**options))
    skipped = SkippedLog()
    (task,) = domain.find_sources([image], skipped).tasks
    found = domain.index_source(task)
    (task,) = domain.settle_sources([SourceFacts(task, found.facts)], skipped)
    rows = domain.index_source(task)
    skipped.entries.extend(rows.notes)
    return domain, rows, skipped


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"crs": "EPSG:4326", "transform": from_origin(9, 48, 1e-4, 1e-4)}, "in another coordinate system (EPSG:4326)"),
        ({"transform": from_origin(600_000, 5_300_000, 10, 10)}, "it lies outside of the raster"),
        ({"values": np.full((1, 60, 70), 0.5, np.float32)}, "numbers that are not whole"),
        ({"values": np.full((1, 60, 70), 1e6, np.float32)}, "labels from 1000000"),
        ({"name": "labels/other.tif"}, "there is no such file"),
    ],
)
def test_a_map_that_does_not_fit_is_a_skipped_raster(scene, write_raster, change, said):
    image, labels = scene
    write_raster(**{"name": "labels/chip.tif", "values": labels[None], **change})
    _, rows, skipped = made(image, size=16, maps={"m": str(image.parent.parent / "labels")})
    assert rows.rows is not None
    assert not len(rows.rows.positions)
    assert skipped.entries[0].path == str(image)
    assert skipped.entries[0].stage == "maps"
    assert said in skipped.entries[0].reason


def test_options_that_cannot_be_are_refused(scene, tmp_path):
    image, _ = scene
    for options, said in (
        ({"maps": {"m": "{what}"}}, "must be a folder, or a path with some of {name}, {stem}, {folder}, {place}"),
        ({"map_column": {"m": "a"}}, "map_column names 'm', which is none of maps"),
        ({"maps": {"m": "x"}, "map_classes": {"m": ("a",)}}, r"map_classes.m needs map_column.m"),
    ):
        with pytest.raises(ValidationError) as raised:
            RemoteSensingOptions(**options)
        assert said in str(raised.value)
    with pytest.raises(UsageError, match=r"data\.maps\.m: there is no"):
        RemoteSensingDomain(RemoteSensingOptions(maps={"m": str(tmp_path / "none")})).find_sources(
            [image], SkippedLog()
        )


def test_the_place_is_what_is_left_without_the_layer(write_raster, make_index, noise, tmp_path):
    """As the chips of Sen1Floods11 are named."""
    write_raster("S2/Spain_7_S2Hand.tif", noise(1, 32, 32))
    write_raster("S1/Spain_7_S1Hand.tif", noise(1, 32, 32, seed=1))
    write_raster("Labels/Spain_7_LabelHand.tif", np.ones((1, 32, 32), np.int16))
    layers = [{"pattern": "_S2Hand", "name": "optical"}, {"pattern": "_S1Hand", "name": "radar"}]
    maps = {"water": str(tmp_path / "Labels" / "{place}_LabelHand.tif")}
    domain, index, skipped = make_index(tmp_path / "S2", tmp_path / "S1", size=32, layers=layers, maps=maps)
    assert not skipped.entries
    sample = domain.reader(index).read(index[0])
    assert sample.values.shape == (2, 32, 32)
    assert (sample.maps["water"] == 1).all()
