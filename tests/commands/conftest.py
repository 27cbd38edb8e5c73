"""Running the command line in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from fmsuite import cli


@dataclass
class Ran:
    """How a command ended, and all that it printed, on one line."""

    code: int
    text: str


@pytest.fixture
def fmsuite(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """``fmsuite("tile", "--domain", ...)`` runs a command as the console script would."""

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["fmsuite", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return Ran(int(ended.value.code or 0), " ".join((captured.out + captured.err).split()))

    return run
