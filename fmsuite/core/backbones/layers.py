"""Transformer layers with timm's parameter names: attention, MLPs, LayerScale, the block."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmsuite.core.backbones.drop_path import Branches, DropPath, Kept
from fmsuite.core.backbones.packing import Group, attend, project_group, select_groups, token_rows
from fmsuite.core.backbones.positions import Rotary
from fmsuite.core.tokens import take

LAYER_NORM_EPS = 1e-6


Norm = Literal["layer", "rms"]


def make_norm(width: int, kind: Norm = "layer") -> nn.LayerNorm | nn.RMSNorm:
    """A normalisation with a learned gain: ``layer``, or ``rms`` (Zhang and Sennrich 2019, equation 4)."""
    return layer_norm(width) if kind == "layer" else nn.RMSNorm(width, eps=LAYER_NORM_EPS)


def layer_norm(width: int) -> nn.LayerNorm:
    """LayerNorm as every public ViT has it (epsilon 1e-6, not PyTorch's 1e-5)."""
    return nn.LayerNorm(width, eps=LAYER_NORM_EPS)


def mlp_hidden(width: int, ratio: float, kind: Literal["gelu", "swiglu"]) -> int:
    """Hidden width of a block's MLP.

    ``gelu``: ``ratio * width``. ``swiglu``: two thirds of that, rounded up to a multiple of 8, so that the gated form
    has as many parameters (Shazeer 2020, "GLU Variants Improve Transformer"; the rounding is DINOv2's).
    """
    hidden = int(width * ratio + 1e-4)
    if kind == "gelu":
        return hidden
    return (int(hidden * 2 / 3) + 7) // 8 * 8


def key_mask_of(valid: Tensor | None, prefix: int = 0) -> Tensor | None:
    """Which tokens attention may read.

    Args:
        valid: (B, N) bool, tokens that carry data; ``None`` means all.
        prefix: tokens before them, all of which may be read.

    Returns:
        (B, prefix + N) bool, or ``None`` if all may be read.
    """
    if valid is None:
        return None
    keys = F.pad(valid, (prefix, 0), value=True)
    # A softmax over no key is not a number: a sample without any gets all of them. It has no target and counts in no
    # mean, so what it attends to is idle.
    return keys | ~keys.any(1, keepdim=True)


@torch.no_grad()
def rescale_by_depth(blocks: Iterable[nn.Module], first: int = 1) -> None:
    """Divide the weights that write into the residual stream, ``attn.proj`` and ``mlp.fc2``, by sqrt(2 l) in block l
    (Bao et al. 2021, section 2.5).

    Args:
        blocks: each a ``Block``.
        first: l of the first of them.
    """
    for number, block in enumerate(blocks, start=first):
        assert isinstance(block, Block)
        for layer in (block.attn.proj, block.mlp.fc2):
            layer.weight.div_((2.0 * number) ** 0.5)


class Attention(nn.Module):
    """Multi-head self-attention with a fused projection (Vaswani et al. 2017, section 3.2).

    Parameters ``qkv`` and ``proj``, as timm names them; q, k and v lie one after the other in ``qkv``.
    """

    def __init__(self, width: int, heads: int, qkv_bias: bool = True, bias: bool = True) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width, bias=bias)

    def forward(
        self,
        x: Tensor,
        rotary: Rotary | None = None,
        key_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            x: (B, N, D).
            rotary: rotation of queries and keys, for all N tokens.
            key_mask: (B, N) bool, False at tokens that nothing may attend to. Every row needs a True.
            position_bias: (heads, N, N) or (B, heads, N, N), added to the logits.

        Returns:
            (B, N, D).
        """
        group = Group(len(x), x.shape[1], rotary, key_mask, position_bias)
        return self.attend(x.flatten(0, 1), (group,)).view(x.shape)

    def attend(self, x: Tensor, groups: Sequence[Group]) -> Tensor:
        """(T, D) to (T, D), the tokens of several groups of sequences; see ``packing.attend``."""
        return self.proj(attend(self.qkv(x).unflatten(-1, (3, self.heads, -1)), groups))

    def attend_queries(self, x: Tensor, queries: Tensor, key_mask: Tensor | None) -> Tensor:
        """What some of the tokens read from all: (B, N, D) and their numbers (B, M) int64 to (B, M, D)."""
        width = x.shape[-1]
        weight, bias = self.qkv.weight, self.qkv.bias
        first, rest = (None, None) if bias is None else (bias[:width], bias[width:])
        q = F.linear(take(x, queries), weight[:width], first).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = F.linear(x, weight[width:], rest).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mask = None if key_mask is None else key_mask[:, None, None, :]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(out.transpose(1, 2).flatten(2))

    def weights(
        self,
        x: Tensor,
        queries: slice,
        rotary: Rotary | None = None,
        key_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
    ) -> Tensor:
        """What the tokens in ``queries`` attend to: (B, heads, Q, N) float32, rows sum to one."""
        qkv = self.qkv(x.flatten(0, 1)).unflatten(-1, (3, self.heads, -1))
        q, k, _ = project_group(qkv, Group(len(x), x.shape[1], rotary))
        logits = (q[:, :, queries] @ k.transpose(-1, -2)).to(torch.float32) * q.shape[-1] ** -0.5
        if position_bias is not None:
            logits = logits + position_bias[..., queries, :]
        if key_mask is not None:
            logits = logits.masked_fill(~key_mask[:, None, None, :], float("-inf"))
        return logits.softmax(-1)


class Mlp(nn.Module):
    """``fc2(gelu(fc1(x)))`` with the exact (erf) GELU."""

    def __init__(self, width: int, hidden: int, bias: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGlu(nn.Module):
    """``fc2(silu(a) * b)`` with ``a, b`` the halves of ``fc1(x)`` (Shazeer 2020, equation 6).

    The layout of timm's ``SwiGLUPacked`` and, with ``fc1``/``fc2`` called ``w12``/``w3``, of DINOv2.
    """

    def __init__(self, width: int, hidden: int, bias: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 2 * hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * value)


class LayerScale(nn.Module):
    """A learned factor for each feature of a residual branch (Touvron et al. 2021, "Going deeper", equation 4)."""

    def __init__(self, width: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """A pre-norm transformer block with timm's names: ``norm1 attn ls1 norm2 mlp ls2``.

    Args:
        width, heads: of the attention.
        mlp_ratio, mlp: see ``mlp_hidden``.
        norm: see ``make_norm``.
        qkv_bias, bias: whether the attention's projection in, and the other linear layers, have biases.
        layer_scale: initial LayerScale, ``None`` for none.
        drop_path: rate of both branches.
        index: number of the block, which separates the drop-path draws of different blocks.
    """

    entry_points: ClassVar[tuple[str, ...]] = ("attention",)
    """Methods beside ``forward`` that are called from outside: where parameters are spread over processes, they have to
    be gathered for these as well."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float = 4.0,
        *,
        mlp: Literal["gelu", "swiglu"] = "gelu",
        norm: Norm = "layer",
        qkv_bias: bool = True,
        bias: bool = True,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        index: int = 0,
    ) -> None:
        super().__init__()
        hidden = mlp_hidden(width, mlp_ratio, mlp)
        self.norm1 = make_norm(width, norm)
        self.attn = Attention(width, heads, qkv_bias, bias)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)
        self.drop_path1 = DropPath(drop_path, 2 * index)
        self.norm2 = make_norm(width, norm)
        self.mlp = Mlp(width, hidden, bias) if mlp == "gelu" else SwiGlu(width, hidden, bias)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)
        self.drop_path2 = DropPath(drop_path, 2 * index + 1)

    def attention(
        self,
        x: Tensor,
        queries: slice,
        rotary: Rotary | None = None,
        key_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
    ) -> Tensor:
        """What ``forward`` would attend to: see ``Attention.weights``, of whose input x is not yet normalised."""
        return self.attn.weights(self.norm1(x), queries, rotary, key_mask, position_bias)

    def forward(
        self,
        x: Tensor,
        rotary: Rotary | None = None,
        key_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        *,
        groups: Sequence[Group] | None = None,
        kept: Branches = (None, None),
        queries: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            x: (B, N, D); or (T, D), the sequences of ``groups`` one after the other.
            rotary, key_mask, position_bias: those of ``Attention``, for (B, N, D).
            groups: for (T, D), in place of those.
            kept: the samples for which attention and MLP are computed; what the others have is passed on. ``draw_kept``
                makes it.
            queries: (B, M) int64, the only tokens of (B, N, D) whose output is wanted; all others are only read. Not
                with rotary positions, a position bias or drop-path.

        Returns:
            As ``x``; (B, M, D) for queries.

        Raises:
            ValueError: in training with drop-path, if nothing says what is kept; for queries beside what they exclude.
        """
        if any(path.drops and keeps is None for path, keeps in zip((self.drop_path1, self.drop_path2), kept)):
            raise ValueError("a block with drop-path in training needs to be told which samples are kept")
        if queries is not None:
            if any(each is not None for each in (groups, rotary, position_bias, *kept)):
                raise ValueError("queries go with plain attention only, without groups, positions or drop-path")
            mixed = self.attn.attend_queries(self.norm1(x), queries, key_mask)
            x = take(x, queries) + self.ls1(mixed)
            return x + self.ls2(self.mlp(self.norm2(x)))
        if groups is None:
            groups = (Group(len(x), x.shape[1], rotary, key_mask, position_bias),)
        part, here, rows = self._take(x, groups, kept[0])
        normed = self.norm1(part)
        mixed = self.attn.attend(normed.flatten(0, -2), here).view(normed.shape)
        x = self._add(x, self.ls1(mixed), rows, self.drop_path1)
        part, _, rows = self._take(x, groups, kept[1])
        return self._add(x, self.ls2(self.mlp(self.norm2(part))), rows, self.drop_path2)

    @staticmethod
    def _take(
        x: Tensor, groups: Sequence[Group], kept: Kept | None
    ) -> tuple[Tensor, Sequence[Group], tuple[Tensor, Tensor] | None]:
        """What a branch is computed from, its groups, and which rows of ``x`` those are and whether they count."""
        if kept is None:
            return x, groups, None
        if x.dim() == 3:
            rows, counted = kept.rows[0], kept.counted[0][:, None, None]
        else:
            rows, counted = token_rows(groups, kept)
        return x.index_select(0, rows), select_groups(groups, kept), (rows, counted)

    @staticmethod
    def _add(x: Tensor, branch: Tensor, rows: tuple[Tensor, Tensor] | None, path: DropPath) -> Tensor:
        if rows is None:
            return x + branch
        index, counted = rows
        return x.index_add(0, index, (branch * (counted * path.scale)).to(x.dtype))


def init_transformer(module: nn.Module, law: Literal["normal", "xavier"] = "normal") -> None:
    """Starting values of a layer: weights by ``law``, biases zero, norms one and zero. For ``module.apply``.

    Args:
        law: ``normal``: truncated normal of standard deviation 0.02, as ViT, DINO and DINOv2 have it. ``xavier``:
            uniform with variance 2 / (fan in + fan out), a patch projection counting as the linear layer that it is,
            as MAE has it (He et al. 2021, appendix A.1).
    """
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        if law == "normal":
            nn.init.trunc_normal_(module.weight, std=0.02)
        else:
            nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.RMSNorm):
        nn.init.ones_(module.weight)
