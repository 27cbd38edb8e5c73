"""From the ``model:`` section to a backbone."""

from __future__ import annotations

from fmsuite.core.backbones.base import Backbone
from fmsuite.core.backbones.config import SWIN_UNETR, ModelConfig
from fmsuite.core.backbones.datewise import Datewise, one_date
from fmsuite.core.backbones.swin_unetr import SwinUNETR
from fmsuite.core.backbones.timm_backbone import PREFIX, TimmBackbone
from fmsuite.core.backbones.transfer import transfer
from fmsuite.core.backbones.vit import VisionTransformer
from fmsuite.core.inputs import InputSpec


def build_backbone(config: ModelConfig, spec: InputSpec) -> Backbone:
    """A backbone for an input, started from ``config.weights`` if there are any.

    Args:
        config: the shape, of a single date with ``config.datewise``. ``timm:NAME`` wraps a timm model (with random
            weights unless ``config.weights`` names some), ``swin_unetr`` MONAI's Swin UNETR encoder.
        spec: the input; ``config.input_size``, if given, resizes it.

    Raises:
        UsageError: if shape, input and weights do not fit together.
        FmsuiteError: if the weights cannot be read or fetched.
    """
    if config.datewise:
        # A size may name every axis, time included, as for other models of series.
        given = config.input_size
        if given is not None:
            spec = spec.resized(given)
        single = config.model_copy(update={"datewise": False, "input_size": None})
        return Datewise(build_backbone(single, one_date(spec)), spec)
    if config.name.startswith(PREFIX):
        backbone: Backbone = TimmBackbone(config, spec)
    elif config.name == SWIN_UNETR:
        backbone = SwinUNETR(config, spec)
    else:
        backbone = VisionTransformer(config, spec)
    if config.weights is not None:
        # Encoders are built through this function; the import would go round in a circle at the top.
        from fmsuite.core.encoders import load_encoder

        transfer(load_encoder(config.weights).backbone, backbone, config.weights)
    return backbone
