"""What `scoring.budget` loses: regret of sequential halving beside that of asking every candidate every hard prompt.

    python recipes/budget_regret.py [--gains docs/results/calibration-gains-five-seeds.csv,...] [--prompts 128]
                                    [--draws 400] [--spread 0.7] [--out FILE.json]

The tables of `npo calibrate` have the measured gain of each candidate of a learner, its Q, Q_net and V. A draw gives
each hard prompt a difficulty z, and candidate j solves it with probability Phi((Phi^-1(Q_j) - s z)/sqrt(1 - s^2)): the
mean is Q_j, and `--spread` s is how far candidates agree on what is hard. The learner's own second try likewise. Both
ways of spending choose by S = max(0, Q_net)/V, V as in the table, among at most eight candidates per learner, or no
guide if no S is above 0. Regret is the best gain of the learner (at least 0) minus that of the choice. The 95 %
interval of a difference is that of a bootstrap over learners.
"""

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import norm

from npo_cli.scoring.halving import halving_rounds

RESULTS = Path(__file__).resolve().parents[1] / "docs/results"
TABLES = ("calibration-gains.csv", "calibration-gains-five-seeds.csv", "calibration-gains-addh1.csv")
MOST_CANDIDATES = 8


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


def draw_passes(learner: MeasuredLearner, num_prompts: int, spread: float, rng: np.random.Generator) -> np.ndarray:
    """Whether each candidate, the learner last, solves each prompt: `(A + 1, P)`."""
    rates = np.clip([*learner.qualities_A, learner.own_quality], 1e-3, 1 - 1e-3)
    difficulty_P = rng.standard_normal(num_prompts)
    passes = norm.cdf((norm.ppf(rates)[:, None] - spread * difficulty_P) / np.sqrt(1 - spread**2))
    return rng.random(passes.shape) < passes


def choose(learner: MeasuredLearner, solved: np.ndarray, budget: int | None) -> tuple[int | None, int]:
    """The candidate chosen, and the (candidate, prompt) pairs that it took."""
    own_P, num_prompts, left = solved[-1], solved.shape[1], list(range(len(learner.gains_A)))
    used, pairs, signals = 0, 0, {}
    rounds = [(len(left), num_prompts)]
    if budget is not None:
        rounds = [(each.num_candidates, each.prompts_per_candidate) for each in halving_rounds(len(left), budget)]
    for keep, more in rounds:
        left = sorted(left, key=lambda a: -signals.get(a, (0.0, 0.0))[0])[:keep] if signals else left
        new = min(num_prompts, used + more)
        pairs, used = pairs + len(left) * (new - used), new
        net = {a: float(solved[a, :used].mean() - own_P[:used].mean()) for a in left}
        signals = {a: (max(0.0, net[a]) / learner.variances_A[a], net[a]) for a in left}
        left = sorted(left, key=lambda a: signals[a], reverse=True)
    best = max(left, key=lambda a: signals[a])
    return (best if signals[best][0] > 0 else None), pairs


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
    shares: list[float | None] = [None, 1 / 2, 1 / 3, 1 / 4, 1 / 6]
    regrets, costs = np.zeros((len(shares), len(learners))), np.zeros((len(shares), len(learners)))
    for place, learner in enumerate(learners):
        full = len(learner.gains_A) * options.prompts
        for _ in range(options.draws):
            solved = draw_passes(learner, options.prompts, options.spread, rng)
            for number, share in enumerate(shares):
                chosen, pairs = choose(learner, solved, None if share is None else int(full * share))
                regrets[number, place] += learner.regret(chosen) / options.draws
                costs[number, place] += pairs / full / options.draws
    picks = rng.integers(len(learners), size=(4000, len(learners)))
    rows = []
    print("| budget | pairs, share of all | regret | regret minus that of all pairs |\n|---|---|---|---|")
    for number, share in enumerate(shares):
        behind = regrets[number] - regrets[0]
        low, high = np.percentile(behind[picks].mean(axis=1), [2.5, 97.5])
        rows.append(
            {"budget": share, "pairs": costs[number].mean(), "regret": regrets[number].mean(), "behind": behind.mean()}
        )
        name = "all pairs" if share is None else f"{share:.2f} of them"
        print(
            f"| {name} | {costs[number].mean():.2f} | {regrets[number].mean():.4f} | "
            f"{behind.mean():.4f} [{low:.4f}, {high:.4f}] |"
        )
    print(f"{len(learners)} learners, {np.mean([len(one.gains_A) for one in learners]):.1f} candidates on average")
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
