"""``fmsuite pack --whole`` of rasters: windows at any place of the copy are those of the files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fmsuite.commands.pack import pack
from fmsuite.core.data import scene_packing
from fmsuite.core.data.index import SampleIndex
from fmsuite.core.data.packed import located, open_reader
from fmsuite.core.data.packed_scenes import PackedScene, open_scene
from fmsuite.core.data.sampling import RandomWindows
from fmsuite.domains.remote_sensing import RemoteSensingDomain


@pytest.fixture
def copied(make_index: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """``copied(path, ..., option=value)``: the domain, the index, and that of its copy, written in strips."""
    monkeypatch.setattr(scene_packing, "PIECE_BYTES", 1)

    def copy(*paths: Path, **options) -> tuple[RemoteSensingDomain, SampleIndex, SampleIndex]:
        domain, index, _ = make_index(*paths, **options)
        index.write(tmp_path / "index.parquet")
        path = pack(tmp_path / "index.parquet", tmp_path / "copy", whole=True).path
        return domain, index, located(SampleIndex.read(path), path)

    return copy


def compare(domain: RemoteSensingDomain, index: SampleIndex, packed: SampleIndex, tolerance: float = 0) -> set[str]:
    """What was met: windows that are valid, in part, and not at all."""
    ours, theirs = open_reader(domain, packed), open_reader(domain, index)
    sampler, stream = RandomWindows(index, domain.input_spec(index).size), np.random.default_rng(0)
    rows = [*range(len(index))]
    met = set()
    for window in [*map(index.__getitem__, rows), *(sampler(index[row], row, stream) for row in rows * 8)]:
        found, expected = ours.read(window), theirs.read(window)
        assert found.spacing == expected.spacing
        assert found.values.dtype == expected.values.dtype
        valid = np.ones(expected.values.shape, bool) if expected.valid is None else expected.valid
        np.testing.assert_array_equal(np.ones(valid.shape, bool) if found.valid is None else found.valid, valid)
        np.testing.assert_allclose(found.values, expected.values, rtol=tolerance, atol=0)
        assert found.coords.keys() == expected.coords.keys()
        for axis, days in expected.coords.items():
            np.testing.assert_array_equal(found.coords[axis], days)
        met.add("all" if valid.all() else "some" if valid.any() else "none")
    return met


def test_windows_of_the_copy_are_those_of_the_files(write_raster, noise, copied) -> None:
    """Nodata inside, a whole corner without data, a raster smaller than a window, a valid one."""
    holes = noise(3, 300, 70)
    holes[:, 200:, :40] = 0
    holes[1, 20:30, 20:30] = 0
    write_raster("s/holes.tif", holes, nodata=0, tiled=True, blockxsize=64, blockysize=64)
    write_raster("s/small.tif", noise(3, 28, 40, seed=1), nodata=0)
    folder = write_raster("s/full.tif", noise(3, 150, 64, seed=2)).parent
    domain, index, packed = copied(folder, size=32, min_valid=0.4)
    assert len(packed.sources) == 3
    assert compare(domain, index, packed) == {"all", "some", "none"}
    for source in index.sources:
        scene, plain = open_scene(domain, packed, source), domain.scene(index, source)
        assert isinstance(scene, PackedScene)
        np.testing.assert_array_equal(scene.read((0, 0), scene.size).values, plain.read((0, 0), plain.size).values)


def test_resampled_windows_of_the_copy_are_those_of_the_files(write_raster, noise, copied) -> None:
    """To the last digits but one: weights are computed from where a window begins."""
    values = noise(2, 190, 83)
    values[:, 50:60, 30:50] = 0
    path = write_raster("a.tif", values, nodata=0)
    domain, index, packed = copied(path, size=16, gsd=13.0, min_valid=0.2)
    assert compare(domain, index, packed, 2e-5) == {"all", "some"}


def test_series_are_packed_with_their_dates(write_raster, noise, copied) -> None:
    """One of three dates and one of two, of which one lacks data at some places."""
    for place, dates in (("a", ("20200105", "20200310", "20201101")), ("b", ("20200105", "20210102"))):
        for number, date in enumerate(dates):
            values = noise(2, 140, 50, seed=number)
            values[:, :20, :9] *= number > 0
            folder = write_raster(f"s/{place}_{date}.tif", values, nodata=0).parent
    domain, index, packed = copied(folder, size=16, series=True)
    assert compare(domain, index, packed) == {"all", "some"}
    for source in index.sources:
        scene, plain = open_scene(domain, packed, source), domain.scene(index, source)
        found, expected = scene.read((3, 2), (20, 30)), plain.read((3, 2), (20, 30))
        np.testing.assert_array_equal(found.values, expected.values)
        np.testing.assert_array_equal(found.coords["time"], expected.coords["time"])
