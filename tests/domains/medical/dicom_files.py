"""DICOM series written on the spot, with pydicom, and read by another reader."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, EnhancedMRImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
RIGHT = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
"""Columns grow to the patient's left, rows to posterior: an axial slice."""


def dataset(path: Path, kind: str = MRImageStorage, series: str = "1.2.3.1", patient: str = "p1") -> FileDataset:
    """A data set without an image."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = kind
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = kind, meta.MediaStorageSOPInstanceUID
    data.SeriesInstanceUID, data.StudyInstanceUID, data.PatientID = series, "1.2.3", patient
    data.Modality = "CT" if kind == CTImageStorage else "MR"
    data.ImageType = ["ORIGINAL", "PRIMARY", "M"]
    return data


def put_pixels(data: Dataset, values: np.ndarray, bits: int = 16) -> None:
    """(rows, columns), or (frames, rows, columns), of a 16-bit type."""
    data.Rows, data.Columns = values.shape[-2:]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, bits, bits - 1
    data.PixelRepresentation = int(values.dtype.kind == "i")
    data.PixelData = values.tobytes()


def write_series(
    folder: Path,
    values: np.ndarray,
    *,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    orientation: Sequence[float] = RIGHT,
    origin: Sequence[float] = (0.0, 0.0, 0.0),
    step: Sequence[float] | None = None,
    name: Callable[[int], str] = "{:03d}.dcm".format,
    change: Callable[[FileDataset, int], Any] = lambda data, number: None,
    **identity: str,
) -> list[Path]:
    """One file a slice.

    Args:
        values: (slices, rows, columns) int16 or uint16.
        spacing: between slices, rows and columns.
        step: LPS millimetres from a slice to the next; along the normal if not given.
        name: of a slice's file.
        change: of its data set, before it is written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    normal = np.cross(orientation[:3], orientation[3:]) * spacing[0]
    paths = []
    for number, piece in enumerate(values):
        path = folder / name(number)
        data = dataset(path, **identity)
        # As nearly always: the numbers run against the positions, and the thickness is not the distance.
        data.InstanceNumber, data.SliceThickness = len(values) - number, spacing[0] / 2
        position = np.array(origin) + number * (normal if step is None else np.array(step))
        data.ImagePositionPatient = [f"{mm:.10g}"[:16] for mm in position]
        data.ImageOrientationPatient = [f"{cosine:.12f}"[:16] for cosine in orientation]
        data.PixelSpacing = [f"{mm:.10g}" for mm in spacing[1:]]
        put_pixels(data, np.ascontiguousarray(piece))
        change(data, number)
        if data.preamble is None:
            bare = Dataset()
            bare.update(data)
            bare.save_as(path, implicit_vr=True, little_endian=True)
        else:
            data.save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths


def write_enhanced(path: Path, values: np.ndarray, spacing: Sequence[float], order: Sequence[int]) -> None:
    """All slices as frames of one file, in an order of their own."""
    data = dataset(path, EnhancedMRImageStorage)
    put_pixels(data, np.ascontiguousarray(values[list(order)]))
    data.NumberOfFrames = len(values)
    shared, measures, direction, rescale = Dataset(), Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = list(spacing[1:]), 0.5
    direction.ImageOrientationPatient = list(RIGHT)
    rescale.RescaleSlope, rescale.RescaleIntercept, rescale.RescaleType = 2, -5, "US"
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [direction]
    shared.PixelValueTransformationSequence = [rescale]
    data.SharedFunctionalGroupsSequence = [shared]
    groups = []
    for number in order:
        group, plane = Dataset(), Dataset()
        plane.ImagePositionPatient = [0, 0, number * spacing[0]]
        group.PlanePositionSequence = [plane]
        groups.append(group)
    data.PerFrameFunctionalGroupsSequence = groups
    data.save_as(path, enforce_file_format=True)


def without_preamble(data: FileDataset, number: int) -> None:
    """As archives of the 1990s hold files: the data set alone, implicit VR."""
    data.preamble = None


def with_tag(**tags: Any) -> Callable[[FileDataset, int], None]:
    """A ``change`` of ``write_series``."""

    def change(data: FileDataset, number: int) -> None:
        for key, value in tags.items():
            setattr(data, key, value(number) if callable(value) else value)

    return change


def rewrite(path: Path, change: Callable[[FileDataset], Any]) -> None:
    data = pydicom.dcmread(path)
    change(data)
    data.save_as(path, enforce_file_format=True)


def by_gdcm(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """(columns, rows, slices) and the affine in RAS, as ITK's GDCM reads the one series of a folder."""
    itk = pytest.importorskip("itk")
    names = itk.GDCMSeriesFileNames.New(Directory=str(folder), UseSeriesDetails=False)
    (uid,) = names.GetSeriesUIDs()
    reader = itk.ImageSeriesReader[itk.Image[itk.F, 3]].New(
        FileNames=names.GetFileNames(uid), ImageIO=itk.GDCMImageIO.New(), ForceOrthogonalDirection=False
    )
    reader.Update()
    image = reader.GetOutput()
    affine = np.eye(4)
    affine[:3, :3] = itk.array_from_matrix(image.GetDirection()) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return itk.array_from_image(image).transpose(2, 1, 0), LPS @ affine
