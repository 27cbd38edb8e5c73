"""``fmsuite similar``: where a file is like a place that somebody points at."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor

from fmsuite.commands.embed import data_as_seen
from fmsuite.commands.setup import domain_options, open_domain, open_encoder, open_index, read_run_config
from fmsuite.core.adaptation.scenes import PANEL
from fmsuite.core.config import apply_overrides, validate
from fmsuite.core.data.packed_scenes import open_scene
from fmsuite.core.data.scene import Scene
from fmsuite.core.data.scene_maps import MapKind, SceneWriter
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.encoders import Encoder
from fmsuite.core.feature_cache import read_features, write_features
from fmsuite.core.reports.click_picture import click_picture
from fmsuite.core.similarity import Combine, TokenMap, otsu_of, place_vector, similarity, slabs, token_map
from fmsuite.core.training.precision import choose_device
from fmsuite.domains.base import Domain, Progress, load_domain, no_progress
from fmsuite.errors import UsageError
from fmsuite.tiling.labels import LabelOptions

log = logging.getLogger("fmsuite")
AUTO = "auto"
PICTURE = 1024
"""Longest side of the picture of a scene with two axes, before it is drawn."""


@dataclass(frozen=True)
class Similar:
    """
    Attributes:
        map, picture: the files. mask: of what reaches the threshold, if one was asked for.
        threshold: as used.
        clicks, negatives: samples of the file.
    """

    map: Path
    picture: Path
    mask: Path | None
    threshold: float | None
    clicks: list[tuple[int, ...]]
    negatives: list[tuple[int, ...]]


def similar(
    encoder: str,
    file: Path,
    out: Path,
    *,
    at: Sequence[str],
    negative: Sequence[str] = (),
    world: bool = False,
    combine: Combine = "max",
    centre: bool = False,
    threshold: str | None = None,
    features: Path | None = None,
    overlap: float = 0.5,
    batch: int = 4,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    domain: str | None = None,
    overrides: Sequence[str] = (),
    progress: Progress = no_progress,
) -> Similar:
    """Write the cosine similarity of every place of a file to the clicked ones, on the file's own grid, and a picture.

    Args:
        encoder: anything ``open_encoder`` opens; with ``domain`` where it does not say how its files were read.
        out: ``NAME`` or ``NAME.SUFFIX``; the field's own suffix takes the place of one of a NIfTI or TIFF file.
        at, negative: places, "X,Y,Z": samples along the file's own axes (of a raster "X,Y", column and row), or with
            ``world`` its world coordinates.
        combine: of several places, the nearest (``max``) or the mean; of the negative ones the nearest counts.
        centre: see ``TokenMap.directions``.
        threshold: ``auto`` (Otsu's) or a number; a mask of what reaches it is written as well.
        features: a ``.zarr`` folder with the file's features, which is made if it is not there.
        overlap, batch: see ``token_map``.
        domain, overrides: how to read the file, where the encoder does not say so, or in another way.

    Raises:
        UsageError: for places outside of the file, or of what is seen of it; features of something else; or an encoder
            and a file that do not fit.
        FmsuiteError: if the file cannot be read.
    """
    level = _check(file, at, threshold, overlap, batch, features)
    places, unwanted = [_numbers(text, world) for text in at], [_numbers(text, world) for text in negative]
    model = open_encoder(encoder)
    opened, index = open_index(
        opened_domain(encoder, model, domain, overrides), [file], SkippedLog(None, strict=True), progress
    )
    spec = opened.input_spec(index)
    model = model.fitted(spec)
    model.check_input(data_as_seen(spec, model))
    if len(index.sources) != 1:
        raise UsageError(f"{file}: holds {len(index.sources)} sources.", "Name a single one.")
    scene = open_scene(opened, index, index.sources[0])
    clicks, negatives = ([_sample(scene, place, world) for place in some] for some in (places, unwanted))
    seen, unseen = ([_located(scene, click) for click in some] for some in (clicks, negatives))
    facts = {"encoder": model.identity, "file": fingerprint(file), "overlap": overlap}
    facts["reading"] = hashlib.blake2b(opened.options.model_dump_json().encode(), digest_size=8).hexdigest()
    out.parent.mkdir(parents=True, exist_ok=True)
    tokens = _features(model, scene, features, out.parent, facts, overlap, batch, choose_device(device))

    off = tokens.mean() if centre else None
    liked, disliked = ([place_vector(tokens, place, off) for place in some] for some in (seen, unseen))
    scores = similarity(tokens, liked, disliked, combine, off)

    def parts() -> Iterator[tuple[int, np.ndarray]]:
        return slabs(scores, tokens)

    if level == AUTO:
        level = otsu_of(lambda: (part[np.isfinite(part)] for _, part in parts()))
    base = out.with_name(_stem(out.name))
    written = _write(scene.writer(base, MapKind("scores", ("similarity",))), parts(), 0.0)
    mask = None
    if isinstance(level, float):
        # Of two classes, one has what is just below the threshold for its score everywhere.
        below = np.float32(np.nextafter(np.float32(level), np.float32(-2)))
        writer = scene.writer(base.with_name(f"{base.name}-mask"), MapKind("classes", ("other", "similar")))
        mask = _write(writer, parts(), -2.0, below)
    picture = base.with_name(f"{base.name}.png")
    _draw(opened, model, scene, parts(), seen, unseen).save(picture)
    return Similar(written, picture, mask, level if isinstance(level, float) else None, clicks, negatives)


def _check(
    file: Path, at: Sequence[str], threshold: str | None, overlap: float, batch: int, features: Path | None
) -> float | str | None:
    """
    Returns:
        The threshold: a number, ``AUTO`` or ``None``.

    Raises:
        UsageError: for what can be told without opening anything.
    """
    if not file.exists():
        raise UsageError(f"{file}: there is no such file.", "Check the path.")
    if not at:
        raise UsageError("No place was given.", "Name at least one with --at X,Y,Z.")
    if not 0 <= overlap < 1:
        raise UsageError(f"An overlap of {overlap} is out of range.", "Use 0 to less than 1; 0.5 is common.")
    if batch < 1:
        raise UsageError(f"A batch of {batch} windows is none.", "Use 1 or more.")
    if features is not None and features.suffix != ".zarr":
        raise UsageError(f"--features {features}: not the name of a Zarr folder.", "Let it end in .zarr.")
    if threshold is None or threshold == AUTO:
        return threshold
    try:
        level = float(threshold)
    except ValueError:
        level = math.nan
    if not math.isfinite(level):
        raise UsageError(f"--threshold {threshold}: neither a number nor 'auto'.", "Similarity is at most 1.")
    return level


def _numbers(text: str, world: bool) -> list[float]:
    """
    Raises:
        UsageError: for anything but numbers with commas between, whole ones where they count samples.
    """
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [math.nan]
    if not all(map(math.isfinite, values)):
        raise UsageError(f"'{text}' is no place.", "Give numbers with commas between: 64,80,31.")
    if not world and any(value != round(value) for value in values):
        raise UsageError(f"'{text}' counts samples, which are whole.", "Add --world for coordinates.")
    return values


def opened_domain(encoder: str, model: Encoder, domain: str | None, overrides: Sequence[str]) -> Domain:
    """The domain that reads files as the encoder's training data were read, without labels and label maps.

    Raises:
        UsageError: if nothing says how that was.
    """
    config = Path(encoder) / "config.yaml"
    if config.is_file():
        run = read_run_config(config)
        if domain is not None and domain != run.domain:
            raise UsageError(f"{encoder} is of the domain '{run.domain}', not '{domain}'.", "Leave out --domain.")
        plugin = load_domain(run.domain)
        kind, known = plugin.Options, {*plugin.truth_options, *LabelOptions.model_fields}
        raw = {key: value for key, value in run.data.model_dump().items() if key not in known}
        options: BaseModel = validate(kind, _without_labels(kind, raw, overrides), "data", "command line")
        return open_domain(run.domain, options)
    if domain is None and model.spec.reading is not None:
        domain = model.spec.reading.domain
    if domain is None:
        raise UsageError(
            f"{encoder}: nothing in it says how the file is to be read.",
            "Name its field with --domain, and its options with --set data.KEY=VALUE.",
        )
    kind = load_domain(domain).Options
    raw = domain_options(domain, overrides, None, [model]).model_dump(exclude_unset=True)
    return open_domain(domain, validate(kind, _without_labels(kind, raw, ()), "data", "command line"))


def _without_labels(kind: type[BaseModel], raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    if issubclass(kind, LabelOptions):
        raw = {**raw, "labels": "none"}
    items = [item if item.startswith("data.") else f"data.{item}" for item in overrides]
    return apply_overrides({"data": raw}, items)["data"]


def _sample(scene: Scene, place: Sequence[float], world: bool) -> tuple[int, ...]:
    """
    Raises:
        UsageError: for a place outside of the file, with the range.
    """
    found = scene.from_world(place) if world else scene.from_file([int(value) for value in place])
    said = ",".join(f"{value:g}" for value in place)
    if len(found) != len(scene.native_size):
        raise UsageError(f"--at {said}: the file has {len(scene.native_size)} axes.", "Give one number an axis.")
    if any(not 0 <= value < length for value, length in zip(found, scene.native_size, strict=True)):
        # In the order in which places are given.
        order = scene.from_file(range(len(found)))
        lengths = dict(zip(order, scene.native_size, strict=True))
        ranges = ", ".join(f"0 to {lengths[axis] - 1}" for axis in sorted(lengths))
        where = f"{said} is sample {','.join(map(str, found))}" if world else said
        raise UsageError(f"{where}: outside of the file, whose samples go from {ranges}.", "Click inside of it.")
    return found


def _located(scene: Scene, click: tuple[int, ...]) -> tuple[float, ...]:
    place = scene.locate(click)
    if place is None:
        raise UsageError(
            f"{','.join(map(str, click))}: outside of the part of the file that is looked at (its foreground).",
            "Click nearer to the middle, or widen that part (medical: --set data.margin=...).",
        )
    return place


def _features(
    encoder: Encoder,
    scene: Scene,
    folder: Path | None,
    beside: Path,
    facts: dict[str, Any],
    overlap: float,
    batch: int,
    device: torch.device,
) -> TokenMap:
    if folder is not None and folder.exists():
        return read_features(folder, facts)
    spacing: tuple[float, ...] | None = scene.read((0,) * len(scene.size), (1,) * len(scene.size)).spacing

    def read(start: tuple[int, ...], extent: tuple[int, ...]) -> Tensor:
        sample = scene.read(start, extent)
        values = torch.from_numpy(np.ascontiguousarray(sample.values, dtype=np.float32))
        valid = torch.ones_like(values) if sample.valid is None else torch.from_numpy(sample.valid).expand_as(values)
        return torch.cat([values, valid.float()])

    encoder.to(device)
    tokens = token_map(
        encoder,
        read,
        scene.size,
        spacing=spacing,
        overlap=overlap,
        batch=batch,
        device=device,
        panel=PANEL if len(scene.size) == 2 else None,
        folder=beside,
    )
    if folder is not None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_features(folder, tokens, facts)
    return tokens


def fingerprint(path: Path) -> str:
    """Of names, lengths and times of a file, or of those in a folder: changes when the file does."""
    files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    lines = [[str(each.resolve()), each.stat().st_size, each.stat().st_mtime_ns] for each in files]
    return hashlib.blake2b(json.dumps(lines).encode(), digest_size=16).hexdigest()


def _stem(name: str) -> str:
    for suffix in (".gz", ".nii", ".tif", ".tiff", ".png"):
        name = name.removesuffix(suffix)
    return name


def _draw(
    domain: Domain,
    encoder: Encoder,
    scene: Scene,
    parts: Iterable[tuple[int, np.ndarray]],
    seen: Sequence[tuple[float, ...]],
    unseen: Sequence[tuple[float, ...]],
) -> Any:
    spacing: Sequence[float] | None = encoder.spec.spacing
    if len(scene.size) > 2:
        whole = scene.read((0,) * len(scene.size), scene.size)
        scores = np.concatenate([part for _, part in parts])
        return click_picture(
            whole.values[0], scores, seen, unseen, whole.spacing or spacing or (1.0,) * len(scene.size)
        )
    step = math.ceil(max(scene.size) / PICTURE)
    shown, thinned = [], []
    for first, part in parts:
        rows = slice((step // 2 - first) % step, None, step)
        sample = scene.read((first, 0), (len(part), scene.size[1]))
        spacing = sample.spacing or spacing
        shown.append(sample.values[:, rows, step // 2 :: step])
        thinned.append(part[rows, step // 2 :: step])
    image = domain.to_rgb(np.concatenate(shown, axis=1), encoder.spec)
    liked, disliked = ([tuple((at - step // 2) / step for at in place) for place in some] for some in (seen, unseen))
    return click_picture(image, np.concatenate(thinned), liked, disliked, spacing or (1.0, 1.0))


def _write(
    writer: SceneWriter, parts: Iterable[tuple[int, np.ndarray]], unknown: float, below: np.float32 | None = None
) -> Path:
    """
    Args:
        parts: see ``slabs``.
        unknown: the score where there is none, in files that have no place for that.
        below: the first class's score, where classes are to be written.
    """
    try:
        for first, part in parts:
            known = np.isfinite(part)
            values = np.where(known, part, np.float32(unknown))[None]
            if below is not None:
                values = np.concatenate([np.full_like(values, below), values])
            writer.add((first, *[0] * (part.ndim - 1)), values, None if known.all() else known)
        return writer.finish()
    except BaseException:
        writer.discard()
        raise
