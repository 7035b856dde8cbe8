"""Hysteresis of the replays in run directories: each against the branch that it replays, mean over the runs."""

from collections.abc import Sequence

from npo_cli.scoring.hysteresis import SeedHysteresis, estimate_hysteresis, seed_hysteresis
from npo_cli.storage.cost_sums import choose_thresholds, find_arrivals, learning_curve
from npo_cli.storage.layout import RunDir
from npo_cli.storage.lineage import find_first_segment, find_last_guided_fork, list_result_branches
from npo_cli.types.comparison import MethodHysteresis


def replay_hysteresis(runs: Sequence[RunDir]) -> list[MethodHysteresis]:
    """H(a) to the highest threshold for each lower a, by recipe and branch; a run is a seed."""
    curves = [learning_curve(run, name, name=name) for run in runs for name in list_result_branches(run)]
    *levels, target = choose_thresholds(curves) or (1.0,)
    by_replay: dict[tuple[str, str, str, float], list[SeedHysteresis | None]] = {}
    for run in runs:
        for branch in list_result_branches(run):
            fork_step, unguided = find_last_guided_fork(run, branch), find_unguided_branch(run, branch)
            replayed, main = (learning_curve(run, name, name=name) for name in (branch, unguided))
            if fork_step is None or not replayed or not main:
                continue
            recipe = str(run.read_recipe(branch).get("name", "-"))
            for level in levels:
                sides = (find_arrivals(points, level, target) for points in (main, replayed))
                found = seed_hysteresis(*sides, fork_step=fork_step)
                by_replay.setdefault((recipe, branch, unguided, level), []).append(found)
    estimates = {key: estimate_hysteresis(found) for key, found in by_replay.items()}
    return [
        MethodHysteresis(
            method=branch if len(runs) == 1 else f"{recipe}:{branch}",
            baseline=unguided,
            accuracy=level,
            target=target,
            steps=found[0],
            bound=found[1],
        )
        for (recipe, branch, unguided, level), found in estimates.items()
        if found is not None
    ]


def find_unguided_branch(run: RunDir, branch: str) -> str:
    """The nearest ancestor, or the branch itself, without a guide on its line of descent."""
    while find_last_guided_fork(run, branch) is not None:
        parent = find_first_segment(run, branch).parent
        assert parent is not None, "a first branch has no guide"
        branch = parent
    return branch
