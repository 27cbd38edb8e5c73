"""Reads the windows of an index: native pixels, or resampled to a ground sampling distance; one date or many."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import numpy as np

from fmsuite.core.data.handles import HandleCache
from fmsuite.core.data.index import Window
from fmsuite.core.data.sample import ArraySample
from fmsuite.domains.remote_sensing.dates import carried
from fmsuite.domains.remote_sensing.eopatch import EOPatch, PatchDate, is_patch, open_patch, patch_of
from fmsuite.domains.remote_sensing.map_files import UNKNOWN, MapReader
from fmsuite.domains.remote_sensing.options import RemoteSensingOptions
from fmsuite.domains.remote_sensing.scenes import Dates
from fmsuite.domains.remote_sensing.stack import Stack, open_stack
from fmsuite.errors import ReadFailure


@dataclass
class RasterReader:
    """Windows as arrays of (C, y, x), or (C, time, y, x) for a time series.

    Values are in the sensor's counts, in one dtype for the whole index, 0 where invalid; ``valid`` tells band by band
    and pixel by pixel what is data.

    Attributes:
        options: the options that the index was made with.
        bands: to read, in this order.
        dtype: of the values.
        spaced: report each sample's spacing in metres; only where every source of the index has one.
        files: of each source that is more than its one file, the dates.
    """

    anywhere: ClassVar[bool] = True
    piecewise: ClassVar[bool] = True

    options: RemoteSensingOptions
    bands: tuple[str, ...]
    dtype: str
    spaced: bool = True
    files: Mapping[str, Dates] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._handles: HandleCache[Stack | EOPatch] = HandleCache(partial(_open, options=self.options), _close, 16)
        self._maps = MapReader(self.options)

    def read(self, window: Window) -> ArraySample:
        """A window of any extent, at any place; it has as many samples as fit its extent.

        Raises:
            ReadFailure: if a file of the window cannot be opened, lacks a band, or cannot be decoded there.
        """
        position, extent = window.position[-2:], window.extent[-2:]
        spacing: tuple[float, ...] | None = None
        if self.spaced and window.spacing:
            gsd = self.options.gsd
            spacing = window.spacing[-2:] if gsd is None else (gsd, gsd)
        dates = self.files_of(window.source)
        if not self.options.series:
            values, valid = self._read_one(dates[0][1], position, extent)
            maps = self._labels(window.source, dates[0][1], position, extent, valid[:, None])
            return ArraySample(values, valid, spacing=spacing, maps=maps)
        parts = [self._read_one(paths, position, extent) for _, paths in dates]
        valid = np.stack([valid for _, valid in parts], axis=1)
        maps = self._labels(window.source, dates[0][1], position, extent, valid)
        return ArraySample(
            np.stack([values for values, _ in parts], axis=1),
            valid,
            coords={"time": carried([day or 0.0 for day, _ in dates])},
            spacing=None if spacing is None else (1.0, *spacing),
            maps=maps,
        )

    def files_of(self, source: str) -> Dates:
        """The dates of a source, each with its day (``None`` outside of series) and files.

        Raises:
            ReadFailure: if it is a series that the index does not know.
        """
        if source in self.files:
            return self.files[source]
        if self.options.series:
            raise ReadFailure(source, "read", "the index does not list the dates of this series.", "Tile again.")
        return ((None, (source,)),)

    def check_maps(self, source: str) -> None:
        """
        Raises:
            ReadFailure: about the source, if one of its label maps is missing or does not lie over it.
        """
        if self.options.maps:
            self._maps.check(source, self._date(self.files_of(source)[0][1]).grid)

    def native_labels(self, name: str, source: str, start: tuple[int, int], extent: tuple[int, int]) -> np.ndarray:
        """A label map on the source's own pixels, (y, x) int16, -1 where no band has data at any date.

        Raises:
            ReadFailure: if the map or the source cannot be read.
        """
        valid = np.zeros(extent, dtype=bool)
        dates = self.files_of(source)
        for _, paths in dates:
            _, shown = self._date(paths).read(self.bands, *start, *extent)
            valid |= shown.any(0)
        grid = self._date(dates[0][1]).grid
        labels = self._maps.read_one(name, source, grid, start, (1.0, 1.0), extent)
        return np.where(valid, labels, np.int16(UNKNOWN))

    def _labels(
        self,
        source: str,
        paths: tuple[str, ...],
        position: Sequence[float],
        extent: Sequence[float],
        valid: np.ndarray,
    ) -> dict[str, np.ndarray]:
        """The label maps of a window, (y, x) int16, alike for all dates; -1 where no band has data at any.

        Args:
            valid: (C, time, y, x).
        """
        if not self.options.maps:
            return {}
        size, shown = valid.shape[2:], valid.any(axis=(0, 1))
        step = [length / count for length, count in zip(extent, size, strict=True)]
        found = self._maps.read(source, self._date(paths).grid, position, step, size)
        return {name: np.where(shown, labels, np.int16(UNKNOWN)) for name, labels in found.items()}

    def close(self) -> None:
        self._handles.close()
        self._maps.close()

    def _read_one(
        self, paths: tuple[str, ...], position: tuple[float, ...], extent: tuple[float, ...]
    ) -> tuple[np.ndarray, np.ndarray]:
        try:
            return self._resampled(self._date(paths), position, extent)
        except ReadFailure:
            # A GDAL handle that has failed once may go on failing after the file is back.
            self._handles.discard(patch_of(paths)[0])
            raise

    def _date(self, paths: tuple[str, ...]) -> Stack | PatchDate:
        opened, number = patch_of(paths)
        found = self._handles.get(opened)
        if isinstance(found, EOPatch):
            assert number is not None
            return found.date(number)
        return found

    def _resampled(
        self, stack: Stack | PatchDate, position: tuple[float, ...], extent: tuple[float, ...]
    ) -> tuple[np.ndarray, np.ndarray]:
        gsd, metres = self.options.gsd, stack.metres
        if gsd is None or metres is None:
            (top, left), (height, width) = ([round(value) for value in pair] for pair in (position, extent))
            values, valid = stack.read(self.bands, top, left, height, width)
            return values.astype(self.dtype, copy=False), valid
        # The filter's support is one output pixel where it shrinks and one raster pixel where it enlarges. Windows are
        # read with that margin and trimmed, so that neighbouring windows meet without a seam; at the raster's own edge
        # there is nothing to read, and the filter stops.
        cut_size, starts, ends, trims = [], [], [], []
        sizes = [max(1, round(length * side / gsd)) for length, side in zip(extent, metres, strict=True)]
        for place, length, size, limit in zip(position, extent, sizes, (stack.height, stack.width), strict=True):
            step = length / size
            margin = math.ceil(max(1.0, 1 / step))
            before = margin if place - margin * step >= 0 else 0
            after = margin if place + length + margin * step <= limit else 0
            starts.append(place - before * step)
            ends.append(place + length + after * step)
            cut_size.append(size + before + after)
            trims.append(slice(before, before + size))
        top, left = (math.floor(start) for start in starts)
        bottom, right = (math.ceil(end) for end in ends)
        values, valid = stack.read(self.bands, top, left, bottom - top, right - left)
        box = (ends[0] - starts[0], ends[1] - starts[1])
        cut = ArraySample(values.astype(np.float32), valid).crop(
            (starts[0] - top, starts[1] - left), box, (cut_size[0], cut_size[1])
        )
        assert cut.valid is not None
        inside = (slice(None), *trims)
        kept = cut.valid[inside]
        return np.where(kept, cut.values[inside], 0).astype(self.dtype), kept.copy()


def open_date(paths: tuple[str, ...], options: RemoteSensingOptions) -> Stack | PatchDate:
    """The files of one date of one scene, or a date of a folder in eo-learn's layout.

    Raises:
        ReadFailure: as ``open_stack`` and ``open_patch``.
    """
    opened, number = patch_of(paths)
    return open_stack(paths, options) if number is None else open_patch(opened[0], options).date(number)


def _open(paths: tuple[str, ...], options: RemoteSensingOptions) -> Stack | EOPatch:
    return open_patch(paths[0], options) if is_patch(paths[0]) else open_stack(paths, options)


def _close(opened: Stack | EOPatch) -> None:
    opened.close()
