"""Peak memory of `fmsuite predict` over rasters of growing size.

    OMP_NUM_THREADS=1 python benchmarks/raster_memory.py [--side 2048] [--rounds 1] [--width 96] [--depth 2]

Makes rasters of 4 bands (uint16, deflate, 256 px tiles) of one, two and four times the area: longer, wider, and both.
A segmentation network with untrained weights (a vision transformer and a linear decoder, windows of 128 px, half
overlapping) predicts each in a process of its own, which writes the class map as a Cloud-optimised GeoTIFF. What counts
is that process's largest resident set (VmHWM), less what it has before the first pixel is read.
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
from pathlib import Path

import numpy as np

BANDS, SIZE, PATCH = 4, 128, 16
AREAS = {"1": (1, 1), "2, longer": (2, 1), "2, wider": (1, 2), "4, longer": (4, 1), "4, wider": (1, 4), "4": (2, 2)}

RUN = """
import json, sys
from pathlib import Path
from fmsuite.commands.predict import predict
from fmsuite.core.adaptation.network_files import load_network
import rasterio, pyproj

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024

model, raster, out = map(Path, sys.argv[1:])
load_network(model)
before = peak()
done = predict(model, [raster], out, device="cpu", batch=8)
assert not done.skipped and len(done.files) == 2, done
print(json.dumps([before, peak()]))
"""


def make_raster(path: Path, height: int, width: int) -> None:
    """Written row of tiles by row of tiles."""
    import rasterio
    from rasterio.transform import from_origin
    from rasterio.windows import Window

    random = np.random.default_rng(0)
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        count=BANDS,
        height=height,
        width=width,
        dtype="uint16",
        tiled=True,
        blockxsize=256,
        blockysize=256,
        compress="deflate",
        predictor=2,
        crs="EPSG:32632",
        transform=from_origin(500_000, 5_000_000, 10, 10),
    ) as file:
        for top in range(0, height, 256):
            rows = min(256, height - top)
            values = 1000 + random.integers(0, 200, (BANDS, rows, width)) + np.arange(width) % 256
            file.write(values.astype(np.uint16), window=Window(0, top, width, rows))


def make_network(folder: Path, raster: Path, width: int, depth: int) -> None:
    from fmsuite.commands.setup import domain_options, open_domain, open_index
    from fmsuite.core.adaptation.network_files import save_network
    from fmsuite.core.adaptation.task import TASKS
    from fmsuite.core.backbones.config import ModelConfig
    from fmsuite.core.backbones.vit import VisionTransformer
    from fmsuite.core.data.skipped import SkippedLog

    options = domain_options("remote_sensing", [f"size={SIZE}", "statistics_windows=4"])
    domain, index = open_index(open_domain("remote_sensing", options), [raster], SkippedLog())
    spec = domain.input_spec(index)
    config = ModelConfig(name="vit_tiny", width=width, depth=depth, heads=4, patch_size=PATCH)
    task = TASKS["segmentation"]
    network = task(task.Config(classes=3, label_map="ground", decoder="linear"), VisionTransformer(config, spec))
    save_network(folder, network, spec, ["a", "b", "c"], "remote_sensing", options.model_dump(mode="json"), {})


def peak(model: Path, raster: Path) -> tuple[float, float, float]:
    """MiB before the first pixel and at most, and seconds."""
    with tempfile.TemporaryDirectory() as out:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, map(str, sys.path)))}
        begun = time.perf_counter()
        command = [sys.executable, "-c", RUN, str(model), str(raster), out]
        ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if ran.returncode:
            raise SystemExit(ran.stderr)
        before, most = json.loads(ran.stdout.splitlines()[-1])
        return before, most, time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=2048, help="of the smallest raster")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--width", type=int, default=96, help="of the network")
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--cache", type=int, default=16, help="MB of GDAL's block cache")
    options = parser.parse_args()
    # By default it takes a share of the machine's memory, and grows until it has it.
    os.environ["GDAL_CACHEMAX"] = str(options.cache)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        rasters = {}
        for name, (down, across) in AREAS.items():
            rasters[name] = folder / f"{down}x{across}.tif"
            make_raster(rasters[name], down * options.side, across * options.side)
        make_network(folder / "network", rasters["1"], options.width, options.depth)
        found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in rasters}
        for _ in range(options.rounds):
            for name, raster in rasters.items():
                found[name].append(peak(folder / "network", raster))
                before, most, seconds = found[name][-1]
                print(f"  {name:10} {before:6.0f} to {most:6.0f} MiB, {seconds:.0f} s", file=sys.stderr, flush=True)
    middle = {
        name: [round(statistics.median(column), 1) for column in zip(*rows, strict=True)]
        for name, rows in found.items()
    }
    result = {
        "pixels": {name: [down * options.side, across * options.side] for name, (down, across) in AREAS.items()},
        "MiB before, MiB at most, seconds": middle,
        "more than for the smallest, MiB": {
            name: round((most - before) - (middle["1"][1] - middle["1"][0]), 1)
            for name, (before, most, _) in middle.items()
        },
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
