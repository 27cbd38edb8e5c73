"""SimSiam (Chen and He 2021, "Exploring Simple Siamese Representation Learning")."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from fmsuite.core.backbones.base import Backbone
from fmsuite.core.distributed import mean_over
from fmsuite.core.objectives.base import Card, ObjectiveConfig, ParameterRule, register
from fmsuite.core.objectives.heads import projector
from fmsuite.core.objectives.two_views import TwoViews, TwoViewsConfig, each_view


class SimSiamConfig(TwoViewsConfig):
    """The options of ``TwoViewsConfig``, and:

    Attributes:
        head_hidden, head_out, head_layers: shape of the projector, batch normalised within and at its output.
        predictor_hidden: the bottleneck of the predictor, whose output is as wide as the projector's.
        stop_gradient: whether the compared projection is held constant; without it the features collapse (section 4.1).
    """

    head_hidden: int = Field(default=2048, ge=1)
    head_out: int = Field(default=2048, ge=1)
    head_layers: int = Field(default=3, ge=1)
    predictor_hidden: int = Field(default=512, ge=1)
    stop_gradient: bool = True


def negative_cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """``D(p, z) = -cos(p, z)`` (Chen and He 2021, equation 1).

    Args:
        prediction, target: (B, D).

    Returns:
        (B,) float32.
    """
    with torch.autocast(prediction.device.type, enabled=False):
        prediction, target = (functional.normalize(each.to(torch.float32), dim=1) for each in (prediction, target))
        return -(prediction * target).sum(1)


@register
class SimSiam(TwoViews):
    """Predict the projection of one view from the other's, with one network and no teacher.

    With projections z, predictions p = h(z) and the stop-gradient sg,
    ``loss = mean over samples of D(p_1, sg(z_2)) / 2 + D(p_2, sg(z_1)) / 2`` (equation 4). The projector normalises
    every layer, the last without scale and shift; its linear maps have no biases, nor has the predictor's first (public
    code). The predictor's learning rate is not scheduled (section 4.2).
    """

    name: ClassVar[str] = "simsiam"
    batch_statistic: ClassVar[str | None] = "batch normalisation"
    Config: ClassVar[type[ObjectiveConfig]] = SimSiamConfig
    card: ClassVar[Card] = Card(
        family="embedding",
        paper="Chen and He 2021, arXiv:2011.10566",
        predicts="the network's own projection of the other view, held constant",
        masks="nothing",
        checked="brute-force loops; collapse without the stop-gradient",
    )
    config: SimSiamConfig

    def __init__(self, config: SimSiamConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        hidden, out = config.head_hidden, config.head_out
        self.head = projector(
            self.width, hidden, out, config.head_layers, norm=True, out_norm="plain", bias=False, out_bias=False
        )
        self.predictor = projector(out, config.predictor_hidden, out, norm=True, bias=False)

    def parameter_rule(self, name: str) -> ParameterRule:
        return ParameterRule(scheduled=not name.startswith("predictor."))

    def compare(self, features: Tensor, taught: Tensor | None, usable: Tensor) -> dict[str, Tensor]:
        projected = torch.stack(each_view(self.head, features, usable))
        predicted = each_view(self.predictor, projected, usable)
        targets = projected.detach() if self.config.stop_gradient else projected
        both = negative_cosine(predicted[0], targets[1]) / 2 + negative_cosine(predicted[1], targets[0]) / 2
        return {"loss": mean_over(both, usable)}
