"""Guide source `extrapolated`: its cache, its scores beside other candidates, its cost and retention."""

from dataclasses import asdict
from pathlib import Path

import pytest

from npo_cli.errors import NpoError
from npo_cli.guides.source import ReplayTarget, create_source, parse_spec
from npo_cli.guides.sources.extrapolated import Extrapolation, find_older_checkpoint
from npo_cli.session.learner import find_learner
from npo_cli.storage.checkpoints import find_checkpoint, list_checkpoints
from npo_cli.storage.cost_sums import cost_at
from npo_cli.storage.guide_cache import format_source_option, load_guide
from npo_cli.storage.layout import open_run
from npo_cli.storage.sample_store import list_sample_stores
from tests.guides.test_score import score_by_name
from tests.helpers.runs import LORA, copy_run, open_session_at, resume, sample, train

SETTINGS = (
    "train.num_steps=6",
    "guide.cache.samples_per_prompt=4",
    "scoring.num_prompts=16",
    "scoring.samples_per_prompt=2",
    "guide.inject.max_accuracy=1.0",
)


@pytest.fixture(scope="module")
def run_of_6(tmp_path_factory) -> Path:
    """6 quick steps, checkpoints 0, 2, 4 and 6."""
    root = tmp_path_factory.mktemp("run_of_6") / "run"
    train(root, *SETTINGS)
    return root


def extrapolated(root: Path, spec: str, **options):
    options = {"at": 4, "name": "ahead"} | options
    return sample(root, source=f"extrapolated:{spec}", **options)


@pytest.mark.parametrize("spec", ["logits,k=2,a=1", "weights,k=2,a=0.5"])
def test_extrapolated_source_builds_a_guide_cache_that_a_replay_uses(run_of_6, tmp_path, spec):
    root = copy_run(run_of_6, tmp_path / "run")
    info = extrapolated(root, spec)
    assert (info.source.text, info.guide_step) == (f"extrapolated:{spec}", None)
    assert (info.learner_step, info.older_step, info.num_steps) == (4, 2, 2)
    assert info.guide_digest == find_checkpoint(open_run(root), "main", 2).digest
    assert format_source_option(info) == f"--source extrapolated:{spec}"
    rollouts = [each for samples in load_guide(open_run(root), "ahead")[1].values() for each in samples.rollouts]
    assert {(one.source, one.verdict, one.sampler_step) for one in rollouts} == {("extrapolated", "correct", 4)}
    reports = resume(root, at=4, guide="ahead")
    assert sum(report.metrics["inject/slots"] for report in reports) > 0


@pytest.mark.parametrize("spec", ["logits,k=2,a=1", "weights,k=2,a=1"])
def test_extrapolated_source_behavior_logps_equal_the_trainers(run_of_6, spec):
    session = open_session_at(run_of_6, 6)
    digest = session.policy.digest
    learner = find_learner(session.run, at=6, branch=None, overrides=())
    source = create_source(parse_spec(f"extrapolated:{spec}"), ReplayTarget(run=session.run, learner=learner))
    source.open(session)
    sampler = source.sampler
    groups = sampler.sample_groups(session.task.train[:4], label=("try",), slots=range(4))
    pairs = [(group.prompt, rollout) for group in groups for rollout in group.rollouts]
    for (_, rollout), logps_T in zip(pairs, sampler.logprobs(pairs), strict=True):
        assert rollout.behavior_logps == pytest.approx(logps_T, abs=1e-3)
    assert session.policy.digest == digest


def test_older_checkpoint_is_at_least_k_back_and_scales_the_strength(run_of_6):
    run = open_run(run_of_6)
    assert find_older_checkpoint(run, "main", k=3, step=2, every=2) is None
    # 3 steps before 6 is 3, where no checkpoint is: 2 is taken, 4 steps back, and 2 * 3 / 4 = 1.5
    older = find_older_checkpoint(run, "main", k=3, step=6, every=2)
    found = Extrapolation(space="logits", k=3, a=2.0, step=6, older_checkpoint=older)
    assert (older.step, found.lag, found.strength) == (2, 4, 1.5)
    # of the checkpoints 0, 2, 4, 6 only 0 is a multiple of 4 and 3 steps back: too far for k = 3
    with pytest.raises(NpoError, match=r"no checkpoint of main in steps 1 to 3"):
        find_older_checkpoint(run, "main", k=3, step=6, every=6)


def test_extrapolated_candidates_are_scored_on_the_same_prompts_as_others(run_of_6, tmp_path):
    root = copy_run(run_of_6, tmp_path / "run")
    found = score_by_name(
        root,
        "self",
        "6",
        "past",
        "base",
        "extrapolated:logits,k=2,a=1",
        "extrapolated:logits,k=2,a=4",
        "extrapolated:weights,k=2,a=1",
        at=4,
    )
    extrapolations = {name: one for name, one in found.items() if one.source == "extrapolated"}
    assert extrapolations.keys() == {
        "extrapolated:logits,k=2,a=1",
        "extrapolated:logits,k=2,a=4",
        "extrapolated:weights,k=2,a=1",
    }
    assert {"past", "base", "self", "checkpoint:6", "none"} == found.keys() - extrapolations.keys()
    for one in extrapolations.values():
        assert one.num_prompts == found["self"].num_prompts
        assert one.quality_net == pytest.approx(one.quality - found["self"].quality)
        assert 0 <= one.p_best <= 1
    near, far = (extrapolations[f"extrapolated:logits,k=2,a={a}"].kl_per_sequence for a in (1, 4))
    assert 0 < near < far


def test_replay_cost_counts_forwards_of_the_older_policy(run_of_6, tmp_path):
    root = copy_run(run_of_6, tmp_path / "run")
    weights, logits = "extrapolated:weights,k=2,a=1", "extrapolated:logits,k=2,a=1"
    score_by_name(root, "6", "past", weights, logits, at=4)
    cache = extrapolated(root, "logits,k=2,a=1")
    resume(root, at=4, guide="ahead")
    (store,) = list_sample_stores(root / "scores")
    tokens = {weights: 0, logits: 0}
    for (candidate, _), samples in store.read().items():
        if candidate in tokens:
            tokens[candidate] += sum(len(rollout.response_ids) for rollout in samples.rollouts)
    assert tokens[weights] > 0 and tokens[logits] > 0
    spent = cost_at(open_run(root), "ahead", 5)
    assert spent.forwards - spent.tokens == tokens[logits] + cache.num_tokens


def test_scoring_extrapolated_again_samples_nothing_new(run_of_6, tmp_path):
    root = copy_run(run_of_6, tmp_path / "run")
    first = score_by_name(root, "extrapolated:logits,k=2,a=1", at=4)
    logs = {path: path.read_bytes() for path in root.glob("scores/*/rollouts.jsonl")}
    again = score_by_name(root, "extrapolated:logits,k=2,a=1", at=4)
    assert {path: path.read_bytes() for path in root.glob("scores/*/rollouts.jsonl")} == logs
    assert asdict(again["extrapolated:logits,k=2,a=1"]) == asdict(first["extrapolated:logits,k=2,a=1"])


def test_retention_keeps_the_older_checkpoint_of_a_guide_cache(run_of_6, tmp_path):
    root = copy_run(run_of_6, tmp_path / "run")
    extrapolated(root, "logits,k=2,a=1")
    resume(root, "train.num_steps=10", "train.keep_full_checkpoints=1", "train.keep_weights_only=1")
    # 0 always, 2 and 4 for the cache, 8 by the quota of guides, 10 the newest
    assert [found.step for found in list_checkpoints(open_run(root), "main")] == [0, 2, 4, 8, 10]


def test_extrapolated_source_without_a_checkpoint_k_back_is_refused(run_of_6):
    with pytest.raises(NpoError, match="step 4 has no checkpoint 5 steps back"):
        extrapolated(run_of_6, "logits,k=5,a=1")


@pytest.mark.slow
def test_extrapolated_source_works_with_adapters_in_both_spaces(tmp_path):
    root = tmp_path / "run"
    train(root, *LORA, *SETTINGS)
    found = score_by_name(root, "extrapolated:weights,k=2,a=1", at=4)
    assert found["extrapolated:weights,k=2,a=1"].signal is not None
    assert extrapolated(root, "logits,k=2,a=1").complete
