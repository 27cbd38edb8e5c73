"""CLIP (Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision")."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from fmsuite.core.backbones.base import Backbone
from fmsuite.core.distributed import gather_rows, mean_over
from fmsuite.core.objectives.base import Card, ObjectiveConfig, StepContext, register
from fmsuite.core.objectives.pairs import Paired, PairedConfig, in_chunks, unit

LARGEST_SCALE = 100.0
"""Similarities are multiplied by at most this (section 2.5)."""


class CLIPConfig(PairedConfig):
    """The options of ``PairedConfig``, and:

    Attributes:
        temperature: of the softmax over similarities, at the start; it is trained.
    """

    temperature: float = Field(default=0.07, ge=1 / LARGEST_SCALE)


def clip_loss(
    images: Tensor, partners: Tensor, scale: Tensor, usable: Tensor | None = None, chunk: int | None = None
) -> Tensor:
    """The symmetric cross-entropy over similarities (figure 3), over the pairs of all ranks.

    With unit vectors x and y of N pairs and ``l(i, j) = s x_i . y_j``, the loss is the mean over i of
    ``(log sum_j exp l(i, j) + log sum_j exp l(j, i)) / 2 - l(i, i)``.

    Args:
        images, partners: (B, E), row by row the two sides of a pair; B must be equal on all ranks.
        scale: s, a scalar.
        usable: (B,) bool, pairs that count. ``None`` means all.
        chunk: see ``in_chunks``.

    Returns:
        A scalar; its mean over ranks is the loss of the global batch.
    """
    with torch.autocast(images.device.type, enabled=False):
        x, y = unit(images), unit(partners)
        counts = torch.ones(len(x), dtype=torch.bool, device=x.device) if usable is None else usable
        everywhere = gather_rows(counts.to(torch.float32)) > 0

        def normaliser(rows: Tensor, columns: Tensor) -> Tensor:
            def compare(piece: Tensor, counted: Tensor) -> Tensor:
                # Not minus infinity: a piece without any pair that counts stays finite.
                logits = (scale * rows @ piece.T).masked_fill(~counted, torch.finfo(torch.float32).min)
                return logits.logsumexp(1)

            return in_chunks(compare, gather_rows(columns), everywhere, chunk).logsumexp(1)

        terms = (normaliser(x, y) + normaliser(y, x)) / 2 - scale * (x * y).sum(1)
        return mean_over(terms, counts)


@register
class CLIP(Paired):
    """Find the text (or vector) that belongs to an image among all of the batch, and the image that belongs to it.

    ``loss = clip_loss(image, partner)``; its scale is ``exp`` of a trained number, held at 100 or below and not
    decayed. The encoder is the image's backbone, before the projection.
    """

    name: ClassVar[str] = "clip"
    batch_statistic: ClassVar[str | None] = "negatives"
    Config: ClassVar[type[ObjectiveConfig]] = CLIPConfig
    card: ClassVar[Card] = Card(
        family="pairs",
        paper="Radford et al. 2021, arXiv:2103.00020",
        predicts="which text or vector in the batch belongs to the image, and the other way round",
        masks="nothing",
        checked="brute-force loss and gradients, whole and in chunks; two ranks against one",
    )
    config: CLIPConfig

    def __init__(self, config: CLIPConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(config.temperature)))

    def compare(self, images: Tensor, partners: Tensor, usable: Tensor) -> Tensor:
        return clip_loss(images, partners, self.log_scale.exp(), usable, self.config.chunk)

    @torch.no_grad()
    def after_update(self, context: StepContext) -> None:
        """Hold the scale at 100 or below."""
        self.log_scale.clamp_(max=math.log(LARGEST_SCALE))
