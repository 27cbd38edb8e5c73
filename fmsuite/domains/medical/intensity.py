"""What is foreground in a volume, and how its intensities become comparable between volumes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fmsuite.core.inputs import Plan
from fmsuite.domains.medical.options import MedicalOptions
from fmsuite.domains.medical.volumes import Volume
from fmsuite.errors import ReadFailure

CT_BODY = -500.0
"""Hounsfield units half-way between air (-1000) and water (0)."""
MR_SHARE = 0.1
"""Share of the bright end's distance from the background that a voxel needs to count as foreground."""
_LABEL_VALUES = 8
_COMMON = 0.1


@dataclass(frozen=True)
class Intensity:
    """What a plan makes of one image: ``(clip(v, low, high) - mean) / std``, one entry a channel.

    ``zscore`` has the clipped values' mean and standard deviation; for ``percentile`` and ``minmax``, whose results lie
    between 0 and 1, these are ``low`` and ``high - low``.

    Attributes:
        low, high: limits of what is kept, in the file's units.
        mean, std: what becomes 0, and what 1 is.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def apply(self, values: np.ndarray) -> np.ndarray:
        """(C, *size) in the file's units to those of the plan, float32."""
        shape = (-1, *(1,) * (values.ndim - 1))
        low, high, mean, std = (
            np.asarray(part, dtype=np.float32).reshape(shape) for part in (self.low, self.high, self.mean, self.std)
        )
        return (np.clip(values, low, high) - mean) / std

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Intensity:
        return cls(**{name: tuple(values) for name, values in raw.items()})


def foreground(path: str, volume: Volume, modality: str) -> np.ndarray:
    """(z, y, x) bool: the voxels that show a body.

    CT: above ``CT_BODY``. MR: further from the background level than ``MR_SHARE`` of the distance of the 99th
    percentile; the background level is the volume's most common value if a tenth of the voxels or more have exactly
    it, and the first percentile otherwise. A voxel is foreground if it is in any channel.

    Raises:
        ReadFailure: if nothing is foreground, or the values are not what the modality says.
    """
    usable = np.ones(volume.shape, dtype=bool) if volume.valid is None else volume.valid[0]
    found = np.zeros(volume.shape, dtype=bool)
    for values in volume.values:
        inside = values[usable]
        low, high = float(inside.min()), float(inside.max())
        if low == high:
            raise ReadFailure(path, "tissue", f"every voxel has the value {low:g}.", "Leave the file out.")
        if _looks_like_labels(inside):
            raise ReadFailure(
                path,
                "tissue",
                f"at most {_LABEL_VALUES} different values: a label map, not an image.",
                "Give the folder of the images only.",
            )
        if modality == "ct":
            if low >= 0:
                raise ReadFailure(
                    path,
                    "tissue",
                    f"the lowest value is {low:g}, so these are not Hounsfield units.",
                    "Rescale the volume to Hounsfield units, or use data.modality=mr.",
                )
            found |= values > CT_BODY
        else:
            distance = np.abs(values - _background(inside))
            bright = float(np.percentile(distance[usable], 99)) or float(distance[usable].max())
            found |= distance > MR_SHARE * bright
    found &= usable
    if not found.any():
        raise ReadFailure(path, "tissue", "no foreground in the volume.", "Check data.modality, or leave the file out.")
    return found


def measure(path: str, inside: Sequence[np.ndarray], plan: Plan, percentiles: tuple[float, float]) -> Intensity:
    """What a plan makes of an image.

    Args:
        path: for the message.
        inside: (N,) values of each channel that count, in the file's units: those of the foreground, or all.
        plan: any but ``window``, which looks at no image.
        percentiles: of ``zscore`` and ``percentile``.

    Raises:
        ReadFailure: if a channel is constant there.
    """
    parts = []
    for values in inside:
        if plan == "minmax":
            low, high = float(values.min()), float(values.max())
        else:
            low, high = (float(end) for end in np.percentile(values, percentiles))
        mean, std = low, high - low
        if plan == "zscore":
            kept = np.clip(values.astype(np.float64), low, high)
            mean, std = float(kept.mean()), float(kept.std())
        if std <= 1e-6 * max(abs(low), abs(high)):
            raise ReadFailure(path, "tissue", "a channel is constant where it is measured.", "Leave the file out.")
        parts.append((low, high, mean, std))
    low_all, high_all, mean_all, std_all = zip(*parts, strict=True)
    return Intensity(low_all, high_all, mean_all, std_all)


def volume_facts(path: str, volume: Volume, mask: np.ndarray, options: MedicalOptions) -> dict[str, Any]:
    """What an index records of a volume's intensities, as JSON values.

    Args:
        mask: (z, y, x), the foreground.

    Returns:
        ``intensity``, how the plan applies to it, unless the plan is a window; ``moments`` of its foreground after the
        plan, unless these are 0 and 1 by the plan itself.

    Raises:
        ReadFailure: as ``measure``.
    """
    facts: dict[str, Any] = {}
    if options.plan == "window":
        low, high = options.hu_window
        planned = (np.clip(volume.values[:, mask].astype(np.float64), low, high) - low) / (high - low)
    else:
        usable = np.ones(volume.shape, dtype=bool) if volume.valid is None else volume.valid[0]
        measured = mask if options.of_foreground else usable
        intensity = measure(path, [values[measured] for values in volume.values], options.plan, options.percentiles)
        facts["intensity"] = intensity.to_json()
        planned = intensity.apply(volume.values[:, mask])
    if options.plan != "zscore":
        facts["moments"] = moments(list(planned)).tolist()
    return facts


def moments(inside: Sequence[np.ndarray]) -> np.ndarray:
    """(3, C): count, sum and sum of squares of (N,) values of each channel."""
    return np.array([[len(v), v.sum(dtype=np.float64), np.square(v, dtype=np.float64).sum()] for v in inside]).T


def mean_and_std(found: Iterable[Sequence[Sequence[float]]]) -> dict[str, list[float]]:
    """``mean`` and ``std`` of each channel, of the ``moments`` of all images; nothing of none."""
    rows = [np.asarray(each, dtype=np.float64) for each in found]
    if not rows:
        return {}
    count, total, squares = np.sum(rows, axis=0)
    mean = total / count
    return {"mean": mean.tolist(), "std": np.sqrt(np.maximum(squares / count - mean**2, 1e-6)).tolist()}


def _looks_like_labels(values: np.ndarray) -> bool:
    few = np.unique(values[:: max(1, len(values) // 20_000)])
    return len(few) <= _LABEL_VALUES and len(np.unique(values)) <= _LABEL_VALUES


def _background(values: np.ndarray) -> float:
    distinct, counts = np.unique(values, return_counts=True)
    most = int(counts.argmax())
    return float(distinct[most]) if counts[most] >= _COMMON * len(values) else float(np.percentile(values, 1))
