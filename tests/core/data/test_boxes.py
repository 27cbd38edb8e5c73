"""Boxes of arrays in small chunks: each is the array's, from the chunks that it touches, and Zarr reads the files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from fmsuite.core.data import boxes, shards
from fmsuite.core.data.boxes import BoxArray, chunk_of, write_boxes
from fmsuite.core.data.shards import ShardFile, file_digest
from fmsuite.core.zarr_arrays import Damaged


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(1, 11), min_size=1, max_size=3).map(tuple),
    whole=st.lists(st.integers(1, 3), max_size=1).map(tuple),
    dtype=st.sampled_from(["float32", "float16", "int16", "uint8", "bool", "float64"]),
    samples=st.sampled_from([2**3, 2**6]),
    seed=st.integers(0, 99),
)
def test_any_box_is_that_of_the_array(tmp_path_factory, shape, whole, dtype, samples: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    values = (random.normal(size=(*whole, *shape)) * 9).astype(dtype)
    folder = tmp_path_factory.mktemp("a") / "array"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(boxes, "CHUNK_SAMPLES", samples)
        files = write_boxes(folder, values, len(shape))
    assert {path: file_digest(path) for path in folder.rglob("*") if path.is_file()} == files
    array = BoxArray(folder)
    assert (array.shape, array.dtype) == (values.shape, values.dtype)
    for _ in range(4):
        start = [int(random.integers(0, n)) for n in shape]
        size = [int(random.integers(1, n - a + 1)) for a, n in zip(start, shape, strict=True)]
        box = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
        found = array.read(start, size)
        assert found.dtype == values.dtype
        np.testing.assert_array_equal(found, values[(..., *box)])
    array.close()
    np.testing.assert_array_equal(np.asarray(zarr.open_array(str(folder), mode="r")[:]), values)


def test_only_the_chunks_that_a_box_touches_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chunk_of((200, 300, 20)) == (32, 32, 20)
    assert chunk_of((200, 300)) == (128, 128)
    assert chunk_of((3, 200, 300)) == (3, 64, 64)
    assert chunk_of((3, 5)) == (3, 5)
    assert chunk_of((200, 300, 200), 4) == (32, 32, 32)
    assert chunk_of((200, 300), 13 * 2) == (64, 64)
    assert chunk_of((200, 300), 2**30) == (1, 1)
    assert chunk_of((9, 2, 10**6)) == (9, 2, 1024)
    monkeypatch.setattr(boxes, "CHUNK_SAMPLES", 4**3)
    write_boxes(tmp_path / "a", np.zeros((2, 16, 16, 16), np.float32), 3)
    array, slots = BoxArray(tmp_path / "a"), []
    read, pread, asked = ShardFile.read_each, os.pread, []
    monkeypatch.setattr(
        ShardFile, "read_each", lambda self, some, *rest, **how: slots.extend(some) or read(self, some, *rest, **how)
    )
    monkeypatch.setattr(
        shards.os, "pread", lambda file, length, start: asked.append(start) or pread(file, length, start)
    )
    array.read((4, 3, 0), (4, 2, 16))
    # Of 4 x 4 x 4 chunks: the second, the first two, all.
    assert sorted(slots) == [16, 17, 18, 19, 20, 21, 22, 23]
    assert len(asked) == 1
    array.read((0, 0, 8), (6, 8, 8))
    assert len(asked) == 1 + 4


def test_boxes_beyond_the_array_and_damage_are_refused(tmp_path: Path) -> None:
    write_boxes(tmp_path / "a", np.arange(600, dtype=np.int16).reshape(10, 60), 2)
    array = BoxArray(tmp_path / "a")
    for start, size in (((0, 50), (10, 11)), ((-1, 0), (2, 2)), ((0, 0), (0, 2))):
        with pytest.raises(ValueError, match=r"in an array of \(10, 60\)"):
            array.read(start, size)
    array.close()
    about = tmp_path / "a" / "zarr.json"
    described = json.loads(about.read_text())
    for wrong in ("{", json.dumps({**described, "codecs": []}), json.dumps({**described, "shape": None})):
        about.write_text(wrong)
        with pytest.raises(Damaged, match="does not describe an array"):
            BoxArray(tmp_path / "a")
    about.unlink()
    with pytest.raises(Damaged, match=r"zarr\.json"):
        BoxArray(tmp_path / "a")
