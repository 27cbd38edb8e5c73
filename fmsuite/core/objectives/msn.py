"""Masked Siamese networks: MSN (Assran et al. 2022, "Masked Siamese Networks for Label-Efficient Learning") and PMSN
(Assran et al. 2023, "The Hidden Uniform Cluster Prior in Self-Supervised Learning")."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from fmsuite.core.backbones.base import Backbone
from fmsuite.core.data.sample import Batch, MaskSampler, View, ViewRequest
from fmsuite.core.distributed import all_mean, gather_rows
from fmsuite.core.masking import RatioMasking, keep_ids
from fmsuite.core.masking.places import check_count
from fmsuite.core.objectives import ema
from fmsuite.core.objectives.base import Card, ObjectiveConfig, ParameterRule, Share, StepContext, register
from fmsuite.core.objectives.heads import on_crops, projector
from fmsuite.core.objectives.masks import PatternOptions, pattern_for, whole_places
from fmsuite.core.objectives.matryoshka import prefix
from fmsuite.core.objectives.momentum import MomentumConfig, MomentumTeacher
from fmsuite.core.objectives.multi_crop import FIRST, SECOND, MultiCrop, MultiCropConfig
from fmsuite.core.objectives.sinkhorn import sinkhorn
from fmsuite.errors import UsageError


class MSNConfig(MultiCropConfig, MomentumConfig, PatternOptions):
    """The options of ``MultiCropConfig``, ``MomentumConfig`` and ``PatternOptions``, and:

    Attributes:
        patch_drop: share of the patches that the student does not see in its global crop; 0 shows it all.
        prototypes: K.
        temperature: of the softmax over cosines with the prototypes.
        sharpening: temperature that sharpens the target's probabilities.
        sinkhorn_iterations: how often the targets are then balanced over the global batch; 0 leaves them as they are.
        memax_weight: of the term on the mean prediction.
        entropy_weight: of the mean entropy of the predictions.
        head_hidden, head_out, head_layers: shape of the projection head.
    """

    local_crops: int = Field(default=10, ge=0)
    global_scale: Share = (0.3, 1.0)
    local_scale: Share = (0.05, 0.3)
    momentum_schedule: Literal["cosine", "linear"] = "linear"
    patch_drop: float = Field(default=0.15, ge=0, lt=1)
    prototypes: int = Field(default=1024, ge=2)
    temperature: float = Field(default=0.1, gt=0)
    sharpening: float = Field(default=0.25, gt=0)
    sinkhorn_iterations: int = Field(default=3, ge=0)
    memax_weight: float = Field(default=1.0, ge=0)
    entropy_weight: float = Field(default=0.0, ge=0)
    head_hidden: int = Field(default=2048, ge=1)
    head_out: int = Field(default=256, ge=1)
    head_layers: int = Field(default=3, ge=1)


def sharpen(probabilities: Tensor, temperature: float) -> Tensor:
    """``p^(1/T) / sum p^(1/T)`` (Assran et al. 2021, section 3): (..., K) to the same, float32."""
    p = probabilities.to(torch.float32)
    # The largest becomes one, so that no power of all of them underflows.
    powers = (p / p.amax(-1, keepdim=True)) ** (1 / temperature)
    return powers / powers.sum(-1, keepdim=True)


def mean_prediction(probabilities: Tensor, usable: Tensor | None = None) -> Tensor:
    """The mean of predictions over the rows of all ranks.

    A loss of it is equal on all ranks, and its gradient, averaged over ranks, is that of the global batch.

    Args:
        probabilities: (..., K) of this rank.
        usable: (...) bool, rows that count. ``None`` means all.

    Returns:
        (K,) float32.
    """
    with torch.autocast(probabilities.device.type, enabled=False):
        rows = probabilities.to(torch.float32).reshape(-1, probabilities.shape[-1])
        weight = rows.new_ones(len(rows)) if usable is None else usable.reshape(-1).to(torch.float32)
        total = gather_rows(torch.cat([weight @ rows, weight.sum()[None]])[None]).sum(0)
        return total[:-1] / total[-1].clamp(min=1)


def entropy(probabilities: Tensor) -> Tensor:
    """``-sum_k p_k log p_k``: (..., K) to (...); the gradient stays finite where p is zero."""
    return -(probabilities * probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny).log()).sum(-1)


def mean_entropy(probabilities: Tensor, usable: Tensor | None = None) -> Tensor:
    """H(mean p) over the rows of all ranks, which MSN and PAWS maximise; arguments as of ``mean_prediction``."""
    return entropy(mean_prediction(probabilities, usable))


def divergence(mean: Tensor, prior: Tensor) -> Tensor:
    """``KL(mean || prior) = sum_k mean_k log(mean_k / prior_k)`` of two (K,) distributions; for a flat prior,
    ``log K - H(mean)``."""
    return -(mean * prior.log()).sum() - entropy(mean)


def cluster_prior(kind: Literal["uniform", "power_law"], prototypes: int, exponent: float) -> Tensor:
    """(K,) float32 probabilities: all equal, or proportional to ``k^-exponent`` for k = 1 ... K."""
    weights = torch.ones(prototypes, dtype=torch.float64)
    if kind == "power_law":
        weights = torch.arange(1, prototypes + 1, dtype=torch.float64) ** -exponent
    return (weights / weights.sum()).to(torch.float32)


def cluster_scores(embeddings: Tensor, prototypes: Tensor, temperature: float) -> Tensor:
    """Log of ``softmax_k(cos(z, prototype_k) / temperature)`` (Assran et al. 2022, section 3.2).

    Args:
        embeddings: (..., D), of any length.
        prototypes: (K, D), of any length.

    Returns:
        (..., K) float32.
    """
    embeddings = functional.normalize(embeddings.to(torch.float32), dim=-1)
    prototypes = functional.normalize(prototypes.to(torch.float32), dim=-1)
    return functional.log_softmax(embeddings @ prototypes.T / temperature, dim=-1)


@torch.no_grad()
def sharpened_targets(scores: Tensor, sharpening: float, iterations: int, usable: Tensor | None = None) -> Tensor:
    """Targets of the anchors: the target view's probabilities sharpened, then balanced over the global batch.

    Args:
        scores: (B, K) of ``cluster_scores``.
        sharpening: temperature.
        iterations: of Sinkhorn's scalings; 0 leaves the sharpened probabilities as they are.
        usable: (B,) bool, samples that count. ``None`` means all.

    Returns:
        (B, K) float32, zero at samples that do not count.
    """
    sharp = functional.log_softmax(scores / sharpening, dim=-1)
    rows = sharp if usable is None else sharp[usable]
    targets = sinkhorn(rows, 1.0, iterations) if iterations else rows.exp()
    return targets if usable is None else torch.zeros_like(sharp).index_put((usable,), targets)


@dataclass(frozen=True)
class SiameseTerms:
    """Three scalars, each the mean over the global batch once averaged over ranks.

    Attributes:
        cross_entropy: ``mean H(target, p)`` over anchors and samples.
        divergence: ``KL(mean p || prior)``.
        entropy: ``mean H(p)``.
    """

    cross_entropy: Tensor
    divergence: Tensor
    entropy: Tensor


def siamese_terms(scores: Tensor, targets: Tensor, prior: Tensor, usable: Tensor | None = None) -> SiameseTerms:
    """Assran et al. 2022, equation 1, with the prior of Assran et al. 2023.

    ``1/(VB) sum_vb H(target_b, p_vb)``, the divergence of the mean prediction from the prior (for a flat one,
    ``log K - H(mean p)``), and ``1/(VB) sum_vb H(p_vb)``.

    Args:
        scores: (V, B, K) log probabilities of the anchors (``cluster_scores``).
        targets: (B, K) probabilities.
        prior: (K,) probabilities of the clusters.
        usable: (V, B) bool, anchors that count. ``None`` means all.
    """
    p = scores.exp()
    counted = scores.new_ones(scores.shape[:2]) if usable is None else usable.to(scores.dtype)
    number = all_mean(counted.sum())
    weight = counted / torch.where(number > 0, number, 1.0)
    return SiameseTerms(
        cross_entropy=(-(targets * scores).sum(-1) * weight).sum(),
        divergence=divergence(mean_prediction(p, usable), prior) * (number > 0),
        entropy=(-(p * scores).sum(-1) * weight).sum(),
    )


@register
class MSN(MultiCrop, MomentumTeacher):
    """Match the clusters of a partly hidden crop, and of small crops, to those of another, whole crop.

    With p the softmax over cosines with K learned prototypes, anchors v (a global crop without ``patch_drop`` of its
    patches, and the local crops) through the student, and the other global crop through the teacher:
    ``loss = mean_vb H(target_b, p_vb) + memax_weight (log K - H(mean p)) + entropy_weight mean_vb H(p_vb)``
    (``siamese_terms``, ``sharpened_targets``). Dropped and invalid patches never reach the student. The head is
    normalised over the crops of one size, as published. With ``matryoshka``, the loss is summed over the prefixes of
    the pooled features, which share heads and prototypes.

    Raises:
        UsageError: as ``MultiCrop``; for a backbone that cannot drop tokens, a share that drops none or all, or a
            pattern that does not fit (none follows attention: the teacher sees another crop).
    """

    name: ClassVar[str] = "msn"
    batch_statistic: ClassVar[str | None] = "Sinkhorn assignments and the mean prediction"
    Config: ClassVar[type[ObjectiveConfig]] = MSNConfig
    card: ClassVar[Card] = Card(
        family="embedding",
        paper="Assran et al. 2022, arXiv:2204.07141",
        predicts="the teacher's cluster of a whole crop, from another crop with patches dropped and from small crops",
        masks="15% of a global crop at random; the student never sees them",
        checked="public MSN code: loss, targets and gradients, with and without Sinkhorn; two ranks against one",
    )
    config: MSNConfig
    prior: Tensor

    def __init__(self, config: MSNConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        if config.patch_drop:
            self.need(can_drop_tokens=True)
            self.pattern = pattern_for(self, config, self.global_size)
            check_count(config.patch_drop, whole_places(self, self.pattern, self.global_size), "objective.patch_drop")
        elif config.masking != "random" or config.alike:
            raise UsageError(
                "objective.masking and objective.alike have no effect with objective.patch_drop 0.",
                "Remove them, or drop some patches.",
            )
        hidden, out, layers = config.head_hidden, config.head_out, config.head_layers
        self.head = projector(self.width, hidden, out, layers, norm=True, activation=nn.GELU, std=0.02)
        self.teacher_head = ema.teacher_of(self.head)
        self.prototypes = nn.Parameter(torch.empty(config.prototypes, config.head_out))
        nn.init.uniform_(self.prototypes, -(config.head_out**-0.5), config.head_out**-0.5)
        self.register_buffer("prior", self.make_prior(), persistent=False)

    def make_prior(self) -> Tensor:
        """(K,) probabilities that the mean prediction is drawn to."""
        return cluster_prior("uniform", self.config.prototypes, 0.0)

    def followers(self) -> Sequence[tuple[nn.Module, nn.Module]]:
        return [*super().followers(), (self.teacher_head, self.head)]

    def parameter_rule(self, name: str) -> ParameterRule:
        """Only the direction of a prototype counts, so its length is not decayed."""
        return ParameterRule(decayed=name != "prototypes")

    def mask_sampler(self) -> MaskSampler | None:
        return RatioMasking(self.config.patch_drop, self.pattern) if self.config.patch_drop else None

    def view_requests(self) -> tuple[ViewRequest, ...]:
        """The target's crop is whole; the student's is varied as strongly, not as the second of a pair."""
        first, second, *rest = super().view_requests()
        return (replace(first, mask=None), replace(second, second=False), *rest)

    def _student(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """(V, B, D) pooled features and (V, B) bool which count: of the global crop, and of the local ones."""
        view = batch.views[SECOND][0]
        keep = keep_valid = None
        if self.config.patch_drop:
            if view.mask is None:
                raise ValueError("the student's global crop has no mask")
            keep, keep_valid = keep_ids(view.mask, self.backbone.layout(view).valid)
        bundles, counts = [view], [1]
        if locals_ := self.local_views(batch):
            bundles.append(View.cat(locals_))
            counts.append(len(locals_))
        rest = [None] * (len(bundles) - 1)
        features = self.backbone.forward_crops(bundles, None, [keep, *rest], [keep_valid, *rest])
        return [self.pool(each, count) for each, count in zip(features, counts, strict=True)]

    def forward(self, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        with torch.no_grad():
            taught, whole = self.pool(self.teacher(batch.views[FIRST][0]), 1)
        groups = self._student(batch)
        # A crop without a target counts as little as one without content.
        usable = torch.cat([counts for _, counts in groups]) & whole
        parts: dict[str, Tensor] = {}
        for width in self.widths:
            with torch.no_grad():
                target = on_crops(self.teacher_head, prefix(taught, width), whole)[0]
            anchors = [on_crops(self.head, prefix(features, width), counts) for features, counts in groups]
            for name, value in self._terms(torch.cat(anchors), target, usable, whole[0]).items():
                parts[name] = parts[name] + value if name in parts else value
        return {"loss": torch.stack(list(parts.values())).sum(), **parts}

    def _terms(self, anchors: Tensor, target: Tensor, usable: Tensor, whole: Tensor) -> dict[str, Tensor]:
        """The weighted terms of one nested width.

        Args:
            anchors: (V, B, E) of the student.
            target: (B, E) of the teacher.
            usable, whole: (V, B) and (B,) bool, which of them count.
        """
        config = self.config
        with torch.autocast(anchors.device.type, enabled=False):
            targets = sharpened_targets(
                cluster_scores(target, self.prototypes, config.temperature),
                config.sharpening,
                config.sinkhorn_iterations,
                whole,
            )
            scores = cluster_scores(anchors, self.prototypes, config.temperature)
            terms = siamese_terms(scores, targets, self.prior, usable)
        parts = {"cross_entropy": terms.cross_entropy}
        if config.memax_weight:
            parts["divergence"] = config.memax_weight * terms.divergence
        if config.entropy_weight:
            parts["entropy"] = config.entropy_weight * terms.entropy
        return parts


class PMSNConfig(MSNConfig):
    """The options of ``MSNConfig``, and:

    Attributes:
        memax_weight: of the divergence of the mean prediction from the prior.
        prior: how large the clusters are expected to be: ``uniform``, ``power_law``, or a probability for each
            prototype.
        prior_exponent: of the power law: cluster k has a share proportional to ``k^-prior_exponent``.
    """

    sinkhorn_iterations: int = Field(default=0, ge=0)
    prior: Literal["uniform", "power_law"] | tuple[float, ...] = "power_law"
    prior_exponent: float = Field(default=0.25, gt=0)


@register
class PMSN(MSN):
    """MSN whose mean prediction is drawn to a given distribution of clusters, not to the uniform one.

    ``loss = mean_vb H(target_b, p_vb) + memax_weight KL(mean p || prior) + entropy_weight mean_vb H(p_vb)``. For a flat
    prior the divergence is ``log K - H(mean p)``, which is MSN's; in the other direction, as in some public code, it
    would not be. Sinkhorn makes all clusters equally large, against any other prior, so it is left out.

    Raises:
        UsageError: as ``MSN``; for a list that is no distribution over the prototypes, an exponent without a power law,
            or Sinkhorn with a prior that is not uniform.
    """

    name: ClassVar[str] = "pmsn"
    batch_statistic: ClassVar[str | None] = "Sinkhorn assignments and the mean prediction"
    Config: ClassVar[type[ObjectiveConfig]] = PMSNConfig
    card: ClassVar[Card] = Card(
        family="embedding",
        paper="Assran et al. 2023, arXiv:2210.07277",
        predicts="MSN's clusters, of sizes that follow a given prior",
        masks="15% of a global crop at random; the student never sees them",
        checked="MSN for a flat prior; closed form of the divergence; two ranks against one",
    )
    config: PMSNConfig

    def make_prior(self) -> Tensor:
        config = self.config
        flat = config.prior == "uniform"
        if config.prior != "power_law" and config.prior_exponent != PMSNConfig.model_fields["prior_exponent"].default:
            raise UsageError(
                f"objective.prior_exponent is {config.prior_exponent}, but objective.prior is no power law.",
                "Set objective.prior=power_law, or leave the exponent out.",
            )
        if isinstance(config.prior, str):
            prior = cluster_prior(config.prior, config.prototypes, config.prior_exponent)
        else:
            prior = self._listed(config.prior)
            flat = bool((prior == prior[0]).all())
        if config.sinkhorn_iterations and not flat:
            raise UsageError(
                "objective.sinkhorn_iterations makes all clusters equally large, against objective.prior.",
                "Set objective.sinkhorn_iterations=0, or objective.prior=uniform.",
            )
        return prior

    def _listed(self, shares: Sequence[float]) -> Tensor:
        wanted = self.config.prototypes
        if len(shares) != wanted or min(shares) <= 0 or not math.isclose(sum(shares), 1, rel_tol=1e-4):
            raise UsageError(
                f"objective.prior lists {len(shares)} shares, {sum(shares):g} in all, for {wanted} prototypes.",
                "Give one positive probability for each prototype; together they are 1.",
            )
        prior = torch.tensor(shares, dtype=torch.float64)
        return (prior / prior.sum()).to(torch.float32)
