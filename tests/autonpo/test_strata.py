import numpy as np
import pytest

from npo_cli.autonpo.strata import (
    estimate_stratum_quality,
    resample_strata,
    stratified_quality,
    stratified_quality_interval,
)
from npo_cli.rollout.mistake_pool import Stratum, allocate_probe_prompts
from npo_cli.scoring.evidence import PromptPassCount
from tests.rollout.test_mistake_pool import strata_sized


def outcomes(j: int, *correct: int, num_samples: int = 4) -> list[PromptPassCount]:
    """The first prompts of stratum j, with these many correct samples."""
    return [
        PromptPassCount(prompt_id=f"{j}-{i:03}", num_samples=num_samples, num_correct=num_correct)
        for i, num_correct in enumerate(correct)
    ]


def asked(strata, probed, *, resamples=0, seed=0):
    return resample_strata(strata, probed, rng=np.random.default_rng(seed), resamples=resamples)


def test_a_slice_weighs_its_strata_by_their_mistakes_not_by_who_was_asked():
    # q = 1/2 of 30 mistakes, 1/8 of 10, although as many were asked of the one as of the other
    everything = asked(strata_sized(30, 10), outcomes(0, 2, 2) + outcomes(1, 1, 0))
    assert stratified_quality(everything.within(10)).tolist() == [0.5]
    assert stratified_quality(everything.within(20)) == pytest.approx([(30 * 0.5 + 10 * 0.125) / 40])


def test_strata_of_which_nothing_was_asked_have_no_part():
    # the middle one was not asked: (30 * 1/2 + 10 * 1)/40
    everything = asked(strata_sized(30, 500, 10), outcomes(0, 2) + outcomes(2, 4))
    assert stratified_quality(everything.within(30)) == pytest.approx([0.625])
    assert stratified_quality(everything.within(20)) == pytest.approx([0.5])


def test_prompts_count_alike_however_often_they_were_sampled():
    # 1/2 and 1/4, not 2/10
    probed = [*outcomes(0, 1, num_samples=2), PromptPassCount(prompt_id="0-001", num_samples=8, num_correct=2)]
    assert stratified_quality(asked(strata_sized(2), probed)) == pytest.approx([0.375])


def test_every_resample_keeps_the_weight_of_each_stratum():
    everything = asked(strata_sized(30, 10), outcomes(0, 1, 2, 3) + outcomes(1, 0, 4), resamples=50)
    for distance, weight in ((10, 30.0), (20, 40.0)):
        assert everything.within(distance).weights_BP.sum(axis=1) == pytest.approx([weight] * 51)
    assert everything.weights_BP[0] == pytest.approx([10, 10, 10, 5, 5])


def test_resampling_within_strata_gives_the_stratified_standard_error():
    # strata of equal weight; values 0 and 1 half each in either: Var = 2 * (1/2)^2 * .25/40
    everything = asked(strata_sized(100, 100), outcomes(0, *[0, 4] * 20) + outcomes(1, *[0, 4] * 20), resamples=4000)
    assert stratified_quality(everything)[1:].std() == pytest.approx(np.sqrt(2 * 0.25 * 0.25 / 40), rel=0.05)


def test_differences_between_strata_are_no_uncertainty():
    # each stratum is nearly unanimous: a bootstrap over all prompts would have sd sqrt(.25/80) = .056
    everything = asked(strata_sized(100, 100), outcomes(0, 1, *[0] * 39) + outcomes(1, 3, *[4] * 39), resamples=1000)
    assert stratified_quality(everything)[1:].std() < 0.01


def test_the_interval_follows_the_spread_between_prompts():
    # values 1/4 and 3/4: .5 -+ 1.96 * .25/sqrt(40) = .42 to .58; Wilson's of 20 in 40 would be .35 to .65
    everything = asked(strata_sized(100), outcomes(0, *[1, 3] * 20), resamples=4000)
    assert stratified_quality_interval(everything, stratified_quality(everything)) == pytest.approx(
        (0.4225, 0.5775), abs=0.01
    )


def test_unanimous_strata_do_not_feign_certainty():
    # 0 of 10 and 10 of 10: resampling within them changes nothing; Wilson's interval of 10 in 20 is 0.30 to 0.70
    everything = asked(strata_sized(10, 10), outcomes(0, *[0] * 10) + outcomes(1, *[4] * 10), resamples=100)
    low, high = stratified_quality_interval(everything, stratified_quality(everything))
    assert (low, high) == (pytest.approx(0.2993, abs=1e-4), pytest.approx(0.7007, abs=1e-4))
    # all wrong: 0 to z^2/(10 + z^2) = 3.8415/13.8415
    near = everything.within(10)
    assert stratified_quality_interval(near, stratified_quality(near)) == (0.0, pytest.approx(0.27753, abs=1e-4))


def test_a_prompt_outside_the_strata_is_our_own_mistake():
    with pytest.raises(AssertionError, match="mistakes of the strata"):
        asked(strata_sized(2), [PromptPassCount(prompt_id="other", num_samples=1, num_correct=0)])


def test_a_stratum_counts_clustered_samples_for_what_they_are_worth():
    (stratum,) = strata_sized(50)
    # unanimous prompts: ICC 1, so 8 prompts are 8 trials, not 32
    alike = estimate_stratum_quality(stratum, outcomes(0, 4, 4, 0, 0, 0, 0, 0, 0))
    # as many correct, spread evenly over the prompts: ICC 0, 32 trials
    mixed = estimate_stratum_quality(stratum, outcomes(0, *[1] * 8))
    assert alike.quality == mixed.quality == 0.25
    # Beta(2.5, 6.5) against Beta(8.5, 24.5)
    assert (alike.quality_low, alike.quality_high) == (pytest.approx(0.0559, abs=1e-3), pytest.approx(0.5921, abs=1e-3))
    assert (mixed.quality_low, mixed.quality_high) == (pytest.approx(0.1267, abs=1e-3), pytest.approx(0.4174, abs=1e-3))
    assert (alike.num_failed_prompts, alike.num_probed, alike.num_samples, alike.num_correct) == (50, 8, 32, 8)


def test_a_stratum_never_asked_could_be_anything():
    (stratum,) = strata_sized(50)
    line = estimate_stratum_quality(stratum, [])
    assert (line.num_probed, line.quality, line.quality_low, line.quality_high) == (0, 0.0, 0.0, 1.0)


# Is stratifying worth it?

SOLVED_BY_STRATUM = (0.02, 0.5, 0.95)


def answers(prompt_ids, rng) -> list[PromptPassCount]:
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
    probed = answers([prompt_id for ids in chosen for prompt_id in ids], rng)
    return float(stratified_quality(asked(strata, probed))[0])


def uniform_estimate(strata: tuple[Stratum, ...], seed: int) -> float:
    rng = np.random.default_rng(seed)
    pool = [prompt_id for stratum in strata for prompt_id in stratum.prompt_ids]
    probed = answers(rng.choice(pool, 120, replace=False), rng)
    return float(np.mean([outcome.num_correct for outcome in probed]))


def test_a_stratified_probe_errs_less_than_a_uniform_one():
    # q = .49; uniform: Var = .49 * .51/120, sd .046. By size: (.0196 + .25 + .0475)/3 / 120, sd .030
    strata = strata_sized(1000, 1000, 1000)
    truth = np.mean(SOLVED_BY_STRATUM)
    stratified = np.array([stratified_estimate(strata, seed) for seed in range(300)]) - truth
    uniform = np.array([uniform_estimate(strata, seed) for seed in range(300)]) - truth
    assert abs(stratified.mean()) < 0.01
    assert np.sqrt((stratified**2).mean()) < 0.8 * np.sqrt((uniform**2).mean())
    assert np.sqrt((stratified**2).mean()) == pytest.approx(0.030, abs=0.004)


def test_strata_that_were_unlucky_at_first_do_not_pull_quality_down():
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
        found.append(float(stratified_quality(asked(strata, probed))[0]))
    assert abs(np.mean(found) - 0.1) < 0.003
