"""Statistics of the data's values, taken from some windows without their labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fmsuite.core.data.index import SampleIndex
from fmsuite.core.data.pipeline import IMAGE, WholeWindows
from fmsuite.core.data.reader import Reader
from fmsuite.core.data.sample import SkippedWindow
from fmsuite.core.inputs import InputSpec, Quantification
from fmsuite.errors import FmsuiteError

WINDOWS = 256
"""Of which statistics of the data are taken, evenly spread."""
VALUES_A_WINDOW = 4096
"""Of each channel, at a fixed step."""


@dataclass(frozen=True)
class ValueSample:
    """Raw values of the data, without their labels.

    Attributes:
        values: of each channel (N,) float64, valid ones only.
        said: which windows they are of, as the end of a sentence.
    """

    values: tuple[np.ndarray, ...]
    said: str

    @classmethod
    def of(
        cls, index: SampleIndex, rows: Sequence[int], reader: Reader, spec: InputSpec, whose: str, most: int = WINDOWS
    ) -> ValueSample:
        """Of at most ``most`` of the windows, evenly spread; a function of these alone. Those that cannot be read are
        passed over.

        Args:
            rows: of the index.
            spec: the input that ``reader`` yields.
            whose: what the rows are, in the plural: ``training windows``.

        Raises:
            FmsuiteError: if none of them can be read.
        """
        places = np.unique(np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(np.int64))
        windows = WholeWindows(index, reader, spec, spec.size)
        found: list[list[np.ndarray]] = [[] for _ in spec.channels]
        read, reason = 0, ""
        for place in places.tolist():
            item = windows.item(int(rows[place]))
            if isinstance(item, SkippedWindow):
                reason = f"{item.source}: {item.reason}"
                continue
            (view,) = item.views[IMAGE]
            flat = view.values.reshape(spec.in_chans, -1)
            valid = np.ones(flat.shape, dtype=bool)
            if view.valid is not None:
                valid = np.broadcast_to(view.valid, view.values.shape).reshape(flat.shape)
            # An odd step does not fall into the same columns of every row.
            step = max(1, flat.shape[1] // VALUES_A_WINDOW) | 1
            for channel, kept in enumerate(found):
                kept.append(flat[channel, ::step][valid[channel, ::step]].astype(np.float64))
            read += 1
        if not read:
            raise FmsuiteError(f"No window could be read to take statistics of ({reason}).", "See skipped.csv.")
        of = f"all {len(rows)}" if read == len(rows) else f"{read} of {len(rows)}"
        return cls(tuple(np.concatenate(kept) for kept in found), f"{of} {whose}")


@dataclass(frozen=True)
class Statistics:
    """Of each channel's valid physical values, ``clip(offset + scale * raw)``: (C,) float64 each. A channel without any
    has 0 and 1, one without spread a standard deviation of 1."""

    mean: np.ndarray
    std: np.ndarray
    least: np.ndarray
    most: np.ndarray
    low: np.ndarray
    high: np.ndarray
    said: str

    @classmethod
    def of(cls, sample: ValueSample, spec: InputSpec) -> Statistics:
        """``low`` and ``high`` are the percentiles 2 and 98."""
        rows: list[tuple[float, ...]] = []
        for raw, quantification in zip(sample.values, spec.quantifications, strict=True):
            values = physical(raw, quantification)
            if not len(values):
                rows.append((0.0, 1.0, 0.0, 1.0, 0.0, 1.0))
                continue
            spread = float(values.std())
            # Equal values leave rounding noise in the standard deviation.
            spread = spread if spread > 1e-9 * float(np.abs(values).max()) else 1.0
            ends = values.min(), values.max(), *np.percentile(values, (2, 98))
            rows.append((float(values.mean()), spread, *map(float, ends)))
        mean, std, least, most, low, high = np.array(rows).T
        return cls(mean, std, least, most, low, high, sample.said)


def physical(values: np.ndarray, of: Quantification) -> np.ndarray:
    """``clip(offset + scale * raw)``."""
    found = of.offset + of.scale * values
    return found if of.clip is None else found.clip(*of.clip)
