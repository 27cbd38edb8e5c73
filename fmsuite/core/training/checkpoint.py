"""Checkpoints: folders that appear whole or not at all, and that only the run which wrote them is resumed from."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from fmsuite.core.config import RunConfig
from fmsuite.core.distributed import active, is_main, on_main
from fmsuite.core.training.checkpoint_files import DESCRIPTION, Reader, Stored, read_stored
from fmsuite.errors import FmsuiteError, UsageError

logger = logging.getLogger("fmsuite")

FORMAT_VERSION = 2
"""1 was one ``.pt`` file."""
_NAME = re.compile(r"step-(\d{8,})")

NAME = "objective.name"
FREE_KEYS = (
    "recipe",
    "monitor",
    "training.steps",
    "training.epochs",
    "training.device",
    "training.precision",
    "training.compile",
    "training.compile_mode",
    "training.strategy",
    "training.activation_checkpointing",
    "training.workers",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.log_every",
    "training.max_skipped",
)
"""Keys that may change on resume: they decide what is watched, kept and logged, and how the same steps are computed.
The length may be spelt otherwise (steps for epochs), but must come to the same number of steps: see ``Plan``."""


@dataclass(frozen=True)
class Plan:
    """The frame in which a run's schedules are computed. Every schedule is a function of the step within it, so a run
    is resumed only in the same one; to train longer, a new run starts from the finished encoder (``model.weights``)."""

    total_steps: int
    steps_per_epoch: int


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint says beside its tensors. There is no random state in it: all randomness is a function of the
    seed and the step.

    Attributes:
        step: optimiser steps taken.
        config: the resolved configuration as plain values.
        plan: the frame of its schedules.
    """

    step: int
    config: dict[str, Any]
    plan: Plan

    def to_json(self) -> str:
        """The text of ``checkpoint.json``."""
        plan = {"total_steps": self.plan.total_steps, "steps_per_epoch": self.plan.steps_per_epoch}
        return json.dumps({"format": FORMAT_VERSION, "step": self.step, **plan, "config": self.config}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Checkpoint:
        """
        Raises:
            ValueError: if it is no such text.
            FmsuiteError: if a newer version wrote it.
        """
        try:
            raw = json.loads(text)
            if raw["format"] > FORMAT_VERSION:
                raise FmsuiteError("The checkpoint is of a newer fmsuite.", "Upgrade fmsuite to resume from it.")
            plan = Plan(int(raw["total_steps"]), int(raw["steps_per_epoch"]))
            return cls(int(raw["step"]), dict(raw["config"]), plan)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{DESCRIPTION} is incomplete ({error})") from error


@dataclass
class Loaded:
    """A checkpoint with its tensors, by the names of ``state.py``."""

    checkpoint: Checkpoint
    state: dict[str, Tensor]


Targets = Callable[[Checkpoint, Mapping[str, Stored]], dict[str, Tensor]]
"""Given what a checkpoint holds, the tensors to read it into: whole ones, or ``DTensor`` for this rank's part only."""


class Damaged(FmsuiteError):
    """A checkpoint that cannot be read."""


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in a folder, newest first; what is still being written does not count."""
    found = [(int(match[1]), path) for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path} is not named like a checkpoint")
    return int(match[1])


def whole_tensors(checkpoint: Checkpoint, stored: Mapping[str, Stored]) -> dict[str, Tensor]:
    """Targets on the CPU, for whoever wants all of a checkpoint in one process."""
    return {name: torch.empty(each.shape, dtype=each.dtype) for name, each in stored.items()}


def load_checkpoint(path: Path, targets: Targets = whole_tensors) -> Loaded:
    """Read one checkpoint, on all ranks together: each reads what its targets need, however many ranks wrote it.

    Files are trusted with nothing: tensors are read as such, the rest is JSON, and the table that says where tensors
    are (a pickle, by PyTorch's design) is read by an unpickler that knows the types of such a table and nothing else.

    Raises:
        Damaged: on every rank, if it cannot be read on any.
        FmsuiteError: if a newer version wrote it.
    """

    def read_tables() -> tuple[Checkpoint, Any]:
        try:
            return Checkpoint.from_json((path / DESCRIPTION).read_text(encoding="utf-8")), read_stored(path)
        except (OSError, ValueError) as error:
            raise _damaged(path, error) from error

    checkpoint, metadata = on_main(read_tables)
    state = targets(checkpoint, {name: Stored.of(entry) for name, entry in metadata.state_dict_metadata.items()})
    # That there is no process group is known.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
    try:
        dcp.load(
            state,
            storage_reader=Reader(path, metadata),
            planner=dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            no_dist=not active(),
        )
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise _damaged(path, cause) from error
    return Loaded(checkpoint, state)


def _damaged(path: Path, error: BaseException) -> Damaged:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return Damaged(f"{path}: not a readable checkpoint ({reason}).")


def find_latest(folder: Path, targets: Targets = whole_tensors) -> Loaded | None:
    """The newest checkpoint that can be read, on all ranks together; ``None`` if there are none at all.

    One that cannot be read is named in a warning, and the one before it is taken.

    Raises:
        FmsuiteError: if there are checkpoints and none can be read (starting over in silence would hide that), or only
            those of an earlier version.
    """
    paths = on_main(lambda: _present(folder))
    for path in paths:
        try:
            return load_checkpoint(path, targets)
        except Damaged as error:
            if is_main():
                logger.warning("%s Trying the one before it.", error)
    if paths:
        raise FmsuiteError(
            f"{folder}: none of the {len(paths)} checkpoints can be read.",
            "Restore one from a backup, or start again in another folder.",
        )
    return None


def _present(folder: Path) -> list[Path]:
    paths = list_checkpoints(folder)
    if not paths and (old := sorted(folder.glob("step-*.pt"))):
        raise FmsuiteError(
            f"{old[-1]}: a checkpoint in the format of an earlier fmsuite (one file), which this one does not read.",
            "Finish the run with the fmsuite that began it, or start a new one in another folder.",
        )
    return paths


def check_same_run(checkpoint: Checkpoint, config: RunConfig, plan: Plan) -> None:
    """Refuse to continue a checkpoint with a configuration, a length or data that it was not begun with.

    Raises:
        UsageError: naming every key that differs, with both values.
    """
    differing = differences(checkpoint.config, plain_config(config))
    if differing:
        raise UsageError(
            f"The checkpoint of step {checkpoint.step} was made with another configuration: {'; '.join(differing)}.",
            "Resume with the original values, or start a new run in another folder.",
        )
    if checkpoint.plan.steps_per_epoch != plan.steps_per_epoch:
        raise UsageError(
            f"The checkpoint of step {checkpoint.step} was made on other data: {checkpoint.plan.steps_per_epoch} steps "
            f"were one pass over it, now {plan.steps_per_epoch} are.",
            "Resume on the original index, or start a new run in another folder.",
        )
    if checkpoint.plan.total_steps != plan.total_steps:
        raise UsageError(
            f"The run was begun with a length of {checkpoint.plan.total_steps} steps, and all its schedules follow "
            f"from that; it cannot go on as one of {plan.total_steps} (training.steps, training.epochs).",
            "Resume with the original length; to train longer, start a new run with model.weights set to this one.",
        )


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The keys that differ between two ``plain_config`` and may not, with both values. Of another objective only its
    name: that its options are others says nothing."""
    old, new = _flatten(before), _flatten(now)
    keys = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key) and not _is_free(key)]
    if NAME in keys:
        keys = [key for key in keys if key == NAME or not key.startswith("objective.")]
    return [f"{key} (was {old.get(key)!r}, is {new.get(key)!r})" for key in keys]


def plain_config(config: RunConfig) -> dict[str, Any]:
    """The configuration as JSON values under the keys of a recipe, as checkpoints hold it."""
    return config.to_recipe()


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
