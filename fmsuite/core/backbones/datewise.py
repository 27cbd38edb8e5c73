"""A backbone of single images on series of them: each date by itself, as one network over time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fmsuite.core.backbones.base import Backbone, Features
from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.data.sample import View
from fmsuite.core.inputs import InputSpec
from fmsuite.core.tokens import PatchGrid
from fmsuite.errors import UsageError

TIME = "time"
_EACH_DATE = 0x9E3779B97F4A7C15 >> 2
"""What separates the keys of a sample's dates; the first date keeps the sample's own."""


def one_date(spec: InputSpec) -> InputSpec:
    """The input of one date of a series.

    Raises:
        UsageError: for an input without the axis ``time``, or of that axis alone.
    """
    if spec.bag or TIME not in spec.axes or len(spec.axes) < 2:
        raise UsageError(
            f"The dates of a series are taken one by one, and this input's axes are {', '.join(spec.axes)}.",
            "Set model.datewise to false, or give time series (remote sensing: data.series).",
        )
    kept = [place for place, axis in enumerate(spec.axes) if axis != TIME]
    spacing = None if spec.spacing is None else tuple(spec.spacing[place] for place in kept)
    return spec.model_copy(
        update={
            "axes": tuple(spec.axes[place] for place in kept),
            "size": tuple(spec.size[place] for place in kept),
            "spacing": spacing,
        }
    )


def over_dates(spec: InputSpec, dates: int) -> InputSpec:
    """The input of a series of a single date's."""
    return spec.model_copy(
        update={
            "axes": (TIME, *spec.axes),
            "size": (dates, *spec.size),
            "spacing": None if spec.spacing is None else (1.0, *spec.spacing),
        }
    )


@dataclass
class Dates:
    """The dates of a batch of series that have a valid token, one after the other.

    Attributes:
        view: (R, ...) of them, without the axis ``time``.
        rows: (R,) int64, their numbers among all B * T; ``None`` where none is left out.
        used: (B, T) bool.
    """

    view: View
    rows: Tensor | None
    used: Tensor

    def apart(self, values: Tensor) -> Tensor:
        """(R, ...) to (B, T, ...), zero at dates that were left out."""
        if self.rows is not None:
            empty = values.new_zeros((self.used.numel(), *values.shape[1:]))
            values = empty.index_copy(0, self.rows, values)
        return values.unflatten(0, tuple(self.used.shape))

    def mean(self, values: Tensor) -> Tensor:
        """(R, ...) to (B, ...), over the dates of each series; zero where there is none."""
        apart = self.apart(values)
        # A date that is there only for want of another must not count.
        weight = self.used.to(apart.dtype).reshape(*self.used.shape, *(1,) * (apart.dim() - 2))
        return (apart * weight).sum(1) / weight.sum(1).clamp(min=1)


class Datewise(Backbone):
    """Takes the axis ``time`` into the batch and out again.

    Tokens are those of each date, in the order of a grid with the axis ``time``; dates without a valid token are not
    looked at. Class token, registers and what the class token attends to are the means over the dates that were. A
    series of one date gives what the backbone gives of that date, and padding changes nothing. What time is it cannot
    tell: dates in another order give the same tokens in another order.

    Args:
        single: the backbone of one date.
        spec: the series; without its time, the backbone's input.

    Raises:
        UsageError: if it is not.
    """

    def __init__(self, single: Backbone, spec: InputSpec) -> None:
        super().__init__()
        differences = single.spec.differences(one_date(spec))
        if differences or single.grid is None or one_date(spec).size != single.spec.size:
            found = "; ".join(differences) or f"size {single.spec.size} against {one_date(spec).size}"
            raise UsageError(f"The backbone of one date has another input than the dates: {found}.")
        self.single = single
        self.spec = spec
        self.width, self.depth = single.width, single.depth
        self.can_mask_tokens = single.can_mask_tokens
        self.can_resize = single.can_resize
        self.can_show_attention = single.can_show_attention
        place = spec.axes.index(TIME)
        patch = single.grid.patch_size
        self.grid: PatchGrid = replace(single.grid, axes=spec.axes, patch_size=(*patch[:place], 1, *patch[place:]))

    @property
    def config(self) -> ModelConfig:
        """The options of the backbone of one date, as those of this one."""
        config = self.single.config
        assert isinstance(config, ModelConfig)
        return config.model_copy(update={"datewise": True})

    @property
    def has_cls(self) -> bool:
        return self.single.has_cls

    def layer_of(self, parameter: str) -> int:
        return self.single.layer_of(parameter.removeprefix("single."))

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """As the backbone of one date.

        Raises:
            UsageError: if that cannot.
        """
        method = getattr(self.single, "set_activation_checkpointing", None)
        if method is None:
            raise UsageError(f"{type(self.single).__name__} does not support training.activation_checkpointing.")
        method(enabled)

    def compile_blocks(self, backend: str = "inductor", mode: str | None = None) -> None:
        """Nothing: whoever compiles the backbones of a network meets that of one date among them."""

    def dates(self, view: View) -> Dates:
        """The dates of a normalised view that have a valid token; one of the batch where none has."""
        axis = 2 + self.spec.axes.index(TIME)
        samples, times = len(view), view.pixels.shape[axis]

        def folded(values: Tensor, axis: int = axis) -> Tensor:
            return values.movedim(axis, 1).flatten(0, 1)

        spacing = view.spacing
        if spacing is not None:
            kept = [place for place, name in enumerate(self.spec.axes) if name != TIME]
            spacing = spacing[:, kept].repeat_interleave(times, 0)
        keys = view.keys
        if keys is not None:
            keys = ((keys[:, None] + torch.arange(times) * _EACH_DATE) & torch.iinfo(torch.int64).max).flatten()
        flat = View(
            folded(view.pixels),
            None if view.valid is None else folded(view.valid),
            coords={name: v.repeat_interleave(times, 0) for name, v in view.coords.items() if name != TIME},
            spacing=spacing,
            keys=keys,
        )
        if flat.valid is None:
            used = torch.ones(samples, times, dtype=torch.bool, device=view.pixels.device)
            return Dates(flat, None, used)
        assert self.single.grid is not None
        used = self.single.grid.valid_tokens(flat.valid).any(1)
        rows = used.nonzero()[:, 0]
        if len(rows) == len(used):
            return Dates(flat, None, used.view(samples, times))
        if not len(rows):
            rows = torch.zeros(1, dtype=torch.int64, device=used.device)
        picked = replace(flat, keys=None)[rows]
        picked.keys = None if keys is None else keys[rows.cpu()]
        return Dates(picked, rows, used.view(samples, times))

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
        """As in the base class.

        Raises:
            UsageError: for ``keep``: each date would keep another number of tokens.
        """
        if keep is not None or keep_valid is not None:
            raise UsageError("Dates that are taken one by one cannot drop tokens.", "Use a model of time series.")
        layout = self.layout(view)
        dates = self.dates(view)
        if mask is not None:
            mask = self._of_dates(mask[..., None], layout.shape)[..., 0]
            mask = mask if dates.rows is None else mask[dates.rows]
        found = self.single(dates.view, mask=mask, layers=layers, norm_layers=norm_layers, attention=attention)
        weights = None
        if found.attention is not None:
            share = dates.apart(found.attention) / dates.used.sum(1).clamp(min=1)[:, None, None, None]
            weights = self._of_series(share.movedim(2, -1)).movedim(-1, 1)
        return Features(
            patches=self._of_series(dates.apart(found.patches)),
            layout=layout,
            cls=None if found.cls is None else dates.mean(found.cls),
            registers=None if found.registers is None else dates.mean(found.registers),
            intermediate=tuple(self._of_series(dates.apart(output)) for output in found.intermediate),
            attention=weights,
            intermediate_prefix=tuple(dates.mean(output) for output in found.intermediate_prefix),
        )

    def _of_series(self, tokens: Tensor) -> Tensor:
        """(B, T, N, D) of each date to (B, T * N, D) in the order of the grid: time stands behind the group."""
        groups = len(self.grid.groups)
        return tokens.unflatten(2, (groups, -1)).transpose(1, 2).flatten(1, 3)

    def _of_dates(self, tokens: Tensor, shape: tuple[int, ...] | None) -> Tensor:
        """The inverse: (B, T * N, D) to (B * T, N, D)."""
        assert shape is not None
        groups = len(self.grid.groups)
        times = shape[self.grid.token_axes.index(TIME)]
        return tokens.unflatten(1, (groups, times, -1)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
