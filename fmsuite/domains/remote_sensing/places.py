"""Labelled places: points and polygons of the ground, read from a vector file or from a table of coordinates."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from fmsuite.core.data.skipped import SkippedLog
from fmsuite.errors import UsageError, nearest
from fmsuite.tiling.labels import IGNORE

PLACES = "places"
"""The stage of a place that gives no window."""
TABLES = (".csv",)
VECTORS = (".shp", ".geojson", ".json", ".gpkg", ".fgb", ".gml", ".kml")
MOST_LINES = 20
"""More places with the same trouble than these share one line of ``skipped.csv``."""
USUAL_NAMES = {
    "label": ("label", "class", "classname", "class_name"),
    "group": ("group", "scene"),
    "split": ("split", "fold", "set"),
}
"""By role, the columns that are taken where the options name none: the first that the file has, in any case."""
COORDINATES = ((("longitude", "lon", "lng", "long"), ("latitude", "lat")), (("x", "easting"), ("y", "northing")))
"""Names of a table's two columns: degrees, and coordinates of some CRS."""
WGS84 = "EPSG:4326"


class PlaceOptions(BaseModel):
    """The part of the ``data:`` options that says where labelled places are, and how they become windows.

    Attributes:
        places: points and polygons with labels: a shapefile, GeoJSON or GeoPackage, or a CSV with a column of
            longitudes and one of latitudes, or ``x`` and ``y``. Windows then come from the places alone.
        places_layer: of a file with several layers.
        places_crs: coordinate system of the places (``EPSG:32618``, WKT), where the file does not say it or is wrong.
        place_label, place_group, place_split: columns of the class, of what stays on one side of a split, and of the
            sides. Columns that are not named are found by their usual names, ``USUAL_NAMES``. Without a column of
            groups each polygon is a group, and points whose windows share pixels are one.
        place_windows: what windows a polygon gives. ``overlap``: those of the grid (``stride``) of which it covers at
            least ``place_overlap``; one around its middle if it is smaller than a window. ``centre``: one around
            each of its pixels, of which it keeps every ``stride``-th row and column; the label is then that of the
            middle pixel.
        place_overlap: share of a window.
        place_limit: most windows of one polygon, evenly spread; all if not given.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    places: Path | None = None
    places_layer: str | None = None
    places_crs: str | None = None
    place_label: str | None = None
    place_group: str | None = None
    place_split: str | None = None
    place_windows: Literal["overlap", "centre"] = "overlap"
    place_overlap: float = Field(default=0.5, gt=0, le=1)
    place_limit: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _of_places(self) -> PlaceOptions:
        fields = PlaceOptions.model_fields
        asked = [name for name in fields if name != "places" and getattr(self, name) != fields[name].default]
        if self.places is None and asked:
            raise ValueError(f"{asked[0]} has a meaning only with places: FILE")
        if "place_overlap" in asked and self.place_windows == "centre":
            raise ValueError("place_overlap has no meaning with place_windows: centre, which asks for the middle pixel")
        return self


@dataclass(frozen=True)
class Places:
    """
    Attributes:
        file: where they come from.
        numbers: (N,) of each in the file, from 0; lines of a table are counted without the header.
        shapes: (N,) valid shapely points, multipoints, polygons or multipolygons, two-dimensional.
        systems: (N,) coordinate system of each, as text that pyproj understands.
        labels, groups, splits: (N,); ``None`` where the file says nothing.
        grouped: the file has a column of groups.
    """

    file: Path
    numbers: Sequence[int]
    shapes: np.ndarray
    systems: Sequence[str]
    labels: Sequence[str | None]
    groups: Sequence[str | None]
    splits: Sequence[str | None]
    grouped: bool

    def __len__(self) -> int:
        return len(self.numbers)

    def name(self, place: int) -> str:
        """Of a group of one: the file's name and the place's number."""
        return f"{self.file.stem}/{self.numbers[place]}"


def read_places(options: PlaceOptions, skipped: SkippedLog) -> Places:
    """Those of ``options.places``. What is empty, or of a kind that has no area and is no point, goes to ``skipped``.

    Raises:
        UsageError: if the file cannot be read, lacks a column that was named, has no coordinate system, or no usable
            place.
    """
    assert options.places is not None
    file = options.places
    if not file.is_file():
        raise UsageError(f"{file}: there is no such file.", "Check data.places.")
    suffix = file.suffix.lower()
    if suffix in TABLES:
        shapes, systems, columns = _read_table(file, options)
    elif suffix in VECTORS:
        shapes, systems, columns = _read_vectors(file, options)
    else:
        raise UsageError(
            f"{file}: places are read from {', '.join((*VECTORS, *TABLES))}.", "Convert it, or check data.places."
        )
    for system in dict.fromkeys(systems):
        check_system(system, f"{file}: its places' coordinate system")
    chosen = {role: _column(file, list(columns), role, options) for role in USUAL_NAMES}
    texts = {role: [None] * len(shapes) if name is None else columns[name] for role, name in chosen.items()}
    usable, troubles = _usable(shapes)
    report_places(skipped, file, troubles)
    kept = [number for number, shape in enumerate(usable) if shape is not None]
    if not kept:
        raise UsageError(f"{file}: none of its {len(shapes)} places is a point or a polygon.", "Check data.places.")
    return Places(
        file,
        kept,
        np.array([usable[number] for number in kept], dtype=object),
        [systems[number] for number in kept],
        labels=[texts["label"][number] for number in kept],
        groups=[texts["group"][number] for number in kept],
        splits=[texts["split"][number] for number in kept],
        grouped=chosen["group"] is not None,
    )


def report_places(skipped: SkippedLog, file: Path, troubles: Mapping[str, Sequence[int]]) -> None:
    """A line for each place that gives no window; where many have the same trouble, one with their count.

    Args:
        troubles: what is wrong, with a way out, and the numbers of the places.
    """
    for reason, numbers in troubles.items():
        if len(numbers) <= MOST_LINES:
            for number in numbers:
                skipped.add(f"{file}#{number}", PLACES, f"Place {number}: {reason}")
        else:
            examples = ", ".join(map(str, numbers[:5]))
            skipped.add(str(file), PLACES, f"{len(numbers)} places ({examples} and more): {reason}")


def check_system(text: str, whose: str) -> None:
    """
    Raises:
        UsageError: if pyproj does not know the coordinate system.
    """
    import pyproj
    from pyproj.exceptions import CRSError

    try:
        pyproj.CRS.from_user_input(text)
    except CRSError as error:
        raise UsageError(f"{whose}, '{text}', is not known ({error}).", "Name one like EPSG:32618.") from error


def _read_vectors(file: Path, options: PlaceOptions) -> tuple[np.ndarray, list[str], dict[str, list[str | None]]]:
    import pyogrio
    import shapely
    from pyogrio.errors import DataLayerError, DataSourceError

    try:
        layers = [str(name) for name, _ in pyogrio.list_layers(file)]
        if options.places_layer is not None and options.places_layer not in layers:
            raise UsageError(
                f"{file}: there is no layer '{options.places_layer}'.", nearest(options.places_layer, layers)
            )
        if options.places_layer is None and len(layers) > 1:
            raise UsageError(f"{file}: it has the layers {', '.join(layers)}.", "Name one with data.places_layer.")
        facts, _, shapes, values = pyogrio.raw.read(file, layer=options.places_layer)
    except (DataSourceError, DataLayerError) as error:
        raise UsageError(f"{file}: the places cannot be read ({error}).", "Check data.places.") from error
    system = options.places_crs or facts["crs"]
    if system is None:
        raise UsageError(
            f"{file}: it does not say its coordinate system.", "Name it with data.places_crs, as EPSG:32618."
        )
    if shapes is None:
        raise UsageError(f"{file}: a table without places.", "Check data.places and data.places_layer.")
    names = [str(name) for name in facts["fields"]]
    columns = {name: [_text(value) for value in column] for name, column in zip(names, values, strict=True)}
    return shapely.from_wkb(shapes, on_invalid="ignore"), [str(system)] * len(shapes), columns


def _read_table(file: Path, options: PlaceOptions) -> tuple[np.ndarray, list[str], dict[str, list[str | None]]]:
    import shapely

    try:
        with file.open(newline="", encoding="utf-8-sig") as opened:
            rows = [[cell.strip() for cell in row] for row in csv.reader(opened, strict=True)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{file}: not a CSV file in UTF-8 ({error}).", "Check data.places.") from error
    header, *lines = [row for row in rows if any(row)] or [[]]
    if not lines:
        raise UsageError(f"{file}: it has no lines below the names of its columns.", "Check data.places.")
    columns = {
        name: [(line[at] or None) if at < len(line) else None for line in lines] for at, name in enumerate(header)
    }
    by_case = {name.lower(): name for name in reversed(header)}
    for axes in COORDINATES:
        found = [next((by_case[name] for name in names if name in by_case), None) for names in axes]
        if None not in found:
            break
    else:
        raise UsageError(
            f"{file}: no columns of coordinates; it has {', '.join(header)}.",
            "Call two of them longitude and latitude, or x and y.",
        )
    points = np.full((len(lines), 2), np.nan)
    for axis, name in enumerate(found):
        for row, text in enumerate(columns[str(name)]):
            try:
                points[row, axis] = float(text or "nan")
            except ValueError:
                raise UsageError(
                    f"{file}: line {row + 2}: '{text}' in the column '{name}' is not a number.", "Correct the line."
                ) from None
    given = columns.get(by_case.get("crs", ""), [None] * len(lines))
    default = WGS84 if axes is COORDINATES[0] else None
    systems = [options.places_crs or text or default for text in given]
    if None in systems:
        row = systems.index(None)
        raise UsageError(
            f"{file}: line {row + 2} does not say its coordinate system.",
            "Name it with data.places_crs, as EPSG:32618, or in a column crs.",
        )
    whole = np.isfinite(points).all(1)
    shapes = np.full(len(lines), None, dtype=object)
    shapes[whole] = shapely.points(points[whole])
    return shapes, [str(system) for system in systems], columns


def _text(value: Any) -> str | None:
    """As a label: whole numbers without a point, and nothing for what is missing."""
    if value is None or (isinstance(value, float | np.floating) and not np.isfinite(value)):
        return None
    if isinstance(value, float | np.floating):
        return f"{value:g}"
    return str(value).strip() or None


def _column(file: Path, header: list[str], role: str, options: PlaceOptions) -> str | None:
    named = {each: getattr(options, f"place_{each}") for each in USUAL_NAMES}
    name = named[role]
    if role == "split" and name == IGNORE:
        return None
    if name is None:
        # A column that the user gives one role does not play its usual one too.
        free = {column.lower(): column for column in reversed(header) if column not in named.values()}
        return next((free[column] for column in USUAL_NAMES[role] if column in free), None)
    if name not in header:
        raise UsageError(f"{file}: there is no column '{name}' (data.place_{role}).", nearest(name, header))
    return str(name)


def _usable(shapes: np.ndarray) -> tuple[list[Any], dict[str, list[int]]]:
    """Valid two-dimensional points and polygons, ``None`` for the rest, and what is wrong with that."""
    import shapely

    usable: list[Any] = []
    troubles: dict[str, list[int]] = {}
    for number, given in enumerate(shapes):
        shape, trouble = given, ""
        if shape is None or shape.is_empty or not np.isfinite(shapely.get_coordinates(shape)).all():
            trouble = "it has no coordinates. Fill them in."
        elif shape.geom_type in ("Polygon", "MultiPolygon", "GeometryCollection"):
            shape = _areas(shapely.make_valid(shapely.force_2d(shape)))
            if shape is None:
                trouble = "its outline encloses nothing. Draw it again."
        elif shape.geom_type in ("Point", "MultiPoint"):
            shape = shapely.force_2d(shape)
        else:
            trouble = f"a {shape.geom_type} is neither a point nor a polygon. Give it a width, as QGIS's buffer does."
        usable.append(None if trouble else shape)
        if trouble:
            troubles.setdefault(trouble, []).append(number)
    return usable, troubles


def _areas(shape: Any) -> Any:
    """The polygons of what ``make_valid`` made of one; ``None`` where there are none."""
    import shapely

    parts = [part for part in shapely.get_parts(shape, return_index=False) if part.area > 0]
    polygons = [polygon for part in parts for polygon in shapely.get_parts(part) if polygon.area > 0]
    if not polygons:
        return None
    return polygons[0] if len(polygons) == 1 else shapely.union_all(polygons)
