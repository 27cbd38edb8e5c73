"""``embed`` end to end: against its own encoder where that is the bottleneck, against a plain loop where reading is.

    python benchmarks/embed_rate.py ../shared/data/pathology/slides/CMU-1-Small-Region.svs

Everything is measured in one run, in turns, in wall time; medians of the rounds count. Compared are:

- ViT-B/16, untrained, float32, 224 px windows side by side: ``embed`` (reading, resampling, encoding, writing the
  store) against ``Encoder.embed`` on batches that lie in memory, with the same batch size and threads;
- a transformer of one block, patches of 32 px, on a slide that repeats the tiles: ``embed`` against a torch
  ``DataLoader`` over OpenSlide's ``read_region``, the conversion to normalised tensors in its workers, and the same
  model made by timm, with as many workers.

Starting of processes and the writing of results are in both times; imports, opening the encoder and tiling are not.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openslide
import timm
import torch
from slide_windows import Tiles
from torch.utils.data import DataLoader, Dataset

from fmsuite.commands.setup import domain_options, open_domain
from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.backbones.vit import VisionTransformer
from fmsuite.core.data.index import SampleIndex, Window
from fmsuite.core.data.reader import Reader
from fmsuite.core.data.sample import View
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.embedding import Pool, embed, store_facts
from fmsuite.core.encoders import Encoder
from fmsuite.core.features import FeatureStore
from fmsuite.core.inputs import InputSpec, rgb_channels

SIZE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SPEC = InputSpec(axes=("y", "x"), size=(SIZE, SIZE), channels=rgb_channels(), scale=1 / 255)
TINY = {"width": 64, "depth": 1, "heads": 2, "patch_size": 32}


def windows_of(path: str, limit: int | None) -> SampleIndex:
    """Windows side by side at the slide's own resolution."""
    with openslide.OpenSlide(path) as slide:
        width, height = slide.dimensions
    corners = [
        (float(y), float(x)) for y in range(0, height - SIZE + 1, SIZE) for x in range(0, width - SIZE + 1, SIZE)
    ]
    extent = (float(SIZE), float(SIZE))
    return SampleIndex.from_windows(
        (Window(path, "slide", corner, extent) for corner in corners[:limit]), {"domain": "pathology"}
    )


def reader_of(index: SampleIndex) -> Reader:
    domain = open_domain("pathology", domain_options("pathology", [f"size={SIZE}"]))
    return domain.reader(index)


def encoder_of(**options: object) -> Encoder:
    torch.manual_seed(0)
    return Encoder(VisionTransformer(ModelConfig.model_validate(options), SPEC), SPEC, "cls", {})


def of_embed(encoder: Encoder, index: SampleIndex, batch_size: int, workers: int, processes: int) -> float:
    reader = reader_of(index)
    with tempfile.TemporaryDirectory() as folder:
        facts = store_facts(encoder, index, name="benchmark", by="source", batch_size=batch_size)
        start = time.perf_counter()
        with FeatureStore.create_or_resume(Path(folder) / "f.zarr", facts, index) as store:
            embed(
                encoder,
                index,
                reader,
                store,
                workers=workers,
                skipped=SkippedLog(strict=True),
                batch_size=batch_size,
                pool=Pool(processes),
            )
            seconds = time.perf_counter() - start
            assert store.windows() == len(index)
    return seconds


def of_forward(encoder: Encoder, count: int, batch_size: int) -> float:
    pixels = torch.randint(0, 256, (batch_size, 3, SIZE, SIZE), dtype=torch.uint8)
    start = time.perf_counter()
    for first in range(0, count, batch_size):
        encoder.embed(View(pixels[: min(batch_size, count - first)]))
    return time.perf_counter() - start


class Regions(Dataset):
    """As scripts do it: one open slide a worker, floats from it."""

    def __init__(self, path: str, corners: list[tuple[int, int]]) -> None:
        self.path = path
        self.corners = corners
        self.slide: openslide.OpenSlide | None = None
        self.mean = torch.tensor(MEAN)[:, None, None]
        self.std = torch.tensor(STD)[:, None, None]

    def __len__(self) -> int:
        return len(self.corners)

    def __getitem__(self, number: int) -> torch.Tensor:
        if self.slide is None:
            self.slide = openslide.OpenSlide(self.path)
        image = self.slide.read_region(self.corners[number], 0, (SIZE, SIZE)).convert("RGB")
        values = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(255)
        return (values - self.mean) / self.std


def of_plain_loop(model: torch.nn.Module, index: SampleIndex, batch_size: int, workers: int) -> float:
    corners = [(int(x), int(y)) for y, x in index.table.column("position").to_pylist()]
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        loader = DataLoader(Regions(index.sources[0], corners), batch_size, num_workers=workers)
        with torch.inference_mode():
            features = torch.cat([model(batch) for batch in loader])
        torch.save(features, Path(folder) / "features.pt")
        return time.perf_counter() - start


def in_turns(rounds: int, measured: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    for run in measured.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in measured}
    for _ in range(rounds):
        for name, run in measured.items():
            seconds[name].append(run())
    return seconds


def show(title: str, count: int, seconds: dict[str, list[float]], baseline: str) -> None:
    print(f"{title} ({count} windows, {torch.get_num_threads()} threads)")
    for name, values in seconds.items():
        ratios = [base / value for base, value in zip(seconds[baseline], values, strict=True)]
        middle = statistics.median(values)
        print(
            f"  {name:40} {count / middle:8.1f} windows/s   x {statistics.median(ratios):.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f})",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("slide")
    parser.add_argument("--part", choices=("encoder", "reading", "both"), default="both")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--windows", type=int, default=96, help="of the large encoder")
    parser.add_argument("--batch-size", type=int, default=16, help="of the large encoder")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--processes", type=int, default=0, help="of embed, as --processes of the command")
    parser.add_argument("--repeat", type=int, default=4, help="times the tiles are repeated along each side")
    options = parser.parse_args()
    if options.part != "reading":
        index, encoder = windows_of(options.slide, options.windows), encoder_of(name="vit_base")
        names = ("ready batches", "embed")
        seconds = in_turns(
            options.rounds,
            {
                names[0]: lambda: of_forward(encoder, len(index), options.batch_size),
                names[1]: lambda: of_embed(encoder, index, options.batch_size, options.workers, options.processes),
            },
        )
        show("ViT-B/16", len(index), seconds, names[0])
    if options.part != "encoder":
        with tempfile.TemporaryDirectory() as folder:
            index = windows_of(Tiles(options.slide).repeated(Path(folder) / "large.tif", options.repeat), None)
            encoder = encoder_of(name="vit_tiny", **TINY)
            model = timm.models.VisionTransformer(
                SIZE, TINY["patch_size"], embed_dim=TINY["width"], depth=TINY["depth"], num_heads=TINY["heads"]
            )
            model.reset_classifier(0)
            model.eval()
            names = ("DataLoader, OpenSlide, timm", "embed")
            seconds = in_turns(
                options.rounds,
                {
                    names[0]: lambda: of_plain_loop(model, index, 64, options.workers),
                    names[1]: lambda: of_embed(encoder, index, 64, options.workers, options.processes),
                },
            )
            show(f"one block, {options.workers} workers", len(index), seconds, names[0])


if __name__ == "__main__":
    main()
