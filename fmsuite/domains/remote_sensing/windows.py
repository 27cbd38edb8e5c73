"""Which windows of a scene or series are worth reading."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from fmsuite.core.data.index import Window
from fmsuite.core.data.skipped import Skipped
from fmsuite.domains.remote_sensing.layout import WINDOWS, cut_of, lay_out
from fmsuite.domains.remote_sensing.map_files import STAGE as MAPS
from fmsuite.domains.remote_sensing.options import RemoteSensingOptions
from fmsuite.domains.remote_sensing.places import PLACES
from fmsuite.domains.remote_sensing.reader import RasterReader
from fmsuite.domains.remote_sensing.scenes import Unit
from fmsuite.errors import ReadFailure
from fmsuite.tiling.tasks import SourceRows, SourceTask

SMALLEST_SHARE = 0.01
"""A window of which a raster fills less than this is refused unread, whatever ``min_valid`` says."""


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
            if failure.stage in (WINDOWS, MAPS) or len(dates) == len(unit.dates):
                break
            unit = replace(unit, dates=dates)
    return SourceRows.unused(*notes)


def _windows_of_dates(task: SourceTask, unit: Unit, options: RemoteSensingOptions) -> SourceRows:
    """
    Raises:
        ReadFailure: of the stage ``WINDOWS`` if there are none worth reading; of another if a file cannot be read.
    """
    source = unit.source
    (height, width), metres = unit.shape, unit.metres
    cut = cut_of(unit, options)
    extent: tuple[float, ...] = cut.extent
    reach = min(1.0, height / extent[0]) * min(1.0, width / extent[1])
    if reach < max(options.min_valid, SMALLEST_SHARE):
        raise ReadFailure(
            source,
            WINDOWS,
            f"its {height}x{width} pixels fill {reach:.0%} of a window of {extent[0]:.0f}x{extent[1]:.0f} pixels.",
            "Make data.size, data.gsd or data.min_valid smaller.",
        )
    layout = lay_out(cut, unit.plan)
    corners = layout.corners
    if not len(corners):
        reason = f"each of its {layout.left_out} windows is across a border of blocks, or too near to one."
        raise ReadFailure(source, WINDOWS, reason, "Make data.block several times as large as a window.")
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
    thin = int((np.isfinite(content) & ~good).sum())
    if options.places is not None and thin:
        reason = (
            f"{thin} of {len(corners)} windows of places left out: fewer than {options.min_valid:.0%} valid values."
        )
        notes.append(Skipped(source, PLACES, f"{reason} Lower data.min_valid to have them."))
    facts: dict[str, Any] = {"bands": unit.bands, "dtype": unit.dtype, "dates": unit.dates, "metres": metres}
    facts |= {"crs": unit.grid[2], "left_out": layout.left_out, "places": unit.plan.get("places")}
    kept = layout.only(good)
    rows = replace(task, path=source).rows(corners[good], extent, spacing, content[good], kept.groups)
    if kept.labels is not None:
        rows = replace(rows, label=kept.labels, split=kept.splits)
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
        reader.check_maps(unit.source)
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
