"""Processes that start in hundredths of a second."""

from __future__ import annotations

import multiprocessing
import sys
from multiprocessing.context import ForkServerContext

YOUNG = 50_000
"""Objects between two looks of the garbage collector, whose 700 would take a tenth of the time of every test."""


def forkserver() -> ForkServerContext:
    """Its processes are forked from one that has imported what this one has of the package.

    There is one such server, and it imports what is asked when it starts: this is also what the pool of the package
    (``core.pool.processes``) asks, so that it does not matter which test is first.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([name for name in sorted(sys.modules) if name.partition(".")[0] == "fmsuite"])
    return context
