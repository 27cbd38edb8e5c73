"""What UNI's pretraining would cost, on paper: operations of the recipe's own shapes, stated rates, nothing measured.

Prints the section of docs/benchmarks.md; --write puts it there, between the marks. Figures of ours on GPUs are missing
until benchmarks/gpu_training.py has run on one; where it has, give its utilisation with --utilisation.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import yaml

from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.objectives.dinov2 import DINOv2Config
from fmsuite.core.training.flops import Flops, HeadShape, dinov2_step

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- cost model -->", "<!-- end of cost model -->"

TILES = {256: 75.8e6, 512: 24.3e6}
"""UNI's windows by their side (Chen et al. 2024, methods)."""
SLIDES = 100_426
BYTES_PER_PIXEL = 0.25
"""Of a tile in JPEG at a quality of 80 or so: two bits a pixel. An assumption; scanners' own tiles have 0.1 to 0.5."""
SLIDE_GB = 1.0
"""Mean size of a slide file. An assumption: 0.3 to 2 GB are common."""

PEAK, UTILISATION = 989.0, 0.45
"""Dense bfloat16 TFLOP/s of an H100 or H200 (NVIDIA's data sheet), and the share that this project aims at."""
NVLINK, INFINIBAND = 450e9, 50e9
"""Bytes a second, one way, of a GPU inside a node of 8 (NVLink 4) and between nodes (NDR InfiniBand of 400 Gb/s for
each GPU): data sheets; collectives reach 70 to 90% of them."""
REACHED = 0.8
NODE = 8
LATENCY = 30e-6
"""Of one small collective over many nodes. An assumption."""
DISK = 1e9
"""Bytes a second to a shared file system from one node. An assumption."""

READER = {"as it is": 862.0, "resampled to 0.5 um": 409.0, "as it is, through OpenSlide": 464.0}
"""Windows of 256 px a second on one core, random places of a large slide: measured, see "Windows of a slide"."""

PUBLISHED = ("DINOv2 ViT-L/16, its public configuration", 125_000 * 2048, 24.0, 32, "A100", 312.0)
"""What, samples, hours, GPUs, which, its dense bfloat16 TFLOP/s. DINOv2's README: 32 A100, about a day; its
configuration for them: 125,000 iterations of 2048."""


@dataclass(frozen=True)
class Run:
    """UNI's pretraining, as the recipe says it."""

    steps: int
    batch: int
    flops: Flops
    blocks: int
    rest: int
    heads: int
    prototypes: int
    width: int

    @property
    def samples(self) -> int:
        return self.steps * self.batch

    @property
    def trained(self) -> int:
        """Parameters that have gradients."""
        return self.blocks + self.rest + self.heads


def read_recipe() -> Run:
    recipe = yaml.safe_load((ROOT / "fmsuite" / "configs" / "recipes" / "uni.yaml").read_text(encoding="utf-8"))
    model = ModelConfig.model_validate(recipe["model"])
    options = {key: value for key, value in recipe["objective"].items() if key != "name"}
    objective = DINOv2Config.model_validate(options)
    size, patch = model.size, model.patch_size
    tokens, local, values = (224 // patch) ** 2, (96 // patch) ** 2, 3 * patch**2
    low, high = objective.mask_ratio
    shape = HeadShape(objective.head_hidden, objective.head_bottleneck, objective.head_layers, objective.prototypes)
    flops = dinov2_step(
        model,
        values,
        global_patches=tokens,
        local_patches=local,
        local_crops=objective.local_crops,
        masked=2 * tokens * objective.mask_share * (low + high) / 2,
        head=shape,
        patch_head=shape,
    )
    width = size.width
    block = 12 * width**2 + 13 * width + 2 * width
    head = (
        width * shape.hidden + shape.hidden**2 + shape.hidden * shape.bottleneck + shape.bottleneck * shape.prototypes
    )
    rest = values * width + tokens * width + 5 * width
    training = recipe["training"]
    return Run(
        training["steps"],
        training["batch_size"],
        flops,
        size.depth * block,
        rest,
        2 * head,
        objective.prototypes,
        width,
    )


def collective(bytes_: float, gpus: int, passes: float) -> float:
    """Seconds in which ``passes`` times (n - 1) / n of some bytes travel over the slowest links of a ring."""
    if gpus == 1:
        return 0.0
    rate = (NVLINK if gpus <= NODE else INFINIBAND) * REACHED
    return passes * (gpus - 1) / gpus * bytes_ / rate


@dataclass(frozen=True)
class Step:
    """Where the time of a step would go, in seconds, each part as if alone."""

    gpus: int
    compute: float
    ddp: float
    fsdp: float
    heads: float
    small: float
    windows: float
    saving: float


def step_on(run: Run, gpus: int, utilisation: float) -> Step:
    share = run.batch / gpus
    compute = share * run.flops.total / (PEAK * 1e12 * utilisation)
    # Gradients in float32: a reduction and a distribution of them.
    ddp = collective(4 * run.trained, gpus, 2)
    # Blocks in bfloat16 for the student's forward and backward and the teacher's forward; the rest in float32 once for
    # each of the two; gradients are reduced in float32 and not sent back.
    gathered = 3 * 2 * run.blocks + 2 * 4 * (run.rest + run.heads)
    fsdp = collective(gathered, gpus, 1) + collective(4 * run.trained, gpus, 1)
    # KoLeo's rows of two views, forward and backward; the mean logits of the centres.
    rows = 2 * run.batch * run.width * 4
    centres = 2 * run.prototypes * 4
    heads = collective(rows, gpus, 3) + collective(centres, gpus, 2)
    # With Sinkhorn-Knopp in their place: a maximum and a sum of all prototypes, three times for each of two heads.
    small = collective(2 * 3 * 2 * run.prototypes * 4, gpus, 2) + 12 * LATENCY
    windows = run.batch / compute / gpus * min(NODE, gpus)
    saving = 16 * run.trained / DISK
    return Step(gpus, compute, ddp, fsdp, heads, small, windows, saving)


def tables(run: Run, utilisation: float) -> str:
    """The page's section."""
    total = run.samples * run.flops.total
    hours = total / (PEAK * 1e12 * utilisation) / 3600
    name, samples, wall, gpus, gpu, peak = PUBLISHED
    rate = samples / (wall * 3600 * gpus)
    published = rate * run.flops.total / (peak * 1e12)
    pixels = sum(side**2 * count for side, count in TILES.items())
    passes, jpeg = run.samples / sum(TILES.values()), BYTES_PER_PIXEL * pixels / 1e12
    counts = ((run.blocks, 0), (run.heads, 0), (run.rest, 1))
    million = [f"{count / 1e6:,.{places}f}" for count, places in counts]
    each = f"{run.flops.forward / 1e9:,.0f}, {run.flops.backward / 1e9:,.0f} GFLOP"
    facts = {
        "operations a sample: forward, backward": each,
        "operations in all": f"{total:.2e}",
        f"GPU-hours at {100 * utilisation:.0f}% of {PEAK:,.0f} TFLOP/s (H100, H200)": f"{hours:,.0f}",
        f"GPU-hours at the published rate: {name}, {gpus} {gpu}, about {wall:.0f} h for {samples / 1e6:,.0f} million "
        f"samples ({rate:.0f}/s a GPU, {100 * published:.0f}% of its peak)": f"{run.samples / rate / 3600:,.0f}",
        "our own rate on a GPU": "not measured",
        "parameters with gradients: blocks, heads, rest": f"{', '.join(million)} million",
        "weights, two moments and teacher in float32; each checkpoint": f"{16 * run.trained / 1e9:.1f} GB",
        "windows as raw uint8": f"{3 * pixels / 1e12:,.0f} TB",
        f"windows as JPEG, {BYTES_PER_PIXEL} bytes a pixel": f"{jpeg:,.1f} TB",
        f"slides where they are, {SLIDE_GB:g} GB each": f"{SLIDE_GB * SLIDES / 1e3:,.0f} TB",
        f"read in all, as JPEG: {passes:.1f} passes": f"{passes * jpeg:,.0f} TB",
    }
    lines = [
        BEGIN,
        f"Recipe `uni`: {run.steps:,} steps of {run.batch:,} windows, {run.samples / 1e6:,.0f} million in all. Its "
        "drop-path of up to 0.1 leaves out a share that is neither",
        "computed nor counted. The publication's last 12,500 steps, at a higher resolution, are not in it.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {label} | {value} |" for label, value in facts.items()),
        "",
        "The parts of a step, each as if alone: what overlaps (gradients with the backward pass, gathering with the "
        "block before) is not taken off.",
        "",
        "| GPUs | 8 | 64 | 512 |",
        "|---|---|---|---|",
    ]
    steps = [step_on(run, gpus, utilisation) for gpus in (8, 64, 512)]

    def add(label: str, cells: list[str]) -> None:
        lines.append(f"| {label} | " + " | ".join(cells) + " |")

    def milliseconds(values: list[float]) -> list[str]:
        return [f"{1000 * value:,.1f} ms" for value in values]

    add("samples a GPU", [f"{run.batch // step.gpus}" for step in steps])
    add("compute", milliseconds([step.compute for step in steps]))
    add(f"DDP: all-reduce of {4 * run.trained / 1e9:.2f} GB of gradients", milliseconds([step.ddp for step in steps]))
    add("FSDP2: all-gathers and reduce-scatters", milliseconds([step.fsdp for step in steps]))
    add("KoLeo's rows and the centres of the prototypes", milliseconds([step.heads for step in steps]))
    add("Sinkhorn-Knopp in place of the centres", milliseconds([step.small for step in steps]))
    add(
        "compute's share of a step, nothing overlapped: DDP, FSDP2",
        [
            f"{100 * step.compute / (step.compute + step.ddp + step.heads):.0f}%, "
            f"{100 * step.compute / (step.compute + step.fsdp + step.heads):.0f}%"
            for step in steps
        ],
    )
    add("hours of the run by compute alone", [f"{run.steps * step.compute / 3600:,.1f}" for step in steps])
    add("windows a second a node of 8", [f"{step.windows:,.0f}" for step in steps])
    for label, speed in READER.items():
        add(f"cores a node to read them, {label}", [f"{step.windows / speed:.1f}" for step in steps])
    add(
        f"bytes a second a node, windows of {256} px as JPEG",
        [f"{step.windows * BYTES_PER_PIXEL * 256**2 / 1e6:,.0f} MB" for step in steps],
    )
    add("a checkpoint, from one node (a thread writes it)", [f"{step.saving:.1f} s" for step in steps])
    lines += [
        "",
        f"Assumptions: links of {NVLINK / 1e9:.0f} GB/s a GPU, one way, inside a node of {NODE} (NVLink 4), and "
        f"{INFINIBAND / 1e9:.0f} GB/s between nodes (NDR InfiniBand of 400 Gb/s",
        f"for each GPU), by their data sheets, of which collectives reach {100 * REACHED:.0f}%; rings; "
        f"{1e6 * LATENCY:.0f} us for a small collective; {DISK / 1e9:g} GB/s to a shared file system;",
        f"bytes of tiles and slides as said; utilisation equal at all sizes, which with {run.batch // 512} samples "
        "a GPU it would not be. Reader rates are those of",
        '"Windows of a slide", on one core of this machine; cutting ten crops and changing their colours is extra.',
        END,
    ]
    return "\n".join(lines)


def on_the_page(text: str) -> str:
    """What stands between the marks, they included."""
    return text[text.index(BEGIN) : text.index(END) + len(END)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--utilisation", type=float, default=UTILISATION)
    parser.add_argument("--write", action="store_true", help="into docs/benchmarks.md")
    given = parser.parse_args()
    made = tables(read_recipe(), given.utilisation)
    print(made)
    if given.write:
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(page.replace(on_the_page(page), made), encoding="utf-8")


if __name__ == "__main__":
    main()
