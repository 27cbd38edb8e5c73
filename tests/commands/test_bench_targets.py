"""``bench`` on columns of a labels file: X-rays by patient through the command line, volumes by their windows' mean."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fmsuite.commands.bench_targets import bench_targets, parse_targets
from fmsuite.commands.setup import open_index
from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.backbones.vit import VisionTransformer
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.encoders import save_encoder
from fmsuite.core.evaluation.results import Evaluation, Results
from fmsuite.core.features import FeatureStore
from fmsuite.core.inputs import InputSpec
from fmsuite.domains.base import load_domain
from fmsuite.errors import UsageError
from tests.commands.conftest import Ran

nibabel = pytest.importorskip("nibabel")
pytest.importorskip("monai")

PATIENTS = 30
XRAY = {"modality": "xray", "image_size": 16}
VOLUME = {"size": 8, "spacing": None, "min_foreground": 0.0, "margin": None}
COLUMNS = ("sex", "age", "findings")


def patients() -> list[dict]:
    """Sex and age of each, and findings, which every seventh has no word on."""
    random = np.random.default_rng(0)
    found = []
    for number in range(PATIENTS):
        there = [name for name, share in (("Effusion", 0.5), ("Nodule", 0.3)) if random.random() < share]
        findings = "" if number % 7 == 5 else "|".join(there) or "No Finding"
        found.append(
            {
                "id": f"p{number:02d}",
                "sex": "FM"[number % 2],
                "age": round(random.uniform(20, 80)),
                "findings": findings,
            }
        )
    return found


def write(folder: Path, save: Callable[[Path, dict, np.random.Generator], None], suffix: str, each: int) -> Path:
    folder.mkdir()
    random = np.random.default_rng(1)
    rows = [["path", "patient", *COLUMNS]]
    for patient in patients():
        for number in range(each):
            name = f"{patient['id']}_{number}{suffix}"
            save(folder / name, patient, random)
            rows.append([name, patient["id"], patient["sex"], f"{patient['age']:03d}Y", patient["findings"]])
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return folder


def film(path: Path, patient: dict, random: np.random.Generator) -> None:
    """A bright half tells the sex, stripes as many as the age, a spot the effusion."""
    pixels = random.normal(90, 4, (16, 16))
    pixels[:8] += 60 * (patient["sex"] == "M")
    pixels[:, ::2] += 0.8 * patient["age"]
    pixels[10:14, 10:14] -= 70 * ("Effusion" in patient["findings"])
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path)


def volume(path: Path, patient: dict, random: np.random.Generator) -> None:
    """The age is the difference of its upper and its lower half, which single windows do not show."""
    values = random.normal(100, 2, (8, 8, 16)).astype(np.float32)
    values[
        ...,
        8:,
    ] += 2 * patient["age"] * (np.indices((8, 8, 8))[0] % 2)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)


def encoder(folder: Path, spec: InputSpec, patch: int) -> str:
    torch.manual_seed(0)
    config = ModelConfig(width=24, depth=1, heads=2, patch_size=patch)
    save_encoder(folder, VisionTransformer(config, spec), spec, "cls+mean", {})
    return str(folder)


def spec_of(data: Path, options: dict, size: tuple[int, ...]) -> InputSpec:
    plugin = load_domain("medical")
    plugin, index = open_index(plugin(plugin.Options(**options)), [data], SkippedLog())
    return plugin.input_spec(index).resized(size)


def find(results: Results, name: str, method: str, fraction: float | None = None) -> Evaluation:
    (found,) = (
        e
        for e in results.evaluations
        if (e.encoder, e.method, e.fraction, e.shots, e.shuffled) == (name, method, fraction, None, False)
    )
    return found


def test_sex_age_and_findings_of_xrays_by_patient(fmsuite: Callable[..., Ran], tmp_path: Path) -> None:
    data = write(tmp_path / "films", film, ".png", 2)
    net = encoder(tmp_path / "net", spec_of(data, XRAY, (16, 16)), 4)
    settings = [part for key, value in XRAY.items() for part in ("--set", f"data.{key}={value}")]
    asked = ["--classify", "sex", "--regress", "age", "--findings", "findings", "--by", "group"]
    few = ["--fractions", "10%,50%,100%", "--shots", "1,4", "--episodes", "4", "--task", "all"]
    out = tmp_path / "out"
    command = ["bench", "--domain", "medical", "-e", net, "--data", data, "--out", out, "--workers", 0]
    ran = fmsuite(*command, *settings, *asked, *few)
    assert ran.code == 0, ran.text

    sex, age, findings = (Results.read(out / name) for name in COLUMNS)
    assert [found.target for found in (sex, age, findings)] == ["classes", "number", "findings"]
    assert len(FeatureStore.open(out / "features" / "net.zarr").index) == 2 * PATIENTS
    assert not (out / "results.json").exists()
    for results, count in ((sex, PATIENTS), (age, PATIENTS), (findings, PATIENTS - 4)):
        assert (results.unit, len(results.items)) == ("patient", count)
        assert {item.windows for item in results.items} == {2}
    known = {patient["id"]: patient for patient in patients()}
    assert all(item.value == known[item.id]["age"] for item in age.items)
    assert all(sex.classes[item.label] == known[item.id]["sex"] for item in sex.items)
    assert findings.classes == ["Effusion", "Nodule"]
    assert all(bool(item.findings[0]) == ("Effusion" in known[item.id]["findings"]) for item in findings.items)

    auroc = find(sex, "net", "linear_sklearn").metrics["auroc"]
    assert auroc.low is not None
    assert auroc.mean > 0.75
    assert find(age, "net", "ridge").metrics["r2"].mean > 0.7
    assert find(age, "mean of the training side", "mean").metrics["r2"].mean <= 0
    assert find(findings, "net", "linear").metrics["auroc/Effusion"].mean > 0.8
    assert {known.kind for known in age.encoders} == {"encoder", "untrained", "histogram", "constant"}
    assert {e.method for e in findings.evaluations} == {"linear", "knn"}
    for results, method in ((sex, "linear_sklearn"), (age, "ridge"), (findings, "linear")):
        small, half = (find(results, "net", method, share) for share in (0.1, 0.5))
        assert len(small.episodes) == 5
        for less, more in zip(small.episodes, half.episodes, strict=True):
            assert set(less.support or []) < set(more.support or [])
            assert all(results.items[number].split == "train" for number in more.support or [])

    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("shares of the training groups</h4>") == 3
    for said in ("R², whole training side", "AUROC of each finding", "AUROC, whole training side", "an R² of"):
        assert said in page


def test_a_volume_is_the_mean_of_its_windows_and_a_second_run_embeds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write(tmp_path / "volumes", volume, ".nii.gz", 1)
    net = encoder(tmp_path / "net", spec_of(data / "p00_0.nii.gz", VOLUME, (8, 8, 8)), 4)
    overrides = ["data.size=8", "data.spacing=null", "data.min_foreground=0", "data.margin=null"]
    options = {"controls": False, "fractions": [], "overrides": overrides, "workers": 0, "device": "cpu"}

    def judge(by: str) -> Results:
        targets = parse_targets([], ["age"], [])
        (found,) = bench_targets("medical", [net], [data], tmp_path / "out", targets, by=by, **options)  # type: ignore[arg-type]
        return found.results

    whole = judge("source")
    assert (whole.unit, len(whole.items), {item.windows for item in whole.items}) == ("image", PATIENTS, {2})
    monkeypatch.setattr("fmsuite.core.encoders.Encoder.embed", None)
    parts = judge("window")
    assert len(parts.items) == 2 * PATIENTS
    assert [e.encoder for e in parts.evaluations] == ["net", "net"]
    assert find(whole, "net", "ridge").metrics["r2"].mean > 0.5
    assert find(whole, "net", "ridge").metrics["mae"].mean < find(parts, "net", "ridge").metrics["mae"].mean


def test_what_does_not_fit_together_is_refused_before_any_work(fmsuite: Callable[..., Ran], tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["bench", "--domain", "medical", "-e", "nowhere", "--out", out]
    for given, match in (
        (["--by", "source"], "--by is about columns of a labels file"),
        (["--fractions", "5%"], "--fractions is about columns"),
        (["--classify", "sex", "--by", "patient"], "There is no --by patient"),
        (["--classify", "sex", "--regress", "sex"], "'sex' is asked for twice"),
        (["--regress", "age", "--fractions", "0,1"], "A share of 0"),
        (["--regress", "age", "--task", "prototypes"], "There is no task 'prototypes'"),
        (["--regress", "age", "--classify", "sex", "--task", "ridge"], "None of the tasks ridge is one for --classify"),
    ):
        ran = fmsuite(*command, *given)
        assert ran.code == 2
        assert match in ran.text
    assert not out.exists()
    with pytest.raises(UsageError, match="Nothing is asked for"):
        bench_targets("medical", ["nowhere"], [], out, [])
