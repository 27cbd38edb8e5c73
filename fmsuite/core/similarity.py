"""How alike every place of a source is to places that somebody pointed at, by an encoder's patch features."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
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
SLAB = 1 << 22
"""Samples of a slab."""
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

    def mean(self) -> Tensor:
        """(D,) of the valid tokens, which all of them share and which says nothing about any; zero if there is none."""
        total = torch.zeros(len(self.features), dtype=torch.float64)
        for row in range(len(self.valid)):
            total += self.features[:, row][:, self.valid[row]].sum(1, dtype=torch.float64)
        return (total / self.valid.sum().clamp(min=1)).float()

    def directions(self, part: tuple[slice | int, ...] = (), off: Tensor | None = None) -> Tensor:
        """(D, ...) features of length 1 of a part of the grid, of all of it if none is given; zero where not valid.

        Args:
            off: (D,) what is taken off first, such as ``mean``.
        """
        values = self.features[(slice(None), *part)]
        if off is not None:
            valid = self.valid[part]
            values = torch.where(valid, values - off.reshape(-1, *[1] * valid.dim()), 0.0)
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
    panel: int | None = None,
    folder: Path | None = None,
) -> TokenMap:
    """All of them together; see ``stream_tokens``.

    Args:
        folder: where features are kept in a nameless file, of which only what is looked at is in memory; if not given,
            they are in memory.
    """
    options = {"spacing": spacing, "overlap": overlap, "blend": blend, "batch": batch, "device": device, "panel": panel}
    features, valid = None, None
    grid = encoder.backbone.grid
    for stripe in stream_tokens(encoder, read, size, **options):  # type: ignore[arg-type]
        assert grid is not None
        if features is None or valid is None:
            tokens = tuple(-(-length // step) for length, step in zip(size, grid.patch_size, strict=True))
            features, valid = _room((len(stripe.features), *tokens), folder), torch.zeros(tokens, dtype=torch.bool)
        box = tuple(slice(s, s + n) for s, n in zip(stripe.start, stripe.valid.shape, strict=True))
        features[(slice(None), *box)], valid[box] = stripe.features, stripe.valid
    assert grid is not None
    assert features is not None
    assert valid is not None
    return TokenMap(features, valid, grid.patch_size, tuple(size))


def _room(shape: tuple[int, ...], folder: Path | None) -> Tensor:
    if folder is None:
        return torch.zeros(shape)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.truncate(4 * math.prod(shape))
        return torch.from_numpy(np.memmap(file, np.float32, "r+", shape=shape))


def place_vector(tokens: TokenMap, place: Sequence[float], off: Tensor | None = None) -> Tensor:
    """(D,) of length 1: what linear interpolation between the directions of the valid tokens gives at a place.

    Args:
        place: sample numbers along each axis, fractions allowed.
        off: see ``TokenMap.directions``.

    Raises:
        UsageError: if no valid token is near.
    """
    valid = tokens.valid
    total, weights = torch.zeros(len(tokens.features), dtype=torch.float32), 0.0
    low, share = [], []
    for length, step, at in zip(valid.shape, tokens.patch, place, strict=True):
        token = min(max((at + 0.5) / step - 0.5, 0.0), length - 1.0)
        low.append(min(int(token), max(length - 2, 0)))
        share.append(token - low[-1])
    for corner in np.ndindex(*[2] * len(low)):
        weight = math.prod(s if up else 1 - s for up, s in zip(corner, share, strict=True))
        where = tuple(min(start + up, n - 1) for start, up, n in zip(low, corner, valid.shape, strict=True))
        if weight > 0 and bool(valid[where]):
            total, weights = total + weight * tokens.directions(where, off), weights + weight
    if weights == 0 or float(total.norm()) == 0:
        raise UsageError("A click lies where the encoder sees no valid sample.", "Click into the image.")
    return F.normalize(total, dim=0)


def similarity(
    tokens: TokenMap,
    liked: Sequence[Tensor],
    disliked: Sequence[Tensor] = (),
    combine: Combine = "max",
    off: Tensor | None = None,
) -> Tensor:
    """(*tokens) float32: cosine similarity to what was clicked.

    ``max_i cos(f, q_i)`` (or the mean) ``- max(0, max_j cos(f, r_j))``. With ``max`` another click on q never lowers a
    value, and another on r never raises one.

    Args:
        liked, disliked: q and r, (D,) each of length 1.
        off: see ``TokenMap.directions``.
    """
    if not liked:
        raise ValueError("at least one place is needed")
    scores = torch.empty(tokens.valid.shape)
    # Row by row: directions of all tokens would take as much memory as the features.
    for row in range(len(scores)):
        directions = tokens.directions((row,), off)
        found = torch.tensordot(torch.stack(list(liked)), directions, dims=1)
        score = found.amax(0) if combine == "max" else found.mean(0)
        if disliked:
            score = score - torch.tensordot(torch.stack(list(disliked)), directions, dims=1).amax(0).clamp(min=0)
        scores[row] = score
    return scores


def slabs(scores: Tensor, tokens: TokenMap, samples: int = SLAB) -> Iterator[tuple[int, Array]]:
    """What ``to_samples`` gives, in slabs along the first axis.

    Args:
        samples: how many a slab has, about.

    Yields:
        (first, values): the number of its first sample, and (count, *rest) float32.
    """
    patch, rows = tokens.patch[0], len(scores)
    each = max(1, samples // (patch * math.prod(tokens.size[1:])))
    for row in range(0, rows, each):
        # A row of tokens more on either side is what the samples at a slab's border are interpolated with.
        first, last = max(row - 1, 0), min(row + each + 1, rows)
        begin, end = row * patch, min((row + each) * patch, tokens.size[0])
        length = min(last * patch, tokens.size[0]) - first * patch
        part = TokenMap(tokens.features[:0], tokens.valid[first:last], tokens.patch, (length, *tokens.size[1:]))
        yield begin, to_samples(scores[first:last], part)[begin - first * patch : end - first * patch].numpy()


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
    return otsu_of(lambda: iter([values]))


def otsu_of(parts: Callable[[], Iterator[Array]]) -> float:
    """The same of values that come in parts, twice.

    Args:
        parts: finite values; there is one at least.
    """
    ends = [(float(part.min()), float(part.max())) for part in parts() if part.size]
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    if not low < high:
        return low
    borders = np.histogram_bin_edges(np.empty(0), BINS, (low, high))
    counts = np.sum([np.histogram(part, BINS, (low, high))[0] for part in parts()], axis=0)
    centres = (borders[:-1] + borders[1:]) / 2
    below, mass = counts.cumsum()[:-1].astype(np.float64), (counts * centres).cumsum()
    above = counts.sum() - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (mass[:-1] / below - (mass[-1] - mass[:-1]) / above) ** 2
    return float(borders[1 + int(np.nanargmax(np.where((below > 0) & (above > 0), between, np.nan)))])
