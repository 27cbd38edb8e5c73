"""Work on many units at once: in this process, in processes of this machine, or over a Ray cluster."""

from __future__ import annotations

from fmsuite.core.pool.run import run_units
from fmsuite.core.pool.work import ONE_CORE, Outcome, Resources, Work, WorkerLost, slot

__all__ = ["ONE_CORE", "Outcome", "Resources", "Work", "WorkerLost", "run_units", "slot"]
