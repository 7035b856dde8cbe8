"""`npo autonpo`: what AutoNPO did in a run, or, with --explain, would have done on recorded metrics.

The simulation runs the trigger and the controller themselves. What needs a model is assumed and marked: a record
cannot be probed, so every trigger counts as accepted; and it holds the steps of a replay only once, so a simulated
replay uses none of them.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from npo_cli.autonpo.controller import (
    ControllerEvent,
    GuideBuilt,
    PrerequisiteMissing,
    ProbeFinished,
    ReplayTested,
    RollbackDone,
    RunBegun,
    RungApplied,
    RungForecasted,
    ScoutTrained,
    StepObserved,
    advance,
    explain_no_trigger,
    has_window,
    is_early_scout_due,
)
from npo_cli.autonpo.log_files import read_rows
from npo_cli.autonpo.preflight import dump_autonpo_settings
from npo_cli.autonpo.trainer_logs import LogColumns, extract_signals, resolve_columns
from npo_cli.autonpo.trigger import Trigger, TriggerInput
from npo_cli.config.loading import apply_overrides, recipe_from_dict
from npo_cli.config.recipe import Recipe
from npo_cli.errors import NpoError, quote_path
from npo_cli.report.autonpo_plot import plot_autonpo
from npo_cli.storage.autonpo_log import read_transitions
from npo_cli.storage.checkpoints import list_ancestry_checkpoints
from npo_cli.storage.cost_sums import compute_run_costs
from npo_cli.storage.layout import FIRST_BRANCH, RunDir, is_run_directory, open_run
from npo_cli.storage.lineage import ancestry, find_main_branch
from npo_cli.storage.metrics import read_metrics
from npo_cli.types.autonpo import (
    AutoNPOState,
    NonTriggerSpan,
    ProbeResult,
    RungForecast,
    Transition,
    TriggerReading,
)
from npo_cli.types.costs import RunCosts
from npo_cli.types.rollouts import Notice
from npo_cli.types.views import Conclusion


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedRun:
    """The metrics to simulate on, and the settings."""

    source: Path
    run: RunDir | None
    """None for a file of metrics."""
    branch: str
    recipe: Recipe
    save_every: int
    trigger_inputs: tuple[TriggerInput, ...]
    assumptions: tuple[str, ...] = ()
    """What was assumed in reading the metrics."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DryRun:
    """Readings of the trigger, transitions of the controller, and why each other step did not trigger."""

    readings: tuple[TriggerReading, ...]
    transitions: tuple[Transition, ...]
    reasons: tuple[tuple[int, str], ...]


ONCE = "assumed to be applied once"


# Loading metrics


def load_run_record(root: Path, *, columns: LogColumns, overrides: Sequence[str], branch: str | None) -> RecordedRun:
    """A branch of a run with its ancestry, under the branch's recipe."""
    run = open_run(root)
    branch = branch or find_main_branch(run)
    spans = ancestry(run, branch)
    recipe = apply_overrides(recipe_from_dict(run.read_recipe(branch), source=str(run.recipe_path(branch))), overrides)
    rows = [row for span in spans for row in read_metrics(run, span.branch) if span.contains(row["step"])]
    if not rows:
        raise NpoError(f"{root} has no steps on branch {branch} yet", f"npo resume {quote_path(root)}")
    return RecordedRun(
        source=root,
        run=run,
        branch=branch,
        recipe=recipe,
        save_every=recipe.train.save_every,
        trigger_inputs=tuple(extract_signals(rows, resolve_columns(rows, columns, source=root), source=root)),
    )


def load_file_record(path: Path, *, columns: LogColumns, overrides: Sequence[str]) -> RecordedRun:
    """A trainer's log file with default settings; every record has a checkpoint unless train.save_every is given."""
    recipe = apply_overrides(recipe_from_dict({}), overrides)
    given = any(setting.partition("=")[0] == "train.save_every" for setting in overrides)
    rows = read_rows(path)
    names = resolve_columns(rows, columns, source=path)
    signals = tuple(extract_signals(rows, names, source=path))
    assumptions = ["read as " + ", ".join(f"{signal}: {name}" for signal, name in names.items())]
    if not given:
        assumptions.append("every record is assumed to have a checkpoint (change it with train.save_every=N)")
    gap = (signals[-1].step - signals[0].step) / max(1, len(signals) - 1)
    if gap >= 2:
        assumptions.append(
            f"records are {gap:.3g} steps apart: autonpo.trigger.patience counts records, "
            "every other setting counts steps"
        )
    return RecordedRun(
        source=path,
        run=None,
        branch="-",
        recipe=recipe,
        save_every=recipe.train.save_every if given else 1,
        trigger_inputs=signals,
        assumptions=tuple(assumptions),
    )


# Simulation


def simulate_autonpo(record: RecordedRun) -> DryRun:
    """Run trigger and controller over the record; whatever needs a model is assumed."""
    settings = record.recipe.autonpo
    trigger = Trigger(settings.trigger)
    state = AutoNPOState(branch=record.branch, step=min(1, record.trigger_inputs[0].step) - 1)
    evidence = {"simulated": True, "settings": dump_autonpo_settings(record.recipe)}
    started = Transition(step=max(0, state.step), event="started", phase_before="TRAIN", state=state, evidence=evidence)
    readings, transitions, reasons = [], [started], []
    for assumed in assume_early_scout(record) if is_early_scout_due(state, settings) else ():
        state, new = advance(state, assumed, settings)
        transitions += [mark_assumed(transition, record) for transition in new]
    for signal in record.trigger_inputs:
        reading = trigger.observe(signal)
        readings.append(reading)
        event = StepObserved(reading=reading, has_checkpoint=signal.step % record.save_every == 0)
        state, new = advance(state, event, settings)
        transitions += new
        if state.phase in ("TRAIN", "WINDOW", "COOLDOWN"):
            reasons.append((signal.step, explain_no_trigger(state, reading, settings)))
        # An intervention is simulated to its end within the step; a window that loses no step takes recorded steps.
        while state.phase not in ("TRAIN", "COOLDOWN") and not (state.phase == "WINDOW" and state.step == signal.step):
            assumed = assume_rung(state, event, record, before=transitions) or assume_event(state, event, record)
            state, new = advance(state, assumed, settings)
            transitions += [mark_assumed(transition, record) for transition in new]
    return DryRun(readings=tuple(readings), transitions=tuple(transitions), reasons=tuple(reasons))


def assume_early_scout(record: RecordedRun) -> Sequence[ControllerEvent]:
    """The early bootstrap with a disposable scout."""
    early = record.recipe.autonpo.early
    applied = RungApplied(
        branch=record.branch, to_step=0, until_step=early.replay_steps, settings=(), undo={}, guide=None
    )
    return RunBegun(), assume_scout(early.scout_steps, step=0), applied


def assume_scout(num_steps: int, *, step: int) -> ScoutTrained:
    """A scout that was trained to its end."""
    return ScoutTrained(scout="assumed", scout_step=step + num_steps, num_steps=num_steps, num_tokens=0)


def assume_rung(
    state: AutoNPOState, observed: StepObserved, record: RecordedRun, *, before: Sequence[Transition]
) -> ControllerEvent | None:
    """What happens to a rung with a window, which is assumed to be available and to be applied once: its effect is
    unknown. None for the published rollback."""
    rung, step = state.rung, observed.reading.step
    if rung is None or not has_window(rung):
        return None
    distances = find_reachable_distances(record, step)
    is_used = any(one.event == "rung_applied" and one.evidence["rung"] == rung for one in before)
    reason = ONCE if is_used else ""
    match state.phase:
        case "FORECAST":
            return RungForecasted(forecast=RungForecast(rung=rung, basis="untried", value=1.0, reason=reason))
        case "PROBE" if is_used or distances:
            distance = None if is_used else distances[0]
            result = ProbeResult(is_accepted=not is_used, reason=reason, distance=distance, strata=(), scores=())
            return ProbeFinished(result=result)
        case "SCOUT":
            return assume_scout(record.recipe.autonpo.rungs.scout_steps, step=step)
        case "APPLY":
            to_step, length = step - (state.distance or 0), record.recipe.autonpo.rungs.num_steps
            until = to_step + min(length, state.distance or length)
            return RungApplied(branch=state.branch, to_step=to_step, until_step=until, settings=(), undo={}, guide=None)
        case _:
            return None


def assume_event(state: AutoNPOState, observed: StepObserved, record: RecordedRun) -> ControllerEvent:
    """A successful intervention: accepted at the largest distance, guides built, rolled back, replayed, accepted."""
    step = observed.reading.step
    distances = find_reachable_distances(record, step)
    match state.phase:
        case "PROBE" if state.is_early:
            scout = ProbeResult(is_accepted=True, reason="", distance=state.distance, strata=(), scores=())
            return ProbeFinished(result=scout)
        case "PROBE" if not distances:
            return PrerequisiteMissing(
                reason=f"no distance of autonpo.rollback.distances leads from step {step} to a checkpoint"
            )
        case "PROBE":
            largest = ProbeResult(is_accepted=True, reason="", distance=distances[-1], strata=(), scores=())
            return ProbeFinished(result=largest)
        case "GUIDE_GEN":
            return GuideBuilt(guide="assumed", num_prompts=1, num_prompts_with_rollouts=1, num_reused=0, num_tokens=0)
        case "ROLLBACK":
            return RollbackDone(branch=state.branch, to_step=max(0, step - (state.distance or 0)), until_step=step)
        case "ACCEPTANCE_TEST":
            return ReplayTested(is_worse=False, evidence={}, parent=state.branch)
        case _:
            return observed


def find_reachable_distances(record: RecordedRun, step: int) -> list[int]:
    """Distances of autonpo.rollback.distances that end at a checkpoint: multiples of save_every, not before step 0."""
    return [each for each in record.recipe.autonpo.rollback.distances if each % record.save_every == 0 and each <= step]


def mark_assumed(transition: Transition, record: RecordedRun) -> Transition:
    """The same transition, with evidence that says that it was assumed."""
    step = transition.step
    steps = (
        [transition.state.step]
        if transition.state.is_early
        else [step - distance for distance in find_reachable_distances(record, step)]
    )
    rung = {"rung": transition.evidence.get("rung")}
    evidence = {
        "rung_chosen": rung,
        "rung_refused": rung,
        "scout_trained": {"num_steps": transition.evidence.get("num_steps")},
        "rung_applied": {**rung, **{name: transition.evidence.get(name) for name in ("to_step", "until_step")}},
        "probe_accepted": {"distance": transition.state.distance},
        "guide_built": {},
        "rolled_back": {"to_steps": sorted(steps)},
        "replay_accepted": {},
    }
    if transition.event not in evidence:
        return transition
    return dataclasses.replace(transition, evidence={"assumed": True, **evidence[transition.event]})


def merge_reasons(reasons: Sequence[tuple[int, str]]) -> Iterator[NonTriggerSpan]:
    """Consecutive steps with the same reason, as one span."""
    for reason, pairs in groupby(reasons, key=lambda pair: pair[1]):
        steps = [step for step, _ in pairs]
        yield NonTriggerSpan(reason=reason, first_step=steps[0], last_step=steps[-1], num_steps=len(steps))


def explain_autonpo(
    source: Path,
    *,
    columns: LogColumns,
    overrides: Sequence[str],
    branch: str | None,
    figure_path: Path | None,
    draw: bool,
) -> Iterator[Transition | NonTriggerSpan | Notice]:
    """Transitions, then why the other steps did not trigger, then a plot (with `draw`) and a summary."""
    record = (
        load_run_record(source, columns=columns, overrides=overrides, branch=branch)
        if is_run_directory(source)
        else load_file_record(source, columns=columns, overrides=overrides)
    )
    yield from (Notice(message=assumption) for assumption in record.assumptions)
    result = simulate_autonpo(record)
    yield from result.transitions
    yield from merge_reasons(result.reasons)
    if draw:
        yield plot_dry_run(record, result, figure_path=figure_path)
    yield from summarize_dry_run(record, result)


# Plot and summary


def plot_dry_run(record: RecordedRun, result: DryRun, *, figure_path: Path | None) -> Notice:
    """The plot, beside the source unless `figure_path` is given; what a run really did has its own band."""
    inside, beside = record.source / "autonpo.png", record.source.with_name(f"{record.source.name}.autonpo.png")
    path = figure_path or (inside if record.run else beside)
    if figure_path is None and not os.access(path.parent, os.W_OK):
        return Notice(message=f"no plot: {path.parent} is not writable (choose a file with --figure FILE)")
    recorded = read_transitions(record.run) if record.run else []
    bands = [("simulated", result.transitions), *([("recorded", recorded)] if recorded else [])]
    title = f"AutoNPO simulated on {record.source.resolve().name}"
    plot_autonpo(result.readings, bands, path, title=title)
    return Notice(message=f"plot saved to {path}")


def summarize_dry_run(record: RecordedRun, result: DryRun) -> Iterator[Notice | Conclusion]:
    """For a run the commands that do the same by hand; then where it would have triggered."""
    triggers = [transition.step for transition in result.transitions if transition.event == "trigger"]
    limited = [transition.step for transition in result.transitions if transition.event == "limit_reached"]
    within = f"in {len(result.readings)} recorded steps"
    if limited:
        limit = f"autonpo.max_interventions={record.recipe.autonpo.max_interventions}"
        yield Notice(message=f"{limit} would have prevented further triggers from step {limited[0]} on")
    for step in triggers:
        yield from suggest_commands(record, step)
    if triggers:
        times = "once" if len(triggers) == 1 else f"{len(triggers)} times"
        sentence = f"AutoNPO would have triggered {times} {within}: at {_join_steps(triggers)}"
    else:
        reasons = [reason for _, reason in result.reasons]
        common = max(sorted(set(reasons)), key=reasons.count)
        sentence = f"AutoNPO would never have triggered {within}; most frequent reason: {common}"
    if record.run is not None:
        yield Conclusion(sentence=sentence, next=f"npo resume {quote_path(record.source)} --autonpo")
    elif triggers:
        yield Conclusion(sentence=sentence, next="npo index RUN --import FOLDER --recipe RECIPE")
    else:
        yield Conclusion(sentence=sentence, next="npo docs autonpo")


def _join_steps(steps: Sequence[int]) -> str:
    return " and ".join(filter(None, (", ".join(map(str, steps[:-1])), str(steps[-1]))))


def suggest_commands(record: RecordedRun, step: int) -> Iterator[Notice]:
    """Replay from the plateau's start (W before the trigger), guided from autonpo.replay.suggested_steps later.

    Nothing if one of the two checkpoints does not exist.
    """
    if record.run is None:
        return
    saved = [checkpoint.step for checkpoint in list_ancestry_checkpoints(record.run, record.branch)]
    at = max((each for each in saved if each <= step - record.recipe.autonpo.trigger.window), default=None)
    if at is None or at + record.recipe.autonpo.replay.suggested_steps > record.trigger_inputs[-1].step:
        return
    guide = max(each for each in saved if each <= at + record.recipe.autonpo.replay.suggested_steps)
    if guide == at:
        return
    root = quote_path(record.source)
    branch = "" if record.branch == FIRST_BRANCH else f" --branch {record.branch}"
    name = f"{record.branch}-{at}-by-{guide}"
    sample = f"npo sample-guide {root} --at {at} --source {guide} --name {name}{branch}"
    replay = f"npo resume {root} --at {at} --guide {name}"
    yield Notice(message=f"by hand, for step {step}: {sample} && {replay}")


# What happened


def report_history(root: Path, *, branch: str | None) -> Iterator[Transition | RunCosts]:
    """Every transition of the run, and its costs as seen from a branch (None: the one that AutoNPO is on)."""
    run = open_run(root)
    transitions = read_transitions(run)
    if not transitions:
        raise NpoError(f"{root} was never trained with AutoNPO", f"npo resume {quote_path(root)} --autonpo")
    yield from transitions
    yield compute_run_costs(run, branch or transitions[-1].state.branch)
