"""One index, whoever looks at which source, in whatever order, and however often it is begun."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fmsuite.commands import indexing
from fmsuite.commands.indexing import build_index, bundled
from fmsuite.core.data.skipped import Skipped, SkippedLog
from fmsuite.core.pool import Outcome
from fmsuite.domains.base import Domain, load_domain
from fmsuite.errors import FmsuiteError, UsageError
from fmsuite.tiling.tasks import SourceTask
from tests.commands.lines import Deadly, Lines, LinesOptions

TEXTS = {
    "a": "one two",
    "b": "note one two three",
    "c": "bad",
    "d": "part of X",
    "e": "part of X",
    "f": "slow four",
    "g": "part of Y",
    "h": "five",
    "i": "bad too",
    "j": "six one",
}
USED = list("abdfghj")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, text in TEXTS.items():
        (folder / f"{name}.txt").write_text(text)
    (folder / "labels.csv").write_text("path,label,group\na,x,g1\nb,y,g1\nnowhere,y,g2\n")
    return folder


def everything(domain: Domain, path: Path, folder: Path, **options: Any) -> tuple[bytes, str, Any, str]:
    """The bytes of the index, its hash, its metadata and what was skipped."""
    folder.mkdir(exist_ok=True)
    skipped = SkippedLog(folder / "skipped.csv")
    index = build_index(domain, [path], skipped, **options)
    index.write(folder / "index.parquet")
    lines = (folder / "skipped.csv").read_text() if skipped.entries else ""
    return (folder / "index.parquet").read_bytes(), index.hash, index.metadata, lines


def stopping(after: int) -> Callable[..., Iterable]:
    """A progress report that is interrupted after so many sources."""
    left = [after]

    def report(items: Iterable, total: int, title: str) -> Iterator:
        for item in items:
            yield item
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt

    return report


def shuffled(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Units are done in any order."""

    def run(make: Callable, units: list, **options: Any) -> Iterator[Outcome]:
        for number in np.random.default_rng(seed).permutation(len(units)):
            (result,) = make()(iter([units[number]]))
            yield Outcome(int(number), units[number], result, None)

    monkeypatch.setattr(indexing, "run_units", run)


def test_an_index_has_the_sources_in_order_with_what_is_known_of_them(texts: Path) -> None:
    skipped = SkippedLog()
    index = build_index(Lines(LinesOptions()), [texts], skipped)
    assert [Path(source).stem for source in index.sources] == USED
    assert index.groups == ["g1", *"dfghj"]
    assert index[1].position == (1.0,)
    assert (index[0].label, index[2].label, index[6].label) == ("x", "y", None)
    assert index.metadata["words"]["one"] == 3
    assert index.metadata["last"] == "j"
    assert index.metadata["labels"]["matched"] == 2
    assert index.metadata["options"]["width"] == 2.0
    assert "colour" not in index.metadata["options"]
    lines = [(entry.path.rpartition("/")[2], entry.stage) for entry in skipped.entries]
    assert lines == [
        ("nowhere", "labels"),
        ("b.txt", "read"),
        ("c.txt", "open"),
        ("i.txt", "open"),
        ("e.txt", "metadata"),
    ]


@pytest.mark.parametrize("seed", range(12))
def test_the_order_in_which_sources_finish_decides_nothing(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    monkeypatch.setattr("fmsuite.tiling.parts.SEGMENT_SOURCES", int(draw.integers(1, 5)))
    monkeypatch.setattr("fmsuite.tiling.table._BATCH_ROWS", int(draw.integers(1, 9)))
    expected = everything(Lines(LinesOptions()), texts, tmp_path / "a")
    shuffled(monkeypatch, seed)
    parts = tmp_path / "parts" if seed % 2 else None
    assert everything(Lines(LinesOptions()), texts, tmp_path / "b", processes=2, parts=parts) == expected


@pytest.mark.parametrize("after", [1, 4, 9, 12, 16])
@pytest.mark.parametrize("seed", [None, 1])
def test_a_second_start_does_what_is_missing(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, seed: int | None
) -> None:
    expected = everything(Lines(LinesOptions()), texts, tmp_path / "a")
    trace, parts = tmp_path / "trace", tmp_path / "parts"
    domain = Lines(LinesOptions(trace=trace))
    if seed is not None:
        shuffled(monkeypatch, seed)
    processes = 0 if seed is None else 2
    with pytest.raises(KeyboardInterrupt):
        everything(domain, texts, tmp_path / "b", processes=processes, parts=parts, progress=stopping(after))
    before = trace.read_text().split()
    trace.unlink()
    assert everything(domain, texts, tmp_path / "b", processes=processes, parts=parts) == expected
    looked = trace.read_text().split()
    # d, e and g are looked at alone and then, but for e, as what they are.
    assert len(looked) + len(set(before) - {"c.txt", "i.txt"}) <= 10 + 2 + (after > 10) * 3
    assert {"c.txt", "i.txt"} <= set(looked)
    trace.unlink()
    assert everything(domain, texts, tmp_path / "b", parts=parts) == expected
    assert trace.read_text().split() == ["c.txt", "i.txt"]


def test_parts_of_other_options_are_not_taken_and_those_that_matter_to_nothing_are(texts: Path, tmp_path: Path) -> None:
    trace, parts = tmp_path / "trace", tmp_path / "parts"

    def looked(**options: Any) -> int:
        trace.unlink(missing_ok=True)
        index = build_index(Lines(LinesOptions(trace=trace, **options)), [texts], SkippedLog(), parts=parts)
        assert index[0].extent == (options.get("width", 2.0),)
        return len(trace.read_text().split())

    assert looked() == 12
    assert looked(colour="blue") == 2
    assert looked(width=3.0) == 12
    assert looked() == 2


def test_what_was_skipped_once_and_can_be_used_now_is_taken_out(texts: Path, tmp_path: Path) -> None:
    domain, parts = Lines(LinesOptions()), tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        everything(domain, texts, tmp_path / "a", parts=parts, progress=stopping(9))
    (texts / "c.txt").write_text("good")
    lines = everything(domain, texts, tmp_path / "a", parts=parts)[3]
    assert "c.txt" not in lines
    assert [line.partition(",")[0].rpartition("/")[2] for line in lines.splitlines()[1:]] == [
        "nowhere",
        "b.txt",
        "i.txt",
        "e.txt",
    ]


def test_lines_of_others_stay_where_they_are_said(texts: Path, tmp_path: Path) -> None:
    log = SkippedLog(tmp_path / "skipped.csv")
    log.add(str(texts / "a.txt"), "read", "a window that training met")
    parts = tmp_path / "parts"
    for _ in range(2):
        build_index(Lines(LinesOptions()), [texts], log, parts=parts)
    build_index(Lines(LinesOptions()), [texts], log, parts=parts)
    assert [entry.stage for entry in log.entries] == ["labels", "read", "open", "open", "metadata"]


def test_strict_stops_at_the_first(texts: Path) -> None:
    with pytest.raises(FmsuiteError, match="nowhere"):
        build_index(Lines(LinesOptions()), [texts], SkippedLog(strict=True))
    (texts / "labels.csv").unlink()
    with pytest.raises(FmsuiteError, match="a word was left out"):
        build_index(Lines(LinesOptions()), [texts], SkippedLog(strict=True))


def test_a_negative_number_of_processes_is_refused(texts: Path) -> None:
    with pytest.raises(UsageError, match="-1 processes"):
        build_index(Lines(LinesOptions()), [texts], SkippedLog(), processes=-1)


def test_memory_that_runs_out_costs_one_source(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look = Lines.index_source

    def hungry(self: Lines, task: SourceTask) -> Any:
        if task.name == "a":
            raise MemoryError
        return look(self, task)

    monkeypatch.setattr(Lines, "index_source", hungry)
    skipped = SkippedLog()
    index = build_index(Lines(LinesOptions()), [texts], skipped)
    assert [Path(source).stem for source in index.sources] == USED[1:]
    assert [entry.stage for entry in skipped.entries if entry.path.endswith("a.txt")] == ["worker"]


def test_a_defect_ends_the_run_and_keeps_what_is_done(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = Lines.index_source

    def wrong(self: Lines, task: SourceTask) -> Any:
        if task.name == "f":
            raise ZeroDivisionError
        return look(self, task)

    trace = tmp_path / "trace"
    domain = Lines(LinesOptions(trace=trace))
    monkeypatch.setattr(Lines, "index_source", wrong)
    with pytest.raises(ZeroDivisionError):
        build_index(domain, [texts], SkippedLog(), parts=tmp_path / "parts")
    monkeypatch.setattr(Lines, "index_source", look)
    trace.unlink()
    build_index(domain, [texts], SkippedLog(), parts=tmp_path / "parts")
    assert trace.read_text().split() == [f"{n}.txt" for n in "cfghij"] + ["d.txt", "g.txt"]


def test_unasked_long_work_moves_to_processes(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = everything(Lines(LinesOptions()), texts, tmp_path / "a")
    asked: list[tuple[int, int]] = []

    def run(make: Callable, units: list, processes: int = 0, **options: Any) -> Iterator[Outcome]:
        asked.append((processes, sum(map(len, units))))
        for number, unit in enumerate(units):
            (result,) = make()(iter([unit]))
            yield Outcome(number, unit, result, None)

    monkeypatch.setattr(indexing, "run_units", run)
    monkeypatch.setattr(indexing, "_spare_cores", lambda: 3)
    assert everything(Lines(LinesOptions()), texts, tmp_path / "b", processes=None) == expected
    assert asked == [(0, 10), (0, 2)]
    asked.clear()
    monkeypatch.setattr(indexing, "MOVE_AFTER_S", 0.1)
    monkeypatch.setattr(indexing, "WORTH_S", 0.1)
    assert everything(Lines(LinesOptions()), texts, tmp_path / "c", processes=None) == expected
    # The sixth is slow; four are left.
    assert asked == [(0, 10), (3, 4), (0, 2)]


def test_small_files_are_handed_out_together_and_large_ones_alone(tmp_path: Path) -> None:
    sizes = [10, 10, 10, 5 << 20, 10, 3 << 20, 3 << 20, *[10] * 200]
    tasks = []
    for number, size in enumerate(sizes):
        path = tmp_path / str(number)
        with path.open("wb") as file:
            file.truncate(size)
        tasks.append(SourceTask(str(path), str(number)))
    bundles = bundled(tasks, range(len(tasks)), 1)
    assert [number for bundle in bundles for number in bundle] == list(range(len(tasks)))
    assert bundles[:4] == [[0, 1, 2], [3], [4, 5], [*range(6, 6 + len(bundles[3]))]]
    assert max(map(len, bundles)) <= 51
    assert bundled(tasks, [8, 2], 2) == [[8], [2]]
    assert bundled([SourceTask(str(tmp_path / "absent"), "x")] * 9, range(9), 1) == [
        [0, 1],
        [2, 3],
        [4, 5],
        [6, 7],
        [8],
    ]


def test_two_processes_make_the_same_index_whatever_dies(texts: Path, tmp_path: Path) -> None:
    (texts / "k.txt").write_text("kill")
    (texts / "l.txt").write_text("kill-once")
    (texts / "m.txt").write_text("last")
    found = everything(Lines(LinesOptions()), texts, tmp_path / "b", processes=2, parts=tmp_path / "parts")
    killed = [line for line in found[3].splitlines() if ",worker," in line]
    assert len(killed) == 1
    assert str(texts / "k.txt") in killed[0]
    assert "SIGKILL" in killed[0]
    (texts / "k.txt").write_text("bad")
    here = everything(Lines(LinesOptions()), texts, tmp_path / "a")
    assert found[:3] == here[:3]
    assert [line for line in found[3].splitlines() if ",worker," not in line] == [
        line for line in here[3].splitlines() if "k.txt" not in line
    ]


@pytest.mark.parametrize("name", ["medical", "pathology", "remote_sensing", "svg"])
def test_every_domain_makes_one_index_here_in_processes_and_in_two_goes(name: str, tmp_path: Path) -> None:
    kind = load_domain(name)
    domain = kind(kind.Options())
    data = few(name, domain, tmp_path)
    here = everything(domain, data, tmp_path / "here")
    assert "broken" in here[3]
    assert everything(domain, data, tmp_path / "there", processes=2) == here
    parts = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        everything(domain, data, tmp_path / "again", parts=parts, progress=stopping(3))
    assert list(parts.iterdir())
    assert everything(domain, data, tmp_path / "again", parts=parts) == here
    json.dumps(here[2])


def few(name: str, domain: Domain, folder: Path) -> Path:
    """Some of a domain's example data, one file of it broken."""
    made = domain.example_data(folder / "example") if name != "pathology" else slides(folder / "example")
    suffixes = {".gz", ".tif", ".svg"}
    files = sorted(path for path in made.rglob("*") if path.suffix in suffixes)
    for path in files[4:]:
        path.unlink()
    suffix = "".join(files[0].suffixes[-2:]) if name == "medical" else files[0].suffix
    (files[0].parent / f"{files[1].name.partition('.')[0]}_broken{suffix}").write_bytes(b"no such thing")
    for table in made.rglob("labels.csv"):
        table.unlink()
    return made


def slides(folder: Path) -> Path:
    from fmsuite.domains.pathology.example import write_slide

    folder.mkdir()
    draw = np.random.default_rng(3)
    for number in range(8):
        blocks = draw.random((32, 32, 1)).repeat(16, 0).repeat(16, 1)
        picture = np.where(blocks < 0.4, (110, 80, 140), (215, 140, 180)) + draw.integers(-12, 13, (512, 512, 3))
        write_slide(folder / f"{number}.tif", np.clip(picture, 0, 255).astype(np.uint8), 0.5)
    return folder


def test_ten_slides_over_ray_one_broken_and_one_worker_killed(cluster: str, tmp_path: Path) -> None:
    data = slides(tmp_path / "slides")
    shutil.copy(data / "0.tif", data / "8.tif")
    (data / "9.tif").write_bytes((data / "0.tif").read_bytes()[:20_000])
    kind = load_domain("pathology")
    here = everything(kind(kind.Options()), data, tmp_path / "here")
    there = everything(Deadly(kind.Options(), data / "3.tif"), data, tmp_path / "there", ray=cluster, processes=2)
    assert (data / "3.tif.seen").exists()
    assert there[:2] == here[:2]
    assert there[3] == here[3]
    assert there[3].count("\n") == 2
    assert "9.tif" in there[3]


def test_lines_of_a_log_can_be_put_first(tmp_path: Path) -> None:
    log = SkippedLog(tmp_path / "skipped.csv")
    lines = [Skipped(name, "open", "why  so") for name in "abcd"]
    for line in lines:
        log.add(line.path, line.stage, line.reason)
    log.put_first([lines[2], Skipped("z", "open", "never said"), lines[1], lines[2]])
    assert "".join(entry.path for entry in log.entries) == "cbad"
    assert "".join(entry.path for entry in SkippedLog(tmp_path / "skipped.csv").entries) == "cbad"
