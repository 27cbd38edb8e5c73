"""A scene of which parts cannot be read: these are invalid, and it is known which they are."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from fmsuite.core.data.sample import ArraySample
from fmsuite.core.data.scene import Scene, WrappedScene
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.errors import ReadFailure

CELL = 32
"""Side of what is given up at once, in samples."""
_PROBES = 8


class ForgivingScene(WrappedScene):
    """Where a box cannot be read, it is read again in cells; those that fail are invalid.

    Attributes:
        lost: the cells, by their numbers along the axes, that have failed so far.
    """

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        self.lost: set[tuple[int, ...]] = set()
        self._first: ReadFailure | None = None
        self._like: ArraySample | None = None

    def read(self, start: Sequence[int], extent: Sequence[int]) -> ArraySample:
        """
        Raises:
            ReadFailure: if nothing of the scene can be read, not even at places that are spread over it.
        """
        try:
            sample = self.scene.read(start, extent)
        except ReadFailure as failure:
            self._first = self._first or failure
        else:
            self._like = self._like or sample
            return sample
        cells = itertools.product(
            *(range(s // CELL, (s + n - 1) // CELL + 1) for s, n in zip(start, extent, strict=True))
        )
        parts = [(cell, self._cell(cell)) for cell in cells]
        like = self._like or self._probe()
        # What comes before the spatial axes: channels, and dates of a series.
        lead = like.values.shape[: like.values.ndim - len(self.size)]
        values = np.zeros((*lead, *extent), like.values.dtype)
        valid = np.zeros(values.shape, dtype=bool)
        maps = {name: np.full(tuple(extent), -1, labels.dtype) for name, labels in like.maps.items()}
        for cell, part in parts:
            if part is None:
                continue
            box, own = [], []
            for begin, length, number, size in zip(start, extent, cell, self.size, strict=True):
                low, high = max(begin, number * CELL), min(begin + length, (number + 1) * CELL, size)
                box.append(slice(low - begin, high - begin))
                own.append(slice(low - number * CELL, high - number * CELL))
            here: tuple[Any, ...] = (..., *box)
            there: tuple[Any, ...] = (..., *own)
            values[here] = part.values[there]
            valid[here] = True if part.valid is None else part.valid[there]
            for name, labels in part.maps.items():
                maps[name][tuple(box)] = labels[tuple(own)]
        return like.replace(values=values, valid=valid, maps=maps)

    def note(self, skipped: SkippedLog) -> None:
        """Say what was lost, if anything was."""
        if self._first is None or not self.lost:
            return
        corner = ", ".join(str(number * CELL) for number in min(self.lost))
        skipped.add(
            self._first.path,
            self._first.stage,
            f"{len(self.lost)} of its squares of {CELL} samples have no result, the first at ({corner}): "
            f"{self._first.reason} {self._first.hint}".strip(),
        )

    def _cell(self, cell: tuple[int, ...]) -> ArraySample | None:
        """All of a cell, whatever part of it is wanted: so a box does not depend on those that were read before."""
        if cell in self.lost:
            return None
        begin = [number * CELL for number in cell]
        length = [min(CELL, size - b) for size, b in zip(self.size, begin, strict=True)]
        try:
            part = self.scene.read(begin, length)
        except ReadFailure:
            self.lost.add(cell)
            return None
        self._like = self._like or part
        return part

    def _probe(self) -> ArraySample:
        """A sample that tells what the others would look like."""
        cells = [-(-size // CELL) for size in self.size]
        for cell in itertools.product(*(range(0, count, max(1, count // _PROBES)) for count in cells)):
            part = self._cell(cell)
            if part is not None:
                return part
        assert self._first is not None
        raise self._first
