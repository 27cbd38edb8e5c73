"""Which windows of a scene or series are worth reading."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fmsuite.core.data.index import Window
from fmsuite.core.data.skipped import Skipped
from fmsuite.domains.remote_sensing.options import RemoteSensingOptions
from fmsuite.domains.remote_sensing.reader import RasterReader
from fmsuite.domains.remote_sensing.region import region_box
from fmsuite.domains.remote_sensing.scenes import Unit
from fmsuite.errors import ReadFailure
from fmsuite.tiling.grid import window_grid
from fmsuite.tiling.tasks import SourceRows, SourceTask

SMALLEST_SHARE = 0.01
"""A window of which a raster fills less than this is refused unread, whatever ``min_valid`` says."""
WINDOWS = "windows"
"""The stage of a source that can be read and has no window worth it."""


def cut_windows(task: SourceTask, unit: Unit, options: RemoteSensingOptions) -> SourceRows:
    """The windows of one unit. A date that fails is taken out of its series.

    Every window is read once: that is how nodata and damaged regions are known before training. A raster smaller than a
    window has one window, padded with invalid pixels. The last row and column of windows are moved back to end at the
    raster's edge.

    Raises:
        ReadFailure: if it has none.
    """
    notes: list[Skipped] = []
    while unit.dates:
        try:
            found = _windows_of_dates(task, unit, options)
            return replace(found, notes=(*notes, *found.notes))
        except ReadFailure as failure:
            dates = tuple(date for date in unit.dates if failure.path not in date[1])
            notes.append(Skipped.of(failure))
            if failure.stage == WINDOWS or len(dates) == len(unit.dates):
                break
            unit = replace(unit, dates=dates)
    return SourceRows.unused(*notes)


def window_corners(
    unit: Unit, extent: Sequence[float], stride: Sequence[float], options: RemoteSensingOptions
) -> np.ndarray:
    """(N, 2) upper left corners of the windows to look at, in pixels along (y, x).

    Args:
        extent, stride: of windows along (y, x), in the unit's own pixels.

    Raises:
        ReadFailure: if no window fits into the region.
    """
    top, left, bottom, right = region_box(unit.grid, options, unit.source)
    if options.region is None:
        return window_grid(unit.shape, extent, stride, edges="shift")
    if options.gsd is None:
        top, left, bottom, right = math.ceil(top), math.ceil(left), math.floor(bottom), math.floor(right)
    lengths = (bottom - top, right - left)
    if lengths[0] < extent[0] or lengths[1] < extent[1]:
        raise ReadFailure(
            unit.source,
            WINDOWS,
            f"{lengths[0]:.0f}x{lengths[1]:.0f} of its pixels are in data.region, less than a window of "
            f"{extent[0]:.0f}x{extent[1]:.0f}.",
            "Make the region larger, or data.size or data.gsd smaller.",
        )
    return window_grid(lengths, extent, stride, origin=(top, left), edges="shift")


def _windows_of_dates(task: SourceTask, unit: Unit, options: RemoteSensingOptions) -> SourceRows:
    """
    Raises:
        ReadFailure: of the stage ``WINDOWS`` if there are none worth reading; of another if a file cannot be read.
    """
    source = unit.source
    (height, width), metres = unit.shape, unit.metres
    step = (1.0, 1.0)
    if options.gsd is not None and metres is not None:
        step = (options.gsd / metres[0], options.gsd / metres[1])
    extent: tuple[float, ...] = (options.size * step[0], options.size * step[1])
    reach = min(1.0, height / extent[0]) * min(1.0, width / extent[1])
    if reach < max(options.min_valid, SMALLEST_SHARE):
        raise ReadFailure(
            source,
            WINDOWS,
            f"its {height}x{width} pixels fill {reach:.0%} of a window of {extent[0]:.0f}x{extent[1]:.0f} pixels.",
            "Make data.size, data.gsd or data.min_valid smaller.",
        )
    stride = options.stride or options.size
    corners = window_corners(unit, extent, (stride * step[0], stride * step[1]), options)
    spacing: tuple[float, ...] = metres or ()
    if options.series:
        corners = np.concatenate([np.zeros((len(corners), 1)), corners], axis=1)
        extent = (float(len(unit.dates)), *extent)
        spacing = (1.0, *spacing) if spacing else ()
    content, failures = _shares(task, unit, corners, extent, spacing, options)
    notes = []
    if failures:
        worst = failures[0]
        count = f"{len(failures)} of {len(corners)} windows left out: "
        notes.append(Skipped(worst.path, worst.stage, f"{count}{worst.reason} {worst.hint}".strip()))
    good = (content >= options.min_valid) & (content > 0)
    if not good.any():
        if np.isfinite(content).any():
            hint = "If that is enough, lower data.min_valid; if valid pixels are taken for nodata, correct the file."
            reason = (
                f"no window has {options.min_valid:.0%} valid values; the best has {np.nanmax(content):.0%}. {hint}"
            )
            notes.append(Skipped(source, WINDOWS, reason))
        return SourceRows.unused(*notes)
    facts = {"bands": unit.bands, "dtype": unit.dtype, "dates": unit.dates, "metres": metres, "crs": unit.grid[2]}
    rows = replace(task, path=source).rows(corners[good], extent, spacing, content[good])
    return SourceRows(rows, facts, tuple(notes))


def _shares(
    task: SourceTask,
    unit: Unit,
    corners: np.ndarray,
    extent: tuple[float, ...],
    spacing: tuple[float, ...],
    options: RemoteSensingOptions,
) -> tuple[np.ndarray, list[ReadFailure]]:
    """(N,) the share of valid values of each window, NaN where it cannot be read, and why not.

    Raises:
        ReadFailure: if a file of a series cannot be read.
    """
    reader = RasterReader(options, unit.bands, unit.dtype, files={unit.source: unit.dates})
    content = np.full(len(corners), np.nan)
    failures: list[ReadFailure] = []
    try:
        for row, corner in enumerate(corners):
            try:
                sample = reader.read(Window(unit.source, task.group, tuple(corner), extent, spacing))
            except ReadFailure as failure:
                if options.series:
                    raise
                failures.append(failure)
                continue
            content[row] = 1.0 if sample.valid is None else float(sample.valid.mean())
    finally:
        reader.close()
    return content, failures
