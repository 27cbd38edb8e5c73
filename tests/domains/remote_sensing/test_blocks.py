"""Spatial blocks: windows of different blocks share no pixel and are a margin apart, whatever the coordinate system."""

import numpy as np
import pyproj
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
