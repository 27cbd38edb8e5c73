"""Mask samplers: which tokens of a view are hidden. Functions of shapes, validity and a generator.

Every sampler counts *places*. Without ``alike`` axes a place is a token; with them it is a position on the remaining
axes, and its tokens along the alike axes are hidden or shown together: ``alike=("time",)`` makes tubes (Tong et al.
2022, section 3.3), ``alike=("group",)`` hides the same places in every channel group (SatMAE's consistent masks, Cong
et al. 2022, section 3.3). A place is available if any of its tokens is valid; only available places are drawn and
counted, and an invalid token is never masked, whatever happens to its place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fmsuite.core.data.sample import Array, MaskContext
from fmsuite.core.seeding import derive, permuted
from fmsuite.errors import UsageError, nearest

LOWEST_ASPECT = 0.3
"""Blocks have aspect ratios between this and its inverse (Bao et al. 2021, algorithm 1)."""


def kept_count(available: int, ratio: float) -> int:
    """MAE's count of visible places, ``int(available * (1 - ratio))`` (He et al. 2021, section 3), but at least one
    where any is available, so that a sample with few valid tokens still has a context."""
    return min(available, max(1, int(available * (1 - ratio))))


def _check_open(ratio: float) -> None:
    if not 0 < ratio < 1:
        raise UsageError(
            f"A mask ratio of {ratio} leaves no token visible, or masks none.", "Choose one between 0 and 1."
        )


def check_ratio(ratio: float, axes: Sequence[str], shape: Sequence[int], alike: Sequence[str] = ()) -> None:
    """Refuse, before training, a ratio that leaves no visible place or hides none on a whole grid.

    Raises:
        UsageError: for such a ratio, or an ``alike`` axis that the tokens do not have.
    """
    _check_open(ratio)
    places = math.prod(_free_shape(axes, shape, alike))
    visible = int(places * (1 - ratio))
    if not 0 < visible < places:
        raise UsageError(
            f"A mask ratio of {ratio} leaves {visible} of {places} tokens visible.",
            "Change the ratio, or use a larger input or a smaller patch.",
        )


def random_mask(
    axes: Sequence[str],
    shape: Sequence[int],
    valid: Array,
    ratio: float,
    generator: np.random.Generator,
    alike: Sequence[str] = (),
) -> Array:
    """Uniform masking without replacement (He et al. 2021): of L available places, ``kept_count(L, ratio)`` stay.

    Args:
        axes, shape: the token grid.
        valid: (N,) bool in row-major order.
        ratio: share of places to hide.
        alike: axes along which the pattern repeats.

    Returns:
        (N,) bool, True where masked.

    Raises:
        UsageError: for a ratio that is not between 0 and 1, or an unknown ``alike`` axis.
    """
    _check_open(ratio)
    available = _available(axes, shape, valid, alike)
    ids = np.flatnonzero(available)
    hidden = np.zeros(available.shape, dtype=bool)
    hidden.flat[generator.permutation(ids)[kept_count(len(ids), ratio) :]] = True
    return _spread(hidden, axes, shape, valid, alike)


def block_mask(
    axes: Sequence[str],
    shape: Sequence[int],
    valid: Array,
    count: int,
    generator: np.random.Generator,
    min_block: int = 4,
    max_block: int | None = None,
    alike: Sequence[str] = (),
) -> Array:
    """Block-wise masking (Bao et al. 2021, algorithm 1) on a grid of any dimension, with an exact count.

    Boxes are placed until ``count`` places are hidden; one that would hide too many is drawn again, and when ten in a
    row do not fit, the rest is topped up with single places. A box's volume is uniform between ``min_block`` and
    what is missing; in two dimensions its aspect ratio is log-uniform in (0.3, 1/0.3), and in more the same ratio
    is drawn between each side and the geometric mean of the sides that follow, shortest axis first.

    Args:
        axes, shape, valid, alike: as in ``random_mask``.
        count: available places to hide.
        min_block, max_block: bounds of a box's volume in places.

    Returns:
        (N,) bool, True where masked.

    Raises:
        UsageError: for an unknown ``alike`` axis, or more places than there are.
    """
    available = _available(axes, shape, valid, alike)
    total = int(available.sum())
    if not 0 <= count <= total:
        raise UsageError(f"{count} places cannot be masked where {total} are available.", "Lower the mask ratio.")
    hidden = np.zeros(available.shape, dtype=bool)
    missing = count
    while missing > 0:
        for _ in range(10):
            largest = min(missing, max_block or missing)
            volume = generator.uniform(min(min_block, largest), largest)
            box = _draw_box(hidden.shape, volume, generator)
            fresh = available[box] & ~hidden[box]
            gain = int(fresh.sum())
            if 0 < gain <= missing:
                hidden[box] |= fresh
                missing -= gain
                break
        else:
            rest = np.flatnonzero(available & ~hidden)
            hidden.flat[generator.choice(rest, missing, replace=False)] = True
            missing = 0
    return _spread(hidden, axes, shape, valid, alike)


def _draw_box(shape: Sequence[int], volume: float, generator: np.random.Generator) -> tuple[slice, ...]:
    sides = [1] * len(shape)
    order = sorted(generator.permutation(len(shape)).tolist(), key=lambda axis: shape[axis])
    rest = max(volume, 1.0)
    for number, axis in enumerate(order):
        free = len(order) - number
        log_aspect = generator.uniform(math.log(LOWEST_ASPECT), -math.log(LOWEST_ASPECT)) if free > 1 else 0.0
        side = rest ** (1 / free) * math.exp(log_aspect * (free - 1) / free)
        sides[axis] = min(shape[axis], max(1, round(side)))
        rest = max(rest / sides[axis], 1.0)
    starts = [int(generator.integers(length - side + 1)) for length, side in zip(shape, sides, strict=True)]
    return tuple(slice(start, start + side) for start, side in zip(starts, sides, strict=True))


def _free_shape(axes: Sequence[str], shape: Sequence[int], alike: Sequence[str]) -> tuple[int, ...]:
    for axis in alike:
        if axis not in axes:
            raise UsageError(f"Masks cannot be alike along '{axis}'.", nearest(axis, axes))
    if len(shape) != len(axes):
        # A bag: its tokens stand anywhere, in a row of their own.
        if alike:
            raise UsageError(f"Tokens without a grid cannot be alike along {', '.join(alike)}.")
        return tuple(shape)
    return tuple(length for axis, length in zip(axes, shape, strict=True) if axis not in alike)


def _alike_positions(axes: Sequence[str], alike: Sequence[str]) -> tuple[int, ...]:
    return tuple(position for position, axis in enumerate(axes) if axis in alike)


def _available(axes: Sequence[str], shape: Sequence[int], valid: Array, alike: Sequence[str]) -> Array:
    """Bool on the grid of places: any token of the place is valid."""
    _free_shape(axes, shape, alike)
    return np.logical_or.reduce(valid.reshape(tuple(shape)), axis=_alike_positions(axes, alike))


def _spread(hidden: Array, axes: Sequence[str], shape: Sequence[int], valid: Array, alike: Sequence[str]) -> Array:
    repeated = np.expand_dims(hidden, _alike_positions(axes, alike))
    return np.broadcast_to(repeated, tuple(shape)).reshape(-1) & valid


@dataclass(frozen=True)
class RandomMasking:
    """MAE's masks: see ``random_mask``."""

    ratio: float
    alike: tuple[str, ...] = ()

    def __call__(self, context: MaskContext) -> Array:
        return random_mask(context.axes, context.shape, context.valid, self.ratio, context.generator, self.alike)


@dataclass(frozen=True)
class BlockMasking:
    """Block masks with MAE's count: see ``block_mask`` and ``kept_count``."""

    ratio: float
    min_block: int = 4
    alike: tuple[str, ...] = ()

    def __call__(self, context: MaskContext) -> Array:
        _check_open(self.ratio)
        places = _places(context, self.alike)
        return _blocks(context, places - kept_count(places, self.ratio) if places else 0, self.min_block, self.alike)


@dataclass(frozen=True)
class SpreadBlockMasking:
    """DINOv2's masks (Oquab et al. 2023, appendix B.1): a fixed share of the global batch's crops is masked, with
    ratios spread evenly over a range.

    With n crops to mask, the one that a per-step permutation of the batch puts at rank r < n has the ratio
    ``low + (high - low) (r + u) / n``, u uniform in [0, 1). It depends on the crop's place in the run only, so ranks
    and loader processes do not change it.

    Attributes:
        share: share of the crops that are masked.
        ratios: range of the ratio of masked places.
        min_block: smallest block in places.
        alike: axes along which the pattern repeats.
    """

    share: float = 0.5
    ratios: tuple[float, float] = (0.1, 0.5)
    min_block: int = 4
    alike: tuple[str, ...] = ()

    def __call__(self, context: MaskContext) -> Array:
        key = context.key
        crops = key.slots * context.views
        rank = permuted(key.slot * context.views + context.view, crops, derive("masked crops", key.step))
        masked = int(crops * self.share)
        if rank >= masked:
            return np.zeros_like(context.valid)
        low, high = self.ratios
        ratio = low + (high - low) * (rank + context.generator.random()) / masked
        return _blocks(context, int(_places(context, self.alike) * ratio), self.min_block, self.alike)


@dataclass(frozen=True)
class OddsBlockMasking:
    """iBOT's masks (Zhou et al. 2021, section 4): none at all, or a uniform ratio, at given odds for each crop.

    Attributes:
        share: probability that a crop is masked.
        ratios: range of the ratio of masked places.
        min_block: smallest block in places; by default the square of a third of the grid's shortest side, as published.
        alike: axes along which the pattern repeats.
    """

    share: float = 0.5
    ratios: tuple[float, float] = (0.1, 0.5)
    min_block: int | None = None
    alike: tuple[str, ...] = ()

    def __call__(self, context: MaskContext) -> Array:
        if context.generator.random() >= self.share:
            return np.zeros_like(context.valid)
        free = _free_shape(context.axes, context.shape, self.alike)
        smallest = self.min_block or max(1, (min(free) // 3) ** len(free))
        ratio = context.generator.uniform(*self.ratios)
        return _blocks(context, int(_places(context, self.alike) * ratio), smallest, self.alike)


def _places(context: MaskContext, alike: Sequence[str]) -> int:
    return int(_available(context.axes, context.shape, context.valid, alike).sum())


def _blocks(context: MaskContext, count: int, min_block: int, alike: Sequence[str]) -> Array:
    return block_mask(
        context.axes, context.shape, context.valid, count, context.generator, min_block=min_block, alike=alike
    )


def check_ratio_range(
    ratios: tuple[float, float], axes: Sequence[str], shape: Sequence[int], alike: Sequence[str] = ()
) -> None:
    """Refuse, before training, a range of ratios that never masks a place, or can leave none visible.

    Raises:
        UsageError: for such a range, or an ``alike`` axis that the tokens do not have.
    """
    low, high = ratios
    places = math.prod(_free_shape(axes, shape, alike))
    if not 0 <= low <= high < 1 or int(places * high) < 1:
        raise UsageError(
            f"Mask ratios from {low} to {high} on {places} tokens are out of range, or mask none.",
            "Use 0 <= low <= high < 1, with at least one token masked at the upper end.",
        )


def keep_ids(mask: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The visible tokens of a batch, for a backbone's ``keep`` and ``keep_valid``.

    Args:
        mask: (B, N) bool, True where hidden.
        valid: (B, N) bool; ``None`` means all.

    Returns:
        ids: (B, K) int64 in rising order, K the largest number of visible tokens of a sample. Shorter rows are filled
            with other tokens' numbers; no number appears twice in a row.
        keep_valid: (B, K) bool, False at the filling; ``None`` if there is none.

    Raises:
        UsageError: if no sample has a visible token.
    """
    visible = ~mask if valid is None else ~mask & valid
    counts = visible.sum(1)
    longest = int(counts.max())
    if longest == 0:
        raise UsageError("No token of the batch is visible.", "Lower the mask ratio, or drop windows without data.")
    ids = torch.argsort(visible.to(torch.int8), dim=1, descending=True, stable=True)[:, :longest]
    keep_valid = torch.arange(longest, device=mask.device) < counts[:, None]
    return ids, None if bool(keep_valid.all()) else keep_valid
