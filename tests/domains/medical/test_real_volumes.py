"""Real volumes: hippocampus MR of the Medical Segmentation Decathlon, MNI templates, a CT angiogram."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
from nibabel.processing import resample_from_to

from fmsuite.commands.indexing import build_index
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.domains.medical import MedicalDomain, MedicalOptions
from fmsuite.domains.medical.formats import dicom, dicom_files
from fmsuite.domains.medical.scene import VolumeScene
from fmsuite.domains.medical.volumes import load_volume
from fmsuite.errors import ReadFailure

from .dicom_files import by_gdcm

pytestmark = pytest.mark.realdata


def test_hippocampus_images_are_indexed_and_their_label_maps_are_not(real_data: Path) -> None:
    folder = real_data / "medical" / "msd_hippocampus"
    names = sorted(path.name for path in (folder / "images").glob("*.nii.gz"))[:12]
    files = [folder / kind / name for name in names for kind in ("images", "labels")]
    skipped = SkippedLog()
    domain = MedicalDomain(MedicalOptions(size=48))
    index = build_index(domain, files, skipped)
    assert sorted(Path(source).name for source in index.sources) == names
    assert {Path(entry.path).parent.name for entry in skipped.entries} == {"labels"}
    assert len(skipped.entries) == len(names)
    reader = domain.reader(index)
    for row in range(len(index)):
        sample = reader.read(index[row])
        assert sample.values.shape == (1, 48, 48, 48)
        assert sample.valid is not None
        inside = nibabel.load(index[row].source).shape[::-1]
        assert sample.valid.sum() == np.prod(np.minimum(inside, 48))
        assert abs(sample.values[sample.valid].mean()) < 0.5


@pytest.mark.parametrize("name", ["avg152T1_LR_nifti.nii.gz", "nilearn_image_10426.nii.gz", "niivue_CT_AVM.nii.gz"])
def test_real_volumes_are_resampled_as_nibabel_does(real_data: Path, name: str) -> None:
    path = real_data / "medical" / "nifti_volumes" / name
    volume = load_volume(str(path), (3.5, 2.5, 2.5), 1, False)
    stored = nibabel.load(path)
    # nibabel rounds to the stored type, so it is given real numbers.
    image = nibabel.Nifti1Image(stored.get_fdata(dtype=np.float32), stored.affine)
    expected = resample_from_to(image, (volume.shape[::-1], volume.affine), order=1, mode="nearest").get_fdata()
    tolerance = 1e-4 * np.ptp(expected)
    np.testing.assert_allclose(volume.values[0], expected.transpose(2, 1, 0), atol=tolerance)


def test_the_l_and_r_drawn_into_a_template_are_on_their_sides(real_data: Path) -> None:
    """The file holds a letter on each side, brighter than anything else; the L has fewer bright voxels."""
    volume = load_volume(str(real_data / "medical" / "nifti_volumes" / "avg152T1_LR_nifti.nii.gz"), None, 1, False)
    letters = volume.values[0] > 0.95 * volume.values.max()
    x = np.arange(letters.shape[2]) * volume.affine[0, 0] + volume.affine[0, 3]
    left, right = letters[..., x < 0].sum(), letters[..., x > 0].sum()
    assert 0 < left < right


STUDY = {
    # From one slice's position to the next: SliceThickness says 5 mm, and the slices are 6.5 mm apart.
    "Study1/12-T1post-05670": ((512, 512, 22), (0.4297, 0.4297, 6.5)),
    "Study1/13_HCropVolume": ((35, 51, 32), (1, 1, 1)),
    "Study2/14_HCropVolume": ((36, 48, 35), (1, 1, 1)),
    "Study3/11_HCropVolume": ((34, 50, 40), (1, 1, 1)),
}


def test_a_real_study_is_what_gdcm_reads_series_by_series(real_data: Path) -> None:
    folder = real_data / "medical" / "mr_dicom_study"
    skipped = SkippedLog()
    domain = MedicalDomain(MedicalOptions(size=32, spacing=None))
    index = build_index(domain, [folder], skipped)
    assert not skipped.entries
    assert index.sources == [str(folder / name) for name in STUDY]
    assert index.groups == ["PGBM-002", "PGBM-006", "PGBM-003"]
    for name, (shape, spacing) in STUDY.items():
        stored = dicom.read(str(folder / name), None)
        assert stored.grid.shape == shape
        np.testing.assert_allclose(stored.grid.spacing, spacing, atol=1e-4)
        values, affine = by_gdcm(folder / name)
        np.testing.assert_array_equal(stored.values[..., 0], values)
        np.testing.assert_allclose(stored.grid.affine, affine, atol=1e-5)


def test_single_files_of_many_kinds(real_data: Path) -> None:
    """Voxels that are compressed, and every file that is no slice of a volume."""
    itk = pytest.importorskip("itk")
    folder = real_data / "medical" / "dicom_pydicom"
    for name in ("693_J2KI.dcm", "MR_small_RLE.dcm", "CT_small.dcm"):
        _, values = dicom_files.voxels_of(str(folder / name))
        expected = itk.array_from_image(itk.imread(str(folder / name), pixel_type=itk.F))
        np.testing.assert_array_equal(values, expected.reshape(values.shape))
    with pytest.raises(ReadFailure, match="cut short"):
        dicom_files.voxels_of(str(folder / "MR_truncated.dcm"))
    names = [path.name for path in folder.iterdir() if dicom.is_candidate(path.name)]
    stacks, notes = dicom.find_stacks(str(folder), names)
    assert not stacks
    assert sorted(Path(note.path).name for note in notes) == sorted(names)


@pytest.mark.parametrize("name", ["avg152T1_LR_nifti.nii.gz", "niivue_CT_AVM.nii.gz", "nilearn_image_10426.nii.gz"])
def test_writing_back_reproduces_the_input(real_data: Path, tmp_path: Path, name: str) -> None:
    """Through RAS and back: the same voxels on the same grid, header fields included."""
    path = real_data / "medical" / "nifti_volumes" / name
    volume = load_volume(str(path), None, 1, False)
    scene = VolumeScene(str(path), volume, (0, 0, 0), volume.shape, 0.0, {})
    image = nibabel.load(path)
    back = scene.scores_to_native(volume.values)[0]
    np.testing.assert_array_equal(back, image.get_fdata(dtype=np.float32).reshape(back.shape))
    written = nibabel.load(scene.write(back, tmp_path / "out"))
    assert written.shape == image.shape[:3]
    np.testing.assert_array_equal(written.affine, image.affine)
    for key in ("sform_code", "qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y"):
        np.testing.assert_array_equal(written.header[key], image.header[key])


def test_a_map_of_hands_has_its_poles_on_their_sides(real_data: Path) -> None:
    """Button presses of the left hand against those of the right: the cortex of the other side, the cerebellum of the
    same. The file's first axis grows to the left."""
    path = real_data / "medical" / "nifti_volumes" / "nilearn_image_10426.nii.gz"
    assert nibabel.aff2axcodes(nibabel.load(path).affine)[0] == "L"
    volume = load_volume(str(path), None, 1, False)
    z = np.arange(volume.shape[0]) * volume.affine[2, 2] + volume.affine[2, 3]

    def place(which: str, part: np.ndarray) -> np.ndarray:
        values = volume.values[0] * part[:, None, None]
        k, j, i = np.unravel_index(getattr(values, which)(), values.shape)
        return (volume.affine @ [i, j, k, 1])[:3]

    np.testing.assert_allclose(place("argmax", z > 39), (51, -16, 40), atol=1)
    np.testing.assert_allclose(place("argmin", z > 39), (-42, -22, 43), atol=1)
    np.testing.assert_allclose(place("argmax", z < 0), (-21, -55, -29), atol=1)


def test_tissue_of_the_template_is_where_anatomy_has_it(real_data: Path) -> None:
    """MNI millimetres: white matter of the splenium and the genu, fluid in both lateral ventricles, the cerebellum
    behind and below, and nothing in front of it."""
    path = real_data / "medical" / "nifti_volumes" / "nilearn_mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
    volume = load_volume(str(path), None, 1, False)

    def at(*world: float) -> float:
        x, y, z = np.rint(np.linalg.solve(volume.affine, [*world, 1])[:3]).astype(int)
        return float(volume.values[0, z, y, x])

    assert min(at(0, -38, 14), at(0, 26, 6)) > 200
    assert max(at(-4, 0, 20), at(4, 0, 20)) < 80
    assert at(0, -60, -20) > 100
    assert at(0, 60, -35) == 0


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SLP"])
def test_venous_sinuses_of_a_ct_angiogram_are_behind_low_and_on_top_in_the_middle(
    real_data: Path, tmp_path: Path, codes: str
) -> None:
    """Transverse sinuses run along the back of the skull's lower half, on both sides; the superior sagittal sinus is
    the highest vessel, in the midline. However the file's axes lie."""
    stored = nibabel.load(real_data / "medical" / "nifti_volumes" / "niivue_CT_AVM.nii.gz")
    turned = stored.as_reoriented(
        nibabel.orientations.ornt_transform(
            nibabel.io_orientation(stored.affine), nibabel.orientations.axcodes2ornt(tuple(codes))
        )
    )
    path = tmp_path / "turned.nii.gz"
    nibabel.save(turned, path)
    volume = load_volume(str(path), (2, 2, 2), 1, False)
    vessels = np.argwhere(volume.values[0] > 200)[:, ::-1]
    x, y, z = (vessels @ volume.affine[:3, :3].T + volume.affine[:3, 3]).T
    middle = (x.min() + x.max()) / 2
    behind = (y < -40) & (z > -30) & (z < 10)
    assert (behind & (x < middle)).sum() > 150
    assert (behind & (x > middle)).sum() > 150
    assert not ((y < -40) & (z < -60)).any()
    highest = z > z.max() - 10
    assert highest.sum() > 100
    assert abs(np.median(x[highest]) - middle) < 10
    assert x[highest].std() < x.std() / 2
