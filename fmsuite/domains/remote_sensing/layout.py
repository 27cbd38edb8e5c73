"""Which windows a raster is cut into and what is known of each: a grid, or around places; by blocks of the ground."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fmsuite.core.data.skipped import SkippedLog
from fmsuite.domains.remote_sensing.blocks import BlockGrid, refuse_narrow_blocks
from fmsuite.domains.remote_sensing.ground import Frame
from fmsuite.domains.remote_sensing.metres import area_inflation
from fmsuite.domains.remote_sensing.options import RemoteSensingOptions
from fmsuite.domains.remote_sensing.places import PLACES
from fmsuite.domains.remote_sensing.placing import Cut, Laid, lay_places
from fmsuite.domains.remote_sensing.region import region_box
from fmsuite.domains.remote_sensing.scenes import Unit
from fmsuite.errors import ReadFailure, UsageError
from fmsuite.tiling.grid import window_grid
from fmsuite.tiling.labels import SourceLabel, refuse_shared_groups

WINDOWS = "windows"
"""The stage of a source that can be read and has no window worth it."""
UNPLACED = "it has no place on Earth (no coordinate system or no geotransform), which data.{option} needs."
GEOREFERENCE = "Georeference it with `gdal_edit -a_srs -a_ullr`, or leave the option out."
_WHOLE = 1e-6
"""Fractions of a sample below this are rounding."""


@dataclass(frozen=True)
class Layout:
    """The windows of one raster.

    Attributes:
        corners: (N, 2) rows and columns, pixels.
        labels, groups, splits: one for each window, or one for all of them; ``None`` for what the raster itself has.
        left_out: windows that no block holds.
    """

    corners: np.ndarray
    labels: list[str | None] | None = None
    groups: list[str] | None = None
    splits: list[str | None] | None = None
    left_out: int = 0

    def only(self, rows: np.ndarray) -> Layout:
        """Some of the windows.

        Args:
            rows: (N,) bool.
        """

        def chosen(values: list[Any] | None) -> list[Any] | None:
            return None if values is None else [value for value, keep in zip(values, rows, strict=True) if keep]

        return Layout(self.corners[rows], chosen(self.labels), chosen(self.groups), chosen(self.splits), self.left_out)


def cut_of(unit: Unit, options: RemoteSensingOptions) -> Cut:
    """How windows are cut from a raster, or from the part of it that is in ``options.region``.

    Raises:
        ReadFailure: if no window fits into the region.
    """
    step = (1.0, 1.0)
    if options.gsd is not None and unit.metres is not None:
        step = (options.gsd / unit.metres[0], options.gsd / unit.metres[1])
    closest = 1 if options.places is not None and options.place_windows == "centre" else options.size
    stride = options.stride or closest
    extent = (options.size * step[0], options.size * step[1])
    top, left, bottom, right = region_box(unit.grid, options, unit.source)
    # All windows of a raster lie on one grid of samples, which begins with it, as its scene's and its packed copy's do.
    begin = np.ceil(np.array([top, left]) / step - _WHOLE) * step
    lengths = np.floor(np.array([bottom, right]) / step + _WHOLE) * step - begin
    if options.region is not None and (lengths < np.asarray(extent) - _WHOLE * np.asarray(step)).any():
        raise ReadFailure(
            unit.source,
            WINDOWS,
            f"{lengths[0]:.0f}x{lengths[1]:.0f} of its pixels are in data.region, less than a window of "
            f"{extent[0]:.0f}x{extent[1]:.0f}.",
            "Make the region larger, or data.size or data.gsd smaller.",
        )
    rows, columns = (float(length) for length in np.maximum(lengths, step))
    origin = (float(begin[0]), float(begin[1]))
    return Cut((rows, columns), extent, (stride * step[0], stride * step[1]), step, options.gsd is None, origin)


def plan_layouts(
    units: Sequence[Unit], known: Mapping[str, SourceLabel], options: RemoteSensingOptions, skipped: SkippedLog
) -> dict[str, dict[str, Any]]:
    """What ``lay_out`` has to know of each source beside its own pixels; one that can have no window is left out.

    Args:
        known: by source, what labels files say.

    Returns:
        JSON values.

    Raises:
        UsageError: for blocks beside other groups; for blocks that hold no window; if a block is on several sides of
            the split; as ``placing.lay_places``.
    """
    if options.places is None and options.block is None:
        return {unit.source: {} for unit in units}
    option = "block" if options.places is None else "places"
    placed: dict[str, Frame] = {}
    cuts: dict[str, Cut] = {}
    for unit in units:
        try:
            if unit.metres is None:
                raise ReadFailure(unit.source, "metadata", UNPLACED.format(option=option), GEOREFERENCE)
            cuts[unit.source] = cut_of(unit, options)
            placed[unit.source] = Frame(*unit.grid)
        except ReadFailure as failure:
            skipped.add_failure(failure)
    if not placed:
        return {}
    plans: dict[str, dict[str, Any]] = {source: {"frame": asdict(frame)} for source, frame in placed.items()}
    if options.places is not None:
        laid, facts = lay_places(placed, cuts, options, skipped)
        for source in placed:
            if source not in laid:
                skipped.add(source, PLACES, f"none of the places of {options.places} has a window in it.")
        plans = {source: {**plans[source], "laid": _plain(found), "places": facts} for source, found in laid.items()}
    if options.block is not None:
        _refuse_groups(known, plans)
        grid = BlockGrid.of(placed, options, any(map(_is_inflated, placed.values())))
        for unit in units:
            if unit.source in plans and unit.metres is not None:
                extent = cuts[unit.source].extent
                refuse_narrow_blocks((extent[0] * unit.metres[0], extent[1] * unit.metres[1]), options)
                plans[unit.source]["blocks"] = asdict(grid)
        _refuse_parted_blocks(plans, cuts, known)
    return plans


def lay_out(cut: Cut, plan: Mapping[str, Any]) -> Layout:
    """The windows of one raster.

    Args:
        plan: as ``plan_layouts`` made it.
    """
    laid = plan.get("laid")
    if laid is None:
        layout = Layout(window_grid(cut.shape, cut.extent, cut.stride, origin=cut.origin, edges="shift"))
    else:
        corners = np.array(laid["corners"], dtype=np.float64).reshape(-1, 2)
        layout = Layout(corners, list(laid["labels"]), list(laid["groups"]), list(laid["splits"]))
    if "blocks" not in plan:
        return layout
    frame = Frame(**{**plan["frame"], "transform": tuple(plan["frame"]["transform"])})
    blocks = BlockGrid(**plan["blocks"]).groups(frame, layout.corners, cut.extent)
    inside = np.array([block is not None for block in blocks], dtype=bool)
    kept = layout.only(inside)
    named = [block for block in blocks if block is not None]
    return Layout(kept.corners, kept.labels, named, kept.splits, int((~inside).sum()))


def layout_metadata(facts: Iterable[Mapping[str, Any]], options: RemoteSensingOptions) -> dict[str, Any]:
    """For an index's metadata.

    Args:
        facts: of each raster, with ``left_out`` and ``places`` of its layout.
    """
    found = list(facts)
    metadata: dict[str, Any] = {}
    notes = []
    if options.places is not None and found:
        places = metadata["places"] = found[0]["places"]
        notes.append(f"Windows come from {places['used']} of the {places['places']} places of {options.places.name}.")
        if places["meeting"] and options.block is None:
            notes.append(
                f"{places['meeting']} pairs of neighbours in different groups share pixels; with a column of groups "
                "they stay on one side of a split."
            )
    if options.block is not None:
        left_out = sum(fact.get("left_out", 0) for fact in found)
        metadata["blocks"] = {"metres": options.block, "margin": options.block_margin, "left_out": left_out}
        near = f" or within {options.block_margin:g} m of one" if options.block_margin else ""
        notes.append(
            f"Groups are squares of {options.block:g} m of the ground; left out: {left_out} windows across a "
            f"border{near}."
        )
    return {**metadata, "notes": notes} if notes else metadata


def _plain(laid: Laid) -> dict[str, Any]:
    return {**asdict(laid), "corners": laid.corners.tolist()}


def _is_inflated(frame: Frame) -> bool:
    """Whether its metres are none on the ground, as those of Web Mercator away from the equator."""
    import pyproj

    ((x, y),) = frame.coordinates(np.array([[frame.height / 2, frame.width / 2]]))
    system = pyproj.CRS.from_user_input(frame.crs)
    return bool(system.is_projected) and area_inflation(system, x, y) != 1


def _refuse_groups(known: Mapping[str, SourceLabel], plans: Mapping[str, Mapping[str, Any]]) -> None:
    """
    Raises:
        UsageError: if something else says what stays together.
    """
    given = next((label.group for label in known.values() if label.group is not None), None)
    if given is not None:
        raise UsageError(
            f"data.block makes groups of the ground, and the labels file gives groups too, such as '{given}'.",
            "Use one of them: leave data.block out, or take the groups out of the labels file.",
        )
    facts = next(iter(plans.values()), {}).get("places", {})
    if facts.get("grouped"):
        raise UsageError(
            f"data.block makes groups of the ground, and {facts['file']} gives groups too: each polygon is one, or a "
            "column names them.",
            "Use one of them: blocks go with points that have no group.",
        )


def _refuse_parted_blocks(
    plans: Mapping[str, Mapping[str, Any]], cuts: Mapping[str, Cut], known: Mapping[str, SourceLabel]
) -> None:
    """
    Raises:
        UsageError: if a block has windows on several sides of the split.
    """
    pairs: set[tuple[str | None, str | None]] = set()
    for source, plan in plans.items():
        if plan.get("laid") is None and known[source].split is None:
            continue
        layout = lay_out(cuts[source], plan)
        sides = layout.splits or [known[source].split] * len(layout.corners)
        pairs |= {*zip(layout.groups or [], sides, strict=True)}
    refuse_shared_groups(pairs, "data.block: blocks of the ground")
