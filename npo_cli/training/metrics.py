"""What a step reports. Everything here but memory is a function of the seed."""

import resource
import statistics
from collections.abc import Mapping, Sequence

from npo_cli.rollout.batch import StepBatch, flatten_rollouts
from npo_cli.rollout.mixing import count_injections
from npo_cli.session.session import Session, count_generated_tokens
from npo_cli.training.update_types import UpdateReport
from npo_cli.types.rollouts import Group

EMA_DECAY = 0.9


def compute_step_metrics(session: Session, batch: StepBatch, update: UpdateReport, *, lr: float) -> dict[str, float]:
    """The metrics line of one step, names as users of TRL know them; `inject/...` only where a guide is at work."""
    accuracies = [statistics.fmean(rollout.reward for rollout in group.rollouts) for group in batch.on_policy]
    rollouts = flatten_rollouts(batch.on_policy)
    tokens = count_generated_tokens(batch.on_policy)
    metrics = {
        "reward": statistics.fmean(accuracies),
        "reward_std": statistics.fmean(map(_deviation, batch.on_policy)),
        "frac_all_wrong": statistics.fmean(accuracy == 0 for accuracy in accuracies),
        "frac_all_right": statistics.fmean(accuracy == 1 for accuracy in accuracies),
        "frac_reward_zero_std": _share_without_spread(batch.mixed),
        "entropy": sum((r.mean_entropy or 0.0) * len(r.response_ids) for r in rollouts) / tokens,
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
    if update.grad_share is not None:
        metrics["inject/grad_share"] = update.grad_share
    if session.recipe.sampling.dynamic:
        metrics |= {"dynamic/draws": batch.num_gen_batches, "dynamic/kept": len(batch.selected)}
    if update.num_skipped:
        metrics["skipped_updates"] = update.num_skipped
    return metrics


def _deviation(group: Group) -> float:
    """Standard deviation of a group's rewards, ddof 1; 0 for a single rollout."""
    rewards = [rollout.reward for rollout in group.rollouts]
    return statistics.stdev(rewards) if len(rewards) > 1 else 0.0


def _share_without_spread(groups: Sequence[Group]) -> float:
    """Share of groups, guides seated, in which all rewards are equal."""
    return statistics.fmean(len({rollout.reward for rollout in group.rollouts}) == 1 for group in groups)


def update_running_metrics(trackers: Mapping[str, float], metrics: Mapping[str, float]) -> dict[str, float]:
    """Running figures: tokens since the start of the branch's history, and bias-corrected averages.

    ema_t = (decay * raw_{t-1} + (1 - decay) * x_t) / (1 - decay^t), kept as the corrected value and its weight.
    """
    weight = trackers.get("ema_weight", 0.0)
    grown = EMA_DECAY * weight + (1 - EMA_DECAY)
    updated = {"tokens_total": trackers.get("tokens_total", 0) + metrics["tokens"], "ema_weight": grown}
    for name in ("reward", "entropy"):
        before = trackers.get(f"{name}_ema", 0.0)
        updated[f"{name}_ema"] = (EMA_DECAY * weight * before + (1 - EMA_DECAY) * metrics[name]) / grown
    return updated


def peak_memory_mb() -> float:
    """Largest resident size of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
