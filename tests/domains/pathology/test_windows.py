"""From files to an index: what is used, what is skipped and why."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from fmsuite.commands.indexing import build_index
from fmsuite.core.data.index import SampleIndex
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.domains.pathology import PathologyDomain, PathologyOptions
from fmsuite.domains.pathology.example import write_slide
from fmsuite.domains.pathology.slides import open_source
from fmsuite.errors import FmsuiteError, UsageError


def build(*paths: Path, **options: object) -> tuple[SampleIndex, dict[str, str]]:
    """The index, and the reason for each skipped file by its name."""
    skipped = SkippedLog()
    index = build_index(PathologyDomain(PathologyOptions(**options)), list(paths), skipped)  # type: ignore[arg-type]
    return index, {Path(entry.path).name: f"{entry.stage}: {entry.reason}" for entry in skipped.entries}


def test_windows_lie_on_tissue_in_level_0_pixels_of_the_true_resolution(example_index: SampleIndex) -> None:
    facts = example_index.metadata["sources"]
    assert len(facts) == 16
    for row in range(0, len(example_index), 17):
        window = example_index[row]
        mpp = facts[window.source]["mpp"]
        assert window.spacing == pytest.approx(tuple(mpp), abs=1e-6)
        assert window.extent == pytest.approx(tuple(128 * 0.5 / m for m in window.spacing))
        steps = np.asarray(window.position) / window.extent
        assert np.allclose(steps, np.rint(steps), atol=1e-6)
        assert 0.25 <= window.content <= 1
        top, left = window.position
        shape = facts[window.source]["shape"]
        assert top + window.extent[0] <= shape[0] + 1e-3
        assert left + window.extent[1] <= shape[1] + 1e-3
    assert {example_index[row].split for row in range(len(example_index))} == {"train", "test"}
    assert example_index.label_names == ["glandular", "solid"]
    assert example_index.metadata["versions"]["openslide"]
    assert example_index.metadata["labels"]["matched"] == 16


def test_building_twice_gives_the_same_index(example: Path, example_index: SampleIndex) -> None:
    again, _ = build(example, size=128)
    assert again.hash == example_index.hash


def test_a_limit_on_windows_draws_the_same_ones_for_the_same_seed(example: Path) -> None:
    slide = example / "slide_00.tif"
    everything, _ = build(slide, size=64, labels="none")
    first, _ = build(slide, size=64, labels="none", max_windows=9)
    same, _ = build(slide, size=64, labels="none", max_windows=9)
    other, _ = build(slide, size=64, labels="none", max_windows=9, seed=1)
    assert len(first) == len(other) == 9 < len(everything)
    assert first.hash == same.hash != other.hash
    positions = {everything[row].position for row in range(len(everything))}
    assert {first[row].position for row in range(9)} <= positions


def test_two_slides_of_one_name_are_both_used(example: Path, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shutil.copy(example / f"slide_0{int(folder == 'b')}.tif", tmp_path / folder / "slide.tif")
    index, skipped = build(tmp_path, size=128)
    assert not skipped
    assert index.groups == ["a/slide", "b/slide"]
    assert len(index.sources) == 2


def test_every_fault_is_recorded_with_its_file_and_the_way_out(tmp_path: Path, tissue: np.ndarray) -> None:
    write_slide(tmp_path / "good.tif", tissue, 0.5)
    (tmp_path / "text.svs").write_text("this is no slide")
    (tmp_path / "empty.svs").touch()
    (tmp_path / "truncated.tif").write_bytes((tmp_path / "good.tif").read_bytes()[:20_000])
    write_slide(tmp_path / "glass.tif", np.full((1024, 1024, 3), 243, np.uint8), 0.5)
    ink = np.full((1024, 1024, 3), 243, np.uint8)
    ink[200:800, 200:800] = (30, 140, 90)
    write_slide(tmp_path / "ink.tif", ink, 0.5)
    write_slide(tmp_path / "units.tif", tissue, 352.8)
    write_slide(tmp_path / "coarse.tif", tissue, 2.0)
    write_slide(tmp_path / "tiny.tif", tissue[:200, :200], 0.5, downsamples=())
    tifffile.imwrite(tmp_path / "unknown.tif", tissue, tile=(256, 256), photometric="rgb", compression="deflate")
    tifffile.imwrite(tmp_path / "deep.tif", tissue.astype(np.uint16), photometric="rgb")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    index, skipped = build(tmp_path)
    assert [Path(source).name for source in index.sources] == ["good.tif"]
    expected = {
        "text.svs": "open: not a slide",
        "empty.svs": "open: not a slide",
        "truncated.tif": "open: damaged",
        "glass.tif": "tissue: no tissue found: nothing is more coloured than glass",
        "ink.tif": "tissue.artefacts=false",
        "units.tif": "claims 352.8 um per pixel",
        "coarse.tif": "4 times coarser than the asked 0.5",
        "tiny.tif": "edges=cover",
        "unknown.tif": "does not say its resolution",
        "deep.tif": "not 8-bit RGB",
        "broken.png": "open: not a readable image",
    }
    assert set(skipped) == set(expected)
    for name, reason in expected.items():
        assert reason in skipped[name], (name, skipped[name])
    for name in ("units.tif", "unknown.tif"):
        assert "--mpp" in skipped[name]
    with pytest.raises(FmsuiteError, match="--strict"):
        build_index(PathologyDomain(PathologyOptions()), [tmp_path], SkippedLog(strict=True))


def test_a_given_resolution_replaces_what_the_file_says(tmp_path: Path, tissue: np.ndarray) -> None:
    write_slide(tmp_path / "units.tif", tissue, 352.8)
    index, skipped = build(tmp_path, mpp_override=0.25)
    assert not skipped
    assert index[0].spacing == (0.25, 0.25)
    assert index[0].extent == (512.0, 512.0)


def test_edges_cover_reaches_beyond_a_small_slide_and_marks_it_invalid(tmp_path: Path, tissue: np.ndarray) -> None:
    write_slide(tmp_path / "tiny.tif", tissue[:200, :200], 0.5, downsamples=())
    domain = PathologyDomain(PathologyOptions(edges="cover"))
    index = build_index(domain, [tmp_path], SkippedLog())
    assert len(index) == 1
    sample = domain.reader(index).read(index[0])
    assert sample.valid is not None
    assert sample.valid.shape == (1, 256, 256)
    assert sample.valid[0, :200, :200].all()
    assert not sample.valid[0, 200:].any()
    assert index[0].content == pytest.approx((200 / 256) ** 2, abs=0.01)


def test_too_little_tissue_in_every_window_says_so(tmp_path: Path) -> None:
    picture = np.full((1024, 1024, 3), 243, np.uint8)
    picture[200:264, :] = (215, 140, 180)
    write_slide(tmp_path / "thin.tif", picture, 0.5)
    _, skipped = build(tmp_path, min_tissue=0.9)
    assert "the fullest holds 2" in skipped["thin.tif"]
    assert "Lower min_tissue" in skipped["thin.tif"]


def test_a_flat_tiff_in_strips_is_a_slide_when_it_is_large_and_a_tile_when_it_is_small(
    tmp_path: Path, tissue: np.ndarray
) -> None:
    large = np.tile(tissue, (3, 3, 1))
    per_cm = (1e4 / 0.5, 1e4 / 0.5)
    kinds_made = (("strips", large, "deflate"), ("plain", large, None), ("small", tissue, "deflate"))
    for name, pixels, compression in kinds_made:
        tifffile.imwrite(
            tmp_path / f"{name}.tif",
            pixels,
            photometric="rgb",
            compression=compression,
            rowsperstrip=64,
            resolution=per_cm,
            resolutionunit="CENTIMETER",
        )
    domain = PathologyDomain(PathologyOptions())
    skipped = SkippedLog()
    index = build_index(domain, [tmp_path], skipped)
    assert not skipped.entries
    kinds = {Path(path).stem: fact["kind"] for path, fact in index.metadata["sources"].items()}
    assert kinds == {"strips": "slide", "plain": "slide", "small": "image"}
    assert open_source(str(tmp_path / "strips.tif")).striped
    reader = domain.reader(index)
    for row in range(len(index)):
        window = index[row]
        top, left = (int(value) for value in window.position)
        pixels = tissue if window.source.endswith("small.tif") else large
        expected = pixels[top : top + 256, left : left + 256]
        assert np.array_equal(np.moveaxis(reader.read(window).values, 0, -1), expected)


def test_a_strip_cut_short_fails_its_windows_only(tmp_path: Path, tissue: np.ndarray) -> None:
    path = tmp_path / "strips.tif"
    tifffile.imwrite(path, tissue, photometric="rgb", compression="deflate", rowsperstrip=64)
    with tifffile.TiffFile(path) as file:
        offset, count = file.pages[0].dataoffsets[6], file.pages[0].databytecounts[6]
    with path.open("r+b") as handle:
        handle.seek(offset)
        handle.write(bytes(count))
    domain = PathologyDomain(PathologyOptions())
    index = build_index(domain, [path], SkippedLog())
    reader = domain.reader(index)
    outcomes = {}
    for row in range(len(index)):
        window = index[row]
        try:
            reader.read(window)
            outcomes[window.position] = "read"
        except FmsuiteError as failure:
            outcomes[window.position] = str(failure)
    assert len(outcomes) == 16
    for (top, _), outcome in outcomes.items():
        assert ("cannot be read" in outcome) if top == 256 else (outcome == "read")


def tile(path: Path, size: tuple[int, int], seed: int) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def test_folders_of_tiles_give_a_window_each_grouped_by_folder(tmp_path: Path) -> None:
    first = tile(tmp_path / "one" / "a.png", (64, 64), 0)
    tile(tmp_path / "two" / "b.png", (64, 64), 1)
    domain = PathologyDomain(PathologyOptions(size=64))
    index = build_index(domain, [tmp_path], SkippedLog())
    assert index.groups == ["one", "two"]
    assert len(index) == 2
    spec = domain.input_spec(index)
    assert spec.size == (64, 64)
    assert spec.spacing is None
    assert np.array_equal(np.moveaxis(domain.reader(index).read(index[0]).values, 0, -1), first)


def test_larger_tiles_are_gridded_and_smaller_ones_enlarged(tmp_path: Path) -> None:
    large = tile(tmp_path / "large.png", (64, 150), 0)
    tile(tmp_path / "small.png", (40, 48), 1)
    domain = PathologyDomain(PathologyOptions(size=64))
    index = build_index(domain, [tmp_path], SkippedLog())
    windows = [index[row] for row in range(len(index))]
    assert [w.position for w in windows if w.source.endswith("large.png")] == [(0, 0), (0, 64), (0, 86)]
    assert [(w.position, w.extent) for w in windows if w.source.endswith("small.png")] == [
        ((0, 0), (40, 40)),
        ((0, 8), (40, 40)),
    ]
    reader = domain.reader(index)
    assert np.array_equal(np.moveaxis(reader.read(windows[2]).values, 0, -1), large[:, 86:])
    assert reader.read(windows[3]).values.shape == (3, 64, 64)


def test_tiles_of_known_resolution_are_read_at_the_asked_one(tmp_path: Path) -> None:
    tile(tmp_path / "a.png", (128, 128), 0)
    index, _ = build(tmp_path, size=64, mpp=0.5, mpp_override=0.25)
    assert index[0].extent == (128.0, 128.0)
    assert index[0].spacing == (0.25, 0.25)
    assert index.metadata["spacing"] == [0.5, 0.5]


def test_slides_and_tiles_may_stand_in_one_folder(tmp_path: Path, tissue: np.ndarray) -> None:
    write_slide(tmp_path / "slide.tif", tissue, 0.5)
    tile(tmp_path / "tiles" / "a.png", (256, 256), 0)
    index, skipped = build(tmp_path)
    assert not skipped
    assert {fact["kind"] for fact in index.metadata["sources"].values()} == {"slide", "image"}
    assert index.metadata["spacing"] is None


def test_a_tile_that_breaks_later_is_a_read_failure(tmp_path: Path) -> None:
    tile(tmp_path / "a.jpg", (64, 64), 0)
    domain = PathologyDomain(PathologyOptions(size=64))
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:700])
    index = build_index(domain, [tmp_path], SkippedLog())
    with pytest.raises(FmsuiteError, match="cannot be read"):
        domain.reader(index).read(index[0])
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(FmsuiteError, match="the file is gone"):
        domain.reader(index).read(index[0])


def test_labels_files_are_found_named_or_switched_off(example: Path, tmp_path: Path) -> None:
    slide = example / "slide_00.tif"
    assert build(slide, size=128)[0].label_names == []
    named, _ = build(slide, size=128, labels=str(example / "labels.csv"))
    assert named.label_names == ["glandular"]
    assert named.groups == ["P01"]
    off, _ = build(example, size=128, labels="none", max_windows=1)
    assert off.label_names == []
    with pytest.raises(UsageError, match="the labels cannot be read"):
        build(slide, labels=str(tmp_path / "none.csv"))


def test_one_patient_on_both_splits_is_refused_with_the_patients_id(example: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    labels.write_text("slide,label,patient,split\nslide_00,x,P77,train\nslide_01,y,P77,test\n")
    with pytest.raises(UsageError, match="P77"):
        build(example, labels=str(labels))


def test_preview_draws_each_slide_and_one_sheet_of_tiles(tmp_path: Path, tissue: np.ndarray) -> None:
    (tmp_path / "in" / "s").mkdir(parents=True)
    write_slide(tmp_path / "in" / "s" / "slide.tif", tissue, 0.5)
    tile(tmp_path / "in" / "tiles" / "a.png", (256, 256), 0)
    domain = PathologyDomain(PathologyOptions())
    index = build_index(domain, [tmp_path / "in"], SkippedLog())
    written = domain.preview(index, tmp_path / "out")
    assert [path.name for path in written] == ["00000_s_slide.png", "tiles.png"]
    assert max(Image.open(written[0]).size) == 1616
    with pytest.raises(UsageError, match="nothing to draw"):
        domain.preview(index.select([]), tmp_path / "out")


def test_to_rgb_turns_raw_values_into_a_picture(example_index: SampleIndex) -> None:
    domain = PathologyDomain(PathologyOptions(size=128))
    spec = domain.input_spec(example_index)
    assert (spec.scale, spec.spacing, spec.spacing_unit) == (1 / 255, (0.5, 0.5), "um")
    values = domain.reader(example_index).read(example_index[0]).values
    assert np.array_equal(domain.to_rgb(values, spec), np.moveaxis(values, 0, -1))
    with pytest.raises(UsageError, match="3 channels"):
        domain.to_rgb(values[:2], spec)


@pytest.mark.realdata
def test_real_slides_are_used_or_skipped_for_the_right_reason(real_data: Path) -> None:
    index, skipped = build(real_data / "pathology" / "slides")
    used = {Path(source).name for source in index.sources}
    assert used == {"CMU-1-Small-Region.svs", "kidney-48-5.tif", "openslide_boxes.png"}
    for name in ("openslide_boxes.tiff", "pathml_small_HE_levels.tiff"):
        assert "um per pixel, which no slide scanner has" in skipped[name]
    assert "nothing on it can be read" in skipped["openslide_unreadable.svs"]
    for name in ("multi-channel-z-series.ome.tif", "pathml_small_vectra.qptiff", "pathml_smalltif.tif"):
        assert "not 8-bit RGB" in skipped[name]
    assert "openslide_small.svs" in skipped
    # Either file of the DICOM series opens the same slide, which is looked at once.
    assert ("openslide_boxes_0.dcm" in skipped) != ("openslide_boxes_1.dcm" in skipped)


@pytest.mark.realdata
def test_real_labelled_tiles(real_data: Path) -> None:
    folder = real_data / "pathology" / "lc25000_lung"
    index, skipped = build(folder, size=224, group_column="source_tile_group")
    assert not skipped
    assert len(index) == 2220
    assert index.label_names == ["lung_aca", "lung_n", "lung_scc"]
    assert len(index.groups) == 740
    assert len(index.where("split", "train")) == 1551
