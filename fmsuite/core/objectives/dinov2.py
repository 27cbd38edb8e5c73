"""DINOv2 (Oquab et al. 2023, "DINOv2: Learning Robust Visual Features without Supervision")."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fmsuite.core.backbones.base import Backbone
from fmsuite.core.data.sample import MaskSampler
from fmsuite.core.masking import SpreadMasking
from fmsuite.core.objectives.base import Card, ObjectiveConfig, Share, StepContext, check_company, register
from fmsuite.core.objectives.heads import DINOHead
from fmsuite.core.objectives.ibot import MaskedDistillation, MaskedDistillationConfig
from fmsuite.core.objectives.koleo import koleo
from fmsuite.core.objectives.self_distillation import Crops
from fmsuite.core.objectives.sinkhorn import NestedCentre, sinkhorn


class DINOv2Config(MaskedDistillationConfig):
    """
    Attributes:
        centering: ``center`` (running mean), or ``sinkhorn`` as in the published large models.
        sinkhorn_iterations: scalings of rows and columns.
        koleo_weight: of the KoLeo term of each global view; 0 leaves it out.
    """

    global_scale: Share = (0.32, 1.0)
    local_scale: Share = (0.05, 0.32)
    momentum: float = Field(default=0.992, ge=0, le=1)
    centering: Literal["center", "sinkhorn"] = "center"
    sinkhorn_iterations: int = Field(default=3, ge=1)
    koleo_weight: float = Field(default=0.1, ge=0)


@register
class DINOv2(MaskedDistillation):
    """The class term of DINO, the patch term of iBOT, and KoLeo (section 4).

    ``loss = L_class + L_patch + 0.1 * sum over the two global views of KoLeo(class token before the head)``.
    Assignments are centred by a moving average, over the masked tokens for patches, or balanced by Sinkhorn-Knopp over
    the global batch (both views together). ``L_patch`` is the sum over masked tokens, each divided by its crop's
    masked count, divided by the number of all global crops; ratios are spread evenly over the batch. With gradient
    accumulation, Sinkhorn-Knopp and KoLeo see one micro-batch of all ranks at a time. KoLeo spreads whole vectors out,
    also where ``matryoshka`` trains prefixes.
    """

    name: ClassVar[str] = "dinov2"
    batch_statistic: ClassVar[str | None] = "KoLeo's neighbours, and Sinkhorn assignments where they are chosen"
    Config: ClassVar[type[ObjectiveConfig]] = DINOv2Config
    card: ClassVar[Card] = Card(
        family="embedding",
        paper="Oquab et al. 2023, arXiv:2304.07193",
        predicts="the teacher's cluster of another crop, and of each masked patch; features spread out (KoLeo)",
        masks="blocks, 10 to 50% of half of the global crops",
        checked="public DINOv2 code: all losses, both ways of centring",
    )
    config: DINOv2Config

    min_block: ClassVar[int | None] = 4

    def __init__(self, config: DINOv2Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.centre: NestedCentre | None = None
        self.patch_centre: NestedCentre | None = None
        if config.centering == "center":
            self.centre = NestedCentre(config.prototypes, config.center_momentum, self.widths)
            self.patch_centre = NestedCentre(self.patch_prototypes, config.center_momentum, self.patch_widths)

    def mask_sampler(self) -> MaskSampler:
        return SpreadMasking(self.config.mask_share, self.config.mask_ratio, self.pattern)

    def class_targets(self, logits: Tensor, usable: Tensor, context: StepContext, width: int) -> Tensor:
        targets = torch.zeros_like(logits, dtype=torch.float32)
        targets[usable] = self._assign(self.centre, logits[usable], context, width)
        return targets

    def patch_targets(self, logits: Tensor, crops: Crops, head: DINOHead, context: StepContext, width: int) -> Tensor:
        return self._assign(self.patch_centre, logits, context, width)

    def _assign(self, centres: NestedCentre | None, logits: Tensor, context: StepContext, width: int) -> Tensor:
        """(R, K) logits of what counts to probabilities."""
        temperature = self.teacher_temp(context)
        if centres is None:
            return sinkhorn(logits, temperature, self.config.sinkhorn_iterations)
        centre = centres.at(width)
        if self.training:
            centre.observe(logits.sum(0), len(logits))
        return centre.assign(logits, temperature)

    def check_batch(self, samples: int) -> None:
        if self.config.koleo_weight:
            check_company(self, samples)

    def regularisation(self, crops: Crops) -> dict[str, Tensor]:
        if self.config.koleo_weight == 0:
            return {}
        views = [koleo(crops.student[view], crops.usable[view]) for view in range(2)]
        return {"koleo": self.config.koleo_weight * torch.stack(views).sum()}

    def after_update(self, context: StepContext) -> None:
        super().after_update(context)
        for centre in (self.centre, self.patch_centre):
            if centre is not None:
                centre.update()
