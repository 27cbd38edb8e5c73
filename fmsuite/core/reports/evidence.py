"""What a prototype classifier saw: for some slides the windows nearest to each prototype, and a heatmap."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
from PIL import Image

from fmsuite.core.data.index import SampleIndex
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.reports.exhibits import Evidence, Picture
from fmsuite.core.reports.heatmap import heatmap, with_legend
from fmsuite.core.reports.neighbours import choose_queries
from fmsuite.core.reports.pictures import Pictures
from fmsuite.errors import ReadFailure, UsageError

LONGEST = 640
"""Longer side of a heatmap, in pixels."""
SATURATED = 98.0
"""Percentile of the margins' sizes that gets the last colour."""


class Placed(Protocol):
    """A picture of a whole source in the coordinates of its windows: ``domains.base.Overview``."""

    @property
    def rgb(self) -> np.ndarray: ...

    @property
    def origin(self) -> tuple[float, float]: ...

    @property
    def pitch(self) -> tuple[float, float]: ...


@dataclass(frozen=True)
class Judged:
    """A slide (or another bag of windows) and what a prototype classifier made of it.

    Attributes:
        item: id as in ``Results.items``.
        rows: (T,) rows of its windows in the index.
        distances: (T, C) squared distance of each window to each prototype, from ``prototype_distances``.
        true, predicted: positions of the classes.
        scores: (C,) as the classifier gave them.
    """

    item: str
    rows: np.ndarray
    distances: np.ndarray
    true: int
    predicted: int
    scores: Sequence[float]


@dataclass(frozen=True)
class Margins:
    """Values of a slide's windows for its heatmap.

    Attributes:
        values: (T,) positive where a window speaks for ``ends[1]``.
        title: what they are.
        ends: what negative and positive mean.
    """

    values: np.ndarray
    title: str
    ends: tuple[str, str]


def slide_evidence(
    judged: Sequence[Judged],
    index: SampleIndex,
    classes: Sequence[str],
    pictures: Pictures,
    overview: Callable[[str], Placed],
    *,
    encoder: str,
    method: str,
    unit: str,
    skipped: SkippedLog,
    notes: list[str],
    limit: int = 8,
    top: int = 5,
    seed: int = 0,
) -> list[Evidence]:
    """Some slides, each with the windows nearest to every prototype and a heatmap of the margin between classes.

    Slides are taken from every class in turn, alternately judged right and wrong. The heatmap is of the slide's source
    with the most windows; colours mean the same on all of them (the ``SATURATED`` percentile of the margins of all
    chosen slides is the last one). A source of a single window gets none: its windows are whole files.

    Args:
        judged: all slides that were asked.
        index: the windows.
        classes: names.
        pictures: index rows to pictures.
        overview: source to its picture, ``Domain.overview`` with the index bound.
        encoder, method: names that go with the evidence.
        unit: of the windows' spacing, ``InputSpec.spacing_unit``; ``"px"`` draws no scale bar.
        skipped: sources that cannot be read any more are recorded here.
        notes: what cannot be shown is said here.
        limit: most slides.
        top: most windows of a prototype.
        seed: of the choice of slides.

    Raises:
        FmsuiteError: if ``skipped`` is strict and something cannot be read.
    """
    if not judged:
        notes.append(f"{encoder}, {method}: nothing was asked, so there is no evidence to show.")
        return []
    true, predicted = (np.array([getattr(one, name) for one in judged]) for name in ("true", "predicted"))
    chosen = [judged[i] for i in choose_queries(true, predicted >= 0, predicted, count=limit, seed=seed)]
    margins = [class_margins(one.distances, one.predicted, classes) for one in chosen]
    bound = float(np.percentile(np.abs(np.concatenate([margin.values for margin in margins])), SATURATED)) or 1.0
    found = []
    for one, margin in zip(chosen, margins, strict=True):
        order = np.argsort(one.distances, axis=0, kind="stable")[:top]
        images = pictures([int(row) for row in one.rows[order.T.reshape(-1)]])
        drawn = _heatmap(one, margin, bound, index, classes, overview, unit, skipped, notes)
        found.append(
            Evidence(
                encoder=encoder,
                method=method,
                item=one.item,
                true=one.true,
                predicted=one.predicted,
                scores=[float(score) for score in one.scores],
                heatmap=drawn,
                top={
                    name: [
                        _top(images[int(one.rows[place])], one, name, rank, float(one.distances[place, code]))
                        for rank, place in enumerate(order[:, code], 1)
                        if int(one.rows[place]) in images
                    ]
                    for code, name in enumerate(classes)
                },
            )
        )
    return found


def class_margins(distances: np.ndarray, predicted: int, classes: Sequence[str]) -> Margins:
    """How far each window speaks for one class rather than another.

    Of two classes, the difference of the squared distances to their prototypes, positive where the second is nearer,
    on every slide. Of more, by how much the predicted class's prototype is nearer than the nearest other.

    Args:
        distances: (T, C) squared distances, C of at least 2.

    Raises:
        UsageError: with fewer than two classes.
    """
    if len(classes) < 2:
        raise UsageError("Evidence weighs classes against each other, and there is only one.", "Label another class.")
    title = "Margin of squared distances to prototypes"
    if len(classes) == 2:
        values = distances[:, 0] - distances[:, 1]
        return Margins(values, title, (f"nearer to {classes[0]}", f"nearer to {classes[1]}"))
    others = np.delete(distances, predicted, axis=1).min(axis=1)
    return Margins(others - distances[:, predicted], title, ("nearer to another", f"nearer to {classes[predicted]}"))


def _top(image: Image.Image, one: Judged, name: str, rank: int, distance: float) -> Picture:
    caption = f"squared distance {distance:.3f}"
    return Picture.of(image, f"Window {rank} of {one.item} by nearness to the prototype of {name}: {caption}", caption)


def _heatmap(
    one: Judged,
    margin: Margins,
    bound: float,
    index: SampleIndex,
    classes: Sequence[str],
    overview: Callable[[str], Placed],
    unit: str,
    skipped: SkippedLog,
    notes: list[str],
) -> Picture | None:
    table = index.table.take(pa.array(one.rows))
    sources = table.column("source").cast(pa.string()).to_pylist()
    counted = Counter(sources).most_common()
    source, count = counted[0]
    if count < 2:
        return None
    try:
        view = overview(source)
    except ReadFailure as failure:
        skipped.add_failure(failure)
        _note(notes, f"{one.item}: no heatmap, because {source} can no longer be read.")
        return None
    except UsageError as error:
        _note(notes, f"No heatmaps: {error}")
        return None
    own = np.array([name == source for name in sources])
    positions, extents = (
        np.array([values[-2:] for values in table.column(name).to_pylist()], dtype=np.float64)[own]
        for name in ("position", "extent")
    )
    values = margin.values[own]
    rgb, pitch = _sized(view)
    limits = (-bound, bound)
    coloured = heatmap(rgb, view.origin, pitch, positions, extents, values, limits)
    spacing = index[int(one.rows[int(np.argmax(own))])].spacing
    pixel = spacing[-1] * pitch[1] if spacing and unit != "px" else None
    picture = with_legend(coloured, limits, margin.title, margin.ends, pixel, unit)
    share = float((values > 0).mean())
    which = "" if len(counted) == 1 else f" (one of its {len(counted)} files)"
    verdict = f"{classes[one.predicted]}, truth {classes[one.true]}"
    caption = f"{one.item}{which}: {share:.0%} of {count} windows {margin.ends[1]}; predicted {verdict}"
    alt = (
        f"Overview of {one.item}{which}, its {count} windows coloured from blue ({margin.ends[0]}) over grey to orange "
        f"({margin.ends[1]}): {share:.0%} are {margin.ends[1]}. Predicted {verdict}."
    )
    return Picture.of(picture, alt, caption, one.true)


def _sized(view: Placed) -> tuple[np.ndarray, tuple[float, float]]:
    """The overview at ``LONGEST`` pixels, and its pitch there."""
    height, width = view.rgb.shape[:2]
    zoom = LONGEST / max(height, width)
    size = (max(1, round(height * zoom)), max(1, round(width * zoom)))
    way = Image.Resampling.BICUBIC if zoom > 1 else Image.Resampling.BOX
    resized = np.asarray(Image.fromarray(view.rgb).resize((size[1], size[0]), way))
    return resized, (view.pitch[0] * height / size[0], view.pitch[1] * width / size[1])


def _note(notes: list[str], sentence: str) -> None:
    if sentence not in notes:
        notes.append(sentence)
