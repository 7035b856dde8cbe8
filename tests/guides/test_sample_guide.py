"""Guide caches: which prompts are sampled, which responses are kept, and their log-probabilities."""

import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from npo_cli.guides import build_cache as guide_cache
from npo_cli.guides.build_cache import build_guide_cache, rank_responses
from npo_cli.guides.source import (
    GuideSource,
    PromptResponses,
    ReplayTarget,
    compute_logprobs,
    create_source,
    is_yield_low,
    parse_spec,
)
from npo_cli.policy.packing import TokenRow
from npo_cli.session.learner import find_learner
from npo_cli.session.session import Session
from npo_cli.storage.guide_cache import read_guide_prompts
from npo_cli.storage.layout import open_run
from npo_cli.storage.rollout_log import RolloutLog
from npo_cli.types.guides import GuideCacheInfo
from npo_cli.types.rollouts import Rollout
from tests.helpers.guide_trajectories import correct_trajectory, override_settings
from tests.helpers.runs import WHOLE_REPLAY, copy_run, file_digests, open_session_at, sample, train, trajectories


def open_checkpoint_source(session: Session) -> GuideSource:
    """Step 4 as guide of step 2, in a session of step 4."""
    learner = find_learner(session.run, at=2, branch=None, overrides=())
    source = create_source(parse_spec("4"), ReplayTarget(run=session.run, learner=learner))
    source.open(session)
    return source


def visited(root: Path, steps: range) -> list[str]:
    log = RolloutLog(open_run(root).rollouts_path("main"))
    return [group.prompt.prompt_id for step in steps for group in log.read_step(step)]


def test_guide_cache_samples_exactly_the_prompts_of_the_replay(scout):
    assert list(read_guide_prompts(open_run(scout).guide_folder("near"))) == visited(scout, range(3, 5))


def test_guide_cache_keeps_only_finished_correct_responses(scout):
    session, found = open_session_at(scout, 4), trajectories(scout)
    assert found
    prompts = [session.task.prompt(prompt_id) for prompt_id in found]
    graded = session.task.grade(prompts, [kept.text for kept in found.values()])
    assert {verdict.verdict for verdict in graded} == {"correct"}
    for kept in found.values():
        assert kept.response_ids[-1] in session.policy.eos_ids
        assert session.policy.tokenizer.decode(kept.response_ids[:-1]) == kept.text
        assert kept.guide_step == 4


def test_guide_cache_logprobs_are_those_of_the_guides_forward_pass(scout):
    session = open_session_at(scout, 4)
    for prompt_id, kept in trajectories(scout).items():
        row = TokenRow(prompt_ids=session.policy.encode(session.task.prompt(prompt_id)), response_ids=kept.response_ids)
        with torch.no_grad():
            scores = session.policy.score([row], temperature=1.0, chunk_tokens=4096)
        assert kept.behavior_logps == pytest.approx(scores.logps_NT[0].tolist(), abs=1e-5)
        assert len(kept.behavior_logps) == len(kept.response_ids)


def test_guide_cache_stops_sampling_a_solved_prompt(scout):
    queried = read_guide_prompts(open_run(scout).guide_folder("near"))
    for entry in queried.values():
        # rounds of 2, at most 8
        assert entry.num_sampled in (2, 4, 6, 8)
        assert (entry.num_correct > 0) or entry.num_sampled == 8
    assert {entry.prompt_id for entry in queried.values() if entry.num_correct} == set(trajectories(scout))
    assert min(entry.num_sampled for entry in queried.values()) < 8


def test_sampling_in_rounds_gives_the_first_samples_of_the_full_draw(scout):
    session = open_session_at(scout, 4)
    prompts = session.prompts_between(8, 16)
    in_rounds = open_checkpoint_source(session).sample(prompts)
    at_once = open_checkpoint_source(override_settings(session, "guide.cache", samples_per_round=8)).sample(prompts)
    for part, whole in zip(in_rounds, at_once, strict=True):
        drawn = [rollout.response_ids for rollout in part.rollouts]
        assert drawn == [rollout.response_ids for rollout in whole.rollouts[: len(drawn)]]
        assert not any(rollout.verdict == "correct" for rollout in part.rollouts[:-2])


def counts(info: GuideCacheInfo) -> tuple[int, int, int, int, bool]:
    return info.num_prompts, info.num_prompts_with_rollouts, info.num_samples, info.num_tokens, info.complete


def test_guide_cache_counts_agree_with_its_logs(scout, tmp_path):
    root = copy_run(scout, tmp_path / "run")
    info = sample(root, name="again")
    queried = read_guide_prompts(open_run(root).guide_folder("again")).values()
    tokens, samples = sum(entry.num_tokens for entry in queried), sum(entry.num_sampled for entry in queried)
    assert counts(info) == (8, len(trajectories(root, "again")), samples, tokens, True)


@pytest.mark.parametrize(
    "cut", [pytest.param(0.2, marks=pytest.mark.slow), 0.6, pytest.param(0.9, marks=pytest.mark.slow)]
)
def test_guide_cache_resumed_after_a_kill_is_the_same(scout, tmp_path, monkeypatch, cut):
    """The kill is one of its leftovers: some lines of the store, the last one torn."""
    monkeypatch.setattr(guide_cache, "CHUNK_PROMPTS", 3)
    straight, broken = (copy_run(scout, tmp_path / name) for name in ("straight", "broken"))
    for root in (straight, broken):
        shutil.rmtree(root / "guides")
    sample(straight)
    records = build_guide_cache(broken, spec=parse_spec("4"), at=2, name="near", overrides=WHOLE_REPLAY)
    for _ in range(3):  # two chunks of three are done when the third is announced
        next(records)
    records.close()
    path = broken / "guides/near/rollouts.jsonl"
    data = path.read_bytes()
    path.write_bytes(data[: round(cut * len(data))])
    sample(broken)
    assert path.read_bytes() == (straight / "guides/near/rollouts.jsonl").read_bytes()
    assert (
        file_digests(broken)["branches/main/rollouts.jsonl"] == file_digests(straight)["branches/main/rollouts.jsonl"]
    )


# Which prompts are sampled, and when sampling ends

HOPELESS = ("guide.cache.temperature=50", "guide.cache.min_yield=0.05")
"""Random tokens: no response is correct."""


def test_guide_is_sampled_on_prompts_that_failed_on_record_or_have_no_record(scout, tmp_path):
    root = copy_run(scout, tmp_path / "run")
    info = sample(root, "guide.cache.prompts=failed", name="failed", steps=3)  # steps 3 and 4 are recorded, 5 is not
    log = RolloutLog(open_run(root).rollouts_path("main"))
    recorded = {group.prompt.prompt_id: group.accuracy for step in (3, 4) for group in log.read_step(step)}
    prompt_ids = [prompt.prompt_id for prompt in open_session_at(root, 4).prompts_between(8, 20)]
    expected = [prompt_id for prompt_id in prompt_ids if recorded.get(prompt_id, 0) <= 0.6]
    assert set(recorded) - set(expected)
    assert set(expected) - set(recorded)
    assert list(read_guide_prompts(open_run(root).guide_folder("failed"))) == expected
    assert (info.num_steps, info.num_prompts, info.max_accuracy) == (3, len(expected), 0.6)


def test_guide_covers_a_fraction_of_the_steps_up_to_it_or_the_steps_asked_for(scout):
    def num_steps(spec: str, *overrides: str, steps: int | None = None) -> int:
        learner = find_learner(open_run(scout), at=0, branch=None, overrides=("guide.cache.coverage=0.6", *overrides))
        return create_source(
            parse_spec(spec), ReplayTarget(run=open_run(scout), learner=learner, steps=steps)
        ).num_steps

    assert num_steps("4") == 3  # ceil(0.6 x 4)
    assert num_steps("4", steps=4) == num_steps("4", "guide.replay.num_steps=4") == 4
    assert num_steps("self") == 4, "a source that is not ahead covers the rest of the run"


def test_hopeless_guide_ends_its_rounds_and_then_the_cache(scout, tmp_path, monkeypatch):
    """8 prompts at a time in rounds of 2: 16, then 32 samples without a success are enough."""
    monkeypatch.setattr(guide_cache, "CHUNK_PROMPTS", 8)
    straight, broken = (copy_run(scout, tmp_path / name) for name in ("straight", "broken"))
    arguments = {"spec": parse_spec("4"), "at": 0, "name": "bad", "overrides": (*WHOLE_REPLAY, *HOPELESS)}
    *_, warning, info = build_guide_cache(straight, **arguments)
    assert (info.num_prompts, info.num_samples, info.num_prompts_with_rollouts) == (8, 32, 0)
    assert (warning.level, "8 of 16 prompts" in warning.message) == ("warning", True)
    killed = build_guide_cache(broken, **arguments)
    while not (broken / "guides/bad/rollouts.jsonl").exists():
        next(killed)
    killed.close()
    assert list(build_guide_cache(broken, **arguments))[-1] == info
    assert file_digests(broken)["guides/bad/rollouts.jsonl"] == file_digests(straight)["guides/bad/rollouts.jsonl"]


def test_rounds_end_below_the_least_yield():
    """Rounds of (samples, correct ones), judged by the last ones with 32 samples."""
    assert not is_yield_low([(31, 0)], 0.05)
    assert is_yield_low([(32, 1)], 0.05)  # 0.031
    assert not is_yield_low([(40, 2)], 0.05)  # 0.05
    assert is_yield_low([(64, 50), (20, 1), (16, 0)], 0.05)  # 1 of 36
    assert not is_yield_low([(64, 50), (20, 1)], 0.05)  # 51 of 84
    assert not is_yield_low([(1000, 0)], 0)


def test_recorded_successes_are_reused_with_the_step_and_logprobs_of_their_policy(scout, tmp_path):
    root = copy_run(scout, tmp_path / "run")
    sample(root, "guide.cache.reuse_steps=2", name="reused")
    log = RolloutLog(open_run(root).rollouts_path("main"))
    recorded = {
        (rollout.prompt_id, rollout.response_ids): (rollout.sampler_step, rollout.behavior_logps)
        for step in (3, 4)
        for group in log.read_step(step)
        for rollout in group.rollouts
        if rollout.is_correct
    }
    solved = {prompt_id for prompt_id, _ in recorded}
    kept = trajectories(root, "reused")
    assert solved < kept.keys()
    for prompt_id, rollout in kept.items():
        assert rollout.source == "guide"
        if prompt_id in solved:
            assert recorded[prompt_id, rollout.response_ids] == (rollout.sampler_step, rollout.behavior_logps)
        else:
            assert rollout == trajectories(root)[prompt_id], "sampled from step 4 as without the record"
    samples = read_guide_prompts(open_run(root).guide_folder("reused"))
    assert {prompt_id for prompt_id, one in samples.items() if one.num_tokens == 0} == solved


# Selection among several correct responses


@pytest.fixture(scope="module")
def candidates(scout) -> tuple[Session, PromptResponses]:
    """One prompt with correct responses of 9, 8 and 10 tokens (slots 1, 2, 3), a wrong one and an unfinished one."""
    session = open_session_at(scout, 4)
    prompt = next(prompt for prompt in session.task.train if len(prompt.prompt_id.split("/")[1]) == 7)
    ids = correct_trajectory(session, prompt).response_ids

    def rollout(slot: int, ids: tuple[int, ...], verdict: str, *, finished: bool = True) -> Rollout:
        return Rollout(
            prompt_id=prompt.prompt_id,
            slot=slot,
            response_ids=ids,
            behavior_logps=(),
            text="",
            finished=finished,
            sampler_step=4,
            verdict=verdict,
            reward=1.0 if verdict == "correct" else 0.0,
        )

    *body, end = ids
    rollouts = (
        rollout(0, tuple(body[:3]), "wrong"),
        rollout(1, ids, "correct"),
        rollout(2, (*body[:-2], end), "correct"),
        rollout(3, (*body, body[-1], end), "correct"),
        rollout(4, tuple(body[:2]), "correct", finished=False),
    )
    return session, PromptResponses(prompt=prompt, rollouts=rollouts)


def ranked(candidates: tuple[Session, PromptResponses], **changes: object) -> list[Rollout]:
    """The responses in the order in which they are kept under these settings of guide.cache."""
    session, responses = candidates
    source = open_checkpoint_source(override_settings(session, "guide.cache", **changes))
    (ordered,) = rank_responses(source, [responses], label=4)
    return ordered


def test_select_shortest_ranks_by_number_of_tokens(candidates):
    assert [rollout.slot for rollout in ranked(candidates, select="shortest")] == [2, 1, 3]


def test_select_nearest_keeps_the_response_of_highest_learner_logprob_per_token(candidates):
    session, responses = candidates
    first, *_ = ranked(candidates, select="nearest")
    assert session.policy.digest == open_session_at(session.run.root, 4).policy.digest, "the guide's weights are back"
    learner = open_session_at(session.run.root, 2)
    correct = responses.correct_rollouts
    logprobs = compute_logprobs(learner, [(responses.prompt, rollout) for rollout in correct])
    means = [sum(logps_T) / len(logps_T) for logps_T in logprobs]
    assert first == correct[means.index(max(means))]


def test_select_random_depends_on_the_seed_only(candidates):
    session, responses = candidates
    assert ranked(candidates) == ranked(candidates)
    slots = {ranked((override_settings(session, "train", seed=seed), responses))[0].slot for seed in range(20)}
    assert slots == {1, 2, 3}


def test_min_correct_skips_prompts_and_keep_all_keeps_a_wrong_response(candidates):
    # three of the five are correct and finished
    assert len(ranked(candidates, min_correct=3)) == 3
    assert ranked(candidates, min_correct=4) == []
    session, responses = candidates
    wrong = (session, replace(responses, rollouts=responses.rollouts[:1]))
    assert ranked(wrong) == []
    assert [rollout.verdict for rollout in ranked(wrong, keep="all")] == ["wrong"]


def test_select_shortest_draws_all_samples(scout):
    session = override_settings(open_session_at(scout, 4), "guide.cache", select="shortest", samples_per_prompt=4)
    responses = open_checkpoint_source(session).sample(session.prompts_between(8, 12))
    assert {len(entry.rollouts) for entry in responses} == {4}


def test_guide_cache_with_dynamic_sampling_covers_every_sampled_prompt(tmp_path):
    root = tmp_path / "run"
    train(root, "sampling.dynamic=true", "sampling.max_gen_batches=2", "train.prompts_per_step=2")
    sample(root)
    assert list(read_guide_prompts(open_run(root).guide_folder("near"))) == list(
        dict.fromkeys(visited(root, range(3, 5)))
    )


def test_guide_seeds_do_not_depend_on_the_order_of_prompts(scout):
    session = open_session_at(scout, 4)
    prompts = session.prompts_between(8, 16)
    shuffled = random.Random(0).sample(prompts, len(prompts))
    source = open_checkpoint_source(session)
    first = {entry.prompt.prompt_id: entry for entry in source.sample(prompts)}
    for entry in source.sample(shuffled):
        drawn = [replace(rollout, behavior_logps=(), mean_entropy=None) for rollout in entry.rollouts]
        assert drawn == [
            replace(rollout, behavior_logps=(), mean_entropy=None) for rollout in first[entry.prompt.prompt_id].rollouts
        ]
