"""Example scenes: two kinds of land use with equal spectra, told apart by the shapes on the ground alone."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from fmsuite.core.seeding import generator
from fmsuite.domains.remote_sensing.sensors import SENSORS

CLASSES = ("fields", "settlement")
SCENES = 8
SIZE = 256
NODATA = 0
_GEOGRAPHIC_SCENE = 5

# Reflectance x 10000 of bare soil and of crops in the 13 bands of Sentinel-2, rounded from textbook curves.
_SOIL = np.array([1300, 1250, 1500, 1900, 2100, 2250, 2400, 2500, 2600, 900, 60, 3300, 2900], dtype=np.float64)
_CROP = np.array([1150, 800, 800, 550, 1000, 2700, 3500, 3600, 3800, 1100, 40, 1800, 900], dtype=np.float64)


def make_example(folder: Path, seed: int) -> Path:
    """Eight Sentinel-2 scenes of 256 x 256 pixels with labels.csv, as GeoTIFF files as they are found in the wild.

    Four scenes show parcels with straight borders, four show winding roads and houses. Every scene has the same values
    in every band, only laid out differently (before a scene's own illumination and noise), so band statistics cannot
    tell the classes apart. Each scene has a swath edge and a cloud hole of nodata. One is in geographic coordinates,
    where pixels are not square on the ground. One scene a class is the test split.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for scene in range(SCENES):
        name = CLASSES[scene % 2]
        draw = generator(seed, "remote-sensing-example", scene)
        # Paths must not tell the class; the split must not either.
        file = f"scene_{scene + 1:02d}.tif"
        _write(folder / file, _scene(name, draw), scene)
        rows.append((file, name, f"scene_{scene + 1:02d}", "test" if scene >= SCENES - 2 else "train"))
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as table:
        writer = csv.writer(table)
        writer.writerow(["file", "label", "group", "split"])
        writer.writerows(rows)
    return folder


def _scene(name: str, draw: np.random.Generator) -> np.ndarray:
    """(13, SIZE, SIZE) uint16."""
    layout = _fields(draw) if name == "fields" else _settlement(draw)
    cover = _ranked(layout, draw)[None]
    moisture = _ranked(_smooth(draw, 24), draw)[None]
    spectra = _SOIL[:, None, None] * (1 - cover) + _CROP[:, None, None] * cover
    light = draw.normal(1, 0.03) * draw.normal(1, 0.01, size=(13, 1, 1))
    values = spectra * (1 + 0.1 * (moisture - 0.5)) * light
    values = values * draw.normal(1, 0.015, size=values.shape)
    # Sensors do not resolve single counts; rounding keeps the files small.
    values = np.maximum(np.round(values / 8) * 8, 8).astype(np.uint16)
    values[:, _holes(draw)] = NODATA
    return values


def _ranked(layout: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """The same values for every layout, 0 to 1, in the layout's order."""
    order = np.argsort((layout + 1e-6 * draw.random(layout.shape)).reshape(-1), kind="stable")
    ranks = np.empty(layout.size)
    ranks[order] = np.linspace(0, 1, layout.size)
    return ranks.reshape(layout.shape)


def _fields(draw: np.random.Generator) -> np.ndarray:
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float64)
    angle = draw.uniform(0, np.pi)
    along, across = x * np.cos(angle) + y * np.sin(angle), -x * np.sin(angle) + y * np.cos(angle)
    strips = np.cumsum(draw.uniform(14, 26, size=64)) - 600
    strip = np.searchsorted(strips, across)
    cuts = [np.cumsum(draw.uniform(20, 44, size=64)) - 900 for _ in range(65)]
    parcel = np.zeros((SIZE, SIZE), dtype=np.int64)
    for number in np.unique(strip):
        inside = strip == number
        parcel[inside] = 100 * number + np.searchsorted(cuts[number], along[inside])
    values = draw.random(100 * 66)[parcel]
    rows = np.sin(2 * np.pi * across / 4) * draw.choice([0, 0.04], size=100 * 66)[parcel]
    return values + rows


def _settlement(draw: np.random.Generator) -> np.ndarray:
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float64)
    layout = 0.3 * _smooth(draw, 10)
    for _ in range(26):
        centre, size = draw.uniform(0, SIZE, 2), draw.uniform(10, 26)
        layout += 0.35 * draw.normal() * np.exp(-((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / (2 * size**2))
    for _ in range(7):
        wave, phase, tilt = draw.uniform(50, 110), draw.uniform(0, 6.3), draw.uniform(0, np.pi)
        along = x * np.cos(tilt) + y * np.sin(tilt)
        across = -x * np.sin(tilt) + y * np.cos(tilt)
        course = draw.uniform(-140, 200) + draw.uniform(12, 24) * np.sin(2 * np.pi * along / wave + phase)
        layout[np.abs(across - course) < 2.2] = -1.5
    for _ in range(420):
        top, left = draw.integers(0, SIZE - 6, size=2)
        height, width = draw.integers(2, 6, size=2)
        layout[top : top + height, left : left + width] = draw.choice([-1.0, 1.5])
    return layout


def _smooth(draw: np.random.Generator, cells: int) -> np.ndarray:
    """(SIZE, SIZE) noise with a correlation length of ``SIZE / cells`` pixels, unit variance."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(SIZE), np.fft.fftfreq(SIZE)))
    spectrum = np.fft.fft2(draw.normal(size=(SIZE, SIZE))) * np.exp(-0.5 * (frequency * SIZE / cells) ** 2)
    field = np.real(np.fft.ifft2(spectrum))
    return field / field.std()


def _holes(draw: np.random.Generator) -> np.ndarray:
    """(SIZE, SIZE) bool: a slanted swath edge and a cloud."""
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float64)
    edge = x + draw.uniform(0.1, 0.3) * y < draw.uniform(25, 55)
    centre, size = draw.uniform(90, 200, size=2), draw.uniform(14, 26, size=2)
    ragged = 1 + 0.25 * _smooth(draw, 12)
    cloud = ((y - centre[0]) / size[0]) ** 2 + ((x - centre[1]) / size[1]) ** 2 < ragged
    return edge | cloud


def _write(path: Path, values: np.ndarray, scene: int) -> None:
    import rasterio
    from rasterio.transform import from_origin

    if scene == _GEOGRAPHIC_SCENE:
        crs, transform = "EPSG:4326", from_origin(9.0, 48.0, 9e-5, 9e-5)
    else:
        crs, transform = "EPSG:32632", from_origin(500_000 + 10_000 * scene, 5_300_000, 10, 10)
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        width=SIZE,
        height=SIZE,
        count=len(values),
        dtype=values.dtype,
        crs=crs,
        transform=transform,
        nodata=NODATA,
        tiled=True,
        blockxsize=128,
        blockysize=128,
        compress="deflate",
        predictor=2,
    ) as dataset:
        dataset.write(values)
        dataset.descriptions = SENSORS["sentinel2-l1c"].band_names
