"""Workers that are actors of a Ray cluster.

Every actor answers one question at a time, what it has to say, so that a result stays where it was made until the desk
asks for it. A worker that dies is replaced by the desk, as a local process is, and not by Ray, which does not know its
units.
"""

from __future__ import annotations

import logging
import math
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fmsuite.core.pool.desk import Died
from fmsuite.core.pool.messages import Give, Pause, Stop
from fmsuite.core.pool.work import Resources, Work
from fmsuite.core.pool.worker import Channel, forward_logs, log_levels, serve
from fmsuite.errors import UsageError

log = logging.getLogger("fmsuite")
_DETAIL = re.compile(r"Worker exit detail: (.*?)\.(?: |$)")

ANSWER_S = 10.0
"""How long a cluster may take to accept a connection."""
_LOOK_S = 1.0
_ROOM_S = 60.0
"""After so long without any worker, the log says so: the cluster may be full."""


class RayActors:
    """A ``Crew`` of Ray actors.

    Args:
        make: builds the work.
        size: how many actors at most.
        asked: how many the user wants; 0 for as many as there is room for.
        address: ``HOST:PORT`` of a cluster, ``auto`` or ``local``.
        resources: of each.

    Raises:
        UsageError: if Ray is not installed, the address does not answer, or no node could hold a worker.
    """

    def __init__(self, make: Callable[[], Work], size: int, asked: int, address: str, resources: Resources) -> None:
        try:
            import ray
        except ImportError as error:
            raise UsageError("Ray is not installed.", "pip install 'fmsuite[ray]'") from error
        self.ray = ray
        self.resources = resources
        self.actors: dict[int, Any] = {}
        self.saying: dict[Any, int] = {}
        self.heard = False
        self.started = time.monotonic()
        main = threading.current_thread() is threading.main_thread()
        # Ray puts its own in the place of this process's.
        self.on_terminate = signal.getsignal(signal.SIGTERM) if main else None
        self.joined = not ray.is_initialized()
        if self.joined:
            _join(ray, address, asked, resources)
        try:
            self.size = min(size, asked or self._room(address))
            self.make = ray.put(make)
            self.actor = ray.remote(_Actor).options(
                num_cpus=resources.cpus,
                num_gpus=resources.gpus,
                # One call says what there is, another brings a unit meanwhile.
                max_concurrency=2,
                max_restarts=0,
            )
        except BaseException:
            self.close(False)
            raise

    def _room(self, address: str) -> int:
        held = self.ray.cluster_resources()
        wanted = {"CPU": self.resources.cpus, "GPU": self.resources.gpus}
        room = min(int(held.get(name, 0) / amount) for name, amount in wanted.items() if amount)
        if room < 1:
            asked = " and ".join(f"{amount:g} {name}" for name, amount in wanted.items() if amount)
            has = ", ".join(f"{held.get(name, 0):g} {name}" for name in wanted)
            raise UsageError(
                f"The Ray cluster {address} has {has}: no room for a worker of {asked}.",
                "Add nodes, or use --device cpu where it is a GPU that is missing.",
            )
        return room

    def start(self, place: int) -> None:
        self.actors[place] = self.actor.remote(self.make, self.resources, log_levels())
        self._ask(place)

    def _ask(self, place: int) -> None:
        self.saying[self.actors[place].say.remote()] = place

    def give(self, place: int, message: Give | Pause | Stop) -> None:
        # Whatever becomes of the call, the next answer of the actor tells.
        self.actors[place].hear.remote(message)

    def events(self) -> Iterator[tuple[int, Any]]:
        ready: list[Any] = []
        while not ready:
            ready, _ = self.ray.wait(list(self.saying), num_returns=1, timeout=_LOOK_S)
            self._say_if_nothing_fits()
        for answer in ready:
            place = self.saying.pop(answer)
            try:
                message = self.ray.get(answer)
            except self.ray.exceptions.RayTaskError:
                raise
            except self.ray.exceptions.RayError as error:
                yield place, Died(_how(error))
            else:
                self.heard = True
                self._ask(place)
                yield place, message

    def _say_if_nothing_fits(self) -> None:
        if not self.heard and time.monotonic() - self.started > _ROOM_S:
            self.heard = True
            log.warning("For %d s no worker has started on the Ray cluster; still waiting.", _ROOM_S)

    def discard(self, place: int) -> None:
        self.ray.kill(self.actors.pop(place))
        self.saying = {answer: other for answer, other in self.saying.items() if other != place}

    def close(self, orderly: bool) -> None:
        try:
            for place in list(self.actors):
                self.discard(place)
        finally:
            if self.joined:
                # Ends the cluster too, if it was started for this.
                self.ray.shutdown()
                if self.on_terminate is not None:
                    signal.signal(signal.SIGTERM, self.on_terminate)


def _how(error: Exception) -> str:
    """What Ray says of a death, without its advice."""
    said = " ".join(str(error).split())
    found = _DETAIL.search(said)
    return f"its Ray worker died ({found.group(1) if found else said[:300]})"


def _join(ray: Any, address: str, asked: int, resources: Resources) -> None:
    """
    Raises:
        UsageError: if nothing answers there.
    """
    options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        options |= {"include_dashboard": False, "num_cpus": max(cores, math.ceil(asked * resources.cpus))}
    elif address != "auto":
        _knock(address)
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise UsageError(
            f"--ray {address}: there is no cluster to join ({' '.join(str(error).split())}).",
            "Start one with `ray start --head`, give its address as HOST:PORT, or use --ray local. A cluster that asks "
            "for a token (~/.ray/auth_token) is joined with RAY_AUTH_MODE=token in the environment.",
        ) from error


def _knock(address: str) -> None:
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdigit() or "://" in address:
        raise UsageError(
            f"--ray {address}: not an address of a cluster.",
            "Give HOST:PORT as `ray start --head` prints it, auto, or local; run this on one of the cluster's nodes.",
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S).close()
    except OSError as error:
        raise UsageError(
            f"--ray {address}: nothing answers there ({error}).",
            "Check the address that `ray start --head` printed, and that this machine can reach it.",
        ) from error


class _Actor:
    """The worker's end: its work runs in a thread, while calls carry its messages."""

    def __init__(self, make: Callable[[], Work], resources: Resources, levels: dict[str, int]) -> None:
        torch.set_num_threads(max(1, int(resources.cpus)))
        self.channel = Channel()
        forward_logs(self.channel, levels)
        threading.Thread(target=serve, args=(self.channel, make), daemon=True).start()

    def say(self) -> Any:
        """The next message; waits for it."""
        return self.channel.outbox.get()

    def hear(self, message: Any) -> None:
        self.channel.inbox.put(message)
