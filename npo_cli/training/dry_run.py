"""--dry-run of `npo train`, `npo resume` and `npo replay`: what would be trained, and what it would cost."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from npo_cli.config.recipe import Recipe
from npo_cli.guides.candidates import find_candidates
from npo_cli.guides.dense_target import open_teacher
from npo_cli.guides.dry_run import plan_guide_cache, plan_scoring
from npo_cli.guides.privileged import check_privileged_text
from npo_cli.rollout.batch import check_sft_guide
from npo_cli.session.dry_run import open_dry_session, plan_continuations, plan_steps
from npo_cli.session.session import open_policy, open_task
from npo_cli.storage.layout import RunDir, check_unused, open_run
from npo_cli.storage.lineage import find_first_segment, list_branches
from npo_cli.storage.lock import hold_unchanged
from npo_cli.training.disk import check_disk_space, plan_disk
from npo_cli.training.replay import check_replay_branch, find_replay_guide, is_trained
from npo_cli.training.resume import open_active_guide
from npo_cli.training.scout_start import choose_scout
from npo_cli.training.start_point import choose_start
from npo_cli.training.train import MAIN, settle_recipe
from npo_cli.types.guides import ReplayRequest, ScoutRequest
from npo_cli.types.rollouts import Notice
from npo_cli.types.views import PlannedWork


def plan_training(
    root: Path, recipe: Recipe, *, until: int | None, check: Callable[[Recipe, int], None] | None = None
) -> Iterator[PlannedWork | Notice]:
    """The steps, evaluations and disk space of a new run; `check` as in `create_session`."""
    check_unused(root)
    recipe = settle_recipe(recipe)
    last = until or recipe.train.num_steps
    with closing(open_task(recipe)) as task:
        if check is not None:
            check(recipe, len(task.train))
        policy = open_policy(recipe, task, None)
        check_disk_space(root, recipe, policy, last_step=last)
        check_privileged_text(recipe, policy, task.train)
        check_sft_guide(recipe, None, last_step=recipe.train.num_steps)
        open_teacher(RunDir(root), recipe, policy, parent=None, fork_step=0)
        yield from plan_steps(recipe, task, branch=MAIN, first=1, last=last)
        yield from plan_disk(root, recipe, policy, last_step=last)


def plan_resume(
    root: Path,
    *,
    overrides: Sequence[str],
    at: int | None,
    guide: str | None,
    source_branch: str | None,
    new_branch: str | None,
    steps: int | None,
    until: int | None = None,
    fresh: bool = False,
    merge: str | None = None,
) -> Iterator[PlannedWork | Notice]:
    """The steps that would be trained, after the checks of `resume_run`."""
    run = open_run(root)
    with hold_unchanged(run):
        start = choose_start(
            run,
            overrides=overrides,
            at=at,
            guide=guide,
            source_branch=source_branch,
            new_branch=new_branch,
            steps=steps,
            until=until,
            fresh=fresh,
            merge=merge,
        )
        with (
            open_dry_session(run, start.recipe, checkpoint=start.loaded) as session,
            open_active_guide(session, start.segment) as guidance,
        ):
            origin = start.segment if start.is_new else find_first_segment(run, start.branch)
            check_privileged_text(start.recipe, session.policy, session.task.train, guide=guidance)
            check_sft_guide(start.recipe, guidance, last_step=until or start.recipe.train.num_steps)
            first = 1 if start.checkpoint is None else start.checkpoint.step + 1
            place = {"parent": origin.parent, "fork_step": origin.fork_step, "step": first - 1}
            open_teacher(run, start.recipe, session.policy, **place)
            if start.is_new:
                yield Notice(message=f"new branch: {start.branch}")
            last, before = until or start.recipe.train.num_steps, start.segment.parent if start.is_new else start.branch
            yield from plan_steps(
                start.recipe,
                session.task,
                branch=start.branch,
                first=first,
                last=last,
                fork_step=origin.fork_step,
                recorded=(run, before or start.branch),
            )
            if guidance is not None:
                name, end = start.segment.guide_cache, min(last, guidance.until_step)
                steps, prompts = f"{first}-{end}", len(guidance.rollouts)
                if start.recipe.guide.inject.prefix.fraction:
                    work = f"continue guide {name}"
                    continued = plan_continuations(work, start.recipe, num_steps=end - first + 1, steps=steps)
                    yield replace(continued, prompts=prompts)
                else:
                    yield PlannedWork(work=f"inject guide {name}", steps=steps, prompts=prompts)
            yield from plan_disk(root, start.recipe, session.policy, first_step=first, last_step=last)


def plan_scout(root: Path, scout: ScoutRequest) -> Iterator[PlannedWork | Notice]:
    """The steps of a scout, at most, after the checks of `scout_run`."""
    run = open_run(root)
    with hold_unchanged(run):
        start = choose_scout(run, scout)
        if start is None:
            yield Notice(message=f"scout {scout.name} is trained already")
            return
        assert start.checkpoint is not None, "a scout is forked"
        with open_dry_session(run, start.recipe, checkpoint=start.loaded) as session:
            first, last = start.checkpoint.step + 1, start.recipe.train.num_steps
            yield from plan_steps(start.recipe, session.task, branch=scout.name, first=first, last=last)
            yield from plan_disk(root, start.recipe, session.policy, first_step=first, last_step=last)


def plan_replay(root: Path, replay: ReplayRequest) -> Iterator[PlannedWork | Notice]:
    """The stages of `npo replay` that are left. Before the scoring the guide is not known: the candidate with the most
    steps ahead stands for it."""
    run, name = open_run(root), replay.name
    training = {"overrides": replay.overrides, "steps": None, "until": replay.until}
    if name in list_branches(run):
        check_replay_branch(run, replay)
        if is_trained(run, name, replay.overrides):
            yield Notice(message=f"branch {name} is trained already")
            return
        yield from plan_resume(root, **training, at=None, guide=None, source_branch=name, new_branch=None)
        return
    guide = find_replay_guide(run, replay)
    learner = {"at": replay.at, "branch": replay.branch, "overrides": replay.overrides}
    if guide is None:
        yield from plan_scoring(root, **learner, sources=replay.sources)
        _, candidates = find_candidates(run, **learner, sources=replay.sources)
        spec = max(candidates, key=lambda source: source.num_steps).spec
        for work in plan_guide_cache(root, **learner, spec=spec, name=name, steps=replay.steps):
            yield replace(work, work="sample the chosen guide") if isinstance(work, PlannedWork) else work
    elif not guide.complete:
        yield from plan_guide_cache(root, **learner, spec=guide.source, name=name, steps=replay.steps)
    done = name if guide is not None and guide.complete else None
    yield from plan_resume(root, **training, at=replay.at, guide=done, source_branch=replay.branch, new_branch=name)
