"""Fixtures for every test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real slides, volumes, rasters and drawings: ``FMSUITE_DATA``, or ``../shared/data`` beside a checkout."""
    folder = Path(os.environ.get("FMSUITE_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set FMSUITE_DATA to the folder that holds it")
    return folder


@pytest.fixture(scope="session")
def oracles() -> Path:
    """Small extracts of numbers computed with public reference implementations."""
    return Path(__file__).parent / "fixtures" / "oracles"
