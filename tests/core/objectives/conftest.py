"""Inputs of every kind, and batches of them as the data pipeline would make them."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.backbones.vit import VisionTransformer
from fmsuite.core.data.crop import cell_box
from fmsuite.core.data.pairs import byte_tokens
from fmsuite.core.data.sample import Batch, MaskContext, SampleKey, View
from fmsuite.core.inputs import Channel, InputSpec, Normalize
from fmsuite.core.objectives.base import Objective, StepContext, find_objective


@dataclass
class Toy:
    """A small input, and the options that fit it."""

    spec: InputSpec
    patch: int
    coords: dict[str, np.ndarray] = field(default_factory=dict)


def _channels(count: int, groups: str | None = None) -> tuple[Channel, ...]:
    return tuple(
        Channel(name=f"c{i}", mean=0.1 * i, std=1.5, group=groups[i] if groups else None) for i in range(count)
    )


TOYS = {
    "rgb": Toy(InputSpec(axes=("y", "x"), size=(16, 16), channels=_channels(3)), 4),
    "thirteen_grouped": Toy(InputSpec(axes=("y", "x"), size=(16, 16), channels=_channels(13, "aabbbabbbccca")), 4),
    "two_channels": Toy(InputSpec(axes=("y", "x"), size=(16, 16), channels=_channels(2)), 4),
    "volume": Toy(InputSpec(axes=("z", "y", "x"), size=(8, 8, 8), channels=_channels(1)), 2),
    "series": Toy(
        InputSpec(axes=("time", "y", "x"), size=(3, 16, 16), channels=_channels(2)),
        4,
        {"time": np.array([8000.0, 8030.5, 8100.0], dtype=np.float32)},
    ),
}


def _declared(name: str) -> dict[str, object]:
    """What the test files of objectives say in a top-level dictionary of that name, by objective."""
    found: dict[str, object] = {}
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        for statement in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(statement, ast.Assign) and [getattr(t, "id", "") for t in statement.targets] == [name]:
                found |= ast.literal_eval(statement.value)
    return found


SMALL = _declared("SMALL")
"""Options of each objective that keep it small."""
FITS = _declared("FITS")
"""Kinds of input that an objective takes, where it does not take all."""


def _model(toy: Toy, seed: int = 0, **model) -> VisionTransformer:
    torch.manual_seed(seed)
    shape = {"width": 24, "depth": 2, "heads": 2, "patch_size": toy.patch, "positions": "sincos"}
    return VisionTransformer(ModelConfig(**{**shape, **model}), toy.spec)


def _objective(name: str, kind: str = "rgb", *, seed: int = 0, model: dict | None = None, **options) -> Objective:
    backbone = _model(TOYS[kind], seed, **(model or {}))
    cls = find_objective(name)
    return cls(cls.Config(**{**SMALL[name], **options}), backbone)


def _raw_view(objective, kind, request, batch, step, seed, number, invalid) -> View:
    """A crop of each sample's smooth picture, which (seed, step) decides, at a place and contrast of its own."""
    toy = TOYS[kind]
    size, channels = request.size, len(toy.spec.channels)
    pictures, crops = np.random.default_rng([seed, step]), np.random.default_rng([seed, step, number])
    waves = pictures.normal(size=(batch, channels, len(size), 2))
    pixels = 2 * pictures.normal(size=(batch, channels, *[1] * len(size))).astype(np.float32)
    pixels = np.broadcast_to(pixels, (batch, channels, *size)).copy()
    for axis, length in enumerate(size):
        shape = [1, 1, *(length if other == axis else 1 for other in range(len(size)))]
        ramp = (crops.random() + np.linspace(0, 3, length)).reshape(shape)
        frequency, phase = (waves[:, :, axis, part].reshape(batch, channels, *[1] * len(size)) for part in (0, 1))
        pixels += np.sin(frequency * ramp + 3 * phase).astype(np.float32)
    pixels *= np.float32(crops.uniform(0.9, 1.1))
    valid = None
    if invalid:
        valid = np.ones((batch, 1, *size), dtype=bool)
        valid[..., : size[-1] // 4] = False  # whole patches of nothing
        valid[:, :, ..., size[-1] // 2] = False  # and a thin line within others
    return View(
        torch.from_numpy(pixels),
        None if valid is None else torch.from_numpy(valid),
        coords={axis: torch.from_numpy(values).expand(batch, -1) for axis, values in toy.coords.items()},
        keys=torch.arange(batch),
    )


def _batch(objective, kind="rgb", batch=4, step=0, seed=0, invalid=False, nan=False) -> Batch:
    made = _samples(objective, objective.view_requests(), kind, batch, step, seed, invalid, nan)
    asked = objective.support_request()
    if asked is not None:
        rows = asked.classes * asked.per_class
        made.support = _samples(objective, asked.views, kind, rows, step, seed + 1000, invalid, nan)
        made.support.labels = torch.arange(asked.classes).repeat_interleave(asked.per_class)
    if objective.pair_request() is not None:
        made.pairs = _partners(objective.pair_request(), batch, seed, step)
    return made


def _partners(request, batch, seed, step) -> torch.Tensor:
    random = np.random.default_rng([seed, step, 7])
    if request.width is not None:
        return torch.from_numpy(random.normal(size=(batch, request.width)).astype(np.float32))
    texts = ["".join(random.choice(list("abc def"), random.integers(1, request.tokens))) for _ in range(batch)]
    return torch.from_numpy(np.stack([byte_tokens(text, request.tokens) for text in texts]))


def _boxes(request, batch, number, random) -> torch.Tensor:
    """Where the views of a request for cells would have been cut, in samples of length one."""
    cell, unit = number if request.tiled else None, [1.0] * len(request.size)
    boxes = [cell_box(unit, request.cells, cell, random, whole=False) for _ in range(batch)]
    return torch.tensor(boxes, dtype=torch.float32)


def _samples(objective, requests, kind, batch, step, seed, invalid, nan) -> Batch:
    views: dict[str, list[View]] = {}
    masked_views = sum(request.count for request in requests if request.mask is not None)
    number = 0
    normalize, grid = Normalize(TOYS[kind].spec), objective.backbone.grid
    for position, request in enumerate(requests):
        for count in range(request.count):
            view = _raw_view(objective, kind, request, batch, step, seed, 100 * position + count, invalid)
            if request.mask is not None:
                tokens = objective.backbone.layout(view)
                masks = []
                for row in range(batch):
                    valid = np.ones(tokens.num_tokens, bool) if tokens.valid is None else tokens.valid[row].numpy()
                    context = MaskContext(
                        grid.token_axes,
                        grid.shape(request.size),
                        valid,
                        np.random.default_rng([seed, step, row, number]),
                        SampleKey(0, row, step=step, slot=row, slots=batch),
                        number,
                        masked_views,
                    )
                    masks.append(request.mask(context))
                view.mask = torch.from_numpy(np.stack(masks))
                number += 1
            if nan:
                view.pixels = torch.where(view.valid, view.pixels, torch.nan)
            view.pixels = normalize(view.pixels, view.valid)
            if request.cells is not None:
                view.box = _boxes(request, batch, count, np.random.default_rng([seed, step, number, position, count]))
            views.setdefault(request.name, []).append(view)
    return Batch(views, torch.arange(batch), torch.full((batch,), -1))


def _train(objective, batches, steps=40, lr=3e-3) -> list[float]:
    """Losses of a plain AdamW run that follows an objective's life cycle."""
    objective.train()
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=lr)
    losses = []
    for step in range(steps):
        context = StepContext(step, steps, max(1, steps // 4), 4)
        loss = objective(batches[step % len(batches)], context)["loss"]
        optimizer.zero_grad()
        loss.backward()
        objective.before_update(context)
        optimizer.step()
        objective.after_update(context)
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="session")
def toys() -> SimpleNamespace:
    """``kinds`` of input; ``model(kind)``, ``objective(name, kind)``, ``batch(objective, kind)``, ``train(...)``."""
    return SimpleNamespace(
        kinds=tuple(TOYS),
        toys=TOYS,
        model=_model,
        objective=_objective,
        batch=_batch,
        train=_train,
        small=SMALL,
        fits=lambda name: FITS.get(name, tuple(TOYS)),
    )


@pytest.fixture
def context() -> StepContext:
    return StepContext(step=2, total_steps=100, steps_per_epoch=10, batch_size=4)


@pytest.fixture(scope="session")
def load(oracles):
    """Reference numbers by name."""
    return lambda name: torch.load(oracles / f"{name}.pt", weights_only=True)
