"""`npo autonpo`: what AutoNPO did in a run, or, with --explain, would have done on somebody's records."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from npo_cli.auto_records import NonTriggerSpan, Transition
from npo_cli.costs import RunCosts
from npo_cli.errors import NpoError, quote_path
from npo_cli.records import Notice
from npo_cli.report.auto_figure import plot_autonpo
from npo_cli.run_dir.auto import read_transitions
from npo_cli.run_dir.checkpoints import list_ancestry_checkpoints
from npo_cli.run_dir.lineage import find_newest_branch
from npo_cli.run_dir.paths import open_run
from npo_cli.stages.accounting import compute_run_costs
from npo_cli.stages.recorded import LogColumns
from npo_cli.stages.rehearsal import RecordedRun, DryRun, load_file_record, load_run_record, simulate_autonpo, merge_reasons


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
