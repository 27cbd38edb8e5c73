"""What flows from a reader to an objective: samples, the views an objective asks for, and batches of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from fmsuite.core.data.adjust import Adjustment

Array = np.ndarray


@dataclass(frozen=True)
class SampleKey:
    """Names one draw of the sample stream; all of a sample's randomness derives from it and the run's seed.

    Attributes:
        epoch, index: which pass over the index, which row.
        step, slot, slots: its place in the run: optimiser step, position in the global batch, the batch's size.
            Samplers that spread something evenly over a batch (DINOv2's mask ratios) use these.
        attempt: 0, or the how-manieth replacement of a window that could not be read.
    """

    epoch: int
    index: int
    step: int = 0
    slot: int = 0
    slots: int = 1
    attempt: int = 0


class Sample(ABC):
    """One window of a source, before views are cut from it.

    A pixel array is an ``ArraySample``. A source that can be drawn at any resolution (a vector drawing, a slide read
    at a finer level) subclasses this and does so in ``crop``.

    Attributes:
        size: length along each of the input's axes, in the units in which crops are asked for; a pixel array has whole
            pixels, a drawing may measure any number of units.
    """

    @property
    @abstractmethod
    def size(self) -> tuple[float, ...]: ...

    @abstractmethod
    def crop(self, start: tuple[float, ...], extent: tuple[float, ...], size: tuple[int, ...]) -> ArraySample:
        """The box that begins at ``start`` and measures ``extent`` (in this sample's units), resampled to ``size``."""


@dataclass
class ArraySample(Sample):
    """A window as an array.

    Attributes:
        values: (C, *size) in the source's native dtype; (N, D) for a bag.
        valid: bool, (1, *size) or (C, *size), (N,) for a bag; ``None`` means all valid.
        coords: positions along axes that are not evenly spaced: ``{"time": (T,) days since 2000-01-01}``; for a bag,
            each axis to (N,).
        spacing: physical length of one array sample along each axis, where it is known and varies between sources.
        maps: integer label maps (*size), or of the last axes alone where they are alike along the first ones (dates),
            that are cropped along with the pixels (drawing layers, organ masks); a
            plugin's mask sampler may read them, and a view brings those that its request names.
        adjust: what is still to be done to the values, on the device.
    """

    values: Array
    valid: Array | None = None
    coords: dict[str, Array] = field(default_factory=dict)
    spacing: tuple[float, ...] | None = None
    maps: dict[str, Array] = field(default_factory=dict)
    adjust: Adjustment | None = None

    @property
    def size(self) -> tuple[int, ...]:
        return tuple(self.values.shape[1:])

    def crop(self, start: tuple[float, ...], extent: tuple[float, ...], size: tuple[int, ...]) -> ArraySample:
        from fmsuite.core.data.crop import crop_array_sample

        return crop_array_sample(self, start, extent, size)

    def replace(self, **changes: object) -> ArraySample:
        return replace(self, **changes)  # type: ignore[arg-type]


@dataclass
class MaskContext:
    """What a mask sampler may look at.

    Attributes:
        axes, shape: the token grid of this view (group axis included), row-major.
        valid: (N,) bool, tokens that carry data.
        generator: this view's own random stream.
        key: the sample's place in the run.
        view: number of this view among the ``views`` masked views of the sample.
        maps: the sample's label maps, cropped as the pixels were.
    """

    axes: tuple[str, ...]
    shape: tuple[int, ...]
    valid: Array
    generator: np.random.Generator
    key: SampleKey
    view: int = 0
    views: int = 1
    maps: Mapping[str, Array] = field(default_factory=dict)


MaskSampler = Callable[[MaskContext], Array]
"""Returns (N,) bool, True where a token is masked; never True at an invalid token. A sampler that draws several
patterns of one view (I-JEPA's context and targets) returns (M, N), always with the same M. Must be picklable."""


@dataclass(frozen=True)
class ViewRequest:
    """Views that an objective asks for, in terms every domain understands.

    Attributes:
        name: key in ``Batch.views``.
        count: how many of them for each sample.
        size: length along each axis after resampling.
        scale: range of the crop's share of the sample's area or volume; (1, 1) is the whole sample.
        ratio: range of the crop's aspect ratio.
        cells: into how many equal cells the sample is divided along each axis. A view is then of a cell's size, at a
            random place, and ``scale`` and ``ratio`` are not read. One along axes that are not spatial.
        tiled: the views are those cells themselves, row-major; ``count`` is their number.
        augment: strength, one of ``AUGMENT``; the domain decides what is valid for its images at that strength.
        second: this view is the second of an asymmetric pair (less blur, solarisation, where the domain has them).
        mask: draws the tokens to mask, or ``None``.
        maps: names of the sample's label maps to bring along, as targets.
    """

    name: str
    size: tuple[int, ...]
    count: int = 1
    scale: tuple[float, float] = (1.0, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    augment: str = "weak"
    second: bool = False
    mask: MaskSampler | None = None
    maps: tuple[str, ...] = ()
    cells: tuple[int, ...] | None = None
    tiled: bool = False


@dataclass(frozen=True)
class SupportRequest:
    """Labelled windows that an objective asks for beside every step's samples (``core.data.supports``).

    Attributes:
        classes: how many classes a step, drawn without replacement; over all ranks together.
        per_class: windows of each.
        views: what to cut from them.
    """

    classes: int
    per_class: int
    views: tuple[ViewRequest, ...]


@dataclass(frozen=True)
class PairRequest:
    """What an objective takes beside every sample from the table of pairs (``core.data.pairs``); one of the two.

    Attributes:
        tokens: length to which the bytes of a text are cut or padded.
        width: how many numbers a vector has.
    """

    tokens: int | None = None
    width: int | None = None


AUGMENT = ("none", "weak", "strong")
"""none: no change. weak: symmetries only (flips, turns). strong: all that keeps the meaning of an image."""


@dataclass
class View:
    """A batch of one view.

    Attributes:
        pixels: (B, C, *size); native dtype from the loader, float32 once normalised. (B, N, D) for bags.
        valid: bool, (B, 1 or C, *size) or (B, N); ``None`` means all valid.
        mask: (B, N) bool, tokens chosen by the request's mask sampler; (B, M, N) for a sampler of M patterns.
        coords: axis name to (B, length) for unevenly spaced axes; for bags, each axis to (B, N).
        spacing: (B, A) physical length of one array sample.
        keys: (B,) int64, a number for each sample and draw, for randomness inside the network; they stay on the host.
        adjust: parameters of what is still to be done to the raw pixels (``core.data.adjust``), (B, ...) each; they
            stay on the host. ``None`` once it is done.
        maps: the label maps that the request named, (B, *size) integers, or of the last axes alone; 0 where a shorter
            sample is padded, which ``valid`` tells.
        box: (B, 2, A) float32, where the view was cut from, before it was flipped or turned: start and extent along
            each axis as shares of the sample's length. ``None`` for bags.
    """

    pixels: Tensor
    valid: Tensor | None = None
    mask: Tensor | None = None
    coords: dict[str, Tensor] = field(default_factory=dict)
    spacing: Tensor | None = None
    keys: Tensor | None = None
    adjust: dict[str, Tensor] | None = None
    maps: dict[str, Tensor] = field(default_factory=dict)
    box: Tensor | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    def map(self, function: Callable[[Tensor], Tensor]) -> View:
        """Apply a function to every tensor."""

        def each(value: Tensor | None) -> Tensor | None:
            return None if value is None else function(value)

        return View(
            function(self.pixels),
            each(self.valid),
            each(self.mask),
            {axis: function(values) for axis, values in self.coords.items()},
            each(self.spacing),
            each(self.keys),
            None if self.adjust is None else {name: function(part) for name, part in self.adjust.items()},
            maps={name: function(labels) for name, labels in self.maps.items()},
            box=each(self.box),
        )

    def to(self, device: torch.device | str) -> View:
        """Everything on a device, except the keys and adjustments: what hangs on these is decided on the host, without
        waiting for the device."""
        moved = replace(self, keys=None, adjust=None).map(lambda tensor: tensor.to(device, non_blocking=True))
        return replace(moved, keys=self.keys, adjust=self.adjust)

    def __getitem__(self, rows: slice | Tensor) -> View:
        return self.map(lambda tensor: tensor[rows])

    @staticmethod
    def cat(views: list[View]) -> View:
        """Views of equal size, one after the other along the batch (view-major: all of view 0, then all of view 1)."""
        first = views[0]

        def join(values: list[Tensor | None]) -> Tensor | None:
            present = [v for v in values if v is not None]
            if not present:
                return None
            if len(present) != len(values):
                raise ValueError("views with and without a mask, validity or spacing cannot be joined")
            return torch.cat(present)

        pixels = torch.cat([v.pixels for v in views])
        valid = None
        if any(v.valid is not None for v in views):
            like = next(v.valid for v in views if v.valid is not None)
            valid = torch.cat(
                [v.valid if v.valid is not None else like.new_ones((len(v), *like.shape[1:])) for v in views]
            )
        parts = first.adjust
        if any((set(v.adjust) if v.adjust else None) != (set(parts) if parts else None) for v in views):
            raise ValueError("views with different adjustments cannot be joined")
        return View(
            pixels,
            valid,
            join([v.mask for v in views]),
            {axis: torch.cat([v.coords[axis] for v in views]) for axis in first.coords},
            join([v.spacing for v in views]),
            join([v.keys for v in views]),
            None if parts is None else {name: torch.cat([v.adjust[name] for v in views if v.adjust]) for name in parts},
            maps={name: torch.cat([v.maps[name] for v in views]) for name in first.maps},
            box=join([v.box for v in views]),
        )


@dataclass(frozen=True)
class SkippedWindow:
    """A window that could not be read while training, and was replaced by another."""

    source: str
    stage: str
    reason: str
    index: int


@dataclass
class Batch:
    """A rank's share of a global batch.

    Attributes:
        views: request name to its views, ``count`` of them, each a ``View`` of the same samples in the same order.
        indices: (B,) int64 rows of the sample index.
        labels: (B,) int64, -1 where unlabelled.
        skipped: windows that were replaced, supports' included.
        support: this rank's share of the step's labelled supports, where the objective asks for them; (M,) samples
            with M equal on all ranks. Its label is -1 at rows that only fill up an uneven share: these do not count.
        pairs: what is paired with each sample, where the objective asks for it: (B, L) int64 tokens of texts, or (B, D)
            float32 vectors.
    """

    views: dict[str, list[View]]
    indices: Tensor
    labels: Tensor
    skipped: list[SkippedWindow] = field(default_factory=list)
    support: Batch | None = None
    pairs: Tensor | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """Apply a function to every tensor."""
        return Batch(
            {name: [view.map(function) for view in group] for name, group in self.views.items()},
            function(self.indices),
            function(self.labels),
            self.skipped,
            None if self.support is None else self.support.map(function),
            None if self.pairs is None else function(self.pairs),
        )

    def to(self, device: torch.device | str) -> Batch:
        """Everything on a device, except what views keep on the host (see ``View.to``)."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return Batch(
            {name: [view.to(device) for view in group] for name, group in self.views.items()},
            move(self.indices),
            move(self.labels),
            self.skipped,
            None if self.support is None else self.support.to(device),
            None if self.pairs is None else move(self.pairs),
        )

    def pin_memory(self) -> Batch:
        """In page-locked memory, from which copies to a GPU run beside its work. The loader calls this."""
        return self.map(Tensor.pin_memory)

    def map_views(self, function: Callable[[View], View]) -> Batch:
        """Apply a function to every view, the supports' too."""
        views = {name: [function(view) for view in group] for name, group in self.views.items()}
        support = None if self.support is None else self.support.map_views(function)
        return replace(self, views=views, support=support)

    def __getitem__(self, rows: slice) -> Batch:
        """Some of the samples, with all of the supports. What was replaced stays with the whole."""
        views = {name: [view[rows] for view in group] for name, group in self.views.items()}
        pairs = None if self.pairs is None else self.pairs[rows]
        return replace(self, views=views, indices=self.indices[rows], labels=self.labels[rows], skipped=[], pairs=pairs)
