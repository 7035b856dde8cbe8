"""The batch of a step: prompts in order, injected guides, advantages of the mixed groups."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from npo_cli.rollout.batch import ActiveGuide, StepBatch, build_batch
from npo_cli.session.session import Session
from npo_cli.storage.rollout_log import RolloutLog
from npo_cli.training.update import build_training_samples
from tests.helpers.guide_trajectories import correct_trajectory, make_active_guide, override_settings
from tests.helpers.runs import open_session_at, train


@pytest.fixture(scope="module")
def hard(tmp_path_factory) -> Session:
    """The base model before additions with two misconceived digits, 4 prompts of 8 rollouts: all wrong."""
    root = tmp_path_factory.mktemp("hard") / "run"
    train(root, "task.kind=addh2", "train.group_size=8", "train.num_steps=1")
    return open_session_at(root, 0)


def sample_batch(
    session: Session, folder: Path, *, step: int = 1, position: int = 0, active_guide: ActiveGuide | None = None
):
    folder.mkdir(exist_ok=True)
    rollout_log = RolloutLog(folder / "rollouts.jsonl")
    batch = build_batch(session, rollout_log, seed_name="t", step=step, position=position, active_guide=active_guide)
    rollout_log.wait()
    return batch


def test_batch_injects_a_guide_into_an_all_wrong_group(hard, tmp_path):
    active_guide = make_active_guide(correct_trajectory(hard, prompt, shift=-1.0) for prompt in hard.task.train)
    batch = sample_batch(hard, tmp_path, active_guide=active_guide)
    assert [group.on_policy_accuracy for group in batch.mixed] == [0.0] * 4
    for entry in batch.selected:
        *own, guest = entry.group.rollouts
        (trajectory,) = active_guide.rollouts[entry.group.prompt.prompt_id]
        assert {rollout.source for rollout in own} == {"own"}
        assert (guest.source, guest.slot, guest.guide_step, guest.reward) == ("guide", 7, 99, 1.0)
        assert (guest.response_ids, guest.behavior_logps) == (trajectory.response_ids, trajectory.behavior_logps)
        # one right in eight: mean 1/8, standard deviation sqrt(1/8) = 0.3536; 7/8 and -1/8 of it
        assert entry.advantages == pytest.approx([-0.35355] * 7 + [2.47487], abs=1e-4)


def test_training_samples_are_those_of_the_mixed_groups(hard, tmp_path):
    active_guide = make_active_guide(correct_trajectory(hard, prompt, shift=-1.0) for prompt in hard.task.train)
    rows = build_training_samples(
        hard.policy, sample_batch(hard, tmp_path, active_guide=active_guide).selected, hard.recipe.guide.inject
    )
    assert [row.is_off_policy for row in rows] == ([False] * 7 + [True]) * 4
    assert [round(row.advantage, 3) for row in rows] == ([-0.354] * 7 + [2.475]) * 4
    prompt = hard.task.train[hard.order.indices(0, 1)[0]]
    assert rows[7].tokens.prompt_ids == hard.policy.encode(prompt)
    assert rows[7].behavior_logps == active_guide.rollouts[prompt.prompt_id][0].behavior_logps


def test_rollout_log_holds_replaced_and_injected_rollouts(hard, tmp_path):
    active_guide = make_active_guide(correct_trajectory(hard, prompt) for prompt in hard.task.train)
    batch = sample_batch(hard, tmp_path, active_guide=active_guide)
    for own, kept in zip(batch.on_policy, RolloutLog(tmp_path / "rollouts.jsonl").read_step(1), strict=True):
        assert kept.rollouts[:8] == own.rollouts
        assert [rollout.source for rollout in kept.rollouts[8:]] == ["guide"]
        assert (kept.injection_status, kept.on_policy_accuracy) == ("injected", 0.0)
    # Read back, it is the same batch.
    assert sample_batch(hard, tmp_path, active_guide=active_guide) == replace(batch, is_recorded=True)


def test_batch_without_injection_above_threshold_without_response_or_after_the_segment(hard, scout, tmp_path):
    session = open_session_at(scout, 2)
    prompts = session.task.train
    alone = sample_batch(session, tmp_path / "alone")
    accuracies = [sum(rollout.reward for rollout in group.rollouts) / 4 for group in alone.on_policy]
    assert 0 < sum(accuracies) < 4, "some right and some wrong, or this shows nothing"
    shut = override_settings(session, "guide.inject", max_accuracy=0.0)
    batch = sample_batch(
        shut,
        tmp_path / "shut",
        active_guide=make_active_guide(correct_trajectory(session, prompt) for prompt in prompts),
    )
    assert [group.injection_status for group in batch.mixed] == [
        "gate_closed" if share else "injected" for share in accuracies
    ]
    none = sample_batch(shut, tmp_path / "none", active_guide=make_active_guide([]))
    assert [group.injection_status for group in none.mixed] == [
        "gate_closed" if share else "no_guide" for share in accuracies
    ]
    late = sample_batch(hard, tmp_path / "late", step=3, active_guide=make_active_guide([], until=2))
    assert {group.injection_status for group in late.mixed} == {"off"}


def selected_prompts(batch: StepBatch) -> list[str]:
    return [entry.group.prompt.prompt_id for entry in batch.selected]


def test_dynamic_sampling_stops_when_enough_groups_have_signal(scout, tmp_path):
    session = override_settings(open_session_at(scout, 0), "sampling", dynamic=True, max_gen_batches=4)
    batch = sample_batch(session, tmp_path)
    # Groups with right and wrong answers, in data order, no more than a batch; the cursor passes what was drawn.
    mixed = [group.prompt.prompt_id for group in batch.on_policy if len({r.reward for r in group.rollouts}) == 2]
    assert selected_prompts(batch) == mixed[:4]
    assert 1 < batch.num_gen_batches <= 4
    assert batch.position == 4 * batch.num_gen_batches == len(batch.on_policy)
    assert [g.prompt for g in batch.on_policy] == [
        session.task.train[i] for i in session.order.indices(0, batch.position)
    ]


def test_dynamic_sampling_stops_at_its_limit(hard, tmp_path):
    session = override_settings(hard, "sampling", dynamic=True, max_gen_batches=2)
    batch = sample_batch(session, tmp_path)
    assert (batch.num_gen_batches, batch.selected, len(batch.on_policy)) == (2, (), 8)


def test_dynamic_sampling_counts_signal_after_injection(hard, tmp_path):
    session = override_settings(hard, "sampling", dynamic=True, max_gen_batches=2)
    active_guide = make_active_guide(correct_trajectory(hard, prompt) for prompt in hard.task.train)
    batch = sample_batch(session, tmp_path, active_guide=active_guide)
    assert (batch.num_gen_batches, len(batch.selected)) == (1, 4)


def test_overlong_penalty_enters_advantages(hard, tmp_path):
    plain = sample_batch(hard, tmp_path / "plain").selected
    session = override_settings(hard, "sampling", overlong_buffer=18, overlong_penalty=1.0)
    shaped = sample_batch(session, tmp_path / "shaped").selected
    assert not any(entry.has_signal for entry in plain)
    for entry in shaped:
        lengths = [len(rollout.response_ids) for rollout in entry.group.rollouts]
        # all wrong, so the shortest is the best: an answer of T tokens loses T / 18
        if len(set(lengths)) > 1:
            best, worst = entry.advantages.index(max(entry.advantages)), entry.advantages.index(min(entry.advantages))
            assert (lengths[best], lengths[worst]) == (min(lengths), max(lengths))
    assert any(entry.has_signal for entry in shaped)


def test_batch_across_two_epochs_samples_a_prompt_anew(hard, tmp_path):
    size = len(hard.task.train)
    # The last 2 prompts of one epoch and the first 2 of the next, then as many draws as it takes to meet one again.
    session = override_settings(hard, "sampling", dynamic=True, max_gen_batches=5)
    batch = sample_batch(session, tmp_path, position=size - 2)
    seen = Counter(group.prompt.prompt_id for group in batch.on_policy)
    twice = [prompt_id for prompt_id, count in seen.items() if count == 2]
    assert (len(batch.on_policy), batch.position) == (20, size + 18)
    assert twice
    for prompt_id in twice:
        first, again = (group for group in batch.on_policy if group.prompt.prompt_id == prompt_id)
        assert [r.response_ids for r in first.rollouts] != [r.response_ids for r in again.rollouts]
