"""What an index records beside its rows, and the reader that follows it."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from fmsuite.core.data.index import SampleIndex
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.domains.remote_sensing.layout import layout_metadata
from fmsuite.domains.remote_sensing.map_files import class_texts
from fmsuite.domains.remote_sensing.options import RemoteSensingOptions
from fmsuite.domains.remote_sensing.probe import frozen
from fmsuite.domains.remote_sensing.reader import RasterReader
from fmsuite.domains.remote_sensing.statistics import BandStatistics
from fmsuite.errors import ReadFailure
from fmsuite.tiling.table import spread_rows
from fmsuite.tiling.tasks import SourceFacts

_log = logging.getLogger(__name__)


def describe(
    index: SampleIndex, found: Sequence[SourceFacts], options: RemoteSensingOptions, skipped: SkippedLog
) -> dict[str, Any]:
    """The metadata of an index.

    ``files`` has, of each source that is more than its one file, the dates: pairs of a day (``null`` outside of series)
    and the files of that day. ``crs`` says how many sources have which coordinate system, ``map_classes`` the texts
    that number the classes of a map of polygons, class 0 first.
    """
    facts = [source.facts for source in found]
    metres = [fact["metres"] for fact in facts]
    metadata: dict[str, Any] = {
        "bands": facts[0]["bands"] if facts else [],
        "dtype": facts[0]["dtype"] if facts else "float32",
        "spacing": _common_spacing(metres, options),
        "spaced": bool(facts) and all(size is not None for size in metres),
        "dates": max((len(fact["dates"]) for fact in facts), default=0),
        "files": {
            fact["dates"][0][1][0]: fact["dates"] for fact in facts if options.series or len(fact["dates"][0][1]) > 1
        },
    }
    systems = Counter(_short(fact["crs"]) for fact in facts)
    metadata["crs"] = dict(systems.most_common())
    if len(systems) > 1:
        _log.warning("%s", _several(systems, metres, options))
    metadata |= layout_metadata(facts, options)
    if options.map_column:
        metadata["map_classes"] = class_texts(options)
    metadata["statistics"] = _statistics(SampleIndex(index.table, metadata), options, skipped)
    return metadata


def reader_of(index: SampleIndex, options: RemoteSensingOptions) -> RasterReader:
    """The reader of an index, from what its metadata says."""
    facts = index.metadata
    files = {source: frozen(dates) for source, dates in facts.get("files", {}).items()}
    return RasterReader(options, tuple(facts["bands"]), facts["dtype"], facts["spaced"], files)


def _several(systems: Counter[str], metres: Sequence[tuple[float, float] | None], options: RemoteSensingOptions) -> str:
    which = ", ".join(f"{name} ({count})" for name, count in systems.most_common())
    said = f"The rasters are in {len(systems)} coordinate systems: {which}. Each is read on its own grid"
    if options.gsd is not None:
        return f"{said}, at {options.gsd:g} m."
    if _common_spacing(metres, options) is not None:
        return f"{said}; their pixels have the same size on the ground."
    return f"{said}, and their pixels differ in size on the ground: set data.gsd for one size."


def _short(system: str) -> str:
    """The name of a coordinate system that has no code."""
    named = re.match(r'\w+\["([^"]*)"', system)
    return named[1] if named else system if system != "None" else "none"


def _common_spacing(metres: Sequence[tuple[float, float] | None], options: RemoteSensingOptions) -> list[float] | None:
    """Metres a pixel along (y, x), where all sources agree within 5 %."""
    if options.gsd is not None:
        return [options.gsd, options.gsd]
    known = np.array([size for size in metres if size is not None])
    if not len(known) or len(known) < len(metres) or (known.max(0) > 1.05 * known.min(0)).any():
        return None
    return [float(value) for value in known.mean(0)]


def _statistics(index: SampleIndex, options: RemoteSensingOptions, skipped: SkippedLog) -> list[list[float]]:
    """[mean, std] of each band, physical units: the sensor's, or over windows evenly spread through the index."""
    if options.statistics == "sensor":
        return [list(options.published(name)) for name in index.metadata["bands"]]
    reader = reader_of(index, options)
    collected = BandStatistics([options.quantification_of_channel(name) for name in index.metadata["bands"]])
    for row in spread_rows(len(index), options.statistics_windows):
        try:
            collected.add(reader.read(index[int(row)]))
        except ReadFailure as failure:
            skipped.add_failure(failure)
    reader.close()
    return [list(pair) for pair in collected.summary(options.percentiles)]
