"""The page of objectives is what its script writes from the cards and the measured record."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from tests.scripts import load_script

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("objectives_page")


@pytest.fixture(scope="module")
def record() -> dict:
    return json.loads((ROOT / "benchmarks" / "objectives.json").read_text(encoding="utf-8"))


def test_the_page_says_what_cards_and_measurements_say(script: ModuleType, record: dict) -> None:
    written = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")
    assert written == script.page(record), "run benchmarks/objectives.py again, or restore docs/objectives.md"


def test_every_objective_was_measured_or_is_said_not_to_fit(record: dict) -> None:
    from fmsuite.core.objectives.base import OBJECTIVES

    own = {name for name, cls in OBJECTIVES.items() if cls.__module__.startswith("fmsuite.")}
    measured = {key.rpartition("/")[0] for key in record["runs"]}
    assert own == measured | set(record["refused"])
    assert set(record["runs"]) == {f"{name}/{seed}" for name in measured for seed in range(record["seeds"])}
