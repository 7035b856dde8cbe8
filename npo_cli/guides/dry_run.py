"""`npo sample-guide --dry-run` and `npo score-checkpoints --dry-run`: what would be sampled, and what it would cost."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from npo_cli.guides.build_cache import new_cache_info, require_guide_prompts, selection_gate
from npo_cli.guides.candidates import choose_source, find_candidates, find_horizon, plan_rounds
from npo_cli.guides.collect_samples import CONTROL, SCREENING, describe_sampling
from npo_cli.guides.source import open_source
from npo_cli.guides.sources.checkpoint import CheckpointSource, LineCheckpoint
from npo_cli.session.dry_run import dry_session, plan_samples, recorded_length
from npo_cli.session.learner import list_replay_prompts
from npo_cli.session.session import open_task_and_policy
from npo_cli.storage.guide_cache import check_guide_cache, read_guide_prompts
from npo_cli.storage.layout import open_run
from npo_cli.storage.lock import hold_unchanged
from npo_cli.types.guides import SourceSpec
from npo_cli.types.rollouts import Notice
from npo_cli.types.views import PlannedWork


def plan_guide_cache(
    root: Path,
    *,
    spec: SourceSpec | None,
    at: int | None,
    name: str | None = None,
    branch: str | None = None,
    steps: int | None = None,
    overrides: Sequence[str] = (),
) -> Iterator[PlannedWork | Notice]:
    """The prompts and at most so many samples of a guide cache, after the checks of `build_guide_cache`."""
    run = open_run(root)
    source, name = choose_source(run, spec=spec, at=at, name=name, branch=branch, steps=steps, overrides=overrides)
    learner = source.target.learner
    with (
        hold_unchanged(run),
        open_task_and_policy(source.session_recipe(), learner.checkpoint) as (task, policy),
        open_source(source, task=task, policy=policy),
    ):
        cache, is_lazy = learner.recipe.guide.cache, learner.recipe.guide.cache.lazy
        prompts = [] if is_lazy else require_guide_prompts(source)
        if isinstance(source, CheckpointSource) and prompts:
            source.reuse_recorded(prompts)
        gate = None if is_lazy else selection_gate(source)
        info = new_cache_info(source, name, num_prompts=len(prompts), max_accuracy=gate, is_lazy=is_lazy)
        done = read_guide_prompts(run.guide_folder(name)) if check_guide_cache(run, info) else {}
        yield Notice(message=f"guide source: {source.spec.text}; guide cache: {name}")
        steps_covered = f"{learner.step + 1}-{learner.step + source.num_steps}"
        if is_lazy:
            yield PlannedWork(work="sample the guide while training (guide.cache.lazy)", steps=steps_covered, samples=0)
            return
        left = [prompt for prompt in prompts if prompt.prompt_id not in done]
        yield plan_samples(
            f"sample {source.spec.text}" if source.is_fresh else f"read {source.spec.text}",
            num_prompts=len(left),
            samples_per_prompt=cache.samples_per_prompt if source.is_fresh else 0,
            recipe=learner.recipe,
            mean_length=recorded_length(run, learner.branch),
            steps=steps_covered,
        )


def plan_scoring(
    root: Path, *, at: int | None, sources: Sequence[SourceSpec] | None, branch: str | None, overrides: Sequence[str]
) -> Iterator[PlannedWork | Notice]:
    """At most so many samples of the learner and of each candidate, after the checks of `score_run`.

    How many prompts the learner fails is only known once it is sampled.
    """
    run = open_run(root)
    learner, candidates = find_candidates(run, at=at, sources=sources, branch=branch, overrides=overrides)
    recipe = learner.recipe
    horizon, rounds = find_horizon(candidates, learner), plan_rounds(candidates, recipe)
    with hold_unchanged(run), open_task_and_policy(recipe, learner.checkpoint) as (task, policy):
        for source in candidates:
            if not isinstance(source, LineCheckpoint):
                source.check(task, policy)
        with dry_session(run, recipe, task, policy) as session:
            ahead = list_replay_prompts(session, learner, horizon - learner.step)
        count, k = len(ahead[: recipe.scoring.num_prompts]), recipe.scoring.samples_per_prompt
        length, steps = recorded_length(run, learner.branch), f"{learner.step + 1}-{horizon}"
        per_candidate = count
        if rounds is not None:
            per_candidate = min(count, sum(entry.prompts_per_candidate for entry in rounds))
        for work, prompts in (
            (describe_sampling(SCREENING), count),
            (describe_sampling(CONTROL), count),
            *((f"sample {source.spec.text}", per_candidate if source.is_fresh else 0) for source in candidates),
        ):
            yield plan_samples(
                work, num_prompts=prompts, samples_per_prompt=k, recipe=recipe, mean_length=length, steps=steps
            )
