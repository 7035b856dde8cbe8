"""`npo score-checkpoints`: Q, V and S = Q/V of every candidate guide for one learner.

The learner is probed on prompts of the segment ahead; those it mostly fails are put to itself once more (the
control, and the floor of V) and to each candidate. One model walks the checkpoints by swapping weights. Every
chunk of samples is written before the next is drawn: a killed scoring goes on where it stopped.
"""

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

from npo_cli.config import Recipe, ScoringSettings
from npo_cli.errors import NpoError
from npo_cli.guide.halving import HalvingRound, halving_rounds, select_survivors
from npo_cli.guide.signal import CandidateResults, PromptPassCount, SignalKnobs, rank_candidates, variance_range_warning
from npo_cli.records import CheckpointScore, Notice, Progress, Prompt
from npo_cli.run_dir.checkpoints import Checkpoint
from npo_cli.run_dir.lock import lock_run
from npo_cli.run_dir.paths import open_run
from npo_cli.run_dir.scores import SCREENING_INDEX, delete_sample_store, open_sample_store, save_scores
from npo_cli.run_dir.seconds import append_sampling_time
from npo_cli.seeds import derive_seed
from npo_cli.stages.contest import ScoringState, collect_samples, collect_all_samples
from npo_cli.stages.ratios import CandidateSample, compute_learner_ratios
from npo_cli.stages.segment import Learner, find_later_checkpoint, find_learner, list_later_checkpoints, list_replay_prompts
from npo_cli.stages.world import (
    Session,
    load_checkpoint,
    open_policy,
    open_task,
    open_session,
)


def score_run(
    root: Path,
    *,
    at: int | None,
    candidates: Sequence[int] | None,
    branch: str | None,
    overrides: Sequence[str],
    allow_code: bool,
) -> Iterator[Progress | Notice | CheckpointScore]:
    """Probe, ask, rank; yields one score a candidate, nearest first."""
    run = open_run(root)
    learner = find_learner(run, at=at, branch=branch, overrides=overrides)
    chosen = (
        [find_later_checkpoint(run, learner, step) for step in sorted(set(candidates))]
        if candidates is not None
        else list_later_checkpoints(run, learner)
    )
    if learner.recipe.scoring.budget is not None:
        halving_rounds(len(chosen), learner.recipe.scoring.budget)  # a budget too small is told before it is spent
    with lock_run(run):
        task = open_task(learner.recipe, allow_code=allow_code)
        try:
            policy = open_policy(learner.recipe, task, learner.checkpoint)
            # A candidate that cannot be used is told before anything is sampled.
            for candidate in chosen:
                load_checkpoint(policy, candidate)
            with closing(open_session(run, learner.recipe, task=task, policy=policy)) as world:
                contest = open_scoring_state(world, learner, chosen)
                hard = yield from find_failed_prompts(
                    contest, count=learner.recipe.scoring.num_prompts, horizon=chosen[-1].step
                )
                yield from collect_samples(contest, learner.checkpoint, hard)
                scores = yield from run_halving(contest, chosen, hard)
                save_scores(contest.store, scores)
                for remark in (variance_range_warning(scores), sample_count_warning(learner.recipe)):
                    if remark:
                        yield Notice(message=remark, level="warning")
                yield from scores
        finally:
            task.close()


def sample_count_warning(recipe: Recipe) -> str | None:
    """A remark where Q was measured with another number of tries than the guide will have."""
    score, guide = recipe.scoring, recipe.guide
    if score.quality != "pass@k" or score.samples_per_prompt == guide.cache.samples_per_prompt:
        return None
    most = guide.cache.samples_per_prompt
    return (
        f"Q is pass@{score.samples_per_prompt}, but sample-guide draws up to guide.cache.samples_per_prompt = {most} "
        f"samples: set scoring.samples_per_prompt={most} for its Q"
    )


def open_scoring_state(
    world: Session, learner: Learner, candidates: Sequence[Checkpoint], *, sources: Sequence[str] = ()
) -> ScoringState:
    """The same question asked again finds its samples; a prompt cut short by a kill is asked again.

    `others`: who else is asked, where the question is not about checkpoints alone.
    """
    recipe = learner.recipe
    settings = {
        "prompts": recipe.scoring.num_prompts,
        "k": recipe.scoring.samples_per_prompt,
        "gate": recipe.guide.inject.max_accuracy,
        "temperature": recipe.sampling.temperature,
        "max_new_tokens": recipe.sampling.max_new_tokens,
    }
    if sources:
        settings["sources"] = list(sources)
    steps = [checkpoint.step for checkpoint in candidates]
    scoring = open_sample_store(world.run, learner.branch, learner.step, candidates=steps, settings=settings)
    found: dict[tuple[int, str], dict[int, CandidateSample]] = {}
    for row in scoring.samples.iter_rows():
        sample = CandidateSample.from_row(row)
        found.setdefault((sample.candidate, sample.prompt_id), {})[sample.slot] = sample
    whole = {
        key: list(by_slot.values())
        for key, by_slot in found.items()
        if len(by_slot) == recipe.scoring.samples_per_prompt
    }
    return ScoringState(session=world, learner=learner, store=scoring, samples=whole)


def find_failed_prompts(contest: ScoringState, *, count: int, horizon: int) -> Generator[Progress | Notice, None, list[Prompt]]:
    """The prompts of the segment ahead that the gate would let a guide help with, by a first look of k samples."""
    world, learner = contest.session, contest.learner
    prompts = list_replay_prompts(world, learner, horizon - learner.step)[:count]
    yield from collect_samples(contest, learner.checkpoint, prompts, candidate=SCREENING_INDEX)
    gate, hard = learner.recipe.guide.inject.max_accuracy, []
    for prompt in prompts:
        verdicts = [sample.is_correct for sample in contest.samples[SCREENING_INDEX, prompt.prompt_id]]
        if sum(verdicts) / len(verdicts) <= gate:
            hard.append(prompt)
    if not hard:
        delete_sample_store(contest.store)
        raise NpoError(
            f"the learner at step {learner.step} solves all {len(prompts)} prompts above the gate {gate}: "
            "no guide can help",
            "choose an earlier --at, ask more prompts (scoring.num_prompts), or raise guide.inject.max_accuracy",
        )
    yield Notice(message=f"{len(hard)} of {len(prompts)} prompts are hard for step {learner.step} (accuracy <= {gate})")
    return hard


def run_halving(
    contest: ScoringState, candidates: Sequence[Checkpoint], hard: Sequence[Prompt]
) -> Generator[Progress, None, tuple[CheckpointScore, ...]]:
    """Ask everybody everything, or with a budget halve the field round by round; scores all in the end."""
    scores: tuple[CheckpointScore, ...] = ()
    alive, num_asked = list(candidates), 0
    asked = {contest.learner.step: hard}
    for entry in plan_rounds(contest, len(candidates), len(hard)):
        num_asked = min(len(hard), num_asked + entry.prompts_per_candidate)
        if entry.num_candidates < len(alive):
            steps = [checkpoint.step for checkpoint in alive]
            kept = select_survivors([score for score in scores if score.step in steps], entry.num_candidates)
            alive = [checkpoint for checkpoint in alive if checkpoint.step in kept]
        yield from collect_all_samples(contest, alive, hard[:num_asked])
        asked |= {checkpoint.step: hard[:num_asked] for checkpoint in alive}
        scores = yield from rank_round(contest, asked)
    return scores


def plan_rounds(contest: ScoringState, num_candidates: int, num_prompts: int) -> list[HalvingRound]:
    """Sequential halving within `scoring.budget`, or one round in which every candidate is asked everything."""
    budget = contest.settings.budget
    if budget is None:
        return [HalvingRound(num_candidates=num_candidates, prompts_per_candidate=num_prompts)]
    return halving_rounds(num_candidates, budget)


def rank_round(
    contest: ScoringState, asked: Mapping[int, Sequence[Prompt]]
) -> Generator[Progress, None, tuple[CheckpointScore, ...]]:
    """Charge the samples to the learner, whose weights are swapped in once, and rank.

    `asked`: the prompts of each arm so far, the learner's first. What a killed process had sampled beyond them, in
    a later round, must not change who survives this one.
    """
    contest.session.policy.load(contest.learner.checkpoint.path)
    for done, (step, prompts) in enumerate(asked.items()):
        yield Progress(description="compare with the learner", done=done, total=len(asked), note=f"step {step}")
        new = [prompt for prompt in prompts if (step, prompt.prompt_id) not in contest.ratios]
        pairs = [(prompt, sample) for prompt in new for sample in contest.samples[step, prompt.prompt_id]]
        if not pairs:
            continue
        started = time.perf_counter()
        for ratio in compute_learner_ratios(contest.session, pairs, cap=contest.settings.weight_cap):
            contest.ratios.setdefault((step, ratio.prompt_id), []).append(ratio)
        append_sampling_time(contest.store.folder, time.perf_counter() - started, num_tokens=0)
    yield Progress(description="compare with the learner", done=len(asked), total=len(asked))
    self_arm, *arms = [_checkpoint_candidate(contest, step, prompts) for step, prompts in asked.items()]
    return rank_candidates(self_arm, arms, scoring_knobs(contest))


def _checkpoint_candidate(contest: ScoringState, step: int, prompts: Sequence[Prompt]) -> CandidateResults:
    keys = [(step, prompt.prompt_id) for prompt in prompts]
    outcomes = []
    for key in keys:
        samples = contest.samples[key]
        num_correct = sum(sample.is_correct for sample in samples)
        outcomes.append(PromptPassCount(prompt_id=key[1], num_samples=len(samples), num_correct=num_correct))
    ratios = tuple(ratio for key in keys for ratio in contest.ratios[key])
    return CandidateResults(step=step, distance=step - contest.learner.step, pass_counts=tuple(outcomes), ratios=ratios)


def scoring_knobs(contest: ScoringState) -> SignalKnobs:
    """Of a scoring."""
    recipe = contest.learner.recipe
    seed = derive_seed(recipe.train.seed, "bootstrap", contest.learner.step)
    return signal_knobs(recipe, contest.settings, k=contest.settings.samples_per_prompt, seed=seed)


def signal_knobs(recipe: Recipe, settings: ScoringSettings, *, k: int, seed: int) -> SignalKnobs:
    """The recipe's score section, as the guide room knows it, for `k` samples a prompt."""
    return SignalKnobs(
        quality=settings.quality,
        k=k,
        variance=settings.variance,
        kappa=settings.kl_scale,
        cap=settings.weight_cap,
        average=settings.kl_average,
        alpha=settings.variance_exponent,
        rule=settings.selection_rule,
        group_size=recipe.train.group_size,
        resamples=settings.bootstrap_resamples,
        seed=seed,
    )
