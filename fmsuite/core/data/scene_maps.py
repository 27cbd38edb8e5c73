"""Maps of whole scenes: what they hold, and how they are written piece by piece."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from fmsuite.core.data.sample import Array

if TYPE_CHECKING:
    from fmsuite.core.data.scene import Scene

Kind = Literal["classes", "scores", "picture"]


@dataclass(frozen=True)
class MapKind:
    """What a map holds, and so how its values are taken to the native grid and stored.

    Attributes:
        kind: of ``classes`` each sample has a score a class, and the map says the class with the highest interpolated
            one, in 8 bits. ``scores`` are interpolated, and stored as float32. A ``picture`` is red, green and blue, 0
            to 255, interpolated and rounded to 8 bits.
        names: of the classes, from class 0 on, or of the bands.
        tags: further metadata, where the field's format has a place for it.
    """

    kind: Kind
    names: Sequence[str] = ()
    tags: Mapping[str, str] = field(default_factory=dict)

    def stored(self, native: Array) -> Array:
        """(K, ...) float32 on the native grid as (bands, ...) of the type that is stored."""
        if self.kind == "classes":
            if len(native) > np.iinfo(np.uint8).max:
                raise ValueError(f"{len(native)} classes do not fit into 8 bits")
            return native.argmax(axis=0).astype(np.uint8)[None]
        return native.round().clip(0, 255).astype(np.uint8) if self.kind == "picture" else native


class SceneWriter(ABC):
    """Writes one map of a scene. Boxes come in any order, together cover the scene, and do not overlap."""

    @abstractmethod
    def add(self, start: Sequence[int], values: Array, valid: Array | None = None) -> None:
        """
        Args:
            start: of a box on the input's grid.
            values: (K, *extent) float32, finite; see ``MapKind``.
            valid: (*extent) bool, where the scene shows something; ``None`` for everywhere.

        Raises:
            FmsuiteError: if it cannot be written.
        """

    @abstractmethod
    def finish(self) -> Path:
        """
        Returns:
            The map's file, which exists from now on.

        Raises:
            FmsuiteError: if it cannot be written.
        """

    def discard(self) -> None:  # noqa: B027
        """Leave nothing of an unfinished map."""


class WholeWriter(SceneWriter):
    """Collects a map in memory, for scenes whose files are written at once. The validity of samples has no place in
    such files.

    Args:
        path: without a suffix.
    """

    def __init__(self, scene: Scene, path: Path, what: MapKind) -> None:
        self._scene, self._path, self._what = scene, path, what
        self._whole: Array | None = None

    def add(self, start: Sequence[int], values: Array, valid: Array | None = None) -> None:
        if self._whole is None:
            self._whole = np.zeros((len(values), *self._scene.size), np.float32)
        box = tuple(slice(s, s + n) for s, n in zip(start, values.shape[1:], strict=True))
        self._whole[(slice(None), *box)] = values

    def finish(self) -> Path:
        assert self._whole is not None
        outside = float("-inf") if self._what.kind == "classes" else 0.0
        stored = self._what.stored(self._scene.scores_to_native(self._whole, outside))
        return self._scene.write(stored[0] if len(stored) == 1 else stored, self._path)
