"""Reading, orientation and resampling, against nibabel, scipy and closed forms."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
from nibabel.processing import resample_from_to
from scipy.ndimage import map_coordinates

from fmsuite.domains.medical.volumes import load_volume, resampling

ORIENTATIONS = ("RAS", "LPS", "LAS", "PIR", "SRA", "AIL", "ILP")
LANDMARK = np.array([6.0, -9.0, 5.0])


def ball(world: np.ndarray) -> np.ndarray:
    return np.exp(-((world - LANDMARK) ** 2).sum(-1) / (2 * 2.5**2))


def ramp(world: np.ndarray) -> np.ndarray:
    return world @ np.array([1.0, 10.0, 100.0])


def world_positions(volume) -> np.ndarray:
    z, y, x = np.meshgrid(*(np.arange(n) for n in volume.shape), indexing="ij")
    return np.stack([x, y, z], -1) @ volume.affine[:3, :3].T + volume.affine[:3, 3]


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("spacing", [None, (1.0, 1.0, 1.0), (2.0, 0.8, 1.3)])
def test_a_landmark_keeps_its_world_coordinate(save, gridded, orientation, spacing) -> None:
    values, affine = gridded(ball, orientation, (1.0, 0.9, 1.5))
    volume = load_volume(str(save("a.nii.gz", values, affine)), spacing, 1, False)
    weight = volume.values[0].astype(np.float64)
    centroid = (world_positions(volume) * weight[..., None]).sum((0, 1, 2)) / weight.sum()
    np.testing.assert_allclose(centroid, LANDMARK, atol=0.05)
    z, y, x = np.unravel_index(weight.argmax(), weight.shape)
    assert np.abs(world_positions(volume)[z, y, x] - LANDMARK).max() <= 1.0


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_linear_function_of_world_position_is_reproduced_exactly(save, gridded, orientation) -> None:
    """Trilinear interpolation is exact for it, so every voxel inside checks values, affine and axis order at once."""
    values, affine = gridded(ramp, orientation, (1.0, 0.9, 1.5))
    volume = load_volume(str(save("a.nii", values, affine)), (1.2, 0.7, 0.6), 1, False)
    expected = ramp(world_positions(volume))
    inner = (slice(1, -1),) * 3
    np.testing.assert_allclose(volume.values[0][inner], expected[inner], rtol=0, atol=0.02)
    np.testing.assert_allclose(volume.spacing, (1.2, 0.7, 0.6), atol=1e-9)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_without_resampling_the_array_is_nibabels_canonical_one(save, gridded, orientation) -> None:
    values, affine = gridded(lambda world: np.sin(world @ [0.3, 0.5, 0.7]), orientation, (1.0, 0.9, 1.5))
    path = save("a.nii.gz", values, affine)
    canonical = nibabel.as_closest_canonical(nibabel.load(path))
    volume = load_volume(str(path), None, 1, False)
    np.testing.assert_array_equal(volume.values[0], np.asarray(canonical.dataobj).transpose(2, 1, 0))
    np.testing.assert_allclose(volume.affine, canonical.affine, atol=1e-5)
    assert volume.ratio == (1.0, 1.0, 1.0)
    assert volume.valid is None


def test_resampling_equals_nibabels_on_the_same_grid(save, gridded) -> None:
    values, affine = gridded(lambda world: np.sin(world @ [0.3, 0.5, 0.7]), "LPS", (1.0, 0.9, 1.5))
    path = save("a.nii.gz", values, affine)
    volume = load_volume(str(path), (1.0, 1.0, 1.0), 1, False)
    expected = resample_from_to(
        nibabel.load(path), (volume.shape[::-1], volume.affine), order=1, mode="nearest"
    ).get_fdata()
    np.testing.assert_allclose(volume.values[0], expected.transpose(2, 1, 0), atol=1e-4)


def test_an_oblique_volume_is_resampled_along_its_own_axes(save, gridded) -> None:
    values, affine = gridded(ramp, "RAS", (1.0, 1.0, 2.0))
    angle = np.deg2rad(15)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    oblique = affine.copy()
    oblique[:3] = turn @ affine[:3]
    volume = load_volume(str(save("a.nii", values, oblique)), (1.0, 1.0, 1.0), 1, False)
    assert volume.affine[:3, 3] == pytest.approx(oblique[:3, 3], abs=1e-5), "voxel 0 stays where it is"
    back = world_positions(volume) @ turn
    inner = (slice(1, -1),) * 3
    np.testing.assert_allclose(volume.values[0][inner], ramp(back)[inner], atol=0.05)


def test_scale_and_slope_of_the_header_apply(tmp_path: Path) -> None:
    stored = np.arange(4**3, dtype=np.int16).reshape(4, 4, 4)
    image = nibabel.Nifti1Image(stored, np.eye(4))
    image.set_sform(np.eye(4), code=1)
    image.header.set_slope_inter(2.0, -1024.0)
    image.to_filename(tmp_path / "a.nii")
    volume = load_volume(str(tmp_path / "a.nii"), None, 1, False)
    np.testing.assert_array_equal(volume.values[0].transpose(2, 1, 0), stored * 2.0 - 1024.0)


def test_a_4d_file_becomes_channels(save) -> None:
    values = np.random.default_rng(0).normal(size=(5, 6, 7, 2)).astype(np.float32)
    volume = load_volume(str(save("a.nii", values)), None, 2, False)
    np.testing.assert_array_equal(volume.values, values.transpose(3, 2, 1, 0))


def test_a_trailing_axis_of_one_is_no_channel_axis(save) -> None:
    values = np.random.default_rng(0).normal(size=(5, 6, 7, 1)).astype(np.float32)
    volume = load_volume(str(save("a.nii", values)), None, 1, False)
    np.testing.assert_array_equal(volume.values[0], values[..., 0].transpose(2, 1, 0))


@pytest.mark.parametrize("spacing", [None, (0.5, 0.5, 0.5)])
def test_non_finite_voxels_and_what_they_touch_are_invalid(save, spacing) -> None:
    values = np.random.default_rng(0).normal(size=(8, 8, 8)).astype(np.float32)
    values[2, 3, 4] = np.nan
    values[6, 6, 6] = np.inf
    volume = load_volume(str(save("a.nii", values)), spacing, 1, False)
    bad = ~np.isfinite(values.transpose(2, 1, 0))
    if spacing is not None:
        grid = np.meshgrid(*(np.arange(n) * 0.5 for n in volume.shape), indexing="ij")
        bad = map_coordinates(bad.astype(np.float64), grid, order=1, mode="nearest") > 1e-6
    assert volume.valid is not None
    np.testing.assert_array_equal(volume.valid[0], ~bad)
    assert np.isfinite(volume.values).all()


def test_the_resampled_shape_is_monais_own() -> None:
    from monai.data import MetaTensor
    from monai.transforms import Spacing

    for shape, own in (((10, 13, 20), (2.0, 0.7, 5.0)), ((9, 9, 31), (1.0, 1.3, 0.4))):
        image = MetaTensor(np.zeros((1, *shape), dtype=np.float32), affine=np.diag([*own, 1.0]))
        assert tuple(Spacing((1.0, 1.0, 1.0))(image).shape[1:]) == resampling(shape, own, (1.0, 1.0, 1.0))[1]


def test_a_spacing_within_tolerance_is_left_alone() -> None:
    ratio, shape = resampling((10, 10, 10), (1.0005, 1.0, 0.9), (1.0, 1.0, 1.0))
    assert ratio[:2] == (1.0, 1.0)
    assert ratio[2] == pytest.approx(1 / 0.9)
    assert shape == (10, 10, 9)
