"""What an objective is to the training loop, and the registry of objectives."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict
from torch import Tensor, nn

from fmsuite.core.backbones.base import Backbone
from fmsuite.core.data.sample import Batch, PairRequest, SupportRequest, ViewRequest
from fmsuite.core.objectives.reconstruction import Reconstruction
from fmsuite.errors import UsageError, nearest


def _share(bounds: tuple[float, float]) -> tuple[float, float]:
    if not 0 < bounds[0] <= bounds[1] <= 1:
        raise ValueError("give a range above 0 and at most 1, its lower end first, such as [0.2, 1.0]")
    return bounds


def _aspects(bounds: tuple[float, float]) -> tuple[float, float]:
    if not 0 < bounds[0] <= bounds[1] < math.inf:
        raise ValueError("give a range above 0, its lower end first, such as [0.75, 1.33]")
    return bounds


Share = Annotated[tuple[float, float], AfterValidator(_share)]
"""An option for the range of a crop's share of the sample."""
AspectRange = Annotated[tuple[float, float], AfterValidator(_aspects)]
"""An option for the range of a crop's aspect ratio."""


class ObjectiveConfig(BaseModel):
    """Base of every objective's options; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class StepContext:
    """Where training stands; every schedule is a function of it, so nothing has to be restored on resume.

    Attributes:
        step: optimiser steps already taken.
        total_steps: length of the run.
        steps_per_epoch: optimiser steps in one pass over the index (at least 1).
        batch_size: the global batch.
    """

    step: int
    total_steps: int
    steps_per_epoch: int
    batch_size: int


@dataclass(frozen=True)
class Card:
    """What ``docs/objectives.md`` says of an objective; cost and results are measured.

    Attributes:
        family: ``pixels`` (and hand-made targets), ``tokens`` (learned targets), ``embedding`` (joint embedding),
            ``predictive``, or ``pairs``.
        paper: authors, year and arXiv number.
        predicts: what, from what.
        masks: what the student does not see; "nothing" where it sees all.
        checked: against what its numbers were held.
    """

    family: Literal["pixels", "tokens", "embedding", "predictive", "pairs"]
    paper: str
    predicts: str
    masks: str
    checked: str


@dataclass(frozen=True)
class ParameterRule:
    """How the optimiser treats a parameter outside the backbone.

    Attributes:
        lr_scale: factor of the learning rate.
        scheduled: follow the schedule; otherwise the peak learning rate throughout (SimSiam's predictor).
        decayed: weight decay applies where it applies to such tensors at all.
    """

    lr_scale: float = 1.0
    scheduled: bool = True
    decayed: bool = True


class Objective(nn.Module, ABC):
    """A way to pretrain: declares its views, maps a batch to named losses, owns its heads, teacher and predictor.

    Lifecycle of one optimiser step: ``forward`` (once for each micro-batch), backward, ``before_update`` (gradients are
    there, parameters not yet changed), optimiser, ``after_update``.

    A subclass keeps the student at ``self.backbone`` (parameter groups rely on it) and reads every configuration value
    from ``self.config``.
    """

    name: ClassVar[str]
    Config: ClassVar[type[ObjectiveConfig]]
    card: ClassVar[Card | None] = None
    needs_pairs: ClassVar[bool] = False
    """It trains on windows that a table pairs with texts or vectors (``--pairs``)."""
    batch_statistic: ClassVar[str | None] = None
    """What of the loss is a statistic of the batch, in words, and with accumulation one of a micro-batch."""

    def __init__(self, config: ObjectiveConfig, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone

    @abstractmethod
    def view_requests(self) -> tuple[ViewRequest, ...]:
        """The views to cut from each sample."""

    def support_request(self) -> SupportRequest | None:
        """Labelled windows that come with every batch, in ``Batch.support``."""
        return None

    def check_batch(self, samples: int) -> None:
        """Refuse a batch that is too small, before training.

        Args:
            samples: of a micro-batch over all ranks.

        Raises:
            UsageError: if the objective cannot be computed on so few.
        """

    def target_count(self, batch: Batch) -> Tensor | None:
        """How many targets the loss of a batch is the mean over, for objectives whose loss is one such mean: of
        micro-batches those with more of them then count for more, as in the undivided batch. ``None``: all count the
        same.

        Args:
            batch: this rank's, as the loader makes it, on the host.

        Returns:
            () of any dtype.
        """
        return None

    def pair_request(self) -> PairRequest | None:
        """What is paired with every sample, in ``Batch.pairs``; of objectives with ``needs_pairs``."""
        return None

    @abstractmethod
    def forward(self, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        """Named scalar losses of normalised views on the module's device; ``"loss"`` is the one to minimise, the
        others are its parts, for the log. Across ranks, losses are means over the global batch: where a count varies
        between ranks, use ``core.distributed.all_mean`` on it."""

    def before_update(self, context: StepContext) -> None:
        """Change gradients: freeze a last layer, for instance."""

    def after_update(self, context: StepContext) -> None:
        """Called once after each optimiser step: move an EMA teacher, for instance."""

    def parameter_rule(self, name: str) -> ParameterRule:
        """How to train a parameter, by its name in this module; the backbone's follow ``optim``'s layer-wise rules as
        well."""
        return ParameterRule()

    def reconstruct(self, batch: Batch) -> Reconstruction | None:
        """What the objective fills in for hidden pixels; ``None`` of those that predict something else.

        Args:
            batch: normalised views, as for ``forward``.
        """
        return None

    def export(self, folder: Path) -> None:
        """Called once at the end of a run: write what another run needs of this one beside its encoder.

        Args:
            folder: the run folder; ``encoder.safetensors`` is there.
        """

    @property
    def encoder(self) -> Backbone:
        """The network to probe and export: the teacher where there is one (frozen copies are fine)."""
        return self.backbone

    @property
    def pooling(self) -> str:
        """How the encoder's tokens become one vector, by this objective's convention."""
        return "cls" if self.encoder.has_cls else "mean"

    def need(self, **capabilities: bool) -> None:
        """Refuse a backbone that cannot do something: ``self.need(can_drop_tokens=True)``.

        Raises:
            UsageError: naming the backbone and what it lacks.
        """
        for capability in capabilities:
            lack = self.backbone.lacks(capability)
            if lack:
                raise UsageError(
                    f"Objective '{self.name}' does not work with this {type(self.backbone).__name__}, which {lack}.",
                    "Choose another model or another objective.",
                )


def crop_size(
    objective: Objective, key: str, given: int | tuple[int, ...] | None, default: tuple[int, ...]
) -> tuple[int, ...]:
    """The size of an objective's crops along every axis.

    Raises:
        UsageError: naming the option ``key``, if patches do not divide the size; if the input is a bag of vectors, or
            the backbone cannot take another size than its own.
    """
    backbone = objective.backbone
    if backbone.grid is None:
        raise UsageError(f"Objective '{objective.name}' crops a grid; a bag of vectors has none.", "Choose another.")
    try:
        size = default if given is None else backbone.spec.expand(given)
        backbone.grid.shape(size)
    except UsageError as error:
        raise UsageError(f"objective.{key}: {error.message}", error.hint) from error
    if size != backbone.spec.size:
        objective.need(can_resize=True)
    return size


def check_heads(config: ObjectiveConfig, part: str) -> None:
    """
    Raises:
        UsageError: if the option ``PART_heads`` does not divide ``PART_width``.
    """
    width, heads = getattr(config, f"{part}_width"), getattr(config, f"{part}_heads")
    if width % heads:
        raise UsageError(
            f"objective.{part}_width {width} is not a multiple of objective.{part}_heads {heads}.",
            "Change one of them.",
        )


def check_company(objective: Objective, samples: int) -> None:
    """``check_batch`` of the objectives that compare samples with each other.

    Raises:
        UsageError: for a batch of one.
    """
    if samples < 2:
        raise UsageError(
            f"Objective '{objective.name}' compares the samples of a batch, and a batch of one has no other.",
            "Raise training.batch_size, or lower training.accumulate.",
        )


OBJECTIVES: dict[str, type[Objective]] = {}


def register(objective: type[Objective]) -> type[Objective]:
    """Class decorator: make an objective selectable by its ``name``.

    Raises:
        ValueError: if the name is taken by another class.
    """
    if OBJECTIVES.get(objective.name, objective).__qualname__ != objective.__qualname__:
        raise ValueError(f"two objectives are called '{objective.name}'")
    OBJECTIVES[objective.name] = objective
    return objective


def find_objective(name: str) -> type[Objective]:
    """
    Raises:
        UsageError: naming the nearest known objective.
    """
    if name not in OBJECTIVES:
        raise UsageError(f"There is no objective '{name}'.", nearest(name, OBJECTIVES))
    return OBJECTIVES[name]
