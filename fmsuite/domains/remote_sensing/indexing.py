"""From files to the table of windows: what each file is, which bands all share, which dates belong together."""

from __future__ import annotations

import datetime
import posixpath
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fmsuite.core.data.index import SampleIndex, Window
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.domains.base import Progress
from fmsuite.domains.remote_sensing.options import RemoteSensingOptions
from fmsuite.domains.remote_sensing.raster import SUFFIXES, open_raster
from fmsuite.domains.remote_sensing.reader import Dates, RasterReader
from fmsuite.domains.remote_sensing.statistics import BandStatistics
from fmsuite.errors import ReadFailure
from fmsuite.tiling.grid import window_grid
from fmsuite.tiling.labels import SourceLabel, assign_labels
from fmsuite.tiling.sources import SourceFile, find_files
from fmsuite.tiling.table import join_tables, spread_rows, window_table

EPOCH = datetime.date(2000, 1, 1)
SMALLEST_SHARE = 0.01
"""A window of which a raster fills less than this is refused unread, whatever ``min_valid`` says."""


@dataclass
class Probe:
    """What one file said of itself."""

    file: SourceFile
    bands: tuple[str, ...]
    named: bool
    dtype: str
    tagged: bool
    height: int
    width: int
    metres: tuple[float, float] | None
    grid: tuple[Any, ...]
    place: str
    day: float | None = None

    @property
    def path(self) -> str:
        return str(self.file.path)


@dataclass
class Unit:
    """What windows are cut from: a file, or the dates of a place in order.

    Attributes:
        group: the place.
        probes: what is read.
        files: what may have been labelled: also dates of the place that turned out to be of no use.
    """

    group: str
    probes: list[Probe]
    files: tuple[SourceFile, ...]

    @property
    def source(self) -> str:
        return self.probes[0].path

    @property
    def dates(self) -> Dates:
        return [(probe.path, float(probe.day or 0)) for probe in self.probes]


def build_index(
    paths: Sequence[Path], options: RemoteSensingOptions, skipped: SkippedLog, progress: Progress
) -> SampleIndex:
    """As ``Domain.build_index``.

    Files whose bands differ: without ``data.bands``, the set that most files have decides (of equally frequent sets the
    larger, then the one met first); a file that lacks a band of it is skipped, one that has more is read by name.

    Every window is read once: that is how nodata, damaged regions and the statistics are known before training. A
    raster smaller than a window has one window, padded with invalid pixels. The last row and column of windows are
    moved back to end at the raster's edge.
    """
    files = find_files(paths, SUFFIXES, "rasters")
    placed = []
    for file in files:
        try:
            placed.append((file, *_place_and_day(file, options)))
        except ReadFailure as failure:
            skipped.add_failure(failure)
    labels = assign_labels(options, paths, files, skipped, {file.path: place for file, place, _ in placed})
    probes = []
    for file, place, day in progress(placed, len(placed), "opening rasters"):
        try:
            probes.append(_probe(file, place, day, options))
        except ReadFailure as failure:
            skipped.add_failure(failure)
    bands = options.wanted_bands or _common_bands(probes)
    probes = _with_bands(probes, bands, options, skipped)
    units = _units(probes, options, skipped)
    dtype = _common_dtype(probes, options)

    tables: list[pa.Table] = []
    kept: list[Unit] = []
    notes = [labels.of(*unit.files) for unit in units]
    for unit, note in progress(list(zip(units, notes, strict=True)), len(units), "reading windows"):
        table = _windows(unit, bands, dtype, options, skipped, note)
        if table is not None:
            tables.append(table)
            kept.append(unit)

    metres = [unit.probes[0].metres for unit in kept]
    metadata: dict[str, Any] = {
        "domain": "remote_sensing",
        "options": options.model_dump(mode="json"),
        "bands": list(bands),
        "dtype": dtype,
        "spacing": _common_spacing(metres, options),
        "spaced": bool(kept) and all(size is not None for size in metres),
        "dates": max((len(unit.probes) for unit in kept), default=0),
        "series": {unit.source: [list(date) for date in unit.dates] for unit in kept} if options.series else {},
        "labels": labels.summary(),
    }
    index = join_tables(tables, metadata)
    index.metadata["statistics"] = _statistics(index, options, skipped)
    return index


def reader_of(index: SampleIndex, options: RemoteSensingOptions) -> RasterReader:
    """The reader of an index, from what its metadata says."""
    series = {source: [(str(p), float(d)) for p, d in dates] for source, dates in index.metadata["series"].items()}
    facts = index.metadata
    return RasterReader(options, tuple(facts["bands"]), facts["dtype"], facts["spaced"], series)


def _probe(file: SourceFile, place: str, day: float | None, options: RemoteSensingOptions) -> Probe:
    raster = open_raster(str(file.path), options)
    try:
        if options.gsd is not None and raster.metres is None:
            raise ReadFailure(
                raster.path,
                "metadata",
                "it has no place on Earth (no coordinate system or no geotransform), so its pixels have no known size.",
                "Georeference it with `gdal_edit -a_srs -a_ullr`, or leave data.gsd empty to read native pixels.",
            )
        return Probe(
            file,
            tuple(raster.bands),
            raster.named,
            raster.dtype,
            raster.tagged is not None,
            raster.height,
            raster.width,
            raster.metres,
            raster.grid,
            place,
            day,
        )
    finally:
        raster.close()


def _place_and_day(file: SourceFile, options: RemoteSensingOptions) -> tuple[str, float | None]:
    path, name = str(file.path), file.path.name
    day, place = None, file.group
    if options.series:
        found = re.search(options.date_pattern, name)
        if found is None:
            raise ReadFailure(path, "metadata", "no date in its name.", "Set data.date_pattern, or series: false.")
        try:
            date = datetime.date(*(int(found[part]) for part in ("year", "month", "day")))
        except ValueError as error:
            raise ReadFailure(
                path, "metadata", f"'{found[0]}' in its name is not a date ({error}).", "Set data.date_pattern."
            ) from error
        day = float((date - EPOCH).days)
        undated = (name[: found.start()] + name[found.end() :]).removesuffix(file.suffix).strip("_-. ")
        # Of a name that is nothing but a date, the folder is the place.
        place = posixpath.join(posixpath.dirname(file.relative), undated).rstrip("/") or file.root.name
    if options.place_pattern is not None:
        found = re.search(options.place_pattern, name)
        if found is None:
            raise ReadFailure(path, "metadata", "data.place_pattern is not found in its name.", "Correct the pattern.")
        place = found[1] if found.re.groups else found[0]
    return place, day


def _common_bands(probes: Sequence[Probe]) -> tuple[str, ...]:
    sets = Counter(probe.bands for probe in probes)
    if not sets:
        return ()
    order = list(sets)
    return max(order, key=lambda bands: (sets[bands], len(bands), -order.index(bands)))


def _with_bands(
    probes: Sequence[Probe], bands: tuple[str, ...], options: RemoteSensingOptions, skipped: SkippedLog
) -> list[Probe]:
    usable = []
    for probe in probes:
        lacking = [name for name in bands if name not in probe.bands]
        # Positions are no names: the first of three bands and the first of thirteen need not be the same thing.
        if not lacking and not probe.named and options.wanted_bands is None and probe.bands != bands:
            lacking = list(bands)
        if not lacking:
            usable.append(probe)
            continue
        whose = "asked for" if options.wanted_bands is not None else "that most files have"
        skipped.add(
            probe.path,
            "metadata",
            f"it has {len(probe.bands)} bands ({', '.join(probe.bands)}) and not the {len(bands)} {whose} "
            f"({', '.join(bands)}). Choose bands that all files have with data.bands, or index it on its own.",
        )
    return usable


def _units(probes: Sequence[Probe], options: RemoteSensingOptions, skipped: SkippedLog) -> list[Unit]:
    if not options.series:
        return [Unit(probe.place, [probe], (probe.file,)) for probe in probes]
    places: dict[str, list[Probe]] = {}
    for probe in probes:
        places.setdefault(probe.place, []).append(probe)
    units = []
    for place, members in places.items():
        grids = Counter(probe.grid for probe in members)
        grid = max(grids, key=lambda candidate: grids[candidate])
        taken: dict[float, Probe] = {}
        for probe in sorted(members, key=lambda member: (member.day or 0, member.path)):
            day = probe.day or 0
            if probe.grid != grid:
                skipped.add(
                    probe.path,
                    "metadata",
                    f"its pixels do not coincide with those of most dates of '{place}'. Warp it onto their grid with "
                    "`gdalwarp -te -tr -t_srs`, or tell places apart with data.place_pattern.",
                )
            elif day in taken:
                skipped.add(
                    probe.path,
                    "metadata",
                    f"'{place}' already has this date, from {taken[day].path}. "
                    "Tell them apart with data.place_pattern.",
                )
            else:
                taken[day] = probe
        units.append(Unit(place, list(taken.values()), tuple(member.file for member in members)))
    return units


def _common_dtype(probes: Sequence[Probe], options: RemoteSensingOptions) -> str:
    """The smallest type that holds every file's values and that tensors can have."""
    if options.gsd is not None or options.spectral.linear or not probes or any(probe.tagged for probe in probes):
        return "float32"
    found = str(np.result_type(*(np.dtype(probe.dtype) for probe in probes)))
    return found if found in ("uint8", "int16", "uint16", "int32") else "float32"


def _common_spacing(metres: Sequence[tuple[float, float] | None], options: RemoteSensingOptions) -> list[float] | None:
    """Metres a pixel along (y, x), where all sources agree within 5 %."""
    if options.gsd is not None:
        return [options.gsd, options.gsd]
    known = np.array([size for size in metres if size is not None])
    if not len(known) or len(known) < len(metres) or (known.max(0) > 1.05 * known.min(0)).any():
        return None
    return [float(value) for value in known.mean(0)]


def _windows(
    unit: Unit,
    bands: tuple[str, ...],
    dtype: str,
    options: RemoteSensingOptions,
    skipped: SkippedLog,
    note: SourceLabel,
) -> pa.Table | None:
    """The rows of one unit; ``None``, and a reason, where it has none. A date that fails is taken out of its series."""
    group = note.group or unit.group
    while unit.probes:
        first = unit.probes[0]
        step = (1.0, 1.0)
        if options.gsd is not None and first.metres is not None:
            step = (options.gsd / first.metres[0], options.gsd / first.metres[1])
        extent = (options.size * step[0], options.size * step[1])
        reach = min(1.0, first.height / extent[0]) * min(1.0, first.width / extent[1])
        if reach < max(options.min_valid, SMALLEST_SHARE):
            skipped.add(
                first.path,
                "windows",
                f"its {first.height}x{first.width} pixels fill {reach:.0%} of a window of "
                f"{extent[0]:.0f}x{extent[1]:.0f} pixels. Make data.size, data.gsd or data.min_valid smaller.",
            )
            return None
        stride = options.stride or options.size
        corners = window_grid((first.height, first.width), extent, (stride * step[0], stride * step[1]), edges="shift")
        dates = len(unit.probes)
        if options.series:
            corners = np.concatenate([np.zeros((len(corners), 1)), corners], axis=1)
            extent = (float(dates), *extent)  # type: ignore[assignment]
        spacing: tuple[float, ...] = first.metres or ()
        if spacing and options.series:
            spacing = (1.0, *spacing)
        series = {unit.source: unit.dates} if options.series else {}
        reader = RasterReader(options, bands, dtype, series=series)
        content = np.full(len(corners), np.nan)
        failures: list[ReadFailure] = []
        for row, corner in enumerate(corners):
            try:
                sample = reader.read(Window(unit.source, group, tuple(corner), extent, spacing))
            except ReadFailure as failure:
                failures.append(failure)
                if options.series:
                    break
                continue
            content[row] = 1.0 if sample.valid is None else float(sample.valid.mean())
        reader.close()
        if failures and options.series:
            skipped.add_failure(failures[0])
            unit.probes = [probe for probe in unit.probes if probe.path != failures[0].path]
            continue
        if failures:
            worst = failures[0]
            count = f"{len(failures)} of {len(corners)} windows left out: "
            skipped.add(worst.path, worst.stage, f"{count}{worst.reason} {worst.hint}".strip())
        good = (content >= options.min_valid) & (content > 0)
        if not good.any():
            if np.isfinite(content).any():
                skipped.add(
                    unit.source,
                    "windows",
                    f"no window has {options.min_valid:.0%} valid values; the best has {np.nanmax(content):.0%}. "
                    "If that is enough, lower data.min_valid; if valid pixels are taken for nodata, correct the file.",
                )
            return None
        return window_table(unit.source, group, corners[good], extent, spacing, content[good], note.label, note.split)
    return None


def _statistics(index: SampleIndex, options: RemoteSensingOptions, skipped: SkippedLog) -> list[list[float]]:
    """[mean, std] of each band, physical units, over windows evenly spread through the index."""
    scale, offset, clip = options.quantification
    reader = reader_of(index, options)
    collected = BandStatistics(len(index.metadata["bands"]), scale, offset, clip)
    for row in spread_rows(len(index), options.statistics_windows):
        try:
            collected.add(reader.read(index[int(row)]))
        except ReadFailure as failure:
            skipped.add_failure(failure)
    reader.close()
    return [list(pair) for pair in collected.summary(options.percentiles)]
