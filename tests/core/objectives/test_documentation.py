"""The objective in docs/add-an-objective.md is code that works."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest

from fmsuite.core.objectives.base import OBJECTIVES

PAGE = Path(__file__).parents[3] / "docs" / "add-an-objective.md"


@pytest.fixture
def _documented(toys, monkeypatch: pytest.MonkeyPatch):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    module = types.ModuleType("mean_colour")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(code, str(PAGE), "exec"), module.__dict__)
    monkeypatch.setitem(toys.small, "mean_colour", {})
    yield
    del OBJECTIVES["mean_colour"]


@pytest.mark.usefixtures("_documented")
@pytest.mark.parametrize("kind", ["rgb", "volume", "thirteen_grouped"])
def test_the_documented_objective_is_registered_and_learns(toys, kind: str) -> None:
    objective = toys.objective("mean_colour", kind)
    losses = toys.train(objective, [toys.batch(objective, kind)], steps=30)
    assert losses[-1] < 0.5 * losses[0]
