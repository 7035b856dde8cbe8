"""Metrics of a training step. All but the memory are a function of the seed."""

import resource
import statistics
from collections.abc import Mapping, Sequence

from npo_cli.rollout.batch import StepBatch
from npo_cli.rollout.mixing import count_injections
from npo_cli.session.session import Session, count_generated_tokens
from npo_cli.training.update import UpdateReport
from npo_cli.types.rollouts import Group

EMA_DECAY = 0.9


def compute_step_metrics(session: Session, batch: StepBatch, update: UpdateReport, *, lr: float) -> dict[str, float]:
    """The metrics of one step, named as in TRL; `inject/...` only while a guide is in use."""
    accuracies = [group.accuracy for group in batch.on_policy]
    rollouts = [rollout for group in batch.on_policy for rollout in group.rollouts]
    tokens = count_generated_tokens(batch.on_policy)
    metrics = {
        "reward": statistics.fmean(accuracies),
        "reward_std": statistics.fmean(map(_reward_std, batch.on_policy)),
        "frac_all_wrong": statistics.fmean(accuracy == 0 for accuracy in accuracies),
        "frac_all_right": statistics.fmean(accuracy == 1 for accuracy in accuracies),
        "frac_reward_zero_std": _zero_std_fraction(batch.mixed),
        "entropy": sum((r.mean_entropy or 0.0) * r.num_tokens for r in rollouts) / tokens,
        "completions/mean_length": tokens / len(rollouts),
        "completions/clipped_ratio": statistics.fmean(not rollout.finished for rollout in rollouts),
        "verify/unparseable": statistics.fmean(rollout.verdict == "unparseable" for rollout in rollouts),
        "verify/timeout": statistics.fmean(rollout.verdict == "timeout" for rollout in rollouts),
        "loss": update.loss,
        "grad_norm": update.grad_norm,
        "lr": lr,
        "tokens": tokens,
        "rows_trained": update.num_rows,
        "data_position": batch.position,
        **update.stats.metrics(),
    }
    if any(group.injection_status != "off" for group in batch.mixed):
        metrics |= count_injections(batch.mixed)
    if update.grad_norm_fraction is not None:
        metrics["inject/grad_norm_fraction"] = update.grad_norm_fraction
    if session.recipe.sampling.dynamic:
        metrics |= {"dynamic/batches": batch.num_gen_batches, "dynamic/groups": len(batch.selected)}
    if update.num_skipped:
        metrics["skipped_updates"] = update.num_skipped
    return metrics


def _reward_std(group: Group) -> float:
    """Standard deviation of a group's rewards, ddof 1; 0 for a single rollout."""
    rewards = [rollout.reward for rollout in group.rollouts]
    return statistics.stdev(rewards) if len(rewards) > 1 else 0.0


def _zero_std_fraction(groups: Sequence[Group]) -> float:
    """Fraction of groups, injected responses included, whose rewards are all equal."""
    return statistics.fmean(len({rollout.reward for rollout in group.rollouts}) == 1 for group in groups)


def update_running_metrics(running: Mapping[str, float], metrics: Mapping[str, float]) -> dict[str, float]:
    """Running metrics: tokens along the branch's ancestry, and bias-corrected exponential moving averages.

    ema_t = (decay * raw_{t-1} + (1 - decay) * x_t) / (1 - decay^t), stored as the corrected value and its weight.
    """
    weight = running.get("ema_weight", 0.0)
    new_weight = EMA_DECAY * weight + (1 - EMA_DECAY)
    updated = {"tokens_total": running.get("tokens_total", 0) + metrics["tokens"], "ema_weight": new_weight}
    for name in ("reward", "entropy"):
        before = running.get(f"{name}_ema", 0.0)
        updated[f"{name}_ema"] = (EMA_DECAY * weight * before + (1 - EMA_DECAY) * metrics[name]) / new_weight
    return updated


def peak_memory_mb() -> float:
    """Peak resident memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
