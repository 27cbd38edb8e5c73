"""A frozen encoder as the source of an objective's targets, whatever its normalisation and patch size."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fmsuite.core.backbones.base import Backbone, Features
from fmsuite.core.backbones.build import build_backbone
from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.backbones.vit import VisionTransformer
from fmsuite.core.data.sample import View
from fmsuite.core.inputs import SPATIAL_AXES, InputSpec, Normalize, Quantification
from fmsuite.core.tokens import PatchGrid
from fmsuite.errors import FmsuiteError, UsageError

RANDOM = "random"
TEACHERS = "a run folder, a weight file, timm:NAME, hf-hub:NAME, or random"
HASH = 16
"""Bytes of an identity: an encoder's hash; of a random network eight zero bytes, which no hash begins with, and its
seed."""


class FrozenTeacher(nn.Module):
    """Features of a network that never changes, at the student's tokens.

    Views come as the student takes them. The teacher sees the same pixels in its own normalisation; where its patches
    are of another size, pixels are resized so that both have the same token grid (bilinear with antialiasing along one
    or two spatial axes, trilinear along three; an axis such as ``time`` is never resized). What is invalid stays so.

    The weights are no part of the objective's state: a checkpoint holds the teacher's identity only, and one of another
    teacher is refused. They are in no optimiser, take no gradient, are always in evaluation mode, and go along when the
    objective moves to a device. A ``random`` teacher's identity is its seed, from which a restored run makes it again.

    Args:
        what: anything ``load_encoder`` opens, or ``random``: a fresh network of the student's shape (dBOT's first
            teacher, Liu et al. 2022, section 3), drawn by PyTorch's global generator.
        student: whose views the teacher will be shown.
        key: the option that names the teacher, for messages.
        layers: numbers of blocks (0-based, negative from the end) whose patch tokens ``forward`` returns as
            ``Features.intermediate``; or a function that makes them of the teacher's depth.
        norm_layers: put those through the teacher's final norm.
        first_only: run only the blocks up to the last of ``layers``, after which ``Features.patches`` are then taken; a
            timm model runs whole.
        size: of the student's views, to be refused here rather than in the first step; ``student.spec.size`` if not
            given.

    Raises:
        UsageError: for a teacher of other axes, channels, orientation or intensity units, of other channel groups, one
            whose patches cannot be matched by resizing, or layers that it does not have.
        FmsuiteError: if its weights cannot be read.
    """

    recorded: Tensor
    _hidden: tuple[Backbone, Normalize, Normalize]

    def __init__(
        self,
        what: str,
        student: Backbone,
        key: str = "objective.teacher",
        layers: Sequence[int] | Callable[[int], Sequence[int]] = (),
        *,
        norm_layers: bool = True,
        first_only: bool = False,
        size: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.what = what
        self.key = key
        self.norm_layers = norm_layers
        self._first_only = first_only
        self._student_spec = student.spec
        self._student_grid = student.grid
        self._student_config = getattr(student, "config", None)
        if what == RANDOM:
            seed = int(torch.randint(2**62, (), device="cpu"))
            recorded = bytes(HASH - 8) + seed.to_bytes(8, "little")
            backbone, spec = self._random(seed), student.spec
        else:
            # Encoders know objectives through the models that these made; the import would go round in a circle.
            from fmsuite.core.encoders import load_encoder

            try:
                encoder = load_encoder(what)
            except FmsuiteError as error:
                raise type(error)(f"{key}: {error.message}", error.hint) from error
            recorded = bytes.fromhex(encoder.identity)
            backbone, spec = encoder.backbone, encoder.spec
        self.register_buffer("recorded", torch.tensor(list(recorded), dtype=torch.uint8))
        self._spec = spec
        self._channels = self._check_input(spec)
        self._check_grids(backbone)
        self.width = backbone.width
        self.depth = backbone.depth
        self.layers = tuple(layers(self.depth) if callable(layers) else layers)
        self.has_cls = backbone.has_cls
        outside = [layer for layer in self.layers if not -self.depth <= layer < self.depth]
        if outside:
            raise UsageError(
                f"{key}: '{what}' has {self.depth} blocks, so there is no layer {outside[0]}.",
                "Count from 0, or from -1 backwards.",
            )
        self._hide(backbone)
        if self._student_grid is not None:
            self.resized(student.spec.size if size is None else size)

    def _hide(self, backbone: Backbone) -> None:
        """Keep the network and the two normalisations out of the module's registry, and so out of every state dict,
        parameter list, mode and wrapper."""
        if backbone.grid is not None and self._student_grid is not None:
            backbone.grid = replace(backbone.grid, min_valid=self._student_grid.min_valid)
        if self._first_only and self.layers and isinstance(backbone, VisionTransformer):
            self.layers = tuple(layer % self.depth for layer in self.layers)
            backbone.depth = max(self.layers) + 1
            backbone.blocks = backbone.blocks[: backbone.depth]
        backbone.requires_grad_(False).eval()
        hidden = (backbone, Normalize(self._student_spec), Normalize(self._spec))
        for module in hidden:
            module.to(self.recorded.device)
        # A tuple is not looked into by the registry of submodules.
        self._hidden = hidden

    @property
    def backbone(self) -> Backbone:
        """The frozen network."""
        return self._hidden[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenTeacher:
        super()._apply(fn, recurse)
        for module in self._hidden:
            module._apply(fn)
        return self

    def need(self, **capabilities: bool) -> None:
        """Refuse a teacher that cannot do something: ``need(can_drop_tokens=True)``.

        Raises:
            UsageError: naming the teacher and what it lacks.
        """
        for capability in capabilities:
            lack = self.backbone.lacks(capability)
            if lack:
                raise UsageError(f"{self.key}: '{self.what}' {lack}.", "Choose another teacher.")

    def resized(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """The size at which the teacher sees a view of that size of the student's.

        Raises:
            UsageError: if the token grids differ and the teacher cannot take another size.
        """
        mine, theirs = self._student_grid, self.backbone.grid
        if mine is None or theirs is None:
            return tuple(size)
        tokens = [length // patch for length, patch in zip(size, mine.patch_size, strict=True)]
        wanted = tuple(number * patch for number, patch in zip(tokens, theirs.patch_size, strict=True))
        if not self.backbone.can_resize and wanted != self.backbone.spec.size:
            raise UsageError(
                f"{self.key}: '{self.what}' takes inputs of {self.backbone.spec.size} only, and {wanted} would give "
                f"the student's {tuple(tokens)} tokens.",
                "Choose another teacher, or another size for the student.",
            )
        return wanted

    @torch.no_grad()
    def forward(
        self, view: View, keep: Tensor | None = None, attention: bool = False, keep_valid: Tensor | None = None
    ) -> Features:
        """
        Args:
            view: (B, C, *size) or (B, N, D), normalised with the student's statistics.
            keep: (B, K) int64, the only tokens to run on; an invalid one among them is not attended to.
            attention: return ``Features.attention`` as well.
            keep_valid: (B, K) bool, False at padding in ``keep``.

        Returns:
            Features of the student's N tokens (or of the K kept ones), width ``self.width``. ``layout.valid`` is False
            where either network has no valid token.

        Raises:
            UsageError: if the teacher cannot take the view's size, drop tokens or show attention.
        """
        if keep is not None:
            self.need(can_drop_tokens=True)
        if attention:
            self.need(can_show_attention=True)
        given = None
        if view.valid is not None and self._student_grid is not None:
            given = self._student_grid.valid_tokens(view.valid)
        features = self.backbone(
            self.seen(view),
            keep=keep,
            keep_valid=keep_valid,
            layers=self.layers,
            norm_layers=self.norm_layers,
            attention=attention,
        )
        if given is not None:
            given = given if keep is None else given.gather(1, keep)
            layout = features.layout
            features.layout = replace(layout, valid=given if layout.valid is None else given & layout.valid)
        return features

    def seen(self, view: View) -> View:
        """The view as the teacher takes it: its channels, its size, its normalisation; no mask."""
        _, of_student, of_teacher = self._hidden
        pixels, valid, spacing = view.pixels.to(torch.float32), view.valid, view.spacing
        if self._spec.channels != self._student_spec.channels:
            if self._student_spec.bag:
                pixels = of_student.invert(pixels)[..., self._channels]
                pixels = of_teacher(pixels, None if valid is None else valid[..., None])
            else:
                pixels = of_student.invert(pixels)[:, self._channels]
                if valid is not None and valid.shape[1] > 1:
                    valid = valid[:, self._channels]
                pixels = of_teacher(pixels, valid)
        size = tuple(view.pixels.shape[2:])
        wanted = self.resized(size) if self._student_grid is not None else size
        if wanted != size:
            pixels, valid = resize(pixels, valid, self._student_spec.axes, wanted)
            if spacing is not None:
                spacing = spacing * spacing.new_tensor([old / new for old, new in zip(size, wanted, strict=True)])
        return replace(view, pixels=pixels, valid=valid, spacing=spacing, mask=None)

    def _random(self, seed: int) -> Backbone:
        if not isinstance(self._student_config, ModelConfig):
            raise UsageError(f"{self.key}: this student cannot be made anew as a random teacher.", "Name a teacher.")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return build_backbone(self._student_config.model_copy(update={"weights": None}), self._student_spec)

    def _check_input(self, spec: InputSpec) -> list[int]:
        """Positions of the teacher's channels among the student's."""
        mine = self._student_spec
        of_student = _quantifications(mine)
        problem = None
        if spec.bag != mine.bag:
            kinds = ("a grid", "a bag of vectors")
            problem = f"takes {kinds[spec.bag]} and the student {kinds[mine.bag]}"
        elif spec.axes != mine.axes:
            problem = f"has the axes {spec.axes} and the student {mine.axes}"
        elif missing := [name for name in spec.channel_names if name not in mine.channel_names]:
            problem = f"needs the channels {', '.join(missing)}, which the student does not have"
        elif spec.orientation != mine.orientation:
            problem = f"has the orientation {spec.orientation} and the student {mine.orientation}"
        elif any(of_student[name] != values for name, values in _quantifications(spec).items()):
            problem = "reads raw values with another scale, offset or clip than the student"
        if problem:
            raise UsageError(f"{self.key}: '{self.what}' {problem}.", "Choose a teacher of the student's input.")
        return [mine.channel_names.index(name) for name in spec.channel_names]

    def _check_grids(self, backbone: Backbone) -> None:
        mine, theirs = self._student_grid, backbone.grid
        if mine is None or theirs is None:
            return
        if _group_names(self._spec, theirs) != _group_names(self._student_spec, mine):
            raise UsageError(
                f"{self.key}: '{self.what}' has {len(theirs.groups)} channel group(s) and the student "
                f"{len(mine.groups)}, so their tokens do not correspond.",
                "Choose a teacher whose channels are grouped in the same way.",
            )
        for axis, ours, other in zip(mine.axes, mine.patch_size, theirs.patch_size, strict=True):
            if axis not in SPATIAL_AXES and ours != other:
                raise UsageError(
                    f"{self.key}: '{self.what}' cuts '{axis}' into patches of {other} and the student into {ours}; "
                    "this axis is not resized.",
                    "Give the student the teacher's patch size along it.",
                )

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        stored = state_dict.get(f"{prefix}recorded")
        if stored is not None:
            before, now = (bytes(each.tolist()) for each in (stored, self.recorded))
            if before != now:
                if not (_is_seed(before) and _is_seed(now)):
                    raise FmsuiteError(
                        f"{self.key}: the checkpoint was trained with {_told(before)}; '{self.what}' is {_told(now)}.",
                        "Give the teacher that the run began with.",
                    )
                self._hide(self._random(int.from_bytes(before[-8:], "little")))
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        return f"{self.what}, width={self.width}"


def resize(
    pixels: Tensor, valid: Tensor | None, axes: tuple[str, ...], size: tuple[int, ...]
) -> tuple[Tensor, Tensor | None]:
    """Pixels on another grid of the same field of view, interpolated from valid values only.

    Args:
        pixels: (B, C, *old) float32.
        valid: (B, 1 or C, *old) bool; ``None`` means all.
        axes: the spatial ones among them change.
        size: the new lengths; those of other axes are the old ones.

    Returns:
        (B, C, *size) float32, zero where invalid, and the validity: at least half of what a value is made of is valid.
    """
    if valid is None:
        return _interpolate(pixels, axes, size), None
    weight = valid.to(torch.float32)
    share = _interpolate(weight, axes, size)
    total = _interpolate(torch.where(valid, pixels, 0.0), axes, size)
    enough = share >= 0.5 - 1e-6
    return torch.where(enough, total / share.clamp(min=0.25), 0.0), enough


def _interpolate(values: Tensor, axes: tuple[str, ...], size: tuple[int, ...]) -> Tensor:
    spatial = [position for position, axis in enumerate(axes) if axis in SPATIAL_AXES]
    others = [position for position in range(len(axes)) if position not in spatial]
    modes = {1: "linear", 2: "bilinear", 3: "trilinear"}
    order = [0, 1, *(2 + position for position in others), *(2 + position for position in spatial)]
    moved = values.permute(order)
    kept = moved.shape[: 2 + len(others)]
    flat = moved.reshape(math.prod(kept), 1, *moved.shape[2 + len(others) :])
    new = tuple(size[position] for position in spatial)
    out = functional.interpolate(flat, size=new, mode=modes[len(spatial)], antialias=len(spatial) == 2)
    back = [order.index(position) for position in range(len(order))]
    return out.reshape(*kept, *new).permute(back)


def _quantifications(spec: InputSpec) -> dict[str, Quantification]:
    """By channel."""
    return dict(zip(spec.channel_names, spec.quantifications, strict=True))


def _group_names(spec: InputSpec, grid: PatchGrid) -> list[tuple[str, ...]]:
    """Which channels share a token, in token order; one nameless group where all do."""
    if len(grid.groups) == 1:
        return [()]
    return [tuple(spec.channel_names[i] for i in members) for members in grid.groups]


def _is_seed(recorded: bytes) -> bool:
    return not any(recorded[: HASH - 8])


def _told(recorded: bytes) -> str:
    return "a random network" if _is_seed(recorded) else f"the encoder {recorded.hex()}"
