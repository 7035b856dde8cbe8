"""PROBE: sample failed prompts again from the current policy, until one rollback distance is accepted or none can be.

A pool that no distance could pass is rejected before anything is sampled. Rollouts are written chunk by chunk, so a
killed probe continues where it stopped, and its looks decide as before. Only the sampling is random, with seeds from
(run seed, branch, step, prompt, slot).
"""

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

from npo_cli.autonpo.controller import has_window
from npo_cli.autonpo.preflight import usable_distances
from npo_cli.autonpo.rollback_choice import (
    DriftSamples,
    Stratum,
    allocate_probe_prompts,
    choose_rollback,
    count_failed_prompts,
    reject_small_pool,
    stratify_failed_prompts,
)
from npo_cli.autonpo.sequential_test import plan_looks
from npo_cli.config.recipe import Recipe
from npo_cli.guides.source import make_spec, read_or_compute_logprobs
from npo_cli.policy.optimizer import read_trainer_state
from npo_cli.scoring.forecast import ReplaySegment
from npo_cli.scoring.quality import PromptPassCount
from npo_cli.scoring.variance import SampleRatio, SignalFormula
from npo_cli.seeds import derive_seed
from npo_cli.session.learner import find_data_position
from npo_cli.session.logprob_pass import compute_learner_ratios
from npo_cli.session.recorded_steps import RecordedSteps
from npo_cli.session.session import Session, count_generated_tokens, load_checkpoint, sample_groups
from npo_cli.storage.checkpoints import Checkpoint, list_ancestry_checkpoints
from npo_cli.storage.costs import append_cost
from npo_cli.storage.lineage import find_owning_branch
from npo_cli.storage.rollout_log import RolloutLog
from npo_cli.storage.sample_store import SampleStore, open_sample_store
from npo_cli.training.checkpointing import TRAINING_STATE_FOLDER
from npo_cli.types.autonpo import AutoNPOState, FailedPrompt, ProbeResult
from npo_cli.types.rollouts import Group, Progress, Prompt

CHUNK_PROMPTS = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """One probe."""

    session: Session
    branch: str
    checkpoint: Checkpoint
    """The current policy, which would be the guide."""
    strata: tuple[Stratum, ...]
    """Failed prompts by age; of an early bootstrap those that its replay visits."""
    distances: tuple[int, ...]
    """Usable ones, whether or not they have a checkpoint."""
    num_steps: int | None
    """Steps of the replay; None: as many as the distance."""
    seed: int
    is_dense: bool = False
    """The replay would have a dense target, no guide (`dense` of the ladder)."""

    @property
    def store(self) -> SampleStore:
        """Created on first use."""
        recipe = self.session.recipe
        settings = {
            "num_prompts": recipe.autonpo.probe.num_prompts,
            "samples_per_prompt": recipe.autonpo.probe.samples_per_prompt,
            "max_accuracy": recipe.autonpo.pool.max_accuracy,
            "distances": list(self.distances),
            "temperature": recipe.guide.cache.temperature or recipe.sampling.temperature,
            "max_new_tokens": recipe.sampling.max_new_tokens,
        }
        return open_sample_store(self.session.run.probes_folder, self.branch, self.checkpoint.step, settings=settings)

    def distance_to(self, checkpoint: Checkpoint) -> int:
        """Steps back."""
        return self.checkpoint.step - checkpoint.step


def start_probe(session: Session, state: AutoNPOState, current: Checkpoint) -> Probe:
    """The probe of this checkpoint, with the failed prompts saved in it, by age; nothing is written.

    That of an early bootstrap has one distance, the scout's length, and one stratum: what the replay visits.
    """
    recipe = session.recipe
    if state.is_early:
        assert state.distance is not None, "an early bootstrap has its distance"
        visited = dict.fromkeys(prompt.prompt_id for prompt in select_failed_prompts(session, state, current))
        distances, num_steps = (state.distance,), recipe.autonpo.early.replay_steps
        strata = (Stratum(min_age=0, max_age=state.distance, prompt_ids=tuple(visited)),)
    else:
        distances, num_steps = usable_distances(recipe), None
        strata = stratify_failed_prompts(
            read_failed_prompts(current),
            step=current.step,
            distances=distances,
            max_accuracy=recipe.autonpo.pool.max_accuracy,
        )
    return Probe(
        session=session,
        branch=state.branch,
        checkpoint=current,
        strata=strata,
        distances=distances,
        num_steps=num_steps,
        seed=derive_seed(recipe.train.seed, "probe", state.branch, current.step),
        is_dense=has_window(state.rung),
    )


def read_failed_prompts(checkpoint: Checkpoint) -> tuple[FailedPrompt, ...]:
    """The pool saved with a checkpoint."""
    return read_trainer_state(checkpoint.path / TRAINING_STATE_FOLDER).failed_prompts


def select_failed_prompts(session: Session, state: AutoNPOState, current: Checkpoint) -> tuple[Prompt, ...]:
    """Prompts that failed in the last `distance` steps, in the order in which the replay visits them."""
    assert state.distance is not None, "a distance was chosen"
    to_step = state.step - state.distance
    (segment,) = stratify_failed_prompts(
        read_failed_prompts(current),
        step=state.step,
        distances=[state.distance],
        max_accuracy=session.recipe.autonpo.pool.max_accuracy,
    )
    failed = set(segment.prompt_ids)
    num_steps = session.recipe.autonpo.early.replay_steps if state.is_early else state.distance
    first = find_data_position(session.run, state.branch, to_step)
    last = find_data_position(session.run, state.branch, to_step + num_steps)
    return tuple(prompt for prompt in session.prompts_between(first, last) if prompt.prompt_id in failed)


def run_probe(probe: Probe) -> Generator[Progress, None, ProbeResult]:
    """Sample a part, estimate the drift of the stored checkpoints from it, decide; until the test has an answer."""
    session, recipe = probe.session, probe.session.recipe
    past = find_rollback_candidates(probe)
    rejected = reject_small_pool(probe.strata, [probe.distance_to(each) for each in past], recipe.autonpo)
    if rejected is not None:
        return rejected
    least = recipe.autonpo.rollback.min_failed_prompts
    past = [each for each in past if count_failed_prompts(probe.strata, probe.distance_to(each)) >= least]
    num_failed = sum(len(stratum.prompt_ids) for stratum in probe.strata)
    segments = describe_segments(probe, [probe.distance_to(each) for each in past])
    groups: list[Group] = []
    forward: dict[int, list[SampleRatio]] = {each.step: [] for each in past}
    backward: dict[int, list[SampleRatio]] = {}
    for look in plan_looks(min(recipe.autonpo.probe.num_prompts, num_failed)):
        load_checkpoint(session.policy, probe.checkpoint)
        backward = backward or {each.step: score_recorded_rollouts(probe, each.step) for each in past}
        chosen = allocate_probe_prompts(probe.strata, num_prompts=look.num_prompts, seed=probe.seed)
        known = {group.prompt.prompt_id for group in groups}
        new = [prompt_id for stratum in chosen for prompt_id in stratum if prompt_id not in known]
        sampled = yield from sample_probe_groups(probe, new)
        groups += sampled
        ratios = yield from score_past_checkpoints(probe, past, sampled)
        for step, own in ratios.items():
            forward[step] += own
        result = choose_rollback(
            probe.strata,
            count_passes(groups),
            [
                DriftSamples(distance=probe.distance_to(each), forward=forward[each.step], backward=backward[each.step])
                for each in past[::-1]
            ],
            segments=segments,
            formula=SignalFormula.of(recipe),
            settings=recipe.autonpo,
            seed=derive_seed(probe.seed, "bootstrap"),
            num_tokens=count_generated_tokens(groups),
            look=look,
        )
        if result.stop is not None:
            return result
    raise AssertionError("the last look ends the probe")


def describe_segments(probe: Probe, distances: Sequence[int]) -> dict[int, ReplaySegment]:
    """The replay of each distance, and what the run recorded of its steps; nothing for one without a record.

    A guide is injected once for each failed prompt of the segment. A correct response is worth what those in groups
    that pass the gate were worth, as in `npo score-checkpoints`.
    """
    guide, step, found = probe.session.recipe.guide, probe.checkpoint.step, {}
    recorded = RecordedSteps(run=probe.session.run, branch=probe.branch)
    for distance in distances:
        num_steps = probe.num_steps or distance
        first = step - distance
        totals = recorded.summarize(first, first + num_steps, guide.inject.max_accuracy)
        if totals is None:
            continue
        num_prompts = count_failed_prompts(probe.strata, distance)
        segment = totals.describe_replay(
            guide, num_steps=num_steps, lost_steps=distance, num_prompts=num_prompts, scoring_tokens=0
        )
        segment = replace(segment, samples_all=False, eligible_share=1.0, eligible_per_step=num_prompts / num_steps)
        found[distance] = shorten_to_window(segment, probe.session.recipe) if probe.is_dense else segment
    return found


def shorten_to_window(segment: ReplaySegment, recipe: Recipe) -> ReplaySegment:
    """The replay of the rung `dense`: shorter, with no guide to sample; every rollout of a failed prompt has a target,
    which counts as much as a response in a slot. The tokens that smaller groups save are not counted."""
    rungs = recipe.autonpo.rungs
    num_steps = min(rungs.num_steps, segment.num_steps)
    return replace(segment, num_steps=num_steps, slots=rungs.group_size, eligible_share=0.0)


def sample_probe_groups(probe: Probe, prompt_ids: Sequence[str]) -> Generator[Progress, None, list[Group]]:
    """Rollouts for these prompts; a recorded chunk is read back."""
    session, recipe, step, store = probe.session, probe.session.recipe, probe.checkpoint.step, probe.store
    prompts = [session.task.prompt(prompt_id) for prompt_id in prompt_ids]
    rollouts = {prompt_id: samples.rollouts for prompt_id, samples in store.read_prompts().items()}
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
        store.append(make_spec("checkpoint", {"step": step}).text, [group.samples for group in sampled])
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


def score_past_checkpoints(
    probe: Probe, past: Sequence[Checkpoint], groups: Sequence[Group]
) -> Generator[Progress, None, dict[int, list[SampleRatio]]]:
    """Importance ratios of each past checkpoint, by its step, to the current policy, whose weights are loaded."""
    session, temperature = probe.session, probe.session.recipe.guide.cache.temperature
    pairs = [(group.prompt, rollout) for group in groups for rollout in group.rollouts]
    began = time.perf_counter()
    logps = read_or_compute_logprobs(session, pairs, temperature=temperature)
    samples = [
        (prompt, replace(rollout, behavior_logps=each)) for (prompt, rollout), each in zip(pairs, logps, strict=True)
    ]
    forward = {}
    for done, checkpoint in enumerate(past):
        yield Progress(description="score past checkpoints", done=done, total=len(past), note=f"step {checkpoint.step}")
        load_checkpoint(session.policy, checkpoint)
        failed = find_failed_prompt_ids(probe, probe.distance_to(checkpoint))
        inside = [pair for pair in samples if pair[0].prompt_id in failed]
        forward[checkpoint.step] = compute_learner_ratios(
            session.policy, session.recipe, inside, cap=SignalFormula.of(session.recipe).token_cap
        )
    yield Progress(description="score past checkpoints", done=len(past), total=len(past))
    charge_probe(probe, piece=f"logprobs {groups[0].prompt.prompt_id}", tokens=0, began=began)
    return forward


def find_rollback_candidates(probe: Probe) -> list[Checkpoint]:
    """Full checkpoints at the usable distances in the branch's ancestry, oldest first."""
    steps = {probe.checkpoint.step - distance for distance in probe.distances}
    checkpoints = list_ancestry_checkpoints(probe.session.run, probe.branch)
    return [checkpoint for checkpoint in checkpoints if checkpoint.step in steps and checkpoint.tier == "full"]


def find_failed_prompt_ids(probe: Probe, distance: int) -> frozenset[str]:
    """Prompts that failed within the last `distance` steps."""
    return frozenset(
        prompt_id for stratum in probe.strata if stratum.max_age <= distance for prompt_id in stratum.prompt_ids
    )


def score_recorded_rollouts(probe: Probe, step: int) -> list[SampleRatio]:
    """The recorded rollouts of the policy of `step` for failed prompts, scored by the current policy (section 10.7).

    They are the rollouts of a later training step, on whichever branch of the ancestry executed it: of the next one, or
    with train.staleness of one that the policy was sampled for ahead.
    """
    session = probe.session
    groups = read_sampled_groups(session, probe.branch, step)
    failed = {prompt_id for stratum in probe.strata for prompt_id in stratum.prompt_ids}
    rows = [
        (group.prompt, rollout)
        for group in groups
        if group.prompt.prompt_id in failed
        for rollout in group.on_policy.rollouts
    ]
    return compute_learner_ratios(session.policy, session.recipe, rows, cap=SignalFormula.of(session.recipe).token_cap)


def read_sampled_groups(session: Session, branch: str, step: int) -> tuple[Group, ...]:
    """The recorded groups of the first training step whose rollouts the policy of `step` sampled; none is empty.

    With train.staleness the branch that trained `step` may have recorded it after the next one was forked.
    """
    for later in range(step + 1, step + 2 + session.recipe.train.staleness):
        for owner in dict.fromkeys(find_owning_branch(session.run, branch, each) for each in (later, step)):
            groups = RolloutLog(session.run.rollouts_path(owner)).read_step(later) or ()
            if any(rollout.sampler_step == step for group in groups for rollout in group.on_policy.rollouts):
                return groups
    return ()
