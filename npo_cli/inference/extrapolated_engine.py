"""Sampling from pi_t (pi_t / pi_{t-k})^a: two models read the same response, each with its own KV cache.

The logits of the product are z_t + a (z_t - z_{t-k}), normalized by the softmax, so the recorded log-probabilities are
those of the sampling distribution. Per response one prefill and one forward pass per token of either model.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from npo_cli.config.engine import EngineSettings
from npo_cli.inference.base import ModelHandle
from npo_cli.inference.decoding import DecodedModel
from npo_cli.inference.kv_cache import Window
from npo_cli.inference.transformers_engine import TransformersEngine


def extrapolate_logits(new_NW: Tensor, old_NW: Tensor, strength: float) -> Tensor:
    """z_t + a (z_t - z_{t-k}); a token with probability 0 in either model keeps probability 0."""
    impossible_NW = torch.isneginf(new_NW) | torch.isneginf(old_NW)
    return (new_NW + strength * (new_NW - old_NW)).masked_fill(impossible_NW, -torch.inf)


class ExtrapolatedEngine(TransformersEngine):
    """Samples from the current model extrapolated away from an older one, whose weights do not change."""

    def __init__(
        self, settings: EngineSettings, handle: ModelHandle, *, older: PreTrainedModel, strength: float
    ) -> None:
        super().__init__(settings, handle)
        self.older = TransformersEngine(settings, replace(handle, model=older))
        self.strength = strength

    def _logits(self, ids_1L: Tensor) -> Tensor:
        return extrapolate_logits(super()._logits(ids_1L), self.older._logits(ids_1L), self.strength)

    def _open_models(self, window: Window, num_rows: int) -> list[DecodedModel]:
        return super()._open_models(window, num_rows) + self.older._open_models(window, num_rows)

    def _combine(self, logits: Sequence[Tensor]) -> Tensor:
        new_NW, old_NW = (each.float() for each in logits)
        return extrapolate_logits(new_NW, old_NW, self.strength)
