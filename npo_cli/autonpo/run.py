"""`npo train RECIPE --autonpo` and `npo resume RUN --autonpo`: training that decides by itself when to roll back.

The driver asks the controller for the phase, performs it, and applies the event that results. Everything an event
rests on is on disk before the event is applied (metrics, probe rollouts, a complete guide cache, a branch), so a
killed driver starts again from the newest transition and comes to the same decisions. Recorded steps, whether of this
driver or of plain training, are read, not executed again: training first and resuming with AutoNPO later gives the same
weights as training with it, as long as the checkpoints it needs are still there.
"""

import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from npo_cli.autonpo.actions import (
    perform_acceptance_test,
    perform_guide_build,
    perform_probe,
    perform_rollback,
)
from npo_cli.autonpo.controller import (
    TRAINING_PHASES,
    ControllerEvent,
    PrerequisiteMissing,
    RunBegun,
    StepObserved,
    advance,
    is_early_scout_due,
    is_effect_due,
)
from npo_cli.autonpo.preflight import dump_autonpo_settings, find_start, usable_distances, validate_autonpo_settings
from npo_cli.autonpo.rung_actions import describe_scout, enter_window, perform_apply, perform_forecast, plan_scout
from npo_cli.autonpo.rung_effect import measure_rung
from npo_cli.autonpo.rungs import undo_rung
from npo_cli.autonpo.signals import parse_trigger_input, read_trigger_inputs
from npo_cli.autonpo.trigger import Trigger, TriggerInput, is_finite
from npo_cli.config.recipe import Recipe
from npo_cli.errors import NpoError, StoppedEarly, quote_path
from npo_cli.policy.optimizer import build_optimizer
from npo_cli.report.tables_autonpo import describe_transition
from npo_cli.rollout.batch import ActiveGuide
from npo_cli.session.session import Session, load_checkpoint, open_session
from npo_cli.session.startup import charge_startup, measure_startup
from npo_cli.session.stop_signal import StopFlag, stop_between_steps
from npo_cli.storage.autonpo_log import append_transitions, read_transitions
from npo_cli.storage.checkpoints import Checkpoint, find_resume_checkpoint, list_ancestry_checkpoints
from npo_cli.storage.cost_sums import compute_run_costs
from npo_cli.storage.interrupted import record_finish
from npo_cli.storage.layout import open_run
from npo_cli.storage.lineage import find_newest_branch
from npo_cli.storage.lock import lock_run
from npo_cli.storage.metrics import append_event
from npo_cli.storage.scouts import drop_used_scouts
from npo_cli.training.loop import grpo_steps
from npo_cli.training.merge import save_merged_start
from npo_cli.training.resume import damage_warnings, load_first_state, open_active_guide, record_start
from npo_cli.training.scout import train_scout
from npo_cli.training.start_point import ResumePoint, find_resume_point
from npo_cli.training.train import (
    MAIN,
    create_session,
    describe_batch_sizes,
    engine_warnings,
    open_trainer,
    startup_warnings,
)
from npo_cli.types.autonpo import AutoNPOState, RungEffect, Transition
from npo_cli.types.costs import RunCosts
from npo_cli.types.rollouts import Notice, Progress, StepReport, TrainingRecord

ACTIONS = {
    "FORECAST": perform_forecast,
    "APPLY": perform_apply,
    "PROBE": perform_probe,
    "GUIDE_GEN": perform_guide_build,
    "ROLLBACK": perform_rollback,
    "ACCEPTANCE_TEST": perform_acceptance_test,
}
"""What the driver does in each phase that executes no training steps; in SCOUT it trains another branch."""

DriverRecord = Transition | Progress | RunCosts | TrainingRecord


# Entry points


def resume_autonpo(
    root: Path,
    *,
    overrides: Sequence[str],
    at: int | None,
    source_branch: str | None,
    new_branch: str | None,
    stop: StopFlag | None = None,
) -> Iterator[DriverRecord]:
    """Continue a run under AutoNPO from its newest transition, from its first step, or from `at` on a new branch."""
    run = open_run(root)
    with lock_run(run), stop_between_steps(stop) as stop:
        drop_used_scouts(run)  # a kill may have come before it
        start, state = find_start(run, overrides=overrides, at=at, source_branch=source_branch, new_branch=new_branch)
        recipe = undo_rung(run, start.recipe, start.branch)
        with open_session(run, recipe, checkpoint=start.checkpoint, trains=True) as session:
            num_prompts = len(session.task.train)
            validate_autonpo_settings(recipe, num_prompts)
            record_start(run, start, overrides)
            yield Notice(message=describe_batch_sizes(start.recipe, num_prompts=num_prompts))
            yield from damage_warnings(run, start)
            yield from engine_warnings(session)
            yield from run_autonpo(session, state, stop=stop, reads_log=not start.is_new)


def train_autonpo(root: Path, recipe: Recipe, *, stop: StopFlag | None = None) -> Iterator[DriverRecord]:
    """A new run under AutoNPO; settings that could never work are refused before anything is written."""
    with create_session(root, recipe, check=validate_autonpo_settings, stop=stop) as (session, stop):
        yield from startup_warnings(session)
        yield from run_autonpo(session, AutoNPOState(branch=MAIN, step=0), stop=stop, reads_log=False)


def run_autonpo(session: Session, state: AutoNPOState, *, stop: StopFlag, reads_log: bool) -> Iterator[DriverRecord]:
    """Log the settings, drive the run to its end, and sum up what everything cost."""
    unused = sorted(set(session.recipe.autonpo.rollback.distances) - set(usable_distances(session.recipe)))
    if unused:
        distances = ", ".join(map(str, unused))
        yield Notice(
            message=f"autonpo.rollback.distances {distances}: not multiples of train.save_every, so never selected"
        )
    state = yield from log_settings(session, state)
    if reads_log and list_ancestry_checkpoints(session.run, state.branch):
        newest = find_resume_checkpoint(session.run, state.branch).step
        is_read = not is_early_scout_due(state, session.recipe.autonpo)
        if is_read and newest > state.step and state.phase in TRAINING_PHASES:
            yield Notice(message=f"reading the recorded steps {state.step + 1}-{newest} of {state.branch}")
    driver = AutoNPODriver(session, state, stop=stop)
    yield from (Notice(message=warning, level="warning") for warning in driver.missing_inputs())
    has_trained = False
    for record in driver.run_loop():
        has_trained = has_trained or isinstance(record, StepReport)
        yield record
    if not has_trained:
        yield Notice(message=f"no step was left to train: {driver.end_reason()}")
    record_finish(session.run, driver.state.branch)
    yield compute_run_costs(session.run, driver.state.branch)


def log_settings(session: Session, state: AutoNPOState) -> Generator[Transition, None, AutoNPOState]:
    """The first line of autonpo.jsonl, and one more whenever the settings change: they hold from that step on."""
    run, settings = session.run, dump_autonpo_settings(session.recipe)
    recorded = read_transitions(run)
    starts = [transition for transition in recorded if transition.event == "started"]
    same_branch = bool(starts) and recorded[-1].state.branch == state.branch
    if same_branch and starts[-1].evidence["settings"] == settings:
        return state
    if same_branch and state.phase in ("TRAIN", "COOLDOWN") and list_ancestry_checkpoints(run, state.branch):
        # New settings are not applied to recorded steps; only the end of a replay is still looked for in them.
        step = max(state.step, find_resume_checkpoint(run, state.branch).step)
        state = replace(state, step=step, stagnation_streak=0, has_warned=False)
    started = Transition(
        step=state.step, event="started", phase_before=state.phase, state=state, evidence={"settings": settings}
    )
    append_transitions(run, [started])
    yield started
    return state


# The driver


class AutoNPODriver:
    """One run under AutoNPO, from the newest transition on.

    Steps are applied one record late. The loop asks `observe` after each step whether to pause, *before* it saves
    that step's checkpoint, because a pause asks for one; but a transition must not be on disk before the checkpoint
    that it refers to. So `observe` advances the state and puts the transitions into `unsaved`, and `save_transitions`
    writes them when the loop yields its next record or ends: by then the checkpoint is saved. A process killed in
    between finds the step on record after its restart and derives the same transitions from it.
    """

    def __init__(self, session: Session, state: AutoNPOState, *, stop: StopFlag) -> None:
        self.session, self.run, self.recipe = session, session.run, session.recipe
        self.stop = stop
        self.state = state
        self.trigger = self.build_trigger()
        self.unsaved: list[Transition] = []

    def build_trigger(self) -> Trigger:
        """A trigger that has read the branch's ancestry up to the state's step."""
        trigger = Trigger(self.recipe.autonpo.trigger)
        for signal in read_trigger_inputs(self.run, self.state.branch, self.state.step):
            trigger.observe(signal)
        return trigger

    def run_loop(self) -> Iterator[DriverRecord]:
        """Train, probe, build guides, roll back and replay until the last step is done."""
        if is_early_scout_due(self.state, self.recipe.autonpo):
            yield from self.save_first_step()
            self.apply(RunBegun())
            yield from self.save_transitions()
        while not self.is_finished:
            if self.state.phase == "SCOUT":
                yield from self.scout_phase()
                continue
            action = ACTIONS.get(self.state.phase)
            if action is None:
                yield from self.train_phase()
                continue
            event = yield from self.run_action(action(self.session, self.state))
            self.apply(event)
            yield from self.save_transitions()
            self.trigger = self.build_trigger()

    def missing_inputs(self) -> list[str]:
        """Warnings about signals that no recorded step has: without them nothing can ever trigger."""
        recorded = list(read_trigger_inputs(self.run, self.state.branch, sys.maxsize))
        return [
            f"no recorded step has a finite {name}: AutoNPO cannot trigger on them"
            for name in ("reward", "entropy")
            if recorded and not any(is_finite(getattr(signal, name)) for signal in recorded)
        ]

    def end_reason(self) -> str:
        """Why no step is left, and how to train more."""
        if self.state.step >= self.recipe.train.num_steps:
            return f"all {self.recipe.train.num_steps} steps are done (train.num_steps may be raised)"
        return "autonpo.replay.after=stop, and the replay is done (autonpo.replay.after=continue trains on)"

    @property
    def is_finished(self) -> bool:
        """All steps are done and no action is pending; or the replay is done and `autonpo.replay.after` is `stop`."""
        if self.state.phase not in TRAINING_PHASES:
            return False
        if self.recipe.autonpo.replay.after == "stop" and self.state.phase == "COOLDOWN":
            events = [transition.event for transition in read_transitions(self.run) if transition.event != "started"]
            if events[-1] in ("replay_done", "replay_accepted"):
                return True
        return self.state.step >= self.recipe.train.num_steps

    def run_action(
        self, action: Generator[Progress, None, ControllerEvent]
    ) -> Generator[Progress, None, ControllerEvent]:
        """The action, stopped between two of its chunks if a signal asks for it; each chunk is on disk."""
        while True:
            if self.stop:
                action.close()
                append_event(self.run, "stopped", {"branch": self.state.branch, "step": self.state.step})
                raise StoppedEarly(
                    f"stopped by {self.stop.reason} in {self.state.phase}; what was sampled is saved",
                    f"npo resume {quote_path(self.run.root)} --autonpo",
                )
            try:
                progress = next(action)
            except StopIteration as done:
                return done.value
            yield progress

    def apply(self, event: ControllerEvent) -> None:
        """One event to the controller; its transitions wait in `unsaved`."""
        self.state, transitions = advance(self.state, event, self.recipe.autonpo)
        self.unsaved += transitions

    def apply_step(self, signal: TriggerInput) -> None:
        """One step to the trigger and the controller; only a step with a checkpoint can be the guide."""
        at_checkpoint = signal.step % self.recipe.train.save_every == 0
        effect = self.measure_rung(signal.step) if is_effect_due(self.state, signal.step) else None
        self.apply(StepObserved(reading=self.trigger.observe(signal), has_checkpoint=at_checkpoint, effect=effect))

    def measure_rung(self, step: int) -> RungEffect | None:
        """The effect of the rung whose cooldown ends at this step."""
        assert self.state.rung is not None, "a rung is measured"
        return measure_rung(
            self.run,
            read_transitions(self.run),
            rung=self.state.rung,
            last=step,
            rollouts_per_step=self.recipe.train.prompts_per_step * self.recipe.train.group_size,
        )

    def save_transitions(self) -> Iterator[DriverRecord]:
        """Write the transitions before anything is done about them, then report them."""
        transitions, self.unsaved = self.unsaved, []
        append_transitions(self.run, transitions)
        for transition in transitions:
            yield transition
            yield Notice(message=describe_transition(transition))

    def save_first_step(self) -> Iterator[DriverRecord]:
        """Step 0, from which the scout and its learner are forked; nothing where it is saved."""
        if not list_ancestry_checkpoints(self.run, self.state.branch):
            start = find_resume_point(self.run, self.state.branch, ())
            yield from load_first_state(
                self.session, build_optimizer(self.session.policy.model, self.recipe.train), start
            )

    def scout_phase(self) -> Iterator[DriverRecord]:
        """Train the scout of the rung, or what is left of it."""
        try:
            scout = plan_scout(self.session, self.state)
        except NpoError as error:
            self.apply(PrerequisiteMissing(reason=error.message))
        else:
            with self.named_in_stops():
                yield from train_scout(self.session, scout, self.stop)
            self.apply(describe_scout(self.session, scout.name))
        yield from self.save_transitions()

    @contextmanager
    def named_in_stops(self) -> Iterator[None]:
        """Training that is stopped in the block is resumed with --autonpo."""
        try:
            yield
        except StoppedEarly as stopped:
            raise StoppedEarly(stopped.message, f"npo resume {quote_path(self.run.root)} --autonpo") from stopped

    def train_phase(self) -> Iterator[DriverRecord]:
        """Read what is recorded up to the newest full checkpoint, then train, until an action is due."""
        branch = self.state.branch
        newest = find_resume_checkpoint(self.run, branch) if list_ancestry_checkpoints(self.run, branch) else None
        if newest is not None and newest.step > self.state.step:
            yield from self.read_log(newest.step)
            if self.state.phase not in TRAINING_PHASES or self.is_finished:
                return
        yield from self.train(newest)

    def read_log(self, last: int) -> Iterator[DriverRecord]:
        """Apply recorded steps of the branch, up to `last`."""
        for signal in list(read_trigger_inputs(self.run, self.state.branch, last)):
            if signal.step > self.state.step:
                self.apply_step(signal)
                yield from self.save_transitions()
                if self.state.phase not in TRAINING_PHASES or self.is_finished:
                    return
        # A power loss may have taken lines; the checkpoint is there all the same.
        self.state = replace(self.state, step=max(self.state.step, last))

    def train(self, newest: Checkpoint | None) -> Iterator[DriverRecord]:
        """Train from the newest full checkpoint until an action is due."""
        start = find_resume_point(self.run, self.state.branch, ())
        if find_newest_branch(self.run) != self.state.branch:
            record_start(self.run, start, ())
        if newest is not None:
            with measure_startup("load", "the checkpoint"):
                load_checkpoint(self.session.policy, newest)
        session = enter_window(self.session, self.state.branch, 0 if newest is None else newest.step)
        with open_active_guide(session, start.segment) as active_guide:
            yield from self.train_from(session, start, active_guide)

    def train_from(
        self, session: Session, start: ResumePoint, active_guide: ActiveGuide | None
    ) -> Iterator[DriverRecord]:
        """The same from that point, whose weights are loaded, in the session of the branch."""
        optimizer = build_optimizer(session.policy.model, self.recipe.train)
        state = yield from load_first_state(session, optimizer, start)
        if start.is_merge_due:
            yield from save_merged_start(session, optimizer, state, branch=start.branch)
        charge_startup(self.run, branch=self.state.branch, step=state.step)
        trainer = open_trainer(session, optimizer, branch=self.state.branch, step=state.step, active_guide=active_guide)

        def observe(report: StepReport) -> bool:
            signal = parse_trigger_input({"step": report.step, **report.metrics})
            if report.step <= self.state.step:
                # Executed again after a kill, and applied before it; only a power loss takes its record.
                self.trigger.observe_if_new(signal)
                return False
            # No decision may rest on metrics that are not on disk.
            trainer.steps.sync()
            self.apply_step(signal)
            replay_done = any(transition.event == "replay_done" for transition in self.unsaved)
            stops = replay_done and self.recipe.autonpo.replay.after == "stop"
            return stops or self.state.phase not in TRAINING_PHASES

        with self.named_in_stops():
            for record in grpo_steps(trainer, state, self.stop, should_pause=observe):
                yield from self.save_transitions()
                yield record
            yield from self.save_transitions()
