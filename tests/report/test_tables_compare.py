"""Tables of `npo compare`."""

from dataclasses import replace

from npo_cli.report.short_tables import short_speedup_tables, short_threshold_tables
from npo_cli.report.tables_compare import (
    differences_tables,
    hysteresis_tables,
    speedup_tables,
    summary_tables,
    time_to_threshold_tables,
)
from npo_cli.types.comparison import (
    Estimate,
    MethodDifference,
    MethodHysteresis,
    MethodSummary,
    MethodTimeToThreshold,
    SpeedUp,
)

GRPO = MethodSummary(
    method="grpo",
    seeds=(0, 1),
    runs=("a:main", "b:main"),
    num_prompts=64,
    resampling_unit="seeds and prompts",
    horizon=40,
    final_accuracy=Estimate(value=0.5, low=0.4, high=0.625, num_used=2, num_total=2),
    areas={"step": Estimate(value=0.25, low=0.125, high=0.5, num_used=2, num_total=2)},
    entropies=(0.5, 0.25, 0.125, None),
    injections_per_step=0.0,
    guide_gradient_share=None,
    mean_costs={"step": 40, "updates": 40, "tokens": 74602.5},
    run_tokens=99999.0,
    changed_settings=(),
    mismatched_settings=(),
)
ONE = replace(
    GRPO,
    method="npo",
    seeds=(0,),
    resampling_unit="nothing",
    final_accuracy=Estimate(value=0.75),
    injections_per_step=1.5,
    guide_gradient_share=0.2,
    changed_settings=("train.lr 1 -> 2",),
    mismatched_settings=("task.kind any -> mix3",),
)


def test_summary_tables_have_values_with_intervals_where_known():
    accuracy, *_ = summary_tables([GRPO, ONE])
    assert accuracy.header == ("method", "seeds", "final accuracy", "area by step")
    assert accuracy.rows == (
        ("grpo", "2", "0.500 [0.400, 0.625]", "0.250 [0.125, 0.500]"),
        ("npo", "1", "0.750", "0.250 [0.125, 0.500]"),
    )


def test_summary_tables_say_what_the_intervals_are_resampled_over():
    (_, both), (_, one, other) = (summary_tables(some)[0].notes for some in ([GRPO], [GRPO, ONE]))
    assert both.startswith("95 % intervals") and one.startswith("grpo") and other.startswith("npo")


def test_summary_tables_list_mismatches_before_other_settings():
    _, training, settings = summary_tables([GRPO, ONE])
    # no seconds were recorded, and no entropy of the last quarter
    assert not {"seconds", "entropy 75-100 %"} & set(training.header)
    assert settings.rows == (("npo", "MISMATCH", "task.kind any -> mix3"), ("npo", "method", "train.lr 1 -> 2"))
    assert len(summary_tables([GRPO])) == 2


DIFFERENCE = MethodDifference(
    method="npo",
    baseline="grpo",
    num_pairs=2,
    num_prompts=64,
    resampling_unit="seeds and prompts",
    final_accuracy=Estimate(value=0.03, low=-0.01, high=0.07, num_used=2, num_total=2),
    areas={},
    num_not_lower=1,
)


def test_difference_tables_say_how_each_pair_is_paired():
    unpaired = replace(DIFFERENCE, method="far", num_pairs=0, num_prompts=None, num_not_lower=0)
    by_seed = replace(DIFFERENCE, method="old", num_prompts=None)
    (table,) = differences_tables([DIFFERENCE, unpaired, by_seed])
    assert table.header == ("method", "pairs", "final accuracy", "not lower")
    assert table.rows == (
        ("npo", "2", "+0.030 [-0.010, +0.070]", "1 of 2"),
        ("far", "0", "+0.030 [-0.010, +0.070]", "-"),
        ("old", "2", "+0.030 [-0.010, +0.070]", "1 of 2"),
    )
    assert ["by prompt, 64" in note for note in table.notes] == [True, False, False, False]
    assert ["not paired" in note for note in table.notes] == [False, True, False, False]


def test_threshold_tables_mark_a_mean_with_a_censored_seed_as_lower_bound():
    some = MethodTimeToThreshold(
        method="grpo",
        threshold=0.6,
        num_runs=3,
        num_reached=2,
        costs={"step": 31.66, "tokens": 58715.4},
        restricted_means={"step": 31.66, "tokens": 50000.0},
        horizons={"step": 40, "tokens": 74365},
    )
    (table,) = time_to_threshold_tables([some, replace(some, num_reached=3)])
    assert table.header[3:] == ("step", "tokens", "min(step, 40)", "min(tokens, 74,365)")
    assert table.rows == (
        ("grpo", "0.60", "2 of 3", ">= 31.7", ">= 58,715", "31.7", "50,000"),
        ("grpo", "0.60", "3 of 3", "31.7", "58,715", "31.7", "50,000"),
    )


def test_speedup_tables_say_how_many_pairs_a_ratio_has():
    speed = SpeedUp(
        method="npo",
        baseline="grpo",
        threshold=0.6,
        ratio_if_reached={"step": Estimate(value=1.5, low=1.25, high=1.75, num_used=2, num_total=3)},
        restricted_mean_ratio={
            "step": Estimate(value=1.25, low=1.0, high=1.5, num_used=3, num_total=3),
            "tokens": Estimate(value=0.5, num_total=2),
        },
    )
    never = replace(speed, threshold=0.9, ratio_if_reached={}, restricted_mean_ratio={})
    reached, restricted = speedup_tables([speed, never])
    assert reached.header == ("method", "accuracy", "by step")
    assert reached.rows == (("npo", "0.60", "1.50x [1.25, 1.75] (2 of 3)"), ("npo", "0.90", "-"))
    assert restricted.rows[0] == ("npo", "0.60", "1.25x [1.00, 1.50]", "0.50x (1 of 2)")
    # no ratio on any axis: no table
    assert speedup_tables([never]) == ()


def test_compare_tables_have_notes_only_for_what_they_show():
    noted = [summary_tables(some)[1].notes[-1].startswith("guide gradient share") for some in ([GRPO, ONE], [GRPO])]
    assert noted == [True, False]
    some = MethodTimeToThreshold(
        method="a",
        threshold=0.6,
        num_runs=1,
        num_reached=0,
        costs={"step": 5},
        restricted_means={"step": 5},
        horizons={"step": 5},
    )
    tables = [time_to_threshold_tables([one])[0] for one in (some, replace(some, num_reached=1))]
    assert [any(note.startswith(">=") for note in table.notes) for table in tables] == [True, False]
    speed = SpeedUp(
        method="b",
        baseline="a",
        threshold=0.6,
        ratio_if_reached={},
        restricted_mean_ratio={"step": Estimate(value=2.0)},
    )
    partly = replace(speed, restricted_mean_ratio={"step": Estimate(value=2.0, num_used=1, num_total=2)})
    noted = [any(note.startswith("(n of N)") for note in speedup_tables([one])[0].notes) for one in (partly, speed)]
    assert noted == [True, False]


def test_time_to_threshold_table_has_best_held_rows_without_a_step():
    own = MethodTimeToThreshold(
        method="npo",
        threshold=0.6,
        num_runs=2,
        num_reached=1,
        costs={"step": 30.0, "updates": 90.0},
        restricted_means={"step": 30.0, "updates": 80.0},
        horizons={"step": 40.0, "updates": 80.0},
    )
    held = replace(own, curve="best held", num_reached=2, costs={"updates": 60.0}, restricted_means={"updates": 60.0})
    (table,) = time_to_threshold_tables([own, held])
    assert [row[:5] for row in table.rows] == [
        ("npo", "0.60", "1 of 2", ">= 30", ">= 90"),
        ("npo, best held", "0.60", "2 of 2", "-", "60"),
    ]


def test_short_threshold_table_has_the_best_policy_held_where_it_is_not_the_methods_own():
    own = MethodTimeToThreshold(
        method="matched-distill-scout",
        threshold=0.6,
        num_runs=2,
        num_reached=1,
        costs={"step": 30.0, "tokens": 90.0},
        restricted_means={},
        horizons={},
    )
    same = replace(own, curve="best held", costs={"tokens": 90.0})
    cheaper = replace(own, curve="best held", threshold=0.8, costs={"tokens": 60.0})
    (table,) = short_threshold_tables([own, same, replace(own, threshold=0.8), cheaper])
    assert [(row[0], row[1], row[-1]) for row in table.rows] == [
        ("matched-distill-scout", "0.60", ">= 90"),
        ("matched-distill-scout", "0.80", ">= 90"),
        ("matched-distill-scout *", "0.80", ">= 60"),
    ]


def test_short_speedup_table_has_no_row_without_a_pair():
    ratio = Estimate(value=2.0, low=1.0, high=4.0, num_used=2, num_total=2)
    one = SpeedUp(
        method="npo", baseline="grpo", threshold=0.6, ratio_if_reached={"tokens": ratio}, restricted_mean_ratio={}
    )
    never = replace(one, threshold=0.8, ratio_if_reached={})
    (table,) = short_speedup_tables([one, replace(one, curve="best held"), never])
    assert [(row[0], row[1], row[-1]) for row in table.rows] == [("npo", "0.60", "2.00 [1.00, 4.00]")]
    assert table.notes[-1] == "no row: no pair of seeds reached it."
    assert short_speedup_tables([never]) == ()


def test_hysteresis_table_has_the_interval_or_the_bound():
    exact = MethodHysteresis(
        method="npo",
        baseline="grpo",
        accuracy=0.6,
        target=0.9,
        steps=Estimate(value=-5.0, low=-20.0, high=10.0, num_used=3, num_total=4),
        bound="exact",
    )
    bounded = replace(exact, steps=Estimate(value=20.0, num_used=2, num_total=2), bound="at least")
    (table,) = hysteresis_tables([exact, bounded])
    assert table.rows == (
        ("npo", "0.60", "0.90", "-5.0 [-20.0, +10.0]", "3 of 4"),
        ("npo", "0.60", "0.90", ">= +20.0", "2 of 2"),
    )
