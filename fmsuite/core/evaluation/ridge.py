"""Ridge regression of frozen features, its penalty chosen by cross-validation over groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fmsuite.core.evaluation.linear import principal_span
from fmsuite.core.seeding import generator
from fmsuite.errors import UsageError

FOLDS = 5
STRENGTHS = tuple(10 ** (exponent / 2) for exponent in range(-4, 15))
"""Half decades from 0.01 to 10 million: of standardised features N is what the penalty has to be held against."""


@dataclass(frozen=True)
class Ridge:
    """A fitted regression.

    Attributes:
        weight: (D,) float64, of features as they were given.
        bias: float.
        strength: lambda.
        errors: mean squared error of the cross-validation for every strength that was tried; empty for a given one.
    """

    weight: Tensor
    bias: float
    strength: float
    errors: tuple[float, ...] = ()

    def predict(self, features: Tensor) -> Tensor:
        """(N,) float64 of (N, D) features."""
        return features.double() @ self.weight + self.bias


def fit_ridge(features: Tensor, target: Tensor, strength: float) -> Ridge:
    """The minimum of ``sum (y - Xw - b)^2 + lambda ||w||^2``, in float64, over standardised features (Hoerl and Kennard
    1970, "Ridge regression").

    Features have their mean taken off and are divided by their standard deviation (of N, not N - 1), those that do not
    vary by 1. The bias is not penalised.

    Args:
        features: (N, D) finite. target: (N,) finite.
        strength: lambda, above 0.

    Raises:
        UsageError: for no items, values that are not finite, or a bad strength.
    """
    _check(features, target)
    if not strength > 0:
        raise UsageError(f"The strength of a ridge regression must be above 0, not {strength:g}.")
    problem = _Problem.of(features, target)
    return problem.solution(strength)


def fit_ridge_cv(
    features: Tensor, target: Tensor, groups: Tensor, seed: int, strengths: Sequence[float] = STRENGTHS
) -> Ridge:
    """``fit_ridge`` with the strength of the least mean squared error over ``FOLDS`` folds, of which none divides a
    group; the larger of equal ones. Features are standardised within each fold's training part.

    Args:
        groups: (N,) int64.
        seed: of the folds.

    Raises:
        UsageError: as ``fit_ridge``; if there are fewer than two groups.
    """
    _check(features, target)
    fold = folds_of(groups, seed)
    errors = torch.zeros(len(strengths), dtype=torch.float64)
    for number in range(int(fold.max()) + 1):
        asked = fold == number
        problem = _Problem.of(features[~asked], target[~asked])
        missed = problem.predictions(features[asked], strengths) - target[asked].double()[:, None]
        errors += missed.square().sum(0)
    errors /= len(target)
    best = max(range(len(strengths)), key=lambda n: (-errors[n].item(), strengths[n]))
    found = _Problem.of(features, target).solution(strengths[best])
    return Ridge(found.weight, found.bias, found.strength, tuple(errors.tolist()))


def folds_of(groups: Tensor, seed: int, folds: int = FOLDS) -> Tensor:
    """(N,) int64 number of each item's fold: groups, the largest first and equal ones in random order, each join the
    fold that has the fewest items.

    Raises:
        UsageError: if there are fewer than two groups.
    """
    names, member, sizes = groups.unique(return_inverse=True, return_counts=True)
    if len(names) < 2:
        raise UsageError(
            "The strength of a ridge regression is chosen over groups, and all training items are of one.",
            "Label items of another patient or scene, or name the groups with data.group_column.",
        )
    order = generator(seed, "folds").permutation(len(names))
    order = order[np.argsort(-sizes.numpy()[order], kind="stable")]
    count = min(folds, len(names))
    have = np.zeros(count, dtype=np.int64)
    fold = np.empty(len(names), dtype=np.int64)
    for group in order:
        fold[group] = have.argmin()
        have[fold[group]] += int(sizes[group])
    return torch.from_numpy(fold)[member]


@dataclass(frozen=True)
class _Problem:
    """A ridge regression in the principal axes of its standardised features, where every coefficient stands alone.

    Attributes:
        mean, scale: (D,) of the features. basis: (D, r) principal axes.
        energy: (r,) squared length of the items' coordinates along each axis.
        pull: (r,) product of these coordinates with the centred target.
        level: mean of the target.
    """

    mean: Tensor
    scale: Tensor
    basis: Tensor
    energy: Tensor
    pull: Tensor
    level: float

    @classmethod
    def of(cls, features: Tensor, target: Tensor) -> _Problem:
        values, target = features.double(), target.double()
        mean, scale = values.mean(0), values.std(0, correction=0)
        scale = torch.where(scale > 1e-12 * values.abs().amax(0), scale, 1.0)
        _, basis, coordinates = (torch.from_numpy(part) for part in principal_span((values - mean) / scale))
        level = target.mean()
        energy = coordinates.square().sum(0)
        return cls(mean, scale, basis, energy, coordinates.T @ (target - level), level.item())

    def coefficients(self, strengths: Sequence[float]) -> Tensor:
        """(D, L) weights of standardised features."""
        penalised = self.energy[:, None] + torch.tensor(strengths, dtype=torch.float64)
        return self.basis @ (self.pull[:, None] / penalised)

    def predictions(self, features: Tensor, strengths: Sequence[float]) -> Tensor:
        """(N, L)."""
        return ((features.double() - self.mean) / self.scale) @ self.coefficients(strengths) + self.level

    def solution(self, strength: float) -> Ridge:
        weight = self.coefficients([strength])[:, 0] / self.scale
        return Ridge(weight, self.level - (self.mean @ weight).item(), float(strength))


def _check(features: Tensor, target: Tensor) -> None:
    if not len(target) or len(features) != len(target):
        raise UsageError(f"{len(features)} features and {len(target)} numbers to regress on.")
    if not bool(features.isfinite().all()):
        row = int((~features.isfinite()).any(1).nonzero()[0])
        raise UsageError(f"Row {row} of the features is not finite.", "Embed that item again, or leave it out.")
    if not bool(target.isfinite().all()):
        raise UsageError("A number to regress on is not finite.", "Leave out items without one.")
