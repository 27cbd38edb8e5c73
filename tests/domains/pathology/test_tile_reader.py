"""Slides whose own tiles are decoded: OpenSlide's pixels, OpenSlide's failures, bounded memory, or else OpenSlide."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from pathlib import Path

import imagecodecs
import numpy as np
import openslide
import pytest
import tifffile
import torch
from PIL import Image

from fmsuite.core.data.index import Window
from fmsuite.core.data.loader import load_windows
from fmsuite.core.data.pipeline import IMAGE, WholeWindows
from fmsuite.domains.pathology import PathologyDomain, PathologyOptions
from fmsuite.domains.pathology.example import write_slide
from fmsuite.domains.pathology.reading import SlideReader, read_region
from fmsuite.domains.pathology.slides import FIRST_WINDOWS, OpenSlideSource, open_source
from fmsuite.domains.pathology.tile_cache import TileCache
from fmsuite.domains.pathology.tile_codecs import DoubtfulTile, JpegCodec
from fmsuite.errors import ReadFailure
from fmsuite.tiling.table import WindowRows, join_tables, windows_table

APERIO = "Aperio Image Library v1\r\n|AppMag = 20|MPP = 0.5"


@pytest.fixture
def texture() -> np.ndarray:
    """(700, 900, 3) uint8: structure of all sizes, that no tile size divides."""
    rng = np.random.default_rng(5)
    picture = np.full((700, 900, 3), 150.0)
    for size in (4, 16, 64):
        coarse = rng.normal(0, 18, (-(-700 // size), -(-900 // size), 3))
        picture += coarse.repeat(size, 0).repeat(size, 1)[:700, :900]
    return np.clip(picture, 0, 255).astype(np.uint8)


def jpeg_slide(path: Path, levels: list[np.ndarray], tile: int = 256, **options: object) -> str:
    """A pyramid of JPEG tiles that OpenSlide takes for a generic TIFF, or for Aperio's by its description."""
    with tifffile.TiffWriter(path) as file:
        for number, level in enumerate(levels):
            file.write(
                level,
                tile=(tile, tile),
                photometric="rgb",
                compression="jpeg",
                subfiletype=min(number, 1),
                metadata=None,
                **options,
            )
    return str(path)


def pixels_of_openslide(path: str, level: int, top: int, left: int, height: int, width: int) -> np.ndarray:
    with openslide.OpenSlide(path) as slide:
        scale = slide.level_downsamples[level]
        place = (round(left * scale), round(top * scale))
        return np.asarray(slide.read_region(place, level, (width, height)))


def decoded_here(source: OpenSlideSource, level: int = 0) -> bool:
    return bool(source.factors(level))


def boxes(shape: tuple[int, int], count: int, seed: int = 0) -> Iterator[tuple[int, int, int, int]]:
    """Regions within a level: at its corners, one pixel, all of it, and anywhere."""
    height, width = shape
    yield from ((0, 0, height, width), (0, 0, 1, 1), (height - 1, width - 1, 1, 1), (height - 9, 0, 9, width))
    rng = np.random.default_rng(seed)
    for _ in range(count):
        top, left = int(rng.integers(height)), int(rng.integers(width))
        yield top, left, int(rng.integers(1, height - top + 1)), int(rng.integers(1, width - left + 1))


@pytest.mark.parametrize("subsampling", [(1, 1), (2, 1), (2, 2)])
def test_pixels_are_openslides_on_every_level(
    tmp_path: Path, texture: np.ndarray, subsampling: tuple[int, int]
) -> None:
    levels = [texture, texture[::2, ::2], texture[::4, ::4]]
    path = jpeg_slide(tmp_path / "slide.tif", levels, subsampling=subsampling, compressionargs={"level": 80})
    source = open_source(path)
    assert isinstance(source, OpenSlideSource)
    for level, pixels in enumerate(levels):
        assert decoded_here(source, level)
        for box in boxes(pixels.shape[:2], 12):
            ours, begins = source.read(level, *box)
            assert begins == box[:2]
            assert ours.shape == (*box[2:], 3)
            theirs = pixels_of_openslide(path, level, *box)
            assert (theirs[..., 3] == 255).all()
            assert np.array_equal(ours, theirs[..., :3])
    source.close()


@pytest.mark.parametrize("tables", [True, False])
@pytest.mark.parametrize("colour", ["rgb", "ycbcr"])
def test_colours_are_what_the_tags_say_whatever_the_tiles_markers_say(
    tmp_path: Path, texture: np.ndarray, colour: str, tables: bool
) -> None:
    tiles, shared = [], None
    for top in (0, 240):
        for left in (0, 240):
            space = "RGB" if colour == "rgb" else "YCBCR"
            tile = imagecodecs.jpeg8_encode(texture[top : top + 240, left : left + 240], level=70, outcolorspace=space)
            if tables:
                # Aperio's way: the tables once for the level, and tiles without any.
                parts = segments(tile)
                shared = b"\xff\xd8" + b"".join(part for part in parts if part[1] in (0xDB, 0xC4)) + b"\xff\xd9"
                tile = b"\xff\xd8" + b"".join(part for part in parts if part[1] in (0xC0, 0xDA)) + coded(tile)
            tiles.append(tile)
    path = str(tmp_path / "slide.svs")
    tifffile.imwrite(
        path,
        iter(tiles),
        shape=(480, 480, 3),
        dtype=np.uint8,
        tile=(240, 240),
        photometric=colour,
        compression="jpeg",
        compressionargs={"outcolorspace": colour},
        subsampling=(1, 1),
        jpegtables=shared,
        description=APERIO,
        metadata=None,
    )
    source = OpenSlideSource(path)
    assert source.vendor == "aperio"
    assert decoded_here(source)
    ours, _ = source.read(0, 0, 0, 480, 480)
    assert np.array_equal(ours, pixels_of_openslide(path, 0, 0, 0, 480, 480)[..., :3])
    assert np.abs(ours.astype(int) - texture[:480, :480]).mean() < 12
    for factor in source.factors(0):
        reduced = source.read_reduced(0, factor, 0, 0, 480 // factor, 480 // factor)
        # Chroma is not interpolated when it is reduced; other colours would be tens of grey levels off.
        assert np.abs(reduced.astype(int) - means(ours, factor)).mean() < 4
    source.close()


def segments(stream: bytes) -> list[bytes]:
    parts, place = [], 2
    while not parts or parts[-1][1] != 0xDA:
        length = 2 + int.from_bytes(stream[place + 2 : place + 4], "big")
        parts.append(stream[place : place + length])
        place += length
    return parts


def coded(stream: bytes) -> bytes:
    return stream[2 + sum(map(len, segments(stream))) :]


def means(pixels: np.ndarray, factor: int) -> np.ndarray:
    height, width = pixels.shape[0] // factor, pixels.shape[1] // factor
    whole = pixels[: height * factor, : width * factor].astype(float)
    return whole.reshape(height, factor, width, factor, 3).mean((1, 3))


def test_jpeg_2000_tiles_of_aperio_are_openslides_pixels(tmp_path: Path, texture: np.ndarray) -> None:
    def slide(name: str, compression: int, **options: object) -> str:
        places = [(top, left) for top in (0, 256) for left in (0, 256)]
        tiles = [
            imagecodecs.jpeg2k_encode(texture[y : y + 256, x : x + 256], level=45, codecformat="j2k", **options)
            for y, x in places
        ]
        tifffile.imwrite(
            tmp_path / name,
            iter(tiles),
            shape=(512, 512, 3),
            dtype=np.uint8,
            tile=(256, 256),
            photometric="rgb",
            compression=compression,
            description=APERIO,
            metadata=None,
        )
        return str(tmp_path / name)

    path = slide("rgb.svs", 33005)
    source = OpenSlideSource(path)
    assert source._own_tiles(0) is not None
    assert source.factors(0) == ()
    for box in boxes((512, 512), 6):
        assert np.array_equal(source.read(0, *box)[0], pixels_of_openslide(path, 0, *box)[..., :3])
    source.close()
    # Components that are YCbCr, at times with fewer pixels of chroma, are left to OpenSlide.
    source = OpenSlideSource(slide("ycbcr.svs", 33003, mct=False))
    assert source._own_tiles(0) is None
    source.close()


def test_windows_are_those_read_through_openslide(tmp_path: Path, texture: np.ndarray) -> None:
    path = jpeg_slide(tmp_path / "slide.tif", [texture, texture[::4, ::4]])
    ours, theirs = OpenSlideSource(path), OpenSlideSource(path, own_tiles=False)
    assert decoded_here(ours)
    windows = [
        ((10.0, 20.0), 100.0),
        ((10.3, 20.6), 110.7),
        ((-50.0, 850.0), 128.0),
        ((680.5, -3.25), 90.0),
        ((100.0, 100.0), 512.0),
        ((900.0, 100.0), 64.0),
    ]
    for place, length in windows:
        own, own_valid = read_region(ours, place, (length, length), (96, 96))
        other, other_valid = read_region(theirs, place, (length, length), (96, 96))
        assert np.array_equal(own_valid, other_valid)
        assert np.array_equal(own, other)
    ours.close()
    theirs.close()


@pytest.mark.parametrize(("factor", "mean", "most"), [(2, 1.0, 20), (4, 1.0, 20), (8, 0.6, 2)])
def test_a_window_at_a_resolution_without_a_level_is_reduced_while_it_is_decoded(
    tmp_path: Path, texture: np.ndarray, factor: int, mean: float, most: int
) -> None:
    """JPEG's frequencies above the new limit are dropped, so pixels are nearly the means of those that they replace."""
    path = jpeg_slide(tmp_path / "slide.tif", [texture], compressionargs={"level": 90}, subsampling=(1, 1))
    source = OpenSlideSource(path)
    side = 512
    window, valid = read_region(source, (64.0, 128.0), (side, side), (side // factor, side // factor))
    assert valid.all()
    whole, _ = source.read(0, 64, 128, side, side)
    away = np.abs(window - means(whole, factor))
    assert away.mean() < mean
    assert away.max() <= most
    # In tolerance of a pyramid's steps, and no further.
    for scale, reduced in ((1.9, 1), (1.98, 2), (3.9, 2), (7.9, 8)):
        called: list[int] = []
        source.read_reduced = lambda level, by, *box, called=called: (  # type: ignore[method-assign]
            called.append(by) or OpenSlideSource.read_reduced(source, level, by, *box)
        )
        read_region(source, (0.0, 0.0), (64 * scale, 64 * scale), (64, 64))
        assert called == ([reduced] if reduced > 1 else [])
    source.close()


def test_a_level_of_the_file_is_preferred_to_reducing(tmp_path: Path, texture: np.ndarray) -> None:
    half = np.asarray(Image.fromarray(texture).reduce(2))
    path = jpeg_slide(tmp_path / "slide.tif", [texture, half])
    source = OpenSlideSource(path)
    window, _ = read_region(source, (64.0, 128.0), (256.0, 256.0), (128, 128))
    assert np.array_equal(window, pixels_of_openslide(path, 1, 32, 64, 128, 128)[..., :3])
    source.close()


def test_the_far_border_is_complete_where_reduced_pixels_would_be_cut(tmp_path: Path, texture: np.ndarray) -> None:
    path = jpeg_slide(tmp_path / "slide.tif", [texture[:699, :899]])
    source = OpenSlideSource(path)
    window, valid = read_region(source, (571.0, 771.0), (128.0, 128.0), (64, 64))
    assert valid.all()
    assert np.abs(window - means(texture[571:699, 771:899], 2)).mean() < 6
    source.close()


def test_reduced_windows_do_not_depend_on_what_was_read_before(tmp_path: Path, texture: np.ndarray) -> None:
    path = jpeg_slide(tmp_path / "slide.tif", [texture])
    first, second = OpenSlideSource(path), OpenSlideSource(path)
    assert decoded_here(second)
    for box in boxes(texture.shape[:2], 5):
        second.read(0, *box)
    region = ((33.0, 47.0), (400.0, 400.0), (200, 200))
    assert np.array_equal(read_region(first, *region)[0], read_region(second, *region)[0])
    first.close()
    second.close()


def tile_places(path: str, page: int = 0) -> list[tuple[int, int]]:
    with tifffile.TiffFile(path) as file:
        return list(zip(file.pages[page].dataoffsets, file.pages[page].databytecounts, strict=True))


@pytest.mark.parametrize("subsampling", [(1, 1), (2, 1), (2, 2)])
def test_what_openslide_finds_damaged_is_not_taken_for_sound(
    tmp_path: Path, texture: np.ndarray, subsampling: tuple[int, int]
) -> None:
    path = jpeg_slide(tmp_path / "slide.tif", [texture], 64, subsampling=subsampling, compressionargs={"level": 75})
    intact = Path(path).read_bytes()
    rng = np.random.default_rng(1)
    across, refused, missed, accepted = -(-900 // 64), 0, 0, 0
    for kind in ("bit", "bytes", "zeros", "tail", "end", "header"):
        damaged = bytearray(intact)
        places = tile_places(path)
        for offset, count in places:
            at = offset + int(rng.integers(640, count - 40))
            if kind == "bit":
                damaged[at] ^= 1 << int(rng.integers(8))
            elif kind == "bytes":
                damaged[at : at + 16] = rng.integers(0, 256, 16, dtype=np.uint8).tobytes()
            elif kind == "zeros":
                damaged[at : at + 32] = bytes(32)
            elif kind == "tail":
                damaged[at : offset + count] = bytes(offset + count - at)
            elif kind == "end":
                damaged[at : at + 2] = b"\xff\xd9"
            else:
                damaged[offset + int(rng.integers(4))] ^= 0xFF
        Path(path).write_bytes(damaged)
        codec, memory = codec_of(path)
        for number, (offset, count) in enumerate(places):
            top, left = number // across * 64, number % across * 64
            try:
                pixels = pixels_of_openslide(path, 0, top, left, min(64, 700 - top), min(64, 900 - left))
            except openslide.OpenSlideError:
                refused += 1
                for factor in (1, 2, 8):
                    try:
                        codec.decode(bytes(damaged[offset : offset + count]), memory, factor)
                        missed += 1
                    except DoubtfulTile:
                        pass
                continue
            try:
                ours = codec.decode(bytes(damaged[offset : offset + count]), memory)
            except DoubtfulTile:
                continue
            accepted += 1
            assert np.array_equal(ours[: pixels.shape[0], : pixels.shape[1]], pixels[..., :3])
    assert refused > 400
    # A code that means nothing, after which the right number of blocks follows by chance, leaves no trace.
    assert missed <= 0.02 * 3 * refused
    assert accepted > 50
    codec, memory = codec_of(path)
    for offset, count in places:
        codec.decode(intact[offset : offset + count], memory)


def codec_of(path: str) -> tuple[JpegCodec, np.ndarray]:
    with tifffile.TiffFile(path) as file:
        page = file.pages.first
        codec = JpegCodec((page.tilelength, page.tilewidth), page.jpegtables, "YCBCR")
    return codec, np.empty(codec.size, np.uint8)


def test_a_damaged_tile_fails_its_windows_and_the_slide_is_read_on(tmp_path: Path, texture: np.ndarray) -> None:
    path = jpeg_slide(tmp_path / "slide.tif", [texture], 128)
    offset, count = tile_places(path)[9]
    with Path(path).open("r+b") as file:
        file.seek(offset + count // 2)
        file.write(b"\xff\xd9" + b"\0" * (count - count // 2 - 2))
    reader = SlideReader((128, 128))
    handles = []
    for left, fails in ((0.0, False), (128.0, True), (256.0, False), (128.0, True), (384.0, False)):
        window = Window(path, "slide", (128.0, left), (128.0, 128.0))
        if fails:
            with pytest.raises(ReadFailure, match=rf"y=128, x={left:.0f}: a region cannot be read"):
                reader.read(window)
        else:
            values = np.moveaxis(reader.read(window).values, 0, -1)
            part = texture[128:256, int(left) : int(left) + 128]
            assert np.abs(values.astype(int) - part).mean() < 8
        handles.append(reader.handles.get(path))
        assert decoded_here(handles[-1])
    assert handles[0] is not handles[1]
    assert handles[1] is handles[2]
    # Reduced as well: what is damaged is not averaged away.
    with pytest.raises(ReadFailure):
        reader.read(Window(path, "slide", (0.0, 0.0), (512.0, 512.0)))
    reader.handles.close()


def test_tiles_that_the_file_does_not_hold_are_what_openslide_makes_of_them(
    tmp_path: Path, texture: np.ndarray
) -> None:
    def tiles(level: np.ndarray, missing: set[int]) -> Iterator[bytes]:
        number = 0
        for top in range(0, level.shape[0], 128):
            for left in range(0, level.shape[1], 128):
                buffer = io.BytesIO()
                Image.fromarray(level[top : top + 128, left : left + 128]).save(buffer, "JPEG", quality=80)
                yield b"" if number in missing else buffer.getvalue()
                number += 1

    for name, description in (("generic.tif", None), ("aperio.svs", APERIO)):
        path = str(tmp_path / name)
        with tifffile.TiffWriter(path) as file:
            for level, missing in ((texture[:640, :896], {8, 9}), (texture[:640:2, :896:2][:256, :384], set())):
                file.write(
                    tiles(level, missing),
                    shape=level.shape,
                    dtype=np.uint8,
                    tile=(128, 128),
                    photometric="ycbcr",
                    subsampling=(2, 2),
                    compression="jpeg",
                    description=description,
                    subfiletype=0 if missing else 1,
                    metadata=None,
                )
        assert tile_places(path)[8][1] == 0
        source = OpenSlideSource(path)
        assert decoded_here(source) == (source.vendor == "generic-tiff")
        plain = OpenSlideSource(path, own_tiles=False)
        for place, extent in (((0.0, 0.0), 128.0), ((130.0, 60.0), 128.0), ((70.0, 300.3), 128.0), ((0, 0), 512.0)):
            ours, valid = read_region(source, place, (extent, extent), (128, 128))
            theirs, their_valid = read_region(plain, place, (extent, extent), (128, 128))
            assert np.array_equal(valid, their_valid)
            # The last is reduced while it is decoded, where it can be.
            assert np.abs(ours.astype(int) - theirs)[valid].mean() <= (6 if extent == 512 else 0)
            assert np.array_equal(ours[~valid], theirs[~valid])
        rgba, _ = source.read(0, 128, 0, 128, 384)
        assert rgba.shape[2] == 4
        assert (rgba[:, 128:, 3] == 0).all()
        source.close()
        plain.close()


def test_what_is_not_known_is_read_through_openslide_and_said_in_the_log(
    tmp_path: Path, texture: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="fmsuite")
    known = jpeg_slide(tmp_path / "known.tif", [texture])
    source = OpenSlideSource(known)
    assert decoded_here(source)
    assert not caplog.records
    source.close()

    def refused(path: Path, reason: str) -> None:
        caplog.clear()
        source = open_source(str(path))
        assert isinstance(source, OpenSlideSource)
        assert not decoded_here(source)
        assert any(path.name in record.message and reason in record.message for record in caplog.records)
        rgb, _ = read_region(source, (0.0, 0.0), (64.0, 64.0), (64, 64))
        assert np.abs(rgb.astype(int) - texture[:64, :64]).mean() < 8
        source.close()

    tiled = {"tile": (256, 256), "photometric": "rgb", "metadata": None}
    tifffile.imwrite(tmp_path / "deflate.tif", texture, compression="deflate", **tiled)
    refused(tmp_path / "deflate.tif", "compression 32946")
    tifffile.imwrite(tmp_path / "planes.tif", np.moveaxis(texture, -1, 0), compression="lzw", planarconfig=2, **tiled)
    refused(tmp_path / "planes.tif", "36 tiles where a grid has 12")
    with tifffile.TiffWriter(tmp_path / "twins.tif") as file:
        for subfiletype in (0, 0):
            file.write(texture, compression="jpeg", subfiletype=subfiletype, **tiled)
    refused(tmp_path / "twins.tif", "2 pages are a level")
    turned = [(274, 3, 1, 3, True)]
    tifffile.imwrite(tmp_path / "turned.tif", texture, compression="jpeg", extratags=turned, **tiled)
    refused(tmp_path / "turned.tif", "turned or mirrored")
    huge = np.tile(texture, (3, 3, 1))
    jpeg_slide(tmp_path / "huge.tif", [huge], 2048)
    refused(tmp_path / "huge.tif", "too large")


def test_a_level_whose_tiles_are_not_what_openslide_reads_is_left_to_it(
    tmp_path: Path, texture: np.ndarray, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG, logger="fmsuite")
    path = jpeg_slide(tmp_path / "slide.tif", [texture])
    exact = imagecodecs.jpeg8_decode

    def brighter(*arguments: object, out: np.ndarray, **options: object) -> None:
        exact(*arguments, out=out, **options)
        out[:8] = np.minimum(out[:8], 254) + 1

    monkeypatch.setattr("fmsuite.domains.pathology.tile_codecs.imagecodecs.jpeg8_decode", brighter)
    source = OpenSlideSource(path)
    assert not decoded_here(source)
    assert "its own tiles differ" in caplog.text
    ours, _ = source.read(0, 5, 6, 70, 80)
    assert np.array_equal(ours, pixels_of_openslide(path, 0, 5, 6, 70, 80))
    source.close()


def test_the_cache_keeps_to_its_bytes_and_forgets_what_was_used_longest_ago() -> None:
    cache = TileCache(1000, 300)

    def tile(value: int) -> np.ndarray:
        def decode(memory: np.ndarray) -> np.ndarray:
            assert memory.nbytes == 300
            memory[:10] = value
            return memory[:10]

        return cache.fill(value, decode)

    for value in (1, 2, 3):
        tile(value)
    assert (cache.get(1) == 1).all()
    tile(4)
    assert cache.get(2) is None
    assert [(cache.get(value) == value).all() for value in (1, 3, 4)] == [True] * 3
    assert len(cache) == cache.slots == 3
    memory = cache.get(1)
    while memory.base is not None:
        memory = memory.base
    assert memory.nbytes <= 1000

    def fail(_: np.ndarray) -> np.ndarray:
        raise DoubtfulTile("no")

    for _ in range(5):
        with pytest.raises(DoubtfulTile):
            cache.fill(9, fail)
    tile(5)
    tile(6)
    assert len(cache) == 3
    cache.clear()
    assert cache.get(6) is None


def test_memory_and_files_do_not_grow_over_a_cohort(tmp_path: Path, texture: np.ndarray) -> None:
    paths = [jpeg_slide(tmp_path / f"{number}.tif", [texture], 128) for number in range(6)]
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").is_dir() else None
    reader = SlideReader((64, 64), limit=2)
    rng = np.random.default_rng(0)
    seen = []
    for _ in range(40):
        path = paths[int(rng.integers(6))]
        top, left = rng.integers(0, 600, 2)
        assert decoded_here(reader.handles.get(path))
        reader.read(Window(path, "slide", (float(top), float(left)), (64.0, 64.0)))
        seen.append(reader.handles.get(path))
    kept = [source for source in dict.fromkeys(seen) if source._tiles is not None]
    assert len(kept) == 2
    reader.handles.close()
    assert all(source._tiles is None for source in seen)
    if before is not None:
        assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_the_first_windows_of_a_slide_are_read_through_openslide_and_are_the_same(
    tmp_path: Path, texture: np.ndarray
) -> None:
    path = jpeg_slide(tmp_path / "slide.tif", [texture, texture[::2, ::2]])
    source = OpenSlideSource(path)
    for number in range(FIRST_WINDOWS + 2):
        ours, _ = source.read(0, 10 * number, 20, 100, 100)
        assert (source._tiles is not None) == (number >= FIRST_WINDOWS)
        assert np.array_equal(ours[..., :3], pixels_of_openslide(path, 0, 10 * number, 20, 100, 100)[..., :3])
    source.close()
    # A level on which OpenSlide cannot begin exactly, and a reduced window, would not be the same.
    path = jpeg_slide(tmp_path / "uneven.tif", [texture, texture[:233, :299]])
    for reads in (
        lambda s: s.read(1, 33, 44, 50, 50),
        lambda s: read_region(s, (0.0, 0.0), (200.0, 200.0), (100, 100)),
    ):
        source = OpenSlideSource(path)
        reads(source)
        assert source._tiles is not None
        source.close()


def test_worker_processes_read_what_this_one_reads(
    tmp_path: Path, texture: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fmsuite.domains.pathology.slides.FIRST_WINDOWS", 0)
    for number in range(3):
        path = jpeg_slide(tmp_path / f"{number}.tif", [texture], 128)
    offset, count = tile_places(path)[9]
    rows = [(str(tmp_path / f"{n % 3}.tif"), (128.0, 64.0 * (n // 3))) for n in range(18)]
    table = windows_table(
        [WindowRows(source, "g", np.array([place]), (128.0, 128.0), (0.5, 0.5)) for source, place in rows]
    )
    index = join_tables([table], {"size": 128, "mpp": 0.5})
    domain = PathologyDomain(PathologyOptions(size=128))
    with Path(path).open("r+b") as file:
        file.seek(offset + count // 2)
        file.write(b"\xff\xd9" + b"\0" * (count - count // 2 - 2))
    reader = domain.reader(index)
    # Open files do not follow into the workers.
    reader.read(index[0])
    windows = WholeWindows(index, reader, domain.input_spec(index), 128)
    batches = [list(range(first, first + 6)) for first in (0, 6, 12)]
    here, there = (list(load_windows(windows, batches, workers)) for workers in (0, 2))
    lost = 0
    for (ours, our_skipped), (theirs, their_skipped) in zip(here, there, strict=True):
        assert ours is not None
        assert theirs is not None
        assert torch.equal(ours.views[IMAGE][0].pixels, theirs.views[IMAGE][0].pixels)
        assert our_skipped == their_skipped
        lost += len(our_skipped)
    assert lost == 3
    reader.handles.close()


def test_a_small_cache_changes_no_pixel(tmp_path: Path, texture: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    path = jpeg_slide(tmp_path / "slide.tif", [texture], 64, subsampling=(2, 2))
    monkeypatch.setattr("fmsuite.domains.pathology.slides.open_tiles", small_cache)
    source = OpenSlideSource(path)
    tiles = source._own_tiles(0)
    assert tiles is not None
    for box in boxes(texture.shape[:2], 8):
        assert np.array_equal(source.read(0, *box)[0], pixels_of_openslide(path, 0, *box)[..., :3])
        assert len(tiles.cache) <= tiles.cache.slots == 2
    source.close()


def small_cache(path: str, vendor: str, levels: list) -> object:
    from fmsuite.domains.pathology.tile_reader import open_tiles

    return open_tiles(path, vendor, levels, limit=1)


def test_example_slides_are_decoded_from_their_own_tiles(tmp_path: Path, tissue: np.ndarray) -> None:
    write_slide(tmp_path / "slide.tif", tissue, 0.5)
    source = OpenSlideSource(str(tmp_path / "slide.tif"))
    assert all(decoded_here(source, level) for level in range(len(source.levels)))
    source.close()


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("CMU-1-Small-Region.svs", True),
        ("openslide_small.svs", True),
        ("openslide_boxes.tiff", False),
        ("pathml_small_HE_levels.tiff", False),
        ("openslide_boxes_0.dcm", False),
    ],
)
def test_real_slides_are_pixel_for_pixel_what_openslide_reads(real_data: Path, name: str, own: bool) -> None:
    path = str(real_data / "pathology" / "slides" / name)
    source = OpenSlideSource(path)
    assert (source._own_tiles(0) is not None) == own
    for level, facts in enumerate(source.levels):
        for box in list(boxes(facts.shape, 8, seed=level))[1:]:
            box = (*box[:2], min(box[2], 700), min(box[3], 700))
            ours, _ = source.read(level, *box)
            theirs = pixels_of_openslide(path, level, *box)
            assert np.array_equal(ours, theirs[..., :3] if ours.shape[2] == 3 else theirs)
    source.close()


@pytest.mark.realdata
def test_a_real_slide_at_half_its_resolution(real_data: Path) -> None:
    path = str(real_data / "pathology" / "slides" / "CMU-1-Small-Region.svs")
    source = OpenSlideSource(path)
    away = []
    for top, left in ((0, 0), (1000, 1200), (2200, 300)):
        window, _ = read_region(source, (float(top), float(left)), (512.0, 512.0), (256, 256))
        whole, _ = source.read(0, top, left, 512, 512)
        away.append(np.abs(window - means(whole, 2)))
    assert np.mean(away) < 0.5
    assert np.quantile(away, 0.99) <= 3
    assert np.max(away) <= 30
    source.close()
