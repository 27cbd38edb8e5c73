"""The configuration of ``fmsuite finetune``: sections, as recipes have them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from fmsuite.core.adaptation.task import TASKS, TaskConfig
from fmsuite.core.adaptation.tuning import TuningOptions
from fmsuite.core.config import validate
from fmsuite.core.evaluation.cases import DENSE, TaskName
from fmsuite.core.training.config import OptimConfig, Section, TrainingConfig
from fmsuite.domains.base import DomainOptions, load_domain

SCRATCH = "scratch"


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
        metrics: of a segmentation: ``dice``, ``nsd`` and ``hd95`` are means over the cases, ``iou``, ``f1``,
            ``precision`` and ``recall`` are of all cases' samples together.
        background: of a segmentation, class 0 is what is left: it is not judged, not drawn, and no window of
            ``training.foreground`` is centred on it. Where it is a class as the others are (land cover), false.
        by: of the other tasks, what the mean of the windows' answers stands for.
        replicates, confidence: of the bootstrap intervals.
        write: keep the predictions: label maps in the sources' own format.
    """

    overlap: float = Field(default=0.5, ge=0, lt=1)
    blend: Literal["gaussian", "constant"] = "gaussian"
    batch: int = Field(default=4, ge=1)
    tolerance: float = Field(default=1.0, ge=0)
    metrics: tuple[Literal["dice", "nsd", "hd95", "iou", "f1", "precision", "recall"], ...] = ("dice", "nsd", "hd95")
    background: bool = True
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
        sources: files, folders or one index.parquet.
        encoder: whatever ``load_encoder`` opens.
        targets: a table that names sources or groups and gives them numbers, for multilabel and regression.
        task_name, task: the task and its options, without ``classes``, ``labels`` and ``outputs``, which follow from
            ``classes``.
        classes: names; see ``finetune_file.parse_finetune``.
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
        return [Path(source) for source in self.sources]

    @property
    def label_map(self) -> str | None:
        """Of a task that is learned from one."""
        return self.task.get("label_map") if self.task_name in DENSE else None

    @property
    def first_class(self) -> int:
        """Of a segmentation, the first of its classes that is judged."""
        return int(self.judge.background)

    @property
    def _tune(self) -> str:
        return str(self.task.get("tune", "full"))

    def data_options(self, defaults: Mapping[str, Any] | None = None) -> DomainOptions:
        """The domain's options, with other defaults than its own where some are given."""
        return validate(load_domain(self.domain).Options, {**(defaults or {}), **self.data}, "data", "task")

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
FROM_CLASSES = {
    "classification": "classes",
    "multilabel": "labels",
    "regression": "outputs",
    "segmentation": "classes",
    "change": "classes",
}
