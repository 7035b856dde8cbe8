"""Same weights, other arithmetic: what the trainer makes of an engine that samples from a slightly different policy.

N rows (responses), T tokens; an axis of length 1 broadcasts. mu is the engine's policy, pi_old the trainer's at the
start of the update, w = pi_old / mu of a token. A mode turns w into a factor on the clipped token loss. A foreign row
has the factor 1 in every mode: its distance is another policy's, and `ratios` has the rule for it. See MISMATCH.md.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from npo_cli.losses.importance_ratio import LOG_RATIO_LIMIT, collect_policy_logps, k3, log_ratio
from npo_cli.losses.stats import HISTOGRAM_EDGES
from npo_cli.losses.types import LossInputs, MismatchKnobs, MismatchMode


@dataclass(frozen=True, kw_only=True, slots=True)
class MismatchCorrection:
    """The factor of each token, and what it came from. Nothing in it carries a gradient."""

    weight_NT: Tensor
    """Factor on the token's policy loss, after clipping; 1 on foreign rows and outside the mask."""
    clipped_NT: Tensor
    """True where the mode cut or zeroed it; never on foreign rows."""
    log_weight_NT: Tensor
    """Raw log w in nats, clamped to +-20; 0 on foreign rows and outside the mask."""
    on_policy_NT: Tensor
    """True on the response tokens of own rows."""


MismatchRule = Callable[[Tensor, Tensor, MismatchKnobs], tuple[Tensor, Tensor]]
"""Log w, the mask and the numbers in; factor and where it was cut out. A row without tokens has log w = 0."""


def make_correction(knobs: MismatchKnobs) -> Callable[[Tensor, LossInputs], MismatchCorrection]:
    """The correcting function of one mode, given the current log-probabilities and the rows."""
    rule = MISMATCH_RULES[knobs.mode]

    @torch.no_grad()
    def correct(logps_NT: Tensor, rows: LossInputs) -> MismatchCorrection:
        columns = collect_policy_logps(logps_NT, rows)
        own_NT = rows.mask_NT.bool() & ~rows.off_policy_N.bool()[:, None]
        log_weight_NT = torch.where(own_NT, log_ratio(columns.old_NT, columns.behavior_NT), 0.0)
        weight_NT, cut_NT = rule(log_weight_NT, own_NT, knobs)
        return MismatchCorrection(
            weight_NT=torch.where(own_NT, weight_NT, 1.0),
            clipped_NT=own_NT & cut_NT,
            log_weight_NT=log_weight_NT,
            on_policy_NT=own_NT,
        )

    return correct


def token_tis(log_weight_NT: Tensor, _mask_NT: Tensor, knobs: MismatchKnobs) -> tuple[Tensor, Tensor]:
    """min(w_t, C): truncated importance sampling, token by token. No token loses its gradient."""
    return _capped(log_weight_NT.exp(), knobs.cap)


def sequence_tis(log_weight_NT: Tensor, _mask_NT: Tensor, knobs: MismatchKnobs) -> tuple[Tensor, Tensor]:
    """min(prod_t w_t, C) on every token of the response. The product dies with length: see MISMATCH.md."""
    return _capped(_sequence_weight_N1(log_weight_NT), knobs.cap)


def token_mis(log_weight_NT: Tensor, _mask_NT: Tensor, knobs: MismatchKnobs) -> tuple[Tensor, Tensor]:
    """w_t where low <= w_t <= high, else 0: masked importance sampling (IcePop)."""
    return _masked(log_weight_NT.exp(), knobs)


def sequence_mis(log_weight_NT: Tensor, _mask_NT: Tensor, knobs: MismatchKnobs) -> tuple[Tensor, Tensor]:
    """prod_t w_t where it lies in [low, high], else the whole response is dropped."""
    return _masked(_sequence_weight_N1(log_weight_NT), knobs)


def geometric(log_weight_NT: Tensor, mask_NT: Tensor, knobs: MismatchKnobs) -> tuple[Tensor, Tensor]:
    """1 where geo_low <= exp(mean_t log w_t) <= geo_high, else the response is dropped. Drift of one sign is seen."""
    weight_N1 = _mean_N1(log_weight_NT, mask_NT).exp()
    return _filtered((weight_N1 >= knobs.geo_low) & (weight_N1 <= knobs.geo_high), like=log_weight_NT)


def k3_filter(log_weight_NT: Tensor, mask_NT: Tensor, knobs: MismatchKnobs) -> tuple[Tensor, Tensor]:
    """1 where mean_t(w - 1 - log w) <= k3_max, else the response is dropped. Noise of either sign is seen."""
    return _filtered(_mean_N1(k3(log_weight_NT), mask_NT) <= knobs.k3_max, like=log_weight_NT)


def no_correction(log_weight_NT: Tensor, _mask_NT: Tensor, _knobs: MismatchKnobs) -> tuple[Tensor, Tensor]:
    """1: the mismatch is measured only."""
    return torch.ones_like(log_weight_NT), torch.zeros_like(log_weight_NT, dtype=torch.bool)


MISMATCH_RULES: dict[MismatchMode, MismatchRule] = {
    "token_tis": token_tis,
    "sequence_tis": sequence_tis,
    "token_mis": token_mis,
    "sequence_mis": sequence_mis,
    "geometric": geometric,
    "k3": k3_filter,
    "off": no_correction,
}


@torch.no_grad()
def measure_mismatch(found: MismatchCorrection) -> Tensor:
    """The numbers of `MismatchStats` in their order, in one tensor, so that they cross from the device together."""
    own_NT = found.on_policy_NT
    log_weight_NT = found.log_weight_NT.double()
    weight_NT = torch.where(own_NT, log_weight_NT.exp(), 0.0)
    scalars = [
        own_NT.sum(),
        weight_NT.sum(),
        weight_NT.square().sum(),
        torch.where(own_NT, weight_NT, -torch.inf).amax(),
        (-log_weight_NT).sum(),
        k3(log_weight_NT).sum(),
        found.clipped_NT.sum(),
        own_NT.any(dim=1).sum(),
        (own_NT & (found.weight_NT != 0)).any(dim=1).sum(),
    ]
    edges = torch.tensor(HISTOGRAM_EDGES, dtype=torch.float64, device=own_NT.device)
    bins = torch.bucketize(log_weight_NT.abs()[own_NT], edges)
    histogram = torch.bincount(bins, minlength=len(HISTOGRAM_EDGES) + 1)
    return torch.cat([torch.stack([each.double() for each in scalars]), histogram.double()])


def _capped(weight_NT: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    return weight_NT.clamp(max=cap), weight_NT > cap


def _masked(weight_NT: Tensor, knobs: MismatchKnobs) -> tuple[Tensor, Tensor]:
    kept_NT = (weight_NT >= knobs.low) & (weight_NT <= knobs.high)
    return torch.where(kept_NT, weight_NT, 0.0), ~kept_NT


def _filtered(kept_N1: Tensor, *, like: Tensor) -> tuple[Tensor, Tensor]:
    return kept_N1.to(like.dtype), ~kept_N1


def _sequence_weight_N1(log_weight_NT: Tensor) -> Tensor:
    return log_weight_NT.sum(dim=1, keepdim=True).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def _mean_N1(values_NT: Tensor, mask_NT: Tensor) -> Tensor:
    return values_NT.sum(dim=1, keepdim=True) / mask_NT.sum(dim=1, keepdim=True).clamp(min=1)
