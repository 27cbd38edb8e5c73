"""Mean and standard deviation of each band, from valid pixels only, not moved by a few wild ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from fmsuite.core.data.sample import ArraySample
from fmsuite.core.inputs import Quantification

PIXELS_A_WINDOW = 4096


class BandStatistics:
    """Collects valid values of each band and summarises them.

    Every window adds at most ``PIXELS_A_WINDOW`` positions, taken at a fixed step, so the result depends on nothing
    but the windows.

    Args:
        quantifications: of each band, from stored values to physical ones.
    """

    def __init__(self, quantifications: Sequence[Quantification]) -> None:
        self.quantifications = tuple(quantifications)
        self._values: list[list[np.ndarray]] = [[] for _ in quantifications]

    def add(self, sample: ArraySample) -> None:
        values = sample.values.reshape(len(sample.values), -1)
        valid = np.ones((1, *sample.size), dtype=bool) if sample.valid is None else sample.valid
        valid = np.broadcast_to(valid, sample.values.shape).reshape(values.shape)
        # An odd step does not fall into the same columns of every row.
        step = max(1, values.shape[1] // PIXELS_A_WINDOW) | 1
        for band, (collected, of) in enumerate(zip(self._values, self.quantifications, strict=True)):
            kept = values[band, ::step][valid[band, ::step]]
            physical = of.offset + of.scale * kept.astype(np.float64)
            collected.append(physical if of.clip is None else physical.clip(*of.clip))

    def add_all(self, samples: Iterable[ArraySample]) -> BandStatistics:
        for sample in samples:
            self.add(sample)
        return self

    def summary(self, percentiles: tuple[float, float]) -> list[tuple[float, float]]:
        """(mean, standard deviation) of each band, winsorised: values beyond the percentiles count as the percentile.

        A band without any valid value has (0, 1); one whose values are all equal has a standard deviation of 1.
        """
        found = []
        for collected in self._values:
            values = np.concatenate(collected) if collected else np.zeros(0)
            if not len(values):
                found.append((0.0, 1.0))
                continue
            values = values.clip(*np.percentile(values, percentiles))
            spread = float(values.std())
            # Equal values leave rounding noise in the standard deviation.
            found.append((float(values.mean()), spread if spread > 1e-9 * float(np.abs(values).max()) else 1.0))
        return found
