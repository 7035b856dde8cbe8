"""AutoNPO tries extrapolated guides first: a branch that goes on from here, then a look at whether the reward moved."""

import random

import pytest

from npo_cli.errors import NpoError
from npo_cli.report.tables_autonpo import describe_evidence, describe_transition
from npo_cli.storage.layout import open_run
from npo_cli.storage.lineage import read_segments
from npo_cli.storage.metrics import read_metrics
from tests.autonpo.test_kill_resume import Matrix
from tests.helpers.autonpo_runs import (
    check_equal_except_main,
    deterministic_digests,
    eager_recipe,
    events_of,
    find_transition,
    groups_of,
    start_autonpo,
    start_autonpo_resume,
    train_grpo,
    transitions_of,
)
from tests.helpers.warm_process import ForkServer

PUSHING = (
    "autonpo.extrapolate=2",
    "extrapolation.k=2",
    "extrapolation.a=1",
    "autonpo.max_interventions=1",
    "autonpo.replay.acceptance_test=false",
)


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    root = tmp_path_factory.mktemp("push") / "run"
    list(start_autonpo(root, *PUSHING))
    return root


def test_the_cheap_intervention_comes_first_and_a_rollback_where_it_did_not_move(pushed):
    # c_r=1000: no gain is ever above the noise, so nothing ever counts as moved.
    assert events_of(pushed)[:9] == [
        *("started", "armed", "warning", "trigger", "pushed", "unmoved", "accepted", "guided", "rolled_back"),
    ]
    trigger, unmoved = find_transition(pushed, "trigger"), find_transition(pushed, "unmoved")
    assert trigger.state.phase == "PUSH"
    assert (unmoved.step, unmoved.state.branch, unmoved.state.phase) == (trigger.step + 2, "ahead", "PROBE")
    born = {segment.branch: segment for segment in read_segments(open_run(pushed))}
    ahead = born["ahead"]
    assert (ahead.parent, ahead.fork_step, ahead.guide_cache) == ("main", trigger.step, None)
    assert ahead.extrapolation_until == trigger.step + 2
    assert born["auto-1"].parent == "ahead"


def test_the_motion_guides_on_its_branch_until_its_end_and_nowhere_else(pushed):
    until = find_transition(pushed, "unmoved").step
    run = open_run(pushed)
    rows = [(name, row) for name in ("main", "ahead", "auto-1") for row in read_metrics(run, name)]
    helped = {(name, row["step"]) for name, row in rows if "extrapolate/groups" in row}
    assert helped == {("ahead", step) for step in range(until - 1, until + 1)}
    answers = [
        one
        for step in range(until - 1, until + 1)
        for group in groups_of(pushed, "ahead", step)
        for one in (*group.rollouts, *group.unused_guide_rollouts)
    ]
    assert any(one.source == "extrapolated" for one in answers)


def test_a_reward_that_rises_is_rest_and_no_rollback(tmp_path):
    # c_r=0: any gain counts as one, and with this seed there is one after the push.
    root = tmp_path / "run"
    list(start_autonpo(root, *PUSHING, "autonpo.trigger.max_reward_gain_se=0", "train.seed=9"))
    moved = find_transition(root, "moved")
    assert moved.evidence["gain"] > moved.evidence["margin"] == 0
    assert (moved.state.branch, moved.state.phase, moved.state.num_interventions) == ("ahead", "COOLDOWN", 0)
    assert "rolled_back" not in events_of(root)


def test_where_no_copy_lies_so_far_back_the_mistakes_are_asked_at_once(tmp_path):
    root = tmp_path / "run"
    list(start_autonpo(root, *PUSHING, "extrapolation.k=10"))
    assert events_of(root)[3:6] == ["trigger", "unpushed", "accepted"]
    assert "less than extrapolation.k=10 steps" in find_transition(root, "unpushed").evidence["what"]
    assert "ahead" not in {segment.branch for segment in read_segments(open_run(root))}


def test_training_first_and_autonpo_later_is_training_with_it(pushed, tmp_path):
    root = tmp_path / "run"
    train_grpo(root, *PUSHING)
    list(start_autonpo_resume(root))
    check_equal_except_main(root, pushed)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_dropped_again_and_again_ends_the_same(pushed, tmp_path, seed):
    rng, root = random.Random(seed), tmp_path / "run"
    running = start_autonpo(root, *PUSHING)
    for _ in range(12):
        for _ in range(rng.randrange(1, 12)):
            next(running, None)
        running.close()
        running = start_autonpo_resume(root)
    list(running)
    assert deterministic_digests(root) == deterministic_digests(pushed)


def test_a_run_killed_while_it_is_pushed_ends_the_same(warm: ForkServer, pushed, tmp_path):
    matrix = Matrix(warm=warm, folder=tmp_path, settings=PUSHING, rng=random.Random(3))
    root = tmp_path / "killed"
    for target in ("PUSH", "AHEAD", "AHEAD", "PROBE"):
        if not matrix.kill_at(root, target):
            break
    list(start_autonpo_resume(root))
    assert matrix.kills.total() >= 2
    assert deterministic_digests(root) == deterministic_digests(pushed)


def test_its_end_must_lie_at_a_checkpoint_and_it_is_not_for_runs_that_are_pushed_anyway():
    with pytest.raises(NpoError, match=r"multiple of train.save_every \(2\), got 3"):
        eager_recipe(*PUSHING, "autonpo.extrapolate=3")
    with pytest.raises(NpoError, match=r"autonpo\.extrapolate must be 0"):
        eager_recipe(*PUSHING, "guide.source=extrapolated")


def test_every_move_is_told_in_words(pushed):
    told = [describe_transition(move) for move in transitions_of(pushed)]
    until = find_transition(pushed, "pushed").state.until_step
    assert f"ahead step {until - 2}: pushed: the policy's own motion guides until step {until}" in told
    assert describe_evidence(transitions_of(pushed)[0]).endswith("max 1, push first for 2")
