"""From files to the table of windows: each file by its name, then by what it says of itself, then all together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fmsuite.core.data.skipped import SkippedLog
from fmsuite.domains.remote_sensing.clouds import cloud_path, without_clouds
from fmsuite.domains.remote_sensing.dates import read_dates
from fmsuite.domains.remote_sensing.eopatch import is_patch, open_patch, patch_of, place_of
from fmsuite.domains.remote_sensing.layout import plan_layouts
from fmsuite.domains.remote_sensing.names import Name, read_names
from fmsuite.domains.remote_sensing.options import RemoteSensingOptions
from fmsuite.domains.remote_sensing.probe import Probe, probe
from fmsuite.domains.remote_sensing.raster import SUFFIXES
from fmsuite.domains.remote_sensing.scenes import Unit, settle_scenes
from fmsuite.domains.remote_sensing.windows import cut_windows
from fmsuite.errors import ReadFailure
from fmsuite.tiling.labels import assign_labels
from fmsuite.tiling.sources import SourceFile, find_files
from fmsuite.tiling.tasks import SourceFacts, SourceRows, Sources, SourceTask


def find_rasters(paths: Sequence[Path], options: RemoteSensingOptions, skipped: SkippedLog) -> Sources:
    """Every file whose name can be understood. What is known of one file holds for its scene or, in series, place."""
    options.check_folders()
    found = find_files(paths, SUFFIXES, "rasters", also=is_patch)
    patches = [file for file in found if is_patch(file.path)]
    files = without_clouds([file for file in found if not is_patch(file.path)], options)
    dates = None if options.dates is None else read_dates(options.dates, files, skipped)
    named: list[tuple[SourceFile, Name]] = []
    read = [
        *zip(files, read_names(files, options, dates), strict=True),
        *((file, _of_patch(file, options)) for file in patches),
    ]
    for file, name in read:
        if isinstance(name, Name):
            named.append((file, name))
        else:
            skipped.add_failure(name)
    asked = options if options.places is None else options.model_copy(update={"labels": "none"})
    everything, places = [*files, *patches], {file.path: name.place for file, name in named}
    labels = assign_labels(asked, paths, everything, skipped, places)
    together: dict[str, list[SourceFile]] = {}
    for file, name in named:
        together.setdefault(name.scene, []).append(file)
    known = {scene: labels.of(*members) for scene, members in together.items()}
    tasks = [SourceTask.of(file, known[name.scene], name.details()) for file, name in named]
    return Sources(tasks, {"labels": labels.summary()})


def index_raster(task: SourceTask, options: RemoteSensingOptions) -> SourceRows:
    """First what a file says of itself; then, once all files have been heard, the windows.

    Raises:
        ReadFailure: if it cannot be used.
    """
    if "dates" not in task.details:
        if is_patch(task.path):
            probes = open_patch(task.path, options).probes(task.details["place"])
            days = [[each.path, each.day] for each in probes]
            return SourceRows(None, {**asdict(probes[0]), "dates_of_patch": days})
        return SourceRows(None, asdict(probe(task, options)))
    return cut_windows(task, Unit.recalled(task.details), options)


def settle(found: Sequence[SourceFacts], options: RemoteSensingOptions, skipped: SkippedLog) -> list[SourceTask]:
    """A task for each scene or series; see ``scenes.settle_scenes`` and ``layout.plan_layouts``."""
    tasks = {source.task.path: source.task for source in found}
    probes = [each for source in found for each in _probes(source.facts)]
    settled = []
    units = settle_scenes(probes, options, skipped)
    known = {unit.source: tasks[_file_of(first.path)].known for first, unit in units}
    plans = plan_layouts([unit for _, unit in units], known, options, skipped)
    for first, scene in units:
        if scene.source not in plans:
            continue
        unit = replace(scene, plan=plans[scene.source])
        settled.append(SourceTask(first.path, first.place, known[scene.source], _others(unit, options), asdict(unit)))
    return settled


def _others(unit: Unit, options: RemoteSensingOptions) -> tuple[str, ...]:
    """Every further file that the windows depend on."""
    if is_patch(_file_of(unit.source)):
        folder = Path(_file_of(unit.source)).parent
        return tuple(str(path) for kind in ("data", "mask") for path in sorted((folder / kind).glob("*.npy")))
    files = [path for _, paths in unit.dates for path in paths][1:]
    if options.clouds is not None:
        files += [cloud_path(paths[0], options.clouds) for _, paths in unit.dates]
    return tuple(files)


def _file_of(path: str) -> str:
    return patch_of((path,))[0][0]


def _of_patch(file: SourceFile, options: RemoteSensingOptions) -> Name | ReadFailure:
    if not options.series:
        return ReadFailure(
            str(file.path), "metadata", "a folder of this kind (eo-learn's) is a time series.", "Set data.series=true."
        )
    try:
        place = place_of(file, options)
    except ReadFailure as failure:
        return failure
    return Name(place, place)


def _probes(facts: dict[str, Any]) -> list[Probe]:
    """Of a file one, of a folder of dates one for each."""
    days = facts.get("dates_of_patch")
    one = Probe.recalled({key: value for key, value in facts.items() if key != "dates_of_patch"})
    return [one] if days is None else [replace(one, path=path, day=day) for path, day in days]
