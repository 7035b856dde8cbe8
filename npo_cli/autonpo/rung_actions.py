"""What the driver does in FORECAST, SCOUT and APPLY, and the recipe of a branch on which a rung is in effect.

A rung goes forward on a fork: a new branch at the newest step (or that of a short rollback) whose recipe has the
settings of the window. The log says what they were before, so that the next branch begins without them. A scout is
trained from the same step, before the branch exists.
"""

from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any

from npo_cli.autonpo.actions import (
    EARLY_GUIDE_NAME,
    choose_cache_name,
    choose_intervention_branch,
    is_complete,
    require_full_checkpoint,
)
from npo_cli.autonpo.controller import PrerequisiteMissing, RungApplied, RungForecasted, ScoutTrained, trains_scout
from npo_cli.autonpo.rung_effect import forecast_rung
from npo_cli.autonpo.rungs import RungPlace, RungPlan, check_steps_left, find_rung, find_undo, plan_rung
from npo_cli.config.loading import apply_overrides, recipe_to_dict
from npo_cli.config.recipe import Recipe
from npo_cli.errors import NpoError
from npo_cli.guides.build_cache import new_cache_info
from npo_cli.guides.dense_target import open_teacher
from npo_cli.guides.source import GuideSource, ReplayTarget, create_source, parse_spec
from npo_cli.registry import RUNGS
from npo_cli.session.learner import Learner
from npo_cli.session.session import Session
from npo_cli.storage.autonpo_log import read_transitions
from npo_cli.storage.guide_cache import finish_guide_cache, open_guide_cache
from npo_cli.storage.interrupted import find_last_saved_step
from npo_cli.storage.lineage import find_first_segment, list_branches, list_recorded_branches
from npo_cli.storage.metrics import read_metrics
from npo_cli.storage.scouts import check_not_dropped
from npo_cli.training.resume import record_start
from npo_cli.training.scout_start import check_same_scout, make_scout_recipe
from npo_cli.training.start_point import ResumePoint
from npo_cli.types.autonpo import AutoNPOState, RungForecast
from npo_cli.types.guides import ScoutRequest
from npo_cli.types.rollouts import Progress, Segment


def find_rung_place(session: Session, state: AutoNPOState) -> RungPlace:
    """Where the rung that is considered would be applied."""
    scout = None
    if state.phase == "APPLY" and state.rung is not None and trains_scout(state.rung):
        trained = [one for one in read_transitions(session.run) if one.event == "scout_trained"]
        scout = trained[-1].evidence["scout"]
    return RungPlace(
        run=session.run,
        recipe=session.recipe,
        branch=state.branch,
        step=state.step,
        distance=state.distance or 0,
        is_early=state.is_early,
        scout=scout,
    )


def name_intervention(state: AutoNPOState) -> str:
    """Of the branch of the next intervention."""
    return EARLY_GUIDE_NAME if state.is_early else f"auto-{state.num_interventions + 1}"


def perform_forecast(session: Session, state: AutoNPOState) -> Generator[Progress, None, RungForecasted]:
    """Forecast a rung from its effects in this run; a rung that cannot be applied here is not available."""
    assert state.rung is not None, "a rung is considered"
    yield Progress(description=f"forecast of {state.rung}", done=0, total=1)
    place = find_rung_place(session, state)
    try:
        require_full_checkpoint(session.run, state.branch, state.step)
        if trains_scout(state.rung):
            # Its teacher does not exist yet.
            plan_scout(session, state)
        elif plan_rung(state.rung, place).guide is not None and session.distributed.world_size > 1:
            raise NpoError("a guide is sampled while training by one process", "start without torchrun")
    except NpoError as error:
        return RungForecasted(
            forecast=RungForecast(rung=state.rung, basis="unavailable", value=None, reason=error.message)
        )
    return RungForecasted(forecast=forecast_rung(state.rung, read_transitions(session.run)))


def plan_scout(session: Session, state: AutoNPOState) -> ScoutRequest:
    """The scout of a rung, begun before or not; an NpoError says why it cannot be trained."""
    assert state.rung is not None, "a rung is considered"
    run, place = session.run, find_rung_place(session, state)
    check_steps_left(RUNGS.get(state.rung), place)
    require_full_checkpoint(run, place.branch, place.fork_step)
    request = ScoutRequest(
        at=place.fork_step,
        branch=place.branch,
        steps=place.scout_steps,
        name=f"{name_intervention(state)}-scout",
        undo=find_undo(run, place.branch),
    )
    return replace(request, name=name_rung_scout(session, request))


def name_rung_scout(session: Session, request: ScoutRequest) -> str:
    """The wanted name, or `NAME-2`, `NAME-3`, ... if another branch has it; the same scout is trained to its end."""
    run, taken, number = session.run, list_recorded_branches(session.run), 1
    recipe, branches = make_scout_recipe(run, request), list_branches(run)
    while True:
        named = replace(request, name=request.name if number == 1 else f"{request.name}-{number}")
        if named.name not in taken:
            return named.name
        if named.name in branches:
            try:
                check_same_scout(run, named, recipe)
                check_not_dropped(run, named.name)
            except NpoError:
                pass
            else:
                return named.name
        number += 1


def describe_scout(session: Session, scout: str) -> ScoutTrained:
    """The event of a scout that has ended."""
    first, last = find_first_segment(session.run, scout).fork_step, find_last_saved_step(session.run, scout)
    rows = read_metrics(session.run, scout)
    tokens = sum(row["tokens"] for row in rows if row["step"] <= last)
    return ScoutTrained(scout=scout, scout_step=last, num_steps=last - first, num_tokens=int(tokens))


def perform_apply(
    session: Session, state: AutoNPOState
) -> Generator[Progress, None, RungApplied | PrerequisiteMissing]:
    """Create the branch of the rung's window; the current branch stays as it is."""
    assert state.rung is not None, "a rung was chosen"
    yield Progress(description=f"apply {state.rung}", done=0, total=1)
    run, place = session.run, find_rung_place(session, state)
    try:
        require_full_checkpoint(run, state.branch, place.fork_step)
        plan = plan_rung(state.rung, place)
        name = name_intervention(state)
        guide = None if plan.guide is None else create_lazy_cache(session, place, plan, name)
    except NpoError as error:
        return PrerequisiteMissing(reason=error.message)
    until = place.fork_step + place.num_steps
    segment = Segment(
        branch=name,
        parent=state.branch,
        fork_step=place.fork_step,
        guide_cache=guide,
        guide_until=None if guide is None else until,
        teacher=plan.teacher,
    )
    segment = replace(segment, branch=choose_intervention_branch(run, segment))
    if segment.branch not in list_branches(run):
        start = ResumePoint(recipe=plan.recipe, branch=segment.branch, checkpoint=None, segment=segment, is_new=True)
        record_start(run, start, plan.settings)
    return RungApplied(
        branch=segment.branch,
        to_step=place.fork_step,
        until_step=until,
        settings=plan.settings,
        undo=read_values(session.recipe, plan.settings),
        guide=guide,
    )


def create_lazy_cache(session: Session, place: RungPlace, plan: RungPlan, name: str) -> str:
    """An empty guide cache of the window that training fills; its name."""
    assert plan.guide is not None, "the rung has a guide"
    checkpoint = require_full_checkpoint(place.run, place.branch, place.fork_step)
    recipe = apply_overrides(plan.recipe, ("guide.cache.lazy=true",))
    learner = Learner(recipe=recipe, branch=place.branch, checkpoint=checkpoint)
    source = create_source(parse_spec(plan.guide), ReplayTarget(run=place.run, learner=learner, steps=place.num_steps))
    # Described, not sampled: nothing of it is loaded.
    GuideSource.open(source, session)
    info = choose_cache_name(place.run, new_cache_info(source, name, num_prompts=0, is_lazy=True))
    if not is_complete(place.run, info.name):
        open_guide_cache(place.run, info)
        finish_guide_cache(place.run, info)
    return info.name


def read_values(recipe: Recipe, settings: Sequence[str]) -> dict[str, Any]:
    """The values of a recipe at the keys of KEY=VALUE settings."""
    values = {}
    for key in (setting.partition("=")[0] for setting in settings):
        value: Any = recipe_to_dict(recipe)
        for part in key.split("."):
            value = value[part]
        values[key] = value
    return values


def enter_window(session: Session, branch: str, step: int) -> Session:
    """The session with the recipe of its branch, and the teacher if training from `step` has a part of the window."""
    applied = find_rung(session.run, branch)
    if applied is None:
        return session
    recipe = apply_overrides(session.recipe, applied.evidence["settings"])
    if step >= applied.evidence["until_step"]:
        return replace(session, recipe=recipe)
    place = {"parent": applied.evidence["parent"], "fork_step": applied.evidence["to_step"]}
    return replace(session, recipe=recipe, teacher=open_teacher(session.run, recipe, session.policy, **place))
