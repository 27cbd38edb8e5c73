"""Results of fine-tuning, made up quickly: three arms at three shares of the patients, a known ranking."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.evaluation.cases import OVERALL, Arm, Case, Cell, FinetuneResults, Metric, Panel, TunedRun
from fmsuite.core.evaluation.results import Estimate, Facts
from fmsuite.core.reports.case_slices import CaseSlices
from fmsuite.core.seeding import generator

LABELS = ["anterior", "posterior"]
LEVELS = {"full": 0.87, "low-rank": 0.85, "scratch": 0.83}
FRACTIONS = {0.01: 0.25, 0.1: 0.1, 1.0: 0.0}
"""Share of the patients, and what it costs."""
METRICS = {
    "dice": Metric(title="Dice, 2 |A and B| / (|A| + |B|)", short="Dice"),
    "hd95": Metric(title="95th percentile of the surface distance", short="HD95", higher=False, unit="mm"),
}


def estimate(values: np.ndarray, seed: int = 0) -> Estimate:
    """Of (N,) cases."""
    stream = generator(seed, "bootstrap")
    means = values[stream.integers(0, len(values), (200, len(values)))].mean(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return Estimate(mean=float(values.mean()), std=0.004, low=float(low), high=float(high))


def scores(arm: str, fraction: float, cases: int, metric: str) -> np.ndarray:
    """(N, L); scratch loses more with fewer labels."""
    stream = generator(0, arm, str(fraction))
    shared = generator(0, "cases").normal(0, 0.03, (cases, 1))
    lost = FRACTIONS[fraction] * (2 if arm == "scratch" else 1)
    dice = np.clip(LEVELS[arm] - lost + shared + stream.normal(0, 0.01, (cases, 2)) - [0.0, 0.02], 0, 1)
    return dice if metric == "dice" else 12 * (1 - dice)


def finetune_results(cases: int = 20, labels: int = 2) -> FinetuneResults:
    names = [OVERALL, *LABELS][: labels + 1]
    runs, cells = [], []
    for fraction in FRACTIONS:
        for arm in LEVELS:
            found = {metric: scores(arm, fraction, cases, metric)[:, :labels] for metric in METRICS}
            control = {metric: scores("scratch", fraction, cases, metric)[:, :labels] for metric in METRICS}
            groups = max(1, round(fraction * 80))
            runs.append(
                TunedRun(
                    arm=arm,
                    folder=f"runs/{arm}-{fraction}",
                    fraction=fraction,
                    seed=0,
                    groups=[f"patient-{number}" for number in range(groups)],
                    windows=groups,
                    steps=400,
                    seconds=61.0,
                    cases=list(range(1, cases)),
                    failed=[0] if (arm, fraction) == ("full", 0.01) else [],
                    scores={
                        metric: [[None if (n, k) == (3, 1) else float(v) for k, v in enumerate(row)]
                                 for n, row in enumerate(values[1:])]
                        for metric, values in found.items()
                    },
                )
            )  # fmt: skip

            def columns(values: np.ndarray) -> dict[str, Estimate]:
                every = [values.mean(1), *values.T]
                return {name: estimate(column) for name, column in zip(names, every, strict=True)}

            cells.append(
                Cell(
                    arm=arm,
                    fraction=fraction,
                    groups=(groups, groups),
                    cases=cases - 1,
                    scores={metric: columns(values) for metric, values in found.items()},
                    differences={}
                    if arm == "scratch"
                    else {metric: columns(found[metric] - control[metric]) for metric in METRICS},
                )
            )
    return FinetuneResults(
        domain="medical",
        task="segmentation",
        title="Hippocampus, fine-tuned from mae-hippo",
        encoder="runs/mae-hippo",
        unit="volume",
        group_unit="patient",
        labels=LABELS[:labels],
        cases=[Case(id=f"hippocampus_{n:03d}.nii.gz", sources=[f"{n}.nii.gz"], group=f"p{n}") for n in range(cases)],
        split="80 patients trained the networks, 20 others were asked; no patient is on both sides.",
        metrics=METRICS,
        primary="dice",
        arms=[
            Arm(name="full", title="all weights, from the encoder", parameters=1_200_000, trained=1_200_000),
            Arm(name="low-rank", title="low-rank adapters", parameters=1_210_000, trained=60_000),
            Arm(name="scratch", title="all weights, fresh", control=True, parameters=1_200_000, trained=1_200_000),
        ],
        fractions=list(FRACTIONS),
        runs=runs,
        cells=cells,
        interval="95% of 1,000 bootstrap means over patients.",
        facts=Facts(
            seed=0,
            index_hash="0123abcd",
            command=["fmsuite", "finetune", "--encoder", "runs/mae-hippo", "--data", "DATA", "--out", "OUT"],
            versions={"fmsuite": "0", "torch": "2"},
            python="3.11",
            platform="Linux",
            started="2026-01-01T00:00:00+0000",
            seconds=1234.0,
        ),
    )


def write_finetune(folder: Path, results: FinetuneResults | None = None) -> Path:
    """With the best, the median and the worst case of the first arm, blobs of two labels."""
    results = finetune_results() if results is None else results
    folder.mkdir(parents=True)
    (folder / "panels").mkdir()
    z, y, x = np.mgrid[:12, :16, :10]
    for number, rank in enumerate(("worst", "best", "median")):
        stream = generator(0, "panel", rank)
        truth = np.where((z - 5) ** 2 + (y - 8) ** 2 + (x - 5) ** 2 < 16, 1 + (y > 7), 0)
        prediction = np.roll(truth, (0, number, 0), (0, 1, 2))
        image = truth * 50 + stream.normal(100, 10, truth.shape)
        file = f"panels/full-{rank}.npz"
        CaseSlices.of(image, truth, prediction, (1.0, 1.0, 1.5), 3).save(folder / file)
        results.panels.append(
            Panel(arm="full", fraction=1.0, rank=rank, case=number, value=0.9 - 0.05 * number, file=file)
        )
    results.write(folder)
    SkippedLog(folder / "skipped.csv").add("bad.nii.gz", "read", "The file is truncated.")
    return folder
