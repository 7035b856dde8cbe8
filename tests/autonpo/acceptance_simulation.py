"""How often AutoNPO's confirmation accepts, simulated: with nothing learned since, and with something.

`python -m tests.autonpo.acceptance_simulation` prints the table of docs/results/autonpo-acceptance.md.

16 prompts per step for 80 steps, the pass rate p of each drawn from a Beta distribution; those with at most 2 of 8
correct are the pool. The probe has 256 prompts x 4. What was learned: the current pass rate is p + g (1 - p), that of
the policy D steps back p + g (1 - p)(1 - D/80). A response has the weight w = a/b of its own outcome, times
exp(s sqrt(D/80) z - s^2 D/160), z normal: drift that no pass rate shows. Q of the old rule is that of the whole pool.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from npo_cli.autonpo.rollback_choice import (
    DriftSamples,
    RollbackEstimator,
    Stratum,
    allocate_probe_prompts,
    decide,
)
from npo_cli.autonpo.sequential_test import plan_looks
from npo_cli.config.autonpo import AutonpoSettings, RollbackSettings
from npo_cli.scoring.forecast import ReplaySegment
from npo_cli.scoring.quality import PromptPassCount
from npo_cli.scoring.variance import SampleRatio
from tests.scoring.samples import formula

DIFFICULTIES = {
    "Beta(1,2)": (1.0, 2.0),
    "Beta(1,1)": (1.0, 1.0),
    "Beta(2,6)": (2.0, 6.0),
    "Beta(.5,1.5)": (0.5, 1.5),
    "Beta(.3,3)": (0.3, 3.0),
}
DISTANCES = (20, 40, 80)
NUM_STEPS, PER_STEP, GROUP, SAMPLES, NUM_PROMPTS = 80, 16, 8, 4, 256
SETTINGS = AutonpoSettings().model_copy(update={"rollback": RollbackSettings(min_value=0.0)})
FORMULA = formula("kl_exp", quality_baseline="learner", bootstrap_resamples=1000)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """One probe."""

    is_accepted: bool
    share_sampled: float
    """Prompts sampled, of 256."""
    stop: str
    is_accepted_as_published: bool
    """By the rule before: lower bound of Q >= .10, all prompts sampled."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pool:
    """Failed prompts by age, their current pass rates, and everything that the policy would sample."""

    strata: tuple[Stratum, ...]
    correct: dict[str, np.ndarray]
    """Outcomes of the four samples."""
    log_w: dict[int, dict[str, np.ndarray]]
    """Log weights of the samples, by distance."""


def draw_pool(shape: tuple[float, float], *, gain: float, drift: float, rng: np.random.Generator) -> Pool:
    """One run's failed prompts."""
    base_N = rng.beta(*shape, size=NUM_STEPS * PER_STEP)
    age_N = np.repeat(np.arange(NUM_STEPS), PER_STEP)

    def rate(distance):
        return base_N + gain * (1 - base_N) * (1 - distance / NUM_STEPS)

    failed = np.flatnonzero(rng.binomial(GROUP, rate(age_N + 1)) <= GROUP // 4)
    names = [f"{place:04}" for place in range(len(base_N))]
    now_N = rate(0)
    correct_NS = rng.random((len(base_N), SAMPLES)) < now_N[:, None]
    noise_NS = rng.standard_normal(correct_NS.shape)
    log_w = {}
    with np.errstate(divide="ignore"):
        for distance in DISTANCES:
            old_N, spread = rate(distance), drift * np.sqrt(distance / NUM_STEPS)
            outcome_NS = np.where(correct_NS, (old_N / now_N)[:, None], ((1 - old_N) / (1 - now_N))[:, None])
            weights_NS = np.log(outcome_NS) + spread * noise_NS - spread**2 / 2
            log_w[distance] = {names[i]: weights_NS[i] for i in failed}
    strata = tuple(
        Stratum(min_age=low, max_age=high, prompt_ids=tuple(names[i] for i in failed if low <= age_N[i] < high))
        for low, high in zip((0, *DISTANCES), DISTANCES, strict=False)
    )
    return Pool(strata=strata, correct={names[i]: correct_NS[i] for i in failed}, log_w=log_w)


def simulate_probe(pool: Pool, *, seed: int) -> Outcome:
    """Sample part by part and decide as AutoNPO does, by the forecast, without a limit on it."""
    num_prompts = min(NUM_PROMPTS, len(pool.correct))
    for look in plan_looks(num_prompts):
        chosen = allocate_probe_prompts(pool.strata, num_prompts=look.num_prompts, seed=seed)
        build, probed = estimator_of(pool, [prompt_id for ids in chosen for prompt_id in ids], seed=seed)
        eligible = build.candidates(probed, has_drift=False)
        *_, stop = decide(build, probed, eligible, formula=FORMULA, look=look)
        if stop is not None:
            break
    everything = allocate_probe_prompts(pool.strata, num_prompts=num_prompts, seed=seed)
    build, probed = estimator_of(pool, [prompt_id for ids in everything for prompt_id in ids], seed=seed)
    whole = build.candidates(probed, has_drift=False)[-1].candidate
    return Outcome(
        is_accepted=stop == "success",
        share_sampled=look.num_prompts / num_prompts,
        stop=stop,
        is_accepted_as_published=bool(whole.quality_interval()[0] >= 0.1),
    )


def estimator_of(pool: Pool, prompt_ids: list[str], *, seed: int) -> tuple[RollbackEstimator, list[PromptPassCount]]:
    """What is known after these prompts were sampled."""
    probed = [
        PromptPassCount(prompt_id=name, num_samples=SAMPLES, num_correct=int(pool.correct[name].sum()))
        for name in prompt_ids
    ]
    samples, segments = [], {}
    for distance in DISTANCES:
        inside = {name for stratum in pool.strata if stratum.max_age <= distance for name in stratum.prompt_ids}
        forward = [
            SampleRatio(
                prompt_id=name, num_tokens=10, log_w=float(log_w), sum_rho2=10.0, sum_rho2_grad=10.0,
                sum_rho_grad=10.0, is_correct=bool(is_correct),
            )
            for name in prompt_ids
            if name in inside
            for log_w, is_correct in zip(pool.log_w[distance][name], pool.correct[name], strict=True)
        ]  # fmt: skip
        samples.append(DriftSamples(distance=distance, forward=forward, backward=()))
        segments[distance] = ReplaySegment(
            num_steps=distance, lost_steps=distance, num_prompts=len(inside), samples_all=False, eligible_share=1.0,
            eligible_per_step=len(inside) / distance, correct_per_step=10.0, tokens_per_step=1280.0, slots=1,
            most_draws=8, draws_per_round=2, scoring_tokens=0,
        )  # fmt: skip
    num_samples = SAMPLES * len(probed)
    build = RollbackEstimator(
        strata=pool.strata, samples=samples, segments=segments, formula=FORMULA, settings=SETTINGS, seed=seed,
        num_tokens=10 * num_samples, num_samples=num_samples,
    )  # fmt: skip
    return build, probed


def simulate(name: str, *, gain: float, drift: float, num: int, first_seed: int = 0) -> list[Outcome]:
    """`num` runs of one distribution."""
    found = []
    for seed in range(first_seed, first_seed + num):
        rng = np.random.default_rng([seed, round(100 * gain), round(100 * drift)])
        pool = draw_pool(DIFFICULTIES[name], gain=gain, drift=drift, rng=rng)
        found.append(simulate_probe(pool, seed=seed))
    return found


def share(outcomes: list[Outcome], attribute: str) -> float:
    return float(np.mean([getattr(each, attribute) for each in outcomes]))


def print_table(names: Sequence[str], num_null: int, num_power: int, first_seed: int) -> None:
    """Markdown: share accepted, and in brackets the mean share of the prompts that was sampled."""
    nulls, gains = (0.5, 1.0, 2.0), (0.05, 0.1, 0.2)
    print("| difficulty | before |", " | ".join(f"s {drift:g}" for drift in nulls), "|", end=" ")
    print(" | ".join(f"g {gain:g}" for gain in gains), "|")
    print("| --- " * 8 + "|")
    for name in names:
        null = [simulate(name, gain=0.0, drift=drift, num=num_null, first_seed=first_seed) for drift in nulls]
        power = [simulate(name, gain=gain, drift=1.0, num=num_power, first_seed=first_seed) for gain in gains]
        before = np.mean([share(each, "is_accepted_as_published") for each in null])
        cells = [f"{share(each, 'is_accepted'):.3f} ({share(each, 'share_sampled'):.2f})" for each in (*null, *power)]
        print(f"| {name} | {before:.2f} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=DIFFICULTIES, action="append", default=None)
    parser.add_argument("--null", type=int, default=150, help="probes with nothing learned, per drift")
    parser.add_argument("--power", type=int, default=40, help="probes with something learned, per gain")
    parser.add_argument("--first-seed", type=int, default=0)
    arguments = parser.parse_args()
    print_table(arguments.only or list(DIFFICULTIES), arguments.null, arguments.power, arguments.first_seed)
