"""Random crops from a packed copy of whole volumes against compressed NIfTI through MONAI's cached transforms.

    OMP_NUM_THREADS=1 python benchmarks/random_crops.py [--volumes 24] [--rounds 5] [--data FOLDER] [--cold]

A round cuts one crop from every volume, in another order each time, by each of these in turn:

- ``copy``: windows of training.windows=random from ``fmsuite pack --whole``;
- ``nifti``: LoadImaged to RandSpatialCropd in a CacheDataset that may hold as many bytes as the copy's reader ever held
  in its process (with the crop that it made), which is less than a volume;
- ``nifti, page cache counted``: the same where the CacheDataset may hold as many bytes as the copy has on the disk, as
  if the page cache, which all processes share, belonged to the copy's reader alone;
- ``nifti, all cached``: the same with every volume in memory, in each process that loads;
- ``persistent``: a PersistentDataset, which keeps every transformed volume as a file of tensors.

Both sides reorient, resample, crop to the foreground and standardise. Without --cold, all files are in the page cache;
with it, they are put out of it before each crop (POSIX_FADV_DONTNEED), so that the disk is read. One thread; wall time,
and CPU time, which others on the machine hardly change; medians over rounds, of which the first is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fmsuite.commands.pack import pack
from fmsuite.commands.setup import domain_options, open_domain, open_index
from fmsuite.commands.tile import tile
from fmsuite.core.data.index import SampleIndex
from fmsuite.core.data.packed import open_reader
from fmsuite.core.data.reader import Reader
from fmsuite.core.data.sampling import RandomWindows
from fmsuite.core.data.skipped import SkippedLog

SUFFIXES = (".nii", ".nii.gz")
LEFT = np.diag([-0.9, -0.9, 1.0, 1.0])
"""Millimetres of a generated voxel; its first two axes run against RAS, as scanners' do."""


def generate(folder: Path, count: int, shape: tuple[int, ...]) -> list[Path]:
    """int16 volumes: a smooth ellipsoid with fine noise, in a background of weak noise."""
    import nibabel
    from scipy import ndimage

    files = []
    centred = [np.linspace(-1.15, 1.15, length) for length in shape]
    inside = sum(np.meshgrid(*(axis**2 for axis in centred), indexing="ij", sparse=True)) < 1
    for number in range(count):
        random = np.random.default_rng(number)
        coarse = random.normal(size=[-(-length // 16) + 1 for length in shape])
        smooth = ndimage.zoom(coarse, 16, order=1)[tuple(map(slice, shape))]
        values = np.where(inside, 700 + 250 * smooth + random.normal(0, 15, shape), np.abs(random.normal(0, 6, shape)))
        files.append(folder / f"{number:03d}.nii.gz")
        image = nibabel.Nifti1Image(np.clip(values, 0, 4095).astype(np.int16), LEFT)
        image.set_sform(LEFT, code=1)
        image.header.set_xyzt_units("mm")
        nibabel.save(image, files[-1])
    return files


def body(values: torch.Tensor) -> torch.Tensor:
    return values > 0.1 * values.max()


def transforms(spacing: float, size: int, background: bool) -> Any:
    from monai import transforms as monai

    crop = [monai.CropForegroundd("image", "image", select_fn=body, allow_smaller=True)] if background else []
    return monai.Compose(
        [
            monai.LoadImaged("image"),
            monai.EnsureChannelFirstd("image"),
            monai.Orientationd("image", "RAS", labels=(("L", "R"), ("P", "A"), ("I", "S"))),
            monai.Spacingd("image", (spacing,) * 3, mode="bilinear"),
            *crop,
            monai.NormalizeIntensityd("image", nonzero=True, channel_wise=True),
            monai.SpatialPadd("image", (size,) * 3),
            monai.RandSpatialCropd("image", (size,) * 3, random_size=False),
        ]
    )


def evict(files: Iterable[Path]) -> None:
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def from_copy(reader: Reader, index: SampleIndex, size: int) -> Callable[[int], np.ndarray]:
    sampler, stream = RandomWindows(index, (size,) * 3), np.random.default_rng(0)
    first = {source: row for row, source in reversed(list(enumerate(index.table.column("source").to_pylist())))}
    windows = [index[row] for _, row in sorted(first.items())]

    def crop(number: int) -> np.ndarray:
        sample: Any = reader.read(sampler(windows[number], 0, stream))
        return sample.values

    return crop


def from_items(items: Any) -> Callable[[int], np.ndarray]:
    return lambda number: np.array(items[number]["image"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder of 3D NIfTI volumes (MR); generated if not given")
    parser.add_argument("--volumes", type=int, default=24)
    parser.add_argument("--shape", type=int, nargs=3, default=(256, 256, 160), metavar=("X", "Y", "Z"))
    parser.add_argument("--spacing", type=float, default=1.0)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    from monai.data import CacheDataset, PersistentDataset

    with tempfile.TemporaryDirectory() as made:
        folder, size, spacing = Path(made), options.size, options.spacing
        data = options.data
        if data is None:
            data = folder / "files"
            data.mkdir()
            generate(data, options.volumes, tuple(options.shape))
        asked = [f"size={size}", f"spacing={spacing}", "modality=mr", "min_foreground=0"]
        index_path = tile("medical", [data], folder / "index", overrides=asked).path
        begun = time.perf_counter()
        packed = pack(index_path, folder / "copy", whole=True)
        packing = time.perf_counter() - begun
        domain = open_domain("medical", domain_options("medical", []))
        domain, index = open_index(domain, [packed.path], SkippedLog())
        sources = sorted(index.sources)
        count, order = len(sources), np.random.default_rng(0)

        tracemalloc.start()
        crop = from_copy(open_reader(domain, index), index, size)
        for number in range(count):
            crop(number)
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()

        whole = transforms(spacing, size, background=True)
        items = [{"image": source} for source in sources]
        everything = CacheDataset(items, whole, cache_rate=1.0, progress=False, copy_cache=False)
        volumes = [each["image"].numel() * each["image"].element_size() for each in everything._cache]
        on_disk = sum(path.stat().st_size for path in files_of(folder / "copy" / "sources"))

        def cached(budget: int) -> tuple[int, Any]:
            fits = int(np.searchsorted(np.cumsum(volumes), budget, side="right"))
            return fits, CacheDataset(items, whole, cache_num=fits, progress=False, copy_cache=False)

        fit_none, nothing = cached(held)
        fit_some, some = cached(on_disk)
        kept = PersistentDataset(items, whole, cache_dir=folder / "persistent")
        for number in range(count):
            kept[number]
        works = {
            "copy": crop,
            "nifti": from_items(nothing),
            "nifti, page cache counted": from_items(some),
            "nifti, all cached": from_items(everything),
            "persistent": from_items(kept),
        }
        cached_files = [*map(Path, sources), *files_of(folder / "copy"), *files_of(folder / "persistent")]
        rounds: list[dict[str, np.ndarray]] = []
        for _ in range(options.rounds + 1):
            numbers = order.permutation(count).tolist()
            seconds = {}
            for name, work in works.items():
                total = np.zeros(2)
                for number in numbers:
                    if options.cold:
                        evict(cached_files)
                    start = np.array([time.perf_counter(), time.process_time()])
                    assert work(number).shape == (1, size, size, size)
                    total += np.array([time.perf_counter(), time.process_time()]) - start
                seconds[name] = total / count
            rounds.append(seconds)
        rounds = rounds[1:]
        result: dict[str, object] = {
            "volumes": count,
            "files": "generated" if options.data is None else options.data.name,
            "page cache": "cold" if options.cold else "warm",
            "MB": {
                "nifti": round(sum(Path(source).stat().st_size for source in sources) / 1e6),
                "copy": round(on_disk / 1e6),
                "float32 volumes": round(sum(volumes) / 1e6),
                "held by the copy's reader": round(held / 1e6, 1),
            },
            "seconds to make the copy of one volume": round(packing / count, 2),
            "volumes that fit in the CacheDataset": {"nifti": fit_none, "nifti, page cache counted": fit_some},
        }
        for column, clock in enumerate(("wall", "CPU")):
            result[clock] = {
                "ms a crop": {
                    name: round(1e3 * float(np.median([row[name][column] for row in rounds])), 1) for name in works
                },
                "times as fast as": {
                    name: round(float(np.median([row[name][column] / row["copy"][column] for row in rounds])), 1)
                    for name in works
                    if name != "copy"
                },
            }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
