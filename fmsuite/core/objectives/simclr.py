"""SimCLR (Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual Representations")."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from fmsuite.core.backbones.base import Backbone
from fmsuite.core.distributed import gather_rows, mean_over, rank
from fmsuite.core.objectives.base import Card, ObjectiveConfig, Share, register
from fmsuite.core.objectives.heads import projector
from fmsuite.core.objectives.two_views import TwoViews, TwoViewsConfig


class SimCLRConfig(TwoViewsConfig):
    """The options of ``TwoViewsConfig``, and:

    Attributes:
        temperature: of the softmax over similarities.
        head_hidden, head_out, head_layers: shape of the projection head.
    """

    scale: Share = (0.08, 1.0)
    temperature: float = Field(default=0.1, gt=0)
    head_hidden: int = Field(default=2048, ge=1)
    head_out: int = Field(default=128, ge=1)
    head_layers: int = Field(default=2, ge=1)


def nt_xent(first: Tensor, second: Tensor, temperature: float, usable: Tensor | None = None) -> Tensor:
    """The normalised temperature-scaled cross-entropy (Chen et al. 2020, equation 1), over the views of all ranks.

    With unit vectors z of 2N views, ``l(i, j) = -log(exp(z_i . z_j / T) / sum over k != i of exp(z_i . z_k / T))``
    where j is the other view of i's sample; the loss is the mean over all i.

    Args:
        first, second: (B, D), row by row the views of one sample; B must be equal on all ranks.
        usable: (B,) bool, samples that count as positives and as negatives. ``None`` means all.

    Returns:
        A scalar; its mean over ranks is the loss of the global batch.
    """
    with torch.autocast(first.device.type, enabled=False):
        mine = functional.normalize(torch.cat([first, second]).to(torch.float32), dim=1)
        size = len(first)
        views = gather_rows(mine)
        counts = torch.ones(size, dtype=torch.bool, device=mine.device) if usable is None else usable
        here = torch.cat([counts, counts])
        everywhere = gather_rows(here.to(torch.float32)) > 0
        similarity = mine @ views.T / temperature
        own = torch.arange(2 * size, device=mine.device)
        offset = 2 * size * rank()
        excluded = (~everywhere)[None].repeat(2 * size, 1)
        excluded[own, own + offset] = True
        partner = own.roll(size) + offset
        # An unusable row's own partner stays in its sum, so that the row is finite before it is left out.
        excluded[own, partner] = False
        entropy = functional.cross_entropy(similarity.masked_fill(excluded, -torch.inf), partner, reduction="none")
        return mean_over(entropy, here)


@register
class SimCLR(TwoViews):
    """Find the other view of a sample among all views of the batch.

    A perceptron with ReLU maps the pooled features h to z (section 2.1); ``loss = nt_xent(z_1, z_2)``. Features before
    the head are kept.
    """

    name: ClassVar[str] = "simclr"
    batch_statistic: ClassVar[str | None] = "negatives"
    Config: ClassVar[type[ObjectiveConfig]] = SimCLRConfig
    card: ClassVar[Card] = Card(
        family="embedding",
        paper="Chen et al. 2020, arXiv:2002.05709",
        predicts="which view in the batch shows the same sample",
        masks="nothing",
        checked="brute-force loops; two ranks against one",
    )
    config: SimCLRConfig

    def __init__(self, config: SimCLRConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.head = projector(self.width, config.head_hidden, config.head_out, config.head_layers)

    def compare(self, features: Tensor, taught: Tensor | None, usable: Tensor) -> dict[str, Tensor]:
        first, second = self.head(features)
        return {"loss": nt_xent(first, second, self.config.temperature, usable)}
