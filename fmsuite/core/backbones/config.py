"""The ``model:`` section: which backbone, and its shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fmsuite.core.backbones.positions import TimeEncoding
from fmsuite.errors import UsageError, nearest


@dataclass(frozen=True)
class VitSize:
    """Shape of a published transformer."""

    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0


VIT_SIZES: dict[str, VitSize] = {
    "vit_tiny": VitSize(192, 12, 3),
    "vit_small": VitSize(384, 12, 6),
    "vit_base": VitSize(768, 12, 12),
    "vit_large": VitSize(1024, 24, 16),
    "vit_huge": VitSize(1280, 32, 16),
    "vit_giant": VitSize(1408, 40, 16, 48 / 11),
    "vit_giant2": VitSize(1536, 40, 24),
}
"""Touvron et al. 2021 (tiny, small), Dosovitskiy et al. 2021 (base to huge), Zhai et al. 2022 (giant), Oquab et al.
2023 (giant2, DINOv2's ViT-g)."""


SWIN_UNETR = "swin_unetr"
"""The name of Swin UNETR's encoder (``swin_unetr.py``)."""


class ModelConfig(BaseModel):
    """A backbone.

    Attributes:
        name: one of ``VIT_SIZES``; ``timm:NAME`` for a timm model as it is (2D only; it cannot drop or mask tokens); or
            ``swin_unetr`` for Swin UNETR's encoder, of which ``width`` is the last stage's and ``heads`` the first's.
        input_size: length along the spatial axes; the domain's window if not given.
        patch_size: one number, or one for each input axis.
        patch_embedding: ``linear``, a kernel slice learned for each channel; or ``wavelength``, kernels computed from
            the channels' wavelengths, so that other bands than those of the training can be shown (``wavelengths.py``).
        width, depth, heads, mlp_ratio: override the named size.
        cls_token, registers: special tokens.
        positions: ``learned`` table, fixed ``sincos``, ``rotary`` in every attention, ``learned+rotary`` for both
            (Primus), ``relative`` (a learned bias of every attention by the distance of two tokens, shared by all
            blocks: BEiT), or ``none``.
        positions_cls: the learned table has an entry for the class token, as in the original ViT, MAE and DINO(v2).
        position_units: ``index`` counts patches; ``physical`` uses the spacing, so that one millimetre is one
            millimetre at every spacing.
        position_scale: physical length that counts as one step when units are physical.
        position_widths: features for the sine-cosine code of each named axis; the others share the rest evenly
            (SatMAE gives its channel groups a width of their own).
        time_encoding: what the sine-cosine code of the axis ``time`` encodes: the days since 2000-01-01, or
            (``calendar``) year, month and hour, a third of the features each; SatMAE gives time 384 of them.
        rope_theta: base of the rotary frequencies.
        attention: ``full``; or ``rvsa``, rotated varied-size windows in all blocks but some (``rvsa.py``).
        rvsa_window: side of a window in tokens.
        rvsa_full_every: each block of that number keeps full attention.
        rvsa_outside: how points outside of the grid or on invalid tokens count.
        mlp: ``gelu``, or ``swiglu`` with DINOv2's fused layout (timm's ``GluMlp``, ``fc1`` then ``fc2``).
        norm: ``layer`` or ``rms`` normalisation.
        qkv_bias, bias: whether the blocks' attention projections, and their other linear layers, have biases.
        layer_scale: initial value, or ``None`` for no LayerScale.
        init: ``normal`` is a truncated normal of standard deviation 0.02 (ViT, DINO, DINOv2); ``xavier`` is Glorot's
            uniform law, with the patch projection treated as a linear layer (MAE).
        depth_rescale: divide what block l = 1, 2, ... adds to the sequence (the weights of ``attn.proj`` and
            ``mlp.fc2``) by sqrt(2 l) at the start (BEiT, I-JEPA).
        datewise: of a time series, each date by itself (``datewise.py``): all other options are of one date.
        drop_path: rate of the last block; it grows linearly from 0 at the first unless ``drop_path_uniform``.
        min_valid: share of valid values that a patch needs to be a token.
        weights: anything ``load_encoder`` opens, to start from (continued pretraining).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = "vit_small"
    input_size: int | tuple[int, ...] | None = None
    patch_size: int | tuple[int, ...] = 16
    patch_embedding: Literal["linear", "wavelength"] = "linear"
    width: int | None = Field(default=None, ge=1)
    depth: int | None = Field(default=None, ge=1)
    heads: int | None = Field(default=None, ge=1)
    mlp_ratio: float | None = Field(default=None, gt=0)
    cls_token: bool = True
    registers: int = Field(default=0, ge=0)
    positions: Literal["learned", "sincos", "rotary", "learned+rotary", "relative", "none"] = "learned"
    positions_cls: bool = True
    position_units: Literal["index", "physical"] = "index"
    position_scale: float = Field(default=1.0, gt=0)
    position_widths: dict[str, int] | None = None
    time_encoding: TimeEncoding = "days"
    rope_theta: float = Field(default=100.0, gt=0)
    attention: Literal["full", "rvsa"] = "full"
    rvsa_window: int = Field(default=7, ge=2)
    rvsa_full_every: int = Field(default=3, ge=2)
    rvsa_outside: Literal["left_out", "zeros"] = "left_out"
    mlp: Literal["gelu", "swiglu"] = "gelu"
    norm: Literal["layer", "rms"] = "layer"
    qkv_bias: bool = True
    bias: bool = True
    layer_scale: float | None = None
    init: Literal["normal", "xavier"] = "normal"
    depth_rescale: bool = False
    datewise: bool = False
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    drop_path_uniform: bool = False
    min_valid: float = Field(default=0.5, gt=0, le=1)
    weights: str | None = None

    @model_validator(mode="after")
    def _used(self) -> ModelConfig:
        """An option that nothing would read is a misunderstanding."""
        fields = type(self).model_fields
        for key, wanted, needed in (
            ("rope_theta", self.rotary, "positions: rotary"),
            ("position_widths", self.positions == "sincos", "positions: sincos"),
            ("time_encoding", self.positions == "sincos", "positions: sincos"),
            ("position_scale", self.position_units == "physical", "position_units: physical"),
            *((key, self.attention == "rvsa", "attention: rvsa") for key in fields if key.startswith("rvsa_")),
            ("position_units", self.positions == "sincos" or self.rotary, "positions: sincos or rotary"),
        ):
            if not wanted and getattr(self, key) != fields[key].default:
                raise ValueError(f"{key} has no effect without {needed}")
        if not self.name.startswith("timm:") and self.name != SWIN_UNETR:
            # An unknown name, or heads that do not divide the width, is refused before any data is looked at.
            _ = self.size
        return self

    @property
    def learned(self) -> bool:
        """Whether there is a learned table of positions."""
        return self.positions in ("learned", "learned+rotary")

    @property
    def rotary(self) -> bool:
        """Whether attention turns its queries and keys."""
        return self.positions in ("rotary", "learned+rotary")

    @property
    def size(self) -> VitSize:
        """The shape with overrides applied.

        Raises:
            UsageError: for an unknown name, or a width that the heads do not divide.
        """
        if self.name not in VIT_SIZES:
            raise UsageError(f"There is no model '{self.name}'.", nearest(self.name, [*VIT_SIZES, SWIN_UNETR]))
        base = VIT_SIZES[self.name]
        width, heads = self.width or base.width, self.heads or base.heads
        if width % heads:
            raise UsageError(f"model.width {width} is not a multiple of model.heads {heads}.", "Change one of them.")
        return VitSize(width, self.depth or base.depth, heads, self.mlp_ratio or base.mlp_ratio)
