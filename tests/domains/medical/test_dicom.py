"""DICOM series: what is one volume, where it lies, what its voxels mean; against GDCM through ITK, and closed forms."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRBigEndian,
    HTJ2KLossless,
    RLELossless,
    SegmentationStorage,
    generate_uid,
)

from fmsuite.commands.indexing import build_index
from fmsuite.core.data.index import SampleIndex
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.domains.medical import MedicalDomain, MedicalOptions
from fmsuite.domains.medical.formats import dicom
from fmsuite.domains.medical.volumes import load_volume
from fmsuite.errors import ReadFailure, UsageError

from .dicom_files import (
    LPS,
    RIGHT,
    by_gdcm,
    dataset,
    put_pixels,
    rewrite,
    with_tag,
    without_preamble,
    write_enhanced,
    write_series,
)


def noise(*shape: int, low: int = 0, high: int = 3000, kind: type = np.int16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, shape).astype(kind)


def stacks_of(folder: Path) -> tuple[list[dicom.Stack], list[str]]:
    """And the reasons of what is left out."""
    names = [path.name for path in folder.iterdir() if dicom.is_candidate(path.name)]
    stacks, notes = dicom.find_stacks(str(folder), names)
    return stacks, [note.reason for note in notes]


def only(folder: Path) -> dicom.Stored:
    (stack,), notes = stacks_of(folder)
    assert not notes
    return dicom.read(stack.path, stack.pieces)


@given(
    degrees=st.tuples(*[st.floats(-180, 180)] * 3),
    spacing=st.tuples(*[st.floats(0.3, 8.0)] * 3),
    shape=st.tuples(*[st.integers(2, 6)] * 3),
    rescale=st.sampled_from([(1, 0), (1, -1024), (2.5, 100)]),
    signed=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=8, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
def test_a_series_is_what_gdcm_reads(tmp_path_factory, degrees, spacing, shape, rescale, signed, seed) -> None:
    """Voxel by voxel and in geometry: any orientation, names and numbers in any order."""
    folder = tmp_path_factory.mktemp("series")
    turn = nibabel.eulerangles.euler2mat(*np.deg2rad(degrees))
    order = np.random.default_rng(seed).permutation(shape[0])
    values = noise(*shape, low=-2000 if signed else 0, kind=np.int16 if signed else np.uint16, seed=seed)
    write_series(
        folder,
        values,
        spacing=spacing,
        orientation=(*turn[:, 0], *turn[:, 1]),
        origin=(-12.5, 30, 7),
        name=lambda number: f"IM{order[number]:03d}",
        change=with_tag(RescaleSlope=rescale[0], RescaleIntercept=rescale[1]),
    )
    stored = only(folder)
    expected, affine = by_gdcm(folder)
    np.testing.assert_array_equal(stored.values[..., 0], expected)
    np.testing.assert_allclose(stored.grid.affine, affine, atol=1e-5)
    np.testing.assert_array_equal(stored.values[..., 0], values.transpose(2, 1, 0) * float(rescale[0]) + rescale[1])
    np.testing.assert_allclose(stored.grid.spacing, spacing[::-1], rtol=1e-6)


def test_a_landmark_lies_where_its_position_says(tmp_path: Path) -> None:
    """In LPS millimetres (6, -9, 4): to the patient's left, anterior, superior."""
    values = np.zeros((8, 20, 20), dtype=np.int16)
    values[4, 3, 15] = 1000
    write_series(tmp_path / "s", values, spacing=(2.0, 1.0, 1.0), origin=(-9, -12, -4))
    volume = load_volume(str(tmp_path / "s"), None, 1, False)
    z, y, x = np.unravel_index(volume.values[0].argmax(), volume.shape)
    np.testing.assert_allclose(volume.affine @ [x, y, z, 1], [-6, 9, 4, 1])
    assert volume.spacing == (2.0, 1.0, 1.0)


def test_series_of_one_folder_are_sources_and_patients_their_groups(tmp_path: Path) -> None:
    """Files without a suffix, or with part of a UID for one; a series alone in its folder has the folder's name."""
    study = tmp_path / "study"
    write_series(study / "mixed", noise(8, 10, 10), name=lambda n: f"A{n}", series="1.1", patient="anna")
    write_series(
        study / "mixed", noise(8, 10, 10, seed=1), name=lambda n: f"1.2.840.{n + 5}", series="1.2", patient="anna"
    )
    write_series(study / "alone", noise(8, 10, 10, seed=2), series="1.3", patient="")
    for name in ("LICENSE", "notes"):
        (study / "mixed" / name).write_text("no image")
    skipped = SkippedLog()
    domain = MedicalDomain(MedicalOptions(size=8))
    index = build_index(domain, [study], skipped)
    assert index.sources == [str(study / "alone"), str(study / "mixed" / "1.2.840.10"), str(study / "mixed" / "A0")]
    groups = {source: index.where("source", source)[0].group for source in index.sources}
    assert list(groups.values()) == ["alone", "anna", "anna"]
    assert [(Path(e.path).name, e.reason) for e in skipped.entries] == [("mixed", "not DICOM: notes. It is left out.")]
    index.write(tmp_path / "i.parquet")
    reader = domain.reader(SampleIndex.read(tmp_path / "i.parquet"))
    window = index.where("source", str(study / "mixed" / "1.2.840.10"))[0]
    whole = reader.volume(window.source)
    expected = noise(8, 10, 10, seed=1)[:, ::-1, ::-1].astype(np.float64)
    assert np.corrcoef(whole.values.ravel(), expected.ravel())[0, 1] > 0.99
    scene = domain.scene(index, window.source)
    written = nibabel.load(scene.write(np.zeros(scene.native_size, np.uint8), tmp_path / "out"))
    np.testing.assert_allclose(written.affine, LPS, atol=1e-6)
    assert (int(written.header["sform_code"]), int(written.header["qform_code"])) == (1, 1)
    assert written.shape == (10, 10, 8)


def test_labels_name_folders_or_files_of_a_series(tmp_path: Path) -> None:
    study = tmp_path / "study"
    for name in ("a", "b"):
        write_series(study / "in" / name, noise(8, 10, 10), patient="same")
    table = study / "labels.csv"
    table.write_text("path,label,patient,split\nin/a,ill,p1,train\nin/b/003.dcm,well,,test\n")
    domain = MedicalDomain(MedicalOptions(size=8))
    index = build_index(domain, [study], SkippedLog())
    rows = {Path(index[row].source).name: index[row] for row in range(len(index))}
    assert [(rows[n].label, rows[n].group, rows[n].split) for n in "ab"] == [
        ("ill", "p1", "train"),
        ("well", "same", "test"),
    ]
    table.write_text("path,split\nin/a,train\nin/b,test\n")
    with pytest.raises(UsageError, match=r"'same' \(test and train\)"):
        build_index(domain, [study], SkippedLog())
    table.write_text("path,label\nin/b/003.dcm,well\nin/b/004.dcm,ill\n")
    with pytest.raises(UsageError, match="contradict"):
        build_index(domain, [study], SkippedLog())


@pytest.mark.parametrize(
    "tag", [{"EchoTime": lambda n: 10 + 20 * (n % 2)}, {"TemporalPositionIdentifier": lambda n: 1 + n % 2},
            {"ImageType": lambda n: ["ORIGINAL", "PRIMARY", "MP"[n % 2]]}]
)  # fmt: skip
def test_phases_of_one_place_are_told_apart(tmp_path: Path, tag) -> None:
    values = noise(12, 9, 9)
    write_series(
        tmp_path,
        values,
        change=lambda data, n: [
            with_tag(**tag)(data, n),
            setattr(data, "ImagePositionPatient", [0, 0, n // 2]),
            # Differs from file to file and tells nothing.
            setattr(data, "AcquisitionTime", f"1200{n:02d}"),
        ],
    )
    stacks, notes = stacks_of(tmp_path)
    assert not notes
    assert [Path(stack.path).name for stack in stacks] == ["000.dcm", "001.dcm"]
    for number, stack in enumerate(stacks):
        stored = dicom.read(stack.path, stack.pieces)
        np.testing.assert_array_equal(stored.values[..., 0], values[number::2].transpose(2, 1, 0))
        np.testing.assert_array_equal(dicom.read(stack.path, None).values, stored.values)


def test_an_enhanced_file_is_a_volume_of_its_frames(tmp_path: Path) -> None:
    values = noise(7, 5, 6)
    write_enhanced(tmp_path / "e.dcm", values, (3.0, 0.5, 0.8), order=(3, 1, 6, 0, 2, 5, 4))
    stored = only(tmp_path)
    np.testing.assert_array_equal(stored.values[..., 0], values.transpose(2, 1, 0) * 2.0 - 5)
    np.testing.assert_allclose(stored.grid.spacing, (0.8, 0.5, 3.0))
    np.testing.assert_allclose(stored.grid.affine[:3, 3], 0)


@pytest.mark.parametrize("lean", [(0.0, 0.4, 2.0), (-0.75, 0.3, 1.5), (0.0, -2.0, 4.0)])
def test_a_tilted_stack_is_straightened(tmp_path: Path, lean) -> None:
    """A linear function of world positions is interpolated exactly, wherever there is a slice."""
    shape, spacing = (6, 9, 8), (lean[2], 0.5, 1.5)
    k, j, i = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    world = np.stack([i * spacing[2] + k * lean[0], j * spacing[1] + k * lean[1], k * lean[2]], -1)
    values = (world @ [400, 1000, 300]).round().astype(np.int16)
    write_series(tmp_path / "s", values, spacing=spacing, step=lean)
    volume = load_volume(str(tmp_path / "s"), None, 1, False)
    assert volume.valid is not None
    z, y, x = np.meshgrid(*(np.arange(n) for n in volume.shape), indexing="ij")
    lps = (np.stack([x, y, z], -1) @ volume.affine[:3, :3].T + volume.affine[:3, 3]) * [-1, -1, 1]
    good = volume.valid[0]
    np.testing.assert_allclose(volume.values[0][good], (lps @ [400, 1000, 300])[good], atol=1.0)
    np.testing.assert_allclose(volume.affine[:3, :3], np.diag([1.5, 0.5, lean[2]]), atol=1e-9)
    # Every voxel between the outermost voxels of a slice, and no other.
    low, high = world.reshape(6, -1, 3).min(1), world.reshape(6, -1, 3).max(1)
    inside = ((lps >= low[:, None, None] - 1e-6) & (lps <= high[:, None, None] + 1e-6)).all(-1)
    np.testing.assert_array_equal(good, inside)


def test_rescaling_leaves_the_stored_types_range(tmp_path: Path) -> None:
    """And PET's slopes are each slice's own."""
    values = noise(4, 5, 5, low=-32768, high=32767)
    write_series(tmp_path, values, change=with_tag(RescaleSlope=lambda n: 3 + n, RescaleIntercept=-1024))
    expected = values.astype(np.float64) * np.arange(3, 7)[:, None, None] - 1024
    np.testing.assert_array_equal(only(tmp_path).values[..., 0], expected.transpose(2, 1, 0))


def test_bits_above_the_stored_ones_are_no_voxels(tmp_path: Path) -> None:
    """Old scanners keep overlays there."""
    values = noise(4, 5, 5, high=4096, kind=np.uint16)
    dirty = values | (np.uint16(1) << 14)
    write_series(tmp_path, dirty, change=with_tag(BitsStored=12, HighBit=11))
    np.testing.assert_array_equal(only(tmp_path).values[..., 0], values.transpose(2, 1, 0))


def big_endian(data, number: int) -> None:
    data.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    data.set_original_encoding(False, False)
    data.PixelData = np.frombuffer(data.PixelData, dtype="<i2").astype(">i2").tobytes()


@pytest.mark.parametrize("change", [without_preamble, lambda data, n: data.compress(RLELossless), big_endian])
def test_encodings(tmp_path: Path, change) -> None:
    values = noise(4, 6, 8)
    write_series(tmp_path, values, change=change)
    np.testing.assert_array_equal(only(tmp_path).values[..., 0], values.transpose(2, 1, 0))


def gap(folder: Path) -> None:
    (folder / "003.dcm").unlink()
    (folder / "004.dcm").unlink()


def each(change):
    return lambda folder: [rewrite(path, change) for path in sorted(folder.iterdir())]


def one(change):
    return lambda folder: rewrite(folder / "002.dcm", change)


def tags(**values):
    return lambda data: [setattr(data, key, value) for key, value in values.items()]


def smaller(data) -> None:
    put_pixels(data, noise(5, 5))


def private(data) -> None:
    data.file_meta.TransferSyntaxUID = pydicom.uid.UID("1.3.46.670589.33.1.4.1")


def uninstalled(data) -> None:
    data.file_meta.TransferSyntaxUID = HTJ2KLossless
    data.PixelData = pydicom.encaps.encapsulate([b"\0" * 64])


def cut(folder: Path) -> None:
    path = folder / "002.dcm"
    path.write_bytes(path.read_bytes()[:-40])


def garbled(folder: Path) -> None:
    path = folder / "002.dcm"
    raw = path.read_bytes()
    path.write_bytes(raw[:160] + bytes(reversed(raw[160:400])) + raw[400:])


FAULTS = {
    "missing slices": (gap, "2 of 8 slices missing, the widest gap between 002.dcm and 005.dcm: 3 mm where others"),
    "uneven": (one(tags(ImagePositionPatient=[0, 0, 2.3])), "0.7 to 1.3 mm apart"),
    "phases without a name": (one(tags(ImagePositionPatient=[0, 0, 1])), "lie where another one does"),
    "sizes": (one(smaller), "different sizes in one series: 7 of 10x10 voxels, 1 of 5x5 voxels"),
    "spacings": (one(tags(PixelSpacing=[2, 1])), "different spacings"),
    "orientations": (one(tags(ImageOrientationPatient=[0, 1, 0, 0, 0, 1])), "different orientations"),
    "skewed": (each(tags(ImageOrientationPatient=[1, 0, 0, 0.5, 0.9, 0])), "not at right angles"),
    "spacing of zero": (each(tags(PixelSpacing=[0, 1])), "pixels of 0 x 1 mm"),
    "negative spacing": (each(tags(PixelSpacing=[-1, 1])), "pixels of -1 x 1 mm"),
    "absurd spacing": (each(tags(PixelSpacing=[500, 1])), "voxels of 1 x 500 x 1 mm"),
    "no position": (each(lambda data: delattr(data, "ImagePositionPatient")), "no ImagePositionPatient"),
    "slope of zero": (each(tags(RescaleSlope=0)), "a rescale slope of 0"),
    "overflow": (each(tags(RescaleSlope="1e38")), "overflow when rescaled"),
    "private syntax": (each(private), "private or unknown transfer syntax"),
    "decoder that is not installed": (each(uninstalled), "Install pylibjpeg"),
    "truncated": (cut, "damaged or cut short"),
    "one place": (
        each(lambda data: tags(ImagePositionPatient=[0, 0, 0], EchoTime=data.InstanceNumber)(data)),
        "a single",
    ),
    "mosaic": (each(tags(ImageType=["ORIGINAL", "PRIMARY", "M", "MOSAIC"])), "a mosaic"),
    "colour": (each(tags(SamplesPerPixel=3)), "a colour image"),
    "frames without places": (each(tags(NumberOfFrames=2)), "2 frames that do not say where"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_series_is_skipped_with_reason_and_the_good_one_is_used(tmp_path: Path, fault: str) -> None:
    break_it, reason = FAULTS[fault]
    for name in ("bad", "good"):
        write_series(tmp_path / name, noise(8, 10, 10), spacing=(1, 1, 1), patient=name)
    break_it(tmp_path / "bad")
    skipped = SkippedLog()
    index = build_index(MedicalDomain(MedicalOptions(size=8)), [tmp_path], skipped)
    assert index.sources == [str(tmp_path / "good")]
    assert {Path(entry.path) for entry in skipped.entries} <= {tmp_path / "bad", *(tmp_path / "bad").iterdir()}
    said = [f"{entry.reason}" for entry in skipped.entries]
    assert said
    assert all(reason in text for text in said), said


def test_objects_that_are_no_slices_are_left_out_of_the_series(tmp_path: Path) -> None:
    """A segmentation, a localizer, a copy and a damaged file beside a good series."""
    values = noise(8, 10, 10)
    paths = write_series(tmp_path, values)
    seg = dataset(tmp_path / "seg.dcm", SegmentationStorage)
    seg.save_as(tmp_path / "seg.dcm", enforce_file_format=True)
    (tmp_path / "zcopy.dcm").write_bytes(paths[2].read_bytes())
    (tmp_path / "text.dcm").write_text("no image")
    write_series(
        tmp_path,
        noise(1, 20, 20),
        orientation=(0, 1, 0, 0, 0, -1),
        name=lambda n: "scout.dcm",
        change=with_tag(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]),
    )
    stacks, notes = stacks_of(tmp_path)
    assert len(stacks) == 1
    np.testing.assert_array_equal(
        dicom.read(stacks[0].path, stacks[0].pieces).values[..., 0], values.transpose(2, 1, 0)
    )
    told = " ".join(notes)
    for words in ("not an image but: Segmentation", "a copy of 002.dcm", "not a DICOM file", "1 localizer images"):
        assert words in told
    assert len(notes) == 4


def test_a_damaged_header_costs_its_slice_and_the_gap_is_found(tmp_path: Path) -> None:
    write_series(tmp_path, noise(8, 10, 10))
    garbled(tmp_path)
    stacks, notes = stacks_of(tmp_path)
    assert not stacks
    assert any("slices missing" in note or "slices of different" in note for note in notes)


def test_a_series_that_changes_after_indexing_fails_to_read(tmp_path: Path) -> None:
    write_series(tmp_path / "s", noise(8, 10, 10))
    domain = MedicalDomain(MedicalOptions(size=8))
    index = build_index(domain, [tmp_path / "s"], SkippedLog())
    rewrite(tmp_path / "s" / "002.dcm", tags(ImagePositionPatient=[0, 0, 7.9]))
    with pytest.raises(ReadFailure, match="changed places"):
        domain.reader(index).read(index[0])
    (tmp_path / "s" / "002.dcm").unlink()
    with pytest.raises(ReadFailure, match=r"002\.dcm: the file does not exist"):
        domain.reader(index).read(index[0])


def test_several_series_need_a_name_when_a_folder_is_read_without_an_index(tmp_path: Path) -> None:
    for series in ("1.1", "1.2"):
        write_series(tmp_path, noise(3, 4, 4), series=series, name=lambda n, s=series: f"{s}.{n}")
    with pytest.raises(ReadFailure, match="2 series"):
        dicom.read(str(tmp_path), None)
    assert dicom.read(str(tmp_path / "1.1.2"), None).values.shape == (4, 4, 3, 1)


def test_ct_series_are_hounsfield_units(tmp_path: Path) -> None:
    values = noise(8, 10, 10, high=3000, kind=np.uint16)
    write_series(tmp_path / "s", values, change=with_tag(RescaleSlope=1, RescaleIntercept=-1024), kind=CTImageStorage)
    domain = MedicalDomain(MedicalOptions(size=8, modality="ct"))
    index = build_index(domain, [tmp_path / "s"], SkippedLog())
    scene = domain.scene(index, index.sources[0])
    whole = scene.read((0, 0, 0), scene.size).values[0]
    np.testing.assert_array_equal(whole, values[:, ::-1, ::-1].astype(np.float32) - 1024)


def test_uids_are_not_paths(tmp_path: Path) -> None:
    """Two folders may hold series of one UID: copies of a study, or anonymised carelessly."""
    uid = generate_uid()
    for name in ("a", "b"):
        write_series(tmp_path / name, noise(4, 8, 8), series=uid, orientation=RIGHT)
    index = build_index(MedicalDomain(MedicalOptions(size=4)), [tmp_path], SkippedLog())
    assert index.sources == [str(tmp_path / "a"), str(tmp_path / "b")]
