"""Runs commands in processes of their own, which are forked from one that has the slow imports behind it.

Reads one JSON request a line and answers each with one number: ``{"start": [argument, ...], "output": path,
"environment": {...}}`` with the process's id, ``{"wait": id}`` with how it ended (minus the signal's number where a
signal ended it).
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import sys

import torch

from fmsuite import cli

SLOW = (
    *(f"fmsuite.commands.{name}" for name in ("embed", "launch", "pretrain", "tile")),
    "fmsuite.domains.pathology.domain",
    "pandas",
    "pyarrow.dataset",
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
    sys.argv = ["fmsuite", *request["start"]]
    cli.main()


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
