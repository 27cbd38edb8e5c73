"""From files to windows: where they lie, what they hold, what the index fixes."""

from __future__ import annotations

import csv
import pickle
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.processing import resample_from_to

from fmsuite.commands.indexing import build_index
from fmsuite.core.data.index import SampleIndex
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.domains.base import load_domain
from fmsuite.domains.medical import MedicalDomain, MedicalOptions
from fmsuite.domains.medical.intensity import Intensity
from fmsuite.domains.medical.volumes import load_volume
from fmsuite.domains.medical.windows import bounding_box, resampled_box, to_own, to_resampled, windows_over
from fmsuite.errors import UsageError


def body(world: np.ndarray) -> np.ndarray:
    return np.where(((world - [3, -5, 7]) ** 2).sum(-1) < 9**2, 100 + 10 * np.sin(world @ [0.5, 0.7, 0.9]), 0.0)


def hounsfield(world: np.ndarray) -> np.ndarray:
    return body(world) * 11 - 1000


def test_the_domain_is_found_by_name() -> None:
    assert load_domain("medical") is MedicalDomain


def test_importing_the_domain_imports_no_slow_or_foreign_library() -> None:
    code = (
        "import sys, fmsuite.domains.medical as m; m.MedicalDomain(m.MedicalOptions());"
        "print(sorted({'monai', 'nibabel', 'openslide', 'rasterio', 'cairosvg', 'albumentations'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_a_missing_library_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(UsageError, match=r"fmsuite\[medical\]"):
        MedicalDomain(MedicalOptions()).example_data(tmp_path)


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "SRA"])
@pytest.mark.parametrize("spacing", [1.0, (2.0, 0.8, 1.3), None])
def test_a_windows_content_is_what_nibabel_reads_at_its_place(save, gridded, orientation, spacing) -> None:
    """The window's own coordinates alone, with nibabel's affine, say which world positions its voxels show."""
    values, affine = gridded(hounsfield, orientation, (1.0, 0.9, 1.5), field=30)
    path = save("a.nii.gz", values, affine)
    domain = MedicalDomain(MedicalOptions(modality="ct", spacing=spacing, size=(6, 8, 10)))
    index = build_index(domain, [path], SkippedLog())
    reader = domain.reader(index)
    image = nibabel.load(path)
    canonical = nibabel.as_closest_canonical(image)
    assert len(index) > 3
    for row in range(0, len(index), 3):
        window = index[row]
        np.testing.assert_allclose(window.spacing, nibabel.affines.voxel_sizes(canonical.affine)[::-1], rtol=1e-6)
        step = np.asarray(window.extent) / (6, 8, 10)
        first_centre = np.asarray(window.position) + step / 2 - 0.5
        grid = np.eye(4)
        grid[:3, :3] = np.diag(step[::-1])
        grid[:3, 3] = first_centre[::-1]
        expected = resample_from_to(image, ((10, 8, 6), canonical.affine @ grid), order=1, mode="nearest").get_fdata()
        sample = reader.read(window)
        assert sample.values.shape == (1, 6, 8, 10)
        assert sample.valid is None
        np.testing.assert_allclose(sample.values[0], expected.transpose(2, 1, 0), atol=0.05)
        np.testing.assert_allclose(sample.spacing, step * window.spacing, rtol=1e-6)


def test_mr_values_are_standardised_by_the_foreground_of_their_volume(save, gridded) -> None:
    values, affine = gridded(body, "RAS", field=24)
    domain = MedicalDomain(MedicalOptions(size=24))
    quiet, loud = save("quiet.nii", values, affine), save("loud.nii", values * 37.0, affine)
    index = build_index(domain, [quiet, loud], SkippedLog())
    reader = domain.reader(index)
    windows = [reader.read(index.where("source", str(path))[0]) for path in (quiet, loud)]
    np.testing.assert_allclose(windows[0].values, windows[1].values, atol=1e-4)
    canonical = values.transpose(2, 1, 0)
    start = np.round(np.asarray(index[0].position)).astype(int)
    inside = canonical[tuple(slice(s, s + 24) for s in start)] > 0
    standard = windows[0].values[0][inside]
    assert abs(standard.mean()) < 0.05
    assert abs(standard.std() - 1) < 0.05
    low, high = np.percentile(values[values > 0], (0.5, 99.5))
    clipped = np.clip(values[values > 0], low, high)
    stored = Intensity.from_json(index.metadata["intensities"][str(quiet)])
    np.testing.assert_allclose(
        [stored.low[0], stored.high[0], stored.mean[0], stored.std[0]],
        [low, high, clipped.mean(), clipped.std()],
        rtol=1e-4,
    )


def test_ct_keeps_hounsfield_units_and_the_spec_holds_the_window(save, gridded) -> None:
    values, affine = gridded(hounsfield, "LPS", field=24)
    path = save("a.nii", values, affine)
    domain = MedicalDomain(MedicalOptions(modality="ct", size=12, hu_window=(-200.0, 300.0)))
    index = build_index(domain, [path], SkippedLog())
    spec = domain.input_spec(index)
    scaled = np.clip((values[values > -500] + 200) / 500, 0, 1)
    assert spec.clip == (0.0, 1.0)
    assert spec.scale * -200 + spec.offset == pytest.approx(0)
    assert spec.scale * 300 + spec.offset == pytest.approx(1)
    assert spec.channels[0].mean == pytest.approx(scaled.mean(), rel=1e-4)
    assert spec.channels[0].std == pytest.approx(scaled.std(), rel=1e-3)


def test_the_spec_says_axes_orientation_and_spacing(save, gridded, tmp_path: Path) -> None:
    save("a.nii", *gridded(body, "LPS"))
    domain = MedicalDomain(MedicalOptions(size=(8, 16, 16), spacing=(3.0, 1.0, 1.0)))
    spec = domain.input_spec(build_index(domain, [tmp_path], SkippedLog()))
    assert (spec.axes, spec.size) == (("z", "y", "x"), (8, 16, 16))
    assert (spec.spacing, spec.spacing_unit, spec.orientation) == ((3.0, 1.0, 1.0), "mm", "RAS")
    assert spec.channel_names == ("mr",)


def test_a_volume_smaller_than_a_window_is_padded_on_both_sides_and_marked(save) -> None:
    values = np.random.default_rng(0).normal(100, 10, (10, 20, 13)).astype(np.float32)
    path = save("a.nii", values)
    domain = MedicalDomain(MedicalOptions(size=16))
    index = build_index(domain, [path], SkippedLog())
    sample = domain.reader(index).read(index[0])
    assert sample.values.shape == (1, 16, 16, 16)
    assert sample.valid is not None
    expected = np.zeros((16, 16, 16), dtype=bool)
    expected[1:14, :, 3:13] = True
    np.testing.assert_array_equal(sample.valid[0], expected)
    assert (sample.values[0][~expected] == 0).all()
    assert index[0].content > 0.9, "the share is of the part inside the volume"


def test_4d_files_become_named_channels_with_statistics_of_their_own(save) -> None:
    random = np.random.default_rng(0)
    values = np.stack([random.normal(100, 10, (12,) * 3), random.normal(5, 1, (12,) * 3)], -1).astype(np.float32)
    domain = MedicalDomain(MedicalOptions(size=12, channels=("T1", "T2")))
    index = build_index(domain, [save("a.nii", values)], SkippedLog())
    sample = domain.reader(index).read(index[0])
    assert domain.input_spec(index).channel_names == ("T1", "T2")
    np.testing.assert_allclose(sample.values.mean((1, 2, 3)), 0, atol=0.05)
    np.testing.assert_allclose(sample.values.std((1, 2, 3)), 1, atol=0.05)


def test_background_windows_are_left_out(save) -> None:
    values = np.abs(np.random.default_rng(0).normal(0, 1, (40, 40, 40)))
    values[:12, :12, :12] += 100
    values[28:, 28:, 28:] += 100
    index = build_index(
        MedicalDomain(MedicalOptions(size=10, min_foreground=0.5)),
        [save("a.nii", values.astype(np.float32))],
        SkippedLog(),
    )
    assert 2 <= len(index) <= 16
    for row in range(len(index)):
        centre = np.asarray(index[row].position) + 5
        assert (centre < 14).all() or (centre > 26).all()
        assert index[row].content >= 0.5


def test_an_index_read_back_gives_the_same_windows_and_the_reader_is_picklable(save, gridded, tmp_path: Path) -> None:
    path = save("a.nii", *gridded(body, "LPS"))
    domain = MedicalDomain(MedicalOptions(size=12, spacing=(1.5, 1.0, 1.0)))
    index = build_index(domain, [path], SkippedLog())
    index.write(tmp_path / "index.parquet")
    again = SampleIndex.read(tmp_path / "index.parquet")
    assert again.hash == index.hash
    assert domain.input_spec(again) == domain.input_spec(index)
    reader = domain.reader(index)
    first = reader.read(index[0]).values
    copied = pickle.loads(pickle.dumps(domain.reader(again)))
    np.testing.assert_array_equal(copied.read(again[0]).values, first)


def test_a_volume_is_resampled_once_for_its_windows(save, gridded, monkeypatch: pytest.MonkeyPatch) -> None:
    import fmsuite.domains.medical.reader as module

    opened = []

    def counted(path: str, *rest: object):
        opened.append(path)
        return load_volume(path, *rest)

    path = save("a.nii", *gridded(body, "LPS", field=30))
    domain = MedicalDomain(MedicalOptions(size=8))
    index = build_index(domain, [path], SkippedLog())
    monkeypatch.setattr(module, "load_volume", counted)
    reader = domain.reader(index)
    assert len(index) > 4
    for row in range(len(index)):
        reader.read(index[row])
    assert opened == [str(path)]


def test_a_read_window_does_not_alias_the_cached_volume(save, gridded) -> None:
    domain = MedicalDomain(MedicalOptions(size=8))
    index = build_index(domain, [save("a.nii", *gridded(body, "RAS"))], SkippedLog())
    reader = domain.reader(index)
    first = reader.read(index[0])
    before = first.values.copy()
    first.values[:] = 1e6
    np.testing.assert_array_equal(reader.read(index[0]).values, before)


@pytest.mark.parametrize(("key", "value"), [("spacing", 2.0), ("size", 16), ("modality", "ct")])
def test_options_that_contradict_the_index_are_refused(save, gridded, key, value) -> None:
    index = build_index(MedicalDomain(MedicalOptions(size=8)), [save("a.nii", *gridded(body, "RAS"))], SkippedLog())
    with pytest.raises(UsageError, match=f"data.{key}"):
        MedicalDomain(MedicalOptions(**{"size": 8, key: value})).reader(index)


def test_an_index_of_another_domain_is_refused() -> None:
    with pytest.raises(UsageError, match="not made by"):
        MedicalDomain(MedicalOptions()).input_spec(SampleIndex.from_windows([], {"domain": "svg"}))


@given(
    shape=st.tuples(*[st.integers(2, 40)] * 3),
    ratio=st.tuples(*[st.floats(0.2, 4.0)] * 3),
    size=st.tuples(*[st.integers(2, 16)] * 3),
    share=st.floats(0.1, 1.0),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_windows_cover_the_foreground_and_stay_inside_where_they_fit(shape, ratio, size, share, seed) -> None:
    random = np.random.default_rng(seed)
    own = tuple(max(2, round(n * r)) for n, r in zip(shape, ratio))
    shape = tuple(int(np.round((n - 1) / r + 1)) for n, r in zip(own, ratio))
    mask = np.zeros(own, dtype=bool)
    low = [random.integers(0, n) for n in own]
    mask[tuple(slice(a, a + max(1, int(share * n))) for a, n in zip(low, own))] = True
    corners, content = windows_over(
        mask, ratio, shape, resampled_box(bounding_box(mask), (1, 1, 1), ratio, shape, 0.0), size, size
    )
    starts = to_resampled(corners, np.asarray(ratio))
    np.testing.assert_allclose(to_own(starts, np.asarray(ratio)), corners, atol=1e-6)
    assert ((content >= 0) & (content <= 1 + 1e-9)).all()
    for axis in range(3):
        room = shape[axis] - size[axis]
        if room >= 0:
            assert (starts[:, axis] >= 0).all()
            assert (starts[:, axis] <= room).all()
    covered = np.zeros(shape, dtype=bool)
    for start in starts:
        covered[tuple(slice(max(0, s), s + n) for s, n in zip(start, size))] = True
    centres = np.argwhere(mask) / np.asarray(ratio)
    nearest = np.minimum(np.round(centres).astype(int), np.asarray(shape) - 1)
    assert covered[tuple(nearest.T)].all()


def write_labels(path: Path, *rows: tuple[str, ...]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def test_labels_beside_the_files_are_used(save, gridded, tmp_path: Path) -> None:
    for name in ("a.nii", "b.nii", "c.nii"):
        save(f"scans/{name}", *gridded(body, "RAS"))
    write_labels(
        tmp_path / "scans" / "labels.csv",
        ("path", "label", "patient", "split"),
        ("a.nii", "ill", "p1", "train"),
        ("b.nii", "well", "p2", "test"),
    )
    index = build_index(MedicalDomain(MedicalOptions(size=24)), [tmp_path / "scans"], SkippedLog())
    found = {Path(index[row].source).name: index[row] for row in range(len(index))}
    assert (found["a.nii"].label, found["a.nii"].group, found["a.nii"].split) == ("ill", "p1", "train")
    assert (found["b.nii"].label, found["b.nii"].group, found["b.nii"].split) == ("well", "p2", "test")
    assert (found["c.nii"].label, found["c.nii"].group, found["c.nii"].split) == (None, "c", None)


def test_a_patient_on_both_sides_of_a_split_is_refused(save, gridded, tmp_path: Path) -> None:
    for name in ("a.nii", "b.nii"):
        save(name, *gridded(body, "RAS"))
    labels = write_labels(
        tmp_path / "wrong.csv", ("path", "patient", "split"), ("a.nii", "p7", "train"), ("b.nii", "p7", "test")
    )
    with pytest.raises(UsageError, match="p7"):
        build_index(MedicalDomain(MedicalOptions(labels=labels)), [tmp_path], SkippedLog())


def test_a_labels_line_without_a_volume_is_reported(save, gridded, tmp_path: Path) -> None:
    save("a.nii", *gridded(body, "RAS"))
    labels = write_labels(tmp_path / "l.csv", ("path", "label"), ("a.nii", "ill"), ("gone.nii", "well"))
    skipped = SkippedLog()
    index = build_index(MedicalDomain(MedicalOptions(labels=labels, size=24)), [tmp_path], skipped)
    assert index.label_names == ["ill"]
    assert [(entry.path, entry.stage) for entry in skipped.entries] == [("gone.nii", "labels")]


@pytest.mark.parametrize(
    "wrong", [{"spacing": 0}, {"spacing": float("nan")}, {"size": (8, 8)}, {"hu_window": (5, 5)}, {"channels": ()}]
)
def test_impossible_options_are_refused(wrong) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        MedicalOptions(**wrong)
