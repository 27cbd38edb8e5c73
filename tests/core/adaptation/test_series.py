"""Tasks on series: padding changes nothing, maps lie along the spatial axes, changes are found between two dates."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import pad

from fmsuite.core.adaptation.task import TASKS, Task
from fmsuite.core.backbones.base import Backbone
from fmsuite.core.backbones.build import build_backbone
from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.data.pipeline import Item, NoAugmentation, ViewPipeline, collate
from fmsuite.core.data.sample import ArraySample, Batch, SampleKey, View, ViewRequest
from fmsuite.core.inputs import Channel, InputSpec
from fmsuite.core.objectives.base import StepContext
from fmsuite.core.objectives.single_view import VIEW
from fmsuite.errors import UsageError

FLAT = InputSpec(axes=("y", "x"), size=(8, 8), channels=(Channel(name="a"), Channel(name="b")))
OPTIONS = {
    "classification": {"classes": 3},
    "multilabel": {"labels": 2},
    "regression": {"outputs": 1},
    "segmentation": {"classes": 2, "label_map": "m", "decoder_options": {"base": 4}},
    "change": {"classes": 2, "label_map": "m", "decoder_options": {"base": 4}},
}


def _backbone(dates: int = 2, spec: InputSpec | None = None, **options) -> Backbone:
    torch.manual_seed(0)
    series = InputSpec(axes=("time", "y", "x"), size=(dates, 8, 8), channels=FLAT.channels)
    shape = {"width": 24, "depth": 1, "heads": 2, "patch_size": 4, "positions": "sincos"}
    return build_backbone(ModelConfig(**{**shape, **options}), spec or series)


def _task(kind: str, backbone: Backbone, **options) -> Task:
    torch.manual_seed(1)
    return TASKS[kind](TASKS[kind].Config(**{**OPTIONS[kind], **options}), backbone)


def _view(samples: int = 3, dates: int = 2, seed: int = 0) -> View:
    draw = torch.Generator().manual_seed(seed)
    valid = torch.rand(samples, 1, dates, 8, 8, generator=draw) > 0.1
    pixels = torch.randn(samples, 2, dates, 8, 8, generator=draw) * valid
    days = 9000 + 30 * torch.arange(dates).float().expand(samples, -1)
    return View(pixels, valid, coords={"time": days}, keys=torch.arange(samples))


def _padded(view: View, more: int = 2) -> View:
    assert view.valid is not None
    around = (0, 0, 0, 0, 0, more)
    days = pad(view.coords["time"], (0, more))
    return replace(view, pixels=pad(view.pixels, around), valid=pad(view.valid, around), coords={"time": days})


def _loss(task: Task, view: View, labels: torch.Tensor) -> torch.Tensor:
    count = len(view)
    batch = Batch({VIEW: [replace(view, maps={"m": labels})]}, torch.arange(count), -torch.ones(count).long())
    return task(batch, StepContext(0, 10, 5, 8))["loss"]


@pytest.mark.parametrize("datewise", [False, True])
@pytest.mark.parametrize("kind", ["classification", "multilabel", "regression", "segmentation"])
@torch.no_grad()
def test_dates_that_only_fill_up_a_batch_change_no_answer(kind: str, datewise: bool) -> None:
    task, view = _task(kind, _backbone(datewise=datewise)).eval(), _view()
    said = task.predict(view)
    assert not torch.allclose(said[0], said[1], atol=1e-4)
    torch.testing.assert_close(task.predict(_padded(view)), said, rtol=0, atol=2e-5)


def test_a_map_of_the_place_is_as_good_as_one_of_every_date() -> None:
    task, view = _task("segmentation", _backbone()).eval(), _view()
    labels = (torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(3)) > 0.5).to(torch.uint8)
    every = labels[:, None].expand(-1, 2, -1, -1)
    assert torch.equal(_loss(task, view, labels), _loss(task, view, every))
    # Where no date shows anything a label makes no difference, where one does it makes one.
    view.valid[:, :, :, :4] = False
    hidden, shown = labels.clone(), labels.clone()
    hidden[:, :4], shown[:, 4:] = 1 - hidden[:, :4], 1 - shown[:, 4:]
    assert torch.equal(_loss(task, view, labels), _loss(task, view, hidden))
    assert not torch.equal(_loss(task, view, labels), _loss(task, view, shown))


def test_maps_of_a_place_are_cropped_and_padded_with_its_series() -> None:
    labels = np.random.default_rng(0).integers(0, 5, (12, 12)).astype(np.uint8)
    request = ViewRequest(VIEW, (2, 6, 6), scale=(0.3, 0.6), augment="none", maps=("m",))
    grid = _backbone(patch_size=(2, 3, 3), input_size=6).grid
    pipeline = ViewPipeline([request], NoAugmentation(), grid, ("time", "y", "x"), seed=0)
    items = []
    for dates in (1, 3):
        for maps in (labels, np.broadcast_to(labels, (dates, 12, 12))):
            values, days = np.zeros((2, dates, 12, 12), np.uint8), np.arange(dates)
            sample = ArraySample(values, maps={"m": maps}, coords={"time": days})
            items.append(Item(pipeline(sample, SampleKey(0, 5)), 5, -1))
    place, every = (collate(items[n::2]).views[VIEW][0].maps["m"] for n in (0, 1))
    assert place.shape == (2, 6, 6)
    assert every.shape == (2, 4, 6, 6)
    assert torch.equal(place, every[:, 0])


@pytest.mark.parametrize("datewise", [False, True])
@torch.no_grad()
def test_differences_know_no_direction_and_concatenated_dates_do(datewise: bool) -> None:
    view = _view()
    turned = replace(view, pixels=view.pixels.flip(2), valid=view.valid.flip(2))
    for compare in ("difference", "concat", "both"):
        task = _task("change", _backbone(datewise=datewise), compare=compare).eval()
        assert task.predict(view).shape == (3, 2, 8, 8)
        alike = torch.allclose(task.predict(view), task.predict(turned), atol=1e-6)
        # An encoder of series is told the dates, and these stay where they are.
        assert alike == (compare == "difference" and datewise)
    task = _task("change", _backbone(datewise=True)).eval()
    first = (_view().pixels[:, :, :1], _view(seed=9).pixels[:, :, :1])
    unchanged = [replace(view, pixels=pixels.expand(-1, -1, 2, -1, -1), valid=None) for pixels in first]
    assert torch.equal(*(task.predict(one) for one in unchanged))


@pytest.mark.parametrize("decoder", ["linear", "upernet", "dpt", "unetr"])
def test_a_change_is_learned_by_every_decoder(decoder: str) -> None:
    width = {"linear": {}, "unetr": {"base": 4}}.get(decoder, {"width": 8})
    task = _task("change", _backbone(datewise=True), error="ce", decoder=decoder, decoder_options=width).train()
    optimiser = torch.optim.Adam(task.parameters(), lr=5e-3)
    draw = torch.Generator().manual_seed(0)

    def changes(count: int) -> View:
        first = torch.randn(count, 2, 1, 8, 8, generator=draw)
        changed = torch.rand(count, 2, 2, generator=draw) > 0.5
        changed = changed.repeat_interleave(4, 1).repeat_interleave(4, 2)
        second = torch.where(changed[:, None, None], torch.randn(first.shape, generator=draw), first)
        return View(torch.cat([first, second], 2), maps={"m": changed.to(torch.uint8)}, keys=torch.arange(count))

    for _ in range(50):
        view = changes(16)
        optimiser.zero_grad()
        _loss(task, view, view.maps["m"]).backward()
        optimiser.step()
    task.eval()
    view = changes(32)
    with torch.no_grad():
        right = (task.predict(view).argmax(1) == view.maps["m"]).float().mean()
    assert right > 0.8


def test_a_change_counts_where_both_dates_are_valid() -> None:
    task, view = _task("change", _backbone(datewise=True)).eval(), _view()
    labels = torch.zeros(3, 8, 8, dtype=torch.uint8)
    view.valid[:, :, 1, :, 4:] = False
    right, left = labels.clone(), labels.clone()
    right[:, :, 4:], left[:, :, :4] = 1, 1
    assert torch.equal(_loss(task, view, labels), _loss(task, view, right))
    assert not torch.equal(_loss(task, view, labels), _loss(task, view, left))
    single = View(view.pixels[:, :, :1], coords={"time": view.coords["time"][:, :1]}, keys=view.keys)
    assert _loss(task, single, left) == 0
    filled = _padded(replace(single, valid=torch.ones_like(single.pixels[:, :1], dtype=torch.bool)), 1)
    assert torch.equal(task.predict(single), task.predict(filled))


def test_changes_of_anything_but_two_dates_are_refused() -> None:
    for backbone, why in (
        (_backbone(dates=3), "series have up to 3"),
        (_backbone(patch_size=(2, 4, 4)), "patches span both"),
        (_backbone(spec=FLAT), "axes are y, x"),
    ):
        with pytest.raises(UsageError, match=why):
            _task("change", backbone)
    with pytest.raises(UsageError, match="a sample has 3"):
        _task("change", _backbone(datewise=True)).predict(_view(dates=3))
