"""The application that commands join."""

from __future__ import annotations

import logging
import os
from typing import Annotated

import typer
from rich.logging import RichHandler

from fmsuite import __version__
from fmsuite.cli.output import console, out_console

app = typer.Typer(
    help="Pretrain, adapt and judge vision foundation models for slides, volumes, rasters and vector graphics.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done; 1 failed; 2 wrong use; 3 done, with sources skipped; 130 interrupted; 143 "
    "terminated, after saving.",
)


@app.callback()
def _common(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and debug messages.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", is_eager=True, callback=lambda on: _version(on))
    ] = False,
) -> None:
    # Rich folds lines at the terminal's width, which would break them in a log file.
    pretty = console.is_terminal
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.WARNING,
        format="%(message)s" if pretty else "%(levelname)s %(message)s",
        handlers=[RichHandler(console=console, show_path=False, show_time=False)] if pretty else None,
        force=True,
    )
    # Of several processes the first one tells what goes on, and every one what went wrong.
    usual = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.getLogger("fmsuite").setLevel(logging.DEBUG if debug else usual)


def _version(on: bool) -> None:
    if on:
        out_console.print(f"fmsuite {__version__}")
        raise typer.Exit
