"""``fmsuite bench`` on columns of a labels file: classes, numbers and findings, with all labels and with few."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from fmsuite.commands.bench import EPISODES, MOST_PREDICTIONS, SHOTS, TASK_NAMES
from fmsuite.commands.bench_exhibits import exhibits_of
from fmsuite.commands.bench_jobs import (
    FEWSHOT,
    MEAN,
    class_jobs,
    judged,
    mean_control,
    primary_of_classes,
    shots_of,
    target_jobs,
    title,
)
from fmsuite.commands.bench_opening import (
    ALL,
    check,
    folds_of,
    inputs_of,
    intervals,
    kept_apart,
    learned_from,
    open_bench,
    said_of_folds,
    shared_controls,
)
from fmsuite.commands.comparison import Compared, leave
from fmsuite.commands.contenders import Means
from fmsuite.commands.labelled_windows import named
from fmsuite.commands.target_items import By, TargetItems
from fmsuite.commands.targets import OPTION, Target, parse, read_columns
from fmsuite.core.data.skipped import FILE_NAME as SKIPPED
from fmsuite.core.evaluation import findings, numbers
from fmsuite.core.evaluation.findings import FINDINGS_TASKS
from fmsuite.core.evaluation.folds import Asked
from fmsuite.core.evaluation.fractions import DRAWS, check_fractions, shares_of_sides
from fmsuite.core.evaluation.numbers import CONSTANT, NUMBER_TASKS
from fmsuite.core.evaluation.results import Results
from fmsuite.core.evaluation.splits import Split
from fmsuite.core.reports.exhibits import Exhibits
from fmsuite.domains.base import Progress, no_progress
from fmsuite.errors import UsageError, nearest

log = logging.getLogger("fmsuite")
PROBES = {
    "classes": TASK_NAMES,
    "number": tuple(name for name in NUMBER_TASKS if name != CONSTANT),
    "findings": tuple(FINDINGS_TASKS),
}
"""Tasks by what is asked for."""
FRACTIONS = (0.01, 0.1, 1.0)


def bench_targets(
    domain: str,
    encoders: Sequence[str],
    data: Sequence[Path],
    out: Path,
    targets: Sequence[Target],
    *,
    labels: Path | None = None,
    by: By = "window",
    fractions: Sequence[float] = FRACTIONS,
    tasks: Sequence[str] = (ALL,),
    shots: Sequence[int] = SHOTS,
    episodes: int = EPISODES,
    seed: int = 0,
    folds: Asked | None = None,
    controls: bool = True,
    means: Means = "auto",
    normalisations: Sequence[str] = (),
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    batch_size: int | None = None,
    workers: int = -1,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    strict: bool = False,
    progress: Progress = no_progress,
    command: Sequence[str] = (),
) -> list[Compared]:
    """Compare encoders on columns of a labels file: classes (sex), numbers (age), findings. All windows are embedded
    once, in ``out/features``; each target's results are in ``out/NAME``.

    Args:
        targets: each is judged by itself.
        labels: the CSV file; the one that the index was labelled by, if not given.
        by: what is asked about: each window, or the mean feature of each source or group (patient).
        fractions: shares of the training groups that are trained on beside all of them, ``DRAWS`` draws each.
        tasks: names in ``PROBES``; of each target those that it has.
        The others are those of ``bench``.

    Raises:
        UsageError: as ``bench``; for columns that are missing or hold something else than their target.
        FmsuiteError: as ``bench``.
    """
    known_tasks = list(dict.fromkeys(name for target in targets for name in PROBES[target.kind]))
    check(encoders, tasks, known_tasks, shots, episodes, batch_size, folds, normalisations)
    _check_targets(targets, tasks, by)
    shares = check_fractions(fractions)
    opened = open_bench(domain, encoders, data, out, recipe, overrides, strict, device, progress, batch_size, workers)
    plugin, whole, skipped = opened.plugin, opened.whole, opened.skipped
    columns = read_columns(whole, [name for target in targets for name in target.columns], labels, skipped)
    asked = {}
    for target in targets:
        known = columns[target.columns[0]]
        values = parse(target, [[label.label for label in columns[name]] for name in target.columns])
        asked[target] = TargetItems.asked(
            whole, target, values, known, by=by, seed=seed, units=plugin.units, folds=folds
        )
        log.info("%s: %s", target.name, asked[target].said)
    learned = learned_from(list(asked.values()), plugin.units.window)
    found, stores, of_values = opened.embedded(whole, out, controls, means, normalisations, learned, command)
    stored = [store.read_all()[1] for store in stores]
    compared = []
    for target, items in asked.items():
        items = items.restricted(stored)
        own = [name for name in PROBES[target.kind] if ALL in tasks or name in tasks]
        drawn = shares_of_sides(items.kinds, items.groups, items.split, shares, seed)
        allowed, notes = shots_of(items, shots) if FEWSHOT in own else ([], [])
        keep = len(items) * len(allowed) * episodes * len(found) <= MOST_PREDICTIONS
        jobs = list(
            class_jobs(found, stores, own, allowed, controls, shares)
            if target.kind == "classes"
            else target_jobs(found, stores, own, shares)
        )
        bar = progress(jobs, len(jobs), f"Judging {target.name}")
        evaluations = list(judged(bar, items, episodes, seed, keep, drawn))
        facts = [contender.facts for contender in found]
        exhibits = Exhibits()
        if target.kind == "classes":
            exhibits = exhibits_of(plugin, found, stores, items, evaluations, seed, skipped, progress)
        elif target.kind == "number" and controls:
            facts, evaluations = [*facts, MEAN], [*evaluations, mean_control(items, seed)]
        results = Results(
            kind="bench",
            domain=domain,
            unit=items.unit,
            title=f"{', '.join(target.columns)} of {named(opened.paths)}",
            target=target.kind,
            classes=items.classes,
            items=items.items(),
            split=f"{items.said} {kept_apart(items, plugin.units)}",
            folds=folds_of(items),
            encoders=facts,
            methods={e.method: title(e.method, target.kind) for e in evaluations},
            primary={
                "classes": primary_of_classes(evaluations),
                "number": numbers.PRIMARY,
                "findings": findings.PRIMARY,
            }[target.kind],
            interval=intervals(evaluations, target.kind),
            evaluations=evaluations,
            notes=[
                *items.notes,
                *notes,
                *said_of_folds(items, evaluations),
                *of_values,
                *_said_of_shares(items, drawn),
                *shared_controls(found),
            ],
            facts=opened.start.facts(
                command,
                seed,
                whole.hash,
                inputs_of(opened.paths, whole.hash, whole.metadata, opened.models, labels),
                {contender.name: contender.embedder.normalisation for contender in found},
            ),
        )
        compared.append(leave(out / target.name, results, exhibits, skipped))
        _copy_skipped(out, out / target.name)
    return compared


def parse_targets(classes: Sequence[str], numbers: Sequence[str], findings: Sequence[str]) -> list[Target]:
    """From the options of the command line, in their order.

    Raises:
        UsageError: for an empty name.
    """
    found = [Target("classes", (name,)) for name in classes] + [Target("number", (name,)) for name in numbers]
    found += [Target("findings", tuple(name.strip() for name in names.split(","))) for names in findings]
    for target in found:
        if not all(target.columns) or len(set(target.columns)) < len(target.columns):
            raise UsageError(
                f"{OPTION[target.kind]} '{','.join(target.columns)}' names an empty column, or one twice.",
                "Separate names of columns with commas.",
            )
    return found


def parse_fractions(text: str) -> list[float]:
    """``1%,0.1,100%`` as shares.

    Raises:
        UsageError: for what is no list of numbers.
    """
    try:
        parts = [part.strip() for part in text.split(",")]
        return [float(part.removesuffix("%")) / (100 if part.endswith("%") else 1) for part in parts]
    except ValueError:
        raise UsageError(f"--fractions '{text}' is no list of shares.", "Write it as 1%,10%,100%.") from None


def _check_targets(targets: Sequence[Target], tasks: Sequence[str], by: str) -> None:
    if by not in get_args(By):
        raise UsageError(f"There is no --by {by}.", nearest(by, get_args(By)))
    if not targets:
        raise UsageError("Nothing is asked for.", f"Name a column with {', '.join(OPTION.values())}.")
    names = [target.name for target in targets]
    twice = next((name for number, name in enumerate(names) if name in names[:number]), None)
    if twice is not None:
        raise UsageError(f"'{twice}' is asked for twice.", "Name each column once, in one of the ways.")
    for target in targets:
        if ALL not in tasks and not set(tasks) & set(PROBES[target.kind]):
            raise UsageError(
                f"None of the tasks {', '.join(tasks)} is one for {OPTION[target.kind]} {target.name}.",
                f"It has {', '.join(PROBES[target.kind])}.",
            )


def _copy_skipped(out: Path, folder: Path) -> None:
    """What could not be used, beside each target's results: a report is made from these folders alone."""
    (folder / SKIPPED).unlink(missing_ok=True)
    if (out / SKIPPED).is_file():
        shutil.copyfile(out / SKIPPED, folder / SKIPPED)


def _said_of_shares(items: TargetItems, shares: dict[float, list[list[Split]]]) -> list[str]:
    if not shares:
        return []
    counts = []
    for share, drawn in sorted(shares.items()):
        sizes = sorted({len(items.groups[part.train].unique()) for part in drawn[0]})
        counts.append(f"{100 * share:g}% are {' to '.join(map(str, sizes[:: max(1, len(sizes) - 1)]))}")
    whole = sorted({len(items.groups[part.train].unique()) for part in items.split.parts})
    return [
        f"Few-label curves: of {' to '.join(map(str, whole[:: max(1, len(whole) - 1)]))} training groups, "
        f"{'; '.join(counts)}: at least as many as hold every class or finding, and a smaller share is within a larger "
        f"one; means over {DRAWS} draws."
    ]
