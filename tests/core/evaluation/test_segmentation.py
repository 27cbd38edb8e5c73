"""Dice and IoU of label maps by hand, with classes that are absent."""

from __future__ import annotations

import pytest
import torch

from fmsuite.core.evaluation.segmentation import CaseCounts, case_confusion, mean_over_cases, pooled_scores

TRUE = torch.tensor([[[0, 0, 1], [1, 1, 2]], [[0, 0, 0], [0, 0, -1]]])
SAID = torch.tensor([[[0, 1, 1], [1, 0, 2]], [[0, 0, 2], [0, 0, 1]]])
# Class 3 is nowhere.
COUNTS = CaseCounts.of(torch.stack([case_confusion(said, true, 4) for said, true in zip(SAID, TRUE)]))


def test_dice_and_iou_by_hand():
    dice, iou = COUNTS.dice(), COUNTS.iou()
    assert dice[0, :3].tolist() == pytest.approx([2 / 4, 4 / 6, 1.0])
    assert iou[0, :3].tolist() == pytest.approx([1 / 3, 2 / 4, 1.0])
    assert dice[1, [0, 2]].tolist() == pytest.approx([8 / 9, 0.0])
    assert iou[1, [0, 2]].tolist() == pytest.approx([4 / 5, 0.0])
    # Neither labelled nor predicted (the ignored sample's prediction does not count): not asked.
    assert dice[:, 3].isnan().all()
    assert dice[1, 1].isnan()


def test_means_over_cases_and_over_pooled_samples():
    one = torch.ones(2, 1)
    means = mean_over_cases(COUNTS.dice(), one)
    assert means["0"].item() == pytest.approx((2 / 4 + 8 / 9) / 2)
    assert means["1"].item() == pytest.approx(4 / 6)
    assert means["2"].item() == pytest.approx(0.5)
    assert means["mean"].item() == pytest.approx(((2 / 4 + 8 / 9) / 2 + 4 / 6 + 0.5) / 3)
    pooled = pooled_scores(COUNTS, one)
    assert [pooled[str(k)].item() for k in range(3)] == pytest.approx([5 / 8, 2 / 4, 1 / 2])
    assert pooled["mean"].item() == pytest.approx((5 / 8 + 2 / 4 + 1 / 2) / 3)
    assert pooled["3"].isnan()
    doubled = pooled_scores(COUNTS, torch.tensor([[2.0, 1.0], [0.0, 1.0]]), CaseCounts.dice)
    assert doubled["0"].tolist() == pytest.approx([2 / 4, 10 / 13])


def test_validity_leaves_samples_out():
    valid = TRUE[0] != 2
    matrix = case_confusion(SAID[0], TRUE[0], 3, valid)
    assert matrix.tolist() == [[1, 1, 0], [1, 2, 0], [0, 0, 0]]
