"""What ``fewshot`` shows of slides that it can read again: evidence of an episode, neighbours, maps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fmsuite.commands.comparison import Compared
from fmsuite.commands.fewshot import fewshot
from fmsuite.commands.setup import domain_options, open_domain, open_index
from fmsuite.core.data.index import SampleIndex
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.evaluation.prototypes import fit_prototypes, nearest_vectors, prototype_distances
from fmsuite.core.features import FeatureStore
from fmsuite.core.reports.exhibits import Exhibits
from fmsuite.domains.pathology.example import write_slide
from tests.commands.fewshot_cohort import index_of, slides, truth_of, write_store

COHORT = slides(10)
OPTIONS = {"shots": (1, 2), "episodes": 3, "methods": ("simpleshot", "mi_simpleshot"), "shuffled": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small slides with ``labels.csv``."""
    made = tmp_path_factory.mktemp("slides")
    for number, slide in enumerate(COHORT):
        random = np.random.default_rng(number)
        coarse = random.random((16, 16, 1)).repeat(16, 0).repeat(16, 1)
        picture = np.where(coarse < 0.4, (110, 80, 140), (215, 140, 180)) + random.integers(-12, 13, (256, 256, 3))
        write_slide(made / f"{slide.name}.tif", np.clip(picture, 0, 255).astype(np.uint8), 0.5, downsamples=(2,))
    lines = [f"{slide.name},{slide.label},{slide.patient}" for slide in COHORT]
    (made / "labels.csv").write_text("\n".join(["slide,label,patient", *lines]))
    return made


@pytest.fixture(scope="module")
def index(folder: Path) -> SampleIndex:
    domain = open_domain("pathology", domain_options("pathology", ["size=64"]))
    return open_index(domain, [folder], SkippedLog())[1]


@pytest.fixture(scope="module")
def compared(index: SampleIndex, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    made = tmp_path_factory.mktemp("compared")
    good = write_store(made / "good.zarr", index, truth_of(COHORT))
    control = {"control": "untrained", "of": "abc"}
    bad = write_store(made / "bad.zarr", index, truth_of(COHORT), 0.0, identity="d", name="bad", provenance=control)
    return fewshot([good, bad], made / "out", evidence=4, **OPTIONS)


def test_evidence_is_of_an_episode_in_the_results_whose_examples_are_not_shown(compared: Compared) -> None:
    exhibits = Exhibits.read(compared.out)
    results = compared.results
    assert len(exhibits.evidence) == 4
    assert {e.encoder for e in exhibits.evidence} == {"planted"}
    [judged] = [e for e in results.evaluations if (e.encoder, e.method, e.shots) == ("planted", "mi_simpleshot", 2)]
    first = judged.episodes[0]
    place = {item.id: number for number, item in enumerate(results.items)}
    for shown in exhibits.evidence:
        assert place[shown.item] not in first.support
        assert first.predictions[place[shown.item]] == shown.predicted
        assert results.items[place[shown.item]].label == shown.true
        assert sum(shown.scores) == pytest.approx(1)
        assert shown.heatmap is not None
        assert (compared.out / shown.heatmap.file).is_file()
        assert {name: len(top) for name, top in shown.top.items()} == {"glandular": 5, "solid": 5}
    [note] = [note for note in exhibits.notes if "evidence is from" in note]
    assert f"first episode with 2 examples of each class (seed {first.seed})" in note
    assert "none of these is among the slides shown" in note


def test_the_top_windows_are_those_nearest_to_the_prototypes_of_that_episode(compared: Compared) -> None:
    exhibits = Exhibits.read(compared.out)
    results = compared.results
    store = FeatureStore.open(next(iter(results.facts.inputs)))
    [judged] = [e for e in results.evaluations if (e.encoder, e.method, e.shots) == ("planted", "mi_simpleshot", 2)]
    features, rows = store.read_all()
    item_of = {int(row): number for number, item in enumerate(results.items) for row in store.rows_of(item.id)}
    owner = np.array([item_of[int(row)] for row in rows])
    support = np.isin(owner, judged.episodes[0].support)
    labels = np.array([results.items[number].label for number in owner])
    prototypes = fit_prototypes(features[support], rows.new_tensor(labels[support]), 2)
    shown = exhibits.evidence[0]
    own = features[owner == [item.id for item in results.items].index(shown.item)]
    distances = prototype_distances(own, prototypes)
    nearest = nearest_vectors(distances, 5)
    for code, name in enumerate(results.classes):
        wanted = [f"squared distance {distances[number, code]:.3f}" for number in nearest[code].tolist()]
        assert [picture.caption for picture in shown.top[name]] == wanted


def test_neighbours_are_other_patients_windows_of_encoders_and_controls_get_a_map_only(compared: Compared) -> None:
    exhibits = Exhibits.read(compared.out)
    assert [drawn.encoder for drawn in exhibits.maps] == ["planted", "bad"]
    assert {near.encoder for near in exhibits.neighbours} == {"planted"}
    patient = {item.id: item.group for item in compared.results.items}

    def of(caption: str) -> str:
        return next(patient[id] for id in patient if id in caption)

    for near in exhibits.neighbours:
        assert len(near.nearest) == 5
        assert of(near.query.caption) not in {of(picture.caption) for picture in near.nearest}


def test_slides_whose_files_are_gone_are_not_shown_and_nothing_else_is_lost(
    index: SampleIndex, folder: Path, tmp_path: Path, compared: Compared
) -> None:
    store = write_store(tmp_path / "good.zarr", index, truth_of(COHORT))
    aside = tmp_path / "aside"
    aside.mkdir()
    gone = [folder / f"{slide.name}.tif" for slide in COHORT[:5]]
    for file in gone:
        file.rename(aside / file.name)
    try:
        ran = fewshot([store], tmp_path / "out", evidence=8, strict=True, **OPTIONS)
    finally:
        for file in gone:
            (aside / file.name).rename(file)
    exhibits = Exhibits.read(tmp_path / "out")
    assert exhibits.evidence
    assert {shown.item for shown in exhibits.evidence}.isdisjoint(file.name for file in gone)
    assert any(
        "5 of 10 files are no longer where they were" in note and str(gone[0]) in note for note in exhibits.notes
    )
    assert [e.metrics for e in ran.results.evaluations] == [
        e.metrics for e in compared.results.evaluations if e.encoder == "planted"
    ]


def test_a_file_that_can_no_longer_be_read_is_noted(index: SampleIndex, folder: Path, tmp_path: Path) -> None:
    store = write_store(tmp_path / "good.zarr", index, truth_of(COHORT))
    kept = {slide.name: (folder / f"{slide.name}.tif").read_bytes() for slide in COHORT}
    try:
        for name in kept:
            (folder / f"{name}.tif").write_bytes(b"torn")
        ran = fewshot([store], tmp_path / "out", strict=True, **OPTIONS)
    finally:
        for name, content in kept.items():
            (folder / f"{name}.tif").write_bytes(content)
    exhibits = Exhibits.read(tmp_path / "out")
    assert len(ran.results.evaluations) == 4
    assert ran.skipped == ""
    assert all(shown.heatmap is None for shown in exhibits.evidence)
    assert any("could not be read again and are not shown; the first is" in note for note in exhibits.notes)


def test_without_mi_simpleshot_or_a_known_domain_there_is_a_note(tmp_path: Path, index: SampleIndex) -> None:
    store = write_store(tmp_path / "f.zarr", index, truth_of(COHORT))
    fewshot([store], tmp_path / "out", **{**OPTIONS, "methods": ("knn",)})
    exhibits = Exhibits.read(tmp_path / "out")
    assert not exhibits.evidence
    assert any("mi_simpleshot was not among the methods" in note for note in exhibits.notes)
    foreign = index_of(COHORT, domain="radio_astronomy")
    store = write_store(tmp_path / "g.zarr", foreign, truth_of(COHORT), domain="radio_astronomy")
    ran = fewshot([store], tmp_path / "foreign", **OPTIONS)
    assert ran.results.unit == "source"
    notes = Exhibits.read(tmp_path / "foreign").notes
    assert any("There is no domain 'radio_astronomy'" in note for note in notes)


def test_items_of_one_window_have_no_evidence_inside(tmp_path: Path, index: SampleIndex) -> None:
    sources = index.table.column("source").to_pylist()
    alone = index.select([sources.index(source) for source in dict.fromkeys(sources)])
    store = write_store(tmp_path / "f.zarr", alone, truth_of(COHORT))
    fewshot([store], tmp_path / "out", **OPTIONS)
    exhibits = Exhibits.read(tmp_path / "out")
    assert exhibits.neighbours
    assert not exhibits.evidence
    assert any("no evidence from single slides, as each is a single window" in note for note in exhibits.notes)


def test_from_fifty_slides_on_a_point_of_the_map_is_a_slide(tmp_path: Path) -> None:
    many = [
        replace(slide, windows=2, split="train" if number < 20 else "test") for number, slide in enumerate(slides(50))
    ]
    store = write_store(tmp_path / "f.zarr", index_of(many), truth_of(many))
    fewshot([store], tmp_path / "out", **OPTIONS)
    [drawn] = Exhibits.read(tmp_path / "out").maps
    assert drawn.method.startswith("A point is a slide: the mean")
    assert drawn.held_out == [number >= 20 for number in range(50)]
