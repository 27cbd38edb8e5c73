"""Where labelled samples lie: what foreground-balanced windows are centred on."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from fmsuite.core.data.sample import Array
from fmsuite.core.data.scene import Scene, labels_of
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.seeding import generator
from fmsuite.domains.base import Progress
from fmsuite.errors import ReadFailure, UsageError

POINTS = 2000
"""Of each class of each source at most."""
Points = Mapping[str, Mapping[int, Array]]


def write_points(path: Path, points: Points) -> None:
    """Atomic; a NumPy archive with an array for each class of each source."""
    arrays: dict[str, Array] = {"sources": np.asarray(list(points), dtype=np.str_)}
    for number, classes in enumerate(points.values()):
        arrays |= {f"{number}/{label}": places for label, places in classes.items()}
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    os.replace(partial, path)


def read_points(path: Path) -> dict[str, dict[int, Array]]:
    """
    Raises:
        UsageError: if the file is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            sources = file["sources"].tolist()
            found: dict[str, dict[int, Array]] = {source: {} for source in sources}
            for name in file.files:
                number, _, label = name.partition("/")
                if label:
                    found[sources[int(number)]][int(label)] = file[name]
    except (OSError, ValueError, KeyError, IndexError, BadZipFile) as error:
        raise UsageError(f"{path}: damaged ({error}).", "Remove it to have the points looked for again.") from error
    return found


def foreground_points(
    scenes: Callable[[str], Scene],
    sources: Sequence[str],
    name: str,
    first: int,
    classes: int,
    axes: int,
    seed: int,
    skipped: SkippedLog,
    progress: Progress,
) -> dict[str, dict[int, Array]]:
    """Middles of labelled samples of each class from ``first`` on, ``POINTS`` of each at most, in the coordinates of
    ``Window.position``. A source that cannot be read has none and goes to ``skipped``.

    Args:
        axes: of a window; along those that a scene does not have, dates, points are at the beginning.

    Raises:
        UsageError: for a label that is no class.
    """
    found: dict[str, dict[int, Array]] = {}
    for source in progress(sources, len(sources), "Looking for labels"):
        try:
            scene = scenes(source)
            labels = labels_of(scene, scene.read((0,) * len(scene.size), scene.size), name)
        except ReadFailure as failure:
            skipped.add_failure(failure)
            continue
        draw = generator(seed, "points", source)
        found[source] = {}
        for label in np.unique(labels).tolist():
            if label < first:
                continue
            if label >= classes:
                raise UsageError(
                    f"{source}: its label map has the value {label}, but there are {classes} classes, counted from 0.",
                    "Name all of them in task.classes.",
                )
            where = np.argwhere(labels == label)
            if len(where) > POINTS:
                where = where[np.sort(draw.choice(len(where), POINTS, replace=False))]
            places = scene.place(where + 0.5)
            found[source][label] = np.pad(places, ((0, 0), (axes - places.shape[1], 0)))
    return found
