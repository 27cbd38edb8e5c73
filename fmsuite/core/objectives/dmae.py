"""DMAE: a masked autoencoder that also follows a larger one's features (Bai et al. 2022, "Masked Autoencoders Enable
Efficient Knowledge Distillers")."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from fmsuite.core.backbones.base import Backbone
from fmsuite.core.data.sample import Batch
from fmsuite.core.distributed import mean_over
from fmsuite.core.objectives.base import Card, ObjectiveConfig, StepContext, register
from fmsuite.core.objectives.frozen import TEACHERS, FrozenTeacher
from fmsuite.core.objectives.mae import MAE, MAEConfig
from fmsuite.core.objectives.single_view import VIEW
from fmsuite.errors import UsageError


class DMAEConfig(MAEConfig):
    """The options of ``MAEConfig``, and:

    Attributes:
        teacher: anything ``load_encoder`` opens, such as a larger masked autoencoder; or ``random``.
        student_layer, teacher_layer: numbers of the blocks whose outputs are compared (0-based, negative from the end);
            that at three quarters of the depth if not given.
        feature_weight: of the features' distance beside the reconstruction.
    """

    teacher: str = Field(description=TEACHERS)
    student_layer: int | None = None
    teacher_layer: int | None = None
    feature_weight: float = Field(default=1.0, ge=0)


def three_quarters(depth: int) -> int:
    """The block at three quarters of the depth: the 9th of 12, the 18th of 24 (section 3)."""
    return max(0, depth * 3 // 4 - 1)


def unit_distance(prediction: Tensor, target: Tensor) -> Tensor:
    """``sum_d |p_d / ||p|| - t_d / ||t|| | / D``: (..., D) twice to (...), float32.

    The paper's L1 distance, of unit-length features as the public code has it.
    """
    first, second = (functional.normalize(each.to(torch.float32), dim=-1) for each in (prediction, target))
    return (first - second).abs().mean(-1)


@register
class DMAE(MAE):
    """Reconstruct hidden patches, and agree with a frozen teacher about the visible ones at an intermediate layer.

    The teacher sees the same visible tokens, in its blocks up to the compared one only, so that both its unseen tokens
    and its last blocks cost nothing (section 3). With the features s_i and t_i of the visible tokens V and a linear
    projection P, ``loss = L_MAE + feature_weight * mean_{i in V} unit_distance(P s_i, t_i)``. The public code
    compares class tokens as well.

    Raises:
        UsageError: as ``MAE`` and ``FrozenTeacher``; for a teacher that cannot drop tokens, or blocks that there are
            not.
    """

    name: ClassVar[str] = "dmae"
    Config: ClassVar[type[ObjectiveConfig]] = DMAEConfig
    card: ClassVar[Card] = Card(
        family="pixels",
        paper="Bai et al. 2022, arXiv:2208.12256",
        predicts="pixels of the masked patches, and a frozen encoder's features of the visible ones",
        masks="75% at random; neither encoder sees them",
        checked="MAE's loss as 'mae'; the features' distance against loops",
    )
    config: DMAEConfig

    def __init__(self, config: DMAEConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        layer = three_quarters(backbone.depth) if config.student_layer is None else config.student_layer
        if not -backbone.depth <= layer < backbone.depth:
            raise UsageError(
                f"objective.student_layer {layer}: the model has {backbone.depth} blocks.",
                "Count from 0, or from -1 backwards.",
            )
        self.student_layer = layer
        self.teacher = FrozenTeacher(
            config.teacher,
            backbone,
            layers=self._compared,
            norm_layers=False,
            first_only=True,
            size=self.size,
        )
        self.teacher.need(can_drop_tokens=True)
        self.projection = nn.Linear(backbone.width, self.teacher.width)
        nn.init.xavier_uniform_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)

    def _compared(self, depth: int) -> tuple[int]:
        """The teacher's block, of the depth that it has."""
        given = self.config.teacher_layer
        return (three_quarters(depth) if given is None else given,)

    def forward(self, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        view = batch.views[VIEW][0]
        visible = self.encode(view, layers=(self.student_layer,), norm_layers=False)
        taught = self.teacher(view, keep=visible.ids, keep_valid=visible.keep_valid)
        pixels = self.decoder_loss(view, visible)
        shown = visible.features.intermediate[0]
        distance = self.feature_loss(shown, taught.intermediate[0], taught.layout.valid)
        loss = pixels + self.config.feature_weight * distance
        return {"loss": loss, "pixels": pixels, "features": distance}

    def feature_loss(self, student: Tensor, teacher: Tensor, valid: Tensor | None) -> Tensor:
        """Mean over the visible tokens of all ranks.

        Args:
            student, teacher: (B, K, D) and (B, K, D'), outputs of the compared blocks.
            valid: (B, K) bool; ``None`` means all.
        """
        projected = self.projection(student)
        with torch.autocast(student.device.type, enabled=False):
            error = unit_distance(projected, teacher)
            counted = torch.ones_like(error, dtype=torch.bool) if valid is None else valid
            return mean_over(error, counted)
