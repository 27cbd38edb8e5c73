"""The commands: parse, call, print. What they do is in ``fmsuite.commands``."""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table

from fmsuite import __version__
from fmsuite.core.training.progress import console as progress_console
from fmsuite.core.training.progress import console_progress
from fmsuite.errors import FmsuiteError, UsageError

if TYPE_CHECKING:
    from fmsuite.core.evaluation.cases import FinetuneResults
    from fmsuite.core.evaluation.results import Results

# Typer brings its own copy of click, or uses the installed one, as its version has it.
WrongLine: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

DONE, FAILED, WRONG_USE, DONE_WITH_SKIPS, INTERRUPTED = 0, 1, 2, 3, 128 + signal.SIGINT

app = typer.Typer(
    help="Pretrain, adapt and judge vision foundation models for slides, volumes, rasters and vector graphics.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done; 1 failed; 2 wrong use; 3 done, with sources skipped; 130 interrupted; 143 "
    "terminated, after saving.",
)
out_console = Console(width=None if sys.stdout.isatty() else 160)
console = progress_console()

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
        overrides=_with_mpp(overrides, mpp, "data."),
        pairs=pairs,
        strict=strict,
        progress=console_progress,
        command=sys.argv,
    )
    stopped = outcome.stopped_by is not None
    if outcome.main_rank:
        _say(f"{'Interrupted' if stopped else 'Done'} at step {outcome.step} of {outcome.total_steps}.")
        _say(f"Run folder: {outcome.folder}")
        if stopped:
            _say(f"Continue with: fmsuite pretrain --domain {domain} --out {outcome.folder} --resume")
    if outcome.stopped_by is not None:
        raise typer.Exit(128 + outcome.stopped_by)
    _finish(outcome.skipped if outcome.main_rank else "")


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
        overrides=_with_mpp(overrides, mpp, ""),
        preview=preview,
        strict=strict,
        processes=processes,
        ray=ray,
        progress=console_progress,
    )
    _say(f"{len(result.index)} windows from {len(result.index.sources)} sources: {result.path}")
    if result.previews:
        _say(f"{len(result.previews)} previews: {result.previews[0].parent}")
    _finish(result.skipped.summary())


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
            _say(f"{out / name}: {wrong}")
        if damaged:
            raise FmsuiteError(
                f"{len(damaged)} files of the packed copy are damaged.",
                "Delete them and run the same `fmsuite pack` again: only their shards are made anew.",
            )
        _say(f"All files of {out} are as they were written.")
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
    _say(f"{packed} in {total} shards, {written} of them written now: {result.path}")
    _finish(result.skipped.summary())


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

    _say(f"Written: {run(encoder, out, layout)}")


Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where the encoder runs.")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Windows at a time; 64, or as the store was begun.")]
EncoderName = Annotated[
    str,
    typer.Option(
        "--encoder",
        "-e",
        help="A run folder, a file, timm:NAME[@FILE], hf-hub:NAME; controls: untrained:X of any X, histogram.",
    ),
]


@app.command()
def embed(
    encoder: Annotated[
        str, typer.Option("--encoder", "-e", help="A run folder, a file, timm:NAME[@FILE], hf-hub:NAME.")
    ],
    index: Annotated[Path, typer.Option(help="The index of `fmsuite tile`, or a run's index.parquet.")],
    out: Annotated[Path, typer.Option(help="The feature store, a folder ending in .zarr.")],
    by: Annotated[
        Literal["source", "group", "folder"] | None,
        typer.Option(help="What one group of the store is; source (slide), or folder for single tiles, if absent."),
    ] = None,
    pooling: Annotated[
        Literal["cls", "mean", "cls+mean"] | None, typer.Option(help="In place of the encoder's own convention.")
    ] = None,
    channels: Annotated[
        str | None, typer.Option(help="Use only these of the encoder's channels, separated by commas.")
    ] = None,
    batch_size: BatchSize = None,
    workers: Annotated[
        int, typer.Option(min=-1, help="Processes that read ahead for each that embeds; -1 chooses.")
    ] = -1,
    device: Device = "auto",
    processes: Annotated[
        int, typer.Option(min=0, help="Processes that embed, on GPUs one for each; 0 embeds in this one.")
    ] = 0,
    gpus: Annotated[int | None, typer.Option(help="GPUs of this machine to embed on, a process for each.")] = None,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Embed on a Ray cluster: HOST:PORT, auto, or local to start one here."),
    ] = None,
    ray_cpus: Annotated[float | None, typer.Option(help="Cores of each worker of the cluster; 1 if absent.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a store of another encoder or index.")
    ] = False,
    strict: Strict = False,
) -> None:
    """Features of every window, in a Zarr store. Run again, it does what is missing."""
    from fmsuite.commands.embed import embed as run

    result = run(
        encoder,
        index,
        out,
        by=by,
        pooling=pooling,
        channels=channels.split(",") if channels else None,
        batch_size=batch_size,
        workers=workers,
        device=device,
        processes=processes,
        gpus=gpus,
        ray=ray,
        ray_cpus=ray_cpus,
        overwrite=overwrite,
        strict=strict,
        progress=console_progress,
        command=sys.argv,
    )
    _say(f"{result.windows} windows in {result.groups} groups: {result.path}")
    _finish(result.skipped)


Shots = Annotated[str, typer.Option(help="Labelled items a class, separated by commas.")]
Seed = Annotated[int, typer.Option(help="The same seed draws the same episodes.")]


@app.command()
def fewshot(
    features: Annotated[
        list[Path], typer.Option("--features", "-f", help="A feature store; repeat to compare several.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the results.")],
    labels: Annotated[
        Path | None, typer.Option(help="CSV of slides and their labels; what the index says, if absent.")
    ] = None,
    path_column: Annotated[str | None, typer.Option(help="Its column that names the slide.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Its column of classes.")] = None,
    patient_column: Annotated[str | None, typer.Option(help="Its column of patients.")] = None,
    split_column: Annotated[str | None, typer.Option(help="Its column of sides, train and test.")] = None,
    method: Annotated[
        list[str] | None, typer.Option("--method", "-m", help="Repeatable; all if absent. See `fmsuite list methods`.")
    ] = None,
    shots: Shots = "1,2,4,8,16,32",
    episodes: Annotated[int, typer.Option(min=1, help="Draws of supports for each number of shots.")] = 100,
    k: Annotated[int, typer.Option("--k", min=1, help="Nearest tiles for each prototype (MI-SimpleShot).")] = 5,
    seed: Seed = 0,
    shuffled: Annotated[
        bool, typer.Option("--shuffled/--no-shuffled", help="Also judge shuffled labels, which must be at chance.")
    ] = True,
    evidence: Annotated[int, typer.Option(min=0, help="Slides shown with their heatmap and top tiles.")] = 6,
    report: Annotated[bool, typer.Option("--report/--no-report", help="Write report.html beside the results.")] = True,
    strict: Strict = False,
) -> None:
    """Classify slides (patients, scenes) from a handful of labelled ones, with one or several encoders."""
    from fmsuite.commands.fewshot import fewshot as run

    compared = run(
        features,
        out,
        labels=labels,
        path_column=path_column,
        label_column=label_column,
        patient_column=patient_column,
        split_column=split_column,
        methods=method or ["all"],
        shots=_numbers(shots, "--shots"),
        episodes=episodes,
        k=k,
        seed=seed,
        shuffled=shuffled,
        evidence=evidence,
        strict=strict,
        progress=console_progress,
        command=sys.argv,
    )
    _show_results(compared.results)
    _reported(compared.out, report)
    _finish(compared.skipped)


@app.command()
def bench(
    domain: DomainName,
    encoder: Annotated[list[str], typer.Option("--encoder", "-e", help="As for `embed`; repeat to compare several.")],
    out: Annotated[Path, typer.Option(help="Folder for features, results and the report.")],
    data: Annotated[
        list[Path] | None,
        typer.Option(
            "--data", help="Folders of labelled files, their CSV, or an index.parquet; example data if absent."
        ),
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="Cut the windows that this recipe trains on.")] = None,
    task: Annotated[
        list[str] | None, typer.Option("--task", "-t", help="Repeatable; all if absent. See `fmsuite list tasks`.")
    ] = None,
    classify: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN", help="Ask for the classes in a column of the labels file; repeatable."),
    ] = None,
    regress: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN", help="Ask for the number in a column; repeatable.")
    ] = None,
    findings: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COLUMNS", help="Ask which findings are there: a column of a|b lists, or 0/1 columns as A,B,C."
        ),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="CSV that has these columns; the one that labels the data if absent.")
    ] = None,
    by: Annotated[
        str, typer.Option(help="One answer for each window, source or group (patient); of these columns.")
    ] = "window",
    fractions: Annotated[
        str, typer.Option(help="Shares of the training patients to learn these columns from, as 1%,10%,100%.")
    ] = "1%,10%,100%",
    shots: Shots = "1,2,4,8,16,32",
    episodes: Annotated[int, typer.Option(min=1, help="Draws of supports for each number of shots.")] = 200,
    seed: Seed = 0,
    controls: Annotated[
        bool,
        typer.Option("--controls/--no-controls", help="Also judge untrained networks, a histogram, shuffled labels."),
    ] = True,
    batch_size: BatchSize = None,
    workers: Annotated[int, typer.Option(min=-1, help="Processes that read ahead; -1 chooses.")] = -1,
    device: Device = "auto",
    mpp: Mpp = None,
    overrides: Overrides = None,
    report: Annotated[bool, typer.Option("--report/--no-report", help="Write report.html beside the results.")] = True,
    strict: Strict = False,
) -> None:
    """Judge encoders on labelled windows, beside controls that they must beat."""
    from fmsuite.commands.bench import bench as run
    from fmsuite.commands.bench_targets import bench_targets, parse_fractions, parse_targets

    targets = parse_targets(classify or [], regress or [], findings or [])
    shared: dict[str, Any] = {
        "tasks": task or ["all"],
        "shots": _numbers(shots, "--shots"),
        "episodes": episodes,
        "seed": seed,
        "controls": controls,
        "recipe": recipe,
        "overrides": _with_mpp(overrides, mpp, "data."),
        "batch_size": batch_size,
        "workers": workers,
        "device": device,
        "strict": strict,
        "progress": console_progress,
        "command": sys.argv,
    }
    if targets:
        options: dict[str, Any] = {"labels": labels, "by": by, "fractions": parse_fractions(fractions)}
        each = bench_targets(domain, encoder, data or [], out, targets, **options, **shared)
    else:
        _refuse_without_columns(labels, by, fractions)
        each = [run(domain, encoder, data or [], out, **shared)]
    for compared in each:
        if targets:
            _say(compared.results.title)
        _show_results(compared.results)
    _reported(out, report, [compared.out for compared in each])
    _finish(each[0].skipped)


def _refuse_without_columns(labels: Path | None, by: str, fractions: str) -> None:
    given = {"--labels": labels is not None, "--by": by != "window", "--fractions": fractions != "1%,10%,100%"}
    option = next((name for name, is_given in given.items() if is_given), None)
    if option is not None:
        raise UsageError(
            f"{option} is about columns of a labels file, and none is asked for.",
            "Name one with --classify, --regress or --findings.",
        )


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
        _say(f"Interrupted. The same command goes on in {out}.")
        raise typer.Exit(128 + outcome.stopped_by)
    assert outcome.results is not None
    _show_finetuned(outcome.results)
    _say(f"Report: {outcome.page}")
    _say(f"Results: {out / 'results.json'}")
    _finish(outcome.skipped)


@app.command()
def predict(
    model: Annotated[Path, typer.Option(help="A run of a fine-tuning: a folder with network.safetensors.")],
    files: Annotated[list[Path], typer.Argument(help="Files or folders.")],
    out: Annotated[Path, typer.Option(help="Folder for the label maps, or for predictions.csv.")],
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
        overlap=overlap,
        batch=batch,
        device=device,
        overrides=overrides or [],
        strict=strict,
        progress=console_progress,
    )
    for path in made.files:
        _say(str(path))
    _finish(made.skipped)


@app.command()
def similar(
    file: Annotated[Path, typer.Argument(help="A volume, or whatever the encoder's field calls a source.")],
    encoder: Annotated[str, typer.Option("--encoder", "-e", help="A run folder; or as for `embed`, with --domain.")],
    at: Annotated[
        list[str], typer.Option("--at", metavar="X,Y,Z", help="A place: voxel numbers of the file; repeatable.")
    ],
    out: Annotated[Path, typer.Option(help="The map; a picture with the same name lies beside it.")],
    negative: Annotated[
        list[str] | None, typer.Option("--negative", metavar="X,Y,Z", help="A place that is not meant; repeatable.")
    ] = None,
    world: Annotated[bool, typer.Option("--world", help="Places are millimetres in world coordinates (RAS).")] = False,
    combine: Annotated[
        Literal["max", "mean"], typer.Option(help="Of several places: the most similar one, or the mean.")
    ] = "max",
    centre: Annotated[
        bool, typer.Option("--centre", help="Take off what all features of the file share before they are compared.")
    ] = False,
    threshold: Annotated[
        str | None, typer.Option(metavar="auto|NUMBER", help="Write a mask of what reaches it as well.")
    ] = None,
    features: Annotated[
        Path | None, typer.Option(help="Zarr folder that keeps the file's features for further clicks.")
    ] = None,
    overlap: Annotated[float, typer.Option(help="Share of a window that the next one covers as well.")] = 0.5,
    batch: Annotated[int, typer.Option(min=1, help="Windows at a time.")] = 4,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option()] = "auto",
    domain: Annotated[
        str | None, typer.Option("--domain", "-d", help="How to read the file, where the encoder is no run folder.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Show where a file is like a place that you point at."""
    from fmsuite.commands.similar import similar as run

    made = run(
        encoder,
        file,
        out,
        at=at,
        negative=negative or [],
        world=world,
        combine=combine,
        centre=centre,
        threshold=threshold,
        features=features,
        overlap=overlap,
        batch=batch,
        device=device,
        domain=domain,
        overrides=overrides or [],
        progress=console_progress,
    )
    _say(f"Similarity: {made.map}")
    if made.mask is not None:
        _say(f"At {made.threshold:.3f} and above: {made.mask}")
    _say(f"Picture: {made.picture}")


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders of pretrain, finetune, fewshot or bench.")],
    out: Annotated[Path, typer.Option(help="The page.")] = Path("report.html"),
    title: Annotated[str | None, typer.Option(help="Its heading.")] = None,
) -> None:
    """One self-contained HTML page from any results."""
    from fmsuite.commands.report import report as run

    _say(f"Report: {run(folders, out, title)}")


@app.command(name="list")
def list_(what: Annotated[str, typer.Argument(help="recipes, objectives, models, domains, methods or tasks.")]) -> None:
    """Show what there is to choose from."""
    from fmsuite.commands.catalogue import catalogue

    headings, rows = catalogue(what)
    table = Table(*headings, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*map(escape, row))
    out_console.print(table)


@app.command(name="example-data")
def example_data(
    domain: DomainName,
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
    seed: Annotated[int, typer.Option(help="The same seed makes the same data.")] = 0,
) -> None:
    """Make a small data set with a known difference between its classes."""
    from fmsuite.domains.base import load_domain

    plugin = load_domain(domain)
    _say(f"Example data: {plugin(plugin.Options()).example_data(out, seed)}")


def _with_mpp(overrides: list[str] | None, mpp: float | None, prefix: str) -> list[str]:
    items = list(overrides or [])
    return items if mpp is None else [*items, f"{prefix}mpp_override={mpp}"]


def _numbers(text: str, option: str) -> list[int]:
    try:
        numbers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise UsageError(f"{option} '{text}' is no list of numbers.", "Write it as 1,2,4,8.") from None
    if numbers[0] < 1:
        raise UsageError(f"{option} '{text}' has a number below 1.", "Write it as 1,2,4,8.")
    return numbers


def _show_results(results: Results) -> None:
    """The primary metric of every evaluation, as a table."""
    from fmsuite.core.reports.wording import of, shots_name

    several = any(e.fraction is not None for e in results.evaluations)
    heading = "shots or share" if several else "shots"
    table = Table("encoder", "method", heading, results.primary.replace("_", " "), box=None, pad_edge=False)
    for e in results.evaluations:
        value = of(e, results.primary)
        interval = "" if value.low is None or value.high is None else f" ({value.low:.3f}-{value.high:.3f})"
        method = f"{e.method}, shuffled labels" if e.shuffled else e.method
        shots = shots_name(e.shots) if e.fraction is None else f"{e.fraction:.3g} of the groups"
        table.add_row(escape(e.encoder), method, shots, f"{value.mean:.3f}{interval}")
    out_console.print(table)


def _show_finetuned(results: FinetuneResults) -> None:
    """The primary metric of every arm and fraction, and how far it is above the control, as a table."""
    from fmsuite.core.evaluation.cases import OVERALL

    metric = results.metrics[results.primary]
    table = Table("arm", "labels", metric.short, "difference to scratch", box=None, pad_edge=False)
    for cell in results.cells:
        numbers = []
        for scores, sign in ((cell.scores, ""), (cell.differences, "+")):
            value = scores.get(results.primary, {}).get(OVERALL)
            interval = (
                "" if value is None or value.low is None else f" ({value.low:{sign}.3f} to {value.high:{sign}.3f})"
            )
            numbers.append("" if value is None else f"{value.mean:{sign}.3f}{interval}")
        table.add_row(escape(cell.arm), f"{cell.fraction:.3g}", *numbers)
    out_console.print(table)


def _reported(folder: Path, wanted: bool, results: Sequence[Path] = ()) -> None:
    """
    Args:
        results: folders of results, if they are others than the one that gets the report.
    """
    from fmsuite.commands.report import report as write

    folders = list(results) or [folder]
    if wanted:
        _say(f"Report: {write(folders, folder / 'report.html')}")
    _say(f"Results: {', '.join(str(each / 'results.json') for each in folders)}")


def _say(text: str) -> None:
    out_console.print(escape(text), highlight=False, soft_wrap=True)


def _without_traceback(text: str) -> str:
    """The message of an error from a data worker, into which torch has written the worker's traceback."""
    _, quoted, trace = text.partition("Original Traceback (most recent call last):\n")
    return " ".join(line for line in trace.splitlines() if line and not line.startswith(" ")) if quoted else text


def _finish(skipped: str) -> None:
    from fmsuite.core.distributed import launched

    if skipped:
        _say(skipped)
        # torchrun takes any code but 0 for a failure, and may start the job again.
        if not launched():
            raise typer.Exit(DONE_WITH_SKIPS)


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
