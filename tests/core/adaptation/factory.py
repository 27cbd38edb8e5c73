"""A small transformer, its answer to fixed pixels, and adapters with some values."""

from __future__ import annotations

import torch

from fmsuite.core.adaptation.adapters import adapter_state
from fmsuite.core.adaptation.lora import lora_state
from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.backbones.vit import VisionTransformer
from fmsuite.core.data.sample import View
from fmsuite.core.inputs import Channel, InputSpec

SPEC = InputSpec(axes=("y", "x"), size=(8, 8), channels=(Channel(name="grey"),))


def small(seed: int = 0, **options) -> VisionTransformer:
    torch.manual_seed(seed)
    shape = {"width": 24, "depth": 2, "heads": 2, "patch_size": 4, "layer_scale": 0.5}
    return VisionTransformer(ModelConfig(**{**shape, **options}), SPEC).eval()


def out(backbone: VisionTransformer) -> torch.Tensor:
    pixels = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    return backbone(View(pixels)).sequence


def shake(backbone: VisionTransformer) -> None:
    """Give every adapter some values."""
    torch.manual_seed(9)
    for tensor in (*lora_state(backbone).values(), *adapter_state(backbone).values()):
        tensor.normal_(std=0.3)
