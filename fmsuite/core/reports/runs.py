"""The section of a pretraining run: how it went, its curves, what the model saw, how to repeat it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmsuite.core.reports.answer import Answer, Finding
from fmsuite.core.reports.blocks import Figure, Repeat, Shown, SkippedList, data_uri, skipped_list
from fmsuite.core.reports.charts import MOST_POINTS, Curve, step_curves
from fmsuite.core.reports.reconstructions import STAGES
from fmsuite.core.reports.sources import Run
from fmsuite.core.reports.wording import decimal

RANK, KNN, COLLAPSE = "features/rankme", "features/knn_balanced_accuracy", "features/collapse"


@dataclass
class RunSection:
    """One run folder."""

    key: str
    title: str
    folder: str
    answer: Answer
    facts: list[tuple[str, str]]
    curves: list[Figure]
    warnings: list[tuple[int, str]]
    views: Shown | None
    filled: list[Shown]
    filled_how: str
    input: list[tuple[str, str]]
    config: str
    skipped: SkippedList
    repeat: Repeat
    notes: list[str]


def run_section(source: Run, key: str, keys: Iterator[str]) -> RunSection:
    """
    Args:
        key: of the section; unique on the page.
        keys: unique keys for its charts.
    """
    name = Path(source.folder).resolve().name or source.folder
    notes = list(source.notes)
    views = None
    if source.views is not None:
        uri = data_uri(source.views)
        if not uri:
            notes.append("views.png is not a PNG and is not shown.")
        alt = f"Views of the first samples of {name}: each row a sample, each column a view, masked parts dimmed."
        views = Shown(uri, alt, "What the model really sees: views after augmentation, masked tokens dimmed.")
    warnings = [(line["step"], str(line[COLLAPSE])) for line in source.metrics if COLLAPSE in line]
    return RunSection(
        key=key,
        title=f"Pretraining run {name}",
        folder=source.folder,
        answer=_answer(source, name, warnings),
        facts=_facts(source),
        curves=_curves(source.metrics, [step for step, _ in warnings], keys),
        warnings=warnings,
        views=views,
        filled=_filled(source),
        filled_how=_filled_how(source),
        input=_input(source.encoder),
        config=source.config_text,
        skipped=skipped_list(source.skipped),
        repeat=_repeat(source.facts),
        notes=notes,
    )


def _filled(source: Run) -> list[Shown]:
    if source.reconstructions is None:
        return []
    shown = []
    for sample in source.reconstructions.samples:
        picture = source.filled.get(sample.file)
        caption = Path(sample.source).name
        if sample.error is not None:
            caption += f": hidden values are off by {sample.error:.2f} standard deviations (root mean square)"
        alt = f"{sample.source}: {', '.join(STAGES)}."
        shown.append(Shown("" if picture is None else data_uri(picture), alt, caption))
    return shown


def _filled_how(source: Run) -> str:
    found = source.reconstructions
    if found is None:
        return ""
    order = "From top to bottom" if found.upright else "From left to right"
    whose = "Windows that were not trained on" if found.held_out else "Windows that were trained on"
    said = f"{whose}, after step {found.step:,}. {order}: {', '.join(STAGES)}, where values that were not hidden stay."
    if found.given_statistics:
        said += " The network predicts each hidden patch up to its mean and contrast; these are taken from the input."
    return said


def series(metrics: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a quantity; what is not a number is left out, what is not finite kept."""
    points = [
        (line["step"], float(line[name]))
        for line in metrics
        if isinstance(line.get(name), int | float) and not isinstance(line.get(name), bool)
    ]
    return [step for step, _ in points], [value for _, value in points]


def _curves(metrics: Sequence[dict[str, Any]], collapsed: Sequence[int], keys: Iterator[str]) -> list[Figure]:
    terms = sorted({name for line in metrics for name in line if name.startswith("loss/")})
    wanted = [
        ("Loss", "loss", ["loss"]),
        ("Terms of the loss", "loss", terms if len(terms) > 1 else []),
        ("Learning rate", "learning rate", ["lr"]),
        ("Feature rank (RankMe) of the monitor's windows", "RankMe", [RANK]),
        ("kNN probe on the monitor's labelled windows", "balanced accuracy", [KNN]),
    ]
    figures = []
    for title, y_label, names in wanted:
        curves = []
        for mark, name in enumerate(names):
            steps, values = series(metrics, name)
            if any(math.isfinite(value) for value in values):
                label = name.partition("/")[2] if len(names) > 1 else ""
                curves.append(Curve(label, [float(step) for step in steps], values, mark=mark))
        if not curves:
            continue
        marked = collapsed if names[0].startswith("features/") else []
        svg = step_curves(
            next(keys), curves, title=title, y_label=y_label, marked=marked, marked_as="Collapse reported"
        )
        caption = title + (". The dashed lines marked ! are reports of a collapse." if marked else "")
        most = max(len(curve.x) for curve in curves)
        if most > MOST_POINTS:
            caption += f". Each point is the mean of {math.ceil(most / MOST_POINTS)} logged values."
        figures.append(Figure(svg, caption))
    return figures


def _answer(source: Run, name: str, warnings: Sequence[tuple[int, str]]) -> Answer:
    steps = max((line["step"] for line in source.metrics), default=0)
    total = _section(source.config, "training").get("steps")
    done = f"{steps:,} of {total:,} steps" if isinstance(total, int) else f"{steps:,} steps"
    objective = _section(source.config, "objective").get("name", "an unknown objective")
    finished = "has finished" if source.encoder else "has NOT finished"
    headline = f"{name} ({objective}, {done}) {finished}"
    support, findings = [], []
    ranks, probes = series(source.metrics, RANK)[1], series(source.metrics, KNN)[1]
    if len(ranks) > 1:
        support.append(f"RankMe went from {ranks[0]:.1f} to {ranks[-1]:.1f}.")
    if len(probes) > 1:
        direction = "rose" if probes[-1] > probes[0] else "fell" if probes[-1] < probes[0] else "stayed"
        support.append(
            f"The kNN probe {direction} from {decimal(probes[0])} at the first look to {decimal(probes[-1])} "
            f"at the last (highest {decimal(max(probes))})."
        )
        if probes[-1] <= probes[0]:
            findings.append(
                Finding("bad", "By the monitor's kNN probe the encoder is no better than at the first look.")
            )
    losses = series(source.metrics, "loss")[1]
    if losses and not all(map(math.isfinite, losses)):
        findings.append(Finding("bad", "Some losses are not finite."))
    if warnings:
        steps_ = ", ".join(f"{step:,}" for step, _ in warnings[:8])
        findings.append(Finding("bad", f"A collapse was reported at step {steps_}: {warnings[-1][1]}."))
        headline += ", with a collapse reported"
    elif ranks:
        support.append("No collapse was reported.")
    return Answer(f"{headline}.", support, findings)


def _facts(source: Run) -> list[tuple[str, str]]:
    config, training = source.config, _section(source.config, "training")
    model, optim = _section(config, "model"), _section(config, "optim")
    found = [
        ("domain", config.get("domain")),
        ("recipe", config.get("recipe")),
        ("objective", _section(config, "objective").get("name")),
        ("model", model.get("name")),
        ("batch size", training.get("batch_size")),
        ("learning rate", optim.get("lr")),
        ("split trained on", training.get("split")),
    ]
    rates = series(source.metrics, "samples_per_second")[1]
    if rates:
        found.append(("windows a second (median)", f"{sorted(rates)[len(rates) // 2]:.3g}"))
    return [(name, str(value)) for name, value in found if value is not None]


def _input(encoder: dict[str, Any]) -> list[tuple[str, str]]:
    """The encoder's description of its input, briefly."""
    spec = _section(encoder, "input")
    size, channels = spec.get("size"), spec.get("channels")
    lines = []
    if isinstance(size, list):
        lines.append(("input size", " × ".join(map(str, size))))
    if isinstance(channels, list):
        lines.append(("channels", ", ".join(str(c.get("name")) if isinstance(c, dict) else str(c) for c in channels)))
    lines += [(name, str(encoder[name])) for name in ("pooling", "identity") if encoder.get(name) is not None]
    return lines


def _repeat(facts: dict[str, Any]) -> Repeat:
    starts = [start for start in facts.get("starts", []) if isinstance(start, dict)]
    last = starts[-1] if starts else {}
    commands = [(shlex.join(map(str, start.get("command", []))), str(start.get("started", ""))) for start in starts]
    shown = [("seed", facts.get("seed")), ("hash of the index", facts.get("index_hash"))]
    shown += [(name, last.get(name)) for name in ("python", "platform", "gpu", "ranks", "host")]
    versions = _section(last, "versions")
    return Repeat(
        commands,
        [(name, str(value)) for name, value in shown if value is not None],
        sorted((str(name), str(value)) for name, value in versions.items()),
    )


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    found = values.get(name)
    return found if isinstance(found, dict) else {}
