"""The learner pushed along its own motion as a guide: who is asked, what is kept of it, what it is compared with."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from npo_cli.errors import NpoError
from npo_cli.extrapolation.sampler import find_extrapolation, load_older_policy, open_extrapolated_sampler
from npo_cli.extrapolation.spec import parse_extrapolation, parse_extrapolation_grid
from npo_cli.storage.checkpoints import find_checkpoint, list_checkpoints
from npo_cli.storage.cost_sums import cost_at
from npo_cli.storage.guide_cache import format_guide_source_options, load_guide
from npo_cli.storage.layout import open_run
from npo_cli.types.guides import ExtrapolationSpec, SourceScore
from tests.guides.test_score_sources import scored
from tests.helpers.runs import LORA, copy_run, open_session_at, resume, sample, train

LINE = (
    "train.num_steps=6",
    "guide.cache.samples_per_prompt=4",
    "scoring.num_prompts=16",
    "scoring.samples_per_prompt=2",
    "guide.inject.max_accuracy=1.0",
)


@pytest.fixture(scope="module")
def line(tmp_path_factory) -> Path:
    """6 quick steps, checkpoints 0, 2, 4 and 6."""
    root = tmp_path_factory.mktemp("line") / "run"
    train(root, *LINE)
    return root


def extrapolated(root: Path, push: str, **options):
    asked = {"source": "extrapolated", "origin": push, "guide_step": None, "at": 4, "name": "ahead"} | options
    return sample(root, **asked)


@pytest.mark.parametrize("push", ["logits:2:1", "weights:2:0.5"])
def test_it_makes_an_ordinary_cache_that_tells_where_it_is_from_and_a_replay_uses_it(line, tmp_path, push):
    root = copy_run(line, tmp_path / "run")
    info = extrapolated(root, push)
    assert (info.source, info.origin, info.guide_step) == ("extrapolated", f"{push} of steps 4 and 2", None)
    assert (info.at_step, info.older_step, info.num_steps) == (4, 2, 2)
    assert info.guide_digest == find_checkpoint(open_run(root), "main", 2).digest
    assert format_guide_source_options(info) == f"--source extrapolated --from {push}"
    kept = [each for several in load_guide(open_run(root), "ahead")[1].values() for each in several]
    assert {(one.source, one.verdict, one.guide_step) for one in kept} == {("extrapolated", "correct", 4)}
    reports = resume(root, at=4, guide="ahead")
    assert sum(report.metrics["inject/slots"] for report in reports) > 0


@pytest.mark.parametrize("push", ["logits:2:1", "weights:2:1"])
def test_what_was_sampled_has_the_log_probabilities_of_the_trainers_pass(line, push):
    session = open_session_at(line, 6)
    digest = session.policy.digest
    motion = find_extrapolation(session.run, "main", parse_extrapolation(push), step=6, every=2)
    ahead = open_extrapolated_sampler(session, motion, older=load_older_policy(session, motion))
    groups = ahead.sample_groups(session.task.train[:4], label=("try",), slots=range(4))
    pairs = [(group.prompt, rollout) for group in groups for rollout in group.rollouts]
    for (_, rollout), logps_T in zip(pairs, ahead.logprobs(pairs), strict=True):
        assert rollout.behavior_logps == pytest.approx(logps_T, abs=1e-3)
    assert session.policy.digest == digest


def test_the_older_copy_is_the_newest_planned_checkpoint_at_least_k_back_and_a_shrinks_with_it(line):
    run = open_run(line)
    push = ExtrapolationSpec(space="logits", k=3, a=2.0)
    assert find_extrapolation(run, "main", push, step=2, every=2) is None
    # 3 steps before 6 is 3, where no checkpoint is: 2 is taken, 4 steps back, and 2 * 3 / 4 = 1.5
    found = find_extrapolation(run, "main", push, step=6, every=2)
    assert (found.older_checkpoint.step, found.lag, found.strength) == (2, 4, 1.5)
    # of the checkpoints 0, 2, 4, 6 only 0 is a multiple of 4 and 3 steps back: too far for k = 3
    with pytest.raises(NpoError, match=r"no checkpoint of main in steps 1 to 3"):
        find_extrapolation(run, "main", push, step=6, every=6)


def test_a_grid_is_compared_with_futures_past_base_and_self_on_the_same_prompts(line, tmp_path):
    root = copy_run(line, tmp_path / "run")
    found = scored(root, "past", "base", "extrapolated=logits:2:1,4", "extrapolated=weights:2:1", at=4)
    names = {"base", "step 0", "past", "self", "step 6"} & found.keys()
    ahead = {name: one for name, one in found.items() if one.kind == "extrapolated"}
    assert ahead.keys() == {"extrapolated logits:2:1", "extrapolated logits:2:4", "extrapolated weights:2:1"}
    assert {"past", "self", "step 6"} <= names
    for one in ahead.values():
        assert one.num_prompts == found["self"].num_prompts
        assert one.quality_net == pytest.approx(one.quality - found["self"].quality)
        assert 0 <= one.p_best <= 1
    near, far = (ahead[f"extrapolated logits:2:{a}"].kl_per_sequence for a in (1, 4))
    assert 0 < near < far


def test_a_replay_pays_for_what_the_older_copy_read_of_a_comparison_and_of_the_cache(line, tmp_path):
    root = copy_run(line, tmp_path / "run")
    scored(root, "past", "extrapolated=weights:2:1", "extrapolated=logits:2:1", at=4)
    cache = extrapolated(root, "logits:2:1")
    resume(root, at=4, guide="ahead")
    (journal,) = root.glob("scores/*/samples.jsonl")
    rows = [json.loads(row) for row in journal.read_text().splitlines()]
    # -1 is the learner, and the sources count on from there: -2 the past, -3 weights, -4 logits
    read = {arm: sum(len(row["response_ids"]) for row in rows if row["arm"] == arm) for arm in (-3, -4)}
    assert read[-3] > 0 and read[-4] > 0
    spent = cost_at(open_run(root), "ahead", 5)
    assert spent.forwards - spent.tokens == read[-4] + cache.num_tokens


def test_a_comparison_asked_again_samples_nothing_new(line, tmp_path):
    root = copy_run(line, tmp_path / "run")
    first = scored(root, "extrapolated=logits:2:1", at=4)
    journals = {path: path.read_bytes() for path in root.glob("scores/*/samples.jsonl")}
    again = scored(root, "extrapolated=logits:2:1", at=4)
    assert {path: path.read_bytes() for path in root.glob("scores/*/samples.jsonl")} == journals
    assert asdict(again["extrapolated logits:2:1"]) == asdict(first["extrapolated logits:2:1"])


def test_retention_keeps_the_older_copy_of_a_cache(line, tmp_path):
    root = copy_run(line, tmp_path / "run")
    extrapolated(root, "logits:2:1")
    resume(root, "train.num_steps=10", "train.keep_full_checkpoints=1", "train.keep_weights_only=1")
    # 0 always, 2 and 4 for the cache, 8 by the quota of guides, 10 the newest
    assert [found.step for found in list_checkpoints(open_run(root), "main")] == [0, 2, 4, 8, 10]


def test_a_grid_by_commas():
    grid = parse_extrapolation_grid("logits:20,40:1,2.5")
    assert [push.name for push in grid] == ["logits:20:1", "logits:20:2.5", "logits:40:1", "logits:40:2.5"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no SPACE:K:A"),
        ("logits", "no SPACE:K:A"),
        ("moon:2:1", "no SPACE:K:A"),
        ("logits:x:1", "k must be a whole number"),
        ("logits:0:1", "at least 1"),
        ("logits:2:0", "above 0"),
        ("logits:2:nan", "above 0"),
        ("logits:2:1,2", "a grid of 2"),
    ],
)
def test_a_push_that_is_none_is_refused(text, why):
    with pytest.raises(NpoError, match=why):
        parse_extrapolation(text)


def test_a_learner_that_has_not_moved_so_far_is_refused(line):
    with pytest.raises(NpoError, match="step 4 has no older copy 5 steps back"):
        extrapolated(line, "logits:5:1")


@pytest.mark.slow
def test_adapters_are_pushed_in_both_spaces(tmp_path):
    root = tmp_path / "run"
    train(root, *LORA, *LINE)
    found = scored(root, "extrapolated=weights:2:1", at=4)
    assert isinstance(found["extrapolated weights:2:1"], SourceScore)
    assert extrapolated(root, "logits:2:1").complete
