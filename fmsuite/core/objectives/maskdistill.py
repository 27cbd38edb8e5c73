"""Masked distillation: a frozen encoder's features of the whole image, predicted from a part of it (Peng et al. 2022,
"A Unified View of Masked Image Modeling"; Fang et al. 2022, "EVA"; Xue et al. 2022, "Stare at What You See")."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fmsuite.core.backbones.base import Backbone, Features
from fmsuite.core.backbones.layers import init_transformer
from fmsuite.core.data.sample import Batch
from fmsuite.core.distributed import mean_over
from fmsuite.core.masking import keep_ids
from fmsuite.core.objectives.base import Card, ObjectiveConfig, StepContext, register
from fmsuite.core.objectives.feature_targets import TargetNorm, feature_targets, negative_cosine, smooth_l1
from fmsuite.core.objectives.frozen import TEACHERS, FrozenTeacher
from fmsuite.core.objectives.masks import Masking
from fmsuite.core.objectives.single_view import VIEW, MaskedView, MaskedViewConfig, masked_ids
from fmsuite.core.tokens import take
from fmsuite.errors import UsageError


class MaskDistillConfig(MaskedViewConfig):
    """The options of ``MaskedViewConfig``, and:

    Attributes:
        mask_ratio, masking: 40% in blocks, as MaskDistill and EVA have it; MaskAlign hides 70%, and shows what the
            teacher attends to (``attention_low``).
        teacher: anything ``load_encoder`` opens, or ``random``.
        predict: ``masked``: the encoder sees mask tokens, and features are compared there (MaskDistill, EVA);
            ``visible``: masked tokens are dropped, and features are compared at the others (MaskAlign).
        layers: average the teacher's last so many layers, each normalised; 1 takes its output.
        target_norm: of the teacher's features: ``layer`` (zero mean and unit variance at each token), ``l2`` (unit
            length), or ``none``.
        loss: ``smooth_l1``, or ``cosine`` (EVA).
        beta: where smooth L1 turns from a square into a line.
        align: MaskAlign's dynamic alignment: compare those last layers one by one, each with a head of its own that
            reads a learned mix of all the student's layers.
    """

    mask_ratio: float = Field(default=0.4, gt=0, lt=1)
    masking: Masking = "block"
    teacher: str = Field(description=TEACHERS)
    predict: Literal["masked", "visible"] = "masked"
    layers: int = Field(default=1, ge=1)
    target_norm: TargetNorm = "layer"
    loss: Literal["smooth_l1", "cosine"] = "smooth_l1"
    beta: float = Field(default=1.0, gt=0)
    align: bool = False


class DynamicAlignment(nn.Module):
    """A linear head for each of a teacher's last layers, over a learned mix of a student's layers (Xue et al. 2022,
    section 3). A mix begins with the layer at the same share of the depth, and a hundredth of every layer.

    Args:
        width, depth: D and L of the student.
        taught_width, taught_depth: of the teacher.
        layers: K, how many of its last layers.
    """

    def __init__(self, width: int, depth: int, taught_width: int, taught_depth: int, layers: int) -> None:
        super().__init__()
        mix = torch.full((layers, depth), 0.01)
        for row, layer in enumerate(range(taught_depth - layers, taught_depth)):
            mix[row, math.ceil((layer + 1) * depth / taught_depth) - 1] += 1.0
        self.mix = nn.Parameter(mix)
        self.heads = nn.ModuleList(nn.Linear(width, taught_width) for _ in range(layers))

    def forward(self, layers: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """L tensors (B, N, D) to K predictions (B, N, D')."""
        mixed = torch.einsum("kl,lbnd->kbnd", self.mix.to(layers[0].dtype), torch.stack(list(layers)))
        return tuple(head(each) for head, each in zip(self.heads, mixed, strict=True))


@register
class MaskDistill(MaskedView):
    """Predict what a frozen teacher says of each token of the whole view from a view of which a part is hidden.

    With the teacher's features h_i, normalised to t_i (``feature_targets``), the student's z_i and a linear head W,
    ``loss = mean_{i in S} d(W z_i, t_i)``, d ``smooth_l1`` or ``negative_cosine``. S are the masked tokens, which the
    student's encoder sees as mask tokens; or the visible ones, where the others are dropped and nothing is
    reconstructed (Xue et al. 2022, section 3). Invalid tokens are neither. With ``align`` the loss is the mean over the
    teacher's last layers k of ``mean_i d(W_k sum_l a_kl z_i^l, t_i^k)``, over the student's layers l.

    Raises:
        UsageError: for a bag of vectors, a size that the patches do not divide, masks that do not fit, a backbone that
            cannot mask or drop tokens, or a teacher that does not fit (see ``FrozenTeacher``), has fewer layers than
            asked for, or shows no attention where masks follow it.
    """

    name: ClassVar[str] = "maskdistill"
    Config: ClassVar[type[ObjectiveConfig]] = MaskDistillConfig
    card: ClassVar[Card] = Card(
        family="tokens",
        paper="Peng et al. 2022, arXiv:2210.10615; Fang et al. 2022, arXiv:2211.07636; Xue et al. 2022, "
        "arXiv:2211.08887",
        predicts="a frozen encoder's features of the masked (or of the visible) tokens",
        masks="40% in blocks, as mask tokens in the encoder; or dropped",
        checked="brute-force loops over tokens",
    )
    teaches_masks: ClassVar[bool] = True
    config: MaskDistillConfig

    def __init__(self, config: MaskDistillConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.need(**{"can_mask_tokens" if config.predict == "masked" else "can_drop_tokens": True})
        if config.loss != "smooth_l1" and config.beta != type(config).model_fields["beta"].default:
            raise UsageError("objective.beta has no effect without objective.loss smooth_l1.", "Remove it.")
        layers = range(-config.layers, 0) if config.layers > 1 or config.align else ()
        self.teacher = FrozenTeacher(config.teacher, backbone, layers=layers, norm_layers=False, size=self.size)
        if config.follows_attention:
            self.teacher.need(can_show_attention=True)
        taught = self.teacher.width
        self.head: nn.Module = nn.Linear(backbone.width, taught)
        if config.align:
            self.head = DynamicAlignment(backbone.width, backbone.depth, taught, self.teacher.depth, config.layers)
        self.head.apply(init_transformer)

    def forward(self, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        view = batch.views[VIEW][0]
        taught = self.teacher(view, attention=self.config.follows_attention)
        mask, layout = self.masked(view, taught)
        targets = self.targets(taught)
        student: Callable[..., Features] = self.backbone
        if self.config.align:
            student = partial(self.backbone, layers=range(self.backbone.depth), norm_layers=False)
        if self.config.predict == "masked":
            features = student(view, mask=mask)
            ids, counted = masked_ids(mask)
            read = [take(each, ids) for each in (features.intermediate if self.config.align else (features.patches,))]
        else:
            ids, keep_valid = keep_ids(mask, layout.valid)
            features = student(view, keep=ids, keep_valid=keep_valid)
            counted = torch.ones_like(ids, dtype=torch.bool) if keep_valid is None else keep_valid
            read = list(features.intermediate if self.config.align else (features.patches,))
        targets = [take(target, ids) for target in targets]
        predictions = self.head(read) if self.config.align else (self.head(read[0]),)
        pairs = zip(predictions, targets, strict=True)
        return {"loss": torch.stack([self.distance(p, t, counted) for p, t in pairs]).mean()}

    def targets(self, taught: Features) -> list[Tensor]:
        """(B, N, D) float32 each: the teacher's layers one by one where they are aligned, else their mean."""
        norm = self.config.target_norm
        if self.config.align:
            return [feature_targets((layer,), norm) for layer in taught.intermediate]
        return [feature_targets(taught.intermediate or (taught.patches,), norm)]

    def distance(self, prediction: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
        """The loss of (B, M, D) predictions and targets, over the tokens that count, (B, M) bool."""
        with torch.autocast(prediction.device.type, enabled=False):
            if self.config.loss == "cosine":
                return mean_over(negative_cosine(prediction, targets), counted)
            return mean_over(smooth_l1(prediction, targets, self.config.beta), counted)
