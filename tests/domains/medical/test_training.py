"""Volumes through the whole path: window, views, batch, normalisation, objective."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fmsuite.commands.indexing import build_index
from fmsuite.core.backbones.build import build_backbone
from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.data.loader import SampleStream
from fmsuite.core.data.pipeline import ViewPipeline, WindowDataset, collate
from fmsuite.core.data.sample import Batch
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.inputs import InputSpec, Normalize
from fmsuite.core.objectives.base import Objective, StepContext
from fmsuite.core.objectives.dino import DINO
from fmsuite.core.objectives.mae import MAE
from fmsuite.domains.medical import MedicalDomain, MedicalOptions

BATCH = 8
MODEL = ModelConfig(name="vit_tiny", patch_size=8, width=48, depth=2, heads=2, positions="sincos")


@pytest.fixture
def prepared(save):
    """A domain, and an index with a volume smaller than a window, one larger, and one of thick slices."""
    random = np.random.default_rng(0)
    files = []
    for number, (shape, sizes) in enumerate(
        [((14, 20, 16), (1, 1, 1)), ((30, 28, 26), (1, 1, 1)), ((24, 24, 8), (1, 1, 3))]
    ):
        grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1)
        values = 100 + 40 * np.sin(grid @ random.normal(0, 0.3, 3)) + random.normal(0, 4, shape)
        files.append(save(f"{number}.nii.gz", values.astype(np.float32), np.diag([*sizes, 1.0])))
    domain = MedicalDomain(MedicalOptions(size=16))
    return domain, build_index(domain, files, SkippedLog())


def batches(domain: MedicalDomain, index, objective: Objective, steps: int, repeat: bool) -> list[Batch]:
    spec = domain.input_spec(index)
    pipeline = ViewPipeline(
        objective.view_requests(), domain.augmentation(spec), objective.backbone.grid, spec.axes, seed=0
    )
    dataset = WindowDataset(index, domain.reader(index), pipeline, seed=0)
    stream = SampleStream(len(index), BATCH, seed=0)
    made = [collate([dataset[key] for key in stream.keys(step)]) for step in range(1 if repeat else steps)]
    return made * steps if repeat else made


def train(objective: Objective, spec: InputSpec, made: list[Batch]) -> list[float]:
    normalise = Normalize(spec)
    optimiser = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    objective.train()
    for step, batch in enumerate(made):
        context = StepContext(step, len(made), len(made), BATCH)
        ready = batch.map_views(normalise.view)
        loss = objective(ready, context)["loss"]
        optimiser.zero_grad()
        loss.backward()
        objective.before_update(context)
        optimiser.step()
        objective.after_update(context)
        losses.append(loss.item())
    return losses


def test_mae_learns_on_3d_windows_with_padding(prepared) -> None:
    domain, index = prepared
    spec = domain.input_spec(index)
    torch.manual_seed(0)
    backbone = build_backbone(MODEL, spec)
    config = MAE.Config(
        decoder_width=48, decoder_depth=1, decoder_heads=2, mask_ratio=0.5, norm_pix=False, scale=(1.0, 1.0)
    )
    objective = MAE(config, backbone)
    made = batches(domain, index, objective, 40, repeat=True)
    assert any(view.valid is not None and not view.valid.all() for view in next(iter(made[0].views.values())))
    losses = train(objective, spec, made)
    assert np.isfinite(losses).all()
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_dino_runs_on_3d_windows_of_two_sizes(prepared) -> None:
    domain, index = prepared
    spec = domain.input_spec(index)
    torch.manual_seed(0)
    backbone = build_backbone(MODEL, spec)
    objective = DINO(DINO.Config(prototypes=64, head_hidden=64, head_bottleneck=32, local_crops=2), backbone)
    made = batches(domain, index, objective, 3, repeat=False)
    assert {tuple(view.pixels.shape[2:]) for group in made[0].views.values() for view in group} == {(16,) * 3, (8,) * 3}
    before = [parameter.detach().clone() for parameter in objective.backbone.parameters()]
    losses = train(objective, spec, made)
    assert np.isfinite(losses).all()
    assert min(losses) > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, objective.backbone.parameters()))
