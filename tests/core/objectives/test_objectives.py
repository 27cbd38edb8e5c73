"""What every objective must do: run on every kind of input, survive invalid pixels, learn, be saved."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError

from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.backbones.vit import VisionTransformer
from fmsuite.core.data.pipeline import NoAugmentation, ViewPipeline
from fmsuite.core.data.sample import ArraySample, SampleKey
from fmsuite.core.inputs import Channel, InputSpec
from fmsuite.core.objectives.base import OBJECTIVES, StepContext, find_objective
from fmsuite.errors import UsageError

NAMES = sorted(name for name, cls in OBJECTIVES.items() if cls.__module__.startswith("fmsuite."))
DURATIONS = ("freeze_prototypes", "queue_start", "teacher_temp_warmup", "freeze_last_layer")
KINDS = ("rgb", "thirteen_grouped", "two_channels", "volume", "series")


def trained(objective):
    return {name: p for name, p in objective.named_parameters() if p.requires_grad}


@pytest.fixture(autouse=True)
def _only_what_fits(request, toys):
    """Whoever says that an input does not fit refuses it, and is not tested further on it."""
    arguments = getattr(request.node, "callspec", SimpleNamespace(params={})).params
    name, kind = arguments.get("name"), arguments.get("kind", "rgb")
    if name and kind not in toys.fits(name):
        with pytest.raises(UsageError):
            toys.objective(name, kind)
        pytest.skip(f"{name} does not take {kind}, and says so")


def test_every_objective_has_small_options_and_a_card(toys):
    assert set(NAMES) <= set(toys.small)
    assert all(OBJECTIVES[name].card is not None for name in NAMES)


CROPS = ("scale", "global_scale", "local_scale", "ratio")
FIXED_CROPS = ("voco",)
"""Objectives whose crops are the cells of a grid, with no range to choose."""


@pytest.mark.parametrize("name", NAMES)
def test_crops_and_durations_that_cannot_be_are_refused_with_the_name_of_their_option(toys, name):
    options = find_objective(name).Config
    wrong = {key: [(0.9, 0.1), (0.0, 0.5), (-1.0, 1.0)] for key in CROPS}
    for key in CROPS[:3]:
        wrong[key] += [(0.5, 2.0)]
    wrong |= {key: ["ten", -1, "200%"] for key in DURATIONS}
    checked = 0
    for key in set(wrong) & set(options.model_fields):
        for value in wrong[key]:
            with pytest.raises(ValidationError) as error:
                options(**{**toys.small[name], key: value})
            assert {problem["loc"] for problem in error.value.errors()} == {(key,)}
            checked += 1
    assert checked or name in FIXED_CROPS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_every_objective_runs_on_every_kind_of_input(toys, name, kind, context):
    objective = toys.objective(name, kind)
    losses = objective(toys.batch(objective, kind), context)
    losses["loss"].backward()
    assert all(value.shape == () and value.isfinite() for value in losses.values())
    idle = {n for n, p in trained(objective).items() if p.grad is None or not p.grad.isfinite().all()}
    # Objectives that never mask tokens inside the encoder have no use for its mask token.
    assert idle <= {"backbone.mask_token"}


@pytest.mark.parametrize("name", NAMES)
def test_a_bag_of_vectors_has_nothing_to_crop_and_is_refused(toys, name):
    spec = InputSpec(axes=("y", "x"), size=(), channels=(Channel(name="a"), Channel(name="b")), bag=True)
    backbone = VisionTransformer(ModelConfig(width=24, depth=2, heads=2, positions="sincos"), spec)
    cls = find_objective(name)
    with pytest.raises(UsageError, match="a bag of vectors has none"):
        cls(cls.Config(**toys.small[name]), backbone)


def test_what_a_backbone_lacks_is_said_in_a_sentence(toys):
    objective = toys.objective("mae", model={"cls_token": False})
    with pytest.raises(UsageError, match="'mae' does not work with this VisionTransformer, which has no class token"):
        objective.need(has_cls=True)
    objective.need(can_drop_tokens=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_not_a_number_at_invalid_pixels_changes_nothing(toys, name, kind, context):
    results = []
    for nan in (False, True):
        objective = toys.objective(name, kind)
        batch = toys.batch(objective, kind, invalid=True, nan=nan)
        loss = objective(batch, context)["loss"]
        loss.backward()
        grads = [p.grad for p in trained(objective).values() if p.grad is not None]
        assert loss.isfinite()
        assert all(grad.isfinite().all() for grad in grads)
        results.append((loss.item(), grads))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def emptied(batch, rows):
    """The same batch; some of its samples have no valid pixel."""
    batch = copy.deepcopy(batch)
    for view in (view for views in batch.views.values() for view in views):
        if view.valid is None:
            view.valid = torch.ones(len(view), 1, *view.pixels.shape[2:], dtype=torch.bool)
        view.valid[rows] = False
        view.pixels[rows] = 7.0
        if view.mask is not None:
            view.mask[rows] = False
    return batch


def stepped(objective, batch, context):
    """Losses, gradients and state after a step without an optimiser."""
    objective.train()
    losses = objective(batch, context)
    losses["loss"].backward()
    objective.before_update(context)
    objective.after_update(context)
    grads = {name: p.grad for name, p in trained(objective).items() if p.grad is not None}
    return {name: loss.detach() for name, loss in losses.items()}, grads, objective.state_dict()


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_without_data_changes_nothing(toys, name, context):
    """Not the loss, not through batch statistics or assignments that are balanced, not what is remembered."""
    kind = toys.fits(name)[0]
    batch = toys.batch(toys.objective(name, kind), kind, batch=5)
    without = stepped(toys.objective(name, kind), emptied(batch, slice(0, 0))[1:], context)
    with_one = stepped(toys.objective(name, kind), emptied(batch, slice(0, 1)), context)
    for mine, theirs in zip(without, with_one, strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            wanted, found = value.to(torch.float64), theirs[key].to(torch.float64)
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * max(1.0, wanted.abs().max().item()), msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_without_data_gives_no_loss_and_no_gradient(toys, name, context):
    """A rank's share, or a micro-batch, may be nothing but windows without data."""
    kind = toys.fits(name)[0]
    batch = toys.batch(toys.objective(name, kind), kind)
    losses, grads, state = stepped(toys.objective(name, kind), emptied(batch, slice(None)), context)
    assert losses["loss"].item() == 0
    assert all(not grad.any() for grad in grads.values())
    assert all(value.isfinite().all() for value in state.values())


@pytest.mark.parametrize("name", NAMES)
def test_ranks_meet_in_the_same_collectives_whatever_their_windows_hold(toys, name, context, tmp_path, monkeypatch):
    """Otherwise one waits for the others for ever, or adds up what does not belong together."""
    kind = toys.fits(name)[0]
    objective = toys.objective(name, kind)
    whole = toys.batch(objective, kind)
    # What all ranks do once, together, such as the start of a codebook, is behind them.
    stepped(objective, whole, context)
    met: list[tuple[object, ...]] = []

    def watched(kind_of, tensor_of):
        original = getattr(dist, kind_of)

        def call(*arguments, **options):
            met.append((kind_of, tuple(tensor_of(arguments).shape), tensor_of(arguments).dtype))
            return original(*arguments, **options)

        monkeypatch.setattr(dist, kind_of, call)

    watched("all_reduce", lambda arguments: arguments[0])
    watched("all_gather", lambda arguments: arguments[1])
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        sequences = []
        for batch in (whole, emptied(whole, slice(0, 1)), emptied(whole, slice(None))):
            met.clear()
            stepped(copy.deepcopy(objective), batch, context)
            sequences.append(list(met))
    finally:
        dist.destroy_process_group()
    assert sequences[0]
    assert sequences[1] == sequences[0]
    assert sequences[2] == sequences[0]


@pytest.mark.parametrize("kind", ["rgb", "series"])
def test_a_short_run_of_mae_lowers_the_loss_on_pictures_it_has_not_seen(toys, kind, context):
    objective = toys.objective("mae", kind, norm_pix=False)
    unseen = toys.batch(objective, kind, batch=16, step=99)
    before = objective(unseen, context)["loss"].item()
    toys.train(objective, [toys.batch(objective, kind, step=step) for step in range(8)], steps=40)
    assert objective(unseen, context)["loss"].item() < 0.7 * before


@pytest.mark.parametrize("kind", ["rgb", "series"])
@pytest.mark.parametrize("name", ["dino", "ibot", "dinov2"])
def test_a_short_run_of_self_distillation_fits_a_fixed_teacher(toys, name, kind):
    """With momentum 1 and a settled centre the targets stand still, and the loss can only fall by learning them."""
    options = {"momentum": 1.0, "center_momentum": 0.5, "teacher_temp": 0.01, "teacher_temp_warmup": 0}
    if name == "ibot":
        options["teacher_patch_temp"] = 0.01
    objective = toys.objective(name, kind, freeze_last_layer=0, **options).train()
    batch = toys.batch(objective, kind)
    context = StepContext(0, 40, 10, 4)
    with torch.no_grad():
        for _ in range(10):
            objective(batch, context)
            objective.after_update(context)
    losses = toys.train(objective, [batch], steps=24)
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_is_saved_and_restored_goes_on_with_the_same_numbers(toys, name):
    objective = toys.objective(name)
    toys.train(objective, [toys.batch(objective)], steps=3)
    saved = copy.deepcopy(objective.state_dict())
    other = toys.objective(name, seed=5)
    other.load_state_dict(saved)
    context = StepContext(3, 40, 10, 4)
    batch = toys.batch(objective, step=3)
    for each in (objective, other.train()):
        each.zero_grad()
        each(batch, context)["loss"].backward()
        each.after_update(context)
    for (key, a), b in zip(objective.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    for key, parameter in trained(objective).items():
        mine, theirs = parameter.grad, trained(other)[key].grad
        assert (mine is None and theirs is None) or torch.equal(mine, theirs), key


@pytest.mark.parametrize("name", NAMES)
def test_every_objective_is_registered_with_requests_that_can_be_sent_to_workers(toys, name):
    assert find_objective(name) is OBJECTIVES[name]
    objective = toys.objective(name)
    requests = objective.view_requests()
    assert pickle.loads(pickle.dumps(requests)) == requests
    assert objective.name == name
    assert objective.pooling in ("cls", "mean", "cls+mean")


@pytest.mark.parametrize("name", NAMES)
def test_without_a_class_token_the_mean_of_the_patches_takes_its_place(toys, name, context):
    objective = toys.objective(name, model={"cls_token": False})
    assert objective.pooling == "mean"
    loss = objective(toys.batch(objective, invalid=True), context)["loss"]
    loss.backward()
    assert loss.isfinite()


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_autocast_gives_nearly_the_same_loss(toys, name, context):
    objective = toys.objective(name).eval()
    batch = toys.batch(objective)
    exact = objective(batch, context)["loss"].item()
    with torch.autocast("cpu", torch.bfloat16):
        rough = objective(batch, context)["loss"]
    assert rough.dtype == torch.float32
    assert rough.item() == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_the_view_pipeline_serves_every_objective_with_the_same_masks_at_any_split(toys, name, kind):
    objective = toys.objective(name, kind)
    spec = toys.toys[kind].spec
    pipeline = ViewPipeline(objective.view_requests(), NoAugmentation(), objective.backbone.grid, spec.axes, seed=3)
    sample = ArraySample(
        np.random.default_rng(0).normal(size=(spec.in_chans, *spec.size)).astype(np.float32),
        coords=toys.toys[kind].coords,
    )
    masked = 0
    for slot in range(8):
        key = SampleKey(0, slot, step=1, slot=slot, slots=8)
        views, again = pipeline(sample, key), pickle.loads(pickle.dumps(pipeline))(sample, key)
        assert [request.name for request in objective.view_requests()] == list(views)
        for request in objective.view_requests():
            for view, same in zip(views[request.name], again[request.name], strict=True):
                assert view.values.shape == (spec.in_chans, *request.size)
                assert (view.mask is None) == (request.mask is None)
                if view.mask is not None:
                    assert np.array_equal(view.mask, same.mask)
                    masked += bool(view.mask.any())
    asks = any(request.mask is not None for request in objective.view_requests())
    assert (masked > 0) == asks
