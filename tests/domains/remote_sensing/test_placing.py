"""Places become windows: against shapely's areas window by window, and against patches cut by other code."""

import numpy as np
import pyproj
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from fmsuite.domains.remote_sensing.ground import Frame
from fmsuite.domains.remote_sensing.places import PlaceOptions
from fmsuite.domains.remote_sensing.placing import Claims, Cut, claim_windows
from fmsuite.tiling.grid import window_grid

CUT = Cut((70, 90), (16.0, 16.0), (8.0, 8.0))


def _options(**given):
    return PlaceOptions(places="places.geojson", **given)


def _shapes(*given):
    return np.array(given, dtype=object)


@st.composite
def _polygons(draw):
    points = draw(st.lists(st.tuples(st.floats(-20, 110), st.floats(-20, 90)), min_size=3, max_size=7))
    shape = shapely.make_valid(shapely.Polygon(points))
    areas = [part for part in shapely.get_parts(shape) if part.area > 0]
    return shapely.union_all(areas) if areas else shapely.box(3, 4, 40, 30)


@settings(max_examples=20, deadline=None)
@given(shape=_polygons(), overlap=st.sampled_from([0.1, 0.5, 0.9]), stride=st.sampled_from([5.0, 8.0, 16.0]))
def test_a_polygon_gives_the_windows_of_the_grid_that_it_covers(shape, overlap, stride):
    cut = Cut((70, 90), (16.0, 16.0), (stride, stride))
    claims, thin = claim_windows(_shapes(shape), cut, _options(place_overlap=overlap))
    left, top, right, bottom = shape.bounds
    if right - left <= 16 and bottom - top <= 16:
        assert len(claims.corners) <= 1
        return
    wanted = {}
    for y, x in window_grid(cut.shape, cut.extent, cut.stride, edges="shift"):
        share = shapely.Polygon([(x, y), (x + 16, y), (x + 16, y + 16), (x, y + 16)]).intersection(shape).area / 256
        wanted[y, x] = share
    found = {tuple(corner): share for corner, share in zip(claims.corners.tolist(), claims.shares, strict=True)}
    for corner, share in wanted.items():
        if abs(share - overlap) > 1e-6:
            assert (corner in found) == (share >= overlap)
        if corner in found:
            assert found[corner] == pytest.approx(share, abs=1e-9)
    assert set(found) <= set(wanted)
    assert bool(thin) == (not found and shape.intersection(shapely.box(0, 0, 90, 70)).area > 1e-9)


@settings(max_examples=20, deadline=None)
@given(shape=_polygons(), stride=st.sampled_from([1.0, 3.0]))
def test_windows_around_a_polygons_pixels(shape, stride):
    cut = Cut((70, 90), (8.0, 8.0), (stride, stride))
    claims, _ = claim_windows(_shapes(shape), cut, _options(place_windows="centre"))
    rows, columns = np.meshgrid(np.arange(0, 70, stride), np.arange(0, 90, stride), indexing="ij")
    within = shapely.within(shapely.points(columns + 0.5, rows + 0.5), shape)
    wanted = {
        (min(max(row - 4, 0), 62), min(max(column - 4, 0), 82))
        for row, column in zip(rows[within], columns[within], strict=True)
    }
    found = {tuple(corner) for corner in claims.corners.tolist()}
    if wanted:
        assert found == wanted
    else:
        assert len(found) <= 1


@settings(max_examples=20, deadline=None)
@given(y=st.floats(-5, 75), x=st.floats(-5, 95), size=st.integers(1, 80))
def test_a_point_is_in_the_middle_of_its_window_unless_that_would_leave_the_raster(y, x, size):
    cut = Cut((70, 90), (float(size), float(size)), (1.0, 1.0))
    claims, _ = claim_windows(_shapes(shapely.Point(x, y)), cut, _options())
    if not (0 <= y < 70 and 0 <= x < 90):
        assert not len(claims.corners)
        return
    ((top, left),) = claims.corners
    for corner, point, length in ((top, y, 70), (left, x, 90)):
        assert corner == int(corner)
        assert corner <= point < corner + size
        if size <= length:
            assert 0 <= corner <= length - size
        if 0 < corner < length - size:
            assert corner + size // 2 == int(point)


def test_windows_that_are_resampled_are_centred_to_a_fraction_of_a_pixel():
    cut = Cut((70, 90), (12.8, 12.8), (12.8, 12.8), (1.6, 1.6), native=False)
    claims, _ = claim_windows(_shapes(shapely.Point(30.3, 40.7)), cut, _options())
    assert claims.corners.tolist() == [[pytest.approx(34.3), pytest.approx(23.9)]]


def test_of_two_places_the_larger_overlap_has_the_window_and_ties_are_told():
    left, right = shapely.box(0, 0, 25, 16), shapely.box(25, 0, 90, 16)
    claims, _ = claim_windows(_shapes(left, right), CUT, _options(place_overlap=0.4))
    settled, ties = claims.settled(["a", "b"])
    # The window at column 16 is 9/16 in the first; the one at 24 1/16.
    owner = {
        column: place for (row, column), place in zip(settled.corners.tolist(), settled.places, strict=True) if row == 0
    }
    assert owner[16.0] == 0
    assert owner[24.0] == 1
    assert ties == []
    halves = claim_windows(_shapes(shapely.box(0, 0, 24, 16), shapely.box(24, 0, 90, 16)), CUT, _options())[0]
    settled, ties = halves.settled(["a", "b"])
    owner = {
        column: place for (row, column), place in zip(settled.corners.tolist(), settled.places, strict=True) if row == 0
    }
    assert owner[16.0] == 0
    assert set(ties) == {(0, 1)}
    assert halves.settled(["a", "a"])[1] == []


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.sampled_from([0.25, 0.5, 0.75])), max_size=20))
def test_each_window_is_settled_once(given_claims):
    parts = [(place, np.array([[float(corner), 0.0]]), np.array([share])) for corner, place, share in given_claims]
    claims = Claims.joined(sorted(parts, key=lambda part: part[0]))
    settled, _ = claims.settled(list("abcde"))
    for (corner, _), place, share in zip(settled.corners, settled.places, settled.shares, strict=True):
        rivals = [(-s, p) for c, p, s in given_claims if c == corner]
        assert (-share, place) == min(rivals)
    assert len(settled.corners) == len({corner for corner, _, _ in given_claims})


def test_a_limit_spreads_a_polygons_windows():
    shape = shapely.box(0, 0, 90, 70)
    every, _ = claim_windows(_shapes(shape), CUT, _options(place_windows="centre"))
    few, _ = claim_windows(_shapes(shape), CUT, _options(place_windows="centre", place_limit=5))
    assert len(few.corners) == 5
    assert len(every.corners) > 50
    assert {tuple(c) for c in few.corners.tolist()} <= {tuple(c) for c in every.corners.tolist()}
    assert np.ptp(few.corners[:, 0]) == np.ptp(every.corners[:, 0])


def test_shapes_follow_the_transform_and_the_order_of_axes():
    zone = pyproj.CRS.from_epsg(32618)
    there = pyproj.Transformer.from_crs(4326, 32618, always_xy=True)
    frame = Frame(100, 100, zone.to_wkt(), (10.0, 0.0, 350_000.0, 0.0, -20.0, 3_840_000.0))
    x, y = there.transform(-76.63, 34.68)
    (found,) = frame.shapes(_shapes(shapely.Point(-76.63, 34.68)), ["EPSG:4326"])
    assert (found.x, found.y) == (pytest.approx((x - 350_000) / 10), pytest.approx((3_840_000 - y) / 20))
    turned = Frame(100, 100, zone.to_wkt(), (0.0, 10.0, 350_000.0, 10.0, 0.0, 3_840_000.0))
    (found,) = turned.shapes(_shapes(shapely.Point(350_100, 3_840_300)), ["EPSG:32618"])
    assert (found.x, found.y) == (pytest.approx(30), pytest.approx(10))
    assert turned.coordinates(np.array([[10.0, 30.0]])).tolist() == [[350_100, 3_840_300]]
