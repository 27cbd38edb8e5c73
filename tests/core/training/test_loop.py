from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fmsuite.core.data.sample import Batch
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.objectives.base import StepContext
from fmsuite.core.training import interrupt, metrics
from fmsuite.core.training.accumulation import split_batch
from fmsuite.core.training.loop import RunFolder
from fmsuite.core.training.metrics import read_metrics
from fmsuite.errors import FmsuiteError, UsageError
from tests.core.training.helpers import (
    ToyObjective,
    final_state,
    main,
    make_batch,
    make_config,
    make_loader,
    make_objective,
    run_toy,
    skipped_window,
)
from tests.forked import forkserver


def assert_same_state(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def measured(folder: Path) -> list[dict]:
    """Lines of the metrics without what the clock says."""
    clock = ("samples_per_second", "data_wait")
    return [{k: v for k, v in line.items() if k not in clock} for line in read_metrics(folder / "metrics.jsonl")]


def apart(*arguments: str) -> int | None:
    """The exit code of a toy run in a process of its own."""
    process = forkserver().Process(target=main, args=(arguments,))
    process.start()
    process.join(240)
    return process.exitcode


def test_the_toy_learns_and_leaves_metrics_and_checkpoints(tmp_path: Path) -> None:
    config = make_config(60, log_every=10, checkpoint_every=25, optim={"lr": 3e-2, "weight_decay_end": None})
    result = run_toy(tmp_path, config)
    lines = measured(tmp_path)
    assert [line["step"] for line in lines] == [1, 10, 20, 30, 40, 50, 60]
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    assert lines[-1]["loss"] == pytest.approx(lines[-1]["loss/agree"] + lines[-1]["loss/classify"], rel=1e-5)
    assert (result.step, result.interrupted) == (60, False)
    assert result.metrics["loss"] == lines[-1]["loss"]
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == ["step-00000050", "step-00000060"]
    assert result.checkpoint.name == "step-00000060"


def test_a_step_is_adamw_on_the_clipped_gradient_of_the_mean_loss(tmp_path: Path) -> None:
    config = make_config(3, optim={"warmup": 0, "layer_decay": 0.5, "weight_decay": 0.3, "clip_grad": 0.05})
    run_toy(tmp_path, config)

    reference = make_objective(config)
    groups = {}
    for name, parameter in reference.named_parameters():
        if parameter.requires_grad:
            lower = {"0": 0.25, "1": 0.5}.get(name.split(".")[2] if ".blocks." in name else "", 0.125)
            groups[name] = 1.0 if name.startswith(("head", "backbone.norm")) else lower
    optimizer = torch.optim.AdamW([{"params": [p]} for n, p in reference.named_parameters() if n in groups])
    for step in range(3):
        cosine = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / 3, dtype=torch.float64)).item())
        for (name, scale), group in zip(groups.items(), optimizer.param_groups, strict=True):
            group["lr"] = 3e-3 * cosine * scale
            matrix = name.endswith("weight") and "norm" not in name
            group["weight_decay"] = (0.4 - 0.1 * cosine) if matrix else 0.0
        batch = make_batch(config.seed, step, range(8))
        views = [dataclasses.replace(v, pixels=(v.pixels.float() / 255 - 0.5) / 0.25) for v in batch.views["views"]]
        optimizer.zero_grad()
        context = StepContext(step, 3, 5, 8)
        reference(dataclasses.replace(batch, views={"views": views}), context)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.05)
        optimizer.step()
        reference.after_update(context)
    state = final_state(tmp_path, 3)
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(state[f"objective.{name}"], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("trial", range(3))
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path: Path, trial: int) -> None:
    config = make_config(12, objective={"dropout": 0.3}, checkpoint_every=random.Random(trial).randint(1, 5))
    run_toy(tmp_path / "whole", config)

    class Killed(Exception):
        pass

    stops = sorted(random.Random(trial).sample(range(1, 12), 2))
    for stop in stops:

        def kill(step: int, stop: int = stop) -> None:
            if step == stop:
                raise Killed

        with pytest.raises(Killed):
            run_toy(tmp_path / "parts", config, resume=True, at=kill)
    result = run_toy(tmp_path / "parts", config, resume=True)
    assert result.step == 12
    assert_same_state(final_state(tmp_path / "parts", 12), final_state(tmp_path / "whole", 12))
    assert measured(tmp_path / "parts") == measured(tmp_path / "whole")


def test_dropout_draws_differ_between_steps_and_seeds(tmp_path: Path) -> None:
    objective = make_objective(make_config(objective={"dropout": 0.5}))
    draws: list[torch.Tensor] = []
    objective.dropout.register_forward_hook(lambda module, inputs, output: draws.append(output == 0))
    run_toy(tmp_path, make_config(4, objective={"dropout": 0.5}), objective=objective)
    assert not torch.equal(draws[0], draws[1])


def test_a_run_killed_outright_resumes_to_the_same_numbers(tmp_path: Path) -> None:
    config = make_config(12, objective={"dropout": 0.2})
    torch.set_num_threads(1)
    run_toy(tmp_path / "whole", config)
    parts = [str(tmp_path / "parts"), "--dropout", "0.2"]
    assert apart(*parts, "--stop-at", "7") == -signal.SIGKILL
    assert apart(*parts, "--resume") == 0
    assert_same_state(final_state(tmp_path / "parts", 12), final_state(tmp_path / "whole", 12))
    assert measured(tmp_path / "parts") == measured(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_leaves_a_checkpoint_to_resume(tmp_path: Path, number: int) -> None:
    config = make_config(9, checkpoint_every=100)
    run_toy(tmp_path / "whole", config)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def press(step: int) -> None:
        if step == 4:
            os.kill(os.getpid(), number)

    result = run_toy(tmp_path / "parts", config, at=press)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert (result.step, result.interrupted, result.checkpoint.exists()) == (5, True, True)
    assert run_toy(tmp_path / "parts", config, resume=True).step == 9
    assert_same_state(final_state(tmp_path / "parts", 9), final_state(tmp_path / "whole", 9))


def test_a_signal_in_the_last_step_is_no_interruption(tmp_path: Path) -> None:
    result = run_toy(
        tmp_path, make_config(5), at=lambda step: os.kill(os.getpid(), signal.SIGINT) if step == 4 else None
    )
    assert (result.step, result.interrupted) == (5, False)


def test_a_second_ctrl_c_stops_at_once_and_an_echo_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def press(step: int) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)

    result = run_toy(tmp_path / "echo", make_config(5), at=press)
    assert (result.step, result.interrupted) == (3, True)
    monkeypatch.setattr(interrupt, "ECHO_S", 0.0)
    with pytest.raises(KeyboardInterrupt):
        run_toy(tmp_path / "twice", make_config(5), at=press)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_metrics_on_a_full_disk_end_the_run_with_their_own_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    monkeypatch.setattr(RunFolder, "metrics_path", Path("/dev/full"))
    monkeypatch.setattr(metrics, "_keep_until", lambda path, step: None)
    with pytest.raises(FmsuiteError, match="/dev/full: cannot be written"):
        run_toy(tmp_path, make_config(4))


def test_a_run_that_died_before_its_first_checkpoint_starts_its_metrics_anew(tmp_path: Path) -> None:
    config = make_config(12)
    with pytest.raises(FmsuiteError, match="data ended"):
        run_toy(tmp_path, config, loader=lambda start: iter([make_batch(0, 0, range(8))]))
    run_toy(tmp_path, config, resume=True)
    assert [line["step"] for line in measured(tmp_path)] == [1, 2, 4, 6, 8, 10, 12]


def test_accumulated_micro_batches_equal_the_big_batch(tmp_path: Path) -> None:
    run_toy(tmp_path / "one", make_config(6))
    run_toy(tmp_path / "four", make_config(6, accumulate=4))
    for whole, parts in zip(measured(tmp_path / "one"), measured(tmp_path / "four"), strict=True):
        assert whole == pytest.approx(parts, rel=1e-4)


def test_micro_batches_keep_order_and_cover_the_batch() -> None:
    batch = make_batch(0, 0, range(6))
    parts = split_batch(batch, 3)
    assert [len(part) for part in parts] == [2, 2, 2]
    for name, group in batch.views.items():
        for number, view in enumerate(group):
            assert torch.equal(torch.cat([part.views[name][number].pixels for part in parts]), view.pixels)
    assert torch.equal(torch.cat([part.labels for part in parts]), batch.labels)
    with pytest.raises(FmsuiteError, match="6 samples cannot be divided into 4"):
        split_batch(batch, 4)


def run_main(me: int, *arguments: str) -> None:
    main(arguments)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_ranks_equal_one_process_at_the_same_global_batch(two_ranks, tmp_path: Path, accumulate: int) -> None:
    run_toy(tmp_path / "one", make_config(8))
    two_ranks(run_main, str(tmp_path / "two"), "--steps", "8", "--accumulate", str(accumulate), "--skip")
    for one, two in zip(measured(tmp_path / "one"), measured(tmp_path / "two"), strict=True):
        assert one == pytest.approx(two, rel=1e-4)
    one, two = final_state(tmp_path / "one", 8), final_state(tmp_path / "two", 8)
    for name, value in one.items():
        if name.startswith("objective."):
            torch.testing.assert_close(two[name], value, rtol=1e-3, atol=2e-5, msg=name)
    # Each rank replaced a window of its own.
    assert {line.split(",")[0] for line in (tmp_path / "two" / "skipped.csv").read_text().splitlines()[1:]} == {
        "slide0.svs",
        "slide1.svs",
    }


def test_a_signal_to_one_rank_stops_both_and_one_process_resumes(two_ranks, tmp_path: Path) -> None:
    run_toy(tmp_path / "whole", make_config(8))
    stop = ["--steps", "8", "--stop-at", "4", "--kill-with", str(int(signal.SIGINT))]
    two_ranks(run_main, str(tmp_path / "parts"), *stop)
    assert (tmp_path / "parts" / "result.txt").read_text() == "5 True"
    assert run_toy(tmp_path / "parts", make_config(8), resume=True).step == 8
    for one, two in zip(measured(tmp_path / "whole"), measured(tmp_path / "parts"), strict=False):
        if one["step"] == two["step"]:
            assert one == pytest.approx(two, rel=1e-4)


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(tmp_path: Path) -> None:
    config = make_config(12, objective={"poison_step": 6})
    with pytest.raises(FmsuiteError) as error:
        run_toy(tmp_path, config)
    message = str(error.value)
    assert "step 7" in message
    assert "agree is nan" in message
    assert "classify" not in message
    assert "step-00000004 is intact" in message
    assert "optim.lr" in message
    state = final_state(tmp_path, 4)
    assert all(value.isfinite().all() for value in state.values())


def test_a_run_is_not_overwritten_without_resume(tmp_path: Path) -> None:
    run_toy(tmp_path, make_config(3))
    with pytest.raises(UsageError, match="--resume"):
        run_toy(tmp_path, make_config(3))
    before = final_state(tmp_path, 3)
    assert run_toy(tmp_path, make_config(3), resume=True).step == 3
    assert_same_state(final_state(tmp_path, 3), before)


def test_another_configuration_is_refused_by_key(tmp_path: Path) -> None:
    run_toy(tmp_path, make_config(8))
    changed = make_config(8, optim={"lr": 5e-3, "betas": (0.9, 0.95)}, seed=4)
    with pytest.raises(UsageError) as error:
        run_toy(tmp_path, changed, resume=True)
    for key in ("optim.lr (was 0.003, is 0.005)", "optim.betas", "seed (was 3, is 4)"):
        assert key in str(error.value)
    assert "optim.eps" not in str(error.value)


def test_what_does_not_change_the_numbers_may_change_on_resume(tmp_path: Path) -> None:
    run_toy(tmp_path, make_config(8))
    relaxed = make_config(8, workers=0, log_every=1, checkpoint_every=3, keep_checkpoints=5, monitor={"knn_k": 3})
    assert run_toy(tmp_path, relaxed, resume=True).step == 8


def test_another_length_is_refused_because_schedules_follow_from_it(tmp_path: Path) -> None:
    run_toy(tmp_path, make_config(8))
    with pytest.raises(UsageError, match="length of 8 steps"):
        run_toy(tmp_path, make_config(10), resume=True)


def with_skips(config, steps: int, count: int):  # type: ignore[no-untyped-def]
    def loader(start: int) -> Iterator[Batch]:
        for step, batch in enumerate(make_loader(config)(start), start=start):
            if step < steps:
                batch.skipped += [skipped_window(10 * step + number) for number in range(count)]
            yield batch

    return loader


def test_replaced_windows_go_on_record(tmp_path: Path) -> None:
    config = make_config(6)
    log = SkippedLog(tmp_path / "skipped.csv")
    run_toy(tmp_path, config, loader=with_skips(config, 3, 2), skipped=log)
    assert sorted(entry.path for entry in log.entries) == sorted(f"slide{n}.svs" for n in (0, 1, 10, 11, 20, 21))


def test_too_many_replaced_windows_stop_the_run(tmp_path: Path) -> None:
    config = make_config(30, max_skipped=0.1)
    with pytest.raises(FmsuiteError, match=r"windows could not be read, more than training.max_skipped = 0.1"):
        run_toy(tmp_path, config, loader=with_skips(config, 30, 2))
    steps = [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert 4 <= steps[-1] < 10


def test_strict_makes_the_first_replaced_window_an_error(tmp_path: Path) -> None:
    config = make_config(6)
    with pytest.raises(FmsuiteError, match=r"slide0\.svs: corrupt tile"):
        run_toy(tmp_path, config, loader=with_skips(config, 1, 1), skipped=SkippedLog(strict=True))


def test_a_loader_that_ends_early_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FmsuiteError, match="data ended at step 2"):
        run_toy(tmp_path, make_config(6), loader=lambda start: iter([make_batch(0, s, range(8)) for s in range(2)]))


def test_a_batch_that_cannot_be_divided_is_refused_before_work(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"training\.accumulate 3"):
        run_toy(tmp_path, make_config(6, accumulate=3))
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("key", ["compile", "activation_checkpointing"])
def test_what_a_backbone_cannot_do_is_refused_by_name(tmp_path: Path, key: str) -> None:
    with pytest.raises(UsageError, match=f"ToyBackbone does not support training.{key}"):
        run_toy(tmp_path, make_config(6, **{key: True}))


def test_gradients_dropped_before_the_update_leave_parameters_alone(tmp_path: Path) -> None:
    class Frozen(ToyObjective):
        def before_update(self, context: StepContext) -> None:
            self.head.weight.grad = None

    config = make_config(4)
    base = make_objective(config)
    objective = Frozen(base.config, base.backbone)
    before = objective.head.weight.detach().clone()
    bias = objective.head.bias.detach().clone()
    run_toy(tmp_path, config, objective=objective)
    assert torch.equal(objective.head.weight, before)
    assert not torch.equal(objective.head.bias, bias)


def test_run_folder_records_what_is_needed_to_repeat(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.begin(make_config(), "abc", ["fmsuite", "pretrain"])
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (facts["seed"], facts["index_hash"]) == (3, "abc")
    assert facts["starts"][0]["command"] == ["fmsuite", "pretrain"]
    assert facts["starts"][0]["versions"]["torch"] == torch.__version__
    run.begin(make_config(), "abc", ["fmsuite", "pretrain", "--resume"], resume=True)
    assert len(run.facts()["starts"]) == 2
    with pytest.raises(UsageError, match=r"another index \(abc, now xyz\)"):
        run.begin(make_config(), "xyz", resume=True)
