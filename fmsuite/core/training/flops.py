"""How many floating-point operations a training step asks for, counted from shapes.

A multiplication and an addition are two operations. Matrix products count and nothing else: norms, softmax, GELU and
the optimiser are below a hundredth of a large model's step. What activation checkpointing or an attention kernel
computes again in the backward pass does not count: utilisation is that of the model's operations (Chowdhery et al.
2022, appendix B).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.backbones.layers import mlp_hidden


@dataclass(frozen=True)
class Flops:
    """Operations of a forward and of a backward pass."""

    forward: float
    backward: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.backward

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, times: float) -> Flops:
        return Flops(self.forward * times, self.backward * times)

    __rmul__ = __mul__

    @property
    def untrained(self) -> Flops:
        """The same without a backward pass: a teacher's."""
        return Flops(self.forward)


NONE = Flops(0.0)


def linear(rows: float, inputs: int, outputs: int, *, first: bool = False) -> Flops:
    """Of rows through a linear map. The backward pass has a product for the weights and one for the inputs.

    Args:
        first: nothing before it is trained, so that there is none for the inputs.
    """
    forward = 2.0 * rows * inputs * outputs
    return Flops(forward, forward * (1 if first else 2))


def attention(queries: float, keys: float, width: int) -> Flops:
    """Logits and weighted means of one sequence, over all heads."""
    forward = 4.0 * queries * keys * width
    return Flops(forward, 2 * forward)


def block(tokens: int, width: int, hidden: int, *, swiglu: bool = False, queries: int | None = None) -> Flops:
    """A transformer block on one sequence.

    Args:
        queries: how many of the tokens are asked for, where not all.
    """
    asked = tokens if queries is None else queries
    mlp = linear(asked, width, (2 if swiglu else 1) * hidden) + linear(asked, hidden, width)
    projections = linear(asked, width, width) + linear(tokens, width, 2 * width) + linear(asked, width, width)
    return projections + attention(asked, tokens, width) + mlp


def encoder(config: ModelConfig, patches: int, values: int) -> Flops:
    """A vision transformer on one view, or on the tokens of it that it sees.

    Drop-path leaves out its share of every branch, which is not counted.

    Args:
        patches: how many tokens it sees.
        values: in a patch.
    """
    size = config.size
    tokens = patches + int(config.cls_token) + config.registers
    hidden = mlp_hidden(size.width, size.mlp_ratio, config.mlp)
    # Of rates that grow linearly from zero the mean is half of the last.
    kept = 1 - config.drop_path * (1.0 if config.drop_path_uniform else 0.5)
    blocks = block(tokens, size.width, hidden, swiglu=config.mlp == "swiglu") * (size.depth * kept)
    return linear(patches, values, size.width, first=True) + blocks


def mae_step(
    config: ModelConfig, patches: int, values: int, *, mask_ratio: float, width: int = 512, depth: int = 8
) -> Flops:
    """MAE on one sample: visible tokens through the encoder, all through the decoder, masked ones through the rest."""
    visible = round(patches * (1 - mask_ratio))
    masked = patches - visible
    shown = visible + int(config.cls_token)
    tokens = patches + int(config.cls_token)
    decoder = linear(shown, config.size.width, width) + block(tokens, width, 4 * width) * (depth - 1)
    last = block(tokens, width, 4 * width, queries=masked) + linear(masked, width, values)
    return encoder(config, visible, values) + decoder + last


@dataclass(frozen=True)
class HeadShape:
    """Of a DINO head: ``layers`` linear maps to the bottleneck, then prototypes."""

    hidden: int = 2048
    bottleneck: int = 256
    layers: int = 3
    prototypes: int = 65536

    def of(self, rows: float, width: int) -> Flops:
        """Rows of ``width`` features through the head."""
        widths = [width, *[self.hidden] * (self.layers - 1), self.bottleneck, self.prototypes]
        return sum((linear(rows, a, b) for a, b in pairwise(widths)), NONE)


def dinov2_step(
    config: ModelConfig,
    values: int,
    *,
    global_patches: int,
    local_patches: int,
    local_crops: int,
    masked: float,
    head: HeadShape,
    patch_head: HeadShape,
) -> Flops:
    """DINOv2 on one sample: the teacher on two global crops, the student on all, class and patch heads of both.

    Args:
        global_patches, local_patches: in a crop.
        masked: tokens of the two global crops together that are masked, in the mean.
    """
    width = config.size.width
    whole = 2 * encoder(config.model_copy(update={"drop_path": 0.0}), global_patches, values).untrained
    student = 2 * encoder(config, global_patches, values) + local_crops * encoder(config, local_patches, values)
    crops = 2 + local_crops
    heads = head.of(crops, width) + head.of(2, width).untrained
    heads += patch_head.of(masked, width) + patch_head.of(masked, width).untrained
    # The cross-entropy of every pair of views is a product of assignments, of which the student's have gradients.
    pairs = 2.0 * 2 * crops * head.prototypes
    return whole + student + heads + Flops(pairs, pairs)
