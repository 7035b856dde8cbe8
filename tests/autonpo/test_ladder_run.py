"""Real runs with a ladder: each rung in its own window, measured, and the same after any kill."""

import random
from itertools import groupby

import numpy as np
import pytest

from npo_cli.errors import NpoError
from npo_cli.storage.layout import open_run
from npo_cli.storage.lineage import find_first_segment
from npo_cli.storage.metrics import read_metrics
from npo_cli.training.resume import resume_run
from npo_cli.types.rollouts import StepReport
from tests.autonpo.test_kill_resume import Matrix
from tests.helpers.autonpo_runs import (
    deterministic_digests,
    events_of,
    find_transition,
    groups_of,
    start_autonpo,
    start_autonpo_resume,
    transitions_of,
)
from tests.helpers.runs import LORA
from tests.helpers.warm_process import ForkServer

PLAIN_RESUME = {
    **{"overrides": (), "at": None, "source_branch": None, "new_branch": None, "guide": None, "steps": None},
}
SETTINGS = {
    "mistakes": (),
    "token_weight": ("autonpo.rungs.teacher=base",),
    "guide": ("autonpo.rungs.guide=extrapolated:logits,k=2,a=1",),
    "dense": (),
    "rollback": (),
}
FULL = tuple(SETTINGS)
METRICS = {"mistakes": "order/mistakes", "token_weight": "target/tokens", "dense": "target/tokens"}
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
    "rung", ["mistakes", *(pytest.param(rung, marks=pytest.mark.slow) for rung in ("token_weight", "guide", "dense"))]
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
    assert sizes == {2 if rung == "dense" else 4}
    # no step is lost but by the short rollback
    assert (made.step - made.evidence["to_step"] > 0) == (rung == "dense")
    teacher = find_first_segment(open_run(root), "auto-1").teacher
    assert teacher == {"token_weight": ("main", 0), "dense": ("main", made.step)}.get(rung)


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
@pytest.mark.parametrize("rung", ["mistakes", "token_weight", "guide", "dense"])
def test_ladder_killed_in_every_phase_of_a_rung_ends_the_same(warm: ForkServer, tmp_path, rung, kind):
    settings = (*kind, *ladder(rung, "rollback"))
    list(start_autonpo(tmp_path / "straight", *settings))
    assert {"rung_applied", "rung_measured"} <= set(events_of(tmp_path / "straight"))
    matrix = Matrix(warm=warm, folder=tmp_path, settings=settings, rng=random.Random(3))
    root = tmp_path / "killed"
    first = "PROBE" if rung == "dense" else "FORECAST"
    for target in (first, "APPLY", "WINDOW", "WINDOW", "COOLDOWN"):
        if not matrix.kill_at(root, target):
            break
    list(start_autonpo_resume(root))
    assert matrix.kills.total() >= 3
    assert deterministic_digests(root) == deterministic_digests(tmp_path / "straight")


@pytest.mark.slow
@pytest.mark.parametrize("rung", ["mistakes", "token_weight", "guide", "dense"])
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
