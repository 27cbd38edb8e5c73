"""Installed domains by name. The core knows none; what it was told the name of, it can look up."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from fmsuite.errors import UsageError, nearest

ENTRY_POINT_GROUP = "fmsuite.domains"


def plugin_names() -> list[str]:
    """Names of the installed domains, without importing any."""
    return sorted({entry.name for entry in entry_points(group=ENTRY_POINT_GROUP)})


def load_plugin(name: str) -> Any:
    """The class of a domain, a ``fmsuite.domains.base.Domain``.

    Raises:
        UsageError: for an unknown name (with the nearest known one), or if the domain's libraries are not installed.
    """
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        if entry.name == name:
            try:
                return entry.load()
            except ModuleNotFoundError as error:
                if (error.name or "fmsuite").partition(".")[0] == entry.module.partition(".")[0]:
                    raise
                raise UsageError(
                    f"The domain '{name}' needs {error.name}, which is not installed.",
                    f"Install it with `pip install 'fmsuite[{name.replace('_', '-')}]'`.",
                ) from error
    raise UsageError(f"There is no domain '{name}'.", nearest(name, plugin_names()))
