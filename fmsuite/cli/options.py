"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from fmsuite.errors import UsageError

DomainName = Annotated[str, typer.Option("--domain", "-d", help="The field: see `fmsuite list domains`.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one configuration key; repeatable.")
]
Strict = Annotated[bool, typer.Option("--strict", help="A source that cannot be used is an error.")]
Mpp = Annotated[
    float | None,
    typer.Option(
        "--mpp", help="Microns per pixel of slides whose files do not say (pathology); sets data.mpp_override."
    ),
]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where the encoder runs.")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Windows at a time; 64, or as the store was begun.")]
EncoderName = Annotated[
    str,
    typer.Option(
        "--encoder",
        "-e",
        help="A run folder, a file, timm:NAME[@FILE], hf-hub:NAME; controls: untrained:X of any X, histogram, "
        "band_means.",
    ),
]
Shots = Annotated[str, typer.Option(help="Labelled items a class, separated by commas.")]
Seed = Annotated[int, typer.Option(help="The same seed draws the same episodes.")]


def with_mpp(overrides: list[str] | None, mpp: float | None, prefix: str) -> list[str]:
    items = list(overrides or [])
    return items if mpp is None else [*items, f"{prefix}mpp_override={mpp}"]


def numbers_of(text: str, option: str) -> list[int]:
    try:
        numbers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise UsageError(f"{option} '{text}' is no list of numbers.", "Write it as 1,2,4,8.") from None
    if numbers[0] < 1:
        raise UsageError(f"{option} '{text}' has a number below 1.", "Write it as 1,2,4,8.")
    return numbers
