"""Processes that share a gloo group: started once a test run, when a test first asks for them."""

from __future__ import annotations

import gc
import pickle
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.forked import YOUNG, forkserver

PATIENCE = 120.0
"""Seconds for one call; the first starts the processes."""


class Ranks:
    """``ranks(function, *arguments)`` calls ``function(rank, *arguments)`` on each and returns what each gave.

    The function is one that its module can be asked for by name; arguments and results are pickled. Each call begins
    with the same seed. An error on a rank is raised here, with its traceback, and the next call starts new processes.

    Args:
        folder: where they find each other.
        count: how many.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self._folder = folder
        self._count = count
        self._started = 0
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        if not self._pipes:
            self._start()
        call = pickle.dumps((function, arguments))
        try:
            for pipe in self._pipes:
                pipe.send_bytes(call)
            return self._answers()
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        context = forkserver()
        self._started += 1
        store = self._folder / f"store{self._started}"
        for rank in range(self._count):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self._count, str(store), theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(mine)

    def _answers(self) -> list[Any]:
        found: dict[int, Any] = {}
        deadline = time.monotonic() + PATIENCE
        while len(found) < self._count:
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in found]
            ready = wait(waiting, deadline - time.monotonic())
            if not ready:
                raise TimeoutError(f"{self._count} ranks did not answer within {PATIENCE:.0f} s")
            for pipe in ready:
                rank = self._pipes.index(pipe)
                done, answer = pickle.loads(pipe.recv_bytes())
                if not done:
                    raise RuntimeError(f"rank {rank}:\n{answer}")
                found[rank] = answer
        return [found[rank] for rank in range(self._count)]

    def stop(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.terminate()
            process.join()
        self._pipes, self._processes = [], []


def _serve(rank: int, count: int, store: str, pipe: Connection) -> None:
    # What was imported stays; looking at it would also copy its pages.
    gc.freeze()
    gc.set_threshold(YOUNG)
    torch.set_num_threads(1)
    patience = timedelta(seconds=PATIENCE)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=patience)
    while True:
        try:
            call = pipe.recv_bytes()
        except EOFError:
            return
        torch.manual_seed(0)
        try:
            function, arguments = pickle.loads(call)
            answer = (True, function(rank, *arguments))
        except Exception:
            answer = (False, traceback.format_exc())
        pipe.send_bytes(pickle.dumps(answer))


def averaged(answers: Any) -> Any:
    """The mean over ranks of tensors, or of tuples, lists and dictionaries of them: what data-parallel training makes
    of losses and gradients."""
    first = answers[0]
    if isinstance(first, dict):
        return {name: averaged([answer[name] for answer in answers]) for name in first}
    if isinstance(first, tuple | list):
        return tuple(averaged(parts) for parts in zip(*answers, strict=True))
    return torch.stack(list(answers)).mean(0)
