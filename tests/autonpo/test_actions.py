"""Interventions in real runs: guides, rejected probes and replays, the early bootstrap, and missing files."""

import json
from pathlib import Path

import pytest

from npo_cli.autonpo.actions import PairedTest
from npo_cli.policy.optimizer import read_trainer_state
from npo_cli.storage.checkpoints import delete_checkpoint, demote_checkpoint, find_checkpoint, write_manifests
from npo_cli.storage.cost_sums import compute_run_costs, cost_at, read_cost_table
from npo_cli.storage.guide_cache import list_guide_caches, load_guide, read_guide_prompts
from npo_cli.storage.layout import open_run
from npo_cli.storage.lineage import list_branches, read_segments
from npo_cli.storage.sample_store import SampleStore
from tests.helpers.autonpo_runs import (
    NEVER,
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


def main_digests(root: Path) -> dict[str, str]:
    return {name: digest for name, digest in deterministic_digests(root).items() if name.startswith("branches/main/")}


# Guides


def test_guide_cache_reuses_correct_rollouts_of_the_probe(watched):
    run = open_run(watched)
    num_reused = 0
    for name, probe in (("auto-1", "main_step_000006"), ("auto-2", "auto-1_step_000008")):
        (folder,) = watched.glob(f"probes/{probe}_*")
        sampled = {prompt_id: samples.rollouts for prompt_id, samples in SampleStore(folder).read_prompts().items()}
        _, cached = load_guide(run, name)
        for prompt_id, entry in read_guide_prompts(run.guide_folder(name)).items():
            correct = [found for found in sampled.get(prompt_id, ()) if found.is_correct]
            if correct:
                assert cached[prompt_id].rollouts[0].response_ids in [found.response_ids for found in correct]
                # Not sampled again: the samples are those of the probe (4), and no token was generated.
                assert (entry.num_sampled, entry.num_correct, entry.num_tokens) == (4, len(correct), 0)
                num_reused += 1
            else:
                # guide.cache.samples_per_prompt = 8 in total, all of them used where none is correct
                assert entry.num_sampled <= 8
                assert entry.num_correct or entry.num_sampled == 8
                assert entry.num_tokens > 0
    assert (
        num_reused
        == sum(find_transition(watched, "guide_built", number).evidence["num_reused"] for number in (0, 1))
        >= 2
    )


# Rejected probe


def test_probe_of_a_small_pool_samples_nothing_and_its_cooldown_doubles(tmp_path):
    """17 prompts cannot have failed in 4 steps of 4."""
    root = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("npo_cli.autonpo.preflight.max_failed_prompts", lambda recipe, num_prompts: 99)
        list(start_autonpo(root, "autonpo.rollback.min_failed_prompts=17", "train.num_steps=16"))
    rejected = [found for found in transitions_of(root) if found.event == "probe_rejected"]
    assert len(rejected) >= 2
    assert {found.evidence["stop"] for found in rejected} == {"unsampled"}
    assert not (root / "probes").exists()
    assert not any(row["kind"] == "probe" for row in map(json.loads, (root / "costs.jsonl").read_text().splitlines()))
    assert [found.state.until_step - found.step for found in rejected] == [2**n for n in range(len(rejected))]


def test_rejected_early_bootstrap_continues_the_scout(tmp_path):
    root = tmp_path / "run"
    early = ("autonpo.early.enabled=true", "autonpo.early.scout_steps=4", "autonpo.early.replay_steps=4")
    list(start_autonpo(root, *early, *REJECTING, *NEVER))
    assert events_of(root)[:3] == ["started", "early_bootstrap", "probe_rejected"]
    assert list_branches(open_run(root)) == ["main"]
    assert not list_guide_caches(open_run(root))


def test_rejected_probe_leaves_training_unchanged(plain, tmp_path):
    root = tmp_path / "run"
    list(start_autonpo(root, *REJECTING))
    assert events_of(root).count("probe_rejected") >= 2
    assert {"probe_accepted", "guide_built", "rolled_back"}.isdisjoint(events_of(root))
    assert "autonpo.probe.min_quality is 99 %" in find_transition(root, "probe_rejected").evidence["reason"]
    assert main_digests(root) == main_digests(plain)
    assert list_branches(open_run(root)) == ["main"]
    assert not list_guide_caches(open_run(root))


# After the replay


@pytest.mark.slow
def test_replay_after_stop_ends_the_run(watched, tmp_path):
    root = tmp_path / "run"
    list(start_autonpo(root, "autonpo.replay.after=stop"))
    assert events_of(root)[-1] == "replay_done"
    # Up to there it is the same as otherwise; the last checkpoint is that of step 6.
    theirs = deterministic_digests(watched)
    ours = {
        name: digest
        for name, digest in deterministic_digests(root).items()
        if name.startswith("branches/auto-1/checkpoints")
    }
    assert {name.split("/")[3] for name in ours} == {"step_000006"}
    assert all(theirs[name] == digest for name, digest in ours.items())
    # It stays ended until the setting changes.
    assert steps_of(start_autonpo_resume(root)) == []
    assert next(report.step for report in steps_of(start_autonpo_resume(root, "autonpo.replay.after=continue"))) == 7


def test_guide_cache_that_found_nothing_is_paid_by_the_branch_that_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "npo_cli.guides.build_cache.rank_responses", lambda source, responses, *, label: [[]] * len(responses)
    )
    root = tmp_path / "run"
    # The empty cache is the one intervention that is allowed, so that the triggers after it build no second one.
    list(start_autonpo(root, "autonpo.max_interventions=1"))
    run, vain = open_run(root), find_transition(root, "guide_empty")
    (cache,) = list_guide_caches(run)
    assert (vain.state.branch, cache.num_prompts_with_rollouts, list_branches(run)) == ("main", 0, ["main"])
    table, costs = read_cost_table(run), compute_run_costs(run, "main")
    # Until its step training and probe; from then on the cache too, and at the end everything that was executed.
    until = sum(table.steps["main"][step].tokens for step in range(1, vain.step + 1))
    probes = sum(cost.tokens for step, cost in table.at_step["main"].items() if step <= vain.step)
    assert cost_at(run, "main", vain.step).tokens == until + probes
    last = cost_at(run, "main", costs.step)
    assert (last.tokens, last.seconds, costs.unused_guides) == (costs.tokens, pytest.approx(costs.seconds), ())


def test_acceptance_test_accepts_a_replay_that_is_not_worse(tmp_path):
    root = tmp_path / "run"
    list(start_autonpo(root, "autonpo.replay.acceptance_test=true", "autonpo.max_interventions=1"))
    accepted = find_transition(root, "replay_accepted")
    assert (accepted.phase_before, accepted.state.branch, accepted.evidence["parent"]) == (
        "ACCEPTANCE_TEST",
        "auto-1",
        "main",
    )
    evidence = accepted.evidence
    assert evidence["num_prompts"] == 8
    assert evidence["difference"] == pytest.approx(evidence["replayed_accuracy"] - evidence["abandoned_accuracy"])
    assert evidence["difference_low"] <= evidence["difference"] <= evidence["difference_high"]
    assert evidence["difference_high"] >= 0


def test_acceptance_test_rejects_a_worse_replay_and_its_parent_continues_as_plain_grpo(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(PairedTest, "is_worse", property(lambda test: True))
    root = tmp_path / "run"
    list(
        start_autonpo(
            root,
            "autonpo.replay.acceptance_test=true",
            "autonpo.trigger.cooldown_steps=2",
            "autonpo.max_interventions=1",
        )
    )
    rejected = find_transition(root, "replay_rejected")
    # Tested at 6, cooldown at 7 and 8, armed at 9 on the parent.
    assert (rejected.step, rejected.state.branch, rejected.state.phase, rejected.state.until_step) == (
        6,
        "main",
        "COOLDOWN",
        8,
    )
    assert find_transition(root, "armed", 1).step == 9
    assert transitions_of(root)[-1].state.branch == "main"
    assert main_digests(root) == main_digests(plain)
    assert [segment.branch for segment in read_segments(open_run(root))] == ["main", "auto-1", "main"]


@pytest.mark.slow
def test_acceptance_test_without_a_checkpoint_keeps_the_replay(tmp_path):
    root = tmp_path / "run"
    for record in start_autonpo(root, "autonpo.replay.acceptance_test=true", "autonpo.max_interventions=1"):
        if getattr(record, "event", "") == "replay_done":
            delete_checkpoint(find_checkpoint(open_run(root), "main", 6))
    missing = find_transition(root, "prerequisite_missing")
    assert (missing.phase_before, missing.state.branch, missing.state.phase) == (
        "ACCEPTANCE_TEST",
        "auto-1",
        "COOLDOWN",
    )
    assert "step 6" in missing.evidence["reason"]
    assert transitions_of(root)[-1].state.branch == "auto-1"


@pytest.mark.slow
def test_early_bootstrap_with_a_short_replay_samples_only_its_prompts(tmp_path):
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
    assert {"replay_accepted", "replay_rejected"} & set(events_of(root))
    queried = read_guide_prompts(open_run(root).guide_folder("early"))
    # only prompts of the window's two steps of 4, whenever the scout failed them last
    assert set(queried) <= {each for step in (1, 2) for each in prompt_ids(root, "main", step)}


# Early bootstrap


def test_early_bootstrap_restarts_from_the_base_with_guides(tmp_path):
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
    events = ["early_bootstrap", "probe_accepted", "guide_built", "rolled_back", "replay_done", "armed"]
    assert events_of(root) == ["started", *events]
    segment = read_segments(open_run(root))[-1]
    assert (segment.branch, segment.parent, segment.fork_step, segment.guide_until) == ("early", "main", 0, 2)
    # It is not counted as an intervention. Its probe is of the prompts that the replay visits.
    assert transitions_of(root)[-1].state.num_interventions == 0
    (probe,) = (root / "probes").iterdir()
    assert set(SampleStore(probe).read_prompts()) <= set(failed_prompts(root, "main", range(1, 3), at_most=0.25))
    assert find_transition(root, "probe_accepted").evidence["distance"] == 4
    mixes = {step: {group.injection_status for group in groups_of(root, "early", step)} for step in range(1, 13)}
    assert all(mixes[step] == {"off"} for step in range(3, 13))
    assert "injected" in mixes[1] | mixes[2]
    queried = read_guide_prompts(open_run(root).guide_folder("early"))
    assert set(queried) <= set(failed_prompts(root, "main", range(1, 3), at_most=0.25))


# Missing files


def test_probe_without_its_checkpoint_is_skipped_and_training_continues(plain, tmp_path):
    root = copy_run(plain, tmp_path / "run")
    delete_checkpoint(find_checkpoint(open_run(root), "main", 6))
    list(start_autonpo_resume(root))
    missing = find_transition(root, "prerequisite_missing")
    assert (missing.step, missing.phase_before, missing.state.phase) == (6, "PROBE", "COOLDOWN")
    assert "step 6" in missing.evidence["reason"]
    assert transitions_of(root)[-1].step > 6


@pytest.mark.slow
def test_probe_of_a_weights_only_checkpoint_is_skipped(plain, tmp_path):
    root = copy_run(plain, tmp_path / "run")
    demote_checkpoint(find_checkpoint(open_run(root), "main", 6))
    list(start_autonpo_resume(root))
    assert "weights only" in find_transition(root, "prerequisite_missing").evidence["reason"]


@pytest.mark.parametrize("spoil", [delete_checkpoint, pytest.param(demote_checkpoint, marks=pytest.mark.slow)])
def test_rollback_chooses_among_the_distances_that_have_a_checkpoint(plain, tmp_path, spoil):
    """D = 2 of step 6 leads to step 4, which is gone; D = 4 leads to step 2."""
    root = copy_run(plain, tmp_path / "run")
    spoil(find_checkpoint(open_run(root), "main", 4))
    list(start_autonpo_resume(root, "autonpo.max_interventions=1"))
    accepted = find_transition(root, "probe_accepted")
    assert (accepted.step, accepted.state.distance) == (6, 4)
    assert find_transition(root, "rolled_back").evidence["to_step"] == 2


def test_probe_without_any_rollback_checkpoint_is_skipped(plain, tmp_path):
    root = copy_run(plain, tmp_path / "run")
    for step in (2, 4):
        delete_checkpoint(find_checkpoint(open_run(root), "main", step))
    list(start_autonpo_resume(root, "autonpo.max_interventions=1"))
    reason = "no full checkpoint 2 or 4 steps before step 6"
    assert find_transition(root, "prerequisite_missing").evidence == {"reason": reason}
    assert not any(root.glob("probes/main_step_000006*/rollouts*"))


@pytest.mark.slow
def test_rollback_checkpoint_lost_after_the_probe_ends_the_intervention(watched, tmp_path):
    root = tmp_path / "run"
    for record in (records := start_autonpo(root)):
        if getattr(record, "event", "") == "probe_accepted":
            records.close()
    delete_checkpoint(find_checkpoint(open_run(root), "main", 4))
    list(start_autonpo_resume(root))
    missing = find_transition(root, "prerequisite_missing")
    assert (missing.step, missing.phase_before) == (6, "GUIDE_GEN")
    assert (
        events_of(root)[: events_of(root).index("prerequisite_missing")]
        == events_of(watched)[: events_of(root).index("prerequisite_missing")]
    )


def test_probe_of_an_empty_pool_is_rejected(plain, tmp_path):
    """A checkpoint without failed prompts: the probe has no prompts, and training continues."""
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
        find_transition(root, "probe_rejected").evidence["reason"]
        == "only 0 failed prompts in the last 4 steps; autonpo.rollback.min_failed_prompts is 2"
    )
    ours = find_checkpoint(open_run(root), "main", 12).path / "model.safetensors"
    assert ours.read_bytes() == (tmp_path / "gone/model.safetensors").read_bytes()
