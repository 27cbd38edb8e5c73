"""One DICOM file: what its header says of the slices in it, and their voxels."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fmsuite.domains.medical.formats.base import first_line, require
from fmsuite.domains.medical.formats.stacks import Slice
from fmsuite.errors import ReadFailure

SUFFIXES = (".dcm", ".dicom", ".ima")
_TAGS = (
    "SOPClassUID",
    "SOPInstanceUID",
    "SeriesInstanceUID",
    "PatientID",
    "Modality",
    "ImageType",
    "Rows",
    "Columns",
    "SamplesPerPixel",
    "NumberOfFrames",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "EchoTime",
    "EchoNumbers",
    "TemporalPositionIdentifier",
    "TriggerTime",
    "DiffusionBValue",
    "InversionTime",
    "AcquisitionNumber",
    "AcquisitionTime",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
)
_PHASES = (
    "EchoTime",
    "EchoNumbers",
    "TemporalPositionIdentifier",
    "DiffusionBValue",
    "InversionTime",
    "TriggerTime",
    "AcquisitionNumber",
    "AcquisitionTime",
    "ImageType",
)
"""By what slices of one place are told apart, the surest first."""


@contextmanager
def quiet() -> Iterator[None]:
    """Without pydicom's warnings, one for each value that does not follow the standard: hundreds a series."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def header_of(path: str) -> Any:
    """The tags that place a slice; ``None`` for a file that is not DICOM.

    Raises:
        ReadFailure: if it claims to be and cannot be parsed, or is no image.
    """
    pydicom = require("pydicom")
    try:
        header = parsed(path, stop_before_pixels=True, specific_tags=list(_TAGS))
    except pydicom.errors.InvalidDicomError as error:
        if Path(path).suffix.lower() in SUFFIXES:
            raise ReadFailure(path, "open", "not a DICOM file.", "Fetch it again, or leave it out.") from error
        return None
    kind = header.get("SOPClassUID")
    name = str(getattr(kind, "name", "") or "")
    if kind is not None and "Image Storage" not in name:
        raise ReadFailure(path, "metadata", f"not an image but: {name}.", "It is left out.")
    if header.get("Rows") is None or header.get("Columns") is None:
        raise ReadFailure(path, "metadata", "it holds no image.", "It is left out.")
    return header


def parsed(path: str, **options: Any) -> Any:
    """
    Raises:
        InvalidDicomError: if it is not DICOM.
        ReadFailure: if it is damaged.
    """
    pydicom = require("pydicom")
    try:
        try:
            return pydicom.dcmread(path, **options)
        except pydicom.errors.InvalidDicomError:
            # Files of old archives have neither the preamble nor the group that says how they are encoded.
            found = pydicom.dcmread(path, force=True, **options)
            if "SOPClassUID" not in found or "SOPInstanceUID" not in found:
                raise
            return found
    except pydicom.errors.InvalidDicomError:
        raise
    except FileNotFoundError as error:
        raise ReadFailure(path, "open", "the file does not exist.", "Check the path.") from error
    # A damaged file leads pydicom anywhere: struct, key, attribute, unicode and recursion errors have all been met.
    except Exception as error:
        raise ReadFailure(
            path, "open", f"the header cannot be read ({first_line(error)}).", "Fetch the file again."
        ) from error


def slices_of(path: str, name: str, header: Any) -> list[Slice]:
    """
    Raises:
        ReadFailure: if it does not say where it lies.
    """
    shape = (int(header.Rows), int(header.Columns))
    if int(header.get("SamplesPerPixel", 1) or 1) != 1:
        raise ReadFailure(path, "metadata", "a colour image.", "It is left out.")
    if "MOSAIC" in [str(part).upper() for part in many(header.get("ImageType"))]:
        raise ReadFailure(path, "metadata", "a mosaic of slices in one image.", "Convert it to NIfTI with dcm2niix.")
    try:
        frames = int(header.get("NumberOfFrames", 1) or 1)
        groups = header.get("PerFrameFunctionalGroupsSequence")
        if groups is None:
            if frames > 1:
                raise ReadFailure(
                    path, "metadata", f"{frames} frames that do not say where each lies.", "Convert it to NIfTI."
                )
            return [Slice(name, None, *_placed(header, header, header), shape, _phase(header))]
        shared = (many(header.get("SharedFunctionalGroupsSequence")) or [{}])[0]
        pieces = []
        for number, group in enumerate(groups):
            position, orientation, measures = (
                functional(group, shared, key)
                for key in ("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence")
            )
            phase = _phase(
                functional(group, shared, "MREchoSequence"), functional(group, shared, "FrameContentSequence")
            )
            pieces.append(Slice(name, number, *_placed(position, orientation, measures), shape, phase))
        return pieces
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise ReadFailure(
            path,
            "metadata",
            f"its place cannot be read ({first_line(error)}).",
            "Correct the header; single images are read as data.modality=xray.",
        ) from error


def _placed(
    position: Any, orientation: Any, measures: Any
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
    """
    Raises:
        ValueError: naming the tag that is missing.
    """
    found = []
    for item, key, length in (
        (position, "ImagePositionPatient", 3),
        (orientation, "ImageOrientationPatient", 6),
        (measures, "PixelSpacing", 2),
    ):
        values = many(item.get(key))
        if len(values) != length:
            raise ValueError(f"no {key}")
        found.append(tuple(float(value) for value in values))
    return found[0], found[1], found[2]


def functional(group: Any, shared: Any, key: str) -> Any:
    return (many(group.get(key)) or many(shared.get(key)) or [{}])[0]


def _phase(*items: Any) -> dict[str, Any]:
    names = (*_PHASES, "EffectiveEchoTime", "TemporalPositionIndex")
    found = {name: item.get(name) for item in items for name in names if item.get(name) is not None}
    return {name: str(value) for name, value in found.items()}


def many(value: Any) -> list[Any]:
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def voxels_of(path: str) -> tuple[list[Slice], np.ndarray]:
    """The slices of a file, and (frames, rows, columns) float32.

    Raises:
        ReadFailure: if they cannot be decoded.
    """
    pydicom = require("pydicom")
    try:
        data = parsed(path)
    except pydicom.errors.InvalidDicomError as error:
        raise ReadFailure(path, "read", "not a DICOM file any more.", "Tile again.") from error
    slices = slices_of(path, os.path.basename(path), data)
    check_syntax(path, data)
    try:
        stored = data.pixel_array
    # Each decoder has errors of its own, and damaged streams raise more kinds than they document.
    except Exception as error:
        raise ReadFailure(
            path,
            "read",
            f"the voxels cannot be read; the file is damaged or cut short ({first_line(error)}).",
            "Fetch the file again.",
        ) from error
    stored = stored.reshape(-1, *stored.shape[-2:])
    if stored.shape != (len(slices), *slices[0].shape):
        raise ReadFailure(
            path, "read", f"{len(stored)} frames of voxels, where its header places {len(slices)}.", "Fetch it again."
        )
    return slices, _rescaled(path, data, stored)


def check_syntax(path: str, data: Any) -> None:
    """
    Raises:
        ReadFailure: if nothing that is installed decodes its voxels.
    """
    pydicom = require("pydicom")
    syntax = data.file_meta.get("TransferSyntaxUID")
    if syntax is None:
        implicit, little = data.original_encoding
        explicit = pydicom.uid.ExplicitVRLittleEndian if little else pydicom.uid.ExplicitVRBigEndian
        data.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian if implicit else explicit
        return
    again = "Export it again in a standard one, such as Explicit VR Little Endian."
    if syntax.is_private or not syntax.is_transfer_syntax:
        raise ReadFailure(path, "read", f"voxels in a private or unknown transfer syntax, {syntax}.", again)
    if not syntax.is_compressed:
        return
    try:
        decoder = pydicom.pixels.get_decoder(syntax)
    except NotImplementedError as error:
        raise ReadFailure(path, "read", f"voxels in the transfer syntax {syntax.name}, unsupported.", again) from error
    if not decoder.is_available:
        missing = "; or ".join(text.rpartition("requires ")[2] for text in decoder.missing_dependencies)
        raise ReadFailure(
            path, "read", f"voxels in {syntax.name}, which nothing installed decodes.", f"Install {missing}."
        )


def _rescaled(path: str, data: Any, stored: np.ndarray) -> np.ndarray:
    """Stored integers to what they stand for, float32.

    In double precision: in the stored type, a slope or an intercept can leave its range and wrap around.

    Args:
        stored: (frames, rows, columns).

    Raises:
        ReadFailure: if a slope is 0 or not a number, or values do not fit single precision.
    """
    if data.get("ModalityLUTSequence") is not None:
        return require("pydicom.pixels").apply_modality_lut(stored, data).astype(np.float32)
    groups = many(data.get("PerFrameFunctionalGroupsSequence"))
    shared = (many(data.get("SharedFunctionalGroupsSequence")) or [{}])[0]
    values = stored.astype(np.float64)
    for number in range(len(values)):
        group = functional(groups[number], shared, "PixelValueTransformationSequence") if groups else data
        slope, intercept = (group.get(key) for key in ("RescaleSlope", "RescaleIntercept"))
        slope, intercept = float(1 if slope is None else slope), float(intercept or 0)
        if slope == 0 or not np.isfinite([slope, intercept]).all():
            raise ReadFailure(
                path,
                "read",
                f"a rescale slope of {slope:g} and an intercept of {intercept:g}.",
                "Correct RescaleSlope and RescaleIntercept.",
            )
        values[number] = values[number] * slope + intercept
    if np.abs(values).max(initial=0) > np.finfo(np.float32).max:
        raise ReadFailure(path, "read", "values overflow when rescaled.", "Correct RescaleSlope and RescaleIntercept.")
    return values.astype(np.float32)
