"""SwAV (Caron et al. 2020, "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments")."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from fmsuite.core.backbones.base import Backbone
from fmsuite.core.data.sample import Batch
from fmsuite.core.distributed import gather_rows, rank, world_size
from fmsuite.core.objectives.base import Card, ObjectiveConfig, Share, StepContext, register
from fmsuite.core.objectives.heads import on_crops, projector
from fmsuite.core.objectives.matryoshka import prefix
from fmsuite.core.objectives.multi_crop import MultiCrop, MultiCropConfig
from fmsuite.core.objectives.self_distillation import other_views_loss
from fmsuite.core.objectives.sinkhorn import sinkhorn
from fmsuite.core.training.durations import Duration, resolve
from fmsuite.errors import UsageError

ASSIGNING = 2
"""The global crops; their assignments are what the other crops predict."""
QUEUE_START = "15ep"


class SwAVConfig(MultiCropConfig):
    """The options of ``MultiCropConfig``, and:

    Attributes:
        prototypes: K.
        temperature: of the softmax that predicts an assignment.
        epsilon, sinkhorn_iterations: smoothness of the assignments, and how often they are balanced.
        freeze_prototypes: how long the prototypes stay as they are.
        queue_length: how many past embeddings of each global crop help to balance the assignments of a small batch
            (3840 as published for batches of 256); 0 keeps none.
        queue_start: from when on the queue is filled; it is used once it is full.
        head_hidden, head_out, head_layers: shape of the projection head.
    """

    local_crops: int = Field(default=6, ge=0)
    global_scale: Share = (0.14, 1.0)
    local_scale: Share = (0.05, 0.14)
    prototypes: int = Field(default=3000, ge=2)
    temperature: float = Field(default=0.1, gt=0)
    epsilon: float = Field(default=0.05, gt=0)
    sinkhorn_iterations: int = Field(default=3, ge=1)
    freeze_prototypes: Duration = 313
    queue_length: int = Field(default=0, ge=0)
    queue_start: Duration = QUEUE_START
    head_hidden: int = Field(default=2048, ge=1)
    head_out: int = Field(default=128, ge=1)
    head_layers: int = Field(default=2, ge=1)


@torch.no_grad()
def balanced_assignments(
    scores: Tensor, epsilon: float, iterations: int, usable: Tensor | None = None, past: Tensor | None = None
) -> Tensor:
    """Q* = Diag(u) exp(C^T Z / epsilon) Diag(v), which uses all prototypes equally (Caron et al. 2020, equation 5).

    Args:
        scores: (B, K) cosines of this rank's crops with the prototypes.
        usable: (B,) bool, crops that count. ``None`` means all.
        past: (R, K) scores of earlier crops, this rank's share of them; they take part in the balance only.

    Returns:
        (B, K) float32 probabilities, zero at crops that do not count.
    """
    scores = scores.to(torch.float32)
    rows = scores if usable is None else scores[usable]
    count = len(rows)
    if past is not None:
        rows = torch.cat([past.to(torch.float32), rows])
    assigned = sinkhorn(rows, epsilon, iterations)[len(rows) - count :]
    if usable is None:
        return assigned
    return torch.zeros_like(scores).index_put((usable,), assigned)


def swapped_prediction_loss(
    scores: Tensor, assignments: Tensor, temperature: float, usable: Tensor | None = None
) -> Tensor:
    """Predict the assignment of a global crop from every other crop (Caron et al. 2020, equations 2 and 6).

    With S crops of which the first T are assigned, ``p_s = softmax(scores_s / temperature)`` and
    ``loss = 1 / (T (S - 1)) sum_t sum_{s != t} mean_b -sum_k q_tbk log p_sbk``.

    Args:
        scores: (S, B, K) cosines with the prototypes.
        assignments: (T, B, K) probabilities q.
        usable: (S, B) bool, crops that count. ``None`` means all.

    Returns:
        A scalar; its mean over ranks is the loss of the global batch.
    """
    return other_views_loss(scores, assignments, temperature, usable)


class EmbeddingQueue(nn.Module):
    """The latest embeddings of the whole global batch, first in first out; the same on every rank.

    Args:
        kinds: numbers of independent queues.
        length: of each.
        width: of an embedding.
    """

    rows: Tensor

    def __init__(self, kinds: int, length: int, width: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(kinds, length, width))

    def share(self, kind: int) -> Tensor | None:
        """(R, width) rows that this rank answers for, so that all ranks together hold each of them once; ``None``
        until the queue is full."""
        rows = self.rows[kind]
        # Embeddings have unit length, so an empty place is one of zeros.
        return rows[rank() :: world_size()] if bool(rows[-1].any()) else None

    @torch.no_grad()
    def push(self, kind: int, embeddings: Tensor, usable: Tensor) -> None:
        """Put embeddings in front, and forget as many at the end.

        Args:
            embeddings: (B, width) unit vectors of this rank; B must be equal on all ranks.
            usable: (B,) bool, those to remember.
        """
        remembered = gather_rows(usable.to(torch.float32)) > 0
        new = gather_rows(embeddings.to(torch.float32))[remembered]
        self.rows[kind] = torch.cat([new, self.rows[kind]])[: self.rows.shape[1]]


@register
class SwAV(MultiCrop):
    """Predict the cluster assignment of a global crop from every other crop of the sample.

    A perceptron and L2 normalisation map pooled features to z, and scores are cosines with prototypes C of unit length.
    Assignments q of the two global crops are balanced over the global batch (``balanced_assignments``), and
    ``loss = swapped_prediction_loss(z C^T, q)``. With ``matryoshka``, the loss is summed over the prefixes of the
    pooled features, which share head and prototypes but are balanced each on its own.

    Raises:
        UsageError: as ``MultiCrop``; for a start of the queue where there is none.
    """

    name: ClassVar[str] = "swav"
    batch_statistic: ClassVar[str | None] = "Sinkhorn assignments and batch normalisation"
    Config: ClassVar[type[ObjectiveConfig]] = SwAVConfig
    card: ClassVar[Card] = Card(
        family="embedding",
        paper="Caron et al. 2020, arXiv:2006.09882",
        predicts="the balanced cluster of a global crop, from every other crop",
        masks="nothing",
        checked="public SwAV code: assignments, loss and the gradient of the prototypes; two ranks against one",
    )
    config: SwAVConfig

    def __init__(self, config: SwAVConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        if not config.queue_length and config.queue_start != QUEUE_START:
            raise UsageError(
                f"objective.queue_start is {config.queue_start}, but objective.queue_length is 0.",
                "Set objective.queue_length=3840, or leave the start out.",
            )
        self.head = projector(self.width, config.head_hidden, config.head_out, config.head_layers, norm=True)
        self.prototypes = nn.Parameter(torch.empty(config.prototypes, config.head_out))
        nn.init.uniform_(self.prototypes, -(config.head_out**-0.5), config.head_out**-0.5)
        self._normalise_prototypes()
        self.queue: EmbeddingQueue | None = None
        if config.queue_length:
            self.queue = EmbeddingQueue(ASSIGNING * len(self.widths), config.queue_length, config.head_out)
        self._unqueued: list[tuple[int, Tensor, Tensor]] = []

    @torch.no_grad()
    def _normalise_prototypes(self) -> None:
        # In place and not in the graph, as published: the gradient keeps its radial part.
        self.prototypes.copy_(functional.normalize(self.prototypes, dim=1))

    def forward(self, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        features, usable = self.encode_crops(batch)

        def losses_of(width: int) -> dict[str, Tensor]:
            embeddings = on_crops(self.head, prefix(features, width), usable)
            return {"loss": self._loss(embeddings, usable, self.widths.index(width), context)}

        return self.over_widths(losses_of)

    def _loss(self, embeddings: Tensor, usable: Tensor, number: int, context: StepContext) -> Tensor:
        """Of one nested width.

        Args:
            embeddings: (S, B, E), not yet of unit length.
            usable: (S, B) bool.
            number: which width.
        """
        config = self.config
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings = functional.normalize(embeddings.to(torch.float32), dim=-1)
            scores = embeddings @ self.prototypes.T
            assignments = []
            for crop in range(ASSIGNING):
                kind = ASSIGNING * number + crop
                past = None
                if self.queue is not None and self._reached(config.queue_start, context):
                    rows = self.queue.share(kind)
                    past = None if rows is None else rows @ self.prototypes.T
                    if self.training:
                        self._unqueued.append((kind, embeddings[crop].detach(), usable[crop]))
                assignments.append(
                    balanced_assignments(scores[crop], config.epsilon, config.sinkhorn_iterations, usable[crop], past)
                )
            return swapped_prediction_loss(scores, torch.stack(assignments), config.temperature, usable)

    def _reached(self, duration: Duration, context: StepContext) -> bool:
        return context.step >= resolve(duration, context.total_steps, context.steps_per_epoch)

    def before_update(self, context: StepContext) -> None:
        """Drop the prototypes' gradient while they are frozen (appendix A.1)."""
        if not self._reached(self.config.freeze_prototypes, context):
            self.prototypes.grad = None

    def after_update(self, context: StepContext) -> None:
        """Bring the prototypes back to unit length, and queue what the step has seen."""
        if self._reached(self.config.freeze_prototypes, context):
            self._normalise_prototypes()
        if self.queue is not None:
            for kind, embeddings, usable in self._unqueued:
                self.queue.push(kind, embeddings, usable)
        self._unqueued.clear()
