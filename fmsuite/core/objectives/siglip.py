"""SigLIP (Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training")."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from fmsuite.core.backbones.base import Backbone
from fmsuite.core.distributed import gather_rows, mean_over
from fmsuite.core.objectives.base import Card, ObjectiveConfig, Share, register
from fmsuite.core.objectives.pairs import Paired, PairedConfig, in_chunks, unit


class SigLIPConfig(PairedConfig):
    """The options of ``PairedConfig``, and:

    Attributes:
        temperature: similarities are divided by it, at the start; it is trained.
        bias_start: what is added to them at the start, so that few pairs seem to match; it is trained.
    """

    scale: Share = (1.0, 1.0)
    embedding: int = Field(default=768, ge=1)
    text_width: int = Field(default=768, ge=1)
    text_heads: int = Field(default=12, ge=1)
    text_causal: bool = False
    temperature: float = Field(default=0.1, gt=0)
    bias_start: float = -10.0


def siglip_loss(
    images: Tensor,
    partners: Tensor,
    scale: Tensor,
    bias: Tensor,
    usable: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """The sigmoid loss of every pair (section 3.2), over the pairs of all ranks.

    With unit vectors x and y of N pairs and ``l(i, j) = t x_i . y_j + b``, the loss is
    ``-1/N sum_ij log sigmoid(z_ij l(i, j))`` where z is 1 for i = j and -1 otherwise: as
    ``-log sigmoid(l) = softplus(l) - l``, it is the mean over i of ``sum_j softplus(l(i, j)) - l(i, i)``.

    Args:
        images, partners: (B, E), row by row the two sides of a pair; B must be equal on all ranks.
        scale, bias: t and b, scalars.
        usable: (B,) bool, pairs that count. ``None`` means all.
        chunk: see ``in_chunks``.

    Returns:
        A scalar; its mean over ranks is the loss of the global batch.
    """
    with torch.autocast(images.device.type, enabled=False):
        x, y = unit(images), unit(partners)
        counts = torch.ones(len(x), dtype=torch.bool, device=x.device) if usable is None else usable
        everywhere = gather_rows(counts.to(torch.float32)) > 0

        def compare(piece: Tensor, counted: Tensor) -> Tensor:
            return torch.where(counted, functional.softplus(scale * x @ piece.T + bias), 0.0).sum(1)

        others = in_chunks(compare, gather_rows(y), everywhere, chunk).sum(1)
        terms = others - (scale * (x * y).sum(1) + bias)
        return mean_over(terms, counts)


@register
class SigLIP(Paired):
    """Tell of every image and every text (or vector) of the batch whether they belong together.

    ``loss = siglip_loss(image, partner)`` with ``t = exp(t')``; t' and the bias are trained and not decayed. No softmax
    goes over the batch, so it serves small batches too. The encoder is the image's backbone, before the projection.
    """

    name: ClassVar[str] = "siglip"
    batch_statistic: ClassVar[str | None] = "negatives"
    Config: ClassVar[type[ObjectiveConfig]] = SigLIPConfig
    card: ClassVar[Card] = Card(
        family="pairs",
        paper="Zhai et al. 2023, arXiv:2303.15343",
        predicts="of every image and every text or vector in the batch whether they belong together",
        masks="nothing",
        checked="brute-force loss and gradients, whole and in chunks; two ranks against one",
    )
    config: SigLIPConfig

    def __init__(self, config: SigLIPConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(config.temperature)))
        self.bias = nn.Parameter(torch.tensor(config.bias_start))

    def compare(self, images: Tensor, partners: Tensor, usable: Tensor) -> Tensor:
        return siglip_loss(images, partners, self.log_scale.exp(), self.bias, usable, self.config.chunk)
