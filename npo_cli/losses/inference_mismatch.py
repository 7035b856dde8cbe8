"""Inference/trainer mismatch: the same weights give slightly different log-probabilities in the inference engine.

N rows (responses), T tokens; an axis of length 1 broadcasts. mu is the engine's policy, pi_old the trainer's at the
start of the update, w = pi_old / mu per token. `mismatch.mode` turns w into a factor on the clipped token loss.
Off-policy tokens have the factor 1 in every mode: their distance to pi_old is `importance_ratio`'s subject.
See docs/explanation/inference-mismatch.md.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from npo_cli.config.engine import MismatchSettings
from npo_cli.losses.importance_ratio import LOG_RATIO_LIMIT, k3, log_ratio
from npo_cli.losses.types import HISTOGRAM_EDGES


@dataclass(frozen=True, kw_only=True, slots=True)
class MismatchCorrection:
    """The factor of each token and the weight it comes from. Nothing in it carries a gradient."""

    weight_NT: Tensor
    """Factor on the token's policy loss, after clipping; 1 where `on_policy_NT` is false."""
    clipped_NT: Tensor
    """True where the mode truncated or masked the weight; false where `on_policy_NT` is."""
    log_weight_NT: Tensor
    """Raw log w in nats, clamped to +-20; 0 where `on_policy_NT` is false."""
    on_policy_NT: Tensor
    """True on trained on-policy tokens."""


MismatchRule = Callable[[Tensor, Tensor, MismatchSettings], tuple[Tensor, Tensor]]
"""(log w, on-policy mask, settings) to (factor, where it was truncated or masked)."""


@torch.no_grad()
def correct_mismatch(
    old_logps_NT: Tensor, behavior_logps_NT: Tensor, on_policy_NT: Tensor, settings: MismatchSettings
) -> MismatchCorrection:
    """Factors of the mode in the settings."""
    log_weight_NT = torch.where(on_policy_NT, log_ratio(old_logps_NT, behavior_logps_NT), 0.0)
    weight_NT, clipped_NT = MISMATCH_RULES[settings.mode](log_weight_NT, on_policy_NT, settings)
    return MismatchCorrection(
        weight_NT=torch.where(on_policy_NT, weight_NT, 1.0),
        clipped_NT=on_policy_NT & clipped_NT,
        log_weight_NT=log_weight_NT,
        on_policy_NT=on_policy_NT,
    )


def token_tis(log_weight_NT: Tensor, _mask_NT: Tensor, settings: MismatchSettings) -> tuple[Tensor, Tensor]:
    """min(w_t, C): truncated importance sampling per token. No token loses its gradient."""
    return _truncate(log_weight_NT.exp(), settings)


def sequence_tis(log_weight_NT: Tensor, _mask_NT: Tensor, settings: MismatchSettings) -> tuple[Tensor, Tensor]:
    """min(prod_t w_t, C) on every token of the response. The product vanishes with length."""
    return _truncate(_sequence_weight_N1(log_weight_NT), settings)


def token_mis(log_weight_NT: Tensor, _mask_NT: Tensor, settings: MismatchSettings) -> tuple[Tensor, Tensor]:
    """w_t where low <= w_t <= high, else 0: masked importance sampling (IcePop)."""
    return _mask_outside(log_weight_NT.exp(), settings)


def sequence_mis(log_weight_NT: Tensor, _mask_NT: Tensor, settings: MismatchSettings) -> tuple[Tensor, Tensor]:
    """prod_t w_t where it lies in [low, high], else the whole response is dropped."""
    return _mask_outside(_sequence_weight_N1(log_weight_NT), settings)


def geometric(log_weight_NT: Tensor, mask_NT: Tensor, settings: MismatchSettings) -> tuple[Tensor, Tensor]:
    """1 where geo_low <= exp(mean_t log w_t) <= geo_high, else the response is dropped. Detects drift of one sign."""
    weight_N1 = _mean_N1(log_weight_NT, mask_NT).exp()
    return _filter((weight_N1 >= settings.geo_low) & (weight_N1 <= settings.geo_high), like=log_weight_NT)


def k3_filter(log_weight_NT: Tensor, mask_NT: Tensor, settings: MismatchSettings) -> tuple[Tensor, Tensor]:
    """1 where mean_t(w - 1 - log w) <= k3_max, else the response is dropped. Detects noise of either sign."""
    return _filter(_mean_N1(k3(log_weight_NT), mask_NT) <= settings.k3_max, like=log_weight_NT)


def no_correction(log_weight_NT: Tensor, _mask_NT: Tensor, _settings: MismatchSettings) -> tuple[Tensor, Tensor]:
    """1: the mismatch is only measured."""
    return torch.ones_like(log_weight_NT), torch.zeros_like(log_weight_NT, dtype=torch.bool)


MISMATCH_RULES: dict[str, MismatchRule] = {
    "token_tis": token_tis,
    "sequence_tis": sequence_tis,
    "token_mis": token_mis,
    "sequence_mis": sequence_mis,
    "geometric": geometric,
    "k3": k3_filter,
    "off": no_correction,
}
"""By the value of `mismatch.mode`."""


@torch.no_grad()
def measure_mismatch(correction: MismatchCorrection) -> Tensor:
    """The fields of `MismatchStats` in order, as one tensor, so that they leave the device in one transfer."""
    on_policy_NT = correction.on_policy_NT
    log_weight_NT = correction.log_weight_NT.double()
    weight_NT = torch.where(on_policy_NT, log_weight_NT.exp(), 0.0)
    scalars = [
        on_policy_NT.sum(),
        weight_NT.sum(),
        weight_NT.square().sum(),
        torch.where(on_policy_NT, weight_NT, -torch.inf).amax(),
        (-log_weight_NT).sum(),
        k3(log_weight_NT).sum(),
        correction.clipped_NT.sum(),
        on_policy_NT.any(dim=1).sum(),
        (on_policy_NT & (correction.weight_NT != 0)).any(dim=1).sum(),
    ]
    edges = torch.tensor(HISTOGRAM_EDGES, dtype=torch.float64, device=on_policy_NT.device)
    bins = torch.bucketize(log_weight_NT.abs()[on_policy_NT], edges)
    histogram = torch.bincount(bins, minlength=len(HISTOGRAM_EDGES) + 1)
    return torch.cat([torch.stack([each.double() for each in scalars]), histogram.double()])


def _truncate(weight_NT: Tensor, settings: MismatchSettings) -> tuple[Tensor, Tensor]:
    return weight_NT.clamp(max=settings.cap), weight_NT > settings.cap


def _mask_outside(weight_NT: Tensor, settings: MismatchSettings) -> tuple[Tensor, Tensor]:
    inside_NT = (weight_NT >= settings.low) & (weight_NT <= settings.high)
    return torch.where(inside_NT, weight_NT, 0.0), ~inside_NT


def _filter(passes_N1: Tensor, *, like: Tensor) -> tuple[Tensor, Tensor]:
    return passes_N1.to(like.dtype), ~passes_N1


def _sequence_weight_N1(log_weight_NT: Tensor) -> Tensor:
    return log_weight_NT.sum(dim=1, keepdim=True).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def _mean_N1(values_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """Per-response mean; 0 of a response without tokens."""
    return values_NT.sum(dim=1, keepdim=True) / mask_NT.sum(dim=1, keepdim=True).clamp(min=1)
