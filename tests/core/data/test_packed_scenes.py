"""A packed copy of whole sources reads any window as the reader does, bit for bit; killed, damaged, moved, pickled."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from fmsuite.core.data import boxes, scene_packing, shards
from fmsuite.core.data.index import SampleIndex, Window
from fmsuite.core.data.packed import located, open_reader
from fmsuite.core.data.packed_scenes import PackedScenes, SourcePacking, open_scene
from fmsuite.core.data.sample import Array, ArraySample
from fmsuite.core.data.sampling import RandomWindows
from fmsuite.core.data.scene import Scene
from fmsuite.core.data.scene_packing import (
    Origins,
    finish_sources,
    pack_source,
    unfinished_sources,
    verify_sources,
)
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.errors import FmsuiteError, ReadFailure, UsageError

SIZE, PITCH, FILL = (4, 6), np.array([0.5, 2.0]), -3.0
SHAPES = {"/a": (13, 20), "/b": (3, 30), "/c": (9, 9), "/d": (8, 14)}
CORNER = np.array([0.25, -7.0])
"""Of sample (0, 0) of every source, in coordinates of windows."""


class Reader:
    """Sources in memory. ``/b`` is shorter than a window, ``/c`` cannot be read, ``/d`` has invalid samples."""

    anywhere, piecewise = True, False

    def __init__(self) -> None:
        self.values, self.valid, self.labels = {}, {}, {}
        for number, (source, shape) in enumerate(SHAPES.items()):
            random = np.random.default_rng(number)
            self.values[source] = random.normal(size=(2, *shape)).astype(np.float32)
            self.valid[source] = random.random((1, *shape)) > (0.4 if source == "/d" else -1)
            self.labels[source] = random.integers(0, 5, shape).astype(np.int16)
        self.valid["/d"][:, :4, :6] = False

    def read(self, window: Window) -> ArraySample:
        if window.source == "/c":
            raise ReadFailure("/c", "read", "damaged.", "Leave it.")
        start = np.round((np.array(window.position) - CORNER) / PITCH).astype(int)
        size = np.round(np.array(window.extent) / PITCH).astype(int)
        return self.box(window.source, start, size)

    def box(self, source: str, start: Array, size: Array) -> ArraySample:
        shape = SHAPES[source]
        low, high = np.maximum(start, 0), np.minimum(start + size, shape)
        here = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        there = tuple(slice(a, b) for a, b in zip(low - start, high - start, strict=True))
        values = np.full((2, *size), FILL, np.float32)
        valid, labels = np.zeros((1, *size), bool), np.zeros(size, np.int16)
        values[:, *there], valid[:, *there] = self.values[source][:, *here], self.valid[source][:, *here]
        labels[there] = self.labels[source][here]
        if not valid.any() and not self.piecewise:
            raise ReadFailure(source, "read", "nothing valid.", "It is left out.")
        return ArraySample(values, None if valid.all() else valid, {}, (1.0, 4.0), {"organs/left": labels})


class ToyScene(Scene):
    """All of a source but a margin of one."""

    def __init__(self, reader: Reader, source: str) -> None:
        self.source, self.reader = source, reader
        self.size = (SHAPES[source][0] - 2, SHAPES[source][1] - 2)
        self.origin, self.pitch = tuple((CORNER + PITCH).tolist()), tuple(PITCH.tolist())
        self.native_size, self.native_spacing = SHAPES[source], (1.0, 4.0)

    def read(self, start, extent) -> ArraySample:
        return self.reader.box(self.source, np.array(start) + 1, np.array(extent))

    def native_map(self, name: str) -> Array:
        return self.reader.labels[self.source]

    def scores_to_native(self, scores: Array, outside: float = 0.0) -> Array:
        return np.pad(scores, ((0, 0), (1, 1), (1, 1)), constant_values=outside)

    def write(self, values: Array, path: Path) -> Path:
        raise NotImplementedError


class Field:
    """The part of a domain that a packed copy asks for."""

    name = "toy"

    def __init__(self) -> None:
        self.opened: list[str] = []

    def scene(self, index: SampleIndex, source: str) -> Scene:
        self.opened.append(source)
        if source == "/c":
            raise ReadFailure("/c", "open", "damaged.", "Leave it.")
        return ToyScene(Reader(), source)


def make_index(sources=SHAPES) -> SampleIndex:
    windows = []
    for source in sources:
        room = np.array(SHAPES[source]) - SIZE
        starts = [np.minimum(room, 0) // 2 * (room < 0), np.maximum(room, np.minimum(room, 0) // 2 * (room < 0))]
        for start in (starts[0], starts[1]):
            position = tuple((CORNER + PITCH * start).tolist())
            windows.append(Window(source, source, position, tuple((PITCH * SIZE).tolist()), tuple(PITCH.tolist())))
    return SampleIndex.from_windows(windows, {"domain": "toy"})


def origins_of(index: SampleIndex, scenes: bool, half: bool) -> Origins:
    return Origins(index, SIZE, Reader(), partial(Field().scene, index) if scenes else None, half)


def pack(folder: Path, index: SampleIndex, scenes: bool = True, half: bool = False) -> tuple[list[int], SampleIndex]:
    packing = SourcePacking(len(index.sources), index.hash, "toy", half)
    packing.write(folder)
    todo = unfinished_sources(folder, packing)
    for number in todo:
        pack_source(origins_of(index, scenes, half), folder, number)
    return todo, finish_sources(index, folder, packing, SkippedLog(folder / "skipped.csv"))


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boxes, "CHUNK_SAMPLES", 4**2)


def read_or_reason(reader, window: Window) -> ArraySample | str:
    try:
        return reader.read(window)
    except ReadFailure as failure:
        return failure.path


def same(one: ArraySample, other: ArraySample) -> bool:
    pairs = [(one.values, other.values), *((one.maps[name], other.maps[name]) for name in other.maps)]
    assert one.maps.keys() == other.maps.keys()
    assert one.spacing == other.spacing
    assert (one.valid is None) == (other.valid is None)
    if one.valid is not None:
        pairs.append((one.valid, other.valid))
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("scenes", [True, False])
def test_a_window_at_any_place_is_the_readers_bit_for_bit(tmp_path: Path, scenes: bool) -> None:
    index = make_index()
    _, packed = pack(tmp_path / "made", index, scenes)
    shutil.move(tmp_path / "made", tmp_path / "moved")
    packed = located(SampleIndex.read(tmp_path / "moved" / "index.parquet"), tmp_path / "moved" / "index.parquet")
    assert packed.sources == ["/a", "/b", "/d"]
    assert "/c" in (tmp_path / "moved" / "skipped.csv").read_text()
    ours, theirs = open_reader(Field(), packed), Reader()
    again = pickle.loads(pickle.dumps(ours))
    sampler, stream = RandomWindows(packed, SIZE), np.random.default_rng(0)
    places, invalid = set(), 0
    for row in [*range(len(packed))] * 30:
        window = sampler(packed[row], row, stream)
        expected, found = read_or_reason(theirs, window), read_or_reason(ours, window)
        if isinstance(expected, str):
            assert found == expected == "/d"
            invalid += 1
            continue
        assert isinstance(found, ArraySample)
        assert same(found, expected)
        assert same(again.read(window), expected)
        places.add((window.source, window.position))
    assert invalid
    assert len(places) > 60
    with pytest.raises(ReadFailure, match="lies outside what"):
        ours.read(Window("/a", "/a", (-90.0, 0.0), (2.0, 12.0)))
    with pytest.raises(ReadFailure, match="not in the packed copy"):
        ours.read(Window("/c", "/c", (0.25, -7.0), (2.0, 12.0)))


class Strips(Reader):
    """Reads in pieces, and gives what has no valid sample; ``dates`` make a first axis."""

    piecewise = True

    def __init__(self, dates: int = 0) -> None:
        super().__init__()
        self.dates, self.most = dates, 0
        self.valid["/a"][:, 9:] = False

    def box(self, source: str, start: Array, size: Array) -> ArraySample:
        self.most = max(self.most, int(np.prod(size)))
        return super().box(source, start, size)

    def read(self, window: Window) -> ArraySample:
        if not self.dates:
            return super().read(window).replace(maps={})
        flat = super().read(replace(window, position=window.position[1:], extent=window.extent[1:]))
        values = np.stack([flat.values + date for date in range(self.dates)], axis=1)
        valid = None if flat.valid is None else np.stack([flat.valid] * self.dates, axis=1)
        days = np.linspace(9000, 9000.7, self.dates).astype(np.float32)
        return ArraySample(values, valid, {"time": days}, (1.0, 1.0, 4.0))


def test_a_source_that_is_read_in_pieces_becomes_the_same_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever strips end, and whichever of them is the first with an invalid sample."""
    index = make_index(["/a", "/b", "/d"])
    files = []
    for name, most in (("strips", 1), ("two", 2 * 4 * 20 * 8), ("whole", 2**30)):
        monkeypatch.setattr(scene_packing, "PIECE_BYTES", most)
        reader = Strips()
        for number in range(3):
            pack_source(Origins(index, SIZE, reader), tmp_path / name, number)
        assert reader.most == {"strips": 4 * 30, "two": 8 * 20, "whole": 9 * 20}[name]
        shards_ = [path for path in (tmp_path / name).rglob("0") if path.is_file()]
        files.append({path.relative_to(tmp_path / name): path.read_bytes() for path in shards_})
    assert len(files[0]) == 6
    assert files[0] == files[1] == files[2]


def test_windows_without_a_valid_sample_and_series_are_read_as_the_pieces_were(tmp_path: Path) -> None:
    dates = 3
    flat = make_index(["/a", "/d"])
    windows = [
        replace(w, position=(0.0, *w.position), extent=(dates, *w.extent), spacing=(1.0, *w.spacing))
        for w in map(flat.__getitem__, range(len(flat)))
    ]
    for name, reader, index, size in (
        ("flat", Strips(), flat, SIZE),
        # As of an index that has a longer series too.
        ("series", Strips(dates), SampleIndex.from_windows(windows), (dates + 2, *SIZE)),
    ):
        packing = SourcePacking(len(index.sources), index.hash, "toy")
        packing.write(tmp_path / name)
        for number in unfinished_sources(tmp_path / name, packing):
            pack_source(Origins(index, size, reader), tmp_path / name, number)
        finish_sources(index, tmp_path / name, packing, SkippedLog())
        copy, sampler, stream = PackedScenes(tmp_path / name), RandomWindows(index, size), np.random.default_rng(0)
        empty = 0
        for row in [*range(len(index))] * 20:
            window = sampler(index[row], row, stream)
            expected, found = reader.read(window), copy.read(window)
            assert same(found, expected)
            assert found.coords.keys() == expected.coords.keys() == ({"time"} if name == "series" else set())
            assert all(np.array_equal(found.coords[axis], days) for axis, days in expected.coords.items())
            empty += expected.valid is not None and not expected.valid.any()
        assert empty


def test_scenes_come_from_the_copy_and_open_the_file_only_for_its_own_grid(tmp_path: Path) -> None:
    pack(tmp_path, make_index())
    packed = located(SampleIndex.read(tmp_path / "index.parquet"), tmp_path / "index.parquet")
    domain = Field()
    scene, plain = open_scene(domain, packed, "/a"), ToyScene(Reader(), "/a")
    assert domain.opened == []
    for name in ("source", "size", "origin", "pitch", "native_size", "native_spacing"):
        assert getattr(scene, name) == getattr(plain, name)
    assert same(scene.read((0, 0), scene.size), plain.read((0, 0), plain.size))
    assert same(scene.read((3, 5), (4, 2)), plain.read((3, 5), (4, 2)))
    with pytest.raises(ValueError, match="in a scene of"):
        scene.read((8, 0), (4, 4))
    assert domain.opened == []
    scores = np.random.default_rng(0).random((3, *scene.size)).astype(np.float32)
    np.testing.assert_array_equal(scene.labels_to_native(scores), plain.labels_to_native(scores))
    np.testing.assert_array_equal(scene.native_map("x"), plain.native_map("x"))
    assert domain.opened == ["/a"]
    pack(tmp_path / "other", make_index(), scenes=False)
    packed = located(SampleIndex.read(tmp_path / "other" / "index.parquet"), tmp_path / "other" / "index.parquet")
    assert isinstance(open_scene(domain, packed, "/a"), ToyScene)


def test_packing_that_was_killed_goes_on_with_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL while the second source is written: at the shard of its labels."""
    index = make_index()
    child = os.fork()
    if child == 0:
        written = []

        def die(descriptor: int) -> None:
            written.append(descriptor)
            if len(written) == 4:
                os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(shards.os, "fsync", die)
        pack(tmp_path / "killed", index)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    with pytest.raises(FmsuiteError, match="packing has not been finished"):
        PackedScenes(tmp_path / "killed")
    todo, _ = pack(tmp_path / "killed", index)
    assert todo == [1, 2, 3]
    pack(tmp_path / "whole", index)

    def files(folder: Path) -> dict[str, bytes]:
        kept = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".csv"]
        return {str(path.relative_to(folder)): path.read_bytes() for path in kept}

    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_damage_is_named_and_only_that_source_is_made_anew(tmp_path: Path) -> None:
    index = make_index()
    _, packed = pack(tmp_path, index)
    assert all(wrong is None for _, wrong in verify_sources(tmp_path))
    shard = tmp_path / "sources" / "3" / "values" / "c" / "0" / "0" / "0"
    data = bytearray(shard.read_bytes())
    data[30] ^= 4
    shard.write_bytes(data)
    assert [(name, wrong) for name, wrong in verify_sources(tmp_path) if wrong] == [
        (shard.relative_to(tmp_path).as_posix(), "its content has changed")
    ]
    reader = PackedScenes(tmp_path)
    whole = Window("/d", "/d", tuple(CORNER.tolist()), tuple((PITCH * SHAPES["/d"]).tolist()))
    with pytest.raises(ReadFailure, match="Delete the file and run the same") as failure:
        reader.read(whole)
    assert failure.value.path == str(shard)
    assert reader.read(packed[0]) is not None
    shard.unlink()
    todo, _ = pack(tmp_path, index)
    assert todo == [3]
    assert all(wrong is None for _, wrong in verify_sources(tmp_path))
    assert same(reader.read(whole), Reader().read(whole))


def test_half_precision_halves_the_values_and_nothing_else(tmp_path: Path) -> None:
    index = make_index()
    for half in (False, True):
        pack(tmp_path / str(half), index, half=half)
    window = index[1]
    full, found = (PackedScenes(tmp_path / str(half)).read(window) for half in (False, True))
    assert found.values.dtype == full.values.dtype == np.float32
    np.testing.assert_array_equal(found.values, full.values.astype(np.float16).astype(np.float32))
    assert not np.array_equal(found.values, full.values)
    assert same(full.replace(values=found.values), found)

    class Large(Reader):
        def read(self, window: Window) -> ArraySample:
            sample = super().read(window)
            return sample.replace(values=sample.values * 1e5)

    with pytest.raises(UsageError, match="half precision ends at 65504"):
        pack_source(Origins(index, SIZE, Large(), half=True), tmp_path, 0)


def test_what_cannot_be_packed_whole_is_refused(tmp_path: Path) -> None:
    index = make_index(["/a"])

    class OneSize(Reader):
        def read(self, window: Window) -> ArraySample:
            return ArraySample(np.zeros((1, *SIZE), np.float32))

    class Dated(Reader):
        def read(self, window: Window) -> ArraySample:
            return super().read(window).replace(coords={"time": np.zeros(3)})

    with pytest.raises(UsageError, match=r"OneSize reads windows of one size only.*came as \(4, 6\)"):
        pack_source(Origins(index, SIZE, OneSize()), tmp_path, 0)
    with pytest.raises(UsageError, match="Dated gives more than plain arrays"):
        pack_source(Origins(index, SIZE, Dated()), tmp_path, 0)
    mixed = [Window("/a", "/a", (0.25, -7.0), extent) for extent in ((2.0, 12.0), (1.0, 12.0))]
    with pytest.raises(UsageError, match="windows of 2 extents"):
        pack_source(Origins(SampleIndex.from_windows(mixed), SIZE, Reader()), tmp_path, 0)
    with pytest.raises(UsageError, match="no packed copy of whole sources"):
        PackedScenes(tmp_path)
    lost = make_index(["/c"])
    with pytest.raises(FmsuiteError, match="None of the 1 sources"):
        pack(tmp_path / "lost", lost)
