"""Every domain's reader: few files open, and one that failed is read again once it is whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from fmsuite.core.data.index import Window
from fmsuite.core.data.reader import Reader
from fmsuite.core.data.sample import ArraySample, Sample
from fmsuite.errors import ReadFailure

SOURCES = 100


def make_slide(path: Path, size: int) -> None:
    from fmsuite.domains.pathology.example import write_slide

    random = np.random.default_rng(0)
    write_slide(path, random.integers(60, 200, (size, size, 3)).astype(np.uint8), 0.5)


def make_raster(path: Path, size: int) -> None:
    import rasterio

    values = np.random.default_rng(0).integers(1, 9000, (2, size, size)).astype(np.uint16)
    profile = {"driver": "GTiff", "width": size, "height": size, "count": 2, "dtype": "uint16", "nodata": 0}
    with rasterio.open(path, "w", **profile) as raster:
        raster.write(values)
        raster.descriptions = ("a", "b")


def make_volume(path: Path, size: int) -> None:
    import nibabel

    values = (100 + 40 * np.sin(np.indices((size, size, size)).sum(0) / 3)).astype(np.float32)
    image = nibabel.Nifti1Image(values, np.eye(4))
    image.set_sform(image.affine, code=1)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)


def make_drawing(path: Path, size: int) -> None:
    circle = f'<circle cx="{size / 2}" cy="{size / 2}" r="{size / 3}"/>'
    path.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size} {size}">{circle}</svg>')


def slides() -> Reader:
    from fmsuite.domains.pathology.reading import SlideReader

    return SlideReader((64, 64))


def rasters() -> Reader:
    from fmsuite.domains.remote_sensing.options import RemoteSensingOptions
    from fmsuite.domains.remote_sensing.reader import RasterReader

    return RasterReader(RemoteSensingOptions(sensor="generic", size=64), ("a", "b"), "uint16")


def volumes() -> Reader:
    from fmsuite.domains.medical.reader import VolumeReader

    return VolumeReader(None, 1, False, 0.0, None, cached=2)


def drawings() -> Reader:
    from fmsuite.domains.svg.render import colour
    from fmsuite.domains.svg.safety import Limits
    from fmsuite.domains.svg.sample import SvgReader

    return SvgReader(colour("white"), Limits())


@dataclass
class Field:
    """A domain's files and reader.

    Attributes:
        make: writes a file of a size.
        size: that the window below lies in, at its far corner.
        descriptors: that the reader may hold.
    """

    suffix: str
    make: Callable[[Path, int], None]
    reader: Callable[[], Reader]
    size: int
    window: Window
    descriptors: int


FIELDS = {
    # Eight slides, each open in OpenSlide and for its own tiles.
    "pathology": Field(".tif", make_slide, slides, 256, Window("", "g", (190.0, 190.0), (64.0, 64.0), (0.5, 0.5)), 16),
    "remote_sensing": Field(".tif", make_raster, rasters, 128, Window("", "g", (64.0, 64.0), (64.0, 64.0)), 16),
    "medical": Field(".nii.gz", make_volume, volumes, 32, Window("", "g", (16.0,) * 3, (16.0,) * 3), 0),
    "svg": Field(".svg", make_drawing, drawings, 64, Window("", "g", (0.0, 0.0), (64.0, 64.0)), 0),
}


def pixels(sample: Sample) -> np.ndarray:
    if isinstance(sample, ArraySample):
        return sample.values
    return sample.crop((0.0, 0.0), sample.size, (16, 16)).values


CASES = [*((name, "cut") for name in FIELDS), ("medical", "smaller"), ("svg", "smaller")]
"""A slide or raster that has become a smaller one is no error: what is beyond its border is invalid."""


@pytest.mark.parametrize("opened", [True, False])
@pytest.mark.parametrize(("name", "damage"), CASES)
def test_a_file_that_failed_is_read_again_once_it_is_whole(
    name: str, damage: str, opened: bool, tmp_path: Path
) -> None:
    field = FIELDS[name]
    path, reader, failed = tmp_path / f"source{field.suffix}", field.reader(), 0
    field.make(path, field.size)
    window, whole = replace(field.window, source=str(path)), path.read_bytes()
    expected = pixels(field.reader().read(window))
    if opened:
        np.testing.assert_array_equal(pixels(reader.read(window)), expected)
    # In place, as a copy that is still under way: an open handle sees it.
    if damage == "cut":
        os.truncate(path, len(whole) // 3)
    else:
        other = tmp_path / f"other{field.suffix}"
        field.make(other, field.size // 4)
        path.write_bytes(other.read_bytes())
    for _ in range(2):
        try:
            found = pixels(reader.read(window))
        except ReadFailure:
            failed += 1
        else:
            np.testing.assert_array_equal(found, expected)  # what is in memory is the whole file's
    assert failed == 2 or opened
    path.write_bytes(whole)
    np.testing.assert_array_equal(pixels(reader.read(window)), expected)


def held(folder: Path) -> int:
    """Open descriptors of files in a folder."""
    links = []
    for number in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:  # that of the listing
            continue
    return sum(link.startswith(str(folder)) for link in links)


@pytest.mark.parametrize("field", FIELDS.values(), ids=FIELDS)
def test_a_hundred_sources_keep_few_files_open(field: Field, tmp_path: Path) -> None:
    source, folder, reader, most = tmp_path / f"source{field.suffix}", tmp_path / "many", field.reader(), 0
    field.make(source, field.size)
    folder.mkdir()
    for number in range(SOURCES):
        copy = folder / f"{number}{field.suffix}"
        shutil.copy(source, copy)
        # A slide's own tiles are looked for after some windows.
        for _ in range(6 if number >= SOURCES - 8 else 1):
            reader.read(replace(field.window, source=str(copy)))
        most = max(most, held(folder))
    assert most <= field.descriptors
    assert most >= field.descriptors // 2
