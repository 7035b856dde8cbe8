"""What a probe of a real run finds: counts that are those of its folder, ratios that are those of two checkpoints."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from npo_cli.autonpo import probe as confirm
from npo_cli.autonpo.probe import Probe, run_probe, score_past_checkpoints, start_probe
from npo_cli.inference.base import SampleRequest
from npo_cli.policy.logprobs import TokenRow
from npo_cli.session.session import Session
from npo_cli.storage.autonpo_log import count_probe_tokens
from npo_cli.storage.checkpoints import find_checkpoint
from npo_cli.types.autonpo import ProbeResult
from npo_cli.types.rollouts import Group, Progress
from tests.helpers.autonpo_runs import find_transition, groups_of
from tests.helpers.guide_trajectories import override_settings
from tests.helpers.runs import copy_run, open_session_at


@dataclass(frozen=True, kw_only=True, slots=True)
class Counting:
    """An engine that remembers whom it was asked."""

    engine: Any
    asked: list[tuple[str, int]]

    def generate(self, requests: Sequence[SampleRequest], **law: Any) -> Any:
        self.asked.extend((request.prompt_id, request.slot) for request in requests)
        return self.engine.generate(requests, **law)


def probe_at_6(root: Path, **changes: object) -> tuple[Probe, list[tuple[str, int]]]:
    """What the plain run's step 6 is asked, and a list of who will have been."""
    asked: list[tuple[str, int]] = []
    session = override_settings(open_session_at(root, 6, branch="main"), "autonpo.probe", **changes)
    session = replace(session, engine=Counting(engine=session.engine, asked=asked))
    return start_probe(session, "main", find_checkpoint(session.run, "main", 6)), asked


def finished(doing: Any) -> Any:
    """What a generator returns in the end."""
    while True:
        try:
            next(doing)
        except StopIteration as done:
            return done.value


def answers(probe: Probe) -> list[Group]:
    return [group for _, group in probe.folder.rollouts.iter_groups()]


@pytest.fixture(scope="module")
def everybody(plain, tmp_path_factory) -> tuple[Probe, ProbeResult]:
    """All mistakes of steps 3 to 6 asked again, so that nothing is weighted."""
    root = copy_run(plain, tmp_path_factory.mktemp("everybody") / "run")
    probe, _ = probe_at_6(root, num_prompts=16)
    return probe, finished(run_probe(probe))


def test_quality_is_counted_from_the_answers_in_the_folder(everybody):
    probe, found = everybody
    right = {
        group.prompt.prompt_id: sum(each.verdict == "correct" and each.finished for each in group.rollouts) / 4
        for group in answers(probe)
    }
    near, far = probe.strata
    assert (near.farthest, far.nearest, far.farthest) == (2, 2, 4)
    slices = {2: near.prompt_ids, 4: near.prompt_ids + far.prompt_ids}
    assert [score.distance for score in found.scores] == [2, 4]
    for score in found.scores:
        ids = slices[score.distance]
        assert score.num_mistakes == score.num_probed == len(ids)
        # pass@1: everybody was asked 4 times
        assert score.quality == pytest.approx(sum(right[prompt_id] for prompt_id in ids) / len(ids))
        assert score.quality_low <= score.quality <= score.quality_high
    assert found.num_prompts == len(slices[4]) == len(right)
    assert found.num_samples == 4 * len(right)
    tokens = sum(len(each.response_ids) for group in answers(probe) for each in group.rollouts)
    assert found.num_tokens == count_probe_tokens(probe.folder) == tokens


def test_a_sample_of_the_probe_is_weighted_by_its_stratum(watched):
    """8 of the mistakes were asked: Q(D) = sum N_j q_j/sum N_j, as the journal has it."""
    evidence = find_transition(watched, "accepted").evidence
    assert evidence["num_prompts"] == 8
    strata = evidence["strata"]
    assert sum(stratum["num_mistakes"] for stratum in strata) > 8
    for place, score in enumerate(evidence["scores"], start=1):
        inside = strata[:place]
        total = sum(stratum["num_mistakes"] for stratum in inside)
        by_hand = sum(each["num_mistakes"] * each["num_correct"] / each["num_samples"] for each in inside) / total
        assert score["num_mistakes"] == total
        assert score["quality"] == pytest.approx(by_hand)


def test_v_is_measured_from_both_sides_at_every_distance(watched):
    for number in (0, 1):
        scores = find_transition(watched, "accepted", number).evidence["scores"]
        assert [score["distance"] for score in scores] == [2, 4]
        for score in scores:
            # exp of a KL
            assert 1.0 <= score["variance_forward"] < math.inf
            assert 1.0 <= score["variance_backward"] < math.inf
            assert score["num_backward"] >= 4


def logps(session: Session, prompt: Any, response_ids: tuple[int, ...]) -> float:
    """Log-probability of a response under the weights at hand, all tokens."""
    row = TokenRow(prompt_ids=session.policy.encode(prompt), response_ids=response_ids)
    with torch.no_grad():
        scores = session.policy.score([row], temperature=1.0, chunk_tokens=4096)
    return scores.logps_NT[0].double().sum().item()


def test_the_drift_is_that_of_two_checkpoints_loaded_by_hand(everybody):
    """a = step 2, b = step 6, samples of b: KL(b||a) = mean(log b - log a), a response at a time."""
    probe, found = everybody
    root = probe.session.run.root
    pairs = [(group.prompt, each.response_ids) for group in answers(probe) for each in group.rollouts]
    sums: dict[int, list[float]] = {}
    for step in (2, 6):
        session = open_session_at(root, step, branch="main")
        sums[step] = [logps(session, prompt, ids) for prompt, ids in pairs]
    differences = [b - a for b, a in zip(sums[6], sums[2], strict=True)]
    far = found.scores[-1]
    assert far.distance == 4
    assert far.kl_per_sequence == pytest.approx(max(0.0, sum(differences) / len(differences)), rel=1e-3, abs=1e-4)
    # ... and the other way round: what step 2 had sampled in step 3 for the mistakes.
    failed = {prompt_id for stratum in probe.strata for prompt_id in stratum.prompt_ids}
    theirs = [
        (group.prompt, each)
        for group in groups_of(root, "main", 3)
        if group.prompt.prompt_id in failed
        for each in group.rollouts
    ]
    assert far.num_backward_samples == len(theirs) >= 4
    present = open_session_at(root, 6, branch="main")
    by_hand = [logps(present, prompt, each.response_ids) - sum(each.behavior_logps) for prompt, each in theirs]
    probe.session.policy.load(probe.present.path)
    behind = finished(score_past_checkpoints(probe, answers(probe)))[-1].backward
    assert [sample.log_w for sample in behind] == pytest.approx(by_hand, abs=1e-3)


def test_a_killed_probe_asks_nobody_twice_and_finds_the_same(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(confirm, "CHUNK_PROMPTS", 3)
    roots = [copy_run(plain, tmp_path / name) for name in ("straight", "killed")]
    straight, everyone = probe_at_6(roots[0])
    found = finished(run_probe(straight))
    # 8 prompts in chunks of 3, 3 and 2; 4 samples each
    assert straight.folder.rollouts.steps() == (0, 1, 2)
    assert len(everyone) == len(set(everyone)) == 32

    killed, before = probe_at_6(roots[1])
    for record in (doing := run_probe(killed)):
        if record == Progress(description="ask again what failed", done=3, total=8):
            doing.close()
    assert len(before) == 12
    with (killed.folder.folder / "rollouts.jsonl").open("ab") as file:
        file.write(b'{"step":1,"num_groups":1,"prompt":{"pro')  # torn while the second chunk was written
    again, after = probe_at_6(roots[1])
    assert finished(run_probe(again)) == found
    assert before + after == everyone
    paths = [probe.folder.folder / "rollouts.jsonl" for probe in (straight, again)]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_a_finished_probe_is_read_and_nobody_is_asked(watched, tmp_path):
    probe, asked = probe_at_6(copy_run(watched, tmp_path / "run"))
    found = finished(run_probe(probe))
    assert asked == []
    evidence = find_transition(watched, "accepted").evidence
    assert found.distance == evidence["distance"]
    assert [score.signal for score in found.scores] == [score["signal"] for score in evidence["scores"]]


def test_other_settings_are_another_probe(watched, tmp_path):
    root = copy_run(watched, tmp_path / "run")
    folders = [
        probe_at_6(root, **changes)[0].folder.folder
        for changes in ({}, {"samples_per_prompt": 5}, {"num_prompts": 9}, {})
    ]
    assert folders[0] == folders[3]
    assert len(set(folders)) == 3


def test_learner_ratios_of_nobody_are_none(plain, tmp_path):
    """A run in which nothing failed has nobody to ask."""
    probe, asked = probe_at_6(copy_run(plain, tmp_path / "run"))
    empty = replace(probe, mistakes=(), strata=tuple(replace(each, prompt_ids=()) for each in probe.strata))
    found = finished(run_probe(empty))
    assert (found.accepted, found.num_samples, asked) == (False, 0, [])
    assert found.reason.startswith("only 0 mistakes in the last 4 steps")
