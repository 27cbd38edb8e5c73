"""``fmsuite pretrain --pairs``: how lines find windows, what a run remembers of them, and what is refused."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest

from fmsuite.commands.pairs import join_pairs
from fmsuite.core.data.index import SampleIndex, Window
from fmsuite.core.data.pairs import Pairs, read_pairs
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.encoders import load_encoder
from fmsuite.errors import UsageError

TEXT = {"objective.embedding": 8, "objective.text_width": 16, "objective.text_depth": 1, "objective.text_heads": 2}
OTHERS = ("objective.prototypes", "objective.head_hidden", "objective.head_bottleneck", "objective.local_crops")


@pytest.fixture
def paired(tile_settings):
    """The settings of a small run, without what other objectives are told."""

    def arguments(objective: str, changes: dict) -> list[str]:
        words = tile_settings(objective, {"training.accumulate": 2, **changes})
        items = list(zip(words[::2], words[1::2], strict=True))
        return [word for pair in items if pair[1].split("=")[0] not in OTHERS for word in pair]

    return arguments


INDEX = SampleIndex.from_windows(
    Window(f"/data/{folder}/{name}.nii.gz", f"patient{number // 2}", (z, 0.0, 0.0), (8.0, 8.0, 8.0))
    for number, (folder, name) in enumerate((("a", "x"), ("a", "y"), ("b", "z"), ("b", "w")))
    for z in (0.0, 8.0)
)


def join(tmp_path: Path, text: str) -> tuple[Pairs, SkippedLog]:
    path = tmp_path / "pairs.csv"
    path.write_text(text)
    skipped = SkippedLog()
    return join_pairs(read_pairs(path), INDEX, skipped), skipped


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("source,text\nx.nii.gz,1\nb/z,2\n/data/a/y.nii.gz,3\n", [0, 0, 2, 2, 1, 1, -1, -1]),
        ("path,text\nw,1\n", [-1, -1, -1, -1, -1, -1, 0, 0]),
        ("source,text\npatient1,1\n", [-1, -1, -1, -1, 0, 0, 0, 0]),
        ("group,text\npatient1,1\npatient0,2\n", [1, 1, 1, 1, 0, 0, 0, 0]),
        ("window,text\n5,1\n0,2\n", [1, -1, -1, -1, -1, 0, -1, -1]),
    ],
)
def test_a_line_is_about_all_windows_of_what_it_names(tmp_path: Path, text: str, expected: list[int]) -> None:
    pairs, skipped = join(tmp_path, text)
    assert pairs.of_row.tolist() == expected
    assert not len(skipped)


def test_lines_that_name_nothing_go_on_record(tmp_path: Path) -> None:
    pairs, skipped = join(tmp_path, "source,text\nx,1\nq,2\n")
    assert pairs.of_row.tolist() == [0, 0] + [-1] * 6
    assert [(entry.path, entry.stage) for entry in skipped.entries] == [("q", "pairs")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("source,text\nq,1\nr,2\n", "none of its 2 lines names one of the 8 windows; its first names the source 'q'"),
        ("window,text\n8,1\n", "none of its 1 lines"),
        ("group,text\nPatient0,1\n", "the first window is of the group 'patient0'"),
        ("source,text\nx,1\na/x.nii.gz,2\n", "'x' and 'a/x.nii.gz' are about the same windows"),
    ],
)
def test_lines_that_cannot_be_right_are_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        join(tmp_path, text)


def captions(tiles: Path, tmp_path: Path) -> Path:
    """Texts of five of the six images."""
    path = tmp_path / "captions.csv"
    path.write_text("source,text\n" + "".join(f"{number}.png,blocks number {number}\n" for number in range(5)))
    return path


@pytest.mark.parametrize("objective", ["clip", "siglip"])
def test_a_run_remembers_its_pairs_and_can_be_continued_without_the_table(
    fmsuite, paired, facts_of, tiles: Path, tmp_path: Path, objective: str
) -> None:
    table, run = captions(tiles, tmp_path), tmp_path / "run"
    changes = {**TEXT, "objective.context_length": 20, "objective.chunk": 4}
    arguments = paired(objective, changes)
    ran = fmsuite("pretrain", "--data", tiles, "--pairs", table, "--out", run, *arguments)
    assert ran.code == 0, ran.text
    assert "4 of 24 windows have no partner and are left out of training." in ran.text
    pairs = Pairs.read(run / "pairs.parquet", 24)
    assert (pairs.of_row >= 0).sum() == 20
    assert json.loads((run / "run.json").read_text())["pairs_hash"] == pairs.hash
    encoder = load_encoder(str(run))
    assert encoder.provenance["pairs"] == pairs.hash
    assert not any("partner" in name for name in encoder.backbone.state_dict())
    assert encoder.pooling == "cls"

    whole = facts_of(run)
    for path in sorted((run / "checkpoints").glob("*"))[1:]:
        shutil.rmtree(path)
    table.unlink()
    again = ["pretrain", "--domain", "pathology", "--out", run, "--resume"]
    refused = fmsuite(*again, "--pairs", table)
    assert refused.code == 2
    assert "the run's own pairs.parquet" in refused.text
    ran = fmsuite(*again)
    assert ran.code == 0, ran.text
    assert "Resuming after step" in ran.text
    resumed = facts_of(run)
    assert resumed.losses == whole.losses
    assert all((resumed.weights[name] == weight).all() for name, weight in whole.weights.items())

    (run / "pairs.parquet").unlink()
    other = tmp_path / "other.csv"
    other.write_text("source,text\n0.png,something else\n")
    ran = fmsuite(*again, "--pairs", other)
    assert ran.code == 2
    assert "the run was begun on other pairs" in ran.text
    assert not (run / "pairs.parquet").exists()

    Pairs(pairs.values, np.where(pairs.of_row == 0, 1, pairs.of_row)).write(run / "pairs.parquet")
    ran = fmsuite(*again)
    assert ran.code == 2
    assert "the run was begun on other pairs" in ran.text


def test_two_processes_have_the_losses_of_one(launcher, paired, facts_of, tiles: Path, tmp_path: Path) -> None:
    """Rank 0 joins the table, both read it; each finds its partners among those of both."""
    changes = {**TEXT, "objective.chunk": 3, "training.accumulate": 1}
    arguments = ["pretrain", "--data", tiles, "--pairs", captions(tiles, tmp_path), *paired("clip", changes), "--out"]
    commands = [launcher.start(*arguments, tmp_path / "two", environment=e) for e in environments()]
    for ran in [command.wait() for command in commands]:
        assert ran.code == 0, ran.text
    ran = launcher.start(*arguments, tmp_path / "one").wait()
    assert ran.code == 0, ran.text
    one, two = facts_of(tmp_path / "one").losses, facts_of(tmp_path / "two").losses
    assert set(one) == set(two)
    for step, (loss, grad_norm) in one.items():
        assert two[step] == pytest.approx((loss, grad_norm), rel=1e-4), step


def environments() -> list[dict[str, str]]:
    """What torchrun tells two processes."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]


def test_what_cannot_be_paired_is_refused_before_anything_is_trained(fmsuite, paired, tiles, tmp_path) -> None:
    table, data = captions(tiles, tmp_path), tmp_path / "data"
    shutil.copytree(tiles, data)
    numbers = tmp_path / "numbers.csv"
    numbers.write_text("source,a,b\n0.png,1,2\n1.png,3,4\n")
    cases = [
        (paired("clip", TEXT), [], "learns from pairs, and none are given"),
        (paired("mae", {}), ["--pairs", table], "Objective 'mae' does not learn from pairs."),
        (paired("clip", TEXT), ["--pairs", tmp_path / "none.csv"], "none.csv: not a readable table"),
        (
            paired("clip", TEXT),
            ["--pairs", numbers],
            "The pairs are 2 numbers a line, and objective 'clip' is set up for",
        ),
    ]
    for number, (arguments, pairs, words) in enumerate(cases):
        ran = fmsuite("pretrain", "--data", data, *pairs, "--out", tmp_path / str(number), *arguments)
        assert ran.code == 2, ran.text
        assert words in ran.text
        assert not (tmp_path / str(number) / "checkpoints").exists()
    ran = fmsuite(
        "pretrain",
        "--data",
        data,
        "--pairs",
        numbers,
        "--out",
        tmp_path / "vectors",
        *paired("siglip", {"objective.embedding": 8, "objective.partner": 2, "objective.vector_hidden": 8}),
    )
    assert ran.code == 0, ran.text
