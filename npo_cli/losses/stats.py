"""Measurements that add up: sums, maxima and a histogram of micro-batches, from which the figures of a step are made.

It does not know what a loss is. A mean or a percentile does not add up, so none is kept: the figures come last.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Self

MERGE_MIN = {"merge": min}
MERGE_MAX = {"merge": max}

HISTOGRAM_EDGES = (*(10.0 ** (k / 20 - 7) for k in range(167)), 20.0)
"""Upper ends of the histogram's bins, in nats: 1e-7 (what float32 rounds off a log-probability), then 20 bins a decade,
each 12 % further, up to 20 (where log-ratios end). Behind the last lies a bin for what is not a number."""


def _bin_by_bin(mine: Sequence[float], theirs: Sequence[float]) -> tuple[float, ...]:
    return tuple(a + b for a, b in zip(mine, theirs, strict=True))


MERGE_BINS = {"merge": _bin_by_bin}


class Additive:
    """A record whose fields are summed, unless a field names another way to merge. Its defaults are the zero."""

    __slots__ = ()

    def __add__(self, other: Self) -> Self:
        merged = {}
        for each in fields(self):
            mine, theirs = getattr(self, each.name), getattr(other, each.name)
            merged[each.name] = each.metadata["merge"](mine, theirs) if each.metadata else mine + theirs
        return type(self)(**merged)


@dataclass(frozen=True, kw_only=True, slots=True)
class MismatchStats(Additive):
    """What engine and trainer say of the same own tokens: w = pi_old / mu of a token, raw, whatever the mode.

    Only rows that are trained are seen: without a KL or entropy term, a row of A = 0 is never forwarded.
    """

    tokens: float = 0.0
    weight_sum: float = 0.0
    weight_square_sum: float = 0.0
    weight_max: float = field(default=-math.inf, metadata=MERGE_MAX)
    k1_sum: float = 0.0
    """Sum of -log w, in nats."""
    k3_sum: float = 0.0
    """Sum of w - 1 - log w, in nats."""
    clipped_tokens: float = 0.0
    """Tokens whose weight the mode cut or zeroed."""
    sequences: float = 0.0
    unmasked_sequences: float = 0.0
    """Those with at least one token whose weight is not 0."""
    histogram: tuple[float, ...] = field(default=(0.0,) * (len(HISTOGRAM_EDGES) + 1), metadata=MERGE_BINS)
    """Tokens by |log w|, each in the first bin whose upper end (EDGES) it does not pass."""

    @classmethod
    def from_numbers(cls, numbers: Sequence[float]) -> Self:
        """The fields in their order, the histogram's bins one by one."""
        names = [each.name for each in fields(cls)]
        scalars = dict(zip(names[:-1], numbers, strict=False))
        return cls(**scalars, histogram=tuple(numbers[len(scalars) :]))

    def metrics(self) -> dict[str, float]:
        """Figures of the raw w under their public names; without tokens, none.

        k1 and k3 estimate KL(mu || pi_old) in nats a token. ess = (mean w)^2 / mean w^2, chi2 = mean w^2 - 1.
        """
        if not self.tokens:
            return {}
        mean, mean_square = self.weight_sum / self.tokens, self.weight_square_sum / self.tokens
        return {
            "mismatch/weight_mean": mean,
            "mismatch/weight_max": self.weight_max,
            "mismatch/clipped_share": self.clipped_tokens / self.tokens,
            "mismatch/ess": mean**2 / mean_square,
            "mismatch/k1": self.k1_sum / self.tokens,
            "mismatch/k3": self.k3_sum / self.tokens,
            "mismatch/chi2": mean_square - 1,
            "mismatch/abs_log_w_p99": self._percentile(99),
            "mismatch/kept_share": self.unmasked_sequences / self.sequences,
        }

    def _percentile(self, percent: int) -> float:
        """The upper end of the bin that holds it: at most 12 % too high, never too low; below 1e-7 it is 0."""
        seen = 0.0
        for count, upper in zip(self.histogram, (0.0, *HISTOGRAM_EDGES[1:]), strict=False):
            seen += count
            if 100 * seen >= percent * self.tokens:
                return upper
        return math.nan
