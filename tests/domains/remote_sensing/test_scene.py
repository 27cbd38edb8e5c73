"""Whole rasters: what is read, where what is written lies, and that it is what a GIS expects."""

from __future__ import annotations

import numpy as np
import pytest
import rasterio
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.control import GroundControlPoint
from rasterio.transform import Affine, from_gcps, from_origin

from fmsuite.core.adaptation.scenes import stream_scene
from fmsuite.core.class_colours import class_colours
from fmsuite.core.data.sample import View
from fmsuite.core.data.scene import Scene
from fmsuite.core.data.scene_maps import MapKind
from fmsuite.core.inputs import Channel
from fmsuite.domains.remote_sensing.cog import NO_CLASS, CogFile, Ground, write_cog
from fmsuite.domains.remote_sensing.resampling import linear_back, source_range
from fmsuite.errors import FmsuiteError, UsageError

GRIDS = {
    "projected": ("EPSG:32632", from_origin(500_000, 5_300_000, 10, 10)),
    "not square": ("EPSG:32632", from_origin(500_000, 5_300_000, 10, 20)),
    "geographic": ("EPSG:4326", from_origin(9, 48, 1e-4, 1.3e-4)),
    "rotated": ("EPSG:32632", Affine.translation(500_000, 5_300_000) * Affine.rotation(30) * Affine.scale(10, -10)),
}


def at(transform, column, row):
    return (
        transform.a * column + transform.b * row + transform.c,
        transform.d * column + transform.e * row + transform.f,
    )


@pytest.mark.parametrize("gsd", [None, 17.0, 6.0])
@pytest.mark.parametrize("grid", list(GRIDS))
def test_every_pixel_of_a_written_map_lies_where_the_rasters_does(write_raster, make_index, noise, tmp_path, grid, gsd):
    """Pixel -> coordinate by the written map -> pixel of the raster, and the value that the map has there."""
    crs, transform = GRIDS[grid]
    path = write_raster("a.tif", noise(2, 45, 70), crs=crs, transform=transform)
    domain, index, _ = make_index(path, size=16, gsd=gsd, min_valid=0)
    scene = domain.scene(index, str(path))
    rows, columns = np.mgrid[:45, :70].astype(np.float64)
    written = scene.write(np.stack([rows, columns]), tmp_path / "out" / "map")
    with rasterio.open(written) as made, rasterio.open(path) as source:
        assert made.crs == source.crs
        assert np.isnan(made.nodata)
        x, y = at(made.transform, columns + 0.5, rows + 0.5)
        back = at(~source.transform, x, y)
        values = made.read()
        np.testing.assert_allclose(back[0] - 0.5, values[1], atol=1e-3)
        np.testing.assert_allclose(back[1] - 0.5, values[0], atol=1e-3)
        place = at(source.transform, 33.4, 21.7)
    assert scene.from_world(place) == (21, 33)
    assert scene.from_file((33, 21)) == (21, 33)
    # A ramp on the input's grid is the ramp of the pixels' centres again, but where it ends.
    ramp = [(np.arange(n) + 0.5) * p - 0.5 for n, p in zip(scene.size, scene.pitch, strict=True)]
    y, x = np.meshgrid(*ramp, indexing="ij")
    native = scene.scores_to_native(np.stack([y, x]).astype(np.float32))
    inside = tuple(slice(int(np.ceil(a[0])), int(a[-1])) for a in ramp)
    np.testing.assert_allclose(native[0][inside], rows[inside], atol=1e-3)
    np.testing.assert_allclose(native[1][inside], columns[inside], atol=1e-3)
    located = scene.locate((21, 33))
    np.testing.assert_allclose((scene.place(np.array(located) + 0.5) - 0.5), (21, 33), atol=1e-6)


def test_a_scene_reads_what_windows_read(write_raster, make_index, noise):
    values = noise(2, 50, 61)
    values[:, :5] = 0
    path = write_raster("a.tif", values, nodata=0)
    domain, index, _ = make_index(path, size=16)
    scene = domain.scene(index, str(path))
    assert (scene.size, scene.native_size, scene.native_spacing) == ((50, 61), (50, 61), (10, 10))
    sample = scene.read((2, 30), (40, 31))
    np.testing.assert_array_equal(sample.values, values[:, 2:42, 30:61])
    assert not sample.valid[:, :3].any()
    assert sample.valid[:, 3:].all()
    with pytest.raises(ValueError, match="a box at"):
        scene.read((11, 0), (40, 61))
    with pytest.raises(UsageError, match="not a source of this index"):
        domain.scene(index, "elsewhere.tif")
    coarse, index, _ = make_index(path, size=8, gsd=20)
    scene, reader = coarse.scene(index, str(path)), coarse.reader(index)
    assert scene.size == (25, 30)
    for row in range(len(index)):
        start = np.array(index[row].position) / 2
        if (start == start.astype(int)).all():
            np.testing.assert_array_equal(scene.read(start.astype(int), (8, 8)).values, reader.read(index[row]).values)


def test_a_series_is_read_with_all_dates(write_raster, make_index, noise):
    for day in (3, 9):
        write_raster(f"s/field_202401{day:02d}.tif", noise(2, 40, 36, seed=day))
    domain, index, _ = make_index(write_raster("s/field_20240120.tif", noise(2, 40, 36)).parent, size=16, series=True)
    scene = domain.scene(index, index.sources[0])
    sample = scene.read((4, 0), (30, 36))
    assert scene.size == scene.native_size == (40, 36)
    assert sample.values.shape == (2, 3, 30, 36)
    np.testing.assert_array_equal(sample.values[:, 1], noise(2, 40, 36, seed=9)[:, 4:34])
    assert len(sample.coords["time"]) == 3


def test_what_is_written_is_a_cloud_optimised_geotiff(tmp_path):
    """GDAL says of a file itself whether it is laid out as one."""
    ground = Ground((700, 1500), rasterio.crs.CRS.from_epsg(32632), from_origin(500_000, 5_300_000, 10, 10))
    classes = np.zeros((1, 700, 1500), np.uint8)
    classes[:, :, 600:] = 2
    classes[:, :100] = NO_CLASS
    path = write_cog(tmp_path / "classes", classes, ground, MapKind("classes", ("land", "water", "ice")))
    with rasterio.open(path) as made:
        assert made.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert made.profile["tiled"]
        assert made.block_shapes == [(512, 512)]
        assert made.overviews(1) == [2, 4]
        assert made.nodata == NO_CLASS
        assert made.tags()["CLASS_2"] == "ice"
        assert made.colormap(1)[1] == (*class_colours(3)[1], 255)
        np.testing.assert_array_equal(made.read(), classes)
        # Classes are numbers that no mean makes sense of.
        assert set(np.unique(made.read(1, out_shape=(175, 375)))) <= {0, 2, NO_CLASS}
    scores = np.full((2, 700, 1500), 0.25, np.float32)
    scores[:, :, :10] = np.nan
    path = write_cog(tmp_path / "scores", scores, ground, MapKind("scores", ("land", "water")))
    with rasterio.open(path) as made:
        assert made.descriptions == ("land", "water")
        np.testing.assert_array_equal(made.read(), scores)
        assert np.nanmax(np.abs(made.read(1, out_shape=(175, 375)) - 0.25)) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["classes.tif", "scores.tif"]


def test_a_map_appears_whole_or_not_at_all(tmp_path):
    ground = Ground((40, 50), None, Affine.identity())
    file = CogFile(tmp_path / "a", ground, MapKind("classes"))
    file.write(np.ones((1, 10, 20), np.uint8), 5, 30)
    assert not (tmp_path / "a.tif").exists()
    with rasterio.open(file.finish()) as made:
        values = made.read(1)
        assert made.crs is None
    assert (values[5:15, 30:] == 1).all()
    assert (values == NO_CLASS).sum() == 40 * 50 - 200
    CogFile(tmp_path / "b", ground, MapKind("scores")).discard()
    assert [path.name for path in tmp_path.iterdir()] == ["a.tif"]
    (tmp_path / "file").write_text("")
    with pytest.raises(FmsuiteError, match="cannot be written"):
        CogFile(tmp_path / "file" / "map", ground, MapKind("scores"))


def test_ground_control_points_stay(write_raster, make_index, noise, tmp_path):
    corners = [(0, 0), (0, 40), (40, 0), (40, 40)]
    points = [GroundControlPoint(row=r, col=c, x=9 + c / 1000, y=48 - r / 1000) for r, c in corners]
    path = write_raster("a.tif", noise(1, 40, 40), crs=None, transform=None)
    with rasterio.open(path, "r+") as dataset:
        dataset.gcps = (points, rasterio.crs.CRS.from_epsg(4326))
    domain, index, _ = make_index(path, size=16)
    written = domain.scene(index, str(path)).write(np.zeros((40, 40), np.uint8), tmp_path / "map")
    with rasterio.open(written) as made:
        assert from_gcps(made.gcps[0]).almost_equals(from_gcps(points))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_boxes_of_pixels_are_those_of_the_whole(data):
    """What a box needs of the grid is enough, and gives what the whole gives, bit for bit."""
    pitch = (data.draw(st.floats(0.2, 5)), data.draw(st.sampled_from([1.0, 2.0, 0.5, 10 / 3])))
    native = data.draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    size = tuple(max(1, int(n / p + 1e-6)) for n, p in zip(native, pitch, strict=True))
    values = np.random.default_rng(data.draw(st.integers(0, 99))).random((2, *size), dtype=np.float32)
    whole = linear_back(values, (0, 0), pitch, (0, 0), native)
    start = [data.draw(st.integers(0, n - 1)) for n in native]
    shape = [data.draw(st.integers(1, n - s)) for n, s in zip(native, start, strict=True)]
    ranges = [source_range(*box) for box in zip(start, shape, pitch, size, strict=True)]
    part = values[:, ranges[0][0] : ranges[0][1], ranges[1][0] : ranges[1][1]]
    found = linear_back(part, [low for low, _ in ranges], pitch, start, shape)
    np.testing.assert_array_equal(found, whole[:, start[0] : start[0] + shape[0], start[1] : start[1] + shape[1]])
    assert whole.min() >= values.min()
    assert whole.max() <= values.max()


@pytest.mark.parametrize("gsd", [None, 17.0, 6.0])
def test_parts_of_a_raster_have_the_pixels_whose_middles_they_hold(write_raster, make_index, noise, gsd):
    """As the general definition says; side by side, they are all pixels, each once."""
    path = write_raster("a.tif", noise(1, 45, 70))
    domain, index, _ = make_index(path, size=16, gsd=gsd)
    scene = domain.scene(index, str(path))
    half = scene.size[0] // 2
    boxes = [((0, 0), (half, scene.size[1])), ((half, 0), (scene.size[0] - half, scene.size[1]))]
    found = [scene.native_box(*box) for box in boxes]
    assert found[0][0] == (0, 0)
    assert found[1][0] == (found[0][1][0], 0)
    assert found[0][1][0] + found[1][1][0] == 45
    assert [extent[1] for _, extent in found] == [70, 70]
    middle = ((half // 2, 3), (half // 2, 9))
    assert scene.native_box(*middle) == Scene.native_box(scene, *middle)
    scores = noise(2, *scene.size).astype(np.float32)
    part = scores[:, :half]
    general = Scene.part_to_native(scene, part, (0, 0), *found[0])
    np.testing.assert_allclose(scene.part_to_native(part, (0, 0), *found[0]), general, rtol=1e-6)


class Same:
    """A network whose answer is its input."""

    size = (8, 8)

    def seen(self, valid: torch.Tensor) -> torch.Tensor:
        return valid

    def predict(self, view: View) -> torch.Tensor:
        return view.pixels


@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.7])
@pytest.mark.parametrize("shape", [(3, 5), (5, 20), (8, 8), (31, 19)])
def test_blended_windows_of_an_identity_write_the_raster_itself(
    write_raster, make_index, tmp_path, shape, overlap
) -> None:
    """Rasters smaller than a window, of no multiple of one, and in several panels."""
    values = np.random.default_rng(3).random((2, *shape), dtype=np.float32) + 0.01
    values[:, -1, -1] = np.nan
    path = write_raster("a.tif", values, crs="EPSG:32632", transform=from_origin(5e5, 5.3e6, 10, 10))
    domain, index, _ = make_index(path, size=8, min_valid=0)
    scene, spec = domain.scene(index, str(path)), domain.input_spec(index)
    plain = spec.model_copy(update={"channels": tuple(Channel(name=name) for name in spec.channel_names)})
    writer = scene.writer(tmp_path / "map", MapKind("scores", spec.channel_names))
    for box in stream_scene(Same(), plain, scene, overlap=overlap, batch=3, panel=1):  # type: ignore[arg-type]
        writer.add(box.start, box.scores, box.valid)
    with rasterio.open(writer.finish()) as made:
        np.testing.assert_allclose(made.read(), values, rtol=0, atol=1e-6, equal_nan=True)
