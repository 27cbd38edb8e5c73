"""Small NIfTI volumes for the medical domain's tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

nibabel = pytest.importorskip("nibabel")
pytest.importorskip("monai")

Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """``save(name, values, affine, code=1, header=...)`` writes a NIfTI file into the test's folder."""

    def write(name: str, values: np.ndarray, affine: np.ndarray | None = None, code: int = 1) -> Path:
        affine = np.eye(4) if affine is None else affine
        image = nibabel.Nifti1Image(values, affine)
        image.set_sform(affine, code=code)
        image.set_qform(affine, code=code) if code else image.header.__setitem__("qform_code", 0)
        image.header.set_xyzt_units("mm")
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(image, path)
        return path

    return write


@pytest.fixture(scope="session")
def gridded() -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """``gridded(function, orientation, spacing, field)`` samples a function of world millimetres on a voxel grid.

    The function takes (..., 3) positions along right, anterior, superior; spacing is along the same directions, and
    the grid is centred on (3, -5, 7), so that an affine's translation matters.
    """

    def sample(
        function: Callable[[np.ndarray], np.ndarray],
        orientation: str,
        spacing: Sequence[float] = (1.0, 1.0, 1.0),
        field: float = 24.0,
    ) -> tuple[np.ndarray, np.ndarray]:
        ornt = nibabel.orientations.axcodes2ornt(orientation)
        matrix = np.zeros((3, 3))
        shape = [0, 0, 0]
        for voxel_axis, (world_axis, sign) in enumerate(ornt.astype(int)):
            matrix[world_axis, voxel_axis] = sign * spacing[world_axis]
            shape[voxel_axis] = round(field / spacing[world_axis]) + world_axis
        affine = np.eye(4)
        affine[:3, :3] = matrix
        affine[:3, 3] = np.array([3.0, -5.0, 7.0]) - matrix @ (np.array(shape) - 1) / 2
        voxels = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1)
        return function(voxels @ matrix.T + affine[:3, 3]).astype(np.float32), affine

    return sample
