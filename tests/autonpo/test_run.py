"""A run under AutoNPO depends on recipe and seed alone, however often it stops and whenever AutoNPO is switched on."""

import json
import random
import signal
from collections.abc import Iterable
from typing import Any

import pytest

from npo_cli.errors import StoppedEarly
from npo_cli.storage.guide_cache import load_guide, read_guide_prompts
from npo_cli.storage.layout import open_run
from npo_cli.storage.lineage import read_segments
from npo_cli.storage.log_head import rewrite_head
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

PLAIN_RESUME = {
    **{"overrides": (), "at": None, "source_branch": None, "new_branch": None, "guide": None, "steps": None},
}


def test_autonpo_log_has_two_interventions_and_the_limit(watched):
    assert events_of(watched) == [
        *("started", "armed", "warning", "trigger", "probe_accepted", "guide_built", "rolled_back", "replay_done"),
        *(
            "armed",
            "warning",
            "trigger",
            "probe_accepted",
            "guide_built",
            "rolled_back",
            "replay_done",
            "armed",
            "warning",
            "limit_reached",
        ),
    ]
    # 6 - 2 = 4, and on the replayed branch 8 - 4 = 4.
    assert [
        (found.step, found.state.distance) for found in (find_transition(watched, "probe_accepted", n) for n in (0, 1))
    ] == [
        (6, 2),
        (8, 4),
    ]
    assert [
        (segment.branch, segment.parent, segment.fork_step, segment.guide_until)
        for segment in read_segments(open_run(watched))
    ] == [
        ("main", None, 0, None),
        ("auto-1", "main", 4, 6),
        ("auto-2", "auto-1", 4, 8),
    ]


@pytest.mark.parametrize("num_steps", [12, *(pytest.param(steps, marks=pytest.mark.slow) for steps in (7, 5))])
def test_autonpo_resumed_after_plain_training_equals_training_with_it(watched, plain, tmp_path, num_steps):
    """7 and 5 lie between two checkpoints, 7 after and 5 before the first trigger."""
    root = tmp_path / "run"
    if num_steps == 12:
        copy_run(plain, root)
    else:
        stop_after(train_run(root, eager_recipe()), num_steps)
    list(start_autonpo_resume(root))
    check_equal_except_main(root, watched)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_autonpo_restarted_again_and_again_ends_the_same(watched, tmp_path, seed):
    root, rng = tmp_path / "run", random.Random(seed)
    records = start_autonpo(root)
    for _ in range(60):
        # A restart yields up to 4 records before its first step, and two steps lead to the next checkpoint.
        left = rng.randint(6, 16)
        seen = [record for _, record in zip(range(left), records, strict=False)]
        records.close()
        if len(seen) < left:
            break
        records = start_autonpo_resume(root)
    assert len(seen) < left, "it came to an end"
    assert deterministic_digests(root) == deterministic_digests(watched)


def test_autonpo_on_a_finished_run_changes_nothing(watched, tmp_path):
    root = copy_run(watched, tmp_path / "run")
    records = list(start_autonpo_resume(root))
    assert steps_of(records) == []
    assert "no step was left to train: all 12 steps are done (train.num_steps may be raised)" in messages(records)
    assert deterministic_digests(root) == deterministic_digests(watched)


def test_autonpo_without_a_trigger_is_plain_grpo(plain, tmp_path):
    root = tmp_path / "run"
    list(start_autonpo(root, *NEVER))
    names = [name for name in deterministic_digests(plain) if name.startswith("branches/")]
    assert {name: deterministic_digests(root)[name] for name in names} == {
        name: deterministic_digests(plain)[name] for name in names
    }
    before = deterministic_digests(root)
    assert messages(start_autonpo_resume(root))[-2] == "reading the recorded steps 6-12 of main"
    assert deterministic_digests(root) == before
    assert events_of(root) == ["started", "armed"]


def test_autonpo_on_a_plain_run_without_a_trigger_only_adds_its_log(plain, tmp_path):
    root = copy_run(plain, tmp_path / "run")
    list(start_autonpo_resume(root, *NEVER))
    assert events_of(root) == ["started", "armed"]
    changed = {name for name, digest in file_digests(root).items() if file_digests(plain).get(name) != digest}
    assert changed == {"autonpo.jsonl", "segments.jsonl", "events.jsonl", "branches/main/recipe.yaml"}


# The replay


INTERVENTIONS = [("auto-1", 6, 4), ("auto-2", 8, 4)]


def parent_of(branch: str) -> dict[int, str]:
    """The branch that executed each step before the rollback."""
    return {5: "main", 6: "main"} if branch == "auto-1" else {5: "auto-1", 6: "auto-1", 7: "auto-1", 8: "auto-1"}


@pytest.mark.parametrize(("branch", "at", "back_to"), INTERVENTIONS)
def test_guide_cache_covers_exactly_the_failed_prompts_of_the_segment(watched, branch, at, back_to):
    """A quarter right of four samples or less (autonpo.pool.max_accuracy = 0.25): one or none."""
    before = parent_of(branch)
    (parent,) = set(before.values())
    failed = failed_prompts(watched, parent, range(back_to + 1, at + 1), at_most=0.25)
    queried = read_guide_prompts(open_run(watched).guide_folder(branch))
    assert sorted(queried) == sorted(failed)
    assert len(failed) >= 5
    info, found = load_guide(open_run(watched), branch)
    assert (info.branch, info.learner_step, info.guide_step, info.num_steps) == (parent, back_to, at, at - back_to)
    assert set(found) == {prompt_id for prompt_id, entry in queried.items() if entry.num_correct}
    assert (
        len(found)
        == find_transition(watched, "guide_built", INTERVENTIONS.index((branch, at, back_to))).evidence[
            "num_prompts_with_rollouts"
        ]
    )


@pytest.mark.parametrize(("branch", "at", "back_to"), INTERVENTIONS)
def test_replay_visits_the_same_prompts_in_the_same_order(watched, branch, at, back_to):
    for step, parent in parent_of(branch).items():
        assert back_to < step <= at
        assert prompt_ids(watched, branch, step) == prompt_ids(watched, parent, step)


@pytest.mark.parametrize(("branch", "at", "back_to"), INTERVENTIONS)
def test_replay_injects_a_guide_into_every_hard_group_that_has_one(watched, branch, at, back_to):
    _, found = load_guide(open_run(watched), branch)
    num_injected = 0
    last = 8 if branch == "auto-1" else 12
    for step in range(back_to + 1, last + 1):
        for group in groups_of(watched, branch, step):
            # guide.inject.max_accuracy = 0.6 of the four own rollouts: two right or fewer
            due = step <= at and group.prompt.prompt_id in found and on_policy_accuracy(group) <= 0.6
            guide_rollouts = [rollout for rollout in group.rollouts if rollout.source == "guide"]
            assert (group.injection_status == "injected") == bool(guide_rollouts) == due
            assert (group.injection_status == "off") == (step > at)
            for injected in guide_rollouts:
                (kept,) = found[group.prompt.prompt_id].rollouts
                assert (injected.response_ids, injected.behavior_logps) == (kept.response_ids, kept.behavior_logps)
                num_injected += 1
    assert num_injected >= 1


def test_cooldown_length_and_limit_hold_after_a_restart(watched, tmp_path):
    first, second = (find_transition(watched, "replay_done", number) for number in (0, 1))
    # cooldown_steps = 1: replay done at 6, cooldown at 7, armed at 8
    assert (first.step, first.state.until_step) == (6, 7)
    assert [transition.step for transition in transitions_of(watched) if transition.event == "armed"] == [5, 8, 10]
    assert (second.step, second.state.num_interventions) == (8, 2)
    root = copy_run(watched, tmp_path / "run")
    steps = steps_of(start_autonpo_resume(root, "train.num_steps=16"))
    assert [report.step for report in steps] == [13, 14, 15, 16]
    assert set(events_of(root)[18:]) <= {"warning", "recovered", "limit_reached"}


def test_autonpo_fork_starts_with_a_new_state_on_its_own_branch(watched, tmp_path):
    root = copy_run(watched, tmp_path / "run")
    list(start_autonpo_resume(root, *NEVER, at=4, source_branch="main", new_branch="anew"))
    starts = [transition for transition in transitions_of(root) if transition.event == "started"]
    assert [
        (transition.step, transition.state.branch, transition.state.num_interventions) for transition in starts
    ] == [
        (0, "main", 0),
        (4, "anew", 0),
    ]
    assert transitions_of(root)[-1].event == "armed"
    # It has its own settings, and is continued without naming it.
    assert open_run(root).read_recipe("anew")["autonpo"]["trigger"]["min_entropy_drop_se"] == 1_000_000
    assert steps_of(start_autonpo_resume(root)) == []
    before = deterministic_digests(root)
    assert {name: before[name] for name in deterministic_digests(watched) if name != "autonpo.jsonl"} == {
        name: digest for name, digest in deterministic_digests(watched).items() if name != "autonpo.jsonl"
    }


def messages(records: Iterable[Any]) -> list[str]:
    """The text of every notice."""
    return [record.message for record in records if isinstance(record, Notice)]


@pytest.mark.parametrize(
    ("what", "number"),
    [
        pytest.param("probe failed prompts", 1, marks=pytest.mark.slow),
        pytest.param("score past checkpoints", 2, marks=pytest.mark.slow),
        pytest.param("sample guide", 1, marks=pytest.mark.slow),
    ],
)
def test_signal_stops_an_intervention_between_two_chunks(watched, tmp_path, what, number):
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


def test_settings_changed_in_a_replay_apply_from_there(tmp_path):
    root = tmp_path / "run"
    for record in (records := start_autonpo(root, "autonpo.max_interventions=1")):
        if isinstance(record, StepReport) and record.branch == "auto-1":
            records.close()
    assert transitions_of(root)[-1].state.phase == "REPLAY"
    # resumed without AutoNPO, it passes the end of the replay
    list(resume_run(root, **PLAIN_RESUME))
    list(start_autonpo_resume(root, "autonpo.replay.acceptance_test=true", "train.num_steps=14"))
    replayed = find_transition(root, "replay_done")
    assert (replayed.step, replayed.state.phase) == (6, "ACCEPTANCE_TEST")
    assert {"replay_accepted", "replay_rejected"} & set(events_of(root))
    assert transitions_of(root)[-1].state.phase in ("TRAIN", "COOLDOWN")


def test_autonpo_warns_if_no_recorded_step_has_a_signal(plain, tmp_path):
    root = copy_run(plain, tmp_path / "run")
    path = root / "branches" / "main" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "entropy"}) + "\n" for row in rows))
    rewrite_head(path, is_accepted=True)
    texts = messages(start_autonpo_resume(root))
    assert "no recorded step has a finite entropy: AutoNPO cannot trigger on them" in texts
    assert not any("finite reward" in each for each in texts)


def test_autonpo_log_has_no_time_of_day(watched):
    text = (watched / "autonpo.jsonl").read_text()
    assert '"time"' not in text
    assert "seconds" not in text


def test_changed_settings_are_not_applied_to_recorded_steps(tmp_path):
    """Trained with a trigger that never fires, resumed with one that always fires: after the last recorded step."""
    root = tmp_path / "run"
    train_grpo(root, "train.num_steps=8")
    list(start_autonpo_resume(root, *NEVER))
    list(start_autonpo_resume(root, "autonpo.trigger.min_entropy_drop_se=0", "train.num_steps=12"))
    starts = [transition for transition in transitions_of(root) if transition.event == "started"]
    assert [
        (transition.step, transition.evidence["settings"]["autonpo"]["trigger"]["min_entropy_drop_se"])
        for transition in starts
    ] == [
        (0, 1e6),
        (8, 0),
    ]
    triggers = [transition.step for transition in transitions_of(root) if transition.event == "trigger"]
    assert triggers
    assert min(triggers) > 8
