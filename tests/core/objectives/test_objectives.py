"""What every objective must do: run on every kind of input, survive invalid pixels, learn, be saved."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from fmsuite.core.objectives.base import OBJECTIVES, StepContext, find_objective

NAMES = ("mae", "dino", "ibot", "dinov2")
KINDS = ("rgb", "thirteen_grouped", "two_channels", "volume", "series")


def trained(objective):
    return {name: p for name, p in objective.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_every_objective_runs_on_every_kind_of_input(toys, name, kind, context):
    objective = toys.objective(name, kind)
    losses = objective(toys.batch(objective, kind), context)
    losses["loss"].backward()
    assert all(value.shape == () and value.isfinite() for value in losses.values())
    idle = {n for n, p in trained(objective).items() if p.grad is None or not p.grad.isfinite().all()}
    # Objectives that never mask tokens inside the encoder have no use for its mask token.
    assert idle == ({"backbone.mask_token"} if name in ("mae", "dino") else set())


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


@pytest.mark.parametrize("kind", ["rgb", "series"])
@pytest.mark.parametrize("name", NAMES)
def test_a_short_run_lowers_the_loss(toys, name, kind):
    options = {} if name == "mae" else {"teacher_temperature_warmup": 0, "momentum": 0.99}
    objective = toys.objective(name, kind, **options)
    batches = [toys.batch(objective, kind, step=step) for step in range(2)]
    losses = toys.train(objective, batches)
    first, last = sum(losses[:4]) / 4, sum(losses[-4:]) / 4
    assert last < 0.9 * first


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
    assert objective.pooling == "cls"


@pytest.mark.parametrize("name", ["dino", "ibot", "dinov2"])
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
