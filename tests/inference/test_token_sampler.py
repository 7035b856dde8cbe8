"""Tokens are chosen by inverting the cumulative distribution, over blocks of the vocabulary first."""

import numpy
import pytest
import torch
from scipy.stats import chi2

from npo_cli.inference import token_sampler
from npo_cli.inference.token_sampler import UniformNumbers, choose_tokens

VOCABULARIES = (2, 17, 511, 512, 513, 1024, 5000)


def logits_of(num_rows: int, num_tokens: int, *, spread: float = 3.0, seed: int = 0) -> torch.Tensor:
    return spread * torch.randn((num_rows, num_tokens), generator=torch.Generator().manual_seed(seed))


def uniform_of(num_rows: int) -> torch.Tensor:
    return torch.rand(num_rows, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("num_tokens", VOCABULARIES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_is_the_first_whose_cumulative_probability_exceeds_the_number(num_tokens, temperature):
    logits, uniform = logits_of(200, num_tokens), uniform_of(200)
    tokens, logps, entropies = choose_tokens(logits.clone(), uniform, temperature=temperature)
    law = torch.distributions.Categorical(logits=logits.double() / temperature)
    expected = torch.searchsorted(law.probs.cumsum(-1), uniform[:, None], right=True)[:, 0]
    assert torch.equal(tokens, expected)
    assert torch.allclose(logps.double(), law.log_prob(expected), atol=1e-5)
    assert torch.allclose(entropies.double(), law.entropy(), atol=1e-5)


@pytest.mark.parametrize("num_tokens", VOCABULARIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_impossible_tokens_are_never_chosen(num_tokens, dtype):
    """At both ends of the vocabulary, at the least and the greatest uniform number."""
    logits = logits_of(64, num_tokens).to(dtype)
    logits[:, : num_tokens // 2] = -torch.inf
    if num_tokens > 2:
        logits[:, num_tokens // 2 + 1 + num_tokens // 8 :] = -torch.inf
    for number in (0.0, 1 - 2**-53):
        uniform = torch.full((64,), number, dtype=torch.float64)
        tokens, logps, entropies = choose_tokens(logits.clone(), uniform, temperature=1.0)
        assert torch.isfinite(logits.gather(1, tokens[:, None])).all()
        assert torch.isfinite(logps).all()
        assert torch.isfinite(entropies).all()


def test_tokens_over_several_blocks_follow_the_softmax():
    logits = logits_of(1, 2000, spread=1.0).expand(40_000, -1)
    tokens, *_ = choose_tokens(logits, uniform_of(40_000), temperature=1.0)
    seen = torch.bincount(tokens, minlength=2000).double()
    expected = 40_000 * torch.softmax(logits[0].double(), 0)
    cells = expected >= 5
    statistic = ((seen - expected)[cells] ** 2 / expected[cells]).sum().item()
    assert cells.sum() > 1000
    assert statistic < chi2.isf(1e-3, int(cells.sum()) - 1)


@pytest.mark.parametrize("chunk", [1, 5000, 11_000])
def test_rows_are_chosen_alike_in_chunks_of_any_size(monkeypatch, chunk):
    logits, uniform = logits_of(20, 5000), uniform_of(20)
    whole = choose_tokens(logits.clone(), uniform, temperature=1.0)
    monkeypatch.setattr(token_sampler, "CHUNK_NUMBERS", chunk)
    for ours, theirs in zip(choose_tokens(logits, uniform, temperature=1.0), whole, strict=True):
        assert torch.equal(ours, theirs)


def test_uniform_number_belongs_to_seed_and_position():
    """200 positions, drawn 64 at a time, of responses that begin at different times and change their row."""

    def number(seed: int, position: int) -> float:
        return numpy.random.Generator(numpy.random.Philox(key=seed)).random(position + 1)[position]

    uniform = UniformNumbers(3)
    uniform.start([0, 1, 2], [10, 11, 12])
    for position in range(100):
        found = uniform.at(numpy.array([position] * 3))
        assert found.tolist() == [number(seed, position) for seed in (10, 11, 12)]
    uniform.move([2], [0])
    uniform.start([1], [13])
    for position in range(100):
        found = uniform.at(numpy.array([100 + position, position]))
        assert found.tolist() == [number(12, 100 + position), number(13, position)]
