"""What one file says of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fmsuite.domains.remote_sensing.grids import Grid
from fmsuite.domains.remote_sensing.options import RemoteSensingOptions
from fmsuite.domains.remote_sensing.plausible import refuse_implausible
from fmsuite.domains.remote_sensing.raster import open_raster
from fmsuite.errors import ReadFailure
from fmsuite.tiling.tasks import SourceTask


@dataclass(frozen=True)
class Probe:
    """What one file says of itself, and what its name says.

    Attributes:
        bands: channel names.
        named: its bands have names, and not only positions.
        tagged: it says how its values become physical ones.
        metres: the size of a pixel along (y, x).
        grid: where its pixels lie.
        scene, place, day, layer, band: as in ``names.Name``.
    """

    path: str
    bands: tuple[str, ...]
    named: bool
    dtype: str
    tagged: bool
    metres: tuple[float, float] | None
    grid: Grid
    scene: str
    place: str
    day: float | None = None
    layer: int = 0
    band: str | None = None

    @classmethod
    def recalled(cls, facts: dict[str, Any]) -> Probe:
        """From JSON values."""
        return cls(**{key: frozen(value) for key, value in facts.items()})


def probe(task: SourceTask, options: RemoteSensingOptions) -> Probe:
    """
    Raises:
        ReadFailure: if the file cannot be used.
    """
    raster = open_raster(task.path, options)
    try:
        if options.gsd is not None and raster.metres is None:
            raise ReadFailure(
                raster.path,
                "metadata",
                "it has no place on Earth (no coordinate system or no geotransform), so its pixels have no known size.",
                "Georeference it with `gdal_edit -a_srs -a_ullr`, or leave data.gsd empty to read native pixels.",
            )
        named = task.details["band"]
        if named is not None and len(raster.bands) != 1:
            raise ReadFailure(
                task.path,
                "metadata",
                f"its name says that it is the band {named}, and it holds {len(raster.bands)} bands.",
                "Tell bands in names with data.band_pattern.",
            )
        refuse_implausible(raster)
        return Probe(
            task.path,
            tuple(raster.bands),
            raster.named,
            raster.dtype,
            raster.tagged is not None,
            raster.metres,
            raster.grid,
            **task.details,
        )
    finally:
        raster.close()


def frozen(value: Any) -> Any:
    """With tuples for lists, so that it can be a key."""
    return tuple(map(frozen, value)) if isinstance(value, list | tuple) else value
