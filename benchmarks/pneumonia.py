"""Chest X-rays of PneumoniaMNIST: pretrained without labels, then probed and fine-tuned, beside controls.

    python benchmarks/pneumonia.py --data pneumoniamnist.npz --out FOLDER

The arrays are written as PNG files with a labels.csv (the canonical sides: train, val, test), a small network is
pretrained on the training side as ``pneumonia.yaml`` says, and what it gives is judged on the test side: a linear probe
and nearest neighbours on its frozen features (``fmsuite bench``) beside the same network untrained and a histogram of
the values, and the same probe on raw pixels. ``--finetune`` then trains the whole network with labels, from the encoder
and from scratch, as ``pneumonia-finetune.yaml`` says. What is finished is not done again.
"""

from __future__ import annotations

import argparse
import csv
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fmsuite.commands.bench import bench
from fmsuite.commands.pretrain import pretrain
from fmsuite.core.evaluation.results import Evaluation
from fmsuite.core.evaluation.splits import given_split
from fmsuite.core.evaluation.tiles import judge

HERE = Path(__file__).resolve().parent
SIDES = ("train", "val", "test")
CLASSES = ("normal", "pneumonia")
TASKS = ("linear_sklearn", "knn")
METRICS = ("auroc", "balanced_accuracy")


def unpack(file: Path, folder: Path) -> Path:
    """Write every image as ``SIDE/NUMBER.png``, and ``labels.csv``; returns the folder."""
    if (folder / "labels.csv").is_file():
        return folder
    arrays, rows = np.load(file), []
    for side in SIDES:
        (folder / side).mkdir(parents=True, exist_ok=True)
        for number, (image, label) in enumerate(zip(arrays[f"{side}_images"], arrays[f"{side}_labels"], strict=True)):
            name = f"{side}/{number:05d}.png"
            Image.fromarray(image).save(folder / name)
            rows.append((name, CLASSES[int(label[0])], side))
    # Last, as it says that all images are there.
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file_:
        csv.writer(file_).writerows([("path", "label", "split"), *rows])
    return folder


def of_pixels(file: Path) -> Iterator[Evaluation]:
    """The tasks on pixels as vectors of 784 numbers, each image between 0 and 1 as the reader has it."""
    arrays = np.load(file)
    pixels, labels, sides = [], [], []
    for side in ("train", "test"):
        images = arrays[f"{side}_images"].reshape(-1, 784).astype(np.float32)
        low, high = images.min(1, keepdims=True), images.max(1, keepdims=True)
        pixels.append((images - low) / (high - low))
        labels.append(arrays[f"{side}_labels"].ravel())
        sides += [side] * len(images)
    features, targets = torch.from_numpy(np.concatenate(pixels)), torch.from_numpy(np.concatenate(labels)).long()
    split, groups = given_split(sides), torch.arange(len(sides))
    assert split is not None
    for task in TASKS:
        yield judge(task, features, targets, groups, split, len(CLASSES), encoder="raw pixels", seed=0, rescale=True)


def table(found: list[Evaluation]) -> str:
    """A line for each encoder and task, in Markdown."""
    lines = ["| features | task | AUROC | balanced accuracy |", "|---|---|---|---|"]
    for evaluation in found:
        cells = []
        for name in METRICS:
            value = evaluation.metrics[name]
            cells.append(f"{value.mean:.3f} ({value.low:.3f}-{value.high:.3f})")
        lines.append(f"| {evaluation.encoder} | {evaluation.method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="pneumoniamnist.npz")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of pneumonia.yaml")
    parser.add_argument("--finetune", action="store_true", help="also fine-tune, as pneumonia-finetune.yaml says")
    asked = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    images = unpack(asked.data, asked.out / "images")
    run = asked.out / "mae-thorax"
    if not (run / "encoder.safetensors").is_file():
        pretrain(
            "medical", [images], recipe=str(HERE / "pneumonia.yaml"), out=run, auto_resume=True, overrides=asked.set
        )
    # The data are read as the encoder's were: no option says so again.
    compared = bench("medical", [str(run)], [images], asked.out / "judged", tasks=TASKS, workers=0)
    shown = [evaluation for evaluation in compared.results.evaluations if not evaluation.shuffled]
    print(table([*shown, *of_pixels(asked.data)]))
    if asked.finetune:
        task = ["finetune", HERE / "pneumonia-finetune.yaml", "--encoder", run, "--data", images]
        command = [sys.executable, "-m", "fmsuite", *task, "--out", asked.out / "tuned"]
        subprocess.run([str(part) for part in command], check=True)


if __name__ == "__main__":
    main()
