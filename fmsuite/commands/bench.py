"""``fmsuite bench``: several encoders side by side on labelled windows, beside controls that they have to beat."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from fmsuite.commands.bench_exhibits import exhibits_of
from fmsuite.commands.bench_jobs import (
    FEWSHOT,
    class_jobs,
    judged,
    primary_of_classes,
    shots_of,
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
from fmsuite.commands.labelled_windows import LabelledWindows, named
from fmsuite.core.evaluation.folds import Asked
from fmsuite.core.evaluation.results import Results
from fmsuite.core.evaluation.retrieval import RETRIEVAL
from fmsuite.core.evaluation.tiles import TASKS
from fmsuite.domains.base import Progress, no_progress

log = logging.getLogger("fmsuite")

TASK_NAMES = (*TASKS, RETRIEVAL, FEWSHOT)
SHOTS = (1, 2, 4, 8, 16, 32)
EPISODES = 200
MOST_PREDICTIONS = 20_000_000
"""Predictions of few-shot draws beyond which they are left out of ``predictions.json``."""


def bench(
    domain: str,
    encoders: Sequence[str],
    data: Sequence[Path],
    out: Path,
    *,
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
) -> Compared:
    """Compare encoders on labelled windows; results, pictures and features stay in ``out``.

    Features are kept in ``out/features``, so that an interrupted comparison goes on where it was, and another with more
    encoders or tasks computes only what is new. Results are made again each time.

    Args:
        encoders: anything ``setup.open_encoder`` opens.
        data: files, folders, a CSV that labels the folder it lies in, or one ``index.parquet``; example data if empty.
            Sides of the split are those of the data,
            ``train`` and ``test``; where these name none, a split by group is made.
        tasks: names in ``tiles.TASKS``, ``retrieval``, and ``fewshot``: SimpleShot over ``shots``, ``episodes`` draws
            each; ``all``.
        seed: of the split, the draws, the shuffles and the bootstrap.
        folds: cross-validation by group in place of a split: so many folds, or one for each group. Few-shot draws then
            ask about the groups that gave them no example.
        controls: also judge the same architectures untrained, a histogram of the values, and shuffled labels; where
            there are more than three channels, their means too.
        means: the means of the channels as a control: ``mean`` or ``mean+std`` in any case, ``none`` never.
        normalisations: names in ``normalisations.NORMALISATIONS``, or ``all`` that apply: every encoder is also judged
            with its input normalised so, by statistics of training windows (with folds, of all windows). Its features
            are kept in stores of their own.
        recipe: take the windows that this recipe trains on; if not given, those that the first encoder which says how
            its files were read was trained on, or the domain's own defaults.
        overrides: ``key=value`` items for single ``data:`` options of the domain.
        batch_size, workers, device: of embedding; see ``commands.embed``.

    Raises:
        UsageError: for wrong names and numbers; if encoder and data do not fit; for labels that do not allow a
            comparison (see ``LabelledWindows.of``); if ``out`` holds something else.
        FmsuiteError: if a window's features are not finite, or files cannot be read or written.
    """
    check(encoders, tasks, TASK_NAMES, shots, episodes, batch_size, folds, normalisations)
    tasks = TASK_NAMES if ALL in tasks else tasks
    opened = open_bench(domain, encoders, data, out, recipe, overrides, strict, device, progress, batch_size, workers)
    plugin, whole, paths, skipped = opened.plugin, opened.whole, opened.paths, opened.skipped
    windows = LabelledWindows.of(whole, seed, plugin.units.window, named(paths), folds)
    allowed, notes = shots_of(windows, shots) if FEWSHOT in tasks else ([], [])
    log.info("%s", windows.said)
    learned = learned_from([windows], windows.unit)
    found, stores, of_values = opened.embedded(windows.index, out, controls, means, normalisations, learned, command)
    windows = windows.restricted([store.read_all()[1] for store in stores])
    if FEWSHOT in tasks:
        allowed, notes = shots_of(windows, shots)
    keep = len(windows) * len(allowed) * episodes * len(found) <= MOST_PREDICTIONS
    if not keep:
        notes.append("Predictions of few-shot draws are too many to be kept; ask for fewer episodes to have them.")

    jobs = list(class_jobs(found, stores, tasks, allowed, controls))
    evaluations = list(judged(progress(jobs, len(jobs), "Judging"), windows, episodes, seed, keep))
    exhibits = exhibits_of(plugin, found, stores, windows, evaluations, seed, skipped, progress)
    results = Results(
        kind="bench",
        domain=domain,
        unit=windows.unit,
        title=f"Benchmark on {named(paths)}",
        classes=windows.classes,
        items=windows.items(),
        split=f"{windows.said} {kept_apart(windows, plugin.units)}",
        folds=folds_of(windows),
        encoders=[contender.facts for contender in found],
        methods={e.method: title(e.method) for e in evaluations},
        primary=primary_of_classes(evaluations),
        interval=intervals(evaluations),
        evaluations=evaluations,
        notes=[*windows.notes, *notes, *said_of_folds(windows, evaluations), *of_values, *shared_controls(found)],
        facts=opened.start.facts(
            command,
            seed,
            windows.index.hash,
            inputs_of(paths, whole.hash, whole.metadata, opened.models),
            {contender.name: contender.embedder.normalisation for contender in found},
        ),
    )
    return leave(out, results, exhibits, skipped)
