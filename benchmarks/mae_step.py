"""A training step of MAE ViT-S/16, beside the same model built from the public lightly and timm packages.

A step is: a uint8 batch is normalised, masks are drawn, forward, backward, AdamW. Shapes, options, threads and
optimiser are the same on all sides; pixels are predicted normalised by patch. lightly's model is put together as its
MAE example does it. CrossMAE (Fu et al. 2024) has the same encoder and its paper's decoder (12 blocks), which predicts
a quarter of the tokens.

Needs the package lightly. Writes nothing unless asked to.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.backbones.vit import VisionTransformer
from fmsuite.core.data.sample import Batch, MaskContext, SampleKey, View
from fmsuite.core.inputs import IMAGENET_MEAN, IMAGENET_STD, InputSpec, Normalize, rgb_channels
from fmsuite.core.objectives.base import Objective, StepContext
from fmsuite.core.objectives.crossmae import CrossMAE, CrossMAEConfig
from fmsuite.core.objectives.mae import MAE, MAEConfig
from fmsuite.core.objectives.single_view import VIEW
from fmsuite.core.training.config import OptimConfig
from fmsuite.core.training.optim import apply_schedules, make_optimizer

RATIO, WIDTH, DEPTH, HEADS = 0.75, 512, 8, 16
LR, DECAY, BETAS = 1.5e-4, 0.05, (0.9, 0.95)
Step = Callable[[Tensor, int], float]


def ours(objective: Objective, size: int) -> Step:
    """The package's own step."""
    spec = objective.backbone.spec
    normalize = Normalize(spec)
    optimizer = make_optimizer(OptimConfig(lr=LR, weight_decay=DECAY, betas=BETAS), objective.train())
    apply_schedules(optimizer, LR, DECAY, LR)
    context = StepContext(0, 100, 10, 16)
    sampler = objective.view_requests()[0].mask
    shape = objective.grid.shape((size, size))

    def masks(samples: int, seed: int) -> Tensor:
        drawn = []
        for row in range(samples):
            generator = np.random.default_rng([seed, row])
            everywhere = np.ones(int(np.prod(shape)), bool)
            drawn.append(sampler(MaskContext(("y", "x"), shape, everywhere, generator, SampleKey(0, row))))
        return torch.from_numpy(np.stack(drawn))

    def step(images: Tensor, seed: int) -> float:
        view = View(normalize(images), mask=masks(len(images), seed), keys=torch.arange(len(images)) + seed)
        loss = objective(Batch({VIEW: [view]}, torch.arange(len(images)), torch.zeros(len(images))), context)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def theirs(size: int, depth: int) -> Step:
    """lightly's MAE on timm's transformer, the loss on pixels normalised by patch as the official code has it."""
    warnings.filterwarnings("ignore", message=".*MAEDecoderTIMM.*")
    import timm
    from lightly.models import utils
    from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM

    vit = timm.create_model("vit_small_patch16_224", img_size=size, num_classes=0, depth=depth)
    encoder = MaskedVisionTransformerTIMM(vit=vit)
    tokens = encoder.sequence_length
    decoder = MAEDecoderTIMM(
        num_patches=tokens - 1,
        patch_size=16,
        embed_dim=vit.embed_dim,
        decoder_embed_dim=WIDTH,
        decoder_depth=DEPTH,
        decoder_num_heads=HEADS,
        mlp_ratio=4.0,
    )
    model = nn.ModuleDict({"encoder": encoder, "decoder": decoder}).train()
    optimizer = torch.optim.AdamW(
        (p for p in model.parameters() if p.requires_grad), lr=LR, weight_decay=DECAY, betas=BETAS, fused=True
    )
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) * 255 for values in (IMAGENET_MEAN, IMAGENET_STD))

    def step(images: Tensor, seed: int) -> float:
        torch.manual_seed(seed)
        pixels = (images.to(torch.float32) - mean) / std
        keep, hidden = utils.random_token_mask((len(images), tokens), mask_ratio=RATIO)
        encoded = encoder.encode(images=pixels, idx_keep=keep)
        shown = decoder.embed(encoded)
        sequence = utils.repeat_token(decoder.mask_token, (len(images), tokens))
        sequence = utils.set_at_index(sequence, keep, shown.type_as(sequence))
        decoded = decoder.decode(sequence)
        predicted = decoder.predict(utils.get_at_index(decoded, hidden))
        target = utils.get_at_index(utils.patchify(pixels, 16), hidden - 1)
        centre, spread = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
        loss = nn.functional.mse_loss(predicted, (target - centre) / (spread + 1e-6).sqrt())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def build(name: str, size: int, depth: int) -> Step:
    """A step of ``lightly``, ``mae`` or ``crossmae``."""
    torch.manual_seed(0)
    if name == "lightly":
        return theirs(size, depth)
    spec = InputSpec(axes=("y", "x"), size=(size, size), channels=rgb_channels(), scale=1 / 255)
    model = ModelConfig(name="vit_small", patch_size=16, depth=depth, positions="sincos", init="xavier")
    backbone = VisionTransformer(model, spec)
    options = {"mask_ratio": RATIO, "decoder_width": WIDTH, "decoder_heads": HEADS}
    if name == "mae":
        return ours(MAE(MAEConfig(decoder_depth=DEPTH, **options), backbone), size)
    return ours(CrossMAE(CrossMAEConfig(**options), backbone), size)


def measure(
    names: list[str], batch: int, size: int, depth: int, rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of a step of each, in turns, in every order one after the other; one round before does not count."""
    steps = {name: build(name, size, depth) for name in names}
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
    times: dict[str, list[float]] = {name: [] for name in names}
    orders = list(permutations(names))
    for number in range(rounds + 1):
        # What ran before leaves its memory behind, so that each has to follow each.
        for name in orders[number % len(orders)]:
            begin = clock()
            loss = steps[name](images, number)
            if not np.isfinite(loss):
                raise RuntimeError(f"{name}: the loss is {loss}")
            if number:
                times[name].append(clock() - begin)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--depth", type=int, default=12, help="blocks of the encoders")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--profile", choices=["mae", "crossmae", "lightly"], help="the operators of one, and nothing else"
    )
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor time of one thread, where others use the machine as well"
    )
    parser.add_argument("--json", type=Path, help="where to write the times")
    given = parser.parse_args()
    if given.cpu_time:
        given.threads = 1
    torch.set_num_threads(given.threads)
    if given.profile:
        step = build(given.profile, given.size, given.depth)
        images = torch.randint(0, 256, (given.batch, 3, given.size, given.size), dtype=torch.uint8)
        step(images, 0)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            step(images, 1)
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=45))
        return
    names = ["lightly", "mae", "crossmae"]
    clock = time.process_time if given.cpu_time else time.perf_counter
    times = measure(names, given.batch, given.size, given.depth, given.rounds, clock)
    print(
        f"batch {given.batch}, {given.size} px, {given.threads} thread(s), {given.rounds} rounds, "
        f"torch {torch.__version__}\n"
    )
    print(f"{'step':<10} {'median s':>9} {'images/s':>9} {'lightly / it':>13}  least to most")
    for name in names:
        ratios = [base / own for base, own in zip(times["lightly"], times[name], strict=True)]
        middle = statistics.median(times[name])
        print(
            f"{name:<10} {middle:>9.3f} {given.batch / middle:>9.2f} {statistics.median(ratios):>13.2f}"
            f"  {min(ratios):.2f} to {max(ratios):.2f}"
        )
    if given.json:
        settings = {key: getattr(given, key) for key in ("batch", "size", "depth", "threads")}
        given.json.write_text(json.dumps({**settings, "seconds": times}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
