"""The account of a run by kind of work: the same sums as `accounting.py`, told apart further.

A scout is a step that was rolled back and whose branch's later checkpoint was the guide of what is kept now; other
steps off the line are abandoned.
"""

from collections.abc import Iterator

from npo_cli.costs import CostLine
from npo_cli.run_dir.auto import judgements, probe_tokens, probes, transitions
from npo_cli.run_dir.guides import list_guides
from npo_cli.run_dir.lineage import birth_segment, branches, descent
from npo_cli.run_dir.paths import RunDir
from npo_cli.run_dir.scores import evals, scorings
from npo_cli.run_dir.seconds import seconds_in
from npo_cli.stages.accounting import JUDGED, tokens_of
from npo_cli.stages.ledger import NOTHING, Cost, step_costs

Place = tuple[str, int]


def cost_lines(run: RunDir, branch: str) -> Iterator[CostLine]:
    """Everything the run executed, seen from one branch; the sum; and evaluation, which is nobody's cost."""
    parts = [*_training(run, branch), *_asking(run)]
    yield from parts
    yield CostLine(
        what="all of it",
        steps=sum(one.steps or 0 for one in parts),
        tokens=sum(one.tokens for one in parts),
        seconds=sum(one.seconds or 0.0 for one in parts),
    )
    tested = sum(report.num_tokens for report in evals(run))
    yield CostLine(what="held-out evaluation, not counted", steps=None, tokens=tested, seconds=None)


def _training(run: RunDir, branch: str) -> Iterator[CostLine]:
    line, scouts = descent(run, branch), scouted(run, branch)
    kept = scout = abandoned = NOTHING
    for owner in branches(run):
        for step, cost in step_costs(run, owner).items():
            if any(stretch.branch == owner and stretch.owns(step) for stretch in line):
                kept += cost
            elif (owner, step) in scouts:
                scout += cost
            else:
                abandoned += cost
    yield _trained(f"training, on the line of {branch}", kept)
    yield _trained("scouting: rolled back, and guided what is kept", scout)
    yield _trained("training, abandoned", abandoned)


def _trained(what: str, cost: Cost) -> CostLine:
    return CostLine(what=what, steps=cost.steps, tokens=cost.tokens, seconds=cost.seconds)


def scouted(run: RunDir, branch: str) -> set[Place]:
    """Steps between the learner and the guide of every replay on the line."""
    caches = {info.name: info for info in list_guides(run)}
    guides = [birth_segment(run, stretch.branch).guide for stretch in descent(run, branch)]
    return {
        (stretch.branch, step)
        for info in (caches[name] for name in guides if name in caches)
        if info.guide_step is not None and info.source != "run"
        for stretch in descent(run, info.branch)
        for step in range(info.at_step + 1, info.guide_step + 1)
        if stretch.owns(step)
    }


def _asking(run: RunDir) -> Iterator[CostLine]:
    asked = scorings(run)
    yield CostLine(
        what="scoring of candidates",
        steps=None,
        tokens=sum(len(row["response_ids"]) for scoring in asked for row in scoring.samples.records()),
        seconds=sum(seconds_in(scoring.folder) for scoring in asked),
    )
    found = probes(run)
    yield CostLine(
        what="probes of mistakes",
        steps=None,
        tokens=sum(map(probe_tokens, found)),
        seconds=sum(seconds_in(probe.folder) for probe in found),
    )
    caches = list_guides(run)
    yield CostLine(
        what="guides' samples",
        steps=None,
        tokens=sum(tokens_of(run, info) for info in caches),
        seconds=sum(seconds_in(run.guide_folder(info.name)) for info in caches),
    )
    decided = [move for move in transitions(run) if move.event in JUDGED]
    yield CostLine(
        what="held-out tests that decided",
        steps=None,
        tokens=sum(int(move.evidence.get("num_tokens", 0)) for move in decided),
        seconds=sum(map(seconds_in, judgements(run))),
    )
