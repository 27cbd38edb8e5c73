"""A task's YAML file, read and checked."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from fmsuite import configs
from fmsuite.commands.finetune_config import (
    FROM_CLASSES,
    SCRATCH,
    ArmOptions,
    FewOptions,
    FinetuneConfig,
    JudgeOptions,
    SplitOptions,
    Training,
)
from fmsuite.core.adaptation.task import TASKS
from fmsuite.core.adaptation.tuning import Tune
from fmsuite.core.config import apply_overrides, read_yaml, validate
from fmsuite.core.evaluation.cases import DENSE, OVERALL
from fmsuite.core.training.config import OptimConfig
from fmsuite.errors import UsageError, nearest

TASK_FILES = Path(configs.__file__).parent / "tasks"
SECTIONS = ("data", "task", "optim", "training", "few", "split", "judge")
TOP_KEYS = ("description", "domain", "seed", "sources", "encoder", "targets", "compare", "scratch", *SECTIONS)


def read_finetune(
    path: Path, overrides: Sequence[str] = (), sources: Sequence[Path] = (), encoder: str | None = None
) -> FinetuneConfig:
    """A task's file with ``a.b=value`` overrides; ``~`` and environment variables in paths are replaced.

    Args:
        path: or the name of a task that comes with the package.
        sources, encoder: in place of the file's.

    Raises:
        UsageError: as ``parse_finetune``.
    """
    raw = apply_overrides(read_yaml(_found(path)), overrides)
    if sources:
        raw["sources"] = [str(source) for source in sources]
    if encoder is not None:
        raw["encoder"] = encoder
    for key in ("sources", "data", "encoder", "targets"):
        if key in raw:
            raw[key] = _expanded(raw[key], key)
    return parse_finetune(raw, str(path))


def _found(path: Path) -> Path:
    """A file, or the name of a task that comes with the package.

    Raises:
        UsageError: naming the nearest known task.
    """
    if path.suffix in (".yaml", ".yml"):
        return path
    known = {task.stem: task for task in TASK_FILES.glob("*.yaml")}
    if path.name not in known or len(path.parts) > 1:
        raise UsageError(f"There is no task '{path}'.", f"Give a YAML file, or a name. {nearest(str(path), known)}")
    return known[path.name]


def _expanded(value: Any, key: str) -> Any:
    """With ``~`` and environment variables in every text replaced.

    Raises:
        UsageError: naming a variable that is not set.
    """
    if isinstance(value, Mapping):
        return {name: _expanded(inner, f"{key}.{name}") for name, inner in value.items()}
    if isinstance(value, list):
        return [_expanded(inner, key) for inner in value]
    if not isinstance(value, str):
        return value
    whole = os.path.expanduser(os.path.expandvars(value))
    unset = re.search(r"\$\{?(\w+)", whole)
    if unset is not None:
        raise UsageError(f"{key}: the environment variable {unset[1]} is not set.", "Set it, or write the path out.")
    return whole


def parse_finetune(raw: Mapping[str, Any], origin: str) -> FinetuneConfig:
    """Check a plain mapping against the schema.

    In ``task``, ``name`` is the task; ``classes`` are names: of a segmentation those of the values 0, 1 and so on of
    its label map ``map``, of a multilabel task or a regression the columns of ``targets``, of a classification the
    classes themselves (those of the data, if not given). Everything else is an option of the task.

    Raises:
        UsageError: for an unknown key (with the nearest right one), a value of the wrong kind, or a missing key.
    """
    for key in raw:
        if key not in TOP_KEYS:
            raise UsageError(f"{origin}: unknown key '{key}'.", nearest(key, TOP_KEYS))
    for key in ("domain", "encoder", "sources", "task"):
        if not raw.get(key):
            hints = {"encoder": "Name one, or give --encoder.", "sources": "Name files or folders, or give --data."}
            raise UsageError(f"{origin}: '{key}' is missing.", hints.get(key, "Name one."))
    task = _section(raw, "task", origin)
    name = task.pop("name", None)
    if name not in TASKS:
        raise UsageError(f"{origin}: task.name: there is no task '{name}'.", nearest(str(name), TASKS))
    classes = task.pop("classes", None) or []
    if not isinstance(classes, list) or not all(isinstance(c, str) for c in classes) or len({*classes}) < len(classes):
        raise UsageError(f"{origin}: task.classes must be a list of different names, not {classes!r}.")
    if OVERALL in classes:
        raise UsageError(f"{origin}: a class cannot be called '{OVERALL}'.", "Results call the mean over all so.")
    _check_task(name, task, classes, raw.get("targets"), origin)
    if name in DENSE:
        task["label_map"] = task.pop("map", None) or "label"
        task.setdefault("scale", (1.0, 1.0))
    sources = raw["sources"]
    training = validate(Training, _section(raw, "training", origin), "training", origin)
    if training.foreground and name not in DENSE:
        raise UsageError(f"{origin}: training.foreground has no effect on a {name}.", "Remove it.")
    config = FinetuneConfig(
        domain=str(raw["domain"]),
        seed=_whole(raw.get("seed", 0), "seed", origin),
        sources=tuple(str(s) for s in ([sources] if isinstance(sources, str) else sources)),
        data=_section(raw, "data", origin),
        encoder=str(raw["encoder"]),
        targets=None if raw.get("targets") is None else str(raw["targets"]),
        task_name=name,
        task=task,
        classes=tuple(classes),
        optim=validate(OptimConfig, _section(raw, "optim", origin), "optim", origin),
        training=training,
        arms=_arms(raw, task, origin),
        few=validate(FewOptions, _section(raw, "few", origin), "few", origin),
        split=validate(SplitOptions, _section(raw, "split", origin), "split", origin),
        judge=validate(JudgeOptions, _section(raw, "judge", origin), "judge", origin),
    )
    config.data_options()
    for arm in config.arms:
        config.arm_task(arm, **{FROM_CLASSES[name]: max(2, len(classes))})
        config.arm_optim(arm)
    return config


def _check_task(name: str, task: Mapping[str, Any], classes: Sequence[str], targets: object, origin: str) -> None:
    if (own := FROM_CLASSES[name]) in task and own != "classes":
        raise UsageError(f"{origin}: task.{own} follows from task.classes.", "Name them there.")
    if name in DENSE and len(classes) < 2:
        raise UsageError(
            f"{origin}: task.classes must name the values of the label map from 0 on, the background included.",
            "Such as [background, tumour]; where 0 is a class as the others are, set judge.background to false.",
        )
    if name == "multilabel" and not (classes and targets):
        raise UsageError(
            f"{origin}: a multilabel task needs 'targets', a table with a column of 0, 1 or nothing for each label, "
            "and its columns in task.classes.",
            "Name both.",
        )
    if name == "regression" and targets and not classes:
        raise UsageError(f"{origin}: which columns of 'targets' are to be predicted?", "Name them in task.classes.")
    if targets and name in (*DENSE, "classification"):
        raise UsageError(f"{origin}: 'targets' has no effect on a {name}.", "Remove it.")
    if "map" in task and name not in DENSE:
        raise UsageError(f"{origin}: task.map has no effect on a {name}.", "Remove it.")
    if task.get("scratch"):
        raise UsageError(f"{origin}: the network from scratch is an arm of its own.", "Remove task.scratch.")


def _arms(raw: Mapping[str, Any], task: Mapping[str, Any], origin: str) -> tuple[ArmOptions, ...]:
    """The task's own arm, then the control unless ``scratch: false``, then what else ``compare`` names."""
    wanted = raw.get("compare")
    listed = [] if wanted is None else wanted
    if not isinstance(listed, list):
        raise UsageError(f"{origin}: compare must be a list such as [scratch, frozen, lora], not {listed!r}.")
    control = raw.get("scratch", True)
    if not isinstance(control, bool):
        raise UsageError(f"{origin}: scratch must be true or false, not {control!r}.")
    arms = [ArmOptions(name=str(task.get("tune", "full"))), *(_arm(item, origin) for item in listed)]
    has = any(arm.name == SCRATCH for arm in arms)
    if control and not has:
        arms.insert(1, _arm(SCRATCH, origin))
    if not control and has:
        raise UsageError(f"{origin}: compare names scratch, and scratch is false.", "Decide on one.")
    names = [arm.name for arm in arms]
    twice = next((name for number, name in enumerate(names) if name in names[:number]), None)
    if twice is not None:
        raise UsageError(f"{origin}: compare: there are two arms called '{twice}'.", "Give one another name.")
    return tuple(arms)


def _arm(item: object, origin: str) -> ArmOptions:
    if isinstance(item, str):
        if item not in (SCRATCH, *get_args(Tune)):
            raise UsageError(
                f"{origin}: compare: there is no way to tune called '{item}'.",
                nearest(item, (SCRATCH, *get_args(Tune))),
            )
        arm = ArmOptions(name=item, task={} if item == SCRATCH else {"tune": item})
    else:
        arm = validate(ArmOptions, item, "compare", origin)  # type: ignore[arg-type]
    if arm.task.get("scratch") is not None:
        raise UsageError(f"{origin}: compare: the control is the arm whose name is scratch.", "Remove task.scratch.")
    if arm.name != SCRATCH:
        return arm
    # What was pretrained is to be changed little where it lies deep; fresh weights are to be changed alike.
    return ArmOptions(name=SCRATCH, task={**arm.task, "scratch": True}, optim={"layer_decay": 1.0, **arm.optim})


def _section(raw: Mapping[str, Any], key: str, origin: str) -> dict[str, Any]:
    section = raw.get(key)
    if section is not None and not isinstance(section, Mapping):
        raise UsageError(f"{origin}: '{key}' must be a section with keys, not {section!r}.")
    return dict(section or {})


def _whole(value: object, key: str, origin: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise UsageError(f"{origin}: {key} must be a whole number, not {value!r}.")
    return value
