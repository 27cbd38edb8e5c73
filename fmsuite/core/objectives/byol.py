"""BYOL (Grill et al. 2020, "Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from fmsuite.core.backbones.base import Backbone
from fmsuite.core.distributed import mean_over
from fmsuite.core.objectives import ema
from fmsuite.core.objectives.base import Card, ObjectiveConfig, Share, register
from fmsuite.core.objectives.heads import projector
from fmsuite.core.objectives.two_views import TwoViewsOfTeacher, TwoViewsOfTeacherConfig, each_view


class BYOLConfig(TwoViewsOfTeacherConfig):
    """The options of ``TwoViewsOfTeacherConfig``, and:

    Attributes:
        head_hidden, head_out, head_layers: shape of the projector, batch normalised within.
        predictor_hidden, predictor_layers: shape of the predictor, whose output is as wide as the projector's.
    """

    scale: Share = (0.08, 1.0)
    head_hidden: int = Field(default=4096, ge=1)
    head_out: int = Field(default=256, ge=1)
    head_layers: int = Field(default=2, ge=1)
    predictor_hidden: int = Field(default=4096, ge=1)
    predictor_layers: int = Field(default=2, ge=1)


def regression(prediction: Tensor, target: Tensor) -> Tensor:
    """The squared distance of unit vectors, ``||p/|p| - t/|t| ||^2 = 2 - 2 cos(p, t)`` (Grill et al. 2020, equation 2).

    Args:
        prediction, target: (B, D).

    Returns:
        (B,) float32.
    """
    with torch.autocast(prediction.device.type, enabled=False):
        prediction, target = (functional.normalize(each.to(torch.float32), dim=1) for each in (prediction, target))
        return 2 - 2 * (prediction * target).sum(1)


@register
class BYOL(TwoViewsOfTeacher):
    """Predict the teacher's projection of one view from the student's of the other.

    With student projections z, teacher projections z', and the predictor q,
    ``loss = mean over samples of ||q(z_1) - z'_2||^2 + ||q(z_2) - z'_1||^2`` over unit vectors (equation 2 and its
    swap). The teacher, projector included, is the student's moving average. The last linear map of either head has no
    bias, as in the public code.
    """

    name: ClassVar[str] = "byol"
    batch_statistic: ClassVar[str | None] = "batch normalisation"
    Config: ClassVar[type[ObjectiveConfig]] = BYOLConfig
    card: ClassVar[Card] = Card(
        family="embedding",
        paper="Grill et al. 2020, arXiv:2006.07733",
        predicts="the teacher's projection of the other view",
        masks="nothing",
        checked="brute-force loops; teacher and momentum step by step",
    )
    config: BYOLConfig

    def __init__(self, config: BYOLConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        hidden, out = config.head_hidden, config.head_out
        self.head = projector(self.width, hidden, out, config.head_layers, norm=True, out_bias=False)
        self.teacher_head = ema.teacher_of(self.head)
        self.predictor = projector(
            out, config.predictor_hidden, out, config.predictor_layers, norm=True, out_bias=False
        )

    def followers(self) -> Sequence[tuple[nn.Module, nn.Module]]:
        return [*super().followers(), (self.teacher_head, self.head)]

    def compare(self, features: Tensor, taught: Tensor | None, usable: Tensor) -> dict[str, Tensor]:
        assert taught is not None
        with torch.no_grad():
            targets = each_view(self.teacher_head, taught, usable)
        projected = torch.stack(each_view(self.head, features, usable))
        predicted = each_view(self.predictor, projected, usable)
        both = regression(predicted[0], targets[1]) + regression(predicted[1], targets[0])
        return {"loss": mean_over(both, usable)}
