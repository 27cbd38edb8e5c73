"""SimpleShot and MI-SimpleShot: the nearest class prototype, for single vectors and for bags of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fmsuite.errors import UsageError

_CHUNK_VALUES = 1 << 19
_LARGE_BAG = 256


@dataclass(frozen=True)
class Prototypes:
    """What SimpleShot learns from its supports.

    Attributes:
        mean: (D,) float64, the mean of the support features, that queries are centred with too.
        vectors: (C, D) float64, for each class the mean of its centred, L2-normalised features; not normalised again.
    """

    mean: Tensor
    vectors: Tensor


def fit_prototypes(support: Tensor, labels: Tensor, classes: int) -> Prototypes:
    """Class prototypes after centring and L2 normalisation (CL2N; Wang et al. 2019, "SimpleShot", section 3).

    With bags as supports the features are all vectors of the support bags, each under its bag's label (MI-SimpleShot,
    Chen et al. 2024, "Towards a general-purpose foundation model for computational pathology", Methods). Every vector
    counts alike, so a larger bag weighs more in the mean and in its class's prototype.

    Args:
        support: (N, D) float32.
        labels: (N,) int64, 0 to ``classes`` - 1.

    Raises:
        UsageError: naming a class without a support.
    """
    counts = torch.bincount(labels, minlength=classes)
    if bool((counts == 0).any()):
        missing = int((counts == 0).nonzero()[0])
        raise UsageError(f"Class {missing} has no labelled feature to make a prototype of.", "Label some, or drop it.")
    mean = torch.zeros(support.shape[1], dtype=torch.float64, device=support.device)
    for chunk in _chunks(support):
        mean += chunk.double().sum(0)
    mean /= len(support)
    vectors = torch.zeros(classes, support.shape[1], dtype=torch.float64, device=support.device)
    for chunk, codes in zip(_chunks(support), _chunks(support, labels), strict=True):
        centred, inverse = _centred(chunk, mean)
        vectors += F.one_hot(codes, classes).double().T @ (centred * inverse).double()
    return Prototypes(mean, vectors / counts[:, None])


def prototype_distances(features: Tensor, prototypes: Prototypes) -> Tensor:
    """Squared Euclidean distance of every centred, normalised feature to every prototype.

    ``|z|^2 - 2 z.p + |p|^2`` as a matrix product over chunks of features: nothing of N x C x D values is ever made.
    A feature that equals the mean to float32 resolution has no direction: it stays zero, and its distance to a
    prototype is ``|p|^2``.

    Args:
        features: (N, D) float32, as they come from the encoder.

    Returns:
        (N, C) float32, within 1e-5 of the sum over the squared differences in float64.
    """
    vectors, squares = prototypes.vectors.float(), prototypes.vectors.square().sum(1).float()
    distances = []
    for chunk in _chunks(features):
        centred, inverse = _centred(chunk, prototypes.mean)
        length = (inverse > 0).float()
        distances.append((length - 2 * inverse * (centred @ vectors.T) + squares).clamp_(min=0))
    return torch.cat(distances) if distances else features.new_empty(0, len(vectors))


def nearest_in_bags(distances: Tensor, sizes: Tensor, k: int) -> Tensor:
    """For every bag and prototype the mean distance of the bag's k nearest vectors (all of them in smaller bags).

    Small bags are padded to the next power of two and taken together with those of that size; large ones go one by
    one, where a call costs less than padding.

    Args:
        distances: (T, C), the vectors of bag after bag.
        sizes: (S,) int64, at least 1; they sum to T.
        k: at least 1.

    Returns:
        (S, C) in the dtype of ``distances``.

    Raises:
        UsageError: with k < 1.
    """
    if k < 1:
        raise UsageError(f"The nearest vectors of a bag must be at least 1 in number (k = {k}).")
    if len(distances) == len(sizes):
        return distances
    starts = sizes.cumsum(0) - sizes
    columns = distances.T.contiguous()
    means = distances.new_empty(distances.shape[1], len(sizes))
    for bag in (sizes > _LARGE_BAG).nonzero().flatten().tolist():
        own = columns[:, int(starts[bag]) : int(starts[bag] + sizes[bag])]
        means[:, bag] = own.topk(min(k, own.shape[1]), dim=1, largest=False).values.mean(1)
    width = 1
    while width <= _LARGE_BAG:
        bags = ((sizes > width // 2) & (sizes <= width)).nonzero().flatten()
        place = torch.arange(width, device=sizes.device)
        outside = place >= sizes[bags, None]
        rows = (starts[bags, None] + place).masked_fill_(outside, 0)
        padded = columns[:, rows].masked_fill_(outside, torch.inf)
        nearest = padded.topk(min(k, width), dim=2, largest=False).values
        counted = sizes[bags].clamp(max=k)
        beyond = torch.arange(nearest.shape[2], device=sizes.device) >= counted[:, None]
        means[:, bags] = nearest.masked_fill_(beyond, 0).sum(2) / counted
        width *= 2
    return means.T.contiguous()


def nearest_vectors(distances: Tensor, k: int) -> Tensor:
    """Which vectors of one bag speak for each class: the k nearest to its prototype, nearest first.

    Args:
        distances: (N, C) of the bag's vectors.
        k: at least 1; all vectors if there are fewer.

    Returns:
        (C, min(k, N)) int64 rows of ``distances``; of equal distances the first row comes first.
    """
    return distances.sort(dim=0, stable=True).indices[:k].T


def prototype_scores(distances: Tensor) -> Tensor:
    """Softmax over negative squared distances (Snell et al. 2017, "Prototypical networks", equation 2).

    The largest score is the nearest prototype's; of equal distances the smallest class wins.

    Args:
        distances: (N, C).

    Returns:
        (N, C) float64, rows sum to 1.
    """
    return (-distances.double()).softmax(1)


def _centred(features: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """x - mean (N, D) and 1 / |x - mean| (N, 1), which is zero where the difference is below the resolution of x.

    The mean is subtracted in two float32 parts. The first difference is exact to float32 however far the features lie
    from the origin, so the large common offset that some encoders give all their features costs no digits.
    """
    high = mean.float()
    low = (mean - high.double()).float()
    centred = (features.float() - high).sub_(low)
    norm = torch.linalg.vector_norm(centred, dim=1, keepdim=True)
    floor = float(torch.finfo(torch.float32).eps * torch.linalg.vector_norm(mean))
    return centred, torch.where(norm > floor, 1 / norm, 0.0)


def _chunks(features: Tensor, values: Tensor | None = None) -> tuple[Tensor, ...]:
    """``features`` (or what goes with their rows) in pieces that stay in a core's cache."""
    return (features if values is None else values).split(max(1, _CHUNK_VALUES // max(1, features.shape[1])))
