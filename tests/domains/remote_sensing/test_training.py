"""From rasters to losses: windows, views, batches, normalisation and objectives fit together."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fmsuite.core.backbones.build import build_backbone
from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.data.pipeline import ViewPipeline, WindowDataset, collate
from fmsuite.core.data.sample import Batch, SampleKey
from fmsuite.core.inputs import Normalize
from fmsuite.core.objectives.base import Objective, StepContext
from fmsuite.core.objectives.dino import DINO, DINOConfig
from fmsuite.core.objectives.mae import MAE, MAEConfig

STEPS = 30
SMALL = {"width": 64, "depth": 2, "heads": 2, "patch_size": 8, "positions": "sincos"}
MAE_SMALL = {"decoder_width": 64, "decoder_depth": 1, "decoder_heads": 2}


def scenes(bands: int, seed: int = 0) -> np.ndarray:
    """Smooth structure that all bands share, with a nodata corner."""
    random = np.random.default_rng(seed)
    coarse = random.uniform(500, 4000, size=(1, 12, 12)) * random.uniform(0.5, 1.5, size=(bands, 1, 1))
    values = np.kron(coarse, np.ones((1, 8, 8))).astype(np.uint16)
    values[:, :20, :30] = 0
    return values


def train(objective_type, config, domain, index, model: dict) -> tuple[list[float], Batch]:
    """Losses of a few steps on one repeated batch."""
    torch.manual_seed(0)
    spec = domain.input_spec(index)
    objective: Objective = objective_type(config, build_backbone(ModelConfig(**model), spec))
    pipeline = ViewPipeline(
        objective.view_requests(), domain.augmentation(spec), objective.backbone.grid, spec.axes, seed=0
    )
    dataset = WindowDataset(index, domain.reader(index), pipeline, seed=0)
    batch = collate([dataset[SampleKey(0, row % len(index))] for row in range(8)])
    normalize = Normalize(spec)
    batch = batch.map_views(normalize.view)
    optimiser = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=2e-3)
    objective.train()
    losses = []
    for step in range(STEPS):
        context = StepContext(step, STEPS, 4, 8)
        loss = objective(batch, context)["loss"]
        optimiser.zero_grad()
        loss.backward()
        objective.before_update(context)
        optimiser.step()
        objective.after_update(context)
        losses.append(loss.item())
    return losses, batch


@pytest.mark.parametrize("bands", [2, 13])
def test_mae_and_dino_train_on_two_and_on_thirteen_channels(write_raster, make_index, bands):
    if bands == 2:
        values = (-15 + scenes(2) / 500).astype(np.float32)
        values[:, :20, :30] = np.nan
    else:
        values = scenes(13)
    path = write_raster("a.tif", values, nodata=np.nan if bands == 2 else 0)
    domain, index, _ = make_index(
        path, sensor="sentinel1" if bands == 2 else "sentinel2-l1c", size=32, band_dropout=0.1
    )
    losses, batch = train(MAE, MAEConfig(norm_pix=False, scale=(0.5, 1.0), **MAE_SMALL), domain, index, SMALL)
    view = batch.views["image"][0]
    assert view.pixels.shape == (8, bands, 32, 32)
    assert view.pixels[view.valid].std() == pytest.approx(1, abs=0.3)
    assert (view.pixels[~view.valid] == 0).all()
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.8 * losses[0]
    config = DINOConfig(local_crops=2, prototypes=64, head_hidden=64, head_bottleneck=32, teacher_temp_warmup=0)
    losses, _ = train(DINO, config, domain, index, SMALL)
    assert np.isfinite(losses).all()


def test_mae_trains_on_satmaes_groups(write_raster, make_index):
    path = write_raster("a.tif", scenes(13), nodata=0)
    domain, index, _ = make_index(path, sensor="sentinel2-l1c", groups="satmae", size=32)
    model = {**SMALL, "position_widths": {"group": 16}}
    losses, batch = train(MAE, MAEConfig(norm_pix=False, scale=(0.5, 1.0), **MAE_SMALL), domain, index, model)
    view = batch.views["image"][0]
    assert view.pixels.shape == (8, 10, 32, 32)
    assert view.mask.shape == (8, 3 * 4 * 4)
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.8 * losses[0]


def test_series_of_three_and_of_seven_dates_share_a_batch(write_raster, make_index, tmp_path):
    for place, dates in (("a", 3), ("b", 7)):
        for date in range(dates):
            write_raster(f"s/{place}_2024{date + 1:02d}15.tif", scenes(2, seed=date)[:, 32:64, 32:64])
    domain, index, _ = make_index(tmp_path / "s", series=True, size=32)
    assert domain.input_spec(index).size == (7, 32, 32)
    losses, batch = train(MAE, MAEConfig(norm_pix=False, **MAE_SMALL), domain, index, {**SMALL, "width": 96})
    view = batch.views["image"][0]
    assert view.pixels.shape == (8, 2, 7, 32, 32)
    assert not view.valid[0, :, 3:].any()
    assert view.valid[0, :, :3].all()
    assert view.valid[1].all()
    assert (view.coords["time"][1].diff() > 27).all()
    assert view.coords["time"][0, 0] == view.coords["time"][1, 0] == 8780  # 2024-01-15
    assert not view.mask.view(8, 7, 16)[0, 3:].any()
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.8 * losses[0]
