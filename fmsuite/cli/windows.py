"""Commands about windows: found, copied, made up."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fmsuite.cli.application import app
from fmsuite.cli.options import (
    DomainName,
    Mpp,
    Overrides,
    Strict,
    with_mpp,
)
from fmsuite.cli.output import finish, say
from fmsuite.core.training.progress import console_progress
from fmsuite.errors import FmsuiteError, UsageError


@app.command()
def tile(
    domain: DomainName,
    paths: Annotated[list[Path], typer.Argument(help="Files and folders.")],
    out: Annotated[Path, typer.Option(help="The index: a .parquet file, or a folder for index.parquet.")],
    recipe: Annotated[str | None, typer.Option(help="Find the windows that this recipe trains on.")] = None,
    preview: Annotated[bool, typer.Option("--preview", help="Draw where the windows are.")] = False,
    processes: Annotated[
        int | None,
        typer.Option(
            help="That look at sources; 0: none but this. If absent, one a core where that is worth their start.",
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Look at sources on this Ray cluster: auto, local or HOST:PORT."),
    ] = None,
    mpp: Mpp = None,
    overrides: Overrides = None,
    strict: Strict = False,
) -> None:
    """Find the windows worth looking at, and write their index. Run again after an interruption, it does what is
    missing."""
    from fmsuite.commands.tile import tile as run

    result = run(
        domain,
        paths,
        out,
        recipe=recipe,
        overrides=with_mpp(overrides, mpp, ""),
        preview=preview,
        strict=strict,
        processes=processes,
        ray=ray,
        progress=console_progress,
    )
    say(f"{len(result.index)} windows from {len(result.index.sources)} sources: {result.path}")
    for note in result.index.metadata.get("notes", []):
        say(note)
    if result.previews:
        say(f"{len(result.previews)} previews: {result.previews[0].parent}")
    finish(result.skipped.summary())


@app.command()
def pack(
    out: Annotated[Path, typer.Option(help="Folder of the packed copy; its index.parquet then stands for --index.")],
    index: Annotated[Path | None, typer.Option(help="The index of `fmsuite tile`.")] = None,
    whole: Annotated[
        bool,
        typer.Option("--whole", help="Copy all of each source that its windows cover: windows can then lie anywhere."),
    ] = False,
    half: Annotated[bool, typer.Option("--half", help="Keep values of whole sources in half precision.")] = False,
    processes: Annotated[int, typer.Option(min=0, help="That read and write, a shard each; 0: this one alone.")] = 0,
    shard_windows: Annotated[
        int | None, typer.Option(min=1, help="Windows in a shard; as many as half a gigabyte holds, if absent.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Only check the files of a packed copy.")] = False,
    strict: Strict = False,
) -> None:
    """Copy an index's windows, or its sources whole, into a few large files. Run again, it does what is missing."""
    from fmsuite.commands import pack as command

    if verify:
        if index is not None or whole or half or shard_windows is not None or processes or strict:
            raise UsageError("--verify only checks what is in --out.", "Leave out the other options.")
        damaged = command.check(out, console_progress)
        for name, wrong in damaged:
            say(f"{out / name}: {wrong}")
        if damaged:
            raise FmsuiteError(
                f"{len(damaged)} files of the packed copy are damaged.",
                "Delete them and run the same `fmsuite pack` again: only their shards are made anew.",
            )
        say(f"All files of {out} are as they were written.")
        return
    if index is None:
        raise UsageError("--index is needed: what to pack.")
    result = command.pack(
        index,
        out,
        whole=whole,
        half=half,
        shard_windows=shard_windows,
        processes=processes,
        strict=strict,
        progress=console_progress,
    )
    written, total = result.shards
    packed = f"{len(result.index.sources)} whole sources" if whole else f"{len(result.index)} windows"
    say(f"{packed} in {total} shards, {written} of them written now: {result.path}")
    finish(result.skipped.summary())


@app.command(name="example-data")
def example_data(
    domain: DomainName,
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
    seed: Annotated[int, typer.Option(help="The same seed makes the same data.")] = 0,
) -> None:
    """Make a small data set with a known difference between its classes."""
    from fmsuite.domains.base import load_domain

    plugin = load_domain(domain)
    say(f"Example data: {plugin(plugin.Options()).example_data(out, seed)}")
