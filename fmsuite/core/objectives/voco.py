"""VoCo (Wu et al. 2024, "VoCo: A simple-yet-effective volume contrastive learning framework for 3D medical image
analysis"), in volumes and in planes."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from fmsuite.core.backbones.base import Backbone
from fmsuite.core.data.sample import Batch, ViewRequest
from fmsuite.core.distributed import gather_rows, mean_over, rank, world_size
from fmsuite.core.objectives import ema
from fmsuite.core.objectives.base import (
    Card,
    Objective,
    ObjectiveConfig,
    StepContext,
    check_company,
    crop_size,
    register,
)
from fmsuite.core.objectives.heads import on_crops
from fmsuite.errors import UsageError

BASE, RANDOM = "base", "random"
GRID = 3
"""Base crops along each axis of a plane, as published."""
EPSILON = 1e-6
TOUCH = 1e-6
"""A smaller share of a crop is rounding, and no overlap."""


class VoCoConfig(ObjectiveConfig):
    """
    Attributes:
        size: of every crop; the model's own if not given.
        grid: how many base crops tile the sample along each axis. If not given, 3 along the last two spatial axes (y
            and x) and 1 along the others: samples of 64 x 192 x 192 voxels and crops of 64 x 64 x 64, as published.
        random_crops: how many crops of a cell's size, at random places, are compared with the base crops.
        augment: strength of the domain's augmentation, of each crop by itself.
        intra_weight, inter_weight, orthogonality_weight: of the three terms.
        momentum: of the teacher projector's moving average.
        head_hidden, head_out: shape of the projector's three layers.
    """

    size: int | tuple[int, ...] | None = None
    grid: tuple[int, ...] | None = None
    random_crops: int = Field(default=4, ge=1)
    augment: Literal["none", "weak", "strong"] = "weak"
    intra_weight: float = Field(default=1.0, ge=0)
    inter_weight: float = Field(default=1.0, ge=0)
    orthogonality_weight: float = Field(default=1.0, ge=0)
    momentum: float = Field(default=0.9, ge=0, le=1)
    head_hidden: int = Field(default=1024, ge=1)
    head_out: int = Field(default=1024, ge=1)


def position_labels(boxes: Tensor, bases: Tensor) -> Tensor:
    """The share of every crop that lies in every base crop: the product over axes of the shares of its sides (Wu et al.
    2024, section 3.2). Along an axis that is not divided a crop lies in every cell, so the label is the overlap in the
    plane. A crop inside the sample has labels that sum to one.

    Args:
        boxes: (..., R, 2, A) start and extent along each axis; see ``View.box``.
        bases: (..., K, 2, A).

    Returns:
        (..., R, K).
    """
    start, extent = boxes[..., :, None, 0, :], boxes[..., :, None, 1, :]
    base_start, base_extent = bases[..., None, :, 0, :], bases[..., None, :, 1, :]
    end = torch.minimum(start + extent, base_start + base_extent)
    share = ((end - torch.maximum(start, base_start)).clamp(min=0) / extent).prod(-1)
    return torch.where(share < TOUCH, 0.0, share)


def similarities(crops: Tensor, bases: Tensor) -> Tensor:
    """(..., R, C) and (..., K, C) to the cosine of each pair, zero where it is negative, (..., R, K)."""
    return functional.cosine_similarity(crops[..., :, None, :], bases[..., None, :, :], dim=-1).relu()


def assignment_loss(labels: Tensor, predicted: Tensor, counted: Tensor) -> Tensor:
    """How far similarities are from labels in each sample (Wu et al. 2024, section 3.2, as the public code has it).

    With labels l and similarities s of the pairs that count,
    ``sum -l log(1 - |l - s| + e) / (sum l + e) + mean over l = 0 of -log(1 - s + e)``, e = 1e-6.

    Args:
        labels, predicted: (..., R, K).
        counted: (..., R, K) bool.

    Returns:
        (...).
    """
    attract = torch.where(counted, -labels * torch.log(1 - (labels - predicted).abs() + EPSILON), 0.0)
    positive = attract.sum((-2, -1)) / (torch.where(counted, labels, 0.0).sum((-2, -1)) + EPSILON)
    apart = counted & (labels == 0)
    repel = torch.where(apart, -torch.log(1 - predicted + EPSILON), 0.0)
    return positive + repel.sum((-2, -1)) / (apart.sum((-2, -1)) + EPSILON)


def orthogonality(bases: Tensor, usable: Tensor) -> Tensor:
    """The mean over pairs of a sample's base crops of ``max(0, cos)^2`` (Wu et al. 2024, section 3.3). Of each pair
    only the first takes a gradient, as in the public code.

    Args:
        bases: (B, K, C).
        usable: (B, K) bool.

    Returns:
        (B,).
    """
    square = similarities(bases, bases.detach()) ** 2
    pairs = (usable[:, :, None] & usable[:, None, :]).triu(diagonal=1)
    return torch.where(pairs, square, 0.0).sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)


def next_sample(here: Tensor) -> tuple[Tensor, Tensor]:
    """For every sample the next one that counts, over all ranks, the first after the last.

    Args:
        here: (B,) bool, samples that count; B must be equal on all ranks.

    Returns:
        (B,) int64 rows of what ``gather_rows`` gives, and (B,) bool, False for samples that do not count and for one
        that has no company.
    """
    everywhere = gather_rows(here.to(torch.float32)) > 0
    rows = everywhere.nonzero().flatten()
    following = torch.zeros(len(everywhere), dtype=torch.int64, device=here.device)
    following[rows] = rows.roll(-1)
    own = slice(rank() * len(here), (rank() + 1) * len(here))
    return following[own], here & (len(rows) > 1)


def voco_terms(student: Tensor, taught: Tensor, usable: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The three terms of VoCo's loss over all ranks, see ``VoCo``: intra, inter and orthogonality.

    Args:
        student, taught: (B, K + R, C) embeddings, those of the base crops first.
        usable: (B, K + R) bool, crops that count.
        labels: (B, R, K).
    """
    count = labels.shape[-1]
    bases, crops = student[:, :count], student[:, count:]
    taught_bases, taught_crops = taught[:, :count], taught[:, count:]
    base_usable, crop_usable = usable[:, :count], usable[:, count:]
    counted = crop_usable[:, :, None] & base_usable[:, None, :]
    intra = assignment_loss(labels, similarities(crops, taught_bases), counted)

    here = counted.any(2).any(1)
    following, has_next = next_sample(here)
    all_usable = gather_rows(base_usable.to(torch.float32))[following] > 0
    asked = similarities(taught_crops, gather_rows(taught_bases)[following])
    found = similarities(crops, gather_rows(bases)[following])
    inter = assignment_loss(asked, found, crop_usable[:, :, None] & all_usable[:, None, :])
    return {
        "intra": mean_over(intra, here),
        "inter": mean_over(inter, has_next),
        "orthogonality": mean_over(orthogonality(bases, base_usable), base_usable.any(1)),
    }


@register
class VoCo(Objective):
    """Find out from features alone where in a sample a crop was cut.

    Base crops tile the sample; crops of the same size lie anywhere in it. A projector q and its moving average q' map
    pooled features of all crops to embeddings: z, b of random and base crops by q; z', b' by q', without gradient. With
    ``s(z, b) = max(0, cos(z, b))`` and position labels y (see ``position_labels``),

    - intra: ``assignment_loss(y, s(z, b'))`` within each sample (section 3.2);
    - inter: ``assignment_loss(s(z', b'_next), s(z, b_next))`` with the next sample's base crops, where the teacher's
      similarity is the label;
    - orthogonality: base crops of a sample are to be unlike (``orthogonality``).

    ``loss`` is their weighted sum, each a mean over samples. The projector normalises over all crops of the batch,
    without gain; both projectors start equal, and the encoder has no teacher. The teacher moves after each step, where
    the public code moves it before; that code also drops whole crops' features at random, which is left out here.

    Raises:
        UsageError: for a bag of vectors, a size that the patches do not divide, a grid that does not fit the axes; in
            ``check_batch``, for a batch of one.
    """

    name: ClassVar[str] = "voco"
    Config: ClassVar[type[ObjectiveConfig]] = VoCoConfig
    card: ClassVar[Card] = Card(
        family="embedding",
        paper="Wu et al. 2024, arXiv:2402.17300",
        predicts="how much of a crop lies in each of nine base crops, by likeness of embeddings",
        masks="nothing",
        checked="the public modules: labels, loss, regulariser; counted pixels; two ranks against one",
    )
    batch_statistic: ClassVar[str | None] = "the next sample and batch normalisation"
    config: VoCoConfig

    def __init__(self, config: VoCoConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.size = crop_size(self, "size", config.size, backbone.spec.size)
        self.cells = self._cells()
        self.head = _projector(backbone.width, config.head_hidden, config.head_out)
        self.teacher_head = ema.teacher_of(self.head)

    def _cells(self) -> tuple[int, ...]:
        spec, grid = self.backbone.spec, self.config.grid
        if grid is None:
            return tuple(GRID if axis in spec.spatial[-2:] else 1 for axis in range(len(spec.axes)))
        across = any(count != 1 for axis, count in enumerate(grid) if axis not in spec.spatial)
        if len(grid) != len(spec.axes) or min(grid) < 1 or math.prod(grid) < 2 or across:
            raise UsageError(
                f"objective.grid {list(grid)} does not divide samples with the axes ({', '.join(spec.axes)}).",
                "Give one number an axis, 1 along time, and more than one cell in all.",
            )
        return tuple(grid)

    @property
    def pooling(self) -> str:
        return "mean"

    def view_requests(self) -> tuple[ViewRequest, ...]:
        augment, count = self.config.augment, math.prod(self.cells)
        return (
            ViewRequest(BASE, self.size, count=count, augment=augment, cells=self.cells, tiled=True),
            ViewRequest(RANDOM, self.size, count=self.config.random_crops, augment=augment, cells=self.cells),
        )

    def check_batch(self, samples: int) -> None:
        check_company(self, samples)

    def forward(self, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        self.check_batch(len(batch) * world_size())
        labels = position_labels(_boxes(batch, RANDOM), _boxes(batch, BASE))
        encoded = self.backbone.forward_crops([*batch.views[BASE], *batch.views[RANDOM]])
        features = torch.stack([each.mean() for each in encoded])
        usable = torch.stack([each.usable for each in encoded])
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(torch.float32)
            student = on_crops(self.head, features, usable).transpose(0, 1)
            with torch.no_grad():
                taught = on_crops(self.teacher_head, features, usable).transpose(0, 1)
            terms = voco_terms(student, taught, usable.T, labels)
            config = self.config
            weights = (config.intra_weight, config.inter_weight, config.orthogonality_weight)
            total = sum((weight * term for weight, term in zip(weights, terms.values(), strict=True)), start=0.0)
        return {"loss": torch.as_tensor(total), **terms}

    def after_update(self, context: StepContext) -> None:
        """Move the teacher's projector."""
        ema.follow(self.teacher_head, self.head, self.config.momentum)


def _boxes(batch: Batch, name: str) -> Tensor:
    """(B, V, 2, A) where a request's views were cut."""
    boxes = [view.box for view in batch.views[name] if view.box is not None]
    if len(boxes) != len(batch.views[name]):
        raise ValueError(f"the views '{name}' of objective 'voco' do not say where they were cut")
    return torch.stack(boxes, dim=1)


def _projector(in_dim: int, hidden: int, out: int) -> nn.Sequential:
    """Three linear layers with batch normalisation that has neither gain nor memory; (R, in_dim) to (R, out)."""

    def norm() -> nn.BatchNorm1d:
        return nn.BatchNorm1d(hidden, affine=False, track_running_stats=False)

    layers = [nn.Linear(in_dim, hidden), norm(), nn.ReLU(), nn.Linear(hidden, hidden), norm(), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden, out))
