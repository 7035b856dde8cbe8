"""A probe of a real run: Q from its rollouts, V from the log-probabilities of two checkpoints, kills and reuse."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from npo_cli.autonpo import probe as probe_module
from npo_cli.autonpo import rollback_choice, sequential_test
from npo_cli.autonpo.probe import Probe, run_probe, score_recorded_rollouts, start_probe
from npo_cli.inference.base import SampleRequest
from npo_cli.policy.packing import TokenRow
from npo_cli.session.session import Session
from npo_cli.storage.checkpoints import find_checkpoint
from npo_cli.types.autonpo import AutoNPOState, ProbeResult
from npo_cli.types.rollouts import Group, Progress
from tests.helpers.autonpo_runs import find_transition, groups_of
from tests.helpers.guide_trajectories import override_settings
from tests.helpers.runs import copy_run, open_session_at


@dataclass(frozen=True, kw_only=True, slots=True)
class CountingEngine:
    """An engine that records what it samples."""

    engine: Any
    sampled: list[tuple[str, int]]

    def generate(self, requests: Sequence[SampleRequest], **options: Any) -> Any:
        self.sampled.extend((request.prompt_id, request.slot) for request in requests)
        return self.engine.generate(requests, **options)


def probe_at_6(root: Path, **changes: object) -> tuple[Probe, list[tuple[str, int]]]:
    """The probe of the plain run's step 6, and a list that its engine fills with (prompt id, slot)."""
    sampled: list[tuple[str, int]] = []
    session = override_settings(open_session_at(root, 6, branch="main"), "autonpo.probe", **changes)
    session = replace(session, engine=CountingEngine(engine=session.engine, sampled=sampled))
    state = AutoNPOState(branch="main", step=6, phase="PROBE")
    return start_probe(session, state, find_checkpoint(session.run, "main", 6)), sampled


def result_of(generator: Any) -> Any:
    """The return value of a generator."""
    while True:
        try:
            next(generator)
        except StopIteration as done:
            return done.value


def probe_groups(probe: Probe) -> list[Group]:
    samples = probe.store.read_prompts().values()
    return [Group(prompt=probe.session.task.prompt(one.prompt_id), rollouts=one.rollouts) for one in samples]


@pytest.fixture(scope="module")
def full_probe(plain, tmp_path_factory) -> tuple[Probe, ProbeResult]:
    """All failed prompts of steps 3 to 6 sampled again, so that all weights are equal."""
    root = copy_run(plain, tmp_path_factory.mktemp("full_probe") / "run")
    probe, _ = probe_at_6(root, num_prompts=16)
    return probe, result_of(run_probe(probe))


def test_probe_quality_is_the_pass_rate_of_its_rollouts(full_probe):
    probe, found = full_probe
    accuracy = {
        group.prompt.prompt_id: sum(each.verdict == "correct" and each.finished for each in group.rollouts) / 4
        for group in probe_groups(probe)
    }
    near, far = probe.strata
    assert (near.max_age, far.min_age, far.max_age) == (2, 2, 4)
    segments = {2: near.prompt_ids, 4: near.prompt_ids + far.prompt_ids}
    assert [score.distance for score in found.scores] == [2, 4]
    for score in found.scores:
        ids = segments[score.distance]
        assert score.num_failed_prompts == score.num_probed == len(ids)
        # pass@1: every prompt was sampled 4 times
        assert score.quality == pytest.approx(sum(accuracy[prompt_id] for prompt_id in ids) / len(ids))
        assert score.quality_low <= score.quality <= score.quality_high
    assert found.num_prompts == len(segments[4]) == len(accuracy)
    assert found.num_samples == 4 * len(accuracy)
    tokens = sum(len(each.response_ids) for group in probe_groups(probe) for each in group.rollouts)
    assert found.num_tokens == tokens


def test_probe_quality_weights_strata_by_their_size(watched):
    """8 of the failed prompts were sampled: Q(D) = sum N_j q_j/sum N_j, from the logged strata."""
    evidence = find_transition(watched, "probe_accepted").evidence
    assert evidence["num_prompts"] == 8
    strata = evidence["strata"]
    assert sum(stratum["num_failed_prompts"] for stratum in strata) > 8
    for place, score in enumerate(evidence["scores"], start=1):
        inside = strata[:place]
        total = sum(stratum["num_failed_prompts"] for stratum in inside)
        by_hand = sum(each["num_failed_prompts"] * each["num_correct"] / each["num_samples"] for each in inside) / total
        assert score["num_failed_prompts"] == total
        assert score["quality"] == pytest.approx(by_hand)


def test_probe_variance_is_estimated_in_both_directions(watched):
    for number in (0, 1):
        scores = find_transition(watched, "probe_accepted", number).evidence["scores"]
        assert [score["distance"] for score in scores] == [2, 4]
        for score in scores:
            # exp of a KL
            assert 1.0 <= score["variance_forward"] < math.inf
            assert 1.0 <= score["variance_backward"] < math.inf
            assert score["num_backward_samples"] >= 4


def logps(session: Session, prompt: Any, response_ids: tuple[int, ...]) -> float:
    """Log-probability of a response under the loaded weights, summed over tokens."""
    row = TokenRow(prompt_ids=session.policy.encode(prompt), response_ids=response_ids)
    with torch.no_grad():
        scores = session.policy.score([row], temperature=1.0, chunk_tokens=4096)
    return scores.logps_NT[0].double().sum().item()


def test_probe_drift_equals_that_of_two_checkpoints_loaded_separately(full_probe):
    """a = step 2, b = step 6, samples of b: KL(b||a) = mean(log b - log a), one response at a time."""
    probe, found = full_probe
    root = probe.session.run.root
    pairs = [(group.prompt, each.response_ids) for group in probe_groups(probe) for each in group.rollouts]
    sums: dict[int, list[float]] = {}
    for step in (2, 6):
        session = open_session_at(root, step, branch="main")
        sums[step] = [logps(session, prompt, ids) for prompt, ids in pairs]
    differences = [b - a for b, a in zip(sums[6], sums[2], strict=True)]
    far = found.scores[-1]
    assert far.distance == 4
    assert far.kl_per_sequence == pytest.approx(max(0.0, sum(differences) / len(differences)), rel=1e-3, abs=1e-4)
    # Backward: what the policy of step 2 sampled in step 3 for the failed prompts.
    failed = {prompt_id for stratum in probe.strata for prompt_id in stratum.prompt_ids}
    recorded = [
        (group.prompt, each)
        for group in groups_of(root, "main", 3)
        if group.prompt.prompt_id in failed
        for each in group.rollouts
    ]
    assert far.num_backward_samples == len(recorded) >= 4
    current = open_session_at(root, 6, branch="main")
    by_hand = [logps(current, prompt, each.response_ids) - sum(each.behavior_logps) for prompt, each in recorded]
    probe.session.policy.load(probe.checkpoint.path)
    backward = score_recorded_rollouts(probe, 2)
    assert [sample.log_w for sample in backward] == pytest.approx(by_hand, abs=1e-3)


def test_probe_killed_between_chunks_samples_nothing_twice(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(probe_module, "CHUNK_PROMPTS", 3)
    roots = [copy_run(plain, tmp_path / name) for name in ("straight", "killed")]
    straight, all_samples = probe_at_6(roots[0])
    found = result_of(run_probe(straight))
    # 8 prompts in chunks of 3, 3 and 2; 4 samples each
    lines = [json.loads(line) for line in straight.store.path.read_text().splitlines()]
    assert [(line["candidate"], len(line["groups"])) for line in lines] == [("checkpoint:6", n) for n in (3, 3, 2)]
    assert len(all_samples) == len(set(all_samples)) == 32

    killed, before = probe_at_6(roots[1])
    for record in (generator := run_probe(killed)):
        if record == Progress(description="probe failed prompts", done=3, total=8):
            generator.close()
    assert len(before) == 12
    with killed.store.path.open("ab") as file:
        file.write(b'{"candidate":"checkpoint:6","groups":[{"pro')  # torn while the second chunk was written
    again, after = probe_at_6(roots[1])
    assert result_of(run_probe(again)) == found
    assert before + after == all_samples
    assert straight.store.path.read_bytes() == again.store.path.read_bytes()


def test_probe_in_four_parts_killed_between_two_ends_the_same(plain, tmp_path, monkeypatch):
    """Looks at 2, 4, 6 and 8 prompts, none of which accepts; what is measured is what one look at 8 measures."""
    roots = [copy_run(plain, tmp_path / name) for name in ("whole", "straight", "killed")]
    whole = result_of(run_probe(probe_at_6(roots[0], min_quality=0.99)[0]))
    monkeypatch.setattr(sequential_test, "MIN_PROMPTS_PER_LOOK", 2)
    monkeypatch.setattr(rollback_choice, "MIN_POWER", -1.0)
    straight, all_samples = probe_at_6(roots[1], min_quality=0.99)
    found = result_of(run_probe(straight))
    assert (found.stop, found.num_prompts, found.level) == ("complete", 8, pytest.approx(0.025 * 7 / 16))
    lines = [json.loads(line) for line in straight.store.path.read_text().splitlines()]
    assert [len(line["groups"]) for line in lines] == [2, 2, 2, 2]
    assert len(all_samples) == len(set(all_samples)) == 32
    for ours, theirs in zip(found.scores, whole.scores, strict=True):
        assert (ours.quality, ours.num_backward_samples) == (theirs.quality, theirs.num_backward_samples)
        assert ours.kl_per_sequence == pytest.approx(theirs.kl_per_sequence, abs=1e-5)
        assert ours.quality_self == pytest.approx(theirs.quality_self, abs=1e-5)
        assert (ours.value is None, ours.price > ours.distance) == (False, True)

    killed, before = probe_at_6(roots[2], min_quality=0.99)
    looks = 0
    for record in (generator := run_probe(killed)):
        looks += record == Progress(description="score past checkpoints", done=2, total=2)
        if looks == 2 and record.description == "probe failed prompts":
            generator.close()
    assert len(before) == 16
    again, after = probe_at_6(roots[2], min_quality=0.99)
    assert result_of(run_probe(again)) == found
    assert before + after == all_samples
    assert straight.store.path.read_bytes() == again.store.path.read_bytes()


def test_probe_stops_for_futility_after_its_first_part(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(sequential_test, "MIN_PROMPTS_PER_LOOK", 2)
    probe, sampled = probe_at_6(copy_run(plain, tmp_path / "run"), min_quality=1.0)
    found = result_of(run_probe(probe))
    assert (found.is_accepted, found.stop, found.num_prompts, len(sampled)) == (False, "futility", 2, 8)


def test_probe_that_is_complete_is_read_from_disk(watched, tmp_path):
    probe, sampled = probe_at_6(copy_run(watched, tmp_path / "run"))
    found = result_of(run_probe(probe))
    assert sampled == []
    evidence = find_transition(watched, "probe_accepted").evidence
    assert found.distance == evidence["distance"]
    assert [score.signal for score in found.scores] == [score["signal"] for score in evidence["scores"]]


def test_probe_with_other_settings_has_its_own_folder(watched, tmp_path):
    root = copy_run(watched, tmp_path / "run")
    folders = [
        probe_at_6(root, **changes)[0].store.folder
        for changes in ({}, {"samples_per_prompt": 5}, {"num_prompts": 9}, {})
    ]
    assert folders[0] == folders[3]
    assert len(set(folders)) == 3


def test_probe_without_failed_prompts_is_rejected(plain, tmp_path):
    """A run in which nothing failed."""
    probe, sampled = probe_at_6(copy_run(plain, tmp_path / "run"))
    empty = replace(probe, strata=tuple(replace(each, prompt_ids=()) for each in probe.strata))
    found = result_of(run_probe(empty))
    assert (found.is_accepted, found.num_samples, sampled) == (False, 0, [])
    assert found.reason.startswith("only 0 failed prompts in the last 4 steps")
