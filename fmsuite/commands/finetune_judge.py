"""What a fine-tuned network says of held-out cases, each on its own grid."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from fmsuite.commands.finetune_config import FinetuneConfig
from fmsuite.commands.finetune_data import TaskData
from fmsuite.core.adaptation.network_files import Network
from fmsuite.core.adaptation.scenes import SceneBox, scene_scores
from fmsuite.core.adaptation.task import Change, Segmentation
from fmsuite.core.backbones.datewise import one_date
from fmsuite.core.data.cropped import CroppedScene
from fmsuite.core.data.index import SampleIndex
from fmsuite.core.data.packed import open_reader
from fmsuite.core.data.packed_scenes import open_scene
from fmsuite.core.data.pipeline import IMAGE, WholeWindows
from fmsuite.core.data.sample import Array, ArraySample
from fmsuite.core.data.scene import Scene, labels_of
from fmsuite.core.data.scene_maps import MapKind
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.evaluation.case_scores import segmentation_scores
from fmsuite.core.inputs import InputSpec, Normalize
from fmsuite.core.reports.case_slices import CaseSlices
from fmsuite.domains.base import Domain
from fmsuite.errors import FmsuiteError, ReadFailure, UsageError

SUFFIXES = (".gz", ".nii", ".tif", ".tiff", ".vrt", ".jp2")
"""Of files that maps are of, which have a suffix of their own."""


def file_stem(name: str) -> str:
    """A case's name as the name of a file."""
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    return re.sub(r"[^\w.+=-]+", "-", name).strip("-.") or "case"


def judge_scenes(
    config: FinetuneConfig,
    data: TaskData,
    network: Network,
    numbers: Sequence[int],
    device: torch.device,
    skipped: SkippedLog,
    write: Path | None,
    report: Callable[[Iterable, int], Iterable],
) -> tuple[dict[int, dict[str, list[float | None]]], list[int]]:
    """Scores of a segmentation, by case, and the cases that could not be judged.

    Args:
        numbers: of the cases.
        write: folder for the predicted label maps.

    Raises:
        UsageError: for a label that is no class.
    """
    found: dict[int, dict[str, list[float | None]]] = {}
    failed: list[int] = []
    for number in report(numbers, len(numbers)):
        case = data.cases[number]
        try:
            scene = case_scene(data, number)
            assert config.label_map is not None
            truth = scene.native_map(config.label_map)
            said = scores_of(config, network, scene, device)
            predicted = scene.labels_to_native(said.scores)
        except ReadFailure as failure:
            skipped.add_failure(failure)
            failed.append(number)
            continue
        ignore = network.task.config.ignore_index  # type: ignore[attr-defined]
        if isinstance(network.task, Change) and ignore is not None:
            # Where only one of the dates has data there is nothing to compare, whatever the map says.
            both = scene.scores_to_native(said.valid[None].astype(np.float32))[0] > 0.5
            truth = np.where(both, truth, ignore)
        try:
            found[number] = segmentation_scores(
                predicted,
                truth,
                scene.native_spacing,
                len(data.classes),
                config.judge.metrics,
                config.judge.tolerance,
                ignore,
                config.first_class,
            )
        except FmsuiteError as error:
            raise UsageError(f"{case.sources[0]}: {error.message}", error.hint) from error
        if write is not None:
            write.mkdir(parents=True, exist_ok=True)
            writer = scene.writer(write / file_stem(case.id), MapKind("classes", data.classes))
            writer.add(said.start, said.scores, said.valid)
            writer.finish()
    return found, failed


def case_scene(data: TaskData, number: int) -> Scene:
    """What is judged of a case: its source, or, where others have windows in that too or the groups are blocks of the
    ground, the box around its own.

    Raises:
        UsageError, ReadFailure: as ``open_scene``.
    """
    case, rows = data.cases[number], data.rows_of_case[number]
    scene = open_scene(data.domain, data.index, case.sources[0])
    alone = sum(other.sources[0] == case.sources[0] for other in data.cases) == 1
    if alone and "blocks" not in data.index.metadata:
        return scene
    axes, pitch = len(scene.size), np.asarray(scene.pitch)
    windows = [data.index[int(row)] for row in rows]
    starts = np.array([window.position[-axes:] for window in windows])
    extent = np.rint(np.asarray(windows[0].extent[-axes:]) / pitch).astype(int)
    return CroppedScene(scene, np.rint((starts - scene.origin) / pitch).astype(int), extent.tolist())


def scores_of(config: FinetuneConfig, network: Network, scene: Scene, device: torch.device) -> SceneBox:
    """Of one source, whole."""
    task = network.task
    assert isinstance(task, Segmentation)
    judge = config.judge
    return scene_scores(
        task, network.spec, scene, overlap=judge.overlap, blend=judge.blend, batch=judge.batch, device=device
    )


def judge_windows(
    config: FinetuneConfig,
    data: TaskData,
    network: Network,
    numbers: Sequence[int],
    device: torch.device,
    skipped: SkippedLog,
    report: Callable[[Iterable, int], Iterable],
) -> tuple[dict[int, list[float]], list[int]]:
    """Answers of the other tasks: the mean over a case's windows, by case, and the cases without a readable one."""
    rows = [row for number in numbers for row in data.rows_of_case[number].tolist()]
    owners = [number for number in numbers for _ in data.rows_of_case[number]]
    found = window_means(network, data.domain, data.index, rows, owners, config.judge.batch, device, skipped, report)
    return found, [number for number in numbers if number not in found]


@torch.no_grad()
def window_means(
    network: Network,
    domain: Domain,
    index: SampleIndex,
    rows: Sequence[int],
    owners: Sequence[int],
    batch_size: int,
    device: torch.device,
    skipped: SkippedLog,
    report: Callable[[Iterable, int], Iterable],
) -> dict[int, list[float]]:
    """What a network says of whole windows, unvaried: the mean over those of one owner that can be read.

    Args:
        rows: of the index. owners: of each row, a number.
        batch_size: windows at a time.
    """
    task, spec = network.task, network.spec
    windows = WholeWindows(index, open_reader(domain, index), spec, task.size or spec.size, task.backbone.grid)
    normalize = Normalize(spec).to(device)
    owner_of = dict(zip(rows, owners, strict=True))
    sums: dict[int, torch.Tensor] = {}
    counts: dict[int, int] = {}
    starts = range(0, len(rows), batch_size)
    for start in report(starts, len(starts)):
        batch, missing = windows[rows[start : start + batch_size]]
        for window in missing:
            skipped.add(window.source, window.stage, window.reason)
        if batch is None:
            continue
        (view,) = batch.views[IMAGE]
        said = task.predict(normalize.view(view.to(device))).double().cpu()
        for row, values in zip(batch.indices.tolist(), said, strict=True):
            owner = owner_of[row]
            sums[owner] = sums.get(owner, torch.zeros_like(values)) + values
            counts[owner] = counts.get(owner, 0) + 1
    return {owner: (total / counts[owner]).tolist() for owner, total in sums.items()}


def save_panel(
    config: FinetuneConfig, data: TaskData, network: Network, number: int, device: torch.device, path: Path
) -> None:
    """The slices of a case with truth and prediction, on the input's grid.

    Raises:
        ReadFailure: if its source cannot be read.
    """
    scene = case_scene(data, number)
    whole = scene.read((0,) * len(scene.size), scene.size)
    assert config.label_map is not None
    truth = labels_of(scene, whole, config.label_map)
    predicted = scores_of(config, network, scene, device).scores.argmax(0)
    image = _picture(whole, network.spec, data.domain, len(scene.size))
    spacing = (whole.spacing or network.spec.spacing or (1.0,) * len(scene.size))[-len(scene.size) :]
    ignore = network.task.config.ignore_index  # type: ignore[attr-defined]
    classes = len(data.classes)
    if config.first_class == 0:
        # Pictures leave 0 undrawn: it stands for what is not known, and every class for one more.
        truth, predicted = np.where(truth == ignore, 0, truth + 1), predicted + 1
        ignore, classes = 0, classes + 1
    slices = CaseSlices.of(image, truth, predicted, spacing, classes, ignore=-1 if ignore is None else ignore)
    path.parent.mkdir(parents=True, exist_ok=True)
    slices.save(path)


def _picture(whole: ArraySample, spec: InputSpec, domain: Domain, axes: int) -> Array:
    """A scene of two axes in colours, another's first channel; of a series, the date of which most is valid, the last
    of equals."""
    values = whole.values
    if values.ndim - 1 > axes:
        shown = np.ones(values.shape[1]) if whole.valid is None else whole.valid.mean(axis=(0, 2, 3))
        values, spec = values[:, len(shown) - 1 - int(np.argmax(shown[::-1]))], one_date(spec)
    return domain.to_rgb(values, spec) if axes == 2 else values[0].astype(np.float32)
