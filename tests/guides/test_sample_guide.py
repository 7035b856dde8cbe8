"""Guide caches: whose answers are kept, for which prompts, with which log-probabilities."""

import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from npo_cli.guides import build_cache as guide_cache
from npo_cli.guides.build_cache import rank_responses
from npo_cli.guides.registry import SourceSpec
from npo_cli.guides.sample_guide import build_guide_cache
from npo_cli.guides.source import PromptResponses, compute_logprobs
from npo_cli.guides.sources.checkpoint import CheckpointSource, sample_policy_in_rounds
from npo_cli.policy.logprobs import TokenRow
from npo_cli.session.session import Session
from npo_cli.storage.checkpoints import find_checkpoint
from npo_cli.storage.guide_cache import guide_rollouts_path, queried_prompts_path, read_queried_prompts
from npo_cli.storage.layout import open_run
from npo_cli.storage.rollout_log import RolloutLog
from npo_cli.types.guides import GuideCacheInfo
from npo_cli.types.rollouts import Rollout
from tests.helpers.guide_trajectories import correct_trajectory, override_settings
from tests.helpers.runs import copy_run, file_digests, open_session_at, sample, train, trajectories


def visited(root: Path, steps: range) -> list[str]:
    journal = RolloutLog(open_run(root).rollouts_path("main"))
    return [group.prompt.prompt_id for step in steps for group in journal.read_step(step)]


def test_exactly_the_prompts_of_the_segment_are_asked(scout):
    assert list(read_queried_prompts(open_run(scout).guide_folder("near"))) == visited(scout, range(3, 5))


def test_only_finished_answers_that_the_verifier_calls_right_are_kept(scout):
    session, found = open_session_at(scout, 4), trajectories(scout)
    assert found
    prompts = [session.task.prompt(prompt_id) for prompt_id in found]
    graded = session.task.grade(prompts, [kept.text for kept in found.values()])
    assert {verdict.verdict for verdict in graded} == {"correct"}
    for kept in found.values():
        assert kept.response_ids[-1] in session.policy.eos_ids
        assert session.policy.tokenizer.decode(kept.response_ids[:-1]) == kept.text
        assert kept.guide_step == 4


def test_log_probabilities_are_those_of_the_guides_forward_pass(scout):
    session = open_session_at(scout, 4)
    for prompt_id, kept in trajectories(scout).items():
        row = TokenRow(prompt_ids=session.policy.encode(session.task.prompt(prompt_id)), response_ids=kept.response_ids)
        with torch.no_grad():
            scores = session.policy.score([row], temperature=1.0, chunk_tokens=4096)
        assert kept.behavior_logps == pytest.approx(scores.logps_NT[0].tolist(), abs=1e-5)
        assert len(kept.behavior_logps) == len(kept.response_ids)


def test_a_solved_prompt_is_asked_no_more(scout):
    asked = read_queried_prompts(open_run(scout).guide_folder("near"))
    for entry in asked.values():
        # rounds of 2, at most 8
        assert entry.num_sampled in (2, 4, 6, 8)
        assert (entry.num_correct > 0) or entry.num_sampled == 8
    assert {entry.prompt_id for entry in asked.values() if entry.num_correct} == set(trajectories(scout))
    assert min(entry.num_sampled for entry in asked.values()) < 8


def test_early_stopping_keeps_the_first_samples_of_the_full_draw(scout):
    session = open_session_at(scout, 4)
    prompts = session.prompts_between(8, 16)
    in_rounds = sample_policy_in_rounds(session, prompts, step=4)
    at_once = sample_policy_in_rounds(override_settings(session, "guide.cache", samples_per_round=8), prompts, step=4)
    for part, whole in zip(in_rounds, at_once, strict=True):
        drawn = [rollout.response_ids for rollout in part.rollouts]
        assert drawn == [rollout.response_ids for rollout in whole.rollouts[: len(drawn)]]
        assert not any(rollout.verdict == "correct" for rollout in part.rollouts[:-2])


def counts(info: GuideCacheInfo) -> tuple[int, int, int, int, bool]:
    return info.num_prompts, info.num_prompts_with_rollouts, info.num_samples, info.num_tokens, info.complete


def test_the_counts_are_those_of_the_ledger(scout, tmp_path):
    root = copy_run(scout, tmp_path / "run")
    info = sample(root, name="again")
    asked = read_queried_prompts(open_run(root).guide_folder("again")).values()
    tokens, samples = sum(entry.num_tokens for entry in asked), sum(entry.num_sampled for entry in asked)
    assert counts(info) == (8, len(trajectories(root, "again")), samples, tokens, True)


@pytest.mark.parametrize("cut", [0.2, 0.6, 0.9])
def test_an_interrupted_cache_is_gone_on_with_and_ends_the_same(scout, tmp_path, monkeypatch, cut):
    """The kill is one of its leftovers: some lines of both journals, the last one torn."""
    monkeypatch.setattr(guide_cache, "CHUNK_PROMPTS", 3)
    straight, broken = (copy_run(scout, tmp_path / name) for name in ("straight", "broken"))
    for root in (straight, broken):
        shutil.rmtree(root / "guides")
    sample(straight)
    records = build_guide_cache(
        broken,
        spec=SourceSpec(guide_step=4),
        at=2,
        name="near",
        branch=None,
        steps=None,
        overrides=(),
    )
    for _ in range(3):  # two chunks of three are done when the third is announced
        next(records)
    records.close()
    folder = broken / "guides" / "near"
    for path in (queried_prompts_path(folder), guide_rollouts_path(folder)):
        data = path.read_bytes()
        path.write_bytes(data[: round(cut * len(data))])
    sample(broken)
    for path in (queried_prompts_path(folder), guide_rollouts_path(folder)):
        assert path.read_bytes() == (straight / "guides" / "near" / path.name).read_bytes()
    assert (
        file_digests(broken)["branches/main/rollouts.jsonl"] == file_digests(straight)["branches/main/rollouts.jsonl"]
    )


# Which of several right answers is kept


@pytest.fixture(scope="module")
def choice(scout) -> tuple[Session, list[PromptResponses], CheckpointSource]:
    """One prompt with three answers called right, of 9, 8 and 10 tokens, and a wrong one; weights of the guide."""
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
    run = open_run(scout)
    author = CheckpointSource(
        session=session, learner=find_checkpoint(run, "main", 2), guide=find_checkpoint(run, "main", 4)
    )
    return session, [PromptResponses(prompt=prompt, rollouts=rollouts)], author


def best(choice, **changes: object) -> list[Rollout]:
    """The answers in the order in which they would be kept."""
    session, answers, author = choice
    (ordered,) = rank_responses(override_settings(session, "guide.cache", **changes), answers, source=author, label=4)
    return ordered


def test_shortest_keeps_the_answer_of_fewest_tokens(choice):
    assert [rollout.slot for rollout in best(choice, select="shortest")] == [2, 1, 3]


def test_nearest_keeps_what_the_learner_finds_likeliest_a_token(choice):
    session, (answers,), author = choice
    chosen, *_ = best(choice, select="nearest")
    assert session.policy.digest == open_session_at(session.run.root, 4).policy.digest, "the guide's weights are back"
    learner = open_session_at(session.run.root, 2)
    pairs = [(answers.prompt, rollout) for rollout in answers.correct]
    means = [sum(logps_T) / len(logps_T) for logps_T in compute_logprobs(learner, pairs)]
    assert chosen == answers.correct[means.index(max(means))]
    assert author.learner.step == 2


def test_random_is_the_seeds_choice_among_the_right_ones(choice):
    session, answers, author = choice
    assert best(choice) == best(choice)
    seen = {best((override_settings(session, "train", seed=seed), answers, author))[0].slot for seed in range(20)}
    assert seen == {1, 2, 3}


def test_a_prompt_with_too_few_right_answers_keeps_none_and_a_wrong_one_only_if_asked_to(choice):
    # three right answers, finished, of five
    assert len(best(choice, min_correct=3)) == 3
    assert best(choice, min_correct=4) == []
    session, (answers,), author = choice
    wrong = (session, [replace(answers, rollouts=answers.rollouts[:1])], author)
    assert best(wrong) == []
    assert [rollout.verdict for rollout in best(wrong, keep="all")] == ["wrong"]


def test_choosing_the_best_needs_all_k_samples(scout):
    session = override_settings(open_session_at(scout, 4), "guide.cache", select="shortest", samples_per_prompt=4)
    assert {
        len(entry.rollouts) for entry in sample_policy_in_rounds(session, session.prompts_between(8, 12), step=4)
    } == {4}


def test_dynamic_sampling_asks_for_every_prompt_the_scout_drew(tmp_path):
    root = tmp_path / "run"
    train(root, "sampling.dynamic=true", "sampling.max_gen_batches=2", "train.prompts_per_step=2")
    sample(root)
    assert list(read_queried_prompts(open_run(root).guide_folder("near"))) == list(
        dict.fromkeys(visited(root, range(3, 5)))
    )


def test_seeds_of_a_guide_do_not_depend_on_the_order_of_prompts(scout):
    session = open_session_at(scout, 4)
    prompts = session.prompts_between(8, 16)
    shuffled = random.Random(0).sample(prompts, len(prompts))
    first = {entry.prompt.prompt_id: entry for entry in sample_policy_in_rounds(session, prompts, step=4)}
    for entry in sample_policy_in_rounds(session, shuffled, step=4):
        drawn = [replace(rollout, behavior_logps=(), mean_entropy=None) for rollout in entry.rollouts]
        assert drawn == [
            replace(rollout, behavior_logps=(), mean_entropy=None) for rollout in first[entry.prompt.prompt_id].rollouts
        ]
