"""A batch in micro-batches against the batch as a whole."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest
import torch

from fmsuite.core.data.sample import Batch
from fmsuite.core.objectives.base import OBJECTIVES, Objective, StepContext
from fmsuite.core.training.accumulation import batch_statistics, shares, split_batch
from fmsuite.core.training.optim import clip_gradients
from tests.core.objectives import conftest as toys
from tests.core.training.helpers import ToyObjective, make_config, make_objective, run_toy

CPU = torch.device("cpu")
SAMPLES = 8


def take_steps(name: str, parts: int, invalid: bool = False, **options: object) -> dict[str, torch.Tensor]:
    """Losses, gradient norms and weights of three steps of SGD, which carries every difference of gradients on."""
    objective = toys._objective(name, **options).train()
    optimizer = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=1e-2, momentum=0.9)
    measured = {}
    for step in range(3):
        context = StepContext(step, 10, 1, SAMPLES)
        batch = toys._batch(objective, batch=SAMPLES, step=step, invalid=invalid)
        if invalid:
            batch = with_holes(objective, batch)
        pieces = split_batch(batch, parts)
        total = torch.zeros(())
        for piece, share in zip(pieces, shares(objective, pieces, CPU), strict=True):
            loss = objective(piece, context)["loss"] * share
            loss.backward()
            total += loss.detach()
        objective.before_update(context)
        measured[f"loss {step}"] = total
        measured[f"norm {step}"] = clip_gradients(objective.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        objective.after_update(context)
    return {**measured, **objective.state_dict()}


def with_holes(objective: Objective, batch: Batch) -> Batch:
    """The first samples lose more and more of their masked tokens, so that micro-batches have unlike numbers."""

    def cut(view):  # type: ignore[no-untyped-def]
        valid = view.valid.clone()
        for row in range(SAMPLES // 2):
            valid[row, :, : 3 + 3 * row] = False
        layout = objective.backbone.layout(dataclasses.replace(view, valid=valid))
        return dataclasses.replace(view, valid=valid, mask=view.mask & layout.valid)

    return batch.map_views(cut)


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value.is_floating_point():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("name", ["mae", "simmim", "maskfeat", "ijepa", "dino", "ibot"])
def test_micro_batches_give_the_result_of_the_batch(name: str, parts: int) -> None:
    assert_close(take_steps(name, parts), take_steps(name, 1))


@pytest.mark.parametrize("name", ["mae", "simmim"])
def test_micro_batches_with_unlike_numbers_of_targets_do_too(name: str) -> None:
    whole = take_steps(name, 1, invalid=True)
    assert_close(take_steps(name, 4, invalid=True), whole)
    objective = toys._objective(name)
    pieces = split_batch(with_holes(objective, toys._batch(objective, batch=SAMPLES, invalid=True)), 4)
    weights = [float(share) for share in shares(objective, pieces, CPU)]
    assert sum(weights) == pytest.approx(1)
    assert weights[1] < 0.9 * weights[2]


def test_batches_without_targets_count_the_same() -> None:
    class Nothing(type(make_objective(make_config()))):  # type: ignore[misc]
        def target_count(self, batch: Batch) -> torch.Tensor:
            return torch.zeros(())

    base = make_objective(make_config())
    assert [float(s) for s in shares(Nothing(base.config, base.backbone), [None] * 4, CPU)] == [0.25] * 4  # type: ignore[list-item]


def test_objectives_that_know_the_batch_say_so_and_the_page_names_them() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "scale.md").read_text(encoding="utf-8")
    section = page[page.index("Where samples know each other") : page.index("## Checkpoints")]
    for name, objective in OBJECTIVES.items():
        compares = objective.check_batch is not Objective.check_batch
        assert not compares or objective.batch_statistic, name
        assert (f"`{name}`" in section) == (objective.batch_statistic is not None), name
    for name in ("mae", "dino", "ibot", "simmim", "ijepa"):
        assert batch_statistics(toys._objective(name)) is None
    assert batch_statistics(toys._objective("simclr")) == "negatives"


def test_a_run_says_once_what_is_not_the_whole_batchs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "fmsuite"):
        run_toy(tmp_path / "silent", make_config(3, accumulate=2))
    assert "accumulate" not in caplog.text
    monkeypatch.setattr(ToyObjective, "batch_statistic", "negatives")
    with caplog.at_level(logging.INFO, "fmsuite"):
        run_toy(tmp_path / "said", make_config(3, accumulate=2))
    assert caplog.text.count("negatives of 'toy' are those of 4 samples, not of the whole batch of 8") == 1
