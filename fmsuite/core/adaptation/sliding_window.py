"""A network of fixed window on an input of any size: overlapping windows, blended, in bounded memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fmsuite.errors import UsageError

Network = Callable[[Tensor], Tensor]
"""From (N, C, *window) to (N, K, *window)."""
Read = Callable[[tuple[int, ...], tuple[int, ...]], Tensor]
"""From the start and extent of a box inside the input to its values, (C, *extent) or (B, C, *extent)."""
Blend = Literal["gaussian", "constant"]

SIGMA = 0.125
"""Standard deviation of the Gaussian, as a share of the window (nnU-Net's and MONAI's)."""
LEAST_WEIGHT = 1e-3
"""Weights are raised to this, so that what only the corner of a window sees is not divided by nearly nothing."""


@dataclass(frozen=True)
class Stripe:
    """Finished rows of the output, or of one panel of it.

    Attributes:
        start: the first of them, along the input's first axis.
        values: (K, rows, columns, *rest) or (B, K, rows, columns, *rest) float32.
        left: the first column, along the input's second axis.
    """

    start: int
    values: Tensor
    left: int = 0


@dataclass(frozen=True)
class WindowPlan:
    """Where windows lie.

    Windows follow each other in steps of ``floor(window * (1 - overlap))``, at least 1; the last one along an axis is
    moved back inside. Along an axis that is shorter than the window there is one, with the input in its middle. That
    is MONAI's rule.

    Args:
        size: of the input. window: of the network.
        overlap: share of a window that the next one covers as well, for all axes or for each.

    Raises:
        UsageError: for lengths that do not go together, or an overlap outside 0 to less than 1.
    """

    size: tuple[int, ...]
    window: tuple[int, ...]
    overlap: float | tuple[float, ...] = 0.5

    def __post_init__(self) -> None:
        overlaps = self._overlaps
        if not len(self.size) == len(self.window) == len(overlaps) or min((*self.size, *self.window)) < 1:
            raise UsageError(
                f"A window of {self.window} with overlap {self.overlap} does not fit an input of {self.size}.",
                "Give one length of at least 1 an axis.",
            )
        if not all(0 <= overlap < 1 for overlap in overlaps):
            raise UsageError(f"An overlap of {self.overlap} is out of range.", "Use 0 to less than 1; 0.5 is common.")

    @property
    def _overlaps(self) -> tuple[float, ...]:
        return self.overlap if isinstance(self.overlap, tuple) else (self.overlap,) * len(self.size)

    def starts(self, axis: int) -> list[int]:
        """Where windows begin along an axis; negative where the input is shorter than the window."""
        size, window = self.size[axis], self.window[axis]
        if size <= window:
            return [-((window - size) // 2)]
        step = max(1, int(window * (1 - self._overlaps[axis])))
        return [min(start, size - window) for start in range(0, size - window + step, step)]

    def weights(self, blend: Blend) -> Tensor:
        """(*window) float32 weight of each sample of a window, 1 at the most.

        ``gaussian``: a product of Gaussians around the middle, of standard deviation ``SIGMA`` times the length, and
        at least ``LEAST_WEIGHT``. ``constant``: 1.
        """
        total = torch.ones((), dtype=torch.float32)
        for length in self.window:
            if blend == "gaussian":
                offset = torch.arange(length, dtype=torch.float32) - (length - 1) / 2
                line = (offset.square() / (-2 * (SIGMA * length) ** 2)).exp()
            else:
                line = torch.ones(length)
            total = total[..., None] * line
        return total.clamp(min=LEAST_WEIGHT)


def sliding_window(
    network: Network,
    pixels: Tensor,
    window: Sequence[int],
    *,
    overlap: float | tuple[float, ...] = 0.5,
    blend: Blend = "gaussian",
    batch: int = 1,
    fill: float = 0.0,
    device: torch.device | str | None = None,
) -> Tensor:
    """What a network says of an input of any size.

    Args:
        network: sees windows on ``device``.
        pixels: (B, C, *size), on any device.
        window: length along each axis.
        overlap: see ``WindowPlan``. blend: see ``WindowPlan.weights``.
        batch: largest number of windows at a time.
        fill: what stands around an input that is smaller than the window.
        device: of the network; the pixels' own if not given.

    Returns:
        (B, K, *size) float32 on the pixels' device.

    Raises:
        UsageError: see ``WindowPlan``; if the network's output is not of the window's size.
    """
    _check_batch(batch)
    size = tuple(pixels.shape[2:])
    outputs = []
    # Samples of a batch share windows as long as they fit.
    for part in pixels.split(batch):

        def read(start: tuple[int, ...], extent: tuple[int, ...], part: Tensor = part) -> Tensor:
            box: tuple[Any, ...] = (..., *(slice(s, s + e) for s, e in zip(start, extent, strict=True)))
            return part[box]

        stripes = stream_windows(
            network,
            read,
            size,
            window,
            overlap=overlap,
            blend=blend,
            batch=max(1, batch // len(part)),
            fill=fill,
            device=pixels.device if device is None else device,
        )
        outputs.append(torch.cat([stripe.values.to(pixels.device) for stripe in stripes], dim=2))
    return torch.cat(outputs)


@torch.no_grad()
def stream_windows(
    network: Network,
    read: Read,
    size: Sequence[int],
    window: Sequence[int],
    *,
    overlap: float | tuple[float, ...] = 0.5,
    blend: Blend = "gaussian",
    batch: int = 1,
    fill: float = 0.0,
    device: torch.device | str = "cpu",
    panel: int | None = None,
) -> Iterator[Stripe]:
    """The same for an input that does not fit into memory: windows are read when they are needed, and rows are given
    out when no later window reaches them.

    What is held is a stripe of the output as high as a window, its weights, and ``batch`` windows. With ``panel`` the
    output is made in panels along the second axis, one after the other from the first row to the last, so that memory
    does not grow with the width either. Panels are cut from one plan: every window goes through the network in the
    company that it has without panels and is added in the same order, so the result is the same, bit for bit. The
    batches that reach over a panel's left side are computed again. A read never leaves the input.

    Args:
        network, window, overlap, blend, batch, fill, device: see ``sliding_window``.
        read: gives a box of the input.
        size: of the input; its first axis is the rows.
        panel: least width of a panel in samples; a panel is wider by a batch of windows at the most.

    Yields:
        The rows of each panel from first to last, each once, on ``device``.
    """
    plan = WindowPlan(tuple(size), tuple(window), overlap)
    _check_batch(batch)
    weights = plan.weights(blend).to(device)
    rows = plan.starts(0)
    columns = list(itertools.product(*(plan.starts(axis) for axis in range(1, len(plan.size)))))
    groups = [columns[first : first + batch] for first in range(0, len(columns), batch)]
    for left, right, members in _panels(plan, groups, panel):
        stripe: _Accumulator | None = None
        for number, row in enumerate(rows):
            for group in members:
                places = [(row, *column) for column in group]
                inputs = [_read_padded(read, plan, place, fill).to(device) for place in places]
                outputs = _apply(network, inputs, plan.window)
                if stripe is None:
                    stripe = _Accumulator(plan, outputs[0], left, right)
                for place, output in zip(places, outputs, strict=True):
                    stripe.add(place, output, weights)
            assert stripe is not None
            until = rows[number + 1] if number + 1 < len(rows) else plan.size[0]
            if until > stripe.row:
                yield stripe.finish(until)


Group = list[tuple[int, ...]]
"""Windows that go through the network together: where they begin along all axes but the first."""


def _panels(plan: WindowPlan, groups: list[Group], panel: int | None) -> Iterator[tuple[int, int, list[Group]]]:
    """From where to where each panel reaches along the second axis, and the groups with a window in it."""
    if len(plan.size) == 1:
        yield 0, 1, groups
        return
    width, window = plan.size[1], plan.window[1]
    borders = [0]
    for group in groups:
        if panel is not None and group[0][0] - borders[-1] >= panel:
            borders.append(group[0][0])
    borders.append(width)
    for left, right in itertools.pairwise(borders):
        yield left, right, [g for g in groups if any(c[0] < right and c[0] + window > left for c in g)]


def _check_batch(batch: int) -> None:
    if batch < 1:
        raise UsageError(f"A batch of {batch} windows is none.", "Use 1 or more.")


def _read_padded(read: Read, plan: WindowPlan, place: tuple[int, ...], fill: float) -> Tensor:
    """A window whose part inside the input is read."""
    begin = [max(0, start) for start in place]
    end = [min(n, start + w) for n, start, w in zip(plan.size, place, plan.window, strict=True)]
    values = read(tuple(begin), tuple(e - b for b, e in zip(begin, end, strict=True)))
    pad = [
        amount
        for start, b, e, w in zip(reversed(place), reversed(begin), reversed(end), reversed(plan.window))
        for amount in (b - start, start + w - e)
    ]
    return F.pad(values, pad, value=fill) if any(pad) else values


def _apply(network: Network, inputs: list[Tensor], window: tuple[int, ...]) -> list[Tensor]:
    """The network on all windows at once; each is (C, *window), or (B, C, *window)."""
    single = inputs[0].dim() == 1 + len(window)
    joined = torch.stack(inputs) if single else torch.cat(inputs)
    out = network(joined).float()
    if tuple(out.shape[2:]) != window or len(out) != len(joined):
        raise UsageError(
            f"The network made {tuple(out.shape)} of windows {tuple(joined.shape)}.",
            "Its output must be as large as its input; check the window against the patch size.",
        )
    return list(out) if single else list(out.split(len(inputs[0])))


class _Accumulator:
    """Rows of the output, or of a panel, that windows still reach.

    Attributes:
        row: the first of them.
    """

    def __init__(self, plan: WindowPlan, like: Tensor, left: int, right: int) -> None:
        self.plan = plan
        self.row = 0
        self.left, self.right = left, right
        # (..., K, rows, columns, *rest): what comes before the window's axes is the network's.
        self.lead = like.dim() - len(plan.size)
        shape = [min(plan.window[0], plan.size[0]), *plan.size[1:]]
        shape[1:2] = [right - left] * (len(shape) > 1)
        self.values = like.new_zeros((*like.shape[: self.lead], *shape))
        self.weights = like.new_zeros(shape)

    def add(self, place: tuple[int, ...], output: Tensor, weights: Tensor) -> None:
        target: list[Any] = []
        source: list[Any] = []
        for axis, (start, length, size) in enumerate(zip(place, self.plan.window, self.plan.size, strict=True)):
            low, high, shift = 0, size, 0
            if axis == 0:
                shift = self.row
            elif axis == 1:
                low, high, shift = self.left, self.right, self.left
            begin, end = max(low, start), min(high, start + length)
            if begin >= end:
                return
            source.append(slice(begin - start, end - start))
            target.append(slice(begin - shift, end - shift))
        seen = weights[tuple(source)]
        self.values[(..., *target)] += output[(..., *source)] * seen
        self.weights[tuple(target)] += seen

    def finish(self, until: int) -> Stripe:
        """The rows before ``until``; the others move up."""
        count = until - self.row
        axis = self.lead
        done = self.values.narrow(axis, 0, count) / self.weights[:count]
        stripe = Stripe(self.row, done, self.left)
        kept = len(self.weights) - count
        for tensor, along in ((self.values, axis), (self.weights, 0)):
            rest = tensor.narrow(along, count, kept).clone()
            tensor.zero_()
            tensor.narrow(along, 0, kept).copy_(rest)
        self.row = until
        return stripe
