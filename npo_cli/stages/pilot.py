"""The driver of AutoNPO: asks the state machine what is next, does it, and tells it how it went.

Every fact is on the disk before it is told: recorded metrics, answers of a probe, a finished cache, a branch. A killed
driver therefore starts again from the last transition and comes to the same decisions. Steps that are on record, by
this driver or by plain training, are looked at, not made again.
"""

import sys
from collections.abc import Generator, Iterator, Mapping
from dataclasses import replace
from typing import Any

from npo_cli.auto_records import AutoState, Transition
from npo_cli.errors import StoppedEarly, as_typed
from npo_cli.guide.controller import advance
from npo_cli.guide.facts import Fact, StepSeen
from npo_cli.guide.trigger import Signal, Watch, is_finite
from npo_cli.records import EvalReport, Notice, Progress, StepReport
from npo_cli.report.auto_words import in_words
from npo_cli.run_dir.auto import append_transitions
from npo_cli.run_dir.checkpoints import Checkpoint, history, newest_anchor
from npo_cli.run_dir.lineage import descent, newest_branch
from npo_cli.run_dir.paths import RunDir
from npo_cli.run_dir.steps import append_event, measured_steps
from npo_cli.stages.auto_knobs import controller_knobs, trigger_knobs
from npo_cli.stages.interventions import (
    confirmed_fact,
    guided_fact,
    judged_fact,
    last_event,
    pushed_fact,
    rolled_back_fact,
)
from npo_cli.stages.loop import grpo_steps
from npo_cli.stages.resume import continuation, first_state, open_guidance, record_start
from npo_cli.stages.signals import StopFlag
from npo_cli.stages.together import new_optimizer
from npo_cli.stages.train import open_trainer
from npo_cli.stages.world import World, load_checkpoint

TRAINING = ("TRAIN", "AHEAD", "REPLAY", "COOLDOWN")
Seen = Transition | Notice | Progress | StepReport | EvalReport


def recorded_until(run: RunDir, branch: str, step: int) -> Iterator[Signal]:
    """Signals of the branch's line of descent up to a step, oldest first."""
    for stretch in descent(run, branch):
        for row in measured_steps(run, stretch.branch):
            if stretch.owns(row["step"]) and row["step"] <= step:
                yield signal_of(row)


def signal_of(row: Mapping[str, Any]) -> Signal:
    """What the trigger sees of a step's measurements; a dropped number is missing."""
    return Signal(step=row["step"], reward=row.get("reward"), entropy=row.get("entropy"))


class Pilot:
    """One run under AutoNPO, from the newest transition on."""

    def __init__(self, world: World, state: AutoState, *, stop: StopFlag) -> None:
        self.world, self.run, self.recipe = world, world.run, world.recipe
        self.knobs = controller_knobs(world.recipe)
        self.stop = stop
        self.state = state
        self.watch = self.watched_until(state)

    def watched_until(self, state: AutoState) -> Watch:
        """A watch that has seen the line of descent up to the state's step."""
        watch = Watch(trigger_knobs(self.recipe))
        for signal in recorded_until(self.run, state.branch, state.step):
            watch.see(signal)
        return watch

    def drive(self) -> Iterator[Seen]:
        """Train, push, probe, roll back, replay, until the last step is done."""
        facts = {
            "PUSH": pushed_fact,
            "PROBE": confirmed_fact,
            "GUIDE_GEN": guided_fact,
            "ROLLBACK": rolled_back_fact,
            "JUDGE": judged_fact,
        }
        while not self.ended:
            act = facts.get(self.state.phase)
            if act is None:
                yield from self.go_on()
                continue
            fact = yield from self.stoppable(act(self.world, self.state))
            yield from self.told(fact)
            self.watch = self.watched_until(self.state)

    def lacking(self) -> list[str]:
        """Signals that no step on record has: without them nothing can ever trigger."""
        known = list(recorded_until(self.run, self.state.branch, sys.maxsize))
        return [
            f"no step on record has a finite {name}: AutoNPO cannot trigger on them"
            for name in ("reward", "entropy")
            if known and not any(is_finite(getattr(signal, name)) for signal in known)
        ]

    def why_ended(self) -> str:
        """In words."""
        if self.state.step >= self.recipe.train.num_steps:
            return f"all {self.recipe.train.num_steps} steps are made (train.num_steps may be raised)"
        return "autonpo.replay.after=stop, and the replay is done (autonpo.replay.after=continue goes on)"

    @property
    def ended(self) -> bool:
        """All steps are done and nothing waits; or the recipe wants no more than the replay."""
        if self.state.phase not in TRAINING:
            return False
        stops = self.recipe.autonpo.replay.after == "stop" and self.state.phase == "COOLDOWN"
        if stops and last_event(self.run) in ("replayed", "kept"):
            return True
        return self.state.step >= self.recipe.train.num_steps

    def stoppable(self, act: Generator[Progress, None, Fact]) -> Generator[Progress, None, Fact]:
        """The act, left between two of its chunks if a signal asks for it; each chunk is on the disk."""
        while True:
            if self.stop:
                act.close()
                append_event(self.run, "stopped", {"branch": self.state.branch, "step": self.state.step})
                raise StoppedEarly(
                    f"stopped by {self.stop.reason} in {self.state.phase}; what was sampled is saved",
                    f"npo resume {as_typed(self.run.root)} --autonpo",
                )
            try:
                progress = next(act)
            except StopIteration as done:
                return done.value
            yield progress

    def told(self, fact: Fact) -> Iterator[Seen]:
        """One fact to the state machine; its moves go to the disk before anything is done about them."""
        self.state, moves = advance(self.state, fact, knobs=self.knobs)
        append_transitions(self.run, moves)
        for move in moves:
            yield move
            yield Notice(message=in_words(move))

    def step_seen(self, signal: Signal) -> StepSeen:
        """The fact of one step; a guide must be on the disk, so only steps with a checkpoint can be acted upon."""
        at_checkpoint = signal.step % self.recipe.train.save_every == 0
        return StepSeen(reading=self.watch.see(signal), has_checkpoint=at_checkpoint)

    def go_on(self) -> Iterator[Seen]:
        """Look at what is on record up to the newest full state, then make steps, until something is to be done."""
        branch = self.state.branch
        known = history(self.run, branch)
        newest = newest_anchor(self.run, branch) if known else None
        if newest is not None and newest.step > self.state.step:
            yield from self.look_at_record(newest.step)
            if self.state.phase not in TRAINING or self.ended:
                return
        yield from self.train_on(newest)

    def look_at_record(self, last: int) -> Iterator[Seen]:
        """Recorded steps of the branch itself, up to `last`."""
        for signal in list(recorded_until(self.run, self.state.branch, last)):
            if signal.step > self.state.step:
                yield from self.told(self.step_seen(signal))
                if self.state.phase not in TRAINING or self.ended:
                    return
        # Lines may be lost (a power cut); the checkpoint is there all the same.
        self.state = replace(self.state, step=max(self.state.step, last))

    def train_on(self, newest: Checkpoint | None) -> Iterator[Seen]:
        """Live steps from the newest full state until a decision is due; its transitions wait for the checkpoint."""
        start = continuation(self.run, self.state.branch, ())
        if newest_branch(self.run) != self.state.branch:
            record_start(self.run, start, ())
        if newest is not None:
            load_checkpoint(self.world.policy, newest)
        guidance = open_guidance(self.world, start.segment)
        optimizer = new_optimizer(self.world.policy, self.recipe.train)
        state = yield from first_state(self.world, optimizer, start)
        trainer = open_trainer(self.world, optimizer, branch=self.state.branch, guidance=guidance)
        waiting: list[StepSeen] = []

        def watcher(report: StepReport) -> bool:
            signal = signal_of({"step": report.step, **report.metrics})
            if report.step <= self.state.step:
                # Made again after a kill, and judged before it; only a power cut loses its record.
                self.watch.catch_up(signal)
                return False
            fact = self.step_seen(signal)
            # Nothing is decided on figures that are not on the disk.
            trainer.steps.sync()
            waiting.append(fact)
            ahead, moves = advance(self.state, fact, knobs=self.knobs)
            done = self.recipe.autonpo.replay.after == "stop" and any(move.event == "replayed" for move in moves)
            return done or ahead.phase not in TRAINING

        try:
            for record in grpo_steps(trainer, state, self.stop, watcher=watcher):
                # By now the step before has been saved, if it had to be.
                yield from self.tell_all(waiting)
                yield record
            yield from self.tell_all(waiting)
        except StoppedEarly as stopped:
            raise StoppedEarly(stopped.message, f"npo resume {as_typed(self.run.root)} --autonpo") from stopped

    def tell_all(self, waiting: list[StepSeen]) -> Iterator[Seen]:
        """Facts whose step is safe on the disk."""
        while waiting:
            yield from self.told(waiting.pop(0))
