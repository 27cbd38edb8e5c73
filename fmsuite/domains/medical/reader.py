"""Reads windows of resampled volumes, and keeps the last few volumes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar

import numpy as np

from fmsuite.core.data.handles import HandleCache
from fmsuite.core.data.index import Window
from fmsuite.core.data.sample import ArraySample
from fmsuite.domains.medical.geometry import nearest
from fmsuite.domains.medical.intensity import Intensity
from fmsuite.domains.medical.maps import read_map
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
        assume_orientation: see ``volumes.read_stored``.
        fill: value of voxels that are invalid: outside the volume, or not finite in the file.
        intensities: by source, for MR; ``None`` leaves values as they are.
        cached: volumes to keep.
        maps: templates of label maps by name, see ``maps.map_path``.
        series: slices of the sources that are DICOM series, see ``volumes.read_stored``.
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
        maps: Mapping[str, str] | None = None,
        series: Mapping[str, Sequence[tuple[str, int | None]]] | None = None,
    ) -> None:
        self.fill = fill
        opener = partial(
            _open,
            spacing=spacing,
            channels=channels,
            assume_orientation=assume_orientation,
            fill=fill,
            intensities=intensities,
            maps=dict(maps or {}),
            series=dict(series or {}),
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
        sample = cut(volume, start, size, self.fill)
        if sample.valid is not None and not sample.valid.any():
            raise ReadFailure(window.source, "read", "a window without a finite voxel.", "It is left out.")
        return sample


def cut(volume: Volume, start: np.ndarray, size: np.ndarray, fill: float) -> ArraySample:
    """A box of a resampled volume, copied. What it reaches beyond the volume is invalid, and 0 in label maps.

    Args:
        start, size: (3,) voxels along (z, y, x); a part of the box lies inside the volume.
        fill: value beyond the volume.
    """
    low = np.maximum(start, 0)
    high = np.minimum(start + size, volume.shape)
    source = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    valid = None if volume.valid is None else volume.valid[(slice(None), *source)]
    values = volume.values[(slice(None), *source)]
    maps = {name: labels[source] for name, labels in volume.maps.items()}
    if (high - low < size).any():
        target = tuple(slice(a, b) for a, b in zip(low - start, high - start, strict=True))
        padded = np.full((len(values), *size), fill, dtype=np.float32)
        padded[(slice(None), *target)] = values
        inside = np.zeros((1, *size), dtype=bool)
        inside[(slice(None), *target)] = True if valid is None else valid
        values, valid = padded, inside
        for name, labels in maps.items():
            maps[name] = np.zeros(tuple(size), dtype=labels.dtype)
            maps[name][target] = labels
    return ArraySample(
        values.copy(),
        None if valid is None or valid.all() else valid.copy(),
        spacing=volume.spacing,
        maps={name: labels.copy() for name, labels in maps.items()},
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
    maps: Mapping[str, str],
    series: Mapping[str, Sequence[tuple[str, int | None]]],
) -> Volume:
    volume = load_volume(path, spacing, channels, assume_orientation, series.get(path))
    for name, template in maps.items():
        volume.maps[name] = nearest(read_map(path, volume.native, name, template), volume.ratio, volume.shape)
    if intensities is not None:
        if path not in intensities:
            raise ReadFailure(path, "metadata", "the index holds no intensities for this volume.", "Tile again.")
        volume.values = intensities[path].apply(volume.values)
    if volume.valid is not None:
        np.copyto(volume.values, np.float32(fill), where=~volume.valid)
    return volume


def _forget(volume: Volume) -> None:
    """Nothing to close; the cache's reference was the last."""
