"""The commands: parse, call, print. What they do is in ``fmsuite.commands``."""

from __future__ import annotations

import signal
import sys
import traceback
from typing import Any

import typer
from rich.markup import escape

# isort: off
# In the order in which help lists their commands.
from fmsuite.cli import windows, training, judging  # noqa: F401

# isort: on
from fmsuite.cli.application import app
from fmsuite.cli.output import DONE, FAILED, INTERRUPTED, WRONG_USE, console
from fmsuite.errors import FmsuiteError

# Typer brings its own copy of click, or uses the installed one, as its version has it.
WrongLine: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def _without_traceback(text: str) -> str:
    """The message of an error from a data worker, into which torch has written the worker's traceback."""
    _, quoted, trace = text.partition("Original Traceback (most recent call last):\n")
    return " ".join(line for line in trace.splitlines() if line and not line.startswith(" ")) if quoted else text


def _interrupted() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    console.print("interrupted", highlight=False)


def main() -> None:
    """The console script: errors become one message and an exit code; a traceback appears only with ``--debug``."""
    debug = "--debug" in sys.argv
    if debug:  # allowed anywhere on the line, not only before the command
        sys.argv = [sys.argv[0], "--debug", *(argument for argument in sys.argv[1:] if argument != "--debug")]
    try:
        code = app(standalone_mode=False)
        # typer turns Ctrl-C into this code.
        if code == INTERRUPTED:
            _interrupted()
    except WrongLine as error:
        error.show()
        code = WRONG_USE
    except FmsuiteError as error:
        if debug:
            traceback.print_exc()
        console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        code = error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        _interrupted()
        code = INTERRUPTED
    except OSError as error:
        if debug:
            traceback.print_exc()
        where = f"{error.filename}: " if error.filename else ""
        text = f"{where}{error.strerror or error}."
        console.print(f"[bold red]error:[/] {escape(text)}", highlight=False, soft_wrap=True)
        code = FAILED
    except Exception as error:
        if debug:
            traceback.print_exc()
        notes = " ".join(getattr(error, "__notes__", []))
        text = f"unexpected {type(error).__name__}: {_without_traceback(str(error))} {notes}".strip()
        console.print(f"[bold red]error:[/] {escape(text)}", highlight=False, soft_wrap=True)
        console.print("This is a defect; `--debug` shows where it happened.", highlight=False)
        code = FAILED
    sys.exit(code if isinstance(code, int) else DONE)
