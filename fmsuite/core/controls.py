"""Controls: what an encoder has to beat. The same network untrained, the distribution of its input's values, their
means."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fmsuite.core.backbones.build import build_backbone
from fmsuite.core.backbones.datewise import Datewise
from fmsuite.core.backbones.timm_backbone import TimmBackbone
from fmsuite.core.backbones.vit import VisionTransformer
from fmsuite.core.data.sample import View
from fmsuite.core.encoders import Encoder
from fmsuite.core.input_words import DATA, normalisation_sentence, physical_sentence
from fmsuite.core.inputs import InputSpec, Normalize
from fmsuite.core.seeding import derive
from fmsuite.errors import UsageError

REACH = 3.0
"""Standard deviations on both sides of the mean that the bins of normalised values cover."""

_LAYER_SCALES = frozenset({"gamma", "gamma_1", "gamma_2"})
"""Names of LayerScale's parameters, here and in timm."""


def untrained(encoder: Encoder, seed: int = 0) -> Encoder:
    """The same architecture, input and pooling with fresh weights, every LayerScale at 1.

    Training starts LayerScale near zero (1e-5 in DINOv2), where blocks give nothing to the class token: it would be the
    same for every input to five digits, which is a control too easy to beat.

    PyTorch's global generator is left as it was. The same seed gives the same weights.

    Raises:
        UsageError: for a backbone of a kind that cannot be made again from its options.
        FmsuiteError: if the options of a timm model from the Hugging Face hub cannot be fetched.
    """
    old = encoder.backbone
    if not isinstance(old, VisionTransformer | TimmBackbone | Datewise):
        raise UsageError(f"A {type(old).__name__} cannot be made again without its weights.", "Leave the control out.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "untrained"))
        fresh = build_backbone(old.config.model_copy(update={"weights": None}), old.spec)
    with torch.no_grad():
        for name, parameter in fresh.named_parameters():
            if name.rpartition(".")[2] in _LAYER_SCALES:
                parameter.fill_(1)
    provenance = {"control": "untrained", "seed": seed, "of": encoder.identity}
    return Encoder(fresh, encoder.spec, encoder.pooling, provenance)


class Histogram(nn.Module):
    """The histogram of each channel's valid values, one after the other: an ``Embedder`` that sees no structure.

    8-bit values (an input that only divides them by 255) are counted in equal bins over 0 to 255; other values, once
    normalised, in equal bins over -3 to 3 standard deviations, the outermost of which are open. The shares of all
    channels together (``channel_histograms``) are scaled to unit length: a regularised probe depends on the size of
    its features, and shares alone are so small that the published strength would hold the control down. A valid value
    that is not finite makes the vector NaN.

    Args:
        spec: the input. Its size should be that of the windows: resampling smooths values, and weakens the control.
        bins: bins a channel.

    Raises:
        UsageError: for a bag of vectors.
        ValueError: for fewer than 2 bins.
    """

    pooling = "histogram"

    def __init__(self, spec: InputSpec, bins: int = 32) -> None:
        super().__init__()
        if spec.bag:
            raise UsageError("A histogram is a control for images, not for bags of vectors.", "Leave the control out.")
        if bins < 2:
            raise ValueError(f"{bins} bins")
        self.spec = spec
        self.bins = bins
        self.eight_bit = spec.eight_bit
        self.normalize = Normalize(spec)
        self.provenance: dict[str, Any] = {"control": "histogram", "bins": bins}

    @property
    def dim(self) -> int:
        """Bins of all channels."""
        return self.spec.in_chans * self.bins

    @property
    def normalisation(self) -> str:
        """One sentence on what is counted."""
        if self.eight_bit:
            return f"Raw values from 0 to 255, counted in {self.bins} bins; nothing is normalised."
        counted = f"{self.bins} bins over {-REACH:g} to {REACH:g}"
        return f"{normalisation_sentence(self.spec, DATA)[:-1]}; counted in {counted}."

    @cached_property
    def identity(self) -> str:
        """A hash of the input and the number of bins: equal identities give equal histograms."""
        described = {
            "histogram": self.bins,
            "reach": REACH,
            "scale": "unit length",
            "input": self.spec.model_dump(mode="json"),
        }
        return hashlib.blake2b(json.dumps(described, sort_keys=True).encode(), digest_size=16).hexdigest()

    @torch.no_grad()
    def embed(self, view: View) -> Tensor:
        """(B, C * bins) float32 of raw values, (B, C, *size).

        Raises:
            UsageError: if the number of channels or axes is not the input's.
        """
        pixels = view.pixels
        if pixels.dim() != 2 + len(self.spec.axes) or pixels.shape[1] != self.spec.in_chans:
            form = f"(B, {self.spec.in_chans}, {', '.join(self.spec.axes)})"
            raise UsageError(f"This histogram takes {form}, not an array of shape {tuple(pixels.shape)}.")
        if self.eight_bit:
            values, low, high = pixels.to(torch.float32), 0.0, 256.0
        else:
            values, low, high = self.normalize(pixels), -REACH, REACH
        return nn.functional.normalize(channel_histograms(values, self.bins, low, high, view.valid), dim=1)


class BandMeans(nn.Module):
    """The mean of each channel's valid values, and their standard deviation where asked for: an ``Embedder`` that sees
    one spectrum a window, in physical units (``clip(offset + scale * raw)``).

    A channel without a valid value has the mean that the input names and a deviation of 0, which tells a classifier
    nothing. A valid value that is not finite makes the vector NaN.

    Args:
        spec: the input.
        deviations: also the standard deviations, after all means.

    Raises:
        UsageError: for a bag of vectors.
    """

    def __init__(self, spec: InputSpec, deviations: bool = False) -> None:
        super().__init__()
        if spec.bag:
            raise UsageError("Band means are a control for images, not for bags of vectors.", "Leave the control out.")
        self.spec = spec
        self.deviations = deviations
        self.pooling = "mean and standard deviation" if deviations else "mean"
        flat = tuple(channel.model_copy(update={"mean": 0.0, "std": 1.0}) for channel in spec.channels)
        self.physical = Normalize(spec.model_copy(update={"channels": flat}))
        self.register_buffer("usual", torch.tensor([c.mean for c in spec.channels]), persistent=False)
        self.provenance: dict[str, Any] = {"control": "band_means", "deviations": deviations}

    @property
    def dim(self) -> int:
        """Channels, once or twice."""
        return self.spec.in_chans * (2 if self.deviations else 1)

    @property
    def normalisation(self) -> str:
        """One sentence on what is averaged."""
        return f"{physical_sentence(self.spec)}; averaged over the valid values of each channel."

    @cached_property
    def identity(self) -> str:
        """A hash of the input and of what is taken of it: equal identities give equal vectors."""
        described = {"band means": self.pooling, "input": self.spec.model_dump(mode="json")}
        return hashlib.blake2b(json.dumps(described, sort_keys=True).encode(), digest_size=16).hexdigest()

    @torch.no_grad()
    def embed(self, view: View) -> Tensor:
        """(B, C) or (B, 2 C) float32 of raw values, (B, C, *size).

        Raises:
            UsageError: if the number of channels or axes is not the input's.
        """
        pixels = view.pixels
        if pixels.dim() != 2 + len(self.spec.axes) or pixels.shape[1] != self.spec.in_chans:
            form = f"(B, {self.spec.in_chans}, {', '.join(self.spec.axes)})"
            raise UsageError(f"Band means are of {form}, not of an array of shape {tuple(pixels.shape)}.")
        values = self.physical(pixels).flatten(2).double()
        valid = torch.ones_like(values, dtype=torch.bool)
        if view.valid is not None:
            valid = view.valid.expand(pixels.shape).flatten(2)
        values = torch.where(valid, values, 0.0)
        count = valid.sum(2)
        mean = torch.where(count > 0, values.sum(2) / count.clamp(min=1), self.get_buffer("usual").double())
        if not self.deviations:
            return mean.float()
        squared = torch.where(valid, values - mean[:, :, None], 0.0).square().sum(2)
        return torch.cat([mean, (squared / count.clamp(min=1)).sqrt()], dim=1).float()


def channel_histograms(values: Tensor, bins: int, low: float, high: float, valid: Tensor | None = None) -> Tensor:
    """Shares of each channel's valid values in equal bins from ``low`` to ``high``; what lies beyond counts in the
    outermost bins.

    Args:
        values: (B, C, *size) float.
        valid: bool, broadcastable to ``values``; ``None`` means all valid.

    Returns:
        (B, C * bins) float32, channel after channel; 0 where a channel has no valid value, NaN where one of them is
        not finite.
    """
    batch, channels = values.shape[:2]
    flat = values.reshape(batch * channels, -1)
    finite = flat.isfinite()
    # Clamped while still floating: a huge value has no integer.
    number = ((torch.where(finite, flat, low) - low) * (bins / (high - low))).clamp(0, bins - 1).long()
    number += torch.arange(len(flat), device=flat.device)[:, None] * bins
    if valid is not None:
        chosen = valid.expand(values.shape).reshape(flat.shape)
        number, broken = number[chosen], (~finite & chosen).any(1)
    else:
        broken = (~finite).any(1)
    # Counts are whole numbers, which float32 would lose beyond 2^24.
    counts = torch.bincount(number.flatten(), minlength=len(flat) * bins).view(len(flat), bins).double()
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    shares[broken] = torch.nan
    return shares.to(torch.float32).view(batch, channels * bins)
