"""What objectives over two views of a sample share: the views, and one vector for each."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from fmsuite.core.backbones.base import Backbone
from fmsuite.core.data.sample import Batch, ViewRequest
from fmsuite.core.objectives.base import Objective, ObjectiveConfig, crop_size

FIRST, SECOND = "first", "second"


class TwoViewsConfig(ObjectiveConfig):
    """
    Attributes:
        size: size of the crops; the model's own if not given.
        scale: range of a crop's share of the sample.
        ratio: range of the crops' aspect ratio.
        augment: strength of the domain's augmentation.
        pooling: how a view's tokens become the vector that is trained, and the encoder's convention afterwards: the
            class token, the mean of the patches, or both; the class token where there is one, if not given.
    """

    size: int | tuple[int, ...] | None = None
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    augment: Literal["none", "weak", "strong"] = "strong"
    pooling: Literal["cls", "mean", "cls+mean"] | None = None


class TwoViews(Objective):
    """Base of the objectives that compare two crops of every sample.

    Raises:
        UsageError: for crops that the patches do not divide, a backbone that cannot take crops of another size than
            its own, or a pooling that it does not have.
    """

    config: TwoViewsConfig

    def __init__(self, config: TwoViewsConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.size = crop_size(self, "size", config.size, backbone.spec.size)
        if self.size != backbone.spec.size:
            self.need(can_resize=True)
        if config.pooling not in (None, "mean"):
            self.need(has_cls=True)
        self.width = backbone.width * (2 if self.pooling == "cls+mean" else 1)

    @property
    def pooling(self) -> str:
        return self.config.pooling or super().pooling

    def view_requests(self) -> tuple[ViewRequest, ...]:
        config = self.config
        first = ViewRequest(FIRST, self.size, scale=config.scale, ratio=config.ratio, augment=config.augment)
        return first, replace(first, name=SECOND, second=True)

    def encode(self, batch: Batch, network: Backbone | None = None) -> tuple[Tensor, Tensor]:
        """
        Args:
            network: in place of the student.

        Returns:
            (2, B, D) pooled features, and (B,) bool: samples with valid tokens in both views.
        """
        views = [batch.views[FIRST][0], batch.views[SECOND][0]]
        features = (network or self.backbone).forward_crops(views)
        usable = features[0].usable & features[1].usable
        return torch.stack([each.pooled(self.pooling) for each in features]), usable
