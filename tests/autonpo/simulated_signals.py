"""Simulated metrics, and a small driver that runs trigger and controller over them without any training."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

from npo_cli.autonpo.controller import (
    ControllerEvent,
    GuideBuilt,
    PrerequisiteMissing,
    ProbeFinished,
    ReplayTested,
    RollbackDone,
    StepObserved,
    advance,
)
from npo_cli.autonpo.trigger import Trigger, TriggerInput
from npo_cli.config.autonpo import AutonpoSettings
from npo_cli.types.autonpo import AutoNPOState, Phase, ProbeResult, Transition, TriggerReading


def autonpo_settings(**sections: Any) -> AutonpoSettings:
    """`trigger={"patience": 3}, max_interventions=2`.

    Defaults: window 20, patience 5, warm-up 40, cooldown 40, 3 interventions, no early bootstrap (of 20 steps), no
    acceptance test.
    """
    return AutonpoSettings.model_validate(sections)


DEFAULTS = autonpo_settings()
START = AutoNPOState(branch="main", step=0)
ACCEPTED = ProbeFinished(
    result=ProbeResult(is_accepted=True, reason="", distance=20, strata=(), scores=(), num_prompts=256)
)
REJECTED = ProbeFinished(
    result=ProbeResult(is_accepted=False, reason="too few failed prompts", distance=None, strata=(), scores=())
)
GUIDED = GuideBuilt(guide="auto-1", num_prompts=90, num_prompts_with_rollouts=30, num_reused=20, num_tokens=5000)
UNGUIDED = GuideBuilt(guide="auto-1", num_prompts=90, num_prompts_with_rollouts=0, num_reused=0, num_tokens=5000)
MISSING = PrerequisiteMissing(reason="checkpoint step_000060 is gone")


def curve(
    reward: Callable[[int], float], entropy: Callable[[int], float], *, last: int, noise: tuple[float, float], seed: int
) -> list[TriggerInput]:
    """Steps 1..last: reward + N(0, noise[0]), entropy * (1 + N(0, noise[1]))."""
    rng = Random(seed)
    return [
        TriggerInput(
            step=step,
            reward=reward(step) + rng.gauss(0, noise[0]),
            entropy=entropy(step) * (1 + rng.gauss(0, noise[1])),
        )
        for step in range(1, last + 1)
    ]


def run_until_trigger(
    signals: Iterable[TriggerInput], *, settings: AutonpoSettings = DEFAULTS, save_every: int = 1
) -> Iterator[Transition]:
    """Transitions of a run up to its first trigger; a checkpoint every `save_every` steps."""
    trigger, state = Trigger(settings.trigger), START
    for signal in signals:
        event = StepObserved(reading=trigger.observe(signal), has_checkpoint=signal.step % save_every == 0)
        state, transitions = advance(state, event, settings)
        yield from transitions
        if state.phase != "TRAIN":
            return


def event_steps(transitions: Iterable[Transition]) -> list[tuple[int, str]]:
    return [(transition.step, transition.event) for transition in transitions]


def first_step_of(event: str, transitions: Iterable[Transition]) -> int | None:
    return next((transition.step for transition in transitions if transition.event == event), None)


@dataclass(frozen=True, kw_only=True)
class ControllerStep:
    """One event: what the trigger read, the transitions, and the state after them."""

    reading: TriggerReading | None
    transitions: tuple[Transition, ...]
    state: AutoNPOState


@dataclass(frozen=True, kw_only=True)
class SimulatedRun:
    """A run under AutoNPO without training: `signal_at(branch, step)` is what a step records.

    As on disk, a branch remembers its parent and fork step, and nothing else survives a kill.
    """

    signal_at: Callable[[str, int], TriggerInput]
    settings: AutonpoSettings
    save_every: int = 10
    is_worse: bool = False
    """Outcome of the acceptance test."""
    forks: dict[str, tuple[str, int]] = field(default_factory=dict)

    def recorded_signal(self, branch: str, step: int) -> TriggerInput:
        """The step in the branch's ancestry."""
        while branch in self.forks and step <= self.forks[branch][1]:
            branch = self.forks[branch][0]
        return self.signal_at(branch, step)

    def trigger_at(self, state: AutoNPOState) -> Trigger:
        """A trigger as after a restart: it has read what is recorded."""
        trigger = Trigger(self.settings.trigger)
        for step in range(1, state.step + 1):
            trigger.observe(self.recorded_signal(state.branch, step))
        return trigger

    def run(self, state: AutoNPOState, *, last: int) -> Iterator[ControllerStep]:
        """From a state to the last step, with a new trigger."""
        trigger = self.trigger_at(state)
        while state.step < last or state.phase not in ("TRAIN", "REPLAY", "COOLDOWN"):
            event = self.next_event(state)
            reading = None
            if event is None:
                step = state.step + 1
                reading = trigger.observe(self.recorded_signal(state.branch, step))
                event = StepObserved(reading=reading, has_checkpoint=step % self.save_every == 0)
            state, transitions = advance(state, event, self.settings)
            if isinstance(event, RollbackDone | ReplayTested):
                trigger = self.trigger_at(state)
            yield ControllerStep(reading=reading, transitions=transitions, state=state)

    def next_event(self, state: AutoNPOState) -> ControllerEvent | None:
        """The event of each phase; None if it is the next step."""
        events: dict[Phase, Callable[[AutoNPOState], ControllerEvent]] = {
            "PROBE": lambda _: ACCEPTED,
            "GUIDE_GEN": lambda _: GUIDED,
            "ROLLBACK": self.branch_off,
            "ACCEPTANCE_TEST": lambda state: ReplayTested(
                is_worse=self.is_worse, evidence={}, parent=self.forks[state.branch][0]
            ),
        }
        return events[state.phase](state) if state.phase in events else None

    def branch_off(self, state: AutoNPOState) -> RollbackDone:
        name = "early" if state.is_early else f"auto-{state.num_interventions + 1}"
        self.forks[name] = (state.branch, state.step - state.distance)
        return RollbackDone(branch=name, to_step=state.step - state.distance, until_step=state.step)
