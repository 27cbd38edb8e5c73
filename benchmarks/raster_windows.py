"""Windows of rasters: the reader against a rasterio loop with its handle kept open, and against the packed copy.

    OMP_NUM_THREADS=1 python benchmarks/raster_windows.py [--side 4096] [--windows 120] [--rounds 7] [--nodata 0]

Made Sentinel-2 scenes (13 bands, uint16: a smooth ground that bands share, and noise), in GeoTIFFs of 256 px tiles:
deflate with predictor 2, stored pixel by pixel or band by band, and uncompressed. Windows of 224 px lie at random
places, or side by side. By each of these in turn, in another order each round, from a file that was opened just before
(so that no blocks of an earlier round are left), out of a warm page cache:

- ``loop``: ``dataset.read(window=...)`` of one open dataset, values only;
- ``reader``: ``RasterReader``, as training and embedding have it: values, where they are valid, spacing;
- ``loop, bands`` and ``reader, bands``: the same of a few bands;
- ``copy``: windows from ``fmsuite pack --whole``.

All share one process, one thread and one GDAL block cache of ``--cache`` MB, which holds a part of a file only, as when
many scenes are read at random. Medians over rounds; ratios are those of one round's figures.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fmsuite.commands.pack import pack
from fmsuite.commands.setup import domain_options, open_domain, open_index
from fmsuite.commands.tile import tile
from fmsuite.core.data.index import Window
from fmsuite.core.data.packed import open_reader
from fmsuite.core.data.reader import Reader
from fmsuite.core.data.skipped import SkippedLog

KINDS = {
    "deflate, pixel by pixel": {"compress": "deflate", "predictor": 2, "interleave": "pixel"},
    "deflate, band by band": {"compress": "deflate", "predictor": 2, "interleave": "band"},
    "uncompressed": {"interleave": "pixel"},
}
BANDS = ("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B9", "B10", "B11", "B12")
FEW = ("B4", "B3", "B2")
PITCH_M = 10.0

Places = Sequence[tuple[int, int]]
Work = Callable[[Places], float]
"""Seconds a window."""


def scene(side: int) -> np.ndarray:
    """(13, side, side) counts. Bands share fields and edges, and every pixel has noise of its own: deflate leaves about
    as much of it as of Sentinel-2 scenes."""
    random = np.random.default_rng(0)
    fields = []
    for pitch in (8, 32, 256):
        coarse = random.normal(size=(2, side // pitch + 2, side // pitch + 2)).astype(np.float32)
        at = np.arange(side, dtype=np.float32) / pitch
        low, share = at.astype(int), at - at.astype(int)
        rows = coarse[:, low] * (1 - share)[:, None] + coarse[:, low + 1] * share[:, None]
        fields.extend(rows[:, :, low] * (1 - share) + rows[:, :, low + 1] * share)
    parcels = np.kron(random.normal(size=(side // 64 + 1,) * 2), np.ones((64, 64)))[:side, :side].astype(np.float32)
    out = np.empty((len(BANDS), side, side), dtype=np.uint16)
    for band in out:
        weights = random.normal(size=len(fields) + 1)
        ground = sum(weight * field for weight, field in zip(weights, [*fields, parcels], strict=True))
        band[:] = np.clip(2000 + 150 * ground + random.normal(0, 25, band.shape), 1, 10000)
    return out


def write(path: Path, values: np.ndarray, options: dict[str, Any], nodata: float | None) -> None:
    import rasterio
    from rasterio.transform import from_origin

    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        count=len(values),
        height=values.shape[1],
        width=values.shape[2],
        dtype=values.dtype,
        tiled=True,
        blockxsize=256,
        blockysize=256,
        nodata=nodata,
        crs="EPSG:32632",
        transform=from_origin(500_000, 5_000_000, PITCH_M, PITCH_M),
        **options,
    ) as file:
        file.write(values)
        file.descriptions = BANDS


def of_loop(path: Path, size: int, numbers: Sequence[int] | None) -> Work:
    import rasterio
    from rasterio.windows import Window as Box

    def work(places: Places) -> float:
        boxes = [Box(left, top, size, size) for top, left in places]
        with rasterio.open(path) as file:
            file.read(numbers, window=boxes[0])
            begun = time.perf_counter()
            for box in boxes[1:]:
                file.read(numbers, window=box)
            return (time.perf_counter() - begun) / (len(boxes) - 1)

    return work


def of_reader(reader: Reader, window: Window) -> Work:
    def work(places: Places) -> float:
        windows = [replace(window, position=(float(top), float(left))) for top, left in places]
        reader.close()  # type: ignore[attr-defined]
        reader.read(windows[0])
        begun = time.perf_counter()
        for each in windows[1:]:
            reader.read(each)
        return (time.perf_counter() - begun) / (len(windows) - 1)

    return work


def indexed(path: Path, folder: Path, size: int, bands: Sequence[str]) -> Path:
    names = f"bands={json.dumps(list(bands))}"
    return tile("remote_sensing", [path], folder, overrides=["sensor=sentinel2-l1c", f"size={size}", names]).path


def opened(index: Path) -> tuple[Reader, Window]:
    domain, rows = open_index(
        open_domain("remote_sensing", domain_options("remote_sensing", [])), [index], SkippedLog()
    )
    return open_reader(domain, rows), rows[0]


def check(works: dict[str, tuple[Reader, Window]], path: Path, size: int, places: Places) -> None:
    """Every contender gives rasterio's own values."""
    import rasterio
    from rasterio.windows import Window as Box

    with rasterio.open(path) as file:
        for name, (reader, window) in works.items():
            numbers = [1 + BANDS.index(band) for band in (FEW if name.endswith("bands") else BANDS)]
            for top, left in places:
                sample: Any = reader.read(replace(window, position=(float(top), float(left))))
                np.testing.assert_array_equal(sample.values, file.read(numbers, window=Box(left, top, size, size)))
                assert sample.valid is None or sample.valid.all()


def places_of(order: str, side: int, size: int, count: int, random: np.random.Generator) -> Places:
    if order == "at random":
        return [(int(y), int(x)) for y, x in random.integers(0, side - size + 1, (count, 2))]
    grid = [(y, x) for y in range(0, side - size + 1, size) for x in range(0, side - size + 1, size)]
    begin = int(random.integers(0, max(1, len(grid) - count)))
    return grid[begin : begin + count]


def compare(
    works: dict[str, Work], places: Callable[[], Places], rounds: int, random: np.random.Generator
) -> dict[str, Any]:
    rates: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds + 1):
        chosen = places()
        # In another order each time: memory that one has freed is cheaper for the next.
        for name in random.permutation(list(works)).tolist():
            rates[name].append(1 / works[name](chosen))
    # The first round warms the page cache.
    kept = {name: values[1:] for name, values in rates.items()}

    def ratio(name: str, base: str) -> float:
        return round(statistics.median(a / b for a, b in zip(kept[name], kept[base], strict=True)), 2)

    pairs = [("reader", "loop"), ("reader, bands", "loop, bands"), ("reader, bands", "loop"), ("copy", "loop")]
    return {
        "windows a second": {name: round(statistics.median(values), 1) for name, values in kept.items()},
        "ratios": {f"{name} / {base}": ratio(name, base) for name, base in pairs if {name, base} <= set(works)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=4096)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--windows", type=int, default=120, help="in a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--nodata", type=float, help="that the files declare, without having it")
    parser.add_argument("--cache", type=int, default=128, help="MB of GDAL's block cache")
    parser.add_argument("--folder", type=Path, help="keeps the made files there")
    options = parser.parse_args()
    # GDAL looks at it once.
    os.environ["GDAL_CACHEMAX"] = str(options.cache)
    side, size, random = options.side, options.size, np.random.default_rng(1)
    numbers = [1 + BANDS.index(band) for band in FEW]
    result: dict[str, Any] = {"cores": os.cpu_count(), "load": os.getloadavg()[0], "pixels": [len(BANDS), side, side]}
    with tempfile.TemporaryDirectory() as made:
        folder = options.folder or Path(made)
        values = None
        for kind, how in KINDS.items():
            home = folder / f"{kind.replace(', ', '-').replace(' ', '-')}-{side}-{options.nodata}"
            path = home / "scene.tif"
            if not path.exists():
                values = scene(side) if values is None else values
                home.mkdir(parents=True, exist_ok=True)
                write(path, values, how, options.nodata)
            readers = {
                "reader": opened(indexed(path, home / "all", size, BANDS)),
                "reader, bands": opened(indexed(path, home / "few", size, FEW)),
            }
            begun = time.perf_counter()
            copy = pack(home / "all" / "index.parquet", home / "copy", whole=True)
            packing = time.perf_counter() - begun
            readers["copy"] = opened(copy.path)
            check(readers, path, size, places_of("at random", side, size, 5, random))
            works = {"loop": of_loop(path, size, None), "loop, bands": of_loop(path, size, numbers)}
            works |= {name: of_reader(*reader) for name, reader in readers.items()}
            on_disk = sum(file.stat().st_size for file in (home / "copy").rglob("*") if file.is_file())
            result[kind] = {
                "share of the bytes": round(path.stat().st_size / (2 * len(BANDS) * side**2), 2),
                "share of the bytes, copy": round(on_disk / (2 * len(BANDS) * side**2), 2),
                "seconds to make the copy": round(packing, 1),
            }
            for order in ("at random", "side by side"):
                result[kind][order] = compare(
                    works,
                    lambda order=order: places_of(order, side, size, options.windows, random),
                    options.rounds,
                    random,
                )
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
