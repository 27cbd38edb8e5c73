"""What a report is made from: folders of results and run folders, read and checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fmsuite.core.data.skipped import FILE_NAME as SKIPPED
from fmsuite.core.data.skipped import Skipped
from fmsuite.core.evaluation.result_files import RESULTS
from fmsuite.core.evaluation.results import Results
from fmsuite.core.reports.class_maps import MAPS, MapFolder, read_maps
from fmsuite.core.reports.exhibits import EXHIBITS, Exhibits
from fmsuite.core.reports.exhibits import FORMAT as EXHIBITS_FORMAT
from fmsuite.core.reports.files import json_object, skipped_lines
from fmsuite.core.reports.reconstructions import Reconstructions
from fmsuite.core.reports.tuned import Tuned, is_tuned, read_tuned
from fmsuite.core.training.metrics import read_metrics
from fmsuite.core.training.run_folder import RunFolder
from fmsuite.errors import UsageError

ENCODER = "encoder.json"


@dataclass
class Comparison:
    """A folder that ``bench`` or ``fewshot`` wrote.

    Attributes:
        pictures: file, as in the exhibits, to its bytes; without those that cannot be read.
        notes: what the folder lacks, in sentences.
    """

    folder: str
    results: Results
    exhibits: Exhibits = field(default_factory=Exhibits)
    pictures: dict[str, bytes] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class Run:
    """A folder that ``pretrain`` wrote.

    Attributes:
        facts: ``run.json``.
        config: ``config.yaml``, and as text.
        metrics: the lines of ``metrics.jsonl``.
        encoder: ``encoder.json``; empty while the run is not finished.
        views: ``views.png``.
        reconstructions, filled: what the objective filled in, and the pictures of it by their files.
        notes: what the folder lacks, in sentences.
    """

    folder: str
    facts: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    metrics: list[dict[str, Any]] = field(default_factory=list)
    encoder: dict[str, Any] = field(default_factory=dict)
    views: bytes | None = None
    reconstructions: Reconstructions | None = None
    filled: dict[str, bytes] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


Source = Comparison | Tuned | MapFolder | Run


def read_sources(folder: Path) -> list[Source]:
    """What a folder holds: results, maps, a run, or several of these.

    Raises:
        UsageError: if it holds neither, or a file in it is damaged.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: there is no such folder.", "Name run folders and folders of results.")
    found: list[Source] = []
    if (folder / RESULTS).exists():
        found.append(read_tuned(folder) if is_tuned(folder / RESULTS) else _comparison(folder))
    if (folder / MAPS).exists():
        found.append(read_maps(folder))
    run = RunFolder(folder)
    if run.facts_path.exists() or run.metrics_path.exists():
        found.append(_run(run))
    if not found:
        inside = sorted(path.parent for name in (RESULTS, MAPS, "run.json") for path in folder.glob(f"*/{name}"))
        hint = (
            f"Name the folders in it that do: {' '.join(map(str, dict.fromkeys(inside)))}."
            if inside
            else "Name a run folder of 'fmsuite pretrain', or a folder of 'bench', 'fewshot', 'finetune' or 'predict'."
        )
        raise UsageError(
            f"{folder}: holds no results, maps or run (looked for {RESULTS}, {MAPS}, run.json and metrics.jsonl).",
            hint,
        )
    return found


def _comparison(folder: Path) -> Comparison:
    results = Results.read(folder)
    check(results, str(folder))
    notes: list[str] = []
    exhibits, pictures = Exhibits(), dict[str, bytes]()
    path = folder / EXHIBITS
    if path.exists():
        raw = json_object(path)
        try:
            if raw.get("format", EXHIBITS_FORMAT) > EXHIBITS_FORMAT:
                raise UsageError(f"{path}: exhibits of a newer fmsuite.", "Upgrade fmsuite to read them.")
            exhibits = Exhibits.model_validate(raw)
        except (TypeError, ValueError) as error:
            raise UsageError(f"{path}: damaged ({error}).", "Make the results again.") from error
        _check_exhibits(exhibits, results, path)
        for picture in exhibits.pictures():
            if picture.file in pictures:
                continue
            try:
                pictures[picture.file] = picture.content(folder)
            except UsageError as error:
                notes.append(f"A picture is missing ({picture.alt}): {error.message}")
    else:
        notes.append(f"There is no {EXHIBITS} in {folder}, so no feature map, neighbours or evidence can be shown.")
    return Comparison(
        str(folder), results, exhibits, pictures, skipped_lines(folder / SKIPPED), list(dict.fromkeys(notes))
    )


def check(results: Results, name: str) -> None:
    """
    Raises:
        UsageError: if positions point outside the lists that they refer to.
    """
    classes, items = len(results.classes), len(results.items)
    known = {encoder.name for encoder in results.encoders}
    problem = ""
    by_class = results.target == "classes"
    if by_class and any(not 0 <= item.label < classes for item in results.items):
        problem = "an item's label is not one of the classes"
    if results.target == "findings" and any(len(item.findings) != classes for item in results.items):
        problem = "an item does not say what is known of each finding"
    for e in results.evaluations:
        where = f"the evaluation of {e.encoder} by {e.method}"
        if e.encoder not in known:
            problem = f"{where} is of an encoder that is not listed"
        rows = classes if by_class else 0
        if len(e.confusion) != rows or any(len(row) != rows for row in e.confusion):
            problem = f"{where} has a confusion matrix of another size than the {rows} classes"
        for episode in e.episodes:
            if len(episode.predictions) > items or any(not -1 <= p < classes for p in episode.predictions):
                problem = f"{where} predicts what is not among the items and classes"
            if len(episode.answers) > items or any(not 0 <= n < items for n in episode.support or []):
                problem = f"{where} is about items that are not listed"
    if problem:
        raise UsageError(f"{name}: damaged results ({problem}).", "Make them again.")


def _check_exhibits(exhibits: Exhibits, results: Results, path: Path) -> None:
    classes = range(-1, len(results.classes))
    labels = [label for shown in exhibits.maps for label in shown.labels]
    labels += [label for shown in exhibits.evidence for label in (shown.true, shown.predicted)]
    labels += [-1 if picture.label is None else picture.label for picture in exhibits.pictures()]
    if any(label not in classes for label in labels):
        raise UsageError(f"{path}: a label is not one of the classes of {RESULTS}.", "Make the results again.")


def _run(run: RunFolder) -> Run:
    notes = []
    text = ""
    config: Any = {}
    if run.config_path.exists():
        text = run.config_path.read_text(encoding="utf-8", errors="replace")
        try:
            config = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UsageError(f"{run.config_path}: not valid YAML ({error}).", "Restore it, or remove it.") from error
    else:
        notes.append(f"{run.config_path} is missing.")
    metrics = list(read_metrics(run.metrics_path))
    if not metrics:
        notes.append(f"{run.metrics_path} holds no measurements, so there are no training curves.")
    if not run.facts_path.exists():
        notes.append(f"{run.facts_path} is missing, so nothing says how to repeat the run.")
    encoder_path = run.path / ENCODER
    encoder = json_object(encoder_path) if encoder_path.exists() else {}
    if not encoder:
        notes.append(f"There is no {ENCODER}: the run has not reached its end.")
    views = run.views_path.read_bytes() if run.views_path.is_file() else None
    if views is None:
        notes.append(f"The picture {run.views_path} is missing.")
    facts = run.facts()
    if not isinstance(facts, dict) or not isinstance(config, dict):
        raise UsageError(f"{run.path}: run.json or config.yaml is not a mapping.", "Restore or remove it.")
    found, filled = Reconstructions.read(run.path), dict[str, bytes]()
    for sample in [] if found is None else found.samples:
        if (run.path / sample.file).is_file():
            filled[sample.file] = (run.path / sample.file).read_bytes()
        else:
            notes.append(f"The picture {run.path / sample.file} is missing.")
    skipped = skipped_lines(run.skipped_path)
    return Run(str(run.path), facts, config, text, metrics, encoder, views, found, filled, skipped, notes)
