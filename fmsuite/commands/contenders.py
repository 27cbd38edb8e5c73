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
from fmsuite.core.controls import Histogram, untrained
from fmsuite.core.data.grouping import default_by
from fmsuite.core.data.index import SampleIndex
from fmsuite.core.data.reader import Reader
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.embedding import DEFAULT_BATCH_SIZE, Embedder, embed, store_facts
from fmsuite.core.encoders import Encoder, description
from fmsuite.core.evaluation.results import EncoderFacts
from fmsuite.core.features import FeatureStore
from fmsuite.core.inputs import InputSpec
from fmsuite.core.store_root import read_facts
from fmsuite.core.training.precision import choose_precision
from fmsuite.core.training.progress import ProgressReport
from fmsuite.domains.base import Progress
from fmsuite.errors import FmsuiteError, UsageError

FEATURES = "features"
HISTOGRAM = "histogram"


@dataclass(frozen=True)
class Contender:
    """One column of the comparison.

    Attributes:
        name: unique among all.
        of: names of the encoders that an untrained network is the control of.
    """

    name: str
    kind: Literal["encoder", "untrained", "histogram"]
    embedder: Embedder
    of: tuple[str, ...] = ()

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
        )

    def store(self, out: Path) -> Path:
        """Where its features are kept."""
        return out / FEATURES / f"{file_name(self.name)}.zarr"


def contenders(encoders: Mapping[str, Encoder], data: InputSpec, controls: bool) -> list[Contender]:
    """The encoders in their order, then for each architecture the same untrained, then the histogram.

    Args:
        encoders: by name.
        data: the input that the domain yields.

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
    if not controls:
        return found
    alike: dict[str, list[str]] = {}
    for name, encoder in encoders.items():
        shape = json.dumps(description(encoder.backbone, encoder.spec, encoder.pooling), sort_keys=True)
        alike.setdefault(shape, []).append(name)
    for names in alike.values():
        name = _free(f"untrained {names[0]}", found)
        found.append(Contender(name, "untrained", untrained(encoders[names[0]]), tuple(names)))
    found.append(Contender(_free(HISTOGRAM, found), "histogram", Histogram(data)))
    return found


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
