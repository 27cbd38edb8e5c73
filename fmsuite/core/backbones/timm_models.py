"""timm models with their published or a file's weights, and their own input."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from timm.data import resolve_model_data_config
from torch import Tensor, nn

from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.backbones.timm_backbone import PREFIX, TimmBackbone, create_timm
from fmsuite.core.backbones.weights import read_checkpoint, unwrap
from fmsuite.core.inputs import InputSpec, rgb_channels
from fmsuite.errors import UsageError


def open_timm(name: str, file: Path | None = None) -> tuple[TimmBackbone, dict[str, Any]]:
    """A timm model, with its own input size and statistics, and notes for the provenance.

    Args:
        name: timm's name, or ``hf-hub:...``.
        file: its weights; timm's published ones if not given.

    Raises:
        UsageError: for an unknown name, or weights that do not fit.
        FmsuiteError: if the weights cannot be read or fetched.
    """
    model = create_timm(name, pretrained=file is None)
    data = resolve_model_data_config(model)
    channels = int(data["input_size"][0])
    if channels != 3:
        raise UsageError(f"The timm model '{name}' takes {channels} channels; only RGB models describe their input.")
    spec = InputSpec(
        axes=("y", "x"),
        size=tuple(int(length) for length in data["input_size"][1:]),
        channels=rgb_channels(tuple(data["mean"]), tuple(data["std"])),
        scale=1 / 255,
    )
    notes: dict[str, Any] = {"family": "timm", "origin": PREFIX + name if file is None else f"{PREFIX}{name}@{file}"}
    if file is not None:
        notes["left_out_keys"] = _load(model, file)
    return TimmBackbone(ModelConfig(name=PREFIX + name), spec, model), notes


def _load(model: nn.Module, file: Path) -> list[str]:
    """Load a file into a model without classifier, converted by timm's own filter for the model's kind.

    Returns:
        The classifier's keys, which are left out.
    """
    state, _, _ = unwrap(read_checkpoint(file), str(file))
    convert: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]] | None = getattr(
        sys.modules[type(model).__module__], "checkpoint_filter_fn", None
    )
    if convert is not None:
        state = convert(state, model)
    names = model.pretrained_cfg.get("classifier") or ()  # type: ignore[union-attr, operator]
    classifiers = (names,) if isinstance(names, str) else tuple(names)
    own = model.state_dict()
    left_out = [key for key in state if key not in own and key.startswith(tuple(f"{n}." for n in classifiers))]
    state = {key: value for key, value in state.items() if key not in left_out}
    odd = [key for key in own if key not in state] + [key for key in state if key not in own]
    odd += [key for key in state if key in own and own[key].shape != state[key].shape]
    if odd:
        listed = ", ".join(odd[:5]) + (", ..." if len(odd) > 5 else "")
        raise UsageError(f"{file}: does not fit the timm model; {len(odd)} keys or shapes differ: {listed}.")
    model.load_state_dict(state)
    return left_out
