"""`npo demo`: the whole circle on the embedded default, ending with what it gained and what it cost."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from npo_cli.costs import Crossing, CurvePoint
from npo_cli.errors import as_typed
from npo_cli.guide_records import GuideInfo
from npo_cli.loading import load_recipe
from npo_cli.records import CheckpointEntry, CheckpointScore, EvalReport, Notice, Progress, StepReport
from npo_cli.report.figures import comparison_figure
from npo_cli.run_dir.paths import open_run, refuse_used
from npo_cli.stages.guide_plan import Ask
from npo_cli.stages.index import index_run
from npo_cli.stages.ledger import crossing, curve
from npo_cli.stages.resume import resume_run
from npo_cli.stages.sample_guide import sample_run
from npo_cli.stages.score_checkpoints import score_run
from npo_cli.stages.show import THRESHOLDS
from npo_cli.stages.train import MAIN, train_run

RECIPE = "npo-early"
GUIDE = "near-future"
CANDIDATES = (20, 40, 60)
QUICK = ("scoring.num_prompts=96", "scoring.samples_per_prompt=4")

Shown = (
    Progress | Notice | StepReport | EvalReport | CheckpointEntry | CheckpointScore | GuideInfo | CurvePoint | Crossing
)


def demo_run(out: Path, *, seed: int) -> Iterator[Shown]:
    """Train, index, score, sample the best guide, roll back and replay, compare."""
    refuse_used(out, flag="--out")
    recipe = load_recipe(RECIPE, [f"train.seed={seed}"])
    at = recipe.guide.replay.at_step
    yield Notice(message=f"1/5 npo train {RECIPE} train.seed={seed} --run {as_typed(out)}")
    yield from without_evals(train_run(out, recipe, allow_code=False))

    yield Notice(message=f"2/5 npo index {as_typed(out)}")
    yield from index_run(out, verify=False)

    steps = ",".join(map(str, CANDIDATES))
    yield Notice(message=f"3/5 npo score-checkpoints {as_typed(out)} --at {at} --candidates {steps} {' '.join(QUICK)}")
    best = None
    for record in score_run(out, at=at, candidates=CANDIDATES, branch=None, overrides=QUICK, allow_code=False):
        if isinstance(record, CheckpointScore) and record.chosen:
            best = record.step
        yield record

    yield Notice(message=f"4/5 npo sample-guide {as_typed(out)} --guide {best} --at {at} --name {GUIDE}")
    yield from sample_run(
        out, ask=Ask(guide_step=best), at=at, name=GUIDE, branch=None, steps=None, overrides=(), allow_code=False
    )

    yield Notice(message=f"5/5 npo resume {as_typed(out)} --at {at} --guide {GUIDE}")
    replay = resume_run(
        out,
        overrides=(),
        at=at,
        guide=GUIDE,
        source_branch=None,
        new_branch=None,
        steps=None,
        allow_code=False,
    )
    yield from without_evals(replay)
    yield from verdict(out)


def without_evals(records: Iterable[StepReport | EvalReport | Notice]) -> Iterator[StepReport | Notice]:
    """The curves show the evaluations; a table of them would bury the verdict."""
    return (record for record in records if not isinstance(record, EvalReport))


def verdict(out: Path) -> Iterator[CurvePoint | Crossing | Notice]:
    """Both curves, where they cross the thresholds, and the picture."""
    run = open_run(out)
    arms = [curve(run, MAIN, arm="GRPO"), curve(run, GUIDE, arm="NPO")]
    for points in arms:
        yield from points
    for threshold in THRESHOLDS:
        for points in arms:
            yield crossing(points, threshold)
    picture = out / "comparison.png"
    comparison_figure([point for points in arms for point in points], picture, "GRPO and NPO, one seed")
    yield Notice(message=f"picture: {picture}")
