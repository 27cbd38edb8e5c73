"""How the processes of a run share a model: each holds all of it (DDP), or a part of every tensor (FSDP2)."""

from __future__ import annotations

import copy
import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fmsuite.core.backbones.base import Backbone
from fmsuite.core.distributed import active, all_mean, all_sum, is_main, world_size
from fmsuite.core.objectives.base import Objective
from fmsuite.core.objectives.frozen import FrozenTeacher
from fmsuite.core.training.config import OptimConfig
from fmsuite.core.training.optim import clip_gradients
from fmsuite.core.training.precision import Precision
from fmsuite.errors import UsageError

logger = logging.getLogger("fmsuite")

Name = Literal["ddp", "fsdp2"]

SHARE = 0.5
"""Of a GPU's memory that the training state may take before ``auto`` shards it; the rest is for activations."""
MOMENTS = {"adamw": 2, "lamb": 2, "lion": 1, "lars": 1, "sgd": 1}
"""Tensors of a parameter's size that an optimiser keeps for each."""
_EPSILON = 1e-6


def state_bytes(objective: Objective, optim: OptimConfig) -> int:
    """Bytes that one GPU holds of the training state under DDP, in float32: of each trained parameter itself, its
    gradient, DDP's copy of it and the optimiser's moments; of each frozen one (EMA and frozen teachers) itself."""
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in objective.parameters() if not p.requires_grad)
    frozen += sum(p.numel() for teacher in hidden_backbones(objective) for p in teacher.parameters())
    return 4 * (trained * (3 + MOMENTS[optim.name]) + frozen)


def choose_strategy(
    setting: Literal["auto", "ddp", "fsdp2"], objective: Objective, optim: OptimConfig, device: torch.device
) -> Name:
    """``auto`` is DDP, except on several GPUs where ``state_bytes`` are more than half of a GPU's memory: then FSDP2.

    On CPUs and in a single process it is DDP, whatever the size: sharding would save nothing there that is scarce.
    """
    if setting != "auto":
        return setting
    if device.type != "cuda" or world_size() == 1:
        return "ddp"
    _, memory = torch.cuda.mem_get_info(device)
    needed = state_bytes(objective, optim)
    chosen: Name = "fsdp2" if needed > SHARE * memory else "ddp"
    if is_main():
        logger.info("Training state %.1f GB, GPU memory %.1f GB: strategy %s.", needed / 1e9, memory / 1e9, chosen)
    return chosen


class Strategy(ABC):
    """Places an objective on this process's device, and does to its parameters what depends on where they are.

    Args:
        objective: on the CPU, equal on all ranks, neither compiled nor moved yet.
        device: of this process.
    """

    name: ClassVar[Name]

    def __init__(self, objective: Objective, device: torch.device) -> None:
        self.objective = objective
        self.device = device

    @abstractmethod
    def place(self) -> Objective:
        """Put the objective on the device. Optimisers are made, and checkpoints read, after this."""

    @abstractmethod
    def begin(self) -> nn.Module:
        """What to call in place of the objective, once its state is that of the first step to take."""

    @abstractmethod
    def accumulating(self, last: bool) -> AbstractContextManager:
        """Around forward and backward of a micro-batch.

        Args:
            last: no other follows in this step.
        """

    @abstractmethod
    def average_rest(self) -> None:
        """After the last backward: average over ranks what the backward did not."""

    @abstractmethod
    def clip(self, max_norm: float | None, per_parameter: bool) -> Tensor:
        """See ``clip_gradients``; the norms are those of whole tensors."""

    @abstractmethod
    def whole(self, encoder_only: bool = False) -> AbstractContextManager[Objective | None]:
        """The objective with all of its parameters, for a look at it or to export it: on rank 0; ``None`` elsewhere.

        Every rank enters this, at the same point. What is done inside must not need the other ranks.

        Args:
            encoder_only: only ``Objective.encoder`` is filled, and on the device; otherwise all of it, on the CPU
                where it does not lie on the device anyway.
        """


class Replicated(Strategy):
    """Every rank holds all parameters and the optimiser's state; gradients are averaged (DistributedDataParallel). In a
    single process, the plain objective."""

    name = "ddp"

    def place(self) -> Objective:
        self.objective = _synchronised(self.objective, self.device).to(self.device)
        return self.objective

    def begin(self) -> nn.Module:
        """DDP that starts from rank 0's parameters and buffers. Buffers (centres, say) are then equal on all ranks
        without being sent at each forward, and parameters that a batch does not use are allowed."""
        self.model: nn.Module = self.objective
        if active():
            known = inspect.signature(DistributedDataParallel).parameters
            buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
            self.model = DistributedDataParallel(self.objective, find_unused_parameters=True, **{buffers: False})  # type: ignore[arg-type]
        return self.model

    def accumulating(self, last: bool) -> AbstractContextManager:
        """Gradients travel once, with the last micro-batch."""
        if last or not isinstance(self.model, DistributedDataParallel):
            return nullcontext()
        return self.model.no_sync()

    def average_rest(self) -> None:
        """Nothing is left over."""

    def clip(self, max_norm: float | None, per_parameter: bool) -> Tensor:
        return clip_gradients(self.objective.parameters(), max_norm, per_parameter)

    @contextmanager
    def whole(self, encoder_only: bool = False) -> Iterator[Objective | None]:
        yield self.objective if is_main() else None


class Sharded(Strategy):
    """FSDP2 (Zhao et al. 2023, arXiv:2304.11277): every tensor is cut along its first axis over all ranks, so that
    parameters, gradients and the optimiser's state take 1/n of the memory, teachers' parameters too.

    A transformer block is gathered when it runs and let go after; so much for student, EMA teacher and frozen
    teacher. Heads, embeddings and norms are gathered for a whole forward and backward. Parameters without dimensions
    (a temperature) stay whole on every rank, and their gradients are averaged here.

    With ``precision`` bf16 blocks are gathered in bfloat16, in which autocast multiplies matrices under DDP as well;
    what is outside the blocks stays in float32, since losses use it in regions without autocast. Gradients are
    averaged in float32. Each micro-batch's are reduced as they come: kept whole until the last they would take the
    memory that sharding saves.

    Raises:
        UsageError: for batch normalisation on several CPU ranks.
    """

    name = "fsdp2"

    def __init__(self, objective: Objective, device: torch.device, precision: Precision) -> None:
        super().__init__(objective, device)
        self.hollow = hollow_copy(objective) if is_main() else None
        half = precision == "bf16" and device.type == "cuda"
        self.policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if half else None, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        self.mesh = init_device_mesh(device.type, (world_size(),))
        self.scalars: list[nn.Parameter] = []

    def place(self) -> Objective:
        # Tensor by tensor, so that no GPU ever holds the whole model.
        objective = self.objective = _synchronised(self.objective, self.device)
        self.scalars = [parameter for parameter in objective.parameters() if parameter.dim() == 0]
        for parameter in self.scalars:
            parameter.data = parameter.data.to(self.device)
        for module in objective.modules():
            if isinstance(module, Backbone):
                self._shard_blocks(module)
        fully_shard(objective, mesh=self.mesh, ignored_params=set(self.scalars))
        self._shard_hidden()
        return objective.to(self.device)

    def begin(self) -> nn.Module:
        # A random teacher was made anew if its seed was read from a checkpoint.
        self._shard_hidden()
        return self.objective

    def accumulating(self, last: bool) -> AbstractContextManager:
        return nullcontext()

    def average_rest(self) -> None:
        trained = [parameter for parameter in self.scalars if parameter.requires_grad]
        if trained:
            gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in trained]
            for parameter, mean in zip(trained, all_mean(torch.stack(gradients)).unbind()):
                parameter.grad = mean.clone()

    @torch.no_grad()
    def clip(self, max_norm: float | None, per_parameter: bool) -> Tensor:
        """With one exchange between ranks for the norms of all tensors."""
        shards, others = [], []
        for parameter in self.objective.parameters():
            if isinstance(parameter.grad, DTensor):
                shards.append(parameter.grad.to_local())
            elif parameter.grad is not None:
                others.append(parameter.grad)
        squares = torch.stack(torch._foreach_norm(shards, dtype=torch.float32)).square()
        norms = all_sum(squares).sqrt()
        if others:
            norms = torch.cat([norms, torch.stack(torch._foreach_norm(others, dtype=torch.float32))])
        total = torch.linalg.vector_norm(norms)
        if max_norm is not None:
            factors = (max_norm / ((norms if per_parameter else total) + _EPSILON)).clamp(max=1.0)
            torch._foreach_mul_([*shards, *others], list(factors.expand_as(norms).unbind()))
        return total

    @contextmanager
    def whole(self, encoder_only: bool = False) -> Iterator[Objective | None]:
        source: nn.Module = self.objective.encoder if encoder_only else self.objective
        device = self.device if encoder_only else torch.device("cpu")
        state = gather_state(source.state_dict(), device)
        if self.hollow is None:
            yield None
            return
        target: nn.Module = self.hollow.encoder if encoder_only else self.hollow
        target.load_state_dict(state, assign=True)
        if encoder_only:
            target.to(device)
        try:
            yield self.hollow
        finally:
            _empty(target)

    def _shard_blocks(self, backbone: Backbone) -> None:
        for block in backbone.transformer_blocks():
            fully_shard(block, mesh=self.mesh, mp_policy=self.policy, reshard_after_forward=True)
            for name in getattr(block, "entry_points", ()):
                register_fsdp_forward_method(block, name)

    def _shard_hidden(self) -> None:
        for backbone in hidden_backbones(self.objective):
            if not isinstance(backbone, FSDPModule):
                self._shard_blocks(backbone)
                fully_shard(backbone, mesh=self.mesh, reshard_after_forward=True)


def make_strategy(name: Name, objective: Objective, device: torch.device, precision: Precision) -> Replicated | Sharded:
    return Sharded(objective, device, precision) if name == "fsdp2" else Replicated(objective, device)


def hidden_backbones(objective: Objective) -> list[Backbone]:
    """Those of frozen teachers, which are in no registry of submodules."""
    return [module.backbone for module in objective.modules() if isinstance(module, FrozenTeacher)]


def hollow_copy(objective: Objective) -> Objective:
    """The objective without memory for its parameters (they are on PyTorch's ``meta`` device)."""
    known: dict[int, object] = {}
    for module in (objective, *hidden_backbones(objective)):
        for parameter in module.parameters():
            known[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    return copy.deepcopy(objective, known)


def gather_state(state: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Whole tensors on rank 0, one after the other; an empty dictionary elsewhere. Every rank takes part."""
    gathered = {}
    for name, value in state.items():
        full = value.full_tensor() if isinstance(value, DTensor) else value
        if is_main():
            gathered[name] = full.detach().to(device)
    return gathered


def _empty(module: nn.Module) -> None:
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                hollow = torch.empty_like(parameter, device="meta")
                part._parameters[name] = nn.Parameter(hollow, parameter.requires_grad)


def _synchronised(objective: Objective, device: torch.device) -> Objective:
    """With several ranks, batch statistics over all of them: otherwise each rank would train another network.

    Raises:
        UsageError: on CPUs, where PyTorch has no synchronised batch normalisation.
    """
    normed = [module for module in objective.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if world_size() == 1 or not normed:
        return objective
    if device.type != "cuda":
        raise UsageError(
            f"Objective '{objective.name}' on {type(objective.backbone).__name__} has batch normalisation, which "
            "PyTorch cannot synchronise on CPUs.",
            "Train it in one process, or on GPUs.",
        )
    return nn.SyncBatchNorm.convert_sync_batchnorm(objective)  # type: ignore[no-any-return]
