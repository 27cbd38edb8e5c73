"""``fmsuite embed``: from an encoder and an index to a store, killed and restarted, and what it refuses."""

from __future__ import annotations

import csv
import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fmsuite.commands.embed import embed
from fmsuite.commands.tile import tile
from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.backbones.vit import VisionTransformer
from fmsuite.core.data.index import SampleIndex
from fmsuite.core.encoders import load_encoder, save_encoder
from fmsuite.core.features import FeatureStore
from fmsuite.core.inputs import Channel, InputSpec, rgb_channels
from fmsuite.core.lock import WriterLock
from fmsuite.domains.pathology.reading import read_region
from fmsuite.domains.pathology.slides import open_source
from fmsuite.errors import FmsuiteError, UsageError
from tests.forked import forkserver

SIZE = 32
RGB = InputSpec(axes=("y", "x"), size=(SIZE, SIZE), channels=rgb_channels(), scale=1 / 255)
SLIDES, SIDE = 6, 8


def make_encoder(folder: Path, spec: InputSpec = RGB, seed: int = 0) -> str:
    torch.manual_seed(seed)
    config = ModelConfig(name="vit_tiny", width=32, depth=1, heads=2, patch_size=8)
    save_encoder(folder, VisionTransformer(config, spec), spec, "cls", {"run": folder.name})
    return str(folder)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_encoder(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images of 64 windows each."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(SLIDES):
        noise = np.random.default_rng(number).integers(0, 256, (SIDE * SIZE, SIDE * SIZE, 3)).astype(np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png", compress_level=1)
    return folder


@pytest.fixture(scope="module")
def index(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tile("pathology", [pictures], tmp_path_factory.mktemp("index"), overrides=[f"size={SIZE}"]).path


def content(path: Path) -> dict[str, tuple[bytes, ...]]:
    store = FeatureStore.open(path)
    groups = (store[id] for id in store.stored())
    return {
        group.id: tuple(a.tobytes() for a in (group.rows, group.features, group.position, group.extent))
        for group in groups
    }


def test_every_window_gets_its_features(encoder: str, index: Path, pictures: Path, tmp_path: Path) -> None:
    done = embed(encoder, index, tmp_path / "out", batch_size=50, workers=0, device="cpu", command=["fmsuite", "embed"])
    assert done.path == tmp_path / "out" / "features.zarr"
    assert (done.groups, done.windows, done.skipped) == (SLIDES, SLIDES * SIDE**2, "")
    store = FeatureStore.open(done.path)
    assert store.keys() == [f"{number}.png" for number in range(SLIDES)]
    opened = load_encoder(encoder)
    facts = store.facts
    assert (facts.identity, facts.name, facts.domain) == (opened.identity, encoder, "pathology")
    assert (facts.by, facts.batch_size, facts.precision) == ("source", 50, "float32")
    assert facts.index_hash == SampleIndex.read(index).hash
    assert facts.command == ["fmsuite", "embed"]
    group = store["3.png"]
    for number in (0, 17, 63):
        top, left = map(int, group.position[number])
        with Image.open(pictures / "3.png") as image:
            window = np.asarray(image)[top : top + SIZE, left : left + SIZE]
        expected = opened.embed(torch.from_numpy(window.copy()).permute(2, 0, 1)[None])
        assert np.allclose(group.features[number], expected[0].numpy(), atol=1e-4)
    assert not list(done.path.parent.glob("*skipped.csv"))


def test_tile_images_are_grouped_by_folder_and_patients_on_request(encoder: str, tiles: Path, tmp_path: Path) -> None:
    found = tile("pathology", [tiles], tmp_path / "whole", overrides=["size=64"]).path
    done = embed(encoder, found, tmp_path / "a.zarr", workers=0)
    assert FeatureStore.open(done.path).stored() == [tiles.name]
    done = embed(encoder, found, tmp_path / "b.zarr", by="group", workers=0)
    assert FeatureStore.open(done.path).stored() == ["patient0", "patient1", "patient2"]


def test_a_second_run_has_nothing_to_do(encoder: str, index: Path, tmp_path: Path) -> None:
    path = tmp_path / "f.zarr"
    embed(encoder, index, path, batch_size=48, workers=0)
    before = content(path)

    def none(items: Iterator, total: int, title: str) -> Iterator:
        raise AssertionError("it computes again")

    done = embed(encoder, index, path, progress=none, workers=0)
    assert (done.groups, done.windows) == (SLIDES, SLIDES * SIDE**2)
    assert content(path) == before
    assert FeatureStore.open(path).facts.batch_size == 48


def test_pooling_is_the_encoders_own_or_as_asked(encoder: str, index: Path, tmp_path: Path) -> None:
    for pooling, dim in ((None, 32), ("mean", 32), ("cls+mean", 64)):
        path = tmp_path / f"{pooling}.zarr"
        embed(encoder, index, path, pooling=pooling, workers=0)
        assert FeatureStore.open(path).facts.dim == dim
    cls, mean, both = (FeatureStore.open(tmp_path / f"{p}.zarr").read_all()[0] for p in (None, "mean", "cls+mean"))
    assert torch.equal(torch.cat([cls, mean], 1), both)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"encoder": True}, r"encoder \S+ \([0-9a-f]{32}\) against \S+ \([0-9a-f]{32}\)"),
        ({"index": True}, r"index [0-9a-f]{16} \(pathology\) against [0-9a-f]{16} \(pathology\)"),
        ({"by": "folder"}, "by source against folder"),
        ({"pooling": "mean"}, "pooling cls against mean"),
        ({"batch_size": 7}, "batch_size 64 against 7"),
    ],
)
def test_a_store_of_other_features_is_refused_or_replaced(
    change: dict, named: str, encoder: str, index: Path, tmp_path: Path
) -> None:
    path = tmp_path / "f.zarr"
    embed(encoder, index, path, workers=0)
    before = content(path)
    options = {"encoder": encoder, "index": index, **change}
    if "encoder" in change:
        options["encoder"] = make_encoder(tmp_path / "other", seed=1)
    if "index" in change:
        read = SampleIndex.read(index)
        options["index"] = tmp_path / "fewer.parquet"
        read.select(range(100)).write(options["index"])
    with pytest.raises(UsageError, match=named) as raised:
        embed(out=path, workers=0, **options)
    assert "--overwrite" in str(raised.value)
    assert content(path) == before
    facts = FeatureStore.open(path).facts
    embed(out=path, workers=0, overwrite=True, **options)
    assert FeatureStore.open(path).facts.differences(facts)
    assert FeatureStore.open(path).missing() == []


def test_an_encoder_of_other_data_is_refused(index: Path, encoder: str, tmp_path: Path) -> None:
    bands = InputSpec(axes=("y", "x"), size=(SIZE, SIZE), channels=tuple(Channel(name=f"B{n}") for n in range(4)))
    other = make_encoder(tmp_path / "bands", bands)
    path = tmp_path / "f.zarr"
    with pytest.raises(UsageError, match=r"channels \('B0', 'B1', 'B2', 'B3'\) against \('red', 'green', 'blue'\)"):
        embed(other, index, path, workers=0)
    assert not path.exists()
    embed(encoder, index, path, workers=0)
    before = content(path)
    with pytest.raises(UsageError, match="channels"):
        embed(other, index, path, workers=0, overwrite=True)
    assert content(path) == before


def test_spacings_are_compared_at_the_encoders_size(pictures: Path, tmp_path: Path) -> None:
    found = tile("pathology", [pictures], tmp_path, overrides=["size=64", "mpp=0.5", "mpp_override=0.5"]).path
    half = RGB.model_copy(update={"spacing": (1.0, 1.0), "spacing_unit": "um"})
    embed(make_encoder(tmp_path / "right", half), found, tmp_path / "f.zarr", workers=0)
    wrong = half.model_copy(update={"spacing": (0.5, 0.5)})
    with pytest.raises(UsageError, match=r"spacing \(0\.5, 0\.5\) um against \(1\.0, 1\.0\) um"):
        embed(make_encoder(tmp_path / "wrong", wrong), found, tmp_path / "g.zarr", workers=0)


def test_what_cannot_be_read_is_recorded_beside_the_store(encoder: str, pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    found = tile("pathology", [folder], tmp_path, overrides=[f"size={SIZE}"]).path
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:3000])
    (folder / "4.png").unlink()
    done = embed(encoder, found, tmp_path, workers=1)
    assert (done.groups, done.windows) == (SLIDES - 2, (SLIDES - 2) * SIDE**2)
    with (tmp_path / "features.skipped.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [line["path"] for line in lines] == [str(folder / "2.png"), str(folder / "4.png")]
    assert lines[0]["reason"].startswith("64 of 64 windows of '2.png' left out: ")
    assert "features.skipped.csv" in done.skipped
    # The index's own log is another file. A second run repeats no line, and takes out those of what is there now.
    shutil.copy(pictures / "4.png", folder / "4.png")
    again = embed(encoder, found, tmp_path, workers=0)
    assert again.groups == SLIDES - 1
    with (tmp_path / "features.skipped.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == lines[:1]
    with pytest.raises(FmsuiteError, match=r"2\.png"):
        embed(encoder, found, tmp_path / "strict.zarr", workers=0, strict=True)
    shutil.copy(pictures / "2.png", folder / "2.png")
    assert embed(encoder, found, tmp_path, workers=0).skipped == ""
    assert not (tmp_path / "features.skipped.csv").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"index": "nowhere.parquet"}, "there is no such index"),
        ({"index": "labels.csv"}, r"labels\.csv: not an index"),
        ({"encoder": "nowhere"}, "There is no encoder 'nowhere'"),
        ({"batch_size": 0}, "A batch of 0 windows"),
        ({"pooling": "max"}, "There is no pooling 'max'"),
    ],
)
def test_wrong_use_is_refused_before_anything_is_made(
    options: dict, message: str, encoder: str, index: Path, tmp_path: Path
) -> None:
    given = {"encoder": encoder, "index": index, **options}
    with pytest.raises(UsageError, match=message):
        embed(out=tmp_path / "f.zarr", workers=0, **{**given, "index": Path(given["index"])})
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused(encoder: str, index: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--device is cuda and PyTorch sees no GPU"):
        embed(encoder, index, tmp_path / "f.zarr", device="cuda")


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Processes that have the slow imports behind them."""
    return forkserver()


def embed_in_child(*arguments: Any, **options: Any) -> None:
    """Its loader's processes are its own children, as those of a command are, and notice its death."""
    multiprocessing.set_start_method("fork", force=True)
    embed(*arguments, **options)


@pytest.mark.parametrize("workers", [0, 1])
def test_killed_three_times_it_leaves_the_same_bytes(
    workers: int, encoder: str, index: Path, tmp_path: Path, until: Callable[..., None], processes
) -> None:
    options = {"batch_size": 5, "workers": workers, "device": "cpu"}
    path = tmp_path / "killed.zarr"

    def groups() -> int:
        return len([*path.glob("*.png")])

    def free() -> bool:
        try:
            WriterLock(path / ".lock", "").close()
        except UsageError:
            return False
        return True

    killed, killed_with = [], []
    # At the first sign of a store, while the first group is under way, and twice further on.
    for moment in (0, 2, 4):
        process = processes.Process(target=embed_in_child, args=(encoder, index, path), kwargs=options)
        process.start()
        until(lambda least=moment: path.exists() and groups() >= least)
        process.kill()
        # Its loader's worker lives on for some seconds, and must not keep the next run from writing.
        until(free)
        killed.append(process)
        killed_with.append(groups())
    assert killed_with[0] < killed_with[1] < killed_with[2] < SLIDES
    done = embed(encoder, index, path, workers=workers, device="cpu")
    assert (done.groups, done.windows) == (SLIDES, SLIDES * SIDE**2)
    embed(encoder, index, tmp_path / "whole.zarr", **options)
    assert content(path) == content(tmp_path / "whole.zarr")
    assert not (path / ".partial").exists()
    for process in killed:
        process.join()
        assert process.exitcode == -9


def test_a_second_process_is_told_so(
    encoder: str, index: Path, tmp_path: Path, until: Callable[..., None], processes
) -> None:
    path = tmp_path / "f.zarr"
    process = processes.Process(
        target=embed_in_child, args=(encoder, index, path), kwargs={"batch_size": 2, "workers": 0}
    )
    process.start()
    until(path.exists)
    with pytest.raises(UsageError, match=r"f\.zarr: another process is writing to it"):
        embed(encoder, index, path, workers=0)
    process.kill()
    process.join()


def test_windows_are_read_as_the_index_says(pictures: Path, index: Path) -> None:
    """What the other tests rely on: windows are cut from these images without resampling."""
    window = SampleIndex.read(index)[70]
    source = open_source(window.source)
    rgb, _ = read_region(source, window.position, window.extent, (SIZE, SIZE))
    top, left = map(int, window.position)
    with Image.open(window.source) as image:
        assert np.array_equal(rgb, np.asarray(image.convert("RGB"))[top : top + SIZE, left : left + SIZE])
    source.close()
