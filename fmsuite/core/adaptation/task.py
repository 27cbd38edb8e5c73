"""Supervised tasks in the shape of objectives, so that the training loop trains them: with its checkpoints, ranks,
schedules and layer-wise rates."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import nullcontext
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from fmsuite.core.adaptation.date_pairs import Compare
from fmsuite.core.adaptation.dense import DenseNetwork
from fmsuite.core.adaptation.freezing import is_frozen
from fmsuite.core.adaptation.losses import (
    bce,
    counted,
    cross_entropy,
    deep_supervision,
    dice_ce,
    dice_loss,
    regression,
)
from fmsuite.core.adaptation.tuning import TuningOptions, tuned
from fmsuite.core.backbones.base import Backbone, Features
from fmsuite.core.backbones.datewise import TIME
from fmsuite.core.data.sample import Batch, PairRequest, View, ViewRequest
from fmsuite.core.inputs import SPATIAL_AXES
from fmsuite.core.objectives.base import Objective, ParameterRule, StepContext, crop_size
from fmsuite.core.objectives.single_view import VIEW, ViewOptions
from fmsuite.errors import UsageError


class TaskConfig(TuningOptions, ViewOptions):
    """The options of ``TuningOptions`` and of ``ViewOptions``.

    Attributes:
        backbone_lr: factor of the backbone's learning rate, beside that of ``optim.layer_decay``: a decoder that starts
            from nothing wants more than a transformer bears.
    """

    backbone_lr: float = Field(default=1.0, gt=0)


class Task(Objective):
    """Base of the tasks: one view of each sample, a backbone that trains as the options say, and a head.

    Raises:
        UsageError: if the backbone cannot be tuned so, or cannot take the view's size.
    """

    config: TaskConfig

    def __init__(self, config: TaskConfig, backbone: Backbone) -> None:
        super().__init__(config, tuned(backbone, config))
        bag = self.backbone.grid is None
        if bag and config.size is not None:
            raise UsageError("objective.size is set, but the input is a bag of vectors.", "Remove it.")
        self.size = () if bag else crop_size(self, "size", config.size, self.backbone.spec.size)
        self.frozen = is_frozen(self.backbone)

    def view_requests(self) -> tuple[ViewRequest, ...]:
        return (self.config.request(VIEW, self.size),)

    def parameter_rule(self, name: str) -> ParameterRule:
        return ParameterRule(lr_scale=self.config.backbone_lr if name.startswith("backbone.") else 1.0)

    def train(self, mode: bool = True) -> Task:
        """A frozen backbone stays in evaluation mode: no drop-path, and no batch statistics that follow the data."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def forward(self, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        (view,) = batch.views[VIEW]
        return {"loss": self.loss(view, batch)}

    @abstractmethod
    def loss(self, view: View, batch: Batch) -> Tensor:
        """The scalar to minimise; zero where nothing of the batch is labelled."""

    @abstractmethod
    def predict(self, view: View) -> Tensor:
        """What the task is about, float32, of a normalised view."""


class PooledTaskConfig(TaskConfig):
    """
    Attributes:
        pooling: how tokens become one vector; the class token, or the mean where there is none, if not given.
        head_dropout: of that vector.
    """

    pooling: Literal["cls", "mean", "cls+mean"] | None = None
    head_dropout: float = Field(default=0.0, ge=0, lt=1)


class PooledTask(Task):
    """Base of the tasks with a linear head on one vector of each sample."""

    config: PooledTaskConfig

    def __init__(self, config: PooledTaskConfig, backbone: Backbone, outputs: int) -> None:
        super().__init__(config, backbone)
        if config.pooling in ("cls", "cls+mean"):
            self.need(has_cls=True)
        width = self.backbone.width * (2 if self.pooling == "cls+mean" else 1)
        self.dropout = nn.Dropout(config.head_dropout)
        self.head = nn.Linear(width, outputs)
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    @property
    def pooling(self) -> str:
        return self.config.pooling or ("cls" if self.backbone.has_cls else "mean")

    def outputs(self, view: View) -> tuple[Tensor, Tensor]:
        """(B, K) of the head, and (B,) bool whether a sample has a valid token."""
        with torch.no_grad() if self.frozen else nullcontext():
            features: Features = self.backbone(view)
            pooled = features.pooled(self.pooling)
        return self.head(self.dropout(pooled)), features.usable


class ClassificationConfig(PooledTaskConfig):
    """
    Attributes:
        classes: K.
        label_smoothing: share of the target that is spread over all classes.
    """

    classes: int = Field(ge=2)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)


class Classification(PooledTask):
    """One class for each sample, from ``Batch.labels``; unlabelled samples (-1) do not count."""

    name = "classification"
    Config = ClassificationConfig
    config: ClassificationConfig

    def __init__(self, config: ClassificationConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone, config.classes)

    def loss(self, view: View, batch: Batch) -> Tensor:
        logits, usable = self.outputs(view)
        known = counted(batch.labels, usable)
        _check_labels(batch.labels, known, self.config.classes, "labels")
        return cross_entropy(logits, batch.labels, known, self.config.label_smoothing)

    def predict(self, view: View) -> Tensor:
        """(B, K) probabilities."""
        return self.outputs(view)[0].float().softmax(1)


class MultiLabelConfig(PooledTaskConfig):
    """
    Attributes:
        labels: K.
    """

    labels: int = Field(ge=1)


class MultiLabel(PooledTask):
    """Any number of K labels for each sample, from ``Batch.pairs``: 1 has it, 0 has it not, below 0 unknown."""

    name = "multilabel"
    Config = MultiLabelConfig
    needs_pairs: ClassVar[bool] = True
    config: MultiLabelConfig

    def __init__(self, config: MultiLabelConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone, config.labels)

    def pair_request(self) -> PairRequest:
        return PairRequest(width=self.config.labels)

    def loss(self, view: View, batch: Batch) -> Tensor:
        logits, usable = self.outputs(view)
        target = _partners(batch)
        return bce(logits, target, (target >= 0) & usable[:, None])

    def predict(self, view: View) -> Tensor:
        """(B, K) probabilities."""
        return self.outputs(view)[0].float().sigmoid()


class RegressionConfig(PooledTaskConfig):
    """
    Attributes:
        outputs: numbers to predict.
        error: ``mse``, ``l1`` or ``huber``, of targets in standard deviations.
        target_mean, target_std: of each of them, over the training samples; 0 and 1 if not given.
    """

    outputs: int = Field(default=1, ge=1)
    error: Literal["mse", "l1", "huber"] = "mse"
    target_mean: tuple[float, ...] | None = None
    target_std: tuple[float, ...] | None = None


class Regression(PooledTask):
    """Numbers for each sample, from ``Batch.pairs``; NaN where one is unknown.

    Raises:
        UsageError: if means or deviations are not as many as the outputs, or a deviation is not above 0.
    """

    name = "regression"
    Config = RegressionConfig
    needs_pairs: ClassVar[bool] = True
    config: RegressionConfig
    mean: Tensor
    std: Tensor

    def __init__(self, config: RegressionConfig, backbone: Backbone) -> None:
        mean = config.target_mean or (0.0,) * config.outputs
        std = config.target_std or (1.0,) * config.outputs
        if len(mean) != config.outputs or len(std) != config.outputs or min(std) <= 0:
            raise UsageError(
                f"objective.target_mean {mean} and target_std {std} do not fit {config.outputs} outputs.",
                "Give one number for each, and deviations above 0.",
            )
        super().__init__(config, backbone, config.outputs)
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)

    def pair_request(self) -> PairRequest:
        return PairRequest(width=self.config.outputs)

    def loss(self, view: View, batch: Batch) -> Tensor:
        values, usable = self.outputs(view)
        target = (_partners(batch) - self.mean) / self.std
        return regression(values, target, target.isfinite() & usable[:, None], self.config.error)

    def predict(self, view: View) -> Tensor:
        """(B, outputs) in the targets' units."""
        return self.outputs(view)[0].float() * self.std + self.mean


class SegmentationConfig(TaskConfig):
    """
    Attributes:
        classes: K, background included.
        label_map: name of the sample's label map.
        ignore_index: the label of what is not to be learned from.
        decoder, decoder_options: see ``dense.DECODERS``.
        layers: blocks that the decoder reads; an even spread if not given.
        deep: outputs of deep supervision.
        error: ``ce``, ``dice`` or ``dice_ce``.
        dice_background, dice_batch: see ``dice_loss``.
    """

    classes: int = Field(ge=2)
    label_map: str
    ignore_index: int | None = -1
    decoder: Literal["linear", "unetr", "upernet", "dpt"] = "unetr"
    decoder_options: dict[str, Any] = Field(default_factory=dict)
    layers: tuple[int, ...] | None = None
    deep: int = Field(default=0, ge=0)
    error: Literal["ce", "dice", "dice_ce"] = "dice_ce"
    dice_background: bool = False
    dice_batch: bool = False


class Segmentation(Task):
    """A class for every sample of the input along its spatial axes, from a label map that the view brings.

    Invalid input does not count. Along axes that are not spatial (dates) the map is alike: it has the spatial axes
    alone, or its first entry along the others is read; a place counts where any date is valid.
    """

    name = "segmentation"
    Config = SegmentationConfig
    config: SegmentationConfig

    def __init__(self, config: SegmentationConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        options = {**config.decoder_options, **({"deep": config.deep} if config.deep else {})}
        self.network = DenseNetwork(
            self.backbone, config.decoder, config.classes, config.layers, compare=self.compare, **options
        )
        axes = self.backbone.spec.axes
        self._others = [number for number, axis in enumerate(axes, start=1) if axis not in SPATIAL_AXES]

    def view_requests(self) -> tuple[ViewRequest, ...]:
        request = self.config.request(VIEW, self.size)
        return (ViewRequest(**{**vars(request), "maps": (self.config.label_map,)}),)

    @property
    def pooling(self) -> str:
        return "mean"

    @property
    def compare(self) -> Compare | None:
        """What of the feature maps of two dates is decoded; ``None`` decodes their mean."""
        return None

    def seen(self, valid: Tensor) -> Tensor:
        """(B, *axes) bool, whether a value is valid, to (B, *spatial axes): which places count."""
        return valid.any(self._others) if self._others else valid

    def loss(self, view: View, batch: Batch) -> Tensor:
        target = view.maps[self.config.label_map].long()
        if target.dim() == 1 + len(self.backbone.spec.axes):
            for axis in reversed(self._others):
                target = target.select(axis, 0)
        valid = torch.ones_like(view.pixels[:, 0], dtype=torch.bool) if view.valid is None else view.valid.any(1)
        seen = self.seen(valid)
        known = counted(target, seen, self.config.ignore_index)
        _check_labels(target, known, self.config.classes, f"the label map '{self.config.label_map}'")
        outputs = self._outputs(view)
        pad = [
            amount
            for whole, length in zip(reversed(outputs[0].shape[2:]), reversed(target.shape[1:]))
            for amount in (0, whole - length)
        ]
        return deep_supervision(outputs, F.pad(target, pad), F.pad(known, pad), self._error)

    def predict(self, view: View) -> Tensor:
        """(B, K, *size) probabilities, at the view's size along the spatial axes."""
        return self.network.logits(view).softmax(1)

    def _outputs(self, view: View) -> list[Tensor]:
        with torch.no_grad() if self.frozen else nullcontext():
            maps = self.network.source(view)
        return self.network.decoder(maps)  # type: ignore[no-any-return]

    def _error(self, logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        config = self.config
        if config.error == "ce":
            return cross_entropy(logits, target, valid)
        loss = dice_loss if config.error == "dice" else dice_ce
        return loss(logits, target, valid, background=config.dice_background, batch=config.dice_batch)


class ChangeConfig(SegmentationConfig):
    """
    Attributes:
        compare: what of the two dates' feature maps the decoder reads; see ``date_pairs.Compare``.
    """

    compare: Compare = "difference"


class Change(Segmentation):
    """A class for every place of a series of two dates, such as whether it changed in between; otherwise as
    ``Segmentation``. A place counts where both dates are valid."""

    name = "change"
    Config = ChangeConfig
    config: ChangeConfig

    @property
    def compare(self) -> Compare:
        return self.config.compare

    def seen(self, valid: Tensor) -> Tensor:
        both = valid.all(self._others) if self._others else valid
        # A batch of which no series has a second date has nothing to compare.
        return both & (valid.shape[1 + self.backbone.spec.axes.index(TIME)] > 1)


TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Classification, MultiLabel, Regression, Segmentation, Change)
}


def _partners(batch: Batch) -> Tensor:
    if batch.pairs is None:
        raise ValueError("the batch has no targets: the loader was not told of the task's pair_request")
    return batch.pairs


def _check_labels(labels: Tensor, known: Tensor, classes: int, what: str) -> None:
    """
    Raises:
        UsageError: for a label that is no class. On a GPU, where looking would make it wait, indexing fails instead.
    """
    if labels.device.type != "cpu":
        return
    bad = labels[known & ((labels < 0) | (labels >= classes))]
    if len(bad):
        raise UsageError(
            f"A value of {what} is {int(bad[0])}, but there are {classes} classes, counted from 0.",
            "Correct objective.classes, or give what is not to be learned from as the label to ignore.",
        )
