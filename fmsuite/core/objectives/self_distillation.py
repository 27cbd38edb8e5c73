"""What DINO, iBOT and DINOv2 share: their views, an EMA teacher, its temperature, and the losses over views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from fmsuite.core.backbones.base import Backbone, Features
from fmsuite.core.data.sample import Batch, MaskSampler, View, ViewRequest
from fmsuite.core.distributed import all_mean
from fmsuite.core.objectives import ema
from fmsuite.core.objectives.base import Objective, ObjectiveConfig, StepContext, crop_size
from fmsuite.core.objectives.heads import DINOHead
from fmsuite.core.tokens import PatchGrid
from fmsuite.core.training import schedules
from fmsuite.core.training.config import Duration
from fmsuite.errors import UsageError

FIRST, SECOND, LOCAL = "global", "global_second", "local"
LOCAL_SHARE = (3, 7)
"""Local crops of 96 px beside global ones of 224 (Caron et al. 2021)."""


class SelfDistillationConfig(ObjectiveConfig):
    """
    Attributes:
        global_size: size of the two global crops; the model's own if not given.
        local_size: size of the local crops; if not given, the largest multiple of the patch size that is not above
            3/7 of the global size, and at least one patch.
        local_crops: how many local crops, which may be none.
        global_scale, local_scale: range of a crop's share of the sample.
        ratio: range of the crops' aspect ratio.
        augment: strength of the domain's augmentation.
        student_temp: of the student's softmax.
        teacher_temp, teacher_temp_start, teacher_temp_warmup: the teacher's, and its linear warm-up.
        momentum, momentum_end: of the teacher's moving average, on a cosine over the run.
        freeze_last_layer: how long the prototypes stay as they are.
        prototypes, head_hidden, head_bottleneck, head_layers: shape of the head.
        train_gain: train the norm of the prototypes as well.
        center_momentum: of the running mean that centres the teacher.
    """

    global_size: int | tuple[int, ...] | None = None
    local_size: int | tuple[int, ...] | None = None
    local_crops: int = Field(default=8, ge=0)
    global_scale: tuple[float, float] = (0.4, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.4)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    augment: Literal["none", "weak", "strong"] = "strong"
    student_temp: float = Field(default=0.1, gt=0)
    teacher_temp: float = Field(default=0.07, gt=0)
    teacher_temp_start: float = Field(default=0.04, gt=0)
    teacher_temp_warmup: Duration = "30ep"
    momentum: float = Field(default=0.996, ge=0, le=1)
    momentum_end: float = Field(default=1.0, ge=0, le=1)
    freeze_last_layer: Duration = "1ep"
    prototypes: int = Field(default=65536, ge=2)
    head_hidden: int = Field(default=2048, ge=1)
    head_bottleneck: int = Field(default=256, ge=1)
    head_layers: int = Field(default=3, ge=1)
    train_gain: bool = False
    center_momentum: float = Field(default=0.9, ge=0, lt=1)


def cross_view_entropy(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """H(P_t, P_s) for every pair of a teacher's and a student's view (Caron et al. 2021, equation 2).

    By definition ``out[t, s, b] = -sum_k teacher[t, b, k] * log_softmax(student[s, b] / temperature)[k]``.

    Args:
        student: (S, B, K) logits.
        teacher: (T, B, K) probabilities.

    Returns:
        (T, S, B) float32.
    """
    log_student = functional.log_softmax(student.to(torch.float32) / temperature, dim=-1)
    return -torch.einsum("tbk,sbk->tsb", teacher.to(torch.float32), log_student)


def other_views_loss(student: Tensor, teacher: Tensor, temperature: float, usable: Tensor | None = None) -> Tensor:
    """Mean of ``cross_view_entropy`` over samples and pairs of different views (Caron et al. 2021, equation 3).

    The teacher's views are the student's first: pair (t, s) is left out where t = s.

    Args:
        student: (S, B, K) logits.
        teacher: (T, B, K) probabilities, T <= S.
        usable: (S, B) bool, crops with at least one valid token; pairs with another do not count. ``None`` means all.

    Returns:
        A scalar; its mean over ranks is the loss of the global batch.
    """
    with torch.autocast(student.device.type, enabled=False):
        entropy = cross_view_entropy(student, teacher, temperature)
        views, crops, batch = entropy.shape
        pairs = ~torch.eye(views, crops, dtype=torch.bool, device=entropy.device)[..., None].expand(-1, -1, batch)
        if usable is not None:
            pairs = pairs & usable[:views, None] & usable[None]
        count = all_mean(pairs.sum().to(torch.float32))
        return (entropy * pairs).sum() / torch.where(count > 0, count, 1.0)


def masked_patch_loss(
    student: Tensor, teacher: Tensor, temperature: float, mask: Tensor, crops: Tensor | None = None
) -> Tensor:
    """The masked-patch term of iBOT (Zhou et al. 2021, section 3.1), as iBOT and DINOv2 weigh it: the mean over each
    crop's masked tokens, summed and divided by the number of all crops, masked or not.

    Args:
        student: (M, K) logits at the masked tokens, crop by crop.
        teacher: (M, K) probabilities at the same tokens.
        mask: (V, N) bool with M True entries.
        crops: how many of this rank's crops count; ``None`` means V.

    Returns:
        A scalar; its mean over ranks is the loss of the global batch.
    """
    with torch.autocast(student.device.type, enabled=False):
        log_student = functional.log_softmax(student.to(torch.float32) / temperature, dim=-1)
        entropy = -(teacher.to(torch.float32) * log_student).sum(-1)
        number = mask.sum(1, keepdim=True).clamp(min=1).to(torch.float32)
        weight = (1.0 / number).expand_as(mask)[mask]
        count = crops if crops is not None else torch.tensor(len(mask), device=mask.device)
        count = all_mean(count.to(torch.float32))
        return (entropy * weight).sum() / torch.where(count > 0, count, 1.0)


@dataclass
class Crops:
    """What one batch gives to the losses.

    Attributes:
        student: pooled student features of the global, then the local crops, (S, B, D).
        teacher: pooled teacher features of the global crops, (2, B, D).
        usable: (S, B) bool, crops with at least one valid token.
        mask: (2B, N) bool, valid tokens of the global crops that the student saw masked, view by view.
        student_patches, teacher_patches: patch tokens of the global crops, (2B, N, D).
        valid: (2B, N) bool or ``None``.
    """

    student: Tensor
    teacher: Tensor
    usable: Tensor
    mask: Tensor | None
    student_patches: Tensor
    teacher_patches: Tensor
    valid: Tensor | None


class SelfDistillation(Objective):
    """Base of the objectives in which a student matches its own moving average on other views of a sample.

    The teacher starts as a copy of the student, is always in evaluation mode (no drop-path) and takes no gradient.
    Where the backbone has no class token, the mean of its valid patch tokens takes its place.

    Raises:
        UsageError: for crops that the patches do not divide, or a backbone that cannot take crops of other sizes.
    """

    config: SelfDistillationConfig
    masks: ClassVar[bool] = False
    teacher: Backbone

    def __init__(self, config: SelfDistillationConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        if backbone.grid is None:
            raise UsageError(f"Objective '{self.name}' crops a grid, and a bag of vectors has none.", "Choose another.")
        self.grid: PatchGrid = backbone.grid
        spec = backbone.spec
        self.global_size = crop_size(self, "global_size", config.global_size, spec.size)
        numerator, denominator = LOCAL_SHARE
        default = list(self.global_size)
        for axis in spec.spatial:
            patch = self.grid.patch_size[axis]
            default[axis] = max(1, self.global_size[axis] * numerator // denominator // patch) * patch
        self.local_size = crop_size(self, "local_size", config.local_size, tuple(default))
        sizes = {self.global_size} | ({self.local_size} if config.local_crops else set())
        if sizes != {spec.size}:
            self.need(can_resize=True)
        if self.masks:
            self.need(can_mask_tokens=True)
        self.head = self._make_head(config.prototypes)
        self.teacher = ema.teacher_of(self.backbone)
        self.teacher_head = ema.teacher_of(self.head)

    def _make_head(self, prototypes: int) -> DINOHead:
        config = self.config
        return DINOHead(
            self.backbone.width,
            prototypes,
            config.head_hidden,
            config.head_bottleneck,
            config.head_layers,
            config.train_gain,
        )

    def heads(self) -> Sequence[tuple[DINOHead, DINOHead]]:
        """Every head of the student with its teacher's."""
        return [(self.head, self.teacher_head)]

    def mask_sampler(self) -> MaskSampler | None:
        """Draws the tokens that the student does not see in its global crops; ``None`` masks nothing."""
        return None

    def view_requests(self) -> tuple[ViewRequest, ...]:
        config = self.config
        first = ViewRequest(
            FIRST,
            self.global_size,
            scale=config.global_scale,
            ratio=config.ratio,
            augment=config.augment,
            mask=self.mask_sampler(),
        )
        requests = [first, replace(first, name=SECOND, second=True)]
        if config.local_crops:
            local = replace(first, name=LOCAL, size=self.local_size, scale=config.local_scale, mask=None)
            requests.append(replace(local, count=config.local_crops))
        return tuple(requests)

    @property
    def encoder(self) -> Backbone:
        return self.teacher

    def train(self, mode: bool = True) -> SelfDistillation:
        super().train(mode)
        self.teacher.eval()
        for _, teacher_head in self.heads():
            teacher_head.eval()
        return self

    def teacher_temp(self, context: StepContext) -> float:
        """The teacher's temperature in this step."""
        config = self.config
        return self._warm(config.teacher_temp_start, config.teacher_temp, context)

    def _warm(self, start: float, end: float, context: StepContext) -> float:
        warmup = self._steps(self.config.teacher_temp_warmup, context)
        return schedules.ramp(start, end, warmup)(context.step)

    def _steps(self, duration: Duration, context: StepContext) -> int:
        return schedules.resolve(duration, context.total_steps, context.steps_per_epoch)

    def encode(self, batch: Batch) -> Crops:
        """Run the student on every crop and the teacher on the global ones."""
        whole = View.cat([batch.views[FIRST][0], batch.views[SECOND][0]])
        layout = self.backbone.layout(whole)
        mask = None
        if self.masks:
            if whole.mask is None:
                raise ValueError("the global views have no mask")
            mask = whole.mask if layout.valid is None else whole.mask & layout.valid
        with torch.no_grad():
            taught = self.teacher(whole)
        locals_ = batch.views.get(LOCAL, [])
        bundles, masks = [whole], [mask]
        if locals_:
            bundles.append(View.cat(locals_))
            masks.append(None)
        features = self.backbone.forward_crops(bundles, masks)
        seen = features[0]
        counts = (2, len(locals_))
        pooled = [self._pooled(crop, count) for crop, count in zip(features, counts)]
        usable = [crop.usable.unflatten(0, (count, -1)) for crop, count in zip(features, counts)]
        return Crops(
            torch.cat(pooled),
            self._pooled(taught, 2),
            torch.cat(usable),
            mask,
            seen.patches,
            taught.patches,
            layout.valid,
        )

    def _pooled(self, features: Features, views: int) -> Tensor:
        return features.pooled(self.pooling).unflatten(0, (views, -1))

    def before_update(self, context: StepContext) -> None:
        """Drop the prototypes' gradients while they are frozen (``freeze_last_layer`` of DINO's public code)."""
        if context.step < self._steps(self.config.freeze_last_layer, context):
            for head, _ in self.heads():
                for parameter in head.last_layer.parameters():
                    parameter.grad = None

    def after_update(self, context: StepContext) -> None:
        """Move the teacher: momentum is a cosine of the step that was just taken."""
        config = self.config
        momentum = schedules.cosine(config.momentum, config.momentum_end, context.total_steps)(context.step)
        ema.follow(self.teacher, self.backbone, momentum)
        for head, teacher_head in self.heads():
            ema.follow(teacher_head, head, momentum)
