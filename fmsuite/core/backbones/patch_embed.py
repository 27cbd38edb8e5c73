"""From arrays to tokens: patch projection for 1D to 3D inputs with any channels, and projection of bags of vectors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fmsuite.core.inputs import InputSpec
from fmsuite.core.tokens import PatchGrid, take
from fmsuite.errors import UsageError

_CONVOLUTIONS: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {
    1: nn.Conv1d,
    2: nn.Conv2d,
    3: nn.Conv3d,
}


class PatchEmbed(nn.Module):
    """One linear projection of each patch (Dosovitskiy et al. 2021, equation 1), as a convolution without overlap.

    With a single channel group the parameters are timm's (``proj.weight``, ``proj.bias``). With several, each group has
    its own projection (``proj.0.weight``, ...; Cong et al. 2022, "SatMAE", section 3.3). Tokens come in the order of
    ``PatchGrid.patchify``.

    Raises:
        UsageError: for more than three axes.
    """

    def __init__(self, grid: PatchGrid, width: int) -> None:
        super().__init__()
        self.grid = grid
        if len(grid.axes) not in _CONVOLUTIONS:
            raise UsageError(f"Patches over {len(grid.axes)} axes ({', '.join(grid.axes)}) are not supported.")
        convolution = _CONVOLUTIONS[len(grid.axes)]

        def project(channels: int) -> nn.Module:
            return convolution(channels, width, grid.patch_size, grid.patch_size)  # type: ignore[arg-type]

        self.proj: nn.Module
        if len(grid.groups) == 1:
            self.proj = project(len(grid.groups[0]))
        else:
            self.proj = nn.ModuleList(project(len(members)) for members in grid.groups)

    def forward(self, pixels: Tensor, keep: Tensor | None = None) -> Tensor:
        """(B, C, *size) to (B, N, D); every length must be a multiple of the patch size.

        Args:
            keep: (B, K) int64, the only patches that are wanted, (B, K, D). With a single channel group no others are
                projected.
        """
        if keep is not None:
            return self._project(pixels, keep)
        if isinstance(self.proj, nn.ModuleList):
            parts = [
                proj(pixels[:, list(members)]).flatten(2)
                for proj, members in zip(self.proj, self.grid.groups, strict=True)
            ]
            return torch.cat(parts, dim=2).transpose(1, 2)
        return self.proj(pixels).flatten(2).transpose(1, 2)

    def _project(self, pixels: Tensor, keep: Tensor) -> Tensor:
        proj = self.proj
        if not isinstance(proj, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return take(self(pixels), keep)
        # The kernel's values in the order of a patch's: channels vary fastest.
        weight = proj.weight.movedim(1, -1).flatten(1)
        return nn.functional.linear(take(self.grid.patchify(pixels), keep), weight, proj.bias)


class BagEmbed(nn.Module):
    """A linear map of stored feature vectors, for models over bags (slides seen as sets of tile features)."""

    def __init__(self, spec: InputSpec, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(spec.in_chans, width)

    def forward(self, pixels: Tensor, keep: Tensor | None = None) -> Tensor:
        """(B, N, C) to (B, N, D); or to (B, K, D), the vectors in ``keep``, (B, K) int64."""
        return self.proj(pixels if keep is None else take(pixels, keep))
