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
from npo_cli.guide.evidence import Arm, PromptOutcome
from npo_cli.guide.signal import Lead, leads, rank_arms
from npo_cli.guide_records import SourceScore
from npo_cli.records import CheckpointScore, Notice, Progress, Prompt
from npo_cli.report.source_figure import refuse_format, sources_figure
from npo_cli.run_dir.checkpoints import Checkpoint, find_checkpoint
from npo_cli.run_dir.lock import writing
from npo_cli.run_dir.paths import RunDir, open_run
from npo_cli.run_dir.scores import save_scores
from npo_cli.run_dir.seconds import add_seconds
from npo_cli.stages.contest import Contest, collect_all
from npo_cli.stages.guide_plan import Ask
from npo_cli.stages.ratios import learner_ratios
from npo_cli.stages.score_checkpoints import contest_knobs, hard_prompts, open_contest
from npo_cli.stages.segment import LearnerAt, find_future, find_learner, futures
from npo_cli.stages.source_arms import SourceArm, collect_source, source_arms, tried
from npo_cli.stages.world import load_checkpoint, open_policy, open_task, open_world
from npo_cli.tasks.prompts import Task

BEYOND = 10**9
"""Steps to a policy that is not of the learner's line, in a tie."""
NOT_FRESH = "recorded while training: not fresh, as many tries as there were visits"
BROUGHT = "brought in a file: not fresh, as many tries as it has rows"
NO_LOGPS = "no V and S: nobody knows the log-probabilities of who wrote it, so its ratio to the learner is not known"
NO_SAMPLES = "no V and S: it has no samples on these prompts"


@dataclass(frozen=True, kw_only=True, slots=True)
class Field:
    """Who is compared, checkpoints of the line first."""

    learner: LearnerAt
    near: tuple[Checkpoint, ...]
    far: Checkpoint | None
    base: Checkpoint | None
    others: tuple[SourceArm, ...]

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """By step; the learner itself is one of them."""
        several = [self.base, self.learner.checkpoint, *self.near, self.far]
        return [checkpoint for checkpoint in several if checkpoint is not None]

    def name(self, number: int) -> str:
        """What an arm is called."""
        for arm in self.others:
            if arm.number == number:
                return arm.name
        return "self" if number == self.learner.step else f"step {number}"

    def kind(self, number: int) -> str:
        """What kind of source an arm is."""
        for arm in self.others:
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
    sources: Sequence[Ask],
    branch: str | None,
    figure: Path | None,
    overrides: Sequence[str],
    allow_code: bool,
) -> Iterator[Progress | Notice | SourceScore]:
    """Probe the learner, ask everybody, charge what can be charged; yields one score a source."""
    if figure is not None:
        refuse_format(figure)
    run = open_run(root)
    learner = find_learner(run, at=at, branch=branch, overrides=overrides)
    field = chosen_field(run, learner, candidates=candidates, far=far, sources=sources)
    with writing(run):
        task = open_task(learner.recipe, allow_code=allow_code)
        try:
            scores = yield from compared(run, field, task)
        finally:
            task.close()
    yield from scores
    yield from maxima(scores)
    if figure is not None:
        sources_figure(scores, figure, title=f"{run.root.resolve().name}: sources for step {learner.step}")
        yield Notice(message=f"the picture is in {figure}")


def chosen_field(
    run: RunDir, learner: LearnerAt, *, candidates: Sequence[int] | None, far: int | None, sources: Sequence[Ask]
) -> Field:
    """The named steps, or every later one but the far one; each source checked as far as it can be unopened."""
    later = futures(run, learner)
    if candidates is not None:
        later = [find_future(run, learner, step) for step in sorted(set(candidates))]
    far_one = None if far is None else find_future(run, learner, far)
    near = tuple(each for each in later if far_one is None or each.step < far_one.step)
    if far_one is not None and any(each.step > far_one.step for each in later) and candidates is not None:
        raise NpoError(f"--far {far} is nearer than a candidate", f"--far {later[-1].step}")
    wants_base = any(ask.source == "base" for ask in sources)
    if wants_base and learner.step == 0:
        raise NpoError("the learner at step 0 is the base itself", "leave out --source base, or name a later --at")
    horizon = (near or (far_one,))[-1].step
    others = [ask for ask in sources if ask.source != "base"]
    return Field(
        learner=learner,
        near=near,
        far=far_one,
        base=find_checkpoint(run, learner.branch, 0) if wants_base else None,
        others=tuple(source_arms(run, learner, others, num_steps=horizon - learner.step)),
    )


def compared(run: RunDir, field: Field, task: Task) -> Generator[Progress | Notice, None, tuple[SourceScore, ...]]:
    """Everybody's samples on the same hard prompts, and what they come to."""
    learner = field.learner
    policy = open_policy(learner.recipe, task, learner.checkpoint)
    # Whoever cannot be used is told before anything is sampled.
    yield from tried(field.others, task, policy)
    for checkpoint in field.checkpoints:
        load_checkpoint(policy, checkpoint)
    ahead = [checkpoint for checkpoint in field.checkpoints if checkpoint.step != learner.step]
    with closing(open_world(run, learner.recipe, task=task, policy=policy)) as world:
        # The key holds who is asked, so another question never finds these samples.
        named = [f"{arm.name} {arm.digest}".rstrip() for arm in field.others]
        contest = open_contest(world, learner, ahead, others=["self", *named])
        horizon = (field.near or ahead)[-1].step
        hard = yield from hard_prompts(contest, count=learner.recipe.scoring.num_prompts, horizon=horizon)
        yield from collect_all(contest, field.checkpoints, hard)
    # The engine is closed: an outside model may need its room.
    for arm in field.others:
        policy.load(learner.checkpoint.path)
        yield from collect_source(contest, arm, hard, task=task)
    scores = yield from weighed(contest, field, hard)
    return scores


def weighed(
    contest: Contest, field: Field, hard: Sequence[Prompt]
) -> Generator[Progress, None, tuple[SourceScore, ...]]:
    """Charge to the learner what can be charged, rank it together; of the others only Q."""
    contest.world.policy.load(field.learner.checkpoint.path)
    numbers = [checkpoint.step for checkpoint in field.checkpoints] + [arm.number for arm in field.others]
    arms = {}
    for done, number in enumerate(numbers):
        yield Progress(what="compare with the learner", done=done, total=len(numbers), note=field.name(number))
        arms[number] = arm_of(contest, field, number, hard=hard)
    yield Progress(what="compare with the learner", done=len(numbers), total=len(numbers))
    knobs, self_arm = contest_knobs(contest), arms[field.learner.step]
    charged = [arm for arm in arms.values() if arm.ratios]
    found = leads(self_arm, charged, knobs)
    ranked = {score.step: score for score in rank_arms(self_arm, charged, knobs)}
    # Of an arm alone only the figures that need no V are looked at.
    alone = {arm.step: rank_arms(self_arm, [arm], knobs)[0] for arm in arms.values() if not arm.ratios}
    scores = tuple(
        source_score(contest, field, (ranked | alone)[number], leads=found, charged=[arm.step for arm in charged])
        for number in numbers
    )
    on_line = [score for score in ranked.values() if score.step > field.learner.step]
    save_scores(contest.scoring, on_line, sources=scores)
    return scores


def arm_of(contest: Contest, field: Field, number: int, *, hard: Sequence[Prompt]) -> Arm:
    """Outcomes prompt by prompt, and the ratios where every sample has log-probabilities.

    What was not asked afresh has as many tries as there are: its quality is whether any of them was right.
    """
    given = number < 0 and not next(arm for arm in field.others if arm.number == number).is_fresh
    outcomes, pairs = [], []
    for prompt in hard:
        samples = contest.samples.get((number, prompt.prompt_id), ())
        num_correct, tries = sum(sample.correct for sample in samples), len(samples)
        if given:
            num_correct, tries = int(num_correct > 0), 1
        outcomes.append(PromptOutcome(prompt_id=prompt.prompt_id, num_samples=tries, num_correct=num_correct))
        pairs += [(prompt, sample) for sample in samples]
    ratios = ()
    if pairs and all(sample.logps is not None for _, sample in pairs):
        started = time.perf_counter()
        ratios = tuple(learner_ratios(contest.world, pairs, cap=contest.settings.weight_cap))
        add_seconds(contest.scoring.folder, time.perf_counter() - started, num_tokens=0)
    # Of equal S the one nearest to the learner is taken.
    distance = BEYOND if number < 0 else abs(number - contest.learner.step)
    return Arm(step=number, distance=distance, outcomes=tuple(outcomes), ratios=ratios)


def source_score(
    contest: Contest, field: Field, score: CheckpointScore, *, leads: Mapping[str, Lead], charged: Sequence[int]
) -> SourceScore:
    """One arm's line, with what must be known of it."""
    kind, samples = field.kind(score.step), samples_of(contest, score.step)
    known = SourceScore(
        name=field.name(score.step),
        kind=kind,
        distance=None if score.step < 0 else score.step - field.learner.step,
        num_prompts=score.num_prompts,
        num_samples=len(samples),
        num_tries=len(samples) / score.num_prompts,
        quality_kind="any of what is given" if kind in ("past", "file") else score.quality_kind,
        quality=score.quality,
        quality_low=score.quality_low,
        quality_high=score.quality_high,
        quality_net=score.quality_net,
        pass_at_1=sum(sample.correct for sample in samples) / len(samples) if samples else 0.0,
        variance_kind=score.variance_kind,
        note="; ".join(filter(None, (_origin_note(kind), _gap_note(score.step in charged, len(samples))))),
    )
    if score.step not in charged:
        return known
    place = list(charged).index(score.step)
    return replace(
        known,
        variance=score.variance,
        variance_low=score.variance_low,
        variance_high=score.variance_high,
        signal=score.signal,
        signal_low=score.signal_low,
        signal_high=score.signal_high,
        p_best=score.p_best,
        chosen=score.chosen,
        unreliable=score.unreliable,
        kl_per_token=score.kl_per_token,
        kl_per_sequence=score.kl_per_sequence,
        p_best_by={which: lead.p_best_A[place] for which, lead in leads.items()},
        best_by=tuple(which for which, lead in leads.items() if lead.place == place),
    )


def samples_of(contest: Contest, number: int) -> list:
    """Every sample of one arm."""
    return [sample for (arm, _), each in contest.samples.items() if arm == number for sample in each]


def _origin_note(kind: str) -> str:
    return {"past": NOT_FRESH, "file": BROUGHT}.get(kind, "")


def _gap_note(is_charged: bool, num_samples: int) -> str:
    if is_charged:
        return ""
    return NO_LOGPS if num_samples else NO_SAMPLES


def maxima(scores: Sequence[SourceScore]) -> Iterator[Notice]:
    """Under each kind of V where the largest S is, with its probability."""
    lines = [f"{kind} {score.name} ({score.p_best_by[kind]:.0%})" for score in scores for kind in sorted(score.best_by)]
    yield Notice(message=f"largest S under each V, with its share of the resamples: {', '.join(lines)}")
