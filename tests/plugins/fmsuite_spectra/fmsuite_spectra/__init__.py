"""A fifth field for fmsuite: spectra, one curve of intensities a CSV file."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from fmsuite.core.data.index import SampleIndex, Window
from fmsuite.core.data.sample import ArraySample, Sample
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.inputs import Channel, InputSpec
from fmsuite.core.seeding import generator
from fmsuite.domains.base import Domain, DomainOptions, Units
from fmsuite.errors import ReadFailure
from fmsuite.tiling.labels import DEFAULT_NAME, LabelOptions
from fmsuite.tiling.tasks import SourceRows, Sources, SourceTask, labelled_sources


class SpectraOptions(DomainOptions, LabelOptions):
    """``length``: values to which every spectrum is resampled; and those of labels files."""

    length: int = 256


def read_spectrum(path: str) -> np.ndarray:
    """(N,) intensities, one number a line."""
    try:
        values = np.loadtxt(path, dtype=np.float32, ndmin=1)
    except (OSError, ValueError) as error:
        raise ReadFailure(path, "open", f"not a column of numbers ({error})", "Write one number a line.") from error
    if values.ndim != 1 or len(values) < 2 or not np.isfinite(values).all():
        raise ReadFailure(path, "open", "not a column of finite numbers", "Write one number a line.")
    return values


class SpectraReader:
    def __init__(self, length: int) -> None:
        self.length = length

    def read(self, window: Window) -> Sample:
        whole = ArraySample(read_spectrum(window.source)[None])
        return whole.crop((0.0,), (float(whole.size[0]),), (self.length,))


class SpectraAugmentation:
    def before_crop(self, sample: Sample, strength: str, generator: np.random.Generator) -> Sample:
        return sample

    def after_crop(
        self, sample: ArraySample, strength: str, second: bool, generator: np.random.Generator
    ) -> ArraySample:
        if strength != "strong":
            return sample
        gain, offset = generator.uniform(0.8, 1.2), generator.normal(0, 0.05)
        return sample.replace(values=(sample.values * gain + offset).astype(np.float32))


class SpectraDomain(Domain):
    name = "spectra"
    title = "One-dimensional spectra (CSV, one number a line)"
    Options = SpectraOptions
    default_recipe = "spectra-mae"
    units = Units(window="curve", source="curve", group="substance")
    recipes = Path(__file__).parent / "recipes"
    options: SpectraOptions

    def find_sources(self, paths: Sequence[Path], skipped: SkippedLog) -> Sources:
        found = labelled_sources(self.options, paths, (".csv",), "spectra", skipped)
        return replace(found, tasks=[task for task in found.tasks if Path(task.path).name != DEFAULT_NAME])

    def index_source(self, task: SourceTask) -> SourceRows:
        size = float(len(read_spectrum(task.path)))
        return SourceRows(task.rows(np.zeros((1, 1)), (size,)))

    def input_spec(self, index: SampleIndex) -> InputSpec:
        return InputSpec(axes=("x",), size=(self.options.length,), channels=(Channel(name="intensity"),))

    def reader(self, index: SampleIndex) -> SpectraReader:
        return SpectraReader(self.options.length)

    def augmentation(self, spec: InputSpec) -> SpectraAugmentation:
        return SpectraAugmentation()

    def to_rgb(self, values: np.ndarray, spec: InputSpec) -> np.ndarray:
        image = Image.new("RGB", (values.shape[1], 64), "white")
        low, high = float(values.min()), float(values.max())
        heights = 60 - 56 * (values[0] - low) / max(high - low, 1e-6)
        ImageDraw.Draw(image).line(list(enumerate(heights.tolist())), fill="navy")
        return np.asarray(image)

    def example_data(self, folder: Path, seed: int = 0) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        rows = [("path", "label", "split")]
        for number in range(60):
            peaks, draw = 1 + number % 3, generator(seed, "spectra", number)
            x = np.linspace(0, 1, 300)
            y = draw.normal(0, 0.05, 300)
            for centre in draw.uniform(0.1, 0.9, peaks):
                y += np.exp(-(((x - centre) / 0.03) ** 2))
            np.savetxt(folder / f"{number:02d}.csv", y, fmt="%.5f")
            rows.append((f"{number:02d}.csv", f"{peaks} peaks", "train" if number < 45 else "test"))
        with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
        return folder
