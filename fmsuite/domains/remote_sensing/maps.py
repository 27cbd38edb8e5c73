"""Which label maps lie beside the rasters, and what their values mean: the options."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fmsuite.errors import UsageError
from fmsuite.tiling.templates import absolute_template, is_template

FIELDS = ("name", "stem", "folder", "place")


class MapOptions(BaseModel):
    """Label maps of rasters.

    Attributes:
        maps: label maps by name: a folder that holds a file with the raster's name for each, or a path, in which
            ``{name}`` and ``{stem}`` stand for the raster's file name with and without its suffix, ``{folder}`` for its
            folder, and ``{place}`` for what ``place_pattern`` finds in the name, or without one for the stem without
            what the pattern of its layer matches. A file is a raster in the same coordinate system, or one with
            polygons (shapefile, GeoJSON, GeoPackage) in any.
        map_column: of a vector file, the column that says which class a polygon is: whole numbers, or text.
        map_classes: what the texts of such a column are, class 0 first; sorted, if not given, which needs all polygons
            in one file.
        map_ignore: values that mean "not known", beside the file's nodata value. Such pixels are -1 in the map, as
            those are where no polygon lies, outside the map, and where the raster has no data.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    maps: dict[str, str] = Field(default_factory=dict)
    map_column: dict[str, str] = Field(default_factory=dict)
    map_classes: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    map_ignore: dict[str, tuple[int, ...]] = Field(default_factory=dict)

    @field_validator("maps")
    @classmethod
    def _templates(cls, maps: dict[str, str]) -> dict[str, str]:
        return {name: absolute_template(f"maps.{name}", template, FIELDS) for name, template in maps.items()}

    @model_validator(mode="after")
    def _of_maps(self) -> MapOptions:
        for option in ("map_column", "map_classes", "map_ignore"):
            unknown = [name for name in getattr(self, option) if name not in self.maps]
            if unknown:
                raise ValueError(f"{option} names '{unknown[0]}', which is none of maps ({', '.join(self.maps)})")
        for name, classes in self.map_classes.items():
            if name not in self.map_column:
                raise ValueError(f"map_classes.{name} needs map_column.{name}, whose texts it puts into order")
            if len(set(classes)) < len(classes) or not classes:
                raise ValueError(f"map_classes.{name} must name at least one class, and none twice")
        return self

    def check_folders(self) -> None:
        """
        Raises:
            UsageError: if a folder or file of maps that is not a matter of the raster does not exist.
        """
        for name, template in self.maps.items():
            if not is_template(template) and not Path(template).exists():
                raise UsageError(
                    f"data.maps.{name}: there is no {template}.",
                    "Name the folder of the label maps, a vector file, or a path with {name}, {stem} or {place} in it.",
                )
