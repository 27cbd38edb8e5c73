"""``fmsuite bench``: several encoders side by side on labelled windows, beside controls that they have to beat."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fmsuite.commands.comparison import Compared, Start, leave, open_out, short_names
from fmsuite.commands.contenders import Contender, contenders, embed_all, has_features
from fmsuite.commands.labelled_windows import LabelledWindows, asked_options, named, with_labels_file
from fmsuite.commands.setup import domain_options, open_domain, open_encoder, open_index, parts_of
from fmsuite.core.data.packed import open_reader
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.encoders import Encoder
from fmsuite.core.evaluation.bags import Bags
from fmsuite.core.evaluation.classifiers import find_classifier
from fmsuite.core.evaluation.episodes import allowed_shots, draws
from fmsuite.core.evaluation.fewshot import run
from fmsuite.core.evaluation.results import Evaluation, Results
from fmsuite.core.evaluation.statistics import describe
from fmsuite.core.evaluation.tiles import SHUFFLED_INTERVAL, TASKS, judge
from fmsuite.core.features import FeatureStore
from fmsuite.core.reports.exhibits import Exhibits
from fmsuite.core.reports.feature_map import feature_map
from fmsuite.core.reports.neighbours import choose_queries, neighbours
from fmsuite.core.reports.pictures import window_pictures
from fmsuite.core.seeding import derive
from fmsuite.core.training.precision import choose_device
from fmsuite.domains.base import Domain, Progress, no_progress
from fmsuite.errors import UsageError, nearest
from fmsuite.tiling.parts import discard_parts

log = logging.getLogger("fmsuite")
FEWSHOT = "fewshot"
FEWSHOT_METHOD = "simpleshot"
ALL = "all"
TASK_NAMES = (*TASKS, FEWSHOT)
SHOTS = (1, 2, 4, 8, 16, 32)
EPISODES = 200
SHUFFLED_TASKS = ("knn", "linear_sklearn")
"""Tasks that every encoder is also given with shuffled labels."""
LINEAR_TASKS = ("linear_torch", "linear_sklearn")
"""Tasks whose answer depends on the scale of the features."""
MOST_PREDICTIONS = 20_000_000
"""Predictions of few-shot draws beyond which they are left out of ``predictions.json``."""
MAPS = 4


@dataclass(frozen=True)
class _Job:
    """One evaluation. ``shots`` are those of few-shot draws, ``None`` for the whole training side."""

    contender: Contender
    store: FeatureStore
    method: str
    shots: int | None = None
    shuffled: bool = False


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
    controls: bool = True,
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
        tasks: names in ``tiles.TASKS``, and ``fewshot``: SimpleShot over ``shots``, ``episodes`` draws each; ``all``.
        seed: of the split, the draws, the shuffles and the bootstrap.
        controls: also judge the same architectures untrained, a histogram of the values, and shuffled labels.
        recipe: take the windows that this recipe trains on; if not given, those that the first encoder which says how
            its files were read was trained on, or the domain's own defaults.
        overrides: ``key=value`` items for single ``data:`` options of the domain.
        batch_size, workers, device: of embedding; see ``commands.embed``.

    Raises:
        UsageError: for wrong names and numbers; if encoder and data do not fit; for labels that do not allow a
            comparison (see ``LabelledWindows.of``); if ``out`` holds something else.
        FmsuiteError: if a window's features are not finite, or files cannot be read or written.
    """
    start = Start()
    _check(encoders, tasks, shots, episodes, batch_size)
    tasks = TASK_NAMES if ALL in tasks else tasks
    place = choose_device(device)
    data, overrides = with_labels_file([Path(path) for path in data], overrides)
    models = {name: open_encoder(what) for name, what in zip(short_names(encoders), encoders, strict=True)}
    # An index says itself how its windows are read.
    followed = [] if any(path.suffix == ".parquet" for path in data) else models.values()
    plugin = open_domain(domain, domain_options(domain, overrides, recipe, followed))
    parts = parts_of(out / "index.parquet")
    skipped = open_out(out, "bench", strict, keep_skipped=has_features(out) or parts.is_dir())
    paths = data or [_example_data(plugin)]
    asked = asked_options(overrides)
    plugin, whole = open_index(plugin, paths, skipped, progress, asked, parts=parts, processes=None)
    windows = LabelledWindows.of(whole, seed, plugin.units.window, named(paths))
    allowed, notes = _shots(windows, shots) if FEWSHOT in tasks else ([], [])
    found = contenders(models, plugin.input_spec(windows.index), controls)
    log.info("%s", windows.said)

    reader = open_reader(plugin, windows.index)
    stores = embed_all(
        found,
        windows.index,
        reader,
        out,
        batch_size=batch_size,
        workers=workers,
        device=place,
        skipped=skipped,
        progress=progress,
        command=command,
    )
    discard_parts(parts)
    windows = windows.restricted([store.read_all()[1] for store in stores])
    if FEWSHOT in tasks:
        allowed, notes = _shots(windows, shots)
    keep = len(windows) * len(allowed) * episodes * len(found) <= MOST_PREDICTIONS
    if not keep:
        notes.append("Predictions of few-shot draws are too many to be kept; ask for fewer episodes to have them.")

    jobs = list(_jobs(found, stores, tasks, allowed, controls))
    evaluations = list(_judged(progress(jobs, len(jobs), "Judging"), windows, episodes, seed, keep))
    exhibits = _exhibits(plugin, found, stores, windows, evaluations, seed, skipped, progress)
    results = Results(
        kind="bench",
        domain=domain,
        unit=windows.unit,
        title=f"Benchmark on {named(paths)}",
        classes=windows.classes,
        items=windows.items(),
        split=windows.said,
        encoders=[contender.facts for contender in found],
        methods={e.method: _title(e.method) for e in evaluations},
        interval=f"{describe()} {SHUFFLED_INTERVAL}" if any(e.shuffled for e in evaluations) else describe(),
        evaluations=evaluations,
        notes=[*windows.notes, *notes, *_shared_controls(found)],
        facts=start.facts(command, seed, windows.index.hash, _inputs(paths, whole.hash, whole.metadata, models)),
    )
    return leave(out, results, exhibits, skipped)


def _check(
    encoders: Sequence[str], tasks: Sequence[str], shots: Sequence[int], episodes: int, batch_size: int | None
) -> None:
    if not encoders:
        raise UsageError("No encoder was named.", "Give at least one with --encoder: a run folder, a file, timm:NAME.")
    twice = next((what for number, what in enumerate(encoders) if what in encoders[:number]), None)
    if twice is not None:
        raise UsageError(f"The encoder {twice} is named twice.", "Name each once.")
    if not tasks:
        raise UsageError("No task was named.", f"Known: {', '.join(TASK_NAMES)}.")
    for task in tasks:
        if task not in (ALL, *TASK_NAMES):
            raise UsageError(f"There is no task '{task}'.", nearest(task, (ALL, *TASK_NAMES)))
    if {ALL, FEWSHOT} & set(tasks) and (not shots or min(shots) < 1 or episodes < 1):
        listed = ", ".join(map(str, shots)) or "none"
        raise UsageError(f"Shots ({listed}) and episodes ({episodes}) must be at least 1.")
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"A batch of {batch_size} windows.", "Use 1 or more.")


def _example_data(plugin: Domain) -> Path:
    folder = Path("example-data") / f"{plugin.name}-0"
    log.info("No --data: comparing on example data in %s.", folder)
    return plugin.example_data(folder, 0)


def _bags(windows: LabelledWindows, features: Tensor) -> Bags:
    return Bags.of_single(features, windows.labels, windows.groups, len(windows.classes))


def _shots(windows: LabelledWindows, shots: Sequence[int]) -> tuple[list[int], list[str]]:
    """What the classes allow: known before anything is embedded."""
    bags = _bags(windows, torch.zeros(len(windows), 1))
    split = windows.split
    return allowed_shots(bags, shots, split.train, split.test, names=windows.classes, unit=windows.unit)


def _jobs(
    found: Sequence[Contender],
    stores: Sequence[FeatureStore],
    tasks: Sequence[str],
    shots: Sequence[int],
    controls: bool,
) -> Iterator[_Job]:
    for contender, store in zip(found, stores, strict=True):
        for task in (name for name in TASKS if name in tasks):
            yield _Job(contender, store, task)
            if controls and contender.kind == "encoder" and task in SHUFFLED_TASKS:
                yield _Job(contender, store, task, shuffled=True)
        for number in shots:
            yield _Job(contender, store, FEWSHOT_METHOD, number)


def _judged(
    jobs: Iterable[_Job], windows: LabelledWindows, episodes: int, seed: int, keep: bool
) -> Iterator[Evaluation]:
    split, classes = windows.split, len(windows.classes)
    features, owner = torch.empty(0), None
    for job in jobs:
        name = job.contender.name
        if owner is not job.store:
            features, owner = _features(job.store, windows), job.store
        if job.shots is None:
            yield judge(
                job.method,
                features,
                windows.labels,
                windows.groups,
                split,
                classes,
                encoder=name,
                seed=seed,
                shuffled=job.shuffled,
                rescale=job.contender.kind == "histogram" and job.method in LINEAR_TASKS,
            )
            continue
        bags = _bags(windows, features)
        drawn = draws(bags, job.shots, episodes, seed, split.train, split.test, names=windows.classes)
        own = derive(seed, "bootstrap")
        evaluation = run(
            bags,
            job.method,
            drawn,
            encoder=name,
            shots=job.shots,
            seed=own,
            names=windows.classes,
            unit=windows.unit,
        )
        if not keep:
            for episode in evaluation.episodes:
                episode.predictions = []
        yield evaluation


def _features(store: FeatureStore, windows: LabelledWindows) -> Tensor:
    return store.read_all(windows.rows.numpy())[0]


def _exhibits(
    plugin: Domain,
    found: Sequence[Contender],
    stores: Sequence[FeatureStore],
    windows: LabelledWindows,
    evaluations: Sequence[Evaluation],
    seed: int,
    skipped: SkippedLog,
    progress: Progress,
) -> Exhibits:
    """A map of the features of the first few, and what lies near to what for the first encoder and its control."""
    exhibits = Exhibits()
    held_out = torch.zeros(len(windows), dtype=torch.bool)
    held_out[windows.split.test] = True
    shown = list(zip(found, stores, strict=True))[:MAPS]
    for contender, store in progress(shown, len(shown), "Mapping features"):
        features = _features(store, windows)
        exhibits.maps.append(feature_map(features, windows.labels, held_out, contender.name, seed=seed))
    first = found[0]
    predicted = next(
        (_answers(e) for e in evaluations if (e.encoder, e.shots, e.shuffled) == (first.name, None, False)), None
    )
    queries = choose_queries(windows.labels, held_out, predicted, seed=seed)
    reader, spec = open_reader(plugin, windows.index), plugin.input_spec(windows.index)
    pictures = partial(window_pictures, windows.index, reader, plugin.to_rgb, spec, skipped=skipped)
    names = [item.id for item in windows.items()]
    for contender, store in zip(found, stores, strict=True):
        if contender is not first and first.name not in contender.of:
            continue
        exhibits.neighbours += neighbours(
            _features(store, windows),
            windows.rows,
            windows.labels,
            windows.groups,
            queries,
            pictures,
            encoder=contender.name,
            classes=windows.classes,
            names=names,
            notes=exhibits.notes,
            predicted=predicted if contender is first else None,
        )
    return exhibits


def _answers(evaluation: Evaluation) -> Tensor:
    return torch.tensor(evaluation.episodes[0].predictions)


def _title(method: str) -> str:
    return TASKS[method].title if method in TASKS else find_classifier(method).title


def _shared_controls(found: Sequence[Contender]) -> list[str]:
    return [
        f"'{contender.name}' is the control of {', '.join(contender.of)}, which have one architecture and input."
        for contender in found
        if len(contender.of) > 1
    ]


def _inputs(paths: Sequence[Path], index: str, metadata: dict, encoders: dict[str, Encoder]) -> dict[str, str]:
    """Data, labels files and encoders, each with a hash."""
    tables = [Path(file) for file in (metadata.get("labels") or {}).get("files", [])]
    return {
        **{str(path): index for path in paths},
        **{str(file): hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in tables if file.is_file()},
        **{name: encoder.identity for name, encoder in encoders.items()},
    }
