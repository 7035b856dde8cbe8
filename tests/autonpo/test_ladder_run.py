"""Real runs with a ladder: each rung in its own window, measured, and the same after any kill."""

import random
from contextlib import closing
from dataclasses import replace
from itertools import groupby

import numpy as np
import pytest

from npo_cli.autonpo.run import train_autonpo
from npo_cli.autonpo.rung_actions import plan_scout
from npo_cli.errors import NpoError, StoppedEarly
from npo_cli.report.tables_autonpo import rung_tables
from npo_cli.session.stop_signal import StopFlag
from npo_cli.storage.checkpoints import list_checkpoints
from npo_cli.storage.cost_sums import compute_run_costs, cost_at, costs_by_activity
from npo_cli.storage.interrupted import list_interrupted_branches
from npo_cli.storage.layout import open_run
from npo_cli.storage.lineage import find_first_segment
from npo_cli.storage.metrics import read_metrics
from npo_cli.storage.scouts import has_ended
from npo_cli.training.resume import resume_run
from npo_cli.training.scout import scout_run, train_scout
from npo_cli.training.train import train_run
from npo_cli.types.autonpo import AutoNPOState
from npo_cli.types.guides import ScoutRequest
from npo_cli.types.rollouts import StepReport
from tests.autonpo.test_kill_resume import Matrix
from tests.helpers.autonpo_runs import (
    NEVER,
    deterministic_digests,
    eager_recipe,
    events_of,
    find_transition,
    groups_of,
    start_autonpo,
    start_autonpo_resume,
    transitions_of,
)
from tests.helpers.runs import LORA, open_session_at
from tests.helpers.warm_process import ForkServer

PLAIN_RESUME = {
    **{"overrides": (), "at": None, "source_branch": None, "new_branch": None, "guide": None, "steps": None},
}
SETTINGS = {
    "mistakes": (),
    "token_weight": ("autonpo.rungs.teacher=base",),
    "guide": ("autonpo.rungs.guide=extrapolated:logits,k=2,a=1",),
    "scout": ("autonpo.rungs.scout_steps=2", "scout.num_updates=2", "scout.group_size=6"),
    "dense": (),
    "rollback": (),
}
FULL = tuple(SETTINGS)
METRICS = {
    "mistakes": "order/mistakes",
    **dict.fromkeys(("token_weight", "scout", "dense"), "target/tokens"),
}
"""A metric that only steps in the window of a rung have."""


def ladder(*rungs: str, limit: int = 1, steps: int = 16) -> tuple[str, ...]:
    """Windows of 3 steps and cooldowns of 3, on runs that trigger whenever the entropy falls and save every other
    step."""
    return (
        f"autonpo.ladder=[{','.join(rungs)}]",
        *(setting for rung in rungs for setting in SETTINGS[rung]),
        *(("autonpo.rungs.num_steps=3",) if set(rungs) != {"rollback"} else ()),
        *("autonpo.trigger.cooldown_steps=3", f"autonpo.max_interventions={limit}", f"train.num_steps={steps}"),
    )


def metrics_of(root, branch):
    return {row["step"]: row for row in read_metrics(open_run(root), branch)}


@pytest.mark.parametrize(
    "rung",
    [
        "mistakes",
        *(pytest.param(rung, marks=pytest.mark.slow) for rung in ("token_weight", "guide", "scout", "dense")),
    ],
)
def test_rung_is_in_effect_in_its_window_only(tmp_path, rung):
    root = tmp_path / "run"
    list(start_autonpo(root, *ladder(rung, "rollback")))
    made = find_transition(root, "rung_applied")
    assert made.evidence["rung"] == rung
    window = range(made.evidence["to_step"] + 1, made.evidence["until_step"] + 1)
    steps = metrics_of(root, "auto-1")
    length = min(3, made.step - made.evidence["to_step"]) if rung == "dense" else 3
    assert (min(steps), len(window), max(steps)) == (window[0], length, 16)
    if rung == "guide":
        used = {step for step in steps for group in groups_of(root, "auto-1", step) if group.injection_status != "off"}
    else:
        used = {step for step, row in steps.items() if METRICS[rung] in row}
    assert used == set(window)
    sizes = {len(group.rollouts) for group in groups_of(root, "auto-1", window[0])}
    assert sizes == {2 if rung in ("scout", "dense") else 4}
    # no step is lost but by the short rollback
    assert (made.step - made.evidence["to_step"] > 0) == (rung == "dense")
    teacher = find_first_segment(open_run(root), "auto-1").teacher
    teachers = {
        "token_weight": ("main", 0),
        "scout": ("auto-1-scout", made.step + 2),
        "dense": ("main", made.step),
    }
    assert teacher == teachers.get(rung)


def test_effect_of_a_rung_follows_from_the_recorded_metrics(tmp_path):
    """Trend by numpy over as many steps before the trigger as were executed since, at equal tokens."""
    root = tmp_path / "run"
    list(start_autonpo(root, *ladder("mistakes", "rollback")))
    made, found = find_transition(root, "rung_applied"), find_transition(root, "rung_measured").evidence
    before, after = list(metrics_of(root, "main").values()), metrics_of(root, "auto-1")
    before = [row for row in before if row["step"] <= made.step][-6:]
    end = made.evidence["until_step"]
    cost = sum(after[step]["tokens"] for step in (end - 2, end - 1, end)) / np.mean([row["tokens"] for row in before])
    assert found["cost"] == pytest.approx(cost)
    slope, level = np.polyfit([row["step"] - made.step for row in before], [row["accuracy"] for row in before], 1)
    expected = level + slope * (cost + 2)
    accuracy = np.mean([after[step]["accuracy"] for step in (end + 1, end + 2, end + 3)])
    assert (found["accuracy"], found["accuracy_expected"]) == pytest.approx((accuracy, expected))
    assert found["value"] == pytest.approx(1 + (accuracy - expected) / found["rate"] / cost)
    assert find_transition(root, "rung_measured").step == end + 3


@pytest.mark.slow
def test_cost_of_a_scout_is_in_its_value_and_on_the_bill(tmp_path):
    root = tmp_path / "run"
    list(start_autonpo(root, *ladder("scout", "rollback")))
    run, made = open_run(root), find_transition(root, "rung_applied")
    trained, found = find_transition(root, "scout_trained").evidence, find_transition(root, "rung_measured").evidence
    steps = metrics_of(root, "auto-1-scout")
    paid = sum(row["tokens"] for row in steps.values())
    assert (list(steps), trained["num_tokens"]) == ([made.step + 1, made.step + 2], paid)
    before = [row["tokens"] for row in metrics_of(root, "main").values() if row["step"] <= made.step][-6:]
    window = sum(metrics_of(root, "auto-1")[made.step + place]["tokens"] for place in (1, 2, 3))
    assert found["cost"] == pytest.approx((window + paid) / np.mean(before))
    own = sum(row["tokens"] for row in metrics_of(root, "auto-1").values())
    assert cost_at(run, "auto-1", 16).tokens == cost_at(run, "main", made.step).tokens + paid + own
    (row,) = [one for one in costs_by_activity(run, "auto-1") if one.activity == "training of scouts"]
    assert (row.steps, row.tokens) == (2, paid)
    costs = compute_run_costs(run, "auto-1")
    assert (costs.scout_tokens, costs.abandoned_tokens) == (paid, 0)
    assert list_checkpoints(run, "auto-1-scout") == []
    (table,) = rung_tables(transitions_of(root))
    assert (table.rows[0][1:3], table.rows[0][table.header.index("cost")]) == (
        ("scout", "auto-1"),
        f"{found['cost']:.1f}",
    )


@pytest.mark.slow
def test_scout_is_trained_without_the_settings_of_the_window_before(tmp_path):
    root = tmp_path / "run"
    list(start_autonpo(root, *ladder("mistakes", "rollback")))
    run, state = open_run(root), AutoNPOState(branch="auto-1", step=12, num_interventions=1, rung="scout")
    with closing(open_session_at(root, 12, branch="auto-1")) as session:
        request = plan_scout(session, state)
        list(train_scout(session, replace(request, steps=1), StopFlag()))
        assert request.name == "auto-2-scout"
        # another length is another scout
        assert plan_scout(session, state).name == "auto-2-scout-2"
    assert [run.read_recipe(branch)["order"]["mistakes"] for branch in ("auto-1", "auto-2-scout")] == [0.5, 0]


@pytest.mark.slow
def test_scout_that_is_stopped_or_resumed_alone_is_finished(tmp_path):
    root, straight = tmp_path / "run", tmp_path / "straight"
    settings = (*ladder("scout", "rollback"), "autonpo.rungs.scout_steps=5")
    list(start_autonpo(straight, *settings))
    stop = StopFlag()
    with pytest.raises(StoppedEarly) as caught:
        for record in train_autonpo(root, eager_recipe(*settings), stop=stop):
            if isinstance(record, StepReport) and record.branch == "auto-1-scout":
                stop.request("a test")
    assert caught.value.hint.endswith("--autonpo")
    assert list_interrupted_branches(open_run(root))[-1] == "auto-1-scout"
    list(resume_run(root, **PLAIN_RESUME))
    assert has_ended(open_run(root), "auto-1-scout")
    list(start_autonpo_resume(root))
    assert deterministic_digests(root) == deterministic_digests(straight)


EARLY_SCOUT = (
    *("autonpo.early.enabled=true", "autonpo.early.scout=disposable", "autonpo.early.scout_steps=2"),
    *("autonpo.early.replay_steps=2", "scout.num_updates=2", *NEVER),
)


def test_run_begins_with_a_disposable_scout(tmp_path):
    root = tmp_path / "run"
    list(start_autonpo(root, *EARLY_SCOUT, "train.num_steps=5"))
    run = open_run(root)
    assert events_of(root) == ["started", "early_bootstrap", "scout_trained", "rung_applied", "window_done", "armed"]
    first = find_first_segment(run, "early")
    assert (first.parent, first.fork_step, first.teacher) == ("main", 0, ("early-scout", 2))
    steps = metrics_of(root, "early")
    assert [step for step, row in steps.items() if "target/tokens" in row] == [1, 2] and max(steps) == 5
    assert not metrics_of(root, "main") and list_checkpoints(run, "early-scout") == []
    tokens = sum(row["tokens"] for branch in ("early", "early-scout") for row in metrics_of(root, branch).values())
    assert cost_at(run, "early", 5).tokens == tokens
    assert compute_run_costs(run, "early").num_interventions == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", [(), LORA], ids=["full", "lora"])
def test_early_scout_is_the_one_by_hand_and_the_same_after_kills(warm: ForkServer, tmp_path, kind):
    settings = (*EARLY_SCOUT, *kind, "autonpo.early.scout_steps=4", "autonpo.early.replay_steps=3")
    straight, hand, root = tmp_path / "straight", tmp_path / "hand", tmp_path / "killed"
    list(start_autonpo(straight, *settings))
    list(train_run(hand, eager_recipe(*settings), until=0))
    list(scout_run(hand, ScoutRequest(at=0, branch="main", steps=4, name="early-scout")))
    target = ("target.kind=distribution", "target.teacher=scout:early-scout", "target.num_steps=3")
    options = PLAIN_RESUME | {"overrides": (*target, "target.group_size=2"), "at": 0, "new_branch": "early"}
    list(resume_run(hand, **options))
    ours, theirs = (deterministic_digests(each) for each in (straight, hand))
    assert {name: ours[name] for name in theirs} == theirs
    matrix = Matrix(warm=warm, folder=tmp_path, settings=settings, rng=random.Random(4))
    for target in ("SCOUT", "SCOUT", "APPLY", "WINDOW"):
        if not matrix.kill_at(root, target):
            break
    list(start_autonpo_resume(root))
    assert matrix.kills.total() >= 2
    assert deterministic_digests(root) == ours


@pytest.mark.slow
def test_rungs_are_taken_in_the_order_of_the_ladder(tmp_path):
    """At every trigger the rungs before the one that is taken were refused, or wait after a refusal."""
    root = tmp_path / "run"
    list(start_autonpo(root, *ladder(*FULL, limit=8, steps=90)))
    taken = []
    for is_decision, moves in groupby(
        transitions_of(root), lambda one: one.phase_before in ("TRAIN", "FORECAST", "PROBE") and one.event != "armed"
    ):
        considered = [move for move in moves if move.state.rung is not None] if is_decision else []
        if not considered:
            continue
        names = [move.state.rung for move in considered]
        assert names == sorted(names, key=FULL.index)
        last = considered[-1]
        if last.event in ("rung_chosen", "probe_accepted"):
            taken.append(last.state.rung)
            skipped = set(FULL[: FULL.index(last.state.rung)]) - set(names)
            assert all(last.state.waits[rung] >= last.step for rung in skipped)
    assert len(set(taken)) >= 4
    assert sorted(set(taken), key=taken.index) == sorted(set(taken), key=FULL.index)
    measured = [one.evidence["rung"] for one in transitions_of(root) if one.event == "rung_measured"]
    assert measured == taken[: len(measured)]
    assert len(measured) >= len(taken) - 1


@pytest.mark.slow
def test_rollback_of_a_ladder_is_the_published_one_and_is_measured(tmp_path):
    root = tmp_path / "run"
    list(start_autonpo(root, *ladder("rollback", "mistakes")))
    assert "rung_measured" in events_of(root)
    found = find_transition(root, "rung_measured").evidence
    # probe and guides are paid for
    back = find_transition(root, "rolled_back")
    assert found["cost"] > back.evidence["until_step"] - back.evidence["to_step"]
    published = tmp_path / "published"
    list(start_autonpo(published, *ladder("rollback")))
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        ours, theirs = ((each / "branches" / "auto-1" / name).read_bytes() for each in (root, published))
        assert ours == theirs


@pytest.mark.slow
@pytest.mark.parametrize("kind", [(), LORA], ids=["full", "lora"])
@pytest.mark.parametrize("rung", ["mistakes", "token_weight", "guide", "scout", "dense"])
def test_ladder_killed_in_every_phase_of_a_rung_ends_the_same(warm: ForkServer, tmp_path, rung, kind):
    settings = (*kind, *ladder(rung, "rollback"))
    list(start_autonpo(tmp_path / "straight", *settings))
    assert {"rung_applied", "rung_measured"} <= set(events_of(tmp_path / "straight"))
    matrix = Matrix(warm=warm, folder=tmp_path, settings=settings, rng=random.Random(3))
    root = tmp_path / "killed"
    first = "PROBE" if rung == "dense" else "FORECAST"
    scout = ("SCOUT", "SCOUT") if rung == "scout" else ()
    for target in (first, *scout, "APPLY", "WINDOW", "WINDOW", "COOLDOWN"):
        if not matrix.kill_at(root, target):
            break
    list(start_autonpo_resume(root))
    assert matrix.kills.total() >= 3
    assert deterministic_digests(root) == deterministic_digests(tmp_path / "straight")


@pytest.mark.slow
@pytest.mark.parametrize("rung", ["mistakes", "token_weight", "guide", "scout", "dense"])
def test_window_resumed_without_autonpo_is_the_same(tmp_path, rung):
    root, straight = tmp_path / "run", tmp_path / "straight"
    settings = ladder(rung, "rollback")
    list(start_autonpo(straight, *settings))
    for record in (records := start_autonpo(root, *settings)):
        if isinstance(record, StepReport) and record.branch == "auto-1":
            records.close()
    list(resume_run(root, **PLAIN_RESUME))
    list(start_autonpo_resume(root))
    assert deterministic_digests(root) == deterministic_digests(straight)


@pytest.mark.slow
def test_next_intervention_begins_without_the_settings_of_the_window(tmp_path):
    root = tmp_path / "run"
    list(start_autonpo(root, *ladder("token_weight", "mistakes", limit=6, steps=40)))
    made = [one for one in transitions_of(root) if one.event == "rung_applied"]
    assert {one.evidence["rung"] for one in made} == {"token_weight", "mistakes"}
    for one in made:
        recipe = open_run(root).read_recipe(one.state.branch)
        is_weighted = one.evidence["rung"] == "token_weight"
        assert (recipe["target"]["kind"], recipe["order"]["mistakes"]) == (
            ("token_weight", 0.0) if is_weighted else ("none", 0.5)
        )
    # a fork by --at begins without them too
    last = made[-1]
    list(start_autonpo_resume(root, at=last.step + 2, source_branch=last.state.branch, new_branch="again"))
    again = open_run(root).read_recipe("again")
    assert (again["target"]["kind"], again["order"]["mistakes"]) == ("none", 0.0)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("guide.source=extrapolated", r"switches guide\.source on"),
        ("train.staleness=1", r"not available with train\.staleness"),
    ],
)
def test_rung_that_cannot_be_applied_is_refused_before_training(tmp_path, setting, message):
    with pytest.raises(NpoError, match=message):
        list(start_autonpo(tmp_path / "run", *ladder("guide", "rollback"), setting))
    assert not (tmp_path / "run").exists()
