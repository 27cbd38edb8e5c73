"""Losses against MONAI, scikit-learn-like closed forms, and one process against two."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fmsuite.core.adaptation.losses import (
    at_centres,
    bce,
    counted,
    cross_entropy,
    deep_supervision,
    deep_weights,
    dice_ce,
    dice_loss,
    regression,
)


def made(classes: int = 3, size: tuple[int, ...] = (5, 6), batch: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    logits = 2 * torch.randn(batch, classes, *size)
    target = torch.randint(0, classes, (batch, *size))
    target[0] = 0
    return logits, target, torch.ones(batch, *size, dtype=torch.bool)


@pytest.mark.parametrize(("background", "batch"), itertools.product([True, False], repeat=2))
def test_dice_is_monais(background, batch):
    losses = pytest.importorskip("monai.losses")
    for size in ((5, 6), (3, 4, 5)):
        logits, target, valid = made(size=size)
        options = {"include_background": background, "batch": batch}
        theirs = losses.DiceLoss(softmax=True, to_onehot_y=True, **options)(logits, target[:, None])
        ours = dice_loss(logits, target, valid, background=background, batch=batch)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        both = losses.DiceCELoss(softmax=True, to_onehot_y=True, lambda_dice=0.3, lambda_ce=0.7, **options)
        ours = dice_ce(logits, target, valid, dice_weight=0.3, ce_weight=0.7, background=background, batch=batch)
        torch.testing.assert_close(ours, both(logits, target[:, None]), rtol=1e-6, atol=1e-6)


def test_masked_dice_and_overlapping_classes_are_monais():
    losses = pytest.importorskip("monai.losses")
    logits, target, valid = made()
    valid = torch.rand(valid.shape) < 0.6
    theirs = losses.MaskedDiceLoss(softmax=False)(
        logits.softmax(1), F.one_hot(target, 3).movedim(-1, 1), valid[:, None].float()
    )
    torch.testing.assert_close(dice_loss(logits, target, valid), theirs, rtol=1e-6, atol=1e-6)
    overlapping = (torch.rand(logits.shape) < 0.4).float()
    theirs = losses.DiceLoss(sigmoid=True)(logits, overlapping)
    ours = dice_loss(logits, overlapping, torch.ones_like(valid), activation="sigmoid")
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_dice_by_hand():
    logits = torch.log(torch.tensor([[[0.8, 0.4], [0.6, 0.5]], [[0.2, 0.6], [0.4, 0.5]]]))[None]
    target = torch.tensor([[[0, 1], [1, 1]]])
    valid = torch.ones_like(target, dtype=torch.bool)
    zero = 1 - 2 * 0.8 / (2.3 + 1)
    one = 1 - 2 * 1.5 / (1.7 + 3)
    assert dice_loss(logits, target, valid, smooth=0).item() == pytest.approx((zero + one) / 2, rel=1e-6)
    assert dice_loss(logits, target, valid, smooth=0, background=False).item() == pytest.approx(one, rel=1e-6)


@pytest.mark.parametrize("loss", [dice_loss, cross_entropy, dice_ce])
def test_what_is_not_valid_counts_nowhere(loss):
    logits, target, _ = made()
    target[:, :, 4:] = -1
    target[3] = -1
    valid = counted(target)
    logits.requires_grad_()
    value = loss(logits, target, valid)
    torch.testing.assert_close(value, loss(logits[:3, :, :, :4], target[:3, :, :4], valid[:3, :, :4]))
    value.backward()
    assert not logits.grad[:, :, :, 4:].any()
    assert not logits.grad[3].any()
    assert logits.grad[:3, :, :, :4].any()
    nothing = loss(logits, target, torch.zeros_like(valid))
    assert nothing.item() == 0


def test_cross_entropy_bce_and_regression_by_hand():
    logits = torch.tensor([[0.0, math.log(3)], [5.0, -5.0]])
    valid = torch.tensor([True, False])
    assert cross_entropy(logits, torch.tensor([1, -1]), valid).item() == pytest.approx(-math.log(0.75))
    smoothed = -0.9 * math.log(0.75) - 0.05 * (math.log(0.75) + math.log(0.25)) - 0.0
    assert cross_entropy(logits, torch.tensor([1, 0]), valid, 0.1).item() == pytest.approx(smoothed)
    target = torch.tensor([[1.0, 0.0], [math.nan, 1.0]])
    parts = [math.log(2), math.log(4), math.log1p(math.exp(5))]
    assert bce(logits, target, ~target.isnan()).item() == pytest.approx(sum(parts) / 3)
    values, target = torch.tensor([1.0, 5.0, 0.0]), torch.tensor([1.5, 2.0, math.nan])
    known = ~target.isnan()
    assert regression(values, target, known).item() == pytest.approx((0.25 + 9) / 2)
    assert regression(values, target, known, "l1").item() == pytest.approx(3.5 / 2)
    assert regression(values, target, known, "huber").item() == pytest.approx((0.125 + 2.5) / 2)


def test_deep_supervision():
    assert deep_weights(3) == pytest.approx((4 / 7, 2 / 7, 1 / 7))
    labels = torch.arange(12).reshape(1, 2, 6)
    assert at_centres(labels, (1, 3)).tolist() == [[[7, 9, 11]]]
    assert at_centres(labels, (2, 6)) is labels
    assert at_centres(labels, (2, 4)).tolist() == [[[0, 2, 3, 5], [6, 8, 9, 11]]]
    logits, target, valid = made(size=(4, 6))
    coarse = torch.randn(4, 3, 2, 3)
    expected = 2 / 3 * cross_entropy(logits, target, valid)
    expected += 1 / 3 * cross_entropy(coarse, target[:, 1::2, 1::2], valid[:, ::2, ::2])
    torch.testing.assert_close(deep_supervision([logits, coarse], target, valid, cross_entropy), expected)


def _on_a_rank(rank: int, batch: bool) -> tuple[Tensor, Tensor]:
    logits, target, valid = made()
    valid[1:, :2] = False
    mine = slice(2 * rank, 2 * rank + 2)
    part = logits[mine].requires_grad_()
    loss = dice_ce(part, target[mine], valid[mine], batch=batch)
    loss.backward()
    return loss.detach(), part.grad


@pytest.mark.parametrize("batch", [True, False])
def test_two_ranks_are_one_process(two_ranks, batch):
    logits, target, valid = made()
    valid[1:, :2] = False
    whole = dice_ce(logits.requires_grad_(), target, valid, batch=batch)
    whole.backward()
    (first, upper), (second, lower) = two_ranks(_on_a_rank, batch)
    torch.testing.assert_close((first + second) / 2, whole.detach(), rtol=2e-6, atol=0)
    torch.testing.assert_close(torch.cat([upper, lower]) / 2, logits.grad, rtol=2e-5, atol=1e-8)
