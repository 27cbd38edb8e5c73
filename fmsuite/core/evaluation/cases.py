"""Results of fine-tuning: who was trained on what, and what each held-out case came to."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from fmsuite.core.evaluation.result_files import RESULTS, as_csv, write_results
from fmsuite.core.evaluation.results import Estimate, Facts, Record
from fmsuite.errors import UsageError

KIND: Literal["finetune"] = "finetune"
TABLE = "cases.csv"
CELLS = "results.csv"
PANELS = "panels"
FORMAT = 1
OVERALL = "all"
"""Among a metric's labels: the mean over them, or the metric itself where it has no labels."""

TaskName = Literal["segmentation", "change", "classification", "multilabel", "regression"]
DENSE: tuple[TaskName, ...] = ("segmentation", "change")
"""Tasks that are learned from label maps and judged on whole sources."""


class Case(Record):
    """What is judged: a source, or a group of them (patient).

    Attributes:
        id: readable and unique.
        sources: its files.
        group: what stays on one side of a split.
        truth: what it should come to, where that is short: a class, the labels that it has, numbers. Empty for a
            segmentation.
    """

    id: str
    sources: list[str]
    group: str
    truth: list[str | float | None] = Field(default_factory=list)


class Metric(Record):
    """
    Attributes:
        title: what it is, in a sentence without a full stop, with the tolerance or percentile that it was given.
        short: two or three words, for tables.
        higher: more of it is better.
        unit: of its values; empty for shares.
        by_case: every case has a value, and the metric is their mean; otherwise it is one of all cases together.
    """

    title: str
    short: str
    higher: bool = True
    unit: str = ""
    by_case: bool = True


class Arm(Record):
    """One way to train the network.

    Attributes:
        name: unique and short: it stands in tables.
        title: what it is, in a sentence without a full stop.
        control: the network from scratch, which the others are compared with.
        parameters, trained: numbers in the whole network, and how many of them train.
    """

    name: str
    title: str
    control: bool = False
    parameters: int
    trained: int


class TunedRun(Record):
    """One training run and what it was judged by.

    Attributes:
        folder: of the run, relative to the results.
        fraction: share of the training groups.
        seed: of the choice of groups, of the weights' start and of the order of samples.
        fold: number of the fold that was held out, ``None`` for a single split.
        groups: those trained on.
        windows: how many windows these have.
        steps: optimiser steps. seconds: of training, since the start of the command that ended it.
        cases: positions in ``FinetuneResults.cases`` of the held-out cases that were judged.
        failed: those that could not be; ``skipped.csv`` says why.
        scores: of a segmentation: by metric, for each of ``cases`` a value for each of ``FinetuneResults.labels``;
            ``None`` where the case has the label neither in truth nor in prediction.
        outputs: of the other tasks, for each of ``cases`` what the network said: a probability for each label, or
            numbers.
    """

    arm: str
    folder: str
    fraction: float
    seed: int
    fold: int | None = None
    groups: list[str]
    windows: int
    steps: int
    seconds: float
    cases: list[int]
    failed: list[int] = Field(default_factory=list)
    scores: dict[str, list[list[float | None]]] = Field(default_factory=dict)
    outputs: list[list[float]] = Field(default_factory=list)


class Cell(Record):
    """An arm at a fraction of the labels, over all its seeds and folds.

    Attributes:
        groups: training groups of a run, the least and the most over folds.
        cases: how many were judged.
        scores: by metric, then by label (``OVERALL``, and each of ``FinetuneResults.labels`` where the metric has one
            for each). The deviation is over seeds, the interval over groups of held-out cases.
        differences: the same, less the control's at this fraction on the same cases, with paired intervals; empty for
            the control itself, and without one.
    """

    arm: str
    fraction: float
    groups: tuple[int, int]
    cases: int
    scores: dict[str, dict[str, Estimate]]
    differences: dict[str, dict[str, Estimate]] = Field(default_factory=dict)


class Panel(Record):
    """A case whose picture can be drawn.

    Attributes:
        rank: among the cases of ``arm`` at ``fraction``, by the primary metric.
        case: position in ``FinetuneResults.cases``.
        value: of the primary metric.
        file: relative to the results: what ``CaseSlices.save`` wrote, on the input's grid.
    """

    arm: str
    fraction: float
    rank: Literal["best", "median", "worst"]
    case: int
    value: float
    file: str


class FinetuneResults(Record):
    """Everything that one ``finetune`` found.

    Attributes:
        unit: what a case is, in the singular; group_unit: what a group is.
        labels: names of what a metric is given for, the background left out; empty where a metric has no labels.
        cases: all of them, learned from or held out, in the order that runs refer to.
        split: one sentence on who was trained on and who was asked.
        metrics: by name.
        primary: the metric that answers the question.
        arms: the first one is the task's own.
        fractions: ascending.
        interval: one sentence on what the intervals are.
        notes: sentences for the reader.
    """

    format: int = FORMAT
    kind: Literal["finetune"] = KIND
    domain: str
    task: TaskName
    title: str
    encoder: str
    unit: str
    group_unit: str
    labels: list[str]
    cases: list[Case]
    split: str
    metrics: dict[str, Metric]
    primary: str
    arms: list[Arm]
    fractions: list[float]
    runs: list[TunedRun]
    cells: list[Cell]
    panels: list[Panel] = Field(default_factory=list)
    interval: str
    notes: list[str] = Field(default_factory=list)
    facts: Facts

    @property
    def control(self) -> Arm | None:
        return next((arm for arm in self.arms if arm.control), None)

    def cell(self, arm: str, fraction: float) -> Cell | None:
        return next((cell for cell in self.cells if (cell.arm, cell.fraction) == (arm, fraction)), None)

    def write(self, folder: str | os.PathLike) -> None:
        """Write ``results.json``, ``cases.csv`` (a line for each case of each run) and ``results.csv`` (a line for each
        metric and label of each arm and fraction). Earlier results stay until all of this is on the disk.

        Raises:
            FmsuiteError: if a file cannot be written.
        """
        texts = {
            TABLE: as_csv(self.case_rows()),
            CELLS: as_csv(self.cell_rows()),
            RESULTS: json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n",
        }
        write_results(Path(folder), texts)

    @classmethod
    def read(cls, folder: str | os.PathLike) -> FinetuneResults:
        """
        Raises:
            UsageError: if there are no results of ``finetune``, or they are damaged or of a newer version.
        """
        path = Path(folder) / RESULTS
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if raw.get("format", FORMAT) > FORMAT:
                raise UsageError(f"{path}: results of a newer fmsuite.", "Upgrade fmsuite to read them.")
            return cls.model_validate(raw)
        except OSError as error:
            raise UsageError(
                f"{error.filename}: {error.strerror}.", "Is this a folder of `fmsuite finetune`?"
            ) from error
        except (ValueError, AttributeError, ValidationError) as error:
            raise UsageError(f"{path}: damaged, or not of `fmsuite finetune` ({error}).", "Make it again.") from error

    def case_rows(self) -> list[Sequence[Any]]:
        """The header and the lines of ``cases.csv``: every case of every run, those that failed without values."""
        named = self.task in DENSE
        values = [f"{metric}/{label}" for metric in self.metrics for label in self.labels] if named else self.labels
        rows: list[Sequence[Any]] = [
            ("arm", "fraction", "seed", "fold", "case", "group", "judged", "truth", *(values or ["output"]))
        ]
        for run in self.runs:
            where = (run.arm, run.fraction, run.seed, "" if run.fold is None else run.fold)
            for place, number in enumerate(run.cases):
                case = self.cases[number]
                found = (
                    [value for metric in self.metrics for value in run.scores[metric][place]]
                    if named
                    else run.outputs[place]
                )
                truth = " ".join("" if t is None else str(t) for t in case.truth)
                rows.append((*where, case.id, case.group, True, truth, *found))
            rows += [(*where, self.cases[n].id, self.cases[n].group, False) for n in run.failed]
        return rows

    def cell_rows(self) -> list[Sequence[Any]]:
        """The header and the lines of ``results.csv``."""
        parts = ("mean", "std", "low", "high")
        rows: list[Sequence[Any]] = [
            ("arm", "fraction", "cases", "metric", "label", *parts, *(f"difference_{part}" for part in parts))
        ]
        for cell in self.cells:
            for metric, by_label in cell.scores.items():
                for label, estimate in by_label.items():
                    less = cell.differences.get(metric, {}).get(label)
                    numbers = [getattr(estimate, part) for part in parts]
                    numbers += [None if less is None else getattr(less, part) for part in parts]
                    rows.append((cell.arm, cell.fraction, cell.cases, metric, label, *numbers))
        return rows
