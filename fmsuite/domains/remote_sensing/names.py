"""Which files make one scene, from their names alone: place, date, layer and band."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from fmsuite.domains.remote_sensing.dates import Taken, date_in_name, taken_of
from fmsuite.domains.remote_sensing.options import RemoteSensingOptions
from fmsuite.domains.remote_sensing.sensors import Sensor
from fmsuite.errors import ReadFailure
from fmsuite.tiling.sources import SourceFile

_SEPARATORS = "_-. "
_RESOLUTION_FOLDER = re.compile(r"R\d+m", re.IGNORECASE)
"""In SAFE folders, bands of one scene are apart by their resolution."""


@dataclass(frozen=True)
class Name:
    """What a file's name says.

    Attributes:
        scene: equal for the files of one picture, or, in series, for all of a place.
        place: what its windows are grouped by.
        day: days since 2000-01-01; ``None`` outside of time series.
        layer: number in ``options.layout``.
        band: that the file holds and nothing else; ``None`` where the file itself says what it holds.
    """

    scene: str
    place: str
    day: float | None = None
    layer: int = 0
    band: str | None = None

    def details(self) -> dict[str, Any]:
        """As ``SourceTask.details``."""
        return asdict(self)


@dataclass(frozen=True)
class _Parts:
    file: SourceFile
    folder: str
    left: str
    day: float | None
    layer: int
    band: str | None
    whole: str
    place: str | None

    @property
    def key(self) -> tuple[Any, ...]:
        return _without_resolution(self.folder), self.left, self.day, self.layer


def read_names(
    files: Sequence[SourceFile], options: RemoteSensingOptions, dates: Mapping[Path, Taken] | None = None
) -> list[Name | ReadFailure]:
    """Of each file, what its name says, or why it says nothing.

    Args:
        dates: what ``data.dates`` says of files, if it is given.

    The scene is what is left of the path below the given folder without suffix, date, band and layer. Folders that
    hold files of one layer each tell the layer and not the place, and are left out, if all do.
    """
    found: list[_Parts | ReadFailure] = []
    for file in files:
        try:
            found.append(_parts(file, options, dates))
        except ReadFailure as failure:
            found.append(failure)
    parts = [each for each in found if isinstance(each, _Parts)]
    layers_of: dict[str, set[int]] = {}
    for each in parts:
        layers_of.setdefault(each.folder, set()).add(each.layer)
    apart = len(set().union(*layers_of.values())) > 1 and all(len(layers) == 1 for layers in layers_of.values())
    bands_of: dict[tuple[Any, ...], set[str]] = {}
    for each in parts:
        if each.band is not None:
            bands_of.setdefault(each.key, set()).add(each.band)
    names: list[Name | ReadFailure] = []
    for part in found:
        if isinstance(part, ReadFailure):
            names.append(part)
            continue
        try:
            names.append(_name(part, len(bands_of.get(part.key, ())) > 1, apart, options))
        except ReadFailure as failure:
            names.append(failure)
    return names


def layer_of(path: str, options: RemoteSensingOptions) -> tuple[int, re.Match[str] | None]:
    """The number of a file's layer in ``options.layout``, and where its name says so, if it does.

    Raises:
        ReadFailure: if none or several layers' patterns fit.
    """
    if options.layers is None:
        return 0, None
    folder, name = posixpath.split(path.replace("\\", "/"))
    for text in (name, posixpath.basename(folder)):
        matches = [(number, re.search(layer.pattern, text)) for number, layer in enumerate(options.layers)]
        fitting = [(number, match) for number, match in matches if match is not None]
        if len(fitting) > 1:
            titles = " and ".join(options.layers[number].title for number, _ in fitting)
            raise ReadFailure(path, "metadata", f"the patterns of {titles} fit its name.", "Correct data.layers.")
        if fitting:
            number, match = fitting[0]
            return number, match if text is name else None
    patterns = ", ".join(layer.pattern for layer in options.layers)
    raise ReadFailure(
        path, "metadata", f"none of the patterns of data.layers ({patterns}) is found in its name or its folder's."
    )


def band_of(path: str, layer: int, options: RemoteSensingOptions) -> tuple[str, tuple[int, int]] | None:
    """The band that a file's name says it holds, and which characters of the name say so.

    Raises:
        ReadFailure: if ``band_pattern`` does not fit, or what it finds is no band of the sensor.
    """
    name, own = posixpath.basename(path.replace("\\", "/")), options.layout[layer]
    if own.band_pattern is None:
        return _known_band(name, own.spectral)
    match = re.search(own.band_pattern, name)
    if match is None:
        raise ReadFailure(path, "metadata", "band_pattern is not found in its name.", "Correct data.band_pattern.")
    text = match["band"]
    band = own.spectral.recognise(text) if own.spectral.bands else text
    if not band:
        sensor = own.spectral
        known = f"{sensor.name} has {', '.join(sensor.band_names)}"
        raise ReadFailure(
            path,
            "metadata",
            f"its name says that it is the band '{text}'; {known}.",
            "Leave it out.",
        )
    return band, match.span()


def _known_band(name: str, sensor: Sensor) -> tuple[str, tuple[int, int]] | None:
    expression = _band_expression(tuple(text for band in sensor.bands for text in (band.name, *band.aliases)))
    last = None
    for match in expression.finditer(name) if expression is not None else ():
        last = match
    if last is None:
        return None
    band = sensor.recognise(last["band"])
    return None if band is None else (band, last.span())


@lru_cache
def _band_expression(texts: tuple[str, ...]) -> re.Pattern[str] | None:
    """Any of the bands between separators, with the resolution that SAFE files have behind it."""
    if not texts:
        return None

    def spelt(text: str) -> str:
        pieces = re.findall(r"[a-z]+|\d+", text.lower())
        return "[-_ ]?".join(f"0*{int(piece)}" if piece.isdigit() else piece for piece in pieces)

    choices = "|".join(sorted({spelt(text) for text in texts}, key=len, reverse=True))
    return re.compile(rf"(?<![0-9a-z])(?P<band>{choices})(?:_\d+m)?(?![0-9a-z])", re.IGNORECASE)


def _parts(file: SourceFile, options: RemoteSensingOptions, dates: Mapping[Path, Taken] | None) -> _Parts:
    path, name = str(file.path), file.path.name
    layer, match = layer_of(path, options)
    spans = [match.span()] if match is not None else []
    day = place = None
    if dates is not None:
        taken, dated = taken_of(file, dates, options.date_pattern)
        day, place = taken.day, taken.place
        # A name that says nothing of the date says nothing of the place either: then that is the folder's.
        spans.append(dated if dated is not None else (0, len(name)))
    elif options.series:
        day, span = date_in_name(path, name, options.date_pattern)
        spans.append(span)
    held = band_of(path, layer, options)
    whole = _without(name.removesuffix(file.suffix), spans)
    band = None
    if held is not None:
        band, span = held
        spans.append(span)
    return _Parts(
        file,
        posixpath.dirname(file.relative),
        _without(name.removesuffix(file.suffix), spans),
        day,
        layer,
        band,
        whole,
        place,
    )


def _name(parts: _Parts, of_bands: bool, apart: bool, options: RemoteSensingOptions) -> Name:
    """
    Args:
        of_bands: other files differ in nothing but the band.
        apart: folders tell layers.
    """
    file, layer = parts.file, options.layout[parts.layer]
    of_bands = of_bands or (layer.band_pattern is not None and parts.band is not None)
    folder, left = parts.folder, parts.left if of_bands else parts.whole
    if of_bands:
        folder = _without_resolution(folder)
    if apart and left:
        folder = posixpath.dirname(folder)
    if options.series or options.layers is not None or of_bands:
        # Of a name that is nothing but a date or a band, the folder is the place.
        scene = posixpath.join(folder, left).rstrip("/") or file.root.name
    else:
        scene = file.group
    place = parts.place or scene
    if options.place_pattern is not None and parts.place is None:
        found = re.search(options.place_pattern, file.path.name)
        if found is None:
            raise ReadFailure(
                str(file.path), "metadata", "data.place_pattern is not found in its name.", "Correct the pattern."
            )
        place = found[1] if found.re.groups else found[0]
    return Name(place if options.series else scene, place, parts.day, parts.layer, parts.band if of_bands else None)


def _without_resolution(folder: str) -> str:
    return posixpath.dirname(folder) if _RESOLUTION_FOLDER.fullmatch(posixpath.basename(folder)) else folder


def _without(stem: str, spans: Sequence[tuple[int, int]]) -> str:
    kept = [letter if not any(low <= at < high for low, high in spans) else "\0" for at, letter in enumerate(stem)]
    text = re.sub("\0+", "\0", "".join(kept))
    separators = re.escape(_SEPARATORS)
    text = re.sub(f"([{separators}])\0[{separators}]", r"\1", text).replace("\0", "")
    return text.strip(_SEPARATORS) if spans else text
