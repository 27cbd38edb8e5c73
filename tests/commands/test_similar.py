"""``fmsuite similar``: the map lies over the file, clicks are checked, features are kept."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fmsuite.commands.setup import resolve_run
from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.backbones.vit import VisionTransformer
from fmsuite.core.encoders import Encoder, save_encoder
from fmsuite.core.inputs import Channel, InputSpec

nibabel = pytest.importorskip("nibabel")
pytest.importorskip("monai")

AFFINE = np.array([[-1.0, 0, 0, 9], [0, 0, 2.0, -20], [0, -1.5, 0, 30], [0, 0, 0, 1]])
"""Left, inferior, anterior."""
BRIGHT, DARK = (5, 10, 6), (14, 4, 2)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A volume with a bright block, and an encoder of the domain with random weights."""
    folder = tmp_path_factory.mktemp("similar")
    stream = np.random.default_rng(0)
    values = stream.normal(100, 3, (20, 16, 12)).astype(np.float32)
    values[2:9, 7:14, 3:10] += 60
    image = nibabel.Nifti1Image(values, AFFINE)
    image.set_sform(AFFINE, code=1)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, folder / "scan.nii.gz")

    spec = InputSpec(
        axes=("z", "y", "x"),
        size=(8, 8, 8),
        channels=(Channel(name="mr"),),
        spacing=(1.5, 2.0, 1.0),
        spacing_unit="mm",
        orientation="RAS",
    )
    torch.manual_seed(0)
    config = ModelConfig(width=24, depth=1, heads=2, patch_size=2, positions="sincos")
    save_encoder(folder / "run", VisionTransformer(config, spec), spec, "mean", {})
    options = ["data.size=8", "data.spacing=[1.5,2.0,1.0]", "data.min_foreground=0", "data.margin=null"]
    run = resolve_run("medical", None, "mae", options)
    (folder / "run" / "config.yaml").write_text(run.to_yaml(), encoding="utf-8")
    return folder


def place(voxel: tuple[int, ...]) -> str:
    return ",".join(map(str, voxel))


def test_the_map_lies_over_the_file_and_is_highest_where_it_was_clicked(fmsuite, made, tmp_path) -> None:
    file, out = made / "scan.nii.gz", tmp_path / "new" / "sim.nii.gz"
    ran = fmsuite("similar", file, "--encoder", made / "run", "--at", place(BRIGHT), "--centre", "--out", out,
                  "--threshold", "auto")  # fmt: skip
    assert ran.code == 0, ran.text
    found, source = nibabel.load(out), nibabel.load(file)
    assert (found.affine == source.affine).all()
    assert found.shape == source.shape
    scores = np.asarray(found.dataobj)
    assert scores[BRIGHT] >= np.quantile(scores, 0.98)
    assert 0.7 < scores[BRIGHT] <= 1
    # The block is like itself, and what is around it is not.
    assert scores[4:7, 9:12, 5:8].mean() > scores[12:18, 2:6, 1:4].mean() + 0.3
    mask = np.asarray(nibabel.load(tmp_path / "new" / "sim-mask.nii.gz").dataobj)
    threshold = float(ran.text.partition("At ")[2].split()[0])
    assert mask[BRIGHT] == 1
    assert 0 < mask.mean() < 0.6
    assert (mask == (scores >= threshold)).mean() > 0.99
    picture = Image.open(tmp_path / "new" / "sim.png")
    assert picture.width > 600


def test_kept_features_give_the_same_map_without_the_encoder_and_world_is_the_affine(
    fmsuite, made, tmp_path, monkeypatch
) -> None:
    file, kept = made / "scan.nii.gz", tmp_path / "features.zarr"
    shared = ("similar", file, "--encoder", made / "run", "--features", kept, "--negative", place(DARK))
    ran = fmsuite(*shared, "--at", place(BRIGHT), "--out", tmp_path / "one")
    assert ran.code == 0, ran.text

    def never(self, *arguments):
        raise AssertionError("the encoder was asked")

    monkeypatch.setattr(Encoder, "features", never)
    world = (AFFINE @ [*BRIGHT, 1])[:3]
    # DARK would be another place in millimetres: it is given as such too.
    dark = (AFFINE @ [*DARK, 1])[:3]
    again = ("similar", file, "--encoder", made / "run", "--features", kept)
    ran = fmsuite(*again, "--negative", place(dark), "--at", place(world), "--world", "--out", tmp_path / "two.nii.gz")
    assert ran.code == 0, ran.text
    one, two = (np.asarray(nibabel.load(tmp_path / f"{name}.nii.gz").dataobj) for name in ("one", "two"))
    assert (one == two).all()

    other = tmp_path / "scan.nii.gz"
    shutil.copy(file, other)
    ran = fmsuite("similar", other, "--encoder", made / "run", "--features", kept, "--at", place(BRIGHT), "--out",
                  tmp_path / "three")  # fmt: skip
    assert ran.code == 2
    assert "features of something else: file" in ran.text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--at", "5,10,12"), "samples go from 0 to 19, 0 to 15, 0 to 11"),
        (("--at", "500,0,0", "--world"), "outside of the file"),
        (("--at", "5,10"), "3 axes"),
        (("--at", "5,10,x"), "is no place"),
        (("--at", "5,10,6.5"), "which are whole"),
        (("--at", "5,10,6", "--threshold", "high"), "neither a number nor 'auto'"),
        (("--at", "5,10,6", "--features", "kept"), "not the name of a Zarr folder"),
        (("--at", "5,10,6", "--overlap", "1"), "overlap of 1.0 is out of range"),
        (("--at", "5,10,6", "--domain", "svg"), "is of the domain 'medical'"),
    ],
)
def test_what_cannot_be_is_refused(fmsuite, made, tmp_path, options, said) -> None:
    ran = fmsuite("similar", made / "scan.nii.gz", "--encoder", made / "run", "--out", tmp_path / "a", *options)
    assert ran.code == 2
    assert said in ran.text
    assert list(tmp_path.iterdir()) == []


def test_an_encoder_without_a_run_needs_to_know_the_field(fmsuite, made, tmp_path) -> None:
    weights = tmp_path / "alone"
    weights.mkdir()
    for name in ("encoder.safetensors", "encoder.json"):
        shutil.copy(made / "run" / name, weights)
    asked = ("similar", made / "scan.nii.gz", "--encoder", weights, "--at", place(BRIGHT), "--out", tmp_path / "a")
    ran = fmsuite(*asked)
    assert ran.code == 2
    assert "Name its field with --domain" in ran.text
    options = ["data.size=8", "data.spacing=[1.5,2.0,1.0]", "data.min_foreground=0", "data.margin=null"]
    ran = fmsuite(*asked, "--domain", "medical", *(part for option in options for part in ("--set", option)))
    assert ran.code == 0, ran.text
    ran = fmsuite(*asked, "--domain", "medical", "--set", "data.spacing=3", "--set", "data.size=8")
    assert ran.code == 2
    assert "spacing" in ran.text
