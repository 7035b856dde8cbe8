"""Sampling with transformers' `generate`: each prompt is prefilled once, each response has a seed of its own.

`generate` draws from one global stream. Here a logits processor picks the token instead, by inverting the
cumulative distribution at a uniform number that belongs to (seed, position), and leaves only that token
possible. So a response depends on its seed and, but for float rounding, not on its neighbours; its log-probabilities
come for free.
Beams, penalties, top-k and top-p are left out: the behaviour law must be the policy's own.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from npo_cli.inference.base import LogprobRequest, Sample, SampleRequest, VisionProcessor
from npo_cli.types.rollouts import ImageRef


class SeededSampler(LogitsProcessor):
    """Chooses one token a row and step, and remembers its log-probability and the entropy there."""

    def __init__(self, seeds: Sequence[int], *, num_tokens: int, temperature: float, device: torch.device) -> None:
        draws = [numpy.random.Generator(numpy.random.Philox(key=seed)).random(num_tokens) for seed in seeds]
        self.uniform_NT = torch.from_numpy(numpy.stack(draws)).to(device)
        self.temperature = temperature
        self.logps: list[Tensor] = []
        self.entropies: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Everything but the drawn token becomes impossible."""
        logps_NW = torch.log_softmax(scores.float() / self.temperature, dim=-1)
        probs_NW = logps_NW.exp()
        cumulative_NW = probs_NW.double().cumsum(dim=-1)
        place = len(self.logps)
        threshold_N1 = self.uniform_NT[:, place : place + 1] * cumulative_NW[:, -1:]
        chosen_N1 = torch.searchsorted(cumulative_NW, threshold_N1, right=True).clamp(max=scores.shape[1] - 1)
        self.logps.append(logps_NW.gather(1, chosen_N1)[:, 0])
        self.entropies.append(-torch.nan_to_num(probs_NW * logps_NW).sum(-1))
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen_N1, 0.0)


@contextmanager
def default_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """The model's own generation settings out of sight: `generate` would fill in its beams, bans and penalties."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


class TransformersEngine:
    """Samples from the live model: there are no other weights to keep in step with it."""

    has_own_weights = False
    num_versions = 1
    reproducibility_warning = ""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        eos_ids: Sequence[int],
        pad_id: int,
        max_rows: int,
        dtype: torch.dtype,
        vision: VisionProcessor | None = None,
    ) -> None:
        self.model, self.tokenizer, self.dtype = model, tokenizer, dtype
        self.eos_ids, self.pad_id, self.max_rows = tuple(eos_ids), pad_id, max_rows
        self.vision = vision
        self.version: str | None = None

    def update_weights(self, model: PreTrainedModel, *, version: str) -> None:
        """Nothing is moved: what the trainer changes is what samples."""
        assert model is self.model, "it samples from the model that it was made with"
        self.version = version

    def generate(self, requests: Sequence[SampleRequest], *, temperature: float, max_new_tokens: int) -> list[Sample]:
        """One sample a request, in order; requests of one prompt share its prefill."""
        samples: list[Sample] = []
        for batch in self._batches(requests):
            samples += self._generate_batch(batch, temperature=temperature, max_new_tokens=max_new_tokens)
        return samples

    @torch.no_grad()
    def compute_logps(self, requests: Sequence[LogprobRequest]) -> list[tuple[float, ...]]:
        """One plain forward pass a trajectory."""
        scored = []
        for request in requests:
            ids_1L = torch.tensor([request.prompt_ids + request.response_ids], device=self.model.device)
            with self._precision():
                logits_LW = self._logits(ids_1L)[0]
            logps_LW = torch.log_softmax(logits_LW, dim=-1)
            first, response = len(request.prompt_ids), ids_1L[0, len(request.prompt_ids) :]
            scored.append(tuple(logps_LW[first - 1 : -1].gather(1, response[:, None])[:, 0].tolist()))
        return scored

    def release_memory(self) -> None:
        """It keeps nothing between two batches."""

    def close(self) -> None:
        """There is nothing to end."""

    def _precision(self) -> torch.autocast:
        """The trainer's: bfloat16 products over float32 weights where that is how it computes."""
        return torch.autocast(self.model.device.type, dtype=self.dtype, enabled=self.dtype != self.model.dtype)

    def _batches(self, requests: Sequence[SampleRequest]) -> Iterator[list[SampleRequest]]:
        for start in range(0, len(requests), self.max_rows):
            yield list(requests[start : start + self.max_rows])

    @torch.no_grad()
    def _generate_batch(self, batch: list[SampleRequest], *, temperature: float, max_new_tokens: int) -> list[Sample]:
        ids_NL, mask_NL, cache = self._prefill(batch)
        sampler = self._sampler(batch, num_tokens=max_new_tokens, temperature=temperature)
        with default_generation_config(self.model), self._precision():
            output_NX = self.model.generate(
                ids_NL,
                attention_mask=mask_NL,
                past_key_values=cache,
                logits_processor=LogitsProcessorList([sampler]),
                # Several processes would otherwise all go on until the last of them has its last token.
                synced_gpus=False,
                generation_config=GenerationConfig(
                    do_sample=False,
                    max_new_tokens=max_new_tokens,
                    eos_token_id=list(self.eos_ids),
                    pad_token_id=self.pad_id,
                    suppress_tokens=list(self.vision.suppressed_ids) if self.vision else None,
                ),
            )
        return self._samples(batch, output_NX[:, ids_NL.shape[1] :], sampler)

    def _logits(self, ids_1L: Tensor) -> Tensor:
        """Of every position, in float32."""
        return self.model(ids_1L).logits.float()

    def _sampler(self, batch: list[SampleRequest], *, num_tokens: int, temperature: float) -> SeededSampler:
        """Who chooses the tokens of this batch."""
        seeds = [request.seed for request in batch]
        return SeededSampler(seeds, num_tokens=num_tokens, temperature=temperature, device=self.model.device)

    def _prefill(self, batch: list[SampleRequest]) -> tuple[Tensor, Tensor, DynamicCache]:
        """Left-padded ids and mask of all rows, and a cache of all but their last prompt token."""
        distinct = list(dict.fromkeys((request.prompt_ids, request.images) for request in batch))
        width = max(len(ids) for ids, _ in distinct)
        gaps = [width - len(ids) for ids, _ in distinct]
        padded = [[self.pad_id] * gap + list(ids) for gap, (ids, _) in zip(gaps, distinct, strict=True)]
        ids_PL = torch.tensor(padded, device=self.model.device)
        mask_PL = torch.tensor([[0] * gap + [1] * (width - gap) for gap in gaps], device=self.model.device)
        cache = DynamicCache(config=self.model.config)
        place = {prompt: index for index, prompt in enumerate(distinct)}
        rows = torch.tensor([place[request.prompt_ids, request.images] for request in batch], device=self.model.device)
        sights = self._sights(ids_PL, [images for _, images in distinct])
        if width > 1:
            positions_PL = (mask_PL.cumsum(-1) - 1).clamp(min=0)
            with self._precision():
                self.model.base_model(
                    input_ids=ids_PL[:, :-1],
                    # A model that sees counts its positions by itself, from the mask.
                    attention_mask=mask_PL[:, :-1] if any(gaps) or sights else None,
                    position_ids=None if sights else positions_PL[:, :-1],
                    past_key_values=cache,
                    use_cache=True,
                    **sights,
                )
            cache.batch_select_indices(rows)
        self._count_on(rows, seen=bool(sights))
        return ids_PL[rows], mask_PL[rows], cache

    def _sights(self, ids_PL: Tensor, images: list[tuple[ImageRef, ...]]) -> dict[str, Tensor]:
        """What is shown with these prompts, their last token left out."""
        if self.vision is None:
            return {}
        return self.vision.build_inputs(ids_PL[:, :-1], images)

    def _count_on(self, rows: Tensor, *, seen: bool) -> None:
        """How far positions lag behind tokens, which such a model remembers from its last prefill: now one a row."""
        if self.vision is not None:
            base = self.model.base_model
            base.rope_deltas = base.rope_deltas[rows] if seen else torch.zeros_like(rows)[:, None]

    def _samples(self, batch: list[SampleRequest], response_NT: Tensor, sampler: SeededSampler) -> list[Sample]:
        logps_NT = torch.stack(sampler.logps, dim=1).cpu().numpy()
        entropies_NT = torch.stack(sampler.entropies, dim=1).cpu().numpy()
        samples = []
        for row, ids in enumerate(response_NT.tolist()):
            length = next((place + 1 for place, token in enumerate(ids) if token in self.eos_ids), len(ids))
            finished = ids[length - 1] in self.eos_ids
            kept = ids[:length]
            samples.append(
                Sample(
                    prompt_id=batch[row].prompt_id,
                    slot=batch[row].slot,
                    response_ids=tuple(kept),
                    logps=tuple(logps_NT[row, :length].tolist()),
                    mean_entropy=float(entropies_NT[row, :length].mean(dtype="float64")),
                    text=self.tokenizer.decode(kept[:-1] if finished else kept),
                    finished=finished,
                )
            )
        return samples
