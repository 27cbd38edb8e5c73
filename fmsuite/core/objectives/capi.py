"""CAPI: predict the clusters of hidden patches (Darcet et al. 2025, "Cluster and Predict Latent Patches for Improved
Masked Image Modeling")."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from fmsuite.core.backbones.base import Backbone
from fmsuite.core.backbones.cross_attention import CrossBlock
from fmsuite.core.backbones.layers import init_transformer, key_mask_of
from fmsuite.core.backbones.positions import Rotary, rotary, rotary_angles
from fmsuite.core.data.sample import Array, Batch, MaskContext, MaskSampler, View
from fmsuite.core.distributed import mean_over
from fmsuite.core.masking import keep_ids, kept_count
from fmsuite.core.objectives.base import Card, ObjectiveConfig, ParameterRule, Share, StepContext, register
from fmsuite.core.objectives.clustering import OnlineClustering, soft_cross_entropy
from fmsuite.core.objectives.heads import WeightNormLinear
from fmsuite.core.objectives.masks import Masking
from fmsuite.core.objectives.momentum import MomentumConfig, MomentumTeacher
from fmsuite.core.objectives.single_view import VIEW, MaskedView, MaskedViewConfig
from fmsuite.core.tokens import TokenLayout, take
from fmsuite.errors import UsageError


class CAPIConfig(MaskedViewConfig, MomentumConfig):
    """The options of ``MomentumConfig`` and ``MaskedViewConfig``, and:

    Attributes:
        mask_ratio, masking: 65%, all but one block that may go on at the opposite edge.
        predict_share: share of the masked tokens that are predicted, a new draw each time.
        prototypes: K clusters.
        target_temp, iterations: of the clusters' assignments (Sinkhorn-Knopp).
        cluster_temp: of the clustering head in its own loss.
        student_temp: of the student's prediction.
        cluster_bias: the clustering head has a bias.
        cluster_lr_scale: its learning rate, as a factor of the student's.
        predictor_depth: number of cross-attention blocks.
        predictor_width, predictor_heads: of the predictor; the model's if not given.
        predictor_theta, predictor_position_units, predictor_position_scale: as the model's ``rope_theta`` and options
            of these names, for the predictor, whose positions are rotary whatever the model's are.
    """

    momentum: float = Field(default=0.999, ge=0, le=1)
    mask_ratio: float = Field(default=0.65, gt=0, lt=1)
    masking: Masking = "inverse_block"
    predict_share: float = Field(default=0.05, gt=0, le=1)
    prototypes: int = Field(default=16384, ge=2)
    target_temp: float = Field(default=0.06, gt=0)
    iterations: int = Field(default=3, ge=1)
    cluster_temp: float = Field(default=0.12, gt=0)
    student_temp: float = Field(default=0.12, gt=0)
    cluster_bias: bool = True
    cluster_lr_scale: float = Field(default=0.5, gt=0)
    predictor_depth: int = Field(default=12, ge=1)
    predictor_width: int | None = Field(default=None, ge=1)
    predictor_heads: int | None = Field(default=None, ge=1)
    predictor_theta: float = Field(default=100.0, gt=0)
    predictor_position_units: Literal["index", "physical"] = "index"
    predictor_position_scale: float = Field(default=1.0, gt=0)
    scale: Share = (0.6, 1.0)


def part_of(count: int, share: float) -> int:
    """How many of ``count`` masked tokens are predicted: ``int(count * share)``, but one of any."""
    return min(count, max(1, int(count * share)))


@dataclass(frozen=True)
class PartlyPredicted:
    """A mask, and a random part of its masked tokens (Darcet et al. 2025, section 3). Picklable.

    Attributes:
        masking: draws the mask.
        share: of the masked tokens that are predicted.
    """

    masking: MaskSampler
    share: float

    def __call__(self, context: MaskContext) -> Array:
        """(2, N) bool: the tokens that the encoder does not see, and those that are predicted."""
        hidden = self.masking(context)
        ids = context.generator.permutation(np.flatnonzero(hidden))
        predicted = np.zeros_like(hidden)
        predicted[ids[: part_of(len(ids), self.share)]] = True
        return np.stack([hidden, predicted])


class CrossPredictor(nn.Module):
    """Blocks in which a mask token at each predicted place reads the visible tokens, and nothing else (section 3).

    Parameters ``mask_token blocks``; RMS normalisation and no biases, as published. What the public code calls the
    final norm, one without parameters, would change nothing before the head's L2 normalisation.

    Args:
        width, heads, depth: of the blocks.
        context_width: of the encoder.
    """

    def __init__(self, width: int, heads: int, depth: int, context_width: int) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, width))
        self.blocks = nn.ModuleList(
            CrossBlock(width, heads, context_width, norm="rms", qkv_bias=False, bias=False) for _ in range(depth)
        )
        self.apply(partial(init_transformer, law="xavier"))
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, context: Tensor, at: Rotary, context_at: Rotary, key_mask: Tensor | None = None) -> Tensor:
        """
        Args:
            context: (B, S, C) tokens of the encoder.
            at, context_at: rotations of the M places and of the S tokens.
            key_mask: (B, S) bool, False at tokens that nothing may read. Every row needs a True.

        Returns:
            (B, M, width).
        """
        tokens = self.mask_token.expand(len(context), at.cos.shape[2], -1)
        for block in self.blocks:
            tokens = block(tokens, context, at, context_at, key_mask)
        return tokens


@register
class CAPI(MaskedView, MomentumTeacher):
    """Predict, from a block of visible tokens, to which cluster an EMA teacher's features of hidden ones belong.

    The teacher sees the whole view. Its patch features are clustered online: ``OnlineClustering`` assigns them to K
    prototypes, balanced position by position over the batch, and learns by its own loss (section 3). The student's
    encoder sees the visible tokens only; the predictor z_i at a random part P of the masked ones reads them. With the
    assignments q_i and a head of weight-normalised rows over unit-length z_i,
    ``loss = mean_{i in P} CE(q_i, softmax(head(z_i) / student_temp)) + clustering loss``. No gradient goes from one to
    the other. Invalid tokens are neither predicted, nor read, nor clustered.

    The predictor's positions are rotary, as the encoder's are in the paper; class token and registers do not turn. (The
    public code turns pairs of features that belong to two axes, which is no rotation, and places its registers along
    the edge of the visible tokens.)

    Raises:
        UsageError: for a bag of vectors, a size that the patches do not divide, a backbone that cannot drop tokens,
            masks that do not fit, a share that predicts no token, or a predictor whose heads do not divide its width or
            hold its positions.
    """

    name: ClassVar[str] = "capi"
    batch_statistic: ClassVar[str | None] = "Sinkhorn assignments"
    Config: ClassVar[type[ObjectiveConfig]] = CAPIConfig
    card: ClassVar[Card] = Card(
        family="tokens",
        paper="Darcet et al. 2025, arXiv:2502.08769",
        predicts="clusters of an EMA teacher's features at some of the hidden tokens, from the visible ones",
        masks="65%, all but one block; the encoder never sees them",
        checked="public CAPI code, given its positions: assignments, both losses, gradient norms of every part",
    )
    config: CAPIConfig

    def __init__(self, config: CAPIConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.need(can_drop_tokens=True)
        self._check_share()
        self.sampler = PartlyPredicted(self.sampler, config.predict_share)
        width = config.predictor_width or backbone.width
        heads = config.predictor_heads or self._heads_of_model()
        if width % heads:
            raise UsageError(
                f"The predictor's width {width} is not a multiple of its {heads} heads.",
                "Change objective.predictor_width or objective.predictor_heads.",
            )
        self.head_dim = width // heads
        # Refuses here, not in the first step, positions that do not fit or spacing that is unknown.
        self._rotary(self.whole_layout(), 0)
        self.predictor = CrossPredictor(width, heads, config.predictor_depth, backbone.width)
        self.head = WeightNormLinear(width, config.prototypes, train_gain=True)
        self.clustering = OnlineClustering(
            backbone.width,
            config.prototypes,
            config.target_temp,
            config.cluster_temp,
            config.iterations,
            config.cluster_bias,
        )

    def _heads_of_model(self) -> int:
        size = getattr(getattr(self.backbone, "config", None), "size", None)
        if size is None:
            raise UsageError("This model does not tell its number of heads.", "Set objective.predictor_heads.")
        return int(size.heads)

    def _check_share(self) -> None:
        tokens, share = self.whole_layout().num_tokens, self.config.predict_share
        masked = tokens - kept_count(tokens, self.config.mask_ratio)
        if int(masked * share) < 1:
            raise UsageError(
                f"objective.predict_share {share} of {masked} masked tokens is none.",
                "Raise it, or use a larger input or smaller patches.",
            )

    def parameter_rule(self, name: str) -> ParameterRule:
        """The clustering head has a learning rate of its own, and no weight decay."""
        if name.startswith("clustering."):
            return ParameterRule(lr_scale=self.config.cluster_lr_scale, decayed=False)
        return super().parameter_rule(name)

    def forward(self, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        view = batch.views[VIEW][0]
        if view.mask is None:
            raise ValueError("the view of objective 'capi' has no mask")
        with torch.no_grad():
            taught = self.teacher(view)
        layout = taught.layout
        assignments, clustering = self.clustering(taught.patches, layout.valid)
        mask, chosen = view.mask.unbind(1)
        ids, counted = keep_ids(~chosen, layout.valid)
        targets = take(assignments, ids)
        tokens = self.predict(view, mask if layout.valid is None else mask & layout.valid, layout, ids)
        prediction = self.prediction_loss(tokens, targets, counted)
        return {"loss": prediction + clustering, "prediction": prediction, "clustering": clustering}

    def predict(self, view: View, mask: Tensor, layout: TokenLayout, ids: Tensor) -> Tensor:
        """
        Args:
            view: normalised pixels.
            mask: (B, N) bool, tokens that the encoder does not see.
            layout: of all N tokens.
            ids: (B, M) int64, the tokens to predict.

        Returns:
            (B, M, predictor width).
        """
        shown, keep_valid = keep_ids(mask, layout.valid)
        features = self.backbone(view, keep=shown, keep_valid=keep_valid)
        context = features.sequence
        prefix = context.shape[1] - features.patches.shape[1]
        key_mask = key_mask_of(features.layout.valid, prefix)
        at, context_at = self._rotary(layout.select(ids), 0), self._rotary(features.layout, prefix)
        return self.predictor(context, at, context_at, key_mask)

    def _rotary(self, layout: TokenLayout, prefix: int) -> Rotary:
        config = self.config
        angles = rotary_angles(
            layout,
            self.head_dim,
            config.predictor_theta,
            physical=config.predictor_position_units == "physical",
            scale=config.predictor_position_scale,
            options="objective.predictor_",
        )
        return rotary(angles, prefix)

    def prediction_loss(self, tokens: Tensor, targets: Tensor, counted: Tensor | None = None) -> Tensor:
        """Mean cross-entropy over the predicted tokens of all ranks: the first term of the class's docstring.

        Args:
            tokens: (B, M, D) of the predictor.
            targets: (B, M, K) float32, rows sum to one.
            counted: (B, M) bool; ``None`` means all.
        """
        logits = self.head(functional.normalize(tokens, dim=-1))
        with torch.autocast(tokens.device.type, enabled=False):
            entropy = soft_cross_entropy(targets, logits, self.config.student_temp)
            if counted is None:
                counted = torch.ones_like(entropy, dtype=torch.bool)
            return mean_over(entropy, counted)
