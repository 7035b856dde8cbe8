"""Guide caches of outside models and of other runs: whose tokens are kept, and what is known of their probabilities."""

from dataclasses import replace

import pytest
import torch

from npo_cli.errors import NpoError
from npo_cli.guides import build_cache as guide_cache
from npo_cli.guides.build_cache import build_guide_cache
from npo_cli.guides.source import parse_spec
from npo_cli.guides.sources.retokenize import Retokenizer, TextResponse
from npo_cli.policy.packing import TokenRow
from npo_cli.storage.checkpoints import find_checkpoint
from npo_cli.storage.cost_sums import cost_at
from npo_cli.storage.guide_cache import load_guide
from npo_cli.storage.layout import open_run
from npo_cli.storage.rollout_log import RolloutLog
from tests.helpers.runs import WHOLE_REPLAY, copy_run, open_session_at, resume, sample, train, trajectories
from tests.helpers.teachers import save_with_other_vocabulary

OUTSIDE = {"name": "guided"}
LUFFY = (
    "guide.inject.ratio=unit",
    "guide.inject.ratio_shaping=soft",
    "guide.inject.clip_off_policy=false",
    "guide.inject.max_accuracy=1",
)


@pytest.fixture
def root(scout, tmp_path):
    return copy_run(scout, tmp_path / "run")


@pytest.fixture(scope="session")
def other_vocabulary(tmp_path_factory):
    return save_with_other_vocabulary(tmp_path_factory.mktemp("other_vocabulary") / "model")


def teacher_folder(root):
    return find_checkpoint(open_run(root), "main", 4).path


def test_external_model_with_the_learners_tokens_keeps_its_log_probabilities(root):
    info = sample(root, source=f"model:{teacher_folder(root)}", **OUTSIDE)
    session, found = open_session_at(root, 4), trajectories(root, "guided")
    assert found
    for prompt_id, kept in found.items():
        row = TokenRow(prompt_ids=session.policy.encode(session.task.prompt(prompt_id)), response_ids=kept.response_ids)
        with torch.no_grad():
            scores = session.policy.score([row], temperature=1.0, chunk_tokens=4096)
        assert kept.behavior_logps == pytest.approx(scores.logps_NT[0].tolist(), abs=1e-5)
        assert (kept.source, kept.sampler_step, kept.verdict) == ("teacher", None, "correct")
    assert (info.source.name, info.guide_step, info.has_logps) == ("model", None, True)
    assert info.source.options == {"model": str(teacher_folder(root))}
    assert info.guide_digest == session.policy.digest


def test_external_model_with_other_tokens_is_retokenized_without_log_probabilities(root, other_vocabulary):
    info = sample(root, source=f"model:{other_vocabulary}", **OUTSIDE)
    session, found = open_session_at(root, 2), trajectories(root, "guided")
    assert found
    assert not info.has_logps
    prompts = [session.task.prompt(prompt_id) for prompt_id in found]
    graded = session.task.grade(prompts, [kept.text for kept in found.values()])
    assert {verdict.verdict for verdict in graded} == {"correct"}
    for kept in found.values():
        assert kept.behavior_logps is None
        assert kept.response_ids == (*session.policy.tokenizer(kept.text).input_ids, *session.policy.eos_ids)


def test_external_model_with_other_tokens_has_the_same_quality(root, other_vocabulary):
    """Base and foreigner are one policy in two spellings; drawn 64 times on 8 prompts they agree but for chance."""
    many = ("guide.cache.samples_per_prompt=64", "guide.cache.select=shortest")
    ours = sample(root, *many, source="base", name="ours")
    theirs = sample(root, *many, source=f"model:{other_vocabulary}", name="theirs")
    shares = []
    for name in ("ours", "theirs"):
        found = load_guide(open_run(root), name)[1]
        shares.append(sum(samples.num_correct for samples in found.values()) / (64 * 8))
    assert ours.num_samples == theirs.num_samples == 64 * 8
    # a share of p over 512 answers has a standard error below 0.022: the difference is within four of them
    assert shares[0] == pytest.approx(shares[1], abs=4 * 0.022 * 2**0.5)


def test_external_model_response_too_long_for_the_learner_is_truncated(root):
    """Two answers of 18 tokens at most, told to a learner that may say 6: cut, never correct, and counted."""
    session = open_session_at(root, 2)
    small = session.recipe.sampling.model_copy(update={"max_new_tokens": 6})
    narrow = replace(session, recipe=session.recipe.model_copy(update={"sampling": small}))
    retelling = Retokenizer(session=narrow, learner=session.policy)
    prompt = session.task.train[0]
    long, short = retelling.retokenize(
        [
            TextResponse(prompt=prompt, slot=0, text="1_2_3#321", finished=True),
            TextResponse(prompt=prompt, slot=1, text="1_#1", finished=True),
        ]
    )
    assert (len(long.response_ids), long.finished, long.text) == (6, False, "1_2_3#")
    # four characters and the end
    assert (len(short.response_ids), short.finished) == (5, True)
    assert retelling.num_too_long == 1
    assert retelling.warnings() == ["1 responses exceed sampling.max_new_tokens=6 and were truncated"]


def test_external_model_end_token_spelled_as_text_is_text(root):
    session = open_session_at(root, 2)
    (end,) = session.policy.eos_ids
    assert end not in session.policy.encode_response("1_</s>2")


def test_run_source_records_its_checkpoint_and_training_cost(root, tmp_path):
    other = tmp_path / "seed"
    train(other, "train.seed=7")
    info = sample(root, source=f"run:{other}", **OUTSIDE)
    run = open_run(other)
    assert info.source.options == {"dir": str(other), "branch": "main", "step": 4}
    # what the seed run had generated in its four steps
    tokens = sum(
        len(rollout.response_ids)
        for _, group in RolloutLog(run.rollouts_path("main")).iter_groups()
        for rollout in group.rollouts
    )
    assert info.guide_training_tokens == cost_at(run, "main", 4).tokens == tokens
    assert info.guide_digest == find_checkpoint(run, "main", 4).digest
    assert {(kept.source, kept.sampler_step) for kept in trajectories(root, "guided").values()} == {("teacher", None)}
    assert info.has_logps
    earlier = sample(root, source=f"run:{other}@main:2", name="earlier")
    assert earlier.guide_digest == find_checkpoint(run, "main", 2).digest


@pytest.mark.parametrize("tokens", ["same", "other"])
def test_external_model_guide_cache_trains_with_luffy(root, other_vocabulary, tokens):
    origin = teacher_folder(root) if tokens == "same" else other_vocabulary
    # every prompt has a trajectory, right or wrong: the gate of 1 lets all of them in
    sample(root, "guide.cache.keep=all", source=f"model:{origin}", at=0, **OUTSIDE)
    reports = resume(root, *LUFFY, at=0, guide="guided")
    assert [report.step for report in reports] == [1, 2, 3, 4]
    assert {report.metrics["inject/slots"] for report in reports} == {4.0}
    groups = RolloutLog(open_run(root).rollouts_path("guided")).read_step(1)
    assert [[rollout.source for rollout in group.rollouts] for group in groups] == [["own"] * 3 + ["teacher"]] * 4


def test_external_model_without_log_probabilities_refuses_ratio_exact(root, other_vocabulary):
    sample(root, source=f"model:{other_vocabulary}", **OUTSIDE)
    with pytest.raises(
        NpoError, match=r"guide 'guided' has no log-probabilities: guide\.inject\.ratio=exact is not available"
    ) as caught:
        resume(root, "guide.inject.ratio=exact", at=2, guide="guided")
    assert caught.value.hint.startswith("use guide.inject.ratio=proximal")


@pytest.mark.parametrize("kill_after", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_external_model_guide_cache_resumes_after_a_kill_to_the_same_bytes(
    scout, tmp_path, monkeypatch, other_vocabulary, kill_after
):
    monkeypatch.setattr(guide_cache, "CHUNK_PROMPTS", 3)
    straight, broken = (copy_run(scout, tmp_path / name) for name in ("straight", "broken"))
    arguments = {"source": f"model:{other_vocabulary}", **OUTSIDE}
    sample(straight, **arguments)
    records = build_guide_cache(
        broken,
        spec=parse_spec(f"model:{other_vocabulary}"),
        at=2,
        name="guided",
        overrides=WHOLE_REPLAY,
    )
    for _ in range(1 + kill_after):
        next(records)
    records.close()
    sample(broken, **arguments)
    one, other = ((root / "guides/guided/rollouts.jsonl").read_bytes() for root in (straight, broken))
    assert one == other


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("model:./nowhere", "--source model:./nowhere cannot be loaded: model.path=./nowhere: there is no folder /"),
        ("run:nowhere", "there is no run directory nowhere"),
    ],
)
def test_external_model_that_cannot_be_loaded_is_refused(root, source, message):
    before = sorted(root.rglob("*"))
    with pytest.raises(NpoError, match=message.replace(".", r"\.")):
        sample(root, source=source, name="new")
    assert sorted(root.rglob("*")) == before


def test_run_source_refuses_the_run_itself(root):
    with pytest.raises(NpoError, match="is this run itself"):
        sample(root, source=f"run:{root}", **OUTSIDE)


def test_resume_works_with_a_guide_cache_of_an_external_model(root, other_vocabulary):
    """Retention asks which steps a cache needs; a teacher has none."""
    sample(root, source=f"model:{other_vocabulary}", **OUTSIDE)
    assert resume(root, "train.num_steps=6")[-1].step == 6
