"""What a domain plugin provides, and how plugins are found."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict

from fmsuite.core.data.grouping import By
from fmsuite.core.data.index import SampleIndex
from fmsuite.core.data.reader import Augmentation, Reader
from fmsuite.core.data.scene import Scene
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.inputs import InputSpec
from fmsuite.core.plugins import load_plugin, plugin_names
from fmsuite.errors import ReadFailure, UsageError
from fmsuite.tiling.table import join_tables, windows_table
from fmsuite.tiling.tasks import SourceFacts, SourceRows, Sources, SourceTask

Progress = Callable[[Iterable, int, str], Iterable]
"""``progress(items, total, title)`` yields the items and shows how far along they are."""


def no_progress(items: Iterable, total: int, title: str) -> Iterable:
    """Shows nothing."""
    return items


class DomainOptions(BaseModel):
    """Base of a domain's ``data:`` options; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True)
class Overview:
    """A picture of a whole source, placed in the source's own finest coordinates (those of ``Window.position``).

    Pixel (i, j) covers ``origin + (i, j) * pitch`` to ``origin + (i + 1, j + 1) * pitch``.

    Attributes:
        rgb: (H, W, 3) uint8.
        origin: (y, x) of the picture's corner.
        pitch: (y, x) length of one pixel, positive.
    """

    rgb: np.ndarray
    origin: tuple[float, float]
    pitch: tuple[float, float]


@dataclass(frozen=True)
class Units:
    """What a domain calls things, in the singular and without an article.

    Attributes:
        window: a row of the index; an item of ``bench``.
        source: a file, or files that are one thing; an item of ``fewshot`` on stores by source.
        group: what stays on one side of a split.
    """

    window: str = "window"
    source: str = "source"
    group: str = "group"

    def of(self, by: By) -> str:
        """A group of a feature store."""
        return {"source": self.source, "group": self.group, "folder": "folder"}[by]


class Domain(ABC):
    """A field: how its files become windows, arrays and valid variations of them.

    Everything else (views, tokens, objectives, training, probes) belongs to the core, which never learns which domain
    it is working for.

    Attributes:
        name: as on the command line.
        title: one line for ``fmsuite list domains``.
        Options: the model of the ``data:`` section.
        default_recipe: what ``fmsuite pretrain --domain NAME`` runs.
        recipes: a folder of further recipes, for plugins outside this package.
        units: what results call its windows, sources and groups.
        free_options: names of options that decide nothing about the index: one made with other values of them serves
            as well, and does not record them.
        truth_options: names of options, beside those of ``LabelOptions``, that say what is known of the training data:
            label maps, how they are split. Files that nobody has labelled are read without.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    Options: ClassVar[type[DomainOptions]]
    default_recipe: ClassVar[str]
    recipes: ClassVar[Path | None] = None
    units: ClassVar[Units] = Units()
    free_options: ClassVar[frozenset[str]] = frozenset()
    truth_options: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, options: DomainOptions) -> None:
        self.options = options

    @property
    def at_once(self) -> int:
        """How many sources ``index_source`` may look at, each in a thread of its own: more than 1 where it waits for
        other processes, which do the work."""
        return 1

    @classmethod
    def options_like(cls, spec: InputSpec) -> dict[str, Any]:
        """The ``data:`` options, as plain values, under which this domain reads files as ``spec`` says that the files
        of an encoder's training were read.

        Raises:
            UsageError: if the domain's inputs do not say how its files are read.
        """
        raise UsageError(
            f"The inputs of the domain '{cls.name}' do not say how its files are read.",
            "Make an index with `fmsuite tile`, and read its windows.",
        )

    @classmethod
    def open_file(cls, spec: InputSpec, path: str | Path) -> tuple[SampleIndex, Reader, InputSpec]:
        """The windows of one file, or of a folder that is one source, read as those of an encoder's training were.

        Returns:
            the index that ``fmsuite tile`` would make of the file with ``options_like(spec)``, its reader and input.

        Raises:
            UsageError: as ``options_like``, or if there is no such file.
            ReadFailure: if nothing of it can be used, or it is several sources.
        """
        without_labels = {"labels": "none"} if "labels" in cls.Options.model_fields else {}
        domain = cls(cls.Options.model_validate({**cls.options_like(spec), **without_labels}))
        log = SkippedLog()
        try:
            sources = domain.find_sources([Path(path)], log)
            looked = [(task, domain.index_source(task)) for task in sources.tasks]
            settled = domain.settle_sources([SourceFacts(task, found.facts) for task, found in looked], log)
            if settled is not None:
                looked = [(task, domain.index_source(task)) for task in settled]
            if len(looked) != 1:
                raise ReadFailure(str(path), "open", f"{len(looked)} {domain.units.source}s.", "Name one of them.")
            ((task, found),) = looked
            if found.rows is None or not len(found.rows):
                raise ReadFailure(str(path), "read", found.notes[0].reason if found.notes else "it holds no window.")
            index = join_tables([windows_table([found.rows])], {})
            metadata = domain.index_metadata(index, [SourceFacts(task, found.facts)], log)
        finally:
            domain.close()
        index.metadata = {"domain": cls.name, **sources.metadata, **metadata}
        return index, domain.reader(index), domain.input_spec(index)

    @abstractmethod
    def find_sources(self, paths: Sequence[Path], skipped: SkippedLog) -> Sources:
        """The sources in files and folders (folders are searched through), in the order of the index: by their names
        alone and what labels files say, without opening any. ``tiling.tasks.labelled_sources`` is often all it takes.

        Raises:
            UsageError: if a path does not exist, or holds no file of this domain at all.
        """

    @abstractmethod
    def index_source(self, task: SourceTask) -> SourceRows:
        """The windows of one source.

        A function of the options and the task alone: it may run in any process, at any time, or not at all where an
        earlier run has left its result. What it keeps open between calls, ``close`` closes.

        Raises:
            ReadFailure: if the source cannot be used.
        """

    def settle_sources(self, found: Sequence[SourceFacts], skipped: SkippedLog) -> Sequence[SourceTask] | None:
        """Which sources the index has, where that cannot be told from each alone: several that are one thing, bands
        that all must share.

        ``index_source`` is asked about those of them that are new: a task with other details is. ``None`` where every
        source stands for itself; then each must have given rows.

        Args:
            found: the sources that could be looked at, in order.
        """
        return None

    def index_metadata(self, index: SampleIndex, found: Sequence[SourceFacts], skipped: SkippedLog) -> dict[str, Any]:
        """What the index is to record beside its rows, as JSON values: channel names, statistics, spacing.

        ``input_spec`` and ``reader`` read it back; the options need not be repeated there. ``notes`` are sentences on
        how windows came about, which ``tile`` prints and results repeat.

        Args:
            index: the rows; its metadata is still empty.
            found: its sources, in order.
            skipped: for what went wrong meanwhile.
        """
        return {}

    def close(self) -> None:  # noqa: B027
        """Close what ``index_source`` keeps open. It may be called again afterwards."""

    @abstractmethod
    def input_spec(self, index: SampleIndex) -> InputSpec:
        """The input that ``reader(index)`` yields: its size is the window's."""

    @abstractmethod
    def reader(self, index: SampleIndex) -> Reader:
        """Reads the index's windows, resampled to the asked spacing."""

    def scene(self, index: SampleIndex, source: str) -> Scene:
        """One source of the index, whole, on the grid of ``reader(index)``: for dense predictions.

        Raises:
            UsageError: if the domain predicts nothing densely, or the source is not in the index.
            ReadFailure: if the source cannot be read.
        """
        raise UsageError(f"The domain '{self.name}' has no dense predictions over whole sources.")

    @abstractmethod
    def augmentation(self, spec: InputSpec) -> Augmentation:
        """The variations that are valid for this domain's images."""

    @abstractmethod
    def to_rgb(self, values: np.ndarray, spec: InputSpec) -> np.ndarray:
        """A picture of one view for people: (C, *size) raw values to (H, W, 3) uint8."""

    @abstractmethod
    def example_data(self, folder: Path, seed: int = 0) -> Path:
        """Make a small, honest data set with a known difference between its classes; returns the path to give to
        ``--data``. The same seed makes the same pixels."""

    def preview(self, index: SampleIndex, folder: Path) -> list[Path]:
        """Pictures of where the windows are, one a source.

        Raises:
            UsageError: if the domain has none.
        """
        raise UsageError(f"The domain '{self.name}' draws no preview.")

    def overview(self, index: SampleIndex, source: str) -> Overview:
        """A picture of one source of the index, on which all of its windows can be placed by (y, x).

        Raises:
            UsageError: if the domain has none, or the source is not in the index.
            ReadFailure: if the source cannot be read any more.
        """
        raise UsageError(f"The domain '{self.name}' draws no overview of a source.")


def domain_names() -> list[str]:
    """Names of the installed domains, without importing any."""
    return plugin_names()


def load_domain(name: str) -> type[Domain]:
    """
    Raises:
        UsageError: for an unknown name (with the nearest known one), or if the domain's libraries are not installed.
    """
    return load_plugin(name)
