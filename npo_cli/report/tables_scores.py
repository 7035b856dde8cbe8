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
from npo_cli.types.scores import NO_GUIDE, CandidateScore, choose_guide

REFUTED_KINDS = {
    "group2": "with group2, S named the worst of six guides of micro at step 0 (two seeds), and 13.375 for all far ones"
}
"""Kinds of V that a measured gain scan refuted, and how."""


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
        *(interval_column("Q", "quality"), interval_column("Q_net", "quality_net")),
        *(interval_column(name_variance(scores), "variance"), interval_column("S", "signal")),
        number_column("p(best)", "p_best", digits=2),
        *(number_column("price", "price", digits=1), interval_column("value", "value"), Column("", _mark)),
    )
    return build_table("Guide candidates", scores, columns, notes=_notes(scores))


def name_variance(scores: Sequence[CandidateScore]) -> str:
    """`V`, or `V (distance)` where injected responses have no importance weight whose variance it could be."""
    return "V (distance)" if any(one.is_distance for one in scores) else "V"


def _mark(score: CandidateScore) -> str:
    marks = (("<- selected", score.is_selected), ("unreliable V", score.is_unreliable))
    return " ".join(word for word, applies in marks if applies)


def describe_choice(scores: Sequence[CandidateScore]) -> str:
    """Which guide is selected and how reliably, or that no guide is worth it and why."""
    choice = choose_guide(scores)
    if choice.chosen is None:
        selected = any(one.is_selected for one in scores)
        return f"No guide is worth it here: {choice.reason}." if selected else f"No guide is selected: {choice.reason}."
    selected = next(one for one in scores if one.is_selected)
    text = f"{selected.candidate} is selected; it has the largest S in {selected.p_best:.0%} of the resamples."
    if selected.quality_net_split is None:
        return text
    return (
        f"{text} Its Q_net of {selected.quality_net:+.3f} is from the prompts that selected it, so rather too high: "
        f"selected by one half of the prompts and measured on the other it is {selected.quality_net_split:+.3f}."
    )


def _notes(scores: Sequence[CandidateScore]) -> tuple[str, ...]:
    first = max(scores, key=lambda one: one.num_prompts)
    kind = next((one.quality_kind for one in scores if one.quality_kind != "any"), "any")
    notes = [
        f"Q is {kind}, Q_net is Q minus the learner's own second try, {name_variance(scores)} is "
        f"{first.variance_kind}, with 95 % intervals; {first.num_prompts} prompts that the learner mostly fails, "
        f"{first.samples_per_prompt:.3g} samples per prompt.",
        "price: steps thrown away, guide tokens and scoring, in training steps; value: forecast steps saved / price.",
        describe_choice(scores),
    ]
    selected = next((one for one in scores if one.is_selected), None)
    if selected is not None:
        others = ", ".join(f"{name} {choice}" for name, choice in sorted(selected.selection_by_profile.items()))
        notes.append(f"Rules and profiles select: {others}.")
    notes += [f"{one.candidate}: {one.note}." for one in scores if one.note and one.candidate != NO_GUIDE]
    if any(one.is_unreliable for one in scores):
        notes.append("unreliable V: it rests on a few samples; compare other kinds of V there.")
    return tuple(notes)


def _variance_table(scores: Sequence[CandidateScore]) -> Table:
    """Every kind of V side by side; a star marks the one in S."""
    own = scores[0].variance_kind
    kinds = sorted({kind for one in scores for kind in one.variances} - {own})
    columns = (
        *(text_column("candidate"), count_column("distance"), number_column(f"{_name_kind(own)} *", "variance")),
        *(Column(_name_kind(kind), lambda one, kind=kind: format_number(one.variances.get(kind))) for kind in kinds),
        *(number_column("KL/token", "kl_per_token"), number_column("KL/sequence", "kl_per_sequence")),
        *(number_column("length", "mean_length", digits=1), number_column("ESS", "ess_fraction")),
        *(number_column("pass@1", "pass_at_1"), number_column("pass@k", "pass_at_k")),
    )
    notes = ("*: enters S. KL in nats, length in tokens.", *_refuted_notes((own, *kinds)))
    return build_table(f"{name_variance(scores)} by kind", scores, columns, notes=notes, drops_empty=True)


def _name_kind(kind: str) -> str:
    return f"{kind} (refuted)" if kind in REFUTED_KINDS else kind


def _refuted_notes(kinds: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"refuted: {REFUTED_KINDS[kind]}." for kind in kinds if kind in REFUTED_KINDS)


def _p_best_table(scores: Sequence[CandidateScore]) -> Table:
    """A star marks the largest S of the data as they are."""

    def share(one: CandidateScore, kind: str) -> str:
        star = " *" if kind in one.best_for_variance_kinds else ""
        return format_number(one.p_best_by_variance_kind.get(kind), digits=2) + star

    kinds = sorted({kind for one in scores for kind in one.p_best_by_variance_kind})
    columns = (
        *(text_column("candidate"), count_column("distance")),
        *(Column(_name_kind(kind), lambda one, kind=kind: share(one, kind)) for kind in kinds),
    )
    notes = ("p(best): share of resamples with the largest S. *: the largest S without resampling.",)
    return build_table("p(best) by kind of V", scores, columns, notes=notes)
