"""A whole source on the grid of a model's input: what dense predictions are made over, and the way back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fmsuite.core.data.sample import Array, ArraySample
from fmsuite.core.data.scene_maps import MapKind, SceneWriter, WholeWriter
from fmsuite.errors import UsageError


class Scene(ABC):
    """One source, whole, as a model sees it and as its owner stored it.

    The *input's grid* is that of a reader's windows: the input's axes, orientation and spacing. The *native grid* is
    that of the file: its axes in its own order and direction. A domain may leave out margins that show nothing; what
    a prediction says there is ``outside``. Only spatial axes count: a box of a series is read with all dates.

    Attributes:
        source: as in ``Window.source``.
        size: samples along each of the input's spatial axes.
        origin, pitch: where sample 0 begins, and how long a sample is, along each of the input's axes in the
            coordinates of ``Window.position``.
        native_size: samples along each axis of the native grid.
        native_spacing: physical length of a sample of the native grid along each of its axes, in the input's unit.
    """

    source: str
    size: tuple[int, ...]
    origin: tuple[float, ...]
    pitch: tuple[float, ...]
    native_size: tuple[int, ...]
    native_spacing: tuple[float, ...]

    @abstractmethod
    def read(self, start: Sequence[int], extent: Sequence[int]) -> ArraySample:
        """A box that lies inside ``size``, with the label maps that the domain's options name.

        Raises:
            ReadFailure: for whatever is wrong with the file or this part of it.
        """

    @abstractmethod
    def native_map(self, name: str) -> Array:
        """A label map as it is stored, (*native_size) integers.

        Raises:
            ReadFailure: for whatever is wrong with its file.
            UsageError: if the options name no such map.
        """

    def native_map_part(self, name: str, start: Sequence[int], extent: Sequence[int]) -> Array:
        """A box of ``native_map``."""
        return self.native_map(name)[tuple(slice(s, s + n) for s, n in zip(start, extent, strict=True))]

    @abstractmethod
    def scores_to_native(self, scores: Array, outside: float = 0.0) -> Array:
        """(K, *size) float32 to (K, *native_size), interpolated linearly."""

    def native_box(self, start: Sequence[int], extent: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Start and extent of the samples of the native grid whose middles lie in a box of the input's."""
        inside = np.zeros((1, *self.size), np.float32)
        box: tuple[slice, ...] = tuple(slice(s, s + n) for s, n in zip(start, extent, strict=True))
        inside[(slice(None), *box)] = 1
        places = np.argwhere(self.scores_to_native(inside)[0] >= 0.5)
        low, high = places.min(0), places.max(0) + 1
        return tuple(low.tolist()), tuple((high - low).tolist())

    def part_to_native(
        self,
        scores: Array,
        start: Sequence[int],
        native_start: Sequence[int],
        native_extent: Sequence[int],
        outside: float = 0.0,
    ) -> Array:
        """Scores of a box, (K, *extent), to a box of the native grid; beyond the first, its outermost scores go on.

        Args:
            start: of the first box. native_start, native_extent: of the other.
        """
        around = [(s, whole - s - n) for s, whole, n in zip(start, self.size, scores.shape[1:], strict=True)]
        native = self.scores_to_native(np.pad(scores, [(0, 0), *around], mode="edge"), outside)
        box: tuple[slice, ...] = tuple(slice(s, s + n) for s, n in zip(native_start, native_extent, strict=True))
        return native[(slice(None), *box)]

    @abstractmethod
    def write(self, values: Array, path: Path) -> Path:
        """Write (*native_size), or (K, *native_size), in the field's own format, so that it lies over the source in
        any viewer: the same grid, orientation and coordinates.

        Args:
            path: without a suffix.

        Returns:
            The file's path.
        """

    def writer(self, path: Path, what: MapKind) -> SceneWriter:
        """Writes a map as ``write`` does, box by box of what is said on the input's grid.

        Args:
            path: without a suffix.
        """
        return WholeWriter(self, path, what)

    def coarse_writer(self, path: Path, what: MapKind, step: Sequence[int]) -> SceneWriter:
        """Writes a map with one value for each box of ``step`` samples of the input's grid, from its first corner on;
        the last boxes may reach beyond the scene.

        Raises:
            UsageError: if the domain's files have no such maps.
        """
        raise UsageError("Maps of this field are on the grid of its files only.", "Use `fmsuite similar`.")

    def place(self, samples: Array) -> Array:
        """Places on the input's grid, (..., D) counted in samples (sample k covers k to k + 1), to the coordinates of
        ``Window.position``, float64."""
        return np.asarray(self.origin) + np.asarray(samples) * np.asarray(self.pitch)

    def locate(self, place: Sequence[int]) -> tuple[float, ...] | None:
        """Where the centre of a sample of the native grid lies, in sample numbers along the input's axes (fractions
        allowed); ``None`` outside of what the scene shows.

        Args:
            place: sample numbers along the native axes, within ``native_size``.
        """
        found = []
        for axis, length in enumerate(self.size):
            ramp = np.arange(length, dtype=np.float32).reshape([-1 if axis == n else 1 for n in range(len(self.size))])
            shown = self.scores_to_native(np.broadcast_to(ramp, self.size)[None], outside=float("nan"))
            found.append(float(shown[(0, *place)]))
        return None if np.isnan(found).any() else tuple(found)

    def from_file(self, place: Sequence[int]) -> tuple[int, ...]:
        """The sample of the native grid that somebody means who counts samples as the field does (of a raster column
        first, then row); it may lie outside of ``native_size``."""
        return tuple(place)

    def from_world(self, place: Sequence[float]) -> tuple[int, ...]:
        """The sample of the native grid that holds a point of the source's world coordinates (of a volume millimetres
        in RAS); it may lie outside of ``native_size``.

        Raises:
            UsageError: if the domain has none.
        """
        raise UsageError("This domain has no world coordinates.", "Name samples of the file, without --world.")

    def labels_to_native(self, scores: Array) -> Array:
        """(K, *size) float32 to (*native_size) uint8: the class with the highest interpolated score, and class 0 where
        the scene shows nothing."""
        native: Array = MapKind("classes").stored(self.scores_to_native(scores, outside=float("-inf")))[0]
        return native


class WrappedScene(Scene):
    """A scene that is another one but for what a subclass changes."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.source, self.size, self.origin, self.pitch = scene.source, scene.size, scene.origin, scene.pitch
        self.native_size, self.native_spacing = scene.native_size, scene.native_spacing

    def read(self, start: Sequence[int], extent: Sequence[int]) -> ArraySample:
        return self.scene.read(start, extent)

    def native_map(self, name: str) -> Array:
        return self.scene.native_map(name)

    def native_map_part(self, name: str, start: Sequence[int], extent: Sequence[int]) -> Array:
        return self.scene.native_map_part(name, start, extent)

    def scores_to_native(self, scores: Array, outside: float = 0.0) -> Array:
        return self.scene.scores_to_native(scores, outside)

    def native_box(self, start: Sequence[int], extent: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.scene.native_box(start, extent)

    def part_to_native(
        self,
        scores: Array,
        start: Sequence[int],
        native_start: Sequence[int],
        native_extent: Sequence[int],
        outside: float = 0.0,
    ) -> Array:
        return self.scene.part_to_native(scores, start, native_start, native_extent, outside)

    def write(self, values: Array, path: Path) -> Path:
        return self.scene.write(values, path)

    def writer(self, path: Path, what: MapKind) -> SceneWriter:
        return self.scene.writer(path, what)

    def coarse_writer(self, path: Path, what: MapKind, step: Sequence[int]) -> SceneWriter:
        return self.scene.coarse_writer(path, what, step)

    def locate(self, place: Sequence[int]) -> tuple[float, ...] | None:
        return self.scene.locate(place)

    def from_file(self, place: Sequence[int]) -> tuple[int, ...]:
        return self.scene.from_file(place)

    def from_world(self, place: Sequence[float]) -> tuple[int, ...]:
        return self.scene.from_world(place)


def labels_of(scene: Scene, sample: ArraySample, name: str) -> Array:
    """A label map of what was read of a scene along the scene's own axes; where it is kept for each of its dates, the
    first: they are alike."""
    labels = sample.maps[name]
    return labels[(0,) * (labels.ndim - len(scene.size))]
