"""Commands that look at encoders and compare them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.table import Table

from fmsuite.cli.application import app
from fmsuite.cli.options import (
    BatchSize,
    Device,
    DomainName,
    Mpp,
    Overrides,
    Seed,
    Shots,
    Strict,
    numbers_of,
    with_mpp,
)
from fmsuite.cli.output import finish, out_console, reported, say, show_results
from fmsuite.core.training.progress import console_progress
from fmsuite.errors import UsageError


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
    say(f"{result.windows} windows in {result.groups} groups: {result.path}")
    finish(result.skipped)


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
        shots=numbers_of(shots, "--shots"),
        episodes=episodes,
        k=k,
        seed=seed,
        shuffled=shuffled,
        evidence=evidence,
        strict=strict,
        progress=console_progress,
        command=sys.argv,
    )
    show_results(compared.results)
    reported(compared.out, report)
    finish(compared.skipped)


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
    folds: Annotated[
        str | None,
        typer.Option(metavar="K|groups", help="Cross-validation by group: K folds, or `groups` leaves one group out."),
    ] = None,
    controls: Annotated[
        bool,
        typer.Option("--controls/--no-controls", help="Also judge untrained networks, a histogram, shuffled labels."),
    ] = True,
    band_means: Annotated[
        Literal["auto", "mean", "mean+std", "none"],
        typer.Option(help="Means of the channels as a control; auto: where there are more than three."),
    ] = "auto",
    normalisations: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Judge every encoder under these too, separated by commas: mean-std, two-sigma, min-max, percentiles, "
            "window, scale, raw, imagenet; or all.",
        ),
    ] = None,
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
    from fmsuite.core.evaluation.folds import parse_folds

    targets = parse_targets(classify or [], regress or [], findings or [])
    shared: dict[str, Any] = {
        "tasks": task or ["all"],
        "shots": numbers_of(shots, "--shots"),
        "episodes": episodes,
        "seed": seed,
        "folds": None if folds is None else parse_folds(folds),
        "controls": controls,
        "means": band_means,
        "normalisations": normalisations.split(",") if normalisations else (),
        "recipe": recipe,
        "overrides": with_mpp(overrides, mpp, "data."),
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
            say(compared.results.title)
        show_results(compared.results)
    reported(out, report, [compared.out for compared in each])
    finish(each[0].skipped)


def _refuse_without_columns(labels: Path | None, by: str, fractions: str) -> None:
    given = {"--labels": labels is not None, "--by": by != "window", "--fractions": fractions != "1%,10%,100%"}
    option = next((name for name, is_given in given.items() if is_given), None)
    if option is not None:
        raise UsageError(
            f"{option} is about columns of a labels file, and none is asked for.",
            "Name one with --classify, --regress or --findings.",
        )


@app.command()
def similar(
    file: Annotated[Path, typer.Argument(help="A volume, or whatever the encoder's field calls a source.")],
    encoder: Annotated[str, typer.Option("--encoder", "-e", help="A run folder; or as for `embed`.")],
    at: Annotated[
        list[str],
        typer.Option(
            "--at", metavar="X,Y,Z", help="A place: voxel numbers of the file, or X,Y of a raster; repeatable."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The map; a picture with the same name lies beside it.")],
    negative: Annotated[
        list[str] | None, typer.Option("--negative", metavar="X,Y,Z", help="A place that is not meant; repeatable.")
    ] = None,
    world: Annotated[
        bool,
        typer.Option("--world", help="Places are world coordinates: millimetres (RAS), or those of a raster's CRS."),
    ] = False,
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
        str | None, typer.Option("--domain", "-d", help="How to read the file, where the encoder does not say so.")
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
    say(f"Similarity: {made.map}")
    if made.mask is not None:
        say(f"At {made.threshold:.3f} and above: {made.mask}")
    say(f"Picture: {made.picture}")


@app.command(name="map")
def map_features(
    files: Annotated[list[Path], typer.Argument(help="Rasters or folders.")],
    encoder: Annotated[str, typer.Option("--encoder", "-e", help="A run folder; or as for `embed`.")],
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")],
    overlap: Annotated[float, typer.Option(help="Share of a window that the next one covers as well.")] = 0.5,
    batch: Annotated[int, typer.Option(min=1, help="Windows at a time.")] = 4,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option()] = "auto",
    domain: Annotated[
        str | None, typer.Option("--domain", "-d", help="How to read the files, where the encoder does not say so.")
    ] = None,
    overrides: Overrides = None,
    strict: Strict = False,
) -> None:
    """Draw an encoder's features over whole rasters: three principal components as colours."""
    from fmsuite.commands.feature_pictures import feature_pictures as run

    made = run(
        encoder,
        files,
        out,
        overlap=overlap,
        batch=batch,
        device=device,
        domain=domain,
        overrides=overrides or [],
        strict=strict,
        progress=console_progress,
    )
    for path in made.files:
        say(str(path))
    finish(made.skipped)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders of pretrain, finetune, fewshot or bench.")],
    out: Annotated[Path, typer.Option(help="The page.")] = Path("report.html"),
    title: Annotated[str | None, typer.Option(help="Its heading.")] = None,
) -> None:
    """One self-contained HTML page from any results."""
    from fmsuite.commands.report import report as run

    say(f"Report: {run(folders, out, title)}")


@app.command(name="list")
def list_(
    what: Annotated[str, typer.Argument(help="recipes, objectives, models, domains, sensors, methods or tasks.")],
) -> None:
    """Show what there is to choose from."""
    from fmsuite.commands.catalogue import catalogue

    headings, rows = catalogue(what)
    table = Table(*headings, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*map(escape, row))
    out_console.print(table)
