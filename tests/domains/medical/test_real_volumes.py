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
from fmsuite.domains.medical.volumes import load_volume

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
