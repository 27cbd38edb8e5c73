from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import resource
import threading
import time
from pathlib import Path

import pytest
import torch

from fmsuite.core.training import checkpoint_files, saver
from fmsuite.core.training.checkpoint import Checkpoint, Plan, find_latest, list_checkpoints, load_checkpoint
from fmsuite.core.training.saver import Saver
from fmsuite.errors import FmsuiteError
from tests.core.training.helpers import final_state, make_config, run_toy


def write(folder: Path, step: int, keep: int = 3, values: int = 1000) -> Path:
    """A checkpoint of one tensor and a scalar, complete when this returns."""
    writer = Saver(folder, keep)
    state = {"objective.weight": torch.full((values,), float(step)), "optimizer.weight.step": torch.tensor(float(step))}
    writer.save(Checkpoint(step, {"seed": 0}, Plan(100, 10)), state)
    writer.wait()
    writer.close()
    return folder / f"step-{step:08d}"


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_the_newest_is_found_and_only_the_last_ones_stay(tmp_path: Path) -> None:
    for step in (5, 10, 100, 20):
        write(tmp_path, step)
    expected = ["step-00000100", "step-00000020", "step-00000010"]
    assert [path.name for path in list_checkpoints(tmp_path)] == expected
    assert names(tmp_path) == sorted(expected)
    latest = find_latest(tmp_path)
    assert latest is not None
    assert (latest.checkpoint.step, latest.checkpoint.plan) == (100, Plan(100, 10))
    assert latest.state["objective.weight"].tolist() == [100.0] * 1000
    assert latest.state["optimizer.weight.step"] == 100


def test_no_checkpoint_at_all_is_none(tmp_path: Path) -> None:
    assert find_latest(tmp_path) is None
    (tmp_path / ".step-00000005.partial").mkdir()
    assert find_latest(tmp_path) is None
    write(tmp_path, 7)
    assert names(tmp_path) == ["step-00000007"]


def test_a_checkpoint_takes_the_place_of_one_of_the_same_step(tmp_path: Path) -> None:
    path = write(tmp_path, 5)
    (path / "checkpoint.json").write_text("{}")
    write(tmp_path, 5)
    assert names(tmp_path) == ["step-00000005"]
    assert load_checkpoint(path).checkpoint.step == 5


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "checkpoint.json"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_newest_falls_back_and_is_named(
    tmp_path: Path, file: str, share: float, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 5)
    damaged = write(tmp_path, 10) / file
    content = damaged.read_bytes()
    damaged.write_bytes(content[: int(len(content) * share)])
    with caplog.at_level(logging.WARNING, "fmsuite"):
        latest = find_latest(tmp_path)
    assert latest is not None
    assert latest.checkpoint.step == 5
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "fmsuite"]
    assert "step-00000010: not a readable checkpoint" in warning


def test_a_missing_file_falls_back_too(tmp_path: Path) -> None:
    write(tmp_path, 5)
    (write(tmp_path, 10) / "__0_0.distcp").unlink()
    latest = find_latest(tmp_path)
    assert latest is not None
    assert latest.checkpoint.step == 5


def test_folders_that_are_no_checkpoints_do_not_resume(tmp_path: Path) -> None:
    (tmp_path / "step-00000007").mkdir()
    (tmp_path / "step-00000008").mkdir()
    (tmp_path / "step-00000008" / "checkpoint.json").write_text("[1, 2]")
    with pytest.raises(FmsuiteError, match="none of the 2 checkpoints can be read"):
        find_latest(tmp_path)


def test_the_format_of_an_earlier_version_is_refused_in_a_sentence(tmp_path: Path) -> None:
    torch.save({"format": 1, "step": 5}, tmp_path / "step-00000005.pt")
    with pytest.raises(FmsuiteError, match=r"step-00000005\.pt: a checkpoint in the format of an earlier fmsuite"):
        find_latest(tmp_path)


def test_the_format_of_a_later_version_is_refused_in_a_sentence(tmp_path: Path) -> None:
    description = write(tmp_path, 5) / "checkpoint.json"
    description.write_text(json.dumps({**json.loads(description.read_text()), "format": 3}))
    with pytest.raises(FmsuiteError, match="newer fmsuite"):
        find_latest(tmp_path)


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("place", ["table", "entry", "bytes", "tensor"])
def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, place: str) -> None:
    checkpoints, owned = tmp_path / "checkpoints", tmp_path / "owned"
    path = write(checkpoints, 1)
    table_file, data_file = path / ".metadata", path / "__0_0.distcp"
    table = pickle.loads(table_file.read_bytes())
    name = "objective.weight"
    if place == "table":
        table_file.write_bytes(pickle.dumps(Hostile(owned)))
    elif place == "entry":
        table.planner_data = Hostile(owned)
        table_file.write_bytes(pickle.dumps(table))
    else:
        # What PyTorch would unpickle for us: an entry that says it is an object, and a tensor that is none.
        index = next(index for index in table.storage_data if index.fqn == name)
        if place == "bytes":
            table.state_dict_metadata[name] = torch.distributed.checkpoint.metadata.BytesStorageMetadata()
        torch.save(Hostile(owned), data_file)
        table.storage_data[index].offset, table.storage_data[index].length = 0, data_file.stat().st_size
        table_file.write_bytes(pickle.dumps(table))
    with pytest.raises(FmsuiteError, match="none of the 1"):
        find_latest(checkpoints)
    assert not owned.exists()


def test_a_file_outside_the_folder_is_not_read(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    table = pickle.loads((path / ".metadata").read_bytes())
    for place in table.storage_data.values():
        place.relative_path = f"../{path.name}/{place.relative_path}"
    (path / ".metadata").write_bytes(pickle.dumps(table))
    with pytest.raises(FmsuiteError, match="none of the 1"):
        find_latest(tmp_path)


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("at", ["write", "fsync", "replace"])
def test_a_full_disk_keeps_the_last_good_one_and_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    write(tmp_path, 5, keep=1)
    if at == "write":
        monkeypatch.setattr(checkpoint_files._Recorder, "write", full)
    else:
        monkeypatch.setattr(checkpoint_files.os, at, full)
    with pytest.raises(FmsuiteError) as error:
        write(tmp_path, 10, keep=1)
    monkeypatch.undo()
    message = str(error.value)
    assert "step-00000010: the checkpoint could not be written (No space left on device)" in message
    assert "step-00000005 is intact" in message
    assert "--resume to continue from step 5" in message
    assert names(tmp_path) == ["step-00000005"]
    latest = find_latest(tmp_path)
    assert latest is not None
    assert latest.checkpoint.step == 5


def test_a_real_write_limit_is_reported_as_what_it_is(tmp_path: Path) -> None:
    # A file-size limit makes the kernel refuse the write half-way, as a full disk does.
    write(tmp_path, 5, keep=1, values=10)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(FmsuiteError, match=r"\(File too large\)"):
            write(tmp_path, 8, keep=1, values=10**6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["step-00000005"]


def test_a_run_whose_disk_filled_up_continues_where_the_message_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(12, checkpoint_every=4)
    run_toy(tmp_path / "whole", config)

    class Full(checkpoint_files.Writer):
        def finish(self, **given: object) -> None:
            full() if self.target.name == "step-00000008" else super().finish(**given)  # type: ignore[arg-type]

    monkeypatch.setattr(saver, "Writer", Full)
    with pytest.raises(FmsuiteError, match="continue from step 4"):
        run_toy(tmp_path / "parts", config)
    monkeypatch.undo()
    assert names(tmp_path / "parts" / "checkpoints") == ["step-00000004"]
    run_toy(tmp_path / "parts", config, resume=True)
    whole, parts = final_state(tmp_path / "whole", 12), final_state(tmp_path / "parts", 12)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_steps_go_on_while_a_checkpoint_is_written_and_it_holds_the_step_it_is_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(12, checkpoint_every=4, keep_checkpoints=9)
    run_toy(tmp_path / "quick", config)
    reached, during = threading.Event(), []

    class Slow(checkpoint_files.Writer):
        def write_data(self, *given: object):  # type: ignore[no-untyped-def]
            if self.target.name == "step-00000004":
                # Nothing lets this go on but a step that is taken meanwhile.
                during.append(reached.wait(60))
            return super().write_data(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(saver, "Writer", Slow)
    run_toy(tmp_path / "slow", config, at=lambda step: reached.set() if step == 7 else None)
    assert during == [True]
    for step in (4, 8, 12):
        quick, slow = final_state(tmp_path / "quick", step), final_state(tmp_path / "slow", step)
        assert quick.keys() == slow.keys()
        assert all(torch.equal(slow[name], value) for name, value in quick.items())


def test_one_checkpoint_is_written_at_a_time_and_the_last_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    class Slow(checkpoint_files.Writer):
        def write_data(self, *given: object):  # type: ignore[no-untyped-def]
            events.append(f"begun {self.target.name[-2:]}")
            time.sleep(0.2)
            return super().write_data(*given)  # type: ignore[arg-type]

        def finish(self, **given: object) -> None:
            super().finish(**given)  # type: ignore[arg-type]
            events.append(f"done {self.target.name[-2:]}")

    monkeypatch.setattr(saver, "Writer", Slow)
    run_toy(tmp_path, make_config(6, checkpoint_every=3))
    assert events == ["begun 03", "done 03", "begun 06", "done 06"]
    assert names(tmp_path / "checkpoints") == ["step-00000003", "step-00000006"]
