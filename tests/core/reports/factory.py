"""Results, exhibits and run folders as the commands leave them, made up quickly for the report's tests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.evaluation.results import EncoderFacts, Episode, Estimate, Evaluation, Facts, Item, Results
from fmsuite.core.reports.exhibits import Evidence, Exhibits, FeatureMap, Neighbours, Picture
from fmsuite.core.seeding import generator

CLASSES = ("adenocarcinoma", "squamous cell", "normal lung")
MINE, OWN_CONTROL, HISTOGRAM = "uni-mini", "uni-mini untrained", "colour histogram"


def estimate(mean: float, reach: float | None = 0.03, std: float | None = 0.05) -> Estimate:
    """With an interval of ``mean`` plus and minus ``reach``."""
    low, high = (None, None) if reach is None else (mean - reach, mean + reach)
    return Estimate(mean=mean, std=std, low=low, high=high)


def make_items(count: int = 72, classes: Sequence[str] = CLASSES, split: bool = False) -> list[Item]:
    return [
        Item(
            id=f"slide-{number:02d}.svs",
            label=number % len(classes),
            group=f"patient-{number // 2:02d}",
            split=("train" if number < count // 2 else "test") if split else None,
            windows=100 + number,
        )
        for number in range(count)
    ]


def make_evaluation(
    items: Sequence[Item],
    encoder: str,
    method: str,
    shots: int | None,
    score: Estimate,
    *,
    shuffled: bool = False,
    episodes: int = 4,
    classes: Sequence[str] = CLASSES,
) -> Evaluation:
    """Predictions are right with about the estimate's probability; supports are not asked."""
    random = generator(0, encoder, method, str(shots), int(shuffled))
    confusion = np.zeros((len(classes), len(classes)), dtype=int)
    drawn = []
    for number in range(episodes):
        support = None if shots is None else sorted(random.permutation(len(items))[: shots * len(classes)].tolist())
        predictions = []
        for place, item in enumerate(items):
            asked = item.split != "train" and place not in (support or ())
            right = random.random() < score.mean
            guess = item.label if right else int(random.integers(len(classes)))
            predictions.append(guess if asked else -1)
            if asked:
                confusion[item.label, guess] += 1
        metrics = {"balanced_accuracy": score.mean}
        drawn.append(Episode(seed=number, support=support, metrics=metrics, predictions=predictions))
    others = {"auroc": estimate((1 + score.mean) / 2, 0.02), "quadratic_kappa": estimate(2 * score.mean - 1.05)}
    return Evaluation(
        encoder=encoder,
        method=method,
        shots=shots,
        shuffled=shuffled,
        settings={"k": 5},
        metrics={"balanced_accuracy": score, **others},
        confusion=confusion.tolist(),
        episodes=drawn,
    )


def encoder_facts(name: str, kind: str = "encoder", control_of: str | None = None) -> EncoderFacts:
    return EncoderFacts.model_validate(
        {
            "name": name,
            "kind": kind,
            "identity": "sha256:1f3a9c0de77b",
            "dim": 96 if kind == "histogram" else 192,
            "pooling": None if kind == "histogram" else "cls",
            "provenance": {"recipe": "pathology-mae", "steps": "2000"} if kind == "encoder" else {},
            "control_of": control_of,
        }
    )


def make_results(
    scores: Mapping[tuple[str, str, int | None, bool], Estimate],
    *,
    kind: str = "fewshot",
    encoders: Sequence[EncoderFacts] | None = None,
    items: Sequence[Item] | None = None,
    classes: Sequence[str] = CLASSES,
    title: str = "Few-shot classification of 72 slides",
    unit: str = "slide",
) -> Results:
    """
    Args:
        scores: (encoder, method, shots, shuffled) to the primary metric.
    """
    known = {
        MINE: encoder_facts(MINE),
        OWN_CONTROL: encoder_facts(OWN_CONTROL, "untrained", MINE),
        HISTOGRAM: encoder_facts(HISTOGRAM, "histogram"),
    }
    names = list(dict.fromkeys(encoder for encoder, *_ in scores))
    items = list(items or make_items())
    return Results.model_validate(
        {
            "kind": kind,
            "domain": "pathology",
            "unit": unit,
            "title": title,
            "classes": list(classes),
            "items": items,
            "split": "Supports and queries never share a patient.",
            "encoders": list(encoders or [known.get(name) or encoder_facts(name) for name in names]),
            "methods": {
                method: f"{method}, as published (A. Author 2024)."
                for method in dict.fromkeys(method for _, method, *_ in scores)
            },
            "interval": "95% intervals: percentiles of 1000 bootstrap replicates over patients.",
            "evaluations": [
                make_evaluation(items, encoder, method, shots, score, shuffled=shuffled, classes=classes)
                for (encoder, method, shots, shuffled), score in scores.items()
            ],
            "notes": ["32 shots are left out: the smallest class has 24 slides."],
            "facts": Facts(
                command=["fmsuite", "fewshot", "--features", "my store.zarr", "--out", "few"],
                started="2026-01-02T03:04:05+0000",
                seconds=83.2,
                seed=7,
                versions={"fmsuite": "0.1.0", "torch": "2.15.0"},
                python="3.11.7",
                platform="Linux",
                index_hash="3612555595138faf",
                inputs={"my store.zarr": "a0b1c2d3"},
            ),
        }
    )


def few_shot_results(**changes: object) -> Results:
    """Curves of an encoder, its controls and a second encoder by two methods, and shuffled labels."""
    scores: dict[tuple[str, str, int | None, bool], Estimate] = {}
    heights = {MINE: 0.93, "resnet18": 0.88, OWN_CONTROL: 0.74, HISTOGRAM: 0.79}
    for name, top in heights.items():
        for offset, method in ((0.0, "mi_simpleshot"), (-0.02, "logistic")):
            for step, shots in enumerate((1, 2, 4, 8, 16)):
                mean = 1 / 3 + (top + offset - 1 / 3) * (1 - 0.55 ** (step + 1.5))
                scores[name, method, shots, False] = estimate(mean, 0.08 - 0.01 * step)
                if name == MINE:
                    scores[name, method, shots, True] = estimate(0.33 + 0.004 * step, 0.05)
    return make_results(scores, **changes)  # type: ignore[arg-type]


def bench_results() -> Results:
    """Tiles with a training side, three tasks and a few-shot curve."""
    scores: dict[tuple[str, str, int | None, bool], Estimate] = {}
    for name, top in {MINE: 0.931, OWN_CONTROL: 0.886, HISTOGRAM: 0.911}.items():
        for offset, method in ((0.0, "linear_torch"), (-0.004, "linear_sklearn"), (-0.03, "knn")):
            scores[name, method, None, False] = estimate(top + offset, 0.012, None)
            scores[name, method, None, True] = estimate(0.335 + offset, 0.03, None)
        for step, shots in enumerate((1, 4, 16)):
            scores[name, "simpleshot", shots, False] = estimate(top - 0.3 + 0.08 * step, 0.04)
    items = make_items(300, split=True)
    for item in items:
        item.id, item.windows = item.id.replace("slide", "tile").replace("svs", "png"), 1
    return make_results(scores, kind="bench", items=items, title="lung tiles, split by group", unit="tile")


def blob(seed: int, side: int = 96, width: int | None = None) -> Image.Image:
    """A small picture that looks a little like tissue."""
    random = np.random.default_rng(seed)
    coarse = random.integers(120, 250, (8, 8 if width is None else 12, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((width or side, side), Image.Resampling.BICUBIC)


def make_exhibits(results: Results, points: int = 240) -> Exhibits:
    random = np.random.default_rng(0)
    labels = np.arange(points) % len(results.classes)
    centres = random.uniform(-0.6, 0.6, (len(results.classes), 2))
    places = np.clip(centres[labels] + random.normal(0, 0.16, (points, 2)), -1, 1)
    shown = [encoder.name for encoder in results.encoders]
    maps = [
        FeatureMap(
            encoder=name,
            method="t-SNE of centred, L2-normalised features (perplexity 30).",
            x=places[:, 0].tolist(),
            y=places[:, 1].tolist(),
            labels=labels.tolist(),
            held_out=(np.arange(points) % 4 == 0).tolist(),
            sampled_from=5000,
        )
        for name in shown[:2]
    ]

    def window(seed: int, label: int) -> Picture:
        place = f"slide-{seed:02d}.svs (1024, 2048)"
        return Picture.of(blob(seed), f"Window of {results.classes[label]}", place, label)

    neighbours = [
        Neighbours(
            encoder=shown[0],
            query=window(number, number % 3),
            nearest=[window(10 + 7 * number + rank, (number + (rank == 3)) % 3) for rank in range(6)],
            distances=[0.1 + 0.02 * rank for rank in range(6)],
        )
        for number in range(3)
    ]
    evidence = [
        Evidence(
            encoder=shown[0],
            method="mi_simpleshot",
            item=results.items[number].id,
            true=results.items[number].label,
            predicted=(results.items[number].label + (number == 1)) % 3,
            scores=[0.7, 0.2, 0.1],
            heatmap=Picture.of(
                blob(40 + number, 300, 460), f"Heatmap of {results.items[number].id}", "Blue: normal; red: tumour."
            ),
            top={name: [window(50 + 9 * c + n, c) for n in range(5)] for c, name in enumerate(results.classes)},
        )
        for number in range(2)
    ]
    return Exhibits(maps=maps, neighbours=neighbours, evidence=evidence, notes=["One slide has no overview."])


def write_comparison(folder: Path, results: Results, exhibits: Exhibits | None = None) -> Path:
    results.write(folder)
    (exhibits or make_exhibits(results)).write(folder)
    log = SkippedLog(folder / "skipped.csv")
    for number in range(15):
        log.add(f"slides/broken-{number}.svs", "open" if number < 11 else "read", "Not a TIFF file.")
    return folder


def write_run(folder: Path, steps: int = 400, *, collapse: Sequence[int] = (), finished: bool = True) -> Path:
    """A run folder with curves of a healthy run, except for the named reports of a collapse."""
    folder.mkdir(parents=True)
    lines: list[dict[str, object]] = [{"step": 0, "features/rankme": 3.2, "features/knn_balanced_accuracy": 0.5}]
    for step in range(1, steps + 1):
        share = step / steps
        loss = 6.9 * (1 - 0.4 * share) + 0.1 * np.sin(step)
        line: dict[str, object] = {"step": step, "loss": loss, "loss/class": 0.7 * loss, "loss/patch": 0.3 * loss}
        lines.append({**line, "lr": 1e-3 * min(1, 10 * share) * (1 - share), "samples_per_second": 31.0 + step % 3})
        if step % (steps // 8) == 0:
            found: dict[str, object] = {"step": step, "features/rankme": 3.2 + 14 * share}
            found["features/knn_balanced_accuracy"] = 0.5 + 0.3 * share
            if step in collapse:
                found["features/collapse"] = "the spread of features fell to 0.01, below 10% of the 0.2 at the start"
            lines.append(found)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    start = {
        "command": ["fmsuite", "pretrain", "--domain", "pathology", "--out", "my run"],
        "started": "2026-01-02T03:04:05+0000",
        "host": "node1",
        "python": "3.11.7",
        "gpu": None,
        "versions": {"fmsuite": "0.1.0", "torch": "2.15.0"},
    }
    facts = {"seed": 0, "index_hash": "3612555595138faf", "starts": [start]}
    (folder / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    config = "recipe: pathology-mae\ndomain: pathology\nobjective:\n  name: dinov2\nmodel:\n  name: vit_tiny\n"
    (folder / "config.yaml").write_text(f"{config}training:\n  steps: {steps}\n  batch_size: 48\n", encoding="utf-8")
    blob(3, 200, 420).save(folder / "views.png")
    if finished:
        channels = [{"name": name} for name in ("red", "green", "blue")]
        described = {"format": 1, "pooling": "cls", "input": {"size": [64, 64], "channels": channels}}
        (folder / "encoder.json").write_text(json.dumps(described), encoding="utf-8")
    return folder
