"""Labelled places from files: formats, coordinate systems, columns, and what is wrong with them."""

import json
from collections import Counter

import numpy as np
import pyogrio
import pyproj
import pytest
import shapely
from rasterio.transform import from_origin

from fmsuite.errors import UsageError

WEST, NORTH = 500_000, 5_300_000
"""Corner of the rasters of ``write_raster``: EPSG:32632, 10 m."""


def _square(column, row, side):
    """In EPSG:32632, by pixels of the raster."""
    return shapely.box(WEST + 10 * column, NORTH - 10 * (row + side), WEST + 10 * (column + side), NORTH - 10 * row)


def _write(path, shapes, crs, fields=None, **given):
    fields = fields or {}
    data = [np.array(values, dtype=object) for values in fields.values()]
    kind = {"Polygon": "Polygon", "Point": "Point"}.get(shapes[0].geom_type, "Unknown")
    wkb = np.array([None if shape is None else shapely.to_wkb(shape) for shape in shapes], dtype=object)
    pyogrio.raw.write(path, wkb, data, list(fields), geometry_type=given.pop("geometry_type", kind), crs=crs, **given)
    return path


def _turned(shapes, crs):
    there = pyproj.Transformer.from_crs(32632, crs, always_xy=True)
    return [shapely.transform(s, lambda p: np.stack(there.transform(p[:, 0], p[:, 1]), 1)) for s in shapes]


@pytest.fixture
def raster(write_raster, noise):
    return write_raster("scene.tif", noise(2, 64, 96))


SQUARES = [_square(0, 0, 32), _square(64, 0, 16), _square(40, 40, 4)]
CORNERS = {"a": {(0, 0), (0, 16), (16, 0), (16, 16)}, "b": {(0, 64)}, "c": {(34, 34)}}


@pytest.mark.parametrize(
    ("name", "crs"),
    [("p.shp", "EPSG:32632"), ("p.shp", "EPSG:3035"), ("p.geojson", "EPSG:4326"), ("p.gpkg", "EPSG:4258")],
)
def test_every_format_and_coordinate_system_gives_the_same_windows(tmp_path, raster, make_index, name, crs):
    file = _write(tmp_path / name, _turned(SQUARES, crs), crs, {"label": ["a", "b", "c"]})
    _, index, skipped = make_index(raster, size=16, places=file, place_overlap=0.99)
    found = {}
    for row in range(len(index)):
        window = index[row]
        found.setdefault(window.label, set()).add(window.position)
        assert window.group == f"p/{'abc'.index(window.label)}"
    assert found == CORNERS
    assert not len(skipped)


def test_columns_may_be_named_and_numbers_are_labels(tmp_path, raster, make_index):
    fields = {"code": np.array([2253, 2360, 2360]), "site": ["n", "n", "s"], "fold": ["train", "train", "test"]}
    file = _write(tmp_path / "p.gpkg", SQUARES, "EPSG:32632", fields)
    _, index, _ = make_index(raster, size=16, places=file, place_label="code", place_group="site")
    assert index.label_names == ["2253", "2360"]
    assert {(w.group, w.split) for w in map(index.__getitem__, range(len(index)))} == {("n", "train"), ("s", "test")}
    with pytest.raises(UsageError, match=r"no column 'klass' \(data.place_label\)") as error:
        make_index(raster, size=16, places=file, place_label="klass")
    assert all(name in str(error.value) for name in fields)
    together = _write(tmp_path / "q.gpkg", SQUARES, "EPSG:32632", {**fields, "group": ["one"] * 3})
    with pytest.raises(UsageError, match=r"several sides of the split: 'one'.*place_split=none"):
        make_index(raster, size=16, places=together)
    _, index, _ = make_index(raster, size=16, places=together, place_split="none")
    assert index.groups == ["one"]


def test_windows_of_two_sides_that_share_pixels_are_refused(tmp_path, raster, make_index):
    near = [_square(10, 10, 4), _square(20, 10, 4)]
    file = _write(tmp_path / "p.geojson", _turned(near, 4326), "EPSG:4326", {"split": ["train", "test"]})
    with pytest.raises(UsageError, match=r"places 0 \(train\) and 1 \(test\) share pixels"):
        make_index(raster, size=16, places=file)
    _, index, _ = make_index(raster, size=8, places=file)
    assert index.groups == ["p/0", "p/1"]


def test_points_of_a_table(tmp_path, raster, make_index):
    points = [(5.5, 30.5), (12.5, 30.5), (60.2, 30.5), (94.9, 63.9), (200, 30)]
    there = pyproj.Transformer.from_crs(32632, 4326, always_xy=True)
    lines = ["id,Latitude,Longitude,label"]
    for number, (column, row) in enumerate(points):
        longitude, latitude = there.transform(WEST + 10 * column, NORTH - 10 * row)
        lines.append(f"{number},{latitude:.9f},{longitude:.9f},{'ab'[number % 2]}")
    file = tmp_path / "points.csv"
    file.write_text("\n".join([*lines, "5,,8.0,a"]))
    _, index, skipped = make_index(raster, size=16, places=file)
    windows = [index[row] for row in range(len(index))]
    assert [w.position for w in windows] == [(22, 0), (22, 4), (22, 52), (48, 80)]
    assert "".join(w.label for w in windows) == "abab"
    # Points whose windows share pixels are one group.
    assert [w.group for w in windows] == ["points/0", "points/0", "points/2", "points/3"]
    assert sorted(entry.path.rpartition("#")[2] for entry in skipped.entries) == ["4", "5"]
    assert "outside of every raster" in skipped.entries[1].reason
    assert "no coordinates" in skipped.entries[0].reason


def test_a_table_may_have_coordinates_of_its_own_systems(tmp_path, raster, make_index):
    x, y = pyproj.Transformer.from_crs(32632, 3035, always_xy=True).transform(WEST + 605, NORTH - 305)
    file = tmp_path / "points.csv"
    file.write_text(f"x,y,crs,class\n{WEST + 305},{NORTH - 305},EPSG:32632,a\n{x},{y},EPSG:3035,b\n")
    _, index, _ = make_index(raster, size=16, places=file)
    assert [index[row].position for row in range(2)] == [(22, 22), (22, 52)]
    file.write_text(f"x,y,class\n{WEST + 305},{NORTH - 305},a\n")
    with pytest.raises(UsageError, match=r"does not say its coordinate system.*places_crs"):
        make_index(raster, size=16, places=file)
    _, index, _ = make_index(raster, size=16, places=file, places_crs="EPSG:32632")
    assert index[0].position == (22, 22)
    with pytest.raises(UsageError, match=r"EPSG:99999.*not known"):
        make_index(raster, size=16, places=file, places_crs="EPSG:99999")


def test_one_place_on_several_dates_is_one_group_in_a_series_too(tmp_path, write_raster, noise, make_index):
    for day in ("20240101", "20240201"):
        write_raster(f"scenes/site_{day}.tif", noise(1, 64, 96))
    file = _write(tmp_path / "p.gpkg", SQUARES, "EPSG:32632", {"label": list("abc")})
    _, index, _ = make_index(tmp_path / "scenes", size=16, places=file)
    assert Counter(index[row].group for row in range(len(index))) == {"p/0": 8, "p/1": 2, "p/2": 2}
    _, index, _ = make_index(tmp_path / "scenes", size=16, places=file, series=True)
    assert index[0].position == (0, 0, 0)
    assert index[0].extent == (2, 16, 16)
    assert len(index) == 6


def test_windows_are_resampled_around_places(tmp_path, raster, make_index):
    file = _write(tmp_path / "p.gpkg", [shapely.Point(WEST + 400, NORTH - 300)], "EPSG:32632", {"label": ["a"]})
    _, index, _ = make_index(raster, size=16, gsd=20.0, places=file)
    assert index[0].extent == (32, 32)
    assert index[0].position == pytest.approx((14, 24))


def test_windows_of_places_stay_inside_a_region(tmp_path, raster, make_index):
    file = _write(tmp_path / "p.gpkg", SQUARES, "EPSG:32632", {"label": list("abc")})
    _, index, skipped = make_index(raster, size=16, places=file, region=(3, 60, 51, 4), region_unit="pixel")
    found = {window.position: window.label for window in map(index.__getitem__, range(len(index)))}
    # A grid of 16 px from row 4, column 3; the square of 4 px at (40, 40) has its window moved in from column 34.
    assert found == {(4, 3): "a", (20, 3): "a", (4, 19): "a", (20, 19): "a", (34, 34): "c"}
    assert [entry.path.rpartition("#")[2] for entry in skipped.entries] == ["1"]


def test_nothing_is_lost_silently(tmp_path, write_raster, noise, make_index):
    values = noise(1, 64, 96)
    values[:, :, 48:] = 0
    raster = write_raster("scene.tif", values, nodata=0)
    bow = shapely.Polygon([(WEST, NORTH), (WEST + 320, NORTH - 320), (WEST + 320, NORTH), (WEST, NORTH - 320)])
    shapes = [
        shapely.Polygon(),
        shapely.LineString([(WEST, NORTH), (WEST + 100, NORTH)]),
        shapely.Polygon([(WEST, NORTH), (WEST + 10, NORTH), (WEST + 20, NORTH), (WEST, NORTH)]),
        shapely.box(WEST, NORTH - 640, WEST + 960, NORTH - 630),
        bow,
        shapely.Point(WEST + 900, NORTH - 300),
    ]
    file = _write(tmp_path / "p.gpkg", shapes, "EPSG:32632", {"label": list("abcdef")}, geometry_type="Unknown")
    _, index, skipped = make_index(raster, size=16, places=file)
    said = {entry.path.rpartition("#")[2]: entry.reason for entry in skipped.entries}
    assert "no coordinates" in said["0"]
    assert "LineString" in said["1"]
    assert "encloses nothing" in said["2"]
    assert "place_overlap" in said["3"]
    assert "1 of " in said[str(raster)]
    assert "min_valid" in said[str(raster)]
    # The outline crosses itself: what it encloses are two triangles, left and right.
    assert {index[row].label for row in range(len(index))} == {"e"}
    assert {index[row].position for row in range(len(index))} == {(0, 0), (0, 16), (16, 0), (16, 16)}


def test_many_places_outside_are_one_line(tmp_path, raster, make_index):
    shapes = [shapely.Point(WEST + 300, NORTH - 300), *(shapely.Point(WEST - 100 * n, NORTH) for n in range(1, 40))]
    _, index, skipped = make_index(raster, size=16, places=_write(tmp_path / "p.gpkg", shapes, "EPSG:32632"))
    assert len(index) == 1
    assert index[0].label is None
    (entry,) = skipped.entries
    assert entry.reason.startswith("39 places (1, 2, 3, 4, 5 and more): it lies outside")


def test_two_classes_of_equal_overlap_are_told(tmp_path, raster, make_index):
    left, right = _square(0, 0, 24), shapely.box(WEST + 240, NORTH - 240, WEST + 480, NORTH)
    file = _write(tmp_path / "p.gpkg", [left, right], "EPSG:32632", {"label": ["a", "b"]})
    _, index, skipped = make_index(raster, size=16, stride=16, places=file)
    middle = next(index[row] for row in range(len(index)) if index[row].position == (0, 16))
    assert middle.label == "a"
    assert "covers as much of a window as place 0, 'a'" in skipped.entries[0].reason


def test_files_that_cannot_be_used(tmp_path, raster, make_index):
    file = _write(tmp_path / "p.gpkg", SQUARES, "EPSG:32632", layer="fields")
    _write(file, SQUARES, "EPSG:32632", layer="roads", append=True)
    with pytest.raises(UsageError, match="layers fields, roads"):
        make_index(raster, size=16, places=file)
    assert len(make_index(raster, size=16, places=file, places_layer="roads")[1]) == 6
    with pytest.raises(UsageError, match="no layer 'road'"):
        make_index(raster, size=16, places=file, places_layer="road")
    with pytest.warns(UserWarning, match="'crs' was not provided"):
        bare = _write(tmp_path / "bare.shp", SQUARES, None)
    with pytest.raises(UsageError, match=r"coordinate system.*places_crs"):
        make_index(raster, size=16, places=bare)
    assert len(make_index(raster, size=16, places=bare, places_crs="EPSG:32632")[1]) == 6
    away = _write(tmp_path / "away.gpkg", [_square(1000, 1000, 8)], "EPSG:32632")
    with pytest.raises(UsageError, match="none of its 1 places lies inside"):
        make_index(raster, size=16, places=away)
    broken = tmp_path / "broken.geojson"
    broken.write_text("{")
    with pytest.raises(UsageError, match="cannot be read"):
        make_index(raster, size=16, places=broken)
    with pytest.raises(UsageError, match="no such file"):
        make_index(raster, size=16, places=tmp_path / "absent.shp")
    with pytest.raises(UsageError, match="read from"):
        make_index(raster, size=16, places=raster)
    table = tmp_path / "t.csv"
    for text, reason in (
        ("a,b\n1,2", "no columns of coordinates"),
        ("lon,lat\nx,2", "'x' in the column 'lon'"),
        ("", "no lines"),
    ):
        table.write_text(text)
        with pytest.raises(UsageError, match=reason):
            make_index(raster, size=16, places=table)


def test_options_that_contradict_are_refused():
    from fmsuite.domains.remote_sensing.options import RemoteSensingOptions

    for given, reason in (
        ({"place_label": "a"}, "place_label has a meaning only with places"),
        ({"places": "p.shp", "labels": "l.csv"}, "labels and places"),
        ({"places": "p.shp", "place_windows": "centre", "place_overlap": 0.7}, "middle pixel"),
    ):
        with pytest.raises(ValueError, match=reason):
            RemoteSensingOptions(**given)
    # An index holds its options, and is opened with them.
    options = RemoteSensingOptions(places="p.shp", place_windows="centre")
    assert RemoteSensingOptions.model_validate(json.loads(options.model_dump_json())) == options


def test_a_raster_without_a_place_on_earth_has_none(tmp_path, write_raster, noise, make_index):
    here = write_raster("in/here.tif", noise(1, 64, 96))
    write_raster("in/nowhere.tif", noise(1, 64, 96), crs=None)
    write_raster("in/other.tif", noise(1, 64, 96), transform=from_origin(WEST + 90_000, NORTH, 10, 10))
    file = _write(tmp_path / "p.gpkg", SQUARES, "EPSG:32632", {"label": list("abc")})
    _, index, skipped = make_index(tmp_path / "in", size=16, places=file)
    assert index.sources == [str(here)]
    said = {entry.path.rpartition("/")[2]: entry.reason for entry in skipped.entries}
    assert "no place on Earth" in said["nowhere.tif"]
    assert "none of the places" in said["other.tif"]
