"""Rollback choice: quality of slices from strata, drift from both sides, the chosen distance and its acceptance."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npo_cli.autonpo.rollback_choice import (
    BIDIRECTIONAL_KINDS,
    DriftSamples,
    Stratum,
    allocate_probe_prompts,
    choose_rollback,
    estimate_backward_drift,
    estimate_forward_drift,
    estimate_second_try,
    estimate_stratum_quality,
    is_drift_consistent,
    is_heavy_tailed,
    reject_small_pool,
    resample_strata,
    select_drift,
    slice_within,
)
from npo_cli.autonpo.sequential_test import ONLY_LOOK, plan_looks
from npo_cli.config.autonpo import AutonpoSettings, ProbeSettings, RollbackSettings
from npo_cli.scoring.forecast import ReplaySegment
from npo_cli.scoring.quality import PromptPassCount
from tests.autonpo.test_strata import strata_sized
from tests.scoring.samples import formula, make_drifted_ratio, make_ratio

LOGNORMAL = formula("seq2_lognormal")

# Quality of strata and slices


def pass_counts(j: int, *correct: int, num_samples: int = 4) -> list[PromptPassCount]:
    """The first prompts of stratum j, with these many correct samples."""
    return [
        PromptPassCount(prompt_id=f"{j}-{i:03}", num_samples=num_samples, num_correct=num_correct)
        for i, num_correct in enumerate(correct)
    ]


def resample(strata, probed, *, resamples=0, seed=0):
    return resample_strata(strata, probed, rng=np.random.default_rng(seed), resamples=resamples)


def test_slice_quality_weighs_strata_by_failed_prompts_not_by_probed_ones():
    # q = 1/2 of 30 mistakes, 1/8 of 10, although as many were asked of the one as of the other
    everything = resample(strata_sized(30, 10), pass_counts(0, 2, 2) + pass_counts(1, 1, 0))
    assert slice_within(everything, 10).quality().tolist() == [0.5]
    assert slice_within(everything, 20).quality() == pytest.approx([(30 * 0.5 + 10 * 0.125) / 40])


def test_slice_quality_leaves_out_unprobed_strata():
    # the middle one was not asked: (30 * 1/2 + 10 * 1)/40
    everything = resample(strata_sized(30, 500, 10), pass_counts(0, 2) + pass_counts(2, 4))
    assert slice_within(everything, 30).quality() == pytest.approx([0.625])
    assert slice_within(everything, 20).quality() == pytest.approx([0.5])


def test_slice_quality_counts_prompts_alike_however_often_sampled():
    # 1/2 and 1/4, not 2/10
    probed = [*pass_counts(0, 1, num_samples=2), PromptPassCount(prompt_id="0-001", num_samples=8, num_correct=2)]
    assert resample(strata_sized(2), probed).quality() == pytest.approx([0.375])


def test_slice_resamples_keep_the_weight_of_each_stratum():
    everything = resample(strata_sized(30, 10), pass_counts(0, 1, 2, 3) + pass_counts(1, 0, 4), resamples=50)
    for distance, weight in ((10, 30.0), (20, 40.0)):
        assert slice_within(everything, distance).weights_BP.sum(axis=1) == pytest.approx([weight] * 51)
    assert everything.weights_BP[0] == pytest.approx([10, 10, 10, 5, 5])


def test_slice_quality_has_the_stratified_standard_error():
    # strata of equal weight; values 0 and 1 half each in either: Var = 2 * (1/2)^2 * .25/40
    everything = resample(
        strata_sized(100, 100), pass_counts(0, *[0, 4] * 20) + pass_counts(1, *[0, 4] * 20), resamples=4000
    )
    assert everything.quality()[1:].std() == pytest.approx(np.sqrt(2 * 0.25 * 0.25 / 40), rel=0.05)


def test_slice_quality_uncertainty_ignores_differences_between_strata():
    # each stratum is nearly unanimous: a bootstrap over all prompts would have sd sqrt(.25/80) = .056
    everything = resample(
        strata_sized(100, 100), pass_counts(0, 1, *[0] * 39) + pass_counts(1, 3, *[4] * 39), resamples=1000
    )
    assert everything.quality()[1:].std() < 0.01


def test_slice_quality_interval_follows_the_spread_between_prompts():
    # values 1/4 and 3/4: .5 -+ 1.96 * .25/sqrt(40) = .42 to .58; Wilson's of 20 in 40 would be .35 to .65
    everything = resample(strata_sized(100), pass_counts(0, *[1, 3] * 20), resamples=4000)
    assert everything.quality_interval() == pytest.approx((0.4225, 0.5775), abs=0.01)


def test_slice_quality_interval_of_unanimous_strata_is_wilsons():
    # 0 of 10 and 10 of 10: resampling within them changes nothing; Wilson's interval of 10 in 20 is 0.30 to 0.70
    everything = resample(strata_sized(10, 10), pass_counts(0, *[0] * 10) + pass_counts(1, *[4] * 10), resamples=100)
    low, high = everything.quality_interval()
    assert (low, high) == (pytest.approx(0.2993, abs=1e-4), pytest.approx(0.7007, abs=1e-4))
    # all wrong: 0 to z^2/(10 + z^2) = 3.8415/13.8415
    near = slice_within(everything, 10)
    assert near.quality_interval() == (0.0, pytest.approx(0.27753, abs=1e-4))


def test_slice_asserts_that_probed_prompts_are_in_a_stratum():
    with pytest.raises(AssertionError, match="failed prompts of the strata"):
        resample(strata_sized(2), [PromptPassCount(prompt_id="other", num_samples=1, num_correct=0)])


def test_stratum_quality_interval_uses_effective_trials():
    (stratum,) = strata_sized(50)
    # unanimous prompts: ICC 1, so 8 prompts are 8 trials, not 32
    alike = estimate_stratum_quality(stratum, pass_counts(0, 4, 4, 0, 0, 0, 0, 0, 0))
    # as many correct, spread evenly over the prompts: ICC 0, 32 trials
    mixed = estimate_stratum_quality(stratum, pass_counts(0, *[1] * 8))
    assert alike.quality == mixed.quality == 0.25
    # Beta(2.5, 6.5) against Beta(8.5, 24.5)
    assert (alike.quality_low, alike.quality_high) == (pytest.approx(0.0559, abs=1e-3), pytest.approx(0.5921, abs=1e-3))
    assert (mixed.quality_low, mixed.quality_high) == (pytest.approx(0.1267, abs=1e-3), pytest.approx(0.4174, abs=1e-3))
    assert (alike.num_failed_prompts, alike.num_probed, alike.num_samples, alike.num_correct) == (50, 8, 32, 8)


def test_stratum_quality_of_an_unprobed_stratum_is_unknown():
    (stratum,) = strata_sized(50)
    line = estimate_stratum_quality(stratum, [])
    assert (line.num_probed, line.quality, line.quality_low, line.quality_high) == (0, 0.0, 0.0, 1.0)


# Is stratifying worth it?

SOLVED_BY_STRATUM = (0.02, 0.5, 0.95)


def sample_once(prompt_ids, rng) -> list[PromptPassCount]:
    """One sample a prompt; the leading digit of the id is its stratum."""
    return [
        PromptPassCount(
            prompt_id=prompt_id, num_samples=1, num_correct=int(rng.random() < SOLVED_BY_STRATUM[int(prompt_id[0])])
        )
        for prompt_id in prompt_ids
    ]


def stratified_estimate(strata: tuple[Stratum, ...], seed: int) -> float:
    rng = np.random.default_rng(seed)
    chosen = allocate_probe_prompts(strata, num_prompts=120, seed=seed)
    probed = sample_once([prompt_id for ids in chosen for prompt_id in ids], rng)
    return float(resample(strata, probed).quality()[0])


def uniform_estimate(strata: tuple[Stratum, ...], seed: int) -> float:
    rng = np.random.default_rng(seed)
    pool = [prompt_id for stratum in strata for prompt_id in stratum.prompt_ids]
    probed = sample_once(rng.choice(pool, 120, replace=False), rng)
    return float(np.mean([count.num_correct for count in probed]))


@pytest.mark.slow
def test_stratified_probe_errs_less_than_a_uniform_one():
    # q = .49; uniform: Var = .49 * .51/120, sd .046. By size: (.0196 + .25 + .0475)/3 / 120, sd .030
    strata = strata_sized(1000, 1000, 1000)
    truth = np.mean(SOLVED_BY_STRATUM)
    stratified = np.array([stratified_estimate(strata, seed) for seed in range(300)]) - truth
    uniform = np.array([uniform_estimate(strata, seed) for seed in range(300)]) - truth
    assert abs(stratified.mean()) < 0.01
    assert np.sqrt((stratified**2).mean()) < 0.8 * np.sqrt((uniform**2).mean())
    assert np.sqrt((stratified**2).mean()) == pytest.approx(0.030, abs=0.004)


@pytest.mark.slow
def test_stratified_probe_is_unbiased():
    """8 strata of 100, 64 prompts of 4 samples, q = .1: what chance the first samples had decides nothing.

    Asking less where the first look found nothing gave a bias of -.011 over 500 probes; the standard error here is
    sqrt(.1 * .9/256)/sqrt(500) = .0008.
    """
    strata = strata_sized(*[100] * 8)
    found = []
    for seed in range(500):
        rng = np.random.default_rng(seed)
        chosen = allocate_probe_prompts(strata, num_prompts=64, seed=seed)
        probed = [
            PromptPassCount(prompt_id=prompt_id, num_samples=4, num_correct=int(rng.binomial(4, 0.1)))
            for ids in chosen
            for prompt_id in ids
        ]
        found.append(float(resample(strata, probed).quality()[0]))
    assert abs(np.mean(found) - 0.1) < 0.003


# Drift

GUIDE_LAW = np.array([0.4, 0.3, 0.2, 0.1])
OLD_LAW = np.array([0.3, 0.3, 0.2, 0.2])


def forward_of(samples, part):
    return estimate_forward_drift([samples], [part], formula=LOGNORMAL)[0]


def backward_of(*samples, resamples=0):
    return estimate_backward_drift(
        samples, rng=np.random.default_rng(0), formula=formula(bootstrap_resamples=resamples)
    )


def on(prompt_ids, log_w, *, num=4, num_tokens=5, correct=False):
    return [
        make_drifted_ratio(log_w, num_tokens, prompt_id=prompt_id, correct=correct)
        for prompt_id in prompt_ids
        for _ in range(num)
    ]


def chain(law, other, *, seed, num_prompts=60):
    """Four samples a prompt of 5 symbols from `law`, seen by `other`: log w = log other - log law."""
    rng = np.random.default_rng(seed)
    log_rho = np.log(other) - np.log(law)
    return [
        make_ratio(log_rho[rng.choice(4, size=5, p=law)], prompt_id=f"0-{i:03}")
        for i in range(num_prompts)
        for _ in range(4)
    ]


def forward_chain(seed=0):
    return chain(GUIDE_LAW, OLD_LAW, seed=seed)


def backward_chain(seed=1):
    return chain(OLD_LAW, GUIDE_LAW, seed=seed)


# V, both ways


@pytest.mark.parametrize("kind", ["kl_exp", "tok2", "tok2_grad", "seq2", "seq2_lognormal", "ess", "group2"])
def test_drift_of_a_policy_to_itself_has_variance_one(kind):
    part = resample(strata_sized(30), pass_counts(0, 1, 0, 2), resamples=20)
    recorded = on(["0-007", "0-008"], 0.0, num=16)
    same = DriftSamples(distance=10, forward=on(part.prompt_ids, 0.0, num=11), backward=recorded)
    drifts = forward_of(same, part), *backward_of(same, resamples=20)
    for drift in drifts:
        assert np.exp(drift.log_variance(formula(kind))) == pytest.approx([1.0] * 21)
        assert drift.kl(LOGNORMAL) == (0.0, 0.0)
    # only what a KL tells is the same from both sides
    assert is_drift_consistent(*drifts, formula(kind)) is (True if kind in BIDIRECTIONAL_KINDS else None)


def test_drift_weighs_strata_like_quality():
    # KL .2 on 30 mistakes, 1 on 10: (30 * .2 + 10 * 1)/40 = .4 a sequence, V = exp(.8)
    part = resample(strata_sized(30, 10), pass_counts(0, 1, 1, 1) + pass_counts(1, 1))
    samples = on(["0-000", "0-001", "0-002"], -0.2) + on(["1-000"], -1.0)
    drift = forward_of(DriftSamples(distance=20, forward=samples, backward=[]), part)
    assert drift.kl(LOGNORMAL) == (pytest.approx(0.08), pytest.approx(0.4))
    assert drift.log_variance(formula("seq2_lognormal")) == pytest.approx([0.8])
    assert drift.variances(LOGNORMAL)["seq2_lognormal"] == pytest.approx(np.exp(0.8))


def test_drift_ignores_samples_outside_the_slice():
    everything = resample(strata_sized(30, 10), pass_counts(0, 1) + pass_counts(1, 1))
    samples = on(["0-000"], -0.2) + on(["1-000"], -9.0)
    drift = forward_of(DriftSamples(distance=10, forward=samples, backward=[]), slice_within(everything, 10))
    assert drift.kl(LOGNORMAL)[1] == pytest.approx(0.2)


def test_drift_measures_the_kl_of_its_own_direction():
    # KL(b||a) = 5 (.4 log(4/3) - .1 log 2) = .2288; KL(a||b) = 5 (-.3 log(4/3) + .2 log 2) = .2616
    part = resample(strata_sized(60), pass_counts(0, *[1] * 60))
    both = DriftSamples(distance=10, forward=forward_chain(), backward=backward_chain())
    assert forward_of(both, part).kl(LOGNORMAL)[1] == pytest.approx(0.2288, abs=0.1)
    assert backward_of(both)[0].kl(LOGNORMAL)[1] == pytest.approx(0.2616, abs=0.1)


def test_drift_is_consistent_if_small_and_not_if_large():
    part = resample(strata_sized(60), pass_counts(0, *[1] * 60), resamples=300)
    alike = DriftSamples(distance=10, forward=forward_chain(), backward=backward_chain())
    unlike = DriftSamples(distance=10, forward=forward_chain(), backward=on(part.prompt_ids, -3.0))
    for samples, agree in ((alike, True), (unlike, False)):
        (backward,) = backward_of(samples, resamples=300)
        assert is_drift_consistent(forward_of(samples, part), backward, formula("seq2_lognormal")) is agree
    assert is_drift_consistent(forward_of(alike, part), None, formula("group2")) is None


def test_drift_variance_rests_on_correct_samples_if_a_distance_has_32():
    near_far = resample(strata_sized(40, 40), pass_counts(0, *[4] * 8) + pass_counts(1, *[4] * 8))
    right = on(near_far.prompt_ids, -0.1, correct=True)
    wrong = on(near_far.prompt_ids, -1.0)
    samples = [DriftSamples(distance=distance, forward=right + wrong, backward=[]) for distance in (10, 20)]
    # 8 prompts * 4 correct samples = 32 in the nearer slice: enough
    drifts = estimate_forward_drift(samples, [slice_within(near_far, 10), near_far], formula=LOGNORMAL)
    assert [drift.log_variance(formula("seq2_lognormal"))[0] for drift in drifts] == pytest.approx([0.2, 0.2])
    # but a KL is of all samples: (.1 + 1)/2
    assert [drift.kl(LOGNORMAL)[1] for drift in drifts] == pytest.approx([0.55, 0.55])
    # one correct sample fewer in the nearer slice, and all samples count there
    fewer = [DriftSamples(distance=distance, forward=right[1:] + wrong, backward=[]) for distance in (10, 20)]
    drifts = estimate_forward_drift(fewer, [slice_within(near_far, 10), near_far], formula=LOGNORMAL)
    # (31 * .1 + 32 * 1)/63 and .1, doubled
    assert [drift.log_variance(formula("seq2_lognormal"))[0] for drift in drifts] == pytest.approx([2 * 35.1 / 63, 0.2])


def test_drift_consistency_uses_all_samples():
    # correct samples alone say V = exp(.2), all of them exp(1.1), as the other side does
    part = resample(strata_sized(40), pass_counts(0, *[4] * 8), resamples=100)
    right, wrong = on(part.prompt_ids, -0.1, correct=True), on(part.prompt_ids, -1.0)
    samples = DriftSamples(distance=10, forward=right + wrong, backward=on(part.prompt_ids, -0.55))
    (backward,) = backward_of(samples, resamples=100)
    forward = forward_of(samples, part)
    assert forward.log_variance(formula("seq2_lognormal"))[0] == pytest.approx(0.2)
    assert is_drift_consistent(forward, backward, formula("seq2_lognormal")) is True


def test_drift_is_none_without_samples():
    part = resample(strata_sized(40), pass_counts(0, *[4] * 8))
    right = on(part.prompt_ids, -0.1, correct=True)
    seen = DriftSamples(distance=10, forward=right + on(part.prompt_ids, -1.0), backward=[])
    blind = DriftSamples(distance=20, forward=[], backward=[])
    first, second = estimate_forward_drift([seen, blind], [part, part], formula=LOGNORMAL)
    assert second is None
    assert first.log_variance(formula("seq2_lognormal"))[0] == pytest.approx(0.2)
    assert backward_of(seen, blind) == [None, None]


def test_drift_consistency_needs_32_samples():
    # 8 prompts * 4 samples on one side; one prompt of the other says e^6 = V, and its interval has no width
    part = resample(strata_sized(40), pass_counts(0, *[4] * 8), resamples=50)
    for num, agree in ((31, None), (32, False)):
        samples = DriftSamples(distance=10, forward=on(part.prompt_ids, -0.1), backward=on(["0-001"], -3.0, num=num))
        (backward,) = backward_of(samples, resamples=50)
        assert is_drift_consistent(forward_of(samples, part), backward, formula("seq2_lognormal")) is agree


def test_drift_falls_back_to_the_other_side():
    part = resample(strata_sized(4), pass_counts(0, 1))
    both = DriftSamples(distance=10, forward=on(part.prompt_ids, -0.1), backward=on(["0-003"], -0.2))
    forward, (backward,) = forward_of(both, part), backward_of(both)
    assert select_drift(forward, backward, "guide") is forward
    assert select_drift(forward, backward, "learner") is backward
    assert select_drift(None, backward, "guide") is backward
    assert select_drift(forward, None, "learner") is forward
    assert select_drift(None, None, "guide") is None


def test_drift_resamples_recorded_prompts_jointly():
    # the same records twice over: whatever is drawn, both see the same
    mixed = [make_drifted_ratio(-0.1 * i, 4, prompt_id=f"0-{i:03}") for i in range(8)]
    one, two = backward_of(
        *(DriftSamples(distance=distance, forward=[], backward=mixed) for distance in (10, 20)), resamples=100
    )
    assert one.log_variance(formula("kl_exp")).tolist() == two.log_variance(formula("kl_exp")).tolist()
    assert one.log_variance(formula("kl_exp")).std() > 0


def test_drift_of_a_resample_without_samples_repeats_the_estimate():
    # one of 30 recorded prompts is this distance's own: about a third of the draws miss it
    crowd = DriftSamples(distance=20, forward=[], backward=on([f"0-{i:03}" for i in range(30)], -1.0))
    single = DriftSamples(distance=10, forward=[], backward=on(["0-000"], -0.5))
    drift, _ = backward_of(single, crowd, resamples=200)
    assert (drift.weights_BP.sum(axis=1) == 0).any()
    assert drift.log_variance(formula("seq2_lognormal")) == pytest.approx([1.0] * 201)


# The heavy-tail alarm


def test_heavy_tail_moments_of_a_chain_agree():
    # E_b[w^2] = (sum a^2/b)^5 = (.225 + .3 + .2 + .4)^5 = 1.802 = E_a[w]
    guide_side = np.mean([np.exp(2 * sample.log_w) for sample in forward_chain()])
    learner_side = np.mean([np.exp(-sample.log_w) for sample in backward_chain()])
    assert guide_side == pytest.approx(1.802, abs=0.5)
    assert learner_side == pytest.approx(1.802, abs=0.3)
    assert is_heavy_tailed(forward_chain(), backward_chain()) is False


@pytest.mark.slow
def test_heavy_tail_is_rarely_reported_without_one():
    # two joint standard errors: one in twenty if the means were normal, somewhat more as w^2 is skewed
    alarms = [is_heavy_tailed(forward_chain(seed), backward_chain(1000 + seed)) for seed in range(100)]
    assert sum(alarms) <= 15


def test_heavy_tail_is_detected_if_the_guide_misses_it():
    # the old policy spends a tenth of its samples where a/b = e^5, so E_a[w] = .1 * 148 + .9 * .9 = 15.6, while all
    # of the guide's own samples have w^2 = .9^2
    guide_side = on([f"0-{i:03}" for i in range(60)], np.log(0.9))
    learner_side = [
        make_drifted_ratio(-5.0 if (4 * i + j) % 10 == 0 else -np.log(0.9), 5, prompt_id=f"0-{i:03}")
        for i in range(60)
        for j in range(4)
    ]
    assert is_heavy_tailed(guide_side, learner_side) is True


def test_huge_weights_do_not_overflow():
    ids = [f"0-{i:03}" for i in range(10)]
    # w^2 = 1 against w = e^5000; then w^2 = (e^5000)^2 = e^10000 = w
    assert is_heavy_tailed(on(ids, 0.0), on(ids, -5000.0, num_tokens=50)) is True
    assert is_heavy_tailed(on(ids, 5000.0, num_tokens=50), on(ids, -10000.0, num_tokens=50)) is False


def test_heavy_tail_is_unknown_with_few_samples():
    ids = [f"0-{i:03}" for i in range(8)]
    assert is_heavy_tailed(on(ids, 0.0), on(ids, 0.0)) is False
    # how often a prompt was sampled changes nothing
    assert is_heavy_tailed(on(ids, 0.0), on(ids, 0.0, num=8)) is False
    # 31 samples on one side; one prompt has no standard error
    assert is_heavy_tailed(on(ids, 0.0)[1:], on(ids, 0.0)) is None
    assert is_heavy_tailed(on(ids, 0.0), on(["0-000"], 0.0, num=40)) is None


# The choice

STRATA = strata_sized(40, 40, 40)
HALF_SOLVED = [count for j in range(3) for count in pass_counts(j, *[0, 4] * 10)]
IDS = [count.prompt_id for count in HALF_SOLVED]


def back(distance, forward=None, backward=None) -> DriftSamples:
    """A checkpoint whose samples all have one log weight; the forward ones are of all probed prompts."""
    return DriftSamples(
        distance=distance,
        forward=[] if forward is None else on(IDS, forward),
        backward=[] if backward is None else on([f"2-{i:03}" for i in range(12)], backward),
    )


def choose(
    samples, *, strata=STRATA, probed=HALF_SOLVED, variance="seq2_lognormal", num_tokens=0, seed=0,
    min_quality=0.1, min_failed_prompts=8, variance_samples="guide", min_value=0.0, rule="argmax", segments=None,
    look=ONLY_LOOK, **scoring,
):  # fmt: skip
    """By the published S = Q/V, unless scoring.quality_baseline says otherwise."""
    settings = AutonpoSettings().model_copy(
        update={
            "probe": ProbeSettings(min_quality=min_quality, variance_samples=variance_samples),
            "rollback": RollbackSettings(
                min_failed_prompts=min_failed_prompts, min_value=min_value, selection_rule=rule
            ),
        }
    )
    used = formula(variance, **{"quality_baseline": "none"} | scoring)
    return choose_rollback(
        strata,
        probed,
        samples,
        segments=segments or {},
        formula=used,
        settings=settings,
        seed=seed,
        num_tokens=num_tokens,
        look=look,
    )


def test_rollback_signal_is_smoothed_quality_over_variance():
    # Q = 1/2 of 20 and of 60 prompts, so Q~ = 1/2; V = exp(2 * .1) and exp(2 * .4)
    found = choose([back(10, -0.1), back(30, -0.4)])
    assert [score.variance for score in found.scores] == pytest.approx([np.exp(0.2), np.exp(0.8)])
    assert [score.signal for score in found.scores] == pytest.approx([0.5 * np.exp(-0.2), 0.5 * np.exp(-0.8)])
    assert [score.num_failed_prompts for score in found.scores] == [40, 120]
    assert [score.num_probed for score in found.scores] == [20, 60]
    assert (found.distance, found.is_accepted, found.reason) == (10, True, "")
    assert [score.is_selected for score in found.scores] == [True, False]


def test_rollback_quality_is_smoothed_by_the_probed_prompts():
    # 3 of 3 solved: Q~ = (3 + .5)/4, though the slice has 40 mistakes
    found = choose([DriftSamples(distance=10, forward=[], backward=[])], probed=pass_counts(0, 4, 4, 4))
    assert found.scores[0].signal == pytest.approx(3.5 / 4)


def test_rollback_farther_with_more_solved_prompts_is_chosen():
    # .05 of the near slice, 35/60 of the far one, against V = 1.2 and 2.2: .08/1.2 < .58/2.2
    probed = pass_counts(0, *[0] * 19, 4) + pass_counts(1, *[4] * 20) + pass_counts(2, *[4] * 14, *[0] * 6)
    found = choose([back(10, -0.1), back(30, -0.4)], probed=probed)
    assert found.scores[1].quality == pytest.approx(35 / 60)
    assert (found.distance, found.scores[1].p_best) == (30, 1.0)


def test_rollback_signal_exponent_alpha_weighs_the_variance():
    probed = pass_counts(0, *[0] * 10, *[4] * 10) + pass_counts(1, *[4] * 20) + pass_counts(2, *[4] * 20)
    # Q 1/2 and 5/6: log(5/3) = .51 against alpha * 2 * (.5 - .1) = .8 alpha
    assert choose([back(10, -0.1), back(30, -0.5)], probed=probed, variance_exponent=1.0).distance == 10
    assert choose([back(10, -0.1), back(30, -0.5)], probed=probed, variance_exponent=0.5).distance == 30


def test_rollback_slices_contain_strata_between_checkpoints():
    # no checkpoint 20 steps back: its 40 mistakes are still undone by 30
    found = choose([back(30, -0.1), back(10, -0.1)])
    assert [score.distance for score in found.scores] == [10, 30]
    assert [line.max_age for line in found.strata] == [10, 20, 30]
    assert found.scores[1].num_failed_prompts == 120


def test_rollback_to_the_nearest_of_equals():
    for rule in ("argmax", "one_se", "value"):
        # the slices differ in M alone, and with Q = 1/2 in nothing that S can see; there is no forecast
        assert choose([back(30, -0.2), back(20, -0.2)], rule=rule).distance == 20


def test_rollback_by_one_standard_error_prefers_the_nearer():
    # 10 of 20 against 31 of 60, same V: the far one leads by log(31.5/61) - log(1/2) = .03, SE about .1
    probed = pass_counts(0, *[0, 4] * 10) + pass_counts(1, *[0, 4] * 10) + pass_counts(2, *[0, 4] * 9, 4, 4)
    found = choose([back(10, -0.2), back(30, -0.2)], probed=probed)
    assert found.distance == 30
    assert (found.selection_by_profile["argmax"], found.selection_by_profile["one_se"]) == (30, 10)
    assert choose([back(10, -0.2), back(30, -0.2)], probed=probed, rule="one_se").distance == 10


def test_rollback_reports_what_each_profile_would_choose():
    # Q 1/2 and 5/6 of 20 and 60 prompts: Q~ rises by a factor 1.66. V rises, on 5 tokens with KL .2 and 1 a sequence,
    # faithful exp(.16) = 1.17; calibrated (kappa 10) exp(1.6) = 5; seq_kl exp(1.6); group2 (7 + e^2)/(7 + e^.4) = 1.69
    probed = pass_counts(0, *[0, 4] * 10) + pass_counts(1, *[4] * 20) + pass_counts(2, *[4] * 20)
    found = choose([back(10, -0.2), back(30, -1.0)], probed=probed, kl_scale=10.0)
    assert found.selection_by_profile == {
        "faithful": 30,
        "group2": 10,
        "calibrated": 10,
        "seq_kl": 10,
        "argmax": 10,
        "one_se": 10,
        "value": 10,
    }
    # uncalibrated, the published form hardly sees the distance
    found = choose([back(10, -0.2), back(30, -1.0)], probed=probed)
    assert (found.selection_by_profile["calibrated"], found.selection_by_profile["seq_kl"]) == (30, 10)


@settings(max_examples=8, deadline=None)
@given(
    correct=st.lists(st.integers(0, 4), min_size=6, max_size=6),
    logs=st.lists(st.floats(-2, 0), min_size=3, max_size=3),
    seed=st.integers(0, 3),
)
def test_rollback_p_best_sums_to_one(correct, logs, seed):
    probed = pass_counts(0, *correct[:2]) + pass_counts(1, *correct[2:4]) + pass_counts(2, *correct[4:])
    found = choose([back(d, log_w) for d, log_w in zip((10, 20, 30), logs, strict=True)], probed=probed, seed=seed)
    assert sum(score.p_best for score in found.scores) == pytest.approx(1.0)
    assert sum(score.is_selected for score in found.scores) == 1
    for score in found.scores:
        assert score.quality_low <= score.quality <= score.quality_high
        assert score.signal_low <= score.signal <= score.signal_high
        assert score.variance_low <= score.variance <= score.variance_high


def test_rollback_choice_depends_on_the_seed_alone():
    probed = pass_counts(0, 0, 1, 2, 3, 4, 1) + pass_counts(1, 1, 1, 4, 0) + pass_counts(2, 0, 0, 2)
    samples = [back(10, -0.1, -0.2), back(20, -0.3, -0.2), back(30, -0.3, -0.4)]
    assert choose(samples, probed=probed) == choose(samples[::-1], probed=probed)
    assert choose(samples, probed=probed) != choose(samples, probed=probed, seed=1)


# The direction of V


def test_rollback_variance_is_from_the_configured_samples():
    for side, expected in (("guide", 0.2), ("learner", 0.6)):
        (score,) = choose([back(30, -0.1, -0.3)], variance_samples=side).scores
        assert score.variance == pytest.approx(np.exp(expected))
        assert (score.variance_forward, score.variance_backward) == pytest.approx((np.exp(0.2), np.exp(0.6)))
        assert score.kl_per_sequence == pytest.approx(expected / 2)
        assert score.kl_per_token == pytest.approx(expected / 10)
        assert score.variances["seq2_lognormal"] == score.variance
        assert (score.num_backward_samples, score.variances_agree) == (48, False)


def test_rollback_variance_falls_back_to_the_other_samples():
    (score,) = choose([back(30, None, -0.3)]).scores
    assert (score.variance, score.variance_backward) == pytest.approx((np.exp(0.6), np.exp(0.6)))
    assert (score.variance_forward, score.variances_agree, score.has_heavy_tail) == (None, None, None)
    (score,) = choose([back(30, -0.1)], variance_samples="learner").scores
    assert score.variance == pytest.approx(np.exp(0.2))
    assert (score.variance_backward, score.num_backward_samples) == (None, 0)


def test_rollback_distance_without_ratios_never_beats_a_measured_one():
    found = choose([back(10), back(30, -3.0)])
    assert found.distance == 30
    assert (found.scores[0].variance, found.scores[0].variances, found.scores[0].p_best) == (1.0, {}, 0.0)
    assert choose([back(10), back(30)]).distance == 10


def test_rollback_variance_dominated_by_few_samples_is_replaced():
    # one sample in 240 has w = e^4, the others e^-2: its share of the sum of weights is 55/(55 + 32)
    (mild,) = choose([back(30, -0.2)], variance="seq2").scores
    forward = on(IDS, -2.0)
    heavy = DriftSamples(distance=10, forward=[*on(IDS[:1], 4.0, num=1), *forward[1:]], backward=[])
    found = choose([heavy, back(30, -0.2)], variance="seq2")
    assert mild.variance_kind == "seq2"
    assert {score.variance_kind for score in found.scores} == {"seq2_lognormal"}


def test_rollback_scores_report_heavy_tails():
    (calm,) = choose([back(30, 0.0, 0.0)]).scores
    (alarmed,) = choose([back(30, 0.0, -3.0)]).scores
    assert (calm.has_heavy_tail, alarmed.has_heavy_tail) == (False, True)


def test_rollback_scores_of_distant_policies_are_finite():
    found = choose([back(10, -600.0, -600.0), back(30, -700.0, -700.0)])
    assert all(np.isfinite([score.variance, score.signal, score.signal_high]).all() for score in found.scores)


# The verdict


def test_rollback_without_a_checkpoint_is_rejected():
    found = choose([])
    assert (found.is_accepted, found.reason, found.distance) == (False, "no checkpoint to go back to", None)
    assert (found.scores, found.selection_by_profile) == ((), {})
    assert [line.num_probed for line in found.strata] == [20, 20, 20]


def test_rollback_with_few_failed_prompts_is_rejected():
    found = choose([back(10), back(30)], strata=strata_sized(5, 3, 4), probed=pass_counts(0, 4), min_failed_prompts=64)
    assert found.reason == "only 12 failed prompts in the last 30 steps; autonpo.rollback.min_failed_prompts is 64"
    assert (found.is_accepted, found.distance, found.selection_by_profile) == (False, None, {})
    # the figures are reported all the same
    assert [(score.quality, score.p_best, score.is_selected) for score in found.scores] == [(1.0, 0.0, False)] * 2


def test_rollback_distances_need_enough_failed_prompts():
    found = choose([back(10, 0.0), back(20, -1.0), back(30, -2.0)], min_failed_prompts=80)
    assert found.distance == 20
    assert found.scores[0].signal > found.scores[1].signal
    assert [score.p_best for score in found.scores] == [0.0, 1.0, 0.0]
    assert set(found.selection_by_profile.values()) <= {20, 30}
    # exactly as many are enough
    assert choose([back(30, -0.1)], min_failed_prompts=120).is_accepted
    assert not choose([back(30, -0.1)], min_failed_prompts=121).is_accepted


def test_rollback_without_probed_prompts_is_rejected():
    found = choose([back(10, -0.1), back(20, -0.1)], probed=pass_counts(2, 4))
    assert found.reason == "none of the 80 failed prompts of the last 20 steps was probed"
    assert (found.is_accepted, found.scores) == (False, ())


def test_rollback_is_rejected_if_the_policy_still_fails():
    # all of 20 wrong: Wilson's upper bound is 3.8415/23.8415 = .161
    found = choose([back(10, 0.0)], probed=pass_counts(0, *[0] * 20))
    assert not found.is_accepted
    assert "solves 0 % [0 %, 16.1 %] of the prompts failed in the last 10 steps" in found.reason
    assert "autonpo.probe.min_quality is 10 %" in found.reason
    assert (found.distance, found.scores[0].is_selected) == (10, True)


def test_rollback_acceptance_uses_the_lower_bound_of_quality():
    # 4 of 20 prompts solved: .2 -+ 1.96 * sqrt(.2 * .8/20) = .02 to .38; 40 of 200 narrow it to .145 to .255
    few = choose([back(10)], probed=pass_counts(0, *[4] * 4, *[0] * 16))
    many = choose([back(10)], strata=strata_sized(400), probed=pass_counts(0, *[4] * 40, *[0] * 160))
    assert (few.scores[0].quality, many.scores[0].quality) == (0.2, 0.2)
    assert (few.is_accepted, many.is_accepted) == (False, True)
    assert many.scores[0].quality_low == pytest.approx(0.145, abs=0.015)
    assert few.reason.startswith("the policy solves 20 % [")


def test_rollback_is_not_accepted_for_one_solved_prompt():
    # Wilson's lower bound of 1 in 1 is 1/(1 + 3.8415) = .207
    found = choose([back(10)], probed=pass_counts(0, 4), min_quality=0.25)
    assert not found.is_accepted
    assert found.scores[0].quality_low == pytest.approx(0.2065, abs=1e-4)


def test_rollback_choice_reports_prompts_samples_and_tokens():
    found = choose([back(10, -0.1)], num_tokens=1234)
    assert (found.num_prompts, found.num_samples, found.num_tokens) == (60, 240, 1234)


# Net of the old policy's second try

SEGMENT = ReplaySegment(
    num_steps=10, lost_steps=10, num_prompts=40, samples_all=False, eligible_share=1.0, eligible_per_step=4.0,
    correct_per_step=2.0, tokens_per_step=100.0, slots=1, most_draws=4, draws_per_round=4, scoring_tokens=0,
)  # fmt: skip
"""The replay of D = 10: 40 guides, 2 correct responses per step without them."""


def weighed(counts, log_w, *, wrong=0.0):
    """A sample for each of the counts; correct ones have log w = log_w."""
    return [
        make_drifted_ratio(log_w if is_correct else wrong, 5, prompt_id=count.prompt_id, correct=is_correct)
        for count in counts
        for is_correct in [True] * count.num_correct + [False] * (count.num_samples - count.num_correct)
    ]


def near(probed, log_w, **options) -> DriftSamples:
    return DriftSamples(distance=10, forward=weighed(probed, log_w, **options), backward=[])


def choose_net(samples, **options):
    return choose(samples, **{"quality_baseline": "learner", "min_quality": None, "rule": "value"} | options)


def test_second_try_is_the_weighted_mean_of_correct_samples():
    # a gives its correct responses a quarter of b's probability: Q_self = .25 * (1/2 + 1/4)/2
    probed = pass_counts(0, 2, 1)
    part = slice_within(resample(strata_sized(40), probed), 10)
    own_P = estimate_second_try(part, weighed(probed, np.log(0.25), wrong=np.log(1.45)), cap=10.0)
    # mean weight ((2 * .25 + 2 * 1.45) + (.25 + 3 * 1.45))/8 = 1: nothing to correct
    assert own_P == pytest.approx([0.125, 0.0625])
    assert estimate_second_try(part, [], cap=10.0) is None


def test_second_try_replaces_the_weight_that_the_cap_takes_away():
    # correct samples have w = 2 and .04, wrong ones .04: the mean is (2 + 7 * .04)/8 = .285, and Q_self = 2.04/8/.285
    probed = pass_counts(0, 1, 1)
    part = slice_within(resample(strata_sized(40), probed), 10)
    forward = weighed(probed, np.log(0.04), wrong=np.log(0.04))
    forward[0] = make_drifted_ratio(np.log(2.0), 5, prompt_id="0-000", correct=True)
    assert estimate_second_try(part, forward, cap=10.0).mean() == pytest.approx(2.04 / 8 / 0.285)
    # a weight above the cap counts as the cap, and an average above 1 is not divided by: (4 + .04)/8
    forward[0] = make_drifted_ratio(5.0, 5, prompt_id="0-000", correct=True)
    assert estimate_second_try(part, forward, cap=4.0).mean() == pytest.approx(4.04 / 8 / (4.28 / 8))
    forward[0] = make_drifted_ratio(5.0, 5, prompt_id="0-000", correct=True)
    assert estimate_second_try(part, forward, cap=10.0).mean() == pytest.approx(10.04 / 8)


def test_rollback_is_rejected_if_the_old_policy_solves_as_many():
    # a pass rate of 1/2 that was there before: the published rule accepts it. Newcombe's interval of 10 and 10 in 20 is
    # -+ 28.4 %, and one more correct sample of weight 10 in 80 takes 12.5 % off the lower bound
    probed = pass_counts(0, *[2] * 20)
    assert choose([near(probed, 0.0)], probed=probed).is_accepted
    found = choose_net([near(probed, 0.0)], probed=probed)
    assert (found.is_accepted, found.stop, found.quality_split) == (False, "complete", 0.0)
    assert found.reason.startswith("the policy solves 0 % [-40.9 %, 28.4 %] more of the prompts failed")
    assert found.reason.endswith("than the policy of that time would; the lower bound must be above 0")
    (score,) = found.scores
    assert (score.quality, score.quality_self, score.quality_net) == (0.5, 0.5, 0.0)


def test_rollback_is_accepted_for_what_was_learned():
    # .1 of what it solves now: Q_self .05 and .025, net .45 and .225
    probed = pass_counts(0, *[2, 1] * 20)
    found = choose_net([near(probed, np.log(0.1), wrong=np.log(2.0))], probed=probed)
    assert (found.is_accepted, found.stop, found.reason) == (True, "success", "")
    (score,) = found.scores
    assert (score.quality_self, score.quality_net) == pytest.approx((0.0375, 0.3375))
    assert score.quality_net_low > 0.25
    # a limit on what is learned
    found = choose_net([near(probed, np.log(0.1), wrong=np.log(2.0))], probed=probed, min_quality=0.4)
    assert "autonpo.probe.min_quality is 40 %" in found.reason


def test_rollback_value_is_steps_saved_per_step_of_cost():
    # saved 10 * 4 * Q_net/2 = 20 * .3375; price 10 + (40 guides * 4 draws * 3 tokens + 480 of the probe)/100 = 19.6
    probed = pass_counts(0, *[2, 1] * 20)
    samples = [near(probed, np.log(0.1), wrong=np.log(2.0))]
    found = choose_net(samples, probed=probed, segments={10: SEGMENT}, num_tokens=480, min_value=0.3)
    (score,) = found.scores
    assert (score.steps_saved, score.price) == pytest.approx((6.75, 19.6))
    assert score.value == pytest.approx(6.75 / 19.6)
    assert score.value_low < score.value < score.value_high
    assert found.is_accepted
    assert found.value_split == pytest.approx(score.value, abs=0.02)
    found = choose_net(samples, probed=probed, segments={10: SEGMENT}, num_tokens=480, min_value=1.0)
    assert found.reason == (
        "a rollback by 10 steps is expected to save 0.34 steps per step that it costs (19.6); "
        "autonpo.rollback.min_value is 1"
    )
    found = choose_net(samples, probed=probed, min_value=1.0)
    assert found.reason.startswith("the run has no record of the steps to replay")


def test_rollback_by_value_prefers_the_cheaper_of_equal_gains():
    probed = pass_counts(0, *[2, 1] * 20) + pass_counts(1, *[0] * 20)
    samples = [replace(near(probed, np.log(0.1), wrong=np.log(2.0)), distance=distance) for distance in (10, 20)]
    segments = {10: SEGMENT, 20: replace(SEGMENT, num_steps=20, lost_steps=20, num_prompts=80)}
    found = choose_net(samples, probed=probed, segments=segments)
    assert (found.distance, found.selection_by_profile["value"]) == (10, 10)


def test_rollback_quality_of_the_choice_is_measured_on_the_other_half():
    """Every other prompt: those of the first half all solved, those of the second never."""
    probed = pass_counts(0, *[4, 0] * 10)
    found = choose([near(probed, 0.0)], probed=probed)
    assert found.quality_split == pytest.approx(0.5)
    # two distances, of which each half likes the one in which it was lucky
    lucky = pass_counts(0, *[4, 0] * 10) + pass_counts(1, *[0, 4] * 10)
    strata = strata_sized(40, 400)
    found = choose([back(10, 0.0), back(20, 0.0)], strata=strata, probed=lucky)
    # the first half takes D = 10, where the other one has 0; the second takes D = 20, where it has 0.1 of 440
    assert found.scores[0].quality == pytest.approx(0.5)
    assert found.quality_split == pytest.approx((0.0 + 40 / 440) / 2)


def test_probe_stops_for_futility_and_for_success_at_an_early_look():
    early, *_ = plan_looks(256)
    probed = pass_counts(0, *[2] * 20)
    assert choose_net([near(probed, 0.0)], probed=probed, look=early).stop == "futility"
    probed = pass_counts(0, *[2, 1] * 20)
    learned = [near(probed, np.log(0.1), wrong=np.log(2.0))]
    # early success needs 64 effective correct samples of equal weight: here 30, then 90
    assert choose_net(learned, probed=probed[:20], look=early).stop is None
    probed = pass_counts(0, *[2, 1] * 30)
    strata, learned = strata_sized(60), [near(probed, np.log(0.1), wrong=np.log(2.0))]
    found = choose_net(learned, probed=probed, strata=strata, look=early)
    assert (found.stop, found.is_accepted, found.level) == ("success", True, pytest.approx(0.025 / 16))
    # between the two it continues: one of four samples is new on 4 of 20 prompts, and a little was lost on 2
    some = pass_counts(0, *[1] * 4, *[2] * 2, *[0] * 14)
    forward = weighed(some[:4], np.log(0.2)) + weighed(some[4:], np.log(1.4))
    unsure = DriftSamples(distance=10, forward=forward, backward=[])
    assert choose_net([unsure], probed=some, look=early).stop is None
    # and where even the upper bound of the forecast is below the limit, it does not
    options = {"segments": {10: SEGMENT}, "num_tokens": 480, "min_value": 2.0, "look": early}
    found = choose_net(learned, probed=probed, strata=strata, **options)
    assert (found.stop, found.is_accepted) == ("futility", False)


def test_small_pool_is_rejected_before_sampling():
    config = AutonpoSettings().model_copy(update={"rollback": RollbackSettings(min_failed_prompts=64)})
    found = reject_small_pool(strata_sized(30, 33), [10, 20], config)
    assert (found.is_accepted, found.stop, found.num_samples) == (False, "unsampled", 0)
    assert found.reason == "only 63 failed prompts in the last 20 steps; autonpo.rollback.min_failed_prompts is 64"
    assert [line.num_failed_prompts for line in found.strata] == [30, 33]
    assert reject_small_pool(strata_sized(30, 34), [10, 20], config) is None
