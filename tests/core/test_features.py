"""The feature store: whole groups or none, one writer, nothing mixed, nothing deleted by mistake, damage noticed."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr

from fmsuite.core.data.index import SampleIndex, Window
from fmsuite.core.features import FeatureStore, StoreFacts
from fmsuite.errors import FmsuiteError, UsageError

SIZES = {"a.svs": 3, "b.svs": 600, "sub/a.svs": 2}
DIM = 5


@pytest.fixture
def index() -> SampleIndex:
    """Windows of three slides, of which the first comes back at the end."""
    windows = []
    for name, count in [*SIZES.items(), ("a.svs", 1)]:
        for number in range(count):
            windows.append(Window(f"/d/{name}", name[0], (16.0 * number, 3.0), (16.0, 16.5), label=name[0]))
    return SampleIndex.from_windows(windows, {"domain": "pathology"})


@pytest.fixture
def facts(index: SampleIndex) -> StoreFacts:
    return StoreFacts(
        domain="pathology",
        identity="e1",
        name="one",
        pooling="cls",
        dim=DIM,
        size=(32, 32),
        axes=("y", "x"),
        index_hash=index.hash,
        by="source",
        batch_size=8,
    )


def features_of(store: FeatureStore, id: str, seed: int = 0) -> np.ndarray:
    shape = (len(store.rows_of(id)), DIM)
    return np.random.default_rng([seed, *id.encode()]).standard_normal(shape).astype(np.float32)


@pytest.fixture
def filled(tmp_path: Path, facts: StoreFacts, index: SampleIndex) -> Path:
    """A store with all groups."""
    path = tmp_path / "f.zarr"
    with FeatureStore.create_or_resume(path, facts, index) as store:
        for id in store.keys():  # noqa: SIM118
            store.write(id, store.rows_of(id), features_of(store, id))
    return path


def test_groups_come_back_as_they_were_written(filled: Path, index: SampleIndex, facts: StoreFacts) -> None:
    store = FeatureStore.open(filled)
    assert store.facts == facts
    assert store.index.hash == index.hash
    assert store.index.metadata == index.metadata
    assert store.keys() == store.stored() == list(SIZES)
    assert store.missing() == []
    assert store.windows() == len(index)
    group = store["a.svs"]
    assert group.rows.tolist() == [0, 1, 2, len(index) - 1]
    assert np.array_equal(group.features, features_of(store, "a.svs"))
    assert group.position.tolist() == [list(index[row].position) for row in group.rows]
    assert group.extent.tolist() == [[16.0, 16.5]] * 4


def test_any_zarr_library_reads_it(filled: Path, facts: StoreFacts) -> None:
    root = zarr.open_group(str(filled), mode="r")
    assert root.attrs["identity"] == "e1"
    assert root.attrs["index_hash"] == facts.index_hash
    assert root["sub%2Fa.svs"].attrs["id"] == "sub/a.svs"
    array = root["b.svs"]["features"]
    assert (array.dtype, array.shape, array.chunks) == (np.float32, (600, DIM), (512, DIM))
    assert root["a.svs"]["features"].chunks == (4, DIM)
    assert np.array_equal(array[:], features_of(FeatureStore.open(filled), "b.svs"))


def test_all_features_come_in_the_order_of_the_index(filled: Path, index: SampleIndex) -> None:
    store = FeatureStore.open(filled)
    expected = np.empty((len(index), DIM), dtype=np.float32)
    for id in SIZES:
        own = [row for row in range(len(index)) if index[row].source == f"/d/{id}"]
        expected[own] = features_of(store, id)
    features, rows = store.read_all()
    assert rows.tolist() == list(range(len(index)))
    assert np.array_equal(features.numpy(), expected)
    chosen = [604, 1, 605, 300]
    features, rows = store.read_all(chosen)
    assert rows.tolist() == sorted(chosen)
    assert np.array_equal(features.numpy(), expected[sorted(chosen)])


def test_what_is_not_stored_is_left_out(tmp_path: Path, facts: StoreFacts, index: SampleIndex) -> None:
    with FeatureStore.create_or_resume(tmp_path / "f.zarr", facts, index) as store:
        rows = store.rows_of("a.svs")
        store.write("a.svs", rows[1:], features_of(store, "a.svs")[1:])
        assert store.missing() == ["b.svs", "sub/a.svs"]
        features, found = store.read_all()
        assert found.tolist() == rows[1:].tolist()
        assert np.array_equal(features.numpy(), features_of(store, "a.svs")[1:])
        assert store.read_all([0])[0].shape == (0, DIM)
        with pytest.raises(UsageError, match=r"'b\.svs' is not stored.*fmsuite embed"):
            store["b.svs"]
        with pytest.raises(UsageError, match=r"no group 'b\.sv'.*Did you mean 'b\.svs'"):
            store["b.sv"]


def test_groups_of_which_nothing_could_be_read_are_remembered(
    tmp_path: Path, facts: StoreFacts, index: SampleIndex
) -> None:
    with FeatureStore.create_or_resume(tmp_path / "f.zarr", facts, index) as store:
        store.mark_unreadable("b.svs", "/d/b.svs: broken")
    with FeatureStore.create_or_resume(tmp_path / "f.zarr", facts, index) as store:
        assert store.unreadable() == {"b.svs": "/d/b.svs: broken"}
        assert store.missing() == ["a.svs", "sub/a.svs"]
        with pytest.raises(UsageError, match=r"none of its windows could be read: /d/b\.svs: broken"):
            store["b.svs"]
        store.write("b.svs", store.rows_of("b.svs"), features_of(store, "b.svs"))
        assert store.unreadable() == {}
        assert store.stored() == ["b.svs"]


@pytest.mark.parametrize("name", ["features", "rows", "position"])
def test_a_group_that_cannot_be_finished_is_absent(
    name: str, tmp_path: Path, facts: StoreFacts, index: SampleIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fmsuite.core.features as module

    write_array = module.write_array

    def full(folder: Path, *arguments: object) -> None:
        write_array(folder, *arguments)
        if folder.name == name:
            raise OSError(28, "No space left on device")

    with FeatureStore.create_or_resume(tmp_path / "f.zarr", facts, index) as store:
        store.write("a.svs", store.rows_of("a.svs"), features_of(store, "a.svs"))
        monkeypatch.setattr(module, "write_array", full)
        with pytest.raises(FmsuiteError, match=r"b\.svs: cannot be written \(No space left on device\).*Make room"):
            store.write("b.svs", store.rows_of("b.svs"), features_of(store, "b.svs"))
        assert store.stored() == ["a.svs"]
        assert not list((tmp_path / "f.zarr" / ".partial").iterdir())
        monkeypatch.undo()
        store.write("b.svs", store.rows_of("b.svs"), features_of(store, "b.svs"))
        assert store.stored() == ["a.svs", "b.svs"]


def test_a_disk_that_takes_no_more_is_reported(tmp_path: Path, facts: StoreFacts, index: SampleIndex) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with FeatureStore.create_or_resume(tmp_path / "f.zarr", facts, index) as store:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        try:
            with pytest.raises(FmsuiteError, match=r"b\.svs: cannot be written"):
                store.write("b.svs", store.rows_of("b.svs"), features_of(store, "b.svs"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert store.stored() == []


def test_what_a_killed_process_was_writing_is_removed(filled: Path, facts: StoreFacts, index: SampleIndex) -> None:
    left = filled / ".partial" / "b.svs" / "features"
    left.mkdir(parents=True)
    (left / "c").write_text("half")
    with FeatureStore.create_or_resume(filled, facts, index) as store:
        assert not (filled / ".partial").exists()
        assert store.stored() == list(SIZES)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused(
    value: float, tmp_path: Path, facts: StoreFacts, index: SampleIndex
) -> None:
    with FeatureStore.create_or_resume(tmp_path / "f.zarr", facts, index) as store:
        features = features_of(store, "b.svs")
        features[[4, 77], 2] = value
        with pytest.raises(FmsuiteError, match=r"2 of 600 .*'b\.svs'.*row 7 of the index, /d/b\.svs at \(64"):
            store.write("b.svs", store.rows_of("b.svs"), features)
        assert store.stored() == []


def test_features_that_became_not_finite_are_refused_when_read(filled: Path) -> None:
    zarr.open_array(str(filled / "b.svs" / "features"), mode="r+")[9, 0] = np.nan
    with pytest.raises(FmsuiteError, match=r"'b\.svs'.*row 12 of the index.*Remove .*b\.svs and run `fmsuite embed`"):
        FeatureStore.open(filled).read_all()


def _truncate(file: Path) -> None:
    os.truncate(file, 100)


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[50] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("harm", [_truncate, _flip, Path.unlink])
@pytest.mark.parametrize("file", ["features/c/1/0", "rows/c/0", "features/zarr.json"])
def test_damage_is_noticed_and_its_file_named(filled: Path, file: str, harm: Callable[[Path], None]) -> None:
    damaged = filled / "b.svs" / file
    harm(damaged)
    store = FeatureStore.open(filled)
    with pytest.raises(FmsuiteError) as raised:
        store["b.svs"]
    assert str(damaged) in str(raised.value)
    assert f"Remove {filled / 'b.svs'} and run `fmsuite embed` again" in str(raised.value)
    assert len(store["a.svs"].rows) == 4


@pytest.mark.parametrize("harm", [_truncate, Path.unlink])
def test_counting_windows_names_a_damaged_group_too(filled: Path, harm: Callable[[Path], None]) -> None:
    harm(filled / "b.svs" / "rows" / "zarr.json")
    with pytest.raises(FmsuiteError, match=r"b\.svs/rows/zarr\.json: damaged .*Remove .*b\.svs and run"):
        FeatureStore.open(filled).windows()


@pytest.mark.parametrize("harm", [_truncate, Path.unlink])
def test_a_damaged_index_inside_asks_for_the_store_to_be_made_again(
    filled: Path, facts: StoreFacts, index: SampleIndex, harm: Callable[[Path], None]
) -> None:
    harm(filled / "index.parquet")
    with pytest.raises(FmsuiteError, match=r"index\.parquet: .*--overwrite"):
        FeatureStore.open(filled)
    with pytest.raises(FmsuiteError, match=r"index\.parquet: .*--overwrite"):
        FeatureStore.create_or_resume(filled, facts, index)
    FeatureStore.create_or_resume(filled, facts, index, overwrite=True).close()
    assert FeatureStore.open(filled).keys() == list(SIZES)


def test_a_damaged_description_or_list_is_named_with_the_way_out(filled: Path) -> None:
    (filled / "unreadable.json").write_text("[1]")
    with pytest.raises(FmsuiteError, match=r"unreadable\.json: damaged .*Remove"):
        FeatureStore.open(filled).missing()
    _truncate(filled / "zarr.json")
    with pytest.raises(FmsuiteError, match=r"zarr\.json: damaged .*Remove"):
        FeatureStore.open(filled)


def test_a_group_that_was_removed_is_missing(filled: Path) -> None:
    (filled / "b.svs").rename(filled.with_name("taken out"))
    assert FeatureStore.open(filled).missing() == ["b.svs"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"identity": "e2", "name": "two"}, r"encoder one \(e1\) against two \(e2\)"),
        ({"index_hash": "0123"}, r"index [0-9a-f]{16} \(pathology\) against 0123"),
        ({"pooling": "mean"}, "pooling cls against mean"),
        ({"by": "folder"}, "by source against folder"),
        ({"size": (64, 64)}, r"size \(32, 32\) against \(64, 64\)"),
        ({"batch_size": 4}, "batch_size 8 against 4"),
        ({"batching": 2}, "batching 1 against 2"),
        ({"precision": "bf16"}, "precision float32 against bf16"),
        ({"dim": 6}, "dim 5 against 6"),
    ],
)
def test_another_store_is_refused_or_replaced(
    change: dict, named: str, filled: Path, facts: StoreFacts, index: SampleIndex
) -> None:
    other = facts.model_copy(update=change)
    with pytest.raises(UsageError, match=named) as raised:
        FeatureStore.create_or_resume(filled, other, index)
    assert "--overwrite" in str(raised.value)
    assert FeatureStore.open(filled).stored() == list(SIZES)
    with FeatureStore.create_or_resume(filled, other, index, overwrite=True) as store:
        assert store.stored() == []
        assert store.facts == other
    assert [p.name for p in filled.parent.iterdir()] == [filled.name]


def test_versions_and_commands_do_not_matter(filled: Path, facts: StoreFacts, index: SampleIndex) -> None:
    other = facts.model_copy(update={"versions": {"torch": "9"}, "command": ["again"], "provenance": {"file": "moved"}})
    with FeatureStore.create_or_resume(filled, other, index) as store:
        assert store.facts == facts


def test_a_store_without_any_group_is_begun_anew(tmp_path: Path, facts: StoreFacts, index: SampleIndex) -> None:
    FeatureStore.create_or_resume(tmp_path / "f.zarr", facts, index).close()
    other = facts.model_copy(update={"batch_size": 2})
    with FeatureStore.create_or_resume(tmp_path / "f.zarr", other, index) as store:
        assert store.facts.batch_size == 2
    assert FeatureStore.open(tmp_path / "f.zarr").facts.batch_size == 2


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["folder", "foreign zarr", "file"])
def test_nothing_but_a_store_is_ever_replaced(
    kind: str, overwrite: bool, tmp_path: Path, facts: StoreFacts, index: SampleIndex
) -> None:
    path = tmp_path / "precious.zarr"
    if kind == "file":
        path.write_text("work of years")
    elif kind == "folder":
        path.mkdir()
        (path / "work").write_text("of years")
    else:
        zarr.open_group(str(path), mode="w-", attributes={"work": "of years"})
    before = sorted((p.name, p.stat().st_mtime_ns) for p in tmp_path.rglob("*"))
    for given in (path, tmp_path / "missing" / ".." / "precious.zarr"):
        with pytest.raises(UsageError, match=r"precious\.zarr: .*no feature store; nothing was changed"):
            FeatureStore.create_or_resume(given, facts, index, overwrite)
    assert sorted((p.name, p.stat().st_mtime_ns) for p in tmp_path.rglob("*")) == before
    with pytest.raises(UsageError, match="not a feature store"):
        FeatureStore.open(path)


def test_the_parent_of_a_store_is_not_one(filled: Path, facts: StoreFacts, index: SampleIndex) -> None:
    with pytest.raises(UsageError, match="no feature store; nothing was changed"):
        FeatureStore.create_or_resume(filled / "..", facts, index, overwrite=True)
    assert FeatureStore.open(filled).stored() == list(SIZES)


def test_the_old_store_stays_until_the_new_one_stands(
    filled: Path, facts: StoreFacts, index: SampleIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SampleIndex, "write", full)
    with pytest.raises(FmsuiteError, match="No space left"):
        FeatureStore.create_or_resume(filled, facts, index, overwrite=True)
    assert FeatureStore.open(filled).stored() == list(SIZES)
    assert [p.name for p in filled.parent.iterdir()] == [filled.name]
    monkeypatch.undo()
    FeatureStore.create_or_resume(filled, facts, index, overwrite=True).close()


def test_a_newer_version_and_damaged_facts_are_told_apart(filled: Path) -> None:
    root = filled / "zarr.json"
    written = json.loads(root.read_text())
    root.write_text(json.dumps({**written, "attributes": {**written["attributes"], "format_version": 2}}))
    with pytest.raises(UsageError, match=r"written by a newer fmsuite"):
        FeatureStore.open(filled)
    root.write_text(json.dumps({**written, "attributes": {**written["attributes"], "dim": "many"}}))
    with pytest.raises(FmsuiteError, match=r"zarr\.json: damaged .*dim"):
        FeatureStore.open(filled)
    with pytest.raises(UsageError, match="there is no such feature store"):
        FeatureStore.open(filled / "nowhere")


def test_reading_needs_no_lock_and_cannot_write(filled: Path, facts: StoreFacts, index: SampleIndex) -> None:
    with FeatureStore.create_or_resume(filled, facts, index):
        reading = FeatureStore.open(filled)
        assert reading["a.svs"].rows.size == 4
        with pytest.raises(ValueError, match="open for reading only"):
            reading.write("a.svs", reading.rows_of("a.svs"), features_of(reading, "a.svs"))


def test_rows_of_another_group_or_out_of_order_are_refused(
    tmp_path: Path, facts: StoreFacts, index: SampleIndex
) -> None:
    with FeatureStore.create_or_resume(tmp_path / "f.zarr", facts, index) as store:
        rows = store.rows_of("a.svs")
        for wrong in (rows[::-1], np.array([0, 4]), rows[:0]):
            with pytest.raises(ValueError, match="ascending rows"):
                store.write("a.svs", wrong, np.zeros((len(wrong), DIM), dtype=np.float32))
        with pytest.raises(ValueError, match=r"features of 'a\.svs' are float64"):
            store.write("a.svs", rows, np.zeros((4, DIM)))


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_second_writer_is_told_so(filled: Path, facts: StoreFacts, index: SampleIndex, overwrite: bool) -> None:
    with (
        FeatureStore.create_or_resume(filled, facts, index),
        pytest.raises(UsageError, match=r"f\.zarr: another process is writing to it"),
    ):
        FeatureStore.create_or_resume(filled, facts, index, overwrite)
    assert FeatureStore.open(filled).stored() == list(SIZES)
    FeatureStore.create_or_resume(filled, facts, index, overwrite).close()


HOLDER = """
import os, sys, time
from pathlib import Path
from fmsuite.core.lock import WriterLock
lock = WriterLock(Path(sys.argv[1]), "it")
child = os.fork()
if child:
    print(child, flush=True)
time.sleep(60)
"""


def test_a_killed_writer_leaves_no_lock_even_if_its_children_live(
    filled: Path, facts: StoreFacts, index: SampleIndex
) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(filled / ".lock")], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(UsageError, match="another process is writing"):
            FeatureStore.create_or_resume(filled, facts, index)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        os.kill(child, 0)
        # The child closes its copy of the lock when it is first scheduled.
        for attempt in range(100):
            try:
                FeatureStore.create_or_resume(filled, facts, index).close()
                break
            except UsageError:
                assert attempt < 99
                time.sleep(0.02)
        os.kill(child, 0)
    finally:
        holder.kill()
        os.kill(child, signal.SIGKILL)
        holder.stdout.close()
