"""One run of a fine-tuning: an arm, a fraction of the labels, a seed and a fold, trained in a folder of its own."""

from __future__ import annotations

import copy
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from fmsuite.commands.finetune_config import FROM_CLASSES, ArmOptions, FinetuneConfig
from fmsuite.commands.finetune_data import Fold, TaskData
from fmsuite.commands.finetune_points import Points
from fmsuite.core.adaptation.network_files import DESCRIPTION, save_network
from fmsuite.core.adaptation.task import TASKS, Task
from fmsuite.core.config import RunConfig
from fmsuite.core.data.loader import SampleStream, default_workers, make_loader
from fmsuite.core.data.packed import open_reader
from fmsuite.core.data.pipeline import ViewPipeline, WindowDataset, collate
from fmsuite.core.data.sample import Array
from fmsuite.core.data.sampling import BalancedWindows, RandomWindows, WindowSampler, require_anywhere
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.encoders import Encoder
from fmsuite.core.evaluation.cases import DENSE
from fmsuite.core.reports.views import draw_views
from fmsuite.core.seeding import derive
from fmsuite.core.training.config import MonitorConfig
from fmsuite.core.training.loop import RunFolder, train
from fmsuite.core.training.schedules import run_length
from fmsuite.domains.base import Progress
from fmsuite.errors import UsageError

VIEW_SAMPLES = 6


@dataclass(frozen=True)
class RunPlan:
    """
    Attributes:
        name: for people. folder: relative to the fine-tuning's.
    """

    arm: ArmOptions
    fraction: float
    seed: int
    fold: Fold

    @property
    def folder(self) -> Path:
        place = Path("runs") / self.arm.name / f"fraction-{self.fraction:g}" / f"seed-{self.seed}"
        return place if self.fold.number is None else place / f"fold-{self.fold.number}"

    @property
    def name(self) -> str:
        parts = [self.arm.name, f"{self.fraction:.3g} of the labels", f"seed {self.seed}"]
        return ", ".join(parts if self.fold.number is None else [*parts, f"fold {self.fold.number}"])


@dataclass(frozen=True)
class Setup:
    """What all runs of a fine-tuning share.

    Attributes:
        out: its folder.
        points: of sources to train on, for foreground-balanced windows.
    """

    config: FinetuneConfig
    data: TaskData
    encoder: Encoder
    out: Path
    skipped: SkippedLog
    progress: Progress
    command: Sequence[str]
    points: Points

    def run_seed(self, seed: int) -> int:
        return derive(self.config.seed, "finetune", seed)

    def objective(self, arm: ArmOptions, groups: Sequence[str], seed: int) -> Task:
        """The network that an arm starts from; heads and decoders start alike in all arms.

        Args:
            groups: to train on, whose numbers a regression is measured in.

        Raises:
            UsageError: if the task or the backbone refuse the options.
        """
        config = self.config
        fixed: dict[str, Any] = {FROM_CLASSES[config.task_name]: len(self.data.classes)}
        if config.task_name in DENSE:
            fixed["size"] = window_size(self.config, self.data)
        if config.task_name == "regression" and "target_mean" not in config.task:
            fixed |= _standard(self.data.targets, self.data.rows_of(groups))
        options = config.arm_task(arm, **fixed)
        torch.manual_seed(derive(self.run_seed(seed), "weights"))
        return TASKS[config.task_name](options, copy.deepcopy(self.encoder.backbone))  # type: ignore[arg-type]


def window_size(config: FinetuneConfig, data: TaskData) -> tuple[int, ...]:
    """Samples of a window along each axis: a segmentation sees windows as they are read, as it sees whole sources.

    Raises:
        UsageError: if the task asks for another size.
    """
    size = data.domain.input_spec(data.index).size
    asked = config.task.get("size")
    if asked is not None and tuple(np.broadcast_to(asked, len(size))) != size:
        raise UsageError(
            f"task.size is {asked}, and windows of {size} are read: whole sources would be seen at another scale.",
            "Set data.size and leave task.size out.",
        )
    return size


def _standard(targets: Array | None, rows: Array) -> dict[str, tuple[float, ...]]:
    assert targets is not None
    known = np.ma.masked_invalid(targets[rows].astype(np.float64))
    if (known.count(axis=0) == 0).any():
        raise UsageError("None of the training windows has a value of one of the targets.", "Raise few.fractions.")
    std = known.std(axis=0).filled(1.0)
    return {
        "target_mean": tuple(known.mean(axis=0).tolist()),
        "target_std": tuple(float(s) if s > 0 else 1.0 for s in std),
    }


def run_config(setup: Setup, plan: RunPlan, task: Task) -> RunConfig:
    """What decides a run, as the training loop records it.

    Raises:
        UsageError: if the run's folder holds one that was begun with another task, optimiser or network.
    """
    config = setup.config
    own = RunConfig(
        recipe="finetune",
        domain=config.domain,
        seed=setup.run_seed(plan.seed),
        data=setup.data.domain.options,
        model=task.backbone.config,  # type: ignore[arg-type]
        objective=task.name,
        objective_options=task.config,
        optim=config.arm_optim(plan.arm),
        training=config.training.plain(),
        monitor=MonitorConfig(every=0),
    )
    path = RunFolder(setup.out / plan.folder).config_path
    if path.exists():
        before, now = yaml.safe_load(path.read_text(encoding="utf-8")), yaml.safe_load(own.to_yaml())
        differing = [key for key in ("seed", "model", "objective", "optim") if before.get(key) != now[key]]
        if differing:
            raise UsageError(
                f"{path.parent}: this run was begun with another {' and '.join(differing)}.",
                "Give the arm another name, remove the run's folder, or give the original values.",
            )
    return own


def train_run(setup: Setup, plan: RunPlan) -> signal.Signals | None:
    """Train to the end, or go on where an earlier command stopped, and write the network. Nothing is done where it was
    written before.

    Returns:
        By what it was asked to stop; ``None`` if it ended.

    Raises:
        UsageError: as ``run_config``.
        UsageError, FmsuiteError: as ``train``.
    """
    run = RunFolder(setup.out / plan.folder)
    config, data, seed = setup.config, setup.data, setup.run_seed(plan.seed)
    groups = data.train_groups(plan.fold, plan.fraction, seed)
    rows = data.rows_of(groups)
    task = setup.objective(plan.arm, groups, plan.seed)
    own = run_config(setup, plan, task)
    if (run.path / DESCRIPTION).exists():
        return None
    spec, training = task.backbone.spec, own.training
    index = data.index.select(rows)
    reader = open_reader(data.domain, index)
    sampler: WindowSampler | None = None
    if training.windows == "random":
        require_anywhere(reader)
        size = data.domain.input_spec(index).size
        sampler = RandomWindows(index, size)
        if config.training.foreground:
            sampler = BalancedWindows(index, size, setup.points, config.training.foreground)
    stream = SampleStream(len(index), training.batch_size, seed)
    total = run_length(training, len(index))
    pipeline = ViewPipeline(task.view_requests(), data.domain.augmentation(spec), task.backbone.grid, spec.axes, seed)
    partner = None if data.targets is None else data.targets[rows].__getitem__
    dataset = WindowDataset(index, reader, pipeline, seed, partner, sampler)
    resume = run.config_path.exists()
    run.begin(own, index.hash, setup.command or None, resume)
    views = setup.out / "views.png"
    if not views.exists():
        batch = collate([dataset[key] for key in stream.keys(0)[:VIEW_SAMPLES]])
        draw_views(batch, task.backbone.grid, lambda values: data.domain.to_rgb(values, spec), views)
    workers = training.workers if training.workers >= 0 else default_workers()
    began = time.monotonic()
    result = train(
        task,
        lambda start: make_loader(dataset, stream, start, total, workers),
        own,
        spec,
        run,
        total_steps=total,
        steps_per_epoch=stream.steps_per_epoch,
        skipped=setup.skipped,
        resume=resume,
        report=lambda items, total, title: setup.progress(items, total, f"{plan.name}: {title}"),
    )
    if result.interrupted:
        return result.stopped_by
    provenance = {
        "run": str(run.path.resolve()),
        "finetuned_from": config.encoder,
        "encoder": setup.encoder.identity,
        "arm": plan.arm.name,
        "fraction": plan.fraction,
        "seed": plan.seed,
        "fold": plan.fold.number,
        "groups": groups,
        "windows": len(index),
        "steps": result.step,
        "seconds": round(time.monotonic() - began, 1),
    }
    with result.strategy.whole() as whole:
        assert isinstance(whole, Task)
        options = data.domain.options.model_dump(mode="json")
        save_network(run.path, whole, spec, data.classes, config.domain, options, provenance)
    return None
