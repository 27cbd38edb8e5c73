"""Runs commands in processes of their own, which are forked from one that has the slow imports behind it.

Reads one JSON request a line and answers each with one number: ``{"start": [argument, ...], "by": "fmsuite", "output":
path, "environment": {...}}`` with the process's id, ``{"wait": id}`` with how it ended (minus the signal's number where
a signal ended it). What starts are the console script (``fmsuite``), ``torchrun``, or ``launch``: the package's own
launcher, with the number of processes, that of restarts and the folder of logs before the console script's arguments.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import sys
from pathlib import Path

import torch

from fmsuite import cli

SLOW = (
    *(f"fmsuite.commands.{name}" for name in ("embed", "launch", "pretrain", "tile")),
    "fmsuite.domains.pathology.domain",
    "pandas",
    "pyarrow.dataset",
    "torch.distributed.run",
    "torch._dynamo",
    "torch.utils.tensorboard",
)
"""What commands, and libraries at their first use, import."""


def become(request: dict) -> None:
    """Turn this process into the console script; does not return."""
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(request["environment"])
    atexit.register(gc.unfreeze)
    STARTS[request["by"]](request["start"])
    sys.exit()


def console(arguments: list[str]) -> None:
    sys.argv = ["fmsuite", *arguments]
    cli.main()


def launch(arguments: list[str]) -> None:
    from fmsuite.commands.launch import launch

    processes, restarts, logs, *others = arguments
    sys.exit(launch(others, int(processes), int(restarts), Path(logs)))


def torchrun(arguments: list[str]) -> None:
    from torch.distributed.run import main

    main(arguments)


STARTS = {"fmsuite": console, "launch": launch, "torchrun": torchrun}


def serve() -> None:
    torch.set_num_threads(1)
    for name in SLOW:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    # The collector of a forked process need not look at them, nor copy their pages.
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            answer = os.fork()
            if answer == 0:
                become(request)
        else:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
