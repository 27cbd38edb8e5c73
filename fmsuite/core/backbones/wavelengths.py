"""A patch embedding whose kernel is computed from the wavelengths of the bands (Xiong et al. 2024, "Neural plasticity-
inspired multimodal foundation model for Earth observation" (DOFA), arXiv 2403.15356)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmsuite.core.inputs import Channel, InputSpec
from fmsuite.core.tokens import PatchGrid, take
from fmsuite.errors import UsageError

CODE = 128
"""Features of a wavelength's code."""
WEIGHT_TOKENS = 128
"""Learned tokens that the bands' codes are read beside."""
HEADS, HIDDEN = 4, 2048
"""Of the generator's transformer layer."""
SHORTEST = 100.0
"""Nanometres; below it somebody wrote micrometres."""
_OMEGA = 10_000.0
_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def wavelength_codes(wavelengths: Sequence[float], width: int = CODE) -> Tensor:
    """Sine-cosine codes of wavelengths in nanometres, (K, width) float32.

    Feature i of the first half is ``sin(w / 10000^(2i/width))``, the second half holds the cosines. The unit matters:
    the fastest feature turns by one radian a nanometre. Counted in micrometres, everything from blue to near infrared
    lies within half a radian of it, and the codes of two bands are all but equal.

    Raises:
        UsageError: for wavelengths that are no nanometres.
    """
    odd = [value for value in wavelengths if not value >= SHORTEST]
    if odd:
        raise UsageError(
            f"A wavelength of {odd[0]:g} nm is shorter than those of any band.",
            "Wavelengths are in nanometres: blue is about 490.",
        )
    steps = torch.arange(width // 2, dtype=torch.float64) / (width // 2)
    angles = torch.tensor(list(wavelengths), dtype=torch.float64)[:, None] / _OMEGA**steps
    return torch.cat([angles.sin(), angles.cos()], dim=1).to(torch.float32)


class WavelengthEmbed(nn.Module):
    """One token for each patch, whatever the bands: kernel and bias come from the bands' wavelengths.

    As published: the code of each wavelength goes through two linear layers with a residual connection, then, between
    ``WEIGHT_TOKENS`` learned tokens and one for the bias, through a transformer layer; a linear map makes of each
    band's output (plus its input) the band's slice of the kernel, another of the last token the bias. So the bands'
    order does not matter, and bands of equal wavelengths are treated alike.

    Not as published:

    - A channel without a wavelength (radar, an elevation model) has a learned vector of its own in the place of the
      code, known by the channel's name. DOFA gives both polarisations of Sentinel-1 the wavelength 3.75 um, which
      makes their kernels equal.
    - The kernel starts with the spread of a linear embedding's (DOFA's is about forty times smaller) and the bias at
      zero.
    - The kernel is divided by the number of bands, relative to that of training, so that tokens keep their magnitude
      where there are fewer or more.

    A band's invalid pixels are zero once normalised, and so add nothing: the other bands' part of the token is what it
    was. A band that is left out of ``spec`` is not there at all: the others are scaled up for it, and their kernels no
    longer see its token.

    Args:
        spec: its channels, in the order of the pixels'.
        grid: one channel group.
        width: D.
        law: by which a linear embedding would start; see ``init_transformer``.

    Raises:
        UsageError: if channels are grouped, a wavelength is not in nanometres, or there are more than three axes.
    """

    codes: Tensor
    order: Tensor
    gain: Tensor

    def __init__(self, spec: InputSpec, grid: PatchGrid, width: int, law: Literal["normal", "xavier"]) -> None:
        super().__init__()
        if len(grid.groups) > 1:
            raise UsageError(
                "model.patch_embedding: wavelength makes one token of all bands, but the channels are in groups.",
                "Take the groups away (data.groups=none), or set model.patch_embedding to linear.",
            )
        if len(grid.axes) not in _CONVOLUTIONS:
            raise UsageError(f"Patches over {len(grid.axes)} axes ({', '.join(grid.axes)}) are not supported.")
        known = [channel.wavelength for channel in spec.channels if channel.wavelength is not None]
        self.grid, self.width, self.channels = grid, width, spec.channels
        self.register_buffer("codes", wavelength_codes(known), persistent=False)
        self.register_buffer("order", torch.tensor(_order(spec.channels)), persistent=False)
        patch = math.prod(grid.patch_size)
        fans = width + patch * spec.in_chans
        spread = 0.02 if law == "normal" else math.sqrt(2 / fans)
        self.register_buffer("gain", torch.tensor([spread * spec.in_chans]))
        named = names_without_wavelength(spec)
        self.named = nn.Parameter(torch.zeros(len(named), CODE)) if named else None
        self.residual = nn.Sequential(nn.Linear(CODE, CODE), nn.ReLU(), nn.Linear(CODE, CODE), nn.ReLU())
        self.weight_tokens = nn.Parameter(torch.zeros(WEIGHT_TOKENS, CODE))
        self.bias_token = nn.Parameter(torch.zeros(1, CODE))
        self.transformer = nn.TransformerEncoderLayer(
            CODE, HEADS, HIDDEN, dropout=0.0, activation="gelu", batch_first=True
        )
        self.to_kernel = nn.Linear(CODE, patch * width)
        self.to_bias = nn.Linear(CODE, width)
        self.init_weights()

    def init_weights(self) -> None:
        """Starting values (PyTorch's global generator)."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        nn.init.xavier_uniform_(self.transformer.self_attn.in_proj_weight)
        for token in (self.weight_tokens, self.bias_token):
            nn.init.normal_(token, std=0.02)
        if self.named is not None:
            # Of the magnitude of sines and cosines.
            nn.init.normal_(self.named, std=math.sqrt(0.5))
        # What is read has a squared length of about 2 * CODE: normalised features, and the residual layers' output.
        nn.init.normal_(self.to_kernel.weight, std=(2 * CODE) ** -0.5)
        nn.init.zeros_(self.to_bias.weight)

    def kernel(self) -> tuple[Tensor, Tensor]:
        """The kernel (D, C, *patch) and the bias (D,) for the bands there are."""
        rows = self.codes if self.named is None else torch.cat([self.codes, self.named])
        bands = rows.index_select(0, self.order)
        bands = bands + self.residual(bands)
        read = self.transformer(torch.cat([self.weight_tokens, bands, self.bias_token])[None])[0]
        slices = self.to_kernel(read[WEIGHT_TOKENS:-1] + bands) * (self.gain / len(bands))
        kernel = slices.unflatten(-1, (*self.grid.patch_size, self.width)).movedim(-1, 0)
        return kernel, self.to_bias(read[-1])

    def forward(self, pixels: Tensor, keep: Tensor | None = None) -> Tensor:
        """(B, C, *size) to (B, N, D); every length must be a multiple of the patch size.

        Args:
            keep: (B, K) int64, the only patches that are wanted, (B, K, D); no others are projected.
        """
        kernel, bias = self.kernel()
        if keep is not None:
            weight = kernel.movedim(1, -1).flatten(1)
            return F.linear(take(self.grid.patchify(pixels), keep), weight, bias)
        convolve = _CONVOLUTIONS[len(self.grid.axes)]
        return convolve(pixels, kernel, bias, self.grid.patch_size).flatten(2).transpose(1, 2)  # type: ignore[operator]


def check_wavelengths(spec: InputSpec) -> None:
    """
    Raises:
        UsageError: for data from which such an embedding would learn nothing about wavelengths.
    """
    if all(channel.wavelength is None for channel in spec.channels):
        raise UsageError(
            f"model.patch_embedding: wavelength needs wavelengths, and none of the channels "
            f"{', '.join(spec.channel_names)} has one.",
            "Name the sensor (data.sensor), or set model.patch_embedding to linear.",
        )


def names_without_wavelength(spec: InputSpec) -> list[str]:
    """Of the channels that have a learned vector instead, in the order of the vectors."""
    return [channel.name for channel in spec.channels if channel.wavelength is None]


def carry_over(state: dict[str, Tensor], source: InputSpec, target: InputSpec, origin: str) -> None:
    """Make a state dict of a model with this embedding fit other channels, in place.

    Args:
        source, target: the inputs that the state is of, and shall be for.
        origin: the source's name in messages.

    Raises:
        UsageError: for a channel without a wavelength that the source does not know.
    """
    key = "patch_embed.named"
    have, want = names_without_wavelength(source), names_without_wavelength(target)
    unknown = [name for name in want if name not in have]
    if unknown:
        known = ", ".join(source.channel_names)
        raise UsageError(
            f"{origin}: channel {', '.join(unknown)} has no wavelength, and none of that name was trained on.",
            f"Give its wavelength in nanometres. Trained on: {known}.",
        )
    vectors = state.pop(key, None)
    if want:
        assert vectors is not None
        state[key] = vectors[[have.index(name) for name in want]]


def _order(channels: Sequence[Channel]) -> list[int]:
    """Where each channel's code stands among the codes of wavelengths, followed by the learned vectors."""
    with_code = sum(channel.wavelength is not None for channel in channels)
    places, codes, vectors = [], 0, with_code
    for channel in channels:
        if channel.wavelength is not None:
            places.append(codes)
            codes += 1
        else:
            places.append(vectors)
            vectors += 1
    return places
