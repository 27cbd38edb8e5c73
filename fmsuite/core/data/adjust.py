"""Adjustments: what an augmentation changes point by point or by a small blur, drawn where samples are read and applied
on the device, to a whole batch at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from fmsuite.core.data.sample import Array, View

_REACH = 3
"""Standard deviations after which a blur's kernel ends."""
_TINY = 1e-6
_GAMMA_EPSILON = 1e-7


@dataclass(frozen=True)
class Adjustment:
    """What is to happen to one sample's raw values, in this order; ``None`` leaves a part out.

    Attributes:
        absorbance: (C, C + 1), an affine map in absorbance: ``a = -ln((v + 1) / 256)`` becomes
            ``absorbance[:, :C] a + absorbance[:, C]``. For values from 0 to 255 (stains; Ruifrok and Johnston 2001).
        maps: (K, C, 2C + 1), K affine maps one after the other, as ``affine`` makes them: a position's channels ``v``
            become ``M[:, :C] v + M[:, C:2C] m + M[:, 2C]``, with ``m`` the means of the channels over the valid values
            that this map meets.
        limits: (K + 1, 2), the lowest and highest value before the first map and after each of them.
        blur: (A,), standard deviations of a Gaussian along the input's axes, in array samples; 0 leaves an axis alone.
            The kernel ends after three of them. Neither invalid values nor what is outside have weight in it.
        noise: (C,), standard deviations of normal noise, independent for every value.
        seed: of the noise. The same seed gives other noise on another kind of device.
        gamma: exponent on values scaled to 0-1 by the lowest and highest valid value of the sample.
    """

    absorbance: Array | None = None
    maps: Array | None = None
    limits: Array | None = None
    blur: Array | None = None
    noise: Array | None = None
    seed: int | None = None
    gamma: float | None = None

    def __post_init__(self) -> None:
        if (self.noise is None) != (self.seed is None):
            raise ValueError("noise needs a seed, and only noise does")
        shapes = {"absorbance": 2, "maps": 3, "limits": 2, "blur": 1, "noise": 1}
        for name, dims in shapes.items():
            value = getattr(self, name)
            if value is not None and np.ndim(value) != dims:
                raise ValueError(f"adjustment '{name}' has shape {np.shape(value)} instead of {dims} axes")
        if self.maps is not None and self.maps.shape[2] != 2 * self.maps.shape[1] + 1:
            raise ValueError(f"adjustment 'maps' has shape {self.maps.shape} instead of (K, C, 2C + 1)")
        if self.limits is not None and self.limits.shape != (1 + (0 if self.maps is None else len(self.maps)), 2):
            raise ValueError(f"adjustment 'limits' has shape {self.limits.shape}: not a pair more than there are maps")


def affine(matrix: Array, of_mean: Array | None = None, offset: Array | float = 0.0) -> Array:
    """One of ``Adjustment.maps``: ``matrix v + of_mean m + offset``.

    Args:
        matrix: (C, C).
        of_mean: (C, C) for the channels' means; ``None`` for nothing of them.
        offset: (C,) or a number.

    Returns:
        (C, 2C + 1) float32.
    """
    channels = len(matrix)
    means = np.zeros((channels, channels)) if of_mean is None else of_mean
    return np.column_stack([matrix, means, np.broadcast_to(offset, channels)]).astype(np.float32)


def stacked(samples: Sequence[Adjustment | None]) -> dict[str, Tensor] | None:
    """The adjustments of a batch, (B, ...) each; what some samples leave out is neutral for them.

    Raises:
        ValueError: if one part has different shapes.
    """
    found: dict[str, Tensor] = {}
    for part in fields(Adjustment):
        values = [None if sample is None else getattr(sample, part.name) for sample in samples]
        given = [
            np.asarray(value, np.int64 if part.name == "seed" else np.float32) for value in values if value is not None
        ]
        if not given:
            continue
        shapes = {value.shape for value in given}
        if len(shapes) > 1:
            raise ValueError(f"the adjustment '{part.name}' has different shapes in one batch: {sorted(shapes)}")
        neutral, rows = _neutral(part.name, given[0]), iter(given)
        rows_of_all = [neutral if value is None else next(rows) for value in values]
        found[part.name] = torch.from_numpy(np.stack(rows_of_all))
    return found or None


def _neutral(name: str, like: Array) -> Array:
    """What changes nothing, shaped like another sample's."""
    if name in ("absorbance", "maps"):
        channels = like.shape[-2]
        return np.broadcast_to(np.eye(channels, like.shape[-1], dtype=like.dtype), like.shape)
    if name == "limits":
        return np.broadcast_to(np.array([-np.inf, np.inf], dtype=like.dtype), like.shape)
    return np.ones_like(like) if name == "gamma" else np.zeros_like(like)


def adjusted(view: View) -> View:
    """The view with its adjustments applied to its raw values, where these are: (B, C, *size), in float32 whatever
    autocast says. Without adjustments the view itself.

    A row's result does not depend on the others of its batch. Nothing is rounded between the steps.
    """
    if view.adjust is None:
        return view
    with torch.no_grad(), torch.autocast(view.pixels.device.type, enabled=False):
        # The parameters stay on the host until here, so that what to leave out is decided without waiting for a GPU.
        parts = {name: part.cpu() for name, part in view.adjust.items()}
        if view.pixels.device.type != "cpu":
            return replace(view, pixels=_applied(view.pixels, view.valid, parts), adjust=None)
        # Row by row, a picture stays in a core's cache from one step to the next.
        done = torch.empty(view.pixels.shape, dtype=torch.float32)
        for row in range(len(view)):
            one = slice(row, row + 1)
            valid = None if view.valid is None else view.valid[one]
            done[one] = _applied(view.pixels[one], valid, {name: part[one] for name, part in parts.items()})
    return replace(view, pixels=done, adjust=None)


def _applied(pixels: Tensor, valid: Tensor | None, parts: dict[str, Tensor]) -> Tensor:
    values = pixels.to(torch.float32, copy=True)
    if valid is not None:
        # An invalid value may be anything, NaN too, which no weight of zero takes out of a sum.
        values = torch.where(valid, values, torch.zeros((), device=values.device))
    if "absorbance" in parts:
        maps = parts["absorbance"]
        changed = (maps != torch.eye(*maps.shape[1:])).flatten(1).any(1)
        values = _on_rows(values, valid, changed, _map_absorbance, maps)
    if "limits" in parts:
        values = _clipped(values, parts["limits"][:, 0])
    for number in range(parts["maps"].shape[1] if "maps" in parts else 0):
        values = _mapped(values, valid, parts["maps"][:, number])
        if "limits" in parts:
            values = _clipped(values, parts["limits"][:, number + 1])
    if "blur" in parts:
        values = _on_rows(values, valid, (parts["blur"] > 0).any(1), _blurred, parts["blur"])
    if "noise" in parts:
        values = _noisy(values, parts["noise"], parts["seed"])
    if "gamma" in parts:
        values = _on_rows(values, valid, parts["gamma"] != 1, _gamma, parts["gamma"])
    return values


def _there(part: Tensor, values: Tensor, dims: int | None = None) -> Tensor:
    """Parameters beside the values, with axes of length one up to ``dims``."""
    shape = (*part.shape, *(1,) * ((values.dim() if dims is None else dims) - part.dim()))
    return part.reshape(shape).to(values.device, non_blocking=True)


def _map_absorbance(values: Tensor, valid: Tensor | None, maps: Tensor) -> Tensor:
    absorbance = torch.log((values + 1) * (1 / 256)).neg_()
    return _linear(absorbance, maps[:, :, :-1], maps[:, :, -1]).neg_().exp_().mul_(256).sub_(1)


def _mapped(values: Tensor, valid: Tensor | None, maps: Tensor) -> Tensor:
    """(B, C, 2C + 1) maps applied to (B, C, *size)."""
    channels = values.shape[1]
    matrix, of_mean, offset = maps.split([channels, channels, 1], dim=2)
    if torch.equal(matrix, torch.eye(channels).expand_as(matrix)) and not of_mean.any() and not offset.any():
        return values
    added = _there(offset[..., 0], values, 2)
    if of_mean.any():
        means = _channel_means(values, valid)
        # A product and a sum rather than a matrix product, which a GPU may be told to round to 10 bits.
        added = added + (_there(of_mean, values, 3) * means[:, None]).sum(2)
    return _linear(values, matrix, added)


def _linear(values: Tensor, matrix: Tensor, added: Tensor) -> Tensor:
    """(B, C, *size) times (B, C, C), plus (B, C)."""
    added = _there(added, values)
    if not (matrix - torch.diag_embed(matrix.diagonal(dim1=1, dim2=2))).any():
        return torch.addcmul(added, values, _there(matrix.diagonal(dim1=1, dim2=2), values))
    columns = _there(matrix, values, values.dim() + 1)
    total = torch.addcmul(added, values[:, :1], columns[:, :, 0])
    for channel in range(1, values.shape[1]):
        total.addcmul_(values[:, channel : channel + 1], columns[:, :, channel])
    return total


def _channel_means(values: Tensor, valid: Tensor | None) -> Tensor:
    """(B, C), over valid values; 0 where there are none."""
    if valid is None:
        return values.flatten(2).mean(2)
    weight = valid.to(torch.float32).expand_as(values)
    return (values * weight).flatten(2).sum(2) / weight.flatten(2).sum(2).clamp(min=1)


def _clipped(values: Tensor, limits: Tensor) -> Tensor:
    """To (B, 2) limits, in place."""
    if torch.equal(limits, limits[:1].expand_as(limits)):
        low, high = limits[0].tolist()
        return values if low == -np.inf and high == np.inf else values.clamp_(low, high)
    return torch.minimum(torch.maximum(values, _there(limits[:, 0], values)), _there(limits[:, 1], values))


def _on_rows(
    values: Tensor,
    valid: Tensor | None,
    chosen: Tensor,
    change: Callable[[Tensor, Tensor | None, Tensor], Tensor],
    parameters: Tensor,
) -> Tensor:
    """``change`` applied to the chosen rows only."""
    if chosen.all():
        return change(values, valid, parameters)
    if not chosen.any():
        return values
    rows = chosen.nonzero()[:, 0]
    there = rows.to(values.device, non_blocking=True)
    changed = change(values[there], None if valid is None else valid[there], parameters[rows])
    return values.index_copy(0, there, changed)


def _blurred(values: Tensor, valid: Tensor | None, sigmas: Tensor) -> Tensor:
    """(B, C, *size) blurred along its axes by (B, A)."""
    weight = None if valid is None else valid.to(torch.float32)
    if weight is not None:
        values = values * weight
    for axis, sigma in enumerate(sigmas.unbind(1), start=2):
        if not sigma.any():
            continue
        kernel = _kernel(sigma, values.shape[axis])
        if weight is None:
            # Of an array that is valid throughout, only what lies near its border misses a part of the kernel.
            inside = _spread(torch.ones(len(values), values.shape[axis]), kernel, 1)
            shape = [len(values), *(values.shape[axis] if a == axis else 1 for a in range(1, values.dim()))]
            values = _spread(values, kernel, axis) * _there((1 / inside).reshape(shape), values)
        else:
            values, weight = _spread(values, kernel, axis), _spread(weight, kernel, axis)
    return values if weight is None else values / weight.clamp(min=_TINY)


def _kernel(sigma: Tensor, length: int) -> Tensor:
    """(B, R + 1), one half of each Gaussian, from its middle on; a narrower one ends in zeros, so that its result is
    the same beside a wider one."""
    reach = (_REACH * sigma).ceil().clamp(min=1)
    places = torch.arange(min(int(reach.max()), length - 1) + 1, dtype=torch.float32)
    half = torch.exp(-0.5 * (places / sigma.clamp(min=1e-3)[:, None]) ** 2) * (places <= reach[:, None])
    return half / (2 * half.sum(1, keepdim=True) - half[:, :1])


def _spread(values: Tensor, kernel: Tensor, axis: int) -> Tensor:
    """Convolution along one axis with a symmetric kernel for each row, zero outside. As sums of shifted arrays: in full
    float32 on every device, and on CPUs faster than a grouped convolution."""
    length = values.shape[axis]
    weights = _there(kernel, values, values.dim() + 1).unbind(1)
    total = values * weights[0]
    for shift, weight in enumerate(weights[1:], start=1):
        total.narrow(axis, shift, length - shift).addcmul_(values.narrow(axis, 0, length - shift), weight)
        total.narrow(axis, 0, length - shift).addcmul_(values.narrow(axis, shift, length - shift), weight)
    return total


def _noisy(values: Tensor, stds: Tensor, seeds: Tensor) -> Tensor:
    rows = stds.any(1).nonzero()[:, 0].tolist()
    if not rows:
        return values
    draws = []
    for row in rows:
        stream = torch.Generator(values.device).manual_seed(int(seeds[row]))
        draw = torch.randn(values.shape[1:], generator=stream, device=values.device)
        draws.append(draw * _there(stds[row], values, values.dim() - 1))
    return values.index_add(0, torch.tensor(rows, device=values.device), torch.stack(draws))


def _gamma(values: Tensor, valid: Tensor | None, gammas: Tensor) -> Tensor:
    lowest = values if valid is None else torch.where(valid, values, torch.inf)
    highest = values if valid is None else torch.where(valid, values, -torch.inf)
    low, high = (_there(end, values) for end in (lowest.flatten(1).amin(1), highest.flatten(1).amax(1)))
    extent = high - low
    # Invalid values may lie outside, where a power of a negative number has no value.
    share = ((values - low) / (extent + _GAMMA_EPSILON)).clamp(0, 1)
    return share ** _there(gammas, values) * extent + low
