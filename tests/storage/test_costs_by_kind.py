"""The account told apart by kind of work, of a real run: the sums are those of the account."""

from pathlib import Path

import pytest

from npo_cli.storage.costs import compute_run_costs, cost_lines
from npo_cli.storage.layout import open_run
from npo_cli.storage.sample_store import list_sample_stores
from npo_cli.types.costs import ActivityCost
from tests.helpers.runs import copy_run, resume, score


@pytest.fixture(scope="module")
def whole(scout, tmp_path_factory) -> Path:
    """4 steps on main, a guide of step 4 for step 2, steps 3 and 4 again as `near`, and a scoring."""
    root = copy_run(scout, tmp_path_factory.mktemp("whole") / "run")
    resume(root, at=2, guide="near")
    score(root, "scoring.samples_per_prompt=2", "scoring.bootstrap_resamples=50", "guide.inject.max_accuracy=1.0", at=2)
    return root


def lines_of(root: Path, branch: str) -> dict[str, ActivityCost]:
    return {line.activity: line for line in cost_lines(open_run(root), branch)}


def test_the_sum_is_the_account(whole, watched):
    for root, branch in ((whole, "near"), (whole, "main"), (watched, "auto-2")):
        total, whole_account = lines_of(root, branch)["all of it"], compute_run_costs(open_run(root), branch)
        assert total.tokens == whole_account.tokens
        assert total.steps == whole_account.updates
        assert total.seconds == pytest.approx(whole_account.seconds)


def test_a_step_that_guided_what_is_kept_is_a_scout(whole):
    seen = lines_of(whole, "near")
    assert seen["training, on the line of near"].steps == 4
    assert seen["scouting: rolled back, and guided what is kept"].steps == 2
    assert seen["training, abandoned"].steps == 0
    # Seen from main, its own steps are kept and the replay is what was left.
    other = lines_of(whole, "main")
    assert other["training, on the line of main"].steps == 4
    assert other["scouting: rolled back, and guided what is kept"].steps == 0
    assert other["training, abandoned"].steps == 2


def test_scoring_and_guides_are_told_apart(whole):
    run, seen = open_run(whole), lines_of(whole, "near")
    (scoring,) = list_sample_stores(run)
    scored = sum(len(row["response_ids"]) for row in scoring.samples.iter_rows())
    assert seen["scoring of candidates"].tokens == scored > 0
    assert seen["guides' samples"].tokens == compute_run_costs(run, "near").guide_tokens - scored > 0


def test_what_autonpo_asked_is_there(watched):
    seen = lines_of(watched, "auto-2")
    assert seen["probes of mistakes"].tokens == compute_run_costs(open_run(watched), "auto-2").probe_tokens > 0
    # Triggers at step 6 (D* = 2) and 8 (D* = 4): what was undone guided what came instead.
    assert seen["training, on the line of auto-2"].steps == 12
    assert seen["scouting: rolled back, and guided what is kept"].steps > 0
