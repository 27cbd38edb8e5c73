"""What ``finetune`` left, read and checked for the page."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fmsuite.core.data.skipped import FILE_NAME as SKIPPED
from fmsuite.core.data.skipped import Skipped
from fmsuite.core.evaluation.cases import FinetuneResults, Panel, TunedRun
from fmsuite.core.evaluation.result_files import RESULTS
from fmsuite.core.reports.case_slices import CaseSlices
from fmsuite.core.reports.files import json_object, skipped_lines
from fmsuite.errors import UsageError


@dataclass
class Tuned:
    """A folder that ``finetune`` wrote.

    Attributes:
        slices: of each panel's case, by the panel's file; without those that cannot be read.
        orientation: where a volume's x, y and z axes point, if its encoder says so.
        notes: what the folder lacks, in sentences.
    """

    folder: str
    results: FinetuneResults
    slices: dict[str, CaseSlices] = field(default_factory=dict)
    orientation: str | None = None
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_tuned(folder: Path) -> Tuned:
    """
    Raises:
        UsageError: if the results are damaged.
    """
    results = FinetuneResults.read(folder)
    problem = next(_problems(results), None)
    if problem is not None:
        raise UsageError(f"{folder / RESULTS}: damaged results ({problem}).", "Make them again.")
    slices, notes = dict[str, CaseSlices](), []
    for panel in results.panels:
        try:
            slices[panel.file] = read_case(folder, panel)
        except UsageError as error:
            notes.append(f"A picture is missing ({panel.rank} case of {panel.arm}): {error.message}")
    return Tuned(str(folder), results, slices, _orientation(folder, results), skipped_lines(folder / SKIPPED), notes)


def read_case(folder: Path, panel: Panel) -> CaseSlices:
    """
    Raises:
        UsageError: if the panel's file is missing, lies elsewhere or is damaged.
    """
    path = folder / panel.file
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UsageError(f"{path}: lies outside of the results' folder.", "Make the results again.")
    return CaseSlices.load(path)


def _orientation(folder: Path, results: FinetuneResults) -> str | None:
    path = next((folder / run.folder / "encoder.json" for run in results.runs), None)
    if path is None or not path.is_file():
        return None
    spec = json_object(path).get("input")
    found = spec.get("orientation") if isinstance(spec, dict) else None
    return found if isinstance(found, str) and len(found) == 3 else None


def _problems(results: FinetuneResults) -> Iterator[str]:
    """What would point outside of the lists that it refers to."""
    cases, arms = range(len(results.cases)), {arm.name for arm in results.arms}
    if results.primary not in results.metrics:
        yield f"the metric '{results.primary}' is not described"
    for run in results.runs:
        if run.arm not in arms or any(number not in cases for number in (*run.cases, *run.failed)):
            yield f"a run of '{run.arm}' refers to an arm or a case that is not listed"
        for metric, rows in run.scores.items():
            if len(rows) != len(run.cases) or any(len(row) != len(results.labels) for row in rows):
                yield f"the scores '{metric}' of a run of '{run.arm}' do not fit its cases and labels"
    for cell in results.cells:
        unknown = (cell.scores.keys() | cell.differences.keys()) - results.metrics.keys()
        if cell.arm not in arms or unknown or results.primary not in cell.scores:
            yield f"the scores of '{cell.arm}' are of an arm or a metric that is not described, or lack the primary one"
    for panel in results.panels:
        if panel.arm not in arms or panel.case not in cases:
            yield "a picture is of an arm or a case that is not listed"


def case_values(runs: list[TunedRun], metric: str, label: int | None) -> dict[int, float]:
    """The value of each case, by its number: the mean over runs (seeds) of that label, or of the mean over labels.

    Cases that have the label in no run are left out.

    Args:
        label: position among the results' labels; ``None`` for the mean over those that a case has.
    """
    found: dict[int, list[float]] = {}
    for run in runs:
        for case, row in zip(run.cases, run.scores.get(metric, []), strict=False):
            values = [value for value in (row if label is None else [row[label]]) if value is not None]
            if values and all(map(math.isfinite, values)):
                found.setdefault(case, []).append(sum(values) / len(values))
    return {case: sum(values) / len(values) for case, values in sorted(found.items())}


def is_tuned(path: Path) -> bool:
    """Whether a ``results.json`` is of ``finetune``; one that cannot be read is not."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(raw, dict) and raw.get("kind") == "finetune"
