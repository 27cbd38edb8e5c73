"""Pretraining finds structure that was planted, and a probe without an answer finds nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fmsuite.core.backbones.build import build_backbone
from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.config import RunConfig
from fmsuite.core.data.index import SampleIndex, Window
from fmsuite.core.data.loader import SampleStream, make_loader
from fmsuite.core.data.pipeline import IMAGE, NoAugmentation, ViewPipeline, WindowDataset, plain_views
from fmsuite.core.data.sample import ArraySample
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.encoders import Encoder
from fmsuite.core.evaluation.knn import knn_predict
from fmsuite.core.evaluation.metrics import balanced_accuracy
from fmsuite.core.inputs import Channel, InputSpec
from fmsuite.core.objectives.mae import MAE, MAEConfig
from fmsuite.core.training.config import MonitorConfig, OptimConfig, TrainingConfig
from fmsuite.core.training.loop import RunFolder, train
from fmsuite.domains.base import DomainOptions

SIDE, CLASSES, WINDOWS, STEPS = 16, 4, 600, 240
MARGIN = 0.15
"""In balanced accuracy, where chance is 0.25. Seeds 0 to 2 gained 0.28 to 0.32."""
SPEC = InputSpec(
    axes=("y", "x"), size=(SIDE, SIDE), channels=(Channel(name="grey", mean=0.5, std=0.25),), scale=1 / 255
)


class Stripes:
    """A reader of pictures that exist only as numbers: window ``n`` shows stripes in one of four directions.

    Phase, period, contrast, brightness and noise are random in every window, so that only the direction tells classes
    apart, and no pixel does on average.
    """

    def read(self, window: Window) -> ArraySample:
        number = int(window.source)
        random = np.random.default_rng(number)
        angle = np.pi * (number % CLASSES) / CLASSES
        y, x = np.mgrid[:SIDE, :SIDE]
        along = np.cos(angle) * x + np.sin(angle) * y
        wave = np.sin(2 * np.pi * (along / random.uniform(4.5, 6.5) + random.random()))
        values = random.uniform(100, 155) + random.uniform(30, 60) * wave + random.normal(0, 10, wave.shape)
        return ArraySample(np.clip(values, 0, 255).astype(np.uint8)[None])


def probe(encoder: Encoder, index: SampleIndex, labels: torch.Tensor) -> float:
    """Balanced accuracy of a 10-NN of embeddings: the first two thirds vote on the rest."""
    batches = plain_views(index, Stripes(), SPEC, range(len(index)), SIDE, 100)
    features = torch.cat([encoder.embed(batch.views[IMAGE][0]) for batch in batches])
    # Standardised, so that no single direction of large variance (brightness) decides what is near.
    features = (features - features.mean(0)) / features.std(0).clamp(min=1e-6)
    cut = len(index) * 2 // 3
    predicted = knn_predict(features[:cut], labels[:cut], features[cut:], k=10)
    return balanced_accuracy(predicted, labels[cut:])


def make_run_config(seed: int) -> RunConfig:
    objective = MAEConfig(
        mask_ratio=0.5, decoder_width=48, decoder_depth=1, decoder_heads=2, scale=(0.6, 1.0), augment="none"
    )
    return RunConfig(
        recipe="stripes",
        domain="stripes",
        seed=seed,
        data=DomainOptions(),
        model=ModelConfig(name="vit_tiny", width=48, depth=2, heads=3, patch_size=4, positions="sincos"),
        objective="mae",
        objective_options=objective,
        optim=OptimConfig(lr=4e-3, warmup=30, betas=(0.9, 0.95)),
        training=TrainingConfig(steps=STEPS, batch_size=32, device="cpu", workers=0, checkpoint_every=STEPS),
        monitor=MonitorConfig(every=0),
    )


@pytest.mark.slow
def test_mae_makes_planted_structure_separable_and_invents_none(tmp_path: Path) -> None:
    index = SampleIndex.from_windows(
        Window(str(number), str(number), (0.0, 0.0), (float(SIDE), float(SIDE)), label=f"direction {number % CLASSES}")
        for number in range(WINDOWS)
    )
    labels = torch.tensor([index.label_code(row) for row in range(WINDOWS)])
    shuffled = labels[torch.randperm(WINDOWS, generator=torch.Generator().manual_seed(1))]
    config = make_run_config(seed=0)
    torch.manual_seed(0)
    objective = MAE(config.objective_options, build_backbone(config.model, SPEC))
    encoder = Encoder(build_backbone(config.model, SPEC), SPEC, "cls", {})
    encoder.backbone.load_state_dict(objective.backbone.state_dict())
    untrained = probe(encoder, index, labels)

    pipeline = ViewPipeline(
        objective.view_requests(), NoAugmentation(), objective.backbone.grid, SPEC.axes, config.seed
    )
    dataset = WindowDataset(index, Stripes(), pipeline, config.seed)
    stream = SampleStream(WINDOWS, config.training.batch_size, config.seed)
    train(
        objective,
        lambda start: make_loader(dataset, stream, start, STEPS, 0),
        config,
        SPEC,
        RunFolder(tmp_path),
        total_steps=STEPS,
        steps_per_epoch=stream.steps_per_epoch,
        skipped=SkippedLog(),
    )
    encoder.backbone.load_state_dict(objective.encoder.state_dict())
    trained = probe(encoder, index, labels)
    assert trained > untrained + MARGIN, (untrained, trained)
    assert abs(probe(encoder, index, shuffled) - 1 / CLASSES) < 0.1
