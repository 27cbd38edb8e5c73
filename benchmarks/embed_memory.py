"""Peak memory of ``embed`` over many slides against few.

    python benchmarks/embed_memory.py

Makes slides and embeds each number of them in a process of its own, with a loader's process, as
``fmsuite embed`` does; ``--processes 2`` embeds in two more. While it runs, the proportional set sizes of all its
processes are added up: anonymous and shared memory, pages of several processes once. Pages of files (libraries, slides)
are left out: other programs decide how they are shared. The largest sum counts, and each number is run in turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tifffile

from fmsuite.core.data.index import SampleIndex, Window

SIDE, SIZE = 16, 32
LOOK_S = 0.1
COUNTED = ("Pss_Anon:", "Pss_Shmem:")

RUN = """
import sys
from pathlib import Path
import torch
from fmsuite.commands.embed import embed
from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.backbones.vit import VisionTransformer
from fmsuite.core.encoders import save_encoder
from fmsuite.core.inputs import InputSpec, rgb_channels

if __name__ == "__main__":
    index, out, processes, width = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    spec = InputSpec(axes=("y", "x"), size=(32, 32), channels=rgb_channels(), scale=1 / 255)
    config = ModelConfig(name="vit_tiny", width=width // 2, depth=1, heads=2, patch_size=32)
    save_encoder(out.parent / "run", VisionTransformer(config, spec), spec, "cls+mean", {})
    done = embed(str(out.parent / "run"), index, out, device="cpu", workers=1, processes=processes)
    assert not done.skipped
    print(done.groups, done.windows)
"""


def make_slides(folder: Path, count: int) -> list[Path]:
    """Tiled, compressed images of ``SIDE`` x ``SIDE`` windows."""
    folder.mkdir()
    side = SIDE * SIZE
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    paths = [folder / f"{number:04}.tif" for number in range(count)]
    for number, path in enumerate(paths):
        tifffile.imwrite(
            path,
            np.roll(pixels, number, axis=0),
            tile=(256, 256),
            photometric="rgb",
            compression="jpeg",
            metadata=None,
        )
    return paths


def index_of(slides: list[Path]) -> SampleIndex:
    extent = (float(SIZE), float(SIZE))
    windows = (
        Window(str(path), path.stem, (float(y * SIZE), float(x * SIZE)), extent)
        for path in slides
        for y in range(SIDE)
        for x in range(SIDE)
    )
    return SampleIndex.from_windows(windows, {"domain": "pathology", "options": {"size": SIZE}})


def tree(pid: int) -> list[int]:
    """A process and its descendants."""
    found, waiting = [], [pid]
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            try:
                waiting.extend(map(int, children.read_text().split()))
            except OSError:
                continue
    return found


def memory(pid: int) -> int:
    """KiB that the process and its descendants take."""
    total = 0
    for one in tree(pid):
        try:
            rollup = Path(f"/proc/{one}/smaps_rollup").read_text()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith(COUNTED))
    return total


def peak(index: Path, processes: int, width: int) -> tuple[float, float]:
    """MiB, and seconds."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "run.py"
        script.write_text(RUN)
        command = [sys.executable, str(script), str(index), f"{folder}/f.zarr", str(processes), str(width)]
        start = time.perf_counter()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, map(str, sys.path)))}
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
        most = 0
        while process.poll() is None:
            most = max(most, memory(process.pid))
            time.sleep(LOOK_S)
        if process.returncode:
            raise SystemExit(f"embed ended with {process.returncode}")
        return most / 1024, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--many", type=int, default=200)
    parser.add_argument("--few", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=0, help="of embed, as --processes of the command")
    parser.add_argument("--width", type=int, default=1024, help="of a feature vector, even")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        slides = make_slides(Path(folder) / "slides", options.many)
        counts = {count: Path(folder) / f"{count}.parquet" for count in (options.few, options.many)}
        for count, path in counts.items():
            index_of(slides[:count]).write(path)
        peaks: dict[int, list[float]] = {count: [] for count in counts}
        for _ in range(options.rounds):
            for count, index in counts.items():
                most, seconds = peak(index, options.processes, options.width)
                peaks[count].append(most)
                print(f"  {count:4} slides: {most:7.0f} MiB at most, {seconds:.0f} s", flush=True)
        middle = {count: statistics.median(values) for count, values in peaks.items()}
        print(
            f"{options.many} slides against {options.few} ({SIDE * SIDE} windows each, {options.processes} processes): "
            f"{middle[options.many]:.0f} against {middle[options.few]:.0f} MiB, "
            f"x {middle[options.many] / middle[options.few]:.3f}"
        )


if __name__ == "__main__":
    main()
