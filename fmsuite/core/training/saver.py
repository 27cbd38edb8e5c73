"""Writes checkpoints while the training goes on."""

from __future__ import annotations

import shutil
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor

from fmsuite.core.distributed import extra_group, gather_objects, is_lost_peer, is_main, rank, world_size
from fmsuite.core.training.checkpoint import Checkpoint, checkpoint_path, list_checkpoints, step_of
from fmsuite.core.training.checkpoint_files import Writer, partial_of, remove_checkpoint, remove_leftovers
from fmsuite.errors import FmsuiteError

GIVE_UP_S = 10.0
"""Seconds that an unwritten checkpoint is waited for when the run ends by an error."""


class Saver:
    """``save`` copies the state to the host's memory and returns; a thread writes the copy. Every rank has one, and
    writes the shards that it holds and its share of the tensors that all ranks hold.

    Only one checkpoint is written at a time: ``save`` waits for the one before. Older ones than the newest ``keep`` are
    removed when a new one is complete. Used on all ranks at the same points.

    Args:
        folder: of the run's checkpoints.
        keep: how many stay.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep
        if is_main():
            remove_leftovers(folder)
        # That there is no process group is known.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        self._group = extra_group()
        on_cuda = torch.cuda.is_available()
        self._stager = DefaultStager(StagingOptions(on_cuda, False, False, on_cuda))
        self._thread: threading.Thread | None = None
        self._target = folder
        self._failure: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Whether this rank knows by now that the last checkpoint could not be written."""
        return self._failure is not None

    def save(self, checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> None:
        """
        Raises:
            FmsuiteError: on every rank, if the checkpoint before could not be written.
        """
        self.wait()
        mine = {
            name: value.detach()
            for number, (name, value) in enumerate(state.items())
            if isinstance(value, DTensor) or number % world_size() == rank()
        }
        staged = cast(dict[str, Any], self._stager.stage(mine))
        self._target = checkpoint_path(self.folder, checkpoint.step)
        writer = Writer(self._target, checkpoint.to_json(), self._prune)
        self._thread = threading.Thread(target=self._write, args=(staged, writer), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the last checkpoint is complete.

        Raises:
            FmsuiteError: on every rank, if it could not be written (a full disk, say); older ones are untouched then.
        """
        if self._thread is None:
            return
        self.settle()
        self._thread = None
        failure, self._failure = self._failure, None
        failures = [each for each in gather_objects(None if failure is None else _reason(failure)) if each is not None]
        if failures:
            raise _write_error(self.folder, self._target, failures[0])

    def settle(self, patience: float | None = None) -> None:
        """Until nothing is being written on this rank, whatever became of it.

        Args:
            patience: seconds at most; ``None`` for as long as it takes.
        """
        if self._thread is not None:
            self._thread.join(patience)

    def close(self) -> None:
        """Give back the memory of the copies; a checkpoint that is still being written gets a moment to be finished."""
        self.settle(GIVE_UP_S)
        if self._thread is None or not self._thread.is_alive():
            self._stager.close()

    def _write(self, state: dict[str, Any], writer: Writer) -> None:
        try:
            dcp.save(
                state,
                storage_writer=writer,
                planner=dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                process_group=self._group,
                no_dist=self._group is None,
            )
        except BaseException as error:  # CheckpointException is no Exception.
            if is_main():
                shutil.rmtree(partial_of(self._target), ignore_errors=True)
            self._failure = error

    def _prune(self) -> None:
        for old in list_checkpoints(self.folder)[self.keep :]:
            remove_checkpoint(old)


def _reason(error: BaseException) -> str:
    """Why, in words that fit behind a file's name."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    if is_lost_peer(error):
        return "another process of the run has ended"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return f"{type(error).__name__}: {error}"


def _write_error(folder: Path, target: Path, reason: str) -> FmsuiteError:
    kept = list_checkpoints(folder)
    if kept:
        way_out = f"{kept[0].name} is intact: free some space and run again with --resume to continue from step "
        way_out += f"{step_of(kept[0])}."
    else:
        way_out = "No earlier checkpoint exists: free some space and start again."
    return FmsuiteError(f"{target}: the checkpoint could not be written ({reason}).", way_out)
