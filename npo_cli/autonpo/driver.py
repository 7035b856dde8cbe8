"""The driver of AutoNPO: asks the state machine what is next, does it, and tells it how it went.

Every fact is on the disk before it is told: recorded metrics, answers of a probe, a finished cache, a branch. A killed
driver therefore starts again from the last transition and comes to the same decisions. Steps that are on record, by
this driver or by plain training, are looked at, not made again.
"""

import sys
from collections.abc import Generator, Iterator, Mapping
from dataclasses import replace
from typing import Any

from npo_cli.autonpo.actions import (
    last_event,
    perform_acceptance_test,
    perform_extrapolation,
    perform_guide_build,
    perform_probe,
    perform_rollback,
)
from npo_cli.autonpo.controller import advance
from npo_cli.autonpo.events import ControllerEvent, StepObserved
from npo_cli.autonpo.preflight import controller_knobs, trigger_knobs
from npo_cli.autonpo.trigger import Trigger, TriggerInput, is_finite
from npo_cli.errors import StoppedEarly, quote_path
from npo_cli.policy.optimizer import build_optimizer
from npo_cli.report.tables_autonpo import describe_transition
from npo_cli.session.session import Session, load_checkpoint
from npo_cli.session.stop_signal import StopFlag
from npo_cli.storage.autonpo_log import append_transitions
from npo_cli.storage.checkpoints import Checkpoint, find_resume_checkpoint, list_ancestry_checkpoints
from npo_cli.storage.layout import RunDir
from npo_cli.storage.lineage import ancestry, find_newest_branch
from npo_cli.storage.metrics import append_event, read_metrics
from npo_cli.training.loop import grpo_steps
from npo_cli.training.resume import find_resume_point, load_active_guide, load_first_state, record_start
from npo_cli.training.train import open_trainer
from npo_cli.types.autonpo import AutoNPOState, Transition
from npo_cli.types.rollouts import EvalReport, Notice, Progress, StepReport

TRAINING_PHASES = ("TRAIN", "AHEAD", "REPLAY", "COOLDOWN")
DriverRecord = Transition | Notice | Progress | StepReport | EvalReport


def read_trigger_inputs(run: RunDir, branch: str, step: int) -> Iterator[TriggerInput]:
    """Signals of the branch's line of descent up to a step, oldest first."""
    for stretch in ancestry(run, branch):
        for row in read_metrics(run, stretch.branch):
            if stretch.contains(row["step"]) and row["step"] <= step:
                yield parse_trigger_input(row)


def parse_trigger_input(row: Mapping[str, Any]) -> TriggerInput:
    """What the trigger sees of a step's measurements; a dropped number is missing."""
    return TriggerInput(step=row["step"], reward=row.get("reward"), entropy=row.get("entropy"))


class AutoNPODriver:
    """One run under AutoNPO, from the newest transition on."""

    def __init__(self, session: Session, state: AutoNPOState, *, stop: StopFlag) -> None:
        self.session, self.run, self.recipe = session, session.run, session.recipe
        self.knobs = controller_knobs(session.recipe)
        self.stop = stop
        self.state = state
        self.trigger = self.build_trigger(state)

    def build_trigger(self, state: AutoNPOState) -> Trigger:
        """A watch that has seen the line of descent up to the state's step."""
        watch = Trigger(trigger_knobs(self.recipe))
        for signal in read_trigger_inputs(self.run, state.branch, state.step):
            watch.observe(signal)
        return watch

    def run_loop(self) -> Iterator[DriverRecord]:
        """Train, push, probe, roll back, replay, until the last step is done."""
        facts = {
            "PUSH": perform_extrapolation,
            "PROBE": perform_probe,
            "GUIDE_GEN": perform_guide_build,
            "ROLLBACK": perform_rollback,
            "JUDGE": perform_acceptance_test,
        }
        while not self.is_finished:
            act = facts.get(self.state.phase)
            if act is None:
                yield from self.advance()
                continue
            fact = yield from self.run_action(act(self.session, self.state))
            yield from self.apply_event(fact)
            self.trigger = self.build_trigger(self.state)

    def missing_inputs(self) -> list[str]:
        """Signals that no step on record has: without them nothing can ever trigger."""
        known = list(read_trigger_inputs(self.run, self.state.branch, sys.maxsize))
        return [
            f"no step on record has a finite {name}: AutoNPO cannot trigger on them"
            for name in ("reward", "entropy")
            if known and not any(is_finite(getattr(signal, name)) for signal in known)
        ]

    def end_reason(self) -> str:
        """In words."""
        if self.state.step >= self.recipe.train.num_steps:
            return f"all {self.recipe.train.num_steps} steps are made (train.num_steps may be raised)"
        return "autonpo.replay.after=stop, and the replay is done (autonpo.replay.after=continue goes on)"

    @property
    def is_finished(self) -> bool:
        """All steps are done and nothing waits; or the recipe wants no more than the replay."""
        if self.state.phase not in TRAINING_PHASES:
            return False
        stops = self.recipe.autonpo.replay.after == "stop" and self.state.phase == "COOLDOWN"
        if stops and last_event(self.run) in ("replayed", "kept"):
            return True
        return self.state.step >= self.recipe.train.num_steps

    def run_action(self, act: Generator[Progress, None, ControllerEvent]) -> Generator[Progress, None, ControllerEvent]:
        """The act, left between two of its chunks if a signal asks for it; each chunk is on the disk."""
        while True:
            if self.stop:
                act.close()
                append_event(self.run, "stopped", {"branch": self.state.branch, "step": self.state.step})
                raise StoppedEarly(
                    f"stopped by {self.stop.reason} in {self.state.phase}; what was sampled is saved",
                    f"npo resume {quote_path(self.run.root)} --autonpo",
                )
            try:
                progress = next(act)
            except StopIteration as done:
                return done.value
            yield progress

    def apply_event(self, fact: ControllerEvent) -> Iterator[DriverRecord]:
        """One fact to the state machine; its moves go to the disk before anything is done about them."""
        self.state, moves = advance(self.state, fact, knobs=self.knobs)
        append_transitions(self.run, moves)
        for move in moves:
            yield move
            yield Notice(message=describe_transition(move))

    def observe_step(self, signal: TriggerInput) -> StepObserved:
        """The fact of one step; a guide must be on the disk, so only steps with a checkpoint can be acted upon."""
        at_checkpoint = signal.step % self.recipe.train.save_every == 0
        return StepObserved(reading=self.trigger.observe(signal), has_checkpoint=at_checkpoint)

    def advance(self) -> Iterator[DriverRecord]:
        """Look at what is on record up to the newest full state, then make steps, until something is to be done."""
        branch = self.state.branch
        known = list_ancestry_checkpoints(self.run, branch)
        newest = find_resume_checkpoint(self.run, branch) if known else None
        if newest is not None and newest.step > self.state.step:
            yield from self.replay_log(newest.step)
            if self.state.phase not in TRAINING_PHASES or self.is_finished:
                return
        yield from self.train(newest)

    def replay_log(self, last: int) -> Iterator[DriverRecord]:
        """Recorded steps of the branch itself, up to `last`."""
        for signal in list(read_trigger_inputs(self.run, self.state.branch, last)):
            if signal.step > self.state.step:
                yield from self.apply_event(self.observe_step(signal))
                if self.state.phase not in TRAINING_PHASES or self.is_finished:
                    return
        # Lines may be lost (a power cut); the checkpoint is there all the same.
        self.state = replace(self.state, step=max(self.state.step, last))

    def train(self, newest: Checkpoint | None) -> Iterator[DriverRecord]:
        """Live steps from the newest full state until a decision is due; its transitions wait for the checkpoint."""
        start = find_resume_point(self.run, self.state.branch, ())
        if find_newest_branch(self.run) != self.state.branch:
            record_start(self.run, start, ())
        if newest is not None:
            load_checkpoint(self.session.policy, newest)
        guidance = load_active_guide(self.session, start.segment)
        optimizer = build_optimizer(self.session.policy.model, self.recipe.train)
        state = yield from load_first_state(self.session, optimizer, start)
        trainer = open_trainer(self.session, optimizer, branch=self.state.branch, active_guide=guidance)
        waiting: list[StepObserved] = []

        def watcher(report: StepReport) -> bool:
            signal = parse_trigger_input({"step": report.step, **report.metrics})
            if report.step <= self.state.step:
                # Made again after a kill, and judged before it; only a power cut loses its record.
                self.trigger.observe_if_new(signal)
                return False
            fact = self.observe_step(signal)
            # Nothing is decided on figures that are not on the disk.
            trainer.steps.sync()
            waiting.append(fact)
            ahead, moves = advance(self.state, fact, knobs=self.knobs)
            done = self.recipe.autonpo.replay.after == "stop" and any(move.event == "replayed" for move in moves)
            return done or ahead.phase not in TRAINING_PHASES

        try:
            for record in grpo_steps(trainer, state, self.stop, should_pause=watcher):
                # By now the step before has been saved, if it had to be.
                yield from self.flush(waiting)
                yield record
            yield from self.flush(waiting)
        except StoppedEarly as stopped:
            raise StoppedEarly(stopped.message, f"npo resume {quote_path(self.run.root)} --autonpo") from stopped

    def flush(self, waiting: list[StepObserved]) -> Iterator[DriverRecord]:
        """Facts whose step is safe on the disk."""
        while waiting:
            yield from self.apply_event(waiting.pop(0))
