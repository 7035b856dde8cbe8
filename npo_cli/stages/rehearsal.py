"""The controller over recorded metrics. What only a model could tell is assumed, and says so.

A record cannot be probed, so every trigger counts as accepted; and it holds the steps of a replay only once, so a
rehearsed replay takes none of them. Everything else is the controller itself.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from npo_cli.auto_records import AutoState, Confirmation, Stretch, Transition, TriggerReading
from npo_cli.config import Recipe
from npo_cli.errors import NpoError, as_typed
from npo_cli.guide.controller import advance, why_not
from npo_cli.guide.facts import Confirmed, Fact, Guided, Judged, Missed, RolledBack, StepSeen
from npo_cli.guide.trigger import Signal, Watch
from npo_cli.loading import from_dict, with_overrides
from npo_cli.run_dir.lineage import descent, newest_branch
from npo_cli.run_dir.paths import RunDir, open_run
from npo_cli.run_dir.steps import measured_steps
from npo_cli.stages.auto_knobs import controller_knobs, settings_of, trigger_knobs
from npo_cli.stages.recorded import Columns, chosen_columns, read_rows, signals_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """What is rehearsed, and under which settings."""

    source: Path
    run: RunDir | None
    """None for a file of somebody's metrics."""
    branch: str
    recipe: Recipe
    save_every: int
    signals: tuple[Signal, ...]
    remarks: tuple[str, ...] = ()
    """What was taken for granted in reading it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rehearsal:
    """What the trigger saw, what the controller did, and for every other step why nothing."""

    readings: tuple[TriggerReading, ...]
    moves: tuple[Transition, ...]
    reasons: tuple[tuple[int, str], ...]


# What is rehearsed


def of_run(root: Path, *, columns: Columns, overrides: Sequence[str], branch: str | None) -> Record:
    """A run's branch along its line of descent, under the recipe in force there."""
    run = open_run(root)
    branch = branch or newest_branch(run)
    line = descent(run, branch)
    recipe = with_overrides(from_dict(run.recipe(branch), source=str(run.recipe_path(branch))), overrides)
    rows = [row for part in line for row in measured_steps(run, part.branch) if part.owns(row["step"])]
    if not rows:
        raise NpoError(f"{root} has no steps on branch {branch} yet", f"npo resume {as_typed(root)}")
    return Record(
        source=root,
        run=run,
        branch=branch,
        recipe=recipe,
        save_every=recipe.train.save_every,
        signals=tuple(signals_of(rows, chosen_columns(rows, columns, source=root), source=root)),
    )


def of_file(path: Path, *, columns: Columns, overrides: Sequence[str]) -> Record:
    """Any trainer's file, under the defaults; each record has a checkpoint unless train.save_every is given."""
    recipe = with_overrides(from_dict({}), overrides)
    given = any(setting.partition("=")[0] == "train.save_every" for setting in overrides)
    rows = read_rows(path)
    names = chosen_columns(rows, columns, source=path)
    signals = tuple(signals_of(rows, names, source=path))
    remarks = ["read as " + ", ".join(f"{signal}: {name}" for signal, name in names.items())]
    if not given:
        remarks.append("every record counts as a checkpoint; train.save_every=N says otherwise")
    apart = (signals[-1].step - signals[0].step) / max(1, len(signals) - 1)
    if apart >= 2:
        remarks.append(
            f"records are {apart:.3g} steps apart: autonpo.trigger.patience counts records, everything else steps"
        )
    return Record(
        source=path,
        run=None,
        branch="-",
        recipe=recipe,
        save_every=recipe.train.save_every if given else 1,
        signals=signals,
        remarks=tuple(remarks),
    )


# The rehearsal


def rehearsed(record: Record) -> Rehearsal:
    """Let the trigger see every record and the controller answer; what only a model could tell is assumed."""
    watch, knobs = Watch(trigger_knobs(record.recipe)), controller_knobs(record.recipe)
    state = AutoState(branch=record.branch, step=min(1, record.signals[0].step) - 1)
    begun = {"rehearsed": True, "settings": settings_of(record.recipe)}
    started = Transition(step=max(0, state.step), event="started", phase_before="TRAIN", state=state, evidence=begun)
    readings, moves, reasons = [], [started], []
    for signal in record.signals:
        reading = watch.see(signal)
        readings.append(reading)
        seen = StepSeen(reading=reading, has_checkpoint=signal.step % record.save_every == 0)
        state, some = advance(state, seen, knobs=knobs)
        moves += some
        # A trigger is followed to its end within the step.
        if state.phase in ("TRAIN", "COOLDOWN"):
            reasons.append((signal.step, why_not(state, reading, knobs=knobs)))
        while state.phase not in ("TRAIN", "COOLDOWN"):
            state, some = advance(state, assumed_fact(state, seen, record), knobs=knobs)
            moves += [as_assumed(move, record) for move in some]
    return Rehearsal(readings=tuple(readings), moves=tuple(moves), reasons=tuple(reasons))


def assumed_fact(state: AutoState, seen: StepSeen, record: Record) -> Fact:
    """What may have followed: accepted at the largest distance, guided, replayed, kept."""
    step = seen.reading.step
    distances = reachable(record, step)
    match state.phase:
        case "PUSH":
            return Missed(what="a rehearsal pushes nothing")
        case "PROBE" if not distances:
            return Missed(what=f"no distance of autonpo.rollback.distances leads from step {step} to a checkpoint")
        case "PROBE":
            largest = Confirmation(accepted=True, reason="", distance=distances[-1], strata=(), scores=())
            return Confirmed(confirmation=largest)
        case "GUIDE_GEN":
            return Guided(guide="assumed", num_asked=1, num_found=1, num_reused=0, num_tokens=0)
        case "ROLLBACK":
            return RolledBack(branch=state.branch, to_step=max(0, step - (state.distance or 0)), until=step)
        case "JUDGE":
            return Judged(worse=False, evidence={}, parent=state.branch)
        case _:
            return seen


def reachable(record: Record, step: int) -> list[int]:
    """Distances of autonpo.rollback.distances that end at a checkpoint: multiples of save_every, not before step 0."""
    return [each for each in record.recipe.autonpo.rollback.distances if each % record.save_every == 0 and each <= step]


def as_assumed(move: Transition, record: Record) -> Transition:
    """The same move; where nobody could be asked, its evidence says that it was made up."""
    early = move.state.early
    steps = [move.state.step] if early else [move.step - each for each in reachable(record, move.step)]
    told = {
        "accepted": {"distance": move.state.distance},
        "guided": {},
        "rolled_back": {"to_steps": sorted(steps)},
        "kept": {},
    }
    if move.event not in told:
        return move
    return dataclasses.replace(move, evidence={"assumed": True, **told[move.event]})


def stretches(reasons: Sequence[tuple[int, str]]) -> Iterator[Stretch]:
    """Consecutive steps of one reason together."""
    for reason, some in groupby(reasons, key=lambda named: named[1]):
        steps = [step for step, _ in some]
        yield Stretch(reason=reason, first=steps[0], last=steps[-1], num_steps=len(steps))
