"""`npo resume RUN --autonpo` and `npo train RECIPE --autonpo`: a run that decides by itself when to roll back.

What is already on record is looked back over as if AutoNPO had watched from the start, so training first and resuming
with it afterwards leads to the same weights as training with it, as long as the checkpoints it needs are still there.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from npo_cli.auto_records import AutoState, Transition
from npo_cli.config import Recipe
from npo_cli.errors import NpoError, as_typed
from npo_cli.records import Notice, StepReport
from npo_cli.run_dir.auto import append_transitions, transitions
from npo_cli.run_dir.checkpoints import history, newest_anchor
from npo_cli.run_dir.lineage import birth_segment, newest_branch
from npo_cli.run_dir.lock import writing
from npo_cli.run_dir.paths import RunDir, open_run
from npo_cli.stages.accounting import account
from npo_cli.stages.auto_checks import refuse_impossible, usable_deltas
from npo_cli.stages.auto_knobs import settings_of
from npo_cli.stages.pilot import TRAINING, Pilot, Seen
from npo_cli.stages.resume import Start, continuation, fork, record_start
from npo_cli.stages.signals import StopFlag, stop_between_steps
from npo_cli.stages.train import MAIN, batch_arithmetic, birth_notices, engine_notices, new_world
from npo_cli.stages.world import World, open_policy, open_task, open_world


def resume_auto(
    root: Path,
    *,
    overrides: Sequence[str],
    at: int | None,
    source_branch: str | None,
    new_branch: str | None,
    allow_code: bool,
) -> Iterator[Seen]:
    """Watch a run from its newest transition on, from its first step, or from `at` as a new branch."""
    run = open_run(root)
    with writing(run), stop_between_steps() as stop:
        start, state = where(run, overrides=overrides, at=at, source_branch=source_branch, new_branch=new_branch)
        task = open_task(start.recipe, allow_code=allow_code)
        try:
            refuse_impossible(start.recipe, len(task.train))
            policy = open_policy(start.recipe, task, start.checkpoint)
            with closing(open_world(run, start.recipe, task=task, policy=policy)) as world:
                record_start(run, start, overrides)
                yield Notice(message=batch_arithmetic(start.recipe, num_prompts=len(task.train)))
                yield from engine_notices(world)
                yield from piloted(world, state, stop=stop, looks_back=not start.is_new)
        finally:
            task.close()


def train_auto(root: Path, recipe: Recipe, *, allow_code: bool) -> Iterator[Seen]:
    """A new run under AutoNPO; settings that could never work are refused before anything is made."""
    with new_world(root, recipe, allow_code=allow_code, check=refuse_impossible) as (world, stop):
        yield from birth_notices(world)
        yield from piloted(world, AutoState(branch=MAIN, step=0), stop=stop, looks_back=False)


def where(
    run: RunDir, *, overrides: Sequence[str], at: int | None, source_branch: str | None, new_branch: str | None
) -> tuple[Start, AutoState]:
    """The branch to watch, and the state to go on from."""
    if at is not None:
        start = fork(run, source_branch, at, overrides=overrides, guide=None, wish=new_branch, steps=None)
        return start, AutoState(branch=start.branch, step=at)
    if new_branch is not None:
        raise NpoError(
            "--branch names a new branch, which needs --at STEP", f"npo resume {as_typed(run.root)} --autonpo --at STEP"
        )
    before = transitions(run)
    if before:
        state = before[-1].state
        if source_branch not in (None, state.branch):
            raise NpoError(
                f"AutoNPO of {run.root} is at work on branch {state.branch}, not on {source_branch}",
                f"leave --from out, or begin anew on a branch of its own: npo resume {as_typed(run.root)} --autonpo "
                f"--from {source_branch} --at STEP",
            )
        return continuation(run, state.branch, overrides), state
    branch = source_branch or newest_branch(run)
    start = continuation(run, branch, overrides)
    return start, AutoState(branch=branch, step=birth_segment(run, branch).fork_step)


def piloted(world: World, state: AutoState, *, stop: StopFlag, looks_back: bool) -> Iterator[Seen]:
    """Write down that AutoNPO begins, or with which settings it goes on; drive; account for everything."""
    left_out = sorted(set(world.recipe.autonpo.rollback.distances) - set(usable_deltas(world.recipe)))
    if left_out:
        distances = ", ".join(map(str, left_out))
        yield Notice(
            message=f"autonpo.rollback.distances {distances}: no multiples of train.save_every, so never chosen"
        )
    state = yield from begun(world, state)
    if looks_back and history(world.run, state.branch):
        newest = newest_anchor(world.run, state.branch).step
        if newest > state.step and state.phase in TRAINING:
            yield Notice(
                message=f"looking back over steps {state.step + 1}-{newest} of {state.branch}, already on record"
            )
    pilot = Pilot(world, state, stop=stop)
    yield from (Notice(message=lack, level="warning") for lack in pilot.lacking())
    idle = True
    for record in pilot.drive():
        idle = idle and not isinstance(record, StepReport)
        yield record
    if idle:
        yield Notice(message=f"no step was left to make: {pilot.why_ended()}")
    yield account(world.run, pilot.state.branch)


def begun(world: World, state: AutoState) -> Generator[Transition, None, AutoState]:
    """The first line of autonpo.jsonl, and one more wherever the settings change: from that step on they hold."""
    run, settings = world.run, settings_of(world.recipe)
    starts = [move for move in transitions(run) if move.event == "started"]
    same_branch = bool(starts) and transitions(run)[-1].state.branch == state.branch
    if same_branch and starts[-1].evidence["settings"] == settings:
        return state
    if same_branch and state.phase in ("TRAIN", "COOLDOWN") and history(run, state.branch):
        # What the old settings left unanswered is not asked again with new ones; a replay's end is no question.
        step = max(state.step, newest_anchor(run, state.branch).step)
        state = replace(state, step=step, streak=0, warned=False)
    move = Transition(
        step=state.step, event="started", phase_before=state.phase, state=state, evidence={"settings": settings}
    )
    append_transitions(run, [move])
    yield move
    return state
