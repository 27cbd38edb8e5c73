"""A domain that lives in a package of its own, installed as users install it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PLUGIN = Path(__file__).resolve().parents[1] / "plugins" / "fmsuite_spectra"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plugin in a folder of its own, built from a copy so that the source tree stays clean."""
    root = tmp_path_factory.mktemp("plugin")
    source, target = root / "source", root / "site"
    for path in PLUGIN.rglob("*"):
        relative = path.relative_to(PLUGIN)
        if path.is_file() and path.suffix in (".py", ".toml", ".yaml") and "build" not in relative.parts:
            copy = source / relative
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*pip, "--target", str(target), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


def run(installed: Path, *command: str, cwd: Path | None = None) -> str:
    path = os.pathsep.join(filter(None, [str(installed), os.environ.get("PYTHONPATH", "")]))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


PARTS = """
import sys
from pathlib import Path
import torch
from fmsuite.commands.indexing import build_index
from fmsuite.configs import load_recipe
from fmsuite.core.backbones.build import build_backbone
from fmsuite.core.config import parse_run
from fmsuite.core.data.pipeline import ViewPipeline, WindowDataset, collate
from fmsuite.core.data.sample import SampleKey
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.inputs import Normalize
from fmsuite.core.objectives.base import StepContext
from fmsuite.core.objectives.mae import MAE, MAEConfig
from fmsuite.domains.base import domain_names, load_domain

assert "spectra" in domain_names(), domain_names()
kind = load_domain("spectra")
recipe = load_recipe(kind.default_recipe, [kind.recipes])
config = parse_run(recipe.raw, kind.Options, MAEConfig)
domain = kind(config.data)
folder = domain.example_data(Path(sys.argv[1]))
(folder / "words.csv").write_text("not numbers")
skipped = SkippedLog()
index = build_index(domain, [folder], skipped)
assert len(index) == 60 and index.label_names == ["1 peaks", "2 peaks", "3 peaks"], index.label_names
assert [Path(e.path).name for e in skipped.entries] == ["words.csv"]
spec = domain.input_spec(index)
torch.manual_seed(0)
objective = MAE(config.objective_options, build_backbone(config.model, spec))
pipeline = ViewPipeline(objective.view_requests(), domain.augmentation(spec), objective.backbone.grid, spec.axes, 0)
dataset = WindowDataset(index, domain.reader(index), pipeline, 0)
batch = collate([dataset[SampleKey(0, row)] for row in range(16)])
(view,) = batch.views["image"]
assert view.pixels.shape == (16, 1, 256) and view.mask.shape == (16, 16) and view.mask.sum(1).eq(12).all()
assert domain.to_rgb(view.pixels[0].numpy(), spec).shape == (64, 256, 3)
normalize = Normalize(spec)
optimiser = torch.optim.AdamW(objective.parameters(), lr=1e-3)
losses = []
for step in range(30):
    ready = batch.map_views(lambda v: type(v)(**{**vars(v), "pixels": normalize(v.pixels, v.valid)}))
    loss = objective(ready, StepContext(step, 30, 3, 16))["loss"]
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    losses.append(float(loss.detach()))
assert losses[-1] < losses[0], losses
print("trained")
"""


def test_it_is_under_150_lines() -> None:
    files = [p for p in PLUGIN.rglob("*") if p.suffix in (".py", ".toml", ".yaml") and "build" not in p.parts]
    assert sum(len(path.read_text().splitlines()) for path in files) < 150


def test_the_guide_shows_the_plugin_as_it_is() -> None:
    guide = PLUGIN.parents[2] / "docs" / "add-a-domain.md"
    excerpts = re.findall(r"```(python|toml|yaml)\n(.*?)```", guide.read_text(encoding="utf-8"), re.DOTALL)
    assert len(excerpts) > 8
    sources = {
        "python": PLUGIN / "fmsuite_spectra" / "__init__.py",
        "toml": PLUGIN / "pyproject.toml",
        "yaml": PLUGIN / "fmsuite_spectra" / "recipes" / "spectra-mae.yaml",
    }
    for language, excerpt in excerpts:
        assert excerpt in sources[language].read_text(encoding="utf-8")


@pytest.mark.slow
def test_an_installed_plugin_trains_through_the_core(installed: Path, tmp_path: Path) -> None:
    assert run(installed, "-c", PARTS, str(tmp_path / "data")).strip().endswith("trained")


@pytest.mark.slow
def test_an_installed_plugin_trains_from_the_command_line(installed: Path, tmp_path: Path) -> None:
    options = ["--set", "training.steps=3", "--set", "training.workers=0", "--set", "training.device=cpu"]
    out = tmp_path / "run"
    run(installed, "-m", "fmsuite", "pretrain", "--domain", "spectra", "--out", str(out), *options, cwd=tmp_path)
    assert (out / "encoder.safetensors").is_file()
    assert (out / "views.png").is_file()
    judged = tmp_path / "judged"
    task = ["--task", "knn", "--no-controls", "--workers", "0", "--device", "cpu", "--out", str(judged)]
    run(installed, "-m", "fmsuite", "bench", "--domain", "spectra", "--encoder", str(out), *task, cwd=tmp_path)
    assert json.loads((judged / "results.json").read_text())["unit"] == "curve"
    assert "curves of" in (judged / "report.html").read_text()
