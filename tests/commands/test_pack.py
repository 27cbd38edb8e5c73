"""``fmsuite pack``: the packed copy gives the numbers of the files, in every domain; killed, damaged, moved."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fmsuite.commands.embed import embed
from fmsuite.commands.pack import check, pack
from fmsuite.commands.setup import domain_options, open_domain, open_index
from fmsuite.commands.tile import tile
from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.backbones.vit import VisionTransformer
from fmsuite.core.data.index import SampleIndex
from fmsuite.core.data.packed import open_reader
from fmsuite.core.data.pipeline import IMAGE, plain_views
from fmsuite.core.data.sample import Batch
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.encoders import save_encoder
from fmsuite.core.features import FeatureStore
from fmsuite.errors import FmsuiteError, UsageError


def make_rasters(folder: Path) -> None:
    import rasterio
    from rasterio.transform import from_origin

    for number in range(2):
        values = np.random.default_rng(number).integers(1, 9000, (4, 96, 64)).astype(np.uint16)
        values[:, :20, :10] = 0
        profile = {"driver": "GTiff", "width": 64, "height": 96, "count": 4, "dtype": "uint16", "nodata": 0}
        where = {"crs": "EPSG:32632", "transform": from_origin(500_000, 5_300_000, 10, 10)}
        with rasterio.open(folder / f"{number}.tif", "w", **profile, **where) as raster:
            raster.write(values)
            raster.descriptions = ("B2", "B3", "B4", "B8")


def make_volumes(folder: Path) -> None:
    import nibabel

    for number in range(2):
        grid = np.indices((26, 20, 18))
        values = (100 + 40 * np.sin(grid.sum(0) / (3 + number))).astype(np.float32)
        image = nibabel.Nifti1Image(values, np.diag([1.0, 1.0, 1.0 + number, 1.0]))
        image.set_sform(image.affine, code=1)
        image.header.set_xyzt_units("mm")
        nibabel.save(image, folder / f"{number}.nii.gz")


MADE: dict[str, tuple[Callable[[Path], None] | None, list[str]]] = {
    "pathology": (None, ["size=32"]),
    "remote_sensing": (make_rasters, ["size=32", "bands=[B4,B3,B2,B8]", "sensor=sentinel2-l2a"]),
    "medical": (make_volumes, ["size=16"]),
}


@pytest.fixture(scope="module")
def indexed(tiles: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The index of a few files of a domain, made once."""
    made: dict[str, Path] = {}

    def index(domain: str) -> Path:
        if domain not in made:
            make, overrides = MADE[domain]
            folder = tmp_path_factory.mktemp(domain)
            source = tiles
            if make is not None:
                source = folder / "files"
                source.mkdir()
                make(source)
            made[domain] = tile(domain, [source], folder / "index", overrides=overrides).path
        return made[domain]

    return index


def opened(path: Path):
    domain = SampleIndex.read(path).metadata["domain"]
    plugin, index = open_index(open_domain(domain, domain_options(domain, [])), [path], SkippedLog())
    return plugin, index, open_reader(plugin, index)


def batch_of(path: Path) -> Batch:
    plugin, index, reader = opened(path)
    spec = plugin.input_spec(index)
    return next(iter(plain_views(index, reader, spec, range(len(index)), spec.size, 1000)))


def features(path: Path, out: Path) -> np.ndarray:
    plugin, index, _ = opened(path)
    spec = plugin.input_spec(index)
    torch.manual_seed(0)
    network = VisionTransformer(ModelConfig(name="vit_tiny", width=32, depth=1, heads=2, patch_size=8), spec)
    save_encoder(out / "encoder", network, spec, "cls", {"run": "test"})
    embed(str(out / "encoder"), path, out / "features.zarr", device="cpu", workers=0)
    store = FeatureStore.open(out / "features.zarr")
    return np.concatenate([store[group].features for group in sorted(store.stored())])


@pytest.mark.parametrize("domain", list(MADE))
def test_features_from_the_packed_copy_are_those_from_the_files_bit_for_bit(
    indexed: Callable[[str], Path], domain: str, tmp_path: Path
) -> None:
    index = indexed(domain)
    result = pack(index, tmp_path / "packed", shard_windows=3)
    assert result.index.hash == SampleIndex.read(index).hash
    shutil.move(tmp_path / "packed", tmp_path / "elsewhere")
    moved = tmp_path / "elsewhere" / "index.parquet"
    ours, theirs = batch_of(moved).views[IMAGE][0], batch_of(index).views[IMAGE][0]
    assert ours.pixels.dtype == theirs.pixels.dtype
    for name in ("pixels", "valid", "spacing", "keys"):
        one, other = getattr(ours, name), getattr(theirs, name)
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one.nan_to_num(-1), other.nan_to_num(-1))
    found, expected = features(moved, tmp_path / "a"), features(index, tmp_path / "b")
    assert found.shape == expected.shape == (len(result.index), 32)
    np.testing.assert_array_equal(found, expected)


def test_a_run_on_the_packed_copy_is_the_run_on_the_files(
    fmsuite, indexed: Callable[[str], Path], tiles: Path, tile_settings, tmp_path: Path
) -> None:
    files = tmp_path / "files"
    shutil.copytree(tiles, files)
    index = tile("pathology", [files], tmp_path / "index", overrides=["size=32"]).path
    pack(index, tmp_path / "packed", processes=2, shard_windows=5)
    settings = tile_settings("dino", {"training.steps": 3})
    assert fmsuite("pretrain", *settings, "--data", index, "--out", tmp_path / "a").code == 0
    shutil.rmtree(files)
    ran = fmsuite("pretrain", *settings, "--data", tmp_path / "packed" / "index.parquet", "--out", tmp_path / "b")
    assert ran.code == 0, ran.text
    lines = [(tmp_path / run / "metrics.jsonl").read_text().splitlines() for run in ("a", "b")]
    losses = [[json.loads(line).get("loss") for line in each] for each in lines]
    assert losses[0] == losses[1]
    assert len([loss for loss in losses[0] if loss is not None]) == 3
    assert Image.open(tmp_path / "a" / "views.png").tobytes() == Image.open(tmp_path / "b" / "views.png").tobytes()


def test_the_command_says_what_it_did_and_goes_on_where_it_stopped(fmsuite, tiles: Path, tmp_path: Path) -> None:
    files, out = tmp_path / "files", tmp_path / "packed"
    shutil.copytree(tiles, files)
    index = tile("pathology", [files], tmp_path / "index", overrides=["size=32"]).path
    (files / "2.png").write_bytes(b"not a picture")
    ran = fmsuite("pack", "--index", index, "--out", out, "--shard-windows", 8)
    assert ran.code == 3
    assert "20 windows in 3 shards, 3 of them written now" in ran.text
    assert "1 skipped" in ran.text
    assert "2.png" in (out / "skipped.csv").read_text()
    assert len(SampleIndex.read(out / "index.parquet")) == 20
    again = fmsuite("pack", "--index", index, "--out", out)
    assert "3 shards, 0 of them written now" in again.text
    assert again.code == 3
    assert "as they were written" in fmsuite("pack", "--verify", "--out", out).text

    shard = next(path for path in sorted((out / "arrays").rglob("c/1/**/*")) if path.is_file())
    data = bytearray(shard.read_bytes())
    data[7] ^= 255
    shard.write_bytes(data)
    damaged = fmsuite("pack", "--verify", "--out", out)
    assert damaged.code == 1
    assert shard.name in damaged.text
    shard.unlink()
    (out / "index.parquet").unlink()
    mended = fmsuite("pack", "--index", index, "--out", out)
    assert "20 windows in 3 shards, 1 of them written now" in mended.text
    assert check(out) == []


def test_what_cannot_be_packed_is_refused_in_a_sentence(
    fmsuite, indexed: Callable[[str], Path], tmp_path: Path
) -> None:
    drawings = tmp_path / "drawings"
    drawings.mkdir()
    text = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><rect width="5" height="5"/></svg>'
    (drawings / "a.svg").write_text(text)
    svg = tile("svg", [drawings], tmp_path / "svg").path
    with pytest.raises(UsageError, match="VectorSample, which is drawn anew"):
        pack(svg, tmp_path / "out")
    index = indexed("pathology")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    with pytest.raises(UsageError, match="other files"):
        pack(index, tmp_path / "full")
    pack(index, tmp_path / "packed", shard_windows=16)
    with pytest.raises(UsageError, match="shards hold 16 windows, not 8"):
        pack(index, tmp_path / "packed", shard_windows=8)
    with pytest.raises(UsageError, match="the packed copy itself"):
        pack(tmp_path / "packed" / "index.parquet", tmp_path / "packed")
    other = tmp_path / "other.parquet"
    SampleIndex.read(index).select([0, 1]).write(other)
    with pytest.raises(UsageError, match="of another index"):
        pack(other, tmp_path / "packed")
    with pytest.raises(UsageError, match="no packed copy here"):
        check(tmp_path / "drawings")
    assert fmsuite("pack", "--out", tmp_path / "x").code == 2
    assert fmsuite("pack", "--verify", "--out", tmp_path / "packed", "--index", index).code == 2


def test_a_full_disk_is_said_and_leaves_what_is_done(
    indexed: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fmsuite.core.data import shards

    written = []

    def full(descriptor: int) -> None:
        written.append(descriptor)
        if len(written) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards.os, "fsync", full)
    with pytest.raises(FmsuiteError, match="No space left"):
        pack(indexed("pathology"), tmp_path / "packed", shard_windows=8)
    assert pack(indexed("pathology"), tmp_path / "packed").shards == (2, 3)
