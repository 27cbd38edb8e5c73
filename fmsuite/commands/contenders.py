"""What ``bench`` compares: the user's encoders and the controls beside them, and their features on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from fmsuite.commands.comparison import file_name
from fmsuite.commands.embed import data_as_seen
from fmsuite.core.controls import BandMeans, Histogram, untrained
from fmsuite.core.data.grouping import default_by
from fmsuite.core.data.index import SampleIndex
from fmsuite.core.data.reader import Reader
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.embedding import DEFAULT_BATCH_SIZE, Embedder, embed, store_facts
from fmsuite.core.encoders import Encoder, description
from fmsuite.core.evaluation.renormalised import renormalised
from fmsuite.core.evaluation.results import EncoderFacts
from fmsuite.core.evaluation.value_statistics import ValueSample
from fmsuite.core.features import FeatureStore
from fmsuite.core.inputs import InputSpec
from fmsuite.core.store_root import read_facts
from fmsuite.core.training.precision import choose_precision
from fmsuite.core.training.progress import ProgressReport
from fmsuite.domains.base import Progress
from fmsuite.errors import FmsuiteError, UsageError

FEATURES = "features"
HISTOGRAM = "histogram"
BAND_MEANS = "band means"
FEW_CHANNELS = 3
"""Channels beyond which their means are a control of their own: a spectrum tells more than a colour."""


@dataclass(frozen=True)
class Contender:
    """One column of the comparison.

    Attributes:
        name: unique among all.
        of: names of the encoders that an untrained network is the control of.
        variant_of: the encoder that this is under another normalisation, and which.
    """

    name: str
    kind: Literal["encoder", "untrained", "histogram", "means", "normalised"]
    embedder: Embedder
    of: tuple[str, ...] = ()
    variant_of: tuple[str, str] | None = None

    @property
    def facts(self) -> EncoderFacts:
        provenance = dict(self.embedder.provenance)
        if self.of:
            provenance["control_of"] = list(self.of)
        return EncoderFacts(
            name=self.name,
            kind=self.kind,
            identity=self.embedder.identity,
            dim=self.embedder.dim,
            pooling=self.embedder.pooling,
            provenance=provenance,
            control_of=self.of[0] if self.of else None,
            variant_of=self.variant_of[0] if self.variant_of else None,
            normalisation=self.variant_of[1] if self.variant_of else None,
        )

    def store(self, out: Path) -> Path:
        """Where its features are kept. Another split gives other statistics to normalise with, and so another store."""
        name = file_name(self.name)
        return out / FEATURES / (f"{name}-{self.embedder.identity[:8]}.zarr" if self.variant_of else f"{name}.zarr")


Means = Literal["auto", "mean", "mean+std", "none"]
"""Whether the means of the channels are a control; ``auto``: where there are more than three."""


def contenders(
    encoders: Mapping[str, Encoder], data: InputSpec, controls: bool, means: Means = "auto"
) -> list[Contender]:
    """The encoders in their order, then for each architecture the same untrained, then the histogram, then the means of
    the channels.

    Args:
        encoders: by name.
        data: the input that the domain yields.
        means: taken as asked for whatever ``controls`` says.

    Raises:
        UsageError: naming an encoder that the data do not fit.
    """
    fitted: dict[str, Encoder] = {}
    for name, encoder in encoders.items():
        try:
            fitted[name] = encoder.fitted(data)
            fitted[name].check_input(data_as_seen(data, fitted[name]))
        except UsageError as error:
            raise UsageError(
                f"Encoder '{name}': {error.message}",
                "Take the windows as it expects them (--recipe, or --set data.KEY=VALUE), or leave it out.",
            ) from error
    encoders = fitted
    found = [Contender(name, "encoder", encoder) for name, encoder in encoders.items()]
    if controls:
        found += _controls(encoders, data, found)
    if means in ("mean", "mean+std") or (means == "auto" and controls and data.in_chans > FEW_CHANNELS):
        found.append(Contender(_free(BAND_MEANS, found), "means", BandMeans(data, means == "mean+std")))
    return found


def variants(
    found: Sequence[Contender], names: Sequence[str], sample: ValueSample
) -> tuple[list[Contender], list[str]]:
    """Each encoder among the contenders under other normalisations, and sentences on those that do not apply.

    Args:
        names: as of ``renormalised``.

    Raises:
        UsageError: as ``renormalised``.
    """
    made: list[Contender] = []
    notes = []
    encoders = [
        (one.name, one.embedder) for one in found if isinstance(one.embedder, Encoder) and one.kind == "encoder"
    ]
    for name, encoder in encoders:
        under, left_out = renormalised(encoder, name, names, sample)
        for key, embedder in under.items():
            called = _free(f"{name}, {key}", [*found, *made])
            made.append(Contender(called, "normalised", embedder, variant_of=(name, key)))
        notes += left_out
    return made, notes


def _controls(encoders: Mapping[str, Encoder], data: InputSpec, given: Sequence[Contender]) -> list[Contender]:
    found = list(given)
    alike: dict[str, list[str]] = {}
    for name, encoder in encoders.items():
        shape = json.dumps(description(encoder.backbone, encoder.spec, encoder.pooling), sort_keys=True)
        alike.setdefault(shape, []).append(name)
    for names in alike.values():
        name = _free(f"untrained {names[0]}", found)
        found.append(Contender(name, "untrained", untrained(encoders[names[0]]), tuple(names)))
    found.append(Contender(_free(HISTOGRAM, found), "histogram", Histogram(data)))
    return found[len(given) :]


def _free(name: str, found: Sequence[Contender]) -> str:
    """The name, or with "control" before it where an encoder's store would have the same file name."""
    taken = {file_name(contender.name) for contender in found}
    while file_name(name) in taken:
        name = f"control {name}"
    return name


def has_features(out: Path) -> bool:
    """Whether an earlier comparison left features in this folder."""
    return any((out / FEATURES).glob("*.zarr"))


def embed_all(
    found: Sequence[Contender],
    index: SampleIndex,
    reader: Reader,
    out: Path,
    *,
    batch_size: int | None,
    workers: int,
    device: torch.device,
    skipped: SkippedLog,
    progress: Progress,
    command: Sequence[str],
) -> list[FeatureStore]:
    """A store of features for each, of which only what is missing is computed.

    Args:
        batch_size: that of a store that is there, or else ``DEFAULT_BATCH_SIZE``, if not given.

    Raises:
        UsageError: if a store is there that was made of other windows or another encoder.
        FmsuiteError: as ``embedding.embed``; and if ``skipped`` is strict and windows are missing from an earlier run.
    """
    stores = []
    for contender in found:
        path, embedder = contender.store(out), contender.embedder
        before = read_facts(path)
        facts = store_facts(
            embedder,
            index,
            name=contender.name,
            by=default_by(index),
            batch_size=batch_size or (before.batch_size if before else DEFAULT_BATCH_SIZE),
            precision=choose_precision("auto", device),
            command=command,
        )
        different = before.differences(facts) if before else []
        if different and FeatureStore.open(path).stored():
            raise UsageError(
                f"{path}: there are features here that were made otherwise: {'; '.join(different)}.",
                "Choose another folder with --out, or remove this one to have its features made again.",
            )

        with FeatureStore.create_or_resume(path, facts, index) as store:
            embed(
                embedder,
                index,
                reader,
                store,
                workers=workers,
                device=device,
                skipped=skipped,
                progress=_titled(progress, f"Embedding: {contender.name}"),
                batch_size=facts.batch_size,
            )
        embedder.to(torch.device("cpu"))
        stores.append(store)
        if skipped.strict and store.windows() < len(index):
            raise FmsuiteError(
                f"{path}: {len(index) - store.windows()} windows could not be read when it was made.",
                "(--strict makes a skipped source an error.) Mend the files and remove this store.",
            )
    return stores


def _titled(progress: Progress, title: str) -> ProgressReport:
    return lambda items, total, _: progress(items, total, title)
