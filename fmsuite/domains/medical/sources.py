"""Which files are volumes: one each, or a DICOM series of many."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fmsuite.core.data.skipped import SkippedLog
from fmsuite.domains.medical.formats import dicom, itk, nifti
from fmsuite.domains.medical.maps import map_path
from fmsuite.domains.medical.options import MedicalOptions
from fmsuite.tiling.labels import SourceLabel, assign_labels
from fmsuite.tiling.sources import SourceFile, find_files
from fmsuite.tiling.tasks import SourceFacts, SourceRows, Sources, SourceTask

FOLDER, SERIES = "folder", "series"
"""Keys of a task's details: names of files of which it is to be found out what series they are; slices of one."""
Pieces = list[tuple[str, int | None]]


def find_volumes(paths: Sequence[Path], options: MedicalOptions, skipped: SkippedLog) -> Sources:
    """A task for each file that is a volume, and one for each folder with files that may be DICOM.

    Label maps that ``data.maps`` names are no sources.

    Raises:
        UsageError: as ``sources.find_files`` and ``labels.assign_labels``.
    """
    what = "volumes (NIfTI, MetaImage, NRRD or DICOM)"
    files = find_files(paths, (*nifti.SUFFIXES, *itk.SUFFIXES, *dicom.SUFFIXES), what, _may_be_dicom)
    maps = {map_path(str(file.path), template) for template in options.maps.values() for file in files}
    files = [file for file in files if str(file.path) not in maps]
    folders = {file.path: _place(file) for file in files if _may_be_dicom(file.path.name)}
    labels = assign_labels(options, paths, files, skipped, folders)
    tasks: list[SourceTask] = []
    members: dict[str, list[SourceFile]] = {}
    for file in files:
        if file.path not in folders:
            tasks.append(SourceTask(str(file.path), file.group, labels.of(file), _voxels_beside(file)))
            continue
        folder = str(file.path.parent)
        if folder not in members:
            # Its place in the order is that of its first file.
            tasks.append(SourceTask(folder, folders[file.path]))
        members.setdefault(folder, []).append(file)
    shared = Counter(task.name for task in tasks)
    for number, task in enumerate(tasks):
        if task.path in members:
            name = task.name if shared[task.name] == 1 else task.path
            tasks[number] = _folder_task(task.path, name, members[task.path], labels.by_path)
    return Sources(tasks, {"labels": labels.summary()})


def look_into(task: SourceTask) -> SourceRows:
    """The series of a folder, without rows of their own: ``settle`` makes a task of each."""
    stacks, notes = dicom.find_stacks(task.path, task.details[FOLDER])
    if not stacks:
        return SourceRows.unused(*notes)
    return SourceRows(None, {"stacks": [asdict(stack) for stack in stacks]}, tuple(notes))


def settle(found: Sequence[SourceFacts]) -> list[SourceTask] | None:
    """Folders are replaced by their series; ``None`` if there are none.

    Raises:
        UsageError: if labels files contradict each other about a series.
    """
    if not any("stacks" in source.facts for source in found):
        return None
    tasks: list[SourceTask] = []
    for source in found:
        if "stacks" not in source.facts:
            tasks.append(source.task)
            continue
        for stack in source.facts["stacks"]:
            tasks.append(_series_task(source.task, stack))
    return tasks


def pieces_of(task: SourceTask) -> Pieces | None:
    """The slices of a task that is a series."""
    if not isinstance(task.details, dict) or SERIES not in task.details:
        return None
    return [(name, frame) for name, frame in task.details[SERIES]]


def _may_be_dicom(name: str) -> bool:
    return not name.lower().endswith((*nifti.SUFFIXES, *itk.SUFFIXES)) and dicom.is_candidate(name)


def _voxels_beside(file: SourceFile) -> tuple[str, ...]:
    """Files that a header without voxels most likely names; which it does is not known before it is opened."""
    if file.suffix.lower() not in itk.HEADERS:
        return ()
    return tuple(str(path) for suffix in itk.BESIDE if (path := file.path.with_suffix(suffix)).exists())


def _place(file: SourceFile) -> str:
    """The folder of a file as labels files may name it: below the given one, or its name if it is that itself."""
    return os.path.dirname(file.relative) or file.path.parent.name


def _folder_task(path: str, name: str, files: Sequence[SourceFile], known: dict[Path, SourceLabel]) -> SourceTask:
    said = {file.path.name: asdict(known[file.path]) for file in files if file.path in known}
    details = {FOLDER: [file.path.name for file in files], "known": said}
    return SourceTask(path, name, others=tuple(str(file.path) for file in files), details=details)


def _series_task(folder: SourceTask, stack: dict[str, Any]) -> SourceTask:
    """The patient is the group, unless labels files say another; of a series without PatientID, its place."""
    path, files = stack["path"], list(dict.fromkeys(name for name, _ in stack["pieces"]))
    known = SourceLabel()
    for name in files:
        known = known.merged(SourceLabel(**folder.details["known"].get(name, {})), f"labels of the series {path}")
    if known.group is None and stack["patient"]:
        known = SourceLabel(known.label, stack["patient"], known.split)
    name = folder.name if path == folder.path else f"{folder.name}/{os.path.basename(path)}"
    others = tuple(os.path.join(folder.path, each) for each in files)
    return SourceTask(path, name, known, others, {SERIES: stack["pieces"]})
