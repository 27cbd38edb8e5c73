"""Boxes cut from arrays and resampled: antialiased linear interpolation that nodata never bleeds through."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fmsuite.core.data.sample import Array, ArraySample

Box = tuple[tuple[float, ...], tuple[float, ...]]
"""Start and extent along each axis."""

_TOLERANCE = 1e-6
_NO_SHARE = 1e-9
"""A sample whose weight is less has none: what rounding leaves of an exact zero."""


def crop_array_sample(
    sample: ArraySample, start: Sequence[float], extent: Sequence[float], size: Sequence[int]
) -> ArraySample:
    """The box from ``start`` to ``start + extent``, resampled to ``size``.

    The filter is the separable triangle of torch's and PIL's antialiased bilinear resize: its support grows with the
    reduction factor, and it does not look outside the samples that the box touches. Along an axis whose box lies on
    whole samples and keeps its length, values are copied as they are. Linear rather than cubic, because its weights
    are never negative: nothing overshoots, and "mixes an invalid value" is well defined.

    Args:
        sample: any dtype, (C, *axes).
        start, extent: in array samples, fractions allowed; within the array.
        size: resulting length along each axis. ``()`` asks for a bag of vectors, which is returned whole.

    Returns:
        A sample of the same dtype; integers are rounded and clamped. ``valid`` is False wherever an invalid value
        would have been mixed in (such outputs are mixed from the remaining values and zeros); ``maps`` are cropped
        by nearest neighbour; ``spacing`` is scaled by extent / size; ``coords`` are kept, since unevenly spaced axes
        are never cropped.

    Raises:
        ValueError: if the box is empty or leaves the array, or the lengths do not match the array's axes.
    """
    if len(size) == 0:
        return sample
    shape = sample.size
    if not len(start) == len(extent) == len(size) == len(shape):
        raise ValueError(f"a box {tuple(start)} + {tuple(extent)} -> {tuple(size)} does not fit an array {shape}")
    for begin, length, new, full in zip(start, extent, size, shape):
        if length <= 0 or new < 1 or begin < -_TOLERANCE or begin + length > full + _TOLERANCE:
            raise ValueError(f"the box {tuple(start)} + {tuple(extent)} -> {tuple(size)} leaves the array {shape}")
    axes = [_Axis(b, e, n, full) for b, e, n, full in zip(start, extent, size, shape)]
    values, valid = sample.values, sample.valid
    if any(axis.resamples for axis in axes) and valid is not None:
        if valid.all():
            valid = np.ones((len(valid), *size), dtype=bool)
        else:
            values = np.where(valid, values, np.zeros((), dtype=values.dtype))
            # In float64: torch's float32 weights are off by up to 1e-4 at coordinates of some thousands, which would
            # take samples for mixed in that an output does not touch.
            valid = _resample(np.where(valid, 0.0, 1.0), axes) < _NO_SHARE
    elif valid is not None:
        valid = _slice(valid, axes)
    spacing = sample.spacing
    if spacing is not None:
        spacing = tuple(s * e / n for s, e, n in zip(spacing, extent, size, strict=True))
    return sample.replace(
        values=_resample(values, axes),
        valid=valid,
        spacing=spacing,
        maps={
            name: np.ascontiguousarray(labels[np.ix_(*(a.nearest() for a in axes[-labels.ndim :]))])
            for name, labels in sample.maps.items()
        },
    )


class _Axis:
    """One axis of a box: which samples it touches, and how they mix."""

    def __init__(self, start: float, extent: float, size: int, full: int) -> None:
        end = min(_snap(start + extent), full)
        self.start = max(_snap(start), 0.0)
        self.extent = end - self.start
        self.size = size
        self.low = math.floor(self.start)
        self.high = math.ceil(end)
        self.aligned = self.start == self.low and end == self.high
        self.resamples = not (self.aligned and self.high - self.low == size)

    @property
    def fits_torch(self) -> bool:
        """Whether torch's resize can be used: it takes whole samples only, and of planes that are one sample wide
        (torch 2.15) its kernels give wrong values in float32 and an internal error in 8 bits."""
        return self.aligned and self.high - self.low > 1 and self.size > 1

    @property
    def slice(self) -> slice:
        return slice(self.low, self.high)

    def nearest(self) -> Array:
        """(size,) numbers of the samples that output centres fall into."""
        centres = self.start + (np.arange(self.size) + 0.5) * (self.extent / self.size)
        return np.minimum(np.floor(centres).astype(np.int64), self.high - 1)

    def weights(self, dtype: torch.dtype) -> Tensor:
        """(size, high - low) rows that sum to one: a triangle of half-width max(extent / size, 1) around each output's
        centre, evaluated at the centres of the samples."""
        scale = self.extent / self.size
        support = max(scale, 1.0)
        centres = self.start - self.low + (torch.arange(self.size, dtype=torch.float64) + 0.5) * scale
        samples = torch.arange(self.high - self.low, dtype=torch.float64) + 0.5
        weights = (1 - (samples[None, :] - centres[:, None]).abs() / support).clamp(min=0)
        return (weights / weights.sum(1, keepdim=True)).to(dtype)


def _snap(value: float) -> float:
    """Whole numbers that arithmetic left slightly off."""
    return float(round(value)) if abs(value - round(value)) < _TOLERANCE else value


def _slice(values: Array, axes: list[_Axis]) -> Array:
    return np.ascontiguousarray(values[(slice(None), *(axis.slice for axis in axes))])


def _resample(values: Array, axes: list[_Axis]) -> Array:
    """(C, *axes) to (C, *size) in the same dtype."""
    cut = _slice(values, axes)
    changing = [number for number, axis in enumerate(axes) if axis.resamples]
    if not changing:
        return cut
    plane = len(axes) >= 2 and changing[-1] >= len(axes) - 2 and all(axis.fits_torch for axis in axes[-2:])
    in_plane_only = all(number >= len(axes) - 2 for number in changing)
    # torch's own 8-bit kernel mixes in integers, several times as fast as through float32.
    eight_bit = cut.dtype == np.uint8 and plane and in_plane_only
    tensor = torch.from_numpy(cut if eight_bit else cut.astype(_working_dtype(cut.dtype)))
    if plane:
        lead = tensor.shape[:-2]
        flat = tensor.reshape(1, -1, *tensor.shape[-2:])
        flat = F.interpolate(flat, size=(axes[-2].size, axes[-1].size), mode="bilinear", antialias=True)
        tensor = flat.reshape(*lead, *flat.shape[-2:])
        changing = [number for number in changing if number < len(axes) - 2]
    for number in changing:
        tensor = torch.movedim(
            torch.tensordot(tensor, axes[number].weights(tensor.dtype), dims=([number + 1], [1])), -1, number + 1
        )
    return _to_dtype(tensor.contiguous().numpy(), cut.dtype)


def _working_dtype(dtype: np.dtype) -> type[np.floating]:
    """float32 holds integers up to 16 bits exactly; wider ones and float64 are mixed in float64."""
    wide = dtype.itemsize >= 4 and dtype != np.float32
    return np.float64 if wide else np.float32


def _to_dtype(values: Array, dtype: np.dtype) -> Array:
    if values.dtype == dtype:
        return values
    if dtype == np.bool_:
        return values >= 0.5
    if np.issubdtype(dtype, np.integer):
        limits = np.iinfo(dtype)
        rounded = np.rint(values)
        # Bounds beyond the float's precision would round up past the largest integer.
        upper = np.nextafter(float(limits.max), 0) if float(limits.max) > limits.max else float(limits.max)
        return np.clip(rounded, float(limits.min), upper).astype(dtype)
    return values.astype(dtype)


def random_box(
    size: Sequence[int | float],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    spatial: Sequence[int],
    generator: np.random.Generator,
    whole: bool = True,
) -> Box:
    """A random box that covers a share of a window; axes that are not spatial are always covered in full.

    Two spatial axes follow torchvision's ``RandomResizedCrop``: share of the area uniform in ``scale``, aspect ratio
    (width over height) log-uniform in ``ratio``, ten tries to fit, then the largest central box within ``ratio``.

    For n = 1, 3 or more spatial axes, boxes vary around the window's own shape, which is often flat (a slab of thick
    slices): side ``a`` measures ``size[a] * share**(1/n) * exp(g[a] - mean(g))`` with ``g[a]`` uniform between half
    the logarithms of ``ratio``, so the relative sides of any two axes differ by at most ``ratio`` (for a symmetric
    range) and the share of the volume is uniform in ``scale``. After ten tries that do not fit, a central box of
    the window's own shape.

    Args:
        size: the window's length along each axis.
        scale: range of the share; (1, 1) takes the whole window, whatever its shape.
        ratio: range of the aspect ratio.
        spatial: which axes to crop.
        generator: the source of randomness.
        whole: box on whole array samples; otherwise corners and sides are real numbers.
    """
    start, extent = [0.0] * len(size), [float(length) for length in size]
    if tuple(scale) == (1.0, 1.0) or not spatial:
        return tuple(start), tuple(extent)
    full = [extent[axis] for axis in spatial]
    draw = _plane_sides if len(full) == 2 else _volume_sides
    for _ in range(_TRIES):
        sides = _whole(draw(full, scale, ratio, generator), whole)
        if all(0 < side <= length for side, length in zip(sides, full)):
            room = [length - side for side, length in zip(sides, full)]
            corner = [float(generator.integers(0, int(r) + 1) if whole else generator.uniform(0, r)) for r in room]
            break
    else:
        sides = _central_plane(full, ratio) if len(full) == 2 else _central_volume(full, generator.uniform(*scale))
        sides = [max(side, 1.0) for side in _whole(sides, whole)] if whole else sides
        corner = [(length - side) / 2 for side, length in zip(sides, full)]
        corner = [float(math.floor(c)) for c in corner] if whole else corner
    for axis, begin, side in zip(spatial, corner, sides):
        start[axis], extent[axis] = begin, side
    return tuple(start), tuple(extent)


def cell_box(
    size: Sequence[int | float],
    cells: Sequence[int],
    number: int | None,
    generator: np.random.Generator,
    whole: bool = True,
) -> Box:
    """A box of the size of one of a window's equal cells.

    Args:
        size: the window's length along each axis.
        cells: into how many cells each axis is divided.
        number: which of the cells, row-major; ``None`` for a random place, uniform over those inside the window.
        generator: the source of randomness; only a random place draws from it.
        whole: a random place begins at a whole array sample, along axes whose cells measure whole samples; otherwise
            corners are real numbers.
    """
    extent = tuple(length / count for length, count in zip(size, cells, strict=True))
    if number is not None:
        place = np.unravel_index(number, tuple(cells))
        return tuple(float(index * side) for index, side in zip(place, extent)), extent
    start = []
    for length, side in zip(size, extent):
        on_samples = whole and side == int(side)
        start.append(float(generator.integers(0, int(length - side) + 1) if on_samples else generator.random()))
        if not on_samples:
            start[-1] *= length - side
    return tuple(start), extent


_TRIES = 10


def _plane_sides(
    full: list[float], scale: tuple[float, float], ratio: tuple[float, float], generator: np.random.Generator
) -> list[float]:
    area = generator.uniform(*scale) * full[0] * full[1]
    aspect = math.exp(generator.uniform(math.log(ratio[0]), math.log(ratio[1])))
    return [math.sqrt(area / aspect), math.sqrt(area * aspect)]


def _central_plane(full: list[float], ratio: tuple[float, float]) -> list[float]:
    height, width = full
    if width / height < ratio[0]:
        return [width / ratio[0], width]
    if width / height > ratio[1]:
        return [height, height * ratio[1]]
    return full


def _volume_sides(
    full: list[float], scale: tuple[float, float], ratio: tuple[float, float], generator: np.random.Generator
) -> list[float]:
    share = generator.uniform(*scale)
    spread = generator.uniform(math.log(ratio[0]) / 2, math.log(ratio[1]) / 2, size=len(full))
    factor = np.exp(spread - spread.mean()) * share ** (1 / len(full))
    return [length * float(f) for length, f in zip(full, factor)]


def _central_volume(full: list[float], share: float) -> list[float]:
    return [length * share ** (1 / len(full)) for length in full]


def _whole(sides: list[float], whole: bool) -> list[float]:
    return [float(round(side)) for side in sides] if whole else sides
