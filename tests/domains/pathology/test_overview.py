"""Pictures of whole slides, on which windows find their place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fmsuite.commands.indexing import build_index
from fmsuite.core.data.index import SampleIndex
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.domains.base import Overview
from fmsuite.domains.pathology import PathologyDomain, PathologyOptions
from fmsuite.errors import ReadFailure, UsageError


def part(view: Overview, position: tuple[float, ...], extent: tuple[float, ...]) -> np.ndarray:
    """Whole pixels of an overview inside a window."""
    first = [int(np.ceil((position[a] - view.origin[a]) / view.pitch[a] - 1e-6)) for a in (0, 1)]
    last = [int(np.floor((position[a] + extent[a] - view.origin[a]) / view.pitch[a] + 1e-6)) for a in (0, 1)]
    assert min(first) >= 0
    return view.rgb[first[0] : last[0], first[1] : last[1]]


def test_windows_lie_where_their_pixels_are(example_index: SampleIndex) -> None:
    domain = PathologyDomain(PathologyOptions(size=128))
    reader = domain.reader(example_index)
    source = example_index.sources[0]
    view = domain.overview(example_index, source)
    assert view.rgb.dtype == np.uint8
    rows = [row for row in range(len(example_index)) if example_index[row].source == source]
    means, seen = [], []
    for row in rows:
        window = example_index[row]
        means.append(reader.read(window).values.mean(axis=(1, 2)))
        seen.append(part(view, window.position, window.extent).mean(axis=(0, 1)))
    means, seen = np.array(means), np.array(seen)
    assert len(rows) > 5
    assert means.std(axis=0).max() > 5
    # Pixels at the window's border are only partly its own.
    assert seen == pytest.approx(means, abs=6)


def test_the_whole_slide_is_on_it(example_index: SampleIndex) -> None:
    domain = PathologyDomain(PathologyOptions(size=128))
    source = example_index.sources[0]
    height, width = example_index.metadata["sources"][source]["shape"]
    view = domain.overview(example_index, source)
    assert view.origin == (0, 0)
    assert view.rgb.shape[0] * view.pitch[0] == pytest.approx(height, abs=view.pitch[0])
    assert view.rgb.shape[1] * view.pitch[1] == pytest.approx(width, abs=view.pitch[1])


def test_a_tile_image_is_its_own_overview(tissue: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(tissue[:300, :500]).save(tmp_path / "tile.png")
    domain = PathologyDomain(PathologyOptions(size=128))
    index = build_index(domain, [tmp_path], SkippedLog())
    view = domain.overview(index, str(tmp_path / "tile.png"))
    assert np.array_equal(view.rgb, tissue[:300, :500])
    assert (view.origin, view.pitch) == ((0, 0), (1, 1))


def test_sources_that_are_unknown_or_gone_are_named(tissue: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(tissue[:200, :200]).save(tmp_path / "tile.png")
    domain = PathologyDomain(PathologyOptions(size=128))
    index = build_index(domain, [tmp_path], SkippedLog())
    with pytest.raises(UsageError, match=r"other\.png: not a source of this index"):
        domain.overview(index, "other.png")
    (tmp_path / "tile.png").unlink()
    with pytest.raises(ReadFailure, match=r"tile\.png: the file is gone"):
        domain.overview(index, str(tmp_path / "tile.png"))


@pytest.mark.realdata
def test_a_real_slide(real_data: Path) -> None:
    path = real_data / "pathology" / "slides" / "CMU-1-Small-Region.svs"
    domain = PathologyDomain(PathologyOptions(size=256))
    index = build_index(domain, [path], SkippedLog())
    reader, view = domain.reader(index), domain.overview(index, str(path))
    for row in range(0, len(index), 7):
        window = index[row]
        expected = reader.read(window).values.mean(axis=(1, 2))
        assert part(view, window.position, window.extent).mean(axis=(0, 1)) == pytest.approx(expected, abs=6)
