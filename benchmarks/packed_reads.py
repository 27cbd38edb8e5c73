"""Single windows read from a packed copy against the files that it is a copy of, and against zarr-python.

    OMP_NUM_THREADS=1 python benchmarks/packed_reads.py SLIDE.svs [--windows 600] [--rounds 5]

Random windows of a slide at its own resolution, CPU time of one thread, warm page cache: what remains is decoding and
bookkeeping. On a file system with slow small reads the packed copy gains more. Rounds are taken in turns; medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import zarr
from numcodecs import Blosc, Zstd

from fmsuite.core.data.index import SampleIndex, Window
from fmsuite.core.data.packed import PackedReader, Packing, finish, pack_block
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.domains.pathology.reading import SlideReader
from fmsuite.domains.pathology.slides import open_source

CODECS = {
    "blosc lz4 (used)": Blosc("lz4", 1, Blosc.NOSHUFFLE),
    "zstd 1": Zstd(1),
    "zstd -5": Zstd(-5),
    "blosc zstd 1": Blosc("zstd", 1, Blosc.NOSHUFFLE),
}


def rate(work: Callable[[], object], windows: int) -> float:
    """Of this process's CPU time, which others on the machine do not change."""
    begun = time.process_time()
    work()
    return windows / (time.process_time() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slide", type=Path)
    parser.add_argument("--windows", type=int, default=600)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    random, size, count = np.random.default_rng(0), options.size, options.windows
    source = open_source(str(options.slide))
    top, left, height, width = source.bounds
    source.close()
    corners = np.stack([top + random.integers(0, height - size, count), left + random.integers(0, width - size, count)])
    extent = (float(size), float(size))
    index = SampleIndex.from_windows(
        (Window(str(options.slide.resolve()), "g", (float(y), float(x)), extent) for y, x in corners.T),
        {"domain": "pathology"},
    )
    windows = [index[row] for row in range(count)]
    with tempfile.TemporaryDirectory() as made:
        folder, files = Path(made), SlideReader((size, size))
        packing = Packing(count, index.hash, "pathology", 2048)
        packing.write(folder)
        begun = time.process_time()
        for number in range(packing.blocks):
            pack_block(index, files, folder, packing, number)
        finish(index, folder, packing, SkippedLog())
        packed = time.process_time() - begun
        reader = PackedReader(folder)
        arrays = [zarr.open_array(str(path), mode="r") for path in (folder / "arrays").glob("values-*")]
        assert len(arrays) == 1
        order = random.permutation(count)
        for row in order[:20]:
            np.testing.assert_array_equal(reader.read(windows[row]).values, files.read(windows[row]).values)
        works: dict[str, Callable[[], object]] = {
            "files": lambda: [files.read(windows[row]) for row in order],
            "packed": lambda: [reader.read(windows[row]) for row in order],
            "zarr-python": lambda: [arrays[0][int(row)] for row in order],
        }
        rounds = [{name: rate(work, count) for name, work in works.items()} for _ in range(options.rounds)]
        on_disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        pixels = [np.ascontiguousarray(reader.read(window).values).tobytes() for window in windows[:200]]
    result: dict[str, object] = {
        "windows": count,
        "pixels": [3, size, size],
        "windows a second of CPU time": {name: round(statistics.median(row[name] for row in rounds)) for name in works},
        "packed / files": round(statistics.median(row["packed"] / row["files"] for row in rounds), 2),
        "packed / zarr-python": round(statistics.median(row["packed"] / row["zarr-python"] for row in rounds), 2),
        "packing, windows a second of CPU time": round(count / packed),
        "bytes of the copy / bytes of its pixels": round(on_disk / (count * 3 * size * size), 3),
        "bytes of the slide": options.slide.stat().st_size,
        "codecs": {},
    }
    for name, codec in CODECS.items():
        encoded = [codec.encode(each) for each in pixels]
        decoding = [
            rate(lambda c=codec, e=encoded: [c.decode(one) for one in e], len(pixels))  # type: ignore[misc]
            for _ in range(options.rounds)
        ]
        share = sum(map(len, encoded)) / sum(map(len, pixels))
        result["codecs"][name] = {  # type: ignore[index]
            "share of the bytes": round(share, 3),
            "decoded a second of CPU time": round(statistics.median(decoding)),
        }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
