"""From files to the table of windows: what each file is, which bands all share, which dates belong together."""

from __future__ import annotations

import datetime
import posixpath
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fmsuite.core.data.index import SampleIndex, Window
from fmsuite.core.data.skipped import Skipped, SkippedLog
from fmsuite.domains.remote_sensing.ground import Frame
from fmsuite.domains.remote_sensing.layout import cut_of, lay_out, layout_metadata, plan_layouts
from fmsuite.domains.remote_sensing.options import RemoteSensingOptions
from fmsuite.domains.remote_sensing.places import PLACES
from fmsuite.domains.remote_sensing.raster import SUFFIXES, open_raster
from fmsuite.domains.remote_sensing.reader import Dates, RasterReader
from fmsuite.domains.remote_sensing.statistics import BandStatistics
from fmsuite.errors import ReadFailure
from fmsuite.tiling.labels import assign_labels
from fmsuite.tiling.sources import SourceFile, find_files
from fmsuite.tiling.table import spread_rows
from fmsuite.tiling.tasks import SourceFacts, SourceRows, Sources, SourceTask

EPOCH = datetime.date(2000, 1, 1)
SMALLEST_SHARE = 0.01
"""A window of which a raster fills less than this is refused unread, whatever ``min_valid`` says."""
WINDOWS = "windows"
"""The stage of a source that can be read and has no window worth it."""


@dataclass(frozen=True)
class Probe:
    """What one file says of itself.

    Attributes:
        named: its bands have names, and not only positions.
        tagged: it says how its values become physical ones.
        shape, metres: (height, width), and the size of a pixel along them.
        grid: where its pixels lie.
        frame: the same to the last digit: coordinate system as WKT, and the six numbers of the transform; ``None``
            without a place on Earth.
        place, day: of which it is a picture; no day outside of time series.
    """

    path: str
    bands: tuple[str, ...]
    named: bool
    dtype: str
    tagged: bool
    shape: tuple[int, int]
    metres: tuple[float, float] | None
    grid: tuple[Any, ...]
    frame: tuple[str, tuple[float, ...]] | None
    place: str
    day: float | None = None


@dataclass(frozen=True)
class Unit:
    """What windows are cut from: a file, or the dates of a place in order.

    Attributes:
        dates: the files, each with its day.
        bands, dtype: as which they are read.
        shape, metres: of all of them.
        plan: of its windows; see ``layout.plan_layouts``.
    """

    dates: tuple[tuple[str, float], ...]
    bands: tuple[str, ...]
    dtype: str
    shape: tuple[int, int]
    metres: tuple[float, float] | None
    plan: Mapping[str, Any] = field(default_factory=dict)


def find_rasters(paths: Sequence[Path], options: RemoteSensingOptions, skipped: SkippedLog) -> Sources:
    """Every file that has a place, and a date if these are series. What is known of one date holds for its place."""
    files = find_files(paths, SUFFIXES, "rasters")
    placed: list[tuple[SourceFile, str, float | None]] = []
    for file in files:
        try:
            placed.append((file, *_place_and_day(file, options)))
        except ReadFailure as failure:
            skipped.add_failure(failure)
    asked = options if options.places is None else options.model_copy(update={"labels": "none"})
    labels = assign_labels(asked, paths, files, skipped, {file.path: place for file, place, _ in placed})
    together: dict[str, list[SourceFile]] = {}
    for file, place, _ in placed:
        together.setdefault(place if options.series else str(file.path), []).append(file)
    known = {key: labels.of(*members) for key, members in together.items()}
    tasks = [
        SourceTask.of(file, known[place if options.series else str(file.path)], {"place": place, "day": day})
        for file, place, day in placed
    ]
    return Sources(tasks, {"labels": labels.summary()})


def index_raster(task: SourceTask, options: RemoteSensingOptions) -> SourceRows:
    """First what a file says of itself; then, once all files have been heard, the windows.

    Raises:
        ReadFailure: if it cannot be used.
    """
    if "dates" not in task.details:
        return SourceRows(None, asdict(_probe(task, options)))
    return _windows(task, Unit(**{key: _frozen(value) for key, value in task.details.items()}), options)


def settle(found: Sequence[SourceFacts], options: RemoteSensingOptions, skipped: SkippedLog) -> list[SourceTask]:
    """What windows are cut from, and as what it is read.

    Files whose bands differ: without ``data.bands``, the set that most files have decides (of equally frequent sets the
    larger, then the one met first); a file that lacks a band of it is skipped, one that has more is read by name.
    """
    tasks = {source.task.path: source.task for source in found}
    probes = [_recalled(source.facts) for source in found]
    bands = options.wanted_bands or _common_bands(probes)
    probes = _with_bands(probes, bands, options, skipped)
    dtype = _common_dtype(probes, options)
    settled = []
    units = _units(probes, options, skipped)
    plans = plan_layouts(
        {first.path: (first.shape, first.metres) for first, *_ in units},
        {first.path: None if first.frame is None else Frame(*first.shape, *first.frame) for first, *_ in units},
        {first.path: tasks[first.path].known for first, *_ in units},
        options,
        skipped,
    )
    for members in units:
        first = members[0]
        if first.path not in plans:
            continue
        dates = tuple((probe.path, probe.day or 0.0) for probe in members)
        unit = Unit(dates, bands, dtype, first.shape, first.metres, plans[first.path])
        others = tuple(probe.path for probe in members[1:])
        settled.append(SourceTask(first.path, first.place, tasks[first.path].known, others, asdict(unit)))
    return settled


def describe(
    index: SampleIndex, found: Sequence[SourceFacts], options: RemoteSensingOptions, skipped: SkippedLog
) -> dict[str, Any]:
    """The metadata of an index."""
    facts = [source.facts for source in found]
    metres = [fact["metres"] for fact in facts]
    metadata: dict[str, Any] = {
        "bands": facts[0]["bands"] if facts else [],
        "dtype": facts[0]["dtype"] if facts else "float32",
        "spacing": _common_spacing(metres, options),
        "spaced": bool(facts) and all(size is not None for size in metres),
        "dates": max((len(fact["dates"]) for fact in facts), default=0),
        "series": {fact["dates"][0][0]: fact["dates"] for fact in facts} if options.series else {},
    }
    metadata |= layout_metadata(facts, options)
    metadata["statistics"] = _statistics(SampleIndex(index.table, metadata), options, skipped)
    return metadata


def reader_of(index: SampleIndex, options: RemoteSensingOptions) -> RasterReader:
    """The reader of an index, from what its metadata says."""
    series = {source: [(str(p), float(d)) for p, d in dates] for source, dates in index.metadata["series"].items()}
    facts = index.metadata
    return RasterReader(options, tuple(facts["bands"]), facts["dtype"], facts["spaced"], series)


def _probe(task: SourceTask, options: RemoteSensingOptions) -> Probe:
    raster = open_raster(task.path, options)
    try:
        if options.gsd is not None and raster.metres is None:
            raise ReadFailure(
                raster.path,
                "metadata",
                "it has no place on Earth (no coordinate system or no geotransform), so its pixels have no known size.",
                "Georeference it with `gdal_edit -a_srs -a_ullr`, or leave data.gsd empty to read native pixels.",
            )
        return Probe(
            task.path,
            tuple(raster.bands),
            raster.named,
            raster.dtype,
            raster.tagged is not None,
            (raster.height, raster.width),
            raster.metres,
            raster.grid,
            None if raster.metres is None else (raster.crs.to_wkt(), tuple(raster.transform)[:6]),
            **task.details,
        )
    finally:
        raster.close()


def _recalled(facts: dict[str, Any]) -> Probe:
    return Probe(**{key: _frozen(value) for key, value in facts.items()})


def _frozen(value: Any) -> Any:
    """With tuples for lists, so that it can be a key."""
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


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


def _units(probes: Sequence[Probe], options: RemoteSensingOptions, skipped: SkippedLog) -> list[list[Probe]]:
    """Files that are read together, in the order of their dates."""
    if not options.series:
        return [[probe] for probe in probes]
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
        units.append(list(taken.values()))
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


def _windows(task: SourceTask, unit: Unit, options: RemoteSensingOptions) -> SourceRows:
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
            dates = tuple(date for date in unit.dates if date[0] != failure.path)
            notes.append(Skipped.of(failure))
            if failure.stage == WINDOWS or len(dates) == len(unit.dates):
                break
            unit = replace(unit, dates=dates)
    return SourceRows.unused(*notes)


def _windows_of_dates(task: SourceTask, unit: Unit, options: RemoteSensingOptions) -> SourceRows:
    """
    Raises:
        ReadFailure: of the stage ``WINDOWS`` if there are none worth reading; of another if a file cannot be read.
    """
    source = unit.dates[0][0]
    (height, width), metres = unit.shape, unit.metres
    cut = cut_of(unit.shape, metres, options)
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
    series: dict[str, Dates] = {}
    if options.series:
        corners = np.concatenate([np.zeros((len(corners), 1)), corners], axis=1)
        extent = (float(len(unit.dates)), *extent)
        spacing = (1.0, *spacing) if spacing else ()
        series = {source: unit.dates}
    reader = RasterReader(options, unit.bands, unit.dtype, series=series)
    content = np.full(len(corners), np.nan)
    failures: list[ReadFailure] = []
    for row, corner in enumerate(corners):
        try:
            sample = reader.read(Window(source, task.group, tuple(corner), extent, spacing))
        except ReadFailure as failure:
            if options.series:
                reader.close()
                raise
            failures.append(failure)
            continue
        content[row] = 1.0 if sample.valid is None else float(sample.valid.mean())
    reader.close()
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
    facts |= {"left_out": layout.left_out, "places": unit.plan.get("places")}
    kept = layout.only(good)
    rows = replace(task, path=source).rows(corners[good], extent, spacing, content[good], kept.groups)
    if kept.labels is not None:
        rows = replace(rows, label=kept.labels, split=kept.splits)
    return SourceRows(rows, facts, tuple(notes))


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
