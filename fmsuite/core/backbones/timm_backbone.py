"""Any timm image model as a backbone, as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import timm
from timm.models import group_parameters
from torch import Tensor, nn

from fmsuite.core.backbones.base import Backbone, Features
from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.data.sample import View
from fmsuite.core.inputs import InputSpec
from fmsuite.core.tokens import PatchGrid
from fmsuite.errors import FmsuiteError, UsageError, nearest

PREFIX = "timm:"


class TimmBackbone(Backbone):
    """A timm model under the backbone interface, for 2D inputs in one channel group.

    Patch tokens are what ``forward_features`` gives: a transformer's patch tokens, or the last feature map of a
    convolutional network. The class token is the model's own image vector (``forward_head`` before the classifier:
    class token, attention pooling or average with its norm), where it is as wide as the patch tokens; otherwise there
    is none.
    The model sees every pixel: invalid ones are zero (``Normalize``) and their tokens are only marked.

    Args:
        config: ``config.name`` is ``timm:NAME``; ``input_size``, ``min_valid`` and ``drop_path`` apply, other options
            are refused.
        spec: the input.
        model: the timm model, without classifier; made with random weights if not given.

    Raises:
        UsageError: for an unknown model, an input that timm cannot hold, or an option that does not apply.
    """

    model: Any

    def __init__(self, config: ModelConfig, spec: InputSpec, model: nn.Module | None = None) -> None:
        super().__init__()
        _refuse_options(config)
        if config.input_size is not None:
            spec = spec.resized(config.input_size)
        refuse_input(spec, f"The timm model '{config.name}'")
        self.config = config
        self.spec = spec
        name = config.name.removeprefix(PREFIX)
        made: Any = model or create_timm(name, spec.size, spec.in_chans, drop_path_rate=config.drop_path)
        self.model = made
        self.width = int(made.num_features)
        self.grid = PatchGrid.build(spec, self._stride(), config.min_valid)
        self.can_resize = not made.pretrained_cfg.get("fixed_input_size") or self._is_dynamic()
        self._layers: dict[str, int] = group_parameters(made, made.group_matcher(coarse=False), reverse=True)
        self.depth = len(made.blocks) if self._is_transformer else max(self._layers.values())
        self._has_own_vector = int(getattr(made, "head_hidden_size", self.width)) == self.width

    @property
    def has_cls(self) -> bool:
        return self._has_own_vector

    @property
    def own_pooling(self) -> str:
        """The model's own image vector, or the mean of its patches where that has another width."""
        return "cls" if self.has_cls else "mean"

    @property
    def _is_transformer(self) -> bool:
        return hasattr(self.model, "blocks") and hasattr(self.model, "num_prefix_tokens")

    def transformer_blocks(self) -> Sequence[nn.Module]:
        return list(self.model.blocks) if self._is_transformer else ()

    def layer_of(self, parameter: str) -> int:
        return min(self._layers[parameter.removeprefix("model.")], self.depth + 1)

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
        if attention:
            raise UsageError(f"The timm model '{self.config.name}' shows no attention.", "Use a vit_* model.")
        if keep is not None or keep_valid is not None or mask is not None:
            raise UsageError(f"The timm model '{self.config.name}' cannot drop or mask tokens.", "Use a vit_* model.")
        size = tuple(view.pixels.shape[2:])
        if size != self.spec.size and not self.can_resize:
            raise UsageError(f"'{self.config.name}' takes inputs of {self.spec.size} only, not {size}.")
        layout = self.layout(view)
        out, intermediate = self._features(view.pixels, layers, norm_layers)
        prefix = getattr(self.model, "num_prefix_tokens", 0) if out.dim() == 3 else 0
        patches = self._tokens(out)[:, prefix:]
        if patches.shape[1] != layout.num_tokens:
            raise FmsuiteError(
                f"'{self.config.name}' gave {patches.shape[1]} tokens where {layout.shape} were expected."
            )
        cls = self.model.forward_head(out, pre_logits=True) if self.has_cls else None
        first = int(getattr(self.model, "cls_token", None) is not None)
        registers = out[:, first:prefix] if prefix > first else None
        return Features(patches, layout, cls, registers, intermediate)

    def _features(self, pixels: Tensor, layers: Sequence[int], norm: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        if not layers:
            return self.model.forward_features(pixels), ()
        if not self._is_transformer:
            raise UsageError(f"'{self.config.name}' has no blocks of equal resolution to take layers from.")
        if any(not -self.depth <= layer < self.depth for layer in layers):
            raise UsageError(f"layers {tuple(layers)} do not fit a model of {self.depth} blocks.", "Count from 0.")
        wanted = [layer % self.depth for layer in layers]
        numbers = sorted(set(wanted))
        out, found = self.model.forward_intermediates(pixels, indices=numbers, norm=norm, output_fmt="NLC")
        by_number = dict(zip(numbers, found, strict=True))
        return out, tuple(by_number[number] for number in wanted)

    def _tokens(self, out: Tensor) -> Tensor:
        if out.dim() == 3:
            return out
        if str(getattr(self.model, "output_fmt", "NCHW")).endswith("NHWC"):
            return out.flatten(1, 2)
        return out.flatten(2).transpose(1, 2)

    def _is_dynamic(self) -> bool:
        return self._is_transformer and bool(getattr(self.model, "dynamic_img_size", False))

    def _stride(self) -> int:
        info = self.model.feature_info
        return int(info[-1]["reduction"])


def refuse_input(spec: InputSpec, who: str) -> None:
    """
    Raises:
        UsageError: naming why timm cannot hold such an input: bags, axes other than (y, x), channel groups.
    """
    if spec.bag:
        raise UsageError(f"{who} takes images, not bags of vectors.")
    if spec.axes != ("y", "x"):
        raise UsageError(f"{who} takes 2D images (y, x), not ({', '.join(spec.axes)}).")
    if len(spec.groups) > 1:
        names = ", ".join(name or "unnamed" for name, _ in spec.groups)
        raise UsageError(f"{who} has one patch embedding for all channels; this input has the groups {names}.")


def create_timm(
    name: str, size: tuple[int, ...] | None = None, in_chans: int = 3, *, pretrained: bool = False, **options: Any
) -> nn.Module:
    """A timm model without its classifier, accepting several input sizes where its kind can.

    Args:
        name: timm's name, or ``hf-hub:...``.
        size: (height, width) to build it for; its own default if not given.
        pretrained: fetch its published weights.
        options: for the model's constructor.

    Raises:
        UsageError: for an unknown name, or a size that the model cannot have.
        FmsuiteError: if the weights cannot be fetched.
    """
    if not name.startswith("hf-hub:") and not timm.is_model(name.partition(".")[0]):
        raise UsageError(f"timm has no model '{name}'.", nearest(name, timm.list_models()).split("Known:")[0])
    options = {"num_classes": 0, "in_chans": in_chans, "pretrained": pretrained, **options}
    sized = {} if size is None else {"img_size": size}
    attempts: list[dict[str, Any]] = [{**sized, "dynamic_img_size": True}, sized, {}]
    for extra in attempts:
        try:
            return timm.create_model(name, **options, **extra)
        except TypeError as error:
            # Only transformers know img_size and dynamic_img_size; their constructors are the only way to ask.
            if not any(key in str(error) for key in ("dynamic_img_size", "img_size")):
                raise
        except (AssertionError, ValueError) as error:
            raise UsageError(f"The timm model '{name}' cannot be built for inputs of {size}: {error}") from error
        except (OSError, RuntimeError) as error:
            if not pretrained or "tag" in str(error):
                raise UsageError(f"The timm model '{name}' cannot be built: {error}") from error
            raise FmsuiteError(
                f"The weights of '{name}' could not be fetched: {str(error).rstrip('.')}.",
                f"Without network access, fetch the file elsewhere and give {PREFIX}NAME@FILE.",
            ) from error
    raise UsageError(f"The timm model '{name}' cannot be built with {options}.")


def _refuse_options(config: ModelConfig) -> None:
    allowed = {"name", "input_size", "min_valid", "drop_path", "weights"}
    refused = sorted(
        key
        for key in config.model_fields_set - allowed
        if getattr(config, key) != type(config).model_fields[key].default
    )
    if refused:
        raise UsageError(f"model.{refused[0]} does not apply to the timm model '{config.name}'.", "Remove it.")
