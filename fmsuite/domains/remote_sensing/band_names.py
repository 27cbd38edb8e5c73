"""What the bands of a file are called."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from fmsuite.domains.remote_sensing.names import band_of
from fmsuite.domains.remote_sensing.options import RemoteSensingOptions
from fmsuite.errors import ReadFailure

if TYPE_CHECKING:
    from rasterio.io import DatasetReader

_STACK_HINT = (
    "Name the bands with data.file_bands, or set data.sensor; of files of one band each, say with data.band_pattern "
)
_STACK_HINT += "where their names tell the band."
COLOURS = ("red", "green", "blue")


def colour_names(path: str, layer: int, options: RemoteSensingOptions) -> list[str]:
    """Of the bands that a colour table makes: red, green and blue, as the sensor calls them.

    Raises:
        ReadFailure: if the sensor does not have them.
    """
    sensor = options.layout[layer].spectral
    if not sensor.bands:
        return list(COLOURS)
    names = [sensor.recognise(colour) for colour in COLOURS]
    if None in names:
        raise ReadFailure(path, "metadata", f"{sensor.name} has no {', '.join(COLOURS)}.", "Correct data.sensor.")
    return [name for name in names if name is not None]


def band_names(
    dataset: DatasetReader, path: str, numbers: list[int], layer: int, options: RemoteSensingOptions
) -> tuple[list[str | None], bool]:
    """A name for each band (``None`` for one that the sensor does not know), and whether the file gave them."""
    from rasterio.enums import ColorInterp

    own = options.layout[layer]
    sensor = own.spectral
    described = [(dataset.descriptions[n - 1] or "").strip() for n in numbers]
    if own.band_pattern is not None or (len(numbers) == 1 and not described[0]):
        held = band_of(path, layer, options)
        if held is not None:
            if len(numbers) > 1:
                raise ReadFailure(
                    path, "metadata", f"its name says that it is the band {held[0]}, and it has {len(numbers)} bands."
                )
            return [held[0]], True
    if own.file_bands is not None:
        if len(own.file_bands) != len(numbers):
            raise ReadFailure(
                path,
                "metadata",
                f"it has {len(numbers)} bands and data.file_bands names {len(own.file_bands)}.",
                "Index files of one kind at a time.",
            )
        return list(own.file_bands), True
    colours = [dataset.colorinterp[n - 1] for n in numbers]
    if not any(described) and {ColorInterp.red, ColorInterp.green, ColorInterp.blue} <= set(colours):
        known = {ColorInterp.red: "red", ColorInterp.green: "green", ColorInterp.blue: "blue"}
        described = [known.get(colour, f"band{n}") for colour, n in zip(colours, numbers, strict=True)]
        if sensor.layouts and len(numbers) in {len(layout) for layout in sensor.layouts}:
            described = [""] * len(numbers)
    if not sensor.bands:
        if all(described) and len(set(described)) == len(described):
            return list(described), True
        return [f"band{n}" for n in numbers], False
    if any(described):
        names = [sensor.recognise(text) if text else None for text in described]
        twice = [name for name, count in Counter(n for n in names if n).items() if count > 1]
        if twice:
            raise ReadFailure(
                path, "metadata", f"two of its bands call themselves {twice[0]}.", "Name them with data.file_bands."
            )
        if any(names):
            return list(names), True
        raise ReadFailure(
            path,
            "metadata",
            f"its bands ({', '.join(text or '?' for text in described)}) are none of {sensor.name}'s.",
            _STACK_HINT,
        )
    for layout in sensor.layouts:
        if len(layout) == len(numbers):
            return list(layout), True
    expected = " or ".join(str(len(layout)) for layout in sensor.layouts)
    raise ReadFailure(
        path,
        "metadata",
        f"it has {len(numbers)} undescribed band{'s' * (len(numbers) > 1)}; {sensor.name} has {expected}.",
        _STACK_HINT,
    )
