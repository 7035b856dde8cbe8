"""`npo score-sources`: Q, V and S = Q/V of past, self, near and far future, teachers, for one learner and its prompts.

The paper's central figure on one's own run. The machinery is that of `score_checkpoints`: a source is one more arm. V
needs the log-probabilities of who wrote the samples; where nobody knows them the arm has a Q, and no V and S.
"""

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from npo_cli.errors import NpoError
from npo_cli.guide.evidence import CandidateResults, PromptPassCount
from npo_cli.guide.signal import BestCandidate, find_best_per_variance, rank_candidates
from npo_cli.guide_records import SourceScore
from npo_cli.records import CheckpointScore, Notice, Progress, Prompt
from npo_cli.report.source_figure import validate_figure_format, plot_sources
from npo_cli.run_dir.checkpoints import Checkpoint, find_checkpoint
from npo_cli.run_dir.lock import lock_run
from npo_cli.run_dir.paths import RunDir, open_run
from npo_cli.run_dir.scores import save_scores
from npo_cli.run_dir.seconds import append_sampling_time
from npo_cli.stages.contest import ScoringState, collect_all_samples
from npo_cli.stages.guide_plan import SourceSpec
from npo_cli.stages.ratios import compute_learner_ratios
from npo_cli.stages.score_checkpoints import scoring_knobs, find_failed_prompts, open_scoring_state
from npo_cli.stages.segment import Learner, find_later_checkpoint, find_learner, list_later_checkpoints
from npo_cli.stages.source_arms import SourceCandidate, collect_source_samples, resolve_source_candidates, check_sources
from npo_cli.stages.world import load_checkpoint, open_policy, open_task, open_session
from npo_cli.tasks.prompts import Task

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
    allow_code: bool,
) -> Iterator[Progress | Notice | SourceScore]:
    """Probe the learner, ask everybody, charge what can be charged; yields one score a source."""
    if figure is not None:
        validate_figure_format(figure)
    run = open_run(root)
    learner = find_learner(run, at=at, branch=branch, overrides=overrides)
    field = select_candidates(run, learner, candidates=candidates, far=far, sources=sources)
    with lock_run(run):
        task = open_task(learner.recipe, allow_code=allow_code)
        try:
            scores = yield from compare_candidates(run, field, task)
        finally:
            task.close()
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
    wants_base = any(ask.kind == "base" for ask in sources)
    if wants_base and learner.step == 0:
        raise NpoError("the learner at step 0 is the base itself", "leave out --source base, or name a later --at")
    horizon = (near or (far_one,))[-1].step
    others = [ask for ask in sources if ask.kind != "base"]
    return CandidateSet(
        learner=learner,
        near=near,
        far=far_one,
        base=find_checkpoint(run, learner.branch, 0) if wants_base else None,
        sources=tuple(resolve_source_candidates(run, learner, others, num_steps=horizon - learner.step)),
    )


def compare_candidates(run: RunDir, field: CandidateSet, task: Task) -> Generator[Progress | Notice, None, tuple[SourceScore, ...]]:
    """Everybody's samples on the same hard prompts, and what they come to."""
    learner = field.learner
    policy = open_policy(learner.recipe, task, learner.checkpoint)
    # Whoever cannot be used is told before anything is sampled.
    yield from check_sources(field.sources, task, policy)
    for checkpoint in field.checkpoints:
        load_checkpoint(policy, checkpoint)
    ahead = [checkpoint for checkpoint in field.checkpoints if checkpoint.step != learner.step]
    with closing(open_session(run, learner.recipe, task=task, policy=policy)) as world:
        # The key holds who is asked, so another question never finds these samples.
        named = [f"{arm.name} {arm.digest}".rstrip() for arm in field.sources]
        contest = open_scoring_state(world, learner, ahead, sources=["self", *named])
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
        yield Progress(description="compare with the learner", done=done, total=len(numbers), note=field.candidate_name(number))
        arms[number] = build_candidate(contest, field, number, hard=hard)
    yield Progress(description="compare with the learner", done=len(numbers), total=len(numbers))
    knobs, self_arm = scoring_knobs(contest), arms[field.learner.step]
    charged = [arm for arm in arms.values() if arm.ratios]
    found = find_best_per_variance(self_arm, charged, knobs)
    ranked = {score.step: score for score in rank_candidates(self_arm, charged, knobs)}
    # Of an arm alone only the figures that need no V are looked at.
    alone = {arm.step: rank_candidates(self_arm, [arm], knobs)[0] for arm in arms.values() if not arm.ratios}
    scores = tuple(
        build_source_score(contest, field, (ranked | alone)[number], leads=found, with_variance=[arm.step for arm in charged])
        for number in numbers
    )
    on_line = [score for score in ranked.values() if score.step > field.learner.step]
    save_scores(contest.store, on_line, sources=scores)
    return scores


def build_candidate(contest: ScoringState, field: CandidateSet, number: int, *, hard: Sequence[Prompt]) -> CandidateResults:
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
        append_sampling_time(contest.store.folder, time.perf_counter() - started, num_tokens=0)
    # Of equal S the one nearest to the learner is taken.
    distance = OFF_LINE_DISTANCE if number < 0 else abs(number - contest.learner.step)
    return CandidateResults(step=number, distance=distance, pass_counts=tuple(outcomes), ratios=ratios)


def build_source_score(
    contest: ScoringState, field: CandidateSet, score: CheckpointScore, *, leads: Mapping[str, BestCandidate], with_variance: Sequence[int]
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
        pass_at_1=sum(sample.correct for sample in samples) / len(samples) if samples else 0.0,
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
        chosen=score.is_selected,
        unreliable=score.is_unreliable,
        kl_per_token=score.kl_per_token,
        kl_per_sequence=score.kl_per_sequence,
        p_best_by={which: lead.p_best_A[place] for which, lead in leads.items()},
        best_by=tuple(which for which, lead in leads.items() if lead.index == place),
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
    lines = [f"{kind} {score.name} ({score.p_best_by_variance_kind[kind]:.0%})" for score in scores for kind in sorted(score.best_for_variance_kinds)]
    yield Notice(message=f"largest S under each V, with its share of the resamples: {', '.join(lines)}")
