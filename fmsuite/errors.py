"""Errors that users see, and the suggestions that go with them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FmsuiteError(Exception):
    """Something the user can act on. The command line prints the message without a traceback.

    Args:
        message: what was wrong, naming the file or the key.
        hint: the way out, one sentence; appended to the message.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        self.message = message
        self.hint = hint
        super().__init__(f"{message} {hint}".strip())


class UsageError(FmsuiteError):
    """A wrong option, key, name or combination: found before any work was done."""

    exit_code = 2


class ReadFailure(FmsuiteError):
    """A source, or a window of one, that cannot be read.

    Readers raise this, and nothing else, for bad files; the caller records it in ``skipped.csv`` and goes on.

    Args:
        path: the file.
        stage: where it failed: ``"open"``, ``"metadata"``, ``"tissue"``, ``"read"``, ...
        reason: why, in words.
        hint: the way out.
    """

    def __init__(self, path: str, stage: str, reason: str, hint: str = "") -> None:
        self.path = str(path)
        self.stage = stage
        self.reason = reason
        super().__init__(f"{path}: {reason}", hint)

    def __reduce__(self) -> tuple:
        return ReadFailure, (self.path, self.stage, self.reason, self.hint)


def nearest(name: str, choices: Iterable[str]) -> str:
    """A ``did you mean`` sentence for a misspelt ``name``, followed by all the choices."""
    known = sorted(choices)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    suggestion = f"Did you mean '{close[0]}'? " if close else ""
    return f"{suggestion}Known: {', '.join(known) or 'none'}."
