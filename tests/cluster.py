"""A Ray cluster of two workers on this machine, for all tests that need one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATIENCE_S = 90.0


@contextmanager
def ray_cluster(folder: Path, cpus: int = 2) -> Iterator[str]:
    """The address of a cluster that has so many cores to give; it ends with the block.

    Args:
        folder: for the cluster's files; a path of few characters, as sockets lie in it.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Otherwise a token in the home directory would decide, and be made where there is none.
    os.environ["RAY_AUTH_MODE"] = "disabled"
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
    }
    options = {
        "node-ip-address": "127.0.0.1",
        "port": port,
        "num-cpus": cpus,
        "num-gpus": 0,
        "object-store-memory": 200_000_000,
        "include-dashboard": "false",
        "temp-dir": folder,
    }
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    with (folder / "ray.log").open("w") as log:
        process = subprocess.Popen(
            [*command, *(f"--{name}={value}" for name, value in options.items())],
            env=environment,
            stdout=log,
            stderr=log,
        )
    try:
        end = time.monotonic() + PATIENCE_S
        while "runtime started" not in (folder / "ray.log").read_text():
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError((folder / "ray.log").read_text())
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(PATIENCE_S)
