"""Every objective that fits on one labelled data set, at an equal budget of CPU time, beside the untrained network.

    python benchmarks/objectives.py --data FOLDER

First a few steps of each objective are timed (CPU seconds of one thread, reading and augmentation included). Then each
is trained, with several seeds, for as many steps as cost what ``mae_steps`` of MAE cost (``objectives.yaml``), and its
encoder is judged on held-out groups: 20-NN and a linear probe, balanced accuracy. What is measured goes to
``objectives.json``; what is there already is not measured again. ``docs/objectives.md`` is written from it.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Before torch starts: each run has one thread, so that CPU seconds mean the same in all of them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import yaml
from objectives_page import write_page

from fmsuite.commands.labelled_windows import LabelledWindows
from fmsuite.commands.pretrain import pretrain
from fmsuite.commands.setup import domain_options, open_domain, open_index
from fmsuite.core.controls import untrained
from fmsuite.core.data.index import SampleIndex
from fmsuite.core.data.packed import open_reader
from fmsuite.core.data.pipeline import IMAGE, plain_views
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.encoders import Encoder, load_encoder
from fmsuite.core.evaluation.knn import knn_predict
from fmsuite.core.evaluation.linear import fit_linear
from fmsuite.core.evaluation.metrics import balanced_accuracy
from fmsuite.core.objectives.base import OBJECTIVES
from fmsuite.errors import FmsuiteError, UsageError

HERE = Path(__file__).resolve().parent
DOMAIN = "pathology"
TIMED_STEPS, UNTIMED_STEPS = 10, 3
NEIGHBOURS = 20

Record = dict[str, Any]


class Clock:
    """A progress report that notes the CPU time at which each training step begins."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def __call__(self, items: Iterable, total: int, title: str) -> Iterable:
        for item in items:
            if title == "training":
                self.ticks.append(time.process_time())
            yield item

    def seconds_per_step(self) -> float:
        return statistics.median(b - a for a, b in zip(self.ticks[UNTIMED_STEPS:], self.ticks[UNTIMED_STEPS + 1 :]))


def options_of(name: str, settings: Record) -> Record:
    """The options of an objective: those of ``everywhere`` that it has, and its own."""
    fields = OBJECTIVES[name].Config.model_fields
    return {k: v for k, v in settings["everywhere"].items() if k in fields} | settings["objectives"].get(name, {})


def train(name: str, seed: int, steps: int, index: Path, settings: Record, out: Path, clock: Clock) -> None:
    """A run folder of one objective."""
    recipe = {
        "domain": DOMAIN,
        "description": "one objective of the comparison",
        "seed": seed,
        "data": settings["data"],
        "model": settings["model"],
        "objective": {"name": name, **options_of(name, settings)},
        "optim": settings["optim"],
        "training": {
            "steps": steps,
            "batch_size": settings["batch_size"],
            "device": "cpu",
            "workers": 0,
            "checkpoint_every": steps,
            "log_every": max(1, steps // 20),
        },
        "monitor": {"every": 0},
    }
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    pretrain(DOMAIN, [index], recipe=str(path), out=out, progress=clock)


def judge(encoder: Encoder, index: Path, settings: Record) -> Record:
    """Balanced accuracies on the held-out side."""
    domain, whole = open_index(open_domain(DOMAIN, domain_options(DOMAIN, [])), [index], SkippedLog())
    windows = LabelledWindows.of(whole, 0, "tile", str(index))
    size = settings["model"]["input_size"]
    reader, rows = open_reader(domain, windows.index), windows.rows.tolist()
    batches = list(plain_views(windows.index, reader, encoder.spec, rows, size, 100))
    for window in (skipped for batch in batches for skipped in batch.skipped):
        raise FmsuiteError(
            f"{window.source}: {window.reason}", "Every encoder is judged on the same windows: repair it."
        )
    features = torch.cat([encoder.embed(batch.views[IMAGE][0]) for batch in batches])
    train, test = windows.split.train, windows.split.test
    labels, classes = windows.labels, len(windows.classes)
    probe = fit_linear(features[train], labels[train], classes=classes, form="squared")
    neighbours = knn_predict(features[train], labels[train], features[test], NEIGHBOURS, temperature=None)
    return {
        "knn": balanced_accuracy(neighbours, labels[test]),
        "linear": balanced_accuracy(probe.scores(features[test]).argmax(1), labels[test]),
        "pooling": encoder.pooling,
    }


def measure_cost(name: str, index: Path, settings: Record) -> Record:
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        train(name, 0, UNTIMED_STEPS + TIMED_STEPS + 1, index, settings, Path(folder) / "run", clock)
    return {"seconds": clock.seconds_per_step()}


def measure_run(name: str, seed: int, steps: int, index: Path, settings: Record) -> Record:
    """Train and judge; ``untrained`` judges the network of an MAE run before any step, once with each pooling."""
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        train(name, seed, steps, index, settings, run, clock)
        encoder = load_encoder(run)
        found = {"steps": steps, "seconds": clock.ticks[-1] - clock.ticks[0], **judge(encoder, index, settings)}
        if name == "mae":
            for pooling in ("mean", "cls"):
                fresh = untrained(load_encoder(run, pooling=pooling), seed)
                found[f"untrained_{pooling}"] = judge(fresh, index, settings)
    return found


def prepare(data: Path, settings: Record, folder: Path) -> Path:
    """The index of the data, made once."""
    options = [f"{key}={json.dumps(value)}" for key, value in settings["data"].items()]
    _, whole = open_index(open_domain(DOMAIN, domain_options(DOMAIN, options)), [data], SkippedLog())
    path = folder / "index.parquet"
    whole.write(path)
    return path


def fitting(settings: Record, index: Path, only: list[str]) -> tuple[list[str], dict[str, str]]:
    """Objectives that can be built on these inputs, and why the others cannot."""
    from fmsuite.core.backbones.build import build_backbone
    from fmsuite.core.backbones.config import ModelConfig
    from fmsuite.core.config import validate

    domain, whole = open_index(open_domain(DOMAIN, domain_options(DOMAIN, [])), [index], SkippedLog())
    names, refused = [], {}
    for name, cls in sorted(OBJECTIVES.items()):
        if only and name not in only:
            continue
        if getattr(cls, "needs_pairs", False):
            refused[name] = "it needs pairs"
            continue
        backbone = build_backbone(ModelConfig(**settings["model"]), domain.input_spec(whole))
        try:
            cls(validate(cls.Config, options_of(name, settings), "objective", name), backbone)
        except UsageError as error:
            refused[name] = error.message
        else:
            names.append(name)
    return names, refused


def load(path: Path, settings: Record, index: SampleIndex) -> Record:
    """What was measured before under the same settings; starts anew when they differ."""
    frame = {"settings": settings, "windows": len(index), "index": index.hash}
    if path.exists():
        record = json.loads(path.read_text(encoding="utf-8"))
        if all(record.get(key) == value for key, value in frame.items()):
            return record
    return {**frame, "costs": {}, "runs": {}}


def save(path: Path, record: Record) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(partial, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="labelled tiles, as `fmsuite bench --data` takes them")
    parser.add_argument("--settings", type=Path, default=HERE / "objectives.yaml")
    parser.add_argument("--results", type=Path, default=HERE / "objectives.json")
    parser.add_argument("--page", type=Path, default=HERE.parent / "docs" / "objectives.md")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", nargs="*", default=[], help="objectives; all that fit, if not given")
    arguments = parser.parse_args()
    settings = yaml.safe_load(arguments.settings.read_text(encoding="utf-8"))
    scratch = Path(tempfile.mkdtemp())
    try:
        index = prepare(arguments.data, settings, scratch)
        record = load(arguments.results, settings, SampleIndex.read(index))
        record |= {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
            f"torch {version('torch')}",
            "data": arguments.data.name,
            "seeds": arguments.seeds,
        }
        names, refused = fitting(settings, index, arguments.only)
        record["refused"] = {
            name: why for name, why in record.get("refused", {}).items() if name not in names
        } | refused
        for name in dict.fromkeys(["mae", *names]):
            if name not in record["costs"]:
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    record["costs"][name] = pool.submit(measure_cost, name, index, settings).result()
                print(f"{name}: {record['costs'][name]['seconds']:.3f} s a step", flush=True)
                save(arguments.results, record)
        budget = settings["mae_steps"] * record["costs"]["mae"]["seconds"]
        with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
            waiting = {}
            for seed in range(arguments.seeds):
                for name in names:
                    if f"{name}/{seed}" not in record["runs"]:
                        steps = round(budget / record["costs"][name]["seconds"])
                        waiting[pool.submit(measure_run, name, seed, steps, index, settings)] = f"{name}/{seed}"
            for done in as_completed(waiting):
                record["runs"][waiting[done]] = found = done.result()
                print(f"{waiting[done]}: 20-NN {found['knn']:.3f}, linear {found['linear']:.3f}", flush=True)
                save(arguments.results, record)
        save(arguments.results, record)
    finally:
        shutil.rmtree(scratch)
    write_page(record, arguments.page)


if __name__ == "__main__":
    main()
