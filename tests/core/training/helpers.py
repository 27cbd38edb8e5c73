"""A toy backbone, objective and data source whose every number is a function of the seed."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from fmsuite.core.backbones.base import Backbone, Features
from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.config import RunConfig
from fmsuite.core.data.sample import Batch, SkippedWindow, View, ViewRequest
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.distributed import process_group, rank, world_size
from fmsuite.core.inputs import Channel, InputSpec
from fmsuite.core.objectives.base import Objective, ObjectiveConfig, StepContext
from fmsuite.core.seeding import generator
from fmsuite.core.tokens import PatchGrid
from fmsuite.core.training.checkpoint import load_checkpoint
from fmsuite.core.training.config import MonitorConfig, OptimConfig, TrainingConfig
from fmsuite.core.training.loop import RunFolder, TrainResult, train

SIZE, PATCH, WIDTH, CLASSES = 8, 4, 12, 3
SPEC = InputSpec(
    axes=("y", "x"), size=(SIZE, SIZE), channels=(Channel(name="grey", mean=0.5, std=0.25),), scale=1 / 255
)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.fc = nn.Linear(WIDTH, WIDTH)
        self.gamma = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * torch.tanh(self.fc(self.norm(x)))


class ToyBackbone(Backbone):
    """Patches, a class token, two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.spec, self.grid, self.width, self.depth = SPEC, PatchGrid.build(SPEC, PATCH), WIDTH, 2
        self.patch_embed = nn.Conv2d(1, WIDTH, PATCH, PATCH)
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH) * 0.02)
        self.unused_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.randn(1, (SIZE // PATCH) ** 2, WIDTH) * 0.02)
        self.blocks = nn.ModuleList(Block() for _ in range(self.depth))
        self.norm = nn.LayerNorm(WIDTH)

    @property
    def has_cls(self) -> bool:
        return True

    def forward(self, view: View, **_: object) -> Features:
        x = self.patch_embed(view.pixels).flatten(2).transpose(1, 2) + self.pos_embed
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
            x[:, :1] = x[:, :1] + x[:, 1:].mean(1, keepdim=True)
        x = self.norm(x)
        return Features(x[:, 1:], self.layout(view), cls=x[:, 0])

    def transformer_blocks(self) -> list[nn.Module]:
        return list(self.blocks)

    def layer_of(self, parameter: str) -> int:
        if parameter.startswith("blocks."):
            return int(parameter.split(".")[1]) + 1
        return self.depth + 1 if parameter.startswith("norm") else 0


class ToyConfig(ObjectiveConfig):
    dropout: float = 0.0
    poison_step: int = -1


class ToyObjective(Objective):
    """Classification of the patches' means, an EMA teacher to agree with, a centre buffer: state of every kind."""

    name = "toy"
    Config = ToyConfig
    config: ToyConfig

    def __init__(self, config: ToyConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.dropout = nn.Dropout(config.dropout)
        self.teacher = ToyBackbone().requires_grad_(False)
        self.teacher.load_state_dict(backbone.state_dict())
        self.register_buffer("updates", torch.zeros(1))

    def view_requests(self) -> tuple[ViewRequest, ...]:
        return (ViewRequest("views", (SIZE, SIZE), count=2),)

    def forward(self, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        first, second = batch.views["views"]
        student = self.backbone(first).cls
        with torch.no_grad():
            target = self.teacher(second).cls
        agree = (student - target).square().mean()
        classify = nn.functional.cross_entropy(self.head(self.dropout(student)), batch.labels)
        if context.step == self.config.poison_step:
            agree = agree * torch.nan
        return {"loss": agree + classify, "agree": agree, "classify": classify}

    @torch.no_grad()
    def after_update(self, context: StepContext) -> None:
        self.updates += 1
        for old, new in zip(self.teacher.parameters(), self.backbone.parameters(), strict=True):
            old.lerp_(new, 0.1)

    @property
    def encoder(self) -> Backbone:
        return self.teacher


class NoOptions(BaseModel):
    """A domain without options."""


def make_config(
    total: int = 12,
    batch_size: int = 8,
    optim: dict | None = None,
    monitor: dict | None = None,
    objective: dict | None = None,
    seed: int = 3,
    **training: object,
) -> RunConfig:
    return RunConfig(
        recipe="toy",
        domain="toy",
        seed=seed,
        data=NoOptions(),
        model=ModelConfig(),
        objective="toy",
        objective_options=ToyConfig(**(objective or {})),
        optim=OptimConfig(**{"lr": 3e-3, "warmup": 3, "clip_grad": 1.0, "weight_decay_end": 0.4, **(optim or {})}),
        training=TrainingConfig(
            **{
                "steps": total,
                "batch_size": batch_size,
                "device": "cpu",
                "checkpoint_every": 4,
                "log_every": 2,
                **training,
            }
        ),
        monitor=MonitorConfig(**{"every": 0, **(monitor or {})}),
    )


def make_objective(config: RunConfig) -> ToyObjective:
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        assert isinstance(config.objective_options, ToyConfig)
        return ToyObjective(config.objective_options, ToyBackbone())


def make_batch(seed: int, step: int, rows: range) -> Batch:
    """Rows of the global batch of a step: brighter with the class."""
    pixels, labels = [], []
    for row in rows:
        rng = generator(seed, "toy", step, row)
        label = int(rng.integers(CLASSES))
        pixels.append(rng.integers(0, 160, (2, 1, SIZE, SIZE)) + 40 * label)
        labels.append(label)
    stacked = torch.stack([torch.from_numpy(p) for p in pixels]).to(torch.uint8)
    views = [View(stacked[:, number]) for number in range(2)]
    return Batch({"views": views}, torch.tensor(list(rows)), torch.tensor(labels))


def make_loader(config: RunConfig, at: Callable[[int], None] = lambda step: None) -> Callable[[int], Iterator[Batch]]:
    """This rank's share of the toy stream; ``at(step)`` is called before each batch."""

    def loader(start: int) -> Iterator[Batch]:
        share = config.training.batch_size // world_size()
        step = start
        while True:
            at(step)
            yield make_batch(config.seed, step, range(rank() * share, (rank() + 1) * share))
            step += 1

    return loader


def run_toy(
    folder: Path,
    config: RunConfig,
    *,
    resume: bool = False,
    objective: Objective | None = None,
    at: Callable[[int], None] = lambda step: None,
    loader: Callable[[int], Iterable[Batch]] | None = None,
    skipped: SkippedLog | None = None,
    **options: object,
) -> TrainResult:
    return train(
        objective or make_objective(config),
        loader or make_loader(config, at),
        config,
        SPEC,
        RunFolder(folder),
        total_steps=config.training.steps or 1,
        steps_per_epoch=5,
        skipped=SkippedLog() if skipped is None else skipped,
        resume=resume,
        **options,  # type: ignore[arg-type]
    )


def skipped_window(number: int) -> SkippedWindow:
    return SkippedWindow(f"slide{number}.svs", "read", "corrupt tile", number)


def final_state(folder: Path, step: int) -> dict[str, Tensor]:
    return load_checkpoint(folder / "checkpoints" / f"step-{step:08d}").state


def main(arguments: Sequence[str]) -> None:
    """A toy run as a process of its own, for tests that kill it or start several ranks."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--stop-at", type=int, default=-1)
    parser.add_argument("--kill-with", type=int, default=9)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--skip", action="store_true")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO)
    torch.set_num_threads(1)

    def stop(step: int) -> None:
        if step == options.stop_at and rank() == world_size() - 1:
            os.kill(os.getpid(), options.kill_with)

    config = make_config(options.steps, accumulate=options.accumulate, objective={"dropout": options.dropout})
    with process_group(torch.device("cpu")):
        base = make_loader(config, stop)

        def loader(start: int) -> Iterator[Batch]:
            for step, batch in enumerate(base(start), start=start):
                if options.skip and step == 1:
                    batch.skipped.append(skipped_window(rank()))
                yield batch

        log = SkippedLog(options.folder / "skipped.csv" if rank() == 0 else None)
        result = run_toy(options.folder, config, resume=options.resume, loader=loader, skipped=log)
        if rank() == 0:
            (options.folder / "result.txt").write_text(f"{result.step} {result.interrupted}")
