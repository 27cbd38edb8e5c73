"""A packed copy gives what the reader gave, in shards that Zarr reads; what is damaged is noticed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from fmsuite.core.data.index import SampleIndex, Window
from fmsuite.core.data.packed import (
    OPEN_SHARDS,
    PackedReader,
    Packing,
    finish,
    located,
    open_reader,
    pack_block,
    unfinished,
    verify,
)
from fmsuite.core.data.sample import ArraySample, Sample
from fmsuite.core.data.shards import ShardFile, ShardWriter, create_array, shard_file
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.zarr_arrays import Damaged
from fmsuite.errors import FmsuiteError, ReadFailure, UsageError

ROWS, PER_SHARD = 23, 5
BROKEN = (3, 17)


def window(number: int) -> Window:
    return Window(f"/s{number // 6}", "g", (float(number), 0.5), (8.0, 8.0), (0.5, 0.25) if number % 2 else ())


def sample(number: int) -> ArraySample:
    """Every form that a sample can take, by turns."""
    random = np.random.default_rng(number)
    values = random.integers(0, 60_000, (2, 6, 5)).astype("uint16")
    if number % 4 == 1:
        return ArraySample(values.astype(">i2"), np.ones((2, 6, 5), bool), spacing=(0.1, 1 / 3))
    if number % 4 == 2:
        dates = {"time": random.random(3).astype(np.float32)}
        return ArraySample(random.normal(size=(1, 3, 4, 4)), random.random((1, 3, 4, 4)) > 0.5, dates, (1.0, 2.0, 2.0))
    if number % 4 == 3:
        maps = {"a/b": random.integers(0, 9, (6, 5)), "a.b": random.integers(0, 9, (6, 5)).astype(np.int16)}
        return ArraySample(np.zeros((2, 6, 5), np.uint8), maps=maps)
    return ArraySample(values)


class Reader:
    def __init__(self) -> None:
        self.read_rows: list[int] = []

    def read(self, window: Window) -> Sample:
        number = int(window.position[0])
        self.read_rows.append(number)
        if number in BROKEN:
            raise ReadFailure(window.source, "read", "damaged.", "Leave it.")
        return sample(number)


def packed(folder: Path, reader: Reader | None = None) -> SampleIndex:
    index = SampleIndex.from_windows(map(window, range(ROWS)), {"domain": "test"})
    packing = Packing(ROWS, index.hash, "test", PER_SHARD)
    if not (folder / "packing.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        packing.write(folder)
    for number in unfinished(folder, packing):
        pack_block(index, reader or Reader(), folder, packing, number)
    return finish(index, folder, packing, SkippedLog(folder / "skipped.csv"))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "one"
    packed(folder)
    return folder


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Path:
    """The packed copy at another place."""
    shutil.copytree(original, tmp_path / "moved")
    return tmp_path / "moved"


def assert_same(found: ArraySample, expected: ArraySample) -> None:
    pairs = [(found.values, expected.values), (found.valid, expected.valid)]
    pairs += [(found.coords[name], values) for name, values in expected.coords.items()]
    pairs += [(found.maps[name], values) for name, values in expected.maps.items()]
    for one, other in pairs:
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert one.dtype == other.dtype.newbyteorder("=")
            np.testing.assert_array_equal(one, other)
            assert one.flags.writeable
    assert found.spacing == expected.spacing
    assert set(found.coords) == set(expected.coords)
    assert set(found.maps) == set(expected.maps)


def test_every_window_comes_back_as_it_was_wherever_the_folder_is(copy: Path) -> None:
    index = located(SampleIndex.read(copy / "index.parquet"), copy / "index.parquet")
    assert index.metadata["packed"]["folder"] == str(copy.resolve())
    reader = pickle.loads(pickle.dumps(open_reader(None, index)))  # type: ignore[arg-type]
    rows = [number for number in range(ROWS) if number not in BROKEN]
    assert [int(index[row].position[0]) for row in range(len(index))] == rows
    for row in np.random.default_rng(0).permutation(len(index)):
        assert_same(reader.read(index[int(row)]), sample(rows[int(row)]))


def test_what_cannot_be_read_is_left_out_and_said(original: Path) -> None:
    lines = (original / "skipped.csv").read_text().splitlines()
    assert lines[1:] == ["/s0,read,damaged. Leave it.", "/s2,read,damaged. Leave it."]
    with pytest.raises(ReadFailure, match="not in the packed copy"):
        PackedReader(original).read(window(BROKEN[0]))


def test_zarr_reads_the_arrays(original: Path) -> None:
    kinds = {path.name: zarr.open_array(str(path), mode="r") for path in (original / "arrays").iterdir()}
    assert kinds["values-uint16-2x6x5"].shape == (ROWS, 2, 6, 5)
    for number in set(range(ROWS)) - set(BROKEN):
        values = sample(number).values
        name = f"values-{values.dtype.name}-{'x'.join(map(str, values.shape))}"
        np.testing.assert_array_equal(kinds[name][number], values)


def test_only_what_is_missing_is_done_again(tmp_path: Path, original: Path) -> None:
    folder, first = tmp_path / "killed", Reader()
    index = SampleIndex.from_windows(map(window, range(ROWS)), {"domain": "test"})
    packing = Packing(ROWS, index.hash, "test", PER_SHARD)
    folder.mkdir()
    packing.write(folder)
    for number in (0, 3):
        pack_block(index, first, folder, packing, number)
    # As a killed process leaves it: a shard without a record, and one that was only begun.
    (folder / "blocks" / "3.json").unlink()
    begun = folder / "arrays" / "values-uint16-2x6x5" / "c" / "4" / "0" / "0" / ".0.99"
    begun.parent.mkdir(parents=True)
    begun.write_bytes(b"half")
    assert unfinished(folder, packing) == [1, 2, 3, 4]
    with pytest.raises(FmsuiteError, match="not been finished"):
        PackedReader(folder)
    second = Reader()
    packed(folder, second)
    assert second.read_rows == list(range(PER_SHARD, ROWS))
    assert SampleIndex.read(folder / "index.parquet").hash == SampleIndex.read(original / "index.parquet").hash
    for path in (original / "arrays").rglob("c/*"):
        for file in filter(Path.is_file, path.rglob("*")):
            assert (folder / file.relative_to(original)).read_bytes() == file.read_bytes()


def shard(folder: Path, number: int = 1) -> Path:
    return shard_file(folder / "arrays" / "values-uint16-2x6x5", number, 3)


def test_a_damaged_window_fails_alone_and_is_read_again_once_it_is_whole(copy: Path) -> None:
    reader, path = PackedReader(copy), shard(copy)
    assert_same(reader.read(window(8)), sample(8))
    whole = path.read_bytes()
    path.write_bytes(whole[:10] + bytes([whole[10] ^ 1]) + whole[11:])  # the first window of the shard: row 8
    with pytest.raises(ReadFailure, match="damaged") as failed:
        reader.read(window(8))
    assert failed.value.path == str(path)
    assert "/s1" in failed.value.reason
    assert [name for name, wrong in verify(copy) if wrong] == [path.relative_to(copy).as_posix()]
    assert_same(reader.read(window(4)), sample(4))
    path.write_bytes(whole)
    assert_same(reader.read(window(8)), sample(8))
    assert not [name for name, wrong in verify(copy) if wrong]


@pytest.mark.parametrize("damage", ["gone", "cut", "index"])
def test_a_damaged_shard_fails_until_it_is_packed_again(copy: Path, damage: str) -> None:
    path = shard(copy)
    whole = path.read_bytes()
    changed = {"cut": whole[:-30], "index": whole[:-20] + bytes([whole[-20] ^ 1]) + whole[-19:]}
    path.unlink()
    if damage != "gone":
        path.write_bytes(changed[damage])
    reader = PackedReader(copy)
    with pytest.raises(ReadFailure):
        reader.read(window(8))
    assert_same(reader.read(window(5)), sample(5))
    path.unlink(missing_ok=True)
    again = Reader()
    packed(copy, again)
    assert again.read_rows == list(range(PER_SHARD, 2 * PER_SHARD))
    assert_same(reader.read(window(8)), sample(8))


@pytest.mark.parametrize("name", ["keys.npy", "rows.npy", "facts.npy", "facts.json"])
def test_damaged_tables_are_noticed_before_anything_is_read(copy: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[-3] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(FmsuiteError, match=rf"{name}: its content has changed"):
        PackedReader(copy)
    assert (name, "its content has changed") in list(verify(copy))


@settings(max_examples=60, deadline=None)
@given(at=st.integers(0, 10**9), flip=st.integers(1, 255))
def test_no_flipped_byte_of_a_shard_gives_other_pixels(original: Path, at: int, flip: int) -> None:
    whole = shard(original).read_bytes()
    at %= len(whole)
    target = original.parent / "flipped"
    target.write_bytes(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
    failed = 0
    try:
        opened = ShardFile(target, PER_SHARD)
    except Damaged:
        return
    for number in (8,):
        try:
            values = opened.read(number - PER_SHARD, (2, 6, 5), np.dtype("uint16"))
            np.testing.assert_array_equal(values, sample(number).values)
        except Damaged:
            failed += 1
    opened.close()
    assert failed == 1


def test_files_stay_open_up_to_a_bound_and_none_cross_a_fork(tmp_path: Path) -> None:
    count = 3 * OPEN_SHARDS
    index = SampleIndex.from_windows(
        (Window("/s", "g", (float(4 * number), 0.0), (1.0, 1.0)) for number in range(count)), {"domain": "test"}
    )
    packing = Packing(count, index.hash, "test", 1)
    packing.write(tmp_path)
    for number in range(count):
        pack_block(index, Reader(), tmp_path, packing, number)
    finish(index, tmp_path, packing, SkippedLog())
    reader = PackedReader(tmp_path)

    def held() -> int:
        links = [os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if os.path.islink(entry.path)]
        return sum(link.startswith(str(tmp_path / "arrays")) for link in links)

    for row in range(count):
        reader.read(index[row])
        assert held() <= OPEN_SHARDS
    assert held() == OPEN_SHARDS
    child = os.fork()
    if child == 0:
        same = np.array_equal(reader.read(index[5]).values, sample(20).values)
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
    np.testing.assert_array_equal(reader.read(index[count - 1]).values, sample(4 * count - 4).values)
    reader.close()
    assert held() == 0


class Drawing(ArraySample):
    pass


def test_samples_that_are_drawn_anew_at_each_size_are_refused(tmp_path: Path) -> None:
    class Drawer:
        def read(self, window: Window) -> Sample:
            return Drawing(np.zeros((1, 4, 4)))

    index = SampleIndex.from_windows([window(0)])
    with pytest.raises(UsageError, match="no pixels to pack"):
        pack_block(index, Drawer(), tmp_path, Packing(1, "", "test", 4), 0)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_shard_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    with suppress(ZeroDivisionError), ShardWriter(tmp_path / "c" / "0", 4) as writer:
        writer.add(0, np.zeros(3))
        raise ZeroDivisionError
    assert list((tmp_path / "c").iterdir()) == []


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int16", "float32", "float64"])
def test_zeros_noise_and_large_windows_survive(tmp_path: Path, dtype: str) -> None:
    random = np.random.default_rng(0)
    windows = [np.zeros((3, 64, 64), dtype), (random.random((3, 64, 64)) * 200).astype(dtype)]
    create_array(tmp_path, 4, 4, (3, 64, 64), np.dtype(dtype))
    with ShardWriter(shard_file(tmp_path, 0, 3), 4) as writer:
        for slot, values in zip((0, 2), windows):
            writer.add(slot, values)
        writer.finish()
    opened, array = ShardFile(shard_file(tmp_path, 0, 3), 4), zarr.open_array(str(tmp_path), mode="r")
    for slot, values in zip((0, 2), windows):
        np.testing.assert_array_equal(opened.read(slot, (3, 64, 64), np.dtype(dtype)), values)
        np.testing.assert_array_equal(array[slot], values)
    with pytest.raises(Damaged, match="no window at place 1"):
        opened.read(1, (3, 64, 64), np.dtype(dtype))
    with pytest.raises(Damaged, match="is not "):
        opened.read(0, (3, 64, 65), np.dtype(dtype))
    opened.close()


def test_paths_in_the_folder_are_relative(original: Path) -> None:
    for path in original.rglob("*.json"):
        assert str(original) not in path.read_text(), path
    assert json.loads((original / "packing.json").read_text())["tables"]
    assert SampleIndex.read(original / "index.parquet").metadata["packed"]["folder"] == "."
