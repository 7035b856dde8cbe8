"""Tables and the figure of scored guide candidates."""

from dataclasses import replace

import pytest

from npo_cli.report.score_plots import plot_scores
from npo_cli.report.tables_scores import scores_tables
from tests.report.samples import FAR_SCORE, ITSELF, SCORE, TEACHER_SCORE


def column(table, name: str) -> list[str]:
    return [row[table.header.index(name)] for row in table.rows]


def test_scores_table_is_ordered_by_distance_and_marks_the_selected_candidate():
    signal, _, _ = scores_tables([TEACHER_SCORE, FAR_SCORE, SCORE, ITSELF])
    assert column(signal, "candidate") == ["self", "checkpoint:100", "checkpoint:140", "model:teach"]
    assert column(signal, "distance") == ["0", "20", "60", "-"]
    assert column(signal, "") == ["", "<- selected", "unreliable V", ""]


def test_scores_table_has_intervals_and_dashes_without_log_probabilities():
    signal, _, _ = scores_tables([TEACHER_SCORE, FAR_SCORE, SCORE])
    assert column(signal, "Q") == ["0.250 [0.200, 0.300]", "0.250 [0.200, 0.300]", "0.900 [0.800, 1.000]"]
    assert column(signal, "V") == ["2.000 [1.500, 2.500]", "40.000 [1.500, 90.000]", "-"]
    assert column(signal, "S") == ["0.125 [0.100, 0.150]"] * 2 + ["-"]
    assert column(signal, "p(best)") == ["0.75", "0.25", "-"]


def test_scores_notes_name_the_selected_candidate_and_limitations():
    notes = " ".join(scores_tables([TEACHER_SCORE, FAR_SCORE, SCORE])[0].notes)
    for part in (
        "checkpoint:100 is selected",
        "75% of the resamples",
        "faithful checkpoint:140",
        "model:teach: no V",
        "measured on the other it is +0.180",
    ):
        assert part in notes


def test_scores_of_every_variance_kind_beside_the_one_in_the_signal():
    _, kinds = scores_tables([SCORE])
    assert kinds.header[:8] == (
        *("candidate", "distance", "group2 (refuted) *", "kl_exp", "seq2", "KL/token", "KL/sequence", "length"),
    )
    assert kinds.rows[0][:8] == ("checkpoint:100", "20", "2.000", "1.100", "30.000", "0.020", "0.300", "15.0")
    assert kinds.notes[1].startswith("refuted: with group2, S named the worst")


def test_scores_p_best_under_each_variance_kind():
    *_, p_best = scores_tables([SCORE, FAR_SCORE])
    assert p_best.header == ("candidate", "distance", "group2 (refuted)", "kl_exp")
    assert p_best.rows == (("checkpoint:100", "20", "0.75 *", "0.25"), ("checkpoint:140", "60", "0.25", "0.75 *"))


def test_scores_table_says_that_no_guide_is_worth_it_and_why():
    nothing = replace(ITSELF, candidate="none", source="none", is_selected=True, note="all are worse", p_best=0.9)
    signal, *_ = scores_tables([replace(SCORE, is_selected=False), nothing])
    assert column(signal, "candidate") == ["none", "checkpoint:100"]
    assert column(signal, "")[0] == "<- selected"
    assert "No guide is worth it here: all are worse." in signal.notes


def test_scores_table_calls_v_a_distance_without_importance_weights():
    assert "V (distance)" in scores_tables([replace(SCORE, is_distance=True)])[0].header
    assert "V" in scores_tables([SCORE])[0].header


def test_scores_table_shows_the_forecast_and_the_paired_interval():
    one = replace(
        SCORE, quality_net_low=0.1, quality_net_high=0.3, price=25.04, value=1.5, value_low=1.0, value_high=2.0
    )
    signal, *_ = scores_tables([one])
    assert column(signal, "Q_net") == ["0.200 [0.100, 0.300]"]
    assert (column(signal, "price"), column(signal, "value")) == (["25.0"], ["1.500 [1.000, 2.000]"])


@pytest.mark.parametrize("suffix", ["png", "svg", "PNG"])
def test_scores_figure_names_every_candidate(tmp_path, suffix):
    path = tmp_path / f"scores.{suffix}"
    plot_scores([TEACHER_SCORE, SCORE, replace(ITSELF, candidate="self $x^{$")], path, title="a $ b")
    assert path.stat().st_size > 5_000
    if suffix == "svg":
        # matplotlib keeps each text in a comment beside its outlines
        text = path.read_text()
        assert all(f"<!-- {name} -->" in text for name in ("model:teach", "checkpoint:100 (+20)", "not available"))
