from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fmsuite.core.data.sample import View
from fmsuite.core.evaluation.metrics import balanced_accuracy
from fmsuite.core.inputs import Normalize
from fmsuite.core.objectives.base import StepContext
from fmsuite.core.training.metrics import read_metrics
from fmsuite.core.training.monitor import Monitor, ProbeSet, encode
from fmsuite.errors import UsageError
from tests.core.training.helpers import SPEC, ToyObjective, make_batch, make_config, make_objective, run_toy

NORMALIZE = Normalize(SPEC)


def prepare(view: View) -> View:
    return View(NORMALIZE(view.pixels))


def make_probe(samples: int = 60, groups: int = 6) -> ProbeSet:
    batches = [make_batch(0, step, range(16)) for step in range(10)]
    return ProbeSet.collect(batches, "views", lambda row: f"slide{row % groups}", samples)


def test_a_probe_set_takes_the_first_windows_with_their_groups() -> None:
    probe = make_probe(20, groups=3)
    assert sum(len(view) for view in probe.views) == len(probe.labels) == 20
    assert probe.groups.tolist() == [row % 3 for row in [*range(16), *range(4)]]
    first = make_batch(0, 0, range(16))
    assert torch.equal(probe.views[0].pixels, first.views["views"][0].pixels)
    assert torch.equal(probe.labels[:16], first.labels)


def test_a_probe_set_needs_two_windows() -> None:
    with pytest.raises(UsageError, match=r"monitor.every=0"):
        make_probe(1)


def test_knn_neighbours_come_from_other_groups_only() -> None:
    # Every class has a group of its own, so votes from other groups are always wrong; within the group always right.
    probe = make_probe()
    objective = make_objective(make_config())
    probe.groups = probe.labels.clone()
    assert Monitor(probe, 1).look(objective, prepare, 0).knn == 0.0


def test_knn_equals_a_loop_over_windows() -> None:
    probe, objective = make_probe(), make_objective(make_config())
    report = Monitor(probe, 5).look(objective, prepare, 0)
    features = encode(objective.encoder, probe.views, prepare, "cls").double().numpy()
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    predicted = []
    for row in range(len(features)):
        others = [other for other in range(len(features)) if probe.groups[other] != probe.groups[row]]
        near = sorted(others, key=lambda other: -float(features[row] @ features[other]))[:5]
        votes = np.zeros(3)
        for other in near:
            votes[probe.labels[other]] += np.exp(features[row] @ features[other] / 0.07)
        predicted.append(int(votes.argmax()))
    assert report.knn == pytest.approx(balanced_accuracy(torch.tensor(predicted), probe.labels))
    assert report.knn > 0.5


@pytest.mark.parametrize("missing", ["labels", "classes", "groups"])
def test_without_classes_or_groups_there_is_no_knn(missing: str) -> None:
    probe = make_probe()
    if missing == "labels":
        probe.labels = torch.full_like(probe.labels, -1)
    elif missing == "classes":
        probe.labels = torch.where(probe.labels == 1, 1, -1)
    else:
        probe.groups = torch.zeros_like(probe.groups)
    assert Monitor(probe, 5).look(make_objective(make_config()), prepare, 0).knn is None


def test_looking_leaves_modes_random_state_and_gradients_alone() -> None:
    objective = make_objective(make_config())
    objective.train()
    objective.teacher.blocks[0].eval()
    modes = [module.training for module in objective.modules()]
    state = torch.get_rng_state()
    Monitor(make_probe(), 5).look(objective, prepare, 0)
    assert [module.training for module in objective.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in objective.parameters())


def test_training_is_the_same_with_and_without_monitoring(tmp_path: Path) -> None:
    settings = {"objective": {"dropout": 0.3}}
    run_toy(tmp_path / "blind", make_config(6, **settings))
    run_toy(tmp_path / "seen", make_config(6, monitor={"every": 2}, **settings), probe=make_probe())
    blind = [line["loss"] for line in read_metrics(tmp_path / "blind" / "metrics.jsonl")]
    lines = list(read_metrics(tmp_path / "seen" / "metrics.jsonl"))
    assert [line["loss"] for line in lines if "loss" in line] == blind
    looks = [line for line in lines if "features/rankme" in line]
    assert [line["step"] for line in looks] == [0, 2, 4, 6]
    assert all(0 <= line["features/knn_balanced_accuracy"] <= 1 for line in looks)


class Collapsing(ToyObjective):
    """From step 3 on, the teacher's final norm sends every image to the same vector."""

    def after_update(self, context: StepContext) -> None:
        super().after_update(context)
        if context.step == 3:
            self.backbone.norm.weight.data.zero_()
            self.backbone.norm.bias.data.fill_(1.0)
            self.teacher.load_state_dict(self.backbone.state_dict())

    def forward(self, batch, context: StepContext) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
        losses = super().forward(batch, context)
        return {name: loss * (context.step <= 3) for name, loss in losses.items()}


def test_a_collapse_is_reported_when_it_happens_and_health_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(6, monitor={"every": 1}, optim={"lr": 1e-4})
    with caplog.at_level(logging.WARNING, "fmsuite"):
        run_toy(tmp_path / "healthy", config, probe=make_probe())
    assert caplog.text == ""
    assert not any("features/collapse" in line for line in read_metrics(tmp_path / "healthy" / "metrics.jsonl"))

    base = make_objective(config)
    with caplog.at_level(logging.WARNING, "fmsuite"):
        run_toy(tmp_path / "sick", config, objective=Collapsing(base.config, base.backbone), probe=make_probe())
    reported = [
        line["step"] for line in read_metrics(tmp_path / "sick" / "metrics.jsonl") if "features/collapse" in line
    ]
    assert reported == [4, 5, 6]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert warnings[0].startswith("Step 4: the encoder seems to have collapsed")


def test_features_that_are_not_finite_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    objective = make_objective(make_config())
    objective.teacher.norm.bias.data[0] = torch.nan
    assert Monitor(make_probe(), 5).look(objective, prepare, 7).warning == "some features are not finite"
    assert "Step 7" in caplog.text


def test_a_resumed_run_compares_with_the_start_of_the_run(tmp_path: Path) -> None:
    config = make_config(8, monitor={"every": 4})

    class Killed(Exception):
        pass

    def kill(step: int) -> None:
        if step == 5:
            raise Killed

    with pytest.raises(Killed):
        run_toy(tmp_path, config, at=kill, probe=make_probe())
    first = next(read_metrics(tmp_path / "metrics.jsonl"))
    seen: list[tuple] = []
    look = Monitor.look

    def spy(self: Monitor, *arguments: object) -> object:
        seen.append(self.start)  # type: ignore[arg-type]
        return look(self, *arguments)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Monitor, "look", spy)
        run_toy(tmp_path, config, resume=True, probe=make_probe())
    assert seen == [(first["features/rankme"], first["features/std"])]
