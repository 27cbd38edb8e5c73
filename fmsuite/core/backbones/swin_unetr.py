"""Swin UNETR's encoder (Hatamizadeh et al. 2022, "Swin UNETR"; Tang et al. 2022), MONAI's modules, as a backbone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fmsuite.core.backbones.base import Backbone, Features
from fmsuite.core.backbones.config import SWIN_UNETR, ModelConfig
from fmsuite.core.data.sample import View
from fmsuite.core.inputs import SPATIAL_AXES, Channel, InputSpec
from fmsuite.core.tokens import PatchGrid
from fmsuite.errors import UsageError

STAGES = 4
BLOCKS = 2
"""Of each stage."""
PATCH = 2
STRIDE = PATCH * 2**STAGES
"""Pixels along each side of what becomes one token."""
WINDOW = 7
WIDTH, HEADS = 768, 3
"""Of the tokens, and of the first stage: the published size, MONAI's ``feature_size`` 48."""
OPTIONS = {"name", "input_size", "width", "heads", "drop_path", "min_valid", "weights"}

_ENCODER = re.compile(r"^(patch_embed|layers[1-4])\.")
_SECOND_VERSION = re.compile(r"^layers[1-4]c\.")
_PREFIXES = ("module.", "swinViT.", "encoder.", "student.", "model.")


class SwinUNETR(Backbone):
    """Four stages of shifted-window attention over patches of 2, each of which halves the resolution and doubles the
    width; every 32 x 32 (x 32) pixels end as one token of width D (768).

    Parameters have MONAI's names, ``swinViT.patch_embed.proj.weight`` to ``swinViT.layers4.0.downsample.norm.bias``,
    so that published weights load (``published``), and ``mask_token`` besides. Patches, feature maps and arithmetic
    are MONAI's, the final norm without gain included.

    **Axis order.** MONAI's volumes are (x, y, z), the patient's right, anterior and superior growing along them; ours
    are (z, y, x). The backbone turns a volume over on its way in and its tokens back on their way out, so that weights
    mean the same in both. Images stay (y, x).

    It cannot drop tokens: windows are dense. A mask token takes the place of the patches of a masked token at the
    first stage's resolution (Xie et al. 2021, "SimMIM", on Swin). Invalid pixels are zero (``Normalize``) and their
    tokens are only marked, as neighbours see them.

    ``Features.maps`` holds the maps that Swin UNETR's decoder reads: at 1/2, 1/4, 1/8, 1/16 and 1/32 of the input, of
    widths D/16, D/8, D/4, D/2 and D, (B, width, *size).

    Args:
        config: ``config.name`` is ``swin_unetr``. ``width`` is D, 16 times MONAI's ``feature_size``; ``heads`` those of
            the first stage, doubled at each; ``input_size``, ``drop_path``, ``min_valid`` and ``weights`` apply, other
            options are refused.
        spec: the input: (y, x) or (z, y, x), channels in one group.

    Raises:
        UsageError: for another input, a size that is no multiple of 32, an option that does not apply, or without
            MONAI.
    """

    can_mask_tokens = True
    can_resize = True
    grid: PatchGrid

    def __init__(self, config: ModelConfig, spec: InputSpec) -> None:
        super().__init__()
        _refuse_options(config)
        if config.input_size is not None:
            spec = spec.resized(config.input_size)
        _refuse_input(spec)
        monai = _monai()
        self.config = config
        self.spec = spec
        self.width = config.width or WIDTH
        self.depth = STAGES * BLOCKS
        heads = config.heads or HEADS
        if self.width % (16 * heads):
            raise UsageError(
                f"model.width {self.width} is not a multiple of 16 times model.heads {heads}.",
                "Each of the four stages doubles both, from a sixteenth of the width.",
            )
        self.grid = PatchGrid.build(spec, STRIDE, config.min_valid)
        device = torch.get_default_device()
        # MONAI reads numbers off a tensor while it builds, which a meta tensor has none of.
        with torch.device("cpu"):
            self.swinViT = monai.SwinTransformer(
                in_chans=spec.in_chans,
                embed_dim=self.width // 16,
                window_size=(WINDOW,) * len(spec.axes),
                patch_size=(PATCH,) * len(spec.axes),
                depths=(BLOCKS,) * STAGES,
                num_heads=tuple(heads * 2**stage for stage in range(STAGES)),
                drop_path_rate=config.drop_path,
                spatial_dims=len(spec.axes),
            )
            self.mask_token = nn.Parameter(torch.zeros(1, self.width // 16))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.to(device)

    @property
    def has_cls(self) -> bool:
        return False

    @property
    def map_widths(self) -> tuple[int, ...]:
        """Of ``Features.maps``."""
        return tuple(self.width // 2 ** (STAGES - level) for level in range(STAGES + 1))

    def transformer_blocks(self) -> list[Any]:
        return [block for stage in range(1, STAGES + 1) for block in getattr(self.swinViT, f"layers{stage}")[0].blocks]

    def layer_of(self, parameter: str) -> int:
        found = re.match(r"swinViT\.layers(\d)\.0\.(?:blocks\.(\d+)|downsample)\.", parameter)
        if found is None:
            return 0
        stage, block = int(found[1]) - 1, int(found[2] or BLOCKS - 1)
        return stage * BLOCKS + block + 1

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Recompute each block in the backward pass instead of storing its activations."""
        for block in self.transformer_blocks():
            block.use_checkpoint = enabled

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compile each block in place with ``torch.compile``; parameter names do not change."""
        for block in self.transformer_blocks():
            block.compile(backend=backend)

    def forward(
        self,
        view: View,
        *,
        keep: Tensor | None = None,
        keep_valid: Tensor | None = None,
        mask: Tensor | None = None,
        layers: Sequence[int] = (),
        norm_layers: bool = True,
        attention: bool = False,
    ) -> Features:
        if keep is not None or keep_valid is not None:
            raise UsageError("'swin_unetr' cannot drop tokens: its windows are dense.", "Use a vit_* model.")
        if attention:
            raise UsageError("'swin_unetr' shows no attention.", "Use a vit_* model.")
        if layers:
            raise UsageError(
                "'swin_unetr' has no blocks of equal resolution to take layers from.",
                "Its feature maps are in Features.maps.",
            )
        _check_size(tuple(view.pixels.shape[2:]), self.spec.axes)
        layout = self.layout(view)
        x = self.swinViT.patch_embed(_turned(view.pixels))
        if mask is not None:
            x = torch.where(self._places(mask, layout.shape or ()), self._token(x), x)
        x = self.swinViT.pos_drop(x).movedim(1, -1)
        maps = [x]
        for stage in range(1, STAGES + 1):
            x = self._stage(getattr(self.swinViT, f"layers{stage}")[0], x)
            maps.append(x)
        normed = [functional.layer_norm(each, each.shape[-1:]).movedim(-1, 1) for each in maps]
        turned = tuple(_turned(each) for each in normed)
        return Features(turned[-1].flatten(2).transpose(1, 2), layout, maps=turned)

    def _stage(self, layer: Any, x: Tensor) -> Tensor:
        """(B, *size, C) through one of MONAI's layers to (B, *size / 2, 2C). Its own ``forward`` does the same by
        way of einops, which MONAI does not bring."""
        size = tuple(x.shape[1:-1])
        monai = _monai()
        window, shift = monai.get_window_size(size, layer.window_size, layer.shift_size)
        padded = [-(-length // side) * side for length, side in zip(size, window, strict=True)]
        seen = monai.compute_mask(padded, window, shift, x.device)
        for block in layer.blocks:
            x = block(x, seen)
        return layer.downsample(x)

    def _places(self, mask: Tensor, shape: tuple[int, ...]) -> Tensor:
        """(B, N) bool over tokens to (B, 1, *size) over the first stage's patches, in MONAI's order of axes."""
        places = mask.view(len(mask), 1, *shape)
        for axis in range(2, places.dim()):
            places = places.repeat_interleave(STRIDE // PATCH, dim=axis)
        return _turned(places)

    def _token(self, x: Tensor) -> Tensor:
        return self.mask_token.to(x.dtype).view(1, -1, *[1] * (x.dim() - 2))


def is_published(state: Mapping[str, Any]) -> bool:
    """Whether a state dict holds Swin UNETR's encoder, by its keys."""
    return any(key.endswith("layers1.0.blocks.0.attn.relative_position_bias_table") for key in state)


def published(
    state: Mapping[str, Tensor], origin: str, spec: InputSpec | None = None
) -> tuple[SwinUNETR, dict[str, Any]]:
    """A backbone with the encoder of a published checkpoint: a Swin UNETR of MONAI's, or its pretrained encoder.

    Args:
        state: parameters, with or without the prefixes that wrappers put before them; decoder and heads are left out.
        origin: the file's name in messages.
        spec: the input; if not given, windows of 96^3 with Hounsfield units from -1000 to 1000 scaled to 0 to 1, as the
            self-supervised weights were trained (2D: 96 x 96 with values as they are).

    Returns:
        The backbone, and notes for its provenance.

    Raises:
        UsageError: if weights are missing or do not fit together or ``spec``, or for the second version of the
            network, which has convolutions between its stages.
    """
    found: dict[str, Tensor] = {}
    left_out = 0
    for key, value in state.items():
        name = _stripped(key)
        if _SECOND_VERSION.match(name):
            raise UsageError(
                f"{origin}: this is Swin UNETR's second version (it has '{name}').", "Use the first one's."
            )
        if _ENCODER.match(name):
            # The self-supervised release names the perceptron's layers as timm does.
            name = name.replace(".mlp.fc1.", ".mlp.linear1.").replace(".mlp.fc2.", ".mlp.linear2.")
            found[f"swinViT.{name}"] = value
        else:
            left_out += 1
    kernel = found.get("swinViT.patch_embed.proj.weight")
    table = found.get("swinViT.layers1.0.blocks.0.attn.relative_position_bias_table")
    if kernel is None or table is None:
        raise UsageError(f"{origin}: it lacks the patch embedding or the first block of a Swin UNETR.")
    assumed = spec is None
    if spec is None:
        spec = _published_input(kernel.shape[1], kernel.dim() - 2)
    config = ModelConfig(name=SWIN_UNETR, width=16 * kernel.shape[0], heads=table.shape[1])
    backbone = SwinUNETR(config, spec)
    load_swin(backbone, found, origin)
    notes = {"family": SWIN_UNETR, "origin": origin, "left_out_keys": left_out, "not_in_file": ["mask_token"]}
    return backbone, {**notes, "assumed": ["input"] if assumed else []}


def load_swin(backbone: SwinUNETR, state: Mapping[str, Tensor], origin: str) -> None:
    """Load a state dict whose names are the backbone's; the mask token may be missing.

    Raises:
        UsageError: naming the first keys or shapes that do not fit.
    """
    own = backbone.state_dict()
    odd = [key for key in state if key not in own]
    odd += [key for key in own if key not in state and key != "mask_token"]
    odd += [key for key, value in state.items() if key in own and own[key].shape != value.shape]
    if odd:
        listed = ", ".join(odd[:5]) + (", ..." if len(odd) > 5 else "")
        raise UsageError(f"{origin}: does not fit the model: {listed}.")
    backbone.load_state_dict(dict(state), strict=False)


def _stripped(key: str) -> str:
    changed = True
    while changed:
        changed = False
        for prefix in _PREFIXES:
            if key.startswith(prefix):
                key, changed = key.removeprefix(prefix), True
    return key


def _published_input(channels: int, dims: int) -> InputSpec:
    named = tuple(Channel(name=f"c{number}" if channels > 1 else "ct") for number in range(channels))
    if dims == 2:
        return InputSpec(axes=("y", "x"), size=(96, 96), channels=named)
    scaled: dict[str, Any] = {"scale": 1 / 2000, "offset": 0.5, "clip": (0.0, 1.0), "orientation": "RAS"}
    return InputSpec(axes=("z", "y", "x"), size=(96, 96, 96), channels=named, **scaled)


def _turned(values: Tensor) -> Tensor:
    """(B, C, z, y, x) from or to (B, C, x, y, z); images as they are."""
    return values.transpose(2, 4).contiguous() if values.dim() == 5 else values


def _monai() -> Any:
    try:
        return import_module("monai.networks.nets.swin_unetr")
    except ModuleNotFoundError as error:
        raise UsageError(
            f"The model '{SWIN_UNETR}' needs {error.name}, which is not installed.",
            "Install it with `pip install 'fmsuite[medical]'`.",
        ) from error


def _refuse_input(spec: InputSpec) -> None:
    if spec.bag:
        raise UsageError(f"'{SWIN_UNETR}' takes images and volumes, not bags of vectors.")
    if spec.axes not in (("y", "x"), SPATIAL_AXES):
        raise UsageError(f"'{SWIN_UNETR}' takes (y, x) and (z, y, x), not ({', '.join(spec.axes)}).")
    if len(spec.groups) > 1:
        names = ", ".join(name or "unnamed" for name, _ in spec.groups)
        raise UsageError(f"'{SWIN_UNETR}' has one patch embedding for all channels; this input has the groups {names}.")
    _check_size(spec.size, spec.axes)


def _check_size(size: tuple[int, ...], axes: tuple[str, ...]) -> None:
    wrong = [
        f"{axis} = {length}" for axis, length in zip(axes, size, strict=True) if length < STRIDE or length % STRIDE
    ]
    if wrong:
        raise UsageError(
            f"'{SWIN_UNETR}' halves its input five times: {', '.join(wrong)} is no multiple of {STRIDE}.",
            "Choose another data.size, model.input_size or crop size.",
        )


def _refuse_options(config: ModelConfig) -> None:
    fields = type(config).model_fields
    for key in sorted(config.model_fields_set - OPTIONS):
        if getattr(config, key) != fields[key].default:
            raise UsageError(f"model.{key} does not apply to the model '{SWIN_UNETR}'.", "Remove it.")
