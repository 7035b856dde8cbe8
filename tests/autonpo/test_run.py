"""A run under AutoNPO is a function of recipe and seed: how often it stopped, and when AutoNPO came, is no matter."""

import json
import random
import signal
from collections.abc import Iterable
from typing import Any

import pytest

from npo_cli.errors import StoppedEarly
from npo_cli.storage.guide_cache import load_guide, read_queried_prompts
from npo_cli.storage.layout import open_run
from npo_cli.storage.lineage import read_segments
from npo_cli.training.resume import resume_run
from npo_cli.training.train import train_run
from npo_cli.types.rollouts import Notice, Progress, StepReport
from tests.helpers.autonpo_runs import (
    NEVER,
    check_equal_except_main,
    deterministic_digests,
    eager_recipe,
    events_of,
    failed_prompts,
    find_transition,
    groups_of,
    on_policy_accuracy,
    prompt_ids,
    start_autonpo,
    start_autonpo_resume,
    train_grpo,
    transitions_of,
)
from tests.helpers.runs import copy_run, file_digests, steps_of, stop_after

PLAINLY = {
    **{"overrides": (), "at": None, "source_branch": None, "new_branch": None, "guide": None, "steps": None},
}


def test_the_interventions_are_those_that_the_journal_tells(watched):
    assert events_of(watched) == [
        *("started", "armed", "warning", "trigger", "accepted", "guided", "rolled_back", "replayed"),
        *("armed", "warning", "trigger", "accepted", "guided", "rolled_back", "replayed", "armed", "warning", "capped"),
    ]
    # 6 - 2 = 4, and on the replayed branch 8 - 4 = 4.
    assert [
        (found.step, found.state.distance) for found in (find_transition(watched, "accepted", n) for n in (0, 1))
    ] == [
        (6, 2),
        (8, 4),
    ]
    assert [
        (born.branch, born.parent, born.fork_step, born.guide_until) for born in read_segments(open_run(watched))
    ] == [
        ("main", None, 0, None),
        ("auto-1", "main", 4, 6),
        ("auto-2", "auto-1", 4, 8),
    ]


@pytest.mark.parametrize("num_steps", [12, 7, 5])
def test_training_first_and_autonpo_later_is_training_with_it(watched, plain, tmp_path, num_steps):
    """7 and 5 lie between two checkpoints, 7 after and 5 before the first trigger."""
    root = tmp_path / "run"
    if num_steps == 12:
        copy_run(plain, root)
    else:
        stop_after(train_run(root, eager_recipe()), num_steps)
    list(start_autonpo_resume(root))
    check_equal_except_main(root, watched)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_dropped_again_and_again_ends_the_same(watched, tmp_path, seed):
    root, rng = tmp_path / "run", random.Random(seed)
    records = start_autonpo(root)
    for _ in range(60):
        # A restart says up to 4 things before its first step, and two steps lead to the next checkpoint.
        left = rng.randint(6, 16)
        seen = [record for _, record in zip(range(left), records, strict=False)]
        records.close()
        if len(seen) < left:
            break
        records = start_autonpo_resume(root)
    assert len(seen) < left, "it came to an end"
    assert deterministic_digests(root) == deterministic_digests(watched)


def test_a_run_that_ended_is_looked_at_and_left_alone(watched, tmp_path):
    root = copy_run(watched, tmp_path / "run")
    records = list(start_autonpo_resume(root))
    assert steps_of(records) == []
    assert "no step was left to make: all 12 steps are made (train.num_steps may be raised)" in said(records)
    assert deterministic_digests(root) == deterministic_digests(watched)


def test_where_nothing_triggers_training_is_plain_grpo_and_afterwards_nothing_changes(plain, tmp_path):
    root = tmp_path / "run"
    list(start_autonpo(root, *NEVER))
    names = [name for name in deterministic_digests(plain) if name.startswith("branches/")]
    assert {name: deterministic_digests(root)[name] for name in names} == {
        name: deterministic_digests(plain)[name] for name in names
    }
    before = deterministic_digests(root)
    assert said(start_autonpo_resume(root))[-2] == "looking back over steps 6-12 of main, already on record"
    assert deterministic_digests(root) == before
    assert events_of(root) == ["started", "armed"]


def test_a_plain_run_that_never_stagnated_gains_a_journal_and_nothing_else(plain, tmp_path):
    root = copy_run(plain, tmp_path / "run")
    list(start_autonpo_resume(root, *NEVER))
    assert events_of(root) == ["started", "armed"]
    changed = {name for name, digest in file_digests(root).items() if file_digests(plain).get(name) != digest}
    assert changed == {"autonpo.jsonl", "segments.jsonl", "events.jsonl", "branches/main/recipe.yaml"}


# What a replay is made of


INTERVENTIONS = [("auto-1", 6, 4), ("auto-2", 8, 4)]


def parent_of(branch: str) -> dict[int, str]:
    """Who made the step before the rollback."""
    return {5: "main", 6: "main"} if branch == "auto-1" else {5: "auto-1", 6: "auto-1", 7: "auto-1", 8: "auto-1"}


@pytest.mark.parametrize(("branch", "at", "back_to"), INTERVENTIONS)
def test_guides_are_wanted_for_exactly_what_failed_in_the_slice(watched, branch, at, back_to):
    """A quarter right of four samples or less (autonpo.pool.max_accuracy = 0.25): one or none."""
    before = parent_of(branch)
    (parent,) = set(before.values())
    failed = failed_prompts(watched, parent, range(back_to + 1, at + 1), at_most=0.25)
    asked = read_queried_prompts(open_run(watched).guide_folder(branch))
    assert sorted(asked) == sorted(failed)
    assert len(failed) >= 5
    info, found = load_guide(open_run(watched), branch)
    assert (info.branch, info.learner_step, info.guide_step, info.num_steps) == (parent, back_to, at, at - back_to)
    assert set(found) == {prompt_id for prompt_id, entry in asked.items() if entry.num_correct}
    assert (
        len(found)
        == find_transition(watched, "guided", INTERVENTIONS.index((branch, at, back_to))).evidence["num_found"]
    )


@pytest.mark.parametrize(("branch", "at", "back_to"), INTERVENTIONS)
def test_the_replay_meets_the_same_prompts_in_the_same_order(watched, branch, at, back_to):
    for step, parent in parent_of(branch).items():
        assert back_to < step <= at
        assert prompt_ids(watched, branch, step) == prompt_ids(watched, parent, step)


@pytest.mark.parametrize(("branch", "at", "back_to"), INTERVENTIONS)
def test_a_guide_sits_where_there_is_one_and_the_policy_fails_and_nowhere_after_the_replay(
    watched, branch, at, back_to
):
    _, found = load_guide(open_run(watched), branch)
    num_injected = 0
    last = 8 if branch == "auto-1" else 12
    for step in range(back_to + 1, last + 1):
        for group in groups_of(watched, branch, step):
            # guide.inject.max_accuracy = 0.6 of the four own rollouts: two right or fewer
            due = step <= at and group.prompt.prompt_id in found and on_policy_accuracy(group) <= 0.6
            guests = [rollout for rollout in group.rollouts if rollout.source == "guide"]
            assert (group.injection_status == "injected") == bool(guests) == due
            assert (group.injection_status == "off") == (step > at)
            for guest in guests:
                (kept,) = found[group.prompt.prompt_id]
                assert (guest.response_ids, guest.behavior_logps) == (kept.response_ids, kept.behavior_logps)
                num_injected += 1
    assert num_injected >= 1


def test_the_rest_lasts_as_long_as_it_should_and_the_cap_holds_after_a_restart(watched, tmp_path):
    first, second = (find_transition(watched, "replayed", number) for number in (0, 1))
    # cooldown = 1: replayed at 6, resting at 7, armed at 8
    assert (first.step, first.state.until_step) == (6, 7)
    assert [move.step for move in transitions_of(watched) if move.event == "armed"] == [5, 8, 10]
    assert (second.step, second.state.num_interventions) == (8, 2)
    root = copy_run(watched, tmp_path / "run")
    steps = steps_of(start_autonpo_resume(root, "train.num_steps=16"))
    assert [report.step for report in steps] == [13, 14, 15, 16]
    assert set(events_of(root)[18:]) <= {"warning", "recovered", "capped"}


def test_a_fork_by_hand_starts_anew_on_a_branch_of_its_own(watched, tmp_path):
    root = copy_run(watched, tmp_path / "run")
    list(start_autonpo_resume(root, *NEVER, at=4, source_branch="main", new_branch="anew"))
    begun = [move for move in transitions_of(root) if move.event == "started"]
    assert [(move.step, move.state.branch, move.state.num_interventions) for move in begun] == [
        (0, "main", 0),
        (4, "anew", 0),
    ]
    assert transitions_of(root)[-1].event == "armed"
    # Its settings are its own, and it is taken up again by itself.
    assert open_run(root).read_recipe("anew")["autonpo"]["trigger"]["min_entropy_drop_se"] == 1_000_000
    assert steps_of(start_autonpo_resume(root)) == []
    before = deterministic_digests(root)
    assert {name: before[name] for name in deterministic_digests(watched) if name != "autonpo.jsonl"} == {
        name: digest for name, digest in deterministic_digests(watched).items() if name != "autonpo.jsonl"
    }


def said(records: Iterable[Any]) -> list[str]:
    """Everything that was told in words."""
    return [record.message for record in records if isinstance(record, Notice)]


@pytest.mark.parametrize(("what", "number"), [("ask again what failed", 1), ("look back", 2), ("sample guide", 1)])
def test_a_signal_in_an_intervention_is_heeded_between_two_chunks(watched, tmp_path, what, number):
    root = tmp_path / "run"
    seen = 0
    with pytest.raises(StoppedEarly, match=r"what was sampled is saved") as stopped:
        for record in start_autonpo(root):
            seen += isinstance(record, Progress) and record.description == what
            if seen == number:
                signal.raise_signal(signal.SIGTERM)
                seen += 1
    assert stopped.value.hint.endswith("--autonpo")
    assert "rolled_back" not in events_of(root)
    list(start_autonpo_resume(root))
    assert deterministic_digests(root) == deterministic_digests(watched)


def test_settings_changed_in_a_replay_hold_from_there_and_the_replay_ends_where_it_should(tmp_path):
    root = tmp_path / "run"
    for record in (records := start_autonpo(root, "autonpo.max_interventions=1")):
        if isinstance(record, StepReport) and record.branch == "auto-1":
            records.close()
    assert transitions_of(root)[-1].state.phase == "REPLAY"
    # whoever goes on without AutoNPO passes the end of the replay
    list(resume_run(root, **PLAINLY))
    list(start_autonpo_resume(root, "autonpo.replay.acceptance_test=true", "train.num_steps=14"))
    replayed = find_transition(root, "replayed")
    assert (replayed.step, replayed.state.phase) == (6, "JUDGE")
    assert {"kept", "reverted"} & set(events_of(root))
    assert transitions_of(root)[-1].state.phase in ("TRAIN", "COOLDOWN")


def test_a_run_whose_record_lacks_a_signal_is_told_so(plain, tmp_path):
    root = copy_run(plain, tmp_path / "run")
    path = root / "branches" / "main" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "entropy"}) + "\n" for row in rows))
    told = said(start_autonpo_resume(root))
    assert "no step on record has a finite entropy: AutoNPO cannot trigger on them" in told
    assert not any("finite reward" in each for each in told)


def test_the_moves_of_two_runs_of_one_seed_hold_no_time_of_day(watched):
    said = (watched / "autonpo.jsonl").read_text()
    assert '"time"' not in said
    assert "seconds" not in said


def test_changed_settings_begin_anew_and_are_not_applied_backwards(tmp_path):
    """Trained with a trigger that never fires, resumed with one that always does: it fires after the last record."""
    root = tmp_path / "run"
    train_grpo(root, "train.num_steps=8")
    list(start_autonpo_resume(root, *NEVER))
    list(start_autonpo_resume(root, "autonpo.trigger.min_entropy_drop_se=0", "train.num_steps=12"))
    begun = [move for move in transitions_of(root) if move.event == "started"]
    assert [(move.step, move.evidence["settings"]["autonpo"]["trigger"]["min_entropy_drop_se"]) for move in begun] == [
        (0, 1e6),
        (8, 0),
    ]
    triggers = [move.step for move in transitions_of(root) if move.event == "trigger"]
    assert triggers
    assert min(triggers) > 8
