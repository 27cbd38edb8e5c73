"""A map of features in two dimensions, for people to look at: t-SNE."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fmsuite.core.reports.exhibits import FeatureMap
from fmsuite.core.reports.neighbours import directions
from fmsuite.core.seeding import derive, generator
from fmsuite.errors import FmsuiteError, UsageError

PERPLEXITY = 30.0
COMPONENTS = 50
ITERATIONS = 500
"""Half of the usual number: neighbourhoods are as faithful, and clusters only drift further apart afterwards."""
FEWEST = 5
"""Points from which on t-SNE is drawn; fewer have hardly any neighbours to keep."""


def feature_map(
    features: Tensor | np.ndarray,
    labels: Tensor | np.ndarray,
    held_out: Tensor | np.ndarray,
    encoder: str,
    *,
    limit: int = 1500,
    seed: int = 0,
) -> FeatureMap:
    """t-SNE (van der Maaten and Hinton 2008, "Visualizing Data using t-SNE") of a class-balanced sample.

    Features are centred and L2-normalised (``neighbours.directions``), so that nearness is what k-NN judges by; then
    reduced to ``COMPONENTS`` principal components, the first two of which are where t-SNE starts (Kobak and Berens
    2019, "The art of using t-SNE for single-cell transcriptomics"). One thread computes it, so the map does not depend
    on the number of cores.

    Args:
        features: (N, D) float.
        labels: (N,) int64, -1 where there is none; these count as a class of their own when the sample is drawn.
        held_out: (N,) bool.
        encoder: name that goes with the map.
        limit: largest number of points.
        seed: of the sample.

    Returns:
        A map of at most ``limit`` points, in the order of ``features``. Below ``FEWEST`` points the principal
        components themselves, and if all are equal, every point at 0; ``method`` says so.

    Raises:
        FmsuiteError: if a feature is not finite, naming its place.
        UsageError: if there are no features, or scikit-learn is not installed.
    """
    values = torch.as_tensor(features).detach().cpu()
    classes = torch.as_tensor(labels).cpu().numpy()
    held = torch.as_tensor(held_out).cpu().numpy().astype(bool)
    if not len(values) == len(classes) == len(held):
        raise ValueError(f"{len(values)} features, {len(classes)} labels and {len(held)} sides")
    if not len(values) or limit < 1:
        raise UsageError(f"There are no features of '{encoder}' to map (limit {limit}).", "Embed some windows first.")
    finite = torch.isfinite(values).all(dim=1)
    if not bool(finite.all()):
        raise FmsuiteError(
            f"Feature {int((~finite).nonzero()[0])} of '{encoder}' is not finite, so it has no place on a map.",
            "Embed again, or look at what the encoder makes of that window.",
        )
    chosen = balanced_sample(classes, limit, seed)
    points, method = _embed(directions(values, chosen).double().numpy(), seed)
    if len(chosen) < len(values):
        method += f" {len(chosen)} of {len(values)} features, drawn so that classes are as equal as they can be."
    points -= (points.max(axis=0) + points.min(axis=0)) / 2
    largest = np.abs(points).max()
    points = np.round(points / largest, 4) if largest > 0 else points
    return FeatureMap(
        encoder=encoder,
        method=method,
        x=points[:, 0].tolist(),
        y=points[:, 1].tolist(),
        labels=classes[chosen].tolist(),
        held_out=held[chosen].tolist(),
        sampled_from=len(values),
    )


def balanced_sample(labels: np.ndarray, limit: int, seed: int) -> np.ndarray:
    """At most ``limit`` positions, ascending, drawn at random within each class.

    What a class cannot fill of its equal share goes to the others; a remainder goes to the first classes.

    Args:
        labels: (N,) integers.
    """
    if len(labels) <= limit:
        return np.arange(len(labels))
    names, sizes = np.unique(labels, return_counts=True)
    shares = np.zeros(len(names), np.int64)
    while (left := limit - shares.sum()) > 0:
        open_ = np.flatnonzero(shares < sizes)
        # Fewer places than classes: one each, to as many as there are places.
        step = max(1, left // len(open_))
        for place in open_[: left // step]:
            shares[place] = min(sizes[place], shares[place] + step)
    drawn = [
        generator(seed, "feature map", int(name)).choice(np.flatnonzero(labels == name), share, replace=False)
        for name, share in zip(names, shares, strict=True)
    ]
    return np.sort(np.concatenate(drawn))


def _embed(values: np.ndarray, seed: int) -> tuple[np.ndarray, str]:
    """(P, D) directions to (P, 2), and how."""
    try:
        from sklearn.manifold import TSNE
        from threadpoolctl import threadpool_limits
    except ModuleNotFoundError as error:
        raise UsageError(
            f"A map of features needs {error.name}, which is not installed.",
            "Install it with `pip install 'fmsuite[reports]'`.",
        ) from error
    with threadpool_limits(limits=1):
        scores = _principal_components(values)
        start = scores[:, :2] if scores.shape[1] > 1 else np.pad(scores, ((0, 0), (0, 1)))
        if not scores.any():
            return start, "All features are equal, so the map is a single point."
        if len(values) < FEWEST:
            return start, f"First two principal components of the features; {len(values)} are too few for t-SNE."
        perplexity = min(PERPLEXITY, (len(values) - 1) / 3)
        points = TSNE(
            perplexity=perplexity,
            init=(start / start[:, 0].std() * 1e-4).astype(np.float32),
            learning_rate="auto",
            max_iter=ITERATIONS,
            random_state=derive(seed, "t-SNE") % 2**32,
            n_jobs=1,
        ).fit_transform(scores.astype(np.float32))
    method = (
        f"t-SNE of the centred, L2-normalised features, perplexity {perplexity:.3g}, started from the first "
        "two principal components. Near points are alike; distances between clusters and their sizes mean nothing."
    )
    return points.astype(np.float64), method


def _principal_components(values: np.ndarray) -> np.ndarray:
    """(P, D) to (P, at most ``COMPONENTS``) scores, zero where there is no variance beyond rounding."""
    left, sizes, _ = np.linalg.svd(values - values.mean(axis=0), full_matrices=False)
    # A singular vector's sign is arbitrary: the largest entry decides it.
    signs = np.sign(left[np.abs(left).argmax(axis=0), np.arange(left.shape[1])])
    return (left * signs * np.where(sizes > 1e-7, sizes, 0.0))[:, :COMPONENTS]
