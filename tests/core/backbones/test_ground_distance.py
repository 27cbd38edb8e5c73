"""Positions that know the ground distance, against Scale-MAE's formula (Reed et al. 2023, arXiv 2212.14532, eq. 2)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.backbones.vit import VisionTransformer
from fmsuite.core.data.pipeline import Item, NoAugmentation, ViewPipeline, collate
from fmsuite.core.data.sample import ArraySample, SampleKey, View, ViewRequest
from fmsuite.core.encoders import Encoder
from fmsuite.core.inputs import Channel, InputSpec
from fmsuite.core.objectives.mae import MAE, MAEConfig
from fmsuite.errors import UsageError

WIDTH, PATCH, REFERENCE = 32, 4, 10.0
"""The reference is G of the formula, in metres a pixel."""


def spec_of(spacing: tuple[float, float] | None) -> InputSpec:
    return InputSpec(axes=("y", "x"), size=(16, 16), channels=(Channel(name="a"),), spacing=spacing, spacing_unit="m")


def vit(spacing: tuple[float, float] | None) -> VisionTransformer:
    torch.manual_seed(0)
    config = ModelConfig(
        width=WIDTH,
        depth=1,
        heads=2,
        patch_size=PATCH,
        positions="sincos",
        position_units="physical",
        position_scale=PATCH * REFERENCE,
    )
    return VisionTransformer(config, spec_of(spacing)).eval()


def scale_mae(rows: int, columns: int, gsd: tuple[float, float]) -> torch.Tensor:
    """(N, WIDTH): for x, then for y, sin((g / G) pos / 10000^(2i / D)) for all i, then the cosines; D = WIDTH / 2."""
    table = torch.zeros(rows * columns, WIDTH, dtype=torch.float64)
    half = WIDTH // 2
    for row in range(rows):
        for column in range(columns):
            for part, (place, g) in enumerate(((column, gsd[1]), (row, gsd[0]))):
                for i in range(half // 2):
                    angle = g / REFERENCE * place / 10_000 ** (2 * i / half)
                    table[row * columns + column, part * half + i] = math.sin(angle)
                    table[row * columns + column, part * half + half // 2 + i] = math.cos(angle)
    return table.float()


def views_of(model: VisionTransformer, samples: list[ArraySample], **options: object) -> View:
    request = ViewRequest("image", (16, 16), **options)  # type: ignore[arg-type]
    pipeline = ViewPipeline((request,), NoAugmentation(), model.grid, model.spec.axes, seed=3)
    items = [Item(pipeline(sample, SampleKey(0, n)), n, -1) for n, sample in enumerate(samples)]
    (view,) = collate(items).views["image"]
    return view


def test_positions_of_cropped_and_resized_views_are_scale_maes():
    model = vit((10.0, 10.0))
    random = np.random.default_rng(0)
    given = [(10.0, 10.0), (2.5, 2.5), (30.0, 20.0)]
    samples = [ArraySample(random.random((1, 40, 40), np.float32), spacing=spacing) for spacing in given]
    view = views_of(model, samples, scale=(0.1, 0.6))
    # What a pixel of the view measures: the box that was cut, in metres, over its new size.
    extent = view.box[:, 1] * 40
    gsd = torch.tensor(given) * extent / 16
    assert float((gsd / torch.tensor(given) - 1).abs().min()) > 0.05
    torch.testing.assert_close(view.spacing, gsd, rtol=1e-5, atol=1e-5)
    found, _ = model._positions(model.layout(view))
    for row in range(3):
        expected = scale_mae(4, 4, (float(gsd[row, 0]), float(gsd[row, 1])))
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=0)
    # At the reference it is MAE's table.
    whole = views_of(model, [ArraySample(samples[0].values[:, :16, :16], spacing=(10.0, 10.0))])
    torch.testing.assert_close(
        model._positions(model.layout(whole))[0][0], scale_mae(4, 4, (10.0, 10.0)), atol=1e-6, rtol=0
    )


def test_an_index_of_several_ground_distances_trains_and_embeds():
    model = vit(None)
    options = {"decoder_width": 24, "decoder_depth": 1, "decoder_heads": 2}
    physical = {"decoder_position_units": "physical", "decoder_position_scale": PATCH * REFERENCE}
    objective = MAE(MAEConfig(**options, **physical), model)
    assert objective.view_requests()
    pixels = torch.rand(2, 1, 16, 16)
    encoder = Encoder(model, model.spec, "mean", {})
    near = View(pixels, spacing=torch.tensor([[10.0, 10.0]] * 2))
    far = View(pixels, spacing=torch.tensor([[10.0, 10.0], [30.0, 30.0]]))
    alike = torch.isclose(encoder.embed(near), encoder.embed(far), atol=1e-6).all(1)
    assert alike.tolist() == [True, False]
    with pytest.raises(UsageError, match="spacing is unknown"):
        encoder.embed(pixels)
    unknown = model.spec.model_copy(update={"spacing_unit": "px"})
    with pytest.raises(UsageError, match="spacing is unknown"):
        MAE(MAEConfig(**options, **physical), VisionTransformer(model.config, unknown))


def test_other_spacings_are_refused_where_positions_count_patches_alone():
    physical = Encoder(vit((10.0, 10.0)), spec_of((10.0, 10.0)), "mean", {})
    physical.check_input(spec_of((30.0, 30.0)))
    config = ModelConfig(width=24, depth=1, heads=2, patch_size=4, positions="sincos")
    counted = Encoder(VisionTransformer(config, spec_of((10.0, 10.0))), spec_of((10.0, 10.0)), "mean", {})
    with pytest.raises(UsageError, match="spacing"):
        counted.check_input(spec_of((30.0, 30.0)))
