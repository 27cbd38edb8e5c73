"""What people see: orientation, proportions and window boxes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from fmsuite.commands.indexing import build_index
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.inputs import Channel, InputSpec
from fmsuite.domains.medical import MedicalDomain, MedicalOptions
from fmsuite.domains.medical.pictures import BOX_COLOUR, GAP


def spec(spacing=(1.0, 1.0, 1.0), **changes: object) -> InputSpec:
    return InputSpec(
        axes=("z", "y", "x"),
        size=(8, 10, 12),
        channels=(Channel(name="v"),),
        spacing=spacing,
        spacing_unit="mm",
        **changes,
    )


def test_left_is_left_and_superior_and_anterior_are_up() -> None:
    """One bright corner block: at the patient's left, anterior, superior."""
    values = np.full((1, 8, 10, 12), -2.5, dtype=np.float32)
    values[0, 4:, 5:, :7] = 2.5
    picture = MedicalDomain(MedicalOptions()).to_rgb(values, spec())
    assert picture.dtype == np.uint8
    assert picture.shape == (10, 12 + GAP + 12 + GAP + 10, 3)
    axial, coronal, sagittal = picture[:, :12, 0], picture[:8, 14:26, 0], picture[:8, 28:, 0]
    assert (axial[:5, :7] == 255).all()
    assert (axial[5:] == 0).all()
    assert (axial[:, 7:] == 0).all()
    assert (coronal[:4, :7] == 255).all()
    assert (coronal[4:] == 0).all()
    assert (sagittal[:4, 5:] == 255).all()
    assert (sagittal[:, :5] == 0).all()


def test_planes_are_drawn_in_millimetres() -> None:
    values = np.zeros((1, 8, 10, 12), dtype=np.float32)
    picture = MedicalDomain(MedicalOptions()).to_rgb(values, spec((3.0, 1.0, 1.0)))
    assert picture.shape[0] == 24


def test_the_hounsfield_window_is_the_grey_scale() -> None:
    window = spec(scale=1 / 500, offset=0.4, clip=(0.0, 1.0))
    for value, grey in ((-1000, 0), (-200, 0), (50, 128), (300, 255), (2000, 255)):
        values = np.full((1, 8, 10, 12), value, dtype=np.float32)
        assert MedicalDomain(MedicalOptions()).to_rgb(values, window)[0, 0, 0] == grey


def test_the_preview_draws_one_picture_a_source_with_its_windows(save, tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(100, 10, (20, 20, 20)).astype(np.float32)
    for name in ("a.nii", "b.nii.gz"):
        save(f"scans/{name}", values)
    domain = MedicalDomain(MedicalOptions(size=10))
    index = build_index(domain, [tmp_path / "scans"], SkippedLog())
    written = domain.preview(index, tmp_path / "preview")
    assert [path.name for path in written] == ["00000_a.png", "00001_b.png"]
    picture = np.asarray(Image.open(written[0]).convert("RGB"))
    scale = (picture.shape[1] - 2 * GAP) // 60
    boxed = (picture == BOX_COLOUR).all(-1)
    assert boxed[0, : 20 * scale].all()
    assert boxed[10 * scale, : 20 * scale].all()
    assert not boxed[5 * scale, 2 * scale : 8 * scale].any()
