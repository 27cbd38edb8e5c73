"""MoCo v3 (Chen et al. 2021, "An Empirical Study of Training Self-Supervised Vision Transformers")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from fmsuite.core.backbones.base import Backbone
from fmsuite.core.distributed import gather_rows, mean_over, rank
from fmsuite.core.objectives import ema
from fmsuite.core.objectives.base import Card, ObjectiveConfig, Share, register
from fmsuite.core.objectives.heads import projector
from fmsuite.core.objectives.two_views import TwoViewsOfTeacher, TwoViewsOfTeacherConfig, each_view
from fmsuite.errors import UsageError


class MoCoV3Config(TwoViewsOfTeacherConfig):
    """The options of ``TwoViewsOfTeacherConfig``, and:

    Attributes:
        temperature: of the softmax over similarities.
        head_hidden, head_out, head_layers: shape of the projector, batch normalised within and at its output.
        predictor_hidden, predictor_layers: shape of the predictor, normalised alike, whose output is as wide.
        freeze_patch_embed: leave the patch projection as it starts, which keeps transformers stable (section 4).
    """

    scale: Share = (0.08, 1.0)
    momentum: float = Field(default=0.99, ge=0, le=1)
    temperature: float = Field(default=0.2, gt=0)
    head_hidden: int = Field(default=4096, ge=1)
    head_out: int = Field(default=256, ge=1)
    head_layers: int = Field(default=3, ge=1)
    predictor_hidden: int = Field(default=4096, ge=1)
    predictor_layers: int = Field(default=2, ge=1)
    freeze_patch_embed: bool = True


def info_nce(query: Tensor, key: Tensor, temperature: float, usable: Tensor) -> Tensor:
    """``-log(exp(q . k+ / T) / sum over k of exp(q . k / T)) * 2 T`` (Chen et al. 2021, equation 1 and algorithm 1).

    The keys are those of one view of all samples on all ranks, the positive among them.

    Args:
        query, key: (B, D), row by row two views of one sample; B must be equal on all ranks.
        usable: (B,) bool, samples that count as keys.

    Returns:
        (B,) float32; what stands in rows that do not count is finite and means nothing.
    """
    with torch.autocast(query.device.type, enabled=False):
        query, key = (functional.normalize(each.to(torch.float32), dim=1) for each in (query, key))
        keys, counted = gather_rows(key), gather_rows(usable.to(torch.float32)) > 0
        own = torch.arange(len(query), device=query.device)
        partner = own + len(query) * rank()
        excluded = (~counted)[None].repeat(len(query), 1)
        # An unusable row's own key stays in its sum, so that the row is finite before it is left out.
        excluded[own, partner] = False
        logits = (query @ keys.T / temperature).masked_fill(excluded, -torch.inf)
        return functional.cross_entropy(logits, partner, reduction="none") * (2 * temperature)


@register
class MoCoV3(TwoViewsOfTeacher):
    """Find the teacher's projection of the other view among those of the batch.

    With queries q (student, projector, predictor) and keys k (teacher, its projector) of two views,
    ``loss = mean over samples of ctr(q_1, k_2) + ctr(q_2, k_1)`` with ctr as in ``info_nce`` (algorithm 1). The linear
    maps of both heads have no biases and their outputs are normalised without scale and shift (public code). The
    patch projection stays random and frozen (section 4).

    Raises:
        UsageError: as ``TwoViews``; if the patch projection is to be frozen and the backbone has none.
    """

    name: ClassVar[str] = "mocov3"
    batch_statistic: ClassVar[str | None] = "negatives and batch normalisation"
    Config: ClassVar[type[ObjectiveConfig]] = MoCoV3Config
    card: ClassVar[Card] = Card(
        family="embedding",
        paper="Chen et al. 2021, arXiv:2104.02057",
        predicts="which of the teacher's projections shows the same sample",
        masks="nothing",
        checked="brute-force loops; two ranks against one",
    )
    config: MoCoV3Config

    def __init__(self, config: MoCoV3Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        if config.freeze_patch_embed:
            self._freeze_patch_embed()
        hidden, out = config.head_hidden, config.head_out

        def head(in_dim: int, hidden: int, layers: int) -> nn.Sequential:
            return projector(in_dim, hidden, out, layers, norm=True, out_norm="plain", bias=False, out_bias=False)

        self.head = head(self.width, hidden, config.head_layers)
        self.teacher_head = ema.teacher_of(self.head)
        self.predictor = head(out, config.predictor_hidden, config.predictor_layers)

    def _freeze_patch_embed(self) -> None:
        frozen = [p for name, p in self.backbone.named_parameters() if "patch_embed" in name.split(".")]
        if not frozen:
            raise UsageError(
                f"objective.freeze_patch_embed: {type(self.backbone).__name__} has no patch projection to freeze.",
                "Set objective.freeze_patch_embed=false, or choose another model.",
            )
        for parameter in frozen:
            parameter.requires_grad_(False)

    def followers(self) -> Sequence[tuple[nn.Module, nn.Module]]:
        return [*super().followers(), (self.teacher_head, self.head)]

    def compare(self, features: Tensor, taught: Tensor | None, usable: Tensor) -> dict[str, Tensor]:
        assert taught is not None
        with torch.no_grad():
            keys = each_view(self.teacher_head, taught, usable)
        projected = torch.stack(each_view(self.head, features, usable))
        queries = each_view(self.predictor, projected, usable)
        temperature = self.config.temperature
        both = info_nce(queries[0], keys[1], temperature, usable) + info_nce(queries[1], keys[0], temperature, usable)
        return {"loss": mean_over(both, usable)}
