"""The training loop: one optimiser step, and what happens around it."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fmsuite.core.config import RunConfig
from fmsuite.core.data.prefetch import on_device
from fmsuite.core.data.sample import Batch, SkippedWindow, View
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.distributed import (
    all_mean,
    all_sum,
    gather_objects,
    is_main,
    peers_named,
    process_group,
    rank,
    world_size,
)
from fmsuite.core.inputs import InputSpec, Normalize
from fmsuite.core.objectives.base import Objective, StepContext
from fmsuite.core.seeding import derive
from fmsuite.core.training.accumulation import batch_statistics, shares, split_batch
from fmsuite.core.training.backbones import set_up_backbones
from fmsuite.core.training.checkpoint import (
    Checkpoint,
    Plan,
    check_same_run,
    checkpoint_path,
    find_latest,
    list_checkpoints,
    plain_config,
)
from fmsuite.core.training.checkpoint_files import Stored
from fmsuite.core.training.interrupt import Interrupt
from fmsuite.core.training.metrics import MetricsLog, read_metrics
from fmsuite.core.training.monitor import Monitor, ProbeSet
from fmsuite.core.training.optim import (
    OptimSchedules,
    apply_schedules,
    describe_groups,
    make_optimizer,
)
from fmsuite.core.training.precision import autocast, choose_device, choose_precision
from fmsuite.core.training.progress import LINE_EVERY_S, ProgressReport, silent
from fmsuite.core.training.run_folder import RunFolder
from fmsuite.core.training.saver import Saver
from fmsuite.core.training.state import restore_state, targets, training_state
from fmsuite.core.training.strategy import Strategy, choose_strategy, make_strategy
from fmsuite.errors import FmsuiteError, UsageError

__all__ = ["RunFolder", "TrainResult", "train"]

logger = logging.getLogger("fmsuite")

MIN_DRAWS = 100
"""``training.max_skipped`` is a share of at least this many windows, so that one bad window in the first batch does
not stop a run."""


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        step: optimiser steps taken since its beginning.
        stopped_by: SIGINT or SIGTERM if it was asked to stop before its end, on every rank the same; it can be resumed.
        checkpoint: of that step.
        metrics: the last values logged; empty if no step was taken.
        strategy: knows where the parameters are, for whoever exports them.
    """

    step: int
    stopped_by: signal.Signals | None
    checkpoint: Path
    metrics: dict[str, float]
    strategy: Strategy

    @property
    def interrupted(self) -> bool:
        return self.stopped_by is not None


def train(
    objective: Objective,
    loader: Callable[[int], Iterable[Batch]],
    config: RunConfig,
    spec: InputSpec,
    run: RunFolder,
    *,
    total_steps: int,
    steps_per_epoch: int,
    skipped: SkippedLog,
    probe: ProbeSet | None = None,
    resume: bool = False,
    report: ProgressReport = silent,
) -> TrainResult:
    """Train an objective to its last step, or until asked to stop.

    In a single process, or in each process that torchrun starts. On one CPU a run that was stopped and resumed, however
    it was stopped, gives the numbers of an uninterrupted one bit for bit. It can be resumed on another number of
    processes, and under another strategy; the numbers are then equal up to the order of float32 sums.

    Args:
        objective: on the CPU, equal on all ranks; it ends on the device, in parts if the strategy is ``fsdp2``.
        loader: this rank's batches of raw pixels from a step on.
        spec: how to normalise them.
        run: where checkpoints and metrics go.
        total_steps, steps_per_epoch: the frame of all schedules.
        skipped: gets the windows that the loader replaced, of all ranks.
        probe: windows to monitor; looked at on rank 0.
        resume: continue from the newest readable checkpoint; from the beginning if there is none yet.
        report: shows progress (on rank 0).

    Raises:
        UsageError: if the configuration asks for what device, backbone, batch or checkpoint do not allow.
        FmsuiteError: if a loss is not finite, too many windows cannot be read, the disk is full, or another process of
            the run has ended. The last checkpoint stays usable.
    """
    device = choose_device(config.training.device)
    alone = config.training.strategy == "fsdp2"
    with process_group(device, alone), peers_named(), Interrupt() as interrupt:
        trainer = _Trainer(objective, config, spec, run, Plan(total_steps, steps_per_epoch), skipped, device, interrupt)
        try:
            start = trainer.restore(resume)
            return trainer.run_steps(loader, start, probe, report if is_main() else silent)
        except Exception:
            trainer.saver.close()
            raise


@dataclass
class _Taken:
    """A step that was taken.

    Attributes:
        done: steps taken, this one included.
        values: losses and gradient norm of this rank, () tensors on the device.
        flags: (4,) over all ranks: how many have a value that is not finite, how many could not write a checkpoint, how
            many were asked to stop by SIGINT, and how many by SIGTERM.
    """

    done: int
    values: dict[str, Tensor]
    flags: Tensor
    lr: float
    weight_decay: float


class _Trainer:
    def __init__(
        self,
        objective: Objective,
        config: RunConfig,
        spec: InputSpec,
        run: RunFolder,
        plan: Plan,
        skipped: SkippedLog,
        device: torch.device,
        interrupt: Interrupt,
    ) -> None:
        self.config, self.training, self.run, self.plan = config, config.training, run, plan
        self.skipped, self.device, self.interrupt = skipped, device, interrupt
        self.precision = choose_precision(self.training.precision, device)
        _check_batch(self.training.batch_size, self.training.accumulate)
        objective.check_batch(self.training.batch_size // self.training.accumulate)
        name = choose_strategy(self.training.strategy, objective, config.optim, device)
        self.strategy = make_strategy(name, objective, device, self.precision)
        set_up_backbones(objective, self.training, device, self.strategy.name)
        self.schedules = OptimSchedules.build(
            config.optim, self.training.batch_size, plan.total_steps, plan.steps_per_epoch
        )
        self.objective = self.strategy.place()
        self.objective.train()
        self.normalize = Normalize(spec).to(device)
        self.optimizer = make_optimizer(config.optim, self.objective)
        self.saver = Saver(run.checkpoints, self.training.keep_checkpoints)
        self.unreported: list[SkippedWindow] = []
        self.draws = self.all_draws = self.all_skips = 0

    def restore(self, resume: bool) -> int:
        """Load the newest checkpoint; returns the steps it has taken."""
        if not resume:
            if list_checkpoints(self.run.checkpoints):
                raise UsageError(
                    f"{self.run.path}: there is a run in this folder already.",
                    "Continue it with --resume, or choose another folder with --out.",
                )
            return 0

        def into(checkpoint: Checkpoint, stored: Mapping[str, Stored]) -> dict[str, Tensor]:
            check_same_run(checkpoint, self.config, self.plan)
            return targets(self.objective, self.optimizer, stored)

        found = find_latest(self.run.checkpoints, into)
        if found is None:
            if is_main():
                logger.info("There is no checkpoint yet, so the run starts from the beginning.")
            return 0
        restore_state(self.objective, self.optimizer, found.state)
        if is_main():
            logger.info("Resuming after step %d of %d.", found.checkpoint.step, self.plan.total_steps)
        return found.checkpoint.step

    def run_steps(
        self, loader: Callable[[int], Iterable[Batch]], start: int, probe: ProbeSet | None, report: ProgressReport
    ) -> TrainResult:
        total, training, every = self.plan.total_steps, self.training, self.config.monitor.every
        model = self.strategy.begin()
        if is_main():
            logger.info("%s on %s, %d rank(s), %s.", self.precision, self.device, world_size(), self.strategy.name)
            statistics = batch_statistics(self.objective) if training.accumulate > 1 else None
            if statistics is not None:
                logger.info(
                    "With training.accumulate %d, %s of '%s' are those of %d samples, not of the whole batch of %d.",
                    training.accumulate,
                    statistics,
                    self.objective.name,
                    training.batch_size // training.accumulate,
                    training.batch_size,
                )
        logger.debug("Parameter groups:\n%s", describe_groups(self.optimizer))
        done, last = start, dict[str, float]()
        stopped_by: signal.Signals | None = None
        previous: _Taken | None = None
        with ExitStack() as stack:
            log, monitor = self._open_log(stack, start), self._monitor(probe)
            watched = every > 0 and any(gather_objects(monitor is not None))
            if watched and start == 0:
                self._look(monitor, log, 0)
            batches = _closing(stack, on_device(loader(start), self.device)) if start < total else iter(())
            clock = _Clock(training.batch_size, self.device)
            for step in _closing(stack, report(range(start, total), total - start, "training")):
                batch = clock.next_batch(batches, step)
                taken = self.step(model, batch, step)
                done = step + 1
                logs = done in (1, total) or done % training.log_every == 0
                looks = watched and (done == total or done % every == 0)
                saves = done == total or done % training.checkpoint_every == 0
                # Elsewhere a GPU's outcomes are read one step late, so that the GPU never waits for the host.
                settled = taken if logs or looks or saves or self.device.type == "cpu" else previous
                previous = taken
                asked = None if settled is None else self._asked_to_stop(settled)
                stops = asked is not None and done < total
                if stops:
                    self._asked_to_stop(taken)
                    stopped_by = asked
                if logs or stops:
                    last = self._log(log, taken, clock)
                if logs or saves or stops:
                    self._report_skipped()
                if looks:
                    self._look(monitor, log, done)
                if saves or stops:
                    self._save(done)
                if stops:
                    break
            self.saver.wait()
        self.saver.close()
        if start == total and is_main():
            logger.info("The run is complete: all %d steps were taken before.", total)
        return TrainResult(done, stopped_by, checkpoint_path(self.run.checkpoints, done), last, self.strategy)

    def step(self, model: nn.Module, batch: Batch, step: int) -> _Taken:
        """One optimiser step: schedules, gradients of every micro-batch, clipping, update."""
        plan, optim = self.plan, self.config.optim
        context = StepContext(step, plan.total_steps, plan.steps_per_epoch, self.training.batch_size)
        # Randomness inside the network is a function of the step, so a resumed run draws what it would have drawn.
        torch.manual_seed(derive(self.config.seed, "step", step, rank()))
        lr, weight_decay = self.schedules.lr(step), self.schedules.weight_decay(step)
        apply_schedules(self.optimizer, lr, weight_decay, self.schedules.peak)

        values: dict[str, Tensor] = {}
        parts = split_batch(batch, self.training.accumulate)
        portions = shares(self.objective, parts, self.device)
        for number, (part, share) in enumerate(zip(parts, portions, strict=True), start=1):
            if self.training.compile:
                # Replayed CUDA graphs may overwrite what the last micro-batch left in their memory.
                torch.compiler.cudagraph_mark_step_begin()
            with self.strategy.accumulating(last=number == len(parts)):
                with autocast(self.precision, self.device):
                    losses = model(self.prepare_batch(part), context)
                (losses["loss"] * share).backward()
            for name, loss in losses.items():
                values[name] = values.get(name, 0.0) + loss.detach().float() * share

        self.strategy.average_rest()
        self.objective.before_update(context)
        values["grad_norm"] = self.strategy.clip(optim.clip_grad, optim.clip_per_parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.objective.after_update(context)

        self.unreported += batch.skipped
        self.draws += len(batch) + (0 if batch.support is None else len(batch.support))
        broken = ~torch.stack(list(values.values())).isfinite().all()
        asked = self.interrupt.requested
        told = torch.tensor([self.saver.failed, asked == signal.SIGINT, asked == signal.SIGTERM])
        flags = all_sum(torch.cat([broken[None], told.to(self.device, non_blocking=True)]).float())
        return _Taken(step + 1, values, flags, lr, weight_decay)

    def prepare_batch(self, batch: Batch) -> Batch:
        """On the device, with normalised views."""
        return batch.to(self.device).map_views(self.prepare_view)

    def prepare_view(self, view: View) -> View:
        return self.normalize.view(view.to(self.device))

    def _asked_to_stop(self, taken: _Taken) -> signal.Signals | None:
        """By what any rank was asked to stop by then.

        Raises:
            FmsuiteError: if a loss or a gradient of that step is not finite on any rank, or a checkpoint could not be
                written.
        """
        broken, unwritten, interrupts, terminations = taken.flags.tolist()
        if unwritten:
            self.saver.wait()
        if not broken:
            return signal.SIGTERM if terminations else signal.SIGINT if interrupts else None
        self.saver.settle()
        bad = [f"{name} is {value.item()}" for name, value in taken.values.items() if not value.isfinite()]
        saved = list_checkpoints(self.run.checkpoints)
        kept = f"{saved[0]} is intact." if saved else "No checkpoint had been written yet."
        precision = ", set training.precision=float32" if self.precision != "float32" else ""
        raise FmsuiteError(
            f"Training broke down at step {taken.done}: {', '.join(bad) or 'a value on another rank is not finite'}.",
            f"{kept} Lower optim.lr, lengthen optim.warmup, lower optim.clip_grad{precision}, "
            "and look for extreme values in the data (views.png).",
        )

    def _open_log(self, stack: ExitStack, start: int) -> MetricsLog | None:
        if not is_main():
            return None
        log = MetricsLog(self.run.metrics_path, self.run.tensorboard, start)
        stack.callback(log.close)
        self._said = float("-inf")
        return log

    def _log(self, log: MetricsLog | None, taken: _Taken, clock: _Clock) -> dict[str, float]:
        """One line of metrics; losses are means over ranks."""
        means = all_mean(torch.stack(list(taken.values.values()))).tolist()
        line = {name if name in ("loss", "grad_norm") else f"loss/{name}": v for name, v in zip(taken.values, means)}
        line |= {"lr": taken.lr, "weight_decay": taken.weight_decay, **clock.lap()}
        if log is not None:
            log.write(taken.done, line)
            if time.monotonic() - self._said >= LINE_EVERY_S:
                self._said = time.monotonic()
                logger.info(
                    "step %d of %d: loss %.4f, lr %.2e, gradient norm %.2f, %.1f samples/s, %.0f%% waiting for data",
                    taken.done,
                    self.plan.total_steps,
                    line["loss"],
                    taken.lr,
                    line["grad_norm"],
                    line["samples_per_second"],
                    100 * line["data_wait"],
                )
        return line

    def _monitor(self, probe: ProbeSet | None) -> Monitor | None:
        if probe is None or not self.config.monitor.every or not is_main():
            return None
        begun = next((m for m in read_metrics(self.run.metrics_path) if "features/rankme" in m), None)
        start = None if begun is None else (begun["features/rankme"], begun["features/std"])
        return Monitor(probe, self.config.monitor.knn_k, start)

    def _look(self, monitor: Monitor | None, log: MetricsLog | None, done: int) -> None:
        with self.strategy.whole(encoder_only=True) as objective:
            if monitor is None or objective is None:
                return
            with autocast(self.precision, self.device):
                found = monitor.look(objective, self.prepare_view, done)
        if log is not None:
            log.write(done, found.metrics())

    def _save(self, done: int) -> None:
        checkpoint = Checkpoint(done, plain_config(self.config), self.plan)
        self.saver.save(checkpoint, training_state(self.objective, self.optimizer))

    def _report_skipped(self) -> None:
        """Put every rank's replaced windows on record.

        Raises:
            FmsuiteError: in strict mode, or when they are too many.
        """
        gathered = gather_objects((self.draws, self.unreported))
        self.unreported, self.draws = [], 0
        for draws, windows in gathered:
            self.all_draws += draws + len(windows)
            self.all_skips += len(windows)
            for window in windows:
                if is_main() or self.skipped.strict:
                    self.skipped.add(window.source, window.stage, window.reason)
        if self.all_skips > self.training.max_skipped * max(self.all_draws, MIN_DRAWS):
            where = f" See {self.skipped.path}." if self.skipped.path is not None else ""
            raise FmsuiteError(
                f"{self.all_skips} of {self.all_draws} windows could not be read, more than training.max_skipped = "
                f"{self.training.max_skipped:g} allows.{where}",
                "Repair or remove those sources, or raise training.max_skipped.",
            )


class _Clock:
    """Measures throughput and how long the device waited for data, between one line of metrics and the next.

    A GPU still works while the loop waits for a batch, so there the wait is what lies, on the GPU's own clock, between
    the end of the step before and the arrival of the batch.
    """

    def __init__(self, batch_size: int, device: torch.device) -> None:
        self.batch_size = batch_size
        self.device = device
        self._begin()

    def _begin(self) -> None:
        self.started, self.waited, self.batches = time.monotonic(), 0.0, 0
        self.gaps: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def _mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def next_batch(self, batches: Iterator[Batch], step: int) -> Batch:
        before = time.monotonic()
        idle = self._mark() if self.device.type == "cuda" else None
        try:
            batch = next(batches)
        except StopIteration as error:
            raise FmsuiteError(f"The data ended at step {step}, before the end of the run.") from error
        if idle is None:
            self.waited += time.monotonic() - before
        else:
            self.gaps.append((idle, self._mark()))
        self.batches += 1
        return batch

    def lap(self) -> dict[str, float]:
        """Samples a second over all ranks, and the share of the time spent waiting on this one, since the last lap."""
        for idle, ready in self.gaps:
            ready.synchronize()
            self.waited += idle.elapsed_time(ready) / 1000
        elapsed = max(time.monotonic() - self.started, 1e-9)
        line = {"samples_per_second": self.batches * self.batch_size / elapsed, "data_wait": self.waited / elapsed}
        self._begin()
        return line


def _check_batch(batch_size: int, accumulate: int) -> None:
    if batch_size % (world_size() * accumulate):
        raise UsageError(
            f"training.batch_size {batch_size} cannot be divided over {world_size()} rank(s) and "
            f"training.accumulate {accumulate}.",
            f"Use a multiple of {world_size() * accumulate}.",
        )


def _closing(stack: ExitStack, items: Iterable) -> Iterator:
    """An iterator that is closed with the stack, if it can be: progress bars and loaders end before an error shows."""
    iterator = iter(items)
    close = getattr(iterator, "close", None)
    if close is not None:
        stack.callback(close)
    return iterator
