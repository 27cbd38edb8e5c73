"""Label maps: found by template, checked against their volume, read with its windows."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
from nibabel.processing import resample_from_to

from fmsuite.commands.indexing import build_index
from fmsuite.core.data.index import SampleIndex
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.domains.medical import MedicalDomain, MedicalOptions
from fmsuite.domains.medical.maps import map_path
from fmsuite.errors import UsageError


def texture(world: np.ndarray) -> np.ndarray:
    return 100 + 10 * np.sin(world @ [0.5, 0.7, 0.9])


def organs(world: np.ndarray) -> np.ndarray:
    away = np.abs(world - [3, -5, 7]).max(-1)
    return (away < 4) * 1 + ((away < 6) & (world[..., 0] > 4)) * 2


@pytest.fixture
def pair(save, gridded):
    """A volume and its map, the map stored along other axes."""
    image = save("images/a.nii.gz", *gridded(texture, "LPS", (1.0, 0.9, 1.5), field=14))
    values, affine = gridded(organs, "LPS", (1.0, 0.9, 1.5), field=14)
    stored = nibabel.as_closest_canonical(nibabel.Nifti1Image(values, affine))
    labels = save("labels/a.nii.gz", np.asarray(stored.dataobj).astype(np.uint8), stored.affine)
    return image, labels, values


def options(folder: Path, **changes: object) -> MedicalOptions:
    return MedicalOptions(**{"size": 8, "spacing": (1.0, 0.6, 1.3), "maps": {"organ": str(folder)}, **changes})


def test_maps_are_read_with_windows_by_nearest_neighbour(pair, tmp_path: Path) -> None:
    image, labels, values = pair
    domain = MedicalDomain(options(tmp_path / "labels", margin=None))
    index = build_index(domain, [image], SkippedLog())
    scene = domain.scene(index, str(image))
    mine = scene.read((0, 0, 0), scene.size).maps["organ"]
    assert mine.dtype == np.int16
    expected = resample_from_to(
        nibabel.load(labels), (scene.size[::-1], scene._volume.affine), order=0, mode="nearest"
    ).get_fdata()
    differ = mine != expected.transpose(2, 1, 0)
    # Half-way between two voxels either is nearest.
    assert differ.mean() < 0.02
    assert set(np.unique(mine)) == {0, 1, 2, 3}
    np.testing.assert_array_equal(scene.native_map("organ"), values)
    reader = domain.reader(index)
    for row in range(0, len(index), 3):
        sample = reader.read(index[row])
        assert sample.maps["organ"].shape == sample.values.shape[1:]
        start = [round((p - (1 - r) / 2) / r) for p, r in zip(index[row].position, reader.volume(str(image)).ratio)]
        box = tuple(slice(max(s, 0), s + 8) for s in start)
        inside = tuple(slice(max(-s, 0), max(-s, 0) + n) for s, n in zip(start, mine[box].shape))
        np.testing.assert_array_equal(sample.maps["organ"][inside], mine[box])


def test_maps_are_0_beyond_the_volume(save) -> None:
    values = np.random.default_rng(0).normal(100, 10, (10, 12, 12)).astype(np.float32)
    image = save("a.nii", values)
    save("m/a.nii", np.ones((10, 12, 12), dtype=np.int16))
    domain = MedicalDomain(MedicalOptions(size=16, maps={"all": str(image.parent / "m")}))
    index = build_index(domain, [image], SkippedLog())
    sample = domain.reader(index).read(index[0])
    np.testing.assert_array_equal(sample.maps["all"], sample.valid[0])


def test_the_index_records_the_templates_and_another_one_is_refused(pair, tmp_path: Path, monkeypatch) -> None:
    image, _, _ = pair
    monkeypatch.chdir(tmp_path)
    domain = MedicalDomain(options(Path("labels")))
    index = build_index(domain, [image], SkippedLog())
    index.write(tmp_path / "i.parquet")
    monkeypatch.chdir("/")
    again = SampleIndex.read(tmp_path / "i.parquet")
    assert again.metadata["options"]["maps"] == {"organ": str(tmp_path / "labels")}
    with pytest.raises(UsageError, match=r"data\.maps"):
        MedicalDomain(options(tmp_path, maps={})).reader(again)
    scene = domain.scene(again, str(image))
    with pytest.raises(UsageError, match="no label map 'lesion'"):
        scene.native_map("lesion")


@pytest.mark.parametrize(
    ("template", "path"),
    [
        ("/m", "/m/a.nii.gz"),
        ("/m/{stem}_seg.nrrd", "/m/a_seg.nrrd"),
        ("{folder}/../labels/{name}", "/d/labels/a.nii.gz"),
        ("{folder}/{stem}.mha", "/d/images/a.mha"),
    ],
)
def test_templates(template: str, path: str) -> None:
    maps = MedicalOptions(maps={"m": template}).maps
    assert map_path("/d/images/a.nii.gz", maps["m"]) == path


@pytest.mark.parametrize("template", ["/m/{case}.nii", "/m/{", ""])
def test_templates_that_cannot_be_are_refused(template: str) -> None:
    with pytest.raises(ValueError, match=r"maps\.organ"):
        MedicalOptions(maps={"organ": template})


def test_a_folder_that_is_not_there_is_refused_before_anything_is_read(pair, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no folder"):
        build_index(MedicalDomain(options(tmp_path / "nowhere")), [pair[0]], SkippedLog())


def test_maps_that_do_not_fit_leave_their_volume_out(save, gridded, tmp_path: Path) -> None:
    values, affine = gridded(texture, "LPS", field=12)
    labels = (values > 100).astype(np.uint8)
    moved = affine.copy()
    moved[0, 3] += 2
    unnamed = save("labels/uncoded.nii", labels, affine, code=0)
    wrong = {
        "missing.nii": (None, None, "is missing"),
        "shape.nii": (labels[1:], affine, "voxels"),
        "moved.nii": (labels, moved, "up to 2 mm apart"),
        "mirrored.nii": (labels, affine @ np.diag([-1.0, 1, 1, 1]), "lies elsewhere"),
        "fractions.nii": (labels * np.float32(0.5), affine, "not whole"),
        "nan.nii": (np.where(labels, np.float32(np.nan), 0), affine, "not whole"),
        "large.nii": (labels * np.int32(70000), affine, "labels from 0 to 70000"),
        "several.nii": (np.stack([labels, labels], -1), affine, "a 4D image of 2 volumes"),
        unnamed.name: (labels, None, "codes are 0"),
    }
    for name, (its, where, _) in wrong.items():
        save(f"images/{name}", values, affine)
        if where is not None:
            save(f"labels/{name}", its, where)
    save("images/good.nii", values, affine)
    # The same grid, and a header that rounds otherwise.
    save("labels/good.nii", labels, affine + 1e-4)
    skipped = SkippedLog()
    index = build_index(MedicalDomain(options(tmp_path / "labels")), [tmp_path / "images"], skipped)
    assert [Path(source).name for source in index.sources] == ["good.nii"]
    said = {Path(entry.path).name: entry for entry in skipped.entries}
    assert set(said) == set(wrong)
    for name, (_, _, reason) in wrong.items():
        assert reason in said[name].reason
        assert said[name].stage == "maps"


def test_a_map_that_goes_missing_after_indexing_is_a_read_failure(pair, tmp_path: Path) -> None:
    from fmsuite.errors import ReadFailure

    image, labels, _ = pair
    domain = MedicalDomain(options(tmp_path / "labels"))
    index = build_index(domain, [image], SkippedLog())
    labels.unlink()
    with pytest.raises(ReadFailure, match="is missing"):
        domain.reader(index).read(index[0])
