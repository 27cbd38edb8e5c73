"""VICReg (Bardes et al. 2022, "VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning")."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from fmsuite.core.backbones.base import Backbone
from fmsuite.core.distributed import all_sum, gather_rows, mean_over
from fmsuite.core.objectives.base import Card, ObjectiveConfig, Share, register
from fmsuite.core.objectives.heads import projector
from fmsuite.core.objectives.two_views import TwoViews, TwoViewsConfig, each_view
from fmsuite.errors import UsageError

EPSILON = 1e-4


class VICRegConfig(TwoViewsConfig):
    """The options of ``TwoViewsConfig``, and:

    Attributes:
        invariance, variance, covariance: weights of the three terms (lambda, mu, nu).
        head_hidden, head_out, head_layers: shape of the expander, batch normalised within.
    """

    scale: Share = (0.08, 1.0)
    invariance: float = Field(default=25.0, ge=0)
    variance: float = Field(default=25.0, ge=0)
    covariance: float = Field(default=1.0, ge=0)
    head_hidden: int = Field(default=8192, ge=1)
    head_out: int = Field(default=8192, ge=2)
    head_layers: int = Field(default=3, ge=1)


def spread_and_covariance(values: Tensor, usable: Tensor) -> tuple[Tensor, Tensor]:
    """The two regularisers of one view, over the samples of all ranks (Bardes et al. 2022, equations 1 to 4).

    With the unbiased covariance C of n samples in d dimensions, ``v = mean_j max(0, 1 - sqrt(C_jj + 1e-4))`` and
    ``c = sum_{i != j} C_ij^2 / d``.

    Args:
        values: (B, D); B must be equal on all ranks.
        usable: (B,) bool, samples that count.

    Returns:
        v and c, equal on all ranks.
    """
    counted = gather_rows(usable.to(torch.float32))[:, None]
    number = counted.sum()
    rows = gather_rows(values.to(torch.float32)) * counted
    centred = (rows - rows.sum(0) / number.clamp(min=1)) * counted
    covariance = centred.T @ centred / (number - 1).clamp(min=1)
    variance = covariance.diagonal()
    spread = functional.relu(1 - (variance + EPSILON).sqrt()).mean()
    off_diagonal = covariance - torch.diag(variance)
    return spread, off_diagonal.square().sum() / values.shape[1]


def vicreg_terms(first: Tensor, second: Tensor, usable: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three terms as in the public code: the mean squared difference over samples and dimensions, the variance
    hinge as the mean over both views, the covariance as their sum.

    Args:
        first, second: (B, D), row by row the views of one sample; B must be equal on all ranks.
        usable: (B,) bool, samples that count.

    Returns:
        Invariance, variance, covariance: scalars whose means over ranks are those of the global batch; zero where no
        two samples count.
    """
    with torch.autocast(first.device.type, enabled=False):
        invariance = mean_over((first.to(torch.float32) - second.to(torch.float32)).square().mean(1), usable)
        terms = [spread_and_covariance(view, usable) for view in (first, second)]
        # A spread needs two samples; below that there is nothing to push apart.
        enough = all_sum(usable.sum()) > 1
        spread = torch.where(enough, (terms[0][0] + terms[1][0]) / 2, 0.0)
        return invariance, spread, terms[0][1] + terms[1][1]


@register
class VICReg(TwoViews):
    """Make the embeddings of two views alike, each dimension spread over the batch, and the dimensions uncorrelated.

    With expanded features z of two views, ``loss = 25 s(z_1, z_2) + 25 v + c`` (equation 6): s the mean squared
    difference, v the hinge on each dimension's standard deviation, c the squared covariances off the diagonal (see
    ``vicreg_terms``). No teacher, predictor or negatives. The expander's last linear map has no bias (public code).

    Raises:
        UsageError: as ``TwoViews``; if all three weights are zero.
    """

    name: ClassVar[str] = "vicreg"
    batch_statistic: ClassVar[str | None] = "the covariance of the batch"
    Config: ClassVar[type[ObjectiveConfig]] = VICRegConfig
    card: ClassVar[Card] = Card(
        family="embedding",
        paper="Bardes et al. 2022, arXiv:2105.04906",
        predicts="the embedding of the other view",
        masks="nothing",
        checked="public VICReg code: loss, its three terms, gradients; two ranks against one",
    )
    config: VICRegConfig

    def __init__(self, config: VICRegConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        if not (config.invariance or config.variance or config.covariance):
            raise UsageError(
                "objective.invariance, objective.variance and objective.covariance are all zero: there is no loss.",
                "Leave one of them positive.",
            )
        hidden, out = config.head_hidden, config.head_out
        self.head = projector(self.width, hidden, out, config.head_layers, norm=True, out_bias=False)

    def compare(self, features: Tensor, taught: Tensor | None, usable: Tensor) -> dict[str, Tensor]:
        first, second = each_view(self.head, features, usable)
        invariance, variance, covariance = vicreg_terms(first, second, usable)
        config = self.config
        loss = config.invariance * invariance + config.variance * variance + config.covariance * covariance
        return {"loss": loss, "invariance": invariance, "variance": variance, "covariance": covariance}
