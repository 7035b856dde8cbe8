"""Q, V and S of candidates in every resample, compared on the same prompts."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npo_cli.scoring.quality import bootstrap_counts
from npo_cli.scoring.signal import (
    Candidate,
    argmax,
    build_drift,
    is_worthwhile,
    log_signals,
    one_se,
    p_best,
    paired_log_signals,
    split_quality_net,
    to_signals,
)
from tests.scoring.samples import formula, make_drifted_ratio

LOGNORMAL = formula("seq2_lognormal")


def candidate(values_P, *, counts_BP=None, log_w=0.0, covered_P=None, measured=True) -> Candidate:
    """One sample per prompt, all drifted alike; `values_P` may be fractional. No resamples unless `counts_BP`."""
    num_prompts = len(values_P)
    ids = tuple(f"p{p:03}" for p in range(num_prompts))
    covered = np.ones(num_prompts) if covered_P is None else np.array(covered_P, dtype=float)
    weights_BP = (np.ones((1, num_prompts)) if counts_BP is None else counts_BP) * covered
    sampled = [prompt_id for prompt_id, yes in zip(ids, covered, strict=True) if yes and measured]
    samples = [make_drifted_ratio(log_w, 4, prompt_id=prompt_id) for prompt_id in sampled]
    return Candidate(
        distance=0,
        prompt_ids=ids,
        weights_BP=weights_BP,
        values_P=np.array(values_P, dtype=float) * covered,
        strata_P=np.zeros(num_prompts, dtype=np.intp),
        drift=build_drift(samples, samples, ids, weights_BP=weights_BP, formula=LOGNORMAL),
    )


def test_signal_is_smoothed_quality_over_variance():
    # Q~ = (2 + 1/2)/(4 + 1) = 1/2; KL per sequence 1/2, so V = e
    one = candidate([1, 1, 0, 0], log_w=-0.5)
    assert one.quality()[0] == 0.5
    assert one.log_variance(LOGNORMAL)[0] == pytest.approx(1.0)
    assert one.log_signal(LOGNORMAL)[0] == pytest.approx(np.log(0.5) - 1.0)


def test_signal_exponent_alpha_weighs_the_variance():
    one = candidate([1, 1, 0, 0], log_w=-0.5)
    for alpha, expected in ((0.0, np.log(0.5)), (2.0, np.log(0.5) - 2)):
        assert one.log_signal(formula("seq2_lognormal", variance_exponent=alpha))[0] == pytest.approx(expected)


def test_paired_resamples_separate_close_candidates():
    # prompts are easy or impossible for both; the better one also solves 8 of 200 that the other does not
    rng = np.random.default_rng(1)
    worse_P = np.array([1.0] * 92 + [0.0] * 108)
    better_P = np.array([1.0] * 100 + [0.0] * 100)

    def signals(*counts):
        pair = zip((worse_P, better_P), counts, strict=True)
        return log_signals([candidate(values_P, counts_BP=counts_BP) for values_P, counts_BP in pair], LOGNORMAL)

    counts_BP = bootstrap_counts(200, rng, 2000)
    paired_BA = signals(counts_BP, counts_BP)
    unpaired_BA = signals(bootstrap_counts(200, rng, 2000), bootstrap_counts(200, rng, 2000))
    gap, loose_gap = (log_BA[1:, 1] - log_BA[1:, 0] for log_BA in (paired_BA, unpaired_BA))
    # Var(Q_i - Q_j): paired .04 * .96/200, unpaired about 2 * .25/200
    assert loose_gap.std() > 3 * gap.std()
    assert p_best(paired_BA)[1] > 0.99
    assert p_best(unpaired_BA)[1] < 0.9


def test_p_best_splits_ties_and_sums_to_one():
    log_signal_BA = np.array([[0.0, 0.0, 0.0], [1.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
    # first resample 1/2 and 1/2, second 1 and 0
    assert p_best(log_signal_BA).tolist() == [0.75, 0.25, 0.0]
    assert p_best(log_signal_BA[:1]).tolist() == pytest.approx([1 / 3] * 3)


@given(st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=1, max_size=20))
def test_p_best_always_sums_to_one(rows):
    assert p_best(np.array(rows, dtype=float)).sum() == pytest.approx(1.0)


def test_selection_argmax_takes_the_nearest_of_equals():
    log_signal_BA = np.array([[0.5, 0.5, 0.2]])
    assert argmax(log_signal_BA, [40, 20, 10]) == 1


def test_selection_one_standard_error_prefers_the_nearer():
    # the best leads by 0.1, with resampled leads 0.1 -+ 0.2: SE 0.2 > 0.1
    close_BA = np.array([[0.0, 0.1], [0.0, 0.3], [0.0, -0.1]])
    assert (argmax(close_BA, [20, 40]), one_se(close_BA, [20, 40])) == (1, 0)
    # the same lead with SE 0.05 stands
    clear_BA = np.array([[0.0, 0.1], [0.0, 0.15], [0.0, 0.05]])
    assert one_se(clear_BA, [20, 40]) == 1


def test_selection_one_standard_error_without_resamples_is_argmax():
    assert one_se(np.array([[0.0, 0.1]]), [20, 40]) == 1


def test_selection_one_standard_error_skips_candidates_without_ratios():
    log_signal_BA = np.array([[-np.inf, 0.1], [-np.inf, 0.3], [-np.inf, -0.1]])
    assert one_se(log_signal_BA, [20, 40]) == 1


def test_paired_signal_of_a_dropped_candidate_uses_shared_prompts():
    # On the two easy prompts that both answered, the full one solves all and the dropped one all but half a prompt.
    full = candidate([1, 1, 0, 0, 0, 0, 0, 0])
    dropped = candidate([1, 0.5, 0, 0, 0, 0, 0, 0], covered_P=[1, 1, 0, 0, 0, 0, 0, 0])
    own = [each.log_signal(LOGNORMAL)[0] for each in (full, dropped)]
    assert own[1] > own[0]  # the easy prompts alone flatter it
    paired = paired_log_signals([full, dropped], LOGNORMAL)[0]
    # shared prompts: Q = 1 against .75, so Q = 2/8 - .25 = 0 of the dropped one, and Q~ = (0 + .5)/9
    assert paired[0] == pytest.approx(own[0])
    assert paired[1] == pytest.approx(np.log(0.5 / 9))


def test_paired_signal_lets_a_better_candidate_with_fewer_prompts_win():
    full = candidate([0, 0, 0, 0, 1, 1, 1, 1])
    fewer = candidate([1, 1, 1, 0, 0, 0, 0, 0], covered_P=[1, 1, 1, 1, 0, 0, 0, 0])
    assert argmax(paired_log_signals([full, fewer], LOGNORMAL), [20, 40]) == 1


def test_net_quality_interval_is_paired_over_prompts():
    # Q - Q_self per prompt: 0 where both solve or both fail, +1 on the last; resamples have it 0, 1 or 2 times in 2
    one = replace(candidate([1, 1], counts_BP=np.array([[1.0, 1], [2, 0], [0, 2]])), self_values_P=np.array([1.0, 0]))
    assert one.net_quality().tolist() == [0.5, 0.0, 1.0]
    # linear percentiles of (0, 1)
    assert one.net_quality_interval() == pytest.approx((0.025, 0.975))
    # the interval of Q itself has no width to subtract: both prompts are solved in every resample
    assert one.quality().tolist() == [1.0, 1.0, 1.0]


def test_net_quality_interval_without_spread_is_newcombes():
    # 8 of 8 against 0 of 8: Wilson (.6756, 1) and (0, .3244), so 1 -+ sqrt(.3244^2 + .3244^2) below, 0 above
    counts_BP = bootstrap_counts(8, np.random.default_rng(0), 50)
    one = replace(candidate([1] * 8, counts_BP=counts_BP), self_values_P=np.zeros(8))
    assert one.net_quality_interval() == pytest.approx((1 - 0.3244 * 2**0.5, 1.0), abs=1e-4)
    # one prompt: Wilson (.2065, 1) and (0, .7935)
    alone = replace(candidate([1]), self_values_P=np.zeros(1))
    assert alone.net_quality_interval()[0] == pytest.approx(1 - 0.7935 * 2**0.5, abs=1e-4)
    assert not is_worthwhile(alone) and is_worthwhile(one)


def test_signal_subtracts_the_learners_own_quality_unless_told_not_to():
    one = replace(candidate([1, 1, 0, 0], log_w=-0.5), self_values_P=np.array([0, 1, 0, 0.0]))
    # (2 - 1)/4; V = e
    assert one.log_signal(LOGNORMAL)[0] == pytest.approx(np.log(0.25) - 1)
    published = formula("seq2_lognormal", quality_baseline="none")
    assert one.log_signal(published)[0] == pytest.approx(np.log(0.5) - 1)
    nothing = replace(one, self_values_P=np.array([1, 1, 1, 0.0]))
    assert nothing.log_signal(LOGNORMAL)[0] == -np.inf
    assert to_signals(nothing.log_signal(LOGNORMAL))[0] == 0


def test_no_guide_wins_the_resamples_in_which_no_guide_adds_anything():
    # the guide is ahead on the first prompt alone: Q_net 1/2, 1, 0
    counts_BP = np.array([[1.0, 1], [2, 0], [0, 2]])
    guide = replace(candidate([1, 0], counts_BP=counts_BP), self_values_P=np.zeros(2))
    nothing = replace(guide, values_P=np.zeros(2), drift=None, is_learner=True)
    assert p_best(log_signals([guide, nothing], LOGNORMAL)).tolist() == [0.5, 0.5]


def split_pair():
    """Two guides of 4 prompts: A solves the first and third, B the others; the learner none."""
    pair = [candidate([1, 0, 1, 0]), candidate([0, 1, 0, 1])]
    return [replace(one, self_values_P=np.zeros(4), distance=d) for one, d in zip(pair, (20, 40), strict=True)]


def test_quality_of_a_choice_is_measured_on_prompts_that_did_not_choose_it():
    # Q is 1/2 for both; the half (0, 2) chooses A, of which the half (1, 3) knows nothing, and the other way round
    assert split_quality_net(split_pair(), LOGNORMAL, compare=log_signals) == 0.0
    # a guide that solves all but one prompt is chosen by both halves: (1/2 + 1)/2
    good = replace(candidate([1, 1, 0, 1]), self_values_P=np.zeros(4), distance=60)
    assert split_quality_net([good], LOGNORMAL, compare=log_signals) == 0.75
    one_prompt = [replace(candidate([1]), self_values_P=np.zeros(1))]
    assert split_quality_net(one_prompt, LOGNORMAL, compare=log_signals) is None


def test_resamples_without_a_candidates_prompts_repeat_its_estimate():
    one = candidate([1, 0, 0], counts_BP=np.array([[1.0, 1, 1], [0, 2, 1]]), covered_P=[1, 0, 0])
    assert one.quality().tolist() == [1.0, 1.0]
    assert np.isfinite(one.log_signal(LOGNORMAL)).all()


def test_signal_without_importance_ratios_never_beats_a_measured_one():
    blind, seen = candidate([1, 1, 1], measured=False), candidate([0, 0, 1], log_w=-3.0)
    assert paired_log_signals([blind, seen], LOGNORMAL)[0, 0] == -np.inf
    # among unmeasured ones Q decides
    assert argmax(paired_log_signals([blind, candidate([0, 1, 1], measured=False)], LOGNORMAL), [40, 20]) == 0
