"""Crops of another ground sampling distance: positions in lengths follow them, in encoders, decoders and predictors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fmsuite.core.backbones import positions, vit
from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.backbones.vit import VisionTransformer
from fmsuite.core.data.pipeline import Item, NoAugmentation, ViewPipeline, collate
from fmsuite.core.data.sample import ArraySample, SampleKey
from fmsuite.core.inputs import Channel, InputSpec
from fmsuite.core.objectives import decoders, predictor
from fmsuite.core.objectives.base import find_objective
from fmsuite.core.tokens import TokenLayout

METRES = (10.0, 20.0)
"""Of a pixel of the window, along y and x."""
SIZE, PATCH = 16, 4


def made(toys, name, **options):
    channels = tuple(Channel(name=f"c{number}", group="ab"[number // 2]) for number in range(4))
    if name != "multimae":
        channels = tuple(channel.model_copy(update={"group": None}) for channel in channels)
    spec = InputSpec(axes=("y", "x"), size=(SIZE, SIZE), channels=channels, spacing=METRES, spacing_unit="m")
    shape = {"width": 24, "depth": 2, "heads": 2, "patch_size": PATCH, "positions": "sincos"}
    torch.manual_seed(0)
    backbone = VisionTransformer(ModelConfig(**shape, position_units="physical", position_scale=10.0), spec)
    cls = find_objective(name)
    return cls(cls.Config(**{**toys.small[name], **options}), backbone)


def cropped(objective, samples=3):
    """A batch as the loader makes it, from windows of 24 x 32 pixels."""
    pipeline = ViewPipeline(objective.view_requests(), NoAugmentation(), objective.backbone.grid, ("y", "x"), seed=1)
    values = np.random.default_rng(0).normal(size=(samples, 4, 24, 32)).astype(np.float32)
    items = [
        Item(pipeline(ArraySample(each, spacing=METRES), SampleKey(0, row)), row, -1) for row, each in enumerate(values)
    ]
    return collate(items)


def expected_code(view, steps, side, width):
    """The code of tokens ``steps`` patches from a crop's corner, in metres by the box that was cut.

    Args:
        steps: (N, 2) or (B, N, 2).
        side: of the crop in patches.
    """
    field = view.box[:, 1] * torch.tensor([24 * METRES[0], 32 * METRES[1]])
    metres = steps * (field / side)[:, None]
    return positions.sincos_positions(TokenLayout(("y", "x"), metres / 10.0), width)


def watched(monkeypatch, module):
    """Layouts and position codes that a module asks for."""
    seen = []
    plain = positions.sincos_positions

    def call(layout, width, **given):
        seen.append((layout, plain(layout, width, **given)))
        return seen[-1][1]

    monkeypatch.setattr(module, "sincos_positions", call)
    return seen


@pytest.mark.parametrize(
    ("name", "module", "part"),
    [
        ("mae", decoders, "decoder"),
        ("hi_end_mae", decoders, "decoder"),
        ("crossmae", decoders, "decoder"),
        ("fg_mae", decoders, "decoder"),
        ("multimae", decoders, "decoder"),
        ("ijepa", predictor, "predictor"),
    ],
)
def test_decoders_and_predictors_stand_where_the_crop_was(toys, name, module, part, monkeypatch, context):
    units = {f"{part}_position_units": "physical", f"{part}_position_scale": 10.0}
    objective = made(toys, name, scale=(0.2, 0.9), **units)
    batch = cropped(objective)
    view = batch.views["image"][0]
    assert len({round(side, 3) for side in view.spacing[:, 0].tolist()}) == 3
    seen = watched(monkeypatch, module)
    objective(batch, context)
    layout, code = seen[0]
    expected = expected_code(view, layout.coords, SIZE // PATCH, code.shape[-1])
    torch.testing.assert_close(code, expected, atol=1e-4, rtol=1e-4)
    other = replace(view, box=view.box * 0.9)
    assert not torch.allclose(code, expected_code(other, layout.coords, SIZE // PATCH, code.shape[-1]), atol=1e-2)


def test_an_encoder_is_told_the_spacing_of_each_crop(toys, monkeypatch, context):
    objective = made(toys, "dino", local_size=8, local_scale=(0.05, 0.2), global_scale=(0.6, 1.0))
    batch = cropped(objective)
    seen = watched(monkeypatch, vit)
    objective(batch, context)
    for key, side in (("global", SIZE // PATCH), ("local", 2)):
        view = batch.views[key][0]
        steps = torch.cartesian_prod(torch.arange(side), torch.arange(side))
        expected = expected_code(view, steps, side, 24)
        codes = [code[:3] for _, code in seen if code.shape[1] == len(steps)]
        assert any(torch.allclose(code, expected, atol=1e-4) for code in codes), key
    # The same pixels at another spacing are another place.
    view = batch.views["global"][0]
    coarser = replace(view, spacing=2 * view.spacing)
    assert not torch.allclose(objective.backbone(view).patches, objective.backbone(coarser).patches)
