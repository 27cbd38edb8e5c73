"""Distances between the surfaces of two masks: Hausdorff's percentile and the normalised surface distance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fmsuite.errors import UsageError


@dataclass(frozen=True)
class SurfaceDistances:
    """From every sample of one mask's surface to the nearest of the other's, in units of the spacing.

    The surface of a mask is its samples that have a neighbour along an axis outside of it; outside the array is
    outside. Distances are between centres of samples, as MONAI's (``use_subvoxels=False``) and nnU-Net's evaluation
    have it; DeepMind's code places surfaces between samples and weighs each by its area, which differs by up to half
    a sample.

    Attributes:
        predicted: (P,) float64 from the predicted surface. true: (T,) float64 from the true one. Of an empty mask
            nothing, of one whose partner is empty infinities.
    """

    predicted: np.ndarray
    true: np.ndarray

    @property
    def absent(self) -> bool:
        """Both masks are empty."""
        return not len(self.predicted) and not len(self.true)

    def hausdorff(self, percentile: float = 95.0) -> float:
        """The larger of the two directed percentiles (interpolated linearly; MONAI's definition, not that of the
        percentile of both sets together). NaN if both masks are empty, infinite if one is: who averages replaces that
        by a bound, such as the diagonal of the array, and says so."""
        if self.absent:
            return math.nan
        if not len(self.predicted) or not len(self.true):
            return math.inf
        return float(max(np.percentile(self.predicted, percentile), np.percentile(self.true, percentile)))

    def normalised(self, tolerance: float) -> float:
        """The share of both surfaces that lies within a tolerance of the other (Nikolov et al. 2018). NaN if both masks
        are empty, 0 if one is."""
        if self.absent:
            return math.nan
        within = (self.predicted <= tolerance).sum() + (self.true <= tolerance).sum()
        return float(within / (len(self.predicted) + len(self.true)))

    def mean(self) -> float:
        """The mean of both sets together (average symmetric surface distance). NaN and infinite as ``hausdorff``."""
        if self.absent:
            return math.nan
        return float(np.concatenate([self.predicted, self.true]).mean())


def surface_distances(
    predicted: np.ndarray, true: np.ndarray, spacing: Sequence[float] | None = None
) -> SurfaceDistances:
    """
    Args:
        predicted, true: bool of one shape, any number of axes.
        spacing: physical length of a sample along each axis; 1 if not given.

    Raises:
        UsageError: for unlike shapes, a spacing that does not fit, or without scipy.
    """
    if predicted.shape != true.shape:
        raise UsageError(f"The masks have shapes {predicted.shape} and {true.shape}.", "Resample one to the other.")
    lengths = (1.0,) * true.ndim if spacing is None else tuple(spacing)
    if len(lengths) != true.ndim or not all(length > 0 for length in lengths):
        raise UsageError(
            f"A spacing of {lengths} does not fit masks of shape {true.shape}.", "Give one length an axis."
        )
    predicted, true = _cropped(predicted.astype(bool), true.astype(bool))
    edges = _surface(predicted), _surface(true)
    return SurfaceDistances(_nearest(*edges, lengths), _nearest(edges[1], edges[0], lengths))


def _cropped(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both, cut to the box around what is in either."""
    either = first | second
    if not either.any():
        return first, second
    box = []
    for axis in range(either.ndim):
        where = np.flatnonzero(either.any(axis=tuple(a for a in range(either.ndim) if a != axis)))
        box.append(slice(where[0], where[-1] + 1))
    return first[tuple(box)], second[tuple(box)]


def _surface(mask: np.ndarray) -> np.ndarray:
    inside = mask.copy()
    padded = np.pad(mask, 1)
    for axis in range(mask.ndim):
        for shift in (0, 2):
            window = tuple(slice(shift, shift + n) if a == axis else slice(1, 1 + n) for a, n in enumerate(mask.shape))
            inside &= padded[window]
    return mask & ~inside


def _nearest(here: np.ndarray, there: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    if not here.any():
        return np.empty(0)
    if not there.any():
        return np.full(int(here.sum()), math.inf)
    try:
        from scipy.spatial import KDTree
    except ImportError as error:
        raise UsageError("Surface distances need scipy, which is not installed.", "pip install scipy") from error
    tree = KDTree(np.argwhere(there) * np.asarray(spacing))
    return np.asarray(tree.query(np.argwhere(here) * np.asarray(spacing))[0], dtype=np.float64)
