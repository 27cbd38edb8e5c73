"""Drop-path that skips what it drops, beside multiplying every sample's branch by a mask; and crops of two sizes in one
pass, beside a pass for each.

Forward and backward of the blocks of a ViT-S/16, in turns in one process; the median of the ratios. Writes nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from types import MethodType

import torch
from torch import Tensor

from fmsuite.core.backbones.base import Backbone
from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.backbones.layers import Block
from fmsuite.core.backbones.vit import VisionTransformer
from fmsuite.core.data.sample import View
from fmsuite.core.inputs import InputSpec, rgb_channels
from fmsuite.core.seeding import uniform_from_keys


def by_mask(keys: Tensor) -> Callable[..., Tensor]:
    """A block's forward that computes both branches for all samples."""

    def factor(rate: float, salt: int) -> Tensor:
        kept = uniform_from_keys(keys, salt) >= rate
        return (kept.to(torch.float32) / (1 - rate))[:, None, None].to(DEVICE)

    def forward(block: Block, x: Tensor, **_: object) -> Tensor:
        first, second = block.drop_path1, block.drop_path2
        x = x + block.ls1(block.attn(block.norm1(x))) * factor(first.rate, first.salt)
        return x + block.ls2(block.mlp(block.norm2(x))) * factor(second.rate, second.salt)

    return forward


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def build(rate: float, depth: int) -> VisionTransformer:
    torch.manual_seed(0)
    spec = InputSpec(axes=("y", "x"), size=(224, 224), channels=rgb_channels())
    config = ModelConfig(name="vit_small", patch_size=16, depth=depth, drop_path=rate, drop_path_uniform=True)
    return VisionTransformer(config, spec).train().to(DEVICE)


def compared(ways: dict[str, Callable[[], Tensor]], rounds: int, clock: Callable[[], float]) -> list[float]:
    """Ratios of the first way's time to the second's; the first round does not count."""
    ratios = []
    for number in range(rounds + 1):
        seconds = {}
        for name in list(ways) if number % 2 else reversed(list(ways)):
            begin = clock()
            ways[name]().backward()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            seconds[name] = clock() - begin
        first, second = (seconds[name] for name in ways)
        if number:
            ratios.append(first / second)
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.1, 0.4])
    parser.add_argument("--cpu-time", action="store_true", help="processor time of one thread")
    given = parser.parse_args()
    if given.cpu_time:
        torch.set_num_threads(1)
    clock = time.process_time if given.cpu_time else time.perf_counter
    keys = torch.arange(given.batch) * 31

    def show(what: str, ratios: list[float]) -> None:
        print(f"{what:<44} {statistics.median(ratios):.2f}  ({min(ratios):.2f} to {max(ratios):.2f})", flush=True)

    views = [View(torch.randn(given.batch, 3, side, side, device=DEVICE), keys=keys) for side in (224, 96)]
    for rate in given.rates:
        skipping, masking = build(rate, given.depth), build(rate, given.depth)
        for block in masking.blocks:
            block.forward = MethodType(by_mask(keys), block)  # type: ignore[method-assign]
        ways = {
            "mask": lambda model=masking: model(views[0]).cls.sum(),
            "skip": lambda model=skipping: model(views[0]).cls.sum(),
        }
        show(f"mask / skip, rate {rate:g}, 224 px", compared(ways, given.rounds, clock))
    packed, apart = build(0.0, given.depth), build(0.0, given.depth)
    apart.forward_crops = MethodType(Backbone.forward_crops, apart)  # type: ignore[method-assign]
    crops = [views[0], *[views[1]] * 4]
    ways = {
        "apart": lambda: torch.cat([each.cls for each in apart.forward_crops(crops)]).sum(),
        "packed": lambda: torch.cat([each.cls for each in packed.forward_crops(crops)]).sum(),
    }
    show("a pass a size / one pass, 224 and 4 x 96 px", compared(ways, given.rounds, clock))


if __name__ == "__main__":
    main()
