"""Sources side by side for one learner: who has a V and who cannot, what is fresh, and a kill that changes nothing."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from npo_cli.errors import NpoError
from npo_cli.guides.registry import parse_spec
from npo_cli.guides.score import NO_LOGPS, score_sources
from npo_cli.storage.checkpoints import find_checkpoint
from npo_cli.storage.layout import open_run
from npo_cli.storage.rollout_log import RolloutLog
from npo_cli.storage.sample_store import find_latest_scores, list_sample_stores
from npo_cli.types.guides import SourceScore
from npo_cli.types.rollouts import Notice
from tests.guides.test_score_checkpoints import assert_same_answer
from tests.helpers.runs import copy_run, open_session_at, train
from tests.helpers.teachers import correct_response, correct_rows, save_with_other_vocabulary, write_traces
from tests.inference.openai_server import run_server

QUICK = ("scoring.samples_per_prompt=4", "scoring.bootstrap_resamples=50", "guide.inject.max_accuracy=1.0")
"""Every prompt counts as hard, so that it is known who is asked."""


@pytest.fixture(scope="module")
def line(tmp_path_factory) -> Path:
    """8 steps over a pool of 16, twice: checkpoints 2, 4, 6 and 8; at step 4 every prompt has a past."""
    root = tmp_path_factory.mktemp("line") / "run"
    train(root, "train.num_steps=8", "train.lr=1e-3", "guide.inject.max_accuracy=1.0")
    return root


@pytest.fixture(scope="module")
def foreigner(tmp_path_factory) -> Path:
    return save_with_other_vocabulary(tmp_path_factory.mktemp("foreigner") / "model")


def records_of(root: Path, *sources: str, **options: Any) -> list:
    asked = {"at": 4, "candidates": None, "far": None, "branch": None, "figure": None} | options
    overrides = (*QUICK, *asked.pop("overrides", ()))
    ask = [parse_spec(text) for text in sources]
    return list(score_sources(root, sources=ask, overrides=overrides, **asked))


def scored(root: Path, *sources: str, **options: Any) -> dict[str, SourceScore]:
    records = records_of(root, *sources, **options)
    return {record.name: record for record in records if isinstance(record, SourceScore)}


def test_self_and_every_future_are_compared_on_the_same_prompts(line, tmp_path):
    root = copy_run(line, tmp_path / "run")
    found = scored(root)
    assert {name: (one.kind, one.distance) for name, one in found.items()} == {
        "self": ("self", 0),
        "step 6": ("near", 2),
        "step 8": ("near", 4),
    }
    assert {(one.num_prompts, one.num_samples) for one in found.values()} == {(16, 64)}
    assert sum(one.p_best for one in found.values()) == pytest.approx(1)
    assert sum(one.is_selected for one in found.values()) == 1


def test_the_learner_as_its_own_guide_is_at_no_distance(line, tmp_path):
    itself = scored(copy_run(line, tmp_path / "run"))["self"]
    assert itself.variance == pytest.approx(1)
    assert itself.quality_net == pytest.approx(0)
    assert itself.kl_per_token == pytest.approx(0, abs=1e-9)


def test_a_policy_of_the_learners_tokens_is_charged_like_a_checkpoint(line, tmp_path):
    """Step 8 as a checkpoint and as an outside model: the same weights, so the same law, and other samples."""
    root = copy_run(line, tmp_path / "run")
    folder = find_checkpoint(open_run(root), "main", 8).path
    found = scored(root, f"model:{folder}", candidates=[8], overrides=("scoring.samples_per_prompt=32",))
    inside, outside = found["step 8"], found[f"model:{folder}"]
    assert outside.num_samples == inside.num_samples == 16 * 32
    # pass@1 over 512 samples: a standard error below 0.022 each
    assert outside.pass_at_1 == pytest.approx(inside.pass_at_1, abs=4 * 0.022 * 2**0.5)
    assert outside.variance == pytest.approx(inside.variance, rel=0.5)
    assert outside.variance > 1
    assert outside.distance is None
    rows = list(list_sample_stores(open_run(root))[0].samples.iter_rows())
    by_arm = {arm: [row["response_ids"] for row in rows if row["candidate"] == arm] for arm in (8, -2)}
    assert by_arm[8] != by_arm[-2]


def test_whose_log_probabilities_nobody_knows_has_a_quality_and_nothing_else(line, foreigner, tmp_path):
    found = scored(copy_run(line, tmp_path / "run"), f"model:{foreigner}", candidates=[8])
    one = found[f"model:{foreigner}"]
    assert 0 <= one.quality_low <= one.quality <= one.quality_high <= 1
    assert (one.variance, one.signal, one.p_best, one.p_best_by_variance_kind, one.best_for_variance_kinds) == (
        None,
        None,
        None,
        {},
        (),
    )
    assert one.note == NO_LOGPS
    assert sum(each.p_best for each in found.values() if each.p_best is not None) == pytest.approx(1)


def test_the_past_is_what_was_recorded_and_costs_nothing(line, tmp_path):
    root = copy_run(line, tmp_path / "run")
    past = scored(root, "past", candidates=[8])["past"]
    solved, tries = Counter(), Counter()
    journal = RolloutLog(open_run(root).rollouts_path("main"))
    for step in range(1, 5):
        for group in journal.read_step(step):
            tries[group.prompt.prompt_id] += len(group.rollouts)
            solved[group.prompt.prompt_id] += sum(
                rollout.verdict == "correct" and rollout.finished for rollout in group.rollouts
            )
    assert past.quality == pytest.approx(sum(count > 0 for count in solved.values()) / 16)
    assert past.pass_at_1 == pytest.approx(solved.total() / tries.total())
    assert (past.num_samples, past.samples_per_prompt) == (tries.total(), 4)
    assert past.signal is not None
    assert "not fresh" in past.note
    rows = list(list_sample_stores(open_run(root))[0].samples.iter_rows())
    assert {row["candidate"] for row in rows} == {-1, 4, 8}


def test_a_file_and_an_address_have_a_quality(line, tmp_path):
    root = copy_run(line, tmp_path / "run")
    prompts = open_session_at(root, 4).task.train
    by_text = {prompt.text: prompt for prompt in prompts}
    half = write_traces(tmp_path / "traces.jsonl", correct_rows(prompts[:8]))

    def say(body: dict) -> dict:
        return {"text": correct_response(by_text[body["prompt"]]), "finish_reason": "stop"}

    with run_server(say) as served:
        found = scored(root, f"file:{half}", f"endpoint:{served.url}#teacher", candidates=[8])
    brought, served_one = found[f"file:{half}"], found[f"endpoint:{served.url}#teacher"]
    # 8 of the 16 prompts have a row, and all rows are right
    assert (brought.quality, brought.num_samples, brought.pass_at_1) == (0.5, 8, 1.0)
    assert (served_one.quality, served_one.num_samples) == (1.0, 64)
    assert brought.signal is served_one.signal is None


def test_far_is_told_from_near_and_the_base_from_both(line, tmp_path):
    found = scored(copy_run(line, tmp_path / "run"), "base", far=8)
    assert {name: (one.kind, one.distance) for name, one in found.items()} == {
        "step 0": ("base", -4),
        "self": ("self", 0),
        "step 6": ("near", 2),
        "step 8": ("far", 4),
    }


def test_the_maximum_under_each_v_is_told_with_its_probability(line, tmp_path):
    records = records_of(copy_run(line, tmp_path / "run"), "past")
    (told,) = [record.message for record in records if isinstance(record, Notice) and "largest S" in record.message]
    scores = [record for record in records if isinstance(record, SourceScore)]
    kinds = ["ess", "group2", "kl_exp", "seq2", "seq2_lognormal", "tok2", "tok2_grad"]
    for kind in kinds:
        assert sum(one.p_best_by_variance_kind[kind] for one in scores) == pytest.approx(1)
        (best,) = [one for one in scores if kind in one.best_for_variance_kinds]
        assert f"{kind} {best.name} ({best.p_best_by_variance_kind[kind]:.0%})" in told
    assert [one.name for one in scores if one.is_selected] == [
        one.name for one in scores if "group2" in one.best_for_variance_kinds
    ]


@pytest.mark.parametrize("share", [0.3, 0.95])
def test_a_killed_comparison_goes_on_to_the_same_answer(line, foreigner, tmp_path, share):
    """The leftover of a kill: the first part of the samples, the last line torn."""
    sources = ("past", f"model:{foreigner}")
    straight, broken = (copy_run(line, tmp_path / name) for name in ("straight", "broken"))
    records_of(straight, *sources)
    (scoring,) = list_sample_stores(open_run(straight))
    shutil.copytree(scoring.folder, broken / "scores" / scoring.folder.name)
    folder = broken / "scores" / scoring.folder.name
    (folder / "scores.json").unlink()
    data = (folder / "samples.jsonl").read_bytes()
    (folder / "samples.jsonl").write_bytes(data[: round(share * len(data))])
    records_of(broken, *sources)
    answers = [
        json.loads((root / "scores" / scoring.folder.name / "scores.json").read_text())["sources"]
        for root in (broken, straight)
    ]
    assert_same_answer(*([flat(row) for row in each] for each in answers))


def flat(row: dict) -> dict:
    """Without the inner table, whose shares are of only 50 resamples."""
    return {
        name: value for name, value in row.items() if name not in ("p_best_by_variance_kind", "best_for_variance_kinds")
    }


def test_a_comparison_asked_again_samples_nothing_new(line, foreigner, tmp_path):
    root = copy_run(line, tmp_path / "run")
    first = scored(root, f"model:{foreigner}")
    (scoring,) = list_sample_stores(open_run(root))
    before = (scoring.folder / "samples.jsonl").read_bytes()
    assert scored(root, f"model:{foreigner}") == first
    assert (scoring.folder / "samples.jsonl").read_bytes() == before


def test_the_checkpoints_of_a_comparison_enter_the_index_like_any_scored_ones(line, tmp_path):
    root = copy_run(line, tmp_path / "run")
    found = scored(root, "past")
    kept = {score.step: score for score in find_latest_scores(open_run(root)).scores}
    assert {step: score.signal for step, score in kept.items()} == {
        6: found["step 6"].signal,
        8: found["step 8"].signal,
    }


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_picture_is_drawn(line, foreigner, tmp_path, suffix):
    path = tmp_path / "pictures" / f"sources.{suffix}"
    records = records_of(copy_run(line, tmp_path / "run"), "past", f"model:{foreigner}", figure=path)
    assert path.stat().st_size > 10_000
    assert f"the picture is in {path}" in [record.message for record in records if isinstance(record, Notice)]


@pytest.mark.parametrize(
    ("sources", "options", "message"),
    [
        (("oracle",), {}, "--source=oracle is not a known guide source"),
        (("model",), {}, "source 'model' needs model"),
        (("model:./nowhere",), {}, "--source model:./nowhere cannot be loaded"),
        (("file:no.jsonl",), {}, "there is no file of traces no.jsonl"),
        (("endpoint:http://127.0.0.1:1/v1",), {}, "source 'endpoint' needs model"),
        (("base",), {"at": 0}, "the learner at step 0 is the base itself"),
        (("past",), {"at": 0}, "the learner at step 0 has no earlier rollouts"),
        ((), {"far": 6, "candidates": [8]}, "--far 6 is nearer than a candidate"),
        ((), {"at": 8}, "has no checkpoint later than step 8"),
        ((), {"figure": Path("sources.jpeg")}, "a picture ends in"),
    ],
)
def test_a_comparison_that_cannot_be_made_is_refused_before_anything_is_sampled(
    line, tmp_path, sources, options, message
):
    root = copy_run(line, tmp_path / "run")
    before = sorted(root.rglob("*"))
    with pytest.raises(NpoError, match=message.replace(".", r"\.")):
        records_of(root, *sources, **options)
    assert sorted(root.rglob("*")) == before
