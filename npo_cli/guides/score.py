"""`npo score-sources`: Q, V and S = Q/V of past, self, near and far future, teachers, for one learner and its prompts.

The paper's central figure on one's own run. The machinery is that of `score_checkpoints`: a source is one more arm. V
needs the log-probabilities of who wrote the samples; where nobody knows them the arm has a Q, and no V and S.

`npo score-checkpoints`: Q, V and S = Q/V of every candidate guide for one learner.

The learner is probed on prompts of the segment ahead; those it mostly fails are put to itself once more (the
control, and the floor of V) and to each candidate. One model walks the checkpoints by swapping weights. Every
chunk of samples is written before the next is drawn: a killed scoring goes on where it stopped.

Sources as arms of a comparison: `KIND=WHAT` to who is asked, and the samples that each of them is judged by.

Checkpoints of the line are arms of `score_checkpoints`, by their step; every other source has a number below PROBE.
What is sampled is kept in the scoring's journal like a checkpoint's samples; a file and the past are read again.
"""

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from npo_cli.config.recipe import Recipe
from npo_cli.errors import NpoError
from npo_cli.guides.build_cache import warning_notices
from npo_cli.guides.collect_samples import (
    CHUNK_PROMPTS,
    ScoringState,
    charge_scoring,
    collect_all_samples,
    collect_samples,
)
from npo_cli.guides.registry import create_source
from npo_cli.guides.source import GuideSource, ReplayTarget, open_source
from npo_cli.policy.model import Policy
from npo_cli.report.score_plots import plot_sources, validate_figure_format
from npo_cli.scoring.halving import HalvingRound, halving_rounds, select_survivors
from npo_cli.scoring.quality import PromptPassCount
from npo_cli.scoring.ranking import (
    CandidateResults,
    find_best_per_variance,
    rank_candidates,
    variance_range_warning,
)
from npo_cli.scoring.variance import SignalFormula
from npo_cli.seeds import derive_seed
from npo_cli.session.learner import (
    Learner,
    find_later_checkpoint,
    find_learner,
    list_later_checkpoints,
    list_replay_prompts,
)
from npo_cli.session.policy_ratios import CandidateSample, compute_learner_ratios
from npo_cli.session.session import (
    Session,
    build_session,
    load_checkpoint,
    open_session,
    open_task_and_policy,
)
from npo_cli.storage.checkpoints import Checkpoint, find_checkpoint
from npo_cli.storage.layout import RunDir, open_run
from npo_cli.storage.lock import lock_run
from npo_cli.storage.sample_store import SCREENING_INDEX, delete_sample_store, open_sample_store, save_scores
from npo_cli.tasks.task import Task
from npo_cli.types.guides import SourceScore, SourceSpec
from npo_cli.types.rollouts import CheckpointScore, Notice, Progress, Prompt


def score_run(
    root: Path,
    *,
    at: int | None,
    candidates: Sequence[int] | None,
    branch: str | None,
    overrides: Sequence[str],
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
    with lock_run(run), open_session(run, learner.recipe, checkpoint=learner.checkpoint) as session:
        # An unusable candidate is refused before anything is sampled.
        for candidate in chosen:
            load_checkpoint(session.policy, candidate)
        contest = open_scoring_state(session, learner, chosen)
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
    session: Session, learner: Learner, candidates: Sequence[Checkpoint], *, sources: Sequence[str] = ()
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
    scoring = open_sample_store(session.run, learner.branch, learner.step, candidates=steps, settings=settings)
    found: dict[tuple[int, str], dict[int, CandidateSample]] = {}
    for row in scoring.samples.iter_rows():
        sample = CandidateSample.from_row(row)
        found.setdefault((sample.candidate, sample.prompt_id), {})[sample.slot] = sample
    whole = {
        key: list(by_slot.values())
        for key, by_slot in found.items()
        if len(by_slot) == recipe.scoring.samples_per_prompt
    }
    return ScoringState(session=session, learner=learner, store=scoring, samples=whole)


def find_failed_prompts(
    contest: ScoringState, *, count: int, horizon: int
) -> Generator[Progress | Notice, None, list[Prompt]]:
    """The prompts of the segment ahead that the gate would let a guide help with, by a first look of k samples."""
    session, learner = contest.session, contest.learner
    prompts = list_replay_prompts(session, learner, horizon - learner.step)[:count]
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
        charge_scoring(contest, piece=f"{step}:logprobs", started=started)
    yield Progress(description="compare with the learner", done=len(asked), total=len(asked))
    self_arm, *arms = [_checkpoint_candidate(contest, step, prompts) for step, prompts in asked.items()]
    recipe = contest.learner.recipe
    seed = derive_seed(recipe.train.seed, "bootstrap", contest.learner.step)
    return rank_candidates(self_arm, arms, signal_formula(recipe), seed=seed)


def _checkpoint_candidate(contest: ScoringState, step: int, prompts: Sequence[Prompt]) -> CandidateResults:
    keys = [(step, prompt.prompt_id) for prompt in prompts]
    outcomes = []
    for key in keys:
        samples = contest.samples[key]
        num_correct = sum(sample.is_correct for sample in samples)
        outcomes.append(PromptPassCount(prompt_id=key[1], num_samples=len(samples), num_correct=num_correct))
    ratios = tuple(ratio for key in keys for ratio in contest.ratios[key])
    return CandidateResults(step=step, distance=step - contest.learner.step, pass_counts=tuple(outcomes), ratios=ratios)


def signal_formula(recipe: Recipe) -> SignalFormula:
    """How this recipe computes S."""
    return SignalFormula(settings=recipe.scoring, group_size=recipe.train.group_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceCandidate:
    """One source that is no later checkpoint."""

    number: int
    source: GuideSource
    digest: str
    """What tells it from another behind the same name, as far as that can be told without opening it."""

    @property
    def kind(self) -> str:
        return self.source.name

    @property
    def is_fresh(self) -> bool:
        """Whether it is asked, and not only read."""
        return self.source.is_fresh

    @property
    def name(self) -> str:
        """Its SPEC: `past`, `model:FOLDER`, `run:OTHER@main:120`."""
        return self.source.spec.text


def resolve_source_candidates(
    run: RunDir, learner: Learner, asked: Sequence[SourceSpec], *, num_steps: int
) -> list[SourceCandidate]:
    """Each source once, in the order given, asked for `scoring.samples_per_prompt` answers a prompt at once."""
    recipe = learner.recipe
    k = recipe.scoring.samples_per_prompt
    every = {
        **{"samples_per_prompt": k, "samples_per_round": k, "temperature": None, "select": "random"},
        **{"max_responses_per_prompt": 1, "min_correct": 1},
    }
    guide = recipe.guide.model_copy(update={"cache": recipe.guide.cache.model_copy(update=every)})
    judged = replace(learner, recipe=recipe.model_copy(update={"guide": guide}))
    arms = []
    target = ReplayTarget(run=run, learner=judged, steps=num_steps, purpose="score")
    for place, spec in enumerate(dict.fromkeys(asked)):
        source = create_source(spec, target)
        arms.append(SourceCandidate(number=SCREENING_INDEX - 1 - place, source=source, digest=source.fingerprint()))
    return arms


def check_sources(arms: Sequence[SourceCandidate], task: Task, policy: Policy) -> Iterator[Notice]:
    """Refuse a source that cannot be used before anything is sampled."""
    for arm in arms:
        yield from warning_notices(arm.source.check(task, policy))


def collect_source_samples(
    contest: ScoringState, arm: SourceCandidate, prompts: Sequence[Prompt], *, task: Task
) -> Iterator[Progress]:
    """Samples of one source on each prompt it was not asked before; `contest.world` has the learner's weights."""
    left = [prompt for prompt in prompts if (arm.number, prompt.prompt_id) not in contest.samples]
    if not left:
        return
    with open_source(arm.source, task=task, policy=contest.session.policy):
        for start in range(0, len(left), CHUNK_PROMPTS):
            yield Progress(description=f"ask {arm.kind}", done=len(prompts) - len(left) + start, total=len(prompts))
            part = left[start : start + CHUNK_PROMPTS]
            started = time.perf_counter()
            samples, num_tokens = _sample_candidate(arm.number, arm.source, part)
            if arm.is_fresh:
                charge_scoring(
                    contest,
                    piece=f"{arm.number}:{part[0].prompt_id}",
                    tokens=num_tokens,
                    forwards_per_token=arm.source.forwards_per_token,
                    started=started,
                )
                contest.store.samples.extend([sample.to_row() for sample in samples])
            for sample in samples:
                contest.samples.setdefault((arm.number, sample.prompt_id), []).append(sample)
    yield Progress(description=f"ask {arm.kind}", done=len(prompts), total=len(prompts))


def _sample_candidate(number: int, author: GuideSource, prompts: Sequence[Prompt]) -> tuple[list[CandidateSample], int]:
    """Every answer with its log-probabilities, and the tokens that they had cost."""
    answers = author.sample(prompts)
    pairs = [(entry.prompt, rollout) for entry in answers for rollout in (*entry.rollouts, *entry.duplicates)]
    samples = [
        CandidateSample.from_rollout(number, rollout, logps)
        for (_, rollout), logps in zip(pairs, author.logprobs(pairs), strict=True)
    ]
    return samples, sum(entry.num_tokens for entry in answers)


OFF_LINE_DISTANCE = 10**9
"""Steps to a policy that is not of the learner's line, in a tie."""
NOT_FRESH = "recorded while training: not fresh, as many tries as there were visits"
FROM_FILE = "brought in a file: not fresh, as many tries as it has rows"
NO_LOGPS = "no V and S: nobody knows the log-probabilities of who wrote it, so its ratio to the learner is not known"
NO_SAMPLES = "no V and S: it has no samples on these prompts"


@dataclass(frozen=True, kw_only=True, slots=True)
class CandidateSet:
    """Who is compared, checkpoints of the line first."""

    learner: Learner
    near: tuple[Checkpoint, ...]
    far: Checkpoint | None
    base: Checkpoint | None
    sources: tuple[SourceCandidate, ...]

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """By step; the learner itself is one of them."""
        several = [self.base, self.learner.checkpoint, *self.near, self.far]
        return [checkpoint for checkpoint in several if checkpoint is not None]

    def candidate_name(self, number: int) -> str:
        """What an arm is called."""
        for arm in self.sources:
            if arm.number == number:
                return arm.name
        return "self" if number == self.learner.step else f"step {number}"

    def candidate_kind(self, number: int) -> str:
        """What kind of source an arm is."""
        for arm in self.sources:
            if arm.number == number:
                return arm.kind
        if number <= self.learner.step:
            return "self" if number == self.learner.step else "base"
        return "far" if self.far is not None and number == self.far.step else "near"


def score_sources(
    root: Path,
    *,
    at: int | None,
    candidates: Sequence[int] | None,
    far: int | None,
    sources: Sequence[SourceSpec],
    branch: str | None,
    figure: Path | None,
    overrides: Sequence[str],
) -> Iterator[Progress | Notice | SourceScore]:
    """Probe the learner, ask everybody, charge what can be charged; yields one score a source."""
    if figure is not None:
        validate_figure_format(figure)
    run = open_run(root)
    learner = find_learner(run, at=at, branch=branch, overrides=overrides)
    field = select_candidates(run, learner, candidates=candidates, far=far, sources=sources)
    with lock_run(run), open_task_and_policy(learner.recipe, learner.checkpoint) as (task, policy):
        scores = yield from compare_candidates(run, field, task=task, policy=policy)
    yield from scores
    yield from report_best_sources(scores)
    if figure is not None:
        plot_sources(scores, figure, title=f"{run.root.resolve().name}: sources for step {learner.step}")
        yield Notice(message=f"the picture is in {figure}")


def select_candidates(
    run: RunDir, learner: Learner, *, candidates: Sequence[int] | None, far: int | None, sources: Sequence[SourceSpec]
) -> CandidateSet:
    """The named steps, or every later one but the far one; each source checked as far as it can be unopened."""
    later = list_later_checkpoints(run, learner)
    if candidates is not None:
        later = [find_later_checkpoint(run, learner, step) for step in sorted(set(candidates))]
    far_one = None if far is None else find_later_checkpoint(run, learner, far)
    near = tuple(each for each in later if far_one is None or each.step < far_one.step)
    if far_one is not None and any(each.step > far_one.step for each in later) and candidates is not None:
        raise NpoError(f"--far {far} is nearer than a candidate", f"--far {later[-1].step}")
    wants_base = any(ask.name == "base" for ask in sources)
    if wants_base and learner.step == 0:
        raise NpoError("the learner at step 0 is the base itself", "leave out --source base, or name a later --at")
    horizon = (near or (far_one,))[-1].step
    others = [ask for ask in sources if ask.name != "base"]
    return CandidateSet(
        learner=learner,
        near=near,
        far=far_one,
        base=find_checkpoint(run, learner.branch, 0) if wants_base else None,
        sources=tuple(resolve_source_candidates(run, learner, others, num_steps=horizon - learner.step)),
    )


def compare_candidates(
    run: RunDir, field: CandidateSet, *, task: Task, policy: Policy
) -> Generator[Progress | Notice, None, tuple[SourceScore, ...]]:
    """Everybody's samples on the same hard prompts, and what they come to."""
    learner = field.learner
    # Whoever cannot be used is told before anything is sampled.
    yield from check_sources(field.sources, task, policy)
    for checkpoint in field.checkpoints:
        load_checkpoint(policy, checkpoint)
    ahead = [checkpoint for checkpoint in field.checkpoints if checkpoint.step != learner.step]
    with closing(build_session(run, learner.recipe, task=task, policy=policy)) as session:
        # The key holds who is asked, so another question never finds these samples.
        named = [f"{arm.name} {arm.digest}".rstrip() for arm in field.sources]
        contest = open_scoring_state(session, learner, ahead, sources=["self", *named])
        horizon = (field.near or ahead)[-1].step
        hard = yield from find_failed_prompts(contest, count=learner.recipe.scoring.num_prompts, horizon=horizon)
        yield from collect_all_samples(contest, field.checkpoints, hard)
    # The engine is closed: an outside model may need its room.
    for arm in field.sources:
        policy.load(learner.checkpoint.path)
        yield from collect_source_samples(contest, arm, hard, task=task)
    scores = yield from score_all(contest, field, hard)
    return scores


def score_all(
    contest: ScoringState, field: CandidateSet, hard: Sequence[Prompt]
) -> Generator[Progress, None, tuple[SourceScore, ...]]:
    """Charge to the learner what can be charged, rank it together; of the others only Q."""
    contest.session.policy.load(field.learner.checkpoint.path)
    numbers = [checkpoint.step for checkpoint in field.checkpoints] + [arm.number for arm in field.sources]
    arms = {}
    for done, number in enumerate(numbers):
        yield Progress(
            description="compare with the learner", done=done, total=len(numbers), note=field.candidate_name(number)
        )
        arms[number] = build_candidate(contest, field, number, hard=hard)
    yield Progress(description="compare with the learner", done=len(numbers), total=len(numbers))
    self_arm, recipe = arms[field.learner.step], field.learner.recipe
    formula, seed = signal_formula(recipe), derive_seed(recipe.train.seed, "bootstrap", field.learner.step)
    charged = [arm for arm in arms.values() if arm.ratios]
    found = find_best_per_variance(self_arm, charged, formula, seed=seed)
    ranked = {score.step: score for score in rank_candidates(self_arm, charged, formula, seed=seed)}
    # Of an arm alone only the figures that need no V are looked at.
    alone = {
        arm.step: rank_candidates(self_arm, [arm], formula, seed=seed)[0] for arm in arms.values() if not arm.ratios
    }
    scores = tuple(
        build_source_score(
            contest, field, (ranked | alone)[number], leads=found, with_variance=[arm.step for arm in charged]
        )
        for number in numbers
    )
    on_line = [score for score in ranked.values() if score.step > field.learner.step]
    save_scores(contest.store, on_line, sources=scores)
    return scores


def build_candidate(
    contest: ScoringState, field: CandidateSet, number: int, *, hard: Sequence[Prompt]
) -> CandidateResults:
    """Outcomes prompt by prompt, and the ratios where every sample has log-probabilities.

    What was not asked afresh has as many tries as there are: its quality is whether any of them was right.
    """
    given = number < 0 and not next(arm for arm in field.sources if arm.number == number).is_fresh
    outcomes, pairs = [], []
    for prompt in hard:
        samples = contest.samples.get((number, prompt.prompt_id), ())
        num_correct, tries = sum(sample.is_correct for sample in samples), len(samples)
        if given:
            num_correct, tries = int(num_correct > 0), 1
        outcomes.append(PromptPassCount(prompt_id=prompt.prompt_id, num_samples=tries, num_correct=num_correct))
        pairs += [(prompt, sample) for sample in samples]
    ratios = ()
    if pairs and all(sample.logps is not None for _, sample in pairs):
        started = time.perf_counter()
        ratios = tuple(compute_learner_ratios(contest.session, pairs, cap=contest.settings.weight_cap))
        charge_scoring(contest, piece=f"{number}:logprobs", started=started)
    # Of equal S the one nearest to the learner is taken.
    distance = OFF_LINE_DISTANCE if number < 0 else abs(number - contest.learner.step)
    return CandidateResults(step=number, distance=distance, pass_counts=tuple(outcomes), ratios=ratios)


def build_source_score(
    contest: ScoringState,
    field: CandidateSet,
    score: CheckpointScore,
    *,
    leads: Mapping[str, tuple[int, tuple[float, ...]]],
    with_variance: Sequence[int],
) -> SourceScore:
    """One arm's line, with what must be known of it."""
    kind, samples = field.candidate_kind(score.step), candidate_samples(contest, score.step)
    known = SourceScore(
        name=field.candidate_name(score.step),
        kind=kind,
        distance=None if score.step < 0 else score.step - field.learner.step,
        num_prompts=score.num_prompts,
        num_samples=len(samples),
        samples_per_prompt=len(samples) / score.num_prompts,
        quality_kind="any of what is given" if kind in ("past", "file") else score.quality_kind,
        quality=score.quality,
        quality_low=score.quality_low,
        quality_high=score.quality_high,
        quality_net=score.quality_net,
        pass_at_1=sum(sample.is_correct for sample in samples) / len(samples) if samples else 0.0,
        variance_kind=score.variance_kind,
        note="; ".join(filter(None, (_origin_note(kind), _gap_note(score.step in with_variance, len(samples))))),
    )
    if score.step not in with_variance:
        return known
    place = list(with_variance).index(score.step)
    return replace(
        known,
        variance=score.variance,
        variance_low=score.variance_low,
        variance_high=score.variance_high,
        signal=score.signal,
        signal_low=score.signal_low,
        signal_high=score.signal_high,
        p_best=score.p_best,
        is_selected=score.is_selected,
        is_unreliable=score.is_unreliable,
        kl_per_token=score.kl_per_token,
        kl_per_sequence=score.kl_per_sequence,
        p_best_by_variance_kind={which: p_best[place] for which, (_, p_best) in leads.items()},
        best_for_variance_kinds=tuple(which for which, (best, _) in leads.items() if best == place),
    )


def candidate_samples(contest: ScoringState, number: int) -> list:
    """Every sample of one arm."""
    return [sample for (arm, _), each in contest.samples.items() if arm == number for sample in each]


def _origin_note(kind: str) -> str:
    return {"past": NOT_FRESH, "file": FROM_FILE}.get(kind, "")


def _gap_note(is_charged: bool, num_samples: int) -> str:
    if is_charged:
        return ""
    return NO_LOGPS if num_samples else NO_SAMPLES


def report_best_sources(scores: Sequence[SourceScore]) -> Iterator[Notice]:
    """Under each kind of V where the largest S is, with its probability."""
    lines = [
        f"{kind} {score.name} ({score.p_best_by_variance_kind[kind]:.0%})"
        for score in scores
        for kind in sorted(score.best_for_variance_kinds)
    ]
    yield Notice(message=f"largest S under each V, with its share of the resamples: {', '.join(lines)}")
