"""The state of a training run as one dictionary of tensors, by names that say nothing about ranks.

``objective.NAME`` are the objective's parameters and buffers, ``optimizer.PARAMETER.STATE`` what the optimiser keeps
for a parameter, ``group.NUMBER.KEY`` what it keeps for a group (LAMB counts its steps there). Everything else about an
optimiser is a function of the configuration and the step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fmsuite.core.objectives.base import Objective
from fmsuite.core.training.checkpoint_files import Stored
from fmsuite.errors import FmsuiteError

OBJECTIVE, OPTIMIZER, GROUP = "objective.", "optimizer.", "group."


def training_state(objective: Objective, optimizer: Optimizer) -> dict[str, Tensor]:
    """Tensors as they are: whole, or this rank's part (``DTensor``). They are the run's own and not copies.

    A parameter that has not been updated yet has no optimiser state, and gets none when the state is read back.
    """
    state = {f"{OBJECTIVE}{name}": value for name, value in objective.state_dict().items()}
    for name, parameter in _named(optimizer).items():
        state |= {f"{OPTIMIZER}{name}.{key}": value for key, value in optimizer.state.get(parameter, {}).items()}
    for number, group in enumerate(optimizer.param_groups):
        state |= {f"{GROUP}{number}.{key}": value for key, value in group.items() if isinstance(value, Tensor)}
    return state


def targets(objective: Objective, optimizer: Optimizer, stored: Mapping[str, Stored]) -> dict[str, Tensor]:
    """Empty tensors for a stored state: where a tensor belongs to a parameter and has its shape, cut as that is.

    Raises:
        FmsuiteError: naming what does not fit this objective.
    """
    own, parameters = objective.state_dict(), _named(optimizer)
    found = {}
    for name, each in stored.items():
        like: Tensor | None = None
        known = True
        if name.startswith(OBJECTIVE):
            like = own.get(name.removeprefix(OBJECTIVE))
            known = like is not None and like.shape == each.shape
        elif name.startswith(OPTIMIZER):
            owner, _, key = name.removeprefix(OPTIMIZER).rpartition(".")
            known = owner in parameters
            # A count of steps lies on the host, unless the optimiser wants it elsewhere and moves it.
            if known and parameters[owner].shape == each.shape and key != "step":
                like = parameters[owner].detach()
        if not known:
            raise FmsuiteError(
                f"The checkpoint's '{name}' has no place in this objective, or another shape.",
                "Resume with the version of fmsuite that wrote it.",
            )
        found[name] = (
            torch.empty(each.shape, dtype=each.dtype) if like is None else torch.empty_like(like, dtype=each.dtype)
        )
    return found


def restore_state(objective: Objective, optimizer: Optimizer, state: Mapping[str, Tensor]) -> None:
    """The inverse of ``training_state``."""
    objective.load_state_dict(
        {name.removeprefix(OBJECTIVE): value for name, value in state.items() if name.startswith(OBJECTIVE)}
    )
    numbers = {name: number for number, name in enumerate(_named(optimizer))}
    whole = optimizer.state_dict()
    moments: dict[int, dict[str, Any]] = {}
    for name, value in state.items():
        if name.startswith(OPTIMIZER):
            owner, _, key = name.removeprefix(OPTIMIZER).rpartition(".")
            moments.setdefault(numbers[owner], {})[key] = value
        elif name.startswith(GROUP):
            number, _, key = name.removeprefix(GROUP).partition(".")
            whole["param_groups"][int(number)][key] = value
    optimizer.load_state_dict({**whole, "state": moments})


def _named(optimizer: Optimizer) -> dict[str, nn.Parameter]:
    """The optimiser's parameters by name, in its own order."""
    return {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }
