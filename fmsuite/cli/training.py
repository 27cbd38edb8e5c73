"""Commands that train, and hand on what was trained."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from fmsuite.cli.application import app
from fmsuite.cli.options import (
    DomainName,
    Mpp,
    Overrides,
    Strict,
    with_mpp,
)
from fmsuite.cli.output import finish, say, show_finetuned
from fmsuite.core.training.progress import console_progress
from fmsuite.errors import UsageError


@app.command()
def pretrain(
    domain: DomainName,
    data: Annotated[
        list[Path] | None,
        typer.Option("--data", help="Files, folders or one index.parquet; without it, example data is made."),
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="Recipe name or YAML file.")] = None,
    objective: Annotated[
        str | None, typer.Option(help="Another objective than the recipe's, with its own defaults.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/DOMAIN-TIME if absent.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out where it stopped.")] = False,
    auto_resume: Annotated[
        bool,
        typer.Option(
            "--auto-resume",
            help="Continue the run in --out if it was begun, begin it otherwise; --data, --recipe, --objective and "
            "--pairs then serve the beginning only.",
        ),
    ] = False,
    gpus: Annotated[int | None, typer.Option(min=1, help="Train on this many GPUs of this machine.")] = None,
    restarts: Annotated[
        int,
        typer.Option(min=0, help="With --gpus: how often to start again, from the last checkpoint, when one dies."),
    ] = 0,
    pairs: Annotated[
        Path | None,
        typer.Option(
            help="CSV or Parquet table that names sources, groups or windows and gives each a text or numbers, for "
            "objectives that learn from pairs (clip, siglip)."
        ),
    ] = None,
    mpp: Mpp = None,
    overrides: Overrides = None,
    strict: Strict = False,
) -> None:
    """Pretrain an encoder."""
    from fmsuite.commands.pretrain import pretrain as run
    from fmsuite.core.training.interrupt import warning_ends

    if _launches(gpus, restarts):
        raise typer.Exit(_launch(gpus or 1, restarts, domain, out, resume, auto_resume))
    if resume and auto_resume:
        raise UsageError("--resume and --auto-resume exclude each other.", "Give one of them.")
    warning_ends()
    outcome = run(
        domain,
        data or [],
        recipe=recipe,
        objective=objective,
        out=out,
        resume=resume,
        auto_resume=auto_resume,
        overrides=with_mpp(overrides, mpp, "data."),
        pairs=pairs,
        strict=strict,
        progress=console_progress,
        command=sys.argv,
    )
    stopped = outcome.stopped_by is not None
    if outcome.main_rank:
        say(f"{'Interrupted' if stopped else 'Done'} at step {outcome.step} of {outcome.total_steps}.")
        say(f"Run folder: {outcome.folder}")
        if stopped:
            say(f"Continue with: fmsuite pretrain --domain {domain} --out {outcome.folder} --resume")
    if outcome.stopped_by is not None:
        raise typer.Exit(128 + outcome.stopped_by)
    finish(outcome.skipped if outcome.main_rank else "")


def _launches(gpus: int | None, restarts: int) -> bool:
    """Whether this process is to start others rather than to train."""
    from fmsuite.commands.launch import is_inside
    from fmsuite.core.distributed import launched

    if gpus is None:
        if restarts:
            raise UsageError("--restarts belongs to --gpus.", "Under torchrun use its own --max-restarts.")
        return False
    if launched() and not is_inside():
        raise UsageError("--gpus starts processes of its own.", "Leave it out under torchrun.")
    return not is_inside()


def _launch(gpus: int, restarts: int, domain: str, out: Path | None, resume: bool, auto_resume: bool) -> int:
    from fmsuite.commands.launch import check_gpus, launch
    from fmsuite.commands.pretrain import run_path

    check_gpus(gpus)
    folder = run_path(domain, out, "--resume" if resume else "--auto-resume" if auto_resume else None)
    arguments = sys.argv[1:] if out is not None else [*sys.argv[1:], "--out", str(folder)]
    return launch(arguments, gpus, restarts, folder / "logs")


@app.command()
def export(
    encoder: Annotated[str, typer.Argument(help="A run folder, a weight file, timm:NAME, hf-hub:NAME.")],
    out: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
    layout: Annotated[
        Literal["timm", "native"],
        typer.Option(help="timm's names, or this package's own for what timm cannot hold (volumes, channel groups)."),
    ] = "timm",
) -> None:
    """Write an encoder as safetensors that timm loads."""
    from fmsuite.commands.export import export as run

    say(f"Written: {run(encoder, out, layout)}")


@app.command()
def finetune(
    task: Annotated[Path, typer.Argument(help="YAML file of the task; docs/finetuning.md says what it holds.")],
    out: Annotated[Path, typer.Option(help="Folder; an interrupted fine-tuning in it goes on.")],
    data: Annotated[
        list[Path] | None, typer.Option("--data", help="Files, folders or one index.parquet, in place of the task's.")
    ] = None,
    encoder: Annotated[str | None, typer.Option(help="Run folder, file or timm:NAME, in place of the task's.")] = None,
    overrides: Overrides = None,
    strict: Strict = False,
) -> None:
    """Fine-tune a task from an encoder, beside the same network from scratch, and judge it on held-out cases."""
    from fmsuite.commands.finetune import finetune as run
    from fmsuite.core.training.interrupt import warning_ends

    warning_ends()
    outcome = run(
        task,
        out,
        sources=data or [],
        encoder=encoder,
        overrides=overrides or [],
        strict=strict,
        progress=console_progress,
        command=sys.argv,
    )
    if outcome.stopped_by is not None:
        say(f"Interrupted. The same command goes on in {out}.")
        raise typer.Exit(128 + outcome.stopped_by)
    assert outcome.results is not None
    show_finetuned(outcome.results)
    say(f"Report: {outcome.page}")
    say(f"Results: {out / 'results.json'}")
    finish(outcome.skipped)


@app.command()
def predict(
    model: Annotated[Path, typer.Option(help="A run of a fine-tuning: a folder with network.safetensors.")],
    files: Annotated[list[Path], typer.Argument(help="Files or folders.")],
    out: Annotated[Path, typer.Option(help="Folder for the label maps, or for predictions.csv.")],
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Write maps of every class's probability as well.")
    ] = False,
    overlap: Annotated[float, typer.Option(help="Share of a window that the next one covers as well.")] = 0.5,
    batch: Annotated[int, typer.Option(min=1, help="Windows at a time.")] = 4,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    overrides: Overrides = None,
    strict: Strict = False,
) -> None:
    """Apply a fine-tuned network: label maps in the files' own space, or a table of answers."""
    from fmsuite.commands.predict import predict as run

    made = run(
        model,
        files,
        out,
        probabilities=probabilities,
        overlap=overlap,
        batch=batch,
        device=device,
        overrides=overrides or [],
        strict=strict,
        progress=console_progress,
    )
    for path in made.files:
        say(str(path))
    finish(made.skipped)
