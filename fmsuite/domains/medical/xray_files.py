"""Files of single X-rays as arrays: DICOM as its own instructions show it, PNG, JPEG and TIFF as they are stored."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from fmsuite.domains.medical.formats.base import SPACING_LIMITS, first_line, require
from fmsuite.domains.medical.formats.dicom import is_candidate
from fmsuite.domains.medical.formats.dicom_files import check_syntax, parsed
from fmsuite.errors import ReadFailure

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
"""Of pictures; files that may be DICOM are found as those of series are."""
MODALITIES = {"CR", "DX", "RG", "MG", "IO", "PX"}
"""DICOM's projections: computed and digital radiography, film, mammography, intra-oral and panoramic X-rays."""
MAX_PIXELS = 200_000_000
GREY_TOLERANCE = 2
"""Of 255, between the channels of a picture that is grey but for the rounding of a colour transform."""
_SPACING_TAGS = ("ImagerPixelSpacing", "PixelSpacing", "NominalScannedPixelSpacing")
"""The first that is there counts: at the detector, which nearly every projection knows, rather than in the patient."""
_WHITE_IS_ZERO, _PHOTOMETRIC_TAG = 0, 262


@dataclass
class XrayImage:
    """A single image.

    Attributes:
        values: (H, W) float32 or an integer type; brighter is what lets fewer rays through, as viewers show it.
        padding: (H, W) bool, what the file says is no part of the image; ``None`` if it says nothing.
        spacing: (y, x) millimetres between pixels at the detector, where the file says so.
        patient: the file's own name for the patient.
    """

    values: np.ndarray
    padding: np.ndarray | None = None
    spacing: tuple[float, float] | None = None
    patient: str | None = None

    @property
    def measured(self) -> np.ndarray:
        """(N,) values that are part of the image."""
        return self.values.reshape(-1) if self.padding is None else self.values[~self.padding]


def load_xray(path: str) -> XrayImage:
    """
    Raises:
        ReadFailure: for whatever is wrong with the file, or what it shows.
        UsageError: for a DICOM file, if pydicom is missing.
    """
    image = _load_dicom(path) if _is_dicom(path) else _load_picture(path)
    if image.padding is not None and image.padding.all():
        raise ReadFailure(path, "read", "every pixel is padding.", "Leave the file out.")
    return image


def _is_dicom(path: str) -> bool:
    if is_candidate(Path(path).name):
        return True
    try:
        with Path(path).open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except FileNotFoundError as error:
        raise ReadFailure(path, "open", "the file does not exist.", "Check the path.") from error
    except OSError as error:
        raise ReadFailure(path, "open", f"it cannot be read ({error}).", "Check the file.") from error


def _load_dicom(path: str) -> XrayImage:
    """Stored values, through the modality LUT or rescaling, then the first VOI LUT or window (PS3.3 C.11.1 and C.11.2),
    dark for light where MONOCHROME1 says so."""
    pydicom = require("pydicom")
    processing = require("pydicom.pixels")
    try:
        data = parsed(path)
    except pydicom.errors.InvalidDicomError as error:
        raise ReadFailure(path, "open", "not a DICOM file.", "Fetch it again, or leave it out.") from error
    # Values are converted when they are asked for; one of the wrong kind or number shows only then.
    try:
        _check_dicom(path, data)
        spacing = _dicom_spacing(path, data)
    except (TypeError, ValueError, AttributeError) as error:
        raise ReadFailure(
            path, "metadata", f"a value of its header is not what it should be ({first_line(error)}).", "Correct it."
        ) from error
    check_syntax(path, data)
    try:
        stored = data.pixel_array
    # Each decoder has errors of its own, and damaged streams raise more kinds than they document.
    except Exception as error:
        raise ReadFailure(
            path,
            "read",
            f"the pixels cannot be read; the file is damaged or cut short ({first_line(error)}).",
            "Fetch the file again.",
        ) from error
    try:
        padding = _padding(data, stored)
        values = processing.apply_modality_lut(_for_table(stored, data.get("ModalityLUTSequence")), data)
        for name in ("WindowCenter", "WindowWidth"):
            if name in data and data[name].VM == 0:
                del data[name]
        values = processing.apply_voi_lut(_for_table(values, data.get("VOILUTSequence")), data)
    except Exception as error:
        raise ReadFailure(
            path,
            "metadata",
            f"its lookup table, window or padding cannot be applied ({first_line(error)}).",
            "Correct or remove VOILUTSequence, WindowCenter, WindowWidth and PixelPaddingValue.",
        ) from error
    values = np.asarray(values, dtype=np.float32)
    if not np.isfinite(values).all():
        raise ReadFailure(path, "metadata", "its rescaling gives values that are no numbers.", "Correct the header.")
    if data.PhotometricInterpretation == "MONOCHROME1":
        values = values.max() + values.min() - values
    patient = str(data.get("PatientID") or "").strip() or None
    return XrayImage(values, padding, spacing, patient)


def _for_table(values: np.ndarray, tables: Any) -> np.ndarray:
    """Values as whole numbers within a lookup table, as pydicom needs them: it looks them up in numbers of the
    table's own width, so that those beyond the 256th of an 8-bit table's entries would begin again at its start."""
    if not tables:
        return values
    descriptor = tables[0].LUTDescriptor
    entries, first = int(descriptor[0]) or 1 << 16, int(descriptor[1])
    if descriptor[2] == 8 and entries > 256:
        descriptor[2] = 16
    return np.clip(np.rint(values), first, first + entries - 1).astype(np.int32)


def _check_dicom(path: str, data: Any) -> None:
    """Refuse what is no single projection in grey, before any pixel is decoded."""

    def refuse(reason: str, hint: str) -> None:
        raise ReadFailure(path, "metadata", reason, hint)

    modality = str(data.get("Modality") or "")
    if modality not in MODALITIES:
        known = ", ".join(sorted(MODALITIES))
        refuse(
            f"its modality is '{modality}', which is no X-ray projection ({known}).",
            "Leave it out, or use data.modality=ct or mr.",
        )
    if "PixelData" not in data:
        refuse("it holds no pixels.", "Leave the file out.")
    colours = str(data.get("PhotometricInterpretation") or "")
    if colours not in ("MONOCHROME1", "MONOCHROME2") or int(data.get("SamplesPerPixel") or 1) != 1:
        refuse(f"a colour image ({colours}).", "Leave it out, or convert it to MONOCHROME2.")
    frames = int(data.get("NumberOfFrames") or 1)
    if frames > 1:
        refuse(f"{frames} frames, where one image is expected.", "Write the frames to files of their own.")
    rows, columns = int(data.get("Rows") or 0), int(data.get("Columns") or 0)
    if rows < 1 or columns < 1 or rows * columns > MAX_PIXELS:
        refuse(f"{rows} x {columns} pixels.", "Check the header.")
    stored = int(data.get("BitsStored") or 0)
    if not 1 < stored <= int(data.get("BitsAllocated") or 0) or int(data.get("HighBit", stored - 1)) != stored - 1:
        refuse(
            f"BitsStored {stored}, HighBit {data.get('HighBit')} and BitsAllocated {data.get('BitsAllocated')}.",
            "Values are read from the lowest bits: write the file again so.",
        )


def _padding(data: Any, stored: np.ndarray) -> np.ndarray | None:
    """(H, W) whether a stored value is PixelPaddingValue, or one up to PixelPaddingRangeLimit (PS3.3 C.7.5.1.1.2)."""
    first = data.get("PixelPaddingValue")
    if first is None:
        return None
    last = data.get("PixelPaddingRangeLimit")
    low, high = sorted((int(first), int(first if last is None else last)))
    return (stored >= low) & (stored <= high)


def _dicom_spacing(path: str, data: Any) -> tuple[float, float] | None:
    for name in _SPACING_TAGS:
        given = data.get(name)
        if given:
            y, x = (float(length) for length in given)
            low, high = SPACING_LIMITS
            if not (low <= y <= high and low <= x <= high):
                raise ReadFailure(
                    path,
                    "metadata",
                    f"{name} is {y:g} x {x:g} mm (believable: {low} to {high}).",
                    "Correct the header.",
                )
            return y, x
    return None


def _load_picture(path: str) -> XrayImage:
    # Pillow's decoders raise whatever their formats can go wrong with; all of it means a file that is no use.
    try:
        with Image.open(path) as image:
            pixels = _checked_pixels(path, image)
    except ReadFailure:
        raise
    except Exception as error:
        raise ReadFailure(
            path, "open", f"not a readable image ({first_line(error)}).", "Check that the file is what its name says."
        ) from error
    return XrayImage(pixels)


def _checked_pixels(path: str, image: Image.Image) -> np.ndarray:
    """(H, W) uint8 or uint16 (or what holds it) of a picture that is one grey image."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ReadFailure(path, "metadata", f"{height} x {width} pixels.", "Reduce it first.")
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        raise ReadFailure(path, "metadata", f"{frames} images in one file.", "Write them to files of their own.")
    tiles = getattr(image, "tile", None)
    mode, raw = image.mode, str(tiles[0][3]) if tiles else ""
    inverted = mode.startswith("I") and getattr(image, "tag_v2", {}).get(_PHOTOMETRIC_TAG) == _WHITE_IS_ZERO
    if mode == "L" or mode.startswith("I"):
        pixels = np.asarray(ImageOps.exif_transpose(image))
        # Pillow turns 8-bit TIFFs that count from white, but not those of 16 bits.
        return pixels.max() - pixels if inverted else pixels
    if mode not in ("LA", "RGB", "RGBA", "P", "PA"):
        raise ReadFailure(
            path, "metadata", f"pixels of the kind '{mode}', not grey of 8 or 16 bits.", "Convert it to grey."
        )
    if "16" in raw:
        raise ReadFailure(path, "metadata", "a colour image of 16 bits.", "Save it as 16-bit grey.")
    colours = np.asarray(ImageOps.exif_transpose(image).convert("RGBA"))
    if (colours[..., 3] < 255).any():
        raise ReadFailure(path, "metadata", "it is transparent in places.", "Save it without transparency.")
    apart = int(np.ptp(colours[..., :3], axis=-1).max())
    if apart > GREY_TOLERANCE:
        raise ReadFailure(
            path,
            "metadata",
            f"a colour image: red, green and blue differ by up to {apart} of 255.",
            "Leave it out, or convert it to grey if its colours are only a tint or a mark.",
        )
    return colours[..., 1].copy()
