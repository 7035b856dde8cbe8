"""`npo calibrate`: the gain of guide candidates, measured by short replays, beside the scores that should predict it.

For each learner every candidate is scored once and sampled once on the prompts of the replay. Then, per seed, the
learner is trained for a few steps without a guide and with each guide, in memory: no branch, no checkpoint. Replays of
one seed share their sampling seeds and held-out samples, so gains are paired. Interrupted at any time, the same command
repeats at most one replay.
"""

import hashlib
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from npo_cli.config.loading import recipe_to_dict
from npo_cli.config.recipe import Recipe
from npo_cli.errors import NpoError
from npo_cli.experiments.bootstrap import Resampler, SeedStatistics
from npo_cli.experiments.selection_rules import LearnerGains, Rule, evaluate_rules, list_rules
from npo_cli.guides.build_cache import fill_cache, list_guide_prompts, new_cache_info, selection_gate, warning_notices
from npo_cli.guides.candidates import create_candidates
from npo_cli.guides.score import score_candidates
from npo_cli.guides.source import GuideSource, ReplayTarget, create_source, make_spec, open_source, parse_spec
from npo_cli.guides.sources.checkpoint import LineCheckpoint
from npo_cli.losses.importance_ratio import check_ratio_available
from npo_cli.policy.model import Policy
from npo_cli.policy.optimizer import build_optimizer
from npo_cli.report.calibration_plots import plot_calibration
from npo_cli.rollout.batch import ActiveGuide
from npo_cli.scoring.quality import Floats, percentile_interval
from npo_cli.session.learner import Learner, find_learner
from npo_cli.session.session import Session, build_session, count_generated_tokens, open_task_and_policy
from npo_cli.storage.calibrations import SCRATCH_PREFIX, Calibration, Replay, open_calibration
from npo_cli.storage.checkpoints import list_ancestry_checkpoints
from npo_cli.storage.costs import append_cost
from npo_cli.storage.evals import hash_prompt
from npo_cli.storage.guide_cache import (
    cache_info_path,
    finish_guide_cache,
    open_guide_cache,
    read_cache_info,
    read_guide_prompts,
)
from npo_cli.storage.layout import RunDir, open_run
from npo_cli.storage.lock import lock_run
from npo_cli.storage.metrics import StepLog
from npo_cli.storage.rollout_log import RolloutLog
from npo_cli.tasks.task import Task
from npo_cli.training.checkpointing import restore_state
from npo_cli.training.evaluate import sample_heldout
from npo_cli.training.loop import Trainer, open_queue, run_step
from npo_cli.training.train import load_reference_policy
from npo_cli.training.update import Updater
from npo_cli.types.calibration import CandidateGain, RuleResult
from npo_cli.types.guides import GuideCacheInfo, SourceSpec
from npo_cli.types.rollouts import Notice, Progress
from npo_cli.types.scores import CandidateScore

NUM_EVALUATIONS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class LearnerPlan:
    """One learner with its candidates, validated without a model."""

    learner: Learner
    scored: tuple[GuideSource, ...]
    """The candidates as they are scored."""
    guides: tuple[GuideSource, ...]
    """The same, as guides for the replay."""
    num_steps: int

    @property
    def cache_names(self) -> list[str]:
        """Guide cache of each candidate: another SPEC, or another content behind it, has another name."""
        digests = [hashlib.sha256(f"{one.spec.text} {one.fingerprint()}".encode()).hexdigest() for one in self.guides]
        return [f"{one.spec.name}-{digest[:8]}" for one, digest in zip(self.guides, digests, strict=True)]


def calibrate_run(
    root: Path,
    *,
    at: Sequence[int],
    candidates: Sequence[str],
    num_seeds: int,
    num_steps: int,
    branch: str | None,
    overrides: Sequence[str],
    figure: Path | None = None,
) -> Iterator[Progress | Notice | CandidateGain | RuleResult]:
    """Yields the candidates of each learner, then the rules. Candidates are SPECs, or `+D` for D steps ahead."""
    run = open_run(root)
    learners = [find_calibrated_learner(run, step, num_steps, branch=branch, overrides=overrides) for step in at]
    measured = []
    with lock_run(run):
        available = yield from resolve_candidates(run, learners, candidates)
        plans = [plan_learner(run, *pair, num_steps=num_steps) for pair in zip(learners, available, strict=True)]
        for plan in plans:
            gains = yield from measure_learner(run, plan, num_seeds=num_seeds)
            yield from gains.candidates
            measured.append(gains)
    candidates = [one for gains in measured for one in gains.candidates]
    results = evaluate_rules(measured, list_learner_rules(plans[0].learner, candidates))
    yield from results
    if figure is not None:
        plot_calibration(
            candidates,
            results,
            figure,
            title=f"{run.root.resolve().name}: gain of {num_steps} steps against each score, rank correlations",
        )
        yield Notice(message=f"figure: {figure}")


def find_calibrated_learner(
    run: RunDir, step: int, num_steps: int, *, branch: str | None, overrides: Sequence[str]
) -> Learner:
    """The learner with its recipe for replays of `num_steps` steps; a learner that cannot be replayed is refused."""
    learner = find_learner(run, at=step, branch=branch, overrides=overrides)
    recipe = learner.recipe
    if learner.checkpoint.tier != "full":
        full = [found.step for found in list_ancestry_checkpoints(run, learner.branch) if found.tier == "full"]
        raise NpoError(
            f"step {step} of {learner.branch} has weights only: a replay cannot start from it",
            f"choose --at among {', '.join(map(str, full)) or 'none'} (train.keep_full_checkpoints keeps more of them)",
        )
    if recipe.guide.experience.replay_fraction:
        raise NpoError(
            "guide.experience.replay_fraction replays the run's own successes, in the slots that a guide needs",
            "calibrate a run without experience replay",
        )
    replay = recipe.guide.replay.model_copy(update={"num_steps": num_steps})
    changes = {
        "guide": recipe.guide.model_copy(update={"replay": replay}),
        "scoring": recipe.scoring.model_copy(update={"budget": None}),
    }
    return replace(learner, recipe=recipe.model_copy(update=changes))


def resolve_candidates(
    run: RunDir, learners: Sequence[Learner], candidates: Sequence[str]
) -> Generator[Notice, None, list[list[SourceSpec]]]:
    """The candidates of each learner. One that only some learners have is left out at the others, with a warning.

    Raises NpoError for a candidate that no learner has, and for a learner without any.
    """
    available: list[list[SourceSpec]] = [[] for _ in learners]
    for text in dict.fromkeys(candidates):
        errors = []
        for learner, specs in zip(learners, available, strict=True):
            try:
                spec = parse_candidate(text, learner)
                yield from check_candidate(*create_candidates(run, learner, [spec]))
                specs.append(spec)
            except NpoError as error:
                errors.append((learner, error))
        if len(errors) == len(learners):
            raise errors[0][1]
        for learner, error in errors:
            message = f"step {learner.step}: candidate {text} is left out: {error.message}"
            yield Notice(message=message, level="warning")
    for learner, specs in zip(learners, available, strict=True):
        if not specs:
            raise NpoError(f"the learner at step {learner.step} has no candidate", "add --candidates self")
    return available


def check_candidate(source: GuideSource) -> Iterator[Notice]:
    """Refuse a candidate that cannot be sampled; checkpoints of the line are checked before they are scored."""
    learner = source.target.learner
    if source.has_logprobs is False:
        check_guide_ratio(learner.recipe, source.spec.text, has_logprobs=False)
    if not isinstance(source, LineCheckpoint):
        with open_task_and_policy(learner.recipe, learner.checkpoint, run=source.target.run) as (task, policy):
            yield from warning_notices(source.check(task, policy))


def parse_candidate(text: str, learner: Learner) -> SourceSpec:
    """A SPEC, or `+D` for the checkpoint D steps ahead of the learner."""
    ahead = text.removeprefix("+")
    if ahead == text:
        return parse_spec(text)
    if not (ahead.isdecimal() and ahead.isascii() and 0 < len(ahead) < 18 and int(ahead)):
        raise NpoError(f"candidate {text!r} is no distance ahead of the learner", "use +20 for 20 steps ahead")
    return make_spec("checkpoint", {"step": learner.step + int(ahead)})


def plan_learner(run: RunDir, learner: Learner, specs: Sequence[SourceSpec], *, num_steps: int) -> LearnerPlan:
    """Each candidate as it is scored, and as a guide for the replay."""
    scored = create_candidates(run, learner, specs)
    target = ReplayTarget(run=run, learner=learner, steps=num_steps)
    guides = tuple(create_source(one.spec, target) for one in scored)
    return LearnerPlan(learner=learner, scored=tuple(scored), guides=guides, num_steps=num_steps)


def check_guide_ratio(recipe: Recipe, candidate: str, *, has_logprobs: bool) -> None:
    """Refuse an importance ratio that needs log-probabilities of a candidate without any."""
    check_ratio_available(recipe.guide.inject.ratio, has_logprobs=has_logprobs, guide=f"candidate {candidate!r}")


# One learner


def measure_learner(
    run: RunDir, plan: LearnerPlan, *, num_seeds: int
) -> Generator[Progress | Notice, None, LearnerGains]:
    """Score, sample and replay all candidates of a learner."""
    learner = plan.learner
    with open_task_and_policy(learner.recipe, learner.checkpoint, run=run) as (task, policy):
        # Scores, guides and replays each have their own engine: an external model may need its memory.
        calibration = open_calibration(run, learner.branch, learner.step, settings=describe_replays(plan))
        *scores, _no_guide = yield from score_candidates(
            run,
            learner,
            plan.scored,
            task=task,
            policy=policy,
            folder=calibration.artifacts.scores_folder,
            cost_kind="calibration",
        )
        infos = yield from build_guide_caches(plan, calibration, task=task, policy=policy)
        replays = yield from run_replays(run, plan, calibration, task=task, policy=policy, num_seeds=num_seeds)
    return measure_gains(plan, scores, infos, replays, num_seeds=num_seeds)


def describe_replays(plan: LearnerPlan) -> dict[str, object]:
    """What decides a replay besides its guide and seed."""
    recipe = recipe_to_dict(plan.learner.recipe)
    return {
        "num_steps": plan.num_steps,
        "recipe": {name: section for name, section in recipe.items() if name not in ("scoring", "autonpo")},
    }


def build_guide_caches(
    plan: LearnerPlan, calibration: Calibration, *, task: Task, policy: Policy
) -> Generator[Progress | Notice, None, list[GuideCacheInfo]]:
    """The guide cache of each candidate, sampled as by `npo sample-guide --steps`."""
    home, learner, infos = calibration.artifacts, plan.learner, []
    for source, name in zip(plan.guides, plan.cache_names, strict=True):
        folder = home.guide_folder(name)
        if not (cache_info_path(folder).exists() and read_cache_info(folder).complete):
            yield Notice(message=f"step {learner.step}: sample guide {source.spec.text}")
            policy.load(learner.checkpoint.path)
            with open_source(source, task=task, policy=policy):
                prompts, gate = list_guide_prompts(source), selection_gate(source)
                info = new_cache_info(source, name, num_prompts=len(prompts), max_accuracy=gate)
                yield from fill_cache(source, info, open_guide_cache(home, info), prompts, cost_kind="calibration")
                yield from warning_notices(source.warnings())
                finish_guide_cache(home, info, is_external=source.is_external)
        infos.append(read_cache_info(folder))
        check_guide_ratio(learner.recipe, source.spec.text, has_logprobs=infos[-1].has_logps)
    return infos


def run_replays(
    run: RunDir, plan: LearnerPlan, calibration: Calibration, *, task: Task, policy: Policy, num_seeds: int
) -> Generator[Progress, None, Mapping[tuple[str | None, int], Replay]]:
    """Every replay that is not recorded yet: seed by seed without a guide, then with each."""
    learner, recipe = plan.learner, plan.learner.recipe
    labels: dict[str | None, str] = {None: "no guide"}
    labels |= {name: one.spec.text for name, one in zip(plan.cache_names, plan.guides, strict=True)}
    wanted = [(guide, seed) for seed in range(num_seeds) for guide in labels]
    todo = [key for key in wanted if key not in calibration.read_replays()]
    if todo:
        calibration.delete_scratch()
        policy.load(learner.checkpoint.path)
        with closing(build_session(run, recipe, task=task, policy=policy)) as session:
            reference = load_reference_policy(session) if recipe.loss.kl_coef > 0 else None
            for done, (guide, seed) in enumerate(todo, start=len(wanted) - len(todo)):
                yield Progress(
                    description=f"replays of step {learner.step}",
                    done=done,
                    total=len(wanted),
                    note=f"{labels[guide]}, seed {seed}",
                )
                calibration.append(run_replay(session, plan, calibration, reference, guide=guide, seed=seed))
    yield Progress(description=f"replays of step {learner.step}", done=len(wanted), total=len(wanted))
    return calibration.read_replays()


def run_replay(
    session: Session,
    plan: LearnerPlan,
    calibration: Calibration,
    reference: Policy | None,
    *,
    guide: str | None,
    seed: int,
) -> Replay:
    """Train from the learner for `num_steps` steps and sample the held-out prompts after each quarter of them.

    Weights, optimizer, random streams and data order are the learner's; the sampling seeds depend on `seed` alone, and
    those of held-out samples on neither. Logs go to a hidden folder that is deleted.
    """
    learner, recipe, started = plan.learner, plan.learner.recipe, time.perf_counter()
    last, every = learner.step + plan.num_steps, plan.num_steps // NUM_EVALUATIONS
    num_tokens = num_forwards = num_injected = num_eval_tokens = 0
    counts, eval_steps = [], range(learner.step + every, last + 1, every)
    active = None
    if guide is not None:
        prompts = read_guide_prompts(calibration.artifacts.guide_folder(guide))
        rollouts = {prompt_id: samples.rollouts for prompt_id, samples in prompts.items() if samples.rollouts}
        active = ActiveGuide(rollouts=rollouts, until_step=last, start_step=learner.step)
    session.policy.load(learner.checkpoint.path)
    optimizer = build_optimizer(session.policy.model, recipe.train)
    state = restore_state(session, optimizer, learner.checkpoint)
    with tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX, dir=calibration.folder) as scratch:
        logs = RunDir(Path(scratch))
        logs.branch_folder(learner.branch).mkdir(parents=True)
        trainer = Trainer(
            session=session,
            optimizer=optimizer,
            steps=StepLog(logs, learner.branch, updates_per_step=recipe.train.num_updates),
            rollouts=RolloutLog(logs.rollouts_path(learner.branch)),
            branch=learner.branch,
            seed_name=f"calibration-{seed}",
            fork_step=learner.step,
            active_guide=active,
            reference=reference,
        )
        updater = Updater(session.policy, optimizer, recipe, reference=reference)
        with open_queue(trainer, state, last_step=last) as queue:
            while state.step < last:
                state, report, _ = run_step(trainer, updater, state, queue)
                num_tokens += int(report.metrics["tokens"])
                num_forwards += int(report.metrics.get("forwards", report.metrics["tokens"]))
                num_injected += int(report.metrics.get("inject/slots", 0))
                if state.step in eval_steps:
                    groups = sample_heldout(session, step=state.step)
                    num_eval_tokens += count_generated_tokens(groups)
                    counts.append(tuple(group.num_correct for group in groups))
    append_cost(
        session.run,
        "calibration",
        branch=learner.branch,
        step=learner.step,
        artifact=calibration.folder,
        piece=f"{guide or 'no guide'} seed {seed}",
        updates=plan.num_steps * recipe.train.num_updates,
        tokens=num_tokens + num_eval_tokens,
        forwards=num_forwards + num_eval_tokens,
        seconds=time.perf_counter() - started,
    )
    return Replay(
        guide=guide,
        seed=seed,
        eval_steps=tuple(eval_steps),
        prompt_keys=tuple(map(hash_prompt, session.task.heldout)),
        num_samples=recipe.eval.samples_per_prompt,
        num_correct=tuple(counts),
        num_tokens=num_tokens,
        num_injected=num_injected,
    )


# Gains


def measure_gains(
    plan: LearnerPlan,
    scores: Sequence[CandidateScore],
    infos: Sequence[GuideCacheInfo],
    replays: Mapping[tuple[str | None, int], Replay],
    *,
    num_seeds: int,
) -> LearnerGains:
    """The paired gain of each candidate with its interval, beside its score and price."""
    seeds, learner = range(num_seeds), plan.learner
    unguided = [replays[None, seed] for seed in seeds]
    guided = [[replays[name, seed] for seed in seeds] for name in plan.cache_names]
    gains_BA = resample_gains(guided, unguided)
    tokens_per_step = sum(one.num_tokens for one in unguided) / (num_seeds * plan.num_steps)
    candidates = []
    for a, (source, score, info, own) in enumerate(zip(plan.guides, scores, infos, guided, strict=True)):
        assert source.spec.text == score.candidate == info.source.text
        thrown_away = max(0, (source.guide_step or 0) - learner.step) if isinstance(source, LineCheckpoint) else 0
        low, high = percentile_interval(gains_BA[:, a])
        variances = {} if score.variance is None else {**score.variances, score.variance_kind: score.variance}
        candidates.append(
            CandidateGain(
                branch=learner.branch,
                learner_step=learner.step,
                candidate=score.candidate,
                distance=score.distance,
                gain=float(gains_BA[0, a]),
                gain_low=low,
                gain_high=high,
                gains_by_seed=tuple(
                    mean_accuracy(mine) - mean_accuracy(theirs) for mine, theirs in zip(own, unguided, strict=True)
                ),
                accuracy=float(np.mean([mean_accuracy(one) for one in own])),
                accuracy_unguided=float(np.mean([mean_accuracy(one) for one in unguided])),
                num_heldout=len(own[0].prompt_keys),
                quality=score.quality,
                quality_self=score.quality_self,
                quality_net=score.quality_net,
                num_failed=score.num_prompts,
                variances=variances,
                num_prompts=info.num_prompts,
                num_solved=info.num_prompts_with_rollouts,
                injected_per_step=sum(one.num_injected for one in own) / (num_seeds * plan.num_steps),
                steps_thrown_away=thrown_away,
                guide_tokens=info.num_tokens,
                price=thrown_away + info.num_tokens / tokens_per_step,
            )
        )
    rules = list_learner_rules(learner, candidates)
    named = (replace(one, scores={rule.name: rule.score(one) for rule in rules}) for one in candidates)
    return LearnerGains(candidates=tuple(named), gains_BA=gains_BA)


def list_learner_rules(learner: Learner, candidates: Sequence[CandidateGain]) -> list[Rule]:
    """The rules with every kind of V that any candidate has, and the recipe's exponent of V."""
    kinds = sorted({kind for one in candidates for kind in one.variances})
    return list_rules(kinds, variance_exponent=learner.recipe.scoring.variance_exponent)


def resample_gains(guided: Sequence[Sequence[Replay]], unguided: Sequence[Replay]) -> Floats:
    """gains_BA: mean over seeds of the paired gain; seeds and held-out prompts resampled jointly for all candidates.

    Row 0 is the data as they are.
    """
    resampler = Resampler()
    per_seed = []
    for seed, baseline in enumerate(unguided):
        gains_PA = np.stack([prompt_accuracies(own[seed]) - prompt_accuracies(baseline) for own in guided], axis=1)
        statistics = SeedStatistics(seed=seed, prompts=baseline.prompt_keys, values_PF=gains_PA)
        per_seed.append(resampler.prompt_means(statistics))
    weights_BS = resampler.seed_weights(range(len(unguided)))
    return np.einsum("bs,bsa->ba", weights_BS, np.stack(per_seed, axis=1))


def prompt_accuracies(replay: Replay) -> Floats:
    """Share of correct samples of each held-out prompt, mean over the evaluations."""
    return np.mean(replay.num_correct, axis=0) / replay.num_samples


def mean_accuracy(replay: Replay) -> float:
    """Mean over held-out prompts and evaluations."""
    return float(prompt_accuracies(replay).mean())
