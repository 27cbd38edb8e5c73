"""Class maps of whole sources as pictures: what ``predict`` leaves for a page, and the page's section of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fmsuite.core.class_colours import class_colours
from fmsuite.core.data.sample import Array
from fmsuite.core.data.skipped import FILE_NAME, Skipped
from fmsuite.core.reports.answer import Answer
from fmsuite.core.reports.blocks import Shown, SkippedList, data_uri, skipped_list
from fmsuite.core.reports.files import json_object, skipped_lines
from fmsuite.core.reports.svg import tag
from fmsuite.core.reports.wording import counted
from fmsuite.errors import UsageError

MAPS = "maps.json"
FORMAT = 1
LONGEST = 1024
"""Longest side of a picture of a map, pixels."""
GAP = 8
UNKNOWN = -1


class ClassMap(BaseModel):
    """
    Attributes:
        source: what it is of. file: the map. picture: of both, or of the map alone, beside it.
        shares: of each class among the samples with an answer, of those that the picture shows.
        known: the share of those with an answer.
    """

    model_config = ConfigDict(extra="forbid")

    source: str
    file: str
    picture: str
    shares: list[float]
    known: float


class ClassMaps(BaseModel):
    """The maps of one call of ``predict``.

    Attributes:
        model: the network's folder.
        classes: their names, from 0 on.
    """

    model_config = ConfigDict(extra="forbid")

    format: int = FORMAT
    domain: str
    model: str
    classes: list[str]
    maps: list[ClassMap] = Field(default_factory=list)


class Thinned:
    """Every n-th class of a scene of two axes, collected while its scores come part by part.

    Args:
        size: of the scene.
    """

    def __init__(self, size: tuple[int, ...]) -> None:
        self.step = max(1, math.ceil(max(size) / LONGEST))
        self.first = [min(self.step // 2, n - 1) for n in size]
        shape = [len(range(first, n, self.step)) for first, n in zip(self.first, size, strict=True)]
        self.labels = np.full(shape, UNKNOWN, np.int16)

    def add(self, start: Sequence[int], scores: Array, valid: Array) -> None:
        """
        Args:
            start: of a box. scores: (K, *extent). valid: (*extent) bool.
        """
        own = tuple(
            slice((first - begin) % self.step, None, self.step) for first, begin in zip(self.first, start, strict=True)
        )
        found = np.where(valid[own], scores[(slice(None), *own)].argmax(0), UNKNOWN)
        begin = [(s + p.start - first) // self.step for s, p, first in zip(start, own, self.first, strict=True)]
        self.labels[tuple(slice(b, b + n) for b, n in zip(begin, found.shape, strict=True))] = found

    def shares(self, classes: int) -> tuple[list[float], float]:
        """See ``ClassMap``."""
        known = self.labels >= 0
        counts = np.bincount(self.labels[known], minlength=classes)
        return (counts / max(1, int(known.sum()))).tolist(), float(known.mean())


def draw_class_map(rgb: Array | None, labels: Array, classes: int) -> Image.Image:
    """A source and its map side by side, the map as large as the picture of the source; white where it says nothing.

    Args:
        rgb: (H, W, 3) uint8; without it the map alone is drawn.
        labels: (h, w) integers, ``UNKNOWN`` where there is none.
    """
    colours = np.array([*class_colours(classes), (255, 255, 255)], np.uint8)
    alone = Image.fromarray(colours[labels])
    if rgb is None:
        return alone
    height, width = rgb.shape[:2]
    shown = alone.resize((width, height), Image.Resampling.NEAREST)
    page = Image.new("RGB", (2 * width + GAP, height), (255, 255, 255))
    page.paste(Image.fromarray(rgb), (0, 0))
    page.paste(shown, (width + GAP, 0))
    return page


@dataclass
class MapFolder:
    """A folder of maps that ``predict`` wrote.

    Attributes:
        pictures: by their files; without those that are missing.
    """

    folder: str
    found: ClassMaps
    pictures: dict[str, bytes] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class MapSection:
    """The page's section of it."""

    key: str
    title: str
    folder: str
    answer: Answer
    shown: list[Shown]
    legend: list[tuple[str, str]]
    skipped: SkippedList
    notes: list[str]


def read_maps(folder: Path) -> MapFolder:
    """
    Raises:
        UsageError: if the record is damaged, or of a newer version.
    """
    path = folder / MAPS
    raw = json_object(path)
    if raw.get("format", FORMAT) != FORMAT:
        raise UsageError(f"{path}: maps of another version of fmsuite.", "Make them again.")
    try:
        found = ClassMaps.model_validate(raw)
    except ValidationError as error:
        raise UsageError(f"{path}: damaged ({error}).", "Make the maps again.") from error
    pictures, notes = dict[str, bytes](), []
    for one in found.maps:
        file = folder / Path(one.picture).name
        if file.is_file():
            pictures[one.picture] = file.read_bytes()
        else:
            notes.append(f"The picture {file} is missing.")
    return MapFolder(str(folder), found, pictures, skipped_lines(folder / FILE_NAME), notes)


def map_section(source: MapFolder, key: str) -> MapSection:
    """
    Args:
        key: of the section; unique on the page.
    """
    found = source.found
    headline = f"{counted(len(found.maps), 'map')} of {len(found.classes)} classes by {found.model}."
    shown = []
    for one in found.maps:
        most = sorted(zip(one.shares, found.classes, strict=False), reverse=True)
        said = ", ".join(f"{name} {share:.1%}" for share, name in most if share > 0) or "no answer anywhere"
        caption = f"{Path(one.source).name}: {said}. An answer for {one.known:.0%} of it, in {Path(one.file).name}."
        picture = source.pictures.get(one.picture)
        alt = f"{Path(one.source).name} beside its map of classes: {said}."
        shown.append(Shown("" if picture is None else data_uri(picture), alt, caption))
    legend = [
        (_swatch(colour), name) for colour, name in zip(class_colours(len(found.classes)), found.classes, strict=True)
    ]
    return MapSection(
        key,
        f"Maps in {Path(source.folder).resolve().name}",
        source.folder,
        Answer(headline),
        shown,
        legend,
        skipped_list(source.skipped),
        source.notes,
    )


def _swatch(colour: tuple[int, int, int]) -> str:
    shape = tag("rect", x=1, y=1, width=14, height=14, fill=f"rgb{colour}", stroke="#888")
    return tag("svg", shape, class_="swatch", viewBox="0 0 16 16", width=16, height=16, aria_hidden="true")
