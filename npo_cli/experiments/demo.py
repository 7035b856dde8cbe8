"""`npo demo`: the whole workflow on the embedded task, ending with what it gained and what it cost."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from npo_cli.config.loading import load_recipe
from npo_cli.errors import quote_path
from npo_cli.guides.build_cache import build_guide_cache
from npo_cli.guides.score import score_run
from npo_cli.guides.source import make_spec, parse_spec
from npo_cli.report.plotting import plot_accuracy_curves
from npo_cli.storage.cost_sums import (
    best_held_cost_to_threshold,
    best_held_curve,
    choose_thresholds,
    cost_to_threshold,
    learning_curve,
)
from npo_cli.storage.index import index_run
from npo_cli.storage.layout import check_unused, open_run
from npo_cli.training.resume import resume_run
from npo_cli.training.train import MAIN, train_run
from npo_cli.types.costs import BestHeldPoint, CostToThreshold, CurvePoint
from npo_cli.types.guides import GuideCacheInfo
from npo_cli.types.rollouts import (
    CheckpointEntry,
    CheckpointSaved,
    EvalReport,
    Notice,
    Progress,
    StepReport,
    TrainingRecord,
)
from npo_cli.types.scores import CandidateScore, GuideChoice

RECIPE = "npo-early"
GUIDE = "near-future"
CANDIDATES = (20, 40, 60)
SCORE_OVERRIDES = ("scoring.num_prompts=48",)

DemoRecord = (
    Progress
    | Notice
    | StepReport
    | EvalReport
    | CheckpointEntry
    | CandidateScore
    | GuideChoice
    | GuideCacheInfo
    | CurvePoint
    | BestHeldPoint
    | CostToThreshold
)


def run_demo(out: Path, *, seed: int) -> Iterator[DemoRecord]:
    """Train, index, score, sample the best guide, roll back and replay, compare."""
    check_unused(out, flag="--out")
    recipe = load_recipe(RECIPE, [f"train.seed={seed}"])
    at = recipe.guide.replay.at_step
    yield Notice(message=f"1/5 npo train {RECIPE} {quote_path(out)} train.seed={seed}")
    yield from drop_evals(train_run(out, recipe))

    yield Notice(message=f"2/5 npo index {quote_path(out)}")
    yield from index_run(out)

    steps = ",".join(map(str, CANDIDATES))
    yield Notice(
        message=f"3/5 npo score-checkpoints {quote_path(out)} --at {at} --candidates {steps} {' '.join(SCORE_OVERRIDES)}"  # noqa: E501
    )
    chosen, candidates = None, [make_spec("checkpoint", {"step": step}) for step in CANDIDATES]
    for record in score_run(out, at=at, sources=candidates, branch=None, overrides=SCORE_OVERRIDES):
        if isinstance(record, GuideChoice):
            chosen = record.chosen
        yield record
    if chosen is None:
        yield Notice(message="the demo ends here: without a guide there is nothing to replay", level="warning")
        return

    yield Notice(message=f"4/5 npo sample-guide {quote_path(out)} --at {at} --name {GUIDE}")
    yield from build_guide_cache(out, spec=parse_spec(chosen), at=at, name=GUIDE)

    yield Notice(message=f"5/5 npo resume {quote_path(out)} --at {at} --guide {GUIDE}")
    replay = resume_run(
        out,
        overrides=(),
        at=at,
        guide=GUIDE,
        source_branch=None,
        new_branch=None,
        steps=None,
    )
    yield from drop_evals(replay)
    yield from summarize_demo(out)


def drop_evals(records: Iterable[TrainingRecord]) -> Iterator[StepReport | CheckpointSaved | Notice]:
    """The curves show the evaluations; a table of them would bury the verdict."""
    return (record for record in records if not isinstance(record, EvalReport))


def summarize_demo(out: Path) -> Iterator[CurvePoint | BestHeldPoint | CostToThreshold | Notice]:
    """Both curves, where they cross the thresholds, the picture, and three sentences."""
    run = open_run(out)
    methods = [learning_curve(run, MAIN, name="GRPO"), learning_curve(run, GUIDE, name="NPO")]
    held = best_held_curve(run, GUIDE, name="NPO")
    for points in (*methods, held):
        yield from points
    reached = []
    for threshold in choose_thresholds(methods):
        grpo, npo = (cost_to_threshold(points, threshold) for points in methods)
        reached.append((grpo, npo))
        yield from (grpo, npo, best_held_cost_to_threshold(held, threshold))
    picture = out / "comparison.png"
    plot_accuracy_curves([point for points in methods for point in points], picture, "GRPO and NPO, one seed")
    yield Notice(message="")
    yield from (Notice(message=sentence) for sentence in describe_demo(reached))
    yield Notice(
        message=f"next: open {quote_path(picture)}; npo report {quote_path(out)} --out demo.html; npo init my-task"
    )


def describe_demo(reached: Sequence[tuple[CostToThreshold, CostToThreshold]]) -> Iterator[str]:
    """What was seen, by step, and what it cost: the middle one of the accuracies that both methods reached."""
    both = [pair for pair in reached if None not in (pair[0].step, pair[1].step)]
    if not both:
        lowest = f"of {reached[0][0].threshold:.2f}" if reached else "above the start"
        yield f"no accuracy {lowest} was reached by both methods; try another --seed"
        return
    grpo, npo = both[len(both) // 2]
    yield (
        f"what you saw: NPO reached a held-out accuracy of {npo.threshold:.2f} at step {npo.step}, "
        f"GRPO at step {grpo.step}: {grpo.step / npo.step:.2f}x by step"
    )
    yield (
        f"what it cost: {npo.total_tokens:,} tokens with its guide's training, scoring and samples, "
        f"{grpo.total_tokens:,} for GRPO: {grpo.total_tokens / npo.total_tokens:.2f}x by total tokens"
    )
