"""Choosing one token per row from softmax(logits / temperature), at a uniform number of its own.

The cumulative distribution is inverted in two stages, first over blocks of the vocabulary, then within one block, in
float64 both times; so there is no cumulative sum over the vocabulary. No beams, penalties, top-k or top-p: the behavior
policy must be the policy itself.

Axes: N rows, T tokens of a response, W vocabulary, B blocks of the vocabulary.
"""

from collections.abc import Sequence

import numpy
import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK_TOKENS = 512
"""Tokens of the vocabulary per block."""
CHUNK_NUMBERS = 1 << 23
"""Logits taken at a time, which bounds the memory: log-probabilities and probabilities in float32."""
DRAWN_TOKENS = 64
"""Uniform numbers drawn at a time."""


def choose_tokens(logits_NW: Tensor, uniform_N: Tensor, *, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Per row the token at which the cumulative probability exceeds the uniform number (float64, below 1).

    Also its log-probability, and the entropy of the distribution (nats). A token with logit -inf is never chosen.
    """
    size = max(1, CHUNK_NUMBERS // logits_NW.shape[1])
    chunks = [
        _choose_tokens(logits, uniform, temperature)
        for logits, uniform in zip(logits_NW.split(size), uniform_N.split(size), strict=True)
    ]
    tokens_N, logps_N, entropies_N = (torch.cat(column) for column in zip(*chunks, strict=True))
    return tokens_N, logps_N, entropies_N


def _choose_tokens(logits_NW: Tensor, uniform_N: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    logits_NW = logits_NW.float()
    logps_NW = torch.log_softmax(logits_NW if temperature == 1 else logits_NW / temperature, dim=-1)
    probs_NW = logps_NW.exp()
    chosen_N1 = _invert_cumulative(probs_NW, uniform_N[:, None])
    chosen_logps_N = logps_NW.gather(1, chosen_N1)[:, 0]
    # An impossible token adds 0 * -inf = NaN.
    entropies_N = -logps_NW.mul_(probs_NW).nan_to_num_().sum(-1)
    return chosen_N1[:, 0], chosen_logps_N, entropies_N


def _invert_cumulative(probs_NW: Tensor, uniform_N1: Tensor) -> Tensor:
    """The first token whose cumulative probability exceeds the uniform number, as a fraction of the total."""
    num_tokens = probs_NW.shape[1]
    if num_tokens <= BLOCK_TOKENS:
        cumulative_NW = probs_NW.cumsum(-1, dtype=torch.float64)
        return torch.searchsorted(cumulative_NW, uniform_N1 * cumulative_NW[:, -1:], right=True)
    padding = -num_tokens % BLOCK_TOKENS
    whole = num_tokens - num_tokens % BLOCK_TOKENS
    sums_NB = probs_NW[:, :whole].unflatten(1, (-1, BLOCK_TOKENS)).sum(-1)
    if padding:
        sums_NB = torch.cat([sums_NB, probs_NW[:, whole:].sum(-1, keepdim=True)], dim=1)
    cumulative_NB = sums_NB.cumsum(-1, dtype=torch.float64)
    threshold_N1 = uniform_N1 * cumulative_NB[:, -1:]
    block_N1 = torch.searchsorted(cumulative_NB, threshold_N1, right=True)
    tokens_NK = block_N1 * BLOCK_TOKENS + torch.arange(BLOCK_TOKENS, device=probs_NW.device)
    inside_NK = probs_NW.gather(1, tokens_NK.clamp(max=num_tokens - 1)).masked_fill_(tokens_NK >= num_tokens, 0)
    cumulative_NK = inside_NK.cumsum(-1, dtype=torch.float64)
    threshold_N1 = threshold_N1 - pad(cumulative_NB, (1, 0)).gather(1, block_N1)
    # The block's sum was rounded to float32: stay below its last token with a probability above 0.
    below_N1 = torch.nextafter(cumulative_NK[:, -1:], torch.zeros_like(threshold_N1))
    place_N1 = torch.searchsorted(cumulative_NK, torch.minimum(threshold_N1, below_N1), right=True)
    return block_N1 * BLOCK_TOKENS + place_N1


class UniformNumbers:
    """The uniform number of each (seed, position of the response): entry `position` of Philox with the seed as key."""

    def __init__(self, num_rows: int) -> None:
        self._streams: list[numpy.random.Generator | None] = [None] * num_rows
        self._drawn_NT = numpy.empty((num_rows, DRAWN_TOKENS))

    def start(self, rows: Sequence[int], seeds: Sequence[int]) -> None:
        """Begin responses in these rows."""
        for row, seed in zip(rows, seeds, strict=True):
            self._streams[row] = numpy.random.Generator(numpy.random.Philox(key=seed))

    def move(self, sources: Sequence[int], rows: Sequence[int]) -> None:
        """Continue the responses of `sources` in other rows."""
        for source, row in zip(sources, rows, strict=True):
            self._streams[row] = self._streams[source]
        self._drawn_NT[rows] = self._drawn_NT[sources]

    def at(self, positions_N: numpy.ndarray) -> numpy.ndarray:
        """The numbers of the first N rows; a response asks for each of its positions, in order."""
        places_N = positions_N % DRAWN_TOKENS
        for row in numpy.flatnonzero(places_N == 0):
            self._drawn_NT[row] = self._streams[row].random(DRAWN_TOKENS)
        return self._drawn_NT[numpy.arange(len(places_N)), places_N]
