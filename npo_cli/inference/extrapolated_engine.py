"""Sampling from pi_t (pi_t / pi_old)^a: two models read the same response, token by token, each with its own cache.

The logits z of the two give those of the product, z_t + a (z_t - z_old), and the softmax normalises it; so the
log-probabilities are those of the law that was sampled. The seeded sampler is the one of `transformers_engine`: a
response depends on its seed alone. One prefill a prompt and one forward pass a token, of either model.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from npo_cli.inference.base import SampleRequest, VisionProcessor
from npo_cli.inference.transformers_engine import SeededSampler, TransformersEngine


def extrapolate_logits(new_NW: Tensor, old_NW: Tensor, strength: float) -> Tensor:
    """z_t + a (z_t - z_old). A token that either model rules out stays impossible."""
    ruled_out_NW = torch.isneginf(new_NW) | torch.isneginf(old_NW)
    return (new_NW + strength * (new_NW - old_NW)).masked_fill(ruled_out_NW, -torch.inf)


class OlderModelReader:
    """The older model along the responses of a batch: gives its logits of the next token after each one."""

    def __init__(
        self, model: PreTrainedModel, mask_NL: Tensor, cache: DynamicCache, *, position_lag_N1: Tensor | None
    ) -> None:
        self.model, self.mask_NL, self.cache = model, mask_NL, cache
        self.position_lag_N1 = position_lag_N1
        self.padded = not bool(mask_NL.all())

    def next_logits(self, input_ids: Tensor) -> Tensor:
        """Reads the newest token of each row; the cache holds those before it."""
        grown = input_ids.shape[1] - self.mask_NL.shape[1]
        self.mask_NL = torch.nn.functional.pad(self.mask_NL, (0, grown), value=1)
        output = self.model(
            input_ids=input_ids[:, -1:],
            attention_mask=self.mask_NL if self.padded else None,
            position_ids=self._positions(),
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.logits[:, -1].float()

    def _positions(self) -> Tensor:
        """Of the newest tokens. Left to itself, a model that sees would count those of the whole padded row."""
        place_N1 = self.mask_NL.sum(-1, keepdim=True) - 1
        # One axis stands for time, height and width, which are the same in text.
        return place_N1 if self.position_lag_N1 is None else (place_N1 + self.position_lag_N1)[None]


class ExtrapolatedTokenSampler(SeededSampler):
    """Chooses from the product of two models' laws."""

    def __init__(
        self,
        seeds: Sequence[int],
        *,
        reader: OlderModelReader,
        strength: float,
        num_tokens: int,
        temperature: float,
        device: torch.device,
    ) -> None:
        super().__init__(seeds, num_tokens=num_tokens, temperature=temperature, device=device)
        self.reader, self.strength = reader, strength

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The newer model's scores come from `generate`, the older one's from its reader."""
        return super().__call__(
            input_ids, extrapolate_logits(scores.float(), self.reader.next_logits(input_ids), self.strength)
        )


class ExtrapolatedEngine(TransformersEngine):
    """Samples from the current model extrapolated away from an older one, whose weights never change here."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        older: PreTrainedModel,
        strength: float,
        eos_ids: Sequence[int],
        pad_id: int,
        max_rows: int,
        dtype: torch.dtype,
        vision: VisionProcessor | None = None,
    ) -> None:
        how = {"eos_ids": eos_ids, "pad_id": pad_id, "max_rows": max_rows, "dtype": dtype, "vision": vision}
        super().__init__(model, tokenizer, **how)
        self.older = TransformersEngine(older, tokenizer, **how)
        self.strength = strength

    def _logits(self, ids_1L: Tensor) -> Tensor:
        return extrapolate_logits(super()._logits(ids_1L), self.older._logits(ids_1L), self.strength)

    def _sampler(self, batch: list[SampleRequest], *, num_tokens: int, temperature: float) -> SeededSampler:
        _, mask_NL, cache = self.older._prefill(batch)
        lag_N1 = None if self.vision is None else self.older.model.base_model.rope_deltas
        return ExtrapolatedTokenSampler(
            [request.seed for request in batch],
            reader=OlderModelReader(self.older.model, mask_NL, cache, position_lag_N1=lag_N1),
            strength=self.strength,
            num_tokens=num_tokens,
            temperature=temperature,
            device=self.model.device,
        )
