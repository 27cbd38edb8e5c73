"""PAWS (Assran et al. 2021, "Semi-Supervised Learning of Visual Features by Non-Parametrically Predicting View
Assignments with Support Samples")."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from fmsuite.core.backbones.base import Backbone
from fmsuite.core.data.sample import Batch, SupportRequest, View, ViewRequest
from fmsuite.core.distributed import gather_rows, mean_over
from fmsuite.core.objectives.base import Card, ObjectiveConfig, Share, StepContext, register
from fmsuite.core.objectives.heads import on_usable, projector
from fmsuite.core.objectives.matryoshka import prefix
from fmsuite.core.objectives.msn import mean_entropy, sharpen
from fmsuite.core.objectives.multi_crop import MultiCrop, MultiCropConfig

SUPPORT = "support"
NEGLIGIBLE = 1e-4
"""Shares of a target below this are set to zero, as in the public code."""
BOTTLENECK = 4
"""How many times narrower the prediction head is inside, as in the public code."""


class PAWSConfig(MultiCropConfig):
    """The options of ``MultiCropConfig``, and:

    Attributes:
        classes, per_class: labelled supports of a step: how many classes, and how many windows of each, over all ranks
            together. The public ImageNet run has 15 classes of its own on each of 64 ranks, 960 in all.
        support_views: views of each support, cut as the global crops are.
        smoothing: of the supports' labels.
        temperature: of the softmax over similarities with the supports, tau.
        sharpening: exponent 1/T of the targets, as T.
        entropy_weight: of the mean-entropy term; 0 leaves it out.
        head_hidden, head_out: widths of the projection head.
        predictor: compare the students' vectors after a further head; the targets are always taken before it.
    """

    local_crops: int = Field(default=6, ge=0)
    global_scale: Share = (0.14, 1.0)
    local_scale: Share = (0.05, 0.14)
    classes: int = Field(default=15, ge=2)
    per_class: int = Field(default=7, ge=1)
    support_views: int = Field(default=1, ge=1)
    smoothing: float = Field(default=0.1, ge=0, lt=1)
    temperature: float = Field(default=0.1, gt=0)
    sharpening: float = Field(default=0.25, gt=0, le=1)
    entropy_weight: float = Field(default=1.0, ge=0)
    head_hidden: int = Field(default=2048, ge=1)
    head_out: int = Field(default=2048, ge=BOTTLENECK)
    predictor: bool = True


def smooth_labels(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """Rows ``(1 - smoothing) * one_hot + smoothing / K``; classes are numbered from 0 in the order of their codes.

    Args:
        labels: (N,) int64 of at most K classes, -1 at rows that do not count; theirs mean nothing.
        classes: K.

    Returns:
        (N, K) float32.
    """
    # Numbered without `unique`, for which a GPU would have to wait.
    ordered, order = torch.where(labels < 0, labels.max(), labels).sort()
    steps = functional.pad((ordered[1:] != ordered[:-1]).to(torch.int64), (1, 0))
    numbers = torch.empty_like(labels).scatter(0, order, steps.cumsum(0))
    own = numbers[:, None] == torch.arange(classes, device=labels.device)
    return own.to(torch.float32) * (1 - smoothing) + smoothing / classes


def soft_nearest_neighbours(
    queries: Tensor, supports: Tensor, labels: Tensor, temperature: float, counts: Tensor | None = None
) -> Tensor:
    """Labels of the supports, weighed by their similarity (section 3): ``p = softmax(cos(z, z_s) / tau) @ y_s``.

    Args:
        queries: (..., D).
        supports: (N, D).
        labels: (N, K) probabilities.
        counts: (N,) bool, supports that count. ``None`` means all.

    Returns:
        (..., K) float32 probabilities.
    """
    with torch.autocast(queries.device.type, enabled=False):
        queries, supports = (functional.normalize(z.to(torch.float32), dim=-1) for z in (queries, supports))
        similarity = queries @ supports.T / temperature
        if counts is not None:
            # Not minus infinity: a step without any usable support stays finite.
            similarity = similarity.masked_fill(~counts, torch.finfo(torch.float32).min)
        return similarity.softmax(-1) @ labels


def paws_losses(
    anchors: Tensor, targets: Tensor, sharpening: float, usable: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The two terms of PAWS (section 3), over the views of all ranks.

    A global view's target is the sharpened assignment of the other global view; a local view's is the mean of both.
    ``H(targets, anchors)`` is averaged over all views, and ``H(mean rho(p))`` is over the anchors' own assignments.

    Args:
        anchors: (S, B, K) assignments of every view, the two global ones first.
        targets: (2, B, K) assignments of the global views that give targets, in the same order, without gradient.
        usable: (S, B) bool, views that count. ``None`` means all.

    Returns:
        cross_entropy: its mean over ranks is that of the global batch.
        entropy: of the mean assignment, which is maximised; equal on all ranks.
    """
    if usable is None:
        usable = torch.ones(anchors.shape[:2], dtype=torch.bool, device=anchors.device)
    sharp, seen = sharpen(targets.detach().to(torch.float32), sharpening), usable[:2, :, None].to(torch.float32)
    both = (sharp * seen).sum(0) / seen.sum(0).clamp(min=1)
    wanted = torch.cat([sharp.flip(0), both.expand(len(anchors) - 2, -1, -1)])
    wanted = torch.where(wanted < NEGLIGIBLE, 0.0, wanted)
    counts = usable & torch.cat([usable[:2].flip(0), usable[:2].any(0).expand(len(anchors) - 2, -1)])
    log = anchors.clamp(min=torch.finfo(torch.float32).tiny).log()
    entropy = -(wanted * log).sum(-1)
    return mean_over(entropy, counts), mean_entropy(sharpen(anchors, sharpening), usable)


@register
class PAWS(MultiCrop):
    """Give all views of a sample the same soft label, taken from a few labelled supports.

    With pi_d the soft nearest neighbours over the step's supports, z the projection of a view and q(z) the prediction
    head's output, ``loss = H(rho(pi_d(z')), pi_d(q(z))) - H(mean rho(pi_d(q(z))))`` (section 3): z' is another view of
    the sample and takes no gradient; rho sharpens. Targets compare projections with projections, anchors predictions
    with predictions. Supports are part of the trained batch, also of its batch statistics.

    The loss is summed over nested widths of the features where ``matryoshka`` asks for them.
    """

    name: ClassVar[str] = "paws"
    batch_statistic: ClassVar[str | None] = "the mean prediction and batch normalisation"
    Config: ClassVar[type[ObjectiveConfig]] = PAWSConfig
    card: ClassVar[Card] = Card(
        family="embedding",
        paper="Assran et al. 2021, arXiv:2104.13963",
        predicts="the soft label that labelled supports give another view of the sample",
        masks="nothing",
        checked="public PAWS code: loss and gradients; two ranks against one",
    )
    config: PAWSConfig

    def __init__(self, config: PAWSConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        hidden, out = config.head_hidden, config.head_out
        self.projection = projector(self.width, hidden, out, 3, norm=True)
        self.prediction: nn.Module = nn.Identity()
        if config.predictor:
            self.prediction = nn.Sequential(nn.BatchNorm1d(out), projector(out, out // BOTTLENECK, out, norm=True))

    def support_request(self) -> SupportRequest:
        config = self.config
        view = ViewRequest(
            SUPPORT,
            self.global_size,
            config.support_views,
            scale=config.global_scale,
            ratio=config.ratio,
            augment=config.augment,
        )
        return SupportRequest(config.classes, config.per_class, (view,))

    def forward(self, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        entropy_weight = self.config.entropy_weight
        pooled, usable, labels, counts = self._encode(batch)
        cross_entropy = entropy = pooled.new_zeros((), dtype=torch.float32)
        for width in self.widths:
            anchors, targets = self._assign(prefix(pooled, width), usable, labels, counts)
            terms = paws_losses(anchors, targets, self.config.sharpening, usable)
            cross_entropy, entropy = cross_entropy + terms[0], entropy + terms[1]
        loss = cross_entropy - entropy_weight * entropy if entropy_weight else cross_entropy
        return {"loss": loss, "cross_entropy": cross_entropy, "mean_entropy": entropy}

    def assign(self, batch: Batch) -> Tensor:
        """(S, B, K) soft labels of every view, after the prediction head; classes in the order of their codes."""
        pooled, usable, labels, counts = self._encode(batch)
        return self._assign(pooled, usable, labels, counts)[0]

    def _encode(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """
        Returns:
            pooled: (S * B + M, D) features of all crops, global ones first, and of this rank's supports.
            usable: (S, B) bool.
            labels: (M of all ranks, K) smoothed.
            counts: (M,) bool, this rank's supports that count.
        """
        if batch.support is None:
            raise ValueError("PAWS compares with labelled supports, and the batch has none")
        supports = batch.support.views[SUPPORT]
        bundles, views = [self.global_views(batch)], [2]
        if local := self.local_views(batch):
            bundles.append(View.cat(local))
            views.append(len(local))
        bundles.append(View.cat(supports))
        views.append(len(supports))
        features = self.backbone.forward_crops([replace(bundle, mask=None) for bundle in bundles])
        parts = [self.pool(each, number) for each, number in zip(features, views, strict=True)]
        codes = batch.support.labels.repeat(len(supports))
        counts = (codes >= 0) & parts[-1][1].flatten()
        labels = smooth_labels(gather_rows(codes), self.config.classes, self.config.smoothing)
        usable = torch.cat([usable for _, usable in parts[:-1]])
        return torch.cat([pooled.flatten(0, 1) for pooled, _ in parts]), usable, labels, counts

    def _assign(self, pooled: Tensor, usable: Tensor, labels: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """(S, B, K) assignments of all crops, and (2, B, K) of the global ones as targets."""
        rows = torch.cat([usable.flatten(), counts])
        projected = on_usable(self.projection, pooled, rows)
        predicted = on_usable(self.prediction, projected, rows)
        everywhere = gather_rows(counts.to(torch.float32)) > 0

        def neighbours(values: Tensor) -> Tensor:
            crops, supports = values.split([usable.numel(), len(counts)])
            crops = crops.unflatten(0, usable.shape)
            return soft_nearest_neighbours(crops, gather_rows(supports), labels, self.config.temperature, everywhere)

        with torch.no_grad():
            targets = neighbours(projected)[:2]
        return neighbours(predicted), targets
