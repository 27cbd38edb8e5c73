"""``fewshot`` from stores to results: a planted difference is found, its control is at chance, bad input is refused."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr

from fmsuite.commands.comparison import Compared
from fmsuite.commands.fewshot import fewshot
from fmsuite.core.data.grouping import group_key
from fmsuite.core.evaluation.results import Evaluation, Results
from fmsuite.core.features import FeatureStore
from fmsuite.core.reports.exhibits import Exhibits
from fmsuite.errors import FmsuiteError, UsageError
from tests.commands.fewshot_cohort import index_of, slides, truth_of, unknown, write_store

COHORT = slides(40)
EPISODES = 30
CHEAP = ("simpleshot", "mi_simpleshot", "logistic", "knn")
QUICK = {"shots": (1, 2), "episodes": 3, "methods": ("mi_simpleshot",), "shuffled": False, "evidence": 0}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An encoder that sees the difference, and the same network untrained, which does not."""
    folder = tmp_path_factory.mktemp("stores")
    index, truth = index_of(COHORT), truth_of(COHORT)
    good = write_store(folder / "good.zarr", index, truth)
    control = {"control": "untrained", "of": "abc", "seed": 0}
    bad = write_store(
        folder / "bad.zarr", index, truth, 0.0, seed=1, identity="def", name="untrained", provenance=control
    )
    return good, bad


@pytest.fixture(scope="module")
def compared(stores: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Compared:
    out = tmp_path_factory.mktemp("out") / "results"
    return fewshot(stores, out, episodes=EPISODES, shots=(1, 4, 16, 32), methods=CHEAP)


def find(results: Results, encoder: str, method: str, shots: int, shuffled: bool = False) -> Evaluation:
    [found] = [
        e
        for e in results.evaluations
        if (e.encoder, e.method, e.shots, e.shuffled) == (encoder, method, shots, shuffled)
    ]
    return found


def accuracy(*where: object) -> float:
    return find(*where).metrics["balanced_accuracy"].mean  # type: ignore[arg-type]


def test_the_curve_rises_to_the_planted_difference(compared: Compared) -> None:
    for method in CHEAP:
        assert accuracy(compared.results, "planted", method, 16) > 0.9, method
    curve = [accuracy(compared.results, "planted", "mi_simpleshot", shots) for shots in (1, 4, 16)]
    assert curve[0] + 0.05 < curve[2]
    assert curve[0] < curve[1] <= curve[2] + 0.02


def test_an_encoder_that_sees_nothing_is_at_chance_on_the_same_draws(compared: Compared) -> None:
    for method in CHEAP:
        seen, blind = (find(compared.results, name, method, 4) for name in ("planted", "untrained"))
        assert abs(blind.metrics["balanced_accuracy"].mean - 0.5) < 0.1
        assert [e.support for e in seen.episodes] == [e.support for e in blind.episodes]
        assert [e.seed for e in seen.episodes] == [e.seed for e in blind.episodes]


def test_shuffled_labels_are_at_chance(compared: Compared) -> None:
    shuffled = [e for e in compared.results.evaluations if e.shuffled]
    assert {(e.encoder, e.method, e.shots) for e in shuffled} == {
        (encoder, method, shots)
        for encoder in ("planted", "untrained")
        for method in CHEAP
        for shots in ((1, 4, 16) if method == "mi_simpleshot" else (16,))
    }
    for evaluation in shuffled:
        # 30 episodes of 8 queries at 16 shots: a standard error of about 0.03.
        assert abs(evaluation.metrics["balanced_accuracy"].mean - 0.5) < 0.12, (evaluation.method, evaluation.shots)


def test_results_say_who_what_and_what_was_left_out(compared: Compared, stores: tuple[Path, Path]) -> None:
    results = compared.results
    assert (results.kind, results.domain, results.unit) == ("fewshot", "pathology", "slide")
    assert results.classes == ["glandular", "solid"]
    assert [(i.id, results.classes[i.label], i.group, i.windows) for i in results.items] == [
        (f"{s.name}.svs", s.label, s.patient, s.windows) for s in COHORT
    ]
    assert [(e.name, e.kind, e.control_of) for e in results.encoders] == [
        ("planted", "encoder", None),
        ("untrained", "untrained", "planted"),
    ]
    assert "No fixed split: examples are drawn from all 40 slides of 40 patients" in results.split
    assert any("Shots 32 were left out: class" in note for note in results.notes)
    assert results.facts.inputs == {str(stores[0]): "abc", str(stores[1]): "def"}
    assert results.facts.index_hash == FeatureStore.open(stores[0]).index.hash
    assert set(results.facts.normalisations) == {"planted", "untrained"}
    assert results.facts.normalisations["planted"] == "Raw values as they are."
    assert compared.skipped == ""
    clamped = find(results, "planted", "mi_simpleshot", 4).notes
    assert any("fewer than 5 windows" in note for note in clamped)


def test_every_seed_and_prediction_is_in_the_json_and_agrees_with_the_numbers(compared: Compared) -> None:
    raw = json.loads((compared.out / "results.json").read_text())
    predictions = json.loads((compared.out / "predictions.json").read_text())
    label = np.array([item["label"] for item in raw["items"]])
    for evaluation, rows in zip(raw["evaluations"], predictions, strict=True):
        assert len(evaluation["episodes"]) == len(rows) == EPISODES
        for episode, row in zip(evaluation["episodes"], rows, strict=True):
            said = np.array(row)
            assert isinstance(episode["seed"], int)
            assert len(episode["support"]) == 2 * evaluation["shots"]
            assert (said[episode["support"]] == -1).all()
            if not evaluation["shuffled"]:
                recall = [(said[(label == c) & (said >= 0)] == c).mean() for c in (0, 1)]
                assert episode["metrics"]["balanced_accuracy"] == pytest.approx(np.mean(recall))


def test_the_tables_are_readable(compared: Compared) -> None:
    with (compared.out / "results.csv").open(newline="") as file:
        metrics = list(csv.DictReader(file))
    wanted = {"encoder": "planted", "method": "mi_simpleshot", "shots": "16", "shuffled": "False"}
    [line] = [m for m in metrics if m["metric"] == "balanced_accuracy" and wanted.items() <= m.items()]
    assert float(line["mean"]) == pytest.approx(accuracy(compared.results, "planted", "mi_simpleshot", 16))
    assert float(line["low"]) <= float(line["mean"]) <= float(line["high"])
    with (compared.out / "episodes.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == sum(len(e.episodes) for e in compared.results.evaluations)
    assert all(len(line["support"].split()) == 2 for line in lines if line["shots"] == "1")
    episodes = [float(line["auroc"]) for line in lines if {**line, **wanted} == line]
    [auroc] = [m for m in metrics if m["metric"] == "auroc" and wanted.items() <= m.items()]
    assert np.mean(episodes) == pytest.approx(float(auroc["mean"]))


def test_two_runs_give_the_same_results_apart_from_times(stores: tuple[Path, Path], tmp_path: Path) -> None:
    options = {**QUICK, "methods": ("all",), "shuffled": True, "shots": (8,), "episodes": 2}
    ran = [fewshot([stores[0]], tmp_path / name, command=["c"], **options) for name in "ab"]
    first, second = (run.results.model_copy(update={"facts": None}) for run in ran)
    assert first == second
    for name in ("predictions.json", "results.csv", "episodes.csv", "exhibits.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    [abmil] = [e for e in first.evaluations if e.method == "abmil"]
    assert abmil.metrics["balanced_accuracy"].mean > 0.6
    assert {e.method for e in first.evaluations if e.shuffled} == set(CHEAP)
    other = fewshot([stores[0]], tmp_path / "c", seed=1, **{**options, "methods": CHEAP})
    assert [e.episodes for e in other.results.evaluations if e.method == "knn"] != [
        e.episodes for e in first.evaluations if e.method == "knn"
    ]


def test_sides_are_kept_to(tmp_path: Path) -> None:
    sides = [replace(s, split="train" if n < 12 else "test" if n < 20 else "val") for n, s in enumerate(slides(24))]
    sides[-1] = replace(sides[-1], split=None)
    store = write_store(tmp_path / "f.zarr", index_of(sides), truth_of(sides))
    ran = fewshot([store], tmp_path / "out", **QUICK)
    for episode in ran.results.evaluations[0].episodes:
        assert max(episode.support) < 12
        assert [n for n, said in enumerate(episode.predictions) if said >= 0] == list(range(12, 20))
    assert "the training side, 12 slides of 12 patients" in ran.results.split
    assert any("3 of the side 'val', 1 on no side" in note for note in ran.results.notes)
    assert "1 at split" in ran.skipped
    whole = fewshot([store], tmp_path / "whole", **{**QUICK, "shots": (2, 6)}).results
    assert [note[:24] for note in whole.notes if "same in every episode" in note] == ["At 6 shots the examples "]
    free = fewshot([store], tmp_path / "out", split_column="none", **QUICK)
    assert "No fixed split" in free.results.split
    assert free.skipped == ""


def test_labels_from_a_file_and_who_it_does_not_fit(tmp_path: Path) -> None:
    hidden = unknown(slides(20))
    store = write_store(tmp_path / "f.zarr", index_of(hidden), truth_of(hidden))
    lines = [f"{s.name},{s.label},{s.patient}x" for s in hidden[:-2]]
    file = tmp_path / "labels.csv"
    file.write_text("\n".join(["case,grade,who", *lines, "elsewhere,solid,P99x"]))
    columns = {"path_column": "case", "label_column": "grade", "patient_column": "who"}
    ran = fewshot([store], tmp_path / "out", labels=file, **columns, **QUICK)
    assert len(ran.results.items) == 18
    assert ran.results.items[0].group == f"{hidden[0].patient}x"
    with (tmp_path / "out" / "skipped.csv").open(newline="") as table:
        assert [(row["path"], row["stage"]) for row in csv.DictReader(table)] == [
            ("elsewhere", "labels"),
            ("s18.svs", "labels"),
            ("s19.svs", "labels"),
        ]
    assert ran.skipped.startswith("3 skipped (3 at labels)")
    assert "Left out: 2 slides without a label." in ran.results.notes
    assert f"Left out: 1 line of {file} for which there is no slide." in ran.results.notes
    assert str(file) in ran.results.facts.inputs
    with pytest.raises(FmsuiteError, match=r"elsewhere: .*--strict"):
        fewshot([store], tmp_path / "strict", labels=file, strict=True, **columns, **QUICK)
    assert not (tmp_path / "strict").exists()


def test_one_window_a_slide_makes_mi_simpleshot_simpleshot(tmp_path: Path) -> None:
    single = [replace(s, windows=1) for s in slides(20)]
    store = write_store(tmp_path / "f.zarr", index_of(single), truth_of(single))
    ran = fewshot([store], tmp_path / "out", **{**QUICK, "methods": ("simpleshot", "mi_simpleshot")}).results
    for shots in (1, 2):
        one, other = (find(ran, "planted", method, shots) for method in ("simpleshot", "mi_simpleshot"))
        assert [e.predictions for e in one.episodes] == [e.predictions for e in other.episodes]
        assert any("MI-SimpleShot is SimpleShot here" in note for note in other.notes)


def test_a_class_with_a_single_slide_is_an_example_only_and_the_results_say_so(tmp_path: Path) -> None:
    three = [*slides(12), replace(slides(1)[0], name="s99", label="rare", patient="P99")]
    store = write_store(tmp_path / "f.zarr", index_of(three), truth_of(three))
    ran = fewshot([store], tmp_path / "out", **QUICK).results
    assert {e.shots for e in ran.evaluations} == {1}
    assert any("Shots 2 were left out: class 'rare' has 1 slide" in note for note in ran.notes)
    assert any("no slide of class 'rare' is asked" in note for note in ran.evaluations[0].notes)
    two = [s for s in three if s.label != "solid"]
    store = write_store(tmp_path / "g.zarr", index_of(two), truth_of(two))
    with pytest.raises(UsageError, match=r"Nothing of class 'rare' can be asked"):
        fewshot([store], tmp_path / "two", **QUICK)


def test_grades_are_ordered_by_number(tmp_path: Path) -> None:
    graded = slides(18, classes=("10", "9", "1"))
    store = write_store(tmp_path / "f.zarr", index_of(graded), truth_of(graded))
    assert fewshot([store], tmp_path / "out", **QUICK).results.classes == ["1", "9", "10"]


def test_patients_and_folders_can_be_the_unit(tmp_path: Path) -> None:
    pairs = slides(24, per_patient=2)
    store = write_store(tmp_path / "f.zarr", index_of(pairs), truth_of(pairs), by="group")
    ran = fewshot([store], tmp_path / "out", **QUICK).results
    assert ran.unit == "patient"
    assert [item.id for item in ran.items[:2]] == ["P0-0", "P0-1"]
    assert "from all 12 patients; in every episode the patients that are no examples are asked." in ran.split


def test_slides_of_a_patient_who_gave_an_example_are_not_asked(tmp_path: Path) -> None:
    pairs = slides(24, per_patient=2)
    store = write_store(tmp_path / "f.zarr", index_of(pairs), truth_of(pairs))
    ran = fewshot([store], tmp_path / "out", **QUICK).results
    assert ran.unit == "slide"
    for episode in ran.evaluations[0].episodes:
        shown = {ran.items[n].group for n in episode.support}
        assert {ran.items[n].group for n, said in enumerate(episode.predictions) if said >= 0}.isdisjoint(shown)


def test_two_stores_of_one_encoder_get_names_of_their_own(stores: tuple[Path, Path], tmp_path: Path) -> None:
    index, truth = index_of(COHORT), truth_of(COHORT)
    mean = write_store(tmp_path / "mean.zarr", index, truth, pooling="mean")
    ran = fewshot([stores[0], mean], tmp_path / "out", **QUICK).results
    assert [(e.name, e.pooling) for e in ran.encoders] == [("good", "cls"), ("mean", "mean")]
    assert {e.encoder for e in ran.evaluations} == {"good", "mean"}


def test_a_folder_that_holds_the_store_will_do(tmp_path: Path) -> None:
    few = slides(12)
    write_store(tmp_path / "embedded" / "features.zarr", index_of(few), truth_of(few))
    assert len(fewshot([tmp_path / "embedded"], tmp_path / "out", **QUICK).results.items) == 12


def test_groups_that_could_not_be_read_are_left_out_of_every_store(tmp_path: Path) -> None:
    few = slides(14)
    index, truth = index_of(few), truth_of(few)
    whole = write_store(tmp_path / "a.zarr", index, truth)
    holed = write_store(tmp_path / "b.zarr", index, truth, only=lambda id: id != "s03.svs", name="other")
    with FeatureStore.create_or_resume(holed, FeatureStore.open(holed).facts, index) as store:
        store.mark_unreadable("s03.svs", "torn file")
    ran = fewshot([whole, holed], tmp_path / "out", **QUICK)
    assert "s03.svs" not in {item.id for item in ran.results.items}
    assert "1 skipped (1 at features)" in ran.skipped
    assert "torn file" in (tmp_path / "out" / "skipped.csv").read_text()
    assert "Left out: 1 slide of which no window could be read." in ran.results.notes


def test_stores_with_other_windows_of_a_slide_are_compared_and_the_results_say_so(tmp_path: Path) -> None:
    few = slides(12)
    index, truth = index_of(few), truth_of(few)
    whole = write_store(tmp_path / "a.zarr", index, truth)
    holed = write_store(tmp_path / "b.zarr", index, truth, only=lambda id: id != "s03.svs", name="other")
    with FeatureStore.create_or_resume(holed, FeatureStore.open(holed).facts, index) as store:
        rows = store.rows_of("s03.svs")[1:]
        store.write("s03.svs", rows, np.ones((len(rows), store.facts.dim), np.float32))
    notes = fewshot([whole, holed], tmp_path / "out", **QUICK).results.notes
    assert "other has features of more or fewer windows than planted in 1 slide." in notes


def test_features_that_are_not_finite_are_refused_with_slide_row_and_the_way_out(tmp_path: Path) -> None:
    few = slides(12)
    path = write_store(tmp_path / "f.zarr", index_of(few), truth_of(few))
    store = FeatureStore.open(path)
    zarr.open_array(str(path / group_key("s04.svs") / "features"), mode="r+")[1] = np.nan
    row = int(store.rows_of("s04.svs")[1])
    with pytest.raises(FmsuiteError, match=rf"'s04.svs' are not finite.*row {row} .*Remove .* `fmsuite embed` again"):
        fewshot([path], tmp_path / "out", **QUICK)


def test_stores_that_cannot_be_compared_are_refused(stores: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    few = slides(12)
    index, truth = index_of(few), truth_of(few)
    one = write_store(tmp_path / "one.zarr", index, truth)
    by_patient = write_store(tmp_path / "patient.zarr", index, truth, by="group")
    half = write_store(tmp_path / "half.zarr", index, truth, only=lambda id: id < "s07")
    with pytest.raises(UsageError, match=r"good.zarr is of other windows than .*one.zarr.*Embed one index"):
        fewshot([one, stores[0]], out, **QUICK)
    with pytest.raises(UsageError, match=r"patient.zarr is grouped by group, and .*one.zarr by source.*--by"):
        fewshot([one, by_patient], out, **QUICK)
    with pytest.raises(UsageError, match=r"half.zarr: 5 of 12 groups have no features yet \(s07.svs, .*fmsuite embed"):
        fewshot([one, half], out, **QUICK)
    with pytest.raises(UsageError, match=r"one.zarr: this store is named twice"):
        fewshot([one, tmp_path / "." / "one.zarr"], out, **QUICK)
    with pytest.raises(UsageError, match=r"not a feature store"):
        fewshot([tmp_path], out, **QUICK)
    with pytest.raises(UsageError, match=r"nowhere.zarr: there is no such feature store"):
        fewshot([tmp_path / "nowhere.zarr"], out, **QUICK)
    with pytest.raises(UsageError, match=r"No feature store was named"):
        fewshot([], out, **QUICK)
    assert not out.exists()


def test_wrong_names_and_numbers_are_refused_before_any_work(stores: tuple[Path, Path], tmp_path: Path) -> None:
    def refused(message: str, **options: object) -> None:
        with pytest.raises(UsageError, match=message):
            fewshot([stores[0]], tmp_path / "out", **{**QUICK, **options})

    refused(r"no few-shot method 'mi_simplshot'. Did you mean 'mi_simpleshot'\?", methods=("mi_simplshot",))
    refused(r"No few-shot method was named", methods=())
    refused(r"No few-shot episode of 64 a class can be drawn: class .* has 20 slides", shots=(64,))
    refused(r"Shots must be at least 1", shots=(0, 1))
    refused(r"needs a k of at least 1", k=0)
    refused(r"0 episodes", episodes=0)
    refused(r"--split-column names a column of a labels file, and none is given", split_column="part")
    assert not (tmp_path / "out").exists()


def test_labels_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    hidden = unknown(slides(12))
    store = write_store(tmp_path / "f.zarr", index_of(hidden), truth_of(hidden))

    def refused(message: str, content: str | bytes | None, **options: object) -> None:
        file = tmp_path / "labels.csv"
        if content is not None:
            file.write_bytes(content.encode() if isinstance(content, str) else content)
        with pytest.raises(UsageError, match=message):
            fewshot([store], tmp_path / "out", labels=file, **options, **QUICK)

    rows = [f"{s.name},{s.label}" for s in hidden]
    refused("the labels cannot be read", None)
    refused("not a CSV file in UTF-8", b"\xff\xfe\x00\x01")
    refused("it has none", b"")
    refused(r"no column 'lable'. Did you mean 'label'\?", "slide,label\ns01,x\n", label_column="lable")
    refused(r"none of the 12 slides has a label", "slide,stage\ns01,x\n")
    refused(r"one class, 'x'", "slide,label\ns01,x\ns02,x\n")
    refused("several sides of the split: 'Q'", "slide,label,patient,split\ns01,x,Q,train\ns02,y,Q,test\n")
    folds = "\n".join(f"{row},{n % 3}" for n, row in enumerate(rows))
    refused(
        r"no labelled slide is on the side 'train'.*'0', '1', '2'.*--split-column none", f"slide,label,fold\n{folds}"
    )
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match=r"f.zarr: none of the 12 slides has a label.*--labels"):
        fewshot([store], tmp_path / "out", **QUICK)


def test_windows_of_several_labels_in_one_group_are_refused_by_name(tmp_path: Path) -> None:
    shared = [replace(s, patient=f"P{n // 2}") for n, s in enumerate(slides(12))]
    store = write_store(tmp_path / "f.zarr", index_of(shared), truth_of(shared), by="group")
    with pytest.raises(UsageError, match=r"patient 'P0' have several labels: 'solid', 'glandular'"):
        fewshot([store], tmp_path / "out", **QUICK)


def test_the_folder_of_other_results_is_left_alone(stores: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(UsageError, match="folder of a pretraining run"):
        fewshot([stores[0]], tmp_path / "run", **QUICK)


def test_the_folder_of_a_store_is_left_alone(stores: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="this is a feature store"):
        fewshot([stores[0]], stores[0], **QUICK)


def test_results_that_a_killed_run_left_half_replaced_are_made_again(stores: tuple[Path, Path], tmp_path: Path) -> None:
    fewshot([stores[0]], tmp_path / "out", **QUICK)
    (tmp_path / "out" / "predictions.json").write_text("[]")
    with pytest.raises(UsageError, match="damaged results"):
        Results.read(tmp_path / "out")
    fewshot([stores[0]], tmp_path / "out", **QUICK)
    assert Results.read(tmp_path / "out").evaluations
    (tmp_path / "out" / "results.json").write_text("{")
    with pytest.raises(UsageError, match=r"results.json: damaged, or of another program\. Remove it, or .*--out"):
        fewshot([stores[0]], tmp_path / "out", **QUICK)


def test_results_stay_if_there_is_no_room_for_others(compared: Compared, tmp_path: Path) -> None:
    compared.results.write(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / ".results.json.partial").mkdir()
    with pytest.raises(FmsuiteError, match="results cannot be written"):
        compared.results.model_copy(update={"title": "Another"}).write(tmp_path)
    (tmp_path / ".results.json.partial").rmdir()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_results_of_which_a_part_was_exchanged_are_not_there(
    compared: Compared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared.results.write(tmp_path)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fmsuite.core.evaluation.results.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        compared.results.write(tmp_path)
    with pytest.raises(UsageError, match=r"results\.json"):
        Results.read(tmp_path)


def test_without_the_source_files_only_pictures_are_missing(compared: Compared) -> None:
    exhibits = Exhibits.read(compared.out)
    assert not exhibits.evidence
    assert not exhibits.neighbours
    assert any("/nowhere/s00.svs" in note and "numbers do not need them" in note for note in exhibits.notes)
    assert [drawn.encoder for drawn in exhibits.maps] == ["planted", "untrained"]
    drawn = exhibits.maps[0]
    assert drawn.method.startswith("A point is a window, in the class of its slide.")
    assert len(drawn.x) == sum(s.windows for s in COHORT)
