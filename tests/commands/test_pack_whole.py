"""``fmsuite pack --whole`` of volumes: training, features and scenes as from the files, bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fmsuite.commands.pack import pack
from fmsuite.commands.setup import domain_options, open_domain, open_index
from fmsuite.commands.tile import tile
from fmsuite.core.data.index import SampleIndex
from fmsuite.core.data.packed import open_reader
from fmsuite.core.data.packed_scenes import PackedScene, open_scene
from fmsuite.core.data.sampling import RandomWindows
from fmsuite.core.data.skipped import SkippedLog

nibabel = pytest.importorskip("nibabel")


def save(path: Path, values: np.ndarray, voxels: tuple[float, ...]) -> None:
    # To the patient's left and back: the file's axes are not those of the input.
    image = nibabel.Nifti1Image(values, np.diag([-voxels[0], -voxels[1], voxels[2], 1.0]))
    image.set_sform(image.affine, code=1)
    image.header.set_xyzt_units("mm")
    path.parent.mkdir(exist_ok=True)
    nibabel.save(image, path)


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Three volumes with label maps, and their index: thick slices, one shorter than a window, one with lost voxels."""
    folder = tmp_path_factory.mktemp("volumes")
    for number, (shape, voxels) in enumerate(
        [((30, 26, 13), (1.0, 1.0, 2.3)), ((11, 24, 22), (1.0, 1.2, 1.0)), ((36, 33, 31), (0.9, 0.9, 0.9))]
    ):
        grid = np.indices(shape)
        values = 100 + 40 * np.sin(grid.sum(0) / (3 + number)) + grid[0]
        values[:3] = 0
        values[shape[0] // 2, 5:9, 5:9] = np.nan if number == 2 else 90
        save(folder / "images" / f"{number}.nii.gz", values.astype(np.float32), voxels)
        save(folder / "labels" / f"{number}.nii.gz", (grid.sum(0) // 9 % 4).astype(np.uint8), voxels)
    maps = f"maps={json.dumps({'organs': str(folder / 'labels')})}"
    options = ["size=16", "stride=12", "min_foreground=0.3", maps]
    return folder / "images", tile("medical", [folder / "images"], folder / "index", overrides=options).path


@pytest.fixture(scope="module")
def copied(volumes: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The index of the copy, which has been moved since it was made."""
    folder = tmp_path_factory.mktemp("copy")
    result = pack(volumes[1], folder / "made", whole=True)
    assert result.shards == (3, 3)
    assert result.index.hash == SampleIndex.read(volumes[1]).hash
    shutil.move(folder / "made", folder / "moved")
    return folder / "moved" / "index.parquet"


def opened(path: Path):
    return open_index(open_domain("medical", domain_options("medical", [])), [path], SkippedLog())


def test_windows_at_any_place_are_those_of_the_files(volumes: tuple[Path, Path], copied: Path) -> None:
    domain, index = opened(volumes[1])
    _, packed = opened(copied)
    ours, theirs = open_reader(domain, packed), open_reader(domain, index)
    sampler, stream = RandomWindows(index, (16, 16, 16)), np.random.default_rng(0)
    moved = [sampler(index[row], row, stream) for row in [*range(len(index))] * 3]
    invalid = set()
    for window in [*(index[row] for row in range(len(index))), *moved]:
        found, expected = ours.read(window), theirs.read(window)
        assert found.spacing == expected.spacing
        np.testing.assert_array_equal(found.values, expected.values)
        np.testing.assert_array_equal(found.maps["organs"], expected.maps["organs"])
        assert found.values.dtype == expected.values.dtype
        assert found.maps["organs"].dtype == expected.maps["organs"].dtype
        assert (found.valid is None) == (expected.valid is None)
        if expected.valid is not None:
            np.testing.assert_array_equal(found.valid, expected.valid)
            invalid.add(Path(window.source).name)
    assert invalid == {"1.nii.gz", "2.nii.gz"}


def test_scenes_are_those_of_the_files(volumes: tuple[Path, Path], copied: Path) -> None:
    domain, index = opened(volumes[1])
    _, packed = opened(copied)
    for source in index.sources:
        scene, plain = open_scene(domain, packed, source), domain.scene(index, source)
        assert isinstance(scene, PackedScene)
        assert (scene.size, scene.native_size) == (plain.size, plain.native_size)
        np.testing.assert_allclose(scene.place(np.zeros(3)), plain.place(np.zeros(3)))
        found, expected = (each.read((0, 0, 0), plain.size) for each in (scene, plain))
        np.testing.assert_array_equal(found.values, expected.values)
        np.testing.assert_array_equal(found.maps["organs"], expected.maps["organs"])
    scores = np.random.default_rng(0).random((3, *plain.size)).astype(np.float32)
    np.testing.assert_array_equal(scene.labels_to_native(scores), plain.labels_to_native(scores))


def test_a_run_on_random_windows_of_the_copy_is_the_run_on_the_files(
    fmsuite, volumes: tuple[Path, Path], copied: Path, settings: Callable, facts_of: Callable, tmp_path: Path
) -> None:
    changes = {"training.steps": 3, "training.windows": "random", "model.input_size": 16, "monitor.every": 0}
    arguments = ["--domain", "medical", *settings("mae", changes)]
    for name, data in (("files", volumes[1]), ("copy", copied)):
        ran = fmsuite("pretrain", *arguments, "--data", data, "--out", tmp_path / name)
        assert ran.code == 0, ran.text
    ours, theirs = facts_of(tmp_path / "copy"), facts_of(tmp_path / "files")
    assert ours.losses == theirs.losses
    assert len(ours.losses) == 3
    assert all(np.array_equal(ours.weights[name], weight) for name, weight in theirs.weights.items())


def test_the_command_says_what_it_did_what_is_damaged_and_what_it_refuses(
    fmsuite, volumes: tuple[Path, Path], tiles: Path, tmp_path: Path
) -> None:
    files = tmp_path / "files"
    shutil.copytree(volumes[0], files)
    out = tmp_path / "out"
    index = tile("medical", [files], tmp_path / "index", overrides=["size=16"]).path
    whole = (files / "1.nii.gz").read_bytes()
    (files / "1.nii.gz").write_bytes(whole[: len(whole) // 2])
    ran = fmsuite("pack", "--whole", "--index", index, "--out", out)
    assert ran.code == 3, ran.text
    assert "2 whole sources in 3 shards, 3 of them written now" in ran.text
    assert "1.nii.gz" in (out / "skipped.csv").read_text()
    assert "as they were written" in fmsuite("pack", "--verify", "--out", out).text
    shard = next(
        path for path in sorted((out / "sources" / "2" / "values").rglob("*")) if path.name == "0" and path.is_file()
    )
    data = bytearray(shard.read_bytes())
    data[100] ^= 255
    shard.write_bytes(data)
    ran = fmsuite("pack", "--verify", "--out", out)
    assert ran.code == 1
    assert f"{shard}: its content has changed" in ran.text
    shard.unlink()
    ran = fmsuite("pack", "--whole", "--index", index, "--out", out)
    assert "2 whole sources in 3 shards, 1 of them written now" in ran.text
    assert fmsuite("pack", "--verify", "--out", out).code == 0

    tissue = tile("pathology", [tiles], tmp_path / "tissue", overrides=["size=32"]).path
    for arguments, reason in (
        (["--index", index, "--out", out], "a packed copy of whole sources is in this folder"),
        (["--whole", "--index", volumes[1], "--out", out], "packed copy of another index"),
        (["--whole", "--index", index, "--out", tmp_path / "x", "--shard-windows", 9], "Leave out --shard-windows"),
        (["--whole", "--half", "--index", index, "--out", out], "its values are kept in full precision"),
        (["--half", "--index", index, "--out", tmp_path / "x"], "--half is for whole sources"),
        (["--whole", "--verify", "--out", out], "Leave out the other options"),
        (["--whole", "--index", tissue, "--out", tmp_path / "y"], "SlideReader reads windows of one size only"),
    ):
        ran = fmsuite("pack", *arguments)
        assert ran.code == 2, ran.text
        assert reason in ran.text
