"""Sampling from pi_t (pi_t / pi_{t-k})^a: two models read the same response, each with its own KV cache.

The logits of the product are z_t + a (z_t - z_{t-k}), normalized by the softmax, so the recorded log-probabilities are
those of the sampling distribution. Per response one prefill and one forward pass per token of either model.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from npo_cli.config.engine import EngineSettings
from npo_cli.inference.base import ModelHandle, SampleRequest
from npo_cli.inference.transformers_engine import SeededSampler, TransformersEngine


def extrapolate_logits(new_NW: Tensor, old_NW: Tensor, strength: float) -> Tensor:
    """z_t + a (z_t - z_{t-k}); a token with probability 0 in either model keeps probability 0."""
    impossible_NW = torch.isneginf(new_NW) | torch.isneginf(old_NW)
    return (new_NW + strength * (new_NW - old_NW)).masked_fill(impossible_NW, -torch.inf)


class ExtrapolatedTokenSampler(SeededSampler):
    """Samples tokens from the product of two models; the older one reads each new token with its own KV cache."""

    def __init__(
        self,
        seeds: Sequence[int],
        *,
        older: PreTrainedModel,
        mask_NL: Tensor,
        cache: DynamicCache,
        strength: float,
        num_tokens: int,
        temperature: float,
    ) -> None:
        super().__init__(seeds, num_tokens=num_tokens, temperature=temperature, device=older.device)
        self.older, self.mask_NL, self.cache, self.strength = older, mask_NL, cache, strength
        self.padded = not bool(mask_NL.all())
        # Position offsets of a vision-language model; the next prefill of another batch replaces them.
        self.rope_deltas_N1 = getattr(older.base_model, "rope_deltas", None)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The newer model's scores come from `generate`."""
        return super().__call__(
            input_ids, extrapolate_logits(scores.float(), self._older_logits(input_ids), self.strength)
        )

    def _older_logits(self, input_ids: Tensor) -> Tensor:
        """The older model's logits after the newest token of each row; the cache holds the tokens before it."""
        grown = input_ids.shape[1] - self.mask_NL.shape[1]
        self.mask_NL = torch.nn.functional.pad(self.mask_NL, (0, grown), value=1)
        positions_N1 = self.mask_NL.sum(-1, keepdim=True) - 1
        # The axes time, height and width of a vision-language model's positions are equal in text: one is enough.
        positions = positions_N1 if self.rope_deltas_N1 is None else (positions_N1 + self.rope_deltas_N1)[None]
        output = self.older(
            input_ids=input_ids[:, -1:],
            attention_mask=self.mask_NL if self.padded else None,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.logits[:, -1].float()


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

    def _sampler(self, batch: list[SampleRequest], *, num_tokens: int, temperature: float) -> SeededSampler:
        _, mask_NL, cache = self.older._prefill(batch)
        return ExtrapolatedTokenSampler(
            [request.seed for request in batch],
            older=self.older.model,
            mask_NL=mask_NL,
            cache=cache,
            strength=self.strength,
            num_tokens=num_tokens,
            temperature=temperature,
        )
