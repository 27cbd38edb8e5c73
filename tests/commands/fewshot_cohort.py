"""A generated cohort, written straight into feature stores: slides of two tissues with a planted difference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fmsuite.core.data.index import SampleIndex, Window
from fmsuite.core.features import FeatureStore, StoreFacts

DIM = 24


@dataclass(frozen=True)
class Slide:
    """A slide of the cohort; ``label`` is the truth, which the index knows if ``known``."""

    name: str
    label: str
    patient: str
    split: str | None = None
    windows: int = 6
    known: bool = True


def slides(count: int, classes: Sequence[str] = ("solid", "glandular"), per_patient: int = 1) -> list[Slide]:
    """Slides of classes in turn, each patient's of one class."""
    found = []
    for number in range(count):
        code = number % len(classes)
        patient = f"P{number // len(classes) // per_patient}-{code}"
        found.append(Slide(f"s{number:02d}", classes[code], patient, windows=4 + number % 5))
    return found


def index_of(cohort: Sequence[Slide], folder: Path = Path("/nowhere"), **metadata: object) -> SampleIndex:
    windows = [
        Window(
            str(folder / f"{slide.name}.svs"),
            slide.patient,
            (64.0 * number, 0.0),
            (64.0, 64.0),
            (0.5, 0.5),
            label=slide.label if slide.known else None,
            split=slide.split,
        )
        for slide in cohort
        for number in range(slide.windows)
    ]
    return SampleIndex.from_windows(windows, {"domain": "pathology", "size": 64, "spacing": [0.5, 0.5], **metadata})


def facts_of(index: SampleIndex, **changes: object) -> StoreFacts:
    facts = StoreFacts(
        domain="pathology",
        identity="abc",
        name="runs/planted",
        pooling="cls",
        normalisation="Raw values as they are.",
        dim=DIM,
        size=(64, 64),
        axes=("y", "x"),
        index_hash=index.hash,
        by="source",
        batch_size=8,
    )
    return replace_facts(facts, **changes)


def replace_facts(facts: StoreFacts, **changes: object) -> StoreFacts:
    return facts.model_copy(update=changes)


def planted(strength: float, seed: int = 0) -> Callable[[SampleIndex, np.ndarray, str], np.ndarray]:
    """Features in which half of a slide's windows lie ``strength`` further along an axis of the slide's label; slides
    and windows differ by noise of their own."""

    def features(index: SampleIndex, rows: np.ndarray, label: str) -> np.ndarray:
        random = np.random.default_rng([seed, int(rows[0])])
        values = random.standard_normal((len(rows), DIM)) + 0.6 * random.standard_normal(DIM) + 3.0
        values[::2, sum(label.encode()) % DIM] += strength
        return values.astype(np.float32)

    return features


def write_store(
    path: Path,
    index: SampleIndex,
    truth: dict[str, str],
    strength: float = 4.0,
    seed: int = 0,
    only: Callable[[str], bool] = lambda id: True,
    **facts: object,
) -> Path:
    """A store of planted features.

    Args:
        truth: label of each source's stem.
        only: groups that are written.
    """
    make = planted(strength, seed)
    with FeatureStore.create_or_resume(path, facts_of(index, **facts), index) as store:
        for id in filter(only, store.keys()):
            rows = store.rows_of(id)
            store.write(id, rows, make(index, rows, truth[Path(index[int(rows[0])].source).stem]))
    return path


def truth_of(cohort: Sequence[Slide]) -> dict[str, str]:
    return {slide.name: slide.label for slide in cohort}


def unknown(cohort: Sequence[Slide]) -> list[Slide]:
    """The same, without labels in the index."""
    return [replace(slide, known=False) for slide in cohort]
