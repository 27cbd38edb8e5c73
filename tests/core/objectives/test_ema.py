"""EMA teachers against the closed form."""

from __future__ import annotations

import torch
from torch import nn

from fmsuite.core.objectives.ema import follow, teacher_of


def test_following_a_constant_student_equals_the_closed_form():
    student = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    teacher = teacher_of(student)
    start = [p.clone() for p in teacher.parameters()]
    with torch.no_grad():
        for p in student.parameters():
            p.add_(torch.randn_like(p))
        student[1].running_mean.fill_(3.0)
    for _ in range(7):
        follow(teacher, student, 0.8)
    for first, now, target in zip(start, teacher.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(now, 0.8**7 * first + (1 - 0.8**7) * target.detach())
    assert teacher[1].running_mean.tolist() == [3.0] * 3


def test_following_a_moving_student_equals_the_weighted_sum_of_its_past():
    student = nn.Linear(2, 2, bias=False)
    teacher = teacher_of(student)
    expected = student.weight.detach().clone()
    for step in range(5):
        with torch.no_grad():
            student.weight.copy_(torch.randn(2, 2, generator=torch.Generator().manual_seed(step)))
        momentum = 0.5 + 0.1 * step
        expected = momentum * expected + (1 - momentum) * student.weight.detach()
        follow(teacher, student, momentum)
    torch.testing.assert_close(teacher.weight, expected)


def test_a_teacher_is_a_frozen_copy_in_evaluation_mode():
    student = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    teacher = teacher_of(student)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not any(module.training for module in teacher.modules())
    assert student.training
    assert teacher[0].weight.data_ptr() != student[0].weight.data_ptr()
    follow(teacher, student, 1.0)
    assert torch.equal(teacher[0].weight, student[0].weight)
