"""Objectives on Swin UNETR's encoder: those that fit train, the others refuse it by name."""

from __future__ import annotations

import pytest
import torch

from fmsuite.core.backbones.build import build_backbone
from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.inputs import Channel, InputSpec
from fmsuite.core.objectives.base import OBJECTIVES, find_objective
from fmsuite.errors import UsageError

NAMES = sorted(name for name, cls in OBJECTIVES.items() if cls.__module__.startswith("fmsuite."))
DROPS = ("capi", "crossmae", "dmae", "fg_mae", "hi_end_mae", "ijepa", "mae", "msn", "pmsn")
"""Objectives whose networks run on some of the tokens."""
REFUSES = {name: f"'{name}' does not work with this SwinUNETR, which cannot drop tokens" for name in DROPS}
REFUSES["multimae"] = "'multimae' predicts one channel group from another, and this input has a single one"
REFUSES["vjepa"] = "'vjepa' repeats its masks over a time or z axis"
OPTIONS = {"simmim": {"mask_unit": 32}}
"""Where the small options are for smaller patches."""


@pytest.fixture
def plane(toys, monkeypatch):
    """A kind of input of 128 x 128 pixels, 4 x 4 tokens of the backbone."""
    toy = type(toys.toys["rgb"])(InputSpec(axes=("y", "x"), size=(128, 128), channels=(Channel(name="a"),)), 32)
    monkeypatch.setitem(toys.toys, "plane", toy)
    return toy.spec


@pytest.mark.parametrize("name", NAMES)
def test_an_objective_trains_on_it_or_refuses_it_by_name(toys, plane, name, context):
    torch.manual_seed(0)
    backbone = build_backbone(ModelConfig(name="swin_unetr", width=96, heads=1), plane)
    cls = find_objective(name)
    config = cls.Config(**{**toys.small[name], **OPTIONS.get(name, {})})
    if name in REFUSES:
        with pytest.raises(UsageError, match=REFUSES[name]):
            cls(config, backbone)
        return
    objective = cls(config, backbone)
    objective(toys.batch(objective, "plane", batch=2), context)["loss"].backward()
    trained = {key: p for key, p in objective.named_parameters() if p.requires_grad}
    idle = {key for key, p in trained.items() if p.grad is None or not p.grad.isfinite().all()}
    assert idle <= {"backbone.mask_token"}
