"""``fmsuite predict``: what a fine-tuned network says of files that nobody has labelled."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fmsuite.commands.finetune_judge import file_stem, window_means
from fmsuite.commands.report import NAME as REPORT
from fmsuite.commands.report import report
from fmsuite.commands.setup import open_domain, open_index
from fmsuite.core.adaptation.network_files import Network, load_network
from fmsuite.core.adaptation.scenes import stream_scene
from fmsuite.core.adaptation.task import Segmentation
from fmsuite.core.config import apply_overrides, validate
from fmsuite.core.data.forgiving import ForgivingScene
from fmsuite.core.data.index import SampleIndex
from fmsuite.core.data.packed_files import write_json
from fmsuite.core.data.packed_scenes import open_scene
from fmsuite.core.data.scene_maps import MapKind, SceneWriter
from fmsuite.core.data.skipped import FILE_NAME, SkippedLog
from fmsuite.core.reports.class_maps import MAPS, ClassMap, ClassMaps, Thinned, draw_class_map
from fmsuite.core.training.precision import choose_device
from fmsuite.domains.base import Domain, Progress, load_domain, no_progress
from fmsuite.errors import ReadFailure, UsageError
from fmsuite.tiling.labels import LabelOptions

TABLE = "predictions.csv"


@dataclass(frozen=True)
class Predicted:
    """
    Attributes:
        files: that were written.
        skipped: one sentence on what could not be used; empty if everything was.
    """

    files: list[Path]
    skipped: str


def predict(
    model: Path,
    sources: Sequence[Path],
    out: Path,
    *,
    probabilities: bool = False,
    overlap: float = 0.5,
    batch: int = 4,
    device: str = "auto",
    overrides: Sequence[str] = (),
    strict: bool = False,
    progress: Progress = no_progress,
) -> Predicted:
    """Label maps on the files' own grids (segmentation), or ``predictions.csv`` with a line for each source.

    Files are read as the network's training data were, without label maps and labels files. Maps are made and written
    part by part: memory does not grow with a raster. What cannot be decoded of a file has no result in its map, and a
    line in ``skipped.csv``.

    Args:
        model: folder with ``network.safetensors``.
        probabilities: of a segmentation, write those of each class as well, ``NAME-probabilities``.
        overlap, batch: see ``sliding_window``.
        overrides: ``data.key=value`` items, where the files need another way of reading.

    Raises:
        UsageError: if there is no network, or the files cannot be its input; for probabilities of another task.
        FmsuiteError: if a map cannot be written.
    """
    if not 0 <= overlap < 1:
        raise UsageError(f"An overlap of {overlap} is out of range.", "Use 0 to less than 1; 0.5 is common.")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: this is a file.", "Choose another folder with --out.")
    network = load_network(model)
    if probabilities and not isinstance(network.task, Segmentation):
        raise UsageError(
            "--probabilities asks for maps, and this network makes none.",
            f"Its answers are in {TABLE}; leave the option out.",
        )
    plain = choose_device(device)  # type: ignore[arg-type]
    domain = open_domain(network.domain, _options(network, overrides))
    out.mkdir(parents=True, exist_ok=True)
    for name in (FILE_NAME, MAPS):
        (out / name).unlink(missing_ok=True)
    skipped = SkippedLog(out / FILE_NAME, strict)
    domain, index = open_index(domain, list(sources), skipped, progress)
    differences = network.spec.differences(domain.input_spec(index))
    if differences:
        raise UsageError(
            f"The network's input and the files differ: {'; '.join(differences)}.", "Read them as it expects it."
        )
    network.task.to(plain)
    if isinstance(network.task, Segmentation):
        kinds = {"": MapKind("classes", network.classes)}
        if probabilities:
            kinds["-probabilities"] = MapKind("scores", network.classes)
        record = ClassMaps(domain=network.domain, model=str(model), classes=list(network.classes))
        files = _maps(
            network.task, network, domain, index, out, kinds, overlap, batch, plain, record, skipped, progress
        )
        if record.maps:
            write_json(out / MAPS, record.model_dump(mode="json"))
            files.append(report([out], out / REPORT))
    else:
        files = [_table(network, domain, index, out, batch, plain, skipped, progress)]
    return Predicted(files, skipped.summary())


def _options(network: Network, overrides: Sequence[str]) -> Any:
    plugin = load_domain(network.domain)
    kind, known = plugin.Options, {*plugin.truth_options, *LabelOptions.model_fields}
    raw = {key: value for key, value in network.data.items() if key not in known}
    if issubclass(kind, LabelOptions):
        raw["labels"] = "none"
    if "min_valid" in kind.model_fields:
        # How much of a window is worth learning from says nothing of what is to be predicted.
        raw["min_valid"] = 0.0
    asked = apply_overrides({"data": raw}, overrides)
    return validate(kind, asked["data"], "data", "command line")


def stems_of(index: SampleIndex, out: Path) -> list[str]:
    """What the maps of an index's sources are called in a folder.

    Raises:
        UsageError: if two would have one name, or one would take the place of a source.
    """
    stems = [file_stem(Path(source).name) for source in index.sources]
    twice = next((stem for stem, count in Counter(stems).items() if count > 1), None)
    if twice is not None:
        raise UsageError(f"Several files are called {twice}.", "Predict them into folders of their own.")
    if out.resolve() in {Path(source).resolve().parent for source in index.sources}:
        raise UsageError(f"{out}: maps would take the names of the files here.", "Choose another folder with --out.")
    return stems


def _maps(
    task: Segmentation,
    network: Network,
    domain: Domain,
    index: SampleIndex,
    out: Path,
    kinds: Mapping[str, MapKind],
    overlap: float,
    batch: int,
    device: torch.device,
    record: ClassMaps,
    skipped: SkippedLog,
    progress: Progress,
) -> list[Path]:
    """
    Args:
        kinds: what follows a file's name, and what is then written.
        record: gets a picture of each map, where sources are pictures.
    """
    files: list[Path] = []
    stems = stems_of(index, out)
    for source, stem in progress(list(zip(index.sources, stems, strict=True)), len(stems), "Predicting"):
        writers: list[SceneWriter] = []
        try:
            scene = ForgivingScene(open_scene(domain, index, source))
            writers = [scene.writer(out / f"{stem}{suffix}", kind) for suffix, kind in kinds.items()]
            small = Thinned(scene.size) if len(scene.size) == 2 else None
            for box in stream_scene(task, network.spec, scene, overlap=overlap, batch=batch, device=device):
                for writer in writers:
                    writer.add(box.start, box.scores, box.valid)
                if small is not None:
                    small.add(box.start, box.scores, box.valid)
            written = [writer.finish() for writer in writers]
            files += written
            if small is not None and type(domain).overview is not Domain.overview:
                picture = out / f"{stem}.png"
                draw_class_map(_overview(domain, index, source), small.labels, len(record.classes)).save(picture)
                shares, known = small.shares(len(record.classes))
                record.maps.append(
                    ClassMap(source=source, file=written[0].name, picture=picture.name, shares=shares, known=known)
                )
        except ReadFailure as failure:
            skipped.add_failure(failure)
            continue
        finally:
            for writer in writers:
                writer.discard()
        scene.note(skipped)
    return files


def _overview(domain: Domain, index: SampleIndex, source: str) -> np.ndarray | None:
    """A picture of a source; none of one that is damaged, of which there is a map all the same."""
    try:
        return domain.overview(index, source).rgb
    except ReadFailure:
        return None


def _table(
    network: Network,
    domain: Domain,
    index: SampleIndex,
    out: Path,
    batch: int,
    device: torch.device,
    skipped: SkippedLog,
    progress: Progress,
) -> Path:
    sources = index.sources
    number = {source: place for place, source in enumerate(sources)}
    owners = [number[index[row].source] for row in range(len(index))]
    means = window_means(
        network,
        domain,
        index,
        list(range(len(index))),
        owners,
        batch,
        device,
        skipped,
        lambda items, total: progress(items, total, "Predicting"),
    )
    path = out / TABLE
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("path", *network.classes))
        writer.writerows((source, *means[place]) for place, source in enumerate(sources) if place in means)
    return path
