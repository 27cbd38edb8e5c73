"""An encoder under other normalisations than the one that it was trained with."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from fmsuite.core.encoders import Encoder
from fmsuite.core.evaluation.normalisations import ALL, NORMALISATIONS, TRAINED, Normalised, check_names
from fmsuite.core.evaluation.value_statistics import Statistics, ValueSample
from fmsuite.core.inputs import Normalize
from fmsuite.errors import UsageError


class Renormalised(Encoder):
    """An encoder whose input is normalised otherwise; its weights are shared.

    Attributes:
        by_window: every window is standardised by itself.
    """

    def __init__(self, encoder: Encoder, name: str, found: Normalised) -> None:
        provenance = {**encoder.provenance, "normalisation": name, "of": encoder.identity}
        super().__init__(encoder.backbone, found.spec, encoder.pooling, provenance)
        self._said = found.said
        self.by_window = found.by_window
        if found.by_window:
            self.normalize = WindowNormalize(found.spec)

    @property
    def normalisation(self) -> str:
        return self._said

    @cached_property
    def identity(self) -> str:
        """Of weights, input and pooling, and of what is done to each window."""
        own = Encoder.identity.func(self)  # type: ignore[attr-defined]
        if not self.by_window:
            return str(own)
        return hashlib.blake2b(f"{own} each window by itself".encode(), digest_size=16).hexdigest()


class WindowNormalize(Normalize):
    """Physical values minus their mean over the window, divided by their standard deviation, for each channel over its
    valid values. Invalid positions, and channels without spread, become zero."""

    def forward(self, values: Tensor, valid: Tensor | None = None) -> Tensor:
        out = (values.to(torch.float32) * self.scale + self.offset).clamp(self.low, self.high)
        there = torch.ones_like(out, dtype=torch.bool) if valid is None else valid.expand_as(out)
        out = torch.where(there, out, 0.0)
        axes = tuple(range(2, out.dim()))
        count = there.sum(axes, keepdim=True).clamp(min=1)
        mean = out.sum(axes, keepdim=True, dtype=torch.float64) / count
        centred = torch.where(there, out.double() - mean, 0.0)
        std = (centred.square().sum(axes, keepdim=True) / count).sqrt()
        # Taking the mean off leaves a trace of a spread that is zero.
        varies = std > 1e-6 * mean.abs()
        return torch.where(varies, centred / torch.where(varies, std, 1.0), 0.0).float()


def renormalised(
    encoder: Encoder, called: str, names: Sequence[str], sample: ValueSample
) -> tuple[dict[str, Renormalised], list[str]]:
    """The encoder under each of several normalisations, but not as it was trained, which it is itself.

    Args:
        called: the encoder, for messages.
        names: in ``NORMALISATIONS``, or ``all``, of which those are taken that apply.
        sample: of the data.

    Returns:
        By name, and sentences on what does not apply.

    Raises:
        UsageError: for a name that was given and does not apply, with the reason.
    """
    check_names(names)
    if encoder.spec.bag:
        raise UsageError(f"'{called}' takes vectors, whose normalisations are not compared.", "Leave it out.")
    data = Statistics.of(sample, encoder.spec)
    found: dict[str, Renormalised] = {}
    notes = []
    for name, normalisation in NORMALISATIONS.items():
        if name == TRAINED or not {ALL, name} & set(names):
            continue
        try:
            made = normalisation.apply(encoder.spec, data)
            if made.spec == encoder.spec and not made.by_window:
                raise UsageError("it is what the encoder was trained with")
        except UsageError as error:
            if name in names:
                raise UsageError(
                    f"The normalisation '{name}' does not apply to '{called}': {error.message}.",
                    "Leave it out of --normalisations.",
                ) from error
            notes.append(f"The normalisation '{name}' was left out for {called}: {error.message}.")
            continue
        found[name] = Renormalised(encoder, name, made)
    return found, notes
