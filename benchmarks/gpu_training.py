"""Training on a GPU: model FLOP utilisation, step times, memory and the profile's top entries.

Two models in bfloat16, DINOv2 ViT-L/16 (2 crops of 224 px and 8 of 96) and MAE ViT-L/16 (224 px, 75% masked, decoder
512 x 8), each in processes of its own that torchrun starts:

    ddp, fsdp2    the package's training: packed crops, heads on masked tokens, compiled blocks, fused AdamW
    plain         the same model in a bare loop: a call for each size of crop, nothing compiled, AdamW as it comes

Data lies in the GPU's memory. With --pipeline the package's own command trains from files instead, which adds reading.
Utilisation is the model's operations (fmsuite.core.training.flops) over what the device could do in that time.

Without a GPU it prints the operations, and that nothing was measured; --tiny runs all of it on small models, on any
device, to see that it works.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MethodType

import numpy as np
import torch
from torch import Tensor

from fmsuite.core import distributed
from fmsuite.core.backbones.base import Backbone
from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.backbones.vit import VisionTransformer
from fmsuite.core.data.sample import Batch, MaskContext, SampleKey, View
from fmsuite.core.inputs import InputSpec, Normalize, rgb_channels
from fmsuite.core.objectives.base import Objective, ObjectiveConfig, StepContext, find_objective
from fmsuite.core.objectives.dinov2 import DINOv2Config
from fmsuite.core.objectives.mae import MAEConfig
from fmsuite.core.training.backbones import set_up_backbones
from fmsuite.core.training.config import OptimConfig, TrainingConfig
from fmsuite.core.training.flops import Flops, HeadShape, dinov2_step, mae_step
from fmsuite.core.training.optim import apply_schedules, make_optimizer
from fmsuite.core.training.precision import autocast, choose_device, choose_precision
from fmsuite.core.training.strategy import make_strategy

WAYS = ("plain", "ddp", "fsdp2")
PEAKS = {
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "A6000": 155,
    "A10": 125,
    "RTX 4090": 165,
}
"""Dense bfloat16 TFLOP/s by what the device's name contains, the longest first; NVIDIA's data sheets."""


@dataclass(frozen=True)
class Case:
    """A model and its step.

    Attributes:
        batch: samples in a step.
        model, size: the backbone, and the side of its input.
        objective: what is trained on it; its ``name`` is the case's.
        flops: of one sample.
    """

    batch: int
    model: ModelConfig
    size: int
    objective: ObjectiveConfig
    flops: Flops


def cases(tiny: bool) -> dict[str, Case]:
    """By name; ``tiny`` keeps the structure and nothing of the size."""
    size, local, patch = (32, 16, 8) if tiny else (224, 96, 16)
    shape = {"width": 32, "depth": 2, "heads": 2} if tiny else {"name": "vit_large"}
    base = ModelConfig.model_validate({**shape, "patch_size": patch})
    crops, prototypes = (3, 64) if tiny else (8, 131072)
    heads = HeadShape(prototypes=prototypes, **({"hidden": 48, "bottleneck": 16} if tiny else {}))
    values, tokens, local_tokens = 3 * patch**2, (size // patch) ** 2, (local // patch) ** 2
    dinov2 = DINOv2Config(
        local_crops=crops,
        local_size=local,
        prototypes=prototypes,
        head_hidden=heads.hidden,
        head_bottleneck=heads.bottleneck,
        patch_head="separate",
        centering="sinkhorn",
        freeze_last_layer=0,
    )
    low, high = dinov2.mask_ratio
    counted = dinov2_step(
        base,
        values,
        global_patches=tokens,
        local_patches=local_tokens,
        local_crops=crops,
        masked=2 * tokens * dinov2.mask_share * (low + high) / 2,
        head=heads,
        patch_head=heads,
    )
    width, depth = (32, 2) if tiny else (512, 8)
    fixed = base.model_copy(update={"positions": "sincos"})
    mae = MAEConfig(decoder_width=width, decoder_depth=depth, decoder_heads=2 if tiny else 16)
    return {
        "dinov2": Case(
            4 if tiny else 64,
            base.model_copy(update={"layer_scale": 1e-5}),
            size,
            dinov2,
            counted,
        ),
        "mae": Case(
            4 if tiny else 256,
            fixed,
            size,
            mae,
            mae_step(fixed, tokens, values, mask_ratio=mae.mask_ratio, width=width, depth=depth),
        ),
    }


def synthetic(objective: Objective, batch: int, device: torch.device, seed: int) -> Batch:
    """A raw batch as the loader makes it, on the device; masks are the objective's own."""
    rng = torch.Generator().manual_seed(seed)
    grid = objective.backbone.grid
    assert grid is not None
    views: dict[str, list[View]] = {}
    masked = [request for request in objective.view_requests() if request.mask is not None]
    for request in objective.view_requests():
        group = []
        for _ in range(request.count):
            pixels = torch.randint(0, 256, (batch, 3, *request.size), dtype=torch.uint8, generator=rng)
            mask = None
            if request.mask is not None:
                shape, number = grid.shape(request.size), masked.index(request)
                everywhere = np.ones(int(np.prod(shape)), bool)
                drawn = [
                    request.mask(
                        MaskContext(
                            grid.token_axes,
                            shape,
                            everywhere,
                            np.random.default_rng([seed, number, row]),
                            SampleKey(0, row, step=seed, slot=row, slots=batch),
                            number,
                            len(masked),
                        )
                    )
                    for row in range(batch)
                ]
                mask = torch.from_numpy(np.stack(drawn))
            group.append(View(pixels, mask=mask, keys=torch.arange(batch) + 1000 * seed))
        views[request.name] = group
    return Batch(views, torch.arange(batch), torch.zeros(batch, dtype=torch.int64)).to(device)


def one(name: str, case: Case, way: str, given: argparse.Namespace) -> dict[str, object]:
    """Build, warm up and time a case in this process, which torchrun has started."""
    device = choose_device("auto")
    with distributed.process_group(device):
        precision = choose_precision("auto", device)
        torch.manual_seed(0)
        spec = InputSpec(axes=("y", "x"), size=(case.size,) * 2, channels=rgb_channels(), scale=1 / 255)
        model = case.model.model_copy(update={"drop_path": given.drop_path, "drop_path_uniform": True})
        objective = find_objective(name)(case.objective, VisionTransformer(model, spec))
        compiled = way != "plain" and not given.no_compile
        training = TrainingConfig(
            steps=1, compile=compiled, activation_checkpointing=way != "plain" and given.checkpoint
        )
        strategy = make_strategy("fsdp2" if way == "fsdp2" else "ddp", objective, device, precision)
        set_up_backbones(objective, training, device, strategy.name)
        objective = strategy.place()
        objective.train()
        optim = OptimConfig(name="adamw", lr=1e-4, clip_grad=3.0)
        optimizer = make_optimizer(optim, objective)
        if way == "plain":
            backbone = objective.backbone
            backbone.forward_crops = MethodType(Backbone.forward_crops, backbone)  # type: ignore[method-assign]
            optimizer = torch.optim.AdamW((p for p in objective.parameters() if p.requires_grad), lr=1e-4)
        else:
            apply_schedules(optimizer, 1e-4, 0.05, 1e-4)
        normalize, called = Normalize(spec).to(device), strategy.begin()
        batch = given.batch or case.batch
        context = StepContext(100, 1000, 100, batch * distributed.world_size())
        batches = [synthetic(objective, batch, device, seed) for seed in range(2)]

        def normalised(view: View) -> View:
            return View(normalize(view.pixels), mask=view.mask, keys=view.keys)

        def step(number: int) -> Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            with strategy.accumulating(last=True), autocast(precision, device):
                loss = called(batches[number % 2].map_views(normalised), context)["loss"]
            loss.backward()
            strategy.average_rest()
            objective.before_update(context)
            strategy.clip(optim.clip_grad, optim.clip_per_parameter)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            objective.after_update(context)
            return loss.detach()

        result = _timed(step, device, given)
        result |= {
            "batch": batch,
            "ranks": distributed.world_size(),
            "precision": precision,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        }
        if given.profile and distributed.is_main():
            result["profile"] = _profiled(step, device)
        return result


def _timed(step: Callable[[int], Tensor], device: torch.device, given: argparse.Namespace) -> dict[str, object]:
    """Seconds of each step, from events on the device where it has them, and the memory at its highest."""
    on_gpu = device.type == "cuda"
    loss = torch.zeros(())
    for number in range(given.warm_up):
        loss = step(number)
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(given.steps + 1)]
        marks[0].record()
        for number in range(given.steps):
            loss = step(number)
            marks[number + 1].record()
        torch.cuda.synchronize()
        seconds = [first.elapsed_time(second) / 1000 for first, second in pairwise(marks)]
        memory = torch.cuda.max_memory_allocated() / 2**30
    else:
        seconds, memory = [], float("nan")
        for number in range(given.steps):
            begin = time.perf_counter()
            loss = step(number)
            seconds.append(time.perf_counter() - begin)
    if not bool(loss.isfinite()):
        raise RuntimeError(f"the loss is {loss.item()}")
    return {"seconds": statistics.median(seconds), "slowest": max(seconds), "memory_gib": memory}


def _profiled(step: Callable[[int], Tensor], device: torch.device) -> str:
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profile:
        for number in range(2):
            step(number)
        if device.type == "cuda":
            torch.cuda.synchronize()
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return profile.key_averages().table(sort_by=key, row_limit=15, max_name_column_width=70)


def launch(name: str, way: str, given: argparse.Namespace) -> dict[str, object]:
    """``one`` under torchrun."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={given.ranks}"]
        command += [__file__, *sys.argv[1:], "--one", name, way, str(out)]
        found = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if found.returncode or not out.exists():
            # The end of it, where the cause stands.
            return {"failed": "\n".join(found.stderr.strip().splitlines()[-12:]) or f"exit {found.returncode}"}
        return json.loads(out.read_text(encoding="utf-8"))


def through_the_pipeline(name: str, case: Case, given: argparse.Namespace) -> dict[str, object]:
    """The package's own command on files: its rate over the last half of the run, and its share of waiting."""
    batch, steps = given.batch or case.batch, given.warm_up + 2 * given.steps
    options = {
        **{f"model.{key}": getattr(case.model, key) for key in case.model.model_fields_set},
        **{f"objective.{key}": getattr(case.objective, key) for key in case.objective.model_fields_set},
        **{"model.input_size": case.size, "model.drop_path": given.drop_path, "model.drop_path_uniform": True},
        **{"training.steps": steps, "training.batch_size": batch * given.ranks, "training.log_every": 1},
        **{"training.compile": not given.no_compile, "optim.name": "adamw", "monitor.every": 0},
    }
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={given.ranks}"]
        command += ["-m", "fmsuite", "pretrain", *given.pipeline.split(), "--objective", name, "--out", f"{folder}/run"]
        for key, value in options.items():
            command += ["--set", f"{key}={json.dumps(value)}"]
        subprocess.run(command, check=True)
        lines = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["step"] > steps // 2 and "samples_per_second" in line]
    return {
        "samples_per_second": statistics.median(line["samples_per_second"] for line in last),
        "data_wait": statistics.median(line["data_wait"] for line in last),
    }


def peak_of(device: str, override: float | None) -> float | None:
    """Dense bfloat16 TFLOP/s of a device, if it is known."""
    if override is not None:
        return override
    return next((PEAKS[name] for name in sorted(PEAKS, key=len, reverse=True) if name in device), None)


def operations(known: dict[str, Case]) -> str:
    lines = [f"{'GFLOP a sample':<16} {'forward':>10} {'backward':>10} {'together':>10}"]
    for name, case in known.items():
        counts = (case.flops.forward, case.flops.backward, case.flops.total)
        lines.append(f"{name:<16} " + " ".join(f"{count / 1e9:>10.4g}" for count in counts))
    return "\n".join(lines)


def row(name: str, way: str, case: Case, found: dict[str, object], peak: float | None, drop_path: float) -> str:
    if "failed" in found:
        return f"{name:<8} {way:<6} failed: {found['failed']}"
    seconds, samples = float(str(found["seconds"])), int(str(found["batch"])) / float(str(found["seconds"]))
    done = case.flops.total * (1 - drop_path) * samples / 1e12
    share = f"{100 * done / peak:>6.1f}%" if peak else "      -"
    return (
        f"{name:<8} {way:<6} {1000 * seconds:>9.1f} {1000 * float(str(found['slowest'])):>9.1f} {samples:>10.1f}"
        f" {done:>8.2f} {share} {float(str(found['memory_gib'])):>8.1f}"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["dinov2", "mae"], action="append")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--batch", type=int, help="samples a rank; 64 for dinov2 and 256 for mae if not given")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=8)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--drop-path", type=float, default=0.0)
    parser.add_argument("--checkpoint", action="store_true", help="compute activations again, except in the plain loop")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--profile", action="store_true", help="the top entries of each")
    parser.add_argument("--peak", type=float, help="dense bfloat16 TFLOP/s of the device")
    parser.add_argument("--pipeline", help="arguments of fmsuite pretrain: '--domain pathology --data slides'")
    parser.add_argument("--tiny", action="store_true", help="small models, on any device")
    parser.add_argument("--json", type=Path, help="where to write what was found")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    given = parse()
    known = {name: case for name, case in cases(given.tiny).items() if not given.only or name in given.only}
    if given.one:
        name, way, out = given.one
        found = one(name, known[name], way, given)
        if int(os.environ.get("RANK", "0")) == 0:
            Path(out).write_text(json.dumps(found), encoding="utf-8")
        return
    print(operations(known))
    if not torch.cuda.is_available() and not given.tiny:
        print("\nNothing was measured: PyTorch sees no GPU here.")
        return
    print(
        f"\n{'model':<8} {'way':<6} {'step ms':>9} {'slowest':>9} {'samples/s':>10} {'TFLOP/s':>8}     MFU {'GiB':>8}"
    )
    results: dict[str, dict[str, object]] = {}
    for name, case in known.items():
        for way in given.ways:
            found = results[f"{name}/{way}"] = launch(name, way, given)
            peak = peak_of(str(found.get("device")), given.peak)
            print(row(name, way, case, found, peak, given.drop_path), flush=True)
            if "profile" in found:
                print(found["profile"])
        if given.pipeline:
            found = results[f"{name}/pipeline"] = through_the_pipeline(name, case, given)
            rate, waited = float(str(found["samples_per_second"])), float(str(found["data_wait"]))
            print(f"{name:<8} from files: {rate:.1f} samples/s, {100 * waited:.0f}% of the time waiting for data")
    if given.json:
        given.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if any("failed" in found for found in results.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
