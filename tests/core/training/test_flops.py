"""Operations counted from shapes are those that PyTorch counts while it runs."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fmsuite.core.backbones.config import VIT_SIZES, ModelConfig
from fmsuite.core.backbones.vit import VisionTransformer
from fmsuite.core.data.sample import Batch, View
from fmsuite.core.inputs import InputSpec, rgb_channels
from fmsuite.core.objectives.base import Objective, StepContext
from fmsuite.core.objectives.dinov2 import DINOv2, DINOv2Config
from fmsuite.core.objectives.mae import MAE, MAEConfig
from fmsuite.core.training.flops import Flops, HeadShape, dinov2_step, encoder, mae_step

SPEC = InputSpec(axes=("y", "x"), size=(32, 32), channels=rgb_channels())
CONTEXT = StepContext(5, 10, 2, 2)
BATCH = 2


def _counted(objective: Objective, batch: Batch) -> Flops:
    """Attention by plain products: a fused kernel computes some of them twice."""
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            loss = objective.train()(batch, CONTEXT)["loss"]
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    return Flops(forward.get_total_flops(), backward.get_total_flops())


def _agree(counted: Flops, expected: Flops) -> None:
    assert counted.forward == pytest.approx(BATCH * expected.forward, rel=1e-9)
    assert counted.backward == pytest.approx(BATCH * expected.backward, rel=1e-9)


@pytest.mark.parametrize(
    "changes", [{}, {"mlp": "swiglu", "registers": 2, "cls_token": False}, {"positions": "rotary", "heads": 2}]
)
def test_mae_step(changes: dict) -> None:
    shape = {"width": 48, "depth": 3, "heads": 3, "patch_size": 8, "positions": "sincos"}
    config = ModelConfig.model_validate({**shape, **changes})
    options = MAEConfig(decoder_width=32, decoder_depth=2, decoder_heads=2)
    mask = torch.rand(BATCH, 16).argsort(1) >= 4
    view = View(torch.randn(BATCH, 3, 32, 32), mask=mask)
    counted = _counted(MAE(options, VisionTransformer(config, SPEC)), Batch({"image": [view]}, *2 * [torch.arange(2)]))
    _agree(counted, mae_step(config, 16, 192, mask_ratio=0.75, width=32, depth=2))


def test_dinov2_step() -> None:
    config = ModelConfig(width=48, depth=3, heads=3, patch_size=8, registers=1)
    shape = {"hidden": 40, "bottleneck": 16, "layers": 3}
    options = DINOv2Config(
        prototypes=64,
        patch_prototypes=96,
        patch_head="separate",
        head_hidden=40,
        head_bottleneck=16,
        local_crops=3,
        local_size=16,
        koleo_weight=0,
        centering="sinkhorn",
    )
    masks = [torch.arange(16).expand(BATCH, -1) < number for number in (5, 0)]
    views = {
        "global": [View(torch.randn(BATCH, 3, 32, 32), mask=masks[0])],
        "global_second": [View(torch.randn(BATCH, 3, 32, 32), mask=masks[1])],
        "local": [View(torch.randn(BATCH, 3, 16, 16)) for _ in range(3)],
    }
    objective = DINOv2(options, VisionTransformer(config, SPEC))
    expected = dinov2_step(
        config,
        192,
        global_patches=16,
        local_patches=4,
        local_crops=3,
        masked=5,
        head=HeadShape(prototypes=64, **shape),
        patch_head=HeadShape(prototypes=96, **shape),
    )
    _agree(_counted(objective, Batch(views, *2 * [torch.arange(2)])), expected)


def test_drop_path_is_not_counted_and_published_sizes_are_right() -> None:
    plain = ModelConfig(name="vit_large", patch_size=16)
    # 61.6 GFLOP multiply-adds times two at 224 px (Dosovitskiy et al. 2021; timm's table says 61.60).
    assert encoder(plain, 196, 768).forward / 2e9 == pytest.approx(61.6, rel=0.01)
    dropped = encoder(plain.model_copy(update={"drop_path": 0.4, "drop_path_uniform": True}), 196, 768)
    embedding = 2.0 * 196 * 768 * VIT_SIZES["vit_large"].width
    assert dropped.forward - embedding == pytest.approx(0.6 * (encoder(plain, 196, 768).forward - embedding))
