"""Heads run on masked tokens only: loss and gradients of predicting all tokens, and nothing computed besides."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fmsuite.core.objectives.crossmae import draw_predicted
from fmsuite.core.objectives.mae import masked_mean_error, patch_targets
from fmsuite.core.objectives.simmim import masked_l1_loss
from fmsuite.core.objectives.single_view import masked_ids


def _of_all(objective, batch) -> Tensor:
    """The loss by predicting every token."""
    view = batch.views["image"][0]
    prediction, mask = objective.predict(view)
    if objective.name == "mae":
        return objective.reconstruction_loss(view, prediction, mask)
    if objective.name == "simmim":
        target, weight, _, _ = patch_targets(objective.grid, view)
        return masked_l1_loss(prediction, target, weight, mask)
    target, weight = objective.targets(view)
    return masked_mean_error(prediction, target, weight, mask & (weight > 0).any(-1))


def _gradients(objective, loss: Tensor) -> dict[str, Tensor]:
    objective.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["rgb", "thirteen_grouped", "volume"])
@pytest.mark.parametrize("name", ["mae", "simmim", "maskfeat"])
@pytest.mark.parametrize("uneven", [False, True])
def test_loss_and_gradients_equal_predicting_all(toys, context, name, kind, uneven):
    objective = toys.objective(name, kind)
    batch = toys.batch(objective, kind, invalid=uneven)
    view = batch.views["image"][0]
    if uneven:
        # Another number of targets in each sample, and none at all in the last.
        for row in range(4):
            view.mask[row, : 3 * row] = False
        view.mask[3] = False
    expected = _of_all(objective, batch)
    wanted = _gradients(objective, expected)
    found = objective(batch, context)["loss"]
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    gradients = _gradients(objective, found)
    assert gradients.keys() == wanted.keys()
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[parameter], atol=1e-6, rtol=1e-5, msg=parameter)


@pytest.mark.parametrize("name", ["mae", "simmim", "maskfeat", "maskdistill", "crossmae", "ibot", "dinov2", "beit"])
def test_heads_compute_masked_tokens_alone(toys, context, name):
    objective = toys.objective(name, **({"patch_head": "separate"} if name in ("ibot", "dinov2") else {}))
    batch = toys.batch(objective)
    heads = {"mae": "decoder_pred", "crossmae": "decoder_pred", "ibot": "patch_head", "dinov2": "patch_head"}
    rows: list[int] = []
    head = objective.get_submodule(heads.get(name, "head"))
    head.register_forward_hook(lambda module, arguments, output: rows.append(output.shape[:-1].numel()))
    if name == "mae":
        last = objective.decoder_blocks[-1]
        for part in (last.mlp.fc1, last.attn.proj):
            part.register_forward_hook(lambda module, arguments, output: rows.append(output.shape[:-1].numel()))
    objective(batch, context)
    if name in ("ibot", "dinov2"):
        expected = sum(int(batch.views[each][0].mask.sum()) for each in ("global", "global_second"))
    else:
        view = batch.views["image"][0]
        expected = int(view.mask.sum())
        if name == "crossmae":
            share = objective.config.prediction_ratio / objective.config.mask_ratio
            expected = draw_predicted(view.mask, share, view.keys)[0].numel()
    assert rows == [expected] * (3 if name == "mae" else 1)


def test_numbers_of_masked_tokens():
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]]).bool()
    ids, counted = masked_ids(mask)
    assert [row[chosen].tolist() for row, chosen in zip(ids, counted, strict=True)] == [[1, 2], [3], []]
    assert all(len(set(row.tolist())) == 2 for row in ids)
    assert masked_ids(mask[2:])[0].shape == (1, 1)
