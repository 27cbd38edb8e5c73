"""Files of X-rays: DICOM as the formulas of the standard show it, pictures as they were saved; what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from fmsuite.domains.medical.xray_files import load_xray
from fmsuite.errors import ReadFailure

STORED = np.random.default_rng(0).integers(0, 4096, (9, 7)).astype(np.uint16)


@pytest.fixture
def film(tmp_path: Path) -> Callable[..., str]:
    """``film(**tags)`` writes ``STORED`` as a 12-bit digital radiograph with further or other elements."""

    def write(pixels: np.ndarray = STORED, name: str = "film.dcm", **tags: object) -> str:
        data = pydicom.Dataset()
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
        data.file_meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[name])
        data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID
        data.Modality, data.PatientID = "DX", "p 7"
        data.Rows, data.Columns = pixels.shape
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
        data.PixelData = pixels.tobytes()
        for key, value in tags.items():
            setattr(data, key, value)
        path = tmp_path / name
        data.save_as(path, enforce_file_format=True)
        return str(path)

    return write


def table(first: int, entries: np.ndarray, bits: int) -> pydicom.Sequence:
    item = pydicom.Dataset()
    item.add_new("LUTDescriptor", "US", [len(entries), first, bits])
    item.add_new("LUTData", "OW", entries.astype("<u2").tobytes())
    return pydicom.Sequence([item])


def test_stored_values_are_rescaled_as_itk_does(film) -> None:
    itk = pytest.importorskip("itk")
    path = film(RescaleSlope=2, RescaleIntercept=-100)
    image = load_xray(path)
    reader = itk.GDCMImageIO.New()
    expected = np.asarray(itk.array_from_image(itk.imread(path, itk.F, imageio=reader))).reshape(9, 7)
    np.testing.assert_array_equal(image.values, expected)
    np.testing.assert_array_equal(image.values, STORED * 2.0 - 100)
    assert image.patient == "p 7"
    assert image.spacing is None


def test_a_window_is_the_standards_formula(film) -> None:
    """PS3.3 C.11.2.1.2.1; the output range is that of 12 bits."""
    centre, width = 2000.0, 900.0
    x = STORED.astype(float)
    inside = ((x - (centre - 0.5)) / (width - 1) + 0.5) * 4095
    expected = np.where(
        x <= centre - 0.5 - (width - 1) / 2, 0, np.where(x > centre - 0.5 + (width - 1) / 2, 4095, inside)
    )
    given = {"WindowCenter": [centre, 10.0], "WindowWidth": [width, 20.0]}
    np.testing.assert_allclose(load_xray(film(**given)).values, expected, atol=1e-3)
    dark = load_xray(film(**given, PhotometricInterpretation="MONOCHROME1")).values
    np.testing.assert_allclose(dark, expected.max() + expected.min() - expected, atol=1e-3)
    sigmoid = load_xray(film(**given, VOILUTFunction="SIGMOID")).values
    np.testing.assert_allclose(sigmoid, 4095 / (1 + np.exp(-4 * (x - centre) / width)), atol=1e-3)
    np.testing.assert_array_equal(load_xray(film(WindowCenter=None, WindowWidth=None)).values, STORED)


@pytest.mark.parametrize("bits", [8, 12])
def test_lookup_tables_are_indexed_by_value_even_where_they_are_longer_than_wide(film, bits) -> None:
    entries = np.linspace(0, 2**bits - 1, 3000).round() ** 2 // 2**bits
    expected = entries[np.clip(STORED.astype(int) - 500, 0, 2999)]
    np.testing.assert_array_equal(load_xray(film(VOILUTSequence=table(500, entries, bits))).values, expected)
    shifted = film(VOILUTSequence=table(500, entries, bits), RescaleSlope=1, RescaleIntercept=0)
    np.testing.assert_array_equal(load_xray(shifted).values, expected)
    if bits == 12:
        modality = film(ModalityLUTSequence=table(500, entries, 16))
        np.testing.assert_array_equal(load_xray(modality).values, expected)


def test_bits_that_are_not_stored_are_no_part_of_a_value(film) -> None:
    """Overlays used to lie there."""
    dirty = STORED | np.uint16(0xA000)
    np.testing.assert_array_equal(load_xray(film(dirty)).values, STORED)
    with pytest.raises(ReadFailure, match="HighBit 15"):
        load_xray(film(HighBit=15))


def test_padding_is_measured_nowhere(film) -> None:
    pixels = STORED.copy()
    pixels[:3] = 4095
    image = load_xray(film(pixels, PixelPaddingValue=4090, PixelPaddingRangeLimit=4095))
    assert image.padding is not None
    assert image.padding[:3].all()
    np.testing.assert_array_equal(image.measured, pixels[~((pixels >= 4090) & (pixels <= 4095))])
    with pytest.raises(ReadFailure, match="padding"):
        load_xray(film(np.full((9, 7), 5, np.uint16), PixelPaddingValue=5))


def test_spacing_is_that_of_the_detector_where_it_is_known(film) -> None:
    assert load_xray(film(PixelSpacing=[0.2, 0.3])).spacing == (0.2, 0.3)
    assert load_xray(film(ImagerPixelSpacing=[0.15, 0.16], PixelSpacing=[0.1, 0.1])).spacing == (0.15, 0.16)
    with pytest.raises(ReadFailure, match=r"ImagerPixelSpacing is 0 x 0\.1 mm"):
        load_xray(film(ImagerPixelSpacing=[0, 0.1]))


@pytest.mark.parametrize(
    ("tags", "said"),
    [
        ({"Modality": "CT"}, "modality is 'CT', which is no X-ray"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "colour image"),
        ({"PixelData": (3 * STORED.tobytes()), "NumberOfFrames": 3}, "3 frames"),
        ({"PixelData": STORED.tobytes()[:-20]}, "damaged or cut short"),
        ({"WindowCenter": 10, "WindowWidth": 0}, "window or padding cannot be applied"),
        ({"PixelSpacing": [0.1]}, "a value of its header is not what it should be"),
        ({"Rows": 0}, "0 x 7 pixels"),
    ],
)
def test_dicom_files_that_are_refused_say_why(film, tags, said) -> None:
    with pytest.raises(ReadFailure, match=said):
        load_xray(film(**tags))


def save(path: Path, pixels: np.ndarray, **options: object) -> str:
    Image.fromarray(pixels).save(path, **options)
    return str(path)


def test_pictures_have_the_values_that_were_saved(tmp_path: Path) -> None:
    eight, sixteen = (STORED >> 4).astype(np.uint8), STORED * np.uint16(13)
    for name, pixels in (("8.png", eight), ("16.png", sixteen), ("8.tif", eight), ("16.tif", sixteen)):
        np.testing.assert_array_equal(load_xray(save(tmp_path / name, pixels)).values, pixels)
    grey = save(tmp_path / "grey.png", np.stack([eight, eight, eight], -1))
    np.testing.assert_array_equal(load_xray(grey).values, eight)
    rounded = save(tmp_path / "rounded.png", np.stack([eight, eight, eight ^ 1], -1))
    np.testing.assert_array_equal(load_xray(rounded).values, eight)
    smooth = np.tile(np.arange(0, 240, 5, dtype=np.uint8), (48, 1))
    jpeg = load_xray(save(tmp_path / "grey.jpg", smooth, quality=95)).values
    assert np.abs(jpeg.astype(int) - smooth).max() <= 4


def test_a_tiff_that_counts_from_white_is_turned(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    for name, pixels in (("16.tif", STORED), ("8.tif", (STORED >> 4).astype(np.uint8))):
        tifffile.imwrite(tmp_path / name, pixels, photometric="miniswhite")
        found = load_xray(str(tmp_path / name)).values.astype(int)
        np.testing.assert_array_equal(found - found.min(), int(pixels.max()) - pixels.astype(int))


def test_a_picture_lies_as_its_exif_says(tmp_path: Path) -> None:
    pixels = np.arange(8 * 48, dtype=np.uint8).reshape(16, 24)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(tmp_path / "turned.png", pixels, exif=exif)
    np.testing.assert_array_equal(load_xray(path).values, np.rot90(pixels, -1))


def test_pictures_that_are_refused_say_why(tmp_path: Path) -> None:
    eight = (STORED >> 4).astype(np.uint8)
    colour = np.stack([eight, eight, 255 - eight], -1)
    see_through = np.stack([eight, eight, eight, eight], -1)
    pages = [Image.fromarray(eight), Image.fromarray(eight)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    Image.fromarray(eight > 100).save(tmp_path / "bits.png")
    (tmp_path / "text.png").write_text("no picture")
    whole = Path(save(tmp_path / "whole.png", np.tile(eight, (9, 9))))
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    for name, said in {
        save(tmp_path / "colour.png", colour): "a colour image: red, green and blue differ by up to",
        save(tmp_path / "see_through.png", see_through): "transparent",
        str(tmp_path / "pages.tif"): "2 images in one file",
        str(tmp_path / "bits.png"): "of the kind '1'",
        str(tmp_path / "text.png"): "not a readable image",
        str(tmp_path / "cut.png"): "not a readable image",
        str(tmp_path / "gone.png"): "does not exist",
    }.items():
        with pytest.raises(ReadFailure, match=said):
            load_xray(name)


@pytest.mark.realdata
def test_odd_dicom_files_are_read_or_refused_for_what_they_are(real_data: Path, tmp_path: Path) -> None:
    folder = real_data / "medical" / "dicom_pydicom"
    for name, said in {
        # Its first bytes are missing as well.
        "no_meta.dcm": "not a DICOM file",
        "examples_ybr_color.dcm": "modality is 'US'",
        "rtdose.dcm": "modality is 'RTDOSE'",
        "liver_1frame.dcm": "modality is 'SEG'",
        "CT_small.dcm": "modality is 'CT'",
    }.items():
        with pytest.raises(ReadFailure, match=said):
            load_xray(str(folder / name))

    def as_radiograph(name: str) -> str:
        data = pydicom.dcmread(folder / name)
        data.Modality = "DX"
        for window in ("WindowCenter", "WindowWidth"):
            if window in data:
                del data[window]
        data.save_as(tmp_path / name)
        return str(tmp_path / name)

    for name, said in {
        "examples_ybr_color.dcm": "a colour image \\(YBR_FULL_422\\)",
        "examples_jpeg2k.dcm": "a colour image \\(YBR_RCT\\)",
        "rtdose.dcm": "15 frames",
        "MR_truncated.dcm": "damaged or cut short",
        "liver_1frame.dcm": "BitsStored 1",
    }.items():
        with pytest.raises(ReadFailure, match=said):
            load_xray(as_radiograph(name))
    # The same image, run-length encoded and not.
    plain, packed = (load_xray(as_radiograph(name)) for name in ("MR_small.dcm", "MR_small_RLE.dcm"))
    np.testing.assert_array_equal(plain.values, packed.values)
    itk = pytest.importorskip("itk")
    expected = itk.imread(str(folder / "693_J2KI.dcm"), itk.F, imageio=itk.GDCMImageIO.New())
    np.testing.assert_array_equal(
        load_xray(as_radiograph("693_J2KI.dcm")).values, np.asarray(itk.array_from_image(expected))[0]
    )
