"""From files to the table of windows: each file by its name, then by what it says of itself, then all together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from fmsuite.core.data.skipped import SkippedLog
from fmsuite.domains.remote_sensing.layout import plan_layouts
from fmsuite.domains.remote_sensing.names import Name, read_names
from fmsuite.domains.remote_sensing.options import RemoteSensingOptions
from fmsuite.domains.remote_sensing.probe import Probe, probe
from fmsuite.domains.remote_sensing.raster import SUFFIXES
from fmsuite.domains.remote_sensing.scenes import Unit, settle_scenes
from fmsuite.domains.remote_sensing.windows import cut_windows
from fmsuite.tiling.labels import assign_labels
from fmsuite.tiling.sources import SourceFile, find_files
from fmsuite.tiling.tasks import SourceFacts, SourceRows, Sources, SourceTask


def find_rasters(paths: Sequence[Path], options: RemoteSensingOptions, skipped: SkippedLog) -> Sources:
    """Every file whose name can be understood. What is known of one file holds for its scene or, in series, place."""
    options.check_folders()
    files = find_files(paths, SUFFIXES, "rasters")
    named: list[tuple[SourceFile, Name]] = []
    for file, name in zip(files, read_names(files, options), strict=True):
        if isinstance(name, Name):
            named.append((file, name))
        else:
            skipped.add_failure(name)
    asked = options if options.places is None else options.model_copy(update={"labels": "none"})
    labels = assign_labels(asked, paths, files, skipped, {file.path: name.place for file, name in named})
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
        return SourceRows(None, asdict(probe(task, options)))
    return cut_windows(task, Unit.recalled(task.details), options)


def settle(found: Sequence[SourceFacts], options: RemoteSensingOptions, skipped: SkippedLog) -> list[SourceTask]:
    """A task for each scene or series; see ``scenes.settle_scenes`` and ``layout.plan_layouts``."""
    tasks = {source.task.path: source.task for source in found}
    probes = [Probe.recalled(source.facts) for source in found]
    settled = []
    units = settle_scenes(probes, options, skipped)
    known = {unit.source: tasks[first.path].known for first, unit in units}
    plans = plan_layouts([unit for _, unit in units], known, options, skipped)
    for first, scene in units:
        if scene.source not in plans:
            continue
        unit = replace(scene, plan=plans[scene.source])
        others = tuple(path for _, paths in unit.dates for path in paths)[1:]
        settled.append(SourceTask(first.path, first.place, tasks[first.path].known, others, asdict(unit)))
    return settled
