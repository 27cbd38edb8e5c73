"""Spatial blocks: squares of the ground that stay on one side of a split, whatever raster shows them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from fmsuite.domains.remote_sensing.ground import Frame, transformer
from fmsuite.errors import UsageError

_EDGE_POINTS = 8
"""Into so many parts each side of a window is cut before it is converted to another coordinate system."""
_SLACK = 1e-6
"""Of a block: a window that ends this close to a border ends there."""


class BlockOptions(BaseModel):
    """The part of the ``data:`` options that makes groups of the ground.

    Attributes:
        block: side of a square of the ground in metres. Windows of one square are one group, ``CRS/rRcC``, whichever
            raster and date they come from; windows across a border are left out.
        block_margin: metres; windows nearer to a border than this are left out too.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    block: float | None = Field(default=None, gt=0)
    block_margin: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _of_blocks(self) -> BlockOptions:
        if self.block is None and self.block_margin:
            raise ValueError("block_margin has a meaning only with block: METRES")
        if self.block is not None and 2 * self.block_margin >= self.block:
            raise ValueError(f"a margin of {self.block_margin:g} m leaves nothing of blocks of {self.block:g} m")
        return self


@dataclass(frozen=True)
class BlockGrid:
    """Squares of the ground in one coordinate system, numbered from its origin: the same for all rasters.

    Where coordinates are lengths, block ``rRcC`` is the square from ``C * side`` on eastwards and from ``R * side`` on
    northwards (numbers may be negative). Where they are degrees, rows have equal heights of latitude, and each row is
    cut, from the zero meridian eastwards, into as many equal blocks of longitude as come nearest to the side at its
    middle: blocks of different rows do not stand above each other.

    Attributes:
        crs: WKT.
        side, margin: metres.
        name: of the coordinate system, for the names of blocks.
        degrees: coordinates are angles.
        unit: metres, or radians, of one unit of the coordinates.
        radius: of the ellipsoid along the equator, metres.
    """

    crs: str
    side: float
    margin: float
    name: str
    degrees: bool
    unit: float
    radius: float

    @classmethod
    def of(cls, frames: Mapping[str, Frame], options: BlockOptions, degrees: bool = False) -> BlockGrid:
        """In the rasters' coordinate system; if they have several, in the longitudes and latitudes of the first.

        Args:
            degrees: take longitudes and latitudes in any case.

        Raises:
            UsageError: for a coordinate system without lengths.
        """
        import pyproj

        assert options.block is not None
        texts = list(dict.fromkeys(frame.crs for frame in frames.values()))
        systems = [pyproj.CRS.from_user_input(text) for text in texts]
        system: pyproj.CRS | None = systems[0]
        if degrees or any(system != other for other in systems):
            system = systems[0].geodetic_crs
        if system is None or system.ellipsoid is None or not (system.is_geographic or system.is_projected):
            raise UsageError(
                f"data.block: the rasters' coordinate system ({texts[0][:60]}) has no place on a planet.",
                "Leave data.block out, or georeference the rasters.",
            )
        authority = system.to_authority(min_confidence=100)
        return cls(
            system.to_wkt(),
            options.block,
            options.block_margin,
            "-".join(authority) if authority else "".join(c if c.isalnum() else "-" for c in system.name),
            system.is_geographic,
            float(system.axis_info[0].unit_conversion_factor) if system.axis_info else 1.0,
            float(system.ellipsoid.semi_major_metre),
        )

    def groups(self, frame: Frame, corners: np.ndarray, extent: tuple[float, float]) -> list[str | None]:
        """The block of each window; ``None`` for one that is across a border, or nearer to one than the margin.

        Args:
            corners: (N, 2) rows and columns in pixels.
            extent: (2,) of the windows, pixels.
        """
        west, south, east, north = self._bounds(frame, corners, extent)
        height = self.side / self.radius / self.unit if self.degrees else self.side / self.unit
        row = np.floor(south / height + _SLACK)
        if self.degrees:
            middle = np.clip((row + 0.5) * height * self.unit, -np.pi / 2, np.pi / 2)
            around = np.maximum(np.round(2 * np.pi * self.radius * np.cos(middle) / self.side), 1)
            width = 2 * np.pi / self.unit / around
            # Of a row, the side nearer to a pole is the shorter: there the margin takes most degrees.
            steep = np.maximum(np.abs(row), np.abs(row + 1)) * height * self.unit
            narrow = np.maximum(np.cos(np.minimum(steep, np.pi / 2)), 1e-6)
            margin_x = self.margin / self.radius / narrow / self.unit
            margin_y = np.full(len(row), self.margin / self.radius / self.unit)
            turns = np.floor(west / (2 * np.pi / self.unit) + _SLACK) * (2 * np.pi / self.unit)
            west, east = west - turns, east - turns
        else:
            width = np.full(len(row), height)
            margin_x = margin_y = np.full(len(row), self.margin / self.unit)
        column = np.floor(west / width + _SLACK)
        near = (
            (south - row * height < margin_y - _SLACK * height)
            | ((row + 1) * height - north < margin_y - _SLACK * height)
            | (west - column * width < margin_x - _SLACK * width)
            | ((column + 1) * width - east < margin_x - _SLACK * width)
        )
        return [
            None if out else f"{self.name}/r{int(r)}c{int(c)}"
            for out, r, c in zip(near | ~np.isfinite(west + east + south + north), row, column, strict=True)
        ]

    def _bounds(self, frame: Frame, corners: np.ndarray, extent: tuple[float, float]) -> tuple[np.ndarray, ...]:
        """West, south, east and north of each window, in the grid's coordinate system."""
        steps = np.linspace(0, 1, _EDGE_POINTS + 1)
        ends = np.zeros_like(steps)
        outline = np.concatenate(
            [np.stack(pair, axis=1) for pair in ((steps, ends), (steps, ends + 1), (ends, steps), (ends + 1, steps))]
        )
        points = frame.coordinates((corners[:, None] + outline * np.array(extent)).reshape(-1, 2))
        x, y = transformer(frame.crs, self.crs).transform(points[:, 0], points[:, 1])
        x, y = x.reshape(len(corners), -1), y.reshape(len(corners), -1)
        return x.min(1), y.min(1), x.max(1), y.max(1)


def refuse_narrow_blocks(ground: tuple[float, float], options: BlockOptions) -> None:
    """
    Args:
        ground: (2,) metres that a window measures.

    Raises:
        UsageError: if no window can lie within a block.
    """
    assert options.block is not None
    room = options.block - 2 * options.block_margin
    if max(ground) > room * (1 + _SLACK):
        raise UsageError(
            f"data.block: a window measures {max(ground):.0f} m and a block within its margins {room:.0f} m.",
            "Make data.block several times as large as a window.",
        )
