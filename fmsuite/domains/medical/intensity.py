"""What is foreground in a volume, and how its intensities become comparable between volumes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fmsuite.domains.medical.volumes import Volume
from fmsuite.errors import ReadFailure

CT_BODY = -500.0
"""Hounsfield units half-way between air (-1000) and water (0)."""
MR_SHARE = 0.1
"""Share of the bright end's distance from the background that a voxel needs to count as foreground."""
CLIPPED = (0.5, 99.5)
"""Percentiles of the foreground that MR intensities are clipped to."""
_LABEL_VALUES = 8
_COMMON = 0.1


@dataclass(frozen=True)
class Intensity:
    """An MR volume's own standardisation: ``(clip(v, low, high) - mean) / std``, one entry a channel.

    Attributes:
        low, high: the percentiles ``CLIPPED`` of the foreground, in the file's units.
        mean, std: of the clipped foreground.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def apply(self, values: np.ndarray) -> np.ndarray:
        """(C, z, y, x) in the file's units to standard deviations from the foreground's mean, float32."""
        low, high, mean, std = (
            np.asarray(part, dtype=np.float32).reshape(-1, 1, 1, 1)
            for part in (self.low, self.high, self.mean, self.std)
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


def standardisation(path: str, volume: Volume, mask: np.ndarray) -> Intensity:
    """An MR volume's clipping limits, mean and standard deviation within the foreground.

    Raises:
        ReadFailure: if a channel is constant there.
    """
    parts = []
    for values in volume.values:
        inside = values[mask].astype(np.float64)
        low, high = np.percentile(inside, CLIPPED)
        inside = np.clip(inside, low, high)
        std = float(inside.std())
        if std <= 1e-6 * max(abs(low), abs(high)):
            raise ReadFailure(path, "tissue", "a channel is constant within the foreground.", "Leave the file out.")
        parts.append((float(low), float(high), float(inside.mean()), std))
    low_all, high_all, mean_all, std_all = zip(*parts, strict=True)
    return Intensity(low_all, high_all, mean_all, std_all)


def _looks_like_labels(values: np.ndarray) -> bool:
    few = np.unique(values[:: max(1, len(values) // 20_000)])
    return len(few) <= _LABEL_VALUES and len(np.unique(values)) <= _LABEL_VALUES


def _background(values: np.ndarray) -> float:
    distinct, counts = np.unique(values, return_counts=True)
    most = int(counts.argmax())
    return float(distinct[most]) if counts[most] >= _COMMON * len(values) else float(np.percentile(values, 1))
