"""Sources of trajectories side by side as tables of text."""

from collections.abc import Sequence

from npo_cli.report.table import Table, format_count, format_interval, format_number
from npo_cli.types.guides import SourceScore


def sources_tables(scores: Sequence[SourceScore]) -> tuple[Table, ...]:
    """Q, V and S of each, in the order of the figure; then how sure the largest S is under each kind of V."""
    ordered = sort_sources(scores)
    return (_signal_table(ordered), _lead_table(ordered))


SOURCE_ORDER = ("past", "base", "self", "extrapolated", "near", "far", "run", "model", "endpoint", "file")
"""Kinds of sources, from the learner's own past to others."""


def sort_sources(scores: Sequence[SourceScore]) -> list[SourceScore]:
    """By kind, then by distance."""
    return sorted(scores, key=lambda one: (SOURCE_ORDER.index(one.kind), one.distance or 0))


def _signal_table(scores: Sequence[SourceScore]) -> Table:
    header = (
        "source",
        "kind",
        "ahead",
        "Q",
        "V",
        "S = Q/V",
        "p(best)",
        "pass@1",
        "tries",
        "Q - Q_self",
        "KL/token",
        "KL/seq",
        "",
    )
    rows = tuple(
        (
            *(one.name, one.kind, format_count(one.distance)),
            format_interval(one.quality, one.quality_low, one.quality_high),
            _known(one.variance, one.variance_low, one.variance_high),
            _known(one.signal, one.signal_low, one.signal_high),
            *(
                format_number(one.p_best, digits=2),
                format_number(one.pass_at_1),
                format_number(one.samples_per_prompt, digits=1),
            ),
            *(
                format_number(one.quality_net),
                format_number(one.kl_per_token),
                format_number(one.kl_per_sequence),
                _mark(one),
            ),
        )
        for one in scores
    )
    first = scores[0]
    asked = next(one.quality_kind for one in scores if one.kind == "self")
    notes = [
        f"Q is {asked} and V is {first.variance_kind}, with 95 % intervals; {first.num_prompts} prompts that the "
        "learner mostly fails. tries: samples a prompt."
    ]
    notes += [f"{one.name}: {one.note}." for one in scores if one.note]
    return Table(title="Sources of trajectories", header=header, rows=rows, notes=tuple(notes))


def _known(value: float | None, low: float | None, high: float | None) -> str:
    return "-" if value is None or low is None or high is None else format_interval(value, low, high)


def _mark(score: SourceScore) -> str:
    return " ".join(
        word for word, said in (("<- largest S", score.is_selected), ("unreliable V", score.is_unreliable)) if said
    )


def _lead_table(scores: Sequence[SourceScore]) -> Table:
    """The place of the maximum is marked with a star."""
    kinds = sorted({kind for one in scores for kind in one.p_best_by_variance_kind})
    rows = tuple(
        (
            one.name,
            one.kind,
            *(
                format_number(one.p_best_by_variance_kind[kind], digits=2)
                + " *" * (kind in one.best_for_variance_kinds)
                for kind in kinds
            ),
        )
        for one in scores
        if one.p_best_by_variance_kind
    )
    title = "Share of resamples with the largest S, by kind of V (* the largest S of the data as they are)"
    return Table(title=title, header=("source", "kind", *kinds), rows=rows)
