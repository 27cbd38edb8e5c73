"""A packed copy of whole sources, as a domain's reader gives them, of which windows at any place can be read.

The folder:

- ``index.parquet``: the rows of the sources that could be read, in the index's order, with ``packed`` in its metadata;
- ``sources/N/values``, ``valid``, ``map.NAME``: Zarr arrays of source N, a shard each (``boxes``);
- ``sources/N/record.json``: where it lies, what is known of it, and the SHA-256 of its files;
- ``sources.json``: the records of all, without hashes;
- ``packing.json``: what was packed, and the SHA-256 of ``sources.json``.

What is kept of a source is the box around its windows, and that of its scene (``Domain.scene``) where the domain has
them. No path in it is absolute but those of the sources.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import unquote

import numpy as np

from fmsuite.core.data.boxes import BoxArray
from fmsuite.core.data.handles import HandleCache
from fmsuite.core.data.index import SampleIndex, Window
from fmsuite.core.data.packed_files import AGAIN, INDEX, METADATA, PACKING, read_json, write_json, wrong_file
from fmsuite.core.data.sample import Array, ArraySample
from fmsuite.core.data.scene import Scene
from fmsuite.core.data.scene_maps import MapKind, SceneWriter
from fmsuite.core.zarr_arrays import Damaged
from fmsuite.errors import FmsuiteError, ReadFailure, UsageError

if TYPE_CHECKING:
    from fmsuite.domains.base import Domain

KIND = "sources"
FORMAT = 1
OPEN_ARRAYS = 64
SOURCES, RECORD, TABLE = "sources", "record.json", "sources.json"
VALUES, VALID, MAP = "values", "valid", "map."


@dataclass(frozen=True)
class SourcePacking:
    """What is packed.

    Attributes:
        sources: how many the index has; they are numbered in its order.
        index_hash: of the index.
        domain: its domain.
        half: floating-point values are kept in half precision.
    """

    sources: int
    index_hash: str
    domain: str
    half: bool = False

    @classmethod
    def read(cls, folder: Path) -> SourcePacking:
        """
        Raises:
            UsageError: if there is no packed copy of whole sources in the folder, or a newer fmsuite made it.
            FmsuiteError: if its description is damaged.
        """
        if not is_whole(folder):
            raise UsageError(
                f"{folder}: there is no packed copy of whole sources here.", "Make one with `fmsuite pack --whole`."
            )
        raw = read_json(folder / PACKING)
        if raw.get("format") != FORMAT:
            raise UsageError(f"{folder}: packed by another version of fmsuite.", "Upgrade fmsuite, or pack again.")
        return cls(**{name: raw[name] for name in cls.__dataclass_fields__})

    def write(self, folder: Path, **more: Any) -> None:
        write_json(folder / PACKING, {"format": FORMAT, "kind": KIND, **asdict(self), **more})


@dataclass(frozen=True)
class SceneFacts:
    """What a ``Scene`` says of itself without being read; see there."""

    size: tuple[int, ...]
    origin: tuple[float, ...]
    pitch: tuple[float, ...]
    native_size: tuple[int, ...]
    native_spacing: tuple[float, ...]

    @classmethod
    def of(cls, scene: Scene) -> SceneFacts:
        return cls(
            tuple(map(int, scene.size)),
            tuple(map(float, scene.origin)),
            tuple(map(float, scene.pitch)),
            tuple(map(int, scene.native_size)),
            tuple(map(float, scene.native_spacing)),
        )


@dataclass(frozen=True)
class PackedSource:
    """One source of the copy.

    Attributes:
        source, number: its path, and the folder's name.
        low, pitch: where what is kept begins, and how long a sample is, in the coordinates of ``Window.position``.
        size: samples that are kept along each axis.
        spacing: as in ``ArraySample``.
        dtype: of the values as they are read, which may be kept in half precision.
        arrays: names of its arrays.
        scene: its scene, if the domain has them.
        coords: as in ``ArraySample``, by axis a dtype and the values, of the whole source; those of its first axis.
        gaps: windows without a valid sample are given rather than refused.
    """

    source: str
    number: int
    low: tuple[float, ...]
    pitch: tuple[float, ...]
    size: tuple[int, ...]
    spacing: tuple[float, ...] | None
    dtype: str
    arrays: tuple[str, ...]
    scene: SceneFacts | None
    coords: dict[str, tuple[str, tuple[float, ...]]] = field(default_factory=dict)
    gaps: bool = False

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> PackedSource:
        scene = raw["scene"]
        if scene is not None:
            scene = SceneFacts(**{name: tuple(value) for name, value in scene.items()})
        lists = {name: tuple(raw[name]) for name in ("low", "pitch", "size", "arrays")}
        spacing = None if raw["spacing"] is None else tuple(raw["spacing"])
        coords = {name: (dtype, tuple(values)) for name, (dtype, values) in raw.get("coords", {}).items()}
        return cls(
            raw["source"],
            raw["number"],
            spacing=spacing,
            dtype=raw["dtype"],
            scene=scene,
            coords=coords,
            gaps=raw.get("gaps", False),
            **lists,
        )

    def place(self, position: Sequence[float]) -> tuple[int, ...]:
        """The sample that begins at a position."""
        return tuple(np.round((np.asarray(position) - self.low) / self.pitch).astype(int).tolist())


def is_whole(folder: Path) -> bool:
    """Whether the packed copy in a folder, if there is one, is of whole sources."""
    return (folder / PACKING).is_file() and read_json(folder / PACKING).get("kind") == KIND


def check_table(folder: Path) -> Iterator[tuple[str, str | None]]:
    """The table of a packed copy, with what is wrong with it, or ``None``."""
    tables = read_json(folder / PACKING).get("tables")
    if tables is None or not (folder / INDEX).is_file():
        yield INDEX, "packing has not been finished"
    for name, (size, digest) in (tables or {}).items():
        yield name, wrong_file(folder / name, size, digest)


class PackedScenes:
    """Reads windows at any place of a packed copy of whole sources: what the domain's own reader gives there, bit for
    bit (unless the copy was made in half precision).

    Only the chunks that a window touches are read, through the page cache that all processes share; nothing decoded is
    kept.

    Args:
        folder: the packed copy.

    Raises:
        UsageError: if it is not there.
        FmsuiteError: if it was not finished, or its table is damaged.
    """

    anywhere: ClassVar[bool] = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        SourcePacking.read(folder)
        for name, wrong in check_table(folder):
            if wrong is not None:
                raise FmsuiteError(f"{folder / name}: {wrong}.", "Run the same `fmsuite pack` again.")
        self._arrays: HandleCache[BoxArray] = HandleCache(_open, BoxArray.close, OPEN_ARRAYS)

    @cached_property
    def sources(self) -> dict[str, PackedSource]:
        """By path."""
        found = map(PackedSource.from_json, read_json(self.folder / TABLE))
        return {kept.source: kept for kept in found}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "sources"}

    def source(self, path: str) -> PackedSource:
        """
        Raises:
            ReadFailure: if it is not in the packed copy.
        """
        kept = self.sources.get(path)
        if kept is None:
            raise ReadFailure(path, "read", f"it is not in the packed copy {self.folder}.", "Pack again.")
        return kept

    def read(self, window: Window) -> ArraySample:
        """
        Raises:
            ReadFailure: if the window is not in the packed copy, or what is there is damaged.
        """
        kept = self.source(window.source)
        size = tuple(np.round(np.asarray(window.extent) / kept.pitch).astype(int).tolist())
        return self.box(kept, kept.place(window.position), size)

    def box(self, kept: PackedSource, start: Sequence[int], size: Sequence[int]) -> ArraySample:
        """A box of a source, in samples of what is kept of it.

        Raises:
            ReadFailure: as ``read``.
        """
        if any(a < 0 or a + n > limit for a, n, limit in zip(start, size, kept.size, strict=True)):
            raise ReadFailure(
                kept.source, "read", f"a window lies outside what {self.folder} holds of it.", "Pack again."
            )
        arrays = {name: self._box(kept, name, start, size) for name in kept.arrays}
        valid = arrays.get(VALID)
        if not kept.gaps and valid is not None and not valid.any():
            raise ReadFailure(kept.source, "read", "a window without a valid sample.", "It is left out.")
        return ArraySample(
            arrays[VALUES].astype(kept.dtype, copy=False),
            None if valid is None or valid.all() else valid,
            {
                name: np.array(values[start[0] : start[0] + size[0]], dtype=dtype)
                for name, (dtype, values) in kept.coords.items()
            },
            kept.spacing,
            maps={unquote(name.removeprefix(MAP)): array for name, array in arrays.items() if name.startswith(MAP)},
        )

    def _box(self, kept: PackedSource, name: str, start: Sequence[int], size: Sequence[int]) -> Array:
        path = str(self.folder / SOURCES / str(kept.number) / name)
        try:
            return self._arrays.get(path).read(start, size)
        except Damaged as damage:
            self._arrays.discard(path)
            raise ReadFailure(str(damage.file), "read", f"{damage.reason} (of {kept.source}).", AGAIN) from damage

    def close(self) -> None:
        self._arrays.close()


def _open(path: str) -> BoxArray:
    return BoxArray(Path(path))


class PackedScene(Scene):
    """A scene whose pixels come from a packed copy. What needs the file itself (predictions on its own grid, its label
    maps as they are stored) opens it when it is first asked for.

    Args:
        domain, index: of the packed copy.
        reader: its reader.
        kept: the source.
        facts: its scene's.
    """

    def __init__(
        self, domain: Domain, index: SampleIndex, reader: PackedScenes, kept: PackedSource, facts: SceneFacts
    ) -> None:
        self.source = kept.source
        self.size, self.origin, self.pitch = facts.size, facts.origin, facts.pitch
        self.native_size, self.native_spacing = facts.native_size, facts.native_spacing
        self._domain, self._index, self._reader, self._kept = domain, index, reader, kept
        # Axes that a scene does not have (dates) are read whole.
        self._others = len(kept.size) - len(facts.size)
        self._start = kept.place((*kept.low[: self._others], *facts.origin))

    @cached_property
    def _native(self) -> Scene:
        return self._domain.scene(self._index, self.source)

    def read(self, start: Sequence[int], extent: Sequence[int]) -> ArraySample:
        """
        Raises:
            ValueError: for a box that reaches out of the scene.
            ReadFailure: as ``PackedScenes.read``.
        """
        if any(a < 0 or n < 1 or a + n > limit for a, n, limit in zip(start, extent, self.size, strict=True)):
            raise ValueError(f"a box at {tuple(start)} of {tuple(extent)} in a scene of {self.size}")
        others = self._kept.size[: self._others]
        first = [a + b for a, b in zip((*[0] * len(others), *start), self._start, strict=True)]
        return self._reader.box(self._kept, first, (*others, *extent))

    def native_map(self, name: str) -> Array:
        return self._native.native_map(name)

    def native_map_part(self, name: str, start: Sequence[int], extent: Sequence[int]) -> Array:
        return self._native.native_map_part(name, start, extent)

    def scores_to_native(self, scores: Array, outside: float = 0.0) -> Array:
        return self._native.scores_to_native(scores, outside)

    def locate(self, place: Sequence[int]) -> tuple[float, ...] | None:
        return self._native.locate(place)

    def from_file(self, place: Sequence[int]) -> tuple[int, ...]:
        return self._native.from_file(place)

    def from_world(self, place: Sequence[float]) -> tuple[int, ...]:
        return self._native.from_world(place)

    def native_box(self, start: Sequence[int], extent: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self._native.native_box(start, extent)

    def part_to_native(
        self,
        scores: Array,
        start: Sequence[int],
        native_start: Sequence[int],
        native_extent: Sequence[int],
        outside: float = 0.0,
    ) -> Array:
        return self._native.part_to_native(scores, start, native_start, native_extent, outside)

    def write(self, values: Array, path: Path) -> Path:
        return self._native.write(values, path)

    def writer(self, path: Path, what: MapKind) -> SceneWriter:
        return self._native.writer(path, what)

    def coarse_writer(self, path: Path, what: MapKind, step: Sequence[int]) -> SceneWriter:
        return self._native.coarse_writer(path, what, step)


def open_scene(domain: Domain, index: SampleIndex, source: str) -> Scene:
    """``Domain.scene``, with the pixels of the packed copy of whole sources where the index is of one.

    Raises:
        UsageError, ReadFailure: as ``Domain.scene``, ``PackedScenes``.
    """
    copy = index.metadata.get(METADATA, {})
    if not copy.get("whole"):
        return domain.scene(index, source)
    reader = PackedScenes(Path(copy["folder"]))
    kept = reader.source(source)
    if kept.scene is None:
        return domain.scene(index, source)
    return PackedScene(domain, index, reader, kept, kept.scene)
