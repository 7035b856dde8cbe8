"""The state machine of AutoNPO: a state and an event give the next state and the transitions that lead there.

Pure: no model, no file, no clock. The driver looks at `state.phase`, does what that phase requires and comes back with
an event. An event that does not fit the phase is a bug. The transitions of one event are written together or not at
all, because the state in each says that the event has been applied. The diagram is in `docs/explanation/autonpo.md`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from npo_cli.config.autonpo import EARLY_RUNG, AutonpoSettings
from npo_cli.registry import RUNGS
from npo_cli.types.autonpo import (
    REJECTIONS,
    AutoNPOState,
    Phase,
    ProbeResult,
    RungEffect,
    RungForecast,
    Transition,
    TransitionName,
    TriggerReading,
)

TRAINING_PHASES: tuple[Phase, ...] = ("TRAIN", "WINDOW", "REPLAY", "COOLDOWN")
"""Phases in which training steps are executed; in every other one the driver performs an action."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunBegun:
    """Step 0 is saved, and an early bootstrap with a disposable scout is due (`is_early_scout_due`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepObserved:
    """A training step was executed, or found on record, and the trigger has read it."""

    reading: TriggerReading
    has_checkpoint: bool
    """Whether the policy after this step is on disk: only then can it be the guide."""
    effect: RungEffect | None = None
    """Of the rung before, where this step completes its measurement (`is_effect_due`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RungForecasted:
    """A rung of the ladder that needs no probe was forecast."""

    forecast: RungForecast


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoutTrained:
    """The disposable scout of a rung has ended."""

    scout: str
    """Its branch."""
    scout_step: int
    """Its last step."""
    num_steps: int
    num_tokens: int
    """Generated to train it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RungApplied:
    """A branch was created on which a rung is in effect."""

    branch: str
    to_step: int
    """Step of the current branch that it forks from: the newest, or that of a rollback."""
    until_step: int
    """Last step of the window."""
    settings: tuple[str, ...]
    """KEY=VALUE of the window, in the recipe of the branch."""
    undo: Mapping[str, Any]
    """The same keys with their values before."""
    guide: str | None
    """Guide cache that is sampled while training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeFinished:
    """Failed prompts were sampled again."""

    result: ProbeResult


@dataclass(frozen=True, kw_only=True, slots=True)
class PrerequisiteMissing:
    """Something that the current phase needs is missing, for example a checkpoint."""

    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class GuideBuilt:
    """The guide cache of the intervention is complete."""

    guide: str
    """Name of the cache."""
    num_prompts: int
    """Failed prompts that a guide was sampled for."""
    num_prompts_with_rollouts: int
    """Prompts with a verified-correct response."""
    num_reused: int
    """Of those, prompts with a response taken from the probe."""
    num_tokens: int
    """Generated in addition to the probe's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RollbackDone:
    """A branch was created that forks from the current one at `to_step`."""

    branch: str
    to_step: int
    until_step: int
    """Last step of its replay."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayTested:
    """The replayed policy was compared with the one that it replaces."""

    is_worse: bool
    evidence: Mapping[str, Any]
    parent: str
    """The branch to return to if the replay is worse."""


ControllerEvent = (
    RunBegun
    | StepObserved
    | RungForecasted
    | ScoutTrained
    | RungApplied
    | ProbeFinished
    | PrerequisiteMissing
    | GuideBuilt
    | RollbackDone
    | ReplayTested
)


def advance(
    state: AutoNPOState, event: ControllerEvent, settings: AutonpoSettings
) -> tuple[AutoNPOState, tuple[Transition, ...]]:
    """The next state and the transitions in order; most steps have none. The last transition holds that state."""
    run = _Advance(state, settings)
    match event:
        case RunBegun():
            run.start_early_scout()
        case StepObserved():
            run.observe_step(event)
        case ProbeFinished(result=result):
            run.require_phase("PROBE")
            if result.is_accepted:
                assert result.distance is not None, "an accepted probe has a distance"
                phase: Phase = "APPLY" if has_window(state.rung) else "GUIDE_GEN"
                run.record("probe_accepted", asdict(result), phase=phase, distance=result.distance)
            else:
                run.refuse_rung("probe_rejected", asdict(result), has_evidence=True)
        case RungForecasted(forecast=forecast):
            run.require_phase("FORECAST")
            if forecast.is_taken:
                run.record("rung_chosen", asdict(forecast), phase="SCOUT" if trains_scout(forecast.rung) else "APPLY")
            else:
                run.refuse_rung("rung_refused", asdict(forecast), has_evidence=forecast.value is not None)
        case ScoutTrained():
            run.require_phase("SCOUT")
            run.record("scout_trained", asdict(event), phase="APPLY")
        case RungApplied():
            run.start_window(event)
        case PrerequisiteMissing():
            run.require_phase("FORECAST", "PROBE", "SCOUT", "APPLY", "GUIDE_GEN", "ROLLBACK", "ACCEPTANCE_TEST")
            run.start_cooldown("prerequisite_missing", asdict(event))
        case GuideBuilt():
            run.require_phase("GUIDE_GEN")
            if event.num_prompts_with_rollouts:
                run.record("guide_built", asdict(event), phase="ROLLBACK")
            else:
                # It was paid for: without a limit on empty caches, a plateau would build one after the other.
                run.start_cooldown("guide_empty", asdict(event), num_interventions=run.count_intervention())
        case RollbackDone():
            run.start_replay(event)
        case ReplayTested():
            run.require_phase("ACCEPTANCE_TEST")
            evidence = {**event.evidence, "parent": event.parent}
            if event.is_worse:
                run.start_cooldown("replay_rejected", evidence, branch=event.parent)
            else:
                run.start_cooldown("replay_accepted", evidence)
    if run.transitions:
        # The step that ends a cooldown may begin a streak; a restart from this transition must know of it.
        run.transitions[-1] = replace(run.transitions[-1], state=run.state)
    return run.state, tuple(run.transitions)


def is_effect_due(state: AutoNPOState, step: int) -> bool:
    """Whether a step, the next one of the state, completes what a rung's effect is measured on: its cooldown."""
    return state.rung is not None and state.phase == "COOLDOWN" and step == state.until_step


def has_window(rung: str | None) -> bool:
    """Whether an intervention is a window of steps with other settings; the published one (None) is a replay."""
    return rung is not None and RUNGS.get(rung).has_window


def trains_scout(rung: str) -> bool:
    """Whether a rung trains a disposable scout before its window."""
    return RUNGS.get(rung).trains_scout


def is_early_scout_due(state: AutoNPOState, settings: AutonpoSettings) -> bool:
    """Whether the run begins with a disposable scout: at step 0, before anything else."""
    early = settings.early
    return early.enabled and early.scout == "disposable" and state == AutoNPOState(branch=state.branch, step=0)


def explain_no_trigger(state: AutoNPOState, reading: TriggerReading, settings: AutonpoSettings) -> str:
    """One word for why a step did not trigger, given the state after it.

    The step that ends a replay already counts as cooldown.
    """
    assert state.step == reading.step, "the state after this very step"
    if state.phase in ("REPLAY", "ACCEPTANCE_TEST"):
        return "replay"
    if state.phase == "WINDOW":
        return "window"
    if state.phase == "COOLDOWN":
        return "cooldown"
    assert state.phase == "TRAIN", f"a step in {state.phase} did trigger"
    if state.step <= settings.trigger.warmup_steps:
        return "warmup"
    if state.has_warned:
        return "no_checkpoint"
    if state.stagnation_streak >= settings.trigger.patience:
        return "limit_reached"
    return "short_streak" if reading.verdict == "stagnant" else reading.verdict


class _Advance:
    """A state while one event is applied to it."""

    def __init__(self, state: AutoNPOState, settings: AutonpoSettings) -> None:
        self.state = state
        self.settings = settings
        self.transitions: list[Transition] = []

    def require_phase(self, *phases: Phase) -> None:
        """Refuse an event that does not fit the phase."""
        assert self.state.phase in phases, f"{' or '.join(phases)} expected, not {self.state.phase}"

    def record(self, name: TransitionName, evidence: Mapping[str, Any], **changes: Any) -> None:
        """One transition; its step is that of the state before it, also where the new state is of an earlier step."""
        step, phase_before = self.state.step, self.state.phase
        self.state = replace(self.state, **changes)
        self.transitions.append(
            Transition(step=step, event=name, phase_before=phase_before, state=self.state, evidence=evidence)
        )

    def leave_train(self, name: TransitionName, evidence: Mapping[str, Any], **changes: Any) -> None:
        """An intervention begins, and any streak ends."""
        cleared = {"stagnation_streak": 0, "has_warned": False, "until_step": None, "distance": None, "rung": None}
        self.record(name, evidence, **{**cleared, **changes})

    def start_cooldown(self, name: TransitionName, evidence: Mapping[str, Any], **changes: Any) -> None:
        """Any end of an intervention: after one at step t, step t + cooldown + 1 is the first to count again.

        The n-th rejection in a row has a cooldown of 2^(n-1) cooldown_steps; a replay that lasts ends the row. With a
        ladder the rung waits instead, and of a rung that lasts the effect is measured in the cooldown.
        """
        is_rejection, lasts = name in REJECTIONS and name != "prerequisite_missing", name.startswith("replay_")
        before, rung = self.state.num_rejections, self.state.rung
        rejections = before + 1 if is_rejection else 0 if lasts else before
        doublings = before if is_rejection else 0
        if rung is not None:
            rejections, doublings = before, 0
            changes |= self.back_off(rung) if is_rejection else {}
            rung = None if name in REJECTIONS else rung
        until = self.state.step + self.settings.trigger.cooldown_steps * 2**doublings
        ended = {"until_step": until, "distance": None, "is_early": False, "num_rejections": rejections, "rung": rung}
        self.record(name, evidence, phase="COOLDOWN", **ended, **changes)

    # The ladder

    def start_early_scout(self) -> None:
        assert is_early_scout_due(self.state, self.settings), "a run begins once"
        evidence = {"rung": EARLY_RUNG, "scout_steps": self.settings.early.scout_steps}
        self.record("early_bootstrap", evidence, phase="SCOUT", rung=EARLY_RUNG, is_early=True, has_tried_early=True)

    def climb(self, name: TransitionName, evidence: Mapping[str, Any], **changes: Any) -> None:
        """Consider the next rung that does not wait; after the last one a cooldown, until one may be considered."""
        ladder, rung, step = self.settings.ladder, self.state.rung, self.state.step
        waits = changes.get("waits", self.state.waits)
        left = ladder[ladder.index(rung) + 1 :] if rung in ladder else ladder
        due = next((each for each in left if step > waits.get(each, -1)), None)
        if due is not None:
            self.record(name, evidence, phase=first_phase(due), rung=due, **changes)
            return
        first = min(waits.get(each, -1) for each in ladder)
        until = max(step + self.settings.trigger.cooldown_steps, first)
        self.record(name, evidence, **{**changes, "phase": "COOLDOWN", "rung": None, "until_step": until})

    def refuse_rung(self, name: TransitionName, evidence: Mapping[str, Any], *, has_evidence: bool) -> None:
        """Go on to the next rung. `has_evidence`: against this one, so that it waits; else it was not available."""
        if self.state.rung is None:
            self.start_cooldown(name, evidence)
            return
        self.climb(name, evidence, **(self.back_off(self.state.rung) if has_evidence else {}))

    def back_off(self, rung: str) -> dict[str, Any]:
        """A rung refused n times in a row, or found not to pay, waits 2^(n-1) cooldown_steps."""
        before = self.state.refusals.get(rung, 0)
        until = self.state.step + self.settings.trigger.cooldown_steps * 2**before
        return {
            "refusals": {**self.state.refusals, rung: before + 1},
            "waits": {**self.state.waits, rung: until},
        }

    def start_window(self, event: RungApplied) -> None:
        self.require_phase("APPLY")
        early = {"is_early": True} if self.state.is_early else {}
        assert event.to_step < event.until_step, "a window has at least one step"
        self.record(
            "rung_applied",
            {"rung": self.state.rung, **asdict(event), "parent": self.state.branch, **early},
            branch=event.branch,
            step=event.to_step,
            until_step=event.until_step,
            phase="WINDOW",
            num_interventions=self.count_intervention(),
        )

    def record_effect(self, effect: RungEffect) -> None:
        """The measured rung may be considered again: at once if it paid, else after a wait."""
        changes = self.back_off(effect.rung)
        if effect.value >= 1:
            kept = {rung: count for rung, count in self.state.refusals.items() if rung != effect.rung}
            changes = {"refusals": kept}
        self.record("rung_measured", asdict(effect), rung=None, **changes)

    def observe_step(self, event: StepObserved) -> None:
        self.require_phase(*TRAINING_PHASES)
        last, step, warmup = self.state.step, event.reading.step, self.settings.trigger.warmup_steps
        assert step > last, "steps increase"
        self.state = replace(self.state, step=step)
        if self.state.phase == "REPLAY":
            self.observe_replay_step(step)
            return
        if self.state.phase == "WINDOW":
            assert self.state.until_step is not None
            if step >= self.state.until_step:
                self.start_cooldown("window_done", {"rung": self.state.rung})
            return
        if self.state.phase == "COOLDOWN":
            assert self.state.until_step is not None
            if event.effect is not None:
                self.record_effect(event.effect)
            # A cooldown that begins in the warm-up (early bootstrap) lasts at least as long as the warm-up.
            if step <= max(self.state.until_step, warmup):
                return
            self.record("armed", {}, phase="TRAIN", until_step=None, rung=None)
        elif last <= warmup < step:
            self.record("armed", {})
        self.observe_train_step(event)

    def observe_replay_step(self, step: int) -> None:
        assert self.state.until_step is not None
        if step < self.state.until_step:
            return
        evidence = {"distance": self.state.distance}
        if self.settings.replay.acceptance_test:
            self.record("replay_done", evidence, phase="ACCEPTANCE_TEST", until_step=None)
        else:
            self.start_cooldown("replay_done", evidence)

    def observe_train_step(self, event: StepObserved) -> None:
        """The early bootstrap, or the streak and what follows from it."""
        early = self.settings.early
        # The bootstrap comes at the scout's last step on the first branch, which an intervention would have left.
        untouched = not self.state.has_tried_early and self.state.num_interventions == 0
        is_run = early.enabled and early.scout == "run"
        if is_run and untouched and self.state.step == early.scout_steps:
            distance = early.scout_steps
            changes = {"distance": distance, "is_early": True, "has_tried_early": True}
            self.leave_train("early_bootstrap", {"distance": distance}, phase="PROBE", **changes)
            return
        if self.state.step <= self.settings.trigger.warmup_steps:
            return
        self.update_streak(event.reading)
        if self.state.has_warned and event.has_checkpoint:
            evidence = _reading_evidence(event.reading, self.state.stagnation_streak)
            if self.is_limit_reached():
                evidence["num_interventions"] = self.state.num_interventions
                self.record("limit_reached", evidence, has_warned=False)
            elif self.settings.is_published:
                self.leave_train("trigger", evidence, phase="PROBE")
            else:
                self.climb("trigger", evidence, stagnation_streak=0, has_warned=False, until_step=None, distance=None)

    def update_streak(self, reading: TriggerReading) -> None:
        """The streak grows, ends, or (values missing) stays; at `patience` it becomes a warning."""
        patience = self.settings.trigger.patience
        if reading.verdict == "stagnant":
            streak = self.state.stagnation_streak + 1
            self.state = replace(self.state, stagnation_streak=streak)
            # A streak that reached the limit of interventions warns again only if the limit has been raised since.
            is_due = streak == patience or (streak > patience and not self.is_limit_reached())
            if is_due and not self.state.has_warned:
                self.record("warning", _reading_evidence(reading, streak), has_warned=True)
        elif reading.verdict in ("rising", "entropy_level"):
            if self.state.has_warned:
                evidence = _reading_evidence(reading, self.state.stagnation_streak)
                self.record("recovered", evidence, stagnation_streak=0, has_warned=False)
            self.state = replace(self.state, stagnation_streak=0)

    def is_limit_reached(self) -> bool:
        return 0 <= self.settings.max_interventions <= self.state.num_interventions

    def count_intervention(self) -> int:
        """The interventions with this one; the early bootstrap is none."""
        return self.state.num_interventions + (not self.state.is_early)

    def start_replay(self, event: RollbackDone) -> None:
        self.require_phase("ROLLBACK")
        assert event.to_step < event.until_step, "a replay has at least one step"
        early = self.state.is_early
        self.record(
            "rolled_back",
            {**asdict(event), "parent": self.state.branch, "is_early": early},
            branch=event.branch,
            step=event.to_step,
            until_step=event.until_step,
            phase="REPLAY",
            num_interventions=self.count_intervention(),
        )


def first_phase(rung: str) -> Phase:
    """What a rung begins with: its forecast, or the probe that makes one."""
    return "PROBE" if RUNGS.get(rung).needs_probe else "FORECAST"


def _reading_evidence(reading: TriggerReading, streak: int) -> dict[str, Any]:
    """What the trigger read, as plain data; the step is the transition's own."""
    evidence = asdict(reading)
    del evidence["step"]
    return {**evidence, "streak": streak}
