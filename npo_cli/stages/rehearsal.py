"""The controller over recorded metrics. What only a model could tell is assumed, and says so.

A record cannot be probed, so every trigger counts as accepted; and it holds the steps of a replay only once, so a
rehearsed replay takes none of them. Everything else is the controller itself.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from npo_cli.auto_records import AutoNPOState, ProbeResult, NonTriggerSpan, Transition, TriggerReading
from npo_cli.config import Recipe
from npo_cli.errors import NpoError, quote_path
from npo_cli.guide.controller import advance, explain_no_trigger
from npo_cli.guide.facts import ProbeFinished, ControllerEvent, GuideBuilt, ReplayJudged, PrerequisiteMissing, RollbackDone, StepObserved
from npo_cli.guide.trigger import TriggerInput, Trigger
from npo_cli.loading import recipe_from_dict, apply_overrides
from npo_cli.run_dir.lineage import ancestry, find_newest_branch
from npo_cli.run_dir.paths import RunDir, open_run
from npo_cli.run_dir.steps import read_metrics
from npo_cli.stages.auto_knobs import controller_knobs, dump_autonpo_settings, trigger_knobs
from npo_cli.stages.recorded import LogColumns, resolve_columns, read_rows, extract_signals


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
            return PrerequisiteMissing(what=f"no distance of autonpo.rollback.distances leads from step {step} to a checkpoint")
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
