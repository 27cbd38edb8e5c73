"""What windows are cut from: files that are one picture, dates that are one series; which bands all of them share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fmsuite.core.data.skipped import SkippedLog
from fmsuite.domains.remote_sensing.grids import Grid, misfit, pixel_ratio
from fmsuite.domains.remote_sensing.options import RemoteSensingOptions
from fmsuite.domains.remote_sensing.probe import Probe, frozen

Dates = tuple[tuple[float | None, tuple[str, ...]], ...]
"""In order, each date's day (``None`` outside of time series) and files."""


@dataclass(frozen=True)
class Unit:
    """What windows are cut from: the files of a scene, or those of the dates of a place.

    Attributes:
        bands, dtype: as which they are read.
        grid, metres: of all of them.
        plan: of its windows; see ``layout.plan_layouts``.
    """

    dates: Dates
    bands: tuple[str, ...]
    dtype: str
    grid: Grid
    metres: tuple[float, float] | None
    plan: Mapping[str, Any] = field(default_factory=dict)

    @property
    def source(self) -> str:
        return self.dates[0][1][0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.grid[0], self.grid[1]

    @classmethod
    def recalled(cls, details: dict[str, Any]) -> Unit:
        """From JSON values."""
        return cls(**{key: frozen(value) for key, value in details.items()})


@dataclass(frozen=True)
class Picture:
    """The files of one date of one scene, in the order of layers and bands."""

    files: tuple[Probe, ...]

    @property
    def first(self) -> Probe:
        return self.files[0]

    @property
    def finest(self) -> Probe:
        return min(self.files, key=lambda file: _pixel_area(file.grid))

    def bands_of(self, layer: int) -> tuple[str, ...]:
        return tuple(name for file in self.files if file.layer == layer for name in file.bands)


def settle_scenes(
    probes: Sequence[Probe], options: RemoteSensingOptions, skipped: SkippedLog
) -> list[tuple[Probe, Unit]]:
    """What windows are cut from and as what it is read; each with its first file.

    Files whose bands differ: without ``data.bands``, the set that most scenes have decides, layer by layer (of equally
    frequent sets the larger, then the one met first); what lacks a band of it is skipped, what has more is read by
    name.
    """
    together: dict[tuple[str, float | None], list[Probe]] = {}
    for file in probes:
        together.setdefault((file.scene, file.day), []).append(file)
    pictures = [_picture(files, options, skipped) for files in together.values()]
    bands = options.wanted_bands or _common_bands(pictures, options)
    pictures = [kept for picture in pictures if (kept := _with_bands(picture, bands, options, skipped)) is not None]
    pictures = [kept for picture in pictures if (kept := _on_one_grid(picture, options, skipped)) is not None]
    dtype = _common_dtype([file for picture in pictures for file in picture.files], options)
    units = []
    for dates in _dated(pictures, options, skipped):
        first = dates[0]
        files = tuple((date.first.day, tuple(file.path for file in date.files)) for date in dates)
        units.append((first.first, Unit(files, bands, dtype, first.finest.grid, first.finest.metres)))
    return units


def _picture(files: Sequence[Probe], options: RemoteSensingOptions, skipped: SkippedLog) -> Picture:
    """Files in the order of layers and bands; of a band that several hold, the one with the finest pixels."""
    known = options.known_channels
    taken: dict[str, Probe] = {}
    kept: list[Probe] = []
    for file in sorted(files, key=lambda file: (_pixel_area(file.grid), file.path)):
        rival = next((taken[name] for name in file.bands if name in taken), None)
        if rival is not None:
            _skip_rival(file, rival, options, skipped)
            continue
        kept.append(file)
        taken.update(dict.fromkeys(file.bands, file))

    def order(file: Probe) -> tuple[Any, ...]:
        first = file.bands[0]
        return file.layer, known.index(first) if first in known else len(known), file.path

    return Picture(tuple(sorted(kept, key=order)))


def _skip_rival(file: Probe, rival: Probe, options: RemoteSensingOptions, skipped: SkippedLog) -> None:
    if _pixel_area(file.grid) > 1.5 * _pixel_area(rival.grid):
        reason = f"its bands are read at finer pixels, from {rival.path}."
    elif options.series:
        reason = f"'{file.place}' already has this date, from {rival.path}. Tell them apart with data.place_pattern."
    else:
        reason = f"'{file.scene}' already has the band {file.bands[0]}, from {rival.path}. Rename or remove one."
    skipped.add(file.path, "metadata", reason)


def _common_bands(pictures: Sequence[Picture], options: RemoteSensingOptions) -> tuple[str, ...]:
    common: tuple[str, ...] = ()
    for layer in range(len(options.layout)):
        sets = Counter(bands for picture in pictures if (bands := picture.bands_of(layer)))
        order = list(sets)
        if order:
            common += max(order, key=lambda bands: (sets[bands], len(bands), -order.index(bands)))
    return common


def _with_bands(
    picture: Picture, bands: tuple[str, ...], options: RemoteSensingOptions, skipped: SkippedLog
) -> Picture | None:
    """With the files that are needed for the bands; ``None`` where one that must be there is not."""
    lost: list[str] = []
    for number, layer in enumerate(options.layout):
        own, wanted = picture.bands_of(number), [name for name in bands if options.layer_of(name)[0] == number]
        if not own and not layer.required:
            continue
        if not own and wanted:
            _skip_all(picture, f"'{picture.first.scene}' has no file of {layer.title}.", skipped)
            return None
        lost += [name for name in wanted if name not in own]
        # Positions are no names: the first of three bands and the first of thirteen need not be the same thing.
        named = all(file.named for file in picture.files if file.layer == number)
        if not lost and not named and options.wanted_bands is None and own != tuple(wanted):
            lost = wanted
    if lost:
        has = [name for file in picture.files for name in file.bands]
        whose = "asked for" if options.wanted_bands is not None else "that most have"
        reason = (
            f"it has {len(has)} bands ({', '.join(has)}) and not the {len(bands)} {whose} ({', '.join(bands)}). "
            "Choose bands that all files have with data.bands, or index it on its own."
        )
        _skip_all(picture, reason, skipped)
        return None
    files = tuple(file for file in picture.files if set(file.bands) & set(bands))
    return Picture(files) if files else None


def _on_one_grid(picture: Picture, options: RemoteSensingOptions, skipped: SkippedLog) -> Picture | None:
    finest = picture.finest
    misfits = [file for file in picture.files if pixel_ratio(finest.grid, file.grid) is None]
    for file in misfits:
        skipped.add(file.path, "metadata", misfit(finest.path, finest.grid, file.grid))
    kept = tuple(file for file in picture.files if file not in misfits)
    needed = [file for file in misfits if options.layout[file.layer].required]
    if needed:
        _skip_all(Picture(kept), f"its scene needs {needed[0].path}, which has another grid.", skipped)
        return None
    return Picture(kept)


def _dated(pictures: Sequence[Picture], options: RemoteSensingOptions, skipped: SkippedLog) -> list[list[Picture]]:
    """Pictures that are read together, in the order of their dates."""
    if not options.series:
        return [[picture] for picture in pictures]
    places: dict[str, list[Picture]] = {}
    for picture in pictures:
        places.setdefault(picture.first.scene, []).append(picture)
    series = []
    for place, members in places.items():
        grids: dict[Grid, int] = {}
        for picture in members:
            grid = next((known for known in grids if pixel_ratio(known, picture.finest.grid) == (1, 1)), None)
            grids[grid or picture.finest.grid] = grids.get(grid or picture.finest.grid, 0) + 1
        common = max(grids, key=lambda candidate: grids[candidate])
        dates = []
        for picture in sorted(members, key=lambda member: member.first.day or 0):
            if pixel_ratio(common, picture.finest.grid) == (1, 1):
                dates.append(picture)
                continue
            reason = (
                f"its pixels do not coincide with those of most dates of '{place}'. Warp it onto their grid with "
                "`gdalwarp -te -tr -t_srs`, or tell places apart with data.place_pattern."
            )
            _skip_all(picture, reason, skipped)
        series.append(dates)
    return series


def _skip_all(picture: Picture, reason: str, skipped: SkippedLog) -> None:
    for file in picture.files:
        skipped.add(file.path, "metadata", reason)


def _common_dtype(files: Sequence[Probe], options: RemoteSensingOptions) -> str:
    """The smallest type that holds every file's values and that tensors can have."""
    linear = any(layer.spectral.linear for layer in options.layout)
    if options.gsd is not None or linear or not files or any(file.tagged for file in files):
        return "float32"
    found = str(np.result_type(*(np.dtype(file.dtype) for file in files)))
    return found if found in ("uint8", "int16", "uint16", "int32") else "float32"


def _pixel_area(grid: Grid) -> float:
    a, b, _, d, e, _ = grid[3]
    return abs(a * e - b * d)
