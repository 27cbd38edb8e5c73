"""An encoder that knows wavelengths, from one sensor's rasters to another's: pretrain, embed, compare."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fmsuite.commands.contenders import contenders
from fmsuite.commands.embed import embed
from fmsuite.commands.pretrain import pretrain
from fmsuite.core.encoders import load_encoder
from fmsuite.core.features import FeatureStore
from fmsuite.errors import UsageError

SMALL = (
    "model.width=24",
    "model.depth=1",
    "model.heads=2",
    "objective.decoder_width=24",
    "objective.decoder_depth=1",
    "training.steps=2",
    "training.batch_size=4",
    "training.workers=0",
    "monitor.samples=8",
)


RECIPE = "remote-sensing-wavelengths"


@pytest.fixture
def run(tmp_path: Path, write_raster, noise) -> Path:
    path = write_raster("s2.tif", noise(4, 64, 64), descriptions=("B2", "B3", "B4", "B8"), nodata=0)
    options = [*SMALL, "data.sensor=sentinel2-l2a", "data.size=16"]
    pretrain("remote_sensing", [path], recipe=RECIPE, out=tmp_path / "run", overrides=options)
    return tmp_path / "run"


def test_bands_that_it_never_saw_are_embedded_and_compared(run: Path, tmp_path: Path, write_raster, make_index):
    described = json.loads((run / "encoder.json").read_text())
    assert [channel["wavelength"] for channel in described["input"]["channels"]] == [492.4, 559.8, 664.6, 832.8]
    values = np.random.default_rng(1).integers(1, 255, (3, 64, 64)).astype(np.uint8)
    aerial = write_raster("naip.tif", values, descriptions=("red", "green", "blue"))
    domain, index, _ = make_index(aerial, sensor="naip", size=16)
    index.write(tmp_path / "naip.parquet")
    done = embed(str(run), tmp_path / "naip.parquet", tmp_path / "naip.zarr", workers=0, device="cpu")
    with FeatureStore.open(done.path) as store:
        features, _ = store.read_all()
    assert features.shape == (16, 24)
    spec = domain.input_spec(index)
    encoder = load_encoder(run).fitted(spec)
    assert [channel.std for channel in encoder.spec.channels] == [channel.std for channel in spec.channels]
    pixels = torch.from_numpy(values[None, :, :16, :16])
    torch.testing.assert_close(features[:1], encoder.embed(pixels), atol=2e-3, rtol=1e-3)
    found = contenders({"mine": load_encoder(run)}, spec, controls=True)
    assert [contender.name for contender in found] == ["mine", "untrained mine", "histogram"]
    assert found[0].embedder.identity == encoder.identity
    assert found[1].embedder.spec.channel_names == ("red", "green", "blue")

    unknown, other, _ = make_index(write_raster("other.tif", values[:2].astype(np.uint16)), size=16)
    other.write(tmp_path / "other.parquet")
    with pytest.raises(UsageError, match=r"has no wavelength.*Trained on: B2, B3, B4, B8"):
        embed(str(run), tmp_path / "other.parquet", tmp_path / "other.zarr", workers=0, device="cpu")
    assert unknown.input_spec(other).in_chans == 2
    options = [*SMALL, "data.size=16"]
    with pytest.raises(UsageError, match="needs wavelengths, and none of the channels"):
        pretrain("remote_sensing", [tmp_path / "other.tif"], recipe=RECIPE, out=tmp_path / "no", overrides=options)
