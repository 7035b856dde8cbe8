"""Log-probabilities of responses under a causal language model, computed in chunks of positions.

Logits are computed at positions that predict a response token only, one chunk at a time, and again in the backward
pass, so a large vocabulary needs memory for one chunk.

Axes: N responses, T response tokens (padded), U positions whose distribution is read, M response tokens of all
responses, H hidden size, W vocabulary.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from npo_cli.losses.divergence import DivergenceName, token_divergence, top_token_divergence
from npo_cli.policy.packing import PackedRows

HEAD_TEST_SCALE = 1000.0
Column = Literal["entropies", "collisions"]
"""What can be computed beside log-probabilities, of the distribution at each token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenScores:
    """Results per response token, all `(N, T)` with 0 in the padding; a column that was not requested is None."""

    logps_NT: Tensor
    entropies_NT: Tensor | None = None
    """Entropy of the distribution at that position (nats)."""
    collisions_NT: Tensor | None = None
    """sum_v p(v)^2 of the distribution at that position."""
    divergences_NT: Tensor | None = None
    """Divergence of the distribution at that position from a teacher's (nats)."""


Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherStates:
    """A teacher at the positions of a forward pass: its logits are computed a chunk at a time, like the policy's."""

    hidden_UH: Tensor
    head: Head
    temperature: float
    """Of the teacher's distributions."""
    divergence: DivergenceName
    top_k: int | None
    """As in `target.top_k`."""

    def part(self, start: int, end: int) -> "TeacherStates":
        """Of these positions."""
        return replace(self, hidden_UH=self.hidden_UH[start:end])

    def compare(self, logits_UW: Tensor) -> Tensor:
        """Divergence of the policy's distributions, of these logits at its temperature, `(U,)`."""
        with torch.no_grad():
            teacher_UW = _logits(self.head, self.hidden_UH, self.temperature)
        return token_divergence(teacher_UW, logits_UW, name=self.divergence, top_k=self.top_k)


@dataclass(frozen=True, kw_only=True, slots=True)
class TopTokens:
    """A teacher of which only the most probable tokens are known, at the positions of a forward pass."""

    ids_UK: Tensor
    logps_UK: Tensor
    divergence: DivergenceName

    def part(self, start: int, end: int) -> "TopTokens":
        """Of these positions."""
        return replace(self, ids_UK=self.ids_UK[start:end], logps_UK=self.logps_UK[start:end])

    def compare(self, logits_UW: Tensor) -> Tensor:
        """As of `TeacherStates`."""
        return top_token_divergence(self.ids_UK, self.logps_UK, logits_UW, name=self.divergence)


Teacher = TeacherStates | TopTokens


class SelectedLogps(torch.autograd.Function):
    """log softmax of float32 logits at chosen tokens, `(M,)`.

    Only the logits are saved. The gradient, (1[v = target] - p(v)) per token, is made in place of the probabilities, so
    that forward and backward pass hold one matrix `(U, W)` beside them; autograd would hold three.
    """

    @staticmethod
    def forward(ctx: Any, logits_UW: Tensor, unit_M: Tensor, target_M: Tensor) -> Tensor:
        """`unit_M`: the row of logits of each token."""
        ctx.save_for_backward(logits_UW, unit_M, target_M)
        return torch.log_softmax(logits_UW, dim=-1)[unit_M, target_M]

    @staticmethod
    def backward(ctx: Any, gradient_M: Tensor) -> tuple[Tensor, None, None]:
        """d log p(target) / d logits."""
        logits_UW, unit_M, target_M = ctx.saved_tensors
        gradient_U = gradient_M.new_zeros(len(logits_UW)).index_add_(0, unit_M, gradient_M)
        gradient_UW = torch.softmax(logits_UW, dim=-1).mul_(-gradient_U[:, None])
        return gradient_UW.index_put_((unit_M, target_M), gradient_M, accumulate=True), None, None


def chunk_scores(
    hidden_UH: Tensor,
    unit_M: Tensor,
    target_M: Tensor,
    head: Head,
    *,
    temperature: float,
    columns: Collection[Column] = (),
    teacher: Teacher | None = None,
) -> dict[str, Tensor]:
    """Log-probabilities of the targets and the requested columns, each `(M,)`, at `temperature`.

    The softmax is in float32, of float64 logits in float64. `unit_M`: the hidden state that predicts each target.
    `teacher`: of these positions; adds the divergences.
    """
    logits_UW = _logits(head, hidden_UH, temperature)
    if not columns and teacher is None:
        return {"logps": SelectedLogps.apply(logits_UW, unit_M, target_M)}
    found = {}
    if teacher is not None:
        found["divergences"] = teacher.compare(logits_UW)[unit_M]
    if not columns:
        return found | {"logps": SelectedLogps.apply(logits_UW, unit_M, target_M)}
    logps_UW = torch.log_softmax(logits_UW, dim=-1)
    probs_UW = logps_UW.exp()
    found["logps"] = logps_UW[unit_M, target_M]
    if "entropies" in columns:
        found["entropies"] = -(probs_UW * logps_UW).sum(-1)[unit_M]
    if "collisions" in columns:
        found["collisions"] = probs_UW.square().sum(-1)[unit_M]
    return found


def _logits(head: Head, hidden_UH: Tensor, temperature: float) -> Tensor:
    logits_UW = head(hidden_UH)
    logits_UW = logits_UW.to(torch.promote_types(logits_UW.dtype, torch.float32))
    if temperature == 1:
        return logits_UW
    logits_UW = logits_UW / temperature
    # A suppressed token's logit, the lowest number, would become -inf.
    return logits_UW.clamp(min=torch.finfo(logits_UW.dtype).min) if temperature < 1 else logits_UW


def response_hidden(model: PreTrainedModel, packed: PackedRows, *, plain_head: bool) -> tuple[Tensor, Head]:
    """Hidden states `(U, H)` at the positions that predict response tokens, and the function from them to logits.

    A model that scales or caps its logits after the head computes them itself, at every position.
    """
    if not plain_head:
        logits_BLW = model(**packed.model_inputs).logits
        return logits_BLW[packed.row_U, packed.position_U], torch.nn.Identity()
    hidden_BLH = model.base_model(**packed.model_inputs).last_hidden_state
    return hidden_BLH[packed.row_U, packed.position_U], model.get_output_embeddings()


def suppress_tokens(head: Head, suppressed_ids: Sequence[int]) -> Head:
    """The same head with probability 0 for these tokens."""
    if not suppressed_ids:
        return head

    def suppressed(hidden_UH: Tensor) -> Tensor:
        logits_UW = head(hidden_UH)
        ids = torch.tensor(suppressed_ids, device=logits_UW.device)
        # The lowest number instead of -inf: the entropy would be 0 * -inf = NaN.
        return logits_UW.index_fill(1, ids, torch.finfo(logits_UW.dtype).min)

    return suppressed


def token_scores(
    model: PreTrainedModel,
    packed: PackedRows,
    *,
    temperature: float,
    chunk_tokens: int,
    plain_head: bool,
    columns: Collection[Column] = (),
    teacher: Teacher | None = None,
) -> TokenScores:
    """Score the packed responses; differentiable if gradients are on."""
    hidden_UH, head = response_hidden(model, packed, plain_head=plain_head)
    head = suppress_tokens(head, packed.suppressed_ids)
    options = {"chunk_tokens": chunk_tokens, "temperature": temperature, "columns": columns}
    return score_in_chunks(hidden_UH, packed, head, **options, teacher=teacher)


def score_in_chunks(
    hidden_UH: Tensor,
    packed: PackedRows,
    head: Head,
    *,
    chunk_tokens: int,
    teacher: Teacher | None = None,
    **options: Any,
) -> TokenScores:
    """Scores from hidden states, `chunk_tokens` positions at a time; `options` are those of `chunk_scores`.

    With gradients the logits of a chunk are freed and computed again in the backward pass. Those of the last chunk are
    kept: the backward pass begins with it.
    """
    chunks = []
    firsts, num_units = packed.first_token_of_unit, len(hidden_UH)
    for start in range(0, num_units, chunk_tokens):
        end = min(start + chunk_tokens, num_units)
        tokens = slice(firsts[start], firsts[end])
        inputs = (hidden_UH[start:end], packed.unit_M[tokens] - start, packed.target_M[tokens], head)
        if teacher is not None:
            options["teacher"] = teacher.part(start, end)
        if torch.is_grad_enabled() and end < num_units:
            chunks.append(checkpoint(chunk_scores, *inputs, **options, use_reentrant=False))
        else:
            chunks.append(chunk_scores(*inputs, **options))
    columns = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
    return TokenScores(**{f"{name}_NT": packed.to_padded(column_M) for name, column_M in columns.items()})


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


@contextmanager
def mixed_precision(model: PreTrainedModel, compute_dtype: torch.dtype) -> Iterator[None]:
    """Autocast to `compute_dtype`, unless the weights have it already."""
    with torch.autocast(model.device.type, dtype=compute_dtype, enabled=compute_dtype != model.dtype):
        yield
