"""Tables of a calibration: the candidates of each learner, and the selection rules."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from npo_cli.report.table import (
    Column,
    Table,
    build_table,
    count_column,
    format_number,
    interval_column,
    number_column,
    text_column,
)
from npo_cli.types.calibration import CandidateGain, RuleResult


def candidate_gain_tables(candidates: Sequence[CandidateGain]) -> tuple[Table, ...]:
    """One table per learner: gain, score and price of each candidate."""
    places = dict.fromkeys((one.branch, one.learner_step) for one in candidates)
    return tuple(
        _learner_table([one for one in candidates if (one.branch, one.learner_step) == place]) for place in places
    )


def _learner_table(candidates: Sequence[CandidateGain]) -> Table:
    first = candidates[0]
    kinds = sorted({kind for one in candidates for kind in one.variances})
    columns = (
        *(text_column("candidate"), count_column("distance"), interval_column("gain", "gain")),
        *(number_column("Q", "quality"), number_column("Q_net", "quality_net")),
        *(Column(f"V {kind}", lambda one, kind=kind: format_number(one.variances.get(kind))) for kind in kinds),
        Column("solved", lambda one: f"{one.num_solved} of {one.num_prompts}"),
        number_column("injected/step", "injected_per_step", digits=1),
        count_column("steps thrown away", "steps_thrown_away"),
        count_column("guide tokens", "guide_tokens"),
        number_column("price, steps", "price", digits=1),
        number_column("gain per 100 steps", "gain_per_100_steps"),
    )
    seeds = len(first.gains_by_seed)
    notes = (
        f"gain: mean held-out accuracy during the replay, minus {first.accuracy_unguided:.3f} of the replay without a "
        f"guide; {seeds} seed{'s' * (seeds != 1)}, {first.num_heldout} held-out prompts, 95 % intervals over both.",
        "price: steps thrown away, and the guide's tokens in steps of the replay without a guide.",
    )
    return build_table(
        f"Guide candidates for step {first.learner_step} of {first.branch}", candidates, columns, notes=notes
    )


def rule_tables(results: Sequence[RuleResult]) -> tuple[Table, ...]:
    """How well each rule predicts the gain, and what it chose for each learner."""
    columns = (
        text_column("rule"),
        text_column("kind"),
        interval_column("rank correlation", "rank_correlation"),
        interval_column("regret", "regret"),
        interval_column("share of best", "share"),
        interval_column("share per cost", "share_per_cost"),
        *(
            Column(f"choice at {one.learner_step}", lambda result, place=place: _choice(result, place))
            for place, one in enumerate(results[0].learners)
        ),
    )
    best = ", ".join(f"{one.best or 'no guide'} at {one.learner_step}" for one in results[0].learners)
    notes = (
        f"Largest measured gain: {best}.",
        "rank correlation: Spearman's, of score and gain. regret: largest gain minus that of the choice; "
        "no guide has gain 0. Means over learners; 95 % intervals over seeds and held-out prompts.",
        "share of best: gain of the choice / largest gain; share per cost: the same per step of the price.",
    )
    return (build_table("Selection rules against the measured gain", results, columns, notes=notes),)


def _choice(result: RuleResult, place: int) -> str:
    return result.learners[place].choice or "no guide"


CALIBRATION_TABLES: Mapping[type, Callable[[Sequence[Any]], tuple[Table, ...]]] = {
    CandidateGain: candidate_gain_tables,
    RuleResult: rule_tables,
}
"""How each kind of record is tabulated."""
