"""``fmsuite export``: a file that timm loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch

from fmsuite.core.encoders import load_encoder


@pytest.fixture(scope="module")
def run(launcher, tiles, tile_settings, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "run"
    changes = {"training.steps": 4, "model.depth": 2, "monitor.every": 0}
    ran = launcher.start("pretrain", *tile_settings("mae", changes), "--data", tiles, "--out", folder).wait()
    assert ran.code == 0, ran.text
    return folder


def test_timm_computes_the_same_features_from_an_exported_run(fmsuite, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "encoder.safetensors"
    ran = fmsuite("export", run, "--out", out)
    assert ran.code == 0, ran.text
    assert f"Written: {out}" in ran.text
    described = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))["timm"]
    model = timm.create_model(described["name"], **described["arguments"], checkpoint_path=str(out)).eval()
    encoder = load_encoder(run)
    raw = torch.randint(0, 256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    data = described["data"]
    mean, std = (torch.tensor(data[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        tokens = model.forward_features((raw / 255 - mean) / std)
    expected = encoder.features(raw)
    assert torch.allclose(tokens[:, 0], expected.cls, atol=1e-5)
    assert torch.allclose(tokens[:, 1:], expected.patches, atol=1e-5)
    assert expected.patches.std() > 0.1
    assert torch.allclose(load_encoder(out).embed(raw), encoder.embed(raw), atol=1e-5)


def test_volumes_have_no_place_in_timm(fmsuite, settings, tmp_path: Path) -> None:
    import nibabel
    import numpy as np

    values = np.random.default_rng(0).random((16, 16, 16)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "volume.nii.gz")
    changes = {"data.size": 16, "model.width": 48, "training.steps": 1, "monitor.every": 0, "training.batch_size": 2}
    arguments = ["--data", tmp_path / "volume.nii.gz", "--out", tmp_path / "run"]
    ran = fmsuite("pretrain", "--domain", "medical", *settings("mae", changes), *arguments)
    assert ran.code == 0, ran.text
    ran = fmsuite("export", tmp_path / "run", "--out", tmp_path / "encoder.safetensors")
    assert ran.code == 2
    assert "not (z, y, x)" in ran.text
    assert not (tmp_path / "encoder.safetensors").exists()


@pytest.mark.parametrize(
    ("what", "out", "sentence"),
    [
        ("RUN", "encoder.pt", "an exported encoder is a .safetensors file"),
        ("nowhere", "encoder.safetensors", "nowhere"),
        (".", "encoder.safetensors", "holds no encoder.safetensors"),
        ("timm:resnet_of_nothing", "encoder.safetensors", "resnet_of_nothing"),
    ],
)
def test_what_cannot_be_exported_is_wrong_use(
    fmsuite, run: Path, tmp_path: Path, monkeypatch, what: str, out: str, sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = fmsuite("export", run if what == "RUN" else what, "--out", out)
    assert ran.code == 2, ran.text
    assert sentence in ran.text
    assert not (tmp_path / out).exists()


def test_a_damaged_encoder_is_refused_by_name(fmsuite, run: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes((run / "encoder.safetensors").read_bytes()[:500])
    ran = fmsuite("export", path, "--out", tmp_path / "out.safetensors")
    assert ran.code == 1
    assert str(path) in ran.text
