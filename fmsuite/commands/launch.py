"""``fmsuite pretrain --gpus N``: the same command in N processes of this machine, by PyTorch's elastic launcher."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fmsuite.errors import UsageError

log = logging.getLogger("fmsuite")

PATIENCE_S = 3600
"""Seconds that processes have to save after a signal; PyTorch's launcher alone would kill them after 30."""
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
"""What the launcher passes on to the processes."""
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
    go on from the last checkpoint. A signal is passed on, the processes have an hour to save, and none is started
    again.

    Args:
        arguments: of the console script.
        logs: folder for the output of all processes but the first.

    Returns:
        The exit code of the first process; 1 if one of them failed.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _quieten("torch.distributed.elastic")
    # Older PyTorch knows no other patience than its 30 seconds.
    patience: dict[str, Any] = {"shutdown_timeout": PATIENCE_S} if hasattr(LaunchConfig, "shutdown_timeout") else {}
    cores = os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
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
        signals_to_handle=SIGNALS,
        **patience,
    )
    stopped: signal.Signals | None = None
    with tempfile.TemporaryDirectory() as folder:
        try:
            elastic_launch(config, _rank)(list(arguments), folder)
        except SignalException as error:
            stopped = error.sigval
        except ChildFailedError as error:
            _tell(error.failures)
            return FAILED
        codes = [int(path.read_text()) for path in sorted(Path(folder).iterdir(), key=lambda path: int(path.name))]
    if FAILED in codes:
        return FAILED
    if len(codes) == processes:
        return codes[0]
    # Ended by the signal itself, before there was anything to save.
    return 128 + (signal.SIGINT if stopped == signal.SIGINT else signal.SIGTERM)


def _rank(arguments: list[str], folder: str) -> int:
    """One of the processes. What need not or must not be repeated (done, wrong use, stopped) counts as success to the
    launcher, which starts again whatever fails."""
    global _inside
    _inside = True
    from fmsuite import cli

    told = Path(folder) / os.environ["RANK"]
    told.unlink(missing_ok=True)
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
