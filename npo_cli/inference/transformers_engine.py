"""Sampling with transformers' `generate`: one prefill per prompt, one seed per response.

`generate` draws from one global random stream. Here a logits processor picks the token instead, by inverting the
cumulative distribution at a uniform number that belongs to (seed, position), and masks all other tokens. So a response
depends on its seed and, up to float rounding, not on the rest of the batch; its log-probabilities come for free.
No beams, penalties, top-k or top-p: the behavior policy must be the policy itself.

Axes: N rows, P distinct prompts, L prompt tokens, T response tokens, W vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy
import torch
from packaging.specifiers import SpecifierSet
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)

from npo_cli.activity import SampleMeter, open_meter
from npo_cli.config.engine import EngineSettings
from npo_cli.inference.base import (
    Engine,
    EngineStatus,
    LogprobRequest,
    ModelHandle,
    Sample,
    SampleRequest,
)


class SeededSampler(LogitsProcessor):
    """Chooses one token per row and step, and records its log-probability and the entropy there."""

    def __init__(self, seeds: Sequence[int], *, num_tokens: int, temperature: float, device: torch.device) -> None:
        draws = [numpy.random.Generator(numpy.random.Philox(key=seed)).random(num_tokens) for seed in seeds]
        self.uniform_NT = torch.from_numpy(numpy.stack(draws)).to(device)
        self.temperature = temperature
        self.logps: list[Tensor] = []
        self.entropies: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Mask every token but the chosen one."""
        logps_NW = torch.log_softmax(scores.float() / self.temperature, dim=-1)
        probs_NW = logps_NW.exp()
        cumulative_NW = probs_NW.double().cumsum(dim=-1)
        place = len(self.logps)
        threshold_N1 = self.uniform_NT[:, place : place + 1] * cumulative_NW[:, -1:]
        chosen_N1 = torch.searchsorted(cumulative_NW, threshold_N1, right=True).clamp(max=scores.shape[1] - 1)
        self.logps.append(logps_NW.gather(1, chosen_N1)[:, 0])
        self.entropies.append(-torch.nan_to_num(probs_NW * logps_NW).sum(-1))
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen_N1, 0.0)


class FinishedRows(LogitsProcessor):
    """Reports how many rows of a batch have ended, a few times per second; leaves the scores as they are."""

    def __init__(self, meter: SampleMeter, *, num_prompt_tokens: int, eos_ids: Sequence[int]) -> None:
        self.meter, self.start, self.eos_ids = meter, num_prompt_tokens, eos_ids

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Counts only when a report is due: it reads from the GPU."""
        if self.meter.is_due and input_ids.shape[1] > self.start:
            response_NT = input_ids[:, self.start :]
            ends_NT = torch.isin(response_NT, torch.tensor(self.eos_ids, device=response_NT.device))
            padding_NT = ends_NT.cumsum(1) > ends_NT.int()
            self.meter.report(int(ends_NT.any(1).sum()), int((~padding_NT).sum()))
        return scores


@contextmanager
def default_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """Hide the model's own generation config: `generate` would take beams, bans and penalties from it."""
    config, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = config


class TransformersEngine(Engine):
    """Samples from the trainer's own model, so there are no weights to synchronize."""

    name = "transformers"
    needs_weight_sync = False
    supports_images = True
    serves_adapters = True

    def __init__(self, settings: EngineSettings, handle: ModelHandle) -> None:
        super().__init__(settings, handle)
        self.model, self.vision = handle.model, handle.vision

    @classmethod
    def status(cls, required: Mapping[str, SpecifierSet]) -> EngineStatus:
        """Always available."""
        return EngineStatus(kind=cls.name, is_available=True, detail="the trainer's own model samples")

    def generate(self, requests: Sequence[SampleRequest], *, temperature: float, max_new_tokens: int) -> list[Sample]:
        """One sample per request, in order; requests with the same prompt share its prefill."""
        samples: list[Sample] = []
        meter = open_meter(len(requests))
        for start in range(0, len(requests), self.settings.max_num_seqs):
            batch = list(requests[start : start + self.settings.max_num_seqs])
            found = self._generate_batch(batch, temperature=temperature, max_new_tokens=max_new_tokens, meter=meter)
            if meter is not None:
                meter.add(len(found), sum(len(sample.response_ids) for sample in found))
            samples += found
        return samples

    @torch.no_grad()
    def compute_logps(self, requests: Sequence[LogprobRequest]) -> list[tuple[float, ...]]:
        """One plain forward pass per response."""
        logps = []
        for request in requests:
            ids_1L = torch.tensor([request.prompt_ids + request.response_ids], device=self.model.device)
            with self._precision():
                logits_LW = self._logits(ids_1L)[0]
            logps_LW = torch.log_softmax(logits_LW, dim=-1)
            first, response = len(request.prompt_ids), ids_1L[0, len(request.prompt_ids) :]
            logps.append(tuple(logps_LW[first - 1 : -1].gather(1, response[:, None])[:, 0].tolist()))
        return logps

    def _precision(self) -> torch.autocast:
        """The trainer's precision: bfloat16 autocast over float32 weights where the trainer uses that."""
        dtype = self.handle.dtype
        return torch.autocast(self.model.device.type, dtype=dtype, enabled=dtype != self.model.dtype)

    @torch.no_grad()
    def _generate_batch(
        self, batch: list[SampleRequest], *, temperature: float, max_new_tokens: int, meter: SampleMeter | None
    ) -> list[Sample]:
        ids_NL, mask_NL, cache = self._prefill(batch)
        sampler = self._sampler(batch, num_tokens=max_new_tokens, temperature=temperature)
        processors = LogitsProcessorList([sampler])
        if meter is not None:
            processors.append(FinishedRows(meter, num_prompt_tokens=ids_NL.shape[1], eos_ids=self.handle.eos_ids))
        with default_generation_config(self.model), self._precision():
            output_NX = self.model.generate(
                ids_NL,
                attention_mask=mask_NL,
                past_key_values=cache,
                logits_processor=processors,
                # Otherwise every process would keep generating until the slowest one is done.
                synced_gpus=False,
                generation_config=GenerationConfig(
                    do_sample=False,
                    max_new_tokens=max_new_tokens,
                    eos_token_id=list(self.handle.eos_ids),
                    pad_token_id=self.handle.pad_id,
                    suppress_tokens=list(self.vision.suppressed_ids) if self.vision else None,
                ),
            )
        return self._samples(batch, output_NX[:, ids_NL.shape[1] :], sampler)

    def _logits(self, ids_1L: Tensor) -> Tensor:
        """Logits at every position, in float32."""
        return self.model(ids_1L).logits.float()

    def _sampler(self, batch: list[SampleRequest], *, num_tokens: int, temperature: float) -> SeededSampler:
        """The logits processor that chooses the tokens of this batch."""
        seeds = [request.seed for request in batch]
        return SeededSampler(seeds, num_tokens=num_tokens, temperature=temperature, device=self.model.device)

    def _prefill(self, batch: list[SampleRequest]) -> tuple[Tensor, Tensor, DynamicCache]:
        """Left-padded ids and mask of all rows, and the KV cache of all prompt tokens but the last."""
        distinct = list(dict.fromkeys((request.prompt_ids, request.images) for request in batch))
        width = max(len(ids) for ids, _ in distinct)
        gaps = [width - len(ids) for ids, _ in distinct]
        padded = [[self.handle.pad_id] * gap + list(ids) for gap, (ids, _) in zip(gaps, distinct, strict=True)]
        ids_PL = torch.tensor(padded, device=self.model.device)
        mask_PL = torch.tensor([[0] * gap + [1] * (width - gap) for gap in gaps], device=self.model.device)
        cache = DynamicCache(config=self.model.config)
        place = {prompt: index for index, prompt in enumerate(distinct)}
        rows = torch.tensor([place[request.prompt_ids, request.images] for request in batch], device=self.model.device)
        vision_inputs: dict[str, Tensor] = {}
        if self.vision is not None:
            vision_inputs = self.vision.build_inputs(ids_PL[:, :-1], [images for _, images in distinct])
        if width > 1:
            positions_PL = (mask_PL.cumsum(-1) - 1).clamp(min=0)
            with self._precision():
                self.model.base_model(
                    input_ids=ids_PL[:, :-1],
                    # A vision-language model computes its positions from the mask.
                    attention_mask=mask_PL[:, :-1] if any(gaps) or vision_inputs else None,
                    position_ids=None if vision_inputs else positions_PL[:, :-1],
                    past_key_values=cache,
                    use_cache=True,
                    **vision_inputs,
                )
            cache.batch_select_indices(rows)
        self._expand_rope_deltas(rows, has_images=bool(vision_inputs))
        return ids_PL[rows], mask_PL[rows], cache

    def _expand_rope_deltas(self, rows: Tensor, *, has_images: bool) -> None:
        """Expand the position offsets of a vision-language model's prefill from one per prompt to one per row."""
        if self.vision is not None:
            base = self.model.base_model
            base.rope_deltas = base.rope_deltas[rows] if has_images else torch.zeros_like(rows)[:, None]

    def _samples(self, batch: list[SampleRequest], response_NT: Tensor, sampler: SeededSampler) -> list[Sample]:
        logps_NT = torch.stack(sampler.logps, dim=1).cpu().numpy()
        entropies_NT = torch.stack(sampler.entropies, dim=1).cpu().numpy()
        samples = []
        for row, ids in enumerate(response_NT.tolist()):
            length = next((place + 1 for place, token in enumerate(ids) if token in self.handle.eos_ids), len(ids))
            finished = ids[length - 1] in self.handle.eos_ids
            response_ids = ids[:length]
            samples.append(
                Sample(
                    prompt_id=batch[row].prompt_id,
                    slot=batch[row].slot,
                    response_ids=tuple(response_ids),
                    logps=tuple(logps_NT[row, :length].tolist()),
                    mean_entropy=float(entropies_NT[row, :length].mean(dtype="float64")),
                    text=self.handle.tokenizer.decode(response_ids[:-1] if finished else response_ids),
                    finished=finished,
                )
            )
        return samples
