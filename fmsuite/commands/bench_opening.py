"""What the two forms of ``fmsuite bench`` share: checks, what is opened first, and what results say of it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fmsuite.commands.bench_jobs import (
    FEWSHOT,
)
from fmsuite.commands.comparison import Start, open_out, short_names
from fmsuite.commands.contenders import Contender, Means, contenders, embed_all, has_features, variants
from fmsuite.commands.labelled_windows import LabelledWindows, asked_options, with_labels_file
from fmsuite.commands.setup import domain_options, open_domain, open_encoder, open_index, parts_of
from fmsuite.core.data.grouping import group_codes
from fmsuite.core.data.index import SampleIndex
from fmsuite.core.data.packed import open_reader
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.encoders import Encoder
from fmsuite.core.evaluation.folds import Asked, Folds, check_folds
from fmsuite.core.evaluation.normalisations import TRAINED, check_names
from fmsuite.core.evaluation.results import Evaluation
from fmsuite.core.evaluation.statistics import MIN_GROUPS, describe
from fmsuite.core.evaluation.tiles import SHUFFLED_INTERVAL
from fmsuite.core.evaluation.value_statistics import ValueSample
from fmsuite.core.features import FeatureStore
from fmsuite.core.reports.wording import counted, plural
from fmsuite.core.training.precision import choose_device
from fmsuite.domains.base import Domain, Progress, Units
from fmsuite.errors import UsageError, nearest
from fmsuite.tiling.parts import discard_parts

log = logging.getLogger("fmsuite")
ALL = "all"


@dataclass(frozen=True)
class Opened:
    """What is there before anything is embedded."""

    start: Start
    plugin: Domain
    whole: SampleIndex
    models: dict[str, Encoder]
    skipped: SkippedLog
    paths: list[Path]
    parts: Path
    options: dict[str, Any]
    """Of embedding."""

    def embedded(
        self,
        index: SampleIndex,
        out: Path,
        controls: bool,
        means: Means,
        normalisations: Sequence[str],
        learned: Learned,
        command: Sequence[str],
    ) -> tuple[list[Contender], list[FeatureStore], list[str]]:
        """
        Args:
            learned: the windows that values are taken from, where encoders are normalised otherwise.

        Returns:
            Who takes part, their features, and sentences on normalisations that do not apply.
        """
        spec = self.plugin.input_spec(index)
        found = contenders(self.models, spec, controls, means)
        reader = open_reader(self.plugin, index)
        notes: list[str] = []
        if set(normalisations) - {TRAINED}:
            sample = ValueSample.of(index, learned.rows.tolist(), reader, spec, learned.called)
            more, notes = variants(found, normalisations, sample)
            notes.append(
                f"Other normalisations than the encoders' own take their statistics from {sample.said}, without labels."
            )
            found += more
        stores = embed_all(found, index, reader, out, skipped=self.skipped, command=command, **self.options)
        discard_parts(self.parts)
        return found, stores, notes


def learned_from(all_of: Sequence[LabelledWindows], unit: str) -> Learned:
    """The windows that nobody asks about; with folds, or where somebody asks about each, all of them."""
    asked = {row for windows in all_of for row in windows.rows_of(windows.split.test).tolist()}
    every = sorted({row for windows in all_of for row in windows.rows_of(windows.split.train).tolist()} | asked)
    rest = [row for row in every if row not in asked]
    if rest:
        return Learned(torch.tensor(rest), f"training {plural(unit)}")
    return Learned(torch.tensor(every), f"{plural(unit)}, those included that are asked")


@dataclass(frozen=True)
class Learned:
    """Windows that statistics may be taken from.

    Attributes:
        rows: (N,) int64 of the index, ascending.
        called: what they are, in the plural.
    """

    rows: Tensor
    called: str


def open_bench(
    domain: str,
    encoders: Sequence[str],
    data: Sequence[Path],
    out: Path,
    recipe: str | None,
    overrides: Sequence[str],
    strict: bool,
    device: Literal["auto", "cpu", "cuda"],
    progress: Progress,
    batch_size: int | None,
    workers: int,
) -> Opened:
    start = Start()
    place = choose_device(device)
    paths, overrides = with_labels_file([Path(path) for path in data], overrides)
    models = {name: open_encoder(what) for name, what in zip(short_names(encoders), encoders, strict=True)}
    # An index says itself how its windows are read.
    followed = [] if any(path.suffix == ".parquet" for path in paths) else models.values()
    plugin = open_domain(domain, domain_options(domain, overrides, recipe, followed))
    parts = parts_of(out / "index.parquet")
    skipped = open_out(out, "bench", strict, keep_skipped=has_features(out) or parts.is_dir())
    paths = paths or [_example_data(plugin)]
    plugin, whole = open_index(plugin, paths, skipped, progress, asked_options(overrides), parts=parts, processes=None)
    options = {"batch_size": batch_size, "workers": workers, "device": place, "progress": progress}
    return Opened(start, plugin, whole, models, skipped, paths, parts, options)


def check(
    encoders: Sequence[str],
    tasks: Sequence[str],
    names: Sequence[str],
    shots: Sequence[int],
    episodes: int,
    batch_size: int | None,
    folds: Asked | None,
    normalisations: Sequence[str],
) -> None:
    check_names(normalisations)
    if folds is not None:
        check_folds(folds)
    if not encoders:
        raise UsageError("No encoder was named.", "Give at least one with --encoder: a run folder, a file, timm:NAME.")
    twice = next((what for number, what in enumerate(encoders) if what in encoders[:number]), None)
    if twice is not None:
        raise UsageError(f"The encoder {twice} is named twice.", "Name each once.")
    if not tasks:
        raise UsageError("No task was named.", f"Known: {', '.join(names)}.")
    for task in tasks:
        if task not in (ALL, *names):
            raise UsageError(f"There is no task '{task}'.", nearest(task, (ALL, *names)))
    if {ALL, FEWSHOT} & set(tasks) and (not shots or min(shots) < 1 or episodes < 1):
        listed = ", ".join(map(str, shots)) or "none"
        raise UsageError(f"Shots ({listed}) and episodes ({episodes}) must be at least 1.")
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"A batch of {batch_size} windows.", "Use 1 or more.")


def intervals(evaluations: Sequence[Evaluation], kind: str = "classes") -> str:
    if kind != "classes":
        return (
            "95% percentile bootstrap: groups that were asked, which no split divides, drawn with replacement 1,000 "
            "times, the metric averaged over the draws of a share. It says what other groups to ask would change, not "
            f"what other examples to train on would. None where fewer than {MIN_GROUPS} groups were asked."
        )
    return f"{describe()} {SHUFFLED_INTERVAL}" if any(e.shuffled for e in evaluations) else describe()


def folds_of(windows: LabelledWindows) -> int | None:
    """How many folds there are; ``None`` of a single split."""
    return len(windows.split.parts) if isinstance(windows.split, Folds) else None


def kept_apart(windows: LabelledWindows, units: Units) -> str:
    """One or two sentences on what a group is, none of which is both learned from and asked about; and on sources that
    are."""
    metadata = windows.index.metadata
    blocks, places = metadata.get("blocks"), metadata.get("places") or {}
    if blocks:
        what = f"squares of the ground of {blocks['metres']:g} m (spatial blocks)"
        near = f", or nearer to them than {blocks['margin']:g} m," if blocks.get("margin") else ""
        number = int(blocks["left_out"])
        left = f"{counted(number, units.window)} across their borders{near} {'was' if number == 1 else 'were'} left out"
        said = f"Kept apart: {what}; {left}."
    elif places:
        file = Path(str(places.get("file", "the places"))).name
        what = f"the polygons, or the groups, of {file}"
        if not places.get("grouped"):
            what = f"the points of {file}, but for those whose {plural(units.window)} share pixels"
        said = f"Kept apart: {what}."
        if places.get("meeting"):
            said += f" {counted(int(places['meeting']), 'pair')} of neighbours in different groups share pixels."
    else:
        said = f"Kept apart: what the data call a group ({units.group})."
    divided = _divided(windows)
    if divided:
        whose = f"{counted(divided, units.source)} {'has' if divided == 1 else 'have'}"
        said += f" {whose} {plural(units.window)} that are learned from beside others that are asked."
    return said


def _divided(windows: LabelledWindows) -> int:
    """How many sources are on both sides of the split; with folds, how many are of several groups."""
    _, code = group_codes(windows.index, "source")
    if isinstance(windows.split, Folds):
        rows = windows.rows_of(windows.split.test).numpy()
        _, group = group_codes(windows.index, "group")
        pairs = np.unique(np.stack([code[rows], group[rows]]), axis=1)
        return int((np.unique(pairs[0], return_counts=True)[1] > 1).sum())
    learned, asked = (windows.rows_of(side).numpy() for side in (windows.split.train, windows.split.test))
    return len(np.intersect1d(code[learned], code[asked]))


def said_of_folds(windows: LabelledWindows, evaluations: Sequence[Evaluation]) -> list[str]:
    if not isinstance(windows.split, Folds):
        return []
    said = (
        "Folds: the answers of all folds are put together before they are scored. Metrics of scores (AUROC, average "
        "precision) so compare what different classifiers said, which can lower them."
    )
    few = " Few-shot draws know no folds: each asks about the groups that gave it no example."
    return [said + (few if any(e.shots is not None for e in evaluations) else "")]


def _example_data(plugin: Domain) -> Path:
    folder = Path("example-data") / f"{plugin.name}-0"
    log.info("No --data: comparing on example data in %s.", folder)
    return plugin.example_data(folder, 0)


def shared_controls(found: Sequence[Contender]) -> list[str]:
    return [
        f"'{contender.name}' is the control of {', '.join(contender.of)}, which have one architecture and input."
        for contender in found
        if len(contender.of) > 1
    ]


def inputs_of(
    paths: Sequence[Path], index: str, metadata: dict, encoders: dict[str, Encoder], labels: Path | None = None
) -> dict[str, str]:
    """Data, labels files and encoders, each with a hash."""
    tables = [Path(file) for file in (metadata.get("labels") or {}).get("files", [])]
    tables += [labels] if labels is not None else []
    return {
        **{str(path): index for path in paths},
        **{str(file): hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in tables if file.is_file()},
        **{name: encoder.identity for name, encoder in encoders.items()},
    }
