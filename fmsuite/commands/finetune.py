"""``fmsuite finetune``: a task learned from an encoder, beside the same network from scratch, judged on others."""

from __future__ import annotations

import itertools
import logging
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml
from pydantic import ValidationError

from fmsuite.commands.comparison import Start
from fmsuite.commands.finetune_config import SCRATCH, ArmOptions, FinetuneConfig
from fmsuite.commands.finetune_data import collect
from fmsuite.commands.finetune_file import read_finetune
from fmsuite.commands.finetune_judge import judge_scenes, judge_windows
from fmsuite.commands.finetune_points import Points, foreground_points, read_points, write_points
from fmsuite.commands.finetune_results import collect_results
from fmsuite.commands.finetune_runs import RunPlan, Setup, train_run
from fmsuite.commands.report import report
from fmsuite.commands.setup import open_domain, open_index, options_of_encoders, parts_of
from fmsuite.core import distributed
from fmsuite.core.adaptation.network_files import load_network
from fmsuite.core.data.index import SampleIndex
from fmsuite.core.data.packed_scenes import open_scene
from fmsuite.core.data.skipped import FILE_NAME, SkippedLog
from fmsuite.core.encoders import Encoder, load_encoder
from fmsuite.core.evaluation.case_scores import kept_of
from fmsuite.core.evaluation.cases import DENSE, Arm, FinetuneResults, TunedRun
from fmsuite.core.evaluation.result_files import RESULTS
from fmsuite.core.lock import WriterLock
from fmsuite.core.seeding import derive
from fmsuite.core.training.precision import choose_device
from fmsuite.core.training.run_folder import RunFolder
from fmsuite.domains.base import Domain, Progress, no_progress
from fmsuite.errors import UsageError
from fmsuite.tiling.parts import discard_parts

log = logging.getLogger("fmsuite")

TASK = "task.yaml"
INDEX = "index.parquet"
JUDGED = "judged.json"
PREDICTIONS = "predictions"
POINTS = "points.npz"
FREE = ("arms", "few")
"""Of the configuration, what may change when the command is given again: further arms, fractions and seeds."""


@dataclass(frozen=True)
class Finetuned:
    """How the command ended.

    Attributes:
        results: ``None`` if it was stopped; the same command goes on.
        page: the report.
        stopped_by: SIGINT or SIGTERM.
        skipped: one sentence on what could not be used; empty if everything was.
    """

    out: Path
    results: FinetuneResults | None
    page: Path | None
    stopped_by: signal.Signals | None
    skipped: str


def finetune(
    task: Path,
    out: Path,
    *,
    sources: Sequence[Path] = (),
    encoder: str | None = None,
    overrides: Sequence[str] = (),
    strict: bool = False,
    progress: Progress = no_progress,
    command: Sequence[str] = (),
) -> Finetuned:
    """Train every arm at every fraction, seed and fold, judge each on the cases that it did not see, and write results
    and a report. What an earlier start of the same command has finished is not done again.

    Args:
        task: a YAML file; see ``finetune_file``.
        sources, encoder: in place of those of the file.

    Raises:
        UsageError: for wrong names, keys, paths or combinations, before any training.
        FmsuiteError: if training cannot go on; what is finished stays.
    """
    if distributed.launched():
        raise UsageError(
            "fmsuite finetune runs in one process.", "Start it without torchrun; arms can be shared out by hand."
        )
    start = Start()
    config = read_finetune(task, overrides, sources, encoder)
    _open_out(out, config)
    lock = WriterLock(out / ".lock", f"{out}")
    try:
        return _finetune(config, out, strict, progress, command, start)
    finally:
        lock.close()


def _open_out(out: Path, config: FinetuneConfig) -> None:
    """
    Raises:
        UsageError: if the folder holds something else, or a fine-tuning that was begun with another configuration.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: this is a file.", "Choose another folder with --out.")
    path = out / TASK
    now = config.model_dump(mode="json")
    if path.exists():
        before = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        differing = [key for key in now if key not in FREE and before.get(key) != now[key]]
        if differing:
            raise UsageError(
                f"{out}: the fine-tuning in it was begun with another {', '.join(differing)}.",
                "Give the original values (only compare, scratch and few may change), or choose another folder.",
            )
    elif RunFolder(out).facts_path.exists() or (out / RESULTS).exists():
        raise UsageError(f"{out}: holds a run or results of another command.", "Choose another folder with --out.")
    out.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(yaml.safe_dump(now, sort_keys=False, allow_unicode=True), encoding="utf-8")
    os.replace(partial, path)


def _finetune(
    config: FinetuneConfig, out: Path, strict: bool, progress: Progress, command: Sequence[str], start: Start
) -> Finetuned:
    skipped = SkippedLog(out / FILE_NAME, strict)
    setup, whole = set_up(config, out, skipped, progress, command)
    data = setup.data
    plans = [
        RunPlan(arm, fraction, seed, fold)
        for arm, fraction, seed, fold in itertools.product(
            config.arms, sorted(config.few.fractions), config.few.seeds, data.folds
        )
    ]
    arms = [_arm(setup, arm) for arm in config.arms]
    setup = replace(setup, points=_points(setup))
    log.info("%s", data.said)
    runs: list[TunedRun] = []
    for number, plan in enumerate(plans, start=1):
        judged = _judged(out, plan)
        if judged is None:
            log.info("Run %d of %d: %s.", number, len(plans), plan.name)
        stopped = train_run(setup, plan)
        if stopped is not None:
            return Finetuned(out, None, None, stopped, skipped.summary())
        if judged is None:
            judged = _judge(setup, plan)
        runs.append(judged)
    results = collect_results(setup, arms, runs, whole, command, start)
    results.write(out)
    page = report([out], out / "report.html")
    return Finetuned(out, results, page, None, skipped.summary())


def set_up(
    config: FinetuneConfig,
    out: Path,
    skipped: SkippedLog,
    progress: Progress = no_progress,
    command: Sequence[str] = (),
) -> tuple[Setup, SampleIndex]:
    """What all runs share, but for the points that windows are centred on, and the whole index.

    Raises:
        UsageError: if the data are not the encoder's input, or cannot be learned from.
    """
    opened = load_encoder(config.encoder)
    domain, index = index_of(config, opened, out, skipped, progress)
    spec = domain.input_spec(index)
    opened = opened.fitted(spec)
    opened.check_input(spec)
    table = None if config.targets is None else Path(config.targets)
    data = collect(config, domain, index, skipped, table)
    return Setup(config, data, opened, out, skipped, progress, command, {}), index


def index_of(
    config: FinetuneConfig, encoder: Encoder, out: Path, skipped: SkippedLog, progress: Progress = no_progress
) -> tuple[Domain, SampleIndex]:
    """The folder's index, made if it is not there: files are read as those of the encoder's training were, but for what
    the configuration says."""
    paths = config.paths
    # An index says itself how its windows are read.
    followed = {} if any(path.suffix == ".parquet" for path in paths) else options_of_encoders(config.domain, [encoder])
    domain = open_domain(config.domain, config.data_options(followed))
    path = out / INDEX
    if not path.exists():
        parts = parts_of(path)
        _, index = open_index(domain, paths, skipped, progress, set(config.data), parts=parts, processes=None)
        index.write(path)
        discard_parts(parts)
        log.info("%d windows from %d sources.", len(index), len(index.sources))
    return open_index(domain, [path], skipped)


def _arm(setup: Setup, arm: ArmOptions) -> Arm:
    """Builds the network once, so that what it refuses is refused before the first run."""
    task = setup.objective(arm, setup.data.folds[0].train, setup.config.few.seeds[0])
    # Low-rank and bottleneck adapters are parameters too.
    parameters = sum(p.numel() for p in task.parameters())
    trained = sum(p.numel() for p in task.parameters() if p.requires_grad)
    control = arm.name == SCRATCH
    title = {
        "full": "all weights trained, from the encoder's",
        "frozen": "the encoder as it is, only the rest trained",
        "lora": "low-rank adapters in the encoder, and the rest",
        "adapters": "bottleneck adapters in the encoder, and the rest",
        "attention": "the encoder's attention, and the rest",
        "norms": "the encoder's normalisations, and the rest",
        "biases": "the encoder's biases, and the rest",
    }[task.config.tune]
    if control:
        title = "the same network, all weights trained from a random start"
    return Arm(name=arm.name, title=title, control=control, parameters=parameters, trained=trained)


def _points(setup: Setup) -> Points:
    """Where windows of foreground may be centred, of all sources that are ever trained on; looked for once, and on GPUs
    also if no window is, since label maps are checked by it and later nobody could afford to."""
    config, data = setup.config, setup.data
    on_gpu = choose_device(config.training.device).type != "cpu"
    if config.label_map is None or not (config.training.foreground or on_gpu):
        return {}
    path = setup.out / POINTS
    if path.exists():
        return read_points(path)
    train = {group for fold in data.folds for group in fold.train}
    found = foreground_points(
        lambda source: open_scene(data.domain, data.index, source),
        list(dict.fromkeys(case.sources[0] for case in data.cases if case.group in train)),
        config.label_map,
        config.first_class,
        len(data.classes),
        len(data.domain.input_spec(data.index).axes),
        derive(config.seed, "points"),
        setup.skipped,
        setup.progress,
    )
    write_points(path, found)
    return found


def _judged(out: Path, plan: RunPlan) -> TunedRun | None:
    path = out / plan.folder / JUDGED
    try:
        return TunedRun.model_validate_json(path.read_text(encoding="utf-8")) if path.exists() else None
    except (ValueError, ValidationError) as error:
        raise UsageError(f"{path}: damaged ({error}).", "Remove it to have the run judged again.") from error


def _judge(setup: Setup, plan: RunPlan) -> TunedRun:
    config, data = setup.config, setup.data
    folder = setup.out / plan.folder
    network = load_network(folder)
    device = choose_device(config.training.device)
    network.task.to(device)
    numbers = data.cases_of(plan.fold)
    made = network.provenance

    def shown(items, total):  # type: ignore[no-untyped-def]
        return setup.progress(items, total, f"{plan.name}: judging")

    run = TunedRun(
        arm=plan.arm.name,
        folder=plan.folder.as_posix(),
        fraction=plan.fraction,
        seed=plan.seed,
        fold=plan.fold.number,
        groups=made["groups"],
        windows=made["windows"],
        steps=made["steps"],
        seconds=made["seconds"],
        cases=[],
    )
    if config.task_name in DENSE:
        write = setup.out / PREDICTIONS / plan.folder.relative_to("runs") if config.judge.write else None
        scores, run.failed = judge_scenes(config, data, network, numbers, device, setup.skipped, write, shown)
        run.cases = [number for number in numbers if number in scores]
        run.scores = {name: [scores[number][name] for number in run.cases] for name in kept_of(config.judge.metrics)}
    else:
        outputs, run.failed = judge_windows(config, data, network, numbers, device, setup.skipped, shown)
        run.cases = [number for number in numbers if number in outputs]
        run.outputs = [outputs[number] for number in run.cases]
    path = folder / JUDGED
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(run.model_dump_json(), encoding="utf-8")
    os.replace(partial, path)
    return run
