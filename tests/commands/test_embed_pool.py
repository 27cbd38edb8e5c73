"""``fmsuite embed`` over processes and Ray: the same bytes as in one process, whoever dies on the way."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Callable
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
from fmsuite.core.encoders import save_encoder
from fmsuite.core.features import FeatureStore
from fmsuite.core.inputs import InputSpec, rgb_channels
from fmsuite.domains.pathology.domain import PathologyDomain
from fmsuite.errors import UsageError
from tests.core.pool.deadly import Deadly

ROOT = Path(__file__).resolve().parents[2]
SIZE = 32
SIDES = (8, 3, 6, 2, 7, 5, 8, 1, 4, 3)
"""Windows along each side of ten images; with batches of 16, the smallest share batches."""
RGB = InputSpec(axes=("y", "x"), size=(SIZE, SIZE), channels=rgb_channels(), scale=1 / 255)
CORRUPT = "4.png"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    config = ModelConfig(name="vit_tiny", width=32, depth=1, heads=2, patch_size=8)
    save_encoder(folder, VisionTransformer(config, RGB), RGB, "cls", {"run": folder.name})
    return str(folder)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images, one of which is damaged after it was tiled."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, side in enumerate(SIDES):
        noise = np.random.default_rng(number).integers(0, 256, (side * SIZE, side * SIZE, 3)).astype(np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png", compress_level=1)
    found = tile("pathology", [folder], tmp_path_factory.mktemp("index"), overrides=[f"size={SIZE}"]).path
    (folder / CORRUPT).write_bytes((folder / CORRUPT).read_bytes()[:3000])
    return found


def content(path: Path) -> dict[str, tuple[bytes, ...]]:
    store = FeatureStore.open(path)
    groups = (store[id] for id in store.stored())
    return {
        group.id: tuple(a.tobytes() for a in (group.rows, group.features, group.position, group.extent))
        for group in groups
    }


def lines(path: Path) -> list[tuple[str, str, str]]:
    with path.with_name(f"{path.stem}.skipped.csv").open(newline="", encoding="utf-8") as file:
        return [tuple(line.values()) for line in csv.DictReader(file)]


@pytest.fixture(scope="module")
def alone(encoder: str, index: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process stores."""
    path = tmp_path_factory.mktemp("alone") / "f.zarr"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    embed(encoder, index, path, batch_size=16, workers=0, device="cpu")
    torch.set_num_threads(threads)
    assert len(content(path)) == len(SIDES) - 1
    return path


@pytest.fixture
def deadly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    """``deadly("6.png")`` makes reading that image kill the process that reads it, once or always."""

    def kill(source: str, always: bool = False) -> Path:
        own, mark = PathologyDomain.reader, tmp_path / "killed"
        monkeypatch.setattr(PathologyDomain, "reader", lambda *given: Deadly(own(*given), source, mark, always))
        return mark

    return kill


@pytest.mark.parametrize("workers", [0, 1])
def test_processes_store_the_same_bytes(
    workers: int, encoder: str, index: Path, alone: Path, deadly: Callable, tmp_path: Path
) -> None:
    """One image is corrupt, and another kills its worker, or its worker's loader, once."""
    mark = deadly("6.png")
    done = embed(encoder, index, tmp_path / "f.zarr", batch_size=16, workers=workers, device="cpu", processes=2)
    assert mark.exists()
    assert done.groups == len(SIDES) - 1
    assert content(done.path) == content(alone)
    assert lines(done.path) == lines(alone)
    ((source, _, reason),) = lines(done.path)
    assert source.endswith(CORRUPT)
    assert reason.startswith("49 of 49 windows of '4.png' left out")


@pytest.mark.parametrize("control", ["histogram", "untrained:"])
def test_a_control_is_the_same_everywhere(control: str, encoder: str, index: Path, tmp_path: Path) -> None:
    paths = [tmp_path / f"{processes}.zarr" for processes in (0, 1)]
    for processes, path in enumerate(paths):
        what = control + encoder if control.endswith(":") else control
        embed(what, index, path, workers=0, device="cpu", processes=processes)
    assert content(paths[0])
    assert content(paths[0]) == content(paths[1])


def test_what_kills_every_worker_costs_only_itself(
    encoder: str, index: Path, alone: Path, deadly: Callable, tmp_path: Path
) -> None:
    deadly("6.png", always=True)
    path = tmp_path / "f.zarr"
    done = embed(encoder, index, path, batch_size=16, workers=0, device="cpu", processes=2)
    expected = content(alone)
    del expected["6.png"]
    assert content(path) == expected
    assert done.groups == len(SIDES) - 2
    killed = next(line for line in lines(path) if line[1] == "worker")
    assert killed[0].endswith("6.png")
    assert killed[2].startswith("64 of 64 windows of '6.png' left out: 3 workers died of it: killed by SIGKILL")
    assert len(lines(path)) == 2


def test_a_ray_cluster_stores_the_same_bytes(
    encoder: str, index: Path, alone: Path, deadly: Callable, tmp_path: Path, cluster: str
) -> None:
    """Two workers; one image is corrupt, and another kills its worker once."""
    mark = deadly("6.png")
    done = embed(encoder, index, tmp_path / "f.zarr", batch_size=16, workers=0, device="cpu", ray=cluster)
    assert mark.exists()
    assert done.groups == len(SIDES) - 1
    assert content(done.path) == content(alone)
    assert lines(done.path) == lines(alone)


def test_killed_it_goes_on_with_what_is_missing(
    encoder: str, index: Path, alone: Path, tmp_path: Path, until: Callable[..., None]
) -> None:
    """The whole command, killed as the machine would; its workers end with it."""
    path = tmp_path / "f.zarr"
    command = [sys.executable, "-m", "fmsuite", "embed", "-e", encoder, "--index", str(index), "--out", str(path)]
    command += ["--batch-size", "16", "--workers", "1", "--device", "cpu", "--processes", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    with subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL) as process:
        until(lambda: len([*path.glob("*.png")]) >= 2)
        process.kill()
    until(lambda: not in_session(process.pid))
    done = content(path)
    assert 2 <= len(done) < len(SIDES) - 1
    before = {id: (path / id).stat().st_mtime_ns for id in done}
    embed(encoder, index, path, workers=1, device="cpu", processes=2)
    assert {id: (path / id).stat().st_mtime_ns for id in done} == before
    assert content(path) == content(alone)


def in_session(session: int) -> bool:
    """Whether a process is left."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, number = stat.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(number) == session and state != "Z":
            return True
    return False


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"processes": -1}, "--processes -1"),
        ({"gpus": 0}, "--gpus 0"),
        ({"gpus": 2, "processes": 2}, "--gpus says how many processes"),
        ({"gpus": 2, "device": "cpu"}, "nor --device cpu"),
        ({"ray_cpus": 2.0}, "--ray-cpus is for workers of a Ray cluster"),
        ({"ray": "auto", "ray_cpus": 0.0}, "--ray-cpus 0"),
        ({"ray": "ray://127.0.0.1:1", "device": "cpu"}, "not an address of a cluster"),
        ({"ray": "127.0.0.1:1", "device": "cpu"}, "nothing answers there"),
    ],
)
def test_wrong_use_is_refused(options: dict[str, Any], message: str, encoder: str, index: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        embed(encoder, index, tmp_path / "f.zarr", **options)


def test_without_ray_it_is_said_how_to_get_it(
    encoder: str, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install 'fmsuite\[ray\]'"):
        embed(encoder, index, tmp_path / "f.zarr", device="cpu", ray="auto")


@pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a GPU")
def test_every_process_has_a_gpu_of_its_own(encoder: str, index: Path, alone: Path, tmp_path: Path) -> None:
    count = torch.cuda.device_count()
    with pytest.raises(UsageError, match="each with a GPU of its own"):
        embed(encoder, index, tmp_path / "f.zarr", gpus=count + 1)
    done = embed(encoder, index, tmp_path / "f.zarr", batch_size=16, gpus=count)
    found, expected = FeatureStore.open(done.path).read_all()[0], FeatureStore.open(alone).read_all()[0]
    assert torch.nn.functional.cosine_similarity(found, expected).min() > 0.99
