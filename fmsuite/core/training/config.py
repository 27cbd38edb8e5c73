"""The ``optim:``, ``training:`` and ``monitor:`` sections."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fmsuite.core.training.durations import Duration


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


_MOMENTUM = ("lars", "sgd")


class OptimConfig(Section):
    """The optimiser and the schedules of its hyper-parameters.

    Attributes:
        name: ``adamw`` (Loshchilov and Hutter 2019), ``lamb`` (You et al. 2020), ``lion`` (Chen et al. 2023), ``lars``
            (You et al. 2017) or ``sgd``. LARS and LAMB adapt the step of tensors that are decayed only.
        lr: peak learning rate, at the reference batch if ``lr_scaling`` is not ``none``.
        lr_scaling, lr_reference_batch: ``linear`` multiplies by batch / reference (MAE, DINO), ``sqrt`` by its root
            (DINOv2).
        warmup, warmup_start: linear warm-up from a learning rate.
        schedule: from the peak to ``lr_end``: half a ``cosine``, a ``linear`` line, a ``poly`` (1 - t)^0.9, or none:
            ``constant``.
        lr_end: where the schedule ends.
        betas: of AdamW, LAMB (0.9, 0.999 if not given) and Lion (0.9, 0.99).
        eps: of AdamW and LAMB (1e-8 and 1e-6 if not given).
        momentum: of SGD and LARS.
        weight_decay, weight_decay_end: cosine from one to the other; constant if the end is not given.
        layer_decay: learning-rate factor for each layer down from the last.
        patch_embed_lr_scale: further factor for the patch embedding (0.2 in DINOv2).
        clip_grad: largest gradient norm, or ``None``.
        clip_per_parameter: clip each parameter's own norm (DINO) rather than the total.
    """

    name: Literal["adamw", "lamb", "lion", "lars", "sgd"] = "adamw"
    lr: float = Field(default=1.5e-4, gt=0)
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    lr_reference_batch: int = Field(default=256, ge=1)
    warmup: Duration = "10%"
    warmup_start: float = Field(default=0.0, ge=0)
    schedule: Literal["cosine", "linear", "poly", "constant"] = "cosine"
    lr_end: float = Field(default=0.0, ge=0)
    betas: tuple[float, float] | None = None
    eps: float | None = Field(default=None, gt=0)
    momentum: float | None = Field(default=None, ge=0, lt=1)
    weight_decay: float = Field(default=0.05, ge=0)
    weight_decay_end: float | None = Field(default=None, ge=0)
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    patch_embed_lr_scale: float = Field(default=1.0, gt=0)
    clip_grad: float | None = Field(default=None, gt=0)
    clip_per_parameter: bool = False

    @model_validator(mode="after")
    def _used(self) -> OptimConfig:
        if (
            self.lr_scaling == "none"
            and self.lr_reference_batch != type(self).model_fields["lr_reference_batch"].default
        ):
            raise ValueError("lr_reference_batch has no effect without lr_scaling: linear or sqrt")
        if self.schedule == "constant" and self.lr_end:
            raise ValueError("lr_end has no effect with schedule: constant")
        for key, users in (("betas", ("adamw", "lamb", "lion")), ("eps", ("adamw", "lamb")), ("momentum", _MOMENTUM)):
            if getattr(self, key) is not None and self.name not in users:
                raise ValueError(f"{key} belongs to {', '.join(users)} and has no effect on {self.name}")
        return self


class TrainingConfig(Section):
    """How long, how much at once, on what.

    Attributes:
        steps, epochs: length of the run; exactly one of them. ``steps`` are optimiser steps.
        batch_size: samples in one optimiser step over all ranks and micro-batches.
        accumulate: micro-batches in one step, whose result is the whole batch's where samples do not know each other;
            statistics of a batch (negatives, Sinkhorn, KoLeo, batch normalisation) are a micro-batch's.
        windows: ``fixed`` reads the index's windows where they lie. ``random`` draws anew, for every sample, where its
            window lies within the box around all windows of the same source.
        split: train on the windows of this split and on those without one; the others are held out, and the monitor
            looks at them. ``null`` trains on all.
        strategy: how processes share the model: each holds all of it (``ddp``) or a part (``fsdp2``); ``auto`` is ddp
            unless the training state would take more than half of a GPU (``choose_strategy``).
        precision: ``auto`` is bf16 where the device computes it natively, float32 elsewhere.
        compile: ``torch.compile`` the backbone's blocks.
        compile_mode: as of ``torch.compile``, on GPUs. ``reduce-overhead`` and ``max-autotune`` replay CUDA graphs,
            which pays where a GPU waits for the host (small models, small batches); they want DDP and no drop-path,
            with which lengths differ from step to step. The ``max-autotune`` modes first try out kernels, for minutes.
        activation_checkpointing: recompute blocks in the backward pass.
        workers: loader processes a rank; -1 chooses from the cores.
        checkpoint_every, keep_checkpoints: optimiser steps between checkpoints, and how many of them stay.
        log_every: optimiser steps between lines of ``metrics.jsonl``.
        max_skipped: share of windows that may be replaced as unreadable before the run stops.
    """

    steps: int | None = Field(default=None, ge=1)
    epochs: float | None = Field(default=None, gt=0)
    batch_size: int = Field(default=64, ge=1)
    accumulate: int = Field(default=1, ge=1)
    windows: Literal["fixed", "random"] = "fixed"
    split: str | None = "train"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    strategy: Literal["auto", "ddp", "fsdp2"] = "auto"
    precision: Literal["auto", "float32", "bf16"] = "auto"
    compile: bool = False
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"
    activation_checkpointing: bool = False
    workers: int = Field(default=-1, ge=-1)
    checkpoint_every: int = Field(default=1000, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    log_every: int = Field(default=10, ge=1)
    max_skipped: float = Field(default=0.1, ge=0, le=1)

    @model_validator(mode="after")
    def _one_length(self) -> TrainingConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of training.steps and training.epochs")
        if self.compile_mode != "default" and not self.compile:
            raise ValueError("training.compile_mode has no effect without training.compile=true")
        return self


class MonitorConfig(Section):
    """What is watched while training.

    Attributes:
        every: optimiser steps between looks at the encoder's features; 0 switches them off.
        samples: windows that are looked at.
        knn_k: neighbours of the online kNN probe (run where windows have labels).
    """

    every: int = Field(default=200, ge=0)
    samples: int = Field(default=512, ge=8)
    knn_k: int = Field(default=20, ge=1)
