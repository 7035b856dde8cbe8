"""What an intervention leaves, and what becomes of it where it is rejected, reverted, early, or robbed of its files."""

import json
from pathlib import Path

import pytest

from npo_cli.autonpo.acceptance_test import PairedTest
from npo_cli.policy.optimizer import read_trainer_state
from npo_cli.storage.autonpo_log import list_probes
from npo_cli.storage.checkpoints import delete_checkpoint, demote_checkpoint, find_checkpoint
from npo_cli.storage.guide_cache import list_guide_caches, load_guide, read_queried_prompts
from npo_cli.storage.layout import open_run
from npo_cli.storage.lineage import list_branches, read_segments
from npo_cli.storage.manifests import write_manifests
from tests.helpers.autonpo_runs import (
    REJECTING,
    deterministic_digests,
    events_of,
    failed_prompts,
    find_transition,
    groups_of,
    prompt_ids,
    start_autonpo,
    start_autonpo_resume,
    transitions_of,
)
from tests.helpers.runs import copy_run, steps_of


def main_of(root: Path) -> dict[str, str]:
    return {name: digest for name, digest in deterministic_digests(root).items() if name.startswith("branches/main/")}


# Guides


def test_right_answers_of_the_probe_are_the_guides_word_for_word(watched):
    run = open_run(watched)
    num_reused = 0
    for name, probe in (("auto-1", ("main", 6)), ("auto-2", ("auto-1", 8))):
        (folder,) = [found for found in list_probes(run) if (found.branch, found.step) == probe]
        heard = {group.prompt.prompt_id: group.rollouts for _, group in folder.rollouts.iter_groups()}
        _, cached = load_guide(run, name)
        for prompt_id, entry in read_queried_prompts(run.guide_folder(name)).items():
            right = [found for found in heard.get(prompt_id, ()) if found.verdict == "correct" and found.finished]
            if right:
                assert cached[prompt_id][0].response_ids in [found.response_ids for found in right]
                # Asked no more: the samples are those of the probe (4), and no token was generated.
                assert (entry.num_sampled, entry.num_correct, entry.num_tokens) == (4, len(right), 0)
                num_reused += 1
            else:
                # guide.cache.samples_per_prompt = 8 in all; whoever has no answer was asked that often
                assert entry.num_sampled <= 8
                assert entry.num_correct or entry.num_sampled == 8
                assert entry.num_tokens > 0
    assert (
        num_reused == sum(find_transition(watched, "guided", number).evidence["num_reused"] for number in (0, 1)) >= 2
    )


# Rejected


def test_a_rejected_probe_leaves_training_as_if_it_had_never_been(plain, tmp_path):
    root = tmp_path / "run"
    list(start_autonpo(root, *REJECTING))
    assert events_of(root).count("rejected") >= 2
    assert {"accepted", "guided", "rolled_back"}.isdisjoint(events_of(root))
    assert "autonpo.probe.min_quality is 99 %" in find_transition(root, "rejected").evidence["reason"]
    assert main_of(root) == main_of(plain)
    assert list_branches(open_run(root)) == ["main"]
    assert not list_guide_caches(open_run(root))


# After the replay


def test_after_the_replay_the_run_may_end_there(watched, tmp_path):
    root = tmp_path / "run"
    list(start_autonpo(root, "autonpo.replay.after=stop"))
    assert events_of(root)[-1] == "replayed"
    # What it did up to there is what it does otherwise: the last checkpoint is that of step 6.
    theirs = deterministic_digests(watched)
    ours = {
        name: digest
        for name, digest in deterministic_digests(root).items()
        if name.startswith("branches/auto-1/checkpoints")
    }
    assert {name.split("/")[3] for name in ours} == {"step_000006"}
    assert all(theirs[name] == digest for name, digest in ours.items())
    # It stays ended, until somebody changes that.
    assert steps_of(start_autonpo_resume(root)) == []
    assert next(report.step for report in steps_of(start_autonpo_resume(root, "autonpo.replay.after=continue"))) == 7


def test_a_replay_that_is_not_worse_is_kept(tmp_path):
    root = tmp_path / "run"
    list(start_autonpo(root, "autonpo.replay.acceptance_test=true", "autonpo.max_interventions=1"))
    kept = find_transition(root, "kept")
    assert (kept.phase_before, kept.state.branch, kept.evidence["parent"]) == ("JUDGE", "auto-1", "main")
    assert kept.evidence["num_prompts"] == 8
    # micro evaluates with several answers a prompt: shares of them, and their difference
    assert kept.evidence["difference"] == pytest.approx(kept.evidence["replayed"] - kept.evidence["abandoned"])
    assert kept.evidence["difference_low"] <= kept.evidence["difference"] <= kept.evidence["difference_high"]
    assert kept.evidence["difference_high"] >= 0


def test_a_worse_replay_is_left_and_its_parent_goes_on_like_plain_grpo(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(PairedTest, "worse", property(lambda test: True))
    root = tmp_path / "run"
    list(
        start_autonpo(
            root,
            "autonpo.replay.acceptance_test=true",
            "autonpo.trigger.cooldown_steps=2",
            "autonpo.max_interventions=1",
        )
    )
    reverted = find_transition(root, "reverted")
    # Judged at 6, resting at 7 and 8, armed at 9 on the parent.
    assert (reverted.step, reverted.state.branch, reverted.state.phase, reverted.state.until_step) == (
        6,
        "main",
        "COOLDOWN",
        8,
    )
    assert find_transition(root, "armed", 1).step == 9
    assert transitions_of(root)[-1].state.branch == "main"
    assert main_of(root) == main_of(plain)
    assert [born.branch for born in read_segments(open_run(root))] == ["main", "auto-1", "main"]


def test_a_test_that_lacks_one_of_the_two_keeps_the_replay_and_says_why(tmp_path):
    root = tmp_path / "run"
    for record in start_autonpo(root, "autonpo.replay.acceptance_test=true", "autonpo.max_interventions=1"):
        if getattr(record, "event", "") == "replayed":
            delete_checkpoint(find_checkpoint(open_run(root), "main", 6))
    missed = find_transition(root, "missed")
    assert (missed.phase_before, missed.state.branch, missed.state.phase) == ("JUDGE", "auto-1", "COOLDOWN")
    assert "step 6" in missed.evidence["what"]
    assert transitions_of(root)[-1].state.branch == "auto-1"


def test_a_short_early_window_asks_only_its_own_prompts_and_is_judged_at_its_end(tmp_path):
    root = tmp_path / "run"
    early = (
        "autonpo.early.enabled=true",
        "autonpo.early.scout_steps=8",
        "autonpo.early.replay_steps=2",
        "autonpo.replay.acceptance_test=true",
        "autonpo.trigger.warmup_steps=9",
    )
    kept = ("autonpo.rollback.distances=[2]", "train.keep_full_checkpoints=2", "autonpo.max_interventions=0")
    list(start_autonpo(root, *early, *kept))
    assert {"kept", "reverted"} & set(events_of(root))
    asked = read_queried_prompts(open_run(root).guide_folder("early"))
    # only prompts of the window's two steps of 4, whenever the scout failed them last
    assert set(asked) <= {each for step in (1, 2) for each in prompt_ids(root, "main", step)}


# Early bootstrap


def test_an_early_bootstrap_teaches_a_new_start(tmp_path):
    root = tmp_path / "run"
    list(
        start_autonpo(
            root,
            "autonpo.early.enabled=true",
            "autonpo.early.scout_steps=4",
            "autonpo.early.replay_steps=2",
            "autonpo.trigger.min_entropy_drop_se=1000000",
        )
    )
    assert events_of(root) == ["started", "early", "guided", "rolled_back", "replayed", "armed"]
    born = read_segments(open_run(root))[-1]
    assert (born.branch, born.parent, born.fork_step, born.guide_until) == ("early", "main", 0, 2)
    # It counts for no intervention, and nothing was probed.
    assert transitions_of(root)[-1].state.num_interventions == 0
    assert list_probes(open_run(root)) == []
    mixes = {step: {group.injection_status for group in groups_of(root, "early", step)} for step in range(1, 13)}
    assert all(mixes[step] == {"off"} for step in range(3, 13))
    assert "injected" in mixes[1] | mixes[2]
    asked = read_queried_prompts(open_run(root).guide_folder("early"))
    assert set(asked) <= set(failed_prompts(root, "main", range(1, 3), at_most=0.25))


# What is gone


def test_without_the_policy_that_would_be_asked_the_trigger_is_missed_and_training_goes_on(plain, tmp_path):
    root = copy_run(plain, tmp_path / "run")
    delete_checkpoint(find_checkpoint(open_run(root), "main", 6))
    list(start_autonpo_resume(root))
    missed = find_transition(root, "missed")
    assert (missed.step, missed.phase_before, missed.state.phase) == (6, "PROBE", "COOLDOWN")
    assert "step 6" in missed.evidence["what"]
    assert transitions_of(root)[-1].step > 6


def test_weights_alone_cannot_be_asked_for_their_mistakes(plain, tmp_path):
    root = copy_run(plain, tmp_path / "run")
    demote_checkpoint(find_checkpoint(open_run(root), "main", 6))
    list(start_autonpo_resume(root))
    assert "weights only" in find_transition(root, "missed").evidence["what"]


@pytest.mark.parametrize("spoil", [delete_checkpoint, demote_checkpoint])
def test_without_one_old_state_the_other_distances_are_chosen_from(plain, tmp_path, spoil):
    """D = 2 of step 6 leads to step 4, which is gone; D = 4 leads to step 2."""
    root = copy_run(plain, tmp_path / "run")
    spoil(find_checkpoint(open_run(root), "main", 4))
    list(start_autonpo_resume(root, "autonpo.max_interventions=1"))
    accepted = find_transition(root, "accepted")
    assert (accepted.step, accepted.state.distance) == (6, 4)
    assert find_transition(root, "rolled_back").evidence["to_step"] == 2


def test_without_any_old_state_nobody_is_asked(plain, tmp_path):
    root = copy_run(plain, tmp_path / "run")
    for step in (2, 4):
        delete_checkpoint(find_checkpoint(open_run(root), "main", step))
    list(start_autonpo_resume(root, "autonpo.max_interventions=1"))
    assert find_transition(root, "missed").evidence == {
        "what": "no full state at any of autonpo.rollback.distances before step 6"
    }
    assert not any(root.glob("probes/main_step_000006*/rollouts*"))


def test_an_old_state_lost_between_probe_and_guides_is_missed(watched, tmp_path):
    root = tmp_path / "run"
    for record in (records := start_autonpo(root)):
        if getattr(record, "event", "") == "accepted":
            records.close()
    delete_checkpoint(find_checkpoint(open_run(root), "main", 4))
    list(start_autonpo_resume(root))
    missed = find_transition(root, "missed")
    assert (missed.step, missed.phase_before) == (6, "GUIDE_GEN")
    assert events_of(root)[: events_of(root).index("missed")] == events_of(watched)[: events_of(root).index("missed")]


def test_states_saved_before_mistakes_were_remembered_still_load(plain, tmp_path):
    """Nothing is known of what failed: the probe has nobody to ask, and training goes on from there."""
    root = copy_run(plain, tmp_path / "run")
    for path in root.rglob("training_state/state.json"):
        scalars = json.loads(path.read_text())
        del scalars["failed_prompts"]
        path.write_text(json.dumps(scalars))
        write_manifests(path.parents[1], branch="main", step=scalars["step"])
    (root / "branches/main/checkpoints/step_000012").rename(tmp_path / "gone")
    assert read_trainer_state(find_checkpoint(open_run(root), "main", 6).training_state_path).failed_prompts == ()
    list(start_autonpo_resume(root))
    assert (
        find_transition(root, "rejected").evidence["reason"]
        == "only 0 mistakes in the last 4 steps; autonpo.rollback.min_failed_prompts is 2"
    )
    ours = find_checkpoint(open_run(root), "main", 12).path / "model.safetensors"
    assert ours.read_bytes() == (tmp_path / "gone/model.safetensors").read_bytes()
