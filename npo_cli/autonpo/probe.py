"""PROBE: sample failed prompts again from the current policy, and estimate Q, V and S of every rollback distance.

Rollouts are written chunk by chunk, so a killed probe continues where it stopped. Only the sampling is random, with
seeds from (run seed, branch, step, prompt, slot).
"""

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

from npo_cli.autonpo.preflight import usable_distances
from npo_cli.autonpo.rollback_choice import (
    DriftSamples,
    Stratum,
    allocate_probe_prompts,
    choose_rollback,
    stratify_failed_prompts,
)
from npo_cli.guides.source import compute_logprobs, make_spec
from npo_cli.policy.optimizer import read_trainer_state
from npo_cli.scoring.quality import PromptPassCount
from npo_cli.scoring.variance import SampleRatio, SignalFormula
from npo_cli.seeds import derive_seed
from npo_cli.session.logprob_pass import compute_learner_ratios
from npo_cli.session.session import Session, count_generated_tokens, load_checkpoint, sample_groups
from npo_cli.storage.checkpoints import Checkpoint, list_ancestry_checkpoints
from npo_cli.storage.costs import append_cost
from npo_cli.storage.lineage import find_owning_branch
from npo_cli.storage.rollout_log import RolloutLog
from npo_cli.storage.sample_store import SampleStore, open_sample_store
from npo_cli.training.checkpointing import TRAINING_STATE_FOLDER
from npo_cli.types.autonpo import ProbeResult
from npo_cli.types.rollouts import Group, Progress

CHUNK_PROMPTS = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """One probe."""

    session: Session
    branch: str
    checkpoint: Checkpoint
    """The current policy, which would be the guide."""
    store: SampleStore
    strata: tuple[Stratum, ...]
    seed: int


def start_probe(session: Session, branch: str, current: Checkpoint) -> Probe:
    """The probe of this checkpoint, with the failed prompts saved in it, by age."""
    recipe = session.recipe
    settings = {
        "num_prompts": recipe.autonpo.probe.num_prompts,
        "samples_per_prompt": recipe.autonpo.probe.samples_per_prompt,
        "max_accuracy": recipe.autonpo.pool.max_accuracy,
        "distances": list(usable_distances(recipe)),
        "temperature": recipe.guide.cache.temperature or recipe.sampling.temperature,
        "max_new_tokens": recipe.sampling.max_new_tokens,
    }
    return Probe(
        session=session,
        branch=branch,
        checkpoint=current,
        store=open_sample_store(session.run.probes_folder, branch, current.step, settings=settings),
        strata=stratify_failed_prompts(
            read_trainer_state(current.path / TRAINING_STATE_FOLDER).failed_prompts,
            step=current.step,
            distances=usable_distances(recipe),
            max_accuracy=recipe.autonpo.pool.max_accuracy,
        ),
        seed=derive_seed(recipe.train.seed, "probe", branch, current.step),
    )


def run_probe(probe: Probe) -> Generator[Progress, None, ProbeResult]:
    """Sample, estimate the drift of every stored checkpoint in both directions, choose a distance."""
    session, recipe = probe.session, probe.session.recipe
    count = recipe.autonpo.probe.num_prompts
    load_checkpoint(session.policy, probe.checkpoint)
    groups = yield from sample_probe_groups(
        probe, allocate_probe_prompts(probe.strata, num_prompts=count, seed=probe.seed)
    )
    drift_samples = yield from score_past_checkpoints(probe, groups)
    return choose_rollback(
        probe.strata,
        count_passes(groups),
        drift_samples,
        formula=SignalFormula.of(recipe),
        settings=recipe.autonpo,
        seed=derive_seed(probe.seed, "bootstrap"),
        num_tokens=count_generated_tokens(groups),
    )


def sample_probe_groups(probe: Probe, chosen: Sequence[Sequence[str]]) -> Generator[Progress, None, list[Group]]:
    """Rollouts for the chosen prompts of all strata; a recorded chunk is read back."""
    session, recipe, step = probe.session, probe.session.recipe, probe.checkpoint.step
    prompts = [session.task.prompt(prompt_id) for stratum in chosen for prompt_id in stratum]
    rollouts = {prompt_id: samples.rollouts for prompt_id, samples in probe.store.read_prompts().items()}
    left = [prompt for prompt in prompts if prompt.prompt_id not in rollouts]
    for start in range(0, len(left), CHUNK_PROMPTS):
        yield Progress(description="probe failed prompts", done=len(prompts) - len(left) + start, total=len(prompts))
        began = time.perf_counter()
        sampled = sample_groups(
            session,
            left[start : start + CHUNK_PROMPTS],
            seed_label=("probe", probe.branch, step),
            slots=range(recipe.autonpo.probe.samples_per_prompt),
            sampler_step=step,
            temperature=recipe.guide.cache.temperature,
        )
        charge_probe(probe, piece=left[start].prompt_id, tokens=count_generated_tokens(sampled), began=began)
        probe.store.append(make_spec("checkpoint", {"step": step}).text, [group.samples for group in sampled])
        rollouts |= {group.prompt.prompt_id: group.rollouts for group in sampled}
    yield Progress(description="probe failed prompts", done=len(prompts), total=len(prompts))
    return [Group(prompt=prompt, rollouts=rollouts[prompt.prompt_id]) for prompt in prompts]


def charge_probe(probe: Probe, *, piece: str, tokens: int, began: float) -> None:
    """Charge the work since `began` to the probed policy."""
    append_cost(
        probe.session.run,
        "probe",
        branch=probe.branch,
        step=probe.checkpoint.step,
        artifact=probe.store.folder,
        piece=piece,
        tokens=tokens,
        seconds=time.perf_counter() - began,
    )


def count_passes(groups: Sequence[Group]) -> list[PromptPassCount]:
    """Correct samples of each prompt."""
    return [
        PromptPassCount(
            prompt_id=group.prompt.prompt_id,
            num_samples=len(group.rollouts),
            num_correct=sum(rollout.verdict == "correct" and rollout.finished for rollout in group.rollouts),
        )
        for group in groups
    ]


def score_past_checkpoints(probe: Probe, groups: Sequence[Group]) -> Generator[Progress, None, list[DriftSamples]]:
    """Importance ratios in both directions for every usable distance; the current policy's weights are loaded."""
    session, temperature = probe.session, probe.session.recipe.guide.cache.temperature
    pairs = [(group.prompt, rollout) for group in groups for rollout in group.rollouts]
    began = time.perf_counter()
    logps = compute_logprobs(session, pairs, temperature=temperature)
    step = probe.checkpoint.step
    samples = [
        (prompt, replace(rollout, behavior_logps=each)) for (prompt, rollout), each in zip(pairs, logps, strict=True)
    ]
    past = find_rollback_candidates(probe)
    backward = {checkpoint.step: score_recorded_rollouts(probe, checkpoint.step) for checkpoint in past}
    drift_samples = []
    for done, checkpoint in enumerate(past):
        yield Progress(description="score past checkpoints", done=done, total=len(past), note=f"step {checkpoint.step}")
        load_checkpoint(session.policy, checkpoint)
        distance = step - checkpoint.step
        failed = find_failed_prompt_ids(probe, distance)
        inside = [pair for pair in samples if pair[0].prompt_id in failed]
        forward = compute_learner_ratios(
            session.policy, session.recipe, inside, cap=SignalFormula.of(session.recipe).token_cap
        )
        drift_samples.append(DriftSamples(distance=distance, forward=forward, backward=backward[checkpoint.step]))
    yield Progress(description="score past checkpoints", done=len(past), total=len(past))
    charge_probe(probe, piece="logprobs", tokens=0, began=began)
    return drift_samples[::-1]


def find_rollback_candidates(probe: Probe) -> list[Checkpoint]:
    """Full checkpoints at the usable distances in the branch's ancestry, oldest first."""
    steps = {probe.checkpoint.step - distance for distance in usable_distances(probe.session.recipe)}
    checkpoints = list_ancestry_checkpoints(probe.session.run, probe.branch)
    return [checkpoint for checkpoint in checkpoints if checkpoint.step in steps and checkpoint.tier == "full"]


def find_failed_prompt_ids(probe: Probe, distance: int) -> frozenset[str]:
    """Prompts that failed within the last `distance` steps."""
    return frozenset(
        prompt_id for stratum in probe.strata if stratum.max_age <= distance for prompt_id in stratum.prompt_ids
    )


def score_recorded_rollouts(probe: Probe, step: int) -> list[SampleRatio]:
    """The recorded rollouts of the policy of `step` for failed prompts, scored by the current policy (section 10.7).

    They are the rollouts of the next training step, on whichever branch of the ancestry executed it.
    """
    session = probe.session
    owner = find_owning_branch(session.run, probe.branch, step + 1)
    groups = RolloutLog(session.run.rollouts_path(owner)).read_step(step + 1) or ()
    failed = {prompt_id for stratum in probe.strata for prompt_id in stratum.prompt_ids}
    rows = [
        (group.prompt, rollout)
        for group in groups
        if group.prompt.prompt_id in failed
        for rollout in group.on_policy.rollouts
    ]
    return compute_learner_ratios(session.policy, session.recipe, rows, cap=SignalFormula.of(session.recipe).token_cap)
