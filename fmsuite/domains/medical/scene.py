"""A whole volume on the grid of a model's input, and the way back to its file's own grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fmsuite.core.data.sample import ArraySample
from fmsuite.core.data.scene import Scene
from fmsuite.domains.medical.formats import nifti
from fmsuite.domains.medical.geometry import linear_back, to_native, turn_to_ras
from fmsuite.domains.medical.maps import native_map
from fmsuite.domains.medical.reader import cut
from fmsuite.domains.medical.volumes import Volume
from fmsuite.domains.medical.windows import to_own
from fmsuite.errors import ReadFailure, UsageError


class VolumeScene(Scene):
    """The box around a volume's foreground, resampled, standardised (MR) or in Hounsfield units (CT).

    Args:
        source: the volume.
        volume: resampled and standardised.
        start, size: the box, in resampled voxels along (z, y, x), inside the volume.
        fill: value of voxels that are invalid.
        maps: templates of label maps by name.
    """

    def __init__(
        self,
        source: str,
        volume: Volume,
        start: tuple[int, int, int],
        size: tuple[int, int, int],
        fill: float,
        maps: Mapping[str, str],
    ) -> None:
        self.source = source
        self.size: tuple[int, int, int] = size
        self.native_size: tuple[int, int, int] = volume.native.shape
        self.native_spacing: tuple[float, float, float] = volume.native.spacing
        self.start = start
        ratio = np.asarray(volume.ratio)
        self.origin: tuple[float, ...] = tuple(to_own(np.asarray(start), ratio).tolist())
        self.pitch: tuple[float, ...] = tuple(volume.ratio)
        self._volume = volume
        self._fill = fill
        self._maps = dict(maps)

    def read(self, start: Sequence[int], extent: Sequence[int]) -> ArraySample:
        """(C, z, y, x) float32, with (z, y, x) int16 maps.

        Raises:
            ValueError: for a box that is empty or reaches out of the scene.
            ReadFailure: if no voxel of it is a finite number.
        """
        box = np.asarray(start), np.asarray(extent)
        if box[0].shape != (3,) or (box[0] < 0).any() or (box[1] < 1).any() or (box[0] + box[1] > self.size).any():
            raise ValueError(f"a box at {tuple(start)} of {tuple(extent)} in a scene of {self.size}")
        sample = cut(self._volume, box[0] + self.start, box[1], self._fill)
        if sample.valid is not None and not sample.valid.any():
            raise ReadFailure(self.source, "read", "a box without a finite voxel.", "It is left out.")
        return sample

    def native_map(self, name: str) -> np.ndarray:
        if name not in self._maps:
            known = ", ".join(self._maps) or "none"
            raise UsageError(f"There is no label map '{name}'; data.maps names {known}.", "Name it in data.maps.")
        return native_map(self.source, self._volume.native, name, self._maps[name])

    def scores_to_native(self, scores: np.ndarray, outside: float = 0.0) -> np.ndarray:
        """A voxel of the file gets what linear interpolation gives at its centre; where it is not resampled, the same
        bits.

        Raises:
            ValueError: if the scores are not on this scene's grid.
        """
        if scores.ndim != 4 or scores.shape[1:] != self.size:
            raise ValueError(f"scores of shape {scores.shape} for a scene of {self.size}")
        native = self._volume.native
        order, _ = turn_to_ras(native)
        own = tuple(native.shape[axis] for axis in reversed(order))
        values = linear_back(scores.astype(np.float32, copy=False), self.start, self._volume.ratio, own, outside)
        return np.ascontiguousarray(to_native(values, native))

    def locate(self, place: Sequence[int]) -> tuple[float, ...] | None:
        native = self._volume.native
        order, reverse = turn_to_ras(native)
        own = [native.shape[a] - 1 - place[a] if turned else place[a] for a, turned in zip(order, reverse, strict=True)]
        at = np.asarray(own[::-1]) / self._volume.ratio - self.start
        last = np.asarray(self.size) - 1
        if ((at < -0.5 - 1e-9) | (at > last + 0.5 + 1e-9)).any():
            return None
        return tuple(float(value) for value in at.clip(0, last))

    def from_world(self, place: Sequence[float]) -> tuple[int, ...]:
        """Of the voxel whose centre is nearest to a point in millimetres, RAS.

        Raises:
            UsageError: unless three numbers are given.
        """
        if len(place) != 3:
            raise UsageError(f"A point of a volume has three coordinates, not {len(place)}.", "Give X,Y,Z.")
        return tuple(int(n) for n in np.rint((np.linalg.inv(self._volume.native.affine) @ [*place, 1])[:3]))

    def write(self, values: np.ndarray, path: Path) -> Path:
        """A NIfTI file, see ``formats.nifti.write``; several maps become its fourth axis.

        Raises:
            ValueError: if the values are not on the file's grid.
        """
        if values.shape[-3:] != self.native_size or values.ndim not in (3, 4):
            raise ValueError(f"values of shape {values.shape} for a file of {self.native_size}")
        return nifti.write(path, np.moveaxis(values, 0, -1) if values.ndim == 4 else values, self._volume.native)
