"""What may vary in a scene seen from above: its orientation, its illumination, its sharpness, which bands arrived."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fmsuite.core.data.adjust import Adjustment, affine
from fmsuite.core.data.sample import Array, ArraySample, Sample
from fmsuite.domains.remote_sensing.dates import some_dates
from fmsuite.domains.remote_sensing.dropout import Dropout
from fmsuite.domains.remote_sensing.sensors import Kind
from fmsuite.tiling.symmetry import turned

GAIN = 0.1
"""Reflectance: standard deviation of each band's factor, and of the factor that all bands share."""
OFFSET = 0.02
"""Reflectance: standard deviation of each band's additive part, as a share of the band's mean in the window."""
DECIBELS = 1.0
"""Backscatter: standard deviation of each band's shift, and of the shift that all bands share."""
KELVINS = 2.0
"""Temperature: the same."""
BLUR = (0.3, 1.2)
"""Standard deviation of the blur in pixels, uniform."""
BLUR_PROBABILITY = (0.5, 0.1)
"""For an ordinary view, and for the second of an asymmetric pair."""


@dataclass(frozen=True)
class RasterAugmentation:
    """Flips, right-angle turns and missing bands; at full strength radiometric jitter band by band and mild blur too.

    There is no hue, no greyscale and no JPEG: bands are measurements, and their ratios carry the meaning. Jitter
    acts on physical values, ``offset + scale * stored``; it and the blur are done on the device.

    Attributes:
        kind: ``optical`` varies by factors, ``decibel`` and ``kelvin`` by shifts. Bands of one kind share a part.
        scale, offset: from stored to physical values.
            All three are of all bands, or of each.
        dropout: which bands are marked missing, at either strength.
        dates: how many of a series a varied view shows; all if not given.
    """

    kind: Kind | Sequence[Kind] = "optical"
    scale: float | Sequence[float] = 1.0
    offset: float | Sequence[float] = 0.0
    dropout: Dropout = field(default_factory=Dropout)
    dates: int | None = None

    def before_crop(self, sample: Sample, strength: str, generator: np.random.Generator) -> Sample:
        if self.dates is None or strength == "none":
            return sample
        assert isinstance(sample, ArraySample)
        return some_dates(sample, self.dates, generator)

    def after_crop(
        self, sample: ArraySample, strength: str, second: bool, generator: np.random.Generator
    ) -> ArraySample:
        if strength == "none":
            return sample
        sample = turned(sample, int(generator.integers(4)), bool(generator.integers(2)))
        if strength == "weak":
            return self.dropout(sample, generator)
        maps = self._jitter(len(sample.values), generator)[None]
        blurs = generator.random() < BLUR_PROBABILITY[second]
        sigma = float(generator.uniform(*BLUR))
        blur = np.zeros(sample.values.ndim - 1, dtype=np.float32)
        blur[-2:] = sigma if blurs else 0
        return self.dropout(sample.replace(adjust=Adjustment(maps=maps, blur=blur)), generator)

    def _jitter(self, bands: int, generator: np.random.Generator) -> Array:
        """(C, 2C + 1), a map of stored values that is a factor or a shift of physical ones."""
        kinds = np.broadcast_to(np.asarray(self.kind), bands)
        scale, offset = (np.broadcast_to(np.asarray(value, np.float64), bands) for value in (self.scale, self.offset))
        shares = {kind: generator.normal() for kind in dict.fromkeys(kinds.tolist())}
        shared = np.array([shares[kind] for kind in kinds.tolist()])
        own, shift = generator.normal(size=bands), generator.normal(size=bands)
        optical = kinds == "optical"
        factor, of_mean = np.exp(GAIN * (shared + own)), OFFSET * shift
        shifts = np.where(kinds == "kelvin", KELVINS, DECIBELS) * (shared + own)
        factor, of_mean = np.where(optical, factor, 1), np.where(optical, of_mean, 0)
        moved = np.where(optical, (factor + of_mean - 1) * offset, shifts)
        return affine(np.diag(factor), np.diag(of_mean), moved / scale)
