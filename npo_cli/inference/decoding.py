"""Sampling with continuous batching: a response that ends leaves, and the next one takes its row.

One pass gives every row a token. Rows of responses that ended are computed in vain until the batch is rearranged: new
responses enter them, and where none are left, the last rows move into the gaps and the batch gets smaller. That costs
a prefill or copies, so it waits until half a pass was spent in vain. Responses enter in the order of their
prompts' first appearance, so each prompt is prefilled once; the order depends on nothing else, as results do not.

Axes: N rows, P distinct prompts, L prompt tokens, T response tokens, W vocabulary.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from npo_cli.activity import SampleMeter
from npo_cli.inference.base import ModelHandle, Sample, SampleRequest
from npo_cli.inference.kv_cache import Window, open_rows
from npo_cli.inference.token_sampler import UniformNumbers, choose_tokens
from npo_cli.types.rollouts import ImageRef

WASTED_PASSES = 0.5
"""The batch is rearranged when its ended rows have cost this many passes of the whole batch."""

PromptKey = tuple[tuple[int, ...], tuple[ImageRef, ...]]
"""Token ids and images."""


@dataclass(slots=True)
class SamplingCost:
    """What an engine has computed so far."""

    passes: int = 0
    """Forward passes of one token per row."""
    row_steps: int = 0
    """Rows of these passes."""
    tokens: int = 0
    """Tokens of responses: the rows that were of use."""
    prefills: int = 0
    """Forward passes over prompts."""
    prefilled_tokens: int = 0
    """Prompt tokens of these passes, with padding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefill:
    """The KV cache of some prompts without their last token."""

    rows: dict[PromptKey, int]
    cache: DynamicCache
    num_columns: int
    """0 where all prompts have one token: the cache is empty."""
    position_offsets: list[int]
    """Per prompt, how far a vision-language model's positions are from the number of tokens."""

    def select(self, prompt: PromptKey) -> "Prefill":
        """Of one prompt, which is all that remains of the cache."""
        row = self.rows[prompt]
        self.cache.reorder_cache(torch.tensor([row]))
        return replace(self, rows={prompt: 0}, position_offsets=[self.position_offsets[row]])


class DecodedModel:
    """One model and the KV cache of the rows that it decodes."""

    def __init__(self, handle: ModelHandle, forward: Callable[..., Any], window: Window, *, num_rows: int) -> None:
        """`forward` is called for passes of one token per row, if the cache is written in place."""
        self.model, self.vision, self.pad_id = handle.model, handle.vision, handle.pad_id
        self.window = window
        self.rows = open_rows(self.model.config, window, num_rows=num_rows)
        self.forward = forward if self.rows.accepts_new_rows else self.model
        self.cache_argument = find_cache_argument(self.model)
        # The mask that the attention reads, instead of one per token from which the model derives it.
        self.takes_4d_mask = (
            self.rows.accepts_new_rows
            and self.model.config._attn_implementation == "sdpa"
            and self.model._supports_attention_backend
        )
        self.position_offsets_N = torch.zeros(num_rows, dtype=torch.long, device=self.model.device)

    def prefill(self, prompts: Sequence[PromptKey]) -> Prefill:
        """One pass over all prompts, padded on the left."""
        width = max(len(ids) for ids, _ in prompts)
        gaps = [width - len(ids) for ids, _ in prompts]
        rows = {prompt: row for row, prompt in enumerate(prompts)}
        cache, offsets = DynamicCache(config=self.model.config), [0] * len(prompts)
        if width > 1:
            padded = [[self.pad_id] * gap + list(ids[:-1]) for gap, (ids, _) in zip(gaps, prompts, strict=True)]
            ids_PL = torch.tensor(padded, device=self.model.device)
            mask_PL = torch.arange(width - 1) >= torch.tensor(gaps)[:, None]
            mask_PL = mask_PL.to(device=self.model.device, dtype=torch.long)
            images: dict[str, Tensor] = {}
            if self.vision is not None:
                images = self.vision.build_inputs(ids_PL, [images for _, images in prompts])
            self.model.base_model(
                input_ids=ids_PL,
                # A vision-language model computes its positions from the mask.
                attention_mask=mask_PL if any(gaps) or images else None,
                position_ids=None if images else (mask_PL.cumsum(-1) - 1).clamp(min=0),
                use_cache=True,
                **{self.cache_argument: cache},
                **images,
            )
            if images:
                offsets = self.model.base_model.rope_deltas[:, 0].tolist()
        return Prefill(rows=rows, cache=cache, num_columns=width - 1, position_offsets=offsets)

    def enter(self, prefill: Prefill, prompts: Sequence[PromptKey], rows: Sequence[int]) -> None:
        """Give rows the columns of their prompts."""
        sources = [prefill.rows[prompt] for prompt in prompts]
        self.rows.enter(prefill.cache, sources, rows)
        offsets = [prefill.position_offsets[source] for source in sources]
        self.position_offsets_N[rows] = torch.tensor(offsets, device=self.model.device)

    def move(self, sources: Sequence[int], rows: Sequence[int]) -> None:
        """Copy rows over others, and keep the first `Window.num_rows`."""
        self.rows.move(sources, rows)
        self.position_offsets_N[rows] = self.position_offsets_N[sources]

    def next_logits(self, token_N: Tensor, starts_N: Tensor, *, has_gaps: bool) -> Tensor:
        """The logits after these tokens `(N, W)`; a row's first token lies in column `starts_N`."""
        window, mask = self.window, None
        if has_gaps:
            mask = torch.arange(window.first, window.end + 1, device=starts_N.device) >= starts_N[:, None]
            mask = mask[:, None, None, :] if self.takes_4d_mask else mask
        position_N1 = (window.end - starts_N)[:, None]
        if self.vision is not None:
            # The axes time, height and width of a position are equal in text: one is enough.
            position_N1 = (position_N1 + self.position_offsets_N[: len(starts_N), None])[None]
        output = self.forward(
            input_ids=token_N[:, None],
            attention_mask=mask,
            position_ids=position_N1,
            use_cache=True,
            **{self.cache_argument: self.rows.cache},
        )
        return output.logits[:, -1]


def find_cache_argument(model: PreTrainedModel) -> str:
    """What the model's forward pass calls its KV cache: transformers renamed it."""
    parameters = inspect.signature(type(model.base_model).forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def prompt_key(request: SampleRequest) -> PromptKey:
    """What a prefill depends on."""
    return request.prompt_ids, request.images


def order_by_prompt(requests: Sequence[SampleRequest]) -> list[int]:
    """Places of the requests in the order of entering: prompts by first appearance, the responses of each together."""
    first: dict[PromptKey, int] = {}
    rank = [first.setdefault(prompt_key(request), len(first)) for request in requests]
    return sorted(range(len(requests)), key=rank.__getitem__)


class Decoding:
    """The rows of one call of an engine, from the first response to the last.

    `open_models` returns models that read the same tokens, and `combine` makes one distribution of their logits.
    """

    def __init__(
        self,
        requests: Sequence[SampleRequest],
        handle: ModelHandle,
        *,
        open_models: Callable[[Window, int], Sequence[DecodedModel]],
        combine: Callable[[Sequence[Tensor]], Tensor],
        max_num_rows: int,
        temperature: float,
        max_new_tokens: int,
        cost: SamplingCost,
        meter: SampleMeter | None,
    ) -> None:
        self.requests, self.handle, self.cost, self.meter = requests, handle, cost, meter
        self.temperature, self.max_new_tokens, self.device = temperature, max_new_tokens, handle.model.device
        num_rows = min(max_num_rows, len(requests))
        limits = [request.max_new_tokens or max_new_tokens for request in requests]
        lengths = [len(request.prompt_ids) + limit for request, limit in zip(requests, limits, strict=True)]
        self.limit_of_request = numpy.array(limits)
        self.window = Window(max_columns=max(lengths) - 1)
        self.models, self.combine = open_models(self.window, num_rows), combine
        self.accepts_new_rows = self.models[0].rows.accepts_new_rows
        suppressed = () if handle.vision is None else handle.vision.suppressed_ids
        self.suppressed_ids = torch.tensor(suppressed, dtype=torch.long, device=self.device)
        self.waiting = order_by_prompt(requests)[::-1]
        self.prefills: dict[PromptKey, list[Prefill]] = {}
        """Per prompt, of each model."""
        self.samples: list[Sample | None] = [None] * len(requests)
        self.num_wasted = self.num_done = self.num_tokens = 0
        # Of each row: its request, whether it is unfinished, the column of its first token, and the response so far.
        self.request_N = numpy.zeros(num_rows, dtype=int)
        self.is_active_N = numpy.zeros(num_rows, dtype=bool)
        self.start_N = numpy.zeros(num_rows, dtype=int)
        self.length_N = numpy.zeros(num_rows, dtype=int)
        self.ids_NT = numpy.empty((num_rows, max_new_tokens), dtype=int)
        self.logps_NT = numpy.empty((num_rows, max_new_tokens), dtype=numpy.float32)
        self.entropies_NT = numpy.empty((num_rows, max_new_tokens), dtype=numpy.float32)
        self.uniform = UniformNumbers(num_rows)
        # On the device: the newest token, and the column of the first.
        self.token_N = torch.zeros(num_rows, dtype=torch.long, device=self.device)
        self.device_start_N, self.has_gaps = self.token_N, False

    @torch.no_grad()
    def run(self) -> list[Sample]:
        """One sample per request, in order."""
        while self.num_done < len(self.requests):
            if self._rearranging_pays():
                self._rearrange()
            elif self.window.end == self.window.capacity:
                self._make_room(0)
            self._step()
            if self.meter is not None and self.meter.is_due and self.num_done < len(self.requests):
                self.meter.report(self.num_done, self.num_tokens)
        if self.meter is not None:
            self.meter.add(self.num_done, self.num_tokens)
        return self.samples

    def _rearranging_pays(self) -> bool:
        num_rows = self.window.num_rows
        return self.num_wasted > WASTED_PASSES * num_rows or not self.is_active_N[:num_rows].any()

    def _rearrange(self) -> None:
        """Let responses enter free rows, and close the gaps that remain."""
        self.num_wasted = 0
        if self.waiting and (self.accepts_new_rows or not self.is_active_N.any()):
            self._enter(numpy.flatnonzero(~self.is_active_N)[: len(self.waiting)].tolist())
        else:
            self._make_room(0)
        num_active = int(self.is_active_N.sum())
        if num_active < self.window.num_rows:
            gaps = numpy.flatnonzero(~self.is_active_N[:num_active])
            self._move(num_active + numpy.flatnonzero(self.is_active_N[num_active:]), gaps, num_rows=num_active)
            self._update_columns()

    def _enter(self, rows: list[int]) -> None:
        """Begin the next responses in these rows; prompts that are not at hand are prefilled."""
        entering = [self.waiting.pop() for _ in rows]
        prompts = [prompt_key(self.requests[place]) for place in entering]
        self._make_room(max(len(ids) for ids, _ in prompts) - 1)
        self.window.num_rows = max(self.window.num_rows, rows[-1] + 1)
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.prefills]
        if missing:
            self.prefills |= dict.fromkeys(missing, self._prefill(missing))
        for models in {id(found): found for found in map(self.prefills.get, prompts)}.values():
            own = [index for index, prompt in enumerate(prompts) if self.prefills[prompt] is models]
            for model, prefill in zip(self.models, models, strict=True):
                model.enter(prefill, [prompts[index] for index in own], [rows[index] for index in own])
        self._drop_prefills()
        self.request_N[rows], self.length_N[rows], self.is_active_N[rows] = entering, 0, True
        self.start_N[rows] = [self.window.end + 1 - len(ids) for ids, _ in prompts]
        self.token_N[rows] = torch.tensor([ids[-1] for ids, _ in prompts], device=self.device)
        self.uniform.start(rows, [self.requests[place].seed for place in entering])
        self._update_columns()

    def _drop_prefills(self) -> None:
        """All but that of the next prompt, if some of its responses wait."""
        following = prompt_key(self.requests[self.waiting[-1]]) if self.waiting else None
        kept = self.prefills.get(following) if self.accepts_new_rows else None
        self.prefills = {} if kept is None else {following: [prefill.select(following) for prefill in kept]}

    def _prefill(self, prompts: Sequence[PromptKey]) -> list[Prefill]:
        found = [model.prefill(prompts) for model in self.models]
        self.cost.prefills += 1
        self.cost.prefilled_tokens += len(prompts) * found[0].num_columns
        return found

    def _move(self, sources: numpy.ndarray, rows: numpy.ndarray, *, num_rows: int) -> None:
        """Copy rows over others, and keep the first `num_rows`."""
        self.window.num_rows = num_rows
        for model in self.models:
            model.move(sources.tolist(), rows.tolist())
        self.uniform.move(sources.tolist(), rows.tolist())
        self.token_N[rows.tolist()] = self.token_N[sources.tolist()]
        for column_N in (self.request_N, self.start_N, self.length_N):
            column_N[rows] = column_N[sources]
        for column_NT in (self.ids_NT, self.logps_NT, self.entropies_NT):
            for source, row in zip(sources, rows, strict=True):
                column_NT[row, : self.length_N[row]] = column_NT[source, : self.length_N[row]]
        self.is_active_N[:num_rows], self.is_active_N[num_rows:] = True, False

    def _make_room(self, num_columns: int) -> None:
        """Have a free column, with room for the tokens of all rows left of it, and of entering ones that long."""
        window, old_end = self.window, self.window.end
        start_A = self.start_N[self.is_active_N]
        held = old_end - int(start_A.min()) if len(start_A) else 0
        if not held and not self.accepts_new_rows:
            window.end = -1
        if window.make_room(max(held, num_columns)):
            for model in self.models:
                model.rows.relocate(held, old_end)
            self.start_N[self.is_active_N] += window.end - old_end
            self._update_columns()

    def _update_columns(self) -> None:
        """After a change of rows or columns: where the rows begin."""
        start_A = self.start_N[self.is_active_N]
        if len(start_A):
            self.window.first = int(start_A.min()) if self.accepts_new_rows else 0
            self.has_gaps = bool((start_A > self.window.first).any())
            self.device_start_N = torch.tensor(self.start_N[: self.window.num_rows], device=self.device)

    def _step(self) -> None:
        """One token for every row."""
        num_rows, last = self.window.num_rows, self.max_new_tokens - 1
        uniform_N = self.uniform.at(numpy.minimum(self.length_N[:num_rows], last))
        logits_NW = self.combine(
            [
                model.next_logits(self.token_N[:num_rows], self.device_start_N, has_gaps=self.has_gaps)
                for model in self.models
            ]
        )
        if len(self.suppressed_ids):
            logits_NW.index_fill_(1, self.suppressed_ids, -torch.inf)
        token_N, logps_N, entropies_N = choose_tokens(
            logits_NW, torch.from_numpy(uniform_N).to(self.device), temperature=self.temperature
        )
        self.token_N[:num_rows] = token_N
        self.window.end += 1
        self._record(torch.stack([token_N.double(), logps_N.double(), entropies_N.double()]).cpu().numpy())

    def _record(self, found_3N: numpy.ndarray) -> None:
        """Add tokens, log-probabilities and entropies to the responses, and finish those that end here."""
        rows = numpy.flatnonzero(self.is_active_N)
        ids, logps, entropies = found_3N[:, rows]
        places = self.length_N[rows]
        self.ids_NT[rows, places], self.logps_NT[rows, places] = ids, logps
        self.entropies_NT[rows, places] = entropies
        self.length_N[rows] += 1
        is_end = numpy.isin(ids, self.handle.eos_ids)
        limits = self.limit_of_request[self.request_N[rows]]
        for index in numpy.flatnonzero(is_end | (self.length_N[rows] == limits)):
            self._finish(rows[index], finished=bool(is_end[index]))
        self.num_tokens += len(rows)
        self.num_wasted += found_3N.shape[1] - len(rows)
        self.cost.passes, self.cost.tokens = self.cost.passes + 1, self.cost.tokens + len(rows)
        self.cost.row_steps += found_3N.shape[1]

    def _finish(self, row: int, *, finished: bool) -> None:
        self.is_active_N[row] = False
        self.num_done += 1
        length, request = self.length_N[row], self.requests[self.request_N[row]]
        response_ids = self.ids_NT[row, :length].tolist()
        self.samples[self.request_N[row]] = Sample(
            prompt_id=request.prompt_id,
            slot=request.slot,
            response_ids=tuple(response_ids),
            logps=tuple(self.logps_NT[row, :length].tolist()),
            mean_entropy=float(self.entropies_NT[row, :length].mean(dtype="float64")),
            text=self.handle.tokenizer.decode(response_ids[:-1] if finished else response_ids),
            finished=finished,
        )
