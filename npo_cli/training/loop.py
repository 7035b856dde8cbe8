"""The training loop: GRPO, or NPO while a guide is in use; nothing else differs.

Each step: choose prompts, sample, verify, inject guide rollouts into hard groups, update, log, save a checkpoint when
one is due. Time is reported and never decides anything.
"""

import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.optim import Optimizer

from npo_cli.config.recipe import LossSettings
from npo_cli.errors import StoppedEarly, quote_path
from npo_cli.guides.dense_target import ActiveTarget, StepTarget
from npo_cli.guides.online import OnlineExtrapolation
from npo_cli.guides.privileged import PrivilegedText
from npo_cli.losses.entropy_control import adapt_entropy_coef
from npo_cli.policy.model import Policy
from npo_cli.policy.optimizer import TrainerState, lr_at
from npo_cli.rollout.batch import (
    ActiveGuide,
    OnlineGuide,
    StepBatch,
    build_batch,
    build_sft_batch,
    collect_failed_prompts,
    plan_next_batch,
    select_cached_guides,
    update_failed_prompt_pool,
)
from npo_cli.rollout.mixing import count_injections
from npo_cli.rollout.prefix import prefix_metrics
from npo_cli.rollout.queue import RolloutQueue
from npo_cli.rollout.replay_buffer import buffer_metrics, build_replay_batch, update_buffer
from npo_cli.rollout.revisits import Revisits
from npo_cli.session.session import Session, count_generated_tokens
from npo_cli.session.startup import charge_startup, measure_startup
from npo_cli.session.stop_signal import StopFlag
from npo_cli.storage.metrics import StepLog, append_event
from npo_cli.storage.rollout_log import RolloutLog
from npo_cli.training.checkpointing import CheckpointSaver
from npo_cli.training.evaluate import evaluate_policy
from npo_cli.training.update import TrainingSample, Updater, UpdateReport, build_training_samples
from npo_cli.types.autonpo import FailedPrompt
from npo_cli.types.guides import ReplayBuffer
from npo_cli.types.rollouts import Group, Notice, Rollout, StepReport, TrainingRecord

EMA_DECAY = 0.9


@dataclass(frozen=True, kw_only=True, slots=True)
class Trainer:
    """An open run with what training needs."""

    session: Session
    optimizer: Optimizer
    steps: StepLog
    rollouts: RolloutLog
    branch: str
    seed_name: str
    """Branch whose name enters every sampling seed: its own, or with autonpo.rollback.seed=same its parent's."""
    fork_step: int
    """Step of the weights that the branch starts from."""
    active_guide: ActiveGuide | None
    reference: Policy | None
    """Frozen base model; None if the loss has no KL term."""
    target: ActiveTarget | None = None
    """Dense target of the branch; None without a teacher."""
    revisits: Revisits | None = None
    """Draws prompts that are not from the data order; None: the data order alone."""
    online_guide: OnlineExtrapolation | None = None
    """Guide that is sampled while batches are built; None: a guide cache or none."""


PauseCheck = Callable[[StepReport], bool]
"""Called after each step; True stops training once the step is saved."""


def never_pause(report: StepReport) -> bool:
    """Training without pauses."""
    return False


def grpo_steps(
    trainer: Trainer,
    state: TrainerState,
    stop: StopFlag,
    *,
    should_pause: PauseCheck = never_pause,
    until: int | None = None,
) -> Iterator[TrainingRecord]:
    """Train from `state` to `train.num_steps` or `until`, or to a pause (`should_pause`) or stop signal."""
    session, branch, settings = trainer.session, trainer.branch, trainer.session.recipe.train
    updater = Updater(session.policy, trainer.optimizer, session.recipe, reference=trainer.reference)
    last = settings.num_steps if until is None else until
    saver = CheckpointSaver(
        session, trainer.optimizer, branch=branch, reads_checkpoints=trainer.online_guide is not None
    )
    # Sampled ahead beyond the last step too: train.num_steps may be raised later.
    with closing(saver), open_queue(trainer, state, last_step=last + settings.staleness) as queue:
        if queue is not None:
            charge_startup(session.run, branch=branch, step=state.step)
        while state.step < last:
            state, report, warning = run_step(trainer, updater, state, queue)
            yield from saver.finish()
            yield report
            if warning:
                yield Notice(message=warning, level="warning")
            # Evaluate before saving: after a kill the evaluation is done or the step is repeated, never left out.
            every = session.recipe.eval.every
            if every and (state.step % every == 0 or state.step == settings.num_steps):
                yield evaluate_policy(session, branch=branch, step=state.step)
            # A signal that arrives from here on stops the next step.
            stopping, pausing = bool(stop), should_pause(report)
            is_end = state.step == last or stopping or pausing
            if state.step % settings.save_every == 0 or is_end:
                start_save(saver, queue, state)
                stopping = stopping or bool(stop)
                if is_end or stopping or not saver.in_background:
                    yield from saver.finish()
                    stopping = stopping or bool(stop)
            if stopping:
                append_event(session.run, "stopped", {"branch": branch, "step": state.step, "signal": stop.reason})
                raise StoppedEarly(
                    f"stopped by {stop.reason} after step {state.step}, which is saved",
                    f"npo resume {quote_path(session.run.root)}",
                )
            if pausing:
                return


def start_save(saver: CheckpointSaver, queue: RolloutQueue | None, state: TrainerState) -> None:
    """Begin to save a step, after the rollouts that were sampled ahead of it."""
    if queue is not None:
        queue.record_ahead(state.step)
    saver.start(state)


@contextmanager
def open_queue(trainer: Trainer, state: TrainerState, *, last_step: int) -> Iterator[RolloutQueue | None]:
    """The queue of batches after `state`; None with train.staleness=0."""
    session = trainer.session
    if session.producer is None:
        yield None
        return
    session.producer.start(session.policy)
    with measure_startup("start", "the producer"):
        session.producer.wait_until_ready()
    queue = RolloutQueue(
        session,
        trainer.rollouts,
        branch=trainer.branch,
        seed_name=trainer.seed_name,
        fork_step=trainer.fork_step,
        step=state.step,
        last_step=last_step,
        position=state.position,
        active_guide=trainer.active_guide,
        choose_group_size=partial(choose_group_size, trainer.target),
        revisits=trainer.revisits,
    )
    with closing(queue):
        queue.fill(state.step)
        yield queue


def run_step(
    trainer: Trainer, updater: Updater, state: TrainerState, queue: RolloutQueue | None
) -> tuple[TrainerState, StepReport, str]:
    """Sample, update, log. The last value is a warning if a repeated step differs from the recorded one, or empty."""
    session, step = trainer.session, state.step + 1
    session.distributed.context = f"step {step}"
    started = time.perf_counter()
    online_guide = select_online_guide(trainer, state)
    target = select_target(trainer, step)
    if queue is None:
        batch, replay_buffer = build_step_batch(trainer, state, online_guide)
        sampled = time.perf_counter()
        sampling_seconds = sampled - started
    else:
        (batch, sampling_seconds), replay_buffer = queue.take(step), None
        sampled = time.perf_counter()
    session.engine.release_memory()
    lr = lr_at(step, session.recipe.train)
    entropy_coefs = adapt_entropy_bonus(session.recipe.loss, state, batch)
    try:
        samples, update = learn_batch(trainer, updater, batch, target, step=step, lr=lr, entropy_coefs=entropy_coefs)
        updated = time.perf_counter()
    finally:
        # A step's rollouts are on record before its metrics.
        trainer.rollouts.wait()
    written = time.perf_counter()
    if queue is not None:
        queue.fill(step)
    ended = time.perf_counter()

    metrics = compute_step_metrics(session, batch, update, step=step, lr=lr)
    metrics |= batch.order_metrics
    metrics |= target_metrics(target, samples, update) | entropy_coefs
    if replay_buffer is not None:
        metrics |= buffer_metrics(replay_buffer)
    if online_guide is not None:
        metrics |= online_guide.metrics(batch)
    running = update_running_metrics(state.running_metrics, metrics)
    metrics |= {name: value for name, value in running.items() if name != "ema_weight"}
    timings = {
        "seconds": ended - started,
        "seconds/rollouts": sampled - started,
        "seconds/update": updated - sampled,
        "seconds/write": written - updated,
        "peak_memory_mb": peak_memory_mb(),
    }
    if queue is not None:
        timings |= {"seconds/sampling": sampling_seconds, "seconds/weight_sync": ended - written}
    if session.policy.device.type == "cuda":
        timings["peak_gpu_memory_mb"] = torch.cuda.max_memory_allocated(session.policy.device) / 1e6
    if batch.on_policy and not batch.is_recorded:
        timings["tokens_per_second"] = batch.num_generated_tokens / sampling_seconds
    report = StepReport(branch=trainer.branch, step=step, metrics=metrics, timings=timings)
    warning = ""
    if trainer.steps.write(report) == "differs":
        warning = f"step {step} of {trainer.branch} was recorded before with other metrics; the first record is kept"
        append_event(session.run, "differs", {"branch": trainer.branch, "step": step})
    failed_prompts = update_failed_prompt_pool(
        state.failed_prompts, find_failed_prompts(session, batch, state), size=session.recipe.autonpo.pool.max_size
    )
    after = replace(
        state,
        step=step,
        position=batch.position,
        running_metrics=running,
        failed_prompts=failed_prompts,
        replay_buffer=replay_buffer,
    )
    return after, report, warning


def learn_batch(
    trainer: Trainer,
    updater: Updater,
    batch: StepBatch,
    target: StepTarget | None,
    *,
    step: int,
    lr: float,
    entropy_coefs: Mapping[str, float],
) -> tuple[list[TrainingSample], UpdateReport]:
    """The samples of the batch, and the updates made with them."""
    session, inject = trainer.session, trainer.session.recipe.guide.inject
    if entropy_coefs:
        updater = updater.with_entropy_coef(entropy_coefs["entropy_bonus"])
    samples = build_training_samples(session.policy, batch.selected, inject, target=target)
    measures_guide = step % inject.measure_every == 0 and session.recipe.train.objective == "rl"
    return samples, updater.take_step(samples, lr=lr, target=target, measures_guide=measures_guide)


def adapt_entropy_bonus(settings: LossSettings, state: TrainerState, batch: StepBatch) -> dict[str, float]:
    """As metrics the coefficient of the entropy bonus that the step applies (`entropy_bonus`), and that of the next
    step (`entropy_coef`); empty without loss.entropy_target."""
    if settings.entropy_target is None or not batch.on_policy:
        return {}
    coefficient = state.running_metrics.get("entropy_coef", settings.entropy_coef)
    applied, following = adapt_entropy_coef(settings, coefficient, mean_token_entropy(batch.on_policy))
    return {"entropy_bonus": applied, "entropy_coef": following}


def select_target(trainer: Trainer, step: int) -> StepTarget | None:
    """The dense target of a step, with what its teacher is shown; None without one."""
    if trainer.target is None:
        return None
    recipe, privileged = trainer.session.recipe, None
    if recipe.target.privileged is not None:
        responses = select_cached_guides(trainer.active_guide, step) or {}
        privileged = PrivilegedText(recipe=recipe, policy=trainer.session.policy, responses=responses)
    return trainer.target.at_step(step, privileged=privileged)


def choose_group_size(target: ActiveTarget | None, step: int) -> int | None:
    """Rollouts per prompt of a step in the window of a dense target; None: train.group_size."""
    active = None if target is None else target.at_step(step)
    return None if active is None else active.settings.group_size


def select_online_guide(trainer: Trainer, state: TrainerState) -> OnlineGuide | None:
    """The online guide of the next step; None while a guide cache is active, which has the slots to itself."""
    cache_is_active = trainer.active_guide is not None and state.step < trainer.active_guide.until_step
    return None if trainer.online_guide is None or cache_is_active else trainer.online_guide.at_step(state.step)


def build_step_batch(
    trainer: Trainer, state: TrainerState, online_guide: OnlineGuide | None
) -> tuple[StepBatch, ReplayBuffer | None]:
    """The step's batch and the replay buffer after it; with ExGRPO a part of the prompts is replayed. A dense target
    may have a group size of its own. With train.objective=sft nothing is sampled."""
    session, replay_buffer, batch_plan = trainer.session, state.replay_buffer, None
    if session.recipe.train.objective == "sft":
        assert trainer.active_guide is not None, "supervised fine-tuning needs a guide"
        return build_sft_batch(session, trainer.active_guide, position=state.position), replay_buffer
    place = {"seed_name": trainer.seed_name, "step": state.step + 1, "position": state.position}
    if replay_buffer is not None and replay_buffer.is_collecting:
        batch_plan = build_replay_batch(session, replay_buffer, **place)
    group_size = choose_group_size(trainer.target, state.step + 1)
    if group_size is not None:
        guides = select_cached_guides(trainer.active_guide, state.step + 1)
        batch_plan = plan_next_batch(session, **place, guides=guides, group_size=group_size, revisits=trainer.revisits)
    batch = build_batch(
        session,
        trainer.rollouts,
        **place,
        active_guide=trainer.active_guide,
        batch_plan=batch_plan,
        online_guide=online_guide,
        revisits=trainer.revisits,
    )
    if replay_buffer is not None:
        replay_buffer = update_buffer(session, batch, replay_buffer, sampler_step=state.step, position=state.position)
    return batch, replay_buffer


def find_failed_prompts(session: Session, batch: StepBatch, before: TrainerState) -> tuple[FailedPrompt, ...]:
    """Prompts of the groups that are eligible for injection; the probe filters by autonpo.pool.max_accuracy."""
    epochs = [session.order.epoch(before.position + index) for index in range(len(batch.on_policy))]
    return collect_failed_prompts(
        batch.on_policy, step=before.step + 1, epochs=epochs, limit=session.recipe.guide.inject.max_accuracy
    )


# Metrics of a step; all but the memory are a function of the seed


def compute_step_metrics(
    session: Session, batch: StepBatch, update: UpdateReport, *, step: int, lr: float
) -> dict[str, float]:
    """The metrics of one step, named as in TRL; `inject/...` only while a guide is in use."""
    common = {
        "loss": update.loss,
        "grad_norm": update.grad_norm,
        "lr": lr,
        "rows_trained": update.num_rows,
        "data_position": batch.position,
        **update.stats.metrics(),
        **({"skipped_updates": update.num_skipped} if update.num_skipped else {}),
    }
    if not batch.on_policy:
        return {"tokens": 0} | common
    accuracies = [group.accuracy for group in batch.on_policy]
    rollouts = [rollout for group in batch.on_policy for rollout in group.rollouts]
    tokens = count_generated_tokens(batch.on_policy)
    metrics = {
        "reward": statistics.fmean(map(_mean_reward, batch.on_policy)),
        "accuracy": statistics.fmean(accuracies),
        **_reward_part_means(rollouts),
        "reward_std": statistics.fmean(map(_reward_std, batch.on_policy)),
        "frac_all_wrong": statistics.fmean(accuracy == 0 for accuracy in accuracies),
        "frac_all_right": statistics.fmean(accuracy == 1 for accuracy in accuracies),
        "frac_reward_zero_std": _zero_std_fraction(batch.mixed),
        "entropy": mean_token_entropy(batch.on_policy),
        "completions/mean_length": tokens / len(rollouts),
        "completions/clipped_ratio": statistics.fmean(not rollout.finished for rollout in rollouts),
        "verify/unparseable": statistics.fmean(rollout.verdict == "unparseable" for rollout in rollouts),
        "verify/timeout": statistics.fmean(rollout.verdict == "timeout" for rollout in rollouts),
        "tokens": batch.num_generated_tokens,
        **common,
    }
    if any(group.injection_status != "off" for group in batch.mixed):
        metrics |= count_injections(batch.mixed) | prefix_metrics(batch.mixed)
    if update.grad_norm_fraction is not None:
        metrics["inject/grad_norm_fraction"] = update.grad_norm_fraction
    if session.recipe.sampling.dynamic:
        metrics |= {"dynamic/batches": batch.num_gen_batches, "dynamic/groups": len(batch.selected)}
    if session.recipe.train.staleness:
        metrics["staleness"] = statistics.fmean(step - 1 - rollout.sampler_step for rollout in rollouts)
    return metrics


def target_metrics(
    target: StepTarget | None, samples: Sequence[TrainingSample], update: UpdateReport
) -> dict[str, float]:
    """Coefficient, rollouts with a target and tokens that the teacher scored; the rest is measured with the loss. Empty
    without a target."""
    if target is None:
        return {}
    return {
        "target/coefficient": target.coefficient,
        "target/rollouts": float(sum(sample.has_target for sample in samples)),
        "target/tokens": update.stats.target_tokens,
    }


def mean_token_entropy(groups: Sequence[Group]) -> float:
    """Mean over the tokens of the entropy of the distributions that they were sampled from (nats)."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    return sum((one.mean_entropy or 0.0) * one.num_tokens for one in rollouts) / count_generated_tokens(groups)


def _mean_reward(group: Group) -> float:
    return statistics.fmean(rollout.reward for rollout in group.rollouts)


def _reward_part_means(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Mean of each part of the reward over the rollouts that have it."""
    names = sorted({name for rollout in rollouts for name in rollout.reward_parts})
    return {
        f"reward/{name}": statistics.fmean(one.reward_parts[name] for one in rollouts if name in one.reward_parts)
        for name in names
    }


def _reward_std(group: Group) -> float:
    """Standard deviation of a group's rewards, ddof 1; 0 for a single rollout."""
    rewards = [rollout.reward for rollout in group.rollouts]
    return statistics.stdev(rewards) if len(rewards) > 1 else 0.0


def _zero_std_fraction(groups: Sequence[Group]) -> float:
    """Fraction of groups, injected responses included, whose rewards are all equal."""
    return statistics.fmean(len({rollout.reward for rollout in group.rollouts}) == 1 for group in groups)


def update_running_metrics(running: Mapping[str, float], metrics: Mapping[str, float]) -> dict[str, float]:
    """Running metrics: tokens along the branch's ancestry, and bias-corrected exponential moving averages, which a step
    without rollouts leaves as they are.

    ema_t = (decay * raw_{t-1} + (1 - decay) * x_t) / (1 - decay^t), stored as the corrected value and its weight.
    """
    weight = running.get("ema_weight", 0.0)
    new_weight = EMA_DECAY * weight + (1 - EMA_DECAY)
    updated = {"tokens_total": running.get("tokens_total", 0) + metrics["tokens"], "ema_weight": new_weight}
    if "reward" not in metrics:
        return {**running, "tokens_total": updated["tokens_total"]}
    if "entropy_coef" in metrics:
        updated["entropy_coef"] = metrics["entropy_coef"]
    for name in ("reward", "entropy"):
        before = running.get(f"{name}_ema", 0.0)
        updated[f"{name}_ema"] = (EMA_DECAY * weight * before + (1 - EMA_DECAY) * metrics[name]) / new_weight
    return updated


def peak_memory_mb() -> float:
    """Peak resident memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
