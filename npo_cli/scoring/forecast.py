"""The forecast of a replay: training steps that a guide saves, per step that it costs (`docs/explanation/q-v-s.md`).

A model, not a measurement: one more correct response is worth what the run's own correct responses were worth on the
recorded steps between learner and candidate. `npo calibrate` measures.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from npo_cli.scoring.quality import Interval, PromptPassCount


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplaySegment:
    """The steps that a guide would be used in, and what the run recorded of the same steps without it."""

    num_steps: int
    """Steps with the guide, N."""
    lost_steps: int
    """Steps thrown away by rolling back: the candidate's distance ahead of the learner, else 0."""
    num_prompts: int
    """Distinct prompts of these steps."""
    samples_all: bool
    """Whether the guide is also sampled on prompts of groups that are not eligible."""
    eligible_share: float
    """Share of the recorded groups with an on-policy accuracy <= guide.inject.max_accuracy."""
    eligible_per_step: float
    """Their number per step, g."""
    correct_per_step: float
    """Own correct rollouts in these groups per step, c; at least one in the whole record."""
    tokens_per_step: float
    """Response tokens sampled per training step."""
    slots: int
    """guide.inject.slots."""
    most_draws: int
    """guide.cache.samples_per_prompt."""
    draws_per_round: int
    """guide.cache.samples_per_round; samples_per_prompt where all samples are always drawn."""
    scoring_tokens: int
    """Tokens sampled for this scoring, of the learner and of all candidates."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """Steps saved, their price in steps, and the quotient with an interval."""

    steps_saved: float
    price: float
    value: float
    value_low: float
    value_high: float


def expected_draws(count: PromptPassCount, *, most: int, per_round: int) -> float:
    """Expected samples of a prompt until a round has a correct one: sum over rounds j of b_j (1 - p)^(b j), p = c/m.

    8 by 2 at p = 1/2: 2 (1 + 1/4 + 1/16 + 1/64) = 2.65625.
    """
    wrong = 1.0 - count.num_correct / max(1, count.num_samples)
    starts = range(0, most, per_round)
    return math.fsum(min(per_round, most - start) * wrong**start for start in starts)


def expect_guide_tokens(
    counts: Sequence[PromptPassCount], segment: ReplaySegment, *, tokens_per_sample: float
) -> float:
    """Tokens of the guide cache: eligible prompts need as many draws as the scored ones, the others, if sampled, one
    round."""
    per_round = min(segment.draws_per_round, segment.most_draws)
    draws = [expected_draws(count, most=segment.most_draws, per_round=per_round) for count in counts]
    eligible = segment.num_prompts * segment.eligible_share
    num_draws = eligible * sum(draws) / len(draws) + (segment.num_prompts - eligible) * per_round * segment.samples_all
    return num_draws * tokens_per_sample


def forecast_replay(net: float, net_interval: Interval, segment: ReplaySegment, *, guide_tokens: float) -> Forecast:
    """steps_saved = N k g Q_net / c; price = D + (guide + scoring tokens) / tokens per step; value = saved / price.

    k slots in each of g eligible groups per step hold Q_net more correct responses than the learner's own second try
    would; the run took one step for every c correct rollouts in such groups.
    """
    per_net = segment.num_steps * segment.slots * segment.eligible_per_step / segment.correct_per_step
    price = segment.lost_steps + (guide_tokens + segment.scoring_tokens) / segment.tokens_per_step
    saved, low, high = (per_net * max(0.0, each) for each in (net, *net_interval))
    return Forecast(steps_saved=saved, price=price, value=saved / price, value_low=low / price, value_high=high / price)
