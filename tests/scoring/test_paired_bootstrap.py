from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npo_cli.scoring.paired_bootstrap import (
    Candidate,
    SignalFormula,
    argmax,
    one_se,
    p_best,
    paired_log_signals,
    resample_signal,
)
from npo_cli.scoring.quality import bootstrap_counts
from npo_cli.scoring.variance import compute_moments
from tests.scoring.samples import CAP, KNOBS, make_drifted_ratio

RANKING = SignalFormula(variance="seq2_lognormal", knobs=KNOBS, alpha=1.0)


def candidate(values_P, *, log_w=0.0, covered_P=None, measured=True) -> Candidate:
    """One sample a prompt, all drifted alike; `values_P` may be fractional."""
    num_prompts = len(values_P)
    ids = [f"p{p:03}" for p in range(num_prompts)]
    covered = np.ones(num_prompts) if covered_P is None else np.array(covered_P, dtype=float)
    asked = [prompt_id for prompt_id, yes in zip(ids, covered, strict=True) if yes and measured]
    return Candidate(
        covered_P=covered,
        values_P=np.array(values_P, dtype=float) * covered,
        moments=compute_moments(
            [make_drifted_ratio(log_w, 4, prompt_id=prompt_id) for prompt_id in asked], ids, cap=CAP
        ),
    )


def nothing_seen_twice(num_prompts):
    return compute_moments([], [f"p{p:03}" for p in range(num_prompts)], cap=CAP)


def log_signals(candidates, counts_BP, ranking=RANKING):
    return paired_log_signals(
        candidates, counts_BP, learner_moments=nothing_seen_twice(counts_BP.shape[1]), formula=ranking
    )


def test_signal_is_smoothed_quality_over_variance():
    # Q~ = (2 + 1/2)/(4 + 1) = 1/2; KL per sequence 1/2, so V = e
    parts = resample_signal(
        candidate([1, 1, 0, 0], log_w=-0.5), np.ones((1, 4)), learner_moments=nothing_seen_twice(4), formula=RANKING
    )
    assert parts.quality_B[0] == 0.5
    assert parts.log_variance_B[0] == pytest.approx(1.0)
    assert parts.log_signal_B[0] == pytest.approx(np.log(0.5) - 1.0)


def test_alpha_weighs_the_variance():
    one = candidate([1, 1, 0, 0], log_w=-0.5)
    assert log_signals([one], np.ones((1, 4)), replace(RANKING, alpha=0.0))[0, 0] == pytest.approx(np.log(0.5))
    assert log_signals([one], np.ones((1, 4)), replace(RANKING, alpha=2.0))[0, 0] == pytest.approx(np.log(0.5) - 2)


def test_sharing_the_resampled_prompts_tells_close_candidates_apart():
    # prompts are easy or impossible for both; the better one also solves 8 of 200 that the other does not
    rng = np.random.default_rng(1)
    worse_P = np.array([1.0] * 92 + [0.0] * 108)
    better_P = np.array([1.0] * 100 + [0.0] * 100)
    pair = [candidate(worse_P), candidate(better_P)]
    paired_BA = log_signals(pair, bootstrap_counts(200, rng, 2000))
    unpaired_BA = np.stack([log_signals(pair, bootstrap_counts(200, rng, 2000))[:, a] for a in range(2)], axis=1)
    gap, loose_gap = (log_BA[1:, 1] - log_BA[1:, 0] for log_BA in (paired_BA, unpaired_BA))
    # Var(Q_i - Q_j): paired .04 * .96/200, unpaired about 2 * .25/200
    assert loose_gap.std() > 3 * gap.std()
    assert p_best(paired_BA)[1] > 0.99
    assert p_best(unpaired_BA)[1] < 0.9


def test_chances_of_being_best_split_ties_and_sum_to_one():
    log_signal_BA = np.array([[0.0, 0.0, 0.0], [1.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
    # first resample 1/2 and 1/2, second 1 and 0
    assert p_best(log_signal_BA).tolist() == [0.75, 0.25, 0.0]
    assert p_best(log_signal_BA[:1]).tolist() == pytest.approx([1 / 3] * 3)


@given(st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=1, max_size=20))
def test_chances_of_being_best_always_sum_to_one(rows):
    assert p_best(np.array(rows, dtype=float)).sum() == pytest.approx(1.0)


def test_argmax_takes_the_nearest_of_equals():
    log_signal_BA = np.array([[0.5, 0.5, 0.2]])
    assert argmax(log_signal_BA, [40, 20, 10]) == 1


def test_one_standard_error_prefers_the_nearer_candidate():
    # the best leads by 0.1, with resampled leads 0.1 -+ 0.2: SE 0.2 > 0.1
    close_BA = np.array([[0.0, 0.1], [0.0, 0.3], [0.0, -0.1]])
    assert (argmax(close_BA, [20, 40]), one_se(close_BA, [20, 40])) == (1, 0)
    # the same lead with SE 0.05 stands
    clear_BA = np.array([[0.0, 0.1], [0.0, 0.15], [0.0, 0.05]])
    assert one_se(clear_BA, [20, 40]) == 1


def test_one_standard_error_without_resamples_is_the_best():
    assert one_se(np.array([[0.0, 0.1]]), [20, 40]) == 1


def test_one_standard_error_passes_over_the_unmeasured():
    log_signal_BA = np.array([[-np.inf, 0.1], [-np.inf, 0.3], [-np.inf, -0.1]])
    assert one_se(log_signal_BA, [20, 40]) == 1


def test_a_candidate_dropped_early_is_compared_on_the_prompts_it_shares():
    # On the two easy prompts that both answered, the full one solves all and the dropped one all but half a prompt.
    full = candidate([1, 1, 0, 0, 0, 0, 0, 0])
    dropped = candidate([1, 0.5, 0, 0, 0, 0, 0, 0], covered_P=[1, 1, 0, 0, 0, 0, 0, 0])
    own = [log_signals([each], np.ones((1, 8)))[0, 0] for each in (full, dropped)]
    assert own[1] > own[0]  # the easy prompts alone flatter it
    paired = log_signals([full, dropped], np.ones((1, 8)))[0]
    # shared prompts: Q~ = 2.5/3 against (1.5 + .5)/3
    assert paired[0] == pytest.approx(own[0])
    assert paired[1] == pytest.approx(own[0] + np.log(2.0 / 2.5))


def test_a_better_candidate_with_fewer_prompts_can_still_win():
    full = candidate([0, 0, 0, 0, 1, 1, 1, 1])
    fewer = candidate([1, 1, 1, 0, 0, 0, 0, 0], covered_P=[1, 1, 1, 1, 0, 0, 0, 0])
    assert argmax(log_signals([full, fewer], np.ones((1, 8))), [20, 40]) == 1


def test_resamples_that_miss_a_candidate_repeat_its_estimate():
    one = candidate([1, 0, 0], covered_P=[1, 0, 0])
    counts_BP = np.array([[1.0, 1, 1], [0, 2, 1]])
    parts = resample_signal(one, counts_BP * one.covered_P, learner_moments=nothing_seen_twice(3), formula=RANKING)
    assert parts.quality_B.tolist() == [1.0, 1.0]
    assert np.isfinite(parts.log_signal_B).all()


def test_an_unmeasured_candidate_never_beats_a_measured_one():
    blind, seen = candidate([1, 1, 1], measured=False), candidate([0, 0, 1], log_w=-3.0)
    assert log_signals([blind, seen], np.ones((1, 3)))[0, 0] == -np.inf
    # among unmeasured ones Q decides
    assert argmax(log_signals([blind, candidate([0, 1, 1], measured=False)], np.ones((1, 3))), [40, 20]) == 0
