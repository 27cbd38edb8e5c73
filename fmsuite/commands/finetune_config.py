"""The configuration of ``fmsuite finetune``: a YAML file of sections, as recipes have them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from fmsuite.core.adaptation.task import TASKS, TaskConfig
from fmsuite.core.adaptation.tuning import Tune, TuningOptions
from fmsuite.core.config import apply_overrides, read_yaml, validate
from fmsuite.core.evaluation.cases import OVERALL, TaskName
from fmsuite.core.training.config import OptimConfig, Section, TrainingConfig
from fmsuite.domains.base import DomainOptions, load_domain
from fmsuite.errors import UsageError, nearest

SCRATCH = "scratch"
SECTIONS = ("data", "task", "optim", "training", "few", "split", "judge")
TOP_KEYS = ("description", "domain", "seed", "sources", "encoder", "targets", "compare", "scratch", *SECTIONS)


class FewOptions(Section):
    """
    Attributes:
        fractions: of the training groups (patients), at least one of them; smaller ones are parts of larger ones.
        seeds: for each a choice of groups, a start of the weights and an order of samples.
    """

    fractions: tuple[float, ...] = (1.0,)
    seeds: tuple[int, ...] = (0,)

    @model_validator(mode="after")
    def _usable(self) -> FewOptions:
        if not self.fractions or not all(0 < fraction <= 1 for fraction in self.fractions):
            raise ValueError("few.fractions must be above 0 and at most 1, one at least")
        if not self.seeds:
            raise ValueError("few.seeds must name one seed at least")
        if len(set(self.fractions)) < len(self.fractions) or len(set(self.seeds)) < len(self.seeds):
            raise ValueError("few.fractions and few.seeds must differ among themselves")
        return self


class SplitOptions(Section):
    """
    Attributes:
        test: ``column`` takes the sides ``train`` and ``test`` of the labels file; a number below 1 is the share of the
            groups that are held out. If not given: the column where the data has one, else 0.2.
        folds: so many folds instead, each group held out once.
        seed: of a split that is made here; the task's if not given.
    """

    test: Literal["column"] | float | None = None
    folds: int | None = Field(default=None, ge=2)
    seed: int | None = None

    @model_validator(mode="after")
    def _one_way(self) -> SplitOptions:
        if self.folds is not None and self.test is not None:
            raise ValueError("split.test has no effect with split.folds")
        if isinstance(self.test, float) and not 0 < self.test < 1:
            raise ValueError("split.test must be between 0 and 1")
        return self


class JudgeOptions(Section):
    """
    Attributes:
        overlap, blend, batch: of the windows that go over a whole source; see ``sliding_window``. ``batch`` is also
            how many windows the other tasks are asked at a time.
        tolerance: of the normalised surface distance, in the input's unit of length.
        metrics: of a segmentation.
        by: of the other tasks, what the mean of the windows' answers stands for.
        replicates, confidence: of the bootstrap intervals.
        write: keep the predictions: label maps in the sources' own format.
    """

    overlap: float = Field(default=0.5, ge=0, lt=1)
    blend: Literal["gaussian", "constant"] = "gaussian"
    batch: int = Field(default=4, ge=1)
    tolerance: float = Field(default=1.0, ge=0)
    metrics: tuple[Literal["dice", "nsd", "hd95"], ...] = ("dice", "nsd", "hd95")
    by: Literal["source", "group"] = "source"
    replicates: int = Field(default=1000, ge=1)
    confidence: float = Field(default=0.95, gt=0, lt=1)
    write: bool = False

    @model_validator(mode="after")
    def _some_metric(self) -> JudgeOptions:
        if "dice" not in self.metrics or len(set(self.metrics)) < len(self.metrics):
            raise ValueError("judge.metrics must hold dice, and each metric once")
        return self


class Training(TrainingConfig):
    """
    Attributes:
        foreground: with ``windows: random``, the share of windows that are centred on a labelled point, of classes in
            turn; see ``BalancedWindows``. Segmentation only.
    """

    foreground: float = Field(default=0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _drawn(self) -> Training:
        if "split" in self.model_fields_set and self.split is not None:
            raise ValueError("training.split has no effect here; the section split decides")
        if self.foreground and self.windows != "random":
            raise ValueError("training.foreground has no effect without training.windows: random")
        return self

    def plain(self) -> TrainingConfig:
        """For the training loop."""
        return TrainingConfig.model_validate(self.model_dump(exclude={"foreground"}) | {"split": None})


class ArmOptions(Section):
    """One way to train the network.

    Attributes:
        task, optim: what differs from the main sections.
    """

    name: str = Field(pattern=r"^\w[\w.+-]*$")
    task: dict[str, Any] = Field(default_factory=dict)
    optim: dict[str, Any] = Field(default_factory=dict)


class FinetuneConfig(Section):
    """Everything that decides a fine-tuning, apart from the files themselves.

    Attributes:
        sources: files, folders or one index.parquet; ``~`` and environment variables are expanded.
        encoder: whatever ``load_encoder`` opens.
        targets: a table that names sources or groups and gives them numbers, for multilabel and regression.
        task_name, task: the task and its options, without ``classes``, ``labels`` and ``outputs``, which follow from
            ``classes``.
        classes: names; see ``parse_finetune``.
        arms: the first is the task's own.
    """

    domain: str
    seed: int = 0
    sources: tuple[str, ...]
    data: dict[str, Any]
    encoder: str
    targets: str | None = None
    task_name: TaskName
    task: dict[str, Any]
    classes: tuple[str, ...] = ()
    optim: OptimConfig
    training: Training
    arms: tuple[ArmOptions, ...]
    few: FewOptions = FewOptions()
    split: SplitOptions = SplitOptions()
    judge: JudgeOptions = JudgeOptions()

    @property
    def paths(self) -> list[Path]:
        return [Path(os.path.expanduser(os.path.expandvars(source))) for source in self.sources]

    @property
    def label_map(self) -> str | None:
        """Of a segmentation."""
        return self.task.get("label_map") if self.task_name == "segmentation" else None

    @property
    def _tune(self) -> str:
        return str(self.task.get("tune", "full"))

    def data_options(self) -> DomainOptions:
        return validate(load_domain(self.domain).Options, self.data, "data", "task")

    def arm_task(self, arm: ArmOptions, **fixed: Any) -> TaskConfig:
        """The task's options under an arm.

        Args:
            fixed: what the data decide: the number of classes, say.

        Raises:
            UsageError: for options that the task does not have, or that do not go together.
        """
        asked = {**self.task, **arm.task}
        scratch = bool(arm.task.get("scratch"))
        if scratch or arm.task.get("tune", self._tune) != self._tune:
            # Options of the task's own way of tuning say nothing about another.
            others = _OF_TUNING if scratch else _OF_TUNING | {"backbone_lr"}
            asked = {key: value for key, value in asked.items() if key in arm.task or key not in others}
        return validate(TASKS[self.task_name].Config, {**asked, **fixed}, "task", f"arm '{arm.name}'")  # type: ignore[return-value]

    def arm_optim(self, arm: ArmOptions) -> OptimConfig:
        return validate(OptimConfig, {**self.optim.model_dump(exclude_unset=True), **arm.optim}, "optim", arm.name)


_OF_TUNING = {key for key in TuningOptions.model_fields if key not in ("tune", "scratch")} | {"tune"}
_FROM_CLASSES = {
    "classification": "classes",
    "multilabel": "labels",
    "regression": "outputs",
    "segmentation": "classes",
}


def read_finetune(
    path: Path, overrides: Sequence[str] = (), sources: Sequence[Path] = (), encoder: str | None = None
) -> FinetuneConfig:
    """A task's file with ``a.b=value`` overrides.

    Args:
        sources, encoder: in place of the file's.

    Raises:
        UsageError: as ``parse_finetune``.
    """
    raw = apply_overrides(read_yaml(path), overrides)
    if sources:
        raw["sources"] = [str(source) for source in sources]
    if encoder is not None:
        raw["encoder"] = encoder
    return parse_finetune(raw, str(path))


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
    if name == "segmentation":
        task["label_map"] = task.pop("map", None) or "label"
        task.setdefault("scale", (1.0, 1.0))
    sources = raw["sources"]
    training = validate(Training, _section(raw, "training", origin), "training", origin)
    if training.foreground and name != "segmentation":
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
        config.arm_task(arm, **{_FROM_CLASSES[name]: max(2, len(classes))})
        config.arm_optim(arm)
    return config


def class_option(task: str) -> str:
    """The option of a task that counts its classes."""
    return _FROM_CLASSES[task]


def _check_task(name: str, task: Mapping[str, Any], classes: Sequence[str], targets: object, origin: str) -> None:
    if (own := _FROM_CLASSES[name]) in task and own != "classes":
        raise UsageError(f"{origin}: task.{own} follows from task.classes.", "Name them there.")
    if name == "segmentation" and len(classes) < 2:
        raise UsageError(
            f"{origin}: task.classes must name the values of the label map from 0 on, the background included.",
            "Such as [background, tumour].",
        )
    if name == "multilabel" and not (classes and targets):
        raise UsageError(
            f"{origin}: a multilabel task needs 'targets', a table with a column of 0, 1 or nothing for each label, "
            "and its columns in task.classes.",
            "Name both.",
        )
    if name == "regression" and targets and not classes:
        raise UsageError(f"{origin}: which columns of 'targets' are to be predicted?", "Name them in task.classes.")
    if targets and name in ("segmentation", "classification"):
        raise UsageError(f"{origin}: 'targets' has no effect on a {name}.", "Remove it.")
    if "map" in task and name != "segmentation":
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
