"""Pieces that the page's sections share: charts with captions, pictures as data URIs, skipped sources, commands."""

from __future__ import annotations

import base64
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from fmsuite.core.data.skipped import Skipped
from fmsuite.core.evaluation.results import Facts
from fmsuite.core.reports.charts import Cloud, feature_map, swatch
from fmsuite.core.reports.exhibits import Evidence, FeatureMap, Neighbours, Picture
from fmsuite.core.reports.wording import decimal, method_name
from fmsuite.core.training.progress import format_seconds

FIRST_SKIPPED = 12
_MAGIC = ((b"\x89PNG\r\n\x1a\n", "image/png"), (b"\xff\xd8\xff", "image/jpeg"))


@dataclass(frozen=True)
class Figure:
    """A chart with what stands over and under it; ``legend`` pairs a swatch with its meaning."""

    svg: str
    caption: str = ""
    legend: list[tuple[str, str]] = field(default_factory=list)
    heading: str = ""


@dataclass(frozen=True)
class Shown:
    """A picture inside the page; ``uri`` is empty where it is missing."""

    uri: str
    alt: str
    caption: str
    label: str = ""


@dataclass(frozen=True)
class NeighbourRow:
    encoder: str
    query: Shown
    nearest: list[tuple[Shown, str, bool | None]]


@dataclass(frozen=True)
class EvidenceBlock:
    item: str
    encoder: str
    method: str
    true: str
    predicted: str
    right: bool | None
    scores: list[tuple[str, str]]
    heatmap: Shown | None
    top: list[tuple[str, list[Shown]]]


@dataclass(frozen=True)
class SkippedList:
    total: int
    stages: list[tuple[str, int]]
    first: list[Skipped]


@dataclass(frozen=True)
class Repeat:
    """How to make the numbers again."""

    commands: list[tuple[str, str]]
    facts: list[tuple[str, str]]
    versions: list[tuple[str, str]]
    inputs: list[tuple[str, str]] = field(default_factory=list)


def map_figure(shown: FeatureMap, classes: Sequence[str], key: str) -> Figure:
    clouds, legend = [], []
    codes = sorted(set(shown.labels), key=lambda label: (label < 0, label))
    for label in codes:
        chosen = [number for number, own in enumerate(shown.labels) if own == label]
        name = classes[label] if label >= 0 else "no label"
        mark = label if label >= 0 else len(classes)
        clouds.append(
            Cloud(
                name,
                [shown.x[number] for number in chosen],
                [shown.y[number] for number in chosen],
                [shown.held_out[number] for number in chosen],
                mark,
            )
        )
        legend.append((swatch(mark), f"{name} ({len(chosen)})"))
    if len(set(shown.held_out)) > 1:
        legend.append((swatch(0, "solid muted"), "solid: asked"))
        legend.append((swatch(0, "hollow muted"), "hollow: trained on"))
    points = f"{len(shown.x)} of {shown.sampled_from:,}" if len(shown.x) < shown.sampled_from else f"{len(shown.x)}"
    svg = feature_map(key, clouds, title=f"Features of {shown.encoder} in two dimensions")
    return Figure(svg, f"{shown.encoder}: {points} points. {shown.method}", legend)


class Album:
    """Pictures as data URIs; what cannot be shown becomes a note."""

    def __init__(self, pictures: dict[str, bytes], classes: Sequence[str]) -> None:
        self.pictures, self.classes = pictures, classes
        self.notes: list[str] = []

    def show(self, picture: Picture) -> Shown:
        label = self.name(picture.label)
        content = self.pictures.get(picture.file)
        uri = "" if content is None else data_uri(content)
        if content is not None and not uri:
            self.notes.append(f"The picture {picture.file} ({picture.alt}) is neither PNG nor JPEG and is not shown.")
        return Shown(uri, picture.alt, picture.caption, label)

    def name(self, label: int | None) -> str:
        return "" if label is None or label < 0 else self.classes[label]


def data_uri(content: bytes) -> str:
    """A PNG or JPEG as a data URI; empty for anything else."""
    kind = next((kind for magic, kind in _MAGIC if content.startswith(magic)), None)
    return "" if kind is None else f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def neighbour_row(shown: Neighbours, album: Album) -> NeighbourRow:
    query = shown.query.label
    nearest = [
        (
            album.show(picture),
            decimal(distance),
            None if query is None or picture.label is None or min(query, picture.label) < 0 else picture.label == query,
        )
        for picture, distance in zip(shown.nearest, shown.distances, strict=True)
    ]
    return NeighbourRow(shown.encoder, album.show(shown.query), nearest)


def evidence_block(shown: Evidence, album: Album) -> EvidenceBlock:
    return EvidenceBlock(
        item=shown.item,
        encoder=shown.encoder,
        method=method_name(shown.method),
        true=album.name(shown.true) or "unknown",
        predicted=album.name(shown.predicted),
        right=None if shown.true < 0 else shown.true == shown.predicted,
        scores=[(name, decimal(score)) for name, score in zip(album.classes, shown.scores)],
        heatmap=None if shown.heatmap is None else album.show(shown.heatmap),
        top=[(name, [album.show(picture) for picture in pictures]) for name, pictures in shown.top.items()],
    )


def skipped_list(entries: Sequence[Skipped]) -> SkippedList:
    stages = Counter(entry.stage for entry in entries)
    return SkippedList(len(entries), stages.most_common(), list(entries[:FIRST_SKIPPED]))


def repeat_of(facts: Facts) -> Repeat:
    return Repeat(
        [(shlex.join(facts.command), "")],
        [
            ("seed", str(facts.seed)),
            ("hash of the index", facts.index_hash),
            ("started", facts.started),
            ("took", format_seconds(facts.seconds)),
            ("Python", facts.python),
            ("platform", facts.platform),
        ],
        sorted(facts.versions.items()),
        list(facts.inputs.items()),
    )
