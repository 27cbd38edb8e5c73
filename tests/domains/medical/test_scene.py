"""Whole volumes on the input's grid, and the way back to the file's own, against nibabel and world coordinates."""

from __future__ import annotations

import itertools
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from nibabel.processing import resample_from_to

from fmsuite.commands.indexing import build_index
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.domains.medical import MedicalDomain, MedicalOptions
from fmsuite.domains.medical.formats.base import Grid
from fmsuite.domains.medical.geometry import linear_back, to_native, to_own
from fmsuite.domains.medical.scene import VolumeScene
from fmsuite.errors import UsageError

ORIENTATIONS = [
    "".join(sides) for axes in itertools.permutations(("RL", "AP", "SI")) for sides in itertools.product(*axes)
]


def texture(world: np.ndarray) -> np.ndarray:
    return 100 + 10 * np.sin(world @ [0.5, 0.7, 0.9])


def scene_of(path: Path, **options: object) -> VolumeScene:
    domain = MedicalDomain(MedicalOptions(**{"size": 8, "min_foreground": 0.0, **options}))
    return domain.scene(build_index(domain, [path], SkippedLog()), str(path))


def turned(affine: np.ndarray, degrees: tuple[float, float, float]) -> np.ndarray:
    """The same grid, oblique."""
    rotation = nibabel.eulerangles.euler2mat(*np.deg2rad(degrees))
    oblique = affine.copy()
    oblique[:3] = rotation @ affine[:3]
    return oblique


@given(
    orientation=st.sampled_from(ORIENTATIONS),
    spacing=st.tuples(*[st.floats(0.3, 6.0)] * 3),
    shape=st.tuples(*[st.integers(3, 6)] * 3),
    degrees=st.tuples(*[st.floats(-20, 20)] * 3),
    codes=st.sampled_from([(1, 1), (2, 0), (0, 1), (4, 3)]),
    seed=st.integers(0, 99),
)
@settings(max_examples=15, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
def test_native_to_own_and_back_puts_every_voxel_where_it_was(
    tmp_path_factory, orientation, spacing, shape, degrees, codes, seed
) -> None:
    """And a written file has the input's affine, codes and shape, bit for bit."""
    matrix = np.zeros((4, 4))
    for axis, (world, sign) in enumerate(nibabel.orientations.axcodes2ornt(orientation).astype(int)):
        matrix[world, axis] = sign * spacing[axis]
    matrix[:, 3] = (3, -5, 7, 1)
    affine = turned(matrix, degrees)
    values = np.random.default_rng(seed).normal(100, 20, shape).astype(np.float32)
    image = nibabel.Nifti1Image(values, affine)
    image.set_qform(affine, codes[1])
    image.set_sform(affine, codes[0])
    image.header["pixdim"][4:] = 2.5
    folder = tmp_path_factory.mktemp("scene")
    nibabel.save(image, folder / "a.nii")
    scene = scene_of(folder / "a.nii", spacing=None, margin=None, modality="mr")
    assert scene.native_size == shape
    np.testing.assert_allclose(scene.native_spacing, spacing, rtol=1e-5)
    whole = scene.read((0, 0, 0), scene.size).values
    canonical = nibabel.as_closest_canonical(image)
    np.testing.assert_array_equal(scene.size, canonical.shape[::-1])

    back = scene.scores_to_native(np.stack([whole[0], -whole[0]]))
    stored = nibabel.load(folder / "a.nii")
    low, high = np.percentile(values[values != 0], (0, 100))
    assert back.shape == (2, *shape)
    np.testing.assert_array_equal(back[1], -back[0])
    np.testing.assert_array_equal(to_own(back[0], Grid(shape, stored.affine)), whole[0])
    # Standardised values grow with the file's wherever they are not clipped.
    inner = (
        (values > np.percentile(values, 5)) & (values < np.percentile(values, 95)) & (low < values) & (values < high)
    )
    assert (np.diff(back[0][inner][np.argsort(values[inner])]) >= 0).all()

    written = nibabel.load(scene.write((values > 100), folder / "out"))
    assert written.shape == shape
    assert written.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(written.dataobj), values > 100)
    for key in ("sform_code", "qform_code", "srow_x", "srow_y", "srow_z", "quatern_b", "quatern_c", "quatern_d",
                "qoffset_x", "qoffset_y", "qoffset_z", "xyzt_units"):  # fmt: skip
        np.testing.assert_array_equal(written.header[key], stored.header[key])
    np.testing.assert_array_equal(written.header["pixdim"][:4], stored.header["pixdim"][:4])
    np.testing.assert_array_equal(written.affine, stored.affine)


@given(
    orientation=st.sampled_from(ORIENTATIONS),
    degrees=st.tuples(*[st.floats(-20, 20)] * 3),
    lead=st.integers(0, 2),
)
@settings(max_examples=40, deadline=None)
def test_turning_is_nibabels(orientation, degrees, lead) -> None:
    matrix = np.eye(4)
    ornt = nibabel.orientations.axcodes2ornt(orientation)
    matrix[:3, :3] = nibabel.orientations.inv_ornt_aff(ornt, (1, 1, 1))[:3, :3]
    affine = turned(matrix, degrees)
    values = np.random.default_rng(0).random((*(2, 3)[:lead], 4, 5, 6))
    grid = Grid((4, 5, 6), affine)
    order = (*range(3, 3 + lead), 0, 1, 2)
    canonical = nibabel.orientations.apply_orientation(
        values.transpose(*range(lead, lead + 3), *range(lead)), nibabel.io_orientation(affine)
    )
    own = to_own(values, grid)
    np.testing.assert_array_equal(own.swapaxes(-1, -3), canonical.transpose(order))
    np.testing.assert_array_equal(to_native(own, grid), values)


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "PIR", "SLA"])
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.5, 0.7, 1.6)])
def test_scores_come_back_as_nibabel_resamples_them(save, gridded, orientation, spacing) -> None:
    """Random scores on the resampled grid, put onto the file's by nibabel's own resampling of the two affines."""
    values, affine = gridded(texture, orientation, (1.0, 0.9, 1.5), field=14)
    path = save("a.nii", values, turned(affine, (5, -8, 12)))
    scene = scene_of(path, spacing=spacing, margin=None)
    scores = np.random.default_rng(0).normal(size=(2, *scene.size)).astype(np.float32)
    back = scene.scores_to_native(scores)
    grid = scene._volume.affine
    for one, its in zip(scores, back, strict=True):
        expected = resample_from_to(
            nibabel.Nifti1Image(one.transpose(2, 1, 0), grid), nibabel.load(path), order=1, mode="nearest"
        )
        np.testing.assert_allclose(its, expected.get_fdata(), atol=2e-5)


def test_a_box_of_a_scene_is_the_window_at_its_place(save, gridded) -> None:
    """The scene leaves out what lies further from the foreground than the margin."""

    def body(world: np.ndarray) -> np.ndarray:
        return np.where(np.abs(world - [3, -5, 7]).max(-1) < 5, texture(world), 0.0)

    path = save("a.nii", *gridded(body, "LPS", (1.0, 1.0, 1.0), field=30))
    domain = MedicalDomain(MedicalOptions(size=8, spacing=(1.5, 1.0, 1.0), margin=2.0))
    index = build_index(domain, [path], SkippedLog())
    scene = domain.scene(index, str(path))
    # 10, 9 and 10 voxels of the body along x, y and z, two millimetres on each side; z in steps of 1.5.
    assert scene.size == (10, 13, 14)
    reader = domain.reader(index)
    for row in range(0, len(index), 2):
        window = index[row]
        starts = [
            round((p - (1 - r) / 2) / r) - s for p, r, s in zip(window.position, (1.5, 1, 1), scene.start, strict=True)
        ]
        low = np.maximum(starts, 0)
        high = np.minimum(np.array(starts) + 8, scene.size)
        mine = scene.read(tuple(low), tuple(high - low)).values
        its = reader.read(window).values[(slice(None), *(slice(a, b) for a, b in zip(low - starts, high - starts)))]
        np.testing.assert_array_equal(mine, its)
    scores = np.full((1, *scene.size), 0.25, dtype=np.float32)
    native = scene.scores_to_native(scores, outside=-3.0)
    assert set(np.unique(native)) == {-3.0, 0.25}
    shown = np.argwhere(native[0] == 0.25)
    world = shown @ nibabel.load(path).affine[:3, :3].T + nibabel.load(path).affine[:3, 3]
    inside = np.argwhere(nibabel.load(path).get_fdata() > 0)
    assert {tuple(v) for v in inside} <= {tuple(v) for v in shown}
    np.testing.assert_allclose(world.min(0), [3 - 7, -5 - 7, 7 - 7], atol=1.0)
    np.testing.assert_allclose(world.max(0), [3 + 7, -5 + 7, 7 + 7], atol=1.0)


def test_labels_are_the_class_of_the_highest_score_and_0_outside(save, gridded) -> None:
    path = save("a.nii.gz", *gridded(texture, "PIR", (1.0, 0.9, 1.5), field=14))
    scene = scene_of(path, margin=None)
    scores = np.zeros((3, *scene.size), dtype=np.float32)
    scores[2, : scene.size[0] // 2] = 1
    scores[1, scene.size[0] // 2 :] = 1
    labels = scene.labels_to_native(scores)
    image = nibabel.load(path)
    superior = (np.argwhere(np.ones(labels.shape)) @ image.affine[:3, :3].T + image.affine[:3, 3])[:, 2]
    edge = scene._volume.affine[2, 3] + scene.size[0] // 2 - 0.5
    away = np.abs(superior - edge) > 0.6
    np.testing.assert_array_equal(labels.ravel()[away], np.where(superior > edge, 1, 2)[away])
    written = nibabel.load(scene.write(labels, path.parent / "labels"))
    np.testing.assert_array_equal(written.affine, image.affine)
    assert written.get_data_dtype() == np.uint8


def test_several_maps_become_the_fourth_axis(save, gridded, tmp_path: Path) -> None:
    scene = scene_of(save("a.nii", *gridded(texture, "LPS", field=8)), margin=None)
    maps = np.random.default_rng(0).normal(size=(3, *scene.native_size))
    path = scene.write(maps, tmp_path / "scores")
    assert path.name == "scores.nii.gz"
    image = nibabel.load(path)
    assert image.get_data_dtype() == np.float32
    np.testing.assert_array_equal(image.get_fdata(dtype=np.float32), np.moveaxis(maps, 0, -1).astype(np.float32))


def test_an_assumed_orientation_is_not_stated_by_what_is_written(save, tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(100, 20, (5, 6, 7)).astype(np.float32)
    path = save("a.nii", values, code=0)
    scene = scene_of(path, margin=None, unknown_orientation="assume")
    written = nibabel.load(scene.write(values > 100, tmp_path / "out"))
    assert (int(written.header["sform_code"]), int(written.header["qform_code"])) == (0, 0)
    np.testing.assert_array_equal(written.affine, nibabel.load(path).affine)
    np.testing.assert_array_equal(written.get_fdata(), values > 100)


def test_what_does_not_fit_a_scene_is_refused(save, gridded, tmp_path: Path) -> None:
    path = save("a.nii", *gridded(texture, "LPS", field=8))
    domain = MedicalDomain(MedicalOptions(size=8))
    index = build_index(domain, [path], SkippedLog())
    scene = domain.scene(index, str(path))
    with pytest.raises(ValueError, match="a box at"):
        scene.read((0, 0, 1), scene.size)
    with pytest.raises(ValueError, match="scores of shape"):
        scene.scores_to_native(np.zeros((1, 2, 2, 2), dtype=np.float32))
    with pytest.raises(ValueError, match="values of shape"):
        scene.write(np.zeros((2, 2, 2)), tmp_path / "x")
    with pytest.raises(UsageError, match="not a source"):
        domain.scene(index, "elsewhere.nii")


def test_infinite_scores_stay_infinite_and_make_no_nan() -> None:
    scores = np.full((2, 4, 4, 4), -np.inf, dtype=np.float32)
    scores[0, 1:3] = 1
    back = linear_back(scores, (0, 0, 0), (0.7, 1.3, 1.0), (3, 5, 4), float("-inf"))
    assert not np.isnan(back).any()
    assert (back[1] == -np.inf).all()
