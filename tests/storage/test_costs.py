"""Costs of branches, on a run written by hand: round numbers of steps, tokens and seconds.

main: 6 steps of 100 tokens and 4 s. `near` left it at step 2 with a guide from step 5 (70 tokens and 5 s of samples,
after a scoring of 30 tokens and 3 s) and did 3 steps of 10 tokens and 2 s. `bare` left main at step 4 without a guide:
2 steps of 1 token that took no time.
"""

import json
from dataclasses import replace

import pytest

from npo_cli.errors import NpoError
from npo_cli.report.tables_autonpo import account_tables
from npo_cli.storage.cost_sums import (
    Cost,
    best_held_cost_to_threshold,
    best_held_curve,
    compute_run_costs,
    cost_at,
    cost_at_steps,
    cost_to_threshold,
    learning_curve,
)
from npo_cli.storage.costs import CostLine, append_cost, append_fork_cost, costs_path, encode_cost, read_cost_lines
from npo_cli.storage.evals import append_eval
from npo_cli.storage.guide_cache import finish_guide_cache, open_guide_cache
from npo_cli.storage.jsonl import JsonlLog
from npo_cli.storage.layout import RunDir
from npo_cli.storage.lineage import append_segment
from npo_cli.storage.log_head import rewrite_head
from npo_cli.storage.sample_store import open_sample_store, save_scores
from npo_cli.types.costs import BestHeldPoint, CurvePoint
from npo_cli.types.rollouts import Segment
from tests.storage.builders import RECIPE, evaluation, guide_info, guide_samples, new_run


def train_steps(run: RunDir, branch: str, steps: range, *, tokens: int, seconds: float = 0.0) -> None:
    for step in steps:
        JsonlLog(run.metrics_path(branch)).append(
            {"step": step, "branch": branch, "tokens": tokens, "entropy": step / 10}
        )
        charge_step(run, branch, step, tokens=tokens, seconds=seconds)


def charge_step(run: RunDir, branch: str, step: int, *, tokens: int, seconds: float) -> None:
    line = CostLine(kind="train", branch=branch, step=step, updates=1, tokens=tokens, forwards=tokens, seconds=seconds)
    JsonlLog(costs_path(run)).append(encode_cost(line))


def fork_branch(run: RunDir, branch: str, *, at: int, guide: str | None = None, parent: str = "main") -> None:
    run.save_recipe(branch, RECIPE)
    segment = Segment(branch=branch, parent=parent, fork_step=at, guide_cache=guide, guide_until=5)
    append_fork_cost(run, segment)
    append_segment(run, segment)


def score_learner(run: RunDir, step: int, *, candidates: list[int], tokens: int, seconds: float) -> None:
    """A finished scoring for the learner main:step, in two pieces."""
    store = open_sample_store(run.scores_folder, "main", step, checkpoints=candidates, settings={"k": 1})
    place = {"branch": "main", "step": step, "artifact": store.folder}
    append_cost(run, "score", piece="5:a", tokens=tokens, seconds=seconds - 1, **place)
    append_cost(run, "score", piece="5:logprobs", seconds=1.0, **place)
    save_scores(store, [])


@pytest.fixture
def run(tmp_path) -> RunDir:
    run = new_run(tmp_path)
    train_steps(run, "main", range(1, 7), tokens=100, seconds=4.0)
    score_learner(run, 2, candidates=[5], tokens=30, seconds=3.0)
    # The scoring of another learner is not charged to `near`.
    score_learner(run, 1, candidates=[5], tokens=999, seconds=999.0)
    info = guide_info(run, name="near", learner_step=2, guide_step=5, num_steps=3)
    store = open_guide_cache(run, info)
    store.append("checkpoint:5", [replace(guide_samples(name, num_correct=0), num_tokens=35) for name in ("a", "b")])
    append_cost(
        run, "guide_cache", branch="main", step=2, artifact=run.guide_folder("near"), piece="a", tokens=70, seconds=5.0
    )
    finish_guide_cache(run, info)
    fork_branch(run, "near", at=2, guide="near")
    train_steps(run, "near", range(3, 6), tokens=10, seconds=2.0)
    fork_branch(run, "bare", at=4)
    train_steps(run, "bare", range(5, 7), tokens=1)
    return run


def cost(steps: int, tokens: int, seconds: float) -> Cost:
    """One update per step and one forward pass per token."""
    return Cost(steps=steps, tokens=tokens, seconds=seconds, forwards=tokens, updates=steps)


def test_cost_of_the_first_branch_is_its_own_steps(run):
    assert [cost_at(run, "main", step) for step in (0, 4, 6)] == [cost(0, 0, 0), cost(4, 400, 16), cost(6, 600, 24)]


def test_cost_of_a_replay_includes_the_trained_guide_scoring_and_cache(run):
    # to the guide: 5 steps, 500 tokens, 20 s; scoring 30 and 3 s; cache 70 and 5 s; then 10 and 2 s per step
    assert cost_at(run, "near", 3) == cost(6, 610, 30)
    assert cost_at(run, "near", 5) == cost(8, 630, 34)
    # At and before the fork it is its parent's.
    assert cost_at(run, "near", 2) == cost(2, 200, 8)
    assert cost_at_steps(run, "near")[2] == [cost(2, 200, 8), cost(5, 600, 28)]


def test_costs_of_a_long_line_of_forks_are_summed_once_per_branch(run):
    # Summed again by each fork, the first of 40 would be summed 2^40 times.
    for number in range(40):
        parent = f"fork-{number - 1}" if number else "bare"
        fork_branch(run, f"fork-{number}", at=6 + number, parent=parent)
        charge_step(run, f"fork-{number}", 7 + number, tokens=1, seconds=1.0)
    assert cost_at(run, "fork-39", 46) == cost(46, 442, 56)


def test_cost_of_a_step_executed_again_after_a_kill_has_the_seconds_of_both(run):
    charge_step(run, "main", 2, tokens=100, seconds=16.0)
    # 4 x 4 s and the second execution of step 2; its tokens count once
    assert cost_at(run, "main", 4) == cost(4, 400, 32)
    assert cost_at(run, "main", 1) == cost(1, 100, 4)


def test_cost_of_a_sampled_piece_executed_again_counts_its_tokens_once(run):
    again = {"branch": "main", "step": 2, "artifact": run.guide_folder("near"), "piece": "a"}
    append_cost(run, "guide_cache", tokens=70, seconds=1.0, **again)
    assert cost_at(run, "near", 3) == cost(6, 610, 31)


def test_cost_of_a_scoring_after_the_fork_is_not_charged_whatever_the_clock_says(run):
    score_learner(run, 2, candidates=[6], tokens=999, seconds=999.0)
    assert cost_at(run, "near", 3) == cost(6, 610, 30)


def test_cost_of_scored_candidates_includes_their_training(run):
    score_learner(run, 2, candidates=[5, 6], tokens=0, seconds=1.0)
    fork_branch(run, "later", at=2, guide="near")
    train_steps(run, "later", range(3, 4), tokens=10, seconds=2.0)
    # main up to step 6: one step, 100 tokens and 4 s more; the second scoring 1 s
    assert cost_at(run, "later", 3) == cost(7, 710, 35)


def test_cost_of_a_fork_without_a_guide_is_the_parents_at_the_fork(run):
    assert cost_at(run, "bare", 6) == cost(6, 402, 16)
    assert cost_at_steps(run, "bare")[4] == [cost(4, 400, 16), cost(4, 400, 16)]


def test_cost_of_a_fork_of_a_replay_includes_the_whole_line(run):
    fork_branch(run, "third", at=4, parent="near")
    train_steps(run, "third", range(5, 6), tokens=3, seconds=0.5)
    # near up to 4: 5 + 2 steps, 600 + 20 tokens, 28 + 4 s
    assert cost_at(run, "third", 5) == cost(8, 623, 32.5)


def test_cost_of_a_fork_that_was_charged_and_never_made_is_replaced(run):
    append_fork_cost(run, Segment(branch="late", parent="main", fork_step=2, guide_cache="near", guide_until=5))
    fork_branch(run, "late", at=4)
    assert cost_at_steps(run, "late")[4] == [cost(4, 400, 16), cost(4, 400, 16)]


def charge_probe(run: RunDir, branch: str, step: int, *, seconds: float) -> None:
    folder = run.root / "probes" / f"{branch}_{step}"
    append_cost(run, "probe", branch=branch, step=step, artifact=folder, piece="0", tokens=4, seconds=seconds)


def test_cost_of_a_probe_is_paid_by_the_probed_branch_from_that_step_on(run):
    charge_probe(run, "main", 5, seconds=6.0)
    assert cost_at(run, "main", 4) == cost(4, 400, 16)
    assert cost_at(run, "main", 5) == cost(5, 504, 26)
    assert cost_at(run, "main", 6) == cost(6, 604, 30)
    # bare left main at step 4, before the probe
    assert cost_at(run, "bare", 6) == cost(6, 402, 16)


def test_cost_of_a_replay_includes_the_probe_of_its_guide_and_its_own(run):
    # the guide is main at step 5
    charge_probe(run, "main", 5, seconds=6.0)
    assert cost_at(run, "near", 3) == cost(6, 614, 36)
    charge_probe(run, "near", 4, seconds=1.0)
    assert cost_at(run, "near", 3) == cost(6, 614, 36)
    assert cost_at(run, "near", 5) == cost(8, 638, 41)


def charge_test(run: RunDir, branch: str, step: int, *, reverts: bool) -> None:
    charged = (run.branch_folder("near"), run.guide_folder("near")) if reverts else ()
    folder = run.branch_folder("near") / "acceptance_test"
    place = {"branch": branch, "step": step, "artifact": folder, "charged": charged}
    append_cost(run, "acceptance_test", tokens=40, seconds=0.5, **place)


def test_cost_of_a_reverted_replay_is_paid_by_the_branch_that_goes_on(run):
    charge_test(run, "main", 5, reverts=True)
    assert cost_at(run, "main", 5) == cost(5, 500, 20)
    # from there on: near's 3 steps of 10 tokens and 2 s, its cache's 70 tokens and 5 s, the test; then step 6 itself
    assert cost_at(run, "main", 6) == cost(9, 740, 35.5)
    # the replay itself is charged as before
    assert cost_at(run, "near", 5) == cost(8, 630, 34)


def test_cost_of_an_acceptance_test_is_paid_by_a_replay_that_is_kept(run):
    before = cost_at(run, "near", 4), cost_at(run, "near", 5)
    charge_test(run, "near", 4, reverts=False)
    assert cost_at(run, "near", 4) == before[0]
    assert cost_at(run, "near", 5) == before[1] + Cost(steps=0, tokens=40, seconds=0.5, forwards=40)


@pytest.mark.parametrize("damage", [{"tokens": -1}, {"seconds": "4"}, {"step": True}, {"kind": 3}])
def test_cost_line_with_an_impossible_value_is_damage_and_its_line_is_named(run, damage):
    lines = costs_path(run).read_text().splitlines()
    lines[2] = json.dumps(json.loads(lines[2]) | damage)
    costs_path(run).write_text("\n".join(lines) + "\n")
    rewrite_head(costs_path(run))
    with pytest.raises(NpoError, match="line 3"):
        list(read_cost_lines(run))


def points(run: RunDir, branch: str) -> list[tuple[int, int, int, float, float, float | None]]:
    return [
        (each.step, each.total_steps, each.total_tokens, each.total_seconds, each.accuracy, each.entropy)
        for each in learning_curve(run, branch, name="x")
    ]


def test_learning_curve_follows_the_line_of_descent(run):
    for branch, step, accuracy in (("main", 0, 0.1), ("main", 2, 0.2), ("main", 4, 0.3), ("near", 4, 0.9)):
        append_eval(run, evaluation(step, branch=branch, accuracy=accuracy))
    assert points(run, "main") == [(0, 0, 0, 0, 0.1, None), (2, 2, 200, 8, 0.2, 0.2), (4, 4, 400, 16, 0.3, 0.4)]
    # Twice at the fork: as it was, and with guide and scoring paid and nothing learned yet.
    assert points(run, "near") == [
        (0, 0, 0, 0, 0.1, None),
        (2, 2, 200, 8, 0.2, 0.2),
        (2, 5, 600, 28, 0.2, 0.2),
        (4, 7, 620, 32, 0.9, 0.4),
    ]


def test_learning_curve_quotes_the_evaluation_with_most_samples(run):
    append_eval(run, evaluation(4, accuracy=0.25, num_samples=8))
    append_eval(run, evaluation(4, accuracy=0.75, num_samples=2))
    assert [accuracy for *_, accuracy, _ in points(run, "main")] == [0.25]


def curve(*accuracies: float) -> list[CurvePoint]:
    return [
        CurvePoint(
            name="x",
            step=10 * place,
            total_steps=20 * place,
            total_tokens=place,
            total_seconds=1.5 * place,
            accuracy=accuracy,
        )
        for place, accuracy in enumerate(accuracies)
    ]


def test_cost_to_threshold_uses_the_mean_of_three_evaluations():
    # means: 0.05, 0.3, 0.3, 0.5, 0.6
    found = cost_to_threshold(curve(0.0, 0.1, 0.8, 0.0, 0.7), 0.3)
    assert (found.step, found.total_steps, found.total_tokens, found.total_seconds) == (10, 20, 1, 1.5)
    # 0.8 at step 20 alone is luck: (0.1 + 0.8 + 0.0) / 3
    assert cost_to_threshold(curve(0.0, 0.1, 0.8, 0.0, 0.0), 0.4).step is None


def test_cost_to_threshold_never_reached_is_censored():
    found = cost_to_threshold(curve(0.1, 0.2), 0.5)
    assert (found.name, found.step) == ("x", None)
    assert (found.total_steps, found.total_tokens, found.total_seconds) == (None, None, None)
    assert cost_to_threshold(curve(0.4, 0.6), 0.5).step == 0
    assert cost_to_threshold([], 0.5).step is None


def make_cache(run: RunDir, name: str, *, tokens: int, seconds: float, found: bool = False) -> None:
    """A complete cache of step 6 of main for the learner main:2."""
    info = guide_info(run, name=name, learner_step=2, guide_step=6, num_steps=3)
    samples = replace(guide_samples("a", num_correct=int(found)), num_tokens=tokens)
    open_guide_cache(run, info).append("checkpoint:6", [samples])
    place = {"branch": "main", "step": 2, "artifact": run.guide_folder(name), "piece": "a"}
    append_cost(run, "guide_cache", tokens=tokens, seconds=seconds, **place)
    finish_guide_cache(run, info)


def test_cost_of_a_cache_that_found_nothing_is_paid_by_the_next_replay_of_its_learner(run):
    make_cache(run, "vain", tokens=7, seconds=1.5)
    assert compute_run_costs(run, "near").unused_guides == ("vain",)
    fork_branch(run, "later", at=2, guide="near")
    train_steps(run, "later", range(3, 4), tokens=10, seconds=2.0)
    # as near at step 3 (6 steps, 610 tokens, 30 s), and step 6 of main, the guide of the vain cache: 100, 4 s; 7, 1.5 s
    assert cost_at(run, "later", 3) == cost(7, 717, 35.5)
    assert cost_at(run, "near", 3) == cost(6, 610, 30)
    assert cost_at(run, "main", 6) == cost(6, 600, 24)
    assert compute_run_costs(run, "near").unused_guides == ()


def test_cost_of_a_cache_that_autonpo_found_nothing_for_is_paid_by_the_branch_that_goes_on(run):
    make_cache(run, "vain", tokens=7, seconds=1.5)
    append_cost(run, "guide_empty", branch="main", step=5, seconds=0, charged=[run.guide_folder("vain")])
    assert cost_at(run, "main", 5) == cost(5, 500, 20)
    assert cost_at(run, "main", 6) == cost(6, 607, 25.5)
    # It is paid once: a later replay of the same learner is not charged again.
    fork_branch(run, "later", at=2, guide="near")
    train_steps(run, "later", range(3, 4), tokens=10, seconds=2.0)
    assert cost_at(run, "later", 3) == cost(6, 610, 30)
    assert compute_run_costs(run, "main").unused_guides == ()


def test_cost_of_an_unused_cache_is_charged_to_no_branch_and_named(run):
    make_cache(run, "spare", tokens=9, seconds=2.5, found=True)
    costs = compute_run_costs(run, "near")
    assert (costs.unused_guides, costs.unused_guide_tokens) == (("spare",), 9)
    # 70 of near's cache, 30 and 999 of the scorings
    assert costs.guide_tokens == 70 + 9 + 30 + 999
    (table,) = account_tables([costs])
    assert ("unused guide caches", "spare") in table.rows


def test_cost_of_saving_loading_and_starting_is_wall_time_of_the_branch(run):
    before = {step: cost_at(run, "main", step).seconds for step in (0, 1, 4, 5, 6)}
    append_cost(run, "start", branch="main", step=0, seconds=3.0)
    append_cost(run, "save", branch="main", step=0, seconds=0.5)
    append_cost(run, "save", branch="main", step=4, seconds=0.25)
    append_cost(run, "load", branch="main", step=5, seconds=2.0)
    found = {step: cost_at(run, "main", step).seconds - seconds for step, seconds in before.items()}
    # The start and the save of step 0 are paid from step 1 on, a save from its step on, loading from the next step on.
    assert found == {0: 0.0, 1: 3.5, 4: 3.75, 5: 3.75, 6: 5.75}
    assert cost_at(run, "main", 6).tokens == 600
    # The guide of near is step 5 of main: 3.75 s; its own start 1 s, and 2 s to load the guide for its cache.
    append_cost(run, "start", branch="near", step=2, seconds=1.0)
    append_cost(run, "load", branch="main", step=2, artifact=run.guide_folder("near"), seconds=2.0)
    assert cost_at(run, "near", 3) == cost(6, 610, 30 + 3.75 + 1 + 2)
    assert cost_at(run, "main", 6).seconds == before[6] + 5.75
    # 24 s of main, 6 of near, 5 of its cache, 3 and 999 of the scorings, and everything above
    assert compute_run_costs(run, "near").seconds == 24 + 6 + 5 + 3 + 999 + 5.75 + 3


def test_best_held_curve_credits_a_replay_with_the_scout_that_it_pays_for(run):
    for branch, step, accuracy in (("main", 0, 0.0), ("main", 2, 0.3), ("main", 4, 0.6), ("main", 5, 0.9)):
        append_eval(run, evaluation(step, branch=branch, accuracy=accuracy))
    append_eval(run, evaluation(3, branch="near", accuracy=0.6))
    append_eval(run, evaluation(5, branch="near", accuracy=0.9))
    held = [
        (point.policy_branch, point.step, point.total_steps, point.total_tokens, point.accuracy)
        for point in best_held_curve_of(run, "near")
    ]
    # main: (0 + .3)/2, (0 + .3 + .6)/3, (.3 + .6 + .9)/3, (.6 + .9)/2 at its own costs; near at step 5, .75 too, is no
    # better than the scout's last step; near:2 has (0 + .3 + .6)/3 as main has.
    assert held == [
        ("main", 0, 0, 0, pytest.approx(0.15)),
        ("main", 2, 2, 200, pytest.approx(0.3)),
        ("main", 4, 4, 400, pytest.approx(0.6)),
        ("main", 5, 5, 500, pytest.approx(0.75)),
    ]
    # Its own line reaches .59 at step 3, for 6 steps and 610 tokens; the scout had it for 4 and 400.
    own = cost_to_threshold(learning_curve(run, "near", name="x"), 0.59)
    best = best_held_cost_to_threshold(best_held_curve_of(run, "near"), 0.59)
    assert (own.step, own.total_steps, own.total_tokens) == (3, 6, 610)
    assert (best.step, best.total_steps, best.total_tokens, best.is_best_held) == (4, 4, 400, True)
    # Without a guide there is nothing to credit.
    assert best_held_curve_of(run, "main") == best_held_curve_of(run, "bare") == []


def test_best_held_curve_has_a_reverted_replay_once_it_is_paid(run):
    for step, accuracy in ((0, 0.1), (2, 0.1), (6, 0.2)):
        append_eval(run, evaluation(step, accuracy=accuracy))
    for step, accuracy in ((3, 0.1), (4, 0.5), (5, 0.8)):
        append_eval(run, evaluation(step, branch="near", accuracy=accuracy))
    assert best_held_curve_of(run, "main") == []
    charge_test(run, "main", 5, reverts=True)
    # main: .1, (.1 + .1 + .2)/3; near from step 3 on: (.1 + .1 + .5)/3, (.1 + .5 + .8)/3, (.5 + .8)/2
    held = [(point.policy_branch, point.total_steps, point.accuracy) for point in best_held_curve_of(run, "main")]
    assert held == [
        ("main", 0, pytest.approx(0.1)),
        ("main", 2, pytest.approx(0.4 / 3)),
        ("near", 6, pytest.approx(0.7 / 3)),
        ("near", 7, pytest.approx(1.4 / 3)),
        ("near", 8, pytest.approx(0.65)),
    ]


def best_held_curve_of(run: RunDir, branch: str) -> list[BestHeldPoint]:
    return best_held_curve(run, branch, name="x")
