"""One run as a chapter of a report: what it reached, how, what was decided and on what evidence, and at what cost."""

from collections.abc import Iterator, Sequence
from itertools import chain

from npo_cli.guide_records import GuideInfo
from npo_cli.records import CheckpointScore, Segment
from npo_cli.report.auto_tables import confirmation_tables, transitions_tables
from npo_cli.report.cost_tables import comparison_tables, costs_tables
from npo_cli.report.curves import Arm, accuracy_pictures, training_pictures
from npo_cli.report.limbs import Limb
from npo_cli.report.page import Chapter, Part
from npo_cli.report.signals import guide_pictures, rollback_pictures
from npo_cli.report.tables import evals_tables, guides_tables, lineage_tables, scores_tables
from npo_cli.report.tree import tree_picture
from npo_cli.run_dir.auto import transitions
from npo_cli.run_dir.guides import list_guides
from npo_cli.run_dir.index import best_evals
from npo_cli.run_dir.lineage import birth_segment, branches, descent, newest_branch, segments
from npo_cli.run_dir.paths import RunDir, recipe_text
from npo_cli.run_dir.scores import all_scores
from npo_cli.run_dir.steps import measured_steps
from npo_cli.stages.cost_lines import cost_lines
from npo_cli.stages.facts import facts_of
from npo_cli.stages.ledger import crossing, curve
from npo_cli.stages.samples import fates, marks_of, samples
from npo_cli.stages.show import THRESHOLDS, show_metrics

NUM_PROBES = 6
"""Probes that are drawn; all are tabulated."""


def chapter(run: RunDir, *, title: str, prefix: str) -> Chapter:
    """Everything of one run; `prefix` begins the names of its pictures."""
    branch = newest_branch(run)
    limbs = limbs_of(run, branch)
    parts = (
        *_reached(run, prefix=prefix),
        *_trained(run, limbs, prefix=prefix),
        _lineage(run, limbs, prefix=prefix),
        *_decided(run, prefix=prefix),
        *_scored(run, prefix=prefix),
        _cost(run, branch),
        *_answered(run, branch),
        Part(title="Recipe", listing=recipe_text(run.recipe(branch))),
    )
    return Chapter(title=title, facts=facts_of(run, branch), parts=parts)


def limbs_of(run: RunDir, branch: str) -> list[Limb]:
    """Every branch, as the line of descent of one of them sees it."""
    kept = {stretch.branch: stretch for stretch in descent(run, branch)}
    caches = {info.name: info for info in list_guides(run)}
    found = []
    for name in branches(run):
        born = birth_segment(run, name)
        last = max((row["step"] for row in measured_steps(run, name)), default=born.fork_step)
        ends = last if name in kept and kept[name].to_step is None else kept[name].to_step if name in kept else None
        found.append(
            Limb(
                branch=name,
                parent=born.parent,
                fork_step=born.fork_step,
                last_step=last,
                kept_until=ends,
                guide=born.guide,
                guide_step=guide_step_of(caches.get(born.guide or "")),
                guide_until=guided_until(born),
            )
        )
    return found


def guided_until(born: Segment) -> int | None:
    """Last step with a guide of any kind."""
    return born.guide_until if born.guide else born.ahead_until


def guide_step_of(info: GuideInfo | None) -> int | None:
    """Where on this run's own line the guide stands; None for others' guides."""
    return info.guide_step if info is not None and info.source != "run" else None


def arms_of(run: RunDir) -> Iterator[Arm]:
    """A curve a branch, from its rollback on; a branch without an evaluation has none."""
    for place, name in enumerate(branches(run)):
        born = birth_segment(run, name)
        points = curve(run, name, arm=name)
        if born.parent is not None:
            # Two points stand at the fork: the parent's cost, and the cost of being ready to start again.
            ready = [point for point in points if point.step == born.fork_step][-1:]
            points = [*ready, *(point for point in points if point.step > born.fork_step)]
        if points:
            until = guided_until(born)
            forks = born.parent is not None and points[0].step == born.fork_step
            yield Arm(place=place, points=tuple(points), guide_until=until, is_fork=forks)


def _reached(run: RunDir, *, prefix: str) -> Iterator[Part]:
    arms = list(arms_of(run))
    if not arms:
        yield Part(title="Held-out accuracy", text="No checkpoint was evaluated yet: npo eval RUN --all does it.")
        return
    curves = [curve(run, name, arm=name) for name in branches(run)]
    crossings = [crossing(points, threshold) for threshold in THRESHOLDS for points in curves if points]
    yield Part(
        title="Held-out accuracy",
        text="By place in the data, and by everything it had cost by then: all steps, tokens and seconds, those of "
        "scouts, scorings, probes and guides included. A diamond is a rollback; the broad band behind a line "
        "lasts as long as a guide was mixed in.",
        pictures=tuple(accuracy_pictures(arms, prefix=prefix)),
        tables=comparison_tables(crossings),
        folded=evals_tables([report for _, report in sorted(best_evals(run).items())]),
    )


def _trained(run: RunDir, limbs: Sequence[Limb], *, prefix: str) -> Iterator[Part]:
    reports = list(show_metrics(run, branch=None, step=None))
    if reports:
        yield Part(
            title="Training",
            text="Thin lines are single steps, thick ones a moving average of nine. A dotted vertical line is a "
            "rollback, a shaded range the steps in which a guide was mixed in.",
            pictures=tuple(training_pictures(reports, limbs, prefix=prefix)),
        )


def _lineage(run: RunDir, limbs: Sequence[Limb], *, prefix: str) -> Part:
    guides = list_guides(run)
    return Part(
        title="Lineage",
        text="A lane a branch. What a dotted line shows was left behind; an arrow leads from the checkpoint that "
        "was the guide (or from the parent) back to the step from which training began again.",
        pictures=(tree_picture(limbs, transitions(run), prefix=prefix),),
        tables=(*lineage_tables(segments(run)), *(guides_tables(guides) if guides else ())),
    )


def _decided(run: RunDir, *, prefix: str) -> Iterator[Part]:
    moves = transitions(run)
    if not moves:
        return
    yield Part(title="AutoNPO", tables=transitions_tables(moves)[:1])
    for number, move in enumerate(move for move in moves if move.evidence.get("scores")):
        found, name = move.evidence, f"{prefix}probe-{move.step}-{move.event}-"
        yield Part(
            title=f"Probe at step {move.step}: {move.event}",
            text=str(found.get("reason") or "") or "Q, V and S of each rollback distance, 95 % intervals.",
            pictures=tuple(rollback_pictures(found["scores"], prefix=name)) if number < NUM_PROBES else (),
            folded=confirmation_tables(found, where=f"step {move.step}"),
        )


def _scored(run: RunDir, *, prefix: str) -> Iterator[Part]:
    for answer in all_scores(run):
        if answer.scores:
            signals, kinds = scores_tables(answer.scores)
            yield Part(
                title=f"Candidate guides for step {answer.at} of {answer.branch}",
                text=_choice(answer.scores),
                pictures=tuple(guide_pictures(answer.scores, prefix=f"{prefix}{answer.folder.name}-")),
                tables=(signals,),
                folded=(kinds,),
            )


def _choice(scores: Sequence[CheckpointScore]) -> str:
    best = next((one for one in scores if one.chosen), None)
    rule = "Q: how much of what the learner fails it solves. V: what its distance costs in variance. S = Q / V."
    return rule if best is None else f"{rule} Step {best.step} has the largest S in {best.p_best:.0%} of the resamples."


def _cost(run: RunDir, branch: str) -> Part:
    return Part(
        title="What it cost",
        text="Nothing that was executed is left out, whatever became of it.",
        tables=costs_tables(list(cost_lines(run, branch))),
    )


def _answered(run: RunDir, branch: str) -> Iterator[Part]:
    marks = marks_of(run, branch)
    if marks:
        seated = any(one.seated for one in chain(*marks.values()))
        which = "for which a guide was seated" if seated else "of the newest step"
        yield Part(
            title="Prompts and answers",
            text=f"Some of the prompts {which}, evenly spaced. Log-probabilities are those of the policy that wrote "
            "the answer, the guide's under the guide. The row below each prompt is its whole history.",
            tables=(fates(branch, marks),),
            samples=tuple(samples(run, branch, marks)),
        )
