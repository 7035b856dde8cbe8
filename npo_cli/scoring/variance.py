"""What it costs to learn from another policy's samples (V): seven estimates from the same samples.

Learner a, guide b, samples y ~ b, w = a(y)/b(y), rho = the same ratio of one token. All sums are float64, all
weights stay logarithms until the last step. Dropped from the textbook: the Rao-Blackwellised KL, which needs the
whole vocabulary of both policies. Axes: N samples, P prompts, B rows of prompt counts (see quality.py).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from npo_cli.scoring.quality import Floats

VarianceKind = Literal["kl_exp", "tok2", "tok2_grad", "seq2", "seq2_lognormal", "ess", "group2"]
Average = Literal["sequence", "token"]

LARGEST_LOG = 700.0
"""exp() stays finite below this; a larger log V is cut to it."""
LINEAR = ("samples", "tokens", "kl", "kl_per_token", "rho2", "rho2_per_token", "rho2_grad", "rho_grad")
LOGS = ("log_w", "log_w2", "log_w2_capped")


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleRatio:
    """One guide sample, seen by the learner and by the guide."""

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
class VarianceKnobs:
    """What the kinds of V can be told."""

    kappa: float
    """Scale of the exponent of kl_exp."""
    cap: float
    """Truncation C of a sequence weight; inf truncates nothing."""
    average: Average
    """`sequence` weighs responses alike (1/T_i losses), `token` weighs tokens alike."""
    group_size: int
    """Slots of a group, n; one of them is the guide's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Moments:
    """Sums over samples, one row a prompt or one a resample; V is a function of nothing else."""

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
    """KL measured where there is none (the learner against itself): the noise of the instrument, in nats."""

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
    """log of the sum of exponentials, shifted by the largest; -inf for an empty sum."""
    largest = logs.max(axis=axis, keepdims=True, initial=-np.inf)
    shift = np.where(np.isfinite(largest), largest, 0.0)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(logs - shift).sum(axis=axis)) + np.squeeze(shift, axis=axis)


def compute_moments(samples: Sequence[SampleRatio], prompt_ids: Sequence[str], *, cap: float) -> Moments:
    """Sums per prompt, in the order of `prompt_ids`; samples of other prompts are left out."""
    place = {prompt_id: p for p, prompt_id in enumerate(prompt_ids)}
    kept = [sample for sample in samples if sample.prompt_id in place]
    prompt_N = np.array([place[sample.prompt_id] for sample in kept], dtype=np.intp)
    tokens_N = np.array([sample.num_tokens for sample in kept], dtype=np.float64)
    assert (tokens_N >= 1).all(), "a response has at least one token"
    log_w_N = np.array([sample.log_w for sample in kept], dtype=np.float64)
    rho2_N = np.array([sample.sum_rho2 for sample in kept], dtype=np.float64)
    linear = {
        "samples": np.ones_like(tokens_N),
        "tokens": tokens_N,
        "kl": k1(log_w_N),
        "kl_per_token": k1(log_w_N) / tokens_N,
        "rho2": rho2_N,
        "rho2_per_token": rho2_N / tokens_N,
        "rho2_grad": np.array([sample.sum_rho2_grad for sample in kept], dtype=np.float64),
        "rho_grad": np.array([sample.sum_rho_grad for sample in kept], dtype=np.float64),
    }
    logs = {"log_w": log_w_N, "log_w2": 2 * log_w_N, "log_w2_capped": 2 * np.minimum(log_w_N, np.log(cap))}
    num_prompts = len(prompt_ids)
    sums = {name: np.bincount(prompt_N, weights=of_N, minlength=num_prompts) for name, of_N in linear.items()}
    log_sums = {name: np.full(num_prompts, -np.inf) for name in logs}
    for name, of_N in logs.items():
        np.logaddexp.at(log_sums[name], prompt_N, of_N)
    return Moments(**sums, **log_sums)


def pool_moments(moments: Moments, counts_BP: Floats) -> Moments:
    """The sums of each resample: prompt p counted counts_BP[b, p] times, logarithms added as logarithms."""
    with np.errstate(divide="ignore"):
        log_counts_BP = np.log(counts_BP)
    linear = {name: counts_BP @ getattr(moments, name) for name in LINEAR}
    logs = {name: log_sum_exp(log_counts_BP + getattr(moments, name), axis=1) for name in LOGS}
    return Moments(**linear, **logs)


def kl_means(moments: Moments, average: Average) -> tuple[Floats, Floats]:
    """KL(b||a) per token (by either average) and per sequence, in nats; nan without samples."""
    with np.errstate(invalid="ignore", divide="ignore"):
        by_sequence = moments.kl_per_token / moments.samples
        by_token = moments.kl / moments.tokens
        return (by_sequence if average == "sequence" else by_token), moments.kl / moments.samples


def estimate_kl_floor(moments: Moments, average: Average) -> KLFloor:
    """KL_0 from samples of the learner seen twice by the learner; 0 where there are none."""
    per_token, per_sequence = kl_means(moments, average)
    return KLFloor(per_token=np.nan_to_num(per_token), per_sequence=np.nan_to_num(per_sequence))


def net_kl(moments: Moments, floor: KLFloor, average: Average) -> tuple[Floats, Floats]:
    """KL_net = max(0, KL - KL_0), per token and per sequence."""
    per_token, per_sequence = kl_means(moments, average)
    return np.maximum(0.0, per_token - floor.per_token), np.maximum(0.0, per_sequence - floor.per_sequence)


def _kl_exp(moments: Moments, floor: KLFloor, knobs: VarianceKnobs) -> Floats:
    """V = exp(kappa KL per token): the paper's form, its scale unknown."""
    return knobs.kappa * net_kl(moments, floor, knobs.average)[0]


def _tok2(moments: Moments, floor: KLFloor, knobs: VarianceKnobs) -> Floats:
    """V = mean over tokens of min(rho, C)^2: what token-level importance sampling really multiplies by."""
    if knobs.average == "sequence":
        return np.log(moments.rho2_per_token / moments.samples)
    return np.log(moments.rho2 / moments.tokens)


def _tok2_grad(moments: Moments, floor: KLFloor, knobs: VarianceKnobs) -> Floats:
    """V = sum rho^2 G / sum rho G: tok2 weighted by each token's gradient. 1 where no token has any gradient."""
    return np.where(moments.rho_grad > 0, np.log(moments.rho2_grad / moments.rho_grad), 0.0 * moments.samples)


def _seq2(moments: Moments, floor: KLFloor, knobs: VarianceKnobs) -> Floats:
    """V = mean of min(w, C)^2, the Renyi-2 moment, truncated (Ionides 2008): below 1 once all weights are small."""
    return moments.log_w2_capped - np.log(moments.samples)


def _seq2_lognormal(moments: Moments, floor: KLFloor, knobs: VarianceKnobs) -> Floats:
    """V = exp(2 KL per sequence): that moment if log w were normal; low variance, not truncated."""
    return 2.0 * net_kl(moments, floor, knobs.average)[1]


def _ess(moments: Moments, floor: KLFloor, knobs: VarianceKnobs) -> Floats:
    """V = N sum w^2/(sum w)^2 = 1 + CV^2 = 1/ESS fraction; at most N, however far the policies are (Kong 1992)."""
    return np.log(moments.samples) + moments.log_w2 - 2.0 * moments.log_w


def _group2(moments: Moments, floor: KLFloor, knobs: VarianceKnobs) -> Floats:
    """V = (n - 1 + min(exp(2 KL per sequence), C^2))/n: one guide's slot among n of the learner's own."""
    log_slot = np.minimum(_seq2_lognormal(moments, floor, knobs), 2.0 * np.log(knobs.cap))
    return np.log((knobs.group_size - 1 + np.exp(log_slot)) / knobs.group_size)


VARIANCE_ESTIMATORS: Mapping[VarianceKind, Callable[[Moments, KLFloor, VarianceKnobs], Floats]] = {
    "kl_exp": _kl_exp,
    "tok2": _tok2,
    "tok2_grad": _tok2_grad,
    "seq2": _seq2,
    "seq2_lognormal": _seq2_lognormal,
    "ess": _ess,
    "group2": _group2,
}
HEAVY_TAILED: frozenset[VarianceKind] = frozenset({"seq2", "ess"})
"""Kinds that average sequence weights themselves, so that one sample can decide them."""


def log_variances(moments: Moments, *, kind: VarianceKind, floor: KLFloor, knobs: VarianceKnobs) -> Floats:
    """log V of every row, cut to +-700. nan in a row without samples."""
    with np.errstate(invalid="ignore", divide="ignore"):
        log_V = VARIANCE_ESTIMATORS[kind](moments, floor, knobs)
    return np.where(moments.samples > 0, np.clip(log_V, -LARGEST_LOG, LARGEST_LOG), np.nan)


def estimate_variance(
    samples: Sequence[SampleRatio], kind: VarianceKind, *, knobs: VarianceKnobs, floor: KLFloor = NO_KL_FLOOR
) -> float:
    """V of one set of samples; 1 when the guide is the learner, nan without samples."""
    prompt_ids = sorted({sample.prompt_id for sample in samples})
    moments = pool_moments(compute_moments(samples, prompt_ids, cap=knobs.cap), np.ones((1, len(prompt_ids))))
    return float(np.exp(log_variances(moments, kind=kind, floor=floor, knobs=knobs)[0]))
