"""Results of a comparison of encoders: what was judged, by what, with every seed and every prediction."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fmsuite.core.evaluation.result_files import RESULTS, as_csv, write_results
from fmsuite.errors import UsageError

PREDICTIONS = "predictions.json"
TABLE = "results.csv"
EPISODES = "episodes.csv"
ENCODERS = "encoders.csv"
FORMAT = 1


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Estimate(Record):
    """A metric.

    Attributes:
        mean: over episodes; the value itself where there is one episode.
        std: standard deviation over episodes (n - 1), ``None`` for one episode.
        low, high: bounds of the bootstrap interval over groups (patients), ``None`` where there are too few groups.
    """

    mean: float
    std: float | None = None
    low: float | None = None
    high: float | None = None


class Item(Record):
    """What is classified: a window, or a bag of windows (slide, patient, scene).

    Attributes:
        id: readable and unique.
        label: position in ``Results.classes``; -1 where numbers or findings are asked for.
        value: what is known of it, where a number is asked for.
        findings: for each of ``Results.classes``, where findings are asked for: 1 if it is there, 0 if not, ``None`` if
            unknown.
        group: what stays on one side of a split: patient, scene.
        split: the side, where it is fixed.
        windows: how many windows it has.
    """

    id: str
    label: int = -1
    value: float | None = None
    findings: list[int | None] = Field(default_factory=list)
    group: str
    split: str | None = None
    windows: int = 1


class EncoderFacts(Record):
    """
    Attributes:
        name: unique among the results, and short: it stands in tables.
        kind: ``encoder`` for what the user gave, ``normalised`` for the same under another normalisation; the others
            are controls, ``constant`` one that sees nothing.
        identity: as in the store's attributes.
        control_of: the encoder that an untrained one is a control of.
        variant_of: the encoder that a normalised one is, and normalisation: under which of
            ``normalisations.NORMALISATIONS``.
    """

    name: str
    kind: Literal["encoder", "untrained", "histogram", "means", "constant", "normalised"] = "encoder"
    identity: str
    dim: int
    pooling: str | None = None
    provenance: dict[str, Any] = Field(default_factory=dict)
    control_of: str | None = None
    variant_of: str | None = None
    normalisation: str | None = None


class Episode(Record):
    """One draw of supports.

    Attributes:
        seed: what the draw derives from.
        support: positions in ``Results.items``; ``None`` for the whole training side.
        metrics: of this episode's queries.
        predictions: for each item the predicted class, -1 where it was not asked. Kept in ``predictions.json``.
        answers: where numbers or findings are asked for, instead of predictions: for each item the number, or a score
            for each finding; nothing where it was not asked. Kept in ``predictions.json``.
    """

    seed: int
    support: list[int] | None = None
    metrics: dict[str, float]
    predictions: list[int] = Field(default_factory=list)
    answers: list[list[float]] = Field(default_factory=list)


class Evaluation(Record):
    """One encoder judged by one method.

    Attributes:
        encoder: name of one of ``Results.encoders``.
        method: key in ``Results.methods``.
        shots: labelled items a class; ``None`` for the whole training side.
        fraction: share of the training groups; ``None`` for all of them.
        shuffled: the labels were shuffled: a control, at chance if all is right.
        settings: the method's options as used (k, regularisation, ...).
        metrics: by name, as in ``evaluation.metrics``.
        confusion: rows truth, columns prediction, counts summed over episodes; empty for numbers and findings.
        notes: what was clamped or left out, in sentences.
    """

    encoder: str
    method: str
    shots: int | None = None
    fraction: float | None = None
    shuffled: bool = False
    settings: dict[str, Any] = Field(default_factory=dict)
    metrics: dict[str, Estimate]
    confusion: list[list[int]]
    episodes: list[Episode]
    notes: list[str] = Field(default_factory=list)


class Facts(Record):
    """How to repeat it.

    Attributes:
        index_hash: ``SampleIndex.hash`` of the windows.
        inputs: paths and hashes of what was read (stores, labels), as given.
        normalisations: by encoder one sentence on what raw values became, and whose mean and standard deviation was
            used.
    """

    command: list[str]
    started: str
    seconds: float
    seed: int
    versions: dict[str, str]
    python: str
    platform: str
    index_hash: str
    inputs: dict[str, str] = Field(default_factory=dict)
    normalisations: dict[str, str] = Field(default_factory=dict)


class Results(Record):
    """Everything that one ``bench`` or ``fewshot`` found.

    Attributes:
        unit: what an item is, in the singular: ``tile``, ``slide``, ``patient``, ``scene``, ``drawing``, ``volume``.
        target: what is asked for: one of the classes, a number, or which of the findings are there.
        classes: names, in order of their codes: classes or findings; none for a number.
        items: every labelled one, in the order that supports and predictions refer to.
        split: one sentence on who was trained on and who was asked.
        folds: of a cross-validation, in which every item was asked once; ``None`` for a single split.
        methods: method to one sentence on what it is (with its reference).
        primary: metric that answers the question.
        interval: one sentence on what the intervals are.
        notes: sentences for the reader (labels that named nothing, shots that the classes do not allow).
    """

    format: int = FORMAT
    kind: Literal["bench", "fewshot"]
    domain: str
    unit: str
    title: str
    target: Literal["classes", "number", "findings"] = "classes"
    classes: list[str]
    items: list[Item]
    split: str
    folds: int | None = None
    encoders: list[EncoderFacts]
    methods: dict[str, str]
    primary: str = "balanced_accuracy"
    interval: str
    evaluations: list[Evaluation]
    notes: list[str] = Field(default_factory=list)
    facts: Facts

    def write(self, folder: str | os.PathLike) -> None:
        """Write ``results.json`` (all but the predictions), ``predictions.json``, ``results.csv`` (a line for each
        metric of each evaluation), ``episodes.csv`` (a line for each episode) and ``encoders.csv`` (a line for each
        encoder, with its normalisation).

        Earlier results stay as they are until all of this is on the disk (see ``write_results``).

        Raises:
            FmsuiteError: if a file cannot be written.
        """
        everything = self.model_dump(mode="json")
        predictions, said = [], self._said(self.target)
        for evaluation in everything["evaluations"]:
            predictions.append([episode.pop(said) for episode in evaluation["episodes"]])
        metrics, episodes = self._rows()
        texts = {
            PREDICTIONS: json.dumps(predictions, separators=(",", ":")),
            TABLE: as_csv(metrics),
            EPISODES: as_csv(episodes),
            ENCODERS: as_csv(self._encoder_rows()),
            RESULTS: json.dumps(everything, indent=1, ensure_ascii=False) + "\n",
        }
        write_results(Path(folder), texts)

    @classmethod
    def read(cls, folder: str | os.PathLike) -> Results:
        """
        Raises:
            UsageError: if there are no results, or the files are damaged or of a newer version.
        """
        folder = Path(folder)
        try:
            raw = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
            predictions = json.loads((folder / PREDICTIONS).read_text(encoding="utf-8"))
            if raw.get("format", FORMAT) > FORMAT:
                raise UsageError(f"{folder}: results of a newer fmsuite.", "Upgrade fmsuite to read them.")
            for evaluation, rows in zip(raw["evaluations"], predictions, strict=True):
                for episode, row in zip(evaluation["episodes"], rows, strict=True):
                    episode[cls._said(raw.get("target"))] = row
            return cls.model_validate(raw)
        except OSError as error:
            raise UsageError(f"{error.filename}: {error.strerror}.", "Is this a folder of results?") from error
        except (ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
            raise UsageError(f"{folder}: damaged results ({error}).", "Make them again.") from error

    @staticmethod
    def _said(target: str | None) -> str:
        """The field of an episode that is kept in ``predictions.json``."""
        return "answers" if target in ("number", "findings") else "predictions"

    def _encoder_rows(self) -> list[Sequence[Any]]:
        rows: list[Sequence[Any]] = [("encoder", "kind", "features", "pooling", "identity", "normalisation")]
        for known in self.encoders:
            said = self.facts.normalisations.get(known.name, "")
            rows.append((known.name, known.kind, known.dim, known.pooling or "", known.identity, said))
        return rows

    def _rows(self) -> tuple[list[Sequence[Any]], list[Sequence[Any]]]:
        metrics: list[Sequence[Any]] = [
            (
                "encoder",
                "kind",
                "method",
                "shots",
                "fraction",
                "shuffled",
                "metric",
                "mean",
                "std",
                "low",
                "high",
                "episodes",
            )
        ]
        names = list(dict.fromkeys(name for e in self.evaluations for name in e.metrics))
        episodes: list[Sequence[Any]] = [
            ("encoder", "method", "shots", "fraction", "shuffled", "episode", "seed", *names, "support")
        ]
        kinds = {encoder.name: encoder.kind for encoder in self.encoders}
        for e in self.evaluations:
            shots, share = "all" if e.shots is None else e.shots, 1 if e.fraction is None else e.fraction
            for name, estimate in e.metrics.items():
                values = (estimate.mean, estimate.std, estimate.low, estimate.high, len(e.episodes))
                metrics.append((e.encoder, kinds[e.encoder], e.method, shots, share, e.shuffled, name, *values))
            for number, episode in enumerate(e.episodes):
                support = "" if episode.support is None else " ".join(self.items[i].id for i in episode.support)
                where = (e.encoder, e.method, shots, share, e.shuffled, number, episode.seed)
                episodes.append((*where, *(episode.metrics.get(name, "") for name in names), support))
        return metrics, episodes
