"""Tokens have coordinates on named axes: the layout of tokens, and the patch grid that makes them from pixels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fmsuite.core.inputs import InputSpec
from fmsuite.errors import UsageError


def take(values: Tensor, ids: Tensor) -> Tensor:
    """Some tokens of each sample: (B, N, D) by their numbers, (B, K) int64, to (B, K, D)."""
    return values.gather(1, ids[..., None].expand(-1, -1, values.shape[-1]))


@dataclass(frozen=True)
class TokenLayout:
    """Which tokens there are, and where.

    Attributes:
        axes: names, such as ``("y", "x")``, ``("group", "time", "y", "x")``.
        coords: (N, A) or (B, N, A) float32: position along each axis. Grid axes count patches from the corner;
            ``time`` is days since 2000-01-01; a bag's axes are in the physical unit of its ``InputSpec``.
        shape: the regular grid that the tokens fill in row-major order; ``None`` for an irregular or selected set.
        pitch: (A,) or (B, A) physical length of one step along each axis, where known; ``None`` otherwise.
        valid: (B, N) bool: tokens that carry data. ``None`` means all. An invalid token is neither context nor target.
    """

    axes: tuple[str, ...]
    coords: Tensor
    shape: tuple[int, ...] | None = None
    pitch: Tensor | None = None
    valid: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return self.coords.shape[-2]

    def along(self, axis: str, physical: bool = False, options: str = "model.") -> Tensor:
        """(N,) or (B, N) coordinates along one axis; in physical units on request.

        Args:
            options: how the names of the options begin that asked, for messages.

        Raises:
            UsageError: if the layout has no such axis, or no pitch where physical units were asked for.
        """
        if axis not in self.axes:
            raise UsageError(f"These tokens have no axis '{axis}'.", f"Their axes are {', '.join(self.axes)}.")
        column = self.axes.index(axis)
        values = self.coords[..., column]
        if not physical:
            return values
        if self.pitch is None:
            raise UsageError(
                f"Positions along '{axis}' were asked for in physical units, but the input's spacing is unknown.",
                f"Set {options}position_units to 'index', or give the data's spacing.",
            )
        step = self.pitch[..., column]
        if bool(step.isnan().any()):
            raise UsageError(
                f"Positions along '{axis}' were asked for in physical units, but some samples' spacing is unknown.",
                f"Leave those sources out, or set {options}position_units to 'index'.",
            )
        return values * (step[:, None] if step.dim() == 1 else step)

    def select(self, ids: Tensor) -> TokenLayout:
        """The layout of a subset of tokens.

        Args:
            ids: (B, K) int64 token numbers.
        """
        coords = self.coords
        if coords.dim() == 2:
            picked = coords[ids]
        else:
            picked = take(coords, ids)
        valid = None if self.valid is None else self.valid.gather(1, ids)
        return replace(self, coords=picked, shape=None, valid=valid)


@dataclass(frozen=True)
class PatchGrid:
    """How arrays are cut into tokens. Small and picklable: loader workers use it to sample masks.

    Token order is row-major over ``(group, *axes)``; the group axis exists only if there is more than one group.

    Attributes:
        axes: the input's axes.
        patch_size: length of a patch along each of them.
        groups: channel indices of each token group (see ``InputSpec.groups``).
        group_axis: name of the group axis.
        min_valid: share of a patch's values that must be valid for its token to be valid.
    """

    axes: tuple[str, ...]
    patch_size: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    group_axis: str = "group"
    min_valid: float = 0.5

    @classmethod
    def build(cls, spec: InputSpec, patch_size: int | tuple[int, ...], min_valid: float = 0.5) -> PatchGrid:
        """The grid for an input; an integer patch size applies to spatial axes, and 1 to the others.

        Raises:
            UsageError: if the patch size does not fit the axes or exceeds the input.
        """
        if isinstance(patch_size, int):
            sizes = [1] * len(spec.axes)
            for axis in spec.spatial:
                sizes[axis] = patch_size
            patch_size = tuple(sizes)
        if len(patch_size) != len(spec.axes) or min(patch_size) < 1:
            raise UsageError(f"patch_size {patch_size} does not fit the axes {spec.axes}.", "Give one number an axis.")
        grid = cls(spec.axes, patch_size, tuple(members for _, members in spec.groups), min_valid=min_valid)
        grid.shape(spec.size)
        return grid

    @property
    def token_axes(self) -> tuple[str, ...]:
        return (self.group_axis, *self.axes) if len(self.groups) > 1 else self.axes

    @property
    def patch_values(self) -> int:
        """Values in the largest patch: pixels times the channels of the widest group."""
        return math.prod(self.patch_size) * max(len(members) for members in self.groups)

    def shape(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """The token grid of an array of that size, group axis included.

        Raises:
            UsageError: if the size is not a multiple of the patch size.
        """
        if len(size) != len(self.axes) or any(s < p or s % p for s, p in zip(size, self.patch_size, strict=True)):
            raise UsageError(
                f"An input of size {tuple(size)} cannot be cut into patches of {self.patch_size}.",
                "Use a multiple of the patch size along every axis.",
            )
        inner = tuple(s // p for s, p in zip(size, self.patch_size, strict=True))
        return (len(self.groups), *inner) if len(self.groups) > 1 else inner

    def layout(
        self,
        size: tuple[int, ...],
        coords: Mapping[str, Tensor] | None = None,
        spacing: Tensor | None = None,
        valid: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> TokenLayout:
        """The tokens of arrays of a size.

        Args:
            size: the array's length along each axis.
            coords: for axes that are not evenly spaced, (B, length) positions of the array's samples (``time`` in
                days); a patch of several samples stands at their mean.
            spacing: (A,) or (B, A) physical length of one array sample along each axis.
            valid: (B, N) bool token validity.
        """
        shape = self.shape(size)
        steps = torch.meshgrid(*(torch.arange(n, dtype=torch.float32, device=device) for n in shape), indexing="ij")
        grid = torch.stack([s.flatten() for s in steps], dim=-1)
        axes = self.token_axes
        for axis, values in (coords or {}).items():
            position = self.axes.index(axis)
            column = axes.index(axis)
            centres = values.to(device).unflatten(-1, (-1, self.patch_size[position])).mean(-1)
            if grid.dim() == 2:
                grid = grid.expand(len(values), -1, -1).clone()
            grid[..., column] = centres.to(torch.float32).gather(1, grid[..., column].long())
        pitch = None
        if spacing is not None:
            spacing = spacing.to(device, non_blocking=True)
            # By numbers and not by a tensor of them, for whose copy to the device the host would wait.
            pitch = torch.stack([spacing[..., axis] * patch for axis, patch in enumerate(self.patch_size)], dim=-1)
            for axis in coords or {}:
                pitch[..., self.axes.index(axis)] = 1.0
            if len(self.groups) > 1:
                pitch = torch.cat([torch.ones_like(pitch[..., :1]), pitch], dim=-1)
        return TokenLayout(axes, grid, shape, pitch, valid)

    def patchify(self, values: Tensor) -> Tensor:
        """(B, C, *size) to (B, N, P), P = ``patch_values``; channels vary fastest within a patch, as in MAE.

        Groups with fewer channels than the widest are padded with zeros at the end (see ``element_mask``).
        """
        if self.groups == (tuple(range(values.shape[1])),):
            return self._cut(values)
        return torch.cat([self._cut(values[:, list(members)]) for members in self.groups], dim=1)

    def _cut(self, values: Tensor) -> Tensor:
        dims = len(self.axes)
        batch, channels = values.shape[:2]
        split = [batch, channels]
        for length, patch in zip(values.shape[2:], self.patch_size, strict=True):
            split += [length // patch, patch]
        order = [0, *range(2, 2 + 2 * dims, 2), *range(3, 3 + 2 * dims, 2), 1]
        cut = values.reshape(split).permute(order)
        flat = cut.reshape(batch, math.prod(cut.shape[1 : 1 + dims]), -1)
        missing = self.patch_values - flat.shape[-1]
        return torch.nn.functional.pad(flat, (0, missing)) if missing else flat

    def unpatchify(self, patches: Tensor, size: tuple[int, ...]) -> Tensor:
        """The inverse of ``patchify``: (B, N, P) to (B, C, *size)."""
        dims = len(self.axes)
        inner = tuple(s // p for s, p in zip(size, self.patch_size, strict=True))
        per_group = math.prod(inner)
        channels = sum(len(members) for members in self.groups)
        out = patches.new_empty((len(patches), channels, *size))
        for number, members in enumerate(self.groups):
            part = patches[:, number * per_group : (number + 1) * per_group]
            part = part[..., : math.prod(self.patch_size) * len(members)]
            cut = part.reshape(len(part), *inner, *self.patch_size, len(members))
            order = [0, 1 + 2 * dims]
            for axis in range(dims):
                order += [1 + axis, 1 + dims + axis]
            out[:, list(members)] = cut.permute(order).reshape(len(part), len(members), *size)
        return out

    def element_mask(self, device: torch.device | str = "cpu") -> Tensor:
        """(G, P) bool: which of a patch's P values exist, for each group."""
        mask = torch.zeros(len(self.groups), self.patch_values, dtype=torch.bool, device=device)
        for number, members in enumerate(self.groups):
            mask[number, : math.prod(self.patch_size) * len(members)] = True
        return mask

    def valid_share(self, valid: Tensor) -> Tensor:
        """(B, N) float32: the share of each patch's values that are valid.

        Args:
            valid: (B, C, *size) or (B, 1, *size) bool.
        """
        channels = sum(len(members) for members in self.groups)
        full = valid.to(torch.float32).expand(-1, channels, *valid.shape[2:])
        per_group = math.prod(s // p for s, p in zip(valid.shape[2:], self.patch_size, strict=True))
        counts = self.element_mask(valid.device).sum(-1).repeat_interleave(per_group)
        return self.patchify(full).sum(-1) / counts

    def valid_tokens(self, valid: Tensor) -> Tensor:
        """(B, N) bool: tokens whose valid share is at least ``min_valid`` (and above zero)."""
        share = self.valid_share(valid)
        return (share >= self.min_valid) & (share > 0)
