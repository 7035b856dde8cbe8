"""When a probe has seen enough: a group-sequential test with a bounded error, and a stop for futility.

The probe is sampled in up to four equal parts, with a look after each. At share t_k of its prompts a look may spend
alpha (t_k^2 - t_{k-1}^2) of the one-sided error alpha = 0.025: a power-family spending function (Kim and DeMets 1987),
used through the union bound. It therefore holds whatever the dependence between looks, at the price of some power.
Success: the lower bound of the estimate at that level is above the limit. Futility: the conditional power under the
current trend (Lan, Simon and Halperin 1982) is below 0.1, which an upper bound below the limit implies. Stopping for
futility can only lower the error.
"""

import itertools
import math
from dataclasses import dataclass
from statistics import NormalDist

ALPHA = 0.025
MAX_LOOKS = 4
MIN_PROMPTS_PER_LOOK = 32
MIN_POWER = 0.1
_NORMAL = NormalDist()


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """One interim analysis, or the last one."""

    num_prompts: int
    """Probed by then."""
    share: float
    """Of the whole probe; 1 at the last look."""
    level: float = ALPHA
    """One-sided error of its lower bound."""
    last_level: float = ALPHA
    """That of the last look."""

    @property
    def is_last(self) -> bool:
        return self.share >= 1


ONLY_LOOK = Look(num_prompts=0, share=1.0)
"""A probe of a fixed size."""


def plan_looks(num_prompts: int) -> list[Look]:
    """Up to four looks at equal distances, at least 32 prompts apart: 256 at 64, 128, 192, 256; one below 64."""
    num = max(1, min(MAX_LOOKS, num_prompts // MIN_PROMPTS_PER_LOOK))
    shares = [*(-(-num_prompts * k // num) / max(1, num_prompts) for k in range(num)), 1.0]
    levels = [ALPHA * (after**2 - before**2) for before, after in itertools.pairwise(shares)]
    return [
        Look(num_prompts=round(share * num_prompts), share=share, level=level, last_level=levels[-1])
        for share, level in zip(shares[1:], levels, strict=True)
    ]


def critical_value(level: float) -> float:
    """z with P(Z > z) = level."""
    return _NORMAL.inv_cdf(1.0 - level)


def conditional_power(estimate: float, error: float, *, limit: float, look: Look) -> float:
    """Probability that the last look's lower bound is above the limit, if the estimate stays what it is.

    With B = sqrt(t) (estimate - limit)/SE: Phi((B/t - z)/sqrt(1 - t)), z of the last look. Without an error, whether
    the estimate is above the limit.
    """
    if look.is_last or error <= 0:
        return float(estimate > limit)
    drift = (estimate - limit) / error / math.sqrt(look.share)
    return _NORMAL.cdf((drift - critical_value(look.last_level)) / math.sqrt(1.0 - look.share))
