"""The loop with the real transformer and a real objective."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fmsuite.core.backbones.build import build_backbone
from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.config import RunConfig
from fmsuite.core.data.sample import Batch, MaskContext, SampleKey, View
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.inputs import InputSpec, rgb_channels
from fmsuite.core.objectives.mae import MAE, MAEConfig
from fmsuite.core.seeding import generator
from fmsuite.core.training.loop import RunFolder, TrainResult, train
from fmsuite.core.training.metrics import read_metrics
from fmsuite.core.training.monitor import ProbeSet
from tests.core.training.helpers import final_state, make_config

SPEC = InputSpec(axes=("y", "x"), size=(16, 16), channels=rgb_channels(), scale=1 / 255)
MODEL = ModelConfig(name="vit_tiny", width=24, depth=2, heads=2, patch_size=4, layer_scale=0.5, drop_path=0.3)
OPTIONS = MAEConfig(decoder_width=16, decoder_depth=1, decoder_heads=2, norm_pix=False)


def make_batch(objective: MAE, step: int, size: int = 8) -> Batch:
    """Smooth images of one colour each, with the masks that the objective asks for."""
    request = objective.view_requests()[0]
    assert request.mask is not None
    assert objective.backbone.grid is not None
    shape = objective.backbone.grid.shape(request.size)
    pixels, masks = [], []
    for row in range(size):
        rng = generator("real", step, row)
        pixels.append(np.clip(rng.uniform(0, 255, (3, 1, 1)) + rng.normal(0, 5, (3, 16, 16)), 0, 255).astype(np.uint8))
        key = SampleKey(0, row, step, row, size)
        masks.append(request.mask(MaskContext(("y", "x"), shape, np.ones(np.prod(shape), bool), rng, key)))
    keys = torch.arange(size) + step * size
    view = View(torch.from_numpy(np.stack(pixels)), mask=torch.from_numpy(np.stack(masks)), keys=keys)
    return Batch({request.name: [view]}, torch.arange(size), torch.arange(size) % 2)


def run(folder: Path, total: int, stop: int = -1, resume: bool = False, **training: object) -> TrainResult:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        objective = MAE(OPTIONS, build_backbone(MODEL, SPEC))
    base = make_config(total, optim={"lr": 1e-2}, monitor={"every": 5, "knn_k": 3}, **training)
    config: RunConfig = base.model_copy(update={"model": MODEL, "objective": "mae", "objective_options": OPTIONS})

    def loader(start: int) -> Iterator[Batch]:
        for step in range(start, total):
            if step == stop:
                raise KeyboardInterrupt
            yield make_batch(objective, step)

    probe = ProbeSet.collect([make_batch(objective, 10**6)], "image", lambda row: f"slide{row // 4}", 8)
    return train(
        objective,
        loader,
        config,
        SPEC,
        RunFolder(folder),
        total_steps=total,
        steps_per_epoch=5,
        skipped=SkippedLog(),
        probe=probe,
        resume=resume,
    )


def test_a_masked_autoencoder_learns_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    run(tmp_path / "whole", 60)
    losses = [line["loss"] for line in read_metrics(tmp_path / "whole" / "metrics.jsonl") if "loss" in line]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", 60, stop=43)
    run(tmp_path / "parts", 60, resume=True)
    whole, parts = final_state(tmp_path / "whole", 60), final_state(tmp_path / "parts", 60)
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        assert torch.equal(parts[name], value), name


def test_recomputing_activations_changes_no_number(tmp_path: Path) -> None:
    run(tmp_path / "stored", 6)
    run(tmp_path / "recomputed", 6, activation_checkpointing=True)
    stored, recomputed = final_state(tmp_path / "stored", 6), final_state(tmp_path / "recomputed", 6)
    for name, value in stored.items():
        torch.testing.assert_close(recomputed[name], value, rtol=1e-4, atol=1e-6, msg=name)
