"""Where training continues or forks, and whether the options fit: what `npo resume` finds out without a model."""

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from npo_cli.config.loading import override_saved_recipe, replace_values
from npo_cli.config.recipe import Recipe
from npo_cli.errors import NpoError, quote_path
from npo_cli.guides.sources.extrapolated import find_older_checkpoint
from npo_cli.guides.teacher import settle_teacher
from npo_cli.storage.checkpoints import (
    Checkpoint,
    check_newer_checkpoints,
    find_checkpoint,
    find_resume_checkpoint,
    list_ancestry_checkpoints,
)
from npo_cli.storage.guide_cache import format_source_option, load_guide
from npo_cli.storage.interrupted import find_resume_target
from npo_cli.storage.layout import RunDir
from npo_cli.storage.lineage import (
    check_branch,
    find_first_segment,
    find_free_branch_name,
    find_main_branch,
    read_segments,
    refuse_scout,
)
from npo_cli.storage.scouts import check_not_dropped, find_last_full_step, place_base
from npo_cli.types.guides import GuideCacheInfo
from npo_cli.types.rollouts import Segment


@dataclass(frozen=True, kw_only=True, slots=True)
class ResumePoint:
    """Where training continues."""

    recipe: Recipe
    branch: str
    checkpoint: Checkpoint | None
    """None if the run was killed before its first checkpoint: it starts from the base model."""
    segment: Segment
    is_new: bool
    """The branch does not exist yet."""
    has_fresh_optimizer: bool = False
    """Only weights are loaded from the checkpoint; the optimizer state is new."""

    @property
    def is_merge_due(self) -> bool:
        """The branch has a merged start, which was not saved yet."""
        return bool(self.segment.merged_checkpoints) and (
            self.checkpoint is not None and self.checkpoint.branch != self.branch
        )

    @property
    def begins_adapters(self) -> bool:
        """A scout that begins to train adapters of its own: the checkpoint is the frozen model under them."""
        with_adapters = self.recipe.model.lora.rank is not None and self.checkpoint is not None
        return (
            with_adapters and self.segment.is_scout and self.recipe.model.path == str(self.checkpoint.path.absolute())
        )

    @property
    def loaded(self) -> Checkpoint | None:
        """The checkpoint whose weights are loaded into the recipe's model; None: the model as it is."""
        return None if self.begins_adapters else self.checkpoint


def choose_start(
    run: RunDir,
    *,
    overrides: Sequence[str],
    at: int | None,
    guide: str | None,
    source_branch: str | None,
    new_branch: str | None,
    steps: int | None,
    until: int | None,
    fresh: bool,
    merge: str | None = None,
) -> ResumePoint:
    """Where training continues or forks; refused if no step is left, or if an option does not fit."""
    replay = {"--guide": guide, "--new-branch": new_branch, "--steps": steps, "--merge": merge}
    again = format_command(run.root, **{"--branch": source_branch, "--at": at}, **replay)
    if at is None:
        check_replay_options(again, **replay)
        start = find_resume_point(run, source_branch, overrides)
    else:
        if merge is not None and (guide is not None or fresh):
            option = "--guide" if guide is not None else "--fresh-optimizer"
            raise NpoError(
                f"--merge is not available with {option}",
                f"merge first: {format_command(run.root, **{'--branch': source_branch, '--at': at, '--merge': merge})} "
                f"--no-guide --until {at + 1}",
            )
        start = fork(
            run,
            source_branch,
            at,
            overrides=overrides,
            guide=guide,
            new_branch=new_branch,
            steps=steps,
            merge=merge,
        )
        start = replace(start, has_fresh_optimizer=fresh)
    check_steps_left(run, start, command=again, until=until)
    return start


def format_command(root: Path, **options: str | int | None) -> str:
    """The command as typed, as the start of a hint."""
    given = [f"{name} {shlex.quote(str(value))}" for name, value in options.items() if value is not None]
    return " ".join(["npo resume", quote_path(root), *given])


def check_replay_options(again: str, **options: str | int | None) -> None:
    """`--guide`, `--new-branch`, `--steps` and `--merge` describe a fork, which needs `--at`."""
    for name, value in options.items():
        if value is not None:
            raise NpoError(f"{name} needs --at STEP", f"{again} --at STEP")


def check_steps_left(run: RunDir, start: ResumePoint, *, command: str, until: int | None = None) -> None:
    """Refuse to resume a run that has done all its steps."""
    train, done = start.recipe.train, start.checkpoint.step if start.checkpoint else 0
    if start.is_new and start.segment.guide_cache is None and start.recipe.guide.source == "cache":
        command = f"{command} --no-guide"
    if until is not None and done >= until:
        raise NpoError(
            f"the run is at step {done} already: --until {until} is not later", f"{command} --until {done + 1}"
        )
    if done < train.num_steps:
        return
    more = f"train.num_steps={2 * done}"
    if train.schedule != "constant" and not start.is_new:
        command = f"{command} --at {done} --no-guide"  # the completed steps depend on train.num_steps
    raise NpoError(f"the run has completed step {done} of {train.num_steps}", f"{command} {more}")


def find_resume_point(run: RunDir, branch: str | None, overrides: Sequence[str]) -> ResumePoint:
    """The newest full checkpoint of a branch (None: see `find_resume_target`). Only settings that may change on resume
    may be in `overrides`."""
    branch = branch or find_resume_target(run).branch
    recipe = override_saved_recipe(run.read_recipe(branch), overrides, path=run.recipe_path(branch), purpose="resume")
    first = find_first_segment(run, branch)
    if first.is_scout:
        check_not_dropped(run, branch)
        recipe = place_base(run, recipe, first)
    known = list_ancestry_checkpoints(run, branch)
    if not known:
        check_newer_checkpoints(run, branch, -1)
    if first.is_scout and find_last_full_step(run, branch) < 0:
        # It needs no training state at its fork.
        check_newer_checkpoints(run, branch, first.fork_step)
        checkpoint: Checkpoint | None = find_checkpoint(run, branch, first.fork_step)
    else:
        checkpoint = find_resume_checkpoint(run, branch) if known else None
    segment = [entry for entry in read_segments(run) if entry.branch == branch][-1]
    start = ResumePoint(recipe=recipe, branch=branch, checkpoint=checkpoint, segment=segment, is_new=False)
    return begin_scout(start) if first.is_scout else start


def begin_scout(start: ResumePoint) -> ResumePoint:
    """The start of a scout: with a new optimizer where the checkpoint has no training state for it."""
    assert start.checkpoint is not None, "a scout is forked"
    return replace(start, has_fresh_optimizer=start.begins_adapters or start.checkpoint.tier == "weights")


def fork(
    run: RunDir,
    parent: str | None,
    at: int,
    *,
    overrides: Sequence[str],
    guide: str | None,
    new_branch: str | None,
    steps: int | None,
    merge: str | None = None,
    undo: Mapping[str, Any] = MappingProxyType({}),
) -> ResumePoint:
    """A new branch at step `at`; the guide is used for the steps it was sampled for, or for `steps`. `merge`: SPEC of
    its merged start. `undo`: settings of the parent, by dotted key, that the branch does not inherit."""
    info = None if guide is None else load_guide(run, guide)[0]
    if info is None and steps is not None:
        raise NpoError("--steps needs --guide NAME", "add --guide NAME")
    parent = parent or (info.branch if info else find_main_branch(run))
    refuse_scout(run, parent, "no branch is forked from")
    checkpoint = find_checkpoint(run, parent, at)
    saved = replace_values(run.read_recipe(parent), undo)
    recipe = override_saved_recipe(saved, overrides, path=run.recipe_path(parent), purpose="fork")
    if info:
        check_guide(run, info, parent=parent, at=at)
    if recipe.guide.source == "extrapolated":
        # A missing older checkpoint is reported before a branch is created.
        find_older_checkpoint(run, parent, k=recipe.extrapolation.k, step=at, every=recipe.train.save_every)
    until = at + (steps or info.num_steps) if info else None
    branch = find_free_branch_name(
        run, guide or f"{parent}-from-{at}" if new_branch is None else new_branch, exact=new_branch is not None
    )
    recipe, teacher = settle_teacher(run, recipe, parent=parent, fork_step=at)
    segment = Segment(branch=branch, parent=parent, fork_step=at, guide_cache=guide, guide_until=until, teacher=teacher)
    if merge is not None:
        segment = add_merge(run, segment, merge, recipe)
    return ResumePoint(recipe=recipe, branch=branch, checkpoint=checkpoint, segment=segment, is_new=True)


MERGE_SPEC = re.compile(r"(?P<plus>[^,:]+:\d+)(,minus=(?P<minus>[^,:]+:\d+))?,weight=(?P<weight>[^,]+)", re.ASCII)
MERGE_FORM = "BRANCH:STEP[,minus=BRANCH:STEP],weight=W"


def add_merge(run: RunDir, segment: Segment, spec: str, recipe: Recipe) -> Segment:
    """The segment with the merged start that a SPEC describes: theta + W (theta_plus - theta_minus), theta_minus being
    the checkpoint that is forked where it is not named. Refused without these checkpoints, and for adapters."""
    found = MERGE_SPEC.fullmatch(spec)
    try:
        weight = float(found["weight"]) if found else 0.0
    except ValueError:
        weight = 0.0
    if found is None or not math.isfinite(weight) or not weight:
        raise NpoError(f"--merge {spec} cannot be read", f"write --merge {MERGE_FORM}, such as main:80,weight=0.5")
    if recipe.model.lora.rank is not None:
        raise NpoError(
            "--merge is not available with model.lora.rank: the sum of three adapters has three times their rank",
            "train all weights: npo train RECIPE NEW_RUN model.lora.rank=null",
        )
    assert segment.parent is not None
    places = [(segment.parent, segment.fork_step)]
    for name in ("plus", "minus"):
        if found[name] is not None:
            branch, _, step = found[name].partition(":")
            check_branch(run, branch)
            refuse_scout(run, branch, "is not merged")
            places.append((branch, find_checkpoint(run, branch, int(step)).step))
    plus, minus = places[1], places[-1] if found["minus"] else places[0]
    if plus == minus:
        raise NpoError(
            f"--merge {spec} adds nothing: theta_plus and theta_minus are one checkpoint", "name another one"
        )
    return replace(segment, merge_weight=weight, merge_plus=plus, merge_minus=minus)


def check_guide(run: RunDir, info: GuideCacheInfo, *, parent: str, at: int) -> None:
    """Refuse a guide without a response, or one that was sampled for another learner, and so for other prompts."""
    if not info.num_prompts_with_rollouts and not info.lazy_settings:
        raise NpoError(
            f"guide {info.name} has no response: its source solved none of its {info.num_prompts} prompts",
            f"sample another source: npo sample-guide {quote_path(run.root)} --at {at} --source SPEC --name NEW",
        )
    again = (
        f"npo sample-guide {quote_path(run.root)} --branch {parent} {format_source_option(info)} --at {at} --name NEW"
    )
    if (info.branch, info.learner_step) != (parent, at):
        raise NpoError(
            f"guide {info.name} was sampled for step {info.learner_step} of {info.branch}, not step {at} of {parent}",
            again,
        )
