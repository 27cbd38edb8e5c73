"""Slides that are made once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fmsuite.commands.indexing import build_index
from fmsuite.core.data.index import SampleIndex
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.domains.pathology import PathologyDomain, PathologyOptions
from fmsuite.domains.pathology.example import make_example


@pytest.fixture(scope="session")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example data, with smaller slides."""
    return make_example(tmp_path_factory.mktemp("pathology_example"), seed=0, side_um=640.0)


@pytest.fixture(scope="session")
def example_index(example: Path) -> SampleIndex:
    skipped = SkippedLog()
    index = build_index(PathologyDomain(PathologyOptions(size=128)), [example], skipped)
    assert not skipped.entries
    return index


@pytest.fixture
def tissue() -> np.ndarray:
    """(1024, 1024, 3) uint8: pink and purple structure that fills the slide."""
    rng = np.random.default_rng(3)
    coarse = rng.random((64, 64, 1)).repeat(16, 0).repeat(16, 1)
    picture = np.where(coarse < 0.4, (110, 80, 140), (215, 140, 180)).astype(np.int16)
    return np.clip(picture + rng.integers(-12, 13, picture.shape), 0, 255).astype(np.uint8)
