"""Spatial blocks: windows of different blocks share no pixel and are a margin apart, whatever the coordinate system."""

import numpy as np
import pyproj
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.transform import from_origin

from fmsuite.cli import main
from fmsuite.core.data.index import SampleIndex
from fmsuite.domains.remote_sensing.blocks import BlockGrid, BlockOptions, refuse_narrow_blocks
from fmsuite.domains.remote_sensing.ground import Frame
from fmsuite.errors import UsageError

UTM = pyproj.CRS.from_epsg(32618).to_wkt()
DEGREES = pyproj.CRS.from_epsg(4326).to_wkt()
FEET = pyproj.CRS.from_epsg(2263).to_wkt()


def _frame(crs, x, y, step, size=200):
    return Frame(size, size, crs, (step, 0.0, x, 0.0, -step, y))


def _rectangles(frame, corners, extent):
    """(N, 4) west, south, east, north of windows of a raster that is not rotated."""
    low = frame.coordinates(corners + np.array([extent[0], 0]))
    high = frame.coordinates(corners + np.array([0, extent[1]]))
    return np.concatenate([low, high], axis=1)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    block=st.floats(300, 3000),
    margin=st.floats(0, 60),
    crs=st.sampled_from([(UTM, 350_000.0, 3_840_000.0, 10.0), (FEET, 980_000.0, 200_000.0, 30.0)]),
)
def test_windows_of_different_blocks_are_two_margins_apart(seed, block, margin, crs):
    system, x, y, step = crs
    rng = np.random.default_rng(seed)
    frame = _frame(system, x, y, step)
    corners = rng.integers(0, 190, (60, 2)).astype(float)
    extent = (8.0, 8.0)
    options = BlockOptions(block=block, block_margin=margin)
    groups = BlockGrid.of({"a": frame}, options).groups(frame, corners, extent)
    unit = pyproj.CRS.from_wkt(system).axis_info[0].unit_conversion_factor
    boxes = _rectangles(frame, corners, extent) * unit
    for a in range(60):
        for b in range(a):
            if None in (groups[a], groups[b]) or groups[a] == groups[b]:
                continue
            gap = np.maximum(boxes[a, :2] - boxes[b, 2:], boxes[b, :2] - boxes[a, 2:]).max()
            assert gap >= 2 * margin - 0.01
    # What is left out is left out for a reason: it reaches to within the margin of a multiple of the side.
    for box, group in zip(boxes, groups, strict=True):
        crossing = np.floor((box[2:] + margin) / block) != np.floor((box[:2] - margin) / block)
        near = np.abs((np.stack([box[2:] + margin, box[:2] - margin]) / block + 0.5) % 1 - 0.5).min() < 1e-5
        assert near or (group is None) == crossing.any()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), latitude=st.floats(-75, 75), longitude=st.floats(-179, 178))
def test_blocks_of_degrees_measure_metres_on_the_ellipsoid(seed, latitude, longitude):
    rng = np.random.default_rng(seed)
    frame = _frame(DEGREES, longitude, latitude, 1e-4)
    corners = rng.integers(0, 196, (80, 2)).astype(float)
    margin = 20.0
    groups = BlockGrid.of({"a": frame}, BlockOptions(block=700, block_margin=margin)).groups(frame, corners, (4.0, 4.0))
    boxes = _rectangles(frame, corners, (4.0, 4.0))
    ellipsoid = pyproj.Geod(ellps="WGS84")
    members = {}
    for group, box in zip(groups, boxes, strict=True):
        if group is not None:
            members.setdefault(group, []).append(box)
    assert len(members) >= 2
    union = {group: np.concatenate([np.min(found, 0)[:2], np.max(found, 0)[2:]]) for group, found in members.items()}
    for group, (west, south, east, north) in union.items():
        _, _, across = ellipsoid.inv(west, (south + north) / 2, east, (south + north) / 2)
        _, _, along = ellipsoid.inv(west, south, west, north)
        assert max(across, along) < 700 * 1.02, group
    names = list(union)
    for a in range(len(names)):
        for b in range(a):
            first, second = union[names[a]], union[names[b]]
            gap = np.maximum(first[:2] - second[2:], second[:2] - first[2:])
            metres = gap * [111_320 * np.cos(np.radians(latitude)), 110_574]
            assert metres.max() >= 1.9 * margin


def test_dates_and_neighbours_of_one_place_share_blocks():
    first = _frame(UTM, 350_000.0, 3_840_000.0, 10.0)
    second = _frame(UTM, 350_400.0, 3_839_500.0, 20.0)
    grid = BlockGrid.of({"a": first, "b": second}, BlockOptions(block=500))
    # Both windows show 350,400 to 350,480 east and 3,839,420 to 3,839,500 north.
    mine = grid.groups(first, np.array([[50.0, 40.0]]), (8.0, 8.0))
    theirs = grid.groups(second, np.array([[0.0, 0.0]]), (4.0, 4.0))
    assert mine == theirs == ["EPSG-32618/r7678c700"]


def test_rasters_of_several_systems_share_blocks_of_longitude_and_latitude():
    x, y = pyproj.Transformer.from_crs(4326, 32618, always_xy=True).transform(-76.5, 34.6)
    metric = _frame(UTM, x - 1000, y + 1000, 10.0)
    angular = _frame(DEGREES, -76.51, 34.61, 1e-4)
    grid = BlockGrid.of({"a": metric, "b": angular}, BlockOptions(block=5000))
    assert grid.degrees
    mine = grid.groups(metric, np.array([[98.0, 98.0]]), (4.0, 4.0))
    theirs = grid.groups(angular, np.array([[98.0, 98.0]]), (4.0, 4.0))
    assert mine == theirs
    assert mine[0].startswith("EPSG-4326/")
    # A turn further is the same ground.
    further = _frame(DEGREES, -76.51 + 360, 34.61, 1e-4)
    assert grid.groups(further, np.array([[98.0, 98.0]]), (4.0, 4.0)) == theirs


def test_a_block_that_is_smaller_than_a_window_is_refused():
    refuse_narrow_blocks((640, 640), BlockOptions(block=640))
    with pytest.raises(UsageError, match="640 m and a block within its margins 600 m"):
        refuse_narrow_blocks((640, 640), BlockOptions(block=700, block_margin=50))
    with pytest.raises(ValueError, match="leaves nothing"):
        BlockOptions(block=100, block_margin=50)
    with pytest.raises(ValueError, match="only with block"):
        BlockOptions(block_margin=50)


def test_a_system_without_a_planet_is_refused():
    local = 'LOCAL_CS["bench",UNIT["metre",1],AXIS["x",EAST],AXIS["y",NORTH]]'
    with pytest.raises(UsageError, match="no place on a planet"):
        BlockGrid.of({"a": _frame(local, 0.0, 0.0, 1.0)}, BlockOptions(block=100))


@pytest.fixture
def scenes(tmp_path, write_raster, noise):
    """Two dates of one place and a neighbour that overlaps them by half."""
    write_raster("scenes/a_20240101.tif", noise(1, 96, 96))
    write_raster("scenes/a_20240601.tif", noise(1, 96, 96, seed=1))
    write_raster("scenes/b_20240101.tif", noise(1, 96, 96, seed=2), transform=from_origin(500_480, 5_300_000, 10, 10))
    return tmp_path / "scenes"


def test_groups_of_an_index_are_blocks(scenes, make_index):
    _, index, skipped = make_index(scenes, size=16, stride=4, block=400)
    windows = [index[row] for row in range(len(index))]
    assert not len(skipped)
    west = {"a": 500_000, "b": 500_480}
    for window in windows:
        x = west[window.source.rpartition("/")[2][0]] + 10 * window.position[1]
        y = 5_300_000 - 10 * (window.position[0] + 16)
        assert window.group == f"EPSG-32632/r{int(y // 400)}c{int(x // 400)}"
    # 21 x 21 windows a raster; along an axis of 960 m as many lie within blocks as a loop finds.
    inside = {
        name: sum((start + 40 * k) // 400 == (start + 40 * k + 159) // 400 for k in range(21))
        for name, start in west.items()
    }
    down = sum((5_300_000 - 40 * k - 160) // 400 == (5_300_000 - 40 * k - 1) // 400 for k in range(21))
    kept = down * (2 * inside["a"] + inside["b"])
    assert len(index) == kept
    assert index.metadata["blocks"] == {"metres": 400, "margin": 0, "left_out": 3 * 441 - kept}
    (note,) = index.metadata["notes"]
    assert note == f"Groups are squares of 400 m of the ground; left out: {3 * 441 - kept} windows across a border."


def test_what_blocks_leave_out_is_said_by_tile(scenes, tmp_path, monkeypatch, capsys):
    points = tmp_path / "points.csv"
    lines = [f"{500_060 + 50 * n},{5_299_900 - 40 * n},EPSG:32632,{'ab'[n % 2]}" for n in range(16)]
    points.write_text("\n".join(["x,y,crs,label", *lines]))
    out = tmp_path / "index.parquet"
    command = ["tile", str(scenes), "--domain", "remote_sensing", "--out", str(out), "--set", "data.size=8"]
    monkeypatch.setattr("sys.argv", ["fmsuite", *command, "--set", "data.block=320", "--set", f"data.places={points}"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    index = SampleIndex.read(out)
    said = " ".join(capsys.readouterr().out.split())
    assert len(index.metadata["notes"]) == 2
    for note in index.metadata["notes"]:
        assert note in said
    assert f"left out: {index.metadata['blocks']['left_out']} windows" in said


def test_a_block_on_two_sides_is_refused_and_so_are_other_groups(scenes, make_index):
    table = scenes / "labels.csv"
    table.write_text("path,split\na_20240101.tif,train\na_20240601.tif,test\nb_20240101.tif,test\n")
    with pytest.raises(UsageError, match="blocks of the ground: on several sides"):
        make_index(scenes, size=16, block=400)
    table.write_text("path,group\na_20240101.tif,g\n")
    with pytest.raises(UsageError, match="labels file gives groups too, such as 'g'"):
        make_index(scenes, size=16, block=400)
    with pytest.raises(UsageError, match="a window measures 160 m"):
        make_index(scenes, size=16, block=100, labels="none")


def test_blocks_group_points_and_refuse_polygons(scenes, tmp_path, make_index):
    points = tmp_path / "points.csv"
    lines = [f"{500_100 + 100 * n},{5_299_850 - 60 * n},EPSG:32632,a" for n in range(8)]
    points.write_text("\n".join(["x,y,crs,label", *lines]))
    _, index, _ = make_index(scenes, size=8, block=320, places=points)
    blocks = index.metadata["blocks"]["left_out"]
    assert blocks > 0
    assert blocks + len(index) == 2 * 8 + sum(500_100 + 100 * n >= 500_480 for n in range(8))
    assert {group[:11] for group in index.groups} == {"EPSG-32632/"}
    points.write_text("\n".join(["x,y,crs,group", *lines]))
    with pytest.raises(UsageError, match=r"points.csv gives groups too"):
        make_index(scenes, size=8, block=320, places=points)


def test_a_scene_in_which_no_window_fits_a_block_is_told(tmp_path, write_raster, noise, make_index):
    write_raster("a.tif", noise(1, 32, 32))
    write_raster("b.tif", noise(1, 32, 32), transform=from_origin(500_200, 5_300_000, 10, 10))
    _, index, skipped = make_index(tmp_path, size=32, block=330)
    assert len(index) + sum("across a border of blocks" in entry.reason for entry in skipped.entries) == 2
    assert len(skipped) >= 1


def test_web_mercator_is_measured_in_degrees(tmp_path, write_raster, noise, make_index):
    write_raster("a.tif", noise(1, 64, 64), crs="EPSG:3857", transform=from_origin(1_000_000, 8_400_000, 20, 20))
    _, index, _ = make_index(tmp_path, size=8, stride=4, block=200)
    assert all(group.startswith("EPSG-4326/") for group in index.groups)
    # At 60 degrees north 20 m of the projection are 10 on the ground: a block is 20 pixels, and 64 of them hold 3 to 5.
    assert 9 <= len(index.groups) <= 25
