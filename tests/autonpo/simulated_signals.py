"""Simulated signals, and a small driver that takes them through the watch and the state machine."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from random import Random

from npo_cli.autonpo.controller import ControllerKnobs, advance
from npo_cli.autonpo.events import (
    ControllerEvent,
    GuideBuilt,
    PrerequisiteMissing,
    ProbeFinished,
    ReplayJudged,
    RollbackDone,
    StepObserved,
)
from npo_cli.autonpo.trigger import Trigger, TriggerInput, TriggerKnobs
from npo_cli.types.autonpo import AutoNPOState, Phase, ProbeResult, Transition, TriggerReading

KNOBS = TriggerKnobs(ema=0.9, window=20, c_r=1.0, d_H=0.05, c_H=4.0)
CONTROL = ControllerKnobs(
    patience=5,
    warmup=40,
    cooldown=40,
    max_interventions=3,
    early=False,
    early_scout=20,
    push_steps=0,
    accept_test=False,
)
START = AutoNPOState(branch="main", step=0)
ACCEPTED = ProbeFinished(
    confirmation=ProbeResult(is_accepted=True, reason="", distance=20, strata=(), scores=(), num_prompts=256)
)
REJECTED = ProbeFinished(
    confirmation=ProbeResult(is_accepted=False, reason="too few mistakes", distance=None, strata=(), scores=())
)
GUIDED = GuideBuilt(guide="auto-1", num_prompts=90, num_found=30, num_reused=20, num_tokens=5000)
UNGUIDED = GuideBuilt(guide="auto-1", num_prompts=90, num_found=0, num_reused=0, num_tokens=5000)
MISSED = PrerequisiteMissing(what="checkpoint step_000060 is gone")


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
    signals: Iterable[TriggerInput],
    *,
    trigger: TriggerKnobs = KNOBS,
    control: ControllerKnobs = CONTROL,
    save_every: int = 1,
) -> Iterator[Transition]:
    """Moves while a run trains, up to its first trigger; a checkpoint every `save_every` steps."""
    watch, state = Trigger(trigger), START
    for signal in signals:
        fact = StepObserved(reading=watch.observe(signal), has_checkpoint=signal.step % save_every == 0)
        state, moves = advance(state, fact, knobs=control)
        yield from moves
        if state.phase != "TRAIN":
            return


def event_steps(transitions: Iterable[Transition]) -> list[tuple[int, str]]:
    return [(move.step, move.event) for move in transitions]


def first_step_of(event: str, transitions: Iterable[Transition]) -> int | None:
    return next((move.step for move in transitions if move.event == event), None)


@dataclass(frozen=True, kw_only=True)
class ControllerStep:
    """One fact that the state machine was told: what the trigger saw, the moves, and the state after them."""

    reading: TriggerReading | None
    transitions: tuple[Transition, ...]
    state: AutoNPOState


@dataclass(frozen=True, kw_only=True)
class SimulatedRun:
    """A run under AutoNPO in which nothing is trained: `measured(branch, step)` is what a step records.

    As on a disk, a branch remembers where it left which other one, and nothing else outlives a kill.
    """

    signal_at: Callable[[str, int], TriggerInput]
    control: ControllerKnobs
    save_every: int = 10
    is_worse: bool = False
    """What the held-out test says."""
    forks: dict[str, tuple[str, int]] = field(default_factory=dict)

    def recorded_signal(self, branch: str, step: int) -> TriggerInput:
        """The step as the branch's line of descent has it."""
        while branch in self.forks and step <= self.forks[branch][1]:
            branch = self.forks[branch][0]
        return self.signal_at(branch, step)

    def watch_at(self, state: AutoNPOState) -> Trigger:
        """A watch as after a restart: it has seen what is on record."""
        watch = Trigger(KNOBS)
        for step in range(1, state.step + 1):
            watch.observe(self.recorded_signal(state.branch, step))
        return watch

    def run(self, state: AutoNPOState, *, last: int) -> Iterator[ControllerStep]:
        """From a state to the last step, with a new watch."""
        watch = self.watch_at(state)
        while state.step < last or state.phase not in ("TRAIN", "REPLAY", "COOLDOWN"):
            fact = self.next_event(state)
            reading = None
            if fact is None:
                step = state.step + 1
                reading = watch.observe(self.recorded_signal(state.branch, step))
                fact = StepObserved(reading=reading, has_checkpoint=step % self.save_every == 0)
            state, moves = advance(state, fact, knobs=self.control)
            if isinstance(fact, RollbackDone | ReplayJudged):
                watch = self.watch_at(state)
            yield ControllerStep(reading=reading, transitions=moves, state=state)

    def next_event(self, state: AutoNPOState) -> ControllerEvent | None:
        """The fact that each phase waits for; None where it is the next step."""
        answers: dict[Phase, Callable[[AutoNPOState], ControllerEvent]] = {
            "PROBE": lambda _: ACCEPTED,
            "GUIDE_GEN": lambda _: GUIDED,
            "ROLLBACK": self.branch_off,
            "JUDGE": lambda state: ReplayJudged(
                is_worse=self.is_worse, evidence={}, parent=self.forks[state.branch][0]
            ),
        }
        return answers[state.phase](state) if state.phase in answers else None

    def branch_off(self, state: AutoNPOState) -> RollbackDone:
        name = "early" if state.is_early else f"auto-{state.num_interventions + 1}"
        self.forks[name] = (state.branch, state.step - state.distance)
        return RollbackDone(branch=name, to_step=state.step - state.distance, until_step=state.step)
