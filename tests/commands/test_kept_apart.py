"""What results say of the groups that a split keeps apart: scenes, blocks of the ground, places."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import rasterio
from rasterio.transform import from_origin

from fmsuite.commands.bench_opening import kept_apart
from fmsuite.commands.finetune_data import group_unit
from fmsuite.commands.labelled_windows import LabelledWindows
from fmsuite.commands.tile import tile
from fmsuite.core.data.index import SampleIndex
from fmsuite.domains.base import Units
from fmsuite.domains.remote_sensing import RemoteSensingDomain

UNITS = Units(source="raster", group="scene")


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> SampleIndex:
    """Six scenes of four windows, in two classes."""
    folder = tmp_path_factory.mktemp("apart") / "scenes"
    folder.mkdir()
    lines = ["path,label"]
    for number in range(6):
        kind = {"driver": "GTiff", "height": 32, "width": 32, "count": 1, "dtype": "uint8", "crs": "EPSG:32633"}
        place = from_origin(5e5 + 320 * number, 6e6, 10, 10)
        with rasterio.open(folder / f"{number}.tif", "w", transform=place, **kind) as file:
            file.write(np.random.default_rng(number).integers(1, 255, (1, 32, 32)).astype(np.uint8))
        lines.append(f"{number}.tif,{'ab'[number % 2]}")
    (folder / "labels.csv").write_text("\n".join(lines), encoding="utf-8")
    return tile("remote_sensing", [folder], folder.parent / "index.parquet", overrides=["data.size=16"]).index


def said(index: SampleIndex, folds=None, **metadata: object) -> str:
    changed = SampleIndex(index.table, {**index.metadata, **metadata})
    return kept_apart(LabelledWindows.of(changed, 0, "window", "scenes", folds), UNITS)


def test_a_scene_is_a_group_by_default_and_never_on_both_sides(index: SampleIndex) -> None:
    assert len(index) == 24
    windows = LabelledWindows.of(index, 0, "window", "scenes")
    sources = np.array(index.table.column("source").cast(pa.string()).to_pylist())
    assert not set(sources[windows.split.train.numpy()]) & set(sources[windows.split.test.numpy()])
    assert len(windows.group_names) == 6
    assert said(index) == said(index, folds=2) == "Kept apart: what the data call a group (scene)."


def test_blocks_and_places_are_named_with_their_size_and_file(index: SampleIndex) -> None:
    blocks = {"metres": 640.0, "margin": 0.0, "left_out": 12}
    assert said(index, blocks=blocks) == (
        "Kept apart: squares of the ground of 640 m (spatial blocks); 12 windows across their borders were left out."
    )
    near = said(index, blocks={**blocks, "margin": 80.0, "left_out": 1})
    assert "1 window across their borders, or nearer to them than 80 m, was left out" in near
    assert said(index, places={"file": "a/cover.shp", "grouped": True}) == (
        "Kept apart: the polygons, or the groups, of cover.shp."
    )
    assert "of cover.shp. 2 pairs of neighbours in different groups share pixels." in said(
        index, places={"file": "a/cover.shp", "grouped": True, "meeting": 2}
    )
    assert "points of p.geojson, but for those whose windows share pixels" in said(
        index, places={"file": "p.geojson", "grouped": False}
    )


@pytest.mark.parametrize("folds", [None, 4])
def test_rasters_with_windows_on_both_sides_are_counted(index: SampleIndex, folds) -> None:
    groups = [f"block{row % 4}{row // 8}" for row in range(24)]
    place = index.table.column_names.index("group")
    column = pa.array(groups).dictionary_encode().cast(index.table.schema.field(place).type)
    divided = SampleIndex(index.table.set_column(place, "group", column), index.metadata)
    text = said(divided, folds, blocks={"metres": 160, "left_out": 0})
    assert "rasters have windows that are learned from beside others that are asked." in text


def test_fine_tuning_calls_groups_what_they_are(index: SampleIndex) -> None:
    domain = RemoteSensingDomain()
    assert group_unit(domain, index) == "scene"
    assert group_unit(domain, SampleIndex(index.table, {**index.metadata, "blocks": {"metres": 640.0}})) == "block"
    assert group_unit(domain, SampleIndex(index.table, {**index.metadata, "places": {"file": "a.shp"}})) == "place"
