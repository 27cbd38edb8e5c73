"""Running commands in this process and in others, on settings and data that take a second."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fmsuite import cli

LAUNCHER = Path(__file__).with_name("launcher.py")
PATIENCE_S = 120.0


@dataclass
class Ran:
    """How a command ended, and all that it printed, on one line."""

    code: int
    text: str


@pytest.fixture
def fmsuite(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """``fmsuite("tile", "--domain", ...)`` runs a command as the console script would."""

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["fmsuite", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return Ran(int(ended.value.code or 0), " ".join((captured.out + captured.err).split()))

    return run


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums are taken in another order on another number of threads; these tests compare runs bit for bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass
class Command:
    """A command in a process of its own."""

    pid: int
    output: Path
    _ask: Callable[[dict], int]
    _code: int | None = None

    def wait(self) -> Ran:
        """How it ended; its code is minus the signal's number where a signal ended it."""
        if self._code is None:
            self._code = self._ask({"wait": self.pid})
        return Ran(self._code, " ".join(self.output.read_text(encoding="utf-8").split()))

    @property
    def ended(self) -> bool:
        """Whether it was waited for; its id may be another's then."""
        return self._code is not None

    def send(self, number: int) -> None:
        os.kill(self.pid, number)


@dataclass
class Launcher:
    """See ``launcher.py``."""

    process: subprocess.Popen
    folder: Path
    started: list[Command] = field(default_factory=list)

    def start(self, *arguments: object, by: str = "fmsuite", environment: dict[str, str] | None = None) -> Command:
        output = self.folder / f"{len(self.started)}.txt"
        request = {"start": [*map(str, arguments)], "by": by, "output": str(output), "environment": environment or {}}
        self.started.append(Command(self.ask(request), output, self.ask))
        return self.started[-1]

    def ask(self, request: dict) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """``launcher.start("pretrain", ...)`` runs a command in a process that can be killed."""
    process = subprocess.Popen(
        [sys.executable, str(LAUNCHER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
    )
    yield Launcher(process, tmp_path_factory.mktemp("launched"))
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(PATIENCE_S) == 0


@pytest.fixture(scope="session")
def until() -> Callable[..., None]:
    """``until(condition)`` waits for something that another process does."""

    def wait(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, "it never happened"
            time.sleep(0.002)

    return wait


Settings = Callable[..., list[str]]


@pytest.fixture(scope="session")
def settings() -> Settings:
    """``settings("mae", {"training.steps": 8})``: the arguments of a run on a network of nearly nothing."""
    model = {"model.width": 32, "model.depth": 1, "model.heads": 2, "model.patch_size": 8}
    training = {
        "training.steps": 6,
        "training.batch_size": 8,
        "training.workers": 0,
        "training.device": "cpu",
        "training.log_every": 1,
        "training.checkpoint_every": 2,
        "optim.lr": 1e-3,
        "monitor.every": 3,
        "monitor.samples": 16,
        "monitor.knn_k": 3,
    }
    mae = {"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2, "norm_pix": False}
    dino = {"prototypes": 32, "head_hidden": 32, "head_bottleneck": 16, "local_crops": 2}

    def arguments(objective: str, changes: dict[str, Any] | None = None) -> list[str]:
        own = {f"objective.{key}": value for key, value in (mae if objective == "mae" else dino).items()}
        made = ["--objective", objective]
        for key, value in {**model, **training, **own, **(changes or {})}.items():
            made += ["--set", f"{key}={json.dumps(value)}"]
        return made

    return arguments


TILES = {"data.size": 32, "model.input_size": 32}


@pytest.fixture(scope="session")
def tile_settings(settings: Settings) -> Settings:
    """As ``settings``, for windows of ``tiles``."""
    return lambda objective, changes=None: ["--domain", "pathology", *settings(objective, {**TILES, **(changes or {})})]


@pytest.fixture(scope="session")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six tile images of 64 x 64, four windows of 32 each, in two classes and three groups."""
    folder = tmp_path_factory.mktemp("tiles")
    lines = ["path,label,group"]
    for number in range(6):
        Image.fromarray(_structure(number, 64)).save(folder / f"{number}.png")
        lines.append(f"{number}.png,{'ab'[number % 2]},patient{number // 2}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def _structure(seed: int, side: int) -> np.ndarray:
    """(side, side, 3) uint8: coloured blocks of 8 with some noise."""
    random = np.random.default_rng(seed)
    blocks = random.integers(60, 220, (side // 8, side // 8, 3)).repeat(8, 0).repeat(8, 1)
    return np.clip(blocks + random.integers(-10, 11, blocks.shape), 0, 255).astype(np.uint8)


@dataclass
class RunFacts:
    """What a run folder holds that two equal runs must agree in."""

    losses: dict[int, float]
    weights: dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def facts_of() -> Callable[[Path], RunFacts]:
    """Every step's loss and gradient norm, and the encoder's weights."""

    def read(run: Path) -> RunFacts:
        from safetensors.torch import load_file

        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        losses = {line["step"]: (line["loss"], line["grad_norm"]) for line in lines if "loss" in line}
        return RunFacts(losses, load_file(run / "encoder.safetensors"))

    return read
