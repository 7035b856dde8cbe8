"""V: the variance that a guide's samples bring into the learner's gradient; seven estimators over the same sums.

Learner a, guide b, samples y ~ b, sequence weight w = a(y)/b(y), token ratio rho. All sums are float64; weights stay
logarithms until the last step. Not offered: the Rao-Blackwellised KL, which needs the full vocabulary distribution of
both policies. Axes: N samples, P prompts, B bootstrap resamples (row 0 = the data as they are).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from npo_cli.config.guides import InjectSettings, ScoringSettings
from npo_cli.config.recipe import Recipe
from npo_cli.scoring.quality import Floats

VarianceKind = Literal["kl_exp", "tok2", "tok2_grad", "seq2", "seq2_lognormal", "ess", "group2"]

LARGEST_LOG = 700.0
"""exp() stays finite below this; log V is clipped to it."""
LINEAR = ("samples", "tokens", "kl", "kl_per_token", "rho2", "rho2_per_token", "rho2_grad", "rho_grad")
LOGS = ("log_w", "log_w2", "log_w2_capped")


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleRatio:
    """Importance ratios of one sample, learner to guide."""

    prompt_id: str
    num_tokens: int
    log_w: float
    """sum over tokens of log a - log b (nats)."""
    sum_rho2: float
    """sum over tokens of min(rho, C)^2."""
    sum_rho2_grad: float
    """sum over tokens of rho^2 G, G = 1 - 2 p(y_t) + sum_v p(v)^2 of the learner."""
    sum_rho_grad: float
    """sum over tokens of rho G."""
    is_correct: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class SignalFormula:
    """What turns samples into S: the scoring settings, and how an injected response is trained."""

    settings: ScoringSettings
    group_size: int
    """Own rollouts per group, n."""
    inject: InjectSettings
    clip_high: float
    """loss.clip_high."""

    @classmethod
    def of(cls, recipe: Recipe) -> "SignalFormula":
        """The formula of a recipe."""
        return cls(
            settings=recipe.scoring,
            group_size=recipe.train.group_size,
            inject=recipe.guide.inject,
            clip_high=recipe.loss.clip_high,
        )

    @property
    def is_weighted(self) -> bool:
        """Whether an injected response has an importance weight to the guide (ratio `exact`, `decoupled`).

        With `proximal`, `none` and `unit` it has none: V is then a distance between policies, not a variance.
        """
        return self.inject.ratio in ("exact", "decoupled")

    @property
    def token_cap(self) -> float:
        """Largest weight of an injected token: 1 + clip_high where the clip acts (ratio `exact`), the cap of
        `decoupled`, else `scoring.weight_cap`."""
        if self.inject.ratio == "exact" and self.inject.clip_off_policy and self.inject.ratio_shaping == "none":
            return min(self.settings.weight_cap, 1.0 + self.clip_high)
        if self.inject.ratio == "decoupled":
            return min(self.settings.weight_cap, self.inject.decoupled_cap)
        return self.settings.weight_cap

    def with_variance(self, kind: VarianceKind, **changes: Any) -> "SignalFormula":
        """The same formula with another estimator of V, and perhaps other settings of it."""
        return replace(self, settings=self.settings.model_copy(update={"variance": kind, **changes}))


@dataclass(frozen=True, kw_only=True, slots=True)
class Moments:
    """Sums over samples, one row per prompt or per resample; V is a function of these alone."""

    samples: Floats
    tokens: Floats
    kl: Floats
    """Sum of -log w."""
    kl_per_token: Floats
    """Sum of -log w / T."""
    rho2: Floats
    rho2_per_token: Floats
    rho2_grad: Floats
    rho_grad: Floats
    log_w: Floats
    """log of the sum of w."""
    log_w2: Floats
    """log of the sum of w^2."""
    log_w2_capped: Floats
    """log of the sum of min(w, C)^2."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KLFloor:
    """KL of the learner to itself, in nats: the numerical noise of the measurement, subtracted from every KL."""

    per_token: float | Floats
    per_sequence: float | Floats


NO_KL_FLOOR = KLFloor(per_token=0.0, per_sequence=0.0)


def k1(log_w: float | Floats) -> float | Floats:
    """KL(b||a) of one sample, k1 = -log w: unbiased, signed (Schulman 2020)."""
    return -log_w


def k2(log_w: float | Floats) -> float | Floats:
    """KL(b||a) of one sample, k2 = (log w)^2/2: biased, never negative (Schulman 2020)."""
    return 0.5 * log_w * log_w


def k3(log_w: float | Floats) -> float | Floats:
    """KL(b||a) of one sample, k3 = w - 1 - log w: unbiased, never negative (Schulman 2020)."""
    return np.expm1(log_w) - log_w


def log_sum_exp(logs: Floats, axis: int) -> Floats:
    """log of the sum of exponentials along an axis; -inf for an empty sum."""
    from scipy.special import logsumexp

    with np.errstate(divide="ignore"):
        return np.asarray(logsumexp(logs, axis=axis))


def compute_moments(samples: Sequence[SampleRatio], prompt_ids: Sequence[str], *, cap: float) -> Moments:
    """Sums per prompt, in the order of `prompt_ids`; samples of other prompts are left out."""
    row_of = {prompt_id: p for p, prompt_id in enumerate(prompt_ids)}
    samples = [sample for sample in samples if sample.prompt_id in row_of]
    prompt_N = np.array([row_of[sample.prompt_id] for sample in samples], dtype=np.intp)
    tokens_N = np.array([sample.num_tokens for sample in samples], dtype=np.float64)
    assert (tokens_N >= 1).all(), "a response has at least one token"
    log_w_N = np.array([sample.log_w for sample in samples], dtype=np.float64)
    rho2_N = np.array([sample.sum_rho2 for sample in samples], dtype=np.float64)
    linear = {
        "samples": np.ones_like(tokens_N),
        "tokens": tokens_N,
        "kl": k1(log_w_N),
        "kl_per_token": k1(log_w_N) / tokens_N,
        "rho2": rho2_N,
        "rho2_per_token": rho2_N / tokens_N,
        "rho2_grad": np.array([sample.sum_rho2_grad for sample in samples], dtype=np.float64),
        "rho_grad": np.array([sample.sum_rho_grad for sample in samples], dtype=np.float64),
    }
    logs = {"log_w": log_w_N, "log_w2": 2 * log_w_N, "log_w2_capped": 2 * np.minimum(log_w_N, np.log(cap))}
    num_prompts = len(prompt_ids)
    sums = {name: np.bincount(prompt_N, weights=of_N, minlength=num_prompts) for name, of_N in linear.items()}
    log_sums = {name: np.full(num_prompts, -np.inf) for name in logs}
    for name, of_N in logs.items():
        np.logaddexp.at(log_sums[name], prompt_N, of_N)
    return Moments(**sums, **log_sums)


def pool_moments(moments: Moments, counts_BP: Floats) -> Moments:
    """The sums of each resample, in which prompt p has the weight counts_BP[b, p]; logarithms by logsumexp."""
    with np.errstate(divide="ignore"):
        log_counts_BP = np.log(counts_BP)
    linear = {name: counts_BP @ getattr(moments, name) for name in LINEAR}
    logs = {name: log_sum_exp(log_counts_BP + getattr(moments, name), axis=1) for name in LOGS}
    return Moments(**linear, **logs)


def kl_means(moments: Moments, average: str) -> tuple[Floats, Floats]:
    """KL(b||a) per token (average over `sequence`s or over all `token`s) and per sequence, nats; nan if no samples."""
    with np.errstate(invalid="ignore", divide="ignore"):
        by_sequence = moments.kl_per_token / moments.samples
        by_token = moments.kl / moments.tokens
        return (by_sequence if average == "sequence" else by_token), moments.kl / moments.samples


def estimate_kl_floor(moments: Moments, average: str) -> KLFloor:
    """KL_0 of the learner to itself, from its own samples; 0 where there are none."""
    per_token, per_sequence = kl_means(moments, average)
    return KLFloor(per_token=np.nan_to_num(per_token), per_sequence=np.nan_to_num(per_sequence))


def net_kl(moments: Moments, floor: KLFloor, average: str) -> tuple[Floats, Floats]:
    """KL_net = max(0, KL - KL_0), per token and per sequence."""
    per_token, per_sequence = kl_means(moments, average)
    return np.maximum(0.0, per_token - floor.per_token), np.maximum(0.0, per_sequence - floor.per_sequence)


def _kl_exp(moments: Moments, floor: KLFloor, formula: SignalFormula) -> Floats:
    """V = exp(kappa KL per token): the paper's form; it does not give the scale kappa."""
    return formula.settings.kl_scale * net_kl(moments, floor, formula.settings.kl_average)[0]


def _tok2(moments: Moments, floor: KLFloor, formula: SignalFormula) -> Floats:
    """V = mean over tokens of min(rho, C)^2, the factor of token-level importance sampling."""
    if formula.settings.kl_average == "sequence":
        return np.log(moments.rho2_per_token / moments.samples)
    return np.log(moments.rho2 / moments.tokens)


def _tok2_grad(moments: Moments, floor: KLFloor, formula: SignalFormula) -> Floats:
    """V = sum rho^2 G / sum rho G: tok2 weighted by each token's gradient. 1 if no token has a gradient."""
    return np.where(moments.rho_grad > 0, np.log(moments.rho2_grad / moments.rho_grad), 0.0 * moments.samples)


def _seq2(moments: Moments, floor: KLFloor, formula: SignalFormula) -> Floats:
    """V = mean of min(w, C)^2, the Renyi-2 moment, truncated (Ionides 2008): below 1 once all weights are small."""
    return moments.log_w2_capped - np.log(moments.samples)


def _seq2_lognormal(moments: Moments, floor: KLFloor, formula: SignalFormula) -> Floats:
    """V = exp(2 KL per sequence): that moment if log w were normal; low variance, not truncated."""
    return 2.0 * net_kl(moments, floor, formula.settings.kl_average)[1]


def _ess(moments: Moments, floor: KLFloor, formula: SignalFormula) -> Floats:
    """V = N sum w^2/(sum w)^2 = 1 + CV^2 = 1/ESS fraction; at most N, however far the policies are (Kong 1992)."""
    return np.log(moments.samples) + moments.log_w2 - 2.0 * moments.log_w


def _group2(moments: Moments, floor: KLFloor, formula: SignalFormula) -> Floats:
    """V = (n - k + k min(exp(2 KL per sequence), C^2))/n: k guide slots of n (n + k with `append`), C = token_cap."""
    slots, num_rows = formula.inject.slots, formula.group_size
    num_rows += slots if formula.inject.mode == "append" else 0
    slots = min(slots, num_rows)
    log_slot = np.minimum(_seq2_lognormal(moments, floor, formula), 2.0 * np.log(formula.token_cap))
    return np.log((num_rows - slots + slots * np.exp(log_slot)) / num_rows)


VARIANCE_ESTIMATORS: Mapping[VarianceKind, Callable[[Moments, KLFloor, SignalFormula], Floats]] = {
    "kl_exp": _kl_exp,
    "tok2": _tok2,
    "tok2_grad": _tok2_grad,
    "seq2": _seq2,
    "seq2_lognormal": _seq2_lognormal,
    "ess": _ess,
    "group2": _group2,
}
HEAVY_TAILED: frozenset[VarianceKind] = frozenset({"seq2", "ess"})
"""Kinds that average sequence weights, which a single sample can dominate."""


def log_variances(moments: Moments, formula: SignalFormula, *, floor: KLFloor = NO_KL_FLOOR) -> Floats:
    """log V of every row by the formula's estimator, clipped to +-700; nan in a row without samples."""
    with np.errstate(invalid="ignore", divide="ignore"):
        log_V = VARIANCE_ESTIMATORS[formula.settings.variance](moments, floor, formula)
    return np.where(moments.samples > 0, np.clip(log_V, -LARGEST_LOG, LARGEST_LOG), np.nan)


def estimate_variance(samples: Sequence[SampleRatio], formula: SignalFormula, *, floor: KLFloor = NO_KL_FLOOR) -> float:
    """V of one set of samples; 1 when the guide is the learner, nan without samples."""
    prompt_ids = sorted({sample.prompt_id for sample in samples})
    moments = compute_moments(samples, prompt_ids, cap=formula.settings.weight_cap)
    log_V_B = log_variances(pool_moments(moments, np.ones((1, len(prompt_ids)))), formula, floor=floor)
    return float(np.exp(log_V_B[0]))
