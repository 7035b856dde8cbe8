"""`npo resume RUN --autonpo` and `npo train RECIPE --autonpo`: a run that decides by itself when to roll back.

What is already on record is looked back over as if AutoNPO had watched from the start, so training first and resuming
with it afterwards leads to the same weights as training with it, as long as the checkpoints it needs are still there.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from npo_cli.autonpo.driver import TRAINING_PHASES, AutoNPODriver, DriverRecord
from npo_cli.autonpo.preflight import dump_autonpo_settings, usable_deltas, validate_autonpo_settings
from npo_cli.config.recipe import Recipe
from npo_cli.errors import NpoError, quote_path
from npo_cli.session.session import Session, open_session
from npo_cli.session.stop_signal import StopFlag, stop_between_steps
from npo_cli.storage.autonpo_log import append_transitions, read_transitions
from npo_cli.storage.checkpoints import find_resume_checkpoint, list_ancestry_checkpoints
from npo_cli.storage.cost_sums import compute_run_costs
from npo_cli.storage.layout import RunDir, open_run
from npo_cli.storage.lineage import find_first_segment, find_newest_branch
from npo_cli.storage.lock import lock_run
from npo_cli.training.resume import ResumePoint, find_resume_point, fork, record_start
from npo_cli.training.train import MAIN, create_session, describe_batch_sizes, engine_warnings, startup_warnings
from npo_cli.types.autonpo import AutoNPOState, Transition
from npo_cli.types.rollouts import Notice, StepReport


def resume_autonpo(
    root: Path,
    *,
    overrides: Sequence[str],
    at: int | None,
    source_branch: str | None,
    new_branch: str | None,
) -> Iterator[DriverRecord]:
    """Watch a run from its newest transition on, from its first step, or from `at` as a new branch."""
    run = open_run(root)
    with lock_run(run), stop_between_steps() as stop:
        start, state = find_start(run, overrides=overrides, at=at, source_branch=source_branch, new_branch=new_branch)
        with open_session(run, start.recipe, checkpoint=start.checkpoint) as session:
            num_prompts = len(session.task.train)
            validate_autonpo_settings(start.recipe, num_prompts)
            record_start(run, start, overrides)
            yield Notice(message=describe_batch_sizes(start.recipe, num_prompts=num_prompts))
            yield from engine_warnings(session)
            yield from run_autonpo(session, state, stop=stop, replays_log=not start.is_new)


def train_autonpo(root: Path, recipe: Recipe) -> Iterator[DriverRecord]:
    """A new run under AutoNPO; settings that could never work are refused before anything is made."""
    with create_session(root, recipe, check=validate_autonpo_settings) as (session, stop):
        yield from startup_warnings(session)
        yield from run_autonpo(session, AutoNPOState(branch=MAIN, step=0), stop=stop, replays_log=False)


def find_start(
    run: RunDir, *, overrides: Sequence[str], at: int | None, source_branch: str | None, new_branch: str | None
) -> tuple[ResumePoint, AutoNPOState]:
    """The branch to watch, and the state to go on from."""
    if at is not None:
        start = fork(run, source_branch, at, overrides=overrides, guide=None, new_branch=new_branch, steps=None)
        return start, AutoNPOState(branch=start.branch, step=at)
    if new_branch is not None:
        raise NpoError(
            "--new-branch needs --at STEP",
            f"npo resume {quote_path(run.root)} --autonpo --at STEP",
        )
    before = read_transitions(run)
    if before:
        state = before[-1].state
        if source_branch not in (None, state.branch):
            raise NpoError(
                f"AutoNPO is active on branch {state.branch} of {run.root}, not on {source_branch}",
                f"omit --branch, or fork a branch for it: npo resume {quote_path(run.root)} --autonpo "
                f"--branch {source_branch} --at STEP",
            )
        return find_resume_point(run, state.branch, overrides), state
    branch = source_branch or find_newest_branch(run)
    start = find_resume_point(run, branch, overrides)
    return start, AutoNPOState(branch=branch, step=find_first_segment(run, branch).fork_step)


def run_autonpo(session: Session, state: AutoNPOState, *, stop: StopFlag, replays_log: bool) -> Iterator[DriverRecord]:
    """Write down that AutoNPO begins, or with which settings it goes on; drive; account for everything."""
    left_out = sorted(set(session.recipe.autonpo.rollback.distances) - set(usable_deltas(session.recipe)))
    if left_out:
        distances = ", ".join(map(str, left_out))
        yield Notice(
            message=f"autonpo.rollback.distances {distances}: no multiples of train.save_every, so never chosen"
        )
    state = yield from log_settings(session, state)
    if replays_log and list_ancestry_checkpoints(session.run, state.branch):
        newest = find_resume_checkpoint(session.run, state.branch).step
        if newest > state.step and state.phase in TRAINING_PHASES:
            yield Notice(
                message=f"looking back over steps {state.step + 1}-{newest} of {state.branch}, already on record"
            )
    pilot = AutoNPODriver(session, state, stop=stop)
    yield from (Notice(message=lack, level="warning") for lack in pilot.missing_inputs())
    idle = True
    for record in pilot.run_loop():
        idle = idle and not isinstance(record, StepReport)
        yield record
    if idle:
        yield Notice(message=f"no step was left to make: {pilot.end_reason()}")
    yield compute_run_costs(session.run, pilot.state.branch)


def log_settings(session: Session, state: AutoNPOState) -> Generator[Transition, None, AutoNPOState]:
    """The first line of autonpo.jsonl, and one more wherever the settings change: from that step on they hold."""
    run, settings = session.run, dump_autonpo_settings(session.recipe)
    starts = [move for move in read_transitions(run) if move.event == "started"]
    same_branch = bool(starts) and read_transitions(run)[-1].state.branch == state.branch
    if same_branch and starts[-1].evidence["settings"] == settings:
        return state
    if same_branch and state.phase in ("TRAIN", "COOLDOWN") and list_ancestry_checkpoints(run, state.branch):
        # What the old settings left unanswered is not asked again with new ones; a replay's end is no question.
        step = max(state.step, find_resume_checkpoint(run, state.branch).step)
        state = replace(state, step=step, stagnation_streak=0, has_warned=False)
    move = Transition(
        step=state.step, event="started", phase_before=state.phase, state=state, evidence={"settings": settings}
    )
    append_transitions(run, [move])
    yield move
    return state
