"""``fmsuite pretrain --gpus N``: the same command in N processes of this machine, by PyTorch's elastic launcher."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import torch

from fmsuite.errors import UsageError

log = logging.getLogger("fmsuite")

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
"""What is passed on to the processes. PyTorch's launcher would give them 30 seconds and then kill them; it is left
SIGQUIT, as a way to end everything at once."""
STOPPED = "stopped"
FAILED = 1
_TAIL = 5
_inside = False


def is_inside() -> bool:
    """Whether this process is one that ``launch`` started."""
    return _inside


def check_gpus(processes: int) -> None:
    """
    Raises:
        UsageError: if there are fewer GPUs than that.
    """
    if torch.cuda.device_count() < processes:
        raise UsageError(
            f"--gpus {processes}: PyTorch sees {torch.cuda.device_count()} GPU(s) here.",
            "Ask for as many as there are; for processes on CPUs use torchrun with --set training.device=cpu.",
        )


def launch(arguments: Sequence[str], processes: int, restarts: int, logs: Path) -> int:
    """Run the console script with these arguments in several processes, and wait for them.

    A process that dies, or ends with code 1, ends the others; up to ``restarts`` times all are then started again and
    go on from the last checkpoint. A signal is passed on; the processes have as long as they need to save, and none is
    started again.

    Args:
        arguments: of the console script.
        logs: folder for the output of all processes but the first.

    Returns:
        The exit code of the first process; 1 if one of them failed.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _quieten("torch.distributed.elastic")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=restarts,
        logs_specs=DefaultLogsSpecs(str(logs), dict.fromkeys(range(1, processes), Std.ALL)),
        signals_to_handle="SIGQUIT",
    )
    with tempfile.TemporaryDirectory() as folder, _passing_on(Path(folder) / STOPPED):
        try:
            codes = elastic_launch(config, _rank)(list(arguments), folder)
        except ChildFailedError as error:
            _tell(error.failures)
            return FAILED
    return FAILED if FAILED in codes.values() else codes[0]


@contextmanager
def _passing_on(stopped: Path) -> Iterator[None]:
    """Signals go to the processes, and into a file for those that would be started after them."""

    def receive(number: int, frame: FrameType | None) -> None:
        stopped.write_text(str(int(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)))
        for process in multiprocessing.active_children():
            if process.pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, number)

    before = {number: signal.signal(number, receive) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _rank(arguments: list[str], folder: str) -> int:
    """One of the processes. What need not or must not be repeated (done, wrong use, stopped) counts as success to the
    launcher, which starts again whatever fails."""
    global _inside
    _inside = True
    from fmsuite import cli

    told, stopped = Path(folder) / os.environ["RANK"], Path(folder) / STOPPED
    if stopped.exists():
        # Something failed after the signal, or was ended by it before it could save.
        return int(told.read_text()) if told.exists() else 128 + int(stopped.read_text())
    sys.argv = ["fmsuite", *arguments]
    code = FAILED
    try:
        cli.main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0
    told.write_text(str(code))
    if code == FAILED:
        sys.exit(code)
    return code


def _tell(failures: dict) -> None:
    """Which process failed first, and where its last words are."""
    number, failure = min(failures.items(), key=lambda item: item[1].timestamp)
    how = f"by {signal.Signals(-failure.exitcode).name}" if failure.exitcode < 0 else f"with code {failure.exitcode}"
    file = Path(failure.error_file).with_name("stderr.log")
    log.error("Process %d of the run ended %s.", number, how)
    if file.exists():
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL:]
        log.error("Its last words (%s):\n%s", file, "\n".join(lines))


def _quieten(name: str) -> None:
    """The launcher's own account of its doings, tracebacks included; ``_tell`` says what matters."""
    for known in list(logging.root.manager.loggerDict):
        if known.startswith(name):
            logging.getLogger(known).setLevel(logging.CRITICAL)
