"""``fmsuite pretrain``: from files to an encoder."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from pydantic import BaseModel

from fmsuite.commands.filling import draw_reconstructions
from fmsuite.commands.pairs import join_pairs
from fmsuite.commands.setup import open_domain, open_index, parts_of, read_run_config, resolve_run
from fmsuite.core import distributed
from fmsuite.core.backbones.build import build_backbone
from fmsuite.core.backbones.wavelengths import check_wavelengths
from fmsuite.core.config import RunConfig
from fmsuite.core.data.index import SampleIndex
from fmsuite.core.data.loader import SampleStream, default_workers, make_loader
from fmsuite.core.data.packed import open_reader
from fmsuite.core.data.pairs import Pairs, PairTable, read_pairs
from fmsuite.core.data.pipeline import IMAGE, ViewPipeline, WindowDataset, collate, plain_views
from fmsuite.core.data.reader import Reader
from fmsuite.core.data.sample import Batch
from fmsuite.core.data.sampling import RandomWindows, WindowSampler, require_anywhere
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.data.supports import Supports
from fmsuite.core.encoders import save_encoder
from fmsuite.core.inputs import InputSpec
from fmsuite.core.objectives.base import Objective, find_objective
from fmsuite.core.reports.views import draw_views
from fmsuite.core.seeding import derive, generator
from fmsuite.core.training.checkpoint import differences, plain_config
from fmsuite.core.training.loop import RunFolder, train
from fmsuite.core.training.monitor import ProbeSet
from fmsuite.core.training.precision import choose_device
from fmsuite.core.training.schedules import run_length
from fmsuite.domains.base import Domain, Progress, load_domain, no_progress
from fmsuite.errors import FmsuiteError, UsageError
from fmsuite.tiling.parts import discard_parts

log = logging.getLogger("fmsuite")
Result = TypeVar("Result")
VIEW_SAMPLES = 6
PROBE_BATCH = 32


@dataclass(frozen=True)
class Pretrained:
    """How a run ended.

    Attributes:
        folder: the run folder.
        step, total_steps: optimiser steps done and asked for.
        stopped_by: SIGINT or SIGTERM, if it was stopped; it can be continued with ``--resume``.
        skipped: one sentence on what could not be used; empty if everything was.
        main_rank: this process is the one that reports.
    """

    folder: Path
    step: int
    total_steps: int
    stopped_by: signal.Signals | None
    skipped: str
    main_rank: bool


def pretrain(
    domain: str,
    data: Sequence[Path],
    *,
    recipe: str | None = None,
    objective: str | None = None,
    out: Path | None = None,
    resume: bool = False,
    auto_resume: bool = False,
    overrides: Sequence[str] = (),
    pairs: Path | None = None,
    strict: bool = False,
    progress: Progress = no_progress,
    command: Sequence[str] = (),
) -> Pretrained:
    """Train an encoder and leave a run folder that holds everything needed to repeat it.

    Args:
        resume: continue the run in ``out``.
        auto_resume: continue it if it was begun, begin it otherwise; ``data``, ``recipe``, ``objective`` and ``pairs``
            then serve the beginning only. A process that torchrun has restarted does so unasked.
        pairs: a table that names windows and says what is paired with them, for objectives that need it.

    Raises:
        UsageError: for wrong names, keys, paths or combinations, before any training.
        FmsuiteError: if training cannot go on; the last checkpoint stays usable.
    """
    load_domain(domain)
    run = RunFolder(run_path(domain, out, "--resume" if resume else "--auto-resume" if auto_resume else None))
    if not resume and _goes_on(run, auto_resume):
        resume, data, recipe, objective, pairs = True, (), None, None, None
    config = _run_config(run, domain, recipe, objective, overrides, resume)
    _check_pairs(config.objective, pairs, run, resume)
    device = choose_device(config.training.device)
    with distributed.process_group(device, alone=config.training.strategy == "fsdp2"):
        return _pretrain(config, data, run, resume, _asked(overrides), pairs, strict, progress, command)


def _goes_on(run: RunFolder, auto_resume: bool) -> bool:
    """Whether a run that need not be there is, and is to be continued. Every rank finds the same: none writes to the
    folder before all have met."""
    if not run.config_path.exists():
        return False
    restarts = distributed.restart_count()
    # The first start may have refused a folder with another run, which is then not to be continued either.
    if not auto_resume and not (restarts and run.last_launch == distributed.launch_id()):
        return False
    if restarts:
        log.info("Restart %d: going on from the last checkpoint.", restarts)
    return True


def _check_pairs(objective: str, pairs: Path | None, run: RunFolder, resume: bool) -> None:
    """
    Raises:
        UsageError: if a table of pairs is missing, or has no use.
    """
    kept = resume and run.pairs_path.exists()
    if not find_objective(objective).needs_pairs:
        if pairs is not None:
            raise UsageError(f"Objective '{objective}' does not learn from pairs.", "Leave out --pairs.")
    elif pairs is None and not kept:
        raise UsageError(
            f"Objective '{objective}' learns from pairs, and none are given.",
            "Give a table of texts or numbers with --pairs.",
        )
    elif pairs is not None and kept:
        raise UsageError("--resume goes on with the run's own pairs.parquet.", "Leave out --pairs.")


def run_path(domain: str, out: Path | None, continued_by: str | None) -> Path:
    """``out``, or a new folder for a new run.

    Args:
        continued_by: the option that asks for a run to be continued, if one does.

    Raises:
        UsageError: where one has to be named.
    """
    if out is not None:
        return out
    if continued_by is not None:
        raise UsageError(f"{continued_by} needs --out: which run to continue.")
    if distributed.launched():
        raise UsageError("Under torchrun --out is needed, so that all processes write to one folder.")
    return Path("runs") / f"{domain}-{time.strftime('%Y%m%d-%H%M%S')}"


def _run_config(
    run: RunFolder, domain: str, recipe: str | None, objective: str | None, overrides: Sequence[str], resume: bool
) -> RunConfig:
    """The recipe's configuration; on resume the run's own, with the overrides on top.

    Raises:
        UsageError: on resume, if there is no run, or if it was begun with another configuration. Nothing has been
            written by then.
    """
    if not resume:
        return resolve_run(domain, recipe, objective, overrides)
    if not run.config_path.exists():
        raise UsageError(
            f"{run.path}: there is no run in this folder to continue.",
            "Check --out, or leave out --resume to begin one.",
        )
    before = read_run_config(run.config_path)
    config = resolve_run(domain, recipe or str(run.config_path), objective, overrides)
    changes: dict[str, object] = {"recipe": before.recipe}
    if not _asked(overrides):
        # What the index fixed may differ from what the recipe says.
        changes["data"] = before.data
    config = config.model_copy(update=changes)
    differing = differences(plain_config(before), plain_config(config))
    if differing:
        raise UsageError(
            f"{run.path}: the run was begun with another configuration: {'; '.join(differing)}.",
            "Resume with the original values, or start a new run in another folder.",
        )
    return config


def _asked(overrides: Sequence[str]) -> set[str]:
    """Names of the ``data:`` options among ``--set`` items."""
    paths = [item.partition("=")[0].split(".") for item in overrides]
    return {path[1] for path in paths if path[0] == "data" and len(path) > 1}


def _refuse_other_length(run: RunFolder, config: RunConfig, windows: int) -> None:
    before, now = run_length(read_run_config(run.config_path).training, windows), run_length(config.training, windows)
    if before != now:
        raise UsageError(
            f"{run.path}: the run was begun with a length of {before} steps, and all its schedules follow from that; "
            f"it cannot go on as one of {now} (training.steps, training.epochs).",
            "Resume with the original length; to train longer, start a new run with model.weights set to this one.",
        )


def _pretrain(
    config: RunConfig,
    data: Sequence[Path],
    run: RunFolder,
    resume: bool,
    asked: Collection[str],
    paired: Path | None,
    strict: bool,
    progress: Progress,
    command: Sequence[str],
) -> Pretrained:
    main = distributed.is_main()
    if not resume:
        run.refuse_if_begun()
        distributed.barrier()
    if main:
        run.path.mkdir(parents=True, exist_ok=True)
        if not resume and not parts_of(run.index_path).is_dir():
            run.skipped_path.unlink(missing_ok=True)
    skipped = SkippedLog(run.skipped_path if main else None, strict)
    table = _on_main(lambda: None if paired is None else read_pairs(paired))
    domain, whole = _windows(config, data, run, resume, asked, skipped, progress)
    pairs = _pairs(config.objective, table, run, resume, whole, skipped)
    rows, others = _sides(whole, config.training.split, pairs)
    index, held_out = (whole if len(rows) == len(whole) else whole.select(rows)), whole.select(others)
    if resume:
        _refuse_other_length(run, config, len(index))
        distributed.barrier()
    config = config.model_copy(update={"data": domain.options})

    # Nothing random precedes this, so every rank builds the same network.
    torch.manual_seed(derive(config.seed, "weights"))
    spec = domain.input_spec(index)
    if config.model.patch_embedding == "wavelength" and config.model.weights is None:
        check_wavelengths(spec)
    backbone = build_backbone(config.model, spec)
    objective = find_objective(config.objective)(config.objective_options, backbone)
    spec = backbone.spec

    training = config.training
    stream = SampleStream(len(index), training.batch_size, config.seed, distributed.rank(), distributed.world_size())
    total_steps = run_length(training, len(index))
    if main and training.batch_size > len(index):
        log.warning(
            "training.batch_size %d is more than the %d windows: a batch holds some of them several times.",
            training.batch_size,
            len(index),
        )
    reader = open_reader(domain, index)
    pipeline = ViewPipeline(objective.view_requests(), domain.augmentation(spec), backbone.grid, spec.axes, config.seed)
    partner = None if pairs is None else _partner(pairs.select(rows), objective)
    sampler = _sampler(config, index, held_out, reader, domain)
    dataset = WindowDataset(index, reader, pipeline, config.seed, partner, sampler)
    supports = _supports(config, objective, index, reader, domain)
    if main:
        run.begin(config, whole.hash, command or None, resume, None if pairs is None else pairs.hash)
        if not resume:
            _draw_views(dataset, stream, domain, objective, run)
    probe = None
    if main and config.monitor.every:
        watched = held_out if _has_classes(held_out) else index
        probe = _probe(config, watched, reader, spec, objective, skipped)
    distributed.barrier()
    workers = training.workers if training.workers >= 0 else default_workers()

    result = train(
        objective,
        lambda start: make_loader(dataset, stream, start, total_steps, workers, supports),
        config,
        spec,
        run,
        total_steps=total_steps,
        steps_per_epoch=stream.steps_per_epoch,
        skipped=skipped,
        probe=probe,
        resume=resume,
        report=progress,
    )
    if not result.interrupted:
        provenance = {
            "run": str(run.path.resolve()),
            "recipe": config.recipe,
            "domain": config.domain,
            "objective": config.objective,
            "steps": str(result.step),
            "seed": str(config.seed),
            "index": whole.hash,
            **({} if pairs is None else {"pairs": pairs.hash}),
        }
        with result.strategy.whole() as whole_objective:
            if whole_objective is not None:
                encoder = whole_objective.encoder
                save_encoder(run.path, encoder, encoder.spec, whole_objective.pooling, provenance)
                whole_objective.export(run.path)
                watched, unseen = (held_out, True) if len(held_out) else (index, False)
                draw_reconstructions(
                    whole_objective,
                    domain,
                    reader,
                    watched,
                    run,
                    skipped,
                    seed=config.seed,
                    step=result.step,
                    held_out=unseen,
                )
    return Pretrained(run.path, result.step, total_steps, result.stopped_by, skipped.summary(), main)


def _windows(
    config: RunConfig,
    data: Sequence[Path],
    run: RunFolder,
    resume: bool,
    asked: Collection[str],
    skipped: SkippedLog,
    progress: Progress,
) -> tuple[Domain, SampleIndex]:
    """The run's windows. Rank 0 finds them and writes the run's index; every rank reads it."""
    domain = open_domain(config.domain, config.data)

    def find() -> None:
        if not (resume and run.index_path.exists()):
            paths = [Path(path) for path in data] or [_example_data(domain, config.seed)]
            parts = parts_of(run.index_path)
            opened, index = open_index(domain, paths, skipped, progress, asked, parts=parts, processes=None)
            _say_options_of_index(config.data, opened.options)
            index.write(run.index_path)
            discard_parts(parts)
            log.info("%d windows from %d sources.", len(index), len(index.sources))
        elif data:
            raise UsageError("--resume goes on with the run's own index.parquet.", "Leave out --data.")

    _on_main(find)
    return open_index(domain, [run.index_path], skipped)


def _on_main(work: Callable[[], Result]) -> Result | None:
    """What rank 0 finds, on rank 0; the others wait for it.

    Raises:
        FmsuiteError: on every rank, if rank 0 met one.
    """
    result: Result | None = None
    failure: FmsuiteError | None = None
    if distributed.is_main():
        try:
            result = work()
        except FmsuiteError as error:
            failure = error
    failure = distributed.from_main(failure)
    if failure is not None:
        raise failure
    return result


def _pairs(
    objective: str, table: PairTable | None, run: RunFolder, resume: bool, whole: SampleIndex, skipped: SkippedLog
) -> Pairs | None:
    """The partners of the run's windows. Rank 0 joins the table with the index and writes the run's own pairs; every
    rank reads them."""
    if not find_objective(objective).needs_pairs:
        return None

    def join() -> None:
        if table is not None:
            joined = join_pairs(table, whole, skipped)
            if resume:
                # Others would take the place of the run's own.
                run.refuse_other("pairs_hash", joined.hash)
            joined.write(run.pairs_path)

    _on_main(join)
    return Pairs.read(run.pairs_path, len(whole))


def _partner(pairs: Pairs, objective: Objective) -> Callable[[int], np.ndarray]:
    """The partner of a window to train on.

    Raises:
        UsageError: if the objective is set up for others.
    """
    request = objective.pair_request()
    assert request is not None
    pairs.check(request, objective.name)
    return partial(pairs.partner, request)


def _sides(whole: SampleIndex, split: str | None, pairs: Pairs | None) -> tuple[np.ndarray, np.ndarray]:
    """The rows to train on, and those held out. Without a partner where there should be one, a window is neither.

    Raises:
        UsageError: if nothing is left to train on.
    """
    mine, others = _of_split(whole, split)
    if pairs is None:
        return mine, others
    paired = mine[pairs.of_row[mine] >= 0]
    if not len(paired):
        raise UsageError(
            f"None of the {len(mine)} windows to train on has a partner in the table of pairs.",
            "Add lines for them, or set training.split to the side that has some.",
        )
    if len(paired) < len(mine) and distributed.is_main():
        log.info("%d of %d windows have no partner and are left out of training.", len(mine) - len(paired), len(mine))
    return paired, others


def _of_split(whole: SampleIndex, split: str | None) -> tuple[np.ndarray, np.ndarray]:
    if split is None:
        return np.arange(len(whole)), np.arange(0)
    column = whole.table.column("split").cast(pa.string())
    mine = pc.fill_null(pc.equal(column, split), True).to_numpy()
    if not mine.any():
        raise UsageError(
            f"No window is in the split '{split}'; the index has {', '.join(sorted(pc.unique(column).to_pylist()))}.",
            "Set training.split to one of them, or to null to train on all windows.",
        )
    if not mine.all() and distributed.is_main():
        log.info("Training on %d windows; %d of other splits are held out.", mine.sum(), (~mine).sum())
    return np.flatnonzero(mine), np.flatnonzero(~mine)


def _sampler(
    config: RunConfig, index: SampleIndex, held_out: SampleIndex, reader: Reader, domain: Domain
) -> WindowSampler | None:
    """What draws the windows anew, if they are to be.

    Raises:
        UsageError: if the reader can read the index's windows only, what is paired with them would not fit others, or
            others would show what is held out.
    """
    if config.training.windows == "fixed":
        return None
    if find_objective(config.objective).needs_pairs:
        raise UsageError(
            f"Objective '{config.objective}' learns from what is paired with the index's windows, so they cannot be "
            "drawn anew (training.windows=random).",
            "Use training.windows=fixed.",
        )
    require_anywhere(reader)
    shared = set(index.sources) & set(held_out.sources)
    if shared:
        raise UsageError(
            f"{len(shared)} sources, such as {min(shared)}, have windows in other splits than "
            f"'{config.training.split}', too, which windows drawn anew would show (training.windows=random).",
            "Use training.windows=fixed, split by source, or train on all windows with training.split=null.",
        )
    return RandomWindows(index, domain.input_spec(index).size)


def _supports(
    config: RunConfig, objective: Objective, index: SampleIndex, reader: Reader, domain: Domain
) -> Supports | None:
    """The labelled windows that the objective asks for beside every step's samples.

    Raises:
        UsageError: if there are too few.
    """
    request, backbone, seed = objective.support_request(), objective.backbone, derive(config.seed, "supports")
    if request is None:
        return None
    spec = backbone.spec
    pipeline = ViewPipeline(request.views, domain.augmentation(spec), backbone.grid, spec.axes, seed)
    return Supports(index, reader, pipeline, request, seed, distributed.rank(), distributed.world_size())


def _has_classes(index: SampleIndex) -> bool:
    """Whether a nearest-neighbour probe with neighbours from other groups can be run on these windows."""
    return len(index.label_names) > 1 and len(index.groups) > 1


def _say_options_of_index(recipe: BaseModel, index: BaseModel) -> None:
    wanted, fixed = recipe.model_dump(mode="json"), index.model_dump(mode="json")
    for key in wanted:
        if wanted[key] != fixed[key]:
            log.info("data.%s is %s, as in the index, and not the recipe's %s.", key, fixed[key], wanted[key])


def _example_data(domain: Domain, seed: int) -> Path:
    folder = Path("example-data") / f"{domain.name}-{seed}"
    log.info("No --data: training on example data in %s.", folder)
    return domain.example_data(folder, seed)


def _draw_views(
    dataset: WindowDataset, stream: SampleStream, domain: Domain, objective: Objective, run: RunFolder
) -> None:
    """``views.png`` of the first samples of the first batch, exactly as training will see them."""
    spec = objective.backbone.spec
    batch = collate([dataset[key] for key in stream.keys(0)[:VIEW_SAMPLES]])
    draw_views(batch, objective.backbone.grid, lambda values: domain.to_rgb(values, spec), run.views_path)


def _probe(
    config: RunConfig,
    index: SampleIndex,
    reader: Reader,
    spec: InputSpec,
    objective: Objective,
    skipped: SkippedLog,
) -> ProbeSet:
    """A fixed choice of windows for the monitor."""
    rows = generator(config.seed, "probe").permutation(len(index))[: config.monitor.samples]
    groups = index.table.column("group").combine_chunks().cast("string").take(np.sort(rows)).to_pylist()
    group_of = dict(zip(np.sort(rows).tolist(), groups, strict=True))

    def recorded(batches: Iterable[Batch]) -> Iterable[Batch]:
        for batch in batches:
            for window in batch.skipped:
                skipped.add(window.source, window.stage, window.reason)
            yield batch

    batches = plain_views(index, reader, spec, np.sort(rows).tolist(), spec.size, PROBE_BATCH, objective.backbone.grid)
    return ProbeSet.collect(recorded(batches), IMAGE, group_of.__getitem__, config.monitor.samples)
