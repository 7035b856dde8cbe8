"""Tables of scored guide candidates."""

from collections.abc import Sequence

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
from npo_cli.types.scores import CandidateScore


def scores_tables(scores: Sequence[CandidateScore]) -> tuple[Table, ...]:
    """Q, V and S of each candidate; every other V from the same samples; p(best) under each kind of V."""
    ordered = sort_candidates(scores)
    measured = [one for one in ordered if one.variance is not None]
    tables = [_signal_table(ordered)]
    if measured:
        tables.append(_variance_table(measured))
    if len(measured) > 1:
        tables.append(_p_best_table(measured))
    return tuple(tables)


def sort_candidates(scores: Sequence[CandidateScore]) -> list[CandidateScore]:
    """Those on the learner's line by distance, then the others by SPEC."""
    return sorted(scores, key=lambda one: (one.distance is None, one.distance or 0, one.candidate))


def _signal_table(scores: Sequence[CandidateScore]) -> Table:
    columns = (
        *(text_column("candidate"), count_column("distance")),
        *(interval_column("Q", "quality"), interval_column("V", "variance"), interval_column("S = Q/V", "signal")),
        number_column("p(best)", "p_best", digits=2),
        *(number_column("pass@1", "pass_at_1"), number_column("pass@k", "pass_at_k")),
        *(number_column("Q - Q_self", "quality_net"), number_column("ESS", "ess_fraction"), Column("", _mark)),
    )
    return build_table("Guide candidates", scores, columns, notes=_notes(scores))


def _mark(score: CandidateScore) -> str:
    marks = (("<- selected", score.is_selected), ("unreliable V", score.is_unreliable))
    return " ".join(word for word, applies in marks if applies)


def _notes(scores: Sequence[CandidateScore]) -> tuple[str, ...]:
    first = max(scores, key=lambda one: one.num_prompts)
    kind = next((one.quality_kind for one in scores if one.quality_kind != "any"), "any")
    notes = [
        f"Q is {kind} and V is {first.variance_kind}, with 95 % intervals; {first.num_prompts} prompts that the "
        f"learner mostly fails, {first.samples_per_prompt:.3g} samples per prompt."
    ]
    selected = next((one for one in scores if one.is_selected), None)
    if selected is not None:
        notes.append(
            f"{selected.candidate} is selected; it has the largest S in {selected.p_best:.0%} of the resamples."
        )
        others = ", ".join(f"{name} {choice}" for name, choice in sorted(selected.selection_by_profile.items()))
        notes.append(f"Other rules and profiles would select: {others}.")
    notes += [f"{one.candidate}: {one.note}." for one in scores if one.note]
    if any(one.is_unreliable for one in scores):
        notes.append("unreliable V: it rests on a few samples; compare other kinds of V there.")
    return tuple(notes)


def _variance_table(scores: Sequence[CandidateScore]) -> Table:
    """Every kind of V side by side; a star marks the one in S."""
    own = scores[0].variance_kind
    kinds = sorted({kind for one in scores for kind in one.variances} - {own})
    columns = (
        *(text_column("candidate"), count_column("distance"), number_column(f"{own} *", "variance")),
        *(Column(kind, lambda one, kind=kind: format_number(one.variances.get(kind))) for kind in kinds),
        *(number_column("KL/token", "kl_per_token"), number_column("KL/sequence", "kl_per_sequence")),
        number_column("length", "mean_length", digits=1),
    )
    return build_table("V by kind (* enters S; KL in nats, length in tokens)", scores, columns, drops_empty=True)


def _p_best_table(scores: Sequence[CandidateScore]) -> Table:
    """A star marks the largest S of the data as they are."""

    def share(one: CandidateScore, kind: str) -> str:
        star = " *" if kind in one.best_for_variance_kinds else ""
        return format_number(one.p_best_by_variance_kind.get(kind), digits=2) + star

    kinds = sorted({kind for one in scores for kind in one.p_best_by_variance_kind})
    columns = (
        *(text_column("candidate"), count_column("distance")),
        *(Column(kind, lambda one, kind=kind: share(one, kind)) for kind in kinds),
    )
    title = "p(best) by kind of V: share of resamples with the largest S (* the largest S without resampling)"
    return build_table(title, scores, columns)
