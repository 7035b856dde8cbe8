"""The entropy bonus with a target: its coefficient rises while the policy's entropy is too low, and falls otherwise.

    alpha_k = c_k if e_k <= target, else 0         the coefficient that step k applies
    c_{k+1} = c_k + delta if e_k <= target, else c_k - delta, clipped to [0, max]

e_k is the mean entropy per token of the rollouts of step k (nats), c_1 is `loss.entropy_coef`. (Skywork-OR1, arXiv
2505.22312. TRL's `use_adaptive_entropy` has the same rule with e_{k-1} in the first line.)
"""

from npo_cli.config.recipe import LossSettings


def adapt_entropy_coef(settings: LossSettings, coefficient: float, entropy: float) -> tuple[float, float]:
    """alpha_k and c_{k+1} from c_k and e_k."""
    assert settings.entropy_target is not None, "the entropy has no target"
    is_low = entropy <= settings.entropy_target
    delta = settings.entropy_coef_delta if is_low else -settings.entropy_coef_delta
    return coefficient if is_low else 0.0, min(max(coefficient + delta, 0.0), settings.entropy_coef_max)
