"""Log-probabilities: chunks, columns, suppressed tokens."""

import math
from collections.abc import Sequence

import pytest
import torch

from npo_cli.policy.logprobs import (
    Column,
    TokenScores,
    recompute_activations,
    remove_dropout,
    suppress_tokens,
    token_scores,
)
from npo_cli.policy.packing import TokenRow, pack_rows
from tests.policy.models import gemma, qwen

ROWS = [
    TokenRow(prompt_ids=(1, 2, 3), response_ids=(4, 5)),
    TokenRow(prompt_ids=(6,), response_ids=(7, 8, 9)),
]


BOTH = ("entropies", "collisions")


def score_rows(
    model, *, chunk_tokens: int, temperature: float = 1.0, plain_head: bool = True, columns: Sequence[Column] = BOTH
) -> TokenScores:
    packed = pack_rows(ROWS, pad_id=0, device=torch.device("cpu"))
    options = {"temperature": temperature, "chunk_tokens": chunk_tokens, "plain_head": plain_head}
    return token_scores(model, packed, **options, columns=columns)


def logprobs_by_hand(model, row: TokenRow, temperature: float) -> list[float]:
    """From the logits of this row alone."""
    logits_LW = model(torch.tensor([[*row.prompt_ids, *row.response_ids]])).logits[0]
    logps_LW = torch.log_softmax(logits_LW.double() / temperature, -1)
    first = len(row.prompt_ids) - 1
    return [logps_LW[first + place, token].item() for place, token in enumerate(row.response_ids)]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("chunk_tokens", [1, 2, 3, 100])
def test_logprobs_in_chunks_equal_those_of_each_row_alone(chunk_tokens: int, temperature: float):
    model = qwen()
    with torch.no_grad():
        scores = score_rows(model, chunk_tokens=chunk_tokens, temperature=temperature)
        for row, logps_T in zip(ROWS, scores.logps_NT, strict=True):
            expected = logprobs_by_hand(model, row, temperature)
            assert logps_T[: len(row.response_ids)].tolist() == pytest.approx(expected, abs=1e-5)
    # the padding after the first row's two tokens
    assert (scores.logps_NT[0, 2], scores.entropies_NT[0, 2], scores.collisions_NT[0, 2]) == (0, 0, 0)


def test_columns_are_computed_only_if_asked_for():
    model = qwen()
    both, neither = (score_rows(model, chunk_tokens=2, columns=columns) for columns in (BOTH, ()))
    assert torch.equal(neither.logps_NT, both.logps_NT)
    assert (neither.entropies_NT, neither.collisions_NT) == (None, None)
    entropies = score_rows(model, chunk_tokens=2, columns=("entropies",))
    assert torch.equal(entropies.entropies_NT, both.entropies_NT)
    assert entropies.collisions_NT is None


def gradients(model, *, chunk_tokens: int, plain_head: bool = True) -> list[torch.Tensor]:
    model.zero_grad()
    scores = score_rows(model, chunk_tokens=chunk_tokens, plain_head=plain_head)
    (scores.logps_NT.sum() + 0.1 * scores.entropies_NT.sum()).backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("chunk_tokens", [1, 2, 4])
def test_logprob_gradients_in_chunks_equal_those_of_one_pass(chunk_tokens: int):
    model = qwen()
    expected = gradients(model, chunk_tokens=100)
    found = gradients(model, chunk_tokens=chunk_tokens)
    assert len(found) == len(expected) > 5
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_logprobs_of_a_plain_head_equal_those_of_the_models_own_logits():
    model = qwen()
    with torch.no_grad():
        by_head = score_rows(model, chunk_tokens=2, plain_head=True)
        by_model = score_rows(model, chunk_tokens=2, plain_head=False)
    assert torch.allclose(by_head.logps_NT, by_model.logps_NT, atol=1e-6)


def test_logprobs_of_a_capped_model_differ_without_its_own_logits():
    model = gemma(cap=0.05)
    with torch.no_grad():
        by_head = score_rows(model, chunk_tokens=2, plain_head=True)
        by_model = score_rows(model, chunk_tokens=2, plain_head=False)
        expected = logprobs_by_hand(model, ROWS[1], 1.0)
    assert by_model.logps_NT[1].tolist() == pytest.approx(expected, abs=1e-5)
    assert not torch.allclose(by_head.logps_NT, by_model.logps_NT, atol=1e-3)


def test_suppressed_tokens_have_probability_zero_and_leave_a_finite_entropy():
    # three tokens with logits 0, 1, 2; without the last: p = (1, e) / (1 + e)
    head = suppress_tokens(torch.nn.Identity(), (2,))
    logps_W = torch.log_softmax(head(torch.tensor([[0.0, 1.0, 2.0]])), -1)[0]
    assert logps_W[:2].exp().tolist() == pytest.approx([1 / (1 + math.e), math.e / (1 + math.e)])
    assert logps_W[2].exp() == 0
    assert torch.isfinite((logps_W.exp() * logps_W).sum())
    same = torch.nn.Identity()
    assert suppress_tokens(same, ()) is same


def test_recompute_activations_uses_training_mode_only_with_gradients_and_checkpointing():
    model = qwen()
    seen = []
    for enabled, with_gradients in ((False, True), (True, False), (True, True)):
        if enabled:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with torch.set_grad_enabled(with_gradients), recompute_activations(model):
            seen.append(model.training)
        assert not model.training
    assert seen == [False, False, True]


def test_remove_dropout_sets_every_probability_to_zero():
    model = qwen()
    model.extra = torch.nn.Dropout(0.5)
    model.base_model.layers[0].self_attn.attention_dropout = 0.3
    remove_dropout(model)
    assert model.extra.p == 0.0
    assert model.base_model.layers[0].self_attn.attention_dropout == 0.0
