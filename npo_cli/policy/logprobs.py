"""Log-probabilities of responses under a causal language model, without logits for anything else.

Rows are packed on the right, so causal attention needs no mask. Logits exist only for response tokens, a
chunk at a time, and are computed again in the backward pass: a 49k vocabulary costs one chunk of memory.

Axes: N rows, L positions of the packed batch, T response tokens (padded), M response tokens of all rows in
one line, H hidden width, W vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from npo_cli.types.rollouts import ImageRef

HEAD_TEST_SCALE = 1000.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenRow:
    """One response with its prompt, as token ids."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    images: tuple[ImageRef, ...] = ()
    """What the image tokens of the prompt show."""

    @property
    def num_tokens(self) -> int:
        """Prompt and response together."""
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedRows:
    """Rows as tensors: response token t of row i is predicted at `input_ids_NL[row_M, position_M]`."""

    input_ids_NL: Tensor
    row_M: Tensor
    position_M: Tensor
    target_M: Tensor
    mask_NT: Tensor
    """True where a response token is, end token included."""
    vision_inputs: Mapping[str, Tensor] = field(default_factory=dict)
    """What the model reads beside the ids; nothing where no row shows a picture."""
    suppressed_ids: tuple[int, ...] = ()
    """Tokens that the policy never writes."""

    def to_padded(self, values_M: Tensor) -> Tensor:
        """Per-token values on a line become `(N, T)`, 0 in the padding."""
        return values_M.new_zeros(self.mask_NT.shape).masked_scatter(self.mask_NT, values_M)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenScores:
    """What one pass says of each response token, all `(N, T)` with 0 in the padding."""

    logps_NT: Tensor
    entropies_NT: Tensor
    """Entropy of the whole distribution at that position (nats)."""
    collisions_NT: Tensor
    """sum_v p(v)^2 of the distribution at that position."""


def pack_rows(rows: Sequence[TokenRow], *, pad_id: int, device: torch.device) -> PackedRows:
    """Pad on the right; the order of rows is kept."""
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
    as_ids = {"dtype": torch.long, "device": device}
    return PackedRows(
        input_ids_NL=torch.tensor(ids, **as_ids),
        row_M=torch.tensor(row_of, **as_ids),
        position_M=torch.tensor(position, **as_ids),
        target_M=torch.tensor(target, **as_ids),
        mask_NT=torch.tensor(mask, dtype=torch.bool, device=device),
    )


Head = Callable[[Tensor], Tensor]


def chunk_scores(
    hidden_MH: Tensor, target_M: Tensor, head: Head, *, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of the target, entropy and collision probability; softmax in fp32 at `temperature`."""
    logps_MW = torch.log_softmax(head(hidden_MH).float() / temperature, dim=-1)
    probs_MW = logps_MW.exp()
    target_logps_M = logps_MW.gather(1, target_M[:, None])[:, 0]
    return target_logps_M, -(probs_MW * logps_MW).sum(-1), probs_MW.square().sum(-1)


def response_hidden(model: PreTrainedModel, packed: PackedRows, *, plain_head: bool) -> tuple[Tensor, Head]:
    """Hidden states at the response positions `(M, H)` and the function that makes logits of them.

    A model whose logits are scaled or capped after the head gives its own logits, of every position.
    """
    if not plain_head:
        logits_NLW = model(input_ids=packed.input_ids_NL, **packed.vision_inputs, use_cache=False).logits
        return logits_NLW[packed.row_M, packed.position_M], torch.nn.Identity()
    hidden_NLH = model.base_model(
        input_ids=packed.input_ids_NL, **packed.vision_inputs, use_cache=False
    ).last_hidden_state
    return hidden_NLH[packed.row_M, packed.position_M], model.get_output_embeddings()


def suppress_tokens(head: Head, silent_ids: Sequence[int]) -> Head:
    """The same head for a policy that never writes these tokens: their probability is 0."""
    if not silent_ids:
        return head

    def silenced(hidden_MH: Tensor) -> Tensor:
        logits_MW = head(hidden_MH)
        silent = torch.tensor(silent_ids, device=logits_MW.device)
        # The lowest number instead of -inf: 0 * -inf is not a number, and entropies are wanted.
        return logits_MW.index_fill(1, silent, torch.finfo(logits_MW.dtype).min)

    return silenced


def token_scores(
    model: PreTrainedModel, packed: PackedRows, *, temperature: float, chunk_tokens: int, plain_head: bool
) -> TokenScores:
    """Score the packed responses; differentiable where gradients are on."""
    hidden_MH, head = response_hidden(model, packed, plain_head=plain_head)
    head = suppress_tokens(head, packed.suppressed_ids)
    pieces = []
    for start in range(0, len(packed.target_M), chunk_tokens):
        part = slice(start, start + chunk_tokens)
        inputs = (hidden_MH[part], packed.target_M[part], head)
        if torch.is_grad_enabled():
            pieces.append(checkpoint(chunk_scores, *inputs, temperature=temperature, use_reentrant=False))
        else:
            pieces.append(chunk_scores(*inputs, temperature=temperature))
    logps_M, entropies_M, collisions_M = (torch.cat(column) for column in zip(*pieces, strict=True))
    return TokenScores(
        logps_NT=packed.to_padded(logps_M),
        entropies_NT=packed.to_padded(entropies_M),
        collisions_NT=packed.to_padded(collisions_M),
    )


@contextmanager
def recompute_activations(model: PreTrainedModel) -> Iterator[None]:
    """Let a model with gradient checkpointing drop its activations: transformers does so in training mode only.

    Dropout was taken out when the model was loaded, so the mode changes nothing else.
    """
    wanted = model.is_gradient_checkpointing and torch.is_grad_enabled()
    model.train(wanted)
    try:
        yield
    finally:
        model.eval()


def remove_dropout(model: PreTrainedModel) -> None:
    """Take dropout out of a model for good, in whatever mode it is."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


@torch.no_grad()
def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether head(hidden) equals the model's own logits: false for models that scale or cap them afterwards.

    The head's output is blown up for the test: a cap leaves the small logits of an untrained model as they are.
    """
    probe = torch.arange(1, 9, device=model.device)[None] % model.config.get_text_config().vocab_size
    head = model.get_output_embeddings()
    amplifier = head.register_forward_hook(lambda _head, _inputs, logits: logits * HEAD_TEST_SCALE + HEAD_TEST_SCALE)
    try:
        hidden_1LH = model.base_model(input_ids=probe, use_cache=False).last_hidden_state
        ours, theirs = head(hidden_1LH), model(input_ids=probe, use_cache=False).logits
    finally:
        amplifier.remove()
    return bool(torch.allclose(ours.float(), theirs.float(), rtol=1e-3, atol=1e-3))


def micro_batches(rows: Sequence[TokenRow], *, max_tokens: int) -> list[list[int]]:
    """Row numbers in runs whose padded size (rows x longest row) stays within `max_tokens`, order kept.

    A row longer than the limit gets a run of its own.
    """
    runs: list[list[int]] = []
    widest = 0
    for index, row in enumerate(rows):
        wider = max(widest, row.num_tokens)
        if runs and wider * (len(runs[-1]) + 1) <= max_tokens:
            runs[-1].append(index)
            widest = wider
        else:
            runs.append([index])
            widest = row.num_tokens
    return runs
