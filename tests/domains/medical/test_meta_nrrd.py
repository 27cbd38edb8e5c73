"""MetaImage and NRRD: voxels and geometry against pynrrd and closed forms, and headers that cannot be believed."""

from __future__ import annotations

import re
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from fmsuite.commands.indexing import build_index
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.domains.medical import MedicalDomain, MedicalOptions
from fmsuite.domains.medical.formats import itk as formats
from fmsuite.errors import ReadFailure

pytest.importorskip("itk")
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def noise(*shape: int, kind: type = np.int16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(500, 200, shape).astype(kind)


def write_meta(path: Path, values: np.ndarray, affine: np.ndarray, packed: bool = False, **changes: str) -> Path:
    """(I, J, K), or (I, J, K, T), with an affine in RAS, as the format's documentation says.

    Args:
        changes: lines of the header to replace; ``None`` takes one out.
    """
    lps = LPS @ affine
    size = np.linalg.norm(lps[:3, :3], axis=0)
    sizes = values.shape
    if values.ndim == 4:
        lps_matrix, size = np.eye(4), np.append(size, 1.0)
        lps_matrix[:3, :3] = lps[:3, :3] / size[:3]
        offset = np.append(lps[:3, 3], 0)
    else:
        lps_matrix, offset = lps[:3, :3] / size, lps[:3, 3]
    raw = values.astype(values.dtype.newbyteorder("<")).tobytes(order="F")
    data = zlib.compress(raw) if packed else raw
    kinds = {"int16": "MET_SHORT", "uint8": "MET_UCHAR", "float32": "MET_FLOAT", "float64": "MET_DOUBLE"}
    beside = path.with_suffix(".zraw" if packed else ".raw") if path.suffix == ".mhd" else None
    fields: dict[str, str | None] = {
        "ObjectType": "Image",
        "NDims": str(values.ndim),
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": "False",
        "CompressedData": str(packed),
        "CompressedDataSize": str(len(data)) if packed else None,
        # Its columns are the axes' directions, and it is written column by column.
        "TransformMatrix": " ".join(f"{number:.17g}" for number in lps_matrix.T.ravel()),
        "Offset": " ".join(f"{number:.17g}" for number in offset),
        "ElementSpacing": " ".join(f"{number:.17g}" for number in size),
        "DimSize": " ".join(map(str, sizes)),
        "ElementType": kinds[str(values.dtype)],
        "ElementDataFile": "LOCAL" if beside is None else beside.name,
    }
    fields |= changes
    # Whatever follows this line is voxels.
    fields["ElementDataFile"] = fields.pop("ElementDataFile")
    head = "".join(f"{key} = {value}\n" for key, value in fields.items() if value is not None).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head if beside is not None else head + data)
    if beside is not None:
        beside.write_bytes(data)
    return path


def write_nrrd(path: Path, values: np.ndarray, affine: np.ndarray, space: str = "left-posterior-superior", **changes):
    """By pynrrd."""
    nrrd = pytest.importorskip("nrrd")
    flip = np.array([1 if word in ("right", "anterior", "superior") else -1 for word in space.split("-")])
    header = {
        "space": space,
        "space directions": (affine[:3, :3] * flip[:, None]).T,
        "space origin": affine[:3, 3] * flip,
        "kinds": ["domain"] * 3,
        **changes,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    nrrd.write(str(path), values, {key: value for key, value in header.items() if value is not None})
    return path


def oblique(degrees=(10, -20, 30), spacing=(0.7, 1.1, 2.5)) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = nibabel.eulerangles.euler2mat(*np.deg2rad(degrees)) * spacing
    affine[:3, 3] = (3, -5, 7)
    return affine


@given(
    degrees=st.tuples(*[st.floats(-180, 180)] * 3),
    spacing=st.tuples(*[st.floats(0.2, 9)] * 3),
    shape=st.tuples(*[st.integers(2, 6)] * 3),
    kind=st.sampled_from([np.int16, np.uint8, np.float32, np.float64]),
    how=st.sampled_from(["a.mha", "packed.mha", "a.mhd", "packed.mhd", "a.nrrd", "a.nhdr", "las.nrrd", "ras.nrrd"]),
)
@settings(max_examples=16, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
def test_voxels_and_affine_are_what_was_written(tmp_path_factory, degrees, spacing, shape, kind, how) -> None:
    path = tmp_path_factory.mktemp("formats") / how
    values, affine = noise(*shape).clip(0, 250).astype(kind), oblique(degrees, spacing)
    if path.suffix in formats.META:
        write_meta(path, values, affine, packed=how.startswith("packed"))
    else:
        sides = {"las": "left-anterior-superior", "ras": "right-anterior-superior"}
        write_nrrd(path, values, affine, sides.get(path.stem, "left-posterior-superior"))
    stored = formats.read(str(path), 1, False)
    np.testing.assert_array_equal(stored.values[..., 0], values.astype(np.float32))
    np.testing.assert_allclose(stored.grid.affine, affine, atol=1e-6)


@pytest.mark.parametrize("name", ["a.mha", "front.nrrd", "back.nrrd", "numbers.mha"])
def test_several_volumes_of_one_file_are_channels(tmp_path: Path, name: str) -> None:
    """Along an axis of their own, first or last, or as several numbers a voxel."""
    values, affine = noise(4, 5, 6, 2, kind=np.float32), oblique()
    none = np.full(3, np.nan)
    directions = [*(LPS[:3, :3] @ affine[:3, :3]).T]
    if name == "a.mha":
        write_meta(tmp_path / name, values, affine)
    elif name == "numbers.mha":
        write_meta(tmp_path / name, values[..., 0], affine, ElementNumberOfChannels="2")
        path = tmp_path / name
        head = path.read_bytes().partition(b"LOCAL\n")
        path.write_bytes(head[0] + head[1] + np.moveaxis(values, -1, 0).tobytes(order="F"))
    elif name == "front.nrrd":
        write_nrrd(
            tmp_path / name,
            np.moveaxis(values, -1, 0),
            affine,
            **{"space directions": np.array([none, *directions]), "kinds": ["list", *["domain"] * 3]},
        )
    else:
        write_nrrd(
            tmp_path / name,
            values,
            affine,
            **{"space directions": np.array([*directions, none]), "kinds": [*["domain"] * 3, "list"]},
        )
    stored = formats.read(str(tmp_path / name), 2, False)
    np.testing.assert_array_equal(stored.values, values)
    np.testing.assert_allclose(stored.grid.affine, affine, atol=1e-6)
    with pytest.raises(ReadFailure, match="4D image of 2 volumes"):
        formats.read(str(tmp_path / name), 1, False)


def test_through_the_domain_and_written_back(tmp_path: Path) -> None:
    values, affine = noise(12, 10, 11), oblique(spacing=(1.0, 1.0, 1.0)) @ np.diag([-1, 1, -1, 1])
    write_meta(tmp_path / "scans" / "a.mhd", values, affine)
    write_nrrd(tmp_path / "scans" / "b.nrrd", values, affine)
    write_nrrd(tmp_path / "labels" / "b.nrrd", (values > 500).astype(np.uint8), affine)
    write_meta(tmp_path / "labels" / "a.mha", (values > 500).astype(np.uint8), affine)
    domain = MedicalDomain(MedicalOptions(size=8, margin=None))
    index = build_index(domain, [tmp_path / "scans"], SkippedLog())
    assert [Path(source).name for source in index.sources] == ["a.mhd", "b.nrrd"]
    for source in index.sources:
        scene = domain.scene(index, source)
        whole = scene.read((0, 0, 0), scene.size).values
        back = scene.scores_to_native(whole)
        rank = np.argsort(values.ravel(), kind="stable")
        assert (np.diff(back[0].ravel()[rank]) >= 0).all()
        written = nibabel.load(scene.write(back[0], tmp_path / "out"))
        assert written.shape == values.shape
        np.testing.assert_allclose(written.affine, affine, atol=1e-5)


def test_the_voxels_beside_a_header_belong_to_the_source(tmp_path: Path) -> None:
    """So that an interrupted indexing looks again at a header whose voxels have changed."""
    path = write_meta(tmp_path / "a.mhd", noise(8, 8, 8), oblique())
    (task,) = MedicalDomain(MedicalOptions()).find_sources([path], SkippedLog()).tasks
    assert task.others == (str(tmp_path / "a.raw"),)


def test_an_orientation_that_is_not_stated_can_be_assumed(tmp_path: Path) -> None:
    values = noise(4, 5, 6)
    path = write_meta(tmp_path / "a.mha", values, np.eye(4), TransformMatrix=None)
    with pytest.raises(ReadFailure, match="no TransformMatrix"):
        formats.read(str(path), 1, False)
    stored = formats.read(str(path), 1, True)
    assert stored.grid.assumed
    np.testing.assert_allclose(stored.grid.affine[:3, :3], LPS[:3, :3])


def cut(path: Path, count: int = 100) -> None:
    path.write_bytes(path.read_bytes()[:-count])


def damaged(path: Path, at: int = -60) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 0xFF
    path.write_bytes(raw)


def meta(name: str = "bad.mha", packed: bool = False, then=None, **changes):
    def make(folder: Path) -> None:
        path = write_meta(folder / name, noise(8, 8, 8), oblique(), packed, **changes)
        if then is not None:
            then(path)

    return make


def nrrd(name: str = "bad.nrrd", then=None, old: str = "", new: str = ""):
    """With ``old`` in the header replaced, a regular expression."""

    def make(folder: Path) -> None:
        path = write_nrrd(folder / name, noise(8, 8, 8), oblique())
        head, blank, data = path.read_bytes().partition(b"\n\n")
        if old:
            changed = re.sub(old.encode(), new.encode(), head)
            assert changed != head
            path.write_bytes(changed + blank + data)
        if then is not None:
            then(path)

    return make


FAULTS = {
    "truncated mha": (meta(then=cut), "the header promises"),
    "truncated packed mha": (meta(packed=True, then=cut), "cut short"),
    "damaged packed mha": (meta(packed=True, then=damaged), "damaged"),
    "damaged checksum of a packed mha": (meta(packed=True, then=lambda path: damaged(path, -1)), "damaged"),
    "promise of 27e12 voxels": (meta(DimSize="30000 30000 30000"), "the header promises 54000000000000 bytes"),
    "sizes that wrap around": (meta(DimSize="4294967296 4294967296 2"), "the header promises"),
    "negative size": (meta(DimSize="8 -8 8"), "an image without voxels"),
    "spacing of 0": (meta(ElementSpacing="0 1 1"), "voxels of 0 x 1 x 1 mm"),
    "negative spacing": (meta(ElementSpacing="1 -1 1"), "voxels of 1 x -1 x 1 mm"),
    "absurd spacing": (meta(ElementSpacing="1 1 4000"), "voxels of 1 x 1 x 4000 mm"),
    "no spacing that is a number": (meta(ElementSpacing="1 nan 1"), "voxels of 1 x nan x 1 mm"),
    "sheared": (meta(TransformMatrix="1 0 0 0.3 1 0 0 0 1"), "right angles"),
    "no direction": (meta(TransformMatrix="0 0 0 0 1 0 0 0 1"), "directions are not those of a volume"),
    "parallel directions": (nrrd(old="directions: .*", new="directions: (1,0,0) (2,0,0) (0,0,1)"), "not those of"),
    "2D": (meta(NDims="2", DimSize="8 8", TransformMatrix="1 0 0 1", Offset="0 0", ElementSpacing="1 1"), "2D image"),
    "elsewhere": (meta("bad.mhd", ElementDataFile="../../secret.raw"), "outside of its folder"),
    "absolute": (meta("bad.mhd", ElementDataFile="/etc/passwd"), "outside of its folder"),
    "voxels missing": (meta("bad.mhd", ElementDataFile="gone.raw"), "gone.raw"),
    "several data files": (meta("bad.mhd", ElementDataFile="LIST"), "several data files"),
    "unknown type": (meta(ElementType="MET_OTHER"), "ElementType = MET_OTHER"),
    "text": (meta(then=lambda path: path.write_text("no image\n" * 9)), "not a MetaImage"),
    "empty": (meta(then=lambda path: path.write_bytes(b"")), "not a MetaImage"),
    "truncated nrrd": (nrrd(then=cut), "cut short"),
    "damaged nrrd": (nrrd(then=damaged), "damaged"),
    "nrrd of 27e12 voxels": (nrrd(old="sizes: 8 8 8", new="sizes: 30000 30000 30000"), "the header promises"),
    "nrrd without space": (nrrd(old="space: .*\n", new="space dimension: 3\n"), "no space"),
    "nrrd in scanner's axes": (nrrd(old="space: .*\n", new="space: scanner-xyz\n"), "no space"),
    "nrrd with a spacing of 0": (nrrd(old="directions: [(][^)]*[)]", new="directions: (0,0,0)"), "voxels of 0 x"),
    "nrrd in metres": (nrrd(old="space origin", new='space units: "m" "m" "m"\nspace origin'), "lengths are in m,"),
    "nrrd that leaves its folder": (nrrd("bad.nhdr", old="data file: .*", new="data file: ../x.raw"), "outside"),
    "nrrd without type": (nrrd(old="type: .*\n"), "lacks 'type'"),
    "not a nrrd": (nrrd(then=lambda path: path.write_bytes(b"PNG" * 40)), "not a MetaImage or NRRD"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_file_is_skipped_with_reason_and_the_good_one_is_used(tmp_path: Path, fault: str) -> None:
    make, reason = FAULTS[fault]
    folder = tmp_path / "scans"
    make(folder)
    good = write_meta(folder / "good.mha", noise(8, 8, 8), oblique())
    skipped = SkippedLog()
    index = build_index(MedicalDomain(MedicalOptions(size=8, min_foreground=0)), [folder], skipped)
    assert index.sources == [str(good)]
    (entry,) = skipped.entries
    assert Path(entry.path).stem == "bad"
    assert reason in entry.reason
    assert entry.reason.count(".") >= 2, "a reason and a way out"
