"""Files that cannot be used: each is skipped with its path, the reason and a way out, and the rest goes on."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest

from fmsuite.commands.indexing import build_index
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.domains.medical import MedicalDomain, MedicalOptions
from fmsuite.errors import FmsuiteError, ReadFailure, UsageError


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(100, 20, shape).astype(np.float32)


def patch_header(path: Path, offset: int, layout: str, *values: float) -> None:
    raw = bytearray(path.read_bytes())
    struct.pack_into(layout, raw, offset, *values)
    path.write_bytes(raw)


def truncated(save) -> Path:
    path = save("bad.nii.gz", noise(16, 16, 16))
    path.write_bytes(path.read_bytes()[:-3000])
    return path


def truncated_plain(save) -> Path:
    path = save("bad.nii", noise(16, 16, 16))
    path.write_bytes(path.read_bytes()[:-3000])
    return path


def flipped_bits(save) -> Path:
    path = save("bad.nii.gz", noise(16, 16, 16))
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    path.write_bytes(raw)
    return path


def text(save) -> Path:
    path = save("bad.nii", noise(4, 4, 4))
    path.write_text("These are no voxels.\n" * 50)
    return path


def empty(save) -> Path:
    path = save("bad.nii.gz", noise(4, 4, 4))
    path.write_bytes(b"")
    return path


def gzipped_text(save) -> Path:
    path = save("bad.nii.gz", noise(4, 4, 4))
    path.write_bytes(gzip.compress(b"no voxels " * 100))
    return path


def huge_promise(save) -> Path:
    path = save("bad.nii", noise(16, 16, 16))
    patch_header(path, 42, "<3h", 30000, 30000, 30000)
    return path


def zero_spacing(save) -> Path:
    path = save("bad.nii", noise(16, 16, 16))
    patch_header(path, 280, "<4f", 0, 0, 0, 0)
    return path


def with_affine(*diagonal: float) -> Callable[..., Path]:
    return lambda save: save("bad.nii", noise(16, 16, 16), np.diag([*diagonal, 1.0]))


def nan_affine(save) -> Path:
    path = save("bad.nii", noise(16, 16, 16))
    patch_header(path, 280, "<f", np.nan)
    return path


def sheared(save) -> Path:
    path = save("bad.nii", noise(16, 16, 16))
    patch_header(path, 284, "<f", 0.3)
    return path


def micrometres(save) -> Path:
    path = save("bad.nii", noise(16, 16, 16))
    patch_header(path, 123, "<b", 3)
    return path


def labels_map(save) -> Path:
    return save("bad.nii", np.random.default_rng(0).integers(0, 3, (16, 16, 16)).astype(np.uint8))


def complex_values(save) -> Path:
    return save("bad.nii", noise(16, 16, 16).astype(np.complex64))


def overflowing(save) -> Path:
    path = save("bad.nii", noise(16, 16, 16).astype(np.int16))
    patch_header(path, 112, "<2f", 3e37, 0)
    return path


def rescaled_by_infinity(save) -> Path:
    path = save("bad.nii", noise(16, 16, 16).astype(np.int16))
    patch_header(path, 112, "<2f", 1, np.inf)
    return path


FAULTS: dict[str, tuple[Callable[..., Path], str]] = {
    "truncated .nii.gz": (truncated, "cut short"),
    "truncated .nii": (truncated_plain, "cut short"),
    "damaged .nii.gz": (flipped_bits, "damaged"),
    "text file": (text, "not a NIfTI image"),
    "empty file": (empty, "not a NIfTI image"),
    "gzipped text": (gzipped_text, "not a NIfTI image"),
    "header of 27e12 voxels": (huge_promise, "header promises"),
    "2D": (lambda save: save("bad.nii", noise(16, 16)), "2D image"),
    "one slice": (lambda save: save("bad.nii", noise(16, 16, 1)), "2D image"),
    "4D": (lambda save: save("bad.nii", noise(8, 8, 8, 5)), "4D image of 5 volumes"),
    "5D": (lambda save: save("bad.nii", noise(8, 8, 8, 1, 3)), "5 dimensions"),
    "NaN only": (lambda save: save("bad.nii", np.full((16, 16, 16), np.nan, np.float32)), "no voxel is a finite"),
    "constant": (lambda save: save("bad.nii", np.full((16, 16, 16), 7, np.float32)), "every voxel has the value 7"),
    "infinite only": (lambda save: save("bad.nii", np.full((16, 16, 16), np.inf, np.float32)), "no voxel is a finite"),
    "all zero": (lambda save: save("bad.nii", np.zeros((16, 16, 16), np.int16)), "every voxel has the value 0"),
    "overflow on rescaling": (overflowing, "overflow when rescaled"),
    "rescaled by infinity": (rescaled_by_infinity, "the header cannot be read (Valid slope but invalid intercept"),
    "zero spacing": (zero_spacing, "voxels of 0 x"),
    "absurd spacing": (with_affine(1, 1, 4000), "voxels of 1 x 1 x 4000 mm"),
    "tiny spacing": (with_affine(1e-4, 1, 1), "voxels of 0.0001"),
    "NaN in the affine": (nan_affine, "voxels of nan"),
    "sheared": (sheared, "right angles"),
    "micrometres": (micrometres, "lengths are in micron"),
    "no affine code": (lambda save: save("bad.nii", noise(16, 16, 16), code=0), "sform and qform codes are 0"),
    "label map": (labels_map, "a label map"),
    "complex": (complex_values, "not real numbers"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_file_is_skipped_with_reason_and_the_good_one_is_used(save, tmp_path: Path, fault: str) -> None:
    make, reason = FAULTS[fault]
    bad = make(save)
    good = save("good.nii.gz", noise(16, 16, 16))
    skipped = SkippedLog()
    index = build_index(MedicalDomain(MedicalOptions(size=8)), [tmp_path], skipped)
    assert index.sources == [str(good)]
    assert [entry.path for entry in skipped.entries] == [str(bad)]
    assert reason in skipped.entries[0].reason
    assert skipped.entries[0].reason.count(".") >= 2, "a reason and a way out"


def test_strict_makes_it_an_error(save, tmp_path: Path) -> None:
    text(save)
    with pytest.raises(FmsuiteError, match=r"bad\.nii"):
        build_index(MedicalDomain(MedicalOptions()), [tmp_path], SkippedLog(strict=True))


def test_an_empty_folder_and_a_missing_path_are_wrong_use(tmp_path: Path) -> None:
    domain = MedicalDomain(MedicalOptions())
    with pytest.raises(UsageError, match="NIfTI"):
        build_index(domain, [tmp_path], SkippedLog())
    with pytest.raises(UsageError, match="nowhere"):
        build_index(domain, [tmp_path / "nowhere"], SkippedLog())


def test_an_unknown_orientation_can_be_assumed(save) -> None:
    values = noise(12, 12, 12)
    path = save("a.nii", values, code=0)
    domain = MedicalDomain(MedicalOptions(size=12, unknown_orientation="assume"))
    index = build_index(domain, [path], SkippedLog())
    window = domain.reader(index).read(index[0])
    expected = np.asarray(nibabel.as_closest_canonical(nibabel.load(path)).dataobj).transpose(2, 1, 0)
    assert np.corrcoef(window.values.ravel(), expected.ravel())[0, 1] > 0.99


def test_volumes_that_are_not_in_hounsfield_units_are_refused_as_ct(save) -> None:
    path = save("a.nii", noise(16, 16, 16))
    skipped = SkippedLog()
    build_index(MedicalDomain(MedicalOptions(modality="ct", size=8)), [path], skipped)
    assert "not Hounsfield units" in skipped.entries[0].reason


def test_a_file_that_goes_bad_after_indexing_fails_to_read(save) -> None:
    path = save("a.nii.gz", noise(16, 16, 16))
    domain = MedicalDomain(MedicalOptions(size=8))
    index = build_index(domain, [path], SkippedLog())
    path.write_bytes(path.read_bytes()[:2000])
    reader = domain.reader(index)
    for _ in range(2):
        with pytest.raises(ReadFailure, match=r"a\.nii\.gz"):
            reader.read(index[0])
    path.unlink()
    with pytest.raises(ReadFailure, match="does not exist"):
        reader.read(index[0])


def test_a_window_without_a_finite_voxel_is_a_read_failure(save) -> None:
    values = noise(16, 16, 16)
    path = save("a.nii", values)
    domain = MedicalDomain(MedicalOptions(size=8))
    index = build_index(domain, [path], SkippedLog())
    values[:8, :8, :8] = np.nan
    save("a.nii", values)
    corner = next(index[row] for row in range(len(index)) if index[row].position == (0.0, 0.0, 0.0))
    with pytest.raises(ReadFailure, match="finite"):
        domain.reader(index).read(corner)
