"""Where a window of a source lies, drawn anew for every sample: anywhere, or on points that are worth learning."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from fmsuite.core.data.index import SampleIndex, Window
from fmsuite.core.data.reader import Reader
from fmsuite.core.data.sample import Array
from fmsuite.errors import UsageError

_SLICE = 1 << 16
_WHOLE = 1e-6
"""Fractions of a grid step below this are rounding."""


class WindowSampler(Protocol):
    """Picklable, and a function of its arguments alone."""

    def __call__(self, window: Window, row: int, stream: np.random.Generator) -> Window:
        """
        Args:
            window: a row of the index.
            row: its number there.
            stream: the only source of randomness allowed.

        Returns:
            A window of the same source and extent.
        """
        ...


@dataclass(frozen=True)
class Bounds:
    """The box around all windows of one source, in the source's own coordinates; (D,) float64 each."""

    low: Array
    high: Array


def bounds_of(index: SampleIndex) -> dict[str, Bounds]:
    """The box around each source's windows: what a domain found worth looking at, margins left out.

    Raises:
        UsageError: if windows of one index have different numbers of axes.
    """
    return {source: bounds for (source,), bounds in _bounds(index, ("source",)).items()}


def _bounds(index: SampleIndex, columns: tuple[str, ...]) -> dict[tuple[str, ...], Bounds]:
    """The box around the windows that are alike in some columns, in the order in which they first occur."""
    names: list[dict[str, int]] = [{} for _ in columns]
    low: dict[tuple[int, ...], Array] = {}
    high: dict[tuple[int, ...], Array] = {}
    # In slices: the coordinates of a hundred million windows do not fit in memory at once.
    for start in range(0, len(index), _SLICE):
        rows = index.table.slice(start, _SLICE).combine_chunks()
        codes = []
        for name, known in zip(columns, names, strict=True):
            column = rows.column(name).combine_chunks()
            number_of = [known.setdefault(text, len(known)) for text in column.dictionary.to_pylist()]
            codes.append(np.array(number_of)[column.indices.to_numpy()])
        position, extent = (_matrix(rows.column(name).combine_chunks()) for name in ("position", "extent"))
        axes = next(iter(low.values())).shape[0] if low else position.shape[1]
        if not position.shape[1] == extent.shape[1] == axes:
            raise UsageError("The index holds windows of different numbers of axes.", "Make an index for each.")
        keys, first, which = np.unique(np.stack(codes), axis=1, return_index=True, return_inverse=True)
        least = np.full((keys.shape[1], axes), np.inf)
        most = -least
        np.minimum.at(least, which.reshape(-1), position)
        np.maximum.at(most, which.reshape(-1), position + extent)
        for number in np.argsort(first).tolist():
            key = tuple(keys[:, number].tolist())
            low[key] = np.minimum(low[key], least[number]) if key in low else least[number]
            high[key] = np.maximum(high[key], most[number]) if key in high else most[number]
    texts = [list(known) for known in names]
    return {tuple(own[code] for own, code in zip(texts, key, strict=True)): Bounds(low[key], high[key]) for key in low}


class RandomWindows:
    """Windows anywhere within the box around their source's windows, every place of the grid as likely. Where a source
    has windows of several groups (blocks of the ground), the box is that around those of one.

    The grid is that of the windows' samples: a step along an axis is the window's extent over its samples, counted from
    the box's corner, so that a reader that resamples whole sources never has to interpolate again. How much of a moved
    window is worth looking at is not known; its ``content`` is NaN.

    Args:
        index: the windows; their sources are those that can be sampled.
        size: samples of a window along each axis, as in ``InputSpec.size``.

    Raises:
        UsageError: if ``size`` has another number of axes than the windows.
    """

    def __init__(self, index: SampleIndex, size: Sequence[int]) -> None:
        self.bounds = _bounds(index, ("source", "group"))
        self.size = tuple(size)
        axes = {len(bounds.low) for bounds in self.bounds.values()}
        if axes - {len(self.size)}:
            raise UsageError(f"Windows of {axes.pop()} axes cannot be placed by the size {self.size}.")

    def __call__(self, window: Window, row: int, stream: np.random.Generator) -> Window:
        """
        Raises:
            ValueError: if the window's source is not in the index.
        """
        grid = self.grid(window)
        return grid.window(window, stream.integers(grid.places))

    def grid(self, window: Window) -> PlaceGrid:
        """The places at which a window of this source and extent may begin.

        Raises:
            ValueError: if the source is not in the index.
        """
        bounds = self.bounds.get((window.source, window.group))
        if bounds is None:
            raise ValueError(f"the sampler was made for another index: it does not know {window.source}")
        step = np.asarray(window.extent) / self.size
        room = (bounds.high - bounds.low - window.extent) / step
        return PlaceGrid(bounds.low, step, np.floor(room + _WHOLE).astype(np.int64) + 1)


@dataclass(frozen=True)
class PlaceGrid:
    """Where a window may begin: at ``low + step * k``, for whole ``0 <= k < places`` along each axis.

    Attributes:
        low, step: (D,) float64, in the source's own coordinates.
        places: (D,) int64, at least 1.
    """

    low: Array
    step: Array
    places: Array

    def window(self, window: Window, place: Array) -> Window:
        """The window moved to place k."""
        position = tuple((self.low + self.step * place).tolist())
        return replace(window, position=position, content=float("nan"))


class BalancedWindows:
    """Windows that show a rare class more often than chance: nnU-Net's oversampling of foreground.

    With probability ``foreground`` a window is centred on a labelled point, as far as the box around its source's
    windows allows; the class is drawn uniformly among those that the source has, then the point among the class's.
    Otherwise, and where a source has no points, it lies anywhere, as of ``RandomWindows``. (Isensee et al. 2021,
    "nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation", which takes the last
    third of each batch instead of each sample's own draw.)

    Args:
        index, size: as of ``RandomWindows``.
        points: source to class to (P, D) middles of labelled samples, in the source's own coordinates, those of
            ``Window.position`` (``Scene.place`` gives them).
        foreground: the probability.

    Raises:
        UsageError: as ``RandomWindows``, or if ``foreground`` is no probability.
        ValueError: if points are not (P, D).
    """

    def __init__(
        self,
        index: SampleIndex,
        size: Sequence[int],
        points: Mapping[str, Mapping[int, Array]],
        foreground: float = 1 / 3,
    ) -> None:
        if not 0 <= foreground <= 1:
            raise UsageError(f"A share of {foreground} foreground windows is not between 0 and 1.")
        self.anywhere = RandomWindows(index, size)
        groups = Counter(source for source, _ in self.anywhere.bounds)
        self._parted = {source for source, count in groups.items() if count > 1}
        self.foreground = foreground
        self.points: dict[str, list[Array]] = {}
        for source, classes in points.items():
            known = [np.asarray(classes[label], dtype=np.float64) for label in sorted(classes) if len(classes[label])]
            for found in known:
                if found.ndim != 2 or found.shape[1] != len(self.anywhere.size):
                    raise ValueError(f"points of {source} are {found.shape}, not (P, {len(self.anywhere.size)})")
            if known:
                self.points[source] = known

    def __call__(self, window: Window, row: int, stream: np.random.Generator) -> Window:
        """
        Raises:
            ValueError: as ``RandomWindows``.
        """
        classes = self.points.get(window.source)
        if classes is None or stream.random() >= self.foreground:
            return self.anywhere(window, row, stream)
        if window.source in self._parted:
            # Of the points of all groups, those of the window's own.
            bounds = self.anywhere.bounds[window.source, window.group]
            inside = [((points >= bounds.low) & (points <= bounds.high)).all(1) for points in classes]
            classes = [points[near] for points, near in zip(classes, inside, strict=True) if near.any()]
            if not classes:
                return self.anywhere(window, row, stream)
        candidates = classes[stream.integers(len(classes))]
        point = candidates[stream.integers(len(candidates))]
        grid = self.anywhere.grid(window)
        sample = np.floor((point - grid.low) / grid.step).astype(np.int64)
        place = np.clip(sample - np.asarray(self.anywhere.size) // 2, 0, grid.places - 1)
        return grid.window(window, place)


def require_anywhere(reader: Reader) -> None:
    """
    Raises:
        UsageError: if the reader knows the index's own windows only (see ``Reader``).
    """
    if not getattr(reader, "anywhere", False):
        raise UsageError(
            f"Windows cannot be drawn anew: {type(reader).__name__} reads those of the index only "
            "(training.windows=random).",
            "Use training.windows=fixed; or, if this is a packed copy of windows, the index of the files themselves or "
            "a copy of whole sources (`fmsuite pack --whole`).",
        )


def _matrix(column: object) -> Array:
    """(N, D) of a list column.

    Raises:
        UsageError: if its rows have different lengths.
    """
    lengths = np.diff(column.offsets.to_numpy())  # type: ignore[attr-defined]
    if len(set(lengths.tolist())) > 1:
        raise UsageError("The index holds windows of different numbers of axes.", "Make an index for each.")
    return column.flatten().to_numpy().reshape(len(lengths), -1)  # type: ignore[attr-defined]
