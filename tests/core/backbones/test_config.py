"""The ``model:`` section refuses what nothing would read."""

from __future__ import annotations

import pytest

from fmsuite.core.backbones.config import VIT_SIZES, ModelConfig
from fmsuite.core.config import validate
from fmsuite.errors import UsageError


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        ({"rope_theta": 10.0}, "positions: rotary"),
        ({"positions": "rotary", "position_widths": {"x": 4}}, "positions: sincos"),
        ({"positions": "sincos", "position_scale": 2.0}, "position_units: physical"),
        ({"position_units": "physical"}, "positions: sincos or rotary"),
    ],
)
def test_an_option_without_effect_is_refused(options: dict[str, object], needed: str) -> None:
    with pytest.raises(UsageError, match=f"has no effect without {needed}"):
        validate(ModelConfig, options, "model", "recipe")


@pytest.mark.parametrize("name", list(VIT_SIZES))
def test_a_dumped_configuration_is_read_back_as_it_was(name: str) -> None:
    config = ModelConfig(name=name, positions="rotary", rope_theta=10.0, registers=4)
    assert ModelConfig.model_validate(config.model_dump(mode="json")) == config


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(UsageError, match="not a multiple"):
        _ = ModelConfig(width=100, heads=3).size
