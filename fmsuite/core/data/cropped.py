"""A part of a scene as a scene: what is judged where only some windows of a source are held out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fmsuite.core.data.sample import Array, ArraySample
from fmsuite.core.data.scene import Scene, WrappedScene
from fmsuite.core.data.scene_maps import MapKind, SceneWriter


class CroppedScene(WrappedScene):
    """The box around some windows of a scene. Nothing beyond it is read, and labels outside of the windows are -1.

    What is written has the whole scene's grid, and nothing outside of the box.

    Args:
        starts: (N, D) first samples of the windows along the scene's axes.
        extent: (D,) samples of a window; what reaches beyond the scene is cut off.
    """

    def __init__(self, scene: Scene, starts: Array, extent: Sequence[int]) -> None:
        super().__init__(scene)
        limit = np.asarray(scene.size)
        low = np.asarray(starts).clip(0, limit)
        high = (np.asarray(starts) + extent).clip(0, limit)
        self.start: tuple[int, ...] = tuple(low.min(0).tolist())
        self.size = tuple((high.max(0) - low.min(0)).tolist())
        self.origin = tuple(scene.place(np.asarray(self.start)).tolist())
        self.native_start, self.native_size = scene.native_box(self.start, self.size)
        self._windows = np.stack([low, high - low], axis=1)

    def read(self, start: Sequence[int], extent: Sequence[int]) -> ArraySample:
        if any(s < 0 or s + n > size for s, n, size in zip(start, extent, self.size, strict=True)):
            raise ValueError(f"a box at {tuple(start)} of {tuple(extent)} in a scene of {self.size}")
        return self.scene.read([s + own for s, own in zip(start, self.start, strict=True)], extent)

    def native_map(self, name: str) -> Array:
        labels = self.scene.native_map_part(name, self.native_start, self.native_size)
        shown = np.zeros(labels.shape, dtype=bool)
        for low, length in self._windows.tolist():
            begin, extent = self.scene.native_box(low, length)
            box = (slice(b - own, b - own + n) for b, own, n in zip(begin, self.native_start, extent, strict=True))
            shown[tuple(box)] = True
        return np.where(shown, labels, -1)

    def native_map_part(self, name: str, start: Sequence[int], extent: Sequence[int]) -> Array:
        return self.native_map(name)[tuple(slice(s, s + n) for s, n in zip(start, extent, strict=True))]

    def scores_to_native(self, scores: Array, outside: float = 0.0) -> Array:
        return self.scene.part_to_native(scores, self.start, self.native_start, self.native_size, outside)

    def write(self, values: Array, path: Path) -> Path:
        whole = np.zeros((*values.shape[: -len(self.native_size)], *self.scene.native_size), values.dtype)
        box: tuple[Any, ...] = tuple(slice(s, s + n) for s, n in zip(self.native_start, self.native_size, strict=True))
        whole[(..., *box)] = values
        return self.scene.write(whole, path)

    def writer(self, path: Path, what: MapKind) -> SceneWriter:
        return _Shifted(self.scene.writer(path, what), self.start)

    def locate(self, place: Sequence[int]) -> tuple[float, ...] | None:
        found = self.scene.locate([p + own for p, own in zip(place, self.native_start, strict=True)])
        return None if found is None else tuple(f - own for f, own in zip(found, self.start, strict=True))

    def from_file(self, place: Sequence[int]) -> tuple[int, ...]:
        return self._own(self.scene.from_file(place))

    def from_world(self, place: Sequence[float]) -> tuple[int, ...]:
        return self._own(self.scene.from_world(place))

    def _own(self, place: Sequence[int]) -> tuple[int, ...]:
        return tuple(p - own for p, own in zip(place, self.native_start, strict=True))


class _Shifted(SceneWriter):
    def __init__(self, writer: SceneWriter, start: tuple[int, ...]) -> None:
        self._writer, self._start = writer, start

    def add(self, start: Sequence[int], values: Array, valid: Array | None = None) -> None:
        self._writer.add([s + own for s, own in zip(start, self._start, strict=True)], values, valid)

    def finish(self) -> Path:
        return self._writer.finish()

    def discard(self) -> None:
        self._writer.discard()
