"""``report`` from folders to a file, and what it says about folders that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fmsuite.commands.report import report
from fmsuite.errors import FmsuiteError, UsageError
from tests.core.reports.factory import bench_results, few_shot_results, write_comparison, write_run


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return write_comparison(tmp_path / "few", few_shot_results())


def test_one_page_of_a_run_and_two_results(tmp_path: Path, results: Path) -> None:
    bench = write_comparison(tmp_path / "bench", bench_results())
    run = write_run(tmp_path / "run")
    path = report([run, results, bench], tmp_path / "pages" / "all.html", title="Which one?")

    page = path.read_text(encoding="utf-8")
    assert path == tmp_path / "pages" / "all.html"
    assert "<title>Which one?</title>" in page
    assert [path.name for path in path.parent.iterdir()] == ["all.html"]
    for heading in ("Few-shot classification of 72 slides", "lung tiles, split by group", "Pretraining run run"):
        assert page.count(heading) >= 3
    assert page.index('id="results-1"') < page.index('id="results-2"') < page.index('id="run-1"')


def test_an_existing_folder_gets_a_report(results: Path) -> None:
    assert report([results], results) == results / "report.html"


def test_a_folder_with_a_run_and_results_shows_both(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "both")
    few_shot_results().write(folder)
    page = report([folder], tmp_path / "page.html").read_text(encoding="utf-8")

    assert 'id="results-1"' in page
    assert 'id="run-1"' in page


def test_a_folder_named_twice_is_shown_once(tmp_path: Path, results: Path) -> None:
    assert 'id="results-2"' not in report([results, results], tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_folder_with_neither_is_named(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()

    with pytest.raises(UsageError) as caught:
        report([empty], tmp_path / "page.html")
    for part in (str(empty), "holds no results, maps or run", "results.json", "run.json", "'bench'"):
        assert part in str(caught.value)


def test_the_folders_inside_that_would_do_are_named(tmp_path: Path, results: Path) -> None:
    write_run(tmp_path / "run")

    with pytest.raises(UsageError) as caught:
        report([tmp_path], tmp_path / "page.html")
    assert f"Name the folders in it that do: {results} {tmp_path / 'run'}." in str(caught.value)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere: there is no such folder"):
        report([tmp_path / "nowhere"], tmp_path / "page.html")


@pytest.mark.parametrize("name", ["results.json", "predictions.json", "exhibits.json"])
@pytest.mark.parametrize("content", ["{", "[]", '{"format": "x"}', "\udc80"])
def test_damaged_results_are_named(tmp_path: Path, results: Path, name: str, content: str) -> None:
    (results / name).write_bytes(content.encode("utf-8", "surrogateescape"))

    with pytest.raises(UsageError) as caught:
        report([results], tmp_path / "page.html")
    assert str(results) in str(caught.value)
    assert not (tmp_path / "page.html").exists()


def test_exhibits_of_a_newer_version_are_refused(tmp_path: Path, results: Path) -> None:
    raw = json.loads((results / "exhibits.json").read_text(encoding="utf-8"))
    (results / "exhibits.json").write_text(json.dumps({**raw, "format": 99}), encoding="utf-8")

    with pytest.raises(UsageError, match="newer fmsuite"):
        report([results], tmp_path / "page.html")


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        (("items", 0, "label"), 7, "label"),
        (("evaluations", 0, "encoder"), "nobody", "not listed"),
        (("evaluations", 0, "confusion"), [[1]], "confusion matrix"),
    ],
)
def test_results_that_contradict_themselves_are_refused(
    tmp_path: Path, results: Path, path: tuple, value: object, problem: str
) -> None:
    raw = json.loads((results / "results.json").read_text(encoding="utf-8"))
    place = raw
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (results / "results.json").write_text(json.dumps(raw), encoding="utf-8")

    with pytest.raises(UsageError, match=problem):
        report([results], tmp_path / "page.html")


def test_predictions_of_unknown_classes_are_refused(tmp_path: Path, results: Path) -> None:
    raw = json.loads((results / "predictions.json").read_text(encoding="utf-8"))
    raw[0][0][0] = 3
    (results / "predictions.json").write_text(json.dumps(raw), encoding="utf-8")

    with pytest.raises(UsageError, match="predicts what is not among"):
        report([results], tmp_path / "page.html")


def test_exhibits_of_unknown_classes_are_refused(tmp_path: Path, results: Path) -> None:
    raw = json.loads((results / "exhibits.json").read_text(encoding="utf-8"))
    raw["maps"][0]["labels"][0] = 3
    (results / "exhibits.json").write_text(json.dumps(raw), encoding="utf-8")

    with pytest.raises(UsageError, match="not one of the classes"):
        report([results], tmp_path / "page.html")


@pytest.mark.parametrize(("name", "content"), [("run.json", "{"), ("run.json", "[]"), ("config.yaml", "a: [")])
def test_damaged_runs_are_named(tmp_path: Path, name: str, content: str) -> None:
    run = write_run(tmp_path / "run")
    (run / name).write_text(content, encoding="utf-8")

    with pytest.raises(UsageError, match=name.replace(".", r"\.")):
        report([run], tmp_path / "page.html")


def test_a_damaged_description_of_the_encoder_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "encoder.json").write_text("{", encoding="utf-8")

    with pytest.raises(UsageError, match=r"encoder\.json: cannot be read as JSON"):
        report([run], tmp_path / "page.html")


def test_a_page_that_cannot_be_written_is_named(tmp_path: Path, results: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")

    with pytest.raises(FmsuiteError, match="cannot be written"):
        report([results], tmp_path / "file" / "page.html")


def test_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No folder was named"):
        report([], tmp_path / "page.html")
