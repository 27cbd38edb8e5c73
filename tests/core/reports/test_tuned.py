"""The page of fine-tuning: the answer first, every number as it is in the results, every case a dot."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from fmsuite.core.evaluation.cases import OVERALL, FinetuneResults
from fmsuite.core.evaluation.result_files import RESULTS
from fmsuite.core.evaluation.results import Estimate
from fmsuite.core.reports.page import render
from fmsuite.core.reports.sources import read_sources
from fmsuite.core.reports.strips import Strip, strips, swarm
from fmsuite.core.reports.tuned import Tuned, case_values, read_tuned
from fmsuite.core.reports.tuned_answer import tuned_answer
from fmsuite.core.reports.tuned_section import TunedSection, tuned_section
from fmsuite.core.reports.tuned_tables import difference_table, score_table
from fmsuite.core.reports.tuned_wording import better, signed
from fmsuite.errors import UsageError
from tests.core.reports.tuned_factory import LEVELS, METRICS, finetune_results, write_finetune


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_finetune(tmp_path_factory.mktemp("tuned") / "out")


def section(folder: Path) -> TunedSection:
    return tuned_section(read_tuned(folder), "tuned-1", (f"key-{number}" for number in itertools.count(1)))


def test_the_answer_names_the_best_arm_and_its_paired_difference_at_every_share() -> None:
    results = finetune_results()
    cell = results.cell("full", 1.0)
    assert cell is not None
    less = cell.differences["dice"][OVERALL]

    said = tuned_answer(results)

    assert said.headline.startswith(f"full reaches a Dice of {cell.scores['dice'][OVERALL].mean:.3f} (")
    assert f"with all patients (80), {less.mean:.3f} above the same network from scratch." in said.headline
    good = [finding.text for finding in said.findings if finding.kind == "good"]
    assert [text.partition(":")[0] for text in good] == [
        "With all patients (80)",
        "With 10% of the patients (8)",
        "With 1% of the patients (1)",
    ]
    assert f"+{less.mean:.3f} ({less.low:.3f} to {less.high:.3f})" in good[0]
    assert any("1 volume could not be judged" in finding.text for finding in said.findings)


@pytest.mark.parametrize(
    ("low", "high", "kind", "words"), [(-0.02, 0.05, "open", "may be chance"), (-0.06, -0.02, "bad", "below the same")]
)
def test_a_difference_that_is_none_or_a_loss_is_said_to_be_one(low: float, high: float, kind: str, words: str) -> None:
    results = finetune_results()
    cell = results.cell("full", 1.0)
    assert cell is not None
    less = cell.differences["dice"][OVERALL]
    less.low, less.high, less.mean = low, high, (low + high) / 2

    said = tuned_answer(results)

    assert words in said.headline
    assert said.findings[0].kind == kind


def test_a_difference_that_no_decimal_shows_is_neither_better_nor_worse() -> None:
    metric = METRICS["dice"]
    least = Estimate(mean=-0.0003, low=-0.0004, high=-0.0002)

    assert (signed(-0.0003, metric), signed(0.0004, metric)) == ("0.000", "0.000")
    assert (signed(0.02, metric), signed(-0.02, metric)) == ("+0.020", "−0.020")
    assert (signed(0.004, METRICS["hd95"]), signed(-0.004, METRICS["hd95"])) == ("0.00", "0.00")
    assert better(least, metric) is None
    results = finetune_results()
    cell = results.cell("full", 1.0)
    assert cell is not None
    cell.differences["dice"][OVERALL] = least
    assert "level with the same network from scratch" in tuned_answer(results).headline


def test_where_lower_is_better_the_lowest_is_best_and_a_fall_is_a_gain() -> None:
    results = finetune_results()
    results.primary = "hd95"
    said = tuned_answer(results)

    assert said.headline.startswith("full reaches an HD95 of")
    assert " mm below the same network from scratch" in said.headline
    assert said.findings[0].kind == "good"


def test_tables_hold_every_arm_at_every_share_with_the_control_last() -> None:
    results = finetune_results()
    looks = {arm.name: (number, "encoder") for number, arm in enumerate(results.arms)}
    table = score_table(results, "dice", looks)  # type: ignore[arg-type]

    assert table.columns == ["mean of labels", "less scratch", "anterior", "posterior"]
    assert [[row.name for row in rows] for _, rows in table.groups] == [list(LEVELS)] * 3
    for (_, rows), fraction in zip(table.groups, (1.0, 0.1, 0.01), strict=True):
        for row in rows:
            cell = results.cell(row.name, fraction)
            assert cell is not None
            estimate = cell.scores["dice"]["posterior"]
            assert row.cells[3].mean == f"{estimate.mean:.3f}"
            assert row.cells[3].interval == f"({estimate.low:.3f}–{estimate.high:.3f})"
            assert row.cells[3].best == (row.name == "full")
        assert rows[-1].cells[1].mean == ""
    by_label = difference_table(results, "hd95", looks)  # type: ignore[arg-type]
    assert by_label is not None
    assert {row.name for _, rows in by_label.groups for row in rows} == {"full", "low-rank"}
    assert all(
        cell.mean.startswith("−") and cell.verdict for _, rows in by_label.groups for r in rows for cell in r.cells
    )


def test_a_case_counts_with_the_mean_of_its_runs_and_of_the_labels_that_it_has() -> None:
    [run] = [run for run in finetune_results().runs if (run.arm, run.fraction) == ("full", 1.0)]
    other = run.model_copy(update={"cases": [2], "scores": {"dice": [[0.5, 0.7]]}})
    first = dict(zip(run.cases, run.scores["dice"], strict=True))

    values = case_values([run, other], "dice", None)

    # The third case judged is without its second label.
    missing = next(case for case, row in first.items() if None in row)
    assert values[missing] == first[missing][0]
    assert values[2] == pytest.approx((np.mean(np.array(first[2], float)) + 0.6) / 2)
    assert missing not in case_values([run], "dice", 1)


def test_the_section_draws_every_case_and_the_worst_come_last(folder: Path) -> None:
    shown = section(folder)

    assert [figure.heading for figure in shown.curves] == ["mean of labels", "anterior", "posterior"]
    assert "10%" in shown.curves[0].svg
    dots = re.findall(r"<title>(hippocampus_\d+\.nii\.gz): ", shown.strips[0].svg)
    assert len(dots) == 3 * 19
    [(title, cases)] = shown.panels
    assert title == "full"
    assert [case.caption.partition(":")[0] for case in cases] == ["Best", "Median", "Worst"]
    means = [float(values[0]) for _, _, values in shown.hard]
    assert means == sorted(means)


def test_one_label_alone_needs_no_mean(tmp_path: Path) -> None:
    results = finetune_results(labels=1)
    results.cells = [cell for cell in results.cells if cell.fraction == 1.0]
    for cell in results.cells:
        for columns in (*cell.scores.values(), *cell.differences.values()):
            del columns["anterior"]
    shown = section(write_finetune(tmp_path / "one", results))

    assert shown.tables[0].columns == ["Dice", "less scratch"]
    assert shown.curves == []
    assert len(shown.strips) == 1


def test_the_page_holds_all_of_it_and_titles_are_escaped(tmp_path: Path) -> None:
    results = finetune_results()
    results.title = "<b>bold</b>"
    page = render(read_sources(write_finetune(tmp_path / "out", results)))

    assert "<h1><bdi>&lt;b&gt;bold&lt;/b&gt;</bdi></h1>" in page
    assert page.count('class="slice"') == 3 * 3 * 2
    assert "bad.nii.gz" in page
    assert "fmsuite finetune --encoder runs/mae-hippo" in page
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_what_is_missing_or_damaged_is_said(tmp_path: Path) -> None:
    folder = write_finetune(tmp_path / "out")
    (folder / "panels" / "full-best.npz").write_bytes(b"no")
    (folder / "panels" / "full-worst.npz").unlink()
    [source] = read_sources(folder)
    assert isinstance(source, Tuned)
    assert len(source.slices) == 1
    assert len(source.notes) == 2

    results = FinetuneResults.read(folder)
    results.panels[0].case = 99
    results.write(folder)
    with pytest.raises(UsageError, match="a picture is of an arm or a case that is not listed"):
        read_sources(folder)
    (folder / RESULTS).write_text('{"kind": "finetune"}')
    with pytest.raises(UsageError, match="damaged"):
        read_sources(folder)


def test_a_picture_outside_of_the_folder_is_not_read(tmp_path: Path) -> None:
    folder = write_finetune(tmp_path / "out")
    results = FinetuneResults.read(folder)
    results.panels[0].file = "../other.npz"
    results.write(folder)
    (folder / "panels" / "full-worst.npz").rename(tmp_path / "other.npz")

    assert "outside of the results" in read_tuned(folder).notes[0]


def test_dots_of_a_swarm_touch_only_where_there_is_no_room() -> None:
    places = np.random.default_rng(0).normal(100, 12, 60).tolist()
    points = np.stack([places, swarm(places, 6.0, 60.0)], 1)
    distances = np.linalg.norm(points[:, None] - points, axis=-1)[~np.eye(60, dtype=bool)]

    assert distances.min() >= 6 * (1 - 1e-6)
    assert np.abs(swarm([5.0] * 50, 6.0, 10.0)).max() <= 10


def test_a_strip_of_very_many_cases_is_one_path() -> None:
    values = np.linspace(0, 1, 500).tolist()
    svg = strips("k", [Strip("arm", values, [str(v) for v in values])], title="t", x_label="Dice")

    assert svg.count("<path") == 3
    assert "500 cases, median 0.500, lowest 0.000" in svg
