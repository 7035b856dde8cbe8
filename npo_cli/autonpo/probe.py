"""PROBE: the present policy answers again what it failed on the way; Q, V and S of every rollback distance.

Answers are written chunk by chunk, so a killed probe goes on where it stopped. Nothing here is random but the
sampling, whose seeds are those of (run seed, branch, step, prompt, slot).
"""

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass

from npo_cli.autonpo.preflight import usable_deltas
from npo_cli.autonpo.rollback_choice import DriftSamples, choose_rollback
from npo_cli.guides.source import compute_logprobs
from npo_cli.policy.optimizer import read_trainer_state
from npo_cli.rollout.mistake_pool import Stratum, allocate_probe_prompts, stratify_failed_prompts
from npo_cli.scoring.quality import PromptPassCount
from npo_cli.scoring.variance import SampleRatio, SignalFormula
from npo_cli.seeds import derive_seed
from npo_cli.session.policy_ratios import CandidateSample, compute_learner_ratios
from npo_cli.session.session import Session, count_generated_tokens, load_checkpoint, sample_groups
from npo_cli.storage.autonpo_log import ProbeStore, count_probe_tokens, open_probe
from npo_cli.storage.checkpoints import Checkpoint, list_ancestry_checkpoints
from npo_cli.storage.costs import append_cost
from npo_cli.storage.lineage import find_owning_branch
from npo_cli.storage.rollout_log import RolloutLog
from npo_cli.training.checkpointing import TRAINING_STATE_FOLDER
from npo_cli.types.autonpo import FailedPrompt, ProbeResult
from npo_cli.types.rollouts import Group, Progress, Prompt

CHUNK_PROMPTS = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """One confirmation under way."""

    session: Session
    branch: str
    checkpoint: Checkpoint
    """The policy that is asked, and would be the guide."""
    folder: ProbeStore
    mistakes: tuple[FailedPrompt, ...]
    strata: tuple[Stratum, ...]
    seed: int


def start_probe(session: Session, branch: str, present: Checkpoint) -> Probe:
    """The mistakes saved with the policy's own checkpoint, by age."""
    recipe = session.recipe
    settings = {
        "prompts": recipe.autonpo.probe.num_prompts,
        "k": recipe.autonpo.probe.samples_per_prompt,
        "tau": recipe.autonpo.pool.max_accuracy,
        "deltas": list(usable_deltas(recipe)),
        "temperature": recipe.guide.cache.temperature or recipe.sampling.temperature,
        "max_new_tokens": recipe.sampling.max_new_tokens,
    }
    mistakes = read_trainer_state(present.path / TRAINING_STATE_FOLDER).failed_prompts
    return Probe(
        session=session,
        branch=branch,
        checkpoint=present,
        folder=open_probe(session.run, branch, present.step, settings=settings),
        mistakes=mistakes,
        strata=stratify_failed_prompts(
            mistakes, step=present.step, distances=usable_deltas(recipe), tau=recipe.autonpo.pool.max_accuracy
        ),
        seed=derive_seed(recipe.train.seed, "probe", branch, present.step),
    )


def run_probe(probe: Probe) -> Generator[Progress, None, ProbeResult]:
    """Ask, look at every stored distance from both sides, decide."""
    session, recipe = probe.session, probe.session.recipe
    count = recipe.autonpo.probe.num_prompts
    load_checkpoint(session.policy, probe.checkpoint)
    groups = yield from sample_probe_groups(
        probe, allocate_probe_prompts(probe.strata, num_prompts=count, seed=probe.seed)
    )
    # How far each checkpoint of the past is from the policy that answered.
    hindsights = yield from score_past_checkpoints(probe, groups)
    return choose_rollback(
        probe.strata,
        count_passes(groups),
        hindsights,
        formula=SignalFormula(settings=recipe.scoring, group_size=recipe.train.group_size),
        settings=recipe.autonpo,
        seed=derive_seed(probe.seed, "bootstrap"),
        num_tokens=count_probe_tokens(probe.folder),
    )


def sample_probe_groups(probe: Probe, chosen: Sequence[Sequence[str]]) -> Generator[Progress, None, list[Group]]:
    """Answers to the prompts of all strata; a chunk on record is read back."""
    session, recipe, journal = probe.session, probe.session.recipe, probe.folder.rollouts
    prompts = [session.task.prompt(prompt_id) for stratum in chosen for prompt_id in stratum]
    groups: list[Group] = []
    for place, start in enumerate(range(0, len(prompts), CHUNK_PROMPTS)):
        yield Progress(description="ask again what failed", done=start, total=len(prompts))
        known = journal.read_step(place)
        if known is None:
            began = time.perf_counter()
            known = sample_groups(
                session,
                prompts[start : start + CHUNK_PROMPTS],
                seed_label=("probe", probe.branch, probe.checkpoint.step),
                slots=range(recipe.autonpo.probe.samples_per_prompt),
                sampler_step=probe.checkpoint.step,
                temperature=recipe.guide.cache.temperature,
            )
            charge_probe(probe, piece=str(place), tokens=count_generated_tokens(known), began=began)
            journal.write_step(place, known)
        groups += known
    yield Progress(description="ask again what failed", done=len(prompts), total=len(prompts))
    return groups


def charge_probe(probe: Probe, *, piece: str, tokens: int, began: float) -> None:
    """Charge what was done since `began` to the policy that is probed."""
    append_cost(
        probe.session.run,
        "probe",
        branch=probe.branch,
        step=probe.checkpoint.step,
        artifact=probe.folder.folder,
        piece=piece,
        tokens=tokens,
        seconds=time.perf_counter() - began,
    )


def count_passes(groups: Sequence[Group]) -> list[PromptPassCount]:
    """How the samples of each prompt came out."""
    return [
        PromptPassCount(
            prompt_id=group.prompt.prompt_id,
            num_samples=len(group.rollouts),
            num_correct=sum(rollout.verdict == "correct" and rollout.finished for rollout in group.rollouts),
        )
        for group in groups
    ]


def score_past_checkpoints(probe: Probe, groups: Sequence[Group]) -> Generator[Progress, None, list[DriftSamples]]:
    """The two views of every distance that has a full state; the present policy's weights are at hand."""
    session, heat = probe.session, probe.session.recipe.guide.cache.temperature
    pairs = [(group.prompt, rollout) for group in groups for rollout in group.rollouts]
    began = time.perf_counter()
    logps = compute_logprobs(session, pairs, temperature=heat)
    step = probe.checkpoint.step
    samples = [
        (prompt, CandidateSample.from_rollout(step, rollout, each))
        for (prompt, rollout), each in zip(pairs, logps, strict=True)
    ]
    places = find_rollback_candidates(probe)
    backward = {place.step: score_recorded_rollouts(probe, place.step) for place in places}
    hindsights = []
    for done, place in enumerate(places):
        yield Progress(description="look back", done=done, total=len(places), note=f"step {place.step}")
        load_checkpoint(session.policy, place)
        inside = find_failed_prompt_ids(probe, step - place.step)
        seen = [pair for pair in samples if pair[0].prompt_id in inside]
        forward = compute_learner_ratios(session, seen, cap=session.recipe.scoring.weight_cap)
        hindsights.append(DriftSamples(distance=step - place.step, forward=forward, backward=backward[place.step]))
    yield Progress(description="look back", done=len(places), total=len(places))
    charge_probe(probe, piece="logprobs", tokens=0, began=began)
    return hindsights[::-1]


def find_rollback_candidates(probe: Probe) -> list[Checkpoint]:
    """Full states at the usable distances, on the line of descent, oldest first."""
    steps = {probe.checkpoint.step - delta for delta in usable_deltas(probe.session.recipe)}
    line = list_ancestry_checkpoints(probe.session.run, probe.branch)
    return [found for found in line if found.step in steps and found.tier == "full"]


def find_failed_prompt_ids(probe: Probe, distance: int) -> frozenset[str]:
    """Prompts that failed within the last `distance` steps."""
    return frozenset(
        prompt_id for stratum in probe.strata if stratum.max_age <= distance for prompt_id in stratum.prompt_ids
    )


def score_recorded_rollouts(probe: Probe, step: int) -> list[SampleRatio]:
    """What the policy of `step` itself had answered to prompts of the pool, seen by the present one (section 10.7).

    Its rollouts are those of the next training step, on whichever branch the line of descent made it.
    """
    session = probe.session
    owner = find_owning_branch(session.run, probe.branch, step + 1)
    groups = RolloutLog(session.run.rollouts_path(owner)).read_step(step + 1) or ()
    failed = {prompt_id for stratum in probe.strata for prompt_id in stratum.prompt_ids}
    rows: list[tuple[Prompt, CandidateSample]] = [
        (group.prompt, CandidateSample.from_rollout(step, rollout, rollout.behavior_logps))
        for group in groups
        if group.prompt.prompt_id in failed
        for rollout in group.on_policy.rollouts
    ]
    return compute_learner_ratios(session, rows, cap=session.recipe.scoring.weight_cap)
