"""What cheaper ways of choosing a guide lose: their regret beside that of asking every candidate every hard prompt.

    python recipes/budget_regret.py [--gains docs/results/calibration-gains-five-seeds.csv,...] [--prompts 128]
                                    [--draws 400] [--spread 0.7] [--out FILE.json]

The tables of `npo calibrate` have the measured gain of each candidate of a learner, its Q, Q_net and V. A draw gives
each hard prompt a difficulty z, and candidate j solves it with probability Phi((Phi^-1(Q_j) - s z)/sqrt(1 - s^2)): the
mean is Q_j, and `--spread` s is how far candidates agree on what is hard. The learner's own second try likewise. All
ways of spending choose by S = max(0, Q_net)/V, V as in the table, among at most eight candidates per learner, or no
guide if no S is above 0. Regret is the best gain of the learner (at least 0) minus that of the choice. The 95 %
interval of a difference is that of a bootstrap over learners.

Cost is in responses of candidates. To solve is to have a correct one among eight; responses to one prompt are taken for
independent, so that the first correct one comes as late as these Q allow. Ways of spending, each with all eight
responses, and with two at a time until one is correct, which gives the same answer:

- halving: `scoring.budget`, sequential halving.
- fewer prompts: every candidate on the first prompts.
- race: all candidates on 16 more prompts at a time; one leaves when the paired interval (two standard errors) of its S
  minus the largest is below 0. Ends with one left, or with the budget.
"""

import argparse
import csv
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import norm

from npo_cli.scoring.halving import halving_rounds

RESULTS = Path(__file__).resolve().parents[1] / "docs/results"
TABLES = ("calibration-gains.csv", "calibration-gains-five-seeds.csv", "calibration-gains-addh1.csv")
MOST_CANDIDATES = 8
NUM_RESPONSES = 8
RESPONSES_PER_ROUND = 2
"""Sampled at a time until one is correct."""
RACE_PROMPTS, RACE_ERRORS = 16, 2.0
"""Prompts of a round of a race, and how many standard errors behind the best a candidate leaves."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredLearner:
    """A learner of a calibration; A candidates."""

    gains_A: np.ndarray
    qualities_A: np.ndarray
    variances_A: np.ndarray
    own_quality: float
    """Q of its second try."""

    def regret(self, chosen: int | None) -> float:
        """None: no guide."""
        return max(0.0, self.gains_A.max()) - (0.0 if chosen is None else self.gains_A[chosen])


def read_learners(path: Path) -> list[MeasuredLearner]:
    """The learners of one table, with the candidates that have a V, evenly thinned to eight."""
    rows: dict[tuple[str, str], list[dict[str, str]]] = {}
    with path.open() as file:
        for row in csv.DictReader(file):
            if row["V kl_exp"] and row["candidate"] != "self":
                rows.setdefault((row["run and seed"], row["learner step"]), []).append(row)
    found = []
    for every in rows.values():
        places = np.unique(np.linspace(0, len(every) - 1, MOST_CANDIDATES).round().astype(int))
        some = [every[place] for place in places]
        quality_A, net_A = (np.array([float(row[name]) for row in some]) for name in ("Q", "Q net"))
        found.append(
            MeasuredLearner(
                gains_A=np.array([float(row["gain"]) for row in some]),
                qualities_A=quality_A,
                variances_A=np.array([float(row["V kl_exp"]) for row in some]),
                own_quality=float(np.median(quality_A - net_A)),
            )
        )
    return found


def draw_tries(learner: MeasuredLearner, num_prompts: int, spread: float, rng: np.random.Generator) -> np.ndarray:
    """Each candidate's responses to each prompt until the first correct one, the learner last: `(A + 1, P)`.

    Solved with probability q in eight independent responses means 1 - (1 - q)^(1/8) in one.
    """
    rates = np.clip([*learner.qualities_A, learner.own_quality], 1e-3, 1 - 1e-3)
    difficulty_P = rng.standard_normal(num_prompts)
    passes = norm.cdf((norm.ppf(rates)[:, None] - spread * difficulty_P) / np.sqrt(1 - spread**2))
    return rng.geometric(np.clip(-np.expm1(np.log1p(-np.minimum(passes, 1 - 1e-12)) / NUM_RESPONSES), 1e-12, 1))


@dataclass
class Sampling:
    """The answers of one draw, and how many were asked for; S of a candidate from its first prompts."""

    learner: MeasuredLearner
    tries: np.ndarray
    num_pairs: int = 0
    num_responses: int = 0
    """In rounds, until one is correct."""

    def __post_init__(self) -> None:
        self.solved = self.tries <= NUM_RESPONSES
        self.used_A = np.zeros(len(self.tries) - 1, dtype=int)
        num_rounds = -(-np.minimum(self.tries, NUM_RESPONSES) // RESPONSES_PER_ROUND)
        self.costs = RESPONSES_PER_ROUND * num_rounds

    @property
    def num_prompts(self) -> int:
        """P."""
        return self.tries.shape[1]

    def ask(self, candidates: Sequence[int], num_prompts: int) -> None:
        """Bring these candidates to this number of prompts."""
        for a in candidates:
            new = slice(self.used_A[a], max(num_prompts, self.used_A[a]))
            self.num_pairs += new.stop - new.start
            self.num_responses += int(self.costs[a, new].sum())
            self.used_A[a] = new.stop

    def signal_P(self, a: int) -> np.ndarray:
        """What each prompt asked adds to S, unless that is negative: (solved - solved by the learner)/V."""
        used = self.used_A[a]
        return (self.solved[a, :used] - 1.0 * self.solved[-1, :used]) / self.learner.variances_A[a]

    def signal(self, a: int) -> tuple[float, float]:
        """S, and of several without one Q_net."""
        mean = float(self.signal_P(a).mean())
        return max(0.0, mean), mean * self.learner.variances_A[a]

    def best(self, candidates: Sequence[int]) -> int:
        """The candidate of largest S."""
        return max(candidates, key=self.signal)

    def choose(self, candidates: Sequence[int]) -> int | None:
        """The same, or no guide."""
        best = self.best(candidates)
        return best if self.signal(best)[0] > 0 else None


Way = Callable[[Sampling, float], int | None]
"""Spends a share of all pairs, and chooses."""


def halve(sampling: Sampling, share: float) -> int | None:
    """`scoring.budget`."""
    left = list(range(len(sampling.used_A)))
    used, budget = 0, int(share * len(left) * sampling.num_prompts)
    for each in halving_rounds(len(left), budget):
        if used:
            left = sorted(left, key=sampling.signal, reverse=True)[: each.num_candidates]
        used = min(sampling.num_prompts, used + each.prompts_per_candidate)
        sampling.ask(left, used)
    return sampling.choose(left)


def ask_fewer_prompts(sampling: Sampling, share: float) -> int | None:
    """All candidates on the same part of the prompts."""
    everyone = range(len(sampling.used_A))
    sampling.ask(everyone, int(share * sampling.num_prompts))
    return sampling.choose(everyone)


def race(sampling: Sampling, share: float) -> int | None:
    """Candidates leave when they are shown to be behind."""
    left = list(range(len(sampling.used_A)))
    used, budget = 0, int(share * len(left) * sampling.num_prompts)
    while len(left) > 1 or not used:
        more = min(RACE_PROMPTS, sampling.num_prompts - used, (budget - sampling.num_pairs) // len(left))
        if more < 1:
            break
        used += more
        sampling.ask(left, used)
        best = sampling.best(left)
        left = [a for a in left if not is_behind(sampling.signal_P(best) - sampling.signal_P(a))]
    return sampling.choose(left)


def is_behind(difference_P: np.ndarray) -> bool:
    """Whether the mean is above 0 by RACE_ERRORS standard errors; prompts that agree are not taken as certain."""
    error = np.sqrt((difference_P.var() + 1 / len(difference_P)) / len(difference_P))
    return bool(difference_P.mean() > RACE_ERRORS * error)


WAYS: tuple[tuple[str, Way, float], ...] = (
    ("all pairs", ask_fewer_prompts, 1.0),
    *((f"halving, {share:.2f} of them", halve, share) for share in (3 / 4, 2 / 3, 1 / 2, 1 / 3, 1 / 4, 1 / 6)),
    *((f"fewer prompts, {share:.2f} of them", ask_fewer_prompts, share) for share in (1 / 2, 1 / 3, 1 / 4)),
    *((f"race, at most {share:.2f} of them", race, share) for share in (1.0, 1 / 2, 1 / 3, 1 / 4)),
)


def main(arguments: Sequence[str]) -> None:
    """Simulate and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gains", default=",".join(str(RESULTS / name) for name in TABLES))
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument("--spread", type=float, default=0.7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    rng = np.random.default_rng(0)
    learners = [learner for path in options.gains.split(",") for learner in read_learners(Path(path))]
    regrets, pairs, responses = np.zeros((3, len(WAYS), len(learners)))
    for place, learner in enumerate(learners):
        full = len(learner.gains_A) * options.prompts
        for _ in range(options.draws):
            tries = draw_tries(learner, options.prompts, options.spread, rng)
            for number, (_, spend, share) in enumerate(WAYS):
                sampling = Sampling(learner, tries)
                regrets[number, place] += learner.regret(spend(sampling, share)) / options.draws
                pairs[number, place] += sampling.num_pairs / full / options.draws
                responses[number, place] += sampling.num_responses / (NUM_RESPONSES * full) / options.draws
    picks = rng.integers(len(learners), size=(4000, len(learners)))
    rows = []
    print("| way | pairs, share of all | responses, share of all, until solved | regret | minus that of all pairs |")
    print("|---|---|---|---|---|")
    for number, (name, _, _) in enumerate(WAYS):
        behind = regrets[number] - regrets[0]
        low, high = np.percentile(behind[picks].mean(axis=1), [2.5, 97.5])
        means = {"pairs": pairs[number].mean(), "responses": responses[number].mean(), "regret": regrets[number].mean()}
        rows.append({"way": name} | means | {"behind": behind.mean(), "low": low, "high": high})
        print(
            f"| {name} | {means['pairs']:.2f} | {means['responses']:.2f} | {means['regret']:.4f} | "
            f"{behind.mean():.4f} [{low:.4f}, {high:.4f}] |"
        )
    print(f"{len(learners)} learners, {np.mean([len(one.gains_A) for one in learners]):.1f} candidates on average")
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
