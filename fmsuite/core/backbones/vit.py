"""The vision transformer: any axes, any channels, subsets of tokens; timm's parameter names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fmsuite.core.backbones.base import Backbone, Features, bundle_crops
from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.backbones.drop_path import Branches, DropPath, draw_kept
from fmsuite.core.backbones.layers import Block, init_transformer, key_mask_of, make_norm, rescale_by_depth
from fmsuite.core.backbones.packing import Group
from fmsuite.core.backbones.patch_embed import BagEmbed, PatchEmbed
from fmsuite.core.backbones.positions import (
    Rotary,
    axis_widths,
    check_calendar,
    check_regular,
    resample_table,
    rotary,
    rotary_angles,
    sincos_positions,
)
from fmsuite.core.backbones.relative_bias import RelativePositionBias
from fmsuite.core.backbones.rvsa import RotatedWindowAttention, check_windows, window_blocks
from fmsuite.core.backbones.wavelengths import WavelengthEmbed
from fmsuite.core.data.sample import View
from fmsuite.core.inputs import InputSpec
from fmsuite.core.tokens import PatchGrid, TokenLayout, take
from fmsuite.errors import UsageError


class VisionTransformer(Backbone):
    """Dosovitskiy et al. 2021, with registers (Darcet et al. 2024) and the position codes of ``positions.py``.

    The sequence is class token, registers, patches. A learned table adds to the patches and, with
    ``config.positions_cls``, to the class token; never to registers. Parameters have the names of timm's
    ``VisionTransformer`` (``cls_token reg_token pos_embed patch_embed blocks norm``), and ``mask_token`` besides.

    Weights start as ``config.init`` says (see ``init_transformer``), tokens and position tables as a truncated normal
    of standard deviation 0.02, biases at zero.

    Args:
        config: the shape; ``config.name`` must be a named size. ``config.weights`` is not read here (see
            ``build_backbone``).
        spec: the input; ``config.input_size``, if given, resizes it.

    Raises:
        UsageError: for a shape that does not fit the input, or learned positions for a bag.
    """

    can_drop_tokens = True
    can_mask_tokens = True
    can_resize = True
    can_show_attention = True

    def __init__(self, config: ModelConfig, spec: InputSpec) -> None:
        super().__init__()
        if config.input_size is not None:
            if spec.bag:
                raise UsageError("model.input_size is set, but the input is a bag of vectors.", "Remove it.")
            spec = spec.resized(config.input_size)
        size = config.size
        self.config = config
        self.spec = spec
        self.width = size.width
        self.depth = size.depth
        self.grid = None if spec.bag else PatchGrid.build(spec, config.patch_size, config.min_valid)
        self.patch_embed = self._make_embedding()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size.width)) if config.cls_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, config.registers, size.width)) if config.registers else None
        self.mask_token = nn.Parameter(torch.zeros(1, size.width))
        self.pos_embed = self._make_table()
        self.rel_pos_bias = self._make_bias(size.heads)
        self._check_positions(size.width // size.heads)
        self.blocks = nn.ModuleList(self.make_block(number, self._drop_path(number)) for number in range(size.depth))
        self.norm = make_norm(size.width, config.norm)
        self._checkpointing = self._compiled = False
        if config.attention == "rvsa":
            self.insert_windows()
        self.init_weights()

    def init_weights(self) -> None:
        """Set every parameter to its starting value (PyTorch's global generator)."""
        self.apply(partial(init_transformer, law=self.config.init))
        if isinstance(self.patch_embed, WavelengthEmbed):
            self.patch_embed.init_weights()
        for module in self.modules():
            if isinstance(module, RotatedWindowAttention):
                module.init_regressors()
        for token in (self.cls_token, self.reg_token, self.mask_token, self.pos_embed):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02)
        if self.config.layer_scale is not None:
            for name, gamma in self.named_parameters():
                if name.endswith(".gamma"):
                    nn.init.constant_(gamma, self.config.layer_scale)
        if self.config.depth_rescale:
            rescale_by_depth(self.blocks)

    def insert_windows(self) -> None:
        """Give the blocks the windowed attention that ``config`` describes, in place; weights are kept.

        Raises:
            UsageError: for tokens or positions that windows cannot have.
        """
        config = self.config
        check_windows(self.spec.axes if self.grid is None else self.grid.token_axes, config.positions)
        if self.grid is None:
            raise UsageError("attention: rvsa needs a grid of tokens; a bag of vectors has none.", "Remove it.")
        prefix = self.num_prefix_tokens
        window_blocks(self.blocks, config.rvsa_window, config.rvsa_full_every, prefix, config.rvsa_outside)
        self.can_drop_tokens = False
        self.can_show_attention = self.has_cls or self.depth % config.rvsa_full_every == 0

    @property
    def has_cls(self) -> bool:
        return self.cls_token is not None

    @property
    def num_prefix_tokens(self) -> int:
        """Class token and registers."""
        return int(self.has_cls) + self.config.registers

    @property
    def positions_for_cls(self) -> bool:
        """Whether the first row of ``pos_embed`` belongs to the class token."""
        return self.pos_embed is not None and self.has_cls and self.config.positions_cls

    def transformer_blocks(self) -> Sequence[nn.Module]:
        return list(self.blocks)

    def layer_of(self, parameter: str) -> int:
        head, _, rest = parameter.partition(".")
        if head == "blocks":
            return int(rest.partition(".")[0]) + 1
        return self.depth + 1 if head == "norm" else 0

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Recompute each block in the backward pass instead of storing its activations."""
        self._checkpointing = enabled

    def compile_blocks(self, backend: str = "inductor", mode: str | None = None) -> None:
        """Compile each block in place with ``torch.compile``; parameter names do not change.

        Args:
            backend, mode: as of ``torch.compile``.
        """
        self._compiled = True
        for block in self.blocks:
            block.compile(backend=backend, mode=mode)

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
        sequence, layout, group = self._embed(view, keep, keep_valid, mask)
        kept = self._draw([view])
        sequence, outputs, weights = self._run(sequence, (group,), kept, layers, layout if attention else None)
        if norm_layers:
            outputs = [self.norm(output) for output in outputs]
        return self._features(self.norm(sequence), layout, outputs, weights)

    def forward_crops(
        self,
        views: Sequence[View],
        masks: Sequence[Tensor | None] | None = None,
        keep: Sequence[Tensor | None] | None = None,
        keep_valid: Sequence[Tensor | None] | None = None,
    ) -> list[Features]:
        """As in the base class. Crops of all sizes pass each block in one call: norms and linear layers run on all of
        their tokens at once, and attention stays within each crop (see ``packing.attend``)."""
        crops = bundle_crops(views, masks, keep, keep_valid, self)
        if len(crops.bundles) == 1:
            view, *options = crops.bundles[0]
            return crops.apart([self(view, **dict(zip(("keep", "keep_valid", "mask"), options)))])
        embedded = [self._embed(*bundle) for bundle in crops.bundles]
        groups = tuple(group for _, _, group in embedded)
        tokens = torch.cat([sequence.flatten(0, 1) for sequence, _, _ in embedded])
        kept = self._draw([view for view, *_ in crops.bundles])
        tokens = self.norm(self._run(tokens, groups, kept)[0])
        sequences = tokens.split([group.samples * group.tokens for group in groups])
        return crops.apart(
            [
                self._features(sequence.view(first.shape), layout)
                for sequence, (first, layout, _) in zip(sequences, embedded, strict=True)
            ]
        )

    def _embed(
        self, view: View, keep: Tensor | None = None, keep_valid: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, TokenLayout, Group]:
        """What goes into the first block, (B, S, D), where its patches are, and what attention needs to know."""
        if keep is None and keep_valid is not None:
            raise ValueError("keep_valid marks padding in keep, which was not given")
        if keep is not None and not self.can_drop_tokens:
            raise UsageError("A model with attention: rvsa needs all tokens of its windows.", "Drop none of them.")
        layout = self.layout(view)
        patch_positions, cls_position = self._positions(layout)
        position_bias = self._bias(layout, keep)
        x = self.patch_embed(view.pixels, keep)
        # What is laid out is what ``keep`` leaves; ``keep_valid`` is not of the pixels.
        shown = layout if keep is None else layout.select(keep)
        if mask is not None:
            hidden = mask if keep is None else mask.gather(1, keep)
            x = torch.where(hidden[..., None], self.mask_token.to(x.dtype), x)
        if shown.valid is not None:
            # The output of a token without data must not depend on whatever stands there.
            x = torch.where(shown.valid[..., None], x, torch.zeros((), dtype=x.dtype, device=x.device))
        if patch_positions is not None:
            if keep is not None:
                # A table on one grid has rows (N, D) or (1, N, D), others (B, N, D).
                patch_positions = take(patch_positions.expand(len(x), -1, -1), keep)
            x = x + patch_positions
        layout = shown
        if keep_valid is not None:
            layout = replace(layout, valid=keep_valid if layout.valid is None else layout.valid & keep_valid)
        sequence = self._with_prefix(x, cls_position)
        return sequence, layout, self._group(sequence, layout, position_bias)

    def _group(self, sequence: Tensor, layout: TokenLayout, position_bias: Tensor | None) -> Group:
        turn, keys = self._rotary(layout), self._key_mask(layout)
        return Group(len(sequence), sequence.shape[1], turn, keys, position_bias, layout.shape)

    def _features(
        self,
        sequence: Tensor,
        layout: TokenLayout,
        outputs: Sequence[Tensor] = (),
        attention: Tensor | None = None,
    ) -> Features:
        """(B, S, D) of the last block, through the final norm, and those of other layers."""
        prefix = self.num_prefix_tokens
        return Features(
            patches=sequence[:, prefix:],
            layout=layout,
            cls=sequence[:, 0] if self.has_cls else None,
            registers=sequence[:, int(self.has_cls) : prefix] if self.config.registers else None,
            intermediate=tuple(output[:, prefix:] for output in outputs),
            attention=attention,
            intermediate_prefix=tuple(output[:, :prefix] for output in outputs),
        )

    def make_block(self, index: int, drop_path: float) -> Block:
        """A block of the shape of this model's own.

        Args:
            index: its number, by which drop-path draws differ between blocks; no two that one sample passes are equal.
            drop_path: its probability.
        """
        config, size = self.config, self.config.size
        return Block(
            size.width,
            size.heads,
            size.mlp_ratio,
            mlp=config.mlp,
            norm=config.norm,
            qkv_bias=config.qkv_bias,
            bias=config.bias,
            layer_scale=config.layer_scale,
            drop_path=drop_path,
            index=index,
        )

    def run_blocks(
        self, blocks: Iterable[nn.Module], sequence: Tensor, layout: TokenLayout, keys: Tensor | None
    ) -> Tensor:
        """A sequence through other blocks than the model's own, which are told of positions and validity as those are.

        Args:
            blocks: see ``make_block``.
            sequence: (B, S, D) class token, registers, and all patches of a view.
            layout: of the patches.
            keys: ``View.keys``.

        Returns:
            (B, S, D), without a norm.
        """
        group = self._group(sequence, layout, self._bias(layout, None))
        blocks = list(blocks)
        paths = [path for block in blocks for path in _paths(block)]
        kept = draw_kept(paths, [(len(sequence), keys)], sequence.device, compiled=self._compiled)
        for block, first, second in zip(blocks, kept[::2], kept[1::2], strict=True):
            sequence = block(sequence, groups=(group,), kept=(first, second))
        return sequence

    def _draw(self, views: Sequence[View]) -> list[Branches]:
        """What each block keeps of the samples of some views."""
        paths = [path for block in self.blocks for path in _paths(block)]
        samples = [(len(view), view.keys) for view in views]
        kept = draw_kept(paths, samples, views[0].pixels.device, compiled=self._compiled)
        return list(zip(kept[::2], kept[1::2], strict=True))

    def _run(
        self,
        x: Tensor,
        groups: tuple[Group, ...],
        kept: list[Branches],
        layers: Sequence[int] = (),
        shown: TokenLayout | None = None,
    ) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """The blocks; the outputs of those in ``layers``, in that order, before the final norm; the last one's
        attention, if ``shown`` tells of the patches."""
        wanted = [self._block_number(layer) for layer in layers]
        outputs: dict[int, Tensor] = {}
        weights = None
        for number, (block, branches) in enumerate(zip(self.blocks, kept, strict=True)):
            if shown is not None and number == self.depth - 1:
                assert isinstance(block, Block)
                weights = self._attention(block, x, shown, groups[0])
            if self._checkpointing and self.training:
                x = checkpoint(block, x, groups=groups, kept=branches, use_reentrant=False)
            else:
                x = block(x, groups=groups, kept=branches)
            if number in wanted:
                outputs[number] = x
        return x, [outputs[number] for number in wanted], weights

    def _attention(self, block: Block, x: Tensor, layout: TokenLayout, group: Group) -> Tensor:
        """(B, heads, N) attention of the class token, or the mean over the valid patches, in a block whose input is
        x."""
        prefix = self.num_prefix_tokens
        queries = slice(0, 1) if self.has_cls else slice(prefix, None)
        rows = block.attention(x, queries, group.rotary, group.key_mask, group.position_bias)[..., prefix:]
        if self.has_cls or layout.valid is None:
            return rows.mean(2)
        counted = layout.valid[:, None, :, None].to(rows.dtype)
        return (rows * counted).sum(2) / counted.sum(2).clamp(min=1)

    def _block_number(self, layer: int) -> int:
        if not -self.depth <= layer < self.depth:
            raise UsageError(f"There is no layer {layer}: the model has {self.depth} blocks.", "Count from 0.")
        return layer % self.depth

    def _with_prefix(self, x: Tensor, cls_position: Tensor | None) -> Tensor:
        prefix = []
        if self.cls_token is not None:
            token = self.cls_token if cls_position is None else self.cls_token + cls_position
            prefix.append(token.expand(len(x), -1, -1))
        if self.reg_token is not None:
            prefix.append(self.reg_token.expand(len(x), -1, -1))
        return torch.cat([*prefix, x], dim=1) if prefix else x

    def _key_mask(self, layout: TokenLayout) -> Tensor | None:
        """(B, prefix + N) bool, or ``None`` if every token may be attended to. On a GPU that is asked of the layout
        alone: to look at the values, the host would have to wait for them."""
        if layout.valid is None or (layout.valid.device.type == "cpu" and bool(layout.valid.all())):
            return None
        return key_mask_of(layout.valid, self.num_prefix_tokens)

    def _make_embedding(self) -> PatchEmbed | WavelengthEmbed | BagEmbed:
        by_wavelength = self.config.patch_embedding == "wavelength"
        if self.grid is None:
            if by_wavelength:
                raise UsageError("A bag of vectors has no bands with wavelengths.", "Remove model.patch_embedding.")
            return BagEmbed(self.spec, self.width)
        if by_wavelength:
            return WavelengthEmbed(self.spec, self.grid, self.width, self.config.init)
        return PatchEmbed(self.grid, self.width)

    def _make_table(self) -> nn.Parameter | None:
        if not self.config.learned:
            return None
        if self.grid is None:
            raise UsageError("A bag of vectors has no grid for a learned position table.", "Use sincos or rotary.")
        tokens = 1
        for length in self.grid.shape(self.spec.size):
            tokens *= length
        rows = tokens + int(self.has_cls and self.config.positions_cls)
        return nn.Parameter(torch.zeros(1, rows, self.width))

    def _make_bias(self, heads: int) -> RelativePositionBias | None:
        if self.config.positions != "relative":
            return None
        if self.grid is None:
            raise UsageError("A bag of vectors has no grid for relative positions.", "Use sincos or rotary.")
        shape = self.grid.shape(self.spec.size)
        return RelativePositionBias(shape, self.grid.token_axes, heads, self.num_prefix_tokens)

    def _bias(self, layout: TokenLayout, keep: Tensor | None) -> Tensor | None:
        """(heads, S, S) or, for a subset of tokens, (B, heads, S, S) to add to the attention's logits."""
        if self.rel_pos_bias is None:
            return None
        bias = self.rel_pos_bias(check_regular(layout))
        if keep is None:
            return bias
        prefix = torch.arange(self.num_prefix_tokens, device=keep.device).expand(len(keep), -1)
        tokens = torch.cat([prefix, keep + self.num_prefix_tokens], dim=1)
        return bias[:, tokens[:, :, None], tokens[:, None, :]].transpose(0, 1)

    def _check_positions(self, head_dim: int) -> None:
        axes = self.spec.axes if self.grid is None else self.grid.token_axes
        if self.config.positions == "sincos":
            shares = axis_widths(axes, self.width, self.config.position_widths)
            if self.config.time_encoding == "calendar":
                check_calendar(shares)
        if self.config.rotary:
            rotary_angles(TokenLayout(axes, torch.zeros(1, len(axes))), head_dim, self.config.rope_theta)

    def _positions(self, layout: TokenLayout) -> tuple[Tensor | None, Tensor | None]:
        """What to add to the patches, (N, D) or (1, N, D) or (B, N, D), and to the class token, (1, 1, D)."""
        if self.config.positions == "sincos":
            code = sincos_positions(
                layout,
                self.width,
                physical=self.config.position_units == "physical",
                scale=self.config.position_scale,
                widths=self.config.position_widths,
                time=self.config.time_encoding,
            )
            return code.to(self.norm.weight.dtype), None
        if self.pos_embed is None or self.grid is None:
            return None, None
        shape = check_regular(layout)
        first = int(self.positions_for_cls)
        table = resample_table(self.pos_embed[:, first:], self.grid.shape(self.spec.size), shape, layout.axes)
        return table, self.pos_embed[:, :1] if first else None

    def _rotary(self, layout: TokenLayout) -> Rotary | None:
        if not self.config.rotary:
            return None
        angles = rotary_angles(
            layout,
            self.width // self.config.size.heads,
            self.config.rope_theta,
            physical=self.config.position_units == "physical",
            scale=self.config.position_scale,
        )
        return rotary(angles, self.num_prefix_tokens)

    def _drop_path(self, number: int) -> float:
        if self.config.drop_path_uniform:
            return self.config.drop_path
        return self.config.drop_path * number / max(1, self.depth - 1)


def _paths(block: nn.Module) -> tuple[DropPath, DropPath]:
    assert isinstance(block, Block)
    return block.drop_path1, block.drop_path2
