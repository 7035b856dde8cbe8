"""Records to tables of text, one function a kind of record. It knows no terminal: see the console for that."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from npo_cli.report.prompt_tables import prompt_history_tables, visits_tables
from npo_cli.report.table import Table, drop_empty_columns, format_bytes, format_count, format_interval, format_number
from npo_cli.report.tables_autonpo import AUTONPO_TABLES
from npo_cli.report.tables_compare import COMPARE_TABLES, tuning_tables
from npo_cli.report.tables_costs import cost_to_threshold_tables
from npo_cli.report.tables_memory import PLAN_TABLES
from npo_cli.report.tables_sources import sources_tables
from npo_cli.types.costs import CostToThreshold
from npo_cli.types.guides import GuideCacheInfo, SourceScore
from npo_cli.types.rollouts import CheckpointEntry, CheckpointScore, EvalReport, Segment, StepReport
from npo_cli.types.views import (
    DoctorCheck,
    GroupView,
    PromptHistory,
    PromptVisit,
    RecipeView,
    RolloutView,
    TunedSetting,
)


def index_tables(entries: Sequence[CheckpointEntry]) -> tuple[Table, ...]:
    """The run's checkpoints. Incomplete ones are marked; columns that nothing filled are left out."""
    header = (
        *("branch", "step", "parent", "tier", "size", "whole", "digest", "reward", "entropy", "accuracy"),
        *("Q", "V", "S", "scored for"),
    )
    rows = tuple(
        (
            *(one.branch, str(one.step), one.parent or "-", one.tier, format_bytes(one.size_bytes)),
            *("yes" if one.complete else "NO", (one.digest or "-")[:12]),
            *(format_number(one.reward), format_number(one.entropy), format_number(one.accuracy)),
            *(
                format_number(one.quality),
                format_number(one.variance),
                format_number(one.signal),
                format_count(one.learner_step),
            ),
        )
        for one in entries
    )
    return (drop_empty_columns(Table(title="Checkpoints", header=header, rows=rows)),)


def scores_tables(scores: Sequence[CheckpointScore]) -> tuple[Table, ...]:
    """Candidates by distance with Q, V and S; then every other V from the same samples."""
    ordered = sorted(scores, key=lambda one: one.distance)
    return (_signal_table(ordered), _variance_table(ordered))


def _signal_table(scores: Sequence[CheckpointScore]) -> Table:
    header = ("step", "distance", "Q", "V", "S = Q/V", "p(best)", "pass@1", "pass@k", "Q - Q_self", "ESS", "")
    rows = tuple(
        (
            *(str(one.step), str(one.distance)),
            format_interval(one.quality, one.quality_low, one.quality_high),
            format_interval(one.variance, one.variance_low, one.variance_high),
            format_interval(one.signal, one.signal_low, one.signal_high),
            *(
                format_number(one.p_best, digits=2),
                format_number(one.pass_at_1),
                format_number(one.pass_at_k),
                format_number(one.quality_net),
            ),
            *(format_number(one.ess_fraction), _mark(one)),
        )
        for one in scores
    )
    return Table(title="Candidate guides", header=header, rows=rows, notes=_score_notes(scores))


def _mark(score: CheckpointScore) -> str:
    return " ".join(
        word for word, said in (("<- chosen", score.is_selected), ("unreliable V", score.is_unreliable)) if said
    )


def _score_notes(scores: Sequence[CheckpointScore]) -> tuple[str, ...]:
    first = scores[0]
    notes = [
        f"Q is {first.quality_kind} and V is {first.variance_kind}, with 95 % intervals; "
        f"{first.num_prompts} prompts, {first.num_samples} samples a candidate."
    ]
    best = next((one for one in scores if one.is_selected), None)
    if best is not None:
        notes.append(f"Step {best.step} is chosen; it has the largest S in {best.p_best:.0%} of the resamples.")
    others = {name: step for one in scores for name, step in one.selection_by_profile.items()}
    if others:
        notes.append(
            "Others would choose: " + ", ".join(f"{name} {step}" for name, step in sorted(others.items())) + "."
        )
    if any(one.is_unreliable for one in scores):
        notes.append("unreliable V: it rests on a few samples (ESS below 0.1); trust another V kind there.")
    return tuple(notes)


def _variance_table(scores: Sequence[CheckpointScore]) -> Table:
    """Every V kind side by side; the one that entered S is marked with a star."""
    chosen = f"{scores[0].variance_kind} *"
    kinds = sorted({kind for one in scores for kind in one.variances} - {scores[0].variance_kind})
    rows = tuple(
        (
            *(str(one.step), str(one.distance), format_number(one.variance)),
            *(format_number(one.variances.get(kind)) for kind in kinds),
            *(
                format_number(one.kl_per_token),
                format_number(one.kl_per_sequence),
                format_number(one.mean_length, digits=1),
            ),
        )
        for one in scores
    )
    header = ("step", "distance", chosen, *kinds, "KL/token", "KL/sequence", "length")
    return Table(title="V by kind (* enters S; KL in nats, length in tokens)", header=header, rows=rows)


def evals_tables(reports: Sequence[EvalReport]) -> tuple[Table, ...]:
    """Held-out evaluations in the order given."""
    header = ("branch", "step", "accuracy (avg@k)", "pass@k", "k", "prompts", "length", "cut off", "tokens")
    rows = tuple(
        (
            *(one.branch, str(one.step)),
            format_interval(one.accuracy, one.accuracy_low, one.accuracy_high),
            format_interval(one.pass_at_k, one.pass_at_k_low, one.pass_at_k_high),
            *(str(one.num_samples), format_count(one.num_prompts), format_number(one.mean_length, digits=1)),
            *(f"{one.truncated_fraction:.1%}", format_count(one.num_tokens)),
        )
        for one in reports
    )
    return (Table(title="Held-out accuracy, 95 % intervals over prompts", header=header, rows=rows),)


def guides_tables(guides: Sequence[GuideCacheInfo]) -> tuple[Table, ...]:
    """Guide caches: whom they serve, who wrote them, how many prompts they solved, what they cost and whom."""
    header = (
        *("name", "branch", "for steps", "source", "guide step", "from", "solved", "kept", "samples", "tokens"),
        *("given tokens", "side tokens", "log-probs", "whole"),
    )
    rows = tuple(
        (
            *(one.name, one.branch, f"{one.learner_step + 1}-{one.learner_step + one.num_steps}"),
            *(one.source, format_count(one.guide_step), one.origin),
            *(
                f"{format_count(one.num_prompts_with_rollouts)} of {format_count(one.num_prompts)}",
                format_count(one.num_rollouts or one.num_prompts_with_rollouts),
            ),
            *(format_count(one.num_samples), format_count(one.num_tokens), format_count(one.external_tokens or None)),
            *(
                format_count(one.guide_training_tokens or None),
                "yes" if one.has_logps else "none",
                "yes" if one.complete else "NO",
            ),
        )
        for one in guides
    )
    notes = ("solved: prompts with a verified answer; given: by somebody else; side: what training the guide had cost",)
    return (drop_empty_columns(Table(title="Guide caches", header=header, rows=rows, notes=notes)),)


def lineage_tables(segments: Sequence[Segment]) -> tuple[Table, ...]:
    """Segments in the order in which training began them."""
    header = ("branch", "parent", "from step", "guide", "guide until")
    rows = tuple(
        (one.branch, one.parent or "-", str(one.fork_step), one.guide_cache or "-", format_count(one.guide_until))
        for one in segments
    )
    return (Table(title="Lineage", header=header, rows=rows),)


def metrics_tables(reports: Sequence[StepReport]) -> tuple[Table, ...]:
    """One line a branch (means of the first and the last tenth of its steps), then the newest steps one by one."""
    branches = dict.fromkeys(one.branch for one in reports)
    rows = tuple(_branch_row([one for one in reports if one.branch == branch]) for branch in branches)
    header = ("branch", "steps", "reward first", "reward last", "entropy first", "entropy last", "tokens")
    notes = ("first, last: mean over the first and over the last tenth of the steps",)
    summary = Table(title="Training", header=header, rows=rows, notes=notes)
    return (summary, _newest_steps(reports[-NUM_NEWEST:]))


def _branch_row(reports: Sequence[StepReport]) -> tuple[str, ...]:
    tenth = max(1, len(reports) // 10)
    ends = (reports[:tenth], reports[-tenth:])
    means = (format_number(_mean(some, name)) for name in ("reward", "entropy") for some in ends)
    tokens = format_count(sum(int(one.metrics.get("tokens", 0)) for one in reports))
    return (reports[0].branch, f"{reports[0].step}-{reports[-1].step}", *means, tokens)


def _mean(reports: Sequence[StepReport], name: str) -> float | None:
    values = [one.metrics[name] for one in reports if name in one.metrics]
    return sum(values) / len(values) if values else None


def _newest_steps(reports: Sequence[StepReport]) -> Table:
    header = ("branch", "step", "reward", "entropy", "all wrong", "length", "injected", "grad norm", "tokens/s")
    names = ("reward", "entropy", "frac_all_wrong", "completions/mean_length", "inject/slots", "grad_norm")
    rows = tuple(
        (
            *(one.branch, str(one.step), *(format_number(one.metrics.get(name)) for name in names)),
            format_count(_whole(one.timings.get("tokens_per_second"))),
        )
        for one in reports
    )
    return drop_empty_columns(Table(title="Newest steps", header=header, rows=rows))


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)


def rollouts_tables(lines: Sequence[RolloutView]) -> tuple[Table, ...]:
    """Rollouts with question, reference answer and response, the seated guide told apart."""
    header = ("branch", "step", "prompt", "slot", "source", "verdict", "ended", "question", "answer", "response")
    rows = tuple(
        (
            *(one.branch, str(one.step), one.rollout.prompt_id, str(one.rollout.slot), _source(one)),
            *(one.rollout.verdict or "-", "yes" if one.rollout.finished else "cut off"),
            *(one.prompt_text, one.reference_answer, one.rollout.text),
        )
        for one in lines
    )
    return (Table(title="Rollouts", header=header, rows=rows),)


def _source(line: RolloutView) -> str:
    rollout = line.rollout
    return (
        rollout.source
        if rollout.sampler_step is None or not rollout.is_off_policy
        else f"{rollout.source} {rollout.sampler_step}"
    )


def groups_tables(lines: Sequence[GroupView]) -> tuple[Table, ...]:
    """Groups with the mean reward over all their rollouts."""
    header = ("branch", "step", "prompt", "rollouts", "own accuracy", "reward", "mix")
    rows = tuple(
        (
            *(one.branch, str(one.step), one.group.prompt.prompt_id, str(len(one.group.rollouts))),
            *(
                format_number(one.group.on_policy_accuracy),
                format_number(_mean_reward(one)),
                one.group.injection_status,
            ),
        )
        for one in lines
    )
    return (Table(title="Groups", header=header, rows=rows),)


def _mean_reward(line: GroupView) -> float | None:
    rewards = [rollout.reward for rollout in line.group.rollouts if rollout.reward is not None]
    return sum(rewards) / len(rewards) if rewards else None


def recipes_tables(lines: Sequence[RecipeView]) -> tuple[Table, ...]:
    """Recipes by name."""
    rows = tuple((one.name, one.description) for one in lines)
    return (Table(title="Recipes", header=("name", "what for"), rows=rows),)


def checks_tables(checks: Sequence[DoctorCheck]) -> tuple[Table, ...]:
    """`-` marks an optional part that is absent, `BAD` a fault."""
    words = {(True, True): "ok", (True, False): "ok", (False, False): "-", (False, True): "BAD"}
    rows = tuple((words[one.is_ok, one.is_required], one.name, one.detail, one.hint) for one in checks)
    return (Table(title="This machine", header=("", "part", "found", "to mend it"), rows=rows),)


NUM_NEWEST = 10

TABLES: Mapping[type, Callable[[Sequence[Any]], tuple[Table, ...]]] = {
    StepReport: metrics_tables,
    CheckpointEntry: index_tables,
    GuideCacheInfo: guides_tables,
    CheckpointScore: scores_tables,
    SourceScore: sources_tables,
    EvalReport: evals_tables,
    CostToThreshold: cost_to_threshold_tables,
    **COMPARE_TABLES,
    **AUTONPO_TABLES,
    **PLAN_TABLES,
    Segment: lineage_tables,
    RolloutView: rollouts_tables,
    GroupView: groups_tables,
    PromptHistory: prompt_history_tables,
    PromptVisit: visits_tables,
    RecipeView: recipes_tables,
    TunedSetting: tuning_tables,
    DoctorCheck: checks_tables,
}
"""How each kind of record is tabulated, in the order in which kinds are shown."""
