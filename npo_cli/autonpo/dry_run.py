"""The controller over recorded metrics. What only a model could tell is assumed, and says so.

A record cannot be probed, so every trigger counts as accepted; and it holds the steps of a replay only once, so a
rehearsed replay takes none of them. Everything else is the controller itself.

`npo autonpo`: what AutoNPO did in a run, or, with --explain, would have done on somebody's records.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from npo_cli.autonpo.controller import advance, explain_no_trigger
from npo_cli.autonpo.events import (
    ControllerEvent,
    GuideBuilt,
    PrerequisiteMissing,
    ProbeFinished,
    ReplayJudged,
    RollbackDone,
    StepObserved,
)
from npo_cli.autonpo.preflight import controller_knobs, dump_autonpo_settings, trigger_knobs
from npo_cli.autonpo.trainer_logs import LogColumns, extract_signals, read_rows, resolve_columns
from npo_cli.autonpo.trigger import Trigger, TriggerInput
from npo_cli.config.loading import apply_overrides, recipe_from_dict
from npo_cli.config.recipe import Recipe
from npo_cli.errors import NpoError, quote_path
from npo_cli.report.autonpo_plot import plot_autonpo
from npo_cli.storage.autonpo_log import read_transitions
from npo_cli.storage.checkpoints import list_ancestry_checkpoints
from npo_cli.storage.cost_sums import compute_run_costs
from npo_cli.storage.layout import RunDir, open_run
from npo_cli.storage.lineage import ancestry, find_newest_branch
from npo_cli.storage.metrics import read_metrics
from npo_cli.types.autonpo import AutoNPOState, NonTriggerSpan, ProbeResult, Transition, TriggerReading
from npo_cli.types.costs import RunCosts
from npo_cli.types.rollouts import Notice


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedRun:
    """What is rehearsed, and under which settings."""

    source: Path
    run: RunDir | None
    """None for a file of somebody's metrics."""
    branch: str
    recipe: Recipe
    save_every: int
    trigger_inputs: tuple[TriggerInput, ...]
    assumptions: tuple[str, ...] = ()
    """What was taken for granted in reading it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DryRun:
    """What the trigger saw, what the controller did, and for every other step why nothing."""

    readings: tuple[TriggerReading, ...]
    transitions: tuple[Transition, ...]
    reasons: tuple[tuple[int, str], ...]


# What is rehearsed


def load_run_record(root: Path, *, columns: LogColumns, overrides: Sequence[str], branch: str | None) -> RecordedRun:
    """A run's branch along its line of descent, under the recipe in force there."""
    run = open_run(root)
    branch = branch or find_newest_branch(run)
    line = ancestry(run, branch)
    recipe = apply_overrides(recipe_from_dict(run.read_recipe(branch), source=str(run.recipe_path(branch))), overrides)
    rows = [row for part in line for row in read_metrics(run, part.branch) if part.contains(row["step"])]
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
    """Any trainer's file, under the defaults; each record has a checkpoint unless train.save_every is given."""
    recipe = apply_overrides(recipe_from_dict({}), overrides)
    given = any(setting.partition("=")[0] == "train.save_every" for setting in overrides)
    rows = read_rows(path)
    names = resolve_columns(rows, columns, source=path)
    signals = tuple(extract_signals(rows, names, source=path))
    remarks = ["read as " + ", ".join(f"{signal}: {name}" for signal, name in names.items())]
    if not given:
        remarks.append("every record counts as a checkpoint; train.save_every=N says otherwise")
    apart = (signals[-1].step - signals[0].step) / max(1, len(signals) - 1)
    if apart >= 2:
        remarks.append(
            f"records are {apart:.3g} steps apart: autonpo.trigger.patience counts records, everything else steps"
        )
    return RecordedRun(
        source=path,
        run=None,
        branch="-",
        recipe=recipe,
        save_every=recipe.train.save_every if given else 1,
        trigger_inputs=signals,
        assumptions=tuple(remarks),
    )


# The rehearsal


def simulate_autonpo(record: RecordedRun) -> DryRun:
    """Let the trigger see every record and the controller answer; what only a model could tell is assumed."""
    watch, knobs = Trigger(trigger_knobs(record.recipe)), controller_knobs(record.recipe)
    state = AutoNPOState(branch=record.branch, step=min(1, record.trigger_inputs[0].step) - 1)
    begun = {"rehearsed": True, "settings": dump_autonpo_settings(record.recipe)}
    started = Transition(step=max(0, state.step), event="started", phase_before="TRAIN", state=state, evidence=begun)
    readings, moves, reasons = [], [started], []
    for signal in record.trigger_inputs:
        reading = watch.observe(signal)
        readings.append(reading)
        seen = StepObserved(reading=reading, has_checkpoint=signal.step % record.save_every == 0)
        state, some = advance(state, seen, knobs=knobs)
        moves += some
        # A trigger is followed to its end within the step.
        if state.phase in ("TRAIN", "COOLDOWN"):
            reasons.append((signal.step, explain_no_trigger(state, reading, knobs=knobs)))
        while state.phase not in ("TRAIN", "COOLDOWN"):
            state, some = advance(state, assume_event(state, seen, record), knobs=knobs)
            moves += [mark_assumed(move, record) for move in some]
    return DryRun(readings=tuple(readings), transitions=tuple(moves), reasons=tuple(reasons))


def assume_event(state: AutoNPOState, seen: StepObserved, record: RecordedRun) -> ControllerEvent:
    """What may have followed: accepted at the largest distance, guided, replayed, kept."""
    step = seen.reading.step
    distances = find_reachable_distances(record, step)
    match state.phase:
        case "PUSH":
            return PrerequisiteMissing(what="a rehearsal pushes nothing")
        case "PROBE" if not distances:
            return PrerequisiteMissing(
                what=f"no distance of autonpo.rollback.distances leads from step {step} to a checkpoint"
            )
        case "PROBE":
            largest = ProbeResult(is_accepted=True, reason="", distance=distances[-1], strata=(), scores=())
            return ProbeFinished(confirmation=largest)
        case "GUIDE_GEN":
            return GuideBuilt(guide="assumed", num_prompts=1, num_found=1, num_reused=0, num_tokens=0)
        case "ROLLBACK":
            return RollbackDone(branch=state.branch, to_step=max(0, step - (state.distance or 0)), until_step=step)
        case "JUDGE":
            return ReplayJudged(is_worse=False, evidence={}, parent=state.branch)
        case _:
            return seen


def find_reachable_distances(record: RecordedRun, step: int) -> list[int]:
    """Distances of autonpo.rollback.distances that end at a checkpoint: multiples of save_every, not before step 0."""
    return [each for each in record.recipe.autonpo.rollback.distances if each % record.save_every == 0 and each <= step]


def mark_assumed(move: Transition, record: RecordedRun) -> Transition:
    """The same move; where nobody could be asked, its evidence says that it was made up."""
    early = move.state.is_early
    steps = [move.state.step] if early else [move.step - each for each in find_reachable_distances(record, move.step)]
    told = {
        "accepted": {"distance": move.state.distance},
        "guided": {},
        "rolled_back": {"to_steps": sorted(steps)},
        "kept": {},
    }
    if move.event not in told:
        return move
    return dataclasses.replace(move, evidence={"assumed": True, **told[move.event]})


def merge_reasons(reasons: Sequence[tuple[int, str]]) -> Iterator[NonTriggerSpan]:
    """Consecutive steps of one reason together."""
    for reason, some in groupby(reasons, key=lambda named: named[1]):
        steps = [step for step, _ in some]
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
    """Every move, then why the other steps made none, then a picture (unless not to `draw`) and a conclusion."""
    record = (
        load_run_record(source, columns=columns, overrides=overrides, branch=branch)
        if source.is_dir()
        else load_file_record(source, columns=columns, overrides=overrides)
    )
    yield from (Notice(message=remark) for remark in record.assumptions)
    found = simulate_autonpo(record)
    yield from found.transitions
    yield from merge_reasons(found.reasons)
    if draw:
        yield plot_dry_run(record, found, figure_path=figure_path)
    yield from summarize_dry_run(record, found)


# What it comes to


def plot_dry_run(record: RecordedRun, found: DryRun, *, figure_path: Path | None) -> Notice:
    """The picture, beside what was rehearsed unless told otherwise; what a run really did has a band of its own."""
    inside, beside = record.source / "autonpo.png", record.source.with_name(f"{record.source.name}.autonpo.png")
    path = figure_path or (inside if record.run else beside)
    if figure_path is None and not os.access(path.parent, os.W_OK):
        return Notice(message=f"no picture: {path.parent} may not be written in; --out FILE names another place")
    real = read_transitions(record.run) if record.run else []
    courses = [("rehearsed", found.transitions), *([("happened", real)] if real else [])]
    title = f"AutoNPO rehearsed on {record.source.resolve().name}"
    plot_autonpo(found.readings, courses, path, title=title)
    return Notice(message=f"the picture is in {path}")


def summarize_dry_run(record: RecordedRun, found: DryRun) -> Iterator[Notice]:
    """How often it would have fired and where, and for a run the commands that do the same by hand."""
    fired = [move.step for move in found.transitions if move.event == "trigger"]
    capped = [move.step for move in found.transitions if move.event == "capped"]
    within = f"in {len(found.readings)} recorded steps"
    if fired:
        times = "once" if len(fired) == 1 else f"{len(fired)} times"
        yield Notice(message=f"it would have fired {times} {within}: at {_listed(fired)}")
    else:
        every = [reason for _, reason in found.reasons]
        common = max(sorted(set(every)), key=every.count)
        yield Notice(message=f"it would never have fired {within}, most of them: {common}")
    if capped:
        cap = f"autonpo.max_interventions = {record.recipe.autonpo.max_interventions}"
        yield Notice(message=f"{cap} would have kept it from firing again from step {capped[0]} on")
    for step in fired:
        yield from suggest_commands(record, step)


def _listed(steps: Sequence[int]) -> str:
    return " and ".join(filter(None, (", ".join(map(str, steps[:-1])), str(steps[-1]))))


def suggest_commands(record: RecordedRun, step: int) -> Iterator[Notice]:
    """From the plateau's start, W before the trigger, guided from autonpo.replay.suggested_steps later, if both "
    "exist."""
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
    branch = "" if record.branch == find_newest_branch(record.run) else f" --branch {record.branch}"
    name = f"{record.branch}-{at}-by-{guide}"
    ask = f"npo sample-guide {root} --at {at} --guide {guide}{branch}"
    replay = f"npo resume {root} --at {at} --guide {name}"
    yield Notice(message=f"by hand, for step {step}: {ask} && {replay}")


# What really happened


def report_history(root: Path, *, branch: str | None) -> Iterator[Transition | RunCosts]:
    """Every move of the run, and all that it cost seen from one branch."""
    run = open_run(root)
    moves = read_transitions(run)
    if not moves:
        raise NpoError(f"AutoNPO never watched {root}", f"npo resume {quote_path(root)} --autonpo")
    yield from moves
    yield compute_run_costs(run, branch or find_newest_branch(run))
