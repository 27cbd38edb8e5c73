"""Attention-based multiple-instance learning (ABMIL): the trained baseline beside prototypes at equal shots."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmsuite.core.evaluation.bags import Bags
from fmsuite.core.seeding import derive, generator
from fmsuite.errors import UsageError

_PREDICTED_AT_ONCE = 1 << 15


@dataclass(frozen=True)
class AbmilSettings:
    """How the classifier is built and trained.

    Widths, dropout, optimiser, weight decay and the cosine schedule are those published for slides (Chen et al. 2024,
    Methods). They go with 20 epochs of hundreds of slides and a validation side to stop at. A few supports have
    neither, so here the number of steps is fixed whatever the shots, the learning rate is higher to get anywhere in
    them, nothing is stopped early, and no query is looked at before the end.

    Attributes:
        embedding, attention: widths of the embedding and of the gated attention.
        dropout: after the embedding and in both branches of the attention.
        lr: peak of the cosine from the first step down to 0.
        steps: of AdamW.
        batch: bags in a step; all bags are gone through in a new random order before one comes again.
        tiles: of a larger bag this many random vectors are taken in a step, others at every step. Predictions use all.

    Raises:
        UsageError: naming a count below 1.
    """

    embedding: int = 512
    attention: int = 384
    dropout: float = 0.25
    lr: float = 1e-3
    weight_decay: float = 1e-5
    steps: int = 100
    batch: int = 8
    tiles: int = 512

    def __post_init__(self) -> None:
        for name in ("embedding", "attention", "steps", "batch", "tiles"):
            if getattr(self, name) < 1:
                raise UsageError(f"ABMIL's '{name}' must be at least 1 ({getattr(self, name)}).")


class GatedAttention(nn.Module):
    """One weight for every vector of a bag: softmax over the bag of ``w . (tanh(V h) * sigmoid(U h))``
    (Ilse et al. 2018, "Attention-based deep multiple instance learning", equation 9)."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.V = nn.Linear(dim, hidden)
        self.U = nn.Linear(dim, hidden)
        self.w = nn.Linear(hidden, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, vectors: Tensor, bag_of: Tensor, bags: int) -> Tensor:
        """
        Args:
            vectors: (T, dim). bag_of: (T,) int64 below ``bags``.

        Returns:
            (T,) that sums to 1 in every bag.
        """
        gated = self.dropout(torch.tanh(self.V(vectors))) * self.dropout(torch.sigmoid(self.U(vectors)))
        return softmax_in_bags(self.w(gated).squeeze(1), bag_of, bags)


class Abmil(nn.Module):
    """Standardise, embed, attend, classify.

    Args:
        mean, std: (D,) that features are standardised with, so that training does not depend on an encoder's scale.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor, classes: int, settings: AbmilSettings) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.embed = nn.Sequential(nn.Linear(len(mean), settings.embedding), nn.ReLU(), nn.Dropout(settings.dropout))
        self.attention = GatedAttention(settings.embedding, settings.attention, settings.dropout)
        self.head = nn.Linear(settings.embedding, classes)

    def forward(self, features: Tensor, bag_of: Tensor, bags: int) -> tuple[Tensor, Tensor]:
        """
        Args:
            features: (T, D) float32. bag_of: (T,) int64 below ``bags``; no bag is empty.

        Returns:
            Logits (bags, classes), and attention (T,) that sums to 1 in every bag.
        """
        embedded = self.embed((features - self.mean) / self.std)
        attention = self.attention(embedded, bag_of, bags)
        pooled = embedded.new_zeros(bags, embedded.shape[1]).index_add(0, bag_of, attention[:, None] * embedded)
        return self.head(pooled), attention

    @torch.no_grad()
    def predict(self, bags: Bags, queries: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            queries: (Q,) int64 positions of bags.

        Returns:
            Class probabilities (Q, classes) float64, and the attention of the vectors of bag after bag, float32, in
            the order of ``bags.rows(queries)``.
        """
        self.eval()
        scores, attention = [], []
        sizes = bags.sizes[queries]
        # A group of bags ends where the running sum passes a multiple of the limit: whole bags, bounded memory.
        _, counts = torch.unique_consecutive((sizes.cumsum(0) - 1) // _PREDICTED_AT_ONCE, return_counts=True)
        for part in queries.split(counts.tolist()):
            bag_of = torch.repeat_interleave(torch.arange(len(part)), bags.sizes[part])
            logits, weights = self(bags.features[bags.rows(part)], bag_of, len(part))
            scores.append(logits.double().softmax(1))
            attention.append(weights)
        return torch.cat(scores), torch.cat(attention)


def softmax_in_bags(scores: Tensor, bag_of: Tensor, bags: int) -> Tensor:
    """
    Args:
        scores: (T,). bag_of: (T,) int64 below ``bags``.

    Returns:
        (T,) softmax over the scores of the same bag.
    """
    with torch.no_grad():
        highest = scores.new_full((bags,), -torch.inf).scatter_reduce(0, bag_of, scores, "amax")
    powers = (scores - highest[bag_of]).exp()
    return powers / scores.new_zeros(bags).index_add(0, bag_of, powers)[bag_of]


def fit_abmil(bags: Bags, support: Tensor, seed: int, settings: AbmilSettings | None = None) -> Abmil:
    """Train on the supports alone: cross-entropy, a fixed schedule, no validation side.

    The same seed gives the same network on one machine; the global random state is as before.

    Args:
        support: (N,) int64 positions of bags.
    """
    settings = settings or AbmilSettings()
    rows = bags.rows(support)
    sums = bags.features.new_zeros(2, bags.features.shape[1], dtype=torch.float64)
    for part in rows.split(_PREDICTED_AT_ONCE):
        chunk = bags.features[part].double()
        sums += torch.stack([chunk.sum(0), chunk.square().sum(0)])
    mean = sums[0] / len(rows)
    std = (sums[1] / len(rows) - mean.square()).clamp(min=0).sqrt()
    # A feature that does not vary among the supports says nothing, and must not blow up in the queries.
    std = torch.where(std > 1e-6 * mean.abs(), std, torch.inf)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "abmil"))
        model = Abmil(mean.float(), std.float(), bags.classes, settings).train()
        optimiser = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
        for step, chosen in enumerate(_batches(len(support), settings, seed)):
            for group in optimiser.param_groups:
                group["lr"] = settings.lr * (1 + math.cos(math.pi * step / settings.steps)) / 2
            batch = support[chosen]
            vectors, bag_of = _sampled(bags, batch, settings.tiles, derive(seed, "tiles", step))
            logits, _ = model(bags.features[vectors], bag_of, len(batch))
            loss = F.cross_entropy(logits, bags.labels[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return model.eval()


def _batches(count: int, settings: AbmilSettings, seed: int) -> list[Tensor]:
    """For each step the places of its bags among the supports: one random order of all after another, cut up."""
    random = generator(seed, "batches")
    size = min(settings.batch, count)
    rounds = -(-settings.steps * size // count)
    order = [torch.from_numpy(random.permutation(count)) for _ in range(rounds)]
    return list(torch.cat(order)[: settings.steps * size].split(size))


def _sampled(bags: Bags, batch: Tensor, tiles: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of at most ``tiles`` random vectors of each bag, and the place in ``batch`` that each belongs to."""
    random = generator(seed)
    rows = []
    for own in bags.rows(batch).split(bags.sizes[batch].tolist()):
        rows.append(own[torch.from_numpy(random.permutation(len(own))[:tiles])] if len(own) > tiles else own)
    return torch.cat(rows), torch.repeat_interleave(torch.arange(len(batch)), torch.tensor([len(r) for r in rows]))
