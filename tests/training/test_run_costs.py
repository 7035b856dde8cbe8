"""Costs of a real run: whatever was executed is counted once, and nothing else is.

The run: 4 steps of 2 updates, killed after step 3 and resumed from step 2; a guide cache; a replay of steps 3 and
4; a scoring. Its figures are counted again here from the rollouts themselves.
"""

import json
from collections import Counter
from pathlib import Path

import pytest

from npo_cli.report.show import show_run
from npo_cli.storage.autonpo_log import append_transitions
from npo_cli.storage.cost_sums import compute_run_costs, cost_at, costs_by_activity, read_cost_table
from npo_cli.storage.costs import append_cost, read_cost_lines
from npo_cli.storage.guide_cache import cache_info_path
from npo_cli.storage.layout import RunDir, open_run
from npo_cli.storage.rollout_log import RolloutLog
from npo_cli.storage.sample_store import SampleStore, list_sample_stores
from npo_cli.training.train import train_run
from npo_cli.types.autonpo import AutoNPOState, Transition
from npo_cli.types.costs import ActivityCost, RunCosts
from tests.helpers.runs import copy_run, resume, sample, score, stop_after, tiny_recipe


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("trained") / "run"
    stop_after(train_run(root, tiny_recipe("train.num_updates=2")), 3)
    resume(root)
    return root


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory) -> Path:
    """Everything by hand that AutoNPO does by itself."""
    root = copy_run(trained, tmp_path_factory.mktemp("whole") / "run")
    sample(root)
    resume(root, at=2, guide="near")
    score(root, "scoring.samples_per_prompt=2", "scoring.bootstrap_resamples=50", "guide.inject.max_accuracy=1.0", at=2)
    return root


def generated(run: RunDir, branch: str, steps: range) -> int:
    """Own tokens in the rollouts themselves; a guide's answer was paid for elsewhere."""
    log = RolloutLog(run.rollouts_path(branch))
    return sum(
        len(rollout.response_ids)
        for step in steps
        for _, group in log.iter_groups(step=step)
        for rollout in group.rollouts
        if rollout.source == "own"
    )


def seconds_charged(root: Path) -> list[float]:
    """Seconds of every line but those of evaluation."""
    return [line.seconds for line in read_cost_lines(open_run(root)) if line.kind not in ("evaluate", "fork")]


def test_run_costs_of_plain_training_are_its_steps(trained):
    run = open_run(trained)
    found = compute_run_costs(run, "main")
    assert (found.branch, found.step, found.tokens) == ("main", 4, generated(run, "main", range(1, 5)))
    assert (found.probe_tokens, found.guide_tokens, found.abandoned_tokens) == (0, 0, 0)
    assert (found.num_interventions, found.num_rejections) == (0, 0)


def test_run_costs_of_a_step_done_again_have_the_seconds_of_both(trained):
    run = open_run(trained)
    seconds = seconds_charged(trained)
    kinds = Counter(line.kind for line in read_cost_lines(run))
    # steps 1, 2, 3, then 3 again and 4: five lines of 4 steps, of 2 updates each
    assert (kinds["train"], compute_run_costs(run, "main").updates) == (5, 8)
    # saved: steps 0, 2 and 4; two commands loaded the model and started an engine
    assert (kinds["save"], kinds["load"], kinds["start"]) == (3, 2, 2)
    assert compute_run_costs(run, "main").seconds == pytest.approx(sum(seconds))
    # without a fork the cost of the branch is the same
    spent = cost_at(run, "main", 4)
    assert (spent.tokens, spent.seconds) == (compute_run_costs(run, "main").tokens, pytest.approx(sum(seconds)))


def test_run_costs_count_everything_once_whichever_branch_is_asked(whole):
    run = open_run(whole)
    replayed, scouted = compute_run_costs(run, "near"), compute_run_costs(run, "main")
    sampled = SampleStore(whole / "guides/near").count_tokens()
    (scoring,) = list_sample_stores(run.scores_folder)
    scored = scoring.count_tokens()
    # 4 steps of main and 2 of the replay, of 2 updates each
    assert replayed.updates == scouted.updates == 12
    assert replayed.guide_tokens == scouted.guide_tokens == sampled + scored > 0
    assert replayed.seconds == scouted.seconds == pytest.approx(sum(seconds_charged(whole)))
    assert replayed.tokens == scouted.tokens
    # What main did after step 2 is abandoned for the replay, and the replay for main.
    first, second, third = (
        generated(run, branch, steps)
        for branch, steps in (("main", range(1, 3)), ("main", range(3, 5)), ("near", range(3, 5)))
    )
    assert (replayed.training_tokens, replayed.abandoned_tokens) == (first + third, second)
    assert (scouted.training_tokens, scouted.abandoned_tokens) == (first + second, third)
    assert (replayed.branch, replayed.step) == ("near", 4)


def test_run_costs_of_cache_and_scoring_are_the_tokens_they_sampled(whole):
    run = open_run(whole)
    table = read_cost_table(run)
    (scoring,) = list_sample_stores(run.scores_folder)
    cache = json.loads(cache_info_path(run.guide_folder("near")).read_text())
    assert table.artifacts["guides/near"].tokens == cache["num_tokens"]
    scored = scoring.count_tokens()
    assert table.artifacts[f"scores/{scoring.folder.name}"].tokens == scored
    # What the two commands loaded and started before they sampled is charged to what they made.
    loaded = [line.artifact for line in read_cost_lines(run) if line.kind == "load" and line.artifact]
    assert loaded == ["guides/near", f"scores/{scoring.folder.name}"]
    assert table.kinds["score"].seconds > 0 < table.kinds["guide_cache"].seconds


def record_move(run: RunDir, event: str, **evidence: object) -> None:
    state = AutoNPOState(branch="near", step=4, phase="COOLDOWN")
    append_transitions(run, [Transition(step=4, event=event, phase_before="PROBE", state=state, evidence=evidence)])


def test_run_costs_count_probes_and_decisions_of_autonpo(whole, tmp_path):
    run = open_run(copy_run(whole, tmp_path / "run"))
    before = compute_run_costs(run, "near")
    for step in (2, 4):
        append_cost(run, "probe", branch="main", step=step, piece="0", tokens=4, seconds=0.25)
    for event in ("trigger", "probe_rejected", "trigger", "probe_accepted", "guide_built", "rolled_back"):
        record_move(run, event)
    record_move(run, "rolled_back", is_early=True)
    after = compute_run_costs(run, "near")
    assert (after.probe_tokens, after.tokens - before.tokens) == (8, 8)
    assert after.seconds == pytest.approx(before.seconds + 0.5)
    # The early bootstrap is no intervention.
    assert (after.num_interventions, after.num_rejections) == (1, 1)


def test_show_costs_ends_with_the_costs_of_the_branch_or_of_main(whole):
    options = {"step": None, "prompt_id": None, "limit": None}
    shown = show_run(whole, "costs", branch=None, **options)
    assert [line for line in shown if isinstance(line, RunCosts)] == [shown[-1]]
    assert shown[-1] == compute_run_costs(open_run(whole), "main")
    assert show_run(whole, "costs", branch="near", **options)[-1] == compute_run_costs(open_run(whole), "near")


def activities(root: Path, branch: str) -> dict[str, ActivityCost]:
    return {line.activity: line for line in costs_by_activity(open_run(root), branch)}


def test_costs_by_activity_add_up_to_the_run_costs(whole, watched):
    for root, branch in ((whole, "near"), (whole, "main"), (watched, "auto-2")):
        total, costs = activities(root, branch)["total"], compute_run_costs(open_run(root), branch)
        assert (total.tokens, total.seconds) == (costs.tokens, pytest.approx(costs.seconds))


def test_costs_by_activity_tell_training_of_the_guide_from_abandoned_training(whole):
    seen = activities(whole, "near")
    assert seen["training, line of near"].steps == 4
    assert seen["training of the guide, rolled back"].steps == 2
    assert seen["training, abandoned"].steps == 0
    # From main its own steps are kept, and the replay is abandoned.
    other = activities(whole, "main")
    assert other["training, line of main"].steps == 4
    assert other["training of the guide, rolled back"].steps == 0
    assert other["training, abandoned"].steps == 2


def test_costs_by_activity_have_autonpo_probes(watched):
    seen = activities(watched, "auto-2")
    assert seen["probes"].tokens == compute_run_costs(open_run(watched), "auto-2").probe_tokens > 0
    # Triggers at step 6 (D* = 2) and 8 (D* = 4): what was undone guided what replaced it.
    assert seen["training, line of auto-2"].steps == 12
    assert seen["training of the guide, rolled back"].steps > 0
