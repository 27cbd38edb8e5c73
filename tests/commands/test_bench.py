"""``bench`` on small folders of labelled windows: its figures, its controls, going on, and what it refuses."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from fmsuite.commands.bench import TASK_NAMES, bench
from fmsuite.commands.comparison import Compared, file_name, short_names
from fmsuite.commands.tile import tile
from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.backbones.vit import VisionTransformer
from fmsuite.core.data.index import SampleIndex
from fmsuite.core.encoders import Encoder, save_encoder
from fmsuite.core.evaluation.results import Evaluation, Results
from fmsuite.core.features import FeatureStore
from fmsuite.core.inputs import Channel, InputSpec, rgb_channels
from fmsuite.core.reports.exhibits import Exhibits
from fmsuite.domains.base import load_domain
from fmsuite.errors import FmsuiteError, UsageError

SIDE = 16
WINDOWS = ("data.size=16", "data.min_tissue=0")
COLOURS = {"pink": (190, 100, 140), "violet": (150, 90, 170), "blue": (120, 110, 190)}


@dataclass(frozen=True)
class Tile:
    name: str
    label: str | None
    group: str
    split: str | None = None


def tiles(groups: int, classes: Sequence[str] = ("pink", "violet"), split: bool = True, each: int = 2) -> list[Tile]:
    """Groups of one class each, of which every third is asked."""
    found = []
    for number in range(groups):
        side = ("test" if number // len(classes) % 3 == 2 else "train") if split else None
        label = classes[number % len(classes)]
        found += [Tile(f"g{number:03d}_{k}.png", label, f"g{number:03d}", side) for k in range(each)]
    return found


def write(folder: Path, cohort: Sequence[Tile], spread: float = 25.0) -> Path:
    """Noisy tiles of a class's colour, each tile a little off it, with ``labels.csv``."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, one in enumerate(cohort):
        random = np.random.default_rng(number)
        colour = np.array(COLOURS[one.label or "pink"]) + random.normal(0, spread, 3)
        pixels = np.clip(colour + random.normal(0, 20, (SIDE, SIDE, 3)), 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / one.name)
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file)
        lines.writerow(["path", "label", "group", "split"])
        lines.writerows([one.name, one.label or "", one.group, one.split or ""] for one in cohort)
    return folder


def encoder(folder: Path, seed: int = 0, spec: InputSpec | None = None, width: int = 24, patch: int = 8) -> str:
    """A network of nearly nothing, with random weights."""
    spec = spec or InputSpec(axes=("y", "x"), size=(SIDE, SIDE), channels=rgb_channels(), scale=1 / 255)
    torch.manual_seed(seed)
    config = {"width": width, "depth": 1, "heads": 2, "patch_size": patch}
    backbone = VisionTransformer(ModelConfig.model_validate(config), spec)
    save_encoder(folder, backbone, spec, "cls+mean", {"seed": seed})
    return str(folder)


def run(data: Path, encoders: Sequence[str], out: Path, **changes: object) -> Compared:
    quick = {"episodes": 4, "shots": (1, 2), "overrides": WINDOWS, "workers": 0, "device": "cpu", "strict": False}
    return bench("pathology", encoders, [data], out, **{**quick, **changes})  # type: ignore[arg-type]


def find(results: Results, name: str, method: str, shots: int | None = None, shuffled: bool = False) -> Evaluation:
    [found] = [
        e for e in results.evaluations if (e.encoder, e.method, e.shots, e.shuffled) == (name, method, shots, shuffled)
    ]
    return found


def score(results: Results, *where: object) -> float:
    return find(results, *where).metrics["balanced_accuracy"].mean  # type: ignore[arg-type]


@dataclass(frozen=True)
class Case:
    data: Path
    encoders: list[str]
    compared: Compared

    @property
    def results(self) -> Results:
        return self.compared.results


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Two encoders of one architecture on 90 tiles of 3 classes."""
    folder = tmp_path_factory.mktemp("bench")
    data = write(folder / "tiles", tiles(45, ("pink", "violet", "blue")))
    encoders = [encoder(folder / "one", 1), encoder(folder / "two", 2)]
    return Case(data, encoders, run(data, encoders, folder / "out", command=["fmsuite", "bench"]))


def test_everything_is_judged_by_everything(case: Case) -> None:
    results = case.results
    whole = {"knn", "linear_torch", "linear_sklearn", "prototypes", "retrieval"}
    for name in ("one", "two", "untrained one", "histogram"):
        rows = [e for e in results.evaluations if e.encoder == name and not e.shuffled]
        assert {e.method for e in rows if e.shots is None} == whole
        assert [(e.method, e.shots) for e in rows if e.shots is not None] == [("simpleshot", 1), ("simpleshot", 2)]
    shuffled = [(e.encoder, e.method) for e in results.evaluations if e.shuffled]
    assert shuffled == [(name, method) for name in ("one", "two") for method in ("knn", "linear_sklearn")]
    assert set(results.methods) == {*whole, "simpleshot"}
    assert results.classes == ["blue", "pink", "violet"]
    assert results.unit == "tile"
    assert (results.facts.command, results.facts.seed) == (["fmsuite", "bench"], 0)


def test_what_is_written_is_what_is_returned(case: Case) -> None:
    assert Results.read(case.compared.out) == case.results
    exhibits = Exhibits.read(case.compared.out)
    assert [shown.encoder for shown in exhibits.maps] == ["one", "two", "untrained one", "histogram"]
    assert {shown.encoder for shown in exhibits.neighbours} == {"one", "untrained one"}
    assert exhibits.maps[0].held_out.count(True) == 30


def test_the_items_are_the_tiles_in_order_with_their_sides(case: Case) -> None:
    items, rows = case.results.items, list(csv.DictReader((case.data / "labels.csv").open(encoding="utf-8")))
    assert [item.id for item in items] == [row["path"] for row in rows]
    assert [case.results.classes[item.label] for item in items] == [row["label"] for row in rows]
    assert [(item.group, item.split) for item in items] == [(row["group"], row["split"]) for row in rows]
    assert "60 tiles of 30 groups to train on and 30 tiles of 15 groups to be asked" in case.results.split


def test_encoders_of_one_architecture_share_a_control_and_it_is_said(case: Case) -> None:
    facts = {known.name: known for known in case.results.encoders}
    assert [known.kind for known in facts.values()] == ["encoder", "encoder", "untrained", "histogram"]
    assert facts["untrained one"].control_of == "one"
    assert facts["untrained one"].provenance["control_of"] == ["one", "two"]
    assert facts["untrained one"].identity not in (facts["one"].identity, facts["two"].identity)
    assert any("control of one, two" in note for note in case.results.notes)


@pytest.mark.parametrize("name", ["one", "untrained one", "histogram"])
def test_figures_are_those_of_scikit_learn_on_the_stored_features(case: Case, name: str) -> None:
    features, rows = FeatureStore.open(case.compared.out / "features" / f"{file_name(name)}.zarr").read_all()
    assert rows.tolist() == list(range(90))
    values = features.double().numpy()
    labels = np.array([item.label for item in case.results.items])
    train = np.array([item.split == "train" for item in case.results.items])
    mean = values[train].mean(0)
    unit = (values - mean) / np.linalg.norm(values - mean, axis=1, keepdims=True)
    nearest = KNeighborsClassifier(20).fit(unit[train], labels[train]).predict(unit[~train])
    cost = values.shape[1] * 3 / 100
    scaled = values / np.sqrt((values[train] ** 2).mean()) if name == "histogram" else values
    probe = LogisticRegression(C=cost, max_iter=10_000, tol=1e-8).fit(scaled[train], labels[train])
    for method, predicted in (("knn", nearest), ("linear_sklearn", probe.predict(scaled[~train]))):
        [episode] = find(case.results, name, method).episodes
        assert np.flatnonzero(np.array(episode.predictions) >= 0).tolist() == np.flatnonzero(~train).tolist()
        assert np.array(episode.predictions)[~train].tolist() == predicted.tolist()
        recalls = [(predicted[labels[~train] == label] == label).mean() for label in range(3)]
        assert score(case.results, name, method) == pytest.approx(np.mean(recalls))


def test_a_second_run_embeds_nothing_and_finds_the_same(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("embedded again")

    monkeypatch.setattr(Encoder, "embed", refuse)
    again = run(case.data, case.encoders, case.compared.out, command=["fmsuite", "bench"]).results
    assert again.evaluations == case.results.evaluations
    assert again.model_copy(update={"facts": case.results.facts}) == case.results


def test_another_encoder_and_fewer_tasks_embed_only_what_is_new(case: Case, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(case.compared.out, out)
    stores = {path.name: (path / "zarr.json").stat().st_mtime_ns for path in (out / "features").iterdir()}
    third = encoder(tmp_path / "three", 3, width=16)
    results = run(case.data, [*case.encoders, third], out, tasks=["prototypes"]).results
    after = {path.name: (path / "zarr.json").stat().st_mtime_ns for path in (out / "features").iterdir()}
    assert {name: after[name] for name in stores} == stores
    assert set(after) - set(stores) == {"three.zarr", "untrained-three.zarr"}
    assert {e.method for e in results.evaluations} == {"prototypes"}
    assert score(results, "one", "prototypes") == score(case.results, "one", "prototypes")


def test_without_controls_only_the_encoders_are_judged(case: Case, tmp_path: Path) -> None:
    results = run(case.data, case.encoders[:1], tmp_path / "out", controls=False, tasks=["knn"]).results
    assert [(e.encoder, e.method, e.shuffled) for e in results.evaluations] == [("one", "knn", False)]
    assert [known.name for known in results.encoders] == ["one"]


def test_a_real_difference_is_found_and_shuffled_labels_are_at_chance(tmp_path: Path) -> None:
    data = write(tmp_path / "tiles", tiles(150, each=1), spread=4.0)
    results = run(data, [encoder(tmp_path / "net")], tmp_path / "out", tasks=["knn", "linear_sklearn"]).results
    for method in ("knn", "linear_sklearn"):
        assert score(results, "net", method) > 0.9
        control = find(results, "net", method, None, True)
        estimate = control.metrics["balanced_accuracy"]
        assert len(control.episodes) == 20
        assert estimate.low is not None
        assert estimate.high is not None
        assert estimate.low < 0.5 < estimate.high
        # As if all 20 shuffles gave one and the same answer to each of the 50 tiles: surely too wide.
        assert abs(estimate.mean - 0.5) < 3 * np.sqrt(0.25 / 50)


def test_without_sides_a_split_by_group_is_made_and_said(tmp_path: Path) -> None:
    data = write(tmp_path / "tiles", tiles(20, split=False, each=3))
    net = encoder(tmp_path / "net")
    results = run(data, [net], tmp_path / "out", tasks=["prototypes"], controls=False, seed=5).results
    sides: dict[str, set[str | None]] = {}
    for item in results.items:
        sides.setdefault(item.group, set()).add(item.split)
    assert all(len(side) == 1 for side in sides.values())
    assert sum(side == {"test"} for side in sides.values()) == 6
    assert "Made here" in results.split
    assert "seed 5" in results.split
    other = run(data, [net], tmp_path / "out", tasks=["prototypes"], controls=False, seed=6).results
    assert [item.split for item in other.items] != [item.split for item in results.items]


def test_tiles_without_label_or_on_another_side_are_left_out_and_counted(tmp_path: Path) -> None:
    cohort = [*tiles(12), Tile("u.png", None, "u", "train"), Tile("v.png", "pink", "v", "val")]
    data = write(tmp_path / "tiles", cohort)
    results = run(data, [encoder(tmp_path / "net")], tmp_path / "out", tasks=["knn"], controls=False).results
    assert len(results.items) == 24
    assert results.notes == [
        "Left out: 1 tile without a label.",
        "Left out: 1 tile of other sides of the split (val).",
    ]


def test_a_tile_that_cannot_be_read_is_missing_for_everyone_and_said(tmp_path: Path) -> None:
    data = write(tmp_path / "tiles", tiles(12))
    index = tile("pathology", [data], tmp_path / "index.parquet", overrides=WINDOWS).path
    (data / "g003_1.png").write_bytes((data / "g003_1.png").read_bytes()[:200])
    compared = run(index, [encoder(tmp_path / "net")], tmp_path / "out", tasks=["knn"], overrides=())
    assert len(compared.results.items) == 23
    assert "g003_1.png" not in [item.id for item in compared.results.items]
    assert any("1 tile that could not be read" in note for note in compared.results.notes)
    assert "skipped" in compared.skipped
    again = run(index, [encoder(tmp_path / "net")], tmp_path / "out", tasks=["knn"], overrides=())
    assert again.skipped == compared.skipped
    with pytest.raises(FmsuiteError, match="--strict"):
        run(index, [encoder(tmp_path / "net")], tmp_path / "out", tasks=["knn"], overrides=(), strict=True)


def test_shots_that_a_class_does_not_have_are_left_out_and_said(tmp_path: Path) -> None:
    data = write(tmp_path / "tiles", tiles(12))
    results = run(
        data, [encoder(tmp_path / "net")], tmp_path / "out", tasks=["fewshot"], shots=(1, 4, 64), controls=False
    ).results
    assert [e.shots for e in results.evaluations] == [1, 4]
    assert any("Shots 64 were left out" in note for note in results.notes)


def test_drawings_are_compared_too(tmp_path: Path) -> None:
    data = tmp_path / "drawings"
    data.mkdir()
    shapes = {"disc": '<circle cx="32" cy="32" r="{}"/>', "bar": '<rect x="8" y="26" width="{}" height="9"/>'}
    lines = ["path,label,group"]
    for number in range(24):
        label, shape = list(shapes.items())[number % 2]
        body = shape.format(18 + number // 2)
        text = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64">{body}</svg>'
        (data / f"{number}.svg").write_text(text, encoding="utf-8")
        lines.append(f"{number}.svg,{label},{number}")
    (data / "labels.csv").write_text("\n".join(lines), encoding="utf-8")
    changes = ["size=16", "workers=1"]
    results = bench(
        "svg",
        [encoder(tmp_path / "net")],
        [data],
        tmp_path / "out",
        shots=(1,),
        episodes=3,
        overrides=changes,
        workers=0,
    ).results
    assert (results.unit, len(results.items)) == ("drawing", 24)
    assert score(results, "net", "linear_sklearn") > 0.8
    assert {e.method for e in results.evaluations} == {
        "knn",
        "linear_torch",
        "linear_sklearn",
        "prototypes",
        "retrieval",
        "simpleshot",
    }


@pytest.mark.parametrize("domain", ["medical", "remote_sensing"])
def test_example_data_of_the_other_domains_are_compared(
    domain: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if domain == "medical":
        monkeypatch.setattr("fmsuite.domains.medical.example.PATIENTS", 12)
    plugin = load_domain(domain)
    data = plugin(plugin.Options()).example_data(tmp_path / "data")
    whole = tile(domain, [data], tmp_path / "whole.parquet").index
    # A part is enough: a few windows of every source.
    sources = np.array(whole.table.column("source").cast(pa.string()).to_pylist())
    kept = np.concatenate([np.flatnonzero(sources == source)[:3] for source in sorted(set(sources))])
    index = whole.select(np.sort(kept))
    index.write(tmp_path / "index.parquet")
    net = encoder(tmp_path / "net", spec=plugin(plugin.Options()).input_spec(index), patch=16)
    results = bench(
        domain, [net], [tmp_path / "index.parquet"], tmp_path / "out", shots=(1,), episodes=3, workers=0
    ).results
    assert len(results.items) == len(index)
    assert len({item.id for item in results.items}) == len(index)
    means = {"means"} if domain == "remote_sensing" else set()
    assert {known.kind for known in results.encoders} == {"encoder", "untrained", "histogram"} | means
    first = {"retrieval": "acc@1"}
    assert all(0 <= e.metrics[first.get(e.method, "balanced_accuracy")].mean <= 1 for e in results.evaluations)


def refused(data: Path, encoders: Sequence[str], out: Path, match: str, **changes: object) -> None:
    with pytest.raises(UsageError, match=match):
        run(data, encoders, out, **changes)


def test_wrong_names_and_numbers_are_refused_before_any_work(case: Case, tmp_path: Path) -> None:
    out = tmp_path / "out"
    known = case.encoders[:1]
    refused(case.data, known, out, "no task 'knm'.*Did you mean 'knn'", tasks=["knm"])
    refused(case.data, known, out, "Shots .0, 1.", shots=(0, 1))
    refused(case.data, known, out, "episodes .0.", episodes=0)
    refused(case.data, known * 2, out, "named twice")
    refused(case.data, [], out, "No encoder")
    refused(case.data, [str(tmp_path / "nowhere")], out, "There is no encoder.*nowhere")
    refused(case.data, known, out, "batch of 0", batch_size=0)
    assert not out.exists()


def test_labels_that_allow_no_comparison_are_refused(tmp_path: Path) -> None:
    net, out = [encoder(tmp_path / "net")], tmp_path / "out"

    def cohort(name: str, members: Sequence[Tile]) -> Path:
        return write(tmp_path / name, members)

    nobody = [Tile(f"{n}.png", None, str(n)) for n in range(3)]
    refused(cohort("unlabelled", nobody), net, out, r"unlabelled: none of the 3 tiles has a label.*labels\.csv")
    graded = cohort("graded", nobody)
    (graded / "labels.csv").write_text("path,grade\n0.png,high\n1.png,low\n", encoding="utf-8")
    refused(graded, net, out, r"has a label.*graded.labels\.csv was read and gives none.*data\.label_column")
    refused(cohort("alone", tiles(8, ("pink",))), net, out, "one class, 'pink'")
    lacking = [*tiles(8, ("pink",)), Tile("x.png", "blue", "x", "train")]
    refused(cohort("lacking", lacking), net, out, "'test' of the split has no window of 'blue'")
    sides = [Tile(f"{n}.png", ("pink", "blue")[n % 2], str(n), ("train", "held out")[n // 4]) for n in range(8)]
    refused(cohort("sides", sides), net, out, "side 'test'.*'held out', 'train'")
    single = [*tiles(8, ("pink",), split=False), Tile("x.png", "blue", "x"), Tile("y.png", "blue", "x")]
    refused(cohort("single", single), net, out, "'blue' belong to one group, 'x'")
    refused(cohort("few", tiles(12)), net, out, "No few-shot episode of 64", shots=(64,))


def test_a_group_on_both_sides_of_an_index_is_named(tmp_path: Path) -> None:
    data = write(tmp_path / "tiles", tiles(12))
    index = tile("pathology", [data], tmp_path / "index.parquet", overrides=WINDOWS).index
    groups = index.table.column("group").cast(pa.string()).to_pylist()
    groups[groups.index("g000")] = "g004"
    place = index.table.column_names.index("group")
    table = index.table.set_column(
        place, "group", pa.array(groups).dictionary_encode().cast(index.table.schema.field(place).type)
    )
    SampleIndex(table, index.metadata).write(tmp_path / "edited.parquet")
    refused(
        tmp_path / "edited.parquet", [encoder(tmp_path / "net")], tmp_path / "out", "both sides.*'g004'", overrides=()
    )


def test_an_encoder_that_does_not_fit_the_data_is_named(case: Case, tmp_path: Path) -> None:
    bands = InputSpec(axes=("y", "x"), size=(16, 16), channels=(Channel(name="B2"), Channel(name="B8")), scale=1e-4)
    odd = encoder(tmp_path / "bands", spec=bands)
    refused(case.data, [case.encoders[0], odd], tmp_path / "out", "Encoder 'bands'.*channels")


def test_features_of_other_windows_are_not_mixed_in(case: Case, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(case.compared.out, out)
    other = write(tmp_path / "others", tiles(12))
    refused(other, case.encoders[:1], out, "features here that were made otherwise: index.*--out", tasks=["knn"])


def test_a_folder_of_something_else_is_refused(case: Case, tmp_path: Path) -> None:
    results = tmp_path / "results"
    shutil.copytree(case.compared.out, results)
    raw = json.loads((results / "results.json").read_text(encoding="utf-8"))
    (results / "results.json").write_text(json.dumps({**raw, "kind": "fewshot"}), encoding="utf-8")
    refused(case.data, case.encoders[:1], results, "results of `fmsuite fewshot`")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}", encoding="utf-8")
    refused(case.data, case.encoders[:1], tmp_path / "run", "pretraining run")
    (tmp_path / "file").write_text("", encoding="utf-8")
    refused(case.data, case.encoders[:1], tmp_path / "file", "this is a file")


def test_tasks_can_be_named_all_at_once(case: Case, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        run(case.data, case.encoders[:1], tmp_path / "out", tasks=["everything"])
    assert all(name in str(error.value) for name in (*TASK_NAMES, "all"))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["runs/a", "runs/b"], ["a", "b"]),
        (["x/a/encoder.safetensors", "y/a"], ["x/a", "y/a"]),
        (["timm:vit_tiny", "timm:resnet18@weights/w.pth"], ["vit_tiny", "resnet18"]),
        (["timm:resnet18@one/w.pth", "timm:resnet18@v.pth"], ["resnet18@w", "resnet18@v"]),
        (["hf-hub:owner/net", "hf-hub:other/net"], ["owner/net", "other/net"]),
        (["stores/uni.zarr", "dino.pth"], ["uni", "dino"]),
        (["a", "./a"], ["a", "a (2)"]),
    ],
)
def test_names_are_as_short_as_their_neighbours_allow(
    given: list[str], expected: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    names = short_names(given)
    assert len(set(names)) == len(names)
    if given != ["a", "./a"]:
        assert names == expected
    else:
        assert names[1] == f"{names[0]} (2)"


def test_names_become_file_names() -> None:
    assert file_name("owner/net (2)") == "owner-net-2"
    assert file_name("untrained vit_tiny") == "untrained-vit_tiny"
