"""The account of a real run: whatever was executed is in it once, and nothing else is.

The run: 4 steps of 2 updates, killed after step 3 and gone on with from step 2; a guide cache; a replay of steps 3 and
4; a scoring. Its figures are counted again here from the rollouts themselves.
"""

import json
from pathlib import Path

import pytest

from npo_cli.report.show import show_run
from npo_cli.storage.autonpo_log import append_transitions, open_probe
from npo_cli.storage.costs import compute_run_costs, cost_at
from npo_cli.storage.files import write_json_atomic
from npo_cli.storage.guide_cache import cache_info_path
from npo_cli.storage.layout import RunDir, open_run
from npo_cli.storage.metrics import append_sampling_time, sum_sampling_seconds
from npo_cli.storage.rollout_log import RolloutLog
from npo_cli.storage.sample_store import list_sample_stores
from npo_cli.training.train import train_run
from npo_cli.types.autonpo import AutoNPOState, Transition
from npo_cli.types.costs import RunCosts
from tests.helpers.runs import copy_run, resume, sample, score, stop_after, tiny_recipe
from tests.storage.builders import group


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
    journal = RolloutLog(run.rollouts_path(branch))
    return sum(
        len(rollout.response_ids)
        for step in steps
        for _, group in journal.iter_groups(step=step)
        for rollout in group.rollouts
        if rollout.source == "own"
    )


def seconds_written(root: Path) -> list[float]:
    """Every second that any timings.jsonl of the run tells of."""
    lines = [line for path in root.rglob("timings.jsonl") for line in path.read_text().splitlines()]
    return [json.loads(line)["seconds"] for line in lines]


def test_a_run_that_was_only_trained_has_spent_its_steps(trained):
    run = open_run(trained)
    found = compute_run_costs(run, "main")
    assert (found.branch, found.step, found.tokens) == ("main", 4, generated(run, "main", range(1, 5)))
    assert (found.probe_tokens, found.guide_tokens, found.abandoned_tokens) == (0, 0, 0)
    assert (found.num_interventions, found.num_rejections) == (0, 0)


def test_a_step_done_again_is_one_step_with_the_seconds_of_both_times(trained):
    run = open_run(trained)
    seconds = seconds_written(trained)
    # steps 1, 2, 3, then 3 again and 4: five lines of 4 steps, of 2 updates each
    assert (len(seconds), compute_run_costs(run, "main").updates) == (5, 8)
    assert compute_run_costs(run, "main").seconds == pytest.approx(sum(seconds))
    # without a fork the curve's ledger says the same
    spent = cost_at(run, "main", 4)
    assert (spent.tokens, spent.seconds) == (compute_run_costs(run, "main").tokens, pytest.approx(sum(seconds)))


def test_an_account_counts_everything_once_whichever_branch_looks(whole):
    run = open_run(whole)
    replayed, scouted = compute_run_costs(run, "near"), compute_run_costs(run, "main")
    asked = sum(json.loads(line)["num_tokens"] for line in (whole / "guides/near/asked.jsonl").read_text().splitlines())
    (scoring,) = list_sample_stores(run)
    scored = sum(len(row["response_ids"]) for row in scoring.samples.iter_rows())
    # 4 steps of main and 2 of the replay, of 2 updates each
    assert replayed.updates == scouted.updates == 12
    assert replayed.guide_tokens == scouted.guide_tokens == asked + scored > 0
    assert replayed.seconds == scouted.seconds == pytest.approx(sum(seconds_written(whole)))
    assert replayed.tokens == scouted.tokens
    # What main did after step 2 is abandoned for the replay, and the replay for main.
    first, second, third = (
        generated(run, branch, steps)
        for branch, steps in (("main", range(1, 3)), ("main", range(3, 5)), ("near", range(3, 5)))
    )
    assert (replayed.training_tokens, replayed.abandoned_tokens) == (first + third, second)
    assert (scouted.training_tokens, scouted.abandoned_tokens) == (first + second, third)
    assert (replayed.branch, replayed.step) == ("near", 4)


def test_guides_and_scorings_keep_a_clock_and_count_the_tokens_they_drew(whole):
    run = open_run(whole)
    for folder in (run.guide_folder("near"), list_sample_stores(run)[0].folder):
        assert sum_sampling_seconds(folder) > 0
    drawn = [json.loads(line)["num_tokens"] for line in (whole / "guides/near/timings.jsonl").read_text().splitlines()]
    assert sum(drawn) == json.loads(cache_info_path(run.guide_folder("near")).read_text())["num_tokens"]
    (path,) = (whole / "scores").glob("*/timings.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    scored = sum(len(row["response_ids"]) for row in list_sample_stores(run)[0].samples.iter_rows())
    assert sum(line["num_tokens"] for line in lines) == scored
    # Looks of the learner, its control and the candidate; then both seen by the learner, which generates nothing.
    assert [line["num_tokens"] > 0 for line in lines] == [True, True, True, False, False]


def test_an_unfinished_cache_has_spent_what_it_asked_so_far(whole, tmp_path):
    run = open_run(copy_run(whole, tmp_path / "run"))
    before = compute_run_costs(run, "main").guide_tokens
    path = cache_info_path(run.guide_folder("near"))
    write_json_atomic(path, json.loads(path.read_text()) | {"complete": False, "num_tokens": 0})
    assert compute_run_costs(run, "main").guide_tokens == before


def moved(run: RunDir, event: str, **evidence: object) -> None:
    state = AutoNPOState(branch="near", step=4)
    append_transitions(run, [Transition(step=4, event=event, phase_before="PROBE", state=state, evidence=evidence)])


def test_probes_and_the_moves_of_autonpo_are_counted(whole, tmp_path):
    run = open_run(copy_run(whole, tmp_path / "run"))
    before = compute_run_costs(run, "near")
    for step in (2, 4):
        probe = open_probe(run, "main", step, settings={"k": 2})
        # two answers of two tokens
        probe.rollouts.write_step(0, [group("p0")])
        append_sampling_time(probe.folder, 0.25, num_tokens=4)
    for event in ("trigger", "rejected", "trigger", "accepted", "guided", "rolled_back"):
        moved(run, event)
    moved(run, "rolled_back", is_early=True)
    after = compute_run_costs(run, "near")
    assert (after.probe_tokens, after.tokens - before.tokens) == (8, 8)
    assert after.seconds == pytest.approx(before.seconds + 0.5)
    # The early bootstrap is no intervention.
    assert (after.num_interventions, after.num_rejections) == (1, 1)


def test_costs_end_with_the_account_of_the_branch_or_of_the_newest(whole):
    asked = {"step": None, "prompt_id": None, "limit": None}
    newest = show_run(whole, "costs", branch=None, **asked)
    assert [line for line in newest if isinstance(line, RunCosts)] == [newest[-1]]
    assert newest[-1] == compute_run_costs(open_run(whole), "near")
    assert show_run(whole, "costs", branch="main", **asked)[-1] == compute_run_costs(open_run(whole), "main")
