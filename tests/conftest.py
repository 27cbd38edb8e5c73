"""Fixtures for every test."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.cluster import ray_cluster
from tests.forked import YOUNG
from tests.ranks import Ranks

ROOT = Path(__file__).resolve().parents[1]
gc.set_threshold(YOUNG)
# Processes that tests start import this checkout, wherever they are started and whatever is installed.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))

# The same examples every time: a suite that fails at times tells less than one that does not.
settings.register_profile("fmsuite", derandomize=True, deadline=None)
settings.load_profile("fmsuite")


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """What was imported stays, and need not be looked at again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


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


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Runs a function on two processes that share a gloo group; see ``Ranks``."""
    ranks = Ranks(tmp_path_factory.mktemp("ranks"), 2)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """As ``two_ranks``, on four."""
    ranks = Ranks(tmp_path_factory.mktemp("ranks"), 4)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """The address of a Ray cluster of two cores, which starts when the first test asks for it."""
    pytest.importorskip("ray")
    # Sockets lie in it, whose paths may have 107 bytes; pytest's own folders are too deep.
    with tempfile.TemporaryDirectory(prefix="ray") as folder, ray_cluster(Path(folder)) as address:
        yield address
