"""Linear probes: multinomial logistic regression of frozen features, in both of the forms that go by UNI's name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fmsuite.errors import UsageError, nearest

Form = Literal["norm", "squared"]

FORMS: dict[str, str] = {
    "norm": "mean cross-entropy + (lambda / 2) ||W||, the norm not squared (UNI's torch form)",
    "squared": "summed cross-entropy + (lambda / 2) ||W||^2 (UNI's scikit-learn form, C = 1 / lambda)",
}
"""Name to objective."""

_RELATIVE_GAP = 1e-11
_ABSOLUTE_GAP = 1e-15
_ARMIJO = 1e-4
_INNER_ITERATIONS = 500
_HALVINGS = 40


@dataclass(frozen=True)
class LinearProbe:
    """A fitted linear classifier.

    Attributes:
        weight: (C, D) float64.
        bias: (C,) float64; minus infinity, beside a weight of zeros, for a class without training items.
        form: of the penalty.
        strength: lambda, as in ``FORMS``.
        iterations: Newton steps taken.
        converged: whether the objective came within a relative 1e-11 of its minimum before the steps ran out.
    """

    weight: Tensor
    bias: Tensor
    form: Form
    strength: float
    iterations: int
    converged: bool

    @property
    def blank(self) -> bool:
        """Whether the penalty outweighs all that the features tell, so that the classes' shares are predicted."""
        return not bool(self.weight.any())

    def scores(self, features: Tensor) -> Tensor:
        """(N, C) float64 softmax probabilities of (N, D) features."""
        return torch.softmax(features.double() @ self.weight.T + self.bias, dim=1)


def fit_linear(
    features: Tensor,
    labels: Tensor,
    classes: int,
    *,
    form: Form,
    strength: float | None = None,
    max_iter: int = 1000,
) -> LinearProbe:
    """The probe that minimises one of the two objectives in ``FORMS``, in float64; biases are not penalised.

    Both are convex, and what is returned is the minimum, whatever the scale of the features. UNI runs L-BFGS (strong
    Wolfe) from zero for at most 1000 iterations, which arrives at the same place on features of even scale, and stops
    far from it where scales differ by orders of magnitude. Here it is a truncated Newton method: the Newton direction
    by conjugate gradients, preconditioned in the principal axes of the features (Lin, Weng and Keerthi 2008, "Trust
    region Newton method for logistic regression", but with a line search).

    The weights of the minimum lie in the span of the centred features (representer theorem), so the search is for
    coefficients in an orthonormal basis of that span, of which there are at most min(N - 1, D) a class. Centring
    moves the bias and nothing else.

    The unsquared norm has no derivative at zero. W = 0 is its minimum exactly if, with the best biases, the gradient
    of the mean cross-entropy is no longer than lambda / 2; the probe then predicts the classes' shares. Otherwise the
    search starts with a step down the gradient. (torch, and so UNI's code, takes the norm's derivative at zero to be
    zero, which gives the same first direction.) With the default lambda, this happens to features of few dimensions or
    of small values, and no scale is made up for them: see ``LinearProbe.blank``.

    With two classes, the squared form penalises the one weight vector that scikit-learn fits, the difference of the
    two here: half of it each, with lambda doubled, is the same problem. The norm form is a softmax over two classes, as
    in UNI's code.

    Args:
        features: (N, D) finite, any floating dtype. labels: (N,) int64 below ``classes``.
        classes: a class without items gets probability 0.
        strength: lambda, above 0; 100 / (D x number of classes with items) by default (UNI).
        max_iter: Newton steps at most; a dozen are usual.

    Raises:
        UsageError: with fewer than two classes among the labels, features that are not finite, or a bad form or
            strength.
    """
    if form not in FORMS:
        raise UsageError(f"There is no linear probe of the form '{form}'.", nearest(form, FORMS))
    present = labels.unique()
    if len(present) < 2:
        raise UsageError(
            "A linear probe needs training items of at least two classes.", "Label items of another class."
        )
    if not bool(features.isfinite().all()):
        row = int((~features.isfinite()).any(1).nonzero()[0])
        raise UsageError(f"Row {row} of the features is not finite.", "Embed that item again, or leave it out.")
    if strength is None:
        strength = 100 / (features.shape[1] * len(present))
    if not strength > 0:
        raise UsageError(f"The strength of a linear probe must be above 0, not {strength:g}.")
    centre, basis, coordinates = principal_span(features)
    penalty = strength if form == "norm" else strength / len(features) * (2 if len(present) == 2 else 1)
    problem = _Problem(coordinates, torch.searchsorted(present, labels).numpy(), len(present), form, penalty)
    coefficients, bias, iterations, converged = _minimise(problem, max_iter)
    weight = torch.zeros(classes, features.shape[1], dtype=torch.float64)
    weight[present] = torch.from_numpy((basis @ coefficients).T)
    biases = torch.full((classes,), -torch.inf, dtype=torch.float64)
    biases[present] = torch.from_numpy(bias - bias.mean()) - weight[present] @ torch.from_numpy(centre)
    return LinearProbe(weight, biases, form, strength, iterations, converged)


def principal_span(features: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean (D,), principal axes (D, r) and coordinates (N, r) of the features in them, r <= min(N - 1, D)."""
    values = features.to("cpu", torch.float64).numpy()
    centre = values.mean(0)
    values = values - centre
    if len(values) > values.shape[1]:
        _, sizes, axes = np.linalg.svd(np.linalg.qr(values, mode="r"), full_matrices=False)
        basis = axes.T
    else:
        orthonormal, triangle = np.linalg.qr(values.T)
        axes, sizes, _ = np.linalg.svd(triangle, full_matrices=False)
        basis = orthonormal @ axes
    basis = np.ascontiguousarray(basis[:, sizes > sizes[0] * max(values.shape) * np.finfo(np.float64).eps])
    return centre, basis, values @ basis


class _Problem:
    """Mean cross-entropy + penalty, as a function of coefficients (r, K) and biases (K,).

    Args:
        coordinates: (N, r). labels: (N,) below ``classes``, each of which occurs.
        form: ``norm`` for (penalty / 2) ||A||, ``squared`` for (penalty / 2) ||A||^2.
    """

    def __init__(self, coordinates: np.ndarray, labels: np.ndarray, classes: int, form: Form, penalty: float) -> None:
        self.x = coordinates
        self.labels = labels
        self.rows = np.arange(len(labels))
        self.form = form
        self.penalty = penalty
        self.shape = (coordinates.shape[1] + 1, classes)
        self.variance = np.append(np.square(coordinates).mean(0), 1.0)

    def start(self) -> np.ndarray:
        """No weights, and the best biases beside none."""
        point = np.zeros(self.shape)
        point[-1] = np.log(np.bincount(self.labels, minlength=self.shape[1]) / len(self.labels))
        return point

    def value(self, point: np.ndarray) -> tuple[float, np.ndarray]:
        """The objective, and the probabilities (N, K)."""
        logits = self.logits(point)
        # Relative to the logit of the true class, so that a small loss is not a difference of large numbers.
        logits -= logits[self.rows, self.labels][:, None]
        top = logits.max(1, keepdims=True)
        odds = np.exp(logits - top)
        total = odds.sum(1, keepdims=True)
        size = float(np.linalg.norm(point[:-1]))
        penalised = size if self.form == "norm" else size**2
        return float((np.log(total) + top).mean()) + self.penalty / 2 * penalised, odds / total

    def logits(self, point: np.ndarray) -> np.ndarray:
        return self.x @ point[:-1] + point[-1]

    def pull(self, residual: np.ndarray) -> np.ndarray:
        """The transpose of ``logits``, over N."""
        return np.concatenate([self.x.T @ residual, residual.sum(0, keepdims=True)]) / len(self.x)

    def slope(self, point: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
        """The gradient (r + 1, K), with a derivative of zero for the norm at zero."""
        residual = probabilities.copy()
        residual[self.rows, self.labels] -= 1
        slope = self.pull(residual)
        slope[:-1] += self.pressure(point) * point[:-1]
        return slope

    def pressure(self, point: np.ndarray) -> float:
        """The factor of the weights in the gradient of the penalty."""
        if self.form == "squared":
            return self.penalty
        size = float(np.linalg.norm(point[:-1]))
        return self.penalty / 2 / size if size else 0.0

    def curvature(self, point: np.ndarray, probabilities: np.ndarray, direction: np.ndarray) -> np.ndarray:
        """The Hessian at ``point`` times a direction (r + 1, K)."""
        moved = probabilities * self.logits(direction)
        product = self.pull(moved - probabilities * moved.sum(1, keepdims=True))
        pressure = self.pressure(point)
        product[:-1] += pressure * direction[:-1]
        if self.form == "norm" and pressure:
            along = point[:-1] / np.linalg.norm(point[:-1])
            product[:-1] -= pressure * np.vdot(along, direction[:-1]) * along
        return product

    def scale(self, point: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
        """(r + 1, K) estimate of the Hessian's diagonal: the axes are principal, so the features are uncorrelated."""
        spread = (probabilities * (1 - probabilities)).mean(0)
        diagonal = self.variance[:, None] * spread
        diagonal[:-1] += self.pressure(point)
        return np.maximum(diagonal, np.finfo(np.float64).tiny)


def _minimise(problem: _Problem, max_iter: int) -> tuple[np.ndarray, np.ndarray, int, bool]:
    """Coefficients (r, K), biases (K,), steps taken, and whether the minimum was reached."""
    point = problem.start()
    value, probabilities = problem.value(point)
    for step in range(max_iter):
        slope = problem.slope(point, probabilities)
        if problem.form == "norm" and not point[:-1].any():
            direction, descent = _leave_zero(problem, point, probabilities, slope)
            if descent >= 0:
                return point[:-1], point[-1], step, True
        else:
            direction = _newton(problem, point, probabilities, slope)
            descent = float(np.vdot(slope, direction))
        # Half the Newton decrement: what the quadratic model says is left to gain.
        arrived = -descent / 2 <= _RELATIVE_GAP * value + _ABSOLUTE_GAP
        for halving in range(_HALVINGS):
            trial = point + direction / 2**halving
            trial_value, trial_probabilities = problem.value(trial)
            if arrived or trial_value <= value + _ARMIJO * descent / 2**halving:
                break
        else:
            return point[:-1], point[-1], step, False
        point, value, probabilities = trial, trial_value, trial_probabilities
        if arrived:
            return point[:-1], point[-1], step + 1, True
    return point[:-1], point[-1], max_iter, False


def _leave_zero(
    problem: _Problem, point: np.ndarray, probabilities: np.ndarray, slope: np.ndarray
) -> tuple[np.ndarray, float]:
    """A step from W = 0 down the gradient of the cross-entropy, and the objective's derivative along it, which is
    not negative if W = 0 is the minimum."""
    direction = -slope
    direction[-1] = 0
    length = float(np.linalg.norm(direction))
    excess = length - problem.penalty / 2
    if excess <= 0:
        return direction, 0.0
    bend = float(np.vdot(direction, problem.curvature(point, probabilities, direction))) / length**2
    reach = excess / bend
    return direction * (reach / length), -reach * excess


def _newton(problem: _Problem, point: np.ndarray, probabilities: np.ndarray, slope: np.ndarray) -> np.ndarray:
    """An approximate solution d of H d = -slope by preconditioned conjugate gradients.

    The tolerance falls with the gradient, which makes the outer steps converge faster than linearly (Nocedal and Wright
    2006, "Numerical Optimization", algorithm 7.1).
    """
    scale = problem.scale(point, probabilities)
    direction = np.zeros_like(slope)
    residual = -slope
    scaled = residual / scale
    search = scaled
    energy = first = float(np.vdot(residual, scaled))
    tolerance = min(0.25, max(first**0.5, 1e-4)) * first
    for _ in range(_INNER_ITERATIONS):
        if energy <= tolerance:
            break
        product = problem.curvature(point, probabilities, search)
        bend = float(np.vdot(search, product))
        if bend <= 0:
            break
        length = energy / bend
        direction = direction + length * search
        residual = residual - length * product
        scaled = residual / scale
        before, energy = energy, float(np.vdot(residual, scaled))
        search = scaled + energy / before * search
    return direction
