"""What a few-shot comparison shows beside its numbers: feature maps, neighbours, and evidence from the slides."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fmsuite.commands.setup import domain_options, open_domain, open_index
from fmsuite.core.data.index import SampleIndex
from fmsuite.core.data.packed import open_reader
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.evaluation.episodes import Draw
from fmsuite.core.evaluation.prototypes import fit_prototypes, nearest_in_bags, prototype_distances, prototype_scores
from fmsuite.core.evaluation.results import EncoderFacts
from fmsuite.core.evaluation.store_bags import StoredBags
from fmsuite.core.features import FeatureStore
from fmsuite.core.reports.evidence import Judged, slide_evidence
from fmsuite.core.reports.exhibits import Exhibits
from fmsuite.core.reports.feature_map import balanced_sample, feature_map
from fmsuite.core.reports.neighbours import choose_queries, neighbours
from fmsuite.core.reports.pictures import Pictures, window_pictures
from fmsuite.core.store_root import INDEX
from fmsuite.domains.base import Domain
from fmsuite.errors import FmsuiteError

METHOD = "mi_simpleshot"
MAP_OF_MEANS = 50
"""From so many slides on a point of the map is a slide; of fewer it is one of their windows."""
NEIGHBOUR_WINDOWS = 4000
"""Windows among which neighbours are looked for."""
QUERIES = 4


@dataclass(frozen=True)
class Asked:
    """Who was classified.

    Attributes:
        ids: of the bags, as in ``Results.items``.
        asked: (S,) bool, whether a bag is ever asked.
        unit: what a bag is, in the singular.
        draw: an episode, whose queries the evidence is of.
        shots: that it has.
        k: of MI-SimpleShot; ``None`` where that was not among the methods.
    """

    ids: Sequence[str]
    classes: Sequence[str]
    asked: Tensor
    unit: str
    draw: Draw
    shots: int
    k: int | None


class Illustrator:
    """Adds what one encoder shows to the exhibits.

    The windows are read again where they lie. What cannot be read any more, or drawn, is a note in the exhibits.

    Args:
        store: one of those compared; all have the same index.
        evidence: slides an encoder.
    """

    def __init__(self, store: FeatureStore, who: Asked, evidence: int, seed: int, exhibits: Exhibits) -> None:
        self.who = who
        self.evidence = evidence
        self.seed = seed
        self.exhibits = exhibits
        self.unread = SkippedLog(None)
        self.windows = _Windows.open(store, self.unread, exhibits.notes)

    def show(self, stored: StoredBags, encoder: EncoderFacts) -> None:
        """Controls get a map only."""
        try:
            self._map(stored, encoder.name)
            if encoder.kind == "encoder" and self.windows is not None:
                self._neighbours(stored, encoder.name, self.windows)
                self._evidence(stored, encoder.name, self.windows)
        except FmsuiteError as error:
            # Numbers that took long are not lost for want of a picture.
            self._note(f"{encoder.name}: not everything could be shown: {error}")
        failed = self.unread.entries
        if failed:
            self._note(
                f"{encoder.name}: {len(failed)} windows or files could not be read again and are not shown; the first "
                f"is {failed[0].path}: {failed[0].reason}"
            )
            self.unread.entries.clear()

    def _map(self, stored: StoredBags, name: str) -> None:
        bags, unit = stored.bags, self.who.unit
        if len(bags) >= MAP_OF_MEANS:
            features, labels, asked = bags.means, bags.labels, self.who.asked
            points = f"A point is a {unit}: the mean of its windows' features."
        else:
            features, labels, asked = bags.features, bags.labels[bags.bag_of], self.who.asked[bags.bag_of]
            points = f"A point is a window, in the class of its {unit}."
        drawn = feature_map(features, labels, asked, name, seed=self.seed)
        self.exhibits.maps.append(drawn.model_copy(update={"method": f"{points} {drawn.method}"}))

    def _neighbours(self, stored: StoredBags, name: str, windows: _Windows) -> None:
        bags = stored.bags
        bag_of = bags.bag_of
        readable = torch.tensor([windows.readable(stored.rows_of(bag)) for bag in range(len(bags))])
        near = torch.from_numpy(np.flatnonzero(readable[bag_of]))
        near = near[balanced_sample(bags.labels[bag_of[near]].numpy(), NEIGHBOUR_WINDOWS, self.seed)]
        if not len(near):
            return
        of = bag_of[near]
        queries = choose_queries(bags.labels[of], self.who.asked[of], count=QUERIES, seed=self.seed)
        self.exhibits.neighbours += neighbours(
            bags.features[near],
            stored.rows[near.numpy()],
            bags.labels[of],
            bags.groups[of],
            queries,
            windows.pictures,
            encoder=name,
            classes=self.who.classes,
            names=[self.who.ids[bag] for bag in of.tolist()],
            notes=self.exhibits.notes,
        )

    def _evidence(self, stored: StoredBags, name: str, windows: _Windows) -> None:
        if not self.evidence:
            return
        if self.who.k is None:
            self._note(f"There is no evidence from single {self.who.unit}s, as {METHOD} was not among the methods.")
            return
        if int(stored.bags.sizes.max()) == 1:
            self._note(f"There is no evidence from single {self.who.unit}s, as each is a single window.")
            return
        judged = [
            one
            for bag, one in zip(self.who.draw.queries.tolist(), self._judged(stored, self.who.k), strict=True)
            if windows.readable(stored.rows_of(bag))
        ]
        if not judged:
            self._note(f"{name}: the files of all {self.who.unit}s that were asked are gone, so none can be shown.")
            return
        draw, unit = self.who.draw, self.who.unit
        self._note(
            f"The evidence is from the first episode with {self.who.shots} examples of each class (seed {draw.seed}): "
            f"prototypes are made of its {len(draw.support)} examples, and none of these is among the {unit}s shown."
        )
        self.exhibits.evidence += slide_evidence(
            judged,
            windows.index,
            self.who.classes,
            windows.pictures,
            partial(windows.domain.overview, windows.index),
            encoder=name,
            method=METHOD,
            unit=windows.spacing_unit,
            skipped=self.unread,
            notes=self.exhibits.notes,
            limit=self.evidence,
            seed=self.seed,
        )

    def _judged(self, stored: StoredBags, k: int) -> list[Judged]:
        """The queries of the episode as MI-SimpleShot sees them."""
        bags, draw = stored.bags, self.who.draw
        of_support = torch.repeat_interleave(bags.labels[draw.support], bags.sizes[draw.support])
        prototypes = fit_prototypes(bags.features[bags.rows(draw.support)], of_support, bags.classes)
        found = []
        for bag in draw.queries.tolist():
            vectors = bags.features[int(bags.offsets[bag]) : int(bags.offsets[bag + 1])]
            distances = prototype_distances(vectors, prototypes)
            scores = prototype_scores(nearest_in_bags(distances, bags.sizes[bag : bag + 1], k))[0]
            found.append(
                Judged(
                    item=self.who.ids[bag],
                    rows=stored.rows_of(bag),
                    distances=distances.numpy(),
                    true=int(bags.labels[bag]),
                    predicted=int(scores.argmax()),
                    scores=scores.tolist(),
                )
            )
        return found

    def _note(self, sentence: str) -> None:
        if sentence not in self.exhibits.notes:
            self.exhibits.notes.append(sentence)


@dataclass(frozen=True)
class _Windows:
    """Reads the windows of a store again.

    Attributes:
        gone: codes of sources that no longer exist, by their position in ``codes``.
        codes: (N,) the source of each row.
    """

    domain: Domain
    index: SampleIndex
    pictures: Pictures
    spacing_unit: str
    gone: np.ndarray
    codes: np.ndarray

    @classmethod
    def open(cls, store: FeatureStore, unread: SkippedLog, notes: list[str]) -> _Windows | None:
        """``None``, with a note, if the domain is not installed, or no file is left."""
        name = store.facts.domain
        try:
            domain, index = open_index(
                open_domain(name, domain_options(name, [])), [store.path / INDEX], SkippedLog(None)
            )
            reader, spec = open_reader(domain, index), domain.input_spec(index)
        except FmsuiteError as error:
            notes.append(f"No window could be read again, so none is shown: {error}")
            return None
        column = index.table.column("source").unify_dictionaries().combine_chunks()
        sources = column.dictionary.to_pylist()
        gone = np.array([not os.path.exists(source) for source in sources])
        if gone.all():
            notes.append(
                f"The files are no longer where they were when they were embedded (the first is {sources[0]}), so no "
                "window and no heatmap is shown; the numbers do not need them."
            )
            return None
        if gone.any():
            notes.append(
                f"{int(gone.sum())} of {len(sources)} files are no longer where they were when they were embedded "
                f"(such as {sources[int(np.argmax(gone))]}); their windows are not shown."
            )
        pictures = partial(window_pictures, index, reader, domain.to_rgb, spec, skipped=unread)
        return cls(domain, index, pictures, spec.spacing_unit, gone, column.indices.to_numpy())

    def readable(self, rows: np.ndarray) -> bool:
        """Whether all files of these rows exist."""
        return not self.gone[self.codes[rows]].any()
