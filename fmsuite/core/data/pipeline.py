"""From a row of the index to a batch of views: read, crop, augment, mask, collate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as with_changes

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fmsuite.core.data.adjust import Adjustment, stacked
from fmsuite.core.data.crop import Box, cell_box, random_box
from fmsuite.core.data.index import SampleIndex, Window
from fmsuite.core.data.reader import Augmentation, Reader
from fmsuite.core.data.sample import (
    Array,
    ArraySample,
    Batch,
    MaskContext,
    Sample,
    SampleKey,
    SkippedWindow,
    View,
    ViewRequest,
)
from fmsuite.core.data.sampling import WindowSampler
from fmsuite.core.inputs import SPATIAL_AXES, InputSpec
from fmsuite.core.seeding import derive, generator
from fmsuite.core.tokens import PatchGrid
from fmsuite.errors import FmsuiteError, ReadFailure, UsageError

IMAGE = "image"
"""Name of the view that ``plain_views`` yields."""

MAX_REPLACEMENTS = 20
"""Unreadable windows in a row after which a sample is given up and the run stops."""


@dataclass
class SampleView:
    """One view of one sample.

    Attributes:
        values: (C, *size), or (N, D) for a bag, in the source's native dtype.
        valid: bool, (1 or C, *size), or (N,) for a bag; ``None`` means all valid.
        mask: bool, shaped like the token grid (group axis included), or (N,) for a bag; with the patterns' axis in
            front where the sampler draws several; ``None`` without a sampler.
        patterns: the sampler draws several.
        coords, spacing: as in ``ArraySample``.
        key: a 63-bit number that names this draw.
        bag: it is a bag of vectors.
        adjust: as in ``ArraySample``.
        maps: label maps that the request named, (*size) integers, or of the last axes alone.
        box: (2, A) float32, as in ``View``; ``None`` for a bag.
    """

    values: Array
    valid: Array | None = None
    mask: Array | None = None
    patterns: bool = False
    coords: dict[str, Array] = field(default_factory=dict)
    spacing: tuple[float, ...] | None = None
    key: int = 0
    bag: bool = False
    adjust: Adjustment | None = None
    maps: dict[str, Array] = field(default_factory=dict)
    box: Array | None = None


@dataclass
class Item:
    """One sample as it leaves the dataset, with the windows that it replaces and its partner of a pair."""

    views: dict[str, list[SampleView]]
    index: int
    label: int
    skipped: list[SkippedWindow] = field(default_factory=list)
    pair: Array | None = None


class NoAugmentation:
    """Changes nothing: for probes, pictures and embedding."""

    def before_crop(self, sample: Sample, strength: str, generator: np.random.Generator) -> Sample:
        return sample

    def after_crop(
        self, sample: ArraySample, strength: str, second: bool, generator: np.random.Generator
    ) -> ArraySample:
        return sample


class ViewPipeline:
    """Cuts the views that an objective asks for out of one sample. Picklable, and a function of its arguments alone.

    Every view has two random streams of its own, one for its crop and augmentation and one for its mask, keyed by
    (seed, epoch, index, attempt, request, number): adding a view, or a mask, changes no other.

    Axes that are not spatial (``time``) keep the sample's own length, whatever the request says. Where a patch spans
    several samples along such an axis, it is padded to a whole number of patches with invalid values.

    Args:
        requests: the views.
        augmentation: the domain's.
        grid: how views are cut into tokens; ``None`` for bags, and where no masks are asked for.
        axes: the input's axes.
        seed: the run's.

    Raises:
        UsageError: if a request's size does not fit the axes, or a masked one not the patches.
        ValueError: if a request's cells do not fit the axes, or its count not the cells that it asks for.
    """

    def __init__(
        self,
        requests: Sequence[ViewRequest],
        augmentation: Augmentation,
        grid: PatchGrid | None,
        axes: tuple[str, ...],
        seed: int,
    ) -> None:
        for request in requests:
            if request.size and len(request.size) != len(axes):
                raise UsageError(
                    f"View '{request.name}' has size {request.size}, but the input's axes are {axes}.",
                    "Give one length an axis.",
                )
            if request.mask is not None and request.size:
                if grid is None:
                    raise UsageError(f"View '{request.name}' is masked, but its tokens do not form a grid.")
                grid.shape(request.size)
        self.requests = tuple(requests)
        self.augmentation = augmentation
        self.grid = grid
        self.axes = axes
        self.seed = seed
        self.spatial = tuple(number for number, axis in enumerate(axes) if axis in SPATIAL_AXES)
        self.masked_views = sum(request.count for request in requests if request.mask is not None)
        for request in requests:
            self._check_cells(request)

    def _check_cells(self, request: ViewRequest) -> None:
        cells = request.cells
        if cells is None:
            if request.tiled:
                raise ValueError(f"view '{request.name}' asks for cells and does not say into how many to divide")
            return
        across = [count for axis, count in enumerate(cells) if axis not in self.spatial]
        if len(cells) != len(self.axes) or min(cells) < 1 or any(count != 1 for count in across):
            raise ValueError(f"view '{request.name}' divides the axes {self.axes} into {cells} cells")
        if request.tiled and request.count != int(np.prod(cells)):
            raise ValueError(f"view '{request.name}' asks for {request.count} of {cells} cells")

    def __call__(self, sample: Sample, key: SampleKey) -> dict[str, list[SampleView]]:
        """The views by request name.

        Raises:
            ValueError: if the augmentation changes a view's size, the reader did not give a map that a request names,
                or a mask sampler returns anything but (N,) or (M, N) bool that leaves invalid tokens alone.
        """
        views: dict[str, list[SampleView]] = {}
        masked = 0
        for request in self.requests:
            group = views.setdefault(request.name, [])
            for number in range(request.count):
                draw = (key.epoch, key.index, key.attempt, request.name, number)
                cut, box = self._cut(sample, request, number, generator(self.seed, "view", *draw))
                view = SampleView(
                    cut.values,
                    cut.valid,
                    coords=cut.coords,
                    spacing=cut.spacing,
                    key=derive(self.seed, "key", *draw),
                    bag=not request.size,
                    adjust=cut.adjust,
                    maps={name: _label_map(cut, name, request) for name in request.maps},
                    box=box,
                )
                if request.mask is not None:
                    context = self._context(cut, view.bag, key, masked, generator(self.seed, "mask", *draw))
                    view.mask = _checked_mask(request, context)
                    view.patterns = view.mask.ndim > len(context.shape)
                    masked += 1
                group.append(view)
        return views

    def _cut(
        self, sample: Sample, request: ViewRequest, number: int, draw: np.random.Generator
    ) -> tuple[ArraySample, Array | None]:
        source = self.augmentation.before_crop(sample, request.augment, draw)
        box = None
        if request.size:
            if len(source.size) != len(self.axes):
                raise ValueError(f"the reader gave an array of size {source.size} for the axes {self.axes}")
            size = tuple(n if a in self.spatial else round(source.size[a]) for a, n in enumerate(request.size))
            start, extent = self._box(source, request, number, draw)
            box = (np.array([start, extent]) / np.array(source.size)).astype(np.float32)
            cut = source.crop(start, extent, size)
            if cut.size != size:
                raise ValueError(f"a crop of view '{request.name}' has size {cut.size} instead of {size}")
        else:
            cut = source.crop((), (), ())
        expected = cut.values.shape
        cut = self.augmentation.after_crop(cut, request.augment, request.second, draw)
        if cut.values.shape[1:] != expected[1:] or (request.size and len(cut.values) != expected[0]):
            raise ValueError(
                f"the augmentation of view '{request.name}' changed its shape from {expected} to {cut.values.shape}"
            )
        if cut.adjust is not None and not request.size:
            raise ValueError(f"the augmentation of view '{request.name}' adjusts a bag of vectors, which has no pixels")
        return self._whole_patches(cut) if request.size and self.grid is not None else cut, box

    def _box(self, source: Sample, request: ViewRequest, number: int, draw: np.random.Generator) -> Box:
        whole = isinstance(source, ArraySample)
        if request.cells is None:
            return random_box(source.size, request.scale, request.ratio, self.spatial, draw, whole)
        return cell_box(source.size, request.cells, number if request.tiled else None, draw, whole)

    def _whole_patches(self, cut: ArraySample) -> ArraySample:
        """Pad axes that are not spatial to a whole number of patches."""
        assert self.grid is not None
        size = tuple(
            n if axis in self.spatial else -(-n // patch) * patch
            for axis, (n, patch) in enumerate(zip(cut.size, self.grid.patch_size, strict=True))
        )
        if size == cut.size:
            return cut
        valid = np.ones((1, *cut.size), dtype=bool) if cut.valid is None else cut.valid
        coords = {axis: _edge_padded(values, size[self.axes.index(axis)]) for axis, values in cut.coords.items()}
        maps = {name: _padded(labels, size[-labels.ndim :]) for name, labels in cut.maps.items()}
        values = _padded(cut.values, (len(cut.values), *size))
        return cut.replace(values=values, valid=_padded(valid, (len(valid), *size)), coords=coords, maps=maps)

    def _context(
        self, cut: ArraySample, bag: bool, key: SampleKey, view: int, stream: np.random.Generator
    ) -> MaskContext:
        axes, shape = self.axes, cut.values.shape[:1]
        if bag:
            valid = np.ones(shape, dtype=bool) if cut.valid is None else cut.valid
        else:
            assert self.grid is not None
            axes, shape = self.grid.token_axes, self.grid.shape(cut.size)
            if cut.valid is None:
                valid = np.ones(int(np.prod(shape)), dtype=bool)
            else:
                valid = self.grid.valid_tokens(torch.from_numpy(cut.valid)[None])[0].numpy()
        return MaskContext(axes, shape, valid, stream, key, view, self.masked_views, cut.maps)


def _label_map(cut: ArraySample, name: str, request: ViewRequest) -> Array:
    labels = cut.maps.get(name)
    if labels is None:
        known = ", ".join(cut.maps) or "none"
        raise ValueError(f"view '{request.name}' asks for the label map '{name}', and the reader gave: {known}")
    if labels.dtype.kind not in "biu":
        raise ValueError(f"the label map '{name}' of view '{request.name}' is {labels.dtype}, not integers")
    return labels


def _checked_mask(request: ViewRequest, context: MaskContext) -> Array:
    assert request.mask is not None
    mask = np.asarray(request.mask(context))
    if mask.ndim > 2 or mask.shape[-1:] != context.valid.shape or mask.dtype != np.bool_:
        raise ValueError(
            f"the mask of view '{request.name}' is {mask.dtype} {mask.shape}, not bool {context.valid.shape}"
        )
    if (mask & ~context.valid).any():
        raise ValueError(f"the mask of view '{request.name}' covers invalid tokens")
    return mask.reshape((*mask.shape[:-1], *context.shape))


class WindowDataset(Dataset):
    """Samples by their key. A window that cannot be read is replaced by another one, drawn from the key.

    Args:
        index: the windows.
        reader: reads one.
        pipeline: cuts its views.
        seed: the run's.
        partner: what is paired with a row, an array of one shape for all rows; ``None`` where nothing is.
        sampler: draws where a row's window lies, from a stream of its own, keyed by (seed, epoch, index, attempt);
            ``None`` leaves it where the index says.
    """

    def __init__(
        self,
        index: SampleIndex,
        reader: Reader,
        pipeline: ViewPipeline,
        seed: int,
        partner: Callable[[int], Array] | None = None,
        sampler: WindowSampler | None = None,
    ) -> None:
        self.index = index
        self.reader = reader
        self.pipeline = pipeline
        self.seed = seed
        self.partner = partner
        self.sampler = sampler

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: SampleKey) -> Item:
        """
        Raises:
            FmsuiteError: if the window and ``MAX_REPLACEMENTS`` replacements in a row cannot be read. Any other
                exception is a bug and passes through, with the window in a note.
        """
        skipped: list[SkippedWindow] = []
        draw = key
        for attempt in range(1, MAX_REPLACEMENTS + 2):
            window = self.index[draw.index]
            if self.sampler is not None:
                stream = generator(self.seed, "window", draw.epoch, draw.index, draw.attempt)
                window = self.sampler(window, draw.index, stream)
            try:
                views = self.pipeline(self.reader.read(window), draw)
                pair = None if self.partner is None else self.partner(draw.index)
                return Item(views, draw.index, self.index.label_code(draw.index), skipped, pair)
            except ReadFailure as failure:
                reason = f"{failure.reason} {failure.hint}".strip()
                skipped.append(SkippedWindow(failure.path, failure.stage, reason, draw.index))
                last = failure
            except Exception as error:
                error.add_note(f"This happened in row {draw.index} of the index: {window.source} at {window.position}.")
                raise
            draw = with_changes(key, index=self.replacement(key, attempt), attempt=attempt)
        files = len({entry.source for entry in skipped})
        raise FmsuiteError(
            f"{len(skipped)} windows in a row, of {files} file(s), could not be read, the last of them in {last.path}: "
            f"{last.reason}",
            "What failed before is in skipped.csv. Check the files, or make the index again with `fmsuite tile`.",
        ) from last

    def replacement(self, key: SampleKey, attempt: int) -> int:
        """The row that takes the place of an unreadable one."""
        stream = generator(self.seed, "replacement", key.epoch, key.index, attempt)
        return int(stream.integers(len(self.index)))


def collate(items: Sequence[Item]) -> Batch:
    """Items to a batch; views are stacked in the order of the items.

    Views of one request may differ in length along axes that are not resampled (3 dates and 7; bags of different
    sizes): they are padded at the end to the longest, with ``valid`` False, coordinates 0 and nothing masked. Samples
    of different dtypes are widened to one that holds them all. Where only some samples know their spacing, the
    others' is NaN.
    """
    views = {
        name: [_stack([item.views[name][number] for item in items]) for number in range(len(group))]
        for name, group in items[0].views.items()
    }
    pairs = [item.pair for item in items if item.pair is not None]
    return Batch(
        views,
        torch.tensor([item.index for item in items], dtype=torch.int64),
        torch.tensor([item.label for item in items], dtype=torch.int64),
        [skipped for item in items for skipped in item.skipped],
        pairs=torch.from_numpy(np.stack(pairs)) if pairs else None,
    )


def _stack(views: Sequence[SampleView]) -> View:
    first = views[0]
    # What may be padded: the vectors of a bag, or every axis but the channels of a grid.
    lengths = [view.values.shape[:1] if view.bag else view.values.shape[1:] for view in views]
    widths = {view.values.shape[1] if view.bag else len(view.values) for view in views}
    if len(widths) > 1:
        raise ValueError(f"the samples of one batch have different numbers of channels: {sorted(widths)}")
    longest = tuple(max(column) for column in zip(*lengths, strict=True))
    ragged = any(length != longest for length in lengths)
    valid = None
    if ragged or any(view.valid is not None for view in views):
        flags = [_validity(view, length) for view, length in zip(views, lengths)]
        channels = () if first.bag else (max(len(flag) for flag in flags),)
        flags = [np.broadcast_to(flag, (*channels, *flag.shape[len(channels) :])) for flag in flags]
        valid = _tensor(flags, (*channels, *longest))
    shape = (*longest, first.values.shape[1]) if first.bag else (len(first.values), *longest)
    mask = None
    if first.mask is not None:
        masks = [view.mask for view in views if view.mask is not None]
        tokens = tuple(max(column) for column in zip(*(m.shape for m in masks), strict=True))
        mask = _tensor(masks, tokens).flatten(2 if first.patterns else 1)
    spacing = None
    if any(view.spacing is not None for view in views):
        axes = len(next(view.spacing for view in views if view.spacing is not None))
        spacing = torch.tensor([view.spacing or (float("nan"),) * axes for view in views], dtype=torch.float32)
    coords = {}
    for axis in first.coords:
        arrays = [np.asarray(view.coords[axis], dtype=np.float32) for view in views]
        coords[axis] = _tensor(arrays, (max(len(array) for array in arrays),))
    return View(
        _tensor([view.values for view in views], shape),
        valid,
        mask,
        coords,
        spacing,
        torch.tensor([view.key for view in views], dtype=torch.int64),
        stacked([view.adjust for view in views]),
        maps={
            name: _tensor([view.maps[name] for view in views], longest[-labels.ndim :])
            for name, labels in first.maps.items()
        },
        box=None
        if first.box is None
        else torch.from_numpy(np.stack([view.box for view in views if view.box is not None])),
    )


def _validity(view: SampleView, length: tuple[int, ...]) -> Array:
    if view.valid is not None:
        return view.valid
    return np.ones(length if view.bag else (1, *length), dtype=bool)


def _tensor(arrays: Sequence[Array], shape: tuple[int, ...]) -> Tensor:
    """(B, *shape), zero where an array is shorter."""
    dtype = _torch_dtype(np.result_type(*arrays))
    if all(array.shape == shape for array in arrays):
        out = np.empty((len(arrays), *shape), dtype=dtype)
    else:
        out = np.zeros((len(arrays), *shape), dtype=dtype)
    for row, array in zip(out, arrays, strict=True):
        row[tuple(slice(n) for n in array.shape)] = array
    return torch.from_numpy(out)


def _torch_dtype(dtype: np.dtype) -> np.dtype:
    """The dtype in native byte order (NIfTI and FITS files are often big-endian).

    Raises:
        TypeError: for what torch cannot hold.
    """
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise TypeError(f"a reader returned {dtype}, which torch cannot hold")
    return dtype.newbyteorder("=")


def _padded(values: Array, shape: tuple[int, ...]) -> Array:
    return np.pad(values, [(0, new - old) for old, new in zip(values.shape, shape, strict=True)])


def _edge_padded(values: Array, length: int) -> Array:
    """Repeats the last coordinate, so that the mean over a half-filled patch stays among the samples that exist."""
    return np.pad(values, (0, length - len(values)), mode="edge")


class WholeWindows(Dataset):
    """Whole windows, resized and not augmented, under the view name ``IMAGE``: for probes, pictures and embedding.

    Args:
        index, reader, spec: the windows, their reader and the input that it yields.
        size: the model's size: one number for all spatial axes, or one for each axis; ignored for bags.
        grid: pads axes that are not spatial to whole patches, where it spans several samples along them.
    """

    def __init__(
        self,
        index: SampleIndex,
        reader: Reader,
        spec: InputSpec,
        size: int | tuple[int, ...],
        grid: PatchGrid | None = None,
    ) -> None:
        self.index = index
        self.reader = reader
        request = ViewRequest(IMAGE, () if spec.bag else spec.expand(size), augment="none")
        self.pipeline = ViewPipeline([request], NoAugmentation(), grid, spec.axes, seed=0)

    def __len__(self) -> int:
        return len(self.index)

    def item(self, row: int) -> Item | SkippedWindow:
        """One window, or why it cannot be read. Any other exception is a bug and passes through, with the window in a
        note."""
        return self.item_of(self.index[row], row, self.index.label_code(row))

    def item_of(self, window: Window, row: int, label: int = -1) -> Item | SkippedWindow:
        """``item`` of a window that is row ``row`` of some index."""
        try:
            views = self.pipeline(self.reader.read(window), SampleKey(0, row))
        except ReadFailure as failure:
            return SkippedWindow(failure.path, failure.stage, f"{failure.reason} {failure.hint}".strip(), row)
        except Exception as error:
            error.add_note(f"This happened in row {row} of the index: {window.source} at {window.position}.")
            raise
        return Item(views, row, label)

    def __getitem__(self, rows: Sequence[int]) -> tuple[Batch | None, list[SkippedWindow]]:
        """The windows of ``rows`` that can be read, in that order (``None`` if there are none), and the others."""
        return joined(map(self.item, map(int, rows)))


def joined(found: Iterable[Item | SkippedWindow]) -> tuple[Batch | None, list[SkippedWindow]]:
    """A batch of what could be read, in order (``None`` if nothing could), and the others."""
    items: list[Item] = []
    skipped: list[SkippedWindow] = []
    for item in found:
        if isinstance(item, Item):
            items.append(item)
        else:
            skipped.append(item)
    return (collate(items) if items else None), skipped


def plain_views(
    index: SampleIndex,
    reader: Reader,
    spec: InputSpec,
    rows: Sequence[int],
    size: int | tuple[int, ...],
    batch_size: int = 32,
    grid: PatchGrid | None = None,
) -> Iterator[Batch]:
    """``WholeWindows`` in the order of ``rows``, in batches of ``batch_size`` readable ones, read in this process.

    A window that cannot be read is left out, and reported in the ``skipped`` of the batch that it would have been in
    (of the last one, if nothing readable follows).

    Args:
        index, reader, spec, size, grid: as in ``WholeWindows``.
        rows: which windows.
        batch_size: largest number of samples at a time.

    Raises:
        FmsuiteError: if not one of the windows can be read.
    """
    windows = WholeWindows(index, reader, spec, size, grid)
    waiting: Batch | None = None
    items: list[Item] = []
    skipped: list[SkippedWindow] = []
    for row in map(int, rows):
        item = windows.item(row)
        if isinstance(item, SkippedWindow):
            skipped.append(item)
            continue
        items.append(with_changes(item, skipped=skipped))
        skipped = []
        if len(items) == batch_size:
            if waiting is not None:
                yield waiting
            waiting, items = collate(items), []
    if items:
        if waiting is not None:
            yield waiting
        waiting = collate(items)
    if waiting is None:
        if not skipped:
            return
        raise FmsuiteError(
            f"None of {len(skipped)} windows could be read, the last of them in {skipped[-1].source}: "
            f"{skipped[-1].reason}"
        )
    waiting.skipped.extend(skipped)
    yield waiting
