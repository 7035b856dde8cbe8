"""`npo score-checkpoints`: Q, V, S and a forecast of guide candidates for one learner, "no guide" among them.

The learner is sampled on prompts of the segment ahead; those that it mostly fails are given to the learner once more
(the control, and the KL floor) and to each candidate: later checkpoints, and any other guide source. V needs the
log-probabilities of the policy that wrote the samples; without them a candidate has a Q, and no V and S.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from npo_cli.config.recipe import Recipe
from npo_cli.errors import NpoError
from npo_cli.guides.build_cache import warning_notices
from npo_cli.guides.candidates import find_candidates, find_horizon, plan_rounds
from npo_cli.guides.collect_samples import (
    CONTROL,
    SCREENING,
    CheckpointLoader,
    SamplerThread,
    ScoringState,
    compute_ratios,
    describe_learner_part,
    open_sampler_thread,
    sample_candidates,
    sample_in_turn,
    sample_other_source,
)
from npo_cli.guides.source import GuideSource
from npo_cli.guides.sources.checkpoint import LineCheckpoint
from npo_cli.policy.model import Policy
from npo_cli.policy.weights_io import hold_weights
from npo_cli.report.score_plots import plot_scores
from npo_cli.scoring.forecast import ReplaySegment
from npo_cli.scoring.halving import HalvingRound, select_survivors
from npo_cli.scoring.quality import PromptPassCount
from npo_cli.scoring.ranking import CandidateResults, rank_candidates, variance_range_warning
from npo_cli.scoring.variance import SignalFormula
from npo_cli.seeds import derive_seed
from npo_cli.session.learner import Learner, list_replay_prompts
from npo_cli.session.recorded_steps import RecordedSteps
from npo_cli.session.session import Session, build_session, load_checkpoint, open_task_and_policy
from npo_cli.session.startup import charge_startup
from npo_cli.storage.costs import CostKind
from npo_cli.storage.layout import RunDir, open_run
from npo_cli.storage.lock import lock_run
from npo_cli.storage.sample_store import open_sample_store, save_scores
from npo_cli.tasks.task import Task
from npo_cli.types.guides import SourceSpec
from npo_cli.types.rollouts import Notice, Progress, Prompt
from npo_cli.types.scores import CandidateScore, GuideChoice, choose_guide


def score_run(
    root: Path,
    *,
    at: int | None,
    sources: Sequence[SourceSpec] | None,
    branch: str | None,
    overrides: Sequence[str],
    figure: Path | None = None,
) -> Iterator[Progress | Notice | CandidateScore | GuideChoice]:
    """Screen prompts, sample, rank; yields one score per candidate, then one of "no guide", then the choice.

    `sources` None: every later checkpoint.
    """
    run = open_run(root)
    learner, candidates = find_candidates(run, at=at, sources=sources, branch=branch, overrides=overrides)
    recipe = learner.recipe
    with (
        lock_run(run),
        hold_weights(),
        open_task_and_policy(recipe, learner.checkpoint, run=run) as (task, policy),
    ):
        scores = yield from score_candidates(run, learner, candidates, task=task, policy=policy)
    for warning in (variance_range_warning(scores), sample_count_warning(recipe)):
        if warning:
            yield Notice(message=warning, level="warning")
    yield from scores
    yield choose_guide(scores)
    if figure is not None:
        plot_scores(scores, figure, title=f"{run.root.resolve().name}: guide candidates for step {learner.step}")
        yield Notice(message=f"figure: {figure}")


def score_candidates(
    run: RunDir,
    learner: Learner,
    candidates: Sequence[GuideSource],
    *,
    task: Task,
    policy: Policy,
    folder: Path | None = None,
    cost_kind: CostKind = "score",
) -> Generator[Progress | Notice, None, tuple[CandidateScore, ...]]:
    """The scores of validated candidates, then that of "no guide"; the samples are stored in `folder` (None:
    RUN/scores). Leaves any weights in the policy."""
    horizon, rounds = find_horizon(candidates, learner), plan_rounds(candidates, learner.recipe)
    # A candidate that cannot be used is refused before anything is sampled.
    for source in candidates:
        if isinstance(source, LineCheckpoint):
            load_checkpoint(policy, source.checkpoint)
        else:
            policy.load(learner.checkpoint.path)
            yield from warning_notices(source.check(task, policy))
    policy.load(learner.checkpoint.path)
    with (
        closing(build_session(run, learner.recipe, task=task, policy=policy)) as session,
        open_sampler_thread(session, learner) as sampler,
    ):
        state = open_scoring_state(
            session, learner, candidates, horizon=horizon, sampler=sampler, folder=folder, cost_kind=cost_kind
        )
        failed = yield from screen_prompts(state)
        scores = yield from sample_and_rank(state, candidates, failed, rounds)
    if scores is None:
        # The engine is closed: an external model may need its memory.
        for source in candidates:
            if not isinstance(source, LineCheckpoint):
                yield from sample_other_source(state, source, failed)
        scores = yield from rank_round(state, dict.fromkeys(candidates, failed), control=failed)
    charge_startup(run, branch=learner.branch, step=learner.step, artifact=state.store.folder)
    save_scores(state.store, scores)
    return scores


def sample_count_warning(recipe: Recipe) -> str | None:
    """A warning where Q is measured with another number of samples than the guide cache draws."""
    scoring, most = recipe.scoring, recipe.guide.cache.samples_per_prompt
    if scoring.quality != "pass@k" or scoring.samples_per_prompt == most:
        return None
    return (
        f"Q is pass@{scoring.samples_per_prompt}, but sample-guide draws up to guide.cache.samples_per_prompt = {most} "
        f"samples: set scoring.samples_per_prompt={most} for its Q"
    )


def open_scoring_state(
    session: Session,
    learner: Learner,
    candidates: Sequence[GuideSource],
    *,
    horizon: int,
    sampler: SamplerThread | None = None,
    folder: Path | None = None,
    cost_kind: CostKind = "score",
) -> ScoringState:
    """The store of this scoring, with the samples that an earlier command left in it."""
    recipe = learner.recipe
    per_round = recipe.scoring.samples_per_round
    store = open_sample_store(
        folder or session.run.scores_folder,
        learner.branch,
        learner.step,
        checkpoints=[source.checkpoint.step for source in candidates if isinstance(source, LineCheckpoint)],
        settings={
            "candidates": {source.spec.text: source.fingerprint() for source in candidates},
            "num_prompts": recipe.scoring.num_prompts,
            "samples_per_prompt": recipe.scoring.samples_per_prompt,
            "max_accuracy": recipe.guide.inject.max_accuracy,
            "temperature": recipe.sampling.temperature,
            "max_new_tokens": recipe.sampling.max_new_tokens,
            **({} if per_round is None else {"samples_per_round": per_round}),
        },
    )
    return ScoringState(
        session=session,
        sampler=sampler,
        weights=CheckpointLoader(policy=session.policy),
        learner=learner,
        store=store,
        samples={key: found.rollouts for key, found in store.read().items()},
        horizon=horizon,
        recorded=RecordedSteps(run=session.run, branch=learner.branch),
        cost_kind=cost_kind,
    )


def screen_prompts(state: ScoringState) -> Generator[Progress | Notice, None, list[Prompt]]:
    """Prompts of the segment ahead into which a guide would be injected: those the learner fails in k samples."""
    learner = state.learner
    prompts = list_replay_prompts(state.session, learner, state.horizon - learner.step)[: state.settings.num_prompts]
    yield from sample_in_turn(state, [describe_learner_part(state, SCREENING, prompts)])
    limit = learner.recipe.guide.inject.max_accuracy
    failed = []
    for prompt in prompts:
        correct = [rollout.is_correct for rollout in state.samples[SCREENING, prompt.prompt_id]]
        if sum(correct) / len(correct) <= limit:
            failed.append(prompt)
    if not failed:
        state.store.delete()
        raise NpoError(
            f"the learner at step {learner.step} solves all {len(prompts)} prompts above "
            f"guide.inject.max_accuracy={limit}: no guide can help",
            "choose an earlier --at, more prompts (scoring.num_prompts), or a higher guide.inject.max_accuracy",
        )
    message = f"{len(failed)} of {len(prompts)} prompts have an accuracy <= {limit} at step {learner.step}"
    yield Notice(message=message)
    return failed


def sample_and_rank(
    state: ScoringState,
    candidates: Sequence[GuideSource],
    failed: Sequence[Prompt],
    rounds: Sequence[HalvingRound] | None,
) -> Generator[Progress, None, tuple[CandidateScore, ...] | None]:
    """Sample all checkpoints on all prompts; with a budget halve their number round by round, and return the scores."""
    if rounds is None:
        yield from sample_candidates(state, candidates, failed, control=failed)
        return None
    scores: tuple[CandidateScore, ...] = ()
    left, num_prompts = list(candidates), 0
    prompts: dict[GuideSource, Sequence[Prompt]] = {}
    for entry in rounds:
        num_prompts = min(len(failed), num_prompts + entry.prompts_per_candidate)
        if entry.num_candidates < len(left):
            names = {source.spec.text for source in left}
            survivors = select_survivors([score for score in scores if score.candidate in names], entry.num_candidates)
            left = [source for source in left if source.spec.text in survivors]
        yield from sample_candidates(state, left, failed[:num_prompts], control=failed)
        prompts |= dict.fromkeys(left, failed[:num_prompts])
        scores = yield from rank_round(state, prompts, control=failed)
    return scores


def rank_round(
    state: ScoringState, prompts: Mapping[GuideSource, Sequence[Prompt]], *, control: Sequence[Prompt]
) -> Generator[Progress, None, tuple[CandidateScore, ...]]:
    """Score all samples under the learner, as far as they were not, and rank.

    `prompts`: those of each candidate so far. What a killed process had sampled beyond them, in a later round of
    halving, must not influence this one.
    """
    learner = state.learner
    description, names = "score under the learner", [CONTROL, *(source.spec.text for source in prompts)]
    for done, (name, own) in enumerate(zip(names, [control, *prompts.values()], strict=True)):
        yield Progress(description=description, done=done, total=len(names), note=name)
        compute_ratios(state, name, own)
    yield Progress(description=description, done=len(names), total=len(names))
    itself = collect_results(state, CONTROL, control, source="self", step=learner.step, is_fresh=True)
    results = [
        collect_results(
            state, source.spec.text, own, source=source.name, step=source.guide_step, is_fresh=source.is_fresh
        )
        for source, own in prompts.items()
    ]
    screened = sum(rollout.num_tokens for key, own in state.samples.items() if key[0] == SCREENING for rollout in own)
    num_tokens = screened + sum(own.num_tokens for own in (itself, *results) if own.is_fresh)
    results = [replace(own, segment=describe_segment(state, own.step, scoring_tokens=num_tokens)) for own in results]
    seed = derive_seed(learner.recipe.train.seed, "bootstrap", learner.step)
    return rank_candidates(itself, results, SignalFormula.of(learner.recipe), seed=seed)


def describe_segment(state: ScoringState, guide_step: int | None, *, scoring_tokens: int) -> ReplaySegment | None:
    """The steps in which a guide is used, and what the run recorded of them; None where it recorded nothing."""
    learner, recipe = state.learner, state.learner.recipe
    ahead = max(0, (guide_step or 0) - learner.step)
    by_default = recipe.guide.cache.count_covered(ahead) if ahead else state.horizon - learner.step
    num_steps = recipe.guide.replay.num_steps or by_default
    recorded = state.recorded.summarize(learner.step, learner.step + num_steps, recipe.guide.inject.max_accuracy)
    if recorded is None:
        return None
    return recorded.describe_replay(
        recipe.guide,
        num_steps=num_steps,
        lost_steps=ahead,
        num_prompts=len(list_replay_prompts(state.session, learner, num_steps)),
        scoring_tokens=scoring_tokens,
    )


def collect_results(
    state: ScoringState, candidate: str, prompts: Sequence[Prompt], *, source: str, step: int | None, is_fresh: bool
) -> CandidateResults:
    """Pass counts and importance ratios of one candidate on these prompts."""
    counts = []
    for prompt in prompts:
        rollouts = state.samples.get((candidate, prompt.prompt_id), ())
        num_correct = sum(rollout.is_correct for rollout in rollouts)
        counts.append(PromptPassCount(prompt_id=prompt.prompt_id, num_samples=len(rollouts), num_correct=num_correct))
    return CandidateResults(
        candidate=candidate,
        source=source,
        step=step,
        distance=None if step is None else step - state.learner.step,
        pass_counts=tuple(counts),
        num_tokens=sum(
            rollout.num_tokens for prompt in prompts for rollout in state.samples.get((candidate, prompt.prompt_id), ())
        ),
        ratios=tuple(ratio for prompt in prompts for ratio in state.ratios.get((candidate, prompt.prompt_id), ())),
        is_fresh=is_fresh,
    )
