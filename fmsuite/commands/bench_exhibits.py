"""The pictures beside a benchmark's numbers: maps of the features, and what lies near to what."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from fmsuite.commands.contenders import Contender
from fmsuite.commands.labelled_windows import LabelledWindows
from fmsuite.core.data.packed import open_reader
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.evaluation.results import Evaluation
from fmsuite.core.features import FeatureStore
from fmsuite.core.reports.exhibits import Exhibits
from fmsuite.core.reports.feature_map import feature_map
from fmsuite.core.reports.neighbours import choose_queries, neighbours
from fmsuite.core.reports.pictures import window_pictures
from fmsuite.domains.base import Domain, Progress

MAPS = 4


def exhibits_of(
    plugin: Domain,
    found: Sequence[Contender],
    stores: Sequence[FeatureStore],
    windows: LabelledWindows,
    evaluations: Sequence[Evaluation],
    seed: int,
    skipped: SkippedLog,
    progress: Progress,
) -> Exhibits:
    """A map of the features of the first few, and what lies near to what for the first encoder and its control."""
    exhibits = Exhibits()
    held_out = torch.zeros(len(windows), dtype=torch.bool)
    held_out[windows.split.test] = True
    shown = list(zip(found, stores, strict=True))[:MAPS]
    for contender, store in progress(shown, len(shown), "Mapping features"):
        features = windows.features(store)
        exhibits.maps.append(feature_map(features, windows.labels, held_out, contender.name, seed=seed))
    first = found[0]
    predicted = next(
        (_answers(e) for e in evaluations if (e.encoder, e.shots, e.shuffled) == (first.name, None, False)), None
    )
    queries = choose_queries(windows.labels, held_out, predicted, seed=seed)
    reader, spec = open_reader(plugin, windows.index), plugin.input_spec(windows.index)
    pictures = partial(window_pictures, windows.index, reader, plugin.to_rgb, spec, skipped=skipped)
    names = [item.id for item in windows.items()]
    for contender, store in zip(found, stores, strict=True):
        if contender is not first and first.name not in contender.of:
            continue
        exhibits.neighbours += neighbours(
            windows.features(store),
            windows.rows,
            windows.labels,
            windows.groups,
            queries,
            pictures,
            encoder=contender.name,
            classes=windows.classes,
            names=names,
            notes=exhibits.notes,
            predicted=predicted if contender is first else None,
        )
    return exhibits


def _answers(evaluation: Evaluation) -> Tensor:
    return torch.tensor(evaluation.episodes[0].predictions)
