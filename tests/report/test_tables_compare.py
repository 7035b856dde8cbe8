"""Tables of `npo compare`, compared whole."""

from dataclasses import replace

from npo_cli.cli.output import format_table
from npo_cli.report.tables_compare import differences_tables, speedup_tables, summary_tables, time_to_threshold_tables
from npo_cli.types.comparison import Estimate, MethodDifference, MethodSummary, MethodTimeToThreshold, SpeedUp

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


def drawn(tables) -> list[str]:
    return "\n".join(map(format_table, tables)).splitlines()


def test_arms_have_intervals_and_say_what_they_come_from():
    assert drawn(summary_tables([GRPO, ONE]))[:6] == [
        "Held-out accuracy",
        "arm   seeds        final accuracy          area by step",
        "grpo      2  0.500 [0.400, 0.625]  0.250 [0.125, 0.500]",
        "npo       1                 0.750  0.250 [0.125, 0.500]",
        "final: mean of the last 3 evaluations up to step 40. area: mean accuracy along an axis, over the stretch that "
        "all arms cover.",
        "grpo: resampled over seeds and held-out prompts.",
    ]
    assert drawn(summary_tables([GRPO]))[4] == "95 % intervals: resampled over seeds and held-out prompts."
    one_seed = "npo: resampled over nothing: one seed, and outcomes were not kept prompt by prompt."
    assert drawn(summary_tables([GRPO, ONE]))[6] == one_seed


def test_what_must_be_alike_stands_before_what_the_method_changes():
    _, training, settings = summary_tables([GRPO, ONE])
    assert training.title == "What it took to stand at step 40"
    # no clock was kept, and no step of the last quarter was measured
    assert not {"seconds", "entropy 75-100 %"} & set(training.header)
    assert settings.header == ("arm", "what", "grpo -> arm")
    assert settings.rows == (("npo", "NOT ALIKE", "task.kind any -> mix3"), ("npo", "method", "train.lr 1 -> 2"))
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


def test_a_difference_says_how_it_is_paired():
    loose = replace(DIFFERENCE, method="far", num_pairs=0, num_prompts=None, num_not_lower=0)
    half = replace(DIFFERENCE, method="old", num_prompts=None)
    assert drawn(differences_tables([DIFFERENCE, loose, half])) == [
        "Arm minus grpo",
        "arm  pairs           final accuracy  not lower",
        "npo      2  +0.030 [-0.010, +0.070]  1 of 2",
        "far      0  +0.030 [-0.010, +0.070]  -",
        "old      2  +0.030 [-0.010, +0.070]  1 of 2",
        "npo: paired by seed and by prompt, 64 prompts a pair.",
        "far shares no seed with grpo: not paired.",
        "old: paired by seed; not by prompt, as no held-out prompt is known to be common.",
        "95 % intervals: resampled over seeds and held-out prompts.",
    ]


def test_a_mean_with_a_seed_that_never_arrived_is_a_lower_bound():
    some = MethodTimeToThreshold(
        method="grpo",
        threshold=0.6,
        num_runs=3,
        num_reached=2,
        costs={"step": 31.66, "tokens": 58715.4},
        restricted_means={"step": 31.66, "tokens": 50000.0},
        horizons={"step": 40, "tokens": 74365},
    )
    assert drawn(time_to_threshold_tables([some, replace(some, num_reached=3)]))[:4] == [
        "Cost of reaching a held-out accuracy",
        "arm   accuracy  reached  step     tokens     min(step, 40)  min(tokens, 74,365)",
        "grpo      0.60  2 of 3   >= 31.7  >= 58,715           31.7               50,000",
        "grpo      0.60  3 of 3   31.7     58,715              31.7               50,000",
    ]


def test_ratios_say_on_how_many_pairs_they_rest():
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
    lines = drawn(speedup_tables([speed, replace(speed, threshold=0.9, ratio_if_reached={}, restricted_mean_ratio={})]))
    assert lines[1:4] == [
        "arm  accuracy  by step",
        "npo      0.60  1.50x [1.25, 1.75] (2 of 3)",
        "npo      0.90  -",
    ]
    assert "npo      0.60  1.25x [1.00, 1.50]  0.50x (1 of 2)" in lines
    # nothing can be said on any axis: no table
    assert speedup_tables([replace(speed, ratio_if_reached={}, restricted_mean_ratio={})]) == ()


def test_notes_explain_only_what_is_in_the_table():
    share = "grad share: of the gradient norm, in steps with a guide slot."
    assert [share in summary_tables(arms)[1].notes for arms in ([GRPO, ONE], [GRPO])] == [True, False]
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
