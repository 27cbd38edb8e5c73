"""From the runs of a fine-tuning to its results."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from fmsuite.commands.comparison import Start
from fmsuite.commands.finetune_config import FinetuneConfig
from fmsuite.commands.finetune_data import TaskData, group_unit
from fmsuite.commands.finetune_judge import save_panel
from fmsuite.commands.finetune_runs import Setup
from fmsuite.core.adaptation.network_files import load_network
from fmsuite.core.data.index import SampleIndex
from fmsuite.core.encoders import Encoder
from fmsuite.core.evaluation.case_scores import (
    COUNTS,
    POOLED_SHORT,
    Values,
    class_values,
    estimates,
    kept_of,
    label_values,
    mean_values,
    metrics_of,
    number_values,
    pooled_values,
    together,
)
from fmsuite.core.evaluation.cases import DENSE, PANELS, Arm, Cell, FinetuneResults, Panel, TunedRun
from fmsuite.core.evaluation.segmentation import CaseCounts
from fmsuite.core.reports.wording import counted
from fmsuite.core.seeding import derive
from fmsuite.core.training.precision import choose_device
from fmsuite.core.training.run_folder import RunFolder
from fmsuite.errors import ReadFailure, UsageError


def collect_results(
    setup: Setup,
    arms: Sequence[Arm],
    runs: Sequence[TunedRun],
    whole: SampleIndex,
    command: Sequence[str],
    start: Start,
) -> FinetuneResults:
    """Cells with intervals, and the pictures' raw material.

    Raises:
        UsageError: if no held-out case could be judged.
    """
    config, data = setup.config, setup.data
    labels = _labels(config, data)
    unit = setup.encoder.spec.spacing_unit
    metrics = metrics_of(config.task_name, config.judge.metrics, config.judge.tolerance, unit)
    asked = sorted({number for fold in data.folds for number in data.cases_of(fold)})
    failed = {number for run in runs for number in run.failed}
    judged = [number for number in asked if number not in failed]
    if not judged:
        raise UsageError("None of the held-out cases could be judged.", f"See {setup.skipped.path}.")
    units, group_name = data.domain.units, group_unit(data.domain, data.index)
    case_unit = group_name if config.task_name not in DENSE and config.judge.by == "group" else units.source
    cells = _cells(setup, arms, runs, judged, labels)
    notes = [*data.notes, *_notes(setup, arms, failed, case_unit, cells)]
    primary = next(iter(metrics))
    if not any(primary in cell.scores for cell in cells):
        notes.append(f"{metrics[primary].short} is not defined on these cases: a class is missing among them.")
        primary = next(name for name in metrics if any(name in cell.scores for cell in cells))
    return FinetuneResults(
        domain=config.domain,
        task=config.task_name,
        title=f"{config.task_name.capitalize()} fine-tuned from {Path(config.encoder).name or config.encoder}",
        encoder=config.encoder,
        unit=case_unit,
        group_unit=group_name,
        labels=labels,
        cases=data.cases,
        split=data.said,
        metrics=metrics,
        primary=primary,
        arms=list(arms),
        fractions=sorted(config.few.fractions),
        runs=list(runs),
        cells=cells,
        panels=_panels(setup, runs, judged, notes) if config.task_name in DENSE else [],
        interval=(
            f"{config.judge.confidence:.0%} percentile bootstrap of held-out {group_name}s, drawn with replacement "
            f"{config.judge.replicates:,} times, of the mean over seeds; differences to the control on the same draws. "
            "They say what other cases to ask would change, not what other cases to train on would."
        ),
        notes=notes,
        facts=start.facts(
            command,
            config.seed,
            whole.hash,
            _inputs(config, setup.encoder, whole),
            {config.encoder: setup.encoder.normalisation},
        ),
    )


def _labels(config: FinetuneConfig, data: TaskData) -> list[str]:
    """What metrics are given for: of a segmentation without its background."""
    return list(data.classes[config.first_class :] if config.task_name in DENSE else data.classes)


def _cells(
    setup: Setup, arms: Sequence[Arm], runs: Sequence[TunedRun], judged: Sequence[int], labels: Sequence[str]
) -> list[Cell]:
    config, data = setup.config, setup.data
    names = sorted({data.cases[number].group for number in judged})
    groups = torch.tensor([names.index(data.cases[number].group) for number in judged])
    seed = derive(config.seed, "intervals")
    control = next((arm.name for arm in arms if arm.control), None)
    cells = []
    for arm in arms:
        for fraction in sorted(config.few.fractions):
            mine = [run for run in runs if (run.arm, run.fraction) == (arm.name, fraction)]
            others = [run for run in runs if (run.arm, run.fraction) == (control, fraction)]
            values, less = (_values(setup, own, judged, labels) for own in (mine, others))
            judge = (groups, config.judge.replicates, config.judge.confidence, seed)
            cells.append(
                Cell(
                    arm=arm.name,
                    fraction=fraction,
                    groups=(min(len(run.groups) for run in mine), max(len(run.groups) for run in mine)),
                    cases=len(judged),
                    scores=estimates(values, *judge),
                    differences={} if control in (None, arm.name) else estimates(values, *judge, less=less),
                )
            )
    return cells


def _values(setup: Setup, runs: Sequence[TunedRun], judged: Sequence[int], labels: Sequence[str]) -> list[Values]:
    """Of each seed, the folds together."""
    config, data = setup.config, setup.data
    pooled = [name for name in config.judge.metrics if name in POOLED_SHORT]
    found = []
    for seed in config.few.seeds:
        of_case = {}
        for run in runs:
            if run.seed != seed:
                continue
            for place, number in enumerate(run.cases):
                of_case[number] = (
                    {name: rows[place] for name, rows in run.scores.items()} if run.scores else run.outputs[place]
                )
        if not of_case:
            continue
        if config.task_name in DENSE:
            tables: dict[str, torch.Tensor] = {
                name: torch.tensor(
                    [[np.nan if v is None else v for v in of_case[number][name]] for number in judged],  # type: ignore[call-overload]
                    dtype=torch.float64,
                )
                for name in kept_of(config.judge.metrics)
            }
            counts = CaseCounts(*(tables.pop(name) for name in COUNTS)) if pooled else None
            by_case = mean_values({name: table for name, table in tables.items() if name not in pooled}, labels)
            found.append(by_case if counts is None else together(by_case, pooled_values(counts, pooled, labels)))
            continue
        outputs = torch.tensor([of_case[number] for number in judged], dtype=torch.float64)
        assert data.truth is not None
        truth = torch.from_numpy(data.truth[list(judged)])
        if config.task_name == "classification":
            found.append(class_values(outputs, truth))
        else:
            kind = label_values if config.task_name == "multilabel" else number_values
            found.append(kind(outputs, truth, labels))
    return found


def _panels(setup: Setup, runs: Sequence[TunedRun], judged: Sequence[int], notes: list[str]) -> list[Panel]:
    """Best, median and worst case of the task's own arm with the most labels."""
    config, data = setup.config, setup.data
    arm, fraction, seed = config.arms[0].name, max(config.few.fractions), config.few.seeds[0]
    mine = [run for run in runs if (run.arm, run.fraction, run.seed) == (arm, fraction, seed)]
    values = {}
    for run in mine:
        for place, number in enumerate(run.cases):
            known = [value for value in run.scores["dice"][place] if value is not None]
            if number in judged and known:
                values[number] = (float(np.mean(known)), run)
    order = sorted(values, key=lambda number: (-values[number][0], number))
    if not order:
        return []
    places = {"best": 0, "median": (len(order) - 1) // 2, "worst": len(order) - 1}
    device = choose_device(config.training.device)
    panels, shown = [], set[int]()
    for rank, place in places.items():
        number = order[place]
        if number in shown:
            continue
        shown.add(number)
        value, run = values[number]
        network = load_network(setup.out / run.folder)
        network.task.to(device)
        file = f"{PANELS}/{rank}.npz"
        try:
            save_panel(config, data, network, number, device, setup.out / file)
        except ReadFailure as failure:
            notes.append(f"The {rank} case cannot be shown: {failure.reason}")
            continue
        panels.append(Panel(arm=arm, fraction=fraction, rank=rank, case=number, value=value, file=file))  # type: ignore[arg-type]
    return panels


def _notes(setup: Setup, arms: Sequence[Arm], failed: set[int], unit: str, cells: Sequence[Cell]) -> list[str]:
    config, data = setup.config, setup.data
    notes = []
    if failed:
        names = ", ".join(data.cases[number].id for number in sorted(failed)[:3])
        more = f" and {len(failed) - 3} more" if len(failed) > 3 else ""
        notes.append(
            f"{counted(len(failed), unit)} could not be judged and {'is' if len(failed) == 1 else 'are'} in no mean "
            f"({names}{more}); skipped.csv says why."
        )
    if any(arm.control for arm in arms) and config.optim.layer_decay != 1:
        control = next(arm for arm in config.arms if arm.name == "scratch")
        decay = config.arm_optim(control).layer_decay
        notes.append(
            f"From scratch, the learning rate falls by {decay:g} a layer instead of {config.optim.layer_decay:g}: "
            "fresh weights have nothing to keep."
        )
    seen = _seen_before(setup)
    if seen:
        notes.append(
            f"The encoder was pretrained, without their labels, on {seen} of the "
            f"{counted(len(data.cases), unit)}: the comparison is of labels, not of new images."
        )
    least = min(cell.groups[0] for cell in cells)
    if least < 3:
        smallest = counted(least, group_unit(data.domain, data.index))
        notes.append(f"The smallest fraction is {smallest}: its draw decides much.")
    return notes


def _seen_before(setup: Setup) -> int:
    """How many of the cases the encoder's own run was trained on, as far as its index is still there."""
    run = setup.encoder.provenance.get("run")
    path = RunFolder(str(run)).index_path if run else None
    if path is None or not path.is_file():
        return 0
    before = {os.path.realpath(source) for source in SampleIndex.read(path).sources}
    return sum(os.path.realpath(case.sources[0]) in before for case in setup.data.cases)


def _inputs(config: FinetuneConfig, encoder: Encoder, whole: SampleIndex) -> dict[str, str]:
    return {**dict.fromkeys(config.sources, whole.hash), config.encoder: encoder.identity}
