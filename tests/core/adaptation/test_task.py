"""Supervised tasks under the training loop: they learn, resume bit for bit, and count what is labelled alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from fmsuite.core.adaptation.lora import lora_layers, lora_state
from fmsuite.core.adaptation.sliding_window import sliding_window
from fmsuite.core.adaptation.task import TASKS, Classification, MultiLabel, Regression, Task
from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.backbones.vit import VisionTransformer
from fmsuite.core.data.sample import Batch, View
from fmsuite.core.inputs import Channel, InputSpec, Normalize
from fmsuite.core.objectives.base import OBJECTIVES, StepContext
from fmsuite.core.objectives.single_view import VIEW
from fmsuite.core.training.config import OptimConfig
from fmsuite.core.training.optim import parameter_groups
from fmsuite.errors import UsageError
from tests.core.training.helpers import SPEC, final_state, make_config, run_toy

CONTEXT = StepContext(0, 10, 5, 8)
OPTIONS = {
    "classification": {"classes": 3},
    "multilabel": {"labels": 2},
    "regression": {"outputs": 2, "target_mean": (1.0, 2.0), "target_std": (2.0, 4.0)},
    "segmentation": {"classes": 2, "label_map": "bright", "decoder_options": {"base": 4}},
}


def backbone(seed: int = 0, spec: InputSpec = SPEC, **options) -> VisionTransformer:
    torch.manual_seed(seed)
    shape = {"width": 24, "depth": 2, "heads": 2, "patch_size": 4}
    return VisionTransformer(ModelConfig(**{**shape, **options}), spec)


def task(kind: str, model: VisionTransformer | None = None, **options) -> Task:
    made = TASKS[kind](TASKS[kind].Config(**{**OPTIONS[kind], **options}), model or backbone())
    return made.train()


def raw_batch(step: int, count: int = 8) -> Batch:
    """A bright square on noise; the class is its row, the numbers are its place, the map is where it is."""
    random = np.random.default_rng(step)
    pixels = random.integers(0, 60, (count, 1, 8, 8)).astype(np.uint8)
    labels, bright = np.zeros(count, np.int64), np.zeros((count, 8, 8), np.uint8)
    places = np.zeros((count, 2), np.float32)
    for row in range(count):
        y, x = (int(n) for n in random.integers(0, 3, 2))
        box = (slice(2 * y, 2 * y + 4), slice(2 * x, 2 * x + 4))
        pixels[row, 0][box] += 150
        bright[row][box] = 1
        labels[row], places[row] = y, (y > 0, x > 0)
    view = View(torch.from_numpy(pixels), keys=torch.arange(count), maps={"bright": torch.from_numpy(bright)})
    return Batch({VIEW: [view]}, torch.arange(count), torch.from_numpy(labels), pairs=torch.from_numpy(places))


def batch(step: int = 0) -> Batch:
    normalize = Normalize(SPEC)
    return raw_batch(step).map_views(
        lambda view: View(normalize(view.pixels), view.valid, keys=view.keys, maps=view.maps)
    )


def loader(until: int | None = None) -> Callable[[int], Iterable[Batch]]:
    def batches(start: int) -> Iterator[Batch]:
        for step in range(start, 100):
            if step == until:
                raise KeyboardInterrupt
            yield raw_batch(step)

    return batches


def fit(made: Task, steps: int = 40, lr: float = 5e-3) -> tuple[float, float]:
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=lr)
    losses = []
    for step in range(steps):
        loss = made(batch(step % 4), CONTEXT)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[:5]) / 5, sum(losses[-5:]) / 5


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_task_is_learned(kind):
    first, last = fit(task(kind))
    assert last < 0.8 * first


def test_predictions_are_what_the_task_is_about():
    new = batch(1000)
    (view,) = new.views[VIEW]
    made = task("segmentation")
    fit(made)
    with torch.no_grad():
        shares = made.eval().predict(view)
    assert shares.shape == (8, 2, 8, 8)
    assert (shares.argmax(1) == view.maps["bright"]).float().mean() > 0.9
    whole = sliding_window(lambda x: made.predict(View(x)), view.pixels, (8, 8))
    torch.testing.assert_close(whole, shares)
    torch.testing.assert_close(task("classification").predict(view).sum(1), torch.ones(8))
    numbers = task("regression").eval()
    torch.nn.init.zeros_(numbers.head.weight)
    assert numbers.predict(view).tolist() == [[1.0, 2.0]] * 8


@pytest.mark.parametrize("options", [{"tune": "lora", "lora_rank": 2, "lora_dropout": 0.2}, {"tune": "frozen"}])
@pytest.mark.parametrize("kind", ["classification", "segmentation"])
def test_the_training_loop_trains_and_resumes_it_bit_for_bit(tmp_path: Path, kind: str, options: dict):
    config = make_config(6)

    def start() -> Task:
        torch.manual_seed(0)
        return task(kind, backbone(drop_path=0.2), **options)

    before = {name: tensor.clone() for name, tensor in start().state_dict().items()}
    run_toy(tmp_path / "whole", config, objective=start(), loader=loader())
    whole = final_state(tmp_path / "whole", 6)
    with pytest.raises(KeyboardInterrupt):
        run_toy(tmp_path / "parts", config, objective=start(), loader=loader(until=5))
    result = run_toy(tmp_path / "parts", config, objective=start(), loader=loader(), resume=True)
    assert result.step == 6
    parts = final_state(tmp_path / "parts", 6)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, whole[f"objective.{name}"])}
    assert changed
    assert all(not name.startswith("backbone.") or "lora" in name for name in changed)
    assert any("lora" in name for name in changed) == (options["tune"] == "lora")


@pytest.mark.parametrize("kind", OPTIONS)
def test_what_is_not_labelled_or_not_valid_does_not_count(kind):
    made, whole = task(kind), batch()
    part = whole[:5]
    (view,) = whole.views[VIEW]
    if kind == "segmentation":
        view.maps["bright"] = view.maps["bright"].to(torch.int16)
        view.maps["bright"][5:] = -1
    whole.labels[5:] = -1
    whole.pairs[5:] = torch.nan
    known = made(whole, CONTEXT)["loss"]
    torch.testing.assert_close(known, made(part, CONTEXT)["loss"])
    whole = batch()
    (view,) = whole.views[VIEW]
    view.valid = torch.ones(8, 1, 8, 8, dtype=torch.bool)
    view.valid[5:] = False
    torch.testing.assert_close(made(whole, CONTEXT)["loss"], known)
    view.valid[:] = False
    assert made(whole, CONTEXT)["loss"].item() == 0


def test_the_same_network_from_scratch_is_one_flag_away():
    def arm(scratch: bool) -> Task:
        trained = backbone()
        torch.manual_seed(5)
        return task("classification", trained, tune="lora", scratch=scratch)

    tuned, control = arm(False), arm(True)
    assert lora_layers(tuned)
    assert not lora_layers(control)
    assert all(parameter.requires_grad for parameter in control.parameters())
    assert control.backbone.config == tuned.backbone.config
    assert not torch.equal(control.backbone.pos_embed, tuned.backbone.pos_embed)
    # Fresh backbones differ from run to run; the seed decides.
    assert torch.equal(control.backbone.pos_embed, arm(True).backbone.pos_embed)


def test_both_arms_start_from_the_same_head():
    heads = []
    for scratch in (False, True):
        model = backbone()
        torch.manual_seed(5)
        heads.append(task("classification", model, scratch=scratch).head.weight)
    assert torch.equal(*heads)


def test_the_backbone_may_learn_more_slowly_than_the_head():
    groups = parameter_groups(OptimConfig(layer_decay=0.5), task("classification", backbone_lr=0.1))
    scale = {name: group["lr_scale"] for group in groups for name, _ in group["params"]}
    assert scale["head.weight"] == 1.0
    assert scale["backbone.blocks.1.mlp.fc1.weight"] == pytest.approx(0.1 * 0.5)
    assert scale["backbone.patch_embed.proj.weight"] == pytest.approx(0.1 * 0.5**3)


def test_frozen_and_adapted_backbones():
    frozen = task("segmentation", backbone(drop_path=0.5), tune="frozen")
    assert frozen.training
    assert not frozen.backbone.training
    frozen(batch(), CONTEXT)["loss"].backward()
    assert all(parameter.grad is None for parameter in frozen.backbone.parameters())
    assert all(parameter.grad is not None for parameter in frozen.network.decoder.parameters())
    adapted = task("segmentation", tune="lora", lora_targets=("qkv", "fc1"))
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad and name.startswith("backbone.")}
    assert trained == {f"backbone.{name}" for name in lora_state(adapted.backbone)}
    assert "network.source.backbone.cls_token" not in adapted.state_dict()


def test_volumes_series_and_bags():
    volume = InputSpec(axes=("z", "y", "x"), size=(4, 8, 8), channels=(Channel(name="a"),))
    made = task(
        "segmentation",
        backbone(spec=volume, patch_size=2, positions="sincos"),
        deep=0,
        decoder="linear",
        decoder_options={},
    )
    view = View(torch.randn(2, 1, 3, 8, 7), maps={"bright": torch.randint(0, 2, (2, 3, 8, 7))})
    assert made(Batch({VIEW: [view]}, torch.arange(2), torch.zeros(2)), CONTEXT)["loss"].isfinite()
    series = InputSpec(axes=("time", "y", "x"), size=(3, 8, 8), channels=(Channel(name="a"),))
    made = task("segmentation", backbone(spec=series, positions="sincos"), deep=1)
    maps = {"bright": torch.randint(0, 2, (2, 1, 8, 8)).expand(2, 3, 8, 8)}
    view = View(torch.randn(2, 1, 3, 8, 8), coords={"time": torch.arange(3.0).expand(2, 3)}, maps=maps)
    assert made(Batch({VIEW: [view]}, torch.arange(2), torch.zeros(2)), CONTEXT)["loss"].isfinite()
    assert made.predict(view).shape == (2, 2, 8, 8)
    bag = InputSpec(axes=("y", "x"), size=(), channels=tuple(Channel(name=f"f{i}") for i in range(6)), bag=True)
    made = task("regression", backbone(spec=bag, positions="sincos"))
    view = View(torch.randn(2, 5, 6), coords={"y": torch.rand(2, 5), "x": torch.rand(2, 5)})
    assert made.predict(view).shape == (2, 2)
    assert made.view_requests()[0].size == ()
    with pytest.raises(UsageError, match="no feature map"):
        task("segmentation", backbone(spec=bag, positions="sincos"))


def test_requests_and_names():
    (request,) = task("segmentation", size=8, scale=(0.5, 1.0)).view_requests()
    assert (request.maps, request.size, request.scale) == (("bright",), (8, 8), (0.5, 1.0))
    assert task("multilabel").pair_request().width == 2
    assert MultiLabel.needs_pairs
    assert Regression.needs_pairs
    assert not Classification.needs_pairs
    # They are trained from labels, by another command.
    assert not set(TASKS) & set(OBJECTIVES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_rank": 4}, "lora_rank has no effect without tune: lora"),
        ({"tune": "lora", "adapter_width": 8}, "adapter_width has no effect without tune: adapters"),
        ({"tune": "frozen", "last_blocks": 1}, "last_blocks has no effect"),
    ],
)
def test_options_without_effect_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        task("classification", **options)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("classification", {"size": 6}, "objective.size"),
        ("classification", {"tune": "full", "last_blocks": 7}, "last 7 blocks of 2"),
        ("regression", {"target_std": (1.0, 0.0)}, "deviations above 0"),
        ("regression", {"target_mean": (1.0,)}, "do not fit 2 outputs"),
        ("segmentation", {"decoder_options": {"wide": 3}}, "'unetr' has no option 'wide'"),
        ("segmentation", {"decoder": "linear", "deep": 1, "decoder_options": {}}, "'linear' has no option 'deep'"),
    ],
)
def test_what_does_not_fit_is_refused(kind, options, message):
    with pytest.raises(UsageError, match=message):
        task(kind, **options)


def test_labels_that_are_no_class_are_named():
    wrong = batch()
    wrong.labels[2] = 3
    with pytest.raises(UsageError, match="labels is 3, but there are 3 classes"):
        task("classification")(wrong, CONTEXT)
    wrong.views[VIEW][0].maps["bright"] = torch.full((8, 8, 8), 2, dtype=torch.uint8)
    with pytest.raises(UsageError, match="label map 'bright' is 2, but there are 2"):
        task("segmentation")(wrong, CONTEXT)
