"""Log-probabilities of responses under a causal language model, computed in chunks of response tokens.

Rows are padded on the right, so causal attention needs no mask. Logits are computed for response tokens only, one chunk
at a time, and again in the backward pass, so a large vocabulary needs memory for one chunk.

Axes: N rows, L positions of the packed batch, T response tokens (padded), M response tokens of all rows, concatenated,
H hidden size, W vocabulary.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from npo_cli.types.rollouts import ImageRef

HEAD_TEST_SCALE = 1000.0
PASS_TOKENS = 256
"""Fixed cost of a forward and backward pass, in tokens: a further pass has to save more padding than this.

Measured on one CPU core: about 200 for the micro model and 80 for SmolLM2-135M, where it is the sum of the weights'
gradients.
"""

Column = Literal["entropies", "collisions"]
"""What can be computed beside log-probabilities, of the distribution at each token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenRow:
    """A prompt and a response, as token ids."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    images: tuple[ImageRef, ...] = ()
    """The images behind the prompt's image tokens."""

    @property
    def num_tokens(self) -> int:
        """Prompt and response together."""
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedRows:
    """Rows as tensors: response token m is predicted at `input_ids_NL[row_M[m], position_M[m]]`."""

    input_ids_NL: Tensor
    row_M: Tensor
    position_M: Tensor
    target_M: Tensor
    mask_NT: Tensor
    """True at response tokens, the end token included."""
    vision_inputs: Mapping[str, Tensor] = field(default_factory=dict)
    """Further model inputs, for rows with images."""
    suppressed_ids: tuple[int, ...] = ()
    """Tokens with probability 0 under the policy."""

    def to_padded(self, values_M: Tensor) -> Tensor:
        """Concatenated per-token values as `(N, T)`, 0 in the padding."""
        return values_M.new_zeros(self.mask_NT.shape).masked_scatter(self.mask_NT, values_M)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenScores:
    """Results per response token, all `(N, T)` with 0 in the padding; a column that was not asked for is None."""

    logps_NT: Tensor
    entropies_NT: Tensor | None = None
    """Entropy of the distribution at that position (nats)."""
    collisions_NT: Tensor | None = None
    """sum_v p(v)^2 of the distribution at that position."""


def pack_rows(rows: Sequence[TokenRow], *, pad_id: int, device: torch.device) -> PackedRows:
    """Pad on the right, in order."""
    width = max(row.num_tokens for row in rows)
    longest = max(len(row.response_ids) for row in rows)
    ids, mask, row_of, position, target = [], [], [], [], []
    for index, row in enumerate(rows):
        length, start = len(row.response_ids), len(row.prompt_ids) - 1
        ids.append([*row.prompt_ids, *row.response_ids, *[pad_id] * (width - row.num_tokens)])
        mask.append([True] * length + [False] * (longest - length))
        row_of += [index] * length
        position += range(start, start + length)
        target += row.response_ids
    id_options = {"dtype": torch.long, "device": device}
    return PackedRows(
        input_ids_NL=torch.tensor(ids, **id_options),
        row_M=torch.tensor(row_of, **id_options),
        position_M=torch.tensor(position, **id_options),
        target_M=torch.tensor(target, **id_options),
        mask_NT=torch.tensor(mask, dtype=torch.bool, device=device),
    )


Head = Callable[[Tensor], Tensor]


def chunk_scores(
    hidden_MH: Tensor, target_M: Tensor, head: Head, *, temperature: float, columns: Collection[Column] = ()
) -> dict[str, Tensor]:
    """Log-probability of the target and the columns asked for, each `(M,)`; softmax in float32 at `temperature`."""
    logits_MW = head(hidden_MH).float()
    logps_MW = torch.log_softmax(logits_MW if temperature == 1 else logits_MW / temperature, dim=-1)
    found = {"logps": logps_MW.gather(1, target_M[:, None])[:, 0]}
    if columns:
        probs_MW = logps_MW.exp()
        if "entropies" in columns:
            found["entropies"] = -(probs_MW * logps_MW).sum(-1)
        if "collisions" in columns:
            found["collisions"] = probs_MW.square().sum(-1)
    return found


def join_chunks(packed: PackedRows, chunks: Sequence[Mapping[str, Tensor]]) -> TokenScores:
    """The results of all chunks, in order, as one record."""
    return TokenScores(
        **{f"{name}_NT": packed.to_padded(torch.cat([chunk[name] for chunk in chunks])) for name in chunks[0]}
    )


def response_hidden(model: PreTrainedModel, packed: PackedRows, *, plain_head: bool) -> tuple[Tensor, Head]:
    """Hidden states `(M, H)` at the response positions, and the function from them to logits.

    A model that scales or caps its logits after the head computes them itself, at every position.
    """
    if not plain_head:
        logits_NLW = model(input_ids=packed.input_ids_NL, **packed.vision_inputs, use_cache=False).logits
        return logits_NLW[packed.row_M, packed.position_M], torch.nn.Identity()
    hidden_NLH = model.base_model(
        input_ids=packed.input_ids_NL, **packed.vision_inputs, use_cache=False
    ).last_hidden_state
    return hidden_NLH[packed.row_M, packed.position_M], model.get_output_embeddings()


def suppress_tokens(head: Head, suppressed_ids: Sequence[int]) -> Head:
    """The same head with probability 0 for these tokens."""
    if not suppressed_ids:
        return head

    def suppressed(hidden_MH: Tensor) -> Tensor:
        logits_MW = head(hidden_MH)
        ids = torch.tensor(suppressed_ids, device=logits_MW.device)
        # The lowest number instead of -inf: the entropy would be 0 * -inf = NaN.
        return logits_MW.index_fill(1, ids, torch.finfo(logits_MW.dtype).min)

    return suppressed


def token_scores(
    model: PreTrainedModel,
    packed: PackedRows,
    *,
    temperature: float,
    chunk_tokens: int,
    plain_head: bool,
    columns: Collection[Column] = (),
) -> TokenScores:
    """Score the packed responses; differentiable if gradients are on."""
    hidden_MH, head = response_hidden(model, packed, plain_head=plain_head)
    head = suppress_tokens(head, packed.suppressed_ids)
    chunks = []
    for start in range(0, len(packed.target_M), chunk_tokens):
        part = slice(start, start + chunk_tokens)
        inputs = (hidden_MH[part], packed.target_M[part], head)
        if torch.is_grad_enabled():
            options = {"temperature": temperature, "columns": columns}
            chunks.append(checkpoint(chunk_scores, *inputs, **options, use_reentrant=False))
        else:
            chunks.append(chunk_scores(*inputs, temperature=temperature, columns=columns))
    return join_chunks(packed, chunks)


@contextmanager
def recompute_activations(model: PreTrainedModel) -> Iterator[None]:
    """Enable gradient checkpointing for the block: transformers does it in training mode only.

    Dropout is removed when the model is loaded, so training mode changes nothing else.
    """
    is_training = model.is_gradient_checkpointing and torch.is_grad_enabled()
    model.train(is_training)
    try:
        yield
    finally:
        model.eval()


def remove_dropout(model: PreTrainedModel) -> None:
    """Set every dropout probability to 0."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


@torch.no_grad()
def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether head(hidden) equals the model's logits: False for models that scale or cap them afterwards.

    The head's output is amplified for the test, because a cap hardly changes the small logits of an untrained model.
    """
    input_ids = torch.arange(1, 9, device=model.device)[None] % model.config.get_text_config().vocab_size
    head = model.get_output_embeddings()
    amplifier = head.register_forward_hook(lambda _head, _inputs, logits: logits * HEAD_TEST_SCALE + HEAD_TEST_SCALE)
    try:
        hidden_1LH = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        head_logits, model_logits = head(hidden_1LH), model(input_ids=input_ids, use_cache=False).logits
    finally:
        amplifier.remove()
    return bool(torch.allclose(head_logits.float(), model_logits.float(), rtol=1e-3, atol=1e-3))


def micro_batches(rows: Sequence[TokenRow], *, max_tokens: int) -> list[list[int]]:
    """Row indices in micro-batches of padded size (rows x longest row) at most `max_tokens`, the longest rows first.

    Rows are sorted by length and cut where padding, plus PASS_TOKENS per micro-batch, is least over all of them: by
    dynamic programming over the first j rows. A row longer than the limit gets a micro-batch of its own.
    """
    order = sorted(range(len(rows)), key=lambda index: -rows[index].num_tokens)
    lengths = np.array([rows[index].num_tokens for index in order])
    least, starts = np.zeros(len(rows) + 1), np.zeros(len(rows) + 1, dtype=int)
    for end in range(1, len(rows) + 1):
        padded = lengths[:end] * np.arange(end, 0, -1)
        # The row before `end` may always stand alone.
        first = min(end - 1, int(np.count_nonzero(padded > max_tokens)))
        costs = least[first:end] + padded[first:] + PASS_TOKENS
        starts[end] = first + int(costs.argmin())
        least[end] = costs.min()
    batches: list[list[int]] = []
    end = len(rows)
    while end:
        batches.append(order[starts[end] : end])
        end = int(starts[end])
    return batches[::-1]


@contextmanager
def mixed_precision(model: PreTrainedModel, compute_dtype: torch.dtype) -> Iterator[None]:
    """Autocast to `compute_dtype`, unless the weights have it already."""
    with torch.autocast(model.device.type, dtype=compute_dtype, enabled=compute_dtype != model.dtype):
        yield
