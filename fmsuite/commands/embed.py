"""``fmsuite embed``: features for every window of an index."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from fmsuite.commands.setup import domain_options, open_domain, open_encoder, open_index
from fmsuite.core.controls import BandMeans, Histogram
from fmsuite.core.data.grouping import By, default_by
from fmsuite.core.data.index import SampleIndex
from fmsuite.core.data.packed import open_reader
from fmsuite.core.data.skipped import FILE_NAME, SkippedLog
from fmsuite.core.embedding import DEFAULT_BATCH_SIZE, Pool, left_out_of, store_facts
from fmsuite.core.embedding import embed as embed_windows
from fmsuite.core.encoders import Encoder, seeing_dates
from fmsuite.core.features import FeatureStore
from fmsuite.core.inputs import InputSpec
from fmsuite.core.pool import Resources
from fmsuite.core.store_root import read_facts
from fmsuite.core.training.precision import Precision, choose_device, choose_precision
from fmsuite.domains.base import Domain, Progress, no_progress
from fmsuite.errors import UsageError

log = logging.getLogger("fmsuite")
STORE_NAME = "features.zarr"
HISTOGRAM = "histogram"
BAND_MEANS = "band_means"
"""In place of an encoder: the histogram, or the mean, of each channel, a control."""


@dataclass(frozen=True)
class Embedded:
    """What is in the store now.

    Attributes:
        path: the store.
        groups, windows: how many are stored.
        skipped: one sentence on what could not be read; empty if everything was.
    """

    path: Path
    groups: int
    windows: int
    skipped: str


def embed(
    encoder: str,
    index: Path,
    out: Path,
    *,
    by: By | None = None,
    pooling: str | None = None,
    channels: Sequence[str] | None = None,
    batch_size: int | None = None,
    workers: int = -1,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    processes: int = 0,
    gpus: int | None = None,
    ray: str | None = None,
    ray_cpus: float | None = None,
    overwrite: bool = False,
    strict: bool = False,
    progress: Progress = no_progress,
    command: Sequence[str] = (),
) -> Embedded:
    """Write a feature store, or go on with one: only the groups that are missing are computed.

    Beside ``NAME.zarr`` lies ``NAME.skipped.csv``: several stores, and the index with its own, can share a folder.

    Args:
        encoder: anything ``setup.open_encoder`` opens, ``histogram`` or ``band_means``.
        index: the ``.parquet`` file, or the folder of an ``index.parquet``.
        out: the store, a folder ``*.zarr``; another folder gets it as ``features.zarr``.
        by: what a group is (``grouping.group_codes``); ``grouping.default_by`` if not given.
        pooling: in place of the encoder's own.
        channels: use only these of the encoder's channels, in the data's order.
        batch_size: windows in a batch; that of the store which is there, or else 64, if not given.
        workers: processes that read ahead for each process that embeds; -1 chooses.
        device: on a GPU that computes bfloat16 natively, the encoder runs in it; on others and on a CPU in float32.
        processes: how many embed, of this machine or of ``ray``; 0 embeds in this one, or fills the cluster. On GPUs
            each has one of its own.
        gpus: as many processes, each on a GPU of this machine.
        ray: address of a Ray cluster; see ``pool.run_units``.
        ray_cpus: cores of each of its workers; 1 if not given.
        overwrite: replace a store that is there.
        strict: a window that cannot be read is an error.

    Raises:
        UsageError: if encoder and data do not fit, the store was made of others (see
            ``FeatureStore.create_or_resume``), options contradict each other, or a cluster does not answer.
        FmsuiteError: as ``core.embedding.embed``.
    """
    path = out if out.suffix == ".zarr" else out / STORE_NAME
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"A batch of {batch_size} windows.", "Use 1 or more.")
    place, pool = _place_and_pool(device, processes, gpus, ray, ray_cpus)
    domain, windows = _open_index(index)
    model = _embedder(encoder, domain.input_spec(windows), channels, pooling)
    facts = store_facts(
        model,
        windows,
        name=encoder,
        by=by or default_by(windows),
        batch_size=batch_size or _batch_size_of(path, overwrite) or DEFAULT_BATCH_SIZE,
        precision=_precision(place, ray),
        command=command,
    )
    reader = open_reader(domain, windows)
    with FeatureStore.create_or_resume(path, facts, windows, overwrite) as store:
        log_path = path.with_name(f"{path.stem}.{FILE_NAME}")
        if not store.stored() and not store.unreadable():
            log_path.unlink(missing_ok=True)
        skipped = SkippedLog(log_path, strict)
        again = {" ".join(id.split()) for id in (*store.missing(), *store.unreadable())}
        skipped.forget(lambda entry: left_out_of(entry) in again)
        _say_what_is_there(store)
        embed_windows(
            model,
            windows,
            reader,
            store,
            workers=workers,
            device=place,
            skipped=skipped,
            progress=progress,
            batch_size=facts.batch_size,
            pool=pool,
        )
        return Embedded(path, len(store.stored()), store.windows(), skipped.summary())


def _embedder(
    what: str, data: InputSpec, channels: Sequence[str] | None, pooling: str | None
) -> Encoder | Histogram | BandMeans:
    if what in (HISTOGRAM, BAND_MEANS):
        if channels or pooling:
            raise UsageError(f"The control {what} takes all channels and has no pooling.", "Leave these options out.")
        return Histogram(data) if what == HISTOGRAM else BandMeans(data)
    model = open_encoder(what, channels=channels, pooling=pooling)
    model = model.fitted(data) if channels is None else seeing_dates(model, data)
    model.check_input(data_as_seen(data, model))
    return model


def data_as_seen(data: InputSpec, encoder: Encoder) -> InputSpec:
    """What a domain yields, at the size to which windows are resampled for an encoder; ``Encoder.check_input`` compares
    physical spacings, which change with it."""
    wanted = encoder.spec
    if data.bag or wanted.bag or data.axes != wanted.axes:
        return data
    size = [new if axis in data.spatial else old for axis, (old, new) in enumerate(zip(data.size, wanted.size))]
    return data.resized(tuple(size))


def _place_and_pool(
    device: Literal["auto", "cpu", "cuda"], processes: int, gpus: int | None, ray: str | None, ray_cpus: float | None
) -> tuple[torch.device, Pool]:
    """Where to compute (``cuda`` without a number where each process has a GPU of its own), and who does.

    Raises:
        UsageError: for options that contradict each other, or GPUs that are not there.
    """
    if processes < 0 or (gpus is not None and gpus < 1):
        raise UsageError(f"--processes {processes}, --gpus {gpus}.", "Use 1 or more, or leave them out.")
    if gpus is not None:
        if processes or ray is not None or device == "cpu":
            raise UsageError(
                "--gpus says how many processes embed on GPUs of this machine; it goes with neither --processes, --ray "
                "nor --device cpu.",
                "Use one of them.",
            )
        device, processes = "cuda", gpus
    if ray is not None:
        cores = 1.0 if ray_cpus is None else ray_cpus
        if cores <= 0:
            raise UsageError(f"--ray-cpus {cores:g}.", "A worker needs some of a core.")
        # The GPUs are the cluster's; this machine need not have one.
        place = torch.device("cuda" if device == "cuda" else _device(device).type)
        return place, Pool(processes, ray, Resources(cores, 1.0 if place.type == "cuda" else 0.0))
    if ray_cpus is not None:
        raise UsageError("--ray-cpus is for workers of a Ray cluster.", "Give its address with --ray, or leave it out.")
    place = _device(device)
    if not processes:
        return place, Pool()
    if place.type == "cuda":
        there = torch.cuda.device_count()
        if processes > there:
            raise UsageError(
                f"{processes} processes, each with a GPU of its own: PyTorch sees {there}.",
                f"Use --gpus {there}, or --device cpu.",
            )
        place = torch.device("cuda")
    return place, Pool(processes)


def _device(setting: Literal["auto", "cpu", "cuda"]) -> torch.device:
    if setting == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "--device is cuda and PyTorch sees no GPU here.",
            "Use --device cpu, or install a PyTorch build for this machine's GPU driver.",
        )
    return choose_device(setting)


def _precision(place: torch.device, ray: str | None) -> Precision:
    """Number format on that device. Of a cluster's GPUs the native one of all since 2020 is expected where this machine
    has none to ask; its workers refuse to embed if theirs is another."""
    if ray is not None and place.type == "cuda" and not torch.cuda.is_available():
        return "bf16"
    return choose_precision("auto", place)


def _open_index(path: Path) -> tuple[Domain, SampleIndex]:
    if path.is_dir():
        path = path / "index.parquet"
    if path.suffix != ".parquet":
        raise UsageError(f"{path}: not an index, which is a .parquet file.", "Make one with `fmsuite tile`.")
    name = SampleIndex.read(path).metadata.get("domain")
    if not isinstance(name, str):
        raise UsageError(f"{path}: this index does not say of which domain it is.", "Make one with `fmsuite tile`.")
    return open_index(open_domain(name, domain_options(name, [])), [path], SkippedLog(None))


def _batch_size_of(path: Path, overwrite: bool) -> int | None:
    """That of the store that is there and will be gone on with."""
    if overwrite or not path.exists():
        return None
    found = read_facts(path)
    return None if found is None else found.batch_size


def _say_what_is_there(store: FeatureStore) -> None:
    unreadable, missing, groups = len(store.unreadable()), len(store.missing()), len(store.keys())
    done = groups - missing - unreadable
    if not done and not unreadable:
        return
    again = f", and try {unreadable} again of which nothing could be read" if unreadable else ""
    if missing or unreadable:
        log.info("%s: %d of %d groups are there; going on with %d%s.", store.path, done, groups, missing, again)
    else:
        log.info("%s: all %d groups are there.", store.path, groups)
