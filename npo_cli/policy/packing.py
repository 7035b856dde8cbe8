"""Rows of a prompt and a response as the tensors of forward passes: what is computed together, and what only once.

The responses of a group have the same prompt. In a packed row it stands once, the responses behind it; each response
attends to the prompt and to itself (a 4D mask), at the positions that it would have alone. That is the same function
of the weights as a row per response, with fewer tokens, but attention reads the square of the packed row: how many
responses share a row is decided by counting both. Rows are then sorted by length and cut into micro-batches.

The last token of a response predicts nothing and is not an input. The first one is predicted at the prompt's last
position, once for all responses of a packed row.

Axes: N responses, T response tokens (padded), B packed rows, L positions, U positions whose distribution is read,
M response tokens of all responses.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from npo_cli.types.rollouts import ImageRef

PASS_TOKENS = 256
"""Fixed cost of a forward and backward pass, in tokens: a further pass has to save more padding than this.

Measured on one CPU core: about 200 for the micro model and 80 for SmolLM2-135M, where it is the sum of the weights'
gradients.
"""
MASKED_ATTENTION = ("sdpa", "eager")
"""Attention implementations that take a mask of queries by keys."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenRow:
    """A prompt and a response, as token ids."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    images: tuple[ImageRef, ...] = ()
    """The images behind the prompt's image tokens."""
    privileged_ids: tuple[int, ...] | None = None
    """What a dense target's teacher reads in the prompt's place; None: the prompt."""

    @property
    def num_tokens(self) -> int:
        """Prompt and response together."""
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longer one of the two prompts."""
        return max(len(self.prompt_ids), len(self.privileged_ids or ()))

    @property
    def as_teacher_reads(self) -> "TokenRow":
        """The same response after the teacher's prompt."""
        return self if self.privileged_ids is None else replace(self, prompt_ids=self.privileged_ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class PackingCosts:
    """Floating-point operations of a forward pass through the layers, to weigh tokens against attention."""

    per_token: float
    """Matrix products with the layers' weights."""
    per_pair: float
    """Attention of a query to a key, over all heads and layers."""

    def of_single(self, num_inputs: int) -> float:
        """A row of one response: causal attention skips half of the pairs."""
        return num_inputs * self.per_token + num_inputs**2 / 2 * self.per_pair

    def of_shared(self, num_inputs: int) -> float:
        """A row of several responses: masked attention computes every pair."""
        return num_inputs * self.per_token + num_inputs**2 * self.per_pair


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """The rows of one forward pass."""

    indices: tuple[int, ...]
    """Places of the rows among those given, packed row after packed row."""
    pack_sizes: tuple[int, ...]
    """Number of them in each packed row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedRows:
    """Rows as tensors. Response token m is read from the distribution at `input_ids_BL[row_U[u], position_U[u]]` with
    u = unit_M[m], and belongs at `[response_M[m], token_M[m]]` of an `(N, T)` result.
    """

    input_ids_BL: Tensor
    row_U: Tensor
    position_U: Tensor
    unit_M: Tensor
    """Ascending."""
    target_M: Tensor
    response_M: Tensor
    token_M: Tensor
    first_token_of_unit: tuple[int, ...]
    """The first m of each u, and M: U + 1 numbers."""
    shape_NT: tuple[int, int]
    position_ids_BL: Tensor | None = None
    """None where no prompt is shared: positions count up, and attention is causal."""
    attention_mask_B1LL: Tensor | None = None
    """0 where a query attends to a key, else the lowest number."""
    vision_inputs: Mapping[str, Tensor] = field(default_factory=dict)
    """Further model inputs, for rows with images."""
    suppressed_ids: tuple[int, ...] = ()
    """Tokens with probability 0 under the policy."""

    @property
    def model_inputs(self) -> dict[str, Any]:
        """Keyword arguments of the model's forward pass."""
        inputs = {"input_ids": self.input_ids_BL, **self.vision_inputs, "use_cache": False}
        if self.attention_mask_B1LL is not None:
            inputs |= {"attention_mask": self.attention_mask_B1LL, "position_ids": self.position_ids_BL}
        return inputs

    def to_padded(self, values_M: Tensor) -> Tensor:
        """Per-token values as `(N, T)`, 0 in the padding."""
        return values_M.new_zeros(self.shape_NT).index_put((self.response_M, self.token_M), values_M)


def pack_rows(
    rows: Sequence[TokenRow],
    *,
    pad_id: int,
    device: torch.device,
    pack_sizes: Sequence[int] | None = None,
    mask_dtype: torch.dtype = torch.float32,
) -> PackedRows:
    """Rows as tensors, padded on the right. `pack_sizes`: how many consecutive rows share each prompt; None: one each.

    `mask_dtype`: precision of the attention, which reads the mask.
    """
    sizes = [1] * len(rows) if pack_sizes is None else pack_sizes
    ids: list[list[int]] = []
    positions: list[list[int]] = []
    segments: list[list[int]] = []
    row_U: list[int] = []
    position_U: list[int] = []
    unit_M: list[int] = []
    target_M: list[int] = []
    response_M: list[int] = []
    token_M: list[int] = []
    firsts: list[int] = []
    for number, (end, size) in enumerate(zip(accumulate(sizes), sizes, strict=True)):
        pack = range(end - size, end)
        prompt_ids = rows[pack[0]].prompt_ids
        ids.append([*prompt_ids])
        positions.append([*range(len(prompt_ids))])
        segments.append([0] * len(prompt_ids))
        # The prompt's last position predicts the first token of each response.
        begun = [response for response in pack if rows[response].response_ids]
        if begun:
            firsts.append(len(unit_M))
            unit_M += [len(row_U)] * len(begun)
            target_M += [rows[response].response_ids[0] for response in begun]
            response_M += begun
            token_M += [0] * len(begun)
            row_U.append(number)
            position_U.append(len(prompt_ids) - 1)
        for segment, response in enumerate(begun, start=1):
            inputs = rows[response].response_ids[:-1]
            count = len(inputs)
            firsts += range(len(unit_M), len(unit_M) + count)
            unit_M += range(len(row_U), len(row_U) + count)
            target_M += rows[response].response_ids[1:]
            response_M += [response] * count
            token_M += range(1, count + 1)
            row_U += [number] * count
            position_U += range(len(ids[-1]), len(ids[-1]) + count)
            ids[-1] += inputs
            positions[-1] += range(len(prompt_ids), len(prompt_ids) + count)
            segments[-1] += [segment] * count

    def padded(lists: Sequence[Sequence[int]], fill: int) -> Tensor:
        width = max(map(len, lists))
        return torch.tensor([[*one, *[fill] * (width - len(one))] for one in lists], device=device)

    def indices(numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=device)

    is_shared = len(sizes) < len(rows)
    return PackedRows(
        input_ids_BL=padded(ids, pad_id),
        row_U=indices(row_U),
        position_U=indices(position_U),
        unit_M=indices(unit_M),
        target_M=indices(target_M),
        response_M=indices(response_M),
        token_M=indices(token_M),
        first_token_of_unit=(*firsts, len(unit_M)),
        shape_NT=(len(rows), max(len(row.response_ids) for row in rows)),
        position_ids_BL=padded(positions, 0) if is_shared else None,
        attention_mask_B1LL=shared_prompt_mask(padded(segments, -1), mask_dtype) if is_shared else None,
    )


def shared_prompt_mask(segments_BL: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask `(B, 1, L, L)`: causal, within a segment or from any segment to segment 0, the prompt."""
    length = segments_BL.shape[1]
    queries_BL1, keys_B1L = segments_BL[:, :, None], segments_BL[:, None, :]
    causal_LL = torch.ones(length, length, dtype=torch.bool, device=segments_BL.device).tril()
    is_hidden_BLL = ~(((keys_B1L == 0) | (keys_B1L == queries_BL1)) & causal_LL)
    mask_BLL = torch.zeros(is_hidden_BLL.shape, dtype=dtype, device=segments_BL.device)
    return mask_BLL.masked_fill_(is_hidden_BLL, torch.finfo(dtype).min)[:, None]


# Which rows go together


def plan_passes(rows: Sequence[TokenRow], *, max_tokens: int, costs: PackingCosts | None) -> list[MicroBatch]:
    """Micro-batches of padded size (packed rows x the longest) at most `max_tokens`; a longer row stands alone.

    With `costs` rows of one prompt share it where that is cheaper. Packed rows with and without a mask do not mix.
    """
    packs = [[index] for index in range(len(rows))] if costs is None else share_prompts(rows, max_tokens, costs)
    lengths = [count_inputs([rows[index] for index in pack]) for pack in packs]
    found = []
    for is_shared in (True, False):
        places = [place for place, pack in enumerate(packs) if (len(pack) > 1) is is_shared]
        for batch in cut_by_length([lengths[place] for place in places], max_tokens=max_tokens):
            some = [packs[places[place]] for place in batch]
            found.append(
                MicroBatch(
                    indices=tuple(index for pack in some for index in pack),
                    pack_sizes=tuple(len(pack) for pack in some),
                )
            )
    return found


def count_inputs(pack: Sequence[TokenRow]) -> int:
    """Tokens that a model reads of a packed row: the prompt, a teacher's where that is longer, and all but the last of
    each response."""
    return pack[0].longest_prompt + sum(max(0, len(row.response_ids) - 1) for row in pack)


def share_prompts(rows: Sequence[TokenRow], max_tokens: int, costs: PackingCosts) -> list[list[int]]:
    """Indices of the rows of each packed row: rows of one prompt, in as many packed rows as cost least."""
    by_prompt: dict[Any, list[int]] = {}
    for index, row in enumerate(rows):
        by_prompt.setdefault((row.prompt_ids, row.images, row.privileged_ids), []).append(index)

    def cost(packs: Sequence[Sequence[int]]) -> float:
        sizes = [count_inputs([rows[index] for index in pack]) for pack in packs]
        if any(size > max_tokens for size, pack in zip(sizes, packs, strict=True) if len(pack) > 1):
            return float("inf")
        return sum(
            costs.of_shared(size) if len(pack) > 1 else costs.of_single(size)
            for size, pack in zip(sizes, packs, strict=True)
        )

    found = []
    for indices in by_prompt.values():
        counts = {-(-len(indices) // size) for size in range(1, len(indices) + 1)}
        found += min((list(split_evenly(indices, count)) for count in sorted(counts)), key=cost)
    return found


def split_evenly(indices: Sequence[int], num_parts: int) -> Iterator[list[int]]:
    """Consecutive parts whose sizes differ by at most one."""
    size, rest = divmod(len(indices), num_parts)
    start = 0
    for part in range(num_parts):
        end = start + size + (part < rest)
        yield list(indices[start:end])
        start = end


def cut_by_length(lengths: Sequence[int], *, max_tokens: int) -> list[list[int]]:
    """Places of the lengths in batches of padded size at most `max_tokens`, the longest first.

    Sorted lengths are cut where padding, plus PASS_TOKENS per batch, is least over all batches: by dynamic programming
    over the longest j of them.
    """
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    sorted_lengths = np.array([lengths[place] for place in order])
    least, starts = np.zeros(len(order) + 1), np.zeros(len(order) + 1, dtype=int)
    for end in range(1, len(order) + 1):
        padded = sorted_lengths[:end] * np.arange(end, 0, -1)
        # The one before `end` may always stand alone.
        first = min(end - 1, int(np.count_nonzero(padded > max_tokens)))
        costs = least[first:end] + padded[first:] + PASS_TOKENS
        starts[end] = first + int(costs.argmin())
        least[end] = costs.min()
    batches: list[list[int]] = []
    end = len(order)
    while end:
        batches.append(order[starts[end] : end])
        end = int(starts[end])
    return batches[::-1]


# Whether a model can share prompts


def packing_costs(model: PreTrainedModel) -> PackingCosts | None:
    """What packing costs in this model; None where prompts cannot be shared.

    Needs full attention with a mask in every layer, and positions that are given. Images, sliding windows, flash and
    flex attention do not have both; experts are left out because their batches, and so their rounding, depend on all
    tokens of a pass.
    """
    text = model.config.get_text_config()
    is_plain = (
        text is model.config
        and text._attn_implementation in MASKED_ATTENTION
        and has_full_attention(text)
        and getattr(text, "num_experts_per_tok", None) is None
    )
    if not is_plain or not obeys_mask_and_positions(model):
        return None
    heads = text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
    embeddings = {id(part.weight) for part in (model.get_input_embeddings(), model.get_output_embeddings())}
    weights = sum(each.numel() for each in model.parameters() if each.dim() == 2 and id(each) not in embeddings)
    # A product and a sum per weight; per pair and head q.k and the weighted sum of v.
    return PackingCosts(per_token=2.0 * weights, per_pair=4.0 * heads * head_size * text.num_hidden_layers)


def has_full_attention(text: PreTrainedConfig) -> bool:
    """Whether the config names no window, chunk, or layer of another kind."""
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    windows = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return kinds == {"full_attention"} and windows == [None, None]


@torch.no_grad()
def obeys_mask_and_positions(model: PreTrainedModel) -> bool:
    """Whether hidden states do not depend on what the mask hides, to the last bit, and do on the given positions."""
    vocabulary = model.config.get_text_config().vocab_size

    def hidden_of_second(first: tuple[int, ...], *, shift: int) -> Tensor:
        rows = [TokenRow(prompt_ids=(1, 2), response_ids=ids) for ids in (first, (3, 4, 5, 6))]
        packed = pack_rows(rows, pad_id=0, device=model.device, pack_sizes=[2], mask_dtype=model.dtype)
        inputs = packed.model_inputs
        inputs["input_ids"] = inputs["input_ids"] % vocabulary
        inputs["position_ids"] = inputs["position_ids"] + shift * (packed.input_ids_BL == 4)
        return model.base_model(**inputs).last_hidden_state[0, -3:]

    try:
        hidden = hidden_of_second((7, 8, 9), shift=0)
        others = hidden_of_second((9, 1, 8), shift=0), hidden_of_second((7, 8, 9), shift=3)
    except (TypeError, ValueError, RuntimeError):  # the model takes no positions, or no mask of this shape
        return False
    return torch.equal(hidden, others[0]) and not torch.equal(hidden, others[1])
