"""Records to tables of text, one function per kind of record; cli/output.py prints them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from npo_cli.report.prompt_tables import prompt_history_tables, visits_tables
from npo_cli.report.table import (
    Column,
    Table,
    bool_column,
    build_table,
    count_column,
    format_bytes,
    format_count,
    format_number,
    interval_column,
    number_column,
    text_column,
)
from npo_cli.report.tables_autonpo import AUTONPO_TABLES
from npo_cli.report.tables_calibration import CALIBRATION_TABLES
from npo_cli.report.tables_checks import CHECK_TABLES
from npo_cli.report.tables_compare import COMPARE_TABLES, tuning_tables
from npo_cli.report.tables_costs import cost_to_threshold_tables
from npo_cli.report.tables_dry_run import DRY_RUN_TABLES
from npo_cli.report.tables_memory import PLAN_TABLES
from npo_cli.report.tables_scores import scores_tables
from npo_cli.report.tables_settings import SETTING_TABLES, wrap_rows
from npo_cli.types.costs import CostToThreshold
from npo_cli.types.guides import GuideCacheInfo
from npo_cli.types.rollouts import CheckpointEntry, EvalReport, Segment, StepReport
from npo_cli.types.scores import CandidateScore
from npo_cli.types.views import (
    GroupView,
    PromptHistory,
    PromptVisit,
    RecipeView,
    RemovedFolder,
    RolloutView,
    RunListing,
    TunedSetting,
)


def index_tables(entries: Sequence[CheckpointEntry]) -> tuple[Table, ...]:
    """The run's checkpoints. Incomplete ones are marked; empty columns are left out."""
    columns = (
        *(text_column("branch"), text_column("step"), text_column("parent"), text_column("tier")),
        Column("size", lambda one: format_bytes(one.size_bytes)),
        bool_column("complete", "complete"),
        Column("digest", lambda one: (one.digest or "-")[:12]),
        *(number_column("reward"), number_column("entropy"), number_column("accuracy")),
        *(number_column("Q", "quality"), number_column("V", "variance"), number_column("S", "signal")),
        count_column("scored for", "learner_step"),
    )
    return (build_table("Checkpoints", entries, columns, drops_empty=True),)


def evals_tables(reports: Sequence[EvalReport]) -> tuple[Table, ...]:
    """Held-out evaluations in the order given."""
    columns = (
        *(text_column("branch"), text_column("step")),
        *(interval_column("accuracy (avg@k)", "accuracy"), interval_column("pass@k", "pass_at_k")),
        *(text_column("k", "num_samples"), count_column("prompts", "num_prompts")),
        number_column("length", "mean_length", digits=1),
        Column("truncated", lambda one: f"{one.truncated_fraction:.1%}"),
        count_column("tokens", "num_tokens"),
    )
    return (build_table("Held-out accuracy, 95 % intervals over prompts", reports, columns),)


def guides_tables(guides: Sequence[GuideCacheInfo]) -> tuple[Table, ...]:
    """Guide caches: learner, source, solved prompts, costs."""
    columns = (
        *(text_column("name"), text_column("branch")),
        Column("for steps", lambda one: f"{one.learner_step + 1}-{one.learner_step + one.num_steps}"),
        *(Column("source", lambda one: one.source.text), count_column("guide step", "guide_step")),
        Column(
            "solved",
            lambda one: f"{format_count(one.num_prompts_with_rollouts)} of {format_count(one.num_prompts)}",
        ),
        Column("kept", lambda one: format_count(one.num_rollouts or one.num_prompts_with_rollouts)),
        *(count_column("samples", "num_samples"), count_column("tokens", "num_tokens")),
        count_column("external tokens", "external_tokens", hides_zero=True),
        count_column("training tokens", "guide_training_tokens", hides_zero=True),
        *(bool_column("log-probs", "has_logps", no="none"), bool_column("complete", "complete")),
    )
    notes = (
        "solved: prompts with a verified response; external: not generated here; training: of a guide of another run",
    )
    return (build_table("Guide caches", guides, columns, notes=notes, drops_empty=True),)


def lineage_tables(segments: Sequence[Segment]) -> tuple[Table, ...]:
    """Segments, oldest first."""
    columns = (
        *(text_column("branch"), text_column("parent"), text_column("from step", "fork_step")),
        *(text_column("guide", "guide_cache"), count_column("guide until", "guide_until")),
        Column("merged start", lambda one: one.merge_spec),
        Column("", lambda one: "removed" if one.removed else "scout" if one.is_scout else ""),
    )
    return (build_table("Lineage", segments, columns, drops_empty=True),)


def metrics_tables(reports: Sequence[StepReport]) -> tuple[Table, ...]:
    """One row per branch (means of the first and the last tenth of its steps), then the newest steps."""
    rows = tuple(
        (one.branch, one.steps, *map(format_number, (*one.rewards, *one.entropies)), format_count(one.tokens))
        for one in summarize_branches(reports)
    )
    header = ("branch", "steps", "reward first", "reward last", "entropy first", "entropy last", "tokens")
    notes = ("first, last: mean over the first and over the last tenth of the steps",)
    summary = Table(title="Training", header=header, rows=rows, notes=notes)
    return (summary, _newest_steps(reports[-NUM_NEWEST:]))


@dataclass(frozen=True, kw_only=True, slots=True)
class BranchSummary:
    """The steps of one branch: means over the first and over the last tenth of them."""

    branch: str
    steps: str
    """`1-100`."""
    rewards: tuple[float | None, float | None]
    entropies: tuple[float | None, float | None]
    tokens: int


def summarize_branches(reports: Sequence[StepReport]) -> list[BranchSummary]:
    """One per branch, in the order of their first steps here."""
    branches = dict.fromkeys(one.branch for one in reports)
    return [_summarize([one for one in reports if one.branch == branch]) for branch in branches]


def _summarize(reports: Sequence[StepReport]) -> BranchSummary:
    tenth = max(1, len(reports) // 10)
    first, last = reports[:tenth], reports[-tenth:]
    return BranchSummary(
        branch=reports[0].branch,
        steps=f"{reports[0].step}-{reports[-1].step}",
        rewards=(_mean(first, "reward"), _mean(last, "reward")),
        entropies=(_mean(first, "entropy"), _mean(last, "entropy")),
        tokens=sum(int(one.metrics.get("tokens", 0)) for one in reports),
    )


def _mean(reports: Sequence[StepReport], name: str) -> float | None:
    values = [one.metrics[name] for one in reports if name in one.metrics]
    return sum(values) / len(values) if values else None


def _newest_steps(reports: Sequence[StepReport]) -> Table:
    columns = (
        *(text_column("branch"), text_column("step")),
        Column("reward", lambda one: format_number(one.metrics.get("reward"))),
        Column("accuracy", lambda one: format_number(one.distinct_accuracy)),
        *(metric_column(heading, name) for heading, name in STEP_METRICS.items()),
        Column("tokens/s", lambda one: format_count(_whole(one.timings.get("tokens_per_second")))),
    )
    return build_table("Newest steps", reports, columns, drops_empty=True)


def metric_column(heading: str, name: str) -> Column:
    """A metric of a training step."""
    return Column(heading, lambda one: format_number(one.metrics.get(name)))


STEP_METRICS = {
    "entropy": "entropy",
    "all wrong": "frac_all_wrong",
    "length": "completions/mean_length",
    "injected": "inject/slots",
    "grad norm": "grad_norm",
}
"""Heading and metric of further columns of the newest steps."""


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)


def rollouts_tables(views: Sequence[RolloutView]) -> tuple[Table, ...]:
    """Rollouts with question, reference answer and response."""
    columns = (
        *(text_column("branch"), text_column("step")),
        Column("prompt", lambda one: one.rollout.prompt_id),
        Column("slot", lambda one: str(one.rollout.slot)),
        Column("source", _source),
        Column("verdict", lambda one: one.rollout.verdict or "-"),
        Column("reward", lambda one: format_number(one.rollout.reward)),
        Column("ended", lambda one: "yes" if one.rollout.finished else "truncated"),
        *(text_column("question", "prompt_text"), text_column("answer", "reference_answer")),
        Column("response", lambda one: one.rollout.text),
    )
    return (build_table("Rollouts", views, columns),)


def _source(view: RolloutView) -> str:
    rollout = view.rollout
    has_step = rollout.is_off_policy and rollout.sampler_step is not None
    return f"{rollout.source} {rollout.sampler_step}" if has_step else rollout.source


def groups_tables(views: Sequence[GroupView]) -> tuple[Table, ...]:
    """Groups with the mean reward over all their rollouts."""
    columns = (
        *(text_column("branch"), text_column("step")),
        Column("prompt", lambda one: one.group.prompt.prompt_id),
        Column("rollouts", lambda one: str(len(one.group.rollouts))),
        Column("on-policy accuracy", lambda one: format_number(one.group.on_policy_accuracy)),
        Column("reward", lambda one: format_number(_mean_reward(one))),
        Column("injection", lambda one: one.group.injection_status),
    )
    return (build_table("Groups", views, columns),)


def _mean_reward(line: GroupView) -> float | None:
    rewards = [rollout.reward for rollout in line.group.rollouts if rollout.reward is not None]
    return sum(rewards) / len(rewards) if rewards else None


def recipes_tables(views: Sequence[RecipeView]) -> tuple[Table, ...]:
    """Recipes or methods by name."""
    header = ("name", "purpose")
    rows = tuple(wrap_rows(((one.name, one.description) for one in views), header=header))
    return (Table(title="Recipes", header=header, rows=rows),)


def runs_tables(runs: Sequence[RunListing]) -> tuple[Table, ...]:
    """Runs by path."""
    columns = (
        *(text_column("run"), text_column("recipe"), Column("branches", lambda one: str(len(one.branches)))),
        Column("scouts", lambda one: str(len(one.scouts) or "-")),
        Column("step", lambda one: f"{one.step} of {one.num_steps}"),
        *(number_column("best accuracy", "best_accuracy", digits=2), text_column("of branch", "best_branch")),
        *(text_column("at step", "best_step"), Column("size", lambda one: format_bytes(one.size_bytes))),
        *(text_column("state"), text_column("note")),
    )
    return (build_table("Runs", runs, columns, drops_empty=True),)


def removal_tables(folders: Sequence[RemovedFolder]) -> tuple[Table, ...]:
    """Folders of a removal."""
    columns = (
        *(text_column("folder", "path"), text_column("kind")),
        Column("size", lambda one: format_bytes(one.size_bytes)),
    )
    title = "Deleted" if folders[0].is_deleted else "Would be deleted"
    return (build_table(title, folders, columns),)


NUM_NEWEST = 10

TABLES: Mapping[type, Callable[[Sequence[Any]], tuple[Table, ...]]] = {
    StepReport: metrics_tables,
    CheckpointEntry: index_tables,
    GuideCacheInfo: guides_tables,
    CandidateScore: scores_tables,
    EvalReport: evals_tables,
    CostToThreshold: cost_to_threshold_tables,
    **COMPARE_TABLES,
    **CALIBRATION_TABLES,
    **AUTONPO_TABLES,
    **PLAN_TABLES,
    Segment: lineage_tables,
    RolloutView: rollouts_tables,
    GroupView: groups_tables,
    PromptHistory: prompt_history_tables,
    PromptVisit: visits_tables,
    RecipeView: recipes_tables,
    TunedSetting: tuning_tables,
    RunListing: runs_tables,
    RemovedFolder: removal_tables,
    **CHECK_TABLES,
    **SETTING_TABLES,
    **DRY_RUN_TABLES,
}
"""The tables of each kind of record, in the order in which they are printed."""
