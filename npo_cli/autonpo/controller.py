"""The state machine of AutoNPO: a state and a fact give the next state and the moves that led there.

Pure: it trains nothing, asks nobody and reads no file. Whoever drives it looks at `state.phase`, does what that says,
and comes back with a fact. A fact that does not fit the phase is our own mistake. The moves of one fact belong
together: they are written down together or not at all, because the state of each says that the fact has been seen.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from npo_cli.autonpo.events import (
    ControllerEvent,
    ExtrapolationStarted,
    GuideBuilt,
    PrerequisiteMissing,
    ProbeFinished,
    ReplayJudged,
    RollbackDone,
    StepObserved,
)
from npo_cli.types.autonpo import AutoNPOState, Event, Phase, ProbeResult, Transition, TriggerReading


@dataclass(frozen=True, kw_only=True, slots=True)
class ControllerKnobs:
    """The settings that decide the moves (auto, early and autonpo.replay.acceptance_test)."""

    patience: int
    """Steps of stagnation with falling entropy before a warning."""
    warmup: int
    """Last step that counts for no streak."""
    cooldown: int
    """Steps of rest: after one that begins at step t, step t + cooldown + 1 is the first that counts again."""
    max_interventions: int
    """-1 is no limit."""
    early: bool
    early_scout: int
    accept_test: bool
    push_steps: int
    """Steps of extrapolated guidance that come before a probe; 0 is none."""


def advance(
    state: AutoNPOState, fact: ControllerEvent, *, knobs: ControllerKnobs
) -> tuple[AutoNPOState, tuple[Transition, ...]]:
    """The next state and the moves that led there, in order; most steps make none. The last one holds that state."""
    course = _Course(state, knobs)
    match fact:
        case StepObserved():
            course.step_seen(fact)
        case ProbeFinished():
            course.confirmed(fact.confirmation)
        case ExtrapolationStarted():
            course.expect("PUSH")
            course.move("pushed", asdict(fact), branch=fact.branch, until_step=fact.until_step, phase="AHEAD")
        case PrerequisiteMissing():
            course.missed(fact)
        case GuideBuilt():
            course.guided(fact)
        case RollbackDone():
            course.rolled_back(fact)
        case ReplayJudged():
            course.expect("JUDGE")
            branch = fact.parent if fact.is_worse else state.branch
            evidence = {**fact.evidence, "parent": fact.parent}
            course.rest("reverted" if fact.is_worse else "kept", evidence, branch=branch)
    if course.moves:
        # The step that ends a rest may begin a streak; a restart from this move must know of it.
        course.moves[-1] = replace(course.moves[-1], state=course.state)
    return course.state, tuple(course.moves)


def explain_no_trigger(state: AutoNPOState, reading: TriggerReading, *, knobs: ControllerKnobs) -> str:
    """One word for a step that did not trigger, given the state after it.

    The step that ends a replay already counts as rest.
    """
    assert state.step == reading.step, "the state after this very step"
    if state.phase in ("REPLAY", "JUDGE"):
        return "replaying"
    if state.phase == "COOLDOWN":
        return "resting"
    if state.phase == "AHEAD":
        return "pushing"
    assert state.phase == "TRAIN", f"a step in {state.phase} did trigger"
    if state.step <= knobs.warmup:
        return "warming_up"
    if state.has_warned:
        return "waiting"
    if state.stagnation_streak >= knobs.patience:
        return "capped"
    return "streak" if reading.verdict == "stagnant" else reading.verdict


class _Course:
    """A state on its way through one fact."""

    def __init__(self, state: AutoNPOState, knobs: ControllerKnobs) -> None:
        self.state = state
        self.knobs = knobs
        self.moves: list[Transition] = []

    def expect(self, *phases: Phase) -> None:
        """Refuse a fact that nobody waits for."""
        assert self.state.phase in phases, f"{' or '.join(phases)} expected, not {self.state.phase}"

    def move(self, event: Event, evidence: Mapping[str, Any], **changes: Any) -> None:
        """One transition; its step is where the run stood when the fact came, also where it then goes back."""
        step, phase_before = self.state.step, self.state.phase
        self.state = replace(self.state, **changes)
        self.moves.append(
            Transition(step=step, event=event, phase_before=phase_before, state=self.state, evidence=evidence)
        )

    def leave_train(self, event: Event, evidence: Mapping[str, Any], **changes: Any) -> None:
        """An intervention begins: whatever streak there was is over."""
        self.move(
            event,
            evidence,
            **{"stagnation_streak": 0, "has_warned": False, "until_step": None, "distance": None, **changes},
        )

    def rest(self, event: Event, evidence: Mapping[str, Any], **changes: Any) -> None:
        """Any end of an intervention, and the cooldown after it."""
        until = self.state.step + self.knobs.cooldown
        self.move(event, evidence, phase="COOLDOWN", until_step=until, distance=None, is_early=False, **changes)

    def step_seen(self, fact: StepObserved) -> None:
        self.expect("TRAIN", "AHEAD", "REPLAY", "COOLDOWN")
        last, step = self.state.step, fact.reading.step
        assert step > last, "steps increase"
        self.state = replace(self.state, step=step)
        if self.state.phase == "REPLAY":
            self.replay_step(step)
            return
        if self.state.phase == "AHEAD":
            self.ahead_step(fact.reading)
            return
        if self.state.phase == "COOLDOWN":
            assert self.state.until_step is not None
            # A rest that begins in the warm-up (early bootstrap) lasts at least as long as that.
            if step <= max(self.state.until_step, self.knobs.warmup):
                return
            self.move("armed", {}, phase="TRAIN", until_step=None)
        elif last <= self.knobs.warmup < step:
            self.move("armed", {})
        self.train_step(fact)

    def replay_step(self, step: int) -> None:
        assert self.state.until_step is not None
        if step < self.state.until_step:
            return
        evidence = {"distance": self.state.distance}
        if self.knobs.accept_test:
            self.move("replayed", evidence, phase="JUDGE", until_step=None)
        else:
            self.rest("replayed", evidence)

    def ahead_step(self, reading: TriggerReading) -> None:
        """At the end of the guidance: it helped if the reward rises again, else the mistakes are asked."""
        assert self.state.until_step is not None
        if reading.step < self.state.until_step:
            return
        if reading.verdict == "rising":
            self.rest("moved", _figures(reading, 0))
        else:
            self.move("unmoved", _figures(reading, 0), phase="PROBE", until_step=None)

    def missed(self, fact: PrerequisiteMissing) -> None:
        """Nothing can be pushed: then the mistakes are asked. Of everything else it is the end."""
        self.expect("PUSH", "PROBE", "GUIDE_GEN", "ROLLBACK", "JUDGE")
        if self.state.phase == "PUSH":
            self.move("unpushed", asdict(fact), phase="PROBE")
        else:
            self.rest("missed", asdict(fact))

    def train_step(self, fact: StepObserved) -> None:
        """An ordinary step: the early bootstrap, or the streak and what follows from it."""
        if self.early_is_due():
            scout = self.knobs.early_scout
            self.leave_train(
                "early", {"distance": scout}, phase="GUIDE_GEN", distance=scout, is_early=True, has_tried_early=True
            )
            return
        if self.state.step <= self.knobs.warmup:
            return
        self.count(fact.reading)
        if self.state.has_warned and fact.has_checkpoint:
            self.answer_warning(fact.reading)

    def early_is_due(self) -> bool:
        """At the scout's last step on the first branch: an intervention would have left it."""
        untouched = not self.state.has_tried_early and self.state.num_interventions == 0
        return self.knobs.early and untouched and self.state.step == self.knobs.early_scout

    def count(self, reading: TriggerReading) -> None:
        """The streak grows, ends, or (data missing) stays; at `patience` it becomes a warning."""
        if reading.verdict == "stagnant":
            streak = self.state.stagnation_streak + 1
            self.state = replace(self.state, stagnation_streak=streak)
            # A streak that met the cap is warned of again only if the cap has been raised since.
            is_due = streak == self.knobs.patience or (streak > self.knobs.patience and not self.is_capped())
            if is_due and not self.state.has_warned:
                self.move("warning", _figures(reading, streak), has_warned=True)
        elif reading.verdict in ("rising", "entropy_level"):
            if self.state.has_warned:
                self.move(
                    "recovered", _figures(reading, self.state.stagnation_streak), stagnation_streak=0, has_warned=False
                )
            self.state = replace(self.state, stagnation_streak=0)

    def answer_warning(self, reading: TriggerReading) -> None:
        """A probe, or the word that there will be none; the warning is answered either way."""
        evidence = _figures(reading, self.state.stagnation_streak)
        if self.is_capped():
            self.move("capped", {**evidence, "interventions": self.state.num_interventions}, has_warned=False)
        else:
            self.leave_train("trigger", evidence, phase="PUSH" if self.knobs.push_steps else "PROBE")

    def is_capped(self) -> bool:
        return 0 <= self.knobs.max_interventions <= self.state.num_interventions

    def confirmed(self, confirmation: ProbeResult) -> None:
        self.expect("PROBE")
        evidence = asdict(confirmation)
        if confirmation.is_accepted:
            assert confirmation.distance is not None, "a distance was chosen"
            self.move("accepted", evidence, phase="GUIDE_GEN", distance=confirmation.distance)
        else:
            self.rest("rejected", evidence)

    def guided(self, fact: GuideBuilt) -> None:
        self.expect("GUIDE_GEN")
        if fact.num_found:
            self.move("guided", asdict(fact), phase="ROLLBACK")
        else:
            self.rest("unguided", asdict(fact))

    def rolled_back(self, fact: RollbackDone) -> None:
        self.expect("ROLLBACK")
        assert fact.to_step < fact.until_step, "a replay has a step"
        early = self.state.is_early
        self.move(
            "rolled_back",
            {**asdict(fact), "parent": self.state.branch, "early": early},
            branch=fact.branch,
            step=fact.to_step,
            until_step=fact.until_step,
            phase="REPLAY",
            num_interventions=self.state.num_interventions + (not early),
        )


def _figures(reading: TriggerReading, streak: int) -> dict[str, Any]:
    """What the trigger saw, as plain data; the step is the transition's own."""
    seen = asdict(reading)
    del seen["step"]
    return {**seen, "streak": streak}
