"""X-rays from files to windows and views: their size, spacing, patients and what may vary."""

from __future__ import annotations

import csv
import pickle
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.uid import ExplicitVRLittleEndian

from fmsuite.commands.indexing import build_index
from fmsuite.core.data.index import Window
from fmsuite.core.data.sample import ArraySample
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.domains.medical import MedicalDomain, MedicalOptions
from fmsuite.domains.medical.augment import XrayAugmentation
from fmsuite.errors import ReadFailure, UsageError

PIXELS = np.random.default_rng(0).integers(0, 250, (60, 40)).astype(np.uint8)


def write_dicom(path: Path, pixels: np.ndarray, patient: str, **tags: object) -> Path:
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = f"1.2.{len(path.name)}"
    data.Modality, data.PatientID, data.PhotometricInterpretation = "CR", patient, "MONOCHROME2"
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PixelRepresentation = 1, 0
    data.BitsAllocated, data.BitsStored, data.HighBit = 8, 8, 7
    data.PixelData = pixels.tobytes()
    for key, value in tags.items():
        setattr(data, key, value)
    data.save_as(path, enforce_file_format=True)
    return path


def domain(**options: object) -> MedicalDomain:
    return MedicalDomain(MedicalOptions(modality="xray", **options))


def test_an_image_is_reduced_as_pillow_reduces_it_and_keeps_its_aspect(tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    mine = domain(image_size=20)
    index = build_index(mine, [tmp_path], SkippedLog())
    window = index[0]
    assert (window.position, window.extent, window.spacing) == ((0.0, 0.0), (60.0, 40.0), ())
    reader = pickle.loads(pickle.dumps(mine.reader(index)))
    sample = reader.read(window)
    values = (PIXELS - PIXELS.min()) / np.ptp(PIXELS)
    expected = np.asarray(Image.fromarray(values.astype(np.float32)).resize((20, 30), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(sample.values[0], expected, atol=1e-5)
    spec = mine.input_spec(index)
    assert (spec.axes, spec.size, spec.channel_names) == (("y", "x"), (20, 20), ("xray",))
    assert (spec.clip, spec.spacing, spec.orientation) == ((0.0, 1.0), None, None)
    larger = domain(image_size=64).reader(build_index(domain(image_size=64), [tmp_path], SkippedLog()))
    np.testing.assert_allclose(larger.read(window).values[0], values, atol=1e-6)


def test_windows_are_boxes_of_own_pixels(tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    mine = domain(image_size=64, framing="centre")
    index = build_index(mine, [tmp_path], SkippedLog())
    assert (index[0].position, index[0].extent) == ((10.0, 0.0), (40.0, 40.0))
    reader = mine.reader(index)
    values = (PIXELS - PIXELS.min()) / np.ptp(PIXELS)
    np.testing.assert_allclose(reader.read(index[0]).values[0], values[10:50], atol=1e-6)
    elsewhere = Window(index[0].source, "g", (3.0, 5.0), (20.0, 16.0))
    np.testing.assert_allclose(reader.read(elsewhere).values[0], values[3:23, 5:21], atol=1e-6)
    with pytest.raises(ReadFailure, match="outside the image"):
        reader.read(Window(index[0].source, "g", (50.0, 0.0), (20.0, 16.0)))


def test_spacing_follows_the_pixels_which_are_made_square(tmp_path: Path) -> None:
    write_dicom(tmp_path / "a.dcm", PIXELS, "p", ImagerPixelSpacing=[0.1, 0.3])
    mine = domain(image_size=30)
    index = build_index(mine, [tmp_path], SkippedLog())
    assert index[0].spacing == (0.1, 0.3)
    sample = mine.reader(index).read(index[0])
    # 60 x 0.1 mm high, 40 x 0.3 mm wide: 30 to 60 square pixels.
    assert sample.size == (30, 60)
    np.testing.assert_allclose(sample.spacing, (0.2, 0.2))


def test_a_dicom_files_patient_is_its_group_unless_a_table_says_otherwise(tmp_path: Path) -> None:
    for name, patient in (("a", "p1"), ("bb", "p1"), ("ccc", ""), ("dddd", "p2")):
        write_dicom(tmp_path / f"{name}.dcm", PIXELS, patient)
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "patient", "split"), ("dddd.dcm", "q", "test"), ("a.dcm", "", "train")])
    index = build_index(domain(), [tmp_path], SkippedLog())
    groups = {Path(index[row].source).stem: index[row].group for row in range(len(index))}
    assert groups == {"a": "p1", "bb": "p1", "ccc": "ccc", "dddd": "q"}
    with (tmp_path / "labels.csv").open("a", newline="") as file:
        csv.writer(file).writerow(("bb.dcm", "", "test"))
    with pytest.raises(UsageError, match="'p1' \\(test and train\\)"):
        build_index(domain(), [tmp_path], SkippedLog())


def test_what_cannot_be_used_is_skipped_and_the_rest_goes_on(tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "good.png")
    Image.fromarray(np.full((9, 9), 7, np.uint8)).save(tmp_path / "flat.png")
    (tmp_path / "empty.dcm").write_bytes(b"")
    write_dicom(tmp_path / "IM0001", PIXELS, "p")
    skipped = SkippedLog()
    index = build_index(domain(), [tmp_path], skipped)
    assert [Path(source).name for source in index.sources] == ["IM0001", "good.png"]
    assert {Path(entry.path).name for entry in skipped.entries} == {"flat.png", "empty.dcm"}


def test_pictures_for_people(tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    mine = domain(image_size=20)
    index = build_index(mine, [tmp_path], SkippedLog())
    sample, spec = mine.reader(index).read(index[0]), mine.input_spec(index)
    assert isinstance(sample, ArraySample)
    np.testing.assert_allclose(mine.to_rgb(sample.values, spec)[..., 0], sample.values[0] * 255, atol=0.51)
    seen = mine.overview(index, index[0].source)
    assert (seen.rgb.shape, seen.origin, seen.pitch) == ((60, 40, 3), (0.0, 0.0), (1.0, 1.0))
    (sheet,) = mine.preview(index, tmp_path / "preview")
    assert Image.open(sheet).width > 60
    with pytest.raises(UsageError, match="no dense predictions over X-rays"):
        mine.scene(index, index[0].source)


def test_sides_are_kept_however_strongly_an_image_varies(tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    mine = domain(image_size=40)
    spec = mine.input_spec(build_index(mine, [tmp_path], SkippedLog()))
    values = np.zeros((1, 32, 32), np.float32)
    values[:, 4:28, 3:14] = 1.0
    given = ArraySample(values)
    augmentation = pickle.loads(pickle.dumps(mine.augmentation(spec)))
    assert isinstance(augmentation, XrayAugmentation)
    random = np.random.default_rng(0)
    assert augmentation.after_crop(given, "weak", False, random) is given
    moved = 0
    for _ in range(30):
        view = augmentation.after_crop(given, "strong", False, random)
        assert view.values.shape == values.shape
        assert view.adjust is not None
        assert view.adjust.blur is not None
        assert view.adjust.blur.shape == (2,)
        moved += not np.array_equal(view.values, values)
        assert view.values[..., :16].mean() > 4 * view.values[..., 16:].mean()
    assert 8 < moved < 25
    both = XrayAugmentation(spec, flip_left_right=True)
    draws = [both.after_crop(given, "weak", False, random).values for _ in range(30)]
    mirrored = sum(np.array_equal(draw, values[..., ::-1]) for draw in draws)
    assert mirrored + sum(np.array_equal(draw, values) for draw in draws) == 30
    assert 5 < mirrored < 25
