import numpy as np
import pytest

from npo_cli.autonpo.drift import (
    BIDIRECTIONAL_KINDS,
    DriftSamples,
    estimate_backward_drift,
    estimate_forward_drift,
    is_drift_consistent,
    is_heavy_tailed,
    select_drift,
)
from tests.autonpo.test_strata import asked, outcomes
from tests.rollout.test_mistake_pool import strata_sized
from tests.scoring.samples import CAP, KNOBS, make_drifted_ratio, make_ratio

GUIDE_LAW = np.array([0.4, 0.3, 0.2, 0.1])
OLD_LAW = np.array([0.3, 0.3, 0.2, 0.2])


def forward_of(hindsight, part):
    return estimate_forward_drift([hindsight], [part], cap=CAP)[0]


def backward_of(*hindsights, resamples=0):
    return estimate_backward_drift(hindsights, rng=np.random.default_rng(0), resamples=resamples, cap=CAP)


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
def test_a_policy_costs_nothing_to_learn_from_itself(kind):
    part = asked(strata_sized(30), outcomes(0, 1, 0, 2), resamples=20)
    recorded = on(["0-007", "0-008"], 0.0, num=16)
    same = DriftSamples(distance=10, forward=on(part.prompt_ids, 0.0, num=11), backward=recorded)
    views = forward_of(same, part), *backward_of(same, resamples=20)
    for view in views:
        assert np.exp(view.log_variance(kind, KNOBS)) == pytest.approx([1.0] * 21)
        assert view.kl(KNOBS) == (0.0, 0.0)
    # only what a KL tells is the same from both sides
    assert is_drift_consistent(*views, kind=kind, knobs=KNOBS) is (True if kind in BIDIRECTIONAL_KINDS else None)


def test_a_slice_weighs_the_cost_of_its_strata_like_their_quality():
    # KL .2 on 30 mistakes, 1 on 10: (30 * .2 + 10 * 1)/40 = .4 a sequence, V = exp(.8)
    part = asked(strata_sized(30, 10), outcomes(0, 1, 1, 1) + outcomes(1, 1))
    samples = on(["0-000", "0-001", "0-002"], -0.2) + on(["1-000"], -1.0)
    view = forward_of(DriftSamples(distance=20, forward=samples, backward=[]), part)
    assert view.kl(KNOBS) == (pytest.approx(0.08), pytest.approx(0.4))
    assert view.log_variance("seq2_lognormal", KNOBS) == pytest.approx([0.8])
    assert view.variances(KNOBS)["seq2_lognormal"] == pytest.approx(np.exp(0.8))


def test_samples_outside_the_slice_are_not_looked_at():
    everything = asked(strata_sized(30, 10), outcomes(0, 1) + outcomes(1, 1))
    samples = on(["0-000"], -0.2) + on(["1-000"], -9.0)
    view = forward_of(DriftSamples(distance=10, forward=samples, backward=[]), everything.within(10))
    assert view.kl(KNOBS)[1] == pytest.approx(0.2)


def test_both_directions_measure_their_own_divergence():
    # KL(b||a) = 5 (.4 log(4/3) - .1 log 2) = .2288; KL(a||b) = 5 (-.3 log(4/3) + .2 log 2) = .2616
    part = asked(strata_sized(60), outcomes(0, *[1] * 60))
    both = DriftSamples(distance=10, forward=forward_chain(), backward=backward_chain())
    assert forward_of(both, part).kl(KNOBS)[1] == pytest.approx(0.2288, abs=0.1)
    assert backward_of(both)[0].kl(KNOBS)[1] == pytest.approx(0.2616, abs=0.1)


def test_small_drift_looks_alike_from_both_sides_and_a_large_one_does_not():
    part = asked(strata_sized(60), outcomes(0, *[1] * 60), resamples=300)
    alike = DriftSamples(distance=10, forward=forward_chain(), backward=backward_chain())
    unlike = DriftSamples(distance=10, forward=forward_chain(), backward=on(part.prompt_ids, -3.0))
    for hindsight, agree in ((alike, True), (unlike, False)):
        (backward,) = backward_of(hindsight, resamples=300)
        assert is_drift_consistent(forward_of(hindsight, part), backward, kind="seq2_lognormal", knobs=KNOBS) is agree
    assert is_drift_consistent(forward_of(alike, part), None, kind="group2", knobs=KNOBS) is None


def test_correct_samples_decide_V_where_every_distance_has_enough():
    near_far = asked(strata_sized(40, 40), outcomes(0, *[4] * 8) + outcomes(1, *[4] * 8))
    right = on(near_far.prompt_ids, -0.1, correct=True)
    wrong = on(near_far.prompt_ids, -1.0)
    hindsights = [DriftSamples(distance=distance, forward=right + wrong, backward=[]) for distance in (10, 20)]
    # 8 prompts * 4 correct samples = 32 in the nearer slice: enough
    views = estimate_forward_drift(hindsights, [near_far.within(10), near_far], cap=CAP)
    assert [view.log_variance("seq2_lognormal", KNOBS)[0] for view in views] == pytest.approx([0.2, 0.2])
    # but a KL is of all samples: (.1 + 1)/2
    assert [view.kl(KNOBS)[1] for view in views] == pytest.approx([0.55, 0.55])
    # one correct sample fewer in the nearer slice, and all samples count in both
    fewer = [DriftSamples(distance=distance, forward=right[1:] + wrong, backward=[]) for distance in (10, 20)]
    views = estimate_forward_drift(fewer, [near_far.within(10), near_far], cap=CAP)
    # (31 * .1 + 32 * 1)/63 and (63 * .1 + 64 * 1)/127, doubled
    assert [view.log_variance("seq2_lognormal", KNOBS)[0] for view in views] == pytest.approx(
        [2 * 35.1 / 63, 2 * 70.3 / 127]
    )


def test_the_two_sides_are_compared_on_all_their_samples():
    # correct samples alone say V = exp(.2), all of them exp(1.1), as the other side does
    part = asked(strata_sized(40), outcomes(0, *[4] * 8), resamples=100)
    right, wrong = on(part.prompt_ids, -0.1, correct=True), on(part.prompt_ids, -1.0)
    hindsight = DriftSamples(distance=10, forward=right + wrong, backward=on(part.prompt_ids, -0.55))
    (backward,) = backward_of(hindsight, resamples=100)
    forward = forward_of(hindsight, part)
    assert forward.log_variance("seq2_lognormal", KNOBS)[0] == pytest.approx(0.2)
    assert is_drift_consistent(forward, backward, kind="seq2_lognormal", knobs=KNOBS) is True


def test_a_distance_without_samples_has_no_view_and_does_not_speak_for_the_others():
    part = asked(strata_sized(40), outcomes(0, *[4] * 8))
    right = on(part.prompt_ids, -0.1, correct=True)
    seen = DriftSamples(distance=10, forward=right + on(part.prompt_ids, -1.0), backward=[])
    blind = DriftSamples(distance=20, forward=[], backward=[])
    first, second = estimate_forward_drift([seen, blind], [part, part], cap=CAP)
    assert second is None
    assert first.log_variance("seq2_lognormal", KNOBS)[0] == pytest.approx(0.2)
    assert backward_of(seen, blind) == (None, None)


def test_a_handful_of_samples_contradicts_nobody():
    # 8 prompts * 4 samples on one side; one prompt of the other says e^6 = V, and its interval has no width
    part = asked(strata_sized(40), outcomes(0, *[4] * 8), resamples=50)
    for num, agree in ((31, None), (32, False)):
        hindsight = DriftSamples(distance=10, forward=on(part.prompt_ids, -0.1), backward=on(["0-001"], -3.0, num=num))
        (backward,) = backward_of(hindsight, resamples=50)
        assert is_drift_consistent(forward_of(hindsight, part), backward, kind="seq2_lognormal", knobs=KNOBS) is agree


def test_the_direction_asked_for_gives_way_where_it_is_missing():
    part = asked(strata_sized(4), outcomes(0, 1))
    both = DriftSamples(distance=10, forward=on(part.prompt_ids, -0.1), backward=on(["0-003"], -0.2))
    forward, (backward,) = forward_of(both, part), backward_of(both)
    assert select_drift(forward, backward, "guide") is forward
    assert select_drift(forward, backward, "learner") is backward
    assert select_drift(None, backward, "guide") is backward
    assert select_drift(forward, None, "learner") is forward
    assert select_drift(None, None, "guide") is None


def test_recorded_prompts_are_resampled_for_all_distances_at_once():
    # the same records twice over: whatever is drawn, both see the same
    mixed = [make_drifted_ratio(-0.1 * i, 4, prompt_id=f"0-{i:03}") for i in range(8)]
    one, two = backward_of(
        *(DriftSamples(distance=distance, forward=[], backward=mixed) for distance in (10, 20)), resamples=100
    )
    assert one.log_variance("kl_exp", KNOBS).tolist() == two.log_variance("kl_exp", KNOBS).tolist()
    assert one.log_variance("kl_exp", KNOBS).std() > 0


def test_a_resample_without_any_record_repeats_the_estimate():
    # one of 30 recorded prompts is this distance's own: about a third of the draws miss it
    crowd = DriftSamples(distance=20, forward=[], backward=on([f"0-{i:03}" for i in range(30)], -1.0))
    single = DriftSamples(distance=10, forward=[], backward=on(["0-000"], -0.5))
    view, _ = backward_of(single, crowd, resamples=200)
    assert (view.weights_BP.sum(axis=1) == 0).any()
    assert view.log_variance("seq2_lognormal", KNOBS) == pytest.approx([1.0] * 201)


# The heavy-tail alarm


def test_the_two_second_moments_of_a_chain_agree():
    # E_b[w^2] = (sum a^2/b)^5 = (.225 + .3 + .2 + .4)^5 = 1.802 = E_a[w]
    guide_side = np.mean([np.exp(2 * sample.log_w) for sample in forward_chain()])
    learner_side = np.mean([np.exp(-sample.log_w) for sample in backward_chain()])
    assert guide_side == pytest.approx(1.802, abs=0.5)
    assert learner_side == pytest.approx(1.802, abs=0.3)
    assert is_heavy_tailed(forward_chain(), backward_chain()) is False


def test_the_alarm_is_rare_where_nothing_is_wrong():
    # two joint standard errors: one in twenty if the means were normal, somewhat more as w^2 is skewed
    alarms = [is_heavy_tailed(forward_chain(seed), backward_chain(1000 + seed)) for seed in range(100)]
    assert sum(alarms) <= 15


def test_a_tail_that_the_guide_never_visits_raises_the_alarm():
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


def test_a_few_samples_say_nothing_about_tails():
    ids = [f"0-{i:03}" for i in range(8)]
    assert is_heavy_tailed(on(ids, 0.0), on(ids, 0.0)) is False
    # how often a prompt was sampled changes nothing
    assert is_heavy_tailed(on(ids, 0.0), on(ids, 0.0, num=8)) is False
    # 31 samples on one side; one prompt has no standard error
    assert is_heavy_tailed(on(ids, 0.0)[1:], on(ids, 0.0)) is None
    assert is_heavy_tailed(on(ids, 0.0), on(["0-000"], 0.0, num=40)) is None
