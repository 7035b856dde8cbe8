"""Simulated signals, and a small driver that takes them through the watch and the state machine."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from random import Random

from npo_cli.auto_records import AutoState, Confirmation, Phase, Transition, TriggerReading
from npo_cli.guide.controller import ControllerKnobs, advance
from npo_cli.guide.facts import Confirmed, Fact, Guided, Judged, Missed, RolledBack, StepSeen
from npo_cli.guide.trigger import Signal, TriggerKnobs, Watch

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
START = AutoState(branch="main", step=0)
ACCEPTED = Confirmed(
    confirmation=Confirmation(accepted=True, reason="", distance=20, strata=(), scores=(), num_prompts=256)
)
REJECTED = Confirmed(
    confirmation=Confirmation(accepted=False, reason="too few mistakes", distance=None, strata=(), scores=())
)
GUIDED = Guided(guide="auto-1", num_asked=90, num_found=30, num_reused=20, num_tokens=5000)
UNGUIDED = Guided(guide="auto-1", num_asked=90, num_found=0, num_reused=0, num_tokens=5000)
MISSED = Missed(what="checkpoint step_000060 is gone")


def curve(
    reward: Callable[[int], float], entropy: Callable[[int], float], *, last: int, noise: tuple[float, float], seed: int
) -> list[Signal]:
    """Steps 1..last: reward + N(0, noise[0]), entropy * (1 + N(0, noise[1]))."""
    rng = Random(seed)
    return [
        Signal(
            step=step,
            reward=reward(step) + rng.gauss(0, noise[0]),
            entropy=entropy(step) * (1 + rng.gauss(0, noise[1])),
        )
        for step in range(1, last + 1)
    ]


def watched(
    signals: Iterable[Signal], *, trigger: TriggerKnobs = KNOBS, control: ControllerKnobs = CONTROL, save_every: int = 1
) -> Iterator[Transition]:
    """Moves while a run trains, up to its first trigger; a checkpoint every `save_every` steps."""
    watch, state = Watch(trigger), START
    for signal in signals:
        fact = StepSeen(reading=watch.see(signal), has_checkpoint=signal.step % save_every == 0)
        state, moves = advance(state, fact, knobs=control)
        yield from moves
        if state.phase != "TRAIN":
            return


def moves_of(transitions: Iterable[Transition]) -> list[tuple[int, str]]:
    return [(move.step, move.event) for move in transitions]


def first(event: str, transitions: Iterable[Transition]) -> int | None:
    return next((move.step for move in transitions if move.event == event), None)


@dataclass(frozen=True, kw_only=True)
class Told:
    """One fact that the state machine was told: what the trigger saw, the moves, and the state after them."""

    reading: TriggerReading | None
    moves: tuple[Transition, ...]
    state: AutoState


@dataclass(frozen=True, kw_only=True)
class Story:
    """A run under AutoNPO in which nothing is trained: `measured(branch, step)` is what a step records.

    As on a disk, a branch remembers where it left which other one, and nothing else outlives a kill.
    """

    measured: Callable[[str, int], Signal]
    control: ControllerKnobs
    save_every: int = 10
    worse: bool = False
    """What the held-out test says."""
    born: dict[str, tuple[str, int]] = field(default_factory=dict)

    def on_record(self, branch: str, step: int) -> Signal:
        """The step as the branch's line of descent has it."""
        while branch in self.born and step <= self.born[branch][1]:
            branch = self.born[branch][0]
        return self.measured(branch, step)

    def watch_at(self, state: AutoState) -> Watch:
        """A watch as after a restart: it has seen what is on record."""
        watch = Watch(KNOBS)
        for step in range(1, state.step + 1):
            watch.see(self.on_record(state.branch, step))
        return watch

    def go_on(self, state: AutoState, *, last: int) -> Iterator[Told]:
        """From a state to the last step, with a new watch."""
        watch = self.watch_at(state)
        while state.step < last or state.phase not in ("TRAIN", "REPLAY", "COOLDOWN"):
            fact = self.answer(state)
            reading = None
            if fact is None:
                step = state.step + 1
                reading = watch.see(self.on_record(state.branch, step))
                fact = StepSeen(reading=reading, has_checkpoint=step % self.save_every == 0)
            state, moves = advance(state, fact, knobs=self.control)
            if isinstance(fact, RolledBack | Judged):
                watch = self.watch_at(state)
            yield Told(reading=reading, moves=moves, state=state)

    def answer(self, state: AutoState) -> Fact | None:
        """The fact that each phase waits for; None where it is the next step."""
        answers: dict[Phase, Callable[[AutoState], Fact]] = {
            "PROBE": lambda _: ACCEPTED,
            "GUIDE_GEN": lambda _: GUIDED,
            "ROLLBACK": self.branch_off,
            "JUDGE": lambda state: Judged(worse=self.worse, evidence={}, parent=self.born[state.branch][0]),
        }
        return answers[state.phase](state) if state.phase in answers else None

    def branch_off(self, state: AutoState) -> RolledBack:
        name = "early" if state.early else f"auto-{state.interventions + 1}"
        self.born[name] = (state.branch, state.step - state.distance)
        return RolledBack(branch=name, to_step=state.step - state.distance, until=state.step)
