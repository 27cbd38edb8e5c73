"""Encoders carry how files were read: they read them so, commands follow, and what contradicts them is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

from fmsuite import cli
from fmsuite.commands.bench import bench
from fmsuite.commands.contenders import contenders
from fmsuite.commands.embed import embed
from fmsuite.commands.indexing import build_index
from fmsuite.commands.setup import domain_options
from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.backbones.vit import VisionTransformer
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.encoders import Encoder, load_encoder, save_encoder
from fmsuite.core.features import FeatureStore
from fmsuite.core.inputs import Reading
from fmsuite.domains.medical import MedicalDomain, MedicalOptions
from fmsuite.errors import ReadFailure, UsageError

from .dicom_files import write_series

MODEL = ModelConfig(name="vit_tiny", width=24, depth=1, heads=2, patch_size=4)
OPTIONS = {
    "mr": {"size": 8, "spacing": (2.0, 1.0, 1.5)},
    "ct": {"size": 8, "spacing": 2.0, "hu_window": (-200.0, 300.0)},
    "xray": {"image_size": 16},
}


def write_nifti(path: Path, values: np.ndarray) -> Path:
    image = nibabel.Nifti1Image(values.astype(np.float32), np.diag([1.0, 1.0, 1.0, 1.0]))
    image.set_sform(image.affine, code=1)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, random = tmp_path_factory.mktemp("scans"), np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in (18, 16, 14)), indexing="ij"), -1)
    inside = ((grid - [9, 8, 7]) ** 2).sum(-1) < 49
    waves = 20 * np.sin(grid @ [0.5, 0.7, 0.9])
    Image.fromarray(random.integers(0, 255, (40, 24)).astype(np.uint8)).save(root / "xray.png")
    return {
        "mr": write_nifti(root / "mr.nii", np.where(inside, 150 + waves, 0)),
        "ct": write_nifti(root / "ct.nii", np.where(inside, 40 + waves, -1000)),
        "xray": root / "xray.png",
    }


@pytest.fixture(scope="module")
def runs(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Saved encoders, each with its index, as a run folder has them."""
    folders = {}
    for modality, path in files.items():
        folder = folders[modality] = tmp_path_factory.mktemp(modality)
        domain = MedicalDomain(MedicalOptions(modality=modality, **OPTIONS[modality]))
        index = build_index(domain, [path], SkippedLog())
        index.write(folder / "index.parquet")
        torch.manual_seed(0)
        backbone = VisionTransformer(MODEL, domain.input_spec(index))
        save_encoder(folder, backbone, backbone.spec, "mean", {})
    return folders


@pytest.mark.parametrize("modality", OPTIONS)
def test_a_file_that_an_encoder_reads_has_the_features_that_embed_stores(modality, files, runs, tmp_path: Path) -> None:
    run = runs[modality]
    embed(str(run), run / "index.parquet", tmp_path / "store.zarr", by="source", workers=0, device="cpu")
    stored = FeatureStore.open(tmp_path / "store.zarr").read_all()[0]
    encoder = load_encoder(run)
    view = encoder.read(files[modality])
    assert len(view) == len(stored) >= (1 if modality == "xray" else 2)
    assert view.pixels.shape[1:] == (1, *encoder.spec.size)
    torch.testing.assert_close(encoder.embed(view), stored, rtol=1e-5, atol=1e-6)


def test_orientation_and_gain_of_a_file_make_no_difference_to_what_is_read(files, runs, tmp_path: Path) -> None:
    encoder, image = load_encoder(runs["mr"]), nibabel.load(files["mr"])
    other = nibabel.Nifti1Image(image.get_fdata() * 7 + 30, image.affine).as_reoriented(
        nibabel.orientations.axcodes2ornt("PSL")
    )
    other.set_sform(other.affine, code=1)
    nibabel.save(other, tmp_path / "other.nii")
    torch.testing.assert_close(
        encoder.read(tmp_path / "other.nii").pixels, encoder.read(files["mr"]).pixels, rtol=0, atol=1e-4
    )


def test_a_folder_is_read_if_it_is_one_series(files, runs, tmp_path: Path) -> None:
    encoder = load_encoder(runs["mr"])
    values = nibabel.load(files["mr"]).get_fdata()
    # Rows to posterior and columns to the left are RAS turned about, slice by slice.
    slices = np.ascontiguousarray(values[::-1, ::-1].transpose(2, 1, 0).round().astype(np.int16))
    write_series(tmp_path / "one", slices)
    whole = nibabel.Nifti1Image(np.rint(values), np.eye(4))
    whole.set_sform(np.eye(4), code=1)
    nibabel.save(whole, tmp_path / "same.nii")
    torch.testing.assert_close(encoder.read(tmp_path / "one").pixels, encoder.read(tmp_path / "same.nii").pixels)
    write_series(tmp_path / "one", slices, series="1.2.3.9", name="other{:03d}.dcm".format)
    with pytest.raises(ReadFailure, match="2 images"):
        encoder.read(tmp_path / "one")


def test_what_encoder_json_says_of_reading(runs) -> None:
    said = {name: json.loads((run / "encoder.json").read_text())["input"] for name, run in runs.items()}
    assert said["mr"]["reading"] == {
        "domain": "medical",
        "modality": "mr",
        "plan": "zscore",
        "percentiles": [0.5, 99.5],
        "foreground": True,
        "size": [8, 8, 8],
        "framing": None,
    }
    assert (said["mr"]["spacing"], said["mr"]["orientation"], said["mr"]["axes"]) == (
        [2.0, 1.0, 1.5],
        "RAS",
        ["z", "y", "x"],
    )
    assert said["ct"]["reading"]["plan"] == "window"
    assert said["ct"]["clip"] == [0.0, 1.0]
    assert said["xray"]["reading"]["plan"] == "minmax"


@pytest.mark.parametrize("modality", OPTIONS)
def test_options_that_nobody_set_are_the_encoders(modality, files, runs) -> None:
    encoder = load_encoder(runs[modality])
    options = domain_options("medical", [], None, [encoder])
    domain = MedicalDomain(options)  # type: ignore[arg-type]
    index = build_index(domain, [files[modality]], SkippedLog())
    assert contenders({"mine": encoder}, domain.input_spec(index), controls=False)[0].embedder is encoder


@pytest.mark.parametrize(
    ("modality", "override", "said"),
    [
        ("mr", "spacing=1.0", r"spacing \(2.0, 1.0, 1.5\) mm against \(1.0, 1.0, 1.0\) mm"),
        ("mr", "intensity=minmax", r"intensity zscore \(percentiles 0.5 and 99.5 of the foreground\) against minmax"),
        ("mr", "percentiles=[0, 100]", r"99.5 of the foreground\) against zscore \(percentiles 0 and 100 of"),
        ("ct", "hu_window=[-1000, 1000]", r"window -200 to 300 \(becoming 0 to 1\) against window -1000 to 1000"),
        ("xray", "framing=centre", "framing whole against centre"),
    ],
)
def test_a_contradiction_names_both_sides(modality, override, said, files, runs) -> None:
    encoder = load_encoder(runs[modality])
    domain = MedicalDomain(domain_options("medical", [override], None, [encoder]))  # type: ignore[arg-type]
    index = build_index(domain, [files[modality]], SkippedLog())
    with pytest.raises(UsageError, match=said):
        contenders({"mine": encoder}, domain.input_spec(index), controls=False)


def test_an_index_made_otherwise_is_refused_by_embed(files, runs, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refused:
        embed(str(runs["mr"]), runs["ct"] / "index.parquet", tmp_path / "s.zarr", workers=0, device="cpu")
    for words in ("modality mr against ct", "intensity zscore", "spacing (2.0, 1.0, 1.5) mm against (2.0, 2.0, 2.0)"):
        assert words in str(refused.value)


def test_an_encoder_from_before_there_were_plans_opens_and_says_that_it_cannot_read(runs, tmp_path: Path) -> None:
    encoder = load_encoder(runs["mr"])
    before = encoder.spec.model_copy(update={"reading": None})
    assert "reading" not in before.model_dump(mode="json")
    save_encoder(tmp_path, VisionTransformer(MODEL, before), before, "mean", {})
    assert "reading" not in json.loads((tmp_path / "encoder.json").read_text())["input"]
    old = load_encoder(tmp_path)
    old.check_input(encoder.spec)
    encoder.check_input(old.spec)
    with pytest.raises(UsageError, match="does not say how files are read"):
        old.read("scan.nii")


def test_files_that_cannot_be_read_and_domains_that_are_not_there(runs, files, tmp_path: Path) -> None:
    encoder = load_encoder(runs["mr"])
    (tmp_path / "cut.nii").write_bytes(files["mr"].read_bytes()[:2000])
    with pytest.raises(ReadFailure, match=r"cut\.nii"):
        encoder.read(tmp_path / "cut.nii")
    with pytest.raises(UsageError, match="no such file"):
        encoder.read(tmp_path / "gone.nii")
    reading = Reading(domain="nowhere", modality="mr", plan="minmax", size=(8, 8, 8))
    elsewhere = Encoder(encoder.backbone, encoder.spec.model_copy(update={"reading": reading}), "mean", {})
    with pytest.raises(UsageError, match="no domain 'nowhere'"):
        elsewhere.read(files["mr"])
    with pytest.raises(UsageError, match="'medical' do not say how its files are read"):
        super(MedicalDomain, MedicalDomain).options_like(encoder.spec)


def test_percentiles_belong_to_plans_that_use_them() -> None:
    for plan, percentiles in (("minmax", (0.5, 99.5)), ("zscore", None)):
        with pytest.raises(ValueError, match="do not go together"):
            Reading(domain="medical", modality="mr", plan=plan, percentiles=percentiles, size=(8, 8, 8))


def test_the_commands_on_x_rays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretrained by a published recipe made small, then judged on files that nobody says again how to read."""
    images, random = tmp_path / "images", np.random.default_rng(0)
    images.mkdir()
    rows = [("path", "label", "patient", "split")]
    for number in range(16):
        bright, name = number % 2, f"{number}.png"
        pixels = random.integers(0, 120, (20, 16)) + bright * np.linspace(0, 120, 16).astype(int)
        Image.fromarray(pixels.astype(np.uint8)).save(images / name)
        rows.append((name, ("even", "odd")[bright], f"p{number // 2}", "test" if number >= 12 else "train"))
    with (images / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    small = {
        "data.image_size": 16,
        "model.name": "vit_tiny",
        "model.width": 24,
        "model.depth": 1,
        "model.heads": 2,
        "model.patch_size": 4,
        "model.input_size": 16,
        "objective.decoder_width": 16,
        "objective.decoder_depth": 1,
        "objective.decoder_heads": 1,
        "training.steps": 2,
        "training.batch_size": 4,
        "training.workers": 0,
        "training.device": "cpu",
        "monitor.every": 0,
    }
    settings = [part for key, value in small.items() for part in ("--set", f"{key}={value}")]
    run = tmp_path / "run"
    command = ["pretrain", "--domain", "medical", "--data", images, "--recipe", "mae-thorax", "--out", run, *settings]
    monkeypatch.setattr("sys.argv", ["fmsuite", *map(str, command)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    encoder = load_encoder(run)
    assert encoder.spec.reading is not None
    assert encoder.spec.reading.size == (16, 16)
    compared = bench("medical", [str(run)], [images], tmp_path / "judged", tasks=["knn"], controls=False, workers=0)
    assert [len(e.episodes[0].predictions) for e in compared.results.evaluations] == [16]
    assert compared.results.evaluations[0].metrics["auroc"].mean is not None
