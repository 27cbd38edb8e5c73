"""Reads windows of resampled volumes, and keeps the last few volumes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import ClassVar

import numpy as np

from fmsuite.core.data.handles import HandleCache
from fmsuite.core.data.index import Window
from fmsuite.core.data.sample import ArraySample
from fmsuite.domains.medical.intensity import Intensity
from fmsuite.domains.medical.volumes import Volume, load_volume
from fmsuite.domains.medical.windows import to_resampled
from fmsuite.errors import ReadFailure


class VolumeReader:
    """Windows as (C, z, y, x) float32, standardised (MR) or in Hounsfield units (CT).

    Resampling and standardising a volume takes far longer than cutting a window, so the last ``cached`` volumes stay
    in memory, each at 4 bytes a voxel and channel.

    Args:
        spacing: (z, y, x) millimetres, or ``None`` for each volume's own.
        channels: volumes that each file holds.
        assume_orientation: see ``volumes.check_header``.
        fill: value of voxels that are invalid: outside the volume, or not finite in the file.
        intensities: by source, for MR; ``None`` leaves values as they are.
        cached: volumes to keep.
    """

    anywhere: ClassVar[bool] = True

    def __init__(
        self,
        spacing: tuple[float, float, float] | None,
        channels: int,
        assume_orientation: bool,
        fill: float,
        intensities: Mapping[str, Intensity] | None,
        cached: int,
    ) -> None:
        self.fill = fill
        opener = partial(
            _open,
            spacing=spacing,
            channels=channels,
            assume_orientation=assume_orientation,
            fill=fill,
            intensities=intensities,
        )
        self._volumes: HandleCache[Volume] = HandleCache(opener, _forget, limit=cached)

    def volume(self, source: str) -> Volume:
        """The whole volume, resampled and standardised.

        Raises:
            ReadFailure: for whatever is wrong with the file.
        """
        return self._volumes.get(source)

    def read(self, window: Window) -> ArraySample:
        volume = self.volume(window.source)
        start, size = voxel_box(window, volume)
        low = np.maximum(start, 0)
        high = np.minimum(start + size, volume.shape)
        if (low >= high).any():
            # Should the file be put right, it is to be read again.
            self._volumes.discard(window.source)
            raise ReadFailure(
                window.source, "read", "a window lies outside the volume: the file has changed.", "Tile again."
            )
        source = (slice(None), *(slice(a, b) for a, b in zip(low, high, strict=True)))
        values = volume.values[source]
        valid = None if volume.valid is None else volume.valid[source]
        if (high - low < size).any():
            target = (slice(None), *(slice(a, b) for a, b in zip(low - start, high - start, strict=True)))
            padded = np.full((len(values), *size), self.fill, dtype=np.float32)
            padded[target] = values
            inside = np.zeros((1, *size), dtype=bool)
            inside[target] = True if valid is None else valid
            values, valid = padded, inside
        if valid is not None and not valid.any():
            raise ReadFailure(window.source, "read", "a window without a finite voxel.", "It is left out.")
        return ArraySample(
            values.copy(), None if valid is None or valid.all() else valid.copy(), spacing=volume.spacing
        )


def voxel_box(window: Window, volume: Volume) -> tuple[np.ndarray, np.ndarray]:
    """(3,) first voxel and (3,) length of a window in the resampled volume, along (z, y, x)."""
    ratio = np.asarray(volume.ratio)
    start = to_resampled(np.asarray(window.position), ratio)
    return start, np.round(np.asarray(window.extent) / ratio).astype(np.int64)


def _open(
    path: str,
    spacing: tuple[float, float, float] | None,
    channels: int,
    assume_orientation: bool,
    fill: float,
    intensities: Mapping[str, Intensity] | None,
) -> Volume:
    volume = load_volume(path, spacing, channels, assume_orientation)
    if intensities is not None:
        if path not in intensities:
            raise ReadFailure(path, "metadata", "the index holds no intensities for this volume.", "Tile again.")
        volume.values = intensities[path].apply(volume.values)
    if volume.valid is not None:
        np.copyto(volume.values, np.float32(fill), where=~volume.valid)
    return volume


def _forget(volume: Volume) -> None:
    """Nothing to close; the cache's reference was the last."""
