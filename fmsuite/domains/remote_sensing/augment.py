"""What may vary in a scene seen from above: its orientation, its illumination, its sharpness, which bands arrived."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from fmsuite.core.data.sample import Array, ArraySample, Sample
from fmsuite.tiling.symmetry import turned

GAIN = 0.1
"""Reflectance: standard deviation of each band's factor, and of the factor that all bands share."""
OFFSET = 0.02
"""Reflectance: standard deviation of each band's additive part, as a share of the band's mean in the window."""
DECIBELS = 1.0
"""Backscatter: standard deviation of each band's shift, and of the shift that all bands share."""
BLUR = (0.3, 1.2)
"""Standard deviation of the blur in pixels, uniform."""
BLUR_PROBABILITY = (0.5, 0.1)
"""For an ordinary view, and for the second of an asymmetric pair."""


@dataclass(frozen=True)
class RasterAugmentation:
    """Flips and right-angle turns; at full strength radiometric jitter band by band, mild blur and missing bands too.

    There is no hue, no greyscale and no JPEG: bands are measurements, and their ratios carry the meaning. Jitter
    acts on physical values, ``offset + scale * stored``.

    Attributes:
        kind: ``optical`` varies by factors, ``decibel`` by shifts.
        scale, offset: from stored to physical values.
        band_dropout: probability that a band is marked missing; one band always stays.
    """

    kind: Literal["optical", "decibel"] = "optical"
    scale: float = 1.0
    offset: float = 0.0
    band_dropout: float = 0.0

    def before_crop(self, sample: Sample, strength: str, generator: np.random.Generator) -> Sample:
        return sample

    def after_crop(
        self, sample: ArraySample, strength: str, second: bool, generator: np.random.Generator
    ) -> ArraySample:
        if strength == "none":
            return sample
        sample = turned(sample, int(generator.integers(4)), bool(generator.integers(2)))
        if strength == "weak":
            return sample
        valid = sample.valid
        physical = sample.values.astype(np.float32) * self.scale + self.offset
        physical = self._jittered(physical, valid, generator)
        blurs = generator.random() < BLUR_PROBABILITY[second]
        sigma = float(generator.uniform(*BLUR))
        if blurs:
            physical = blurred(physical, valid, sigma)
        values = ((physical - self.offset) / self.scale).astype(np.float32)
        if valid is not None:
            values = np.where(valid, values, np.float32(0))
        sample = sample.replace(values=values)
        return _without_bands(sample, self.band_dropout, generator) if self.band_dropout else sample

    def _jittered(self, physical: Array, valid: Array | None, generator: np.random.Generator) -> Array:
        bands = len(physical)
        shape = (bands, *(1,) * (physical.ndim - 1))
        shared, own, shift = generator.normal(), generator.normal(size=bands), generator.normal(size=bands)
        if self.kind == "decibel":
            return physical + (DECIBELS * (shared + own)).reshape(shape).astype(np.float32)
        axes = tuple(range(1, physical.ndim))
        weight = np.ones_like(physical) if valid is None else np.broadcast_to(valid, physical.shape).astype(np.float32)
        mean = (physical * weight).sum(axes, keepdims=True) / np.maximum(weight.sum(axes, keepdims=True), 1)
        factor = np.exp(GAIN * (shared + own)).reshape(shape).astype(np.float32)
        return physical * factor + (OFFSET * shift).reshape(shape).astype(np.float32) * mean


def _without_bands(sample: ArraySample, probability: float, generator: np.random.Generator) -> ArraySample:
    bands = len(sample.values)
    draws = generator.random(bands)
    dropped = draws < probability
    if dropped.all():
        dropped[int(draws.argmax())] = False
    valid = np.ones(sample.values.shape, dtype=bool) if sample.valid is None else sample.valid
    valid = np.broadcast_to(valid, sample.values.shape).copy()
    valid[dropped] = False
    values = sample.values.copy()
    values[dropped] = 0
    return sample.replace(values=values, valid=valid)


def blurred(values: Array, valid: Array | None, sigma: float) -> Array:
    """Gaussian blur along the last two axes in which invalid pixels and the outside have no weight.

    Args:
        values: (C, ..., H, W) float32.
        valid: bool, broadcastable to ``values``; ``None`` means all valid.
        sigma: standard deviation in pixels; the kernel ends at three of them.
    """
    radius = max(1, int(np.ceil(3 * sigma)))
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).astype(np.float32)
    shape = (1, *values.shape[1:]) if valid is None else valid.shape
    weight = np.ones(shape, dtype=np.float32) if valid is None else valid.astype(np.float32)
    spread = _convolved(values * weight, kernel)
    return spread / np.maximum(_convolved(weight, kernel), np.float32(1e-6))


def _convolved(array: Array, kernel: Array) -> Array:
    """Separable convolution of the last two axes, zero outside."""
    radius = len(kernel) // 2
    for axis in (-2, -1):
        length = array.shape[axis]
        margin = [(0, 0)] * array.ndim
        margin[axis] = (radius, radius)
        padded = np.pad(array, margin)
        total = np.zeros_like(array)
        for place, weight in enumerate(kernel):
            part = [slice(None)] * array.ndim
            part[axis] = slice(place, place + length)
            total += weight * padded[tuple(part)]
        array = total
    return array
