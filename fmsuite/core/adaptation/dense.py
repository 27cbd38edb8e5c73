"""A backbone and a decoder: a network with an output for every input sample."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from torch import Tensor, nn

from fmsuite.core.adaptation.date_pairs import Compare, PairSource
from fmsuite.core.adaptation.dpt import Dpt
from fmsuite.core.adaptation.feature_maps import Decoder, MapSource, is_hierarchical, patch_stride, spread
from fmsuite.core.adaptation.linear_decoder import LinearDecoder
from fmsuite.core.adaptation.unetr import Unetr
from fmsuite.core.adaptation.upernet import UperNet
from fmsuite.core.backbones.base import Backbone
from fmsuite.core.data.sample import View
from fmsuite.errors import UsageError, nearest

DECODERS: dict[str, type[Decoder]] = {"linear": LinearDecoder, "unetr": Unetr, "upernet": UperNet, "dpt": Dpt}


class DenseNetwork(nn.Module):
    """Maps views of any size to logits of that size along the spatial axes.

    The backbone is held by reference, in no state dict of this module: its owner saves it.

    Args:
        backbone: on a grid.
        decoder: of ``DECODERS``.
        classes: K.
        layers: blocks of a transformer to read, instead of an even spread over its depth that ends with the last.
        norm_layers: put them through the final norm.
        compare: of a series of two dates, what of their feature maps the decoder reads; see ``PairSource``.
        options: of the decoder.

    Raises:
        UsageError: for an unknown decoder or option, or what the decoder or the backbone refuse.
    """

    def __init__(
        self,
        backbone: Backbone,
        decoder: str,
        classes: int,
        layers: Sequence[int] | None = None,
        norm_layers: bool = True,
        compare: Compare | None = None,
        **options: object,
    ) -> None:
        super().__init__()
        if decoder not in DECODERS:
            raise UsageError(f"There is no decoder '{decoder}'.", nearest(decoder, DECODERS))
        kind = DECODERS[decoder]
        known = [name for name in inspect.signature(kind).parameters if name not in ("levels", "in_chans", "classes")]
        unknown = [name for name in options if name not in known]
        if unknown:
            raise UsageError(
                f"The decoder '{decoder}' has no option '{unknown[0]}'.", f"It has: {', '.join(known) or 'none'}."
            )
        if backbone.grid is None:
            raise UsageError("A bag of vectors has no feature map.", "Give the task images or volumes.")
        if is_hierarchical(backbone) and layers is not None:
            raise UsageError(
                f"A {type(backbone).__name__} has maps of its own and no layers to choose.", "Leave it out."
            )
        if layers is None:
            layers = spread(backbone.depth, kind.wanted(patch_stride(backbone.grid)))
        source = MapSource(backbone, layers, norm_layers)
        if compare is not None:
            source = PairSource(backbone, layers, norm_layers, compare)
        self._source = (source,)
        self.decoder = kind(source.levels, source.in_chans, classes, **options)  # type: ignore[call-arg]

    @property
    def source(self) -> MapSource:
        return self._source[0]

    def forward(self, view: View) -> list[Tensor]:
        """(B, K, *size) logits of a normalised view and coarser ones, if any, of deep supervision, the finest first.
        ``size`` is the view's, rounded up to whole patches: all outputs cover this area."""
        return self.decoder(self.source(view))  # type: ignore[no-any-return]

    def logits(self, view: View) -> Tensor:
        """(B, K, *size) float32 logits at the view's own size along the spatial axes."""
        size = [n for axis, n in zip(self.source.grid.axes, view.pixels.shape[2:]) if axis in self.source.axes]
        whole = self(view)[0]
        return whole[(..., *(slice(n) for n in size))].float()
