"""``training.windows=random``: repeated bit for bit, resumed bit for bit, and refused where it cannot be."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from fmsuite.core.data.index import SampleIndex
from fmsuite.core.data.sampling import RandomWindows
from fmsuite.domains.medical import MedicalDomain, MedicalOptions
from fmsuite.domains.medical.windows import to_own, to_resampled

RANDOM = {"training.windows": "random", "monitor.every": 0, "training.keep_checkpoints": 9}


def test_a_run_on_random_windows_goes_on_bit_for_bit(
    fmsuite, tiles: Path, tile_settings: Callable, facts_of: Callable, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = tile_settings("mae", RANDOM)
    assert fmsuite("pretrain", *settings, "--data", tiles, "--out", run).code == 0
    expected = facts_of(run)
    for late in ("step-00000004", "step-00000006"):
        shutil.rmtree(run / "checkpoints" / late)
    (run / "encoder.safetensors").unlink()
    ran = fmsuite("pretrain", "--domain", "pathology", "--out", run, "--resume")
    assert ran.code == 0, ran.text
    assert "Resuming after step 2 of 6" in ran.text
    found = facts_of(run)
    assert found.losses == expected.losses
    assert all(torch.equal(found.weights[name], weight) for name, weight in expected.weights.items())
    ran = fmsuite("pretrain", "--domain", "pathology", "--out", run, "--resume", "--set", "training.windows=fixed")
    assert ran.code == 2
    assert "training.windows (was 'random', is 'fixed')" in ran.text


def test_random_windows_are_refused_where_windows_cannot_move(
    fmsuite, tiles: Path, tile_settings: Callable, settings: Callable, tmp_path: Path
) -> None:
    ran = fmsuite("tile", "--domain", "pathology", tiles, "--out", tmp_path / "index", "--set", "size=32")
    assert ran.code == 0, ran.text
    packed = tmp_path / "packed"
    assert fmsuite("pack", "--index", tmp_path / "index" / "index.parquet", "--out", packed).code == 0
    ran = fmsuite(
        "pretrain", *tile_settings("mae", RANDOM), "--data", packed / "index.parquet", "--out", tmp_path / "run"
    )
    assert ran.code == 2
    assert "PackedReader reads those of the index only (training.windows=random)" in ran.text
    whole = SampleIndex.read(tmp_path / "index" / "index.parquet")
    sides = pa.array(["train", "test"] * (len(whole) // 2)).dictionary_encode()
    table = whole.table.set_column(whole.table.column_names.index("split"), "split", sides)
    SampleIndex(table, whole.metadata).write(tmp_path / "mixed.parquet")
    ran = fmsuite(
        "pretrain", *tile_settings("mae", RANDOM), "--data", tmp_path / "mixed.parquet", "--out", tmp_path / "r"
    )
    assert ran.code == 2
    assert "6 sources, such as " in ran.text
    assert "have windows in other splits than 'train', too" in ran.text
    drawings = tmp_path / "drawings"
    drawings.mkdir()
    for number in range(4):
        (drawings / f"{number}.svg").write_text(
            f'<svg xmlns="http://www.w3.org/2000/svg" width="32" height="32"><circle cx="16" cy="16" r="{4 + number}"/>'
            "</svg>",
            encoding="utf-8",
        )
    arguments = ["--domain", "svg", *settings("mae", {**RANDOM, "model.input_size": 32}), "--data", drawings]
    ran = fmsuite("pretrain", *arguments, "--out", tmp_path / "run")
    assert ran.code == 2
    assert "SvgReader reads those of the index only" in ran.text


def test_places_in_a_resampled_volume_are_whole_resampled_voxels_inside_it(tmp_path: Path) -> None:
    """Also where voxels are thicker along one axis, and for windows that are longer than the volume."""
    import nibabel

    from fmsuite.commands.indexing import build_index
    from fmsuite.core.data.skipped import SkippedLog

    random = np.random.default_rng(0)
    for number, voxels in enumerate([(1.0, 1.0, 3.1), (0.83, 1.0, 0.7)]):
        values = (100 + random.normal(0, 9, (22, 25, 9 + 20 * number))).astype(np.float32)
        image = nibabel.Nifti1Image(values, np.diag([*voxels, 1.0]))
        image.set_sform(image.affine, code=1)
        nibabel.save(image, tmp_path / f"{number}.nii")
    domain = MedicalDomain(MedicalOptions(size=(12, 10, 30), stride=(7, 9, 30), spacing=1.1, min_foreground=0))
    index = build_index(domain, [tmp_path], SkippedLog())
    reader, sampler, stream = domain.reader(index), RandomWindows(index, (12, 10, 30)), np.random.default_rng(3)
    seen, size = set(), np.array([12, 10, 30])
    for row in [*range(len(index))] * 4:
        window = sampler(index[row], row, stream)
        volume = reader.volume(window.source)
        ratio = np.array(volume.ratio)
        start = to_resampled(np.array(window.position), ratio)
        np.testing.assert_allclose(to_own(start, ratio), window.position, atol=1e-9)
        room = np.array(volume.shape) - size
        assert ((start >= np.minimum(0, room)) & (start <= np.maximum(room, 0))).all()
        sample = reader.read(window)
        low, high = np.maximum(start, 0), np.minimum(start + size, volume.shape)
        inside = tuple(slice(a, b) for a, b in zip(low - start, high - start, strict=True))
        whole = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        np.testing.assert_array_equal(sample.values[:, *inside], volume.values[:, *whole])
        seen.add((window.source, *start.tolist()))
    assert len(seen) > 12
