"""How alike every place of a source is to places that somebody pointed at, by an encoder's patch features."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fmsuite.core.adaptation.sliding_window import Blend, Read, stream_windows
from fmsuite.core.data.sample import Array, View
from fmsuite.core.encoders import Encoder
from fmsuite.core.inputs import SPATIAL_AXES
from fmsuite.errors import UsageError

Combine = Literal["max", "mean"]
BINS = 256
"""Of the histogram in which ``otsu`` looks for a threshold."""
_MODES = ("linear", "bilinear", "trilinear")


@dataclass(frozen=True)
class TokenMap:
    """Features of a source on the grid of its patches: token i along an axis stands for ``patch`` samples from
    ``i * patch`` on; the last ones may reach beyond the source.

    Attributes:
        features: (D, *tokens) float32, zero where not valid.
        valid: (*tokens) bool.
        patch: samples along each axis.
        size: of the source, in samples.
    """

    features: Tensor
    valid: Tensor
    patch: tuple[int, ...]
    size: tuple[int, ...]

    def directions(self, centred: bool = False) -> Tensor:
        """(D, *tokens) features of length 1; zero where not valid.

        Args:
            centred: the mean over the valid tokens is taken off first, which all of them share and which says nothing
                about any.
        """
        values = self.features
        if centred and bool(self.valid.any()):
            mean = values[:, self.valid].mean(1)
            values = torch.where(self.valid, values - mean.reshape(-1, *[1] * self.valid.dim()), 0.0)
        return F.normalize(values, dim=0)


@dataclass(frozen=True)
class TokenStripe:
    """Features of a part of the grid of patches.

    Attributes:
        start: where it begins, in tokens.
        features: (D, *extent) float32, zero where not valid.
        valid: (*extent) bool.
    """

    start: tuple[int, ...]
    features: Tensor
    valid: Tensor


def stream_tokens(
    encoder: Encoder,
    read: Read,
    size: Sequence[int],
    *,
    spacing: Sequence[float] | None = None,
    overlap: float = 0.5,
    blend: Blend = "gaussian",
    batch: int = 4,
    device: torch.device | str = "cpu",
    project: Tensor | None = None,
    panel: int | None = None,
) -> Iterator[TokenStripe]:
    """Patch features of a source of any size: windows as large as the encoder's input, which begin at whole patches,
    are averaged where they overlap (of several channel groups, all groups alike).

    Args:
        encoder: on ``device``.
        read: gives a box of raw values and their validity, one after the other, (2C, *extent) float32.
        size: of the source in samples.
        spacing: physical length of a sample along each axis.
        overlap: least share of a window that the next one covers as well; whole patches.
        blend, batch: see ``sliding_window``.
        project: (D, K) on ``device``: give K linear combinations of the features instead.
        panel: width of a panel in windows, see ``stream_windows``; ``None`` for the source's own width.

    Raises:
        UsageError: for an encoder without a grid of patches, or with axes that are not spatial.
    """
    spec, grid = encoder.spec, encoder.backbone.grid
    others = [axis for axis in spec.axes if axis not in SPATIAL_AXES]
    if spec.bag or others or grid is None:
        raise UsageError(
            f"Places are compared along spatial axes on a grid of patches; this encoder's input is {spec.axes}."
        )
    patch = grid.patch_size
    tokens = tuple(-(-length // step) for length, step in zip(size, patch, strict=True))
    window = tuple(length // step for length, step in zip(spec.size, patch, strict=True))
    dims = len(patch)

    def read_tokens(start: tuple[int, ...], extent: tuple[int, ...]) -> Tensor:
        """(2C * P, *extent): the samples of each patch stand where its token does."""
        begin = [place * step for place, step in zip(start, patch, strict=True)]
        wanted = [length * step for length, step in zip(extent, patch, strict=True)]
        inside = [min(n - b, w) for n, b, w in zip(size, begin, wanted, strict=True)]
        values = read(tuple(begin), tuple(inside))
        missing = [amount for w, i in zip(reversed(wanted), reversed(inside), strict=True) for amount in (0, w - i)]
        values = F.pad(values, missing)
        split = [len(values), *(part for pair in zip(extent, patch, strict=True) for part in pair)]
        cut = values.reshape(split)
        order = [0, *range(2, 2 + 2 * dims, 2), *range(1, 1 + 2 * dims, 2)]
        return cut.permute(order).reshape(-1, *extent)

    def network(packed: Tensor) -> Tensor:
        count = len(packed)
        cut = packed.reshape(count, -1, *patch, *window)
        order = [0, 1, *(axis for d in range(dims) for axis in (2 + dims + d, 2 + d))]
        values, valid = cut.permute(order).reshape(count, cut.shape[1], *spec.size).chunk(2, dim=1)
        spaces = None if spacing is None else torch.tensor([list(spacing)] * count, dtype=torch.float32)
        view = View(values, valid > 0, spacing=spaces).to(torch.device(device))
        found = encoder.features(view)
        known = found.layout.valid
        shown = torch.ones(found.patches.shape[:2], device=packed.device) if known is None else known.float()
        features = found.patches.float()
        if project is not None:
            features = features @ project
        features = features * shown[..., None]
        both = torch.cat([features, shown[..., None]], dim=2).unflatten(1, (-1, *window))
        return both.mean(1).movedim(-1, 1)

    for stripe in stream_windows(
        network,
        read_tokens,
        tokens,
        window,
        overlap=overlap,
        blend=blend,
        batch=batch,
        device=device,
        panel=None if panel is None else panel * window[min(1, dims - 1)],
    ):
        values = stripe.values.cpu()
        valid = values[-1] > 0
        features = torch.where(valid, values[:-1] / values[-1].clamp(min=1e-12), 0.0)
        yield TokenStripe((stripe.start, stripe.left, *[0] * dims)[:dims], features, valid)


def token_map(
    encoder: Encoder,
    read: Read,
    size: Sequence[int],
    *,
    spacing: Sequence[float] | None = None,
    overlap: float = 0.5,
    blend: Blend = "gaussian",
    batch: int = 4,
    device: torch.device | str = "cpu",
) -> TokenMap:
    """All of them at once; see ``stream_tokens``."""
    options = {"spacing": spacing, "overlap": overlap, "blend": blend, "batch": batch, "device": device}
    stripes = list(stream_tokens(encoder, read, size, **options))  # type: ignore[arg-type]
    grid = encoder.backbone.grid
    assert grid is not None
    features, valid = (
        torch.cat(parts, dim=at)
        for parts, at in (([stripe.features for stripe in stripes], 1), ([stripe.valid for stripe in stripes], 0))
    )
    return TokenMap(features, valid, grid.patch_size, tuple(size))


def place_vector(directions: Tensor, valid: Tensor, patch: Sequence[int], place: Sequence[float]) -> Tensor:
    """(D,) of length 1: what linear interpolation between the valid tokens' centres gives at a place.

    Args:
        directions: (D, *tokens). valid: (*tokens).
        place: sample numbers along each axis, fractions allowed.

    Raises:
        UsageError: if no valid token is near.
    """
    total, weights = torch.zeros(len(directions), dtype=torch.float32), 0.0
    low, share = [], []
    for length, step, at in zip(valid.shape, patch, place, strict=True):
        token = min(max((at + 0.5) / step - 0.5, 0.0), length - 1.0)
        low.append(min(int(token), max(length - 2, 0)))
        share.append(token - low[-1])
    for corner in np.ndindex(*[2] * len(low)):
        weight = math.prod(s if up else 1 - s for up, s in zip(corner, share, strict=True))
        where = tuple(min(start + up, n - 1) for start, up, n in zip(low, corner, valid.shape, strict=True))
        if weight > 0 and bool(valid[where]):
            total, weights = total + weight * directions[(slice(None), *where)], weights + weight
    if weights == 0 or float(total.norm()) == 0:
        raise UsageError("A click lies where the encoder sees no valid sample.", "Click into the image.")
    return F.normalize(total, dim=0)


def similarity(
    directions: Tensor, liked: Sequence[Tensor], disliked: Sequence[Tensor] = (), combine: Combine = "max"
) -> Tensor:
    """(*tokens) float32: cosine similarity to what was clicked.

    ``max_i cos(f, q_i)`` (or the mean) ``- max(0, max_j cos(f, r_j))``. With ``max`` another click on q never lowers a
    value, and another on r never raises one.

    Args:
        directions: (D, *tokens) of length 1.
        liked, disliked: q and r, (D,) each of length 1.
    """
    if not liked:
        raise ValueError("at least one place is needed")
    found = torch.tensordot(torch.stack(list(liked)), directions, dims=1)
    score = found.amax(0) if combine == "max" else found.mean(0)
    if disliked:
        score = score - torch.tensordot(torch.stack(list(disliked)), directions, dims=1).amax(0).clamp(min=0)
    return score


def to_samples(scores: Tensor, tokens: TokenMap) -> Tensor:
    """(*tokens) scores to (*size), interpolated linearly between the centres of valid tokens; not a number where none
    is near. For a cosine this is the inner product with the interpolated directions, whose length is below 1 where the
    patches around differ: even the clicked sample gets less than 1 unless it is the middle of a patch."""
    dims = len(tokens.patch)
    grid = [count * step for count, step in zip(scores.shape, tokens.patch, strict=True)]
    kept = torch.where(tokens.valid, scores, 0.0)
    box = tuple(slice(0, length) for length in tokens.size)
    spread = F.interpolate(torch.stack([kept, tokens.valid.float()])[None], grid, mode=_MODES[dims - 1])[0]
    values, weight = (part[box] for part in spread)
    return torch.where(weight > 0, values / weight.clamp(min=1e-12), torch.nan)


def otsu(values: Array) -> float:
    """The threshold that parts values into two groups of least variance within (Otsu 1979), among the borders of
    ``BINS`` equal intervals between the lowest and the highest: values from it on are above.

    Args:
        values: finite.
    """
    low, high = float(values.min()), float(values.max())
    if not low < high:
        return low
    counts, borders = np.histogram(values, BINS, (low, high))
    centres = (borders[:-1] + borders[1:]) / 2
    below, mass = counts.cumsum()[:-1].astype(np.float64), (counts * centres).cumsum()
    above = counts.sum() - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (mass[:-1] / below - (mass[-1] - mass[:-1]) / above) ** 2
    return float(borders[1 + int(np.nanargmax(np.where((below > 0) & (above > 0), between, np.nan)))])
