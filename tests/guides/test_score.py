"""Scoring guide candidates: what is sampled, what a kill leaves, and the scores of checkpoints and other sources."""

import json
import os
import shutil
import threading
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from npo_cli.errors import NpoError, RunFailed
from npo_cli.guides.candidates import create_candidates
from npo_cli.guides.collect_samples import SCREENING
from npo_cli.guides.score import open_scoring_state, rank_round
from npo_cli.guides.source import parse_spec
from npo_cli.inference.transformers_engine import TransformersEngine
from npo_cli.policy import weights_io
from npo_cli.policy.model import Policy
from npo_cli.scoring.ranking import IN_ROUNDS_NOTE, NO_LOGPROBS_NOTE, RECORDED_NOTE
from npo_cli.scoring.variance import VARIANCE_ESTIMATORS
from npo_cli.session.learner import find_learner
from npo_cli.session.session import build_session, open_policy, open_task
from npo_cli.storage import checkpoints
from npo_cli.storage.checkpoints import find_checkpoint
from npo_cli.storage.layout import open_run
from npo_cli.storage.log_head import rewrite_head
from npo_cli.storage.rollout_log import RolloutLog
from npo_cli.storage.sample_store import SampleStore, find_latest_scores, list_sample_stores
from npo_cli.types.rollouts import Notice
from npo_cli.types.scores import CandidateScore
from tests.helpers.runs import copy_run, open_session_at, score, score_records, score_with_none, tiny_recipe, train
from tests.helpers.teachers import correct_response, correct_rows, save_with_other_vocabulary, write_traces
from tests.inference.openai_server import run_server

QUICK = ("scoring.samples_per_prompt=4", "scoring.bootstrap_resamples=50")
LENIENT = (*QUICK, "guide.inject.max_accuracy=1.0")
"""Every prompt counts as hard, so that it is known who is asked."""


@pytest.fixture(scope="module")
def line(tmp_path_factory) -> Path:
    """A run with candidates 1 to 4 for the learner at step 0."""
    root = tmp_path_factory.mktemp("line") / "run"
    train(root, "train.save_every=1", "guide.inject.max_accuracy=1.0")
    return root


def store_of(root: Path) -> SampleStore:
    (store,) = list_sample_stores(root / "scores")
    return store


def prompts_by_candidate(root: Path) -> dict[str, list[str]]:
    """Prompts of each candidate's samples, in order; four samples each."""
    found = defaultdict(list)
    for (candidate, prompt_id), samples in store_of(root).read().items():
        assert len(samples.rollouts) == samples.num_sampled == 4
        found[candidate].append(prompt_id)
    return dict(found)


def saved_scores(root: Path) -> list[dict]:
    return json.loads(store_of(root).scores_path.read_text())["scores"]


def test_score_samples_learner_and_candidates_on_the_prompts_ahead(line, tmp_path):
    root = copy_run(line, tmp_path / "run")
    scores = score_with_none(root, *LENIENT)
    found = prompts_by_candidate(root)
    assert [(entry.step, entry.distance) for entry in scores] == [(1, 1), (2, 2), (3, 3), (4, 4), (None, 0)]
    assert list(found) == [SCREENING, "self", *(f"checkpoint:{step}" for step in (1, 2, 3, 4))]
    assert len(set(map(tuple, found.values()))) == 1
    assert len(found[SCREENING]) == 16
    assert sum(entry.is_selected for entry in scores) == 1
    assert sum(entry.p_best for entry in scores) == pytest.approx(1)
    assert {(entry.num_prompts, entry.num_samples) for entry in scores} == {(16, 64)}
    nothing = scores[-1]
    assert (nothing.candidate, nothing.quality_net, nothing.variance, nothing.price) == ("none", 0, 1, 0)
    assert [entry.quality_self for entry in scores] == pytest.approx([nothing.quality] * 5)
    assert find_latest_scores(open_run(root)).scores == tuple(scores)


def test_score_uses_the_prompts_that_the_screening_fails(line, tmp_path):
    root = copy_run(line, tmp_path / "run")
    score(root, *QUICK, "guide.inject.max_accuracy=0.0", sources=[4])
    solved = {
        prompt_id
        for (candidate, prompt_id), samples in store_of(root).read().items()
        if candidate == SCREENING and samples.num_correct
    }
    found = prompts_by_candidate(root)
    failed = [prompt_id for prompt_id in found[SCREENING] if prompt_id not in solved]
    assert 0 < len(failed) < 16
    assert found["self"] == found["checkpoint:4"] == failed


def test_score_of_the_learner_itself_is_at_the_kl_floor(line, tmp_path):
    """D = 0: its fresh samples, charged to itself, are at a KL of nothing and a V of the floor."""
    root = copy_run(line, tmp_path / "run")
    score(root, *LENIENT, sources=[4])
    run = open_run(root)
    learner = find_learner(run, at=0, branch=None, overrides=LENIENT)
    task = open_task(learner.recipe)
    session = build_session(
        run, learner.recipe, task=task, policy=open_policy(learner.recipe, task, learner.checkpoint)
    )
    (candidate,) = create_candidates(run, learner, [parse_spec("4")])
    state = open_scoring_state(session, learner, [candidate], horizon=4)
    for key in list(state.samples):
        # The control's samples, in the name of a candidate.
        if key[0] == "self":
            state.samples["checkpoint:4", key[1]] = state.samples[key]
    prompts = session.task.train
    step = rank_round(state, {candidate: prompts}, control=prompts)
    try:
        while True:
            next(step)
    except StopIteration as stopped:
        itself, nothing = stopped.value
    assert itself.kl_per_token == pytest.approx(0, abs=1e-6)
    assert itself.kl_per_sequence == pytest.approx(0, abs=1e-5)
    assert itself.variance == pytest.approx(1, abs=1e-4)
    assert itself.variances["seq2"] == pytest.approx(1, abs=1e-4)
    assert itself.quality_net == pytest.approx(0, abs=1e-12)
    assert (itself.is_selected, nothing.is_selected) == (False, True)
    assert itself.ess_fraction == pytest.approx(1, abs=1e-4)


BUDGETS = {"all pairs": (), "halving": ("scoring.budget=64",)}


@pytest.fixture(scope="module")
def straight(line, tmp_path_factory) -> dict[str, Path]:
    """The scoring nobody interrupted, of each kind."""
    roots = {kind: copy_run(line, tmp_path_factory.mktemp("straight") / "run") for kind in BUDGETS}
    for kind, root in roots.items():
        score(root, *LENIENT, *BUDGETS[kind])
    return roots


@pytest.mark.parametrize(
    ("kind", "share"),
    [
        ("all pairs", 0.95),
        ("halving", 0.5),
        pytest.param("all pairs", 0.1, marks=pytest.mark.slow),
        pytest.param("halving", 0.95, marks=pytest.mark.slow),
    ],
)
def test_score_continues_after_a_kill_to_the_same_result(line, straight, tmp_path, kind, share):
    """The leftover of a kill: the first part of the samples, the last line torn, in the middle of a prompt's four."""
    root = copy_run(line, tmp_path / "run")
    leave_unfinished(straight[kind], root, share)
    score(root, *LENIENT, *BUDGETS[kind])
    assert_same_scores(saved_scores(root), saved_scores(straight[kind]))


def leave_unfinished(straight: Path, root: Path, share: float) -> None:
    """What a kill leaves in `root`: the first part of the samples of `straight`, the last line torn, no scores."""
    store = store_of(straight)
    folder = root / "scores" / store.folder.name
    shutil.copytree(store.folder, folder)
    (folder / "scores.json").unlink()
    data = (folder / "rollouts.jsonl").read_bytes()
    (folder / "rollouts.jsonl").write_bytes(data[: round(share * len(data))])
    rewrite_head(folder / "rollouts.jsonl", size=0)


def assert_same_scores(found: list[dict], expected: list[dict]) -> None:
    """Equal but for rounding: a prompt asked again alone may differ from its batch in the last digit."""
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            rounded = isinstance(value, float) or name == "variances"
            assert one[name] == (pytest.approx(value, rel=1e-3, abs=1e-5) if rounded else value), name


def test_score_repeated_samples_nothing_new(straight, tmp_path):
    root = copy_run(straight["all pairs"], tmp_path / "run")
    first = find_latest_scores(open_run(root)).scores
    before = store_of(root).read()
    assert tuple(score_with_none(root, *LENIENT)) == first
    assert store_of(root).read() == before


def test_score_budget_samples_the_better_half_more(straight):
    counts = {candidate: len(prompts) for candidate, prompts in prompts_by_candidate(straight["halving"]).items()}
    # 64 pairs in 2 rounds: 4 candidates x 8 prompts, then the better 2 x 16, of which only 8 are left
    assert (counts[SCREENING], counts["self"]) == (16, 16)
    assert sorted(counts[f"checkpoint:{step}"] for step in (1, 2, 3, 4)) == [8, 8, 16, 16]
    *guides, _no_guide = saved_scores(straight["halving"])
    for entry in guides:
        assert entry["num_prompts"] == counts[entry["candidate"]]


def test_score_in_rounds_has_the_same_quality_from_fewer_responses(line, straight, tmp_path):
    """Of 4 responses one at a time the first correct one is the last: the others are not sampled, and Q is the same."""
    root = copy_run(line, tmp_path / "run")
    records = list(score_records(root, *LENIENT, "scoring.samples_per_round=1"))
    scores = [record for record in records if isinstance(record, CandidateScore)]
    for entry, all_at_once in zip(scores, saved_scores(straight["all pairs"]), strict=True):
        fields = ("candidate", "quality", "quality_low", "quality_high", "quality_net", "num_prompts")
        assert [getattr(entry, name) for name in fields] == pytest.approx([all_at_once[name] for name in fields])
        assert entry.num_samples < all_at_once["num_samples"]
        assert entry.candidate == "none" or IN_ROUNDS_NOTE in entry.note
    everything = store_of(straight["all pairs"]).read()
    for key, samples in store_of(root).read().items():
        sampled, others = samples.rollouts, everything[key].rollouts
        is_correct = [rollout.is_correct for rollout in others]
        first = 4 if key[0] == SCREENING or not any(is_correct) else 1 + is_correct.index(True)
        assert [(rollout.slot, rollout.response_ids) for rollout in sampled] == [
            (rollout.slot, rollout.response_ids) for rollout in others[:first]
        ]


@pytest.mark.slow
def test_score_in_rounds_continues_after_a_kill(line, tmp_path):
    in_rounds = (*LENIENT, "scoring.samples_per_round=2", "scoring.budget=64")
    straight, broken = (copy_run(line, tmp_path / name) for name in ("straight", "broken"))
    score(straight, *in_rounds)
    leave_unfinished(straight, broken, 0.6)
    score(broken, *in_rounds)
    assert_same_scores(saved_scores(broken), saved_scores(straight))


def test_score_in_rounds_needs_pass_at_k():
    with pytest.raises(NpoError, match=r"it needs scoring\.quality=pass@k, got pass@1"):
        tiny_recipe("scoring.samples_per_round=2", "scoring.quality=pass@1")


def test_score_budget_ignores_samples_of_later_rounds(straight, tmp_path):
    """First everything is asked; the budget's own race over the same samples is what it would have been alone."""
    root = copy_run(straight["all pairs"], tmp_path / "run")
    score(root, *LENIENT, "scoring.budget=64")
    assert_same_scores(saved_scores(root), saved_scores(straight["halving"]))


def test_score_rule_one_se_selects_the_nearest_within_one_standard_error(straight, tmp_path):
    root = copy_run(straight["all pairs"], tmp_path / "run")
    greedy = score_with_none(root, *LENIENT)
    cautious = score_with_none(root, *LENIENT, "scoring.selection_rule=one_se")
    (nearest,) = [entry for entry in cautious if entry.is_selected]
    (largest,) = [entry for entry in greedy if entry.is_selected]
    assert nearest.distance <= largest.distance
    assert {entry.selection_by_profile["one_se"] for entry in (*greedy, *cautious)} == {nearest.candidate}
    worthwhile = [entry for entry in greedy if entry.candidate == "none" or entry.quality_net_low > 0]
    assert largest.signal == max(entry.signal for entry in worthwhile)


def test_score_forecasts_from_what_the_run_recorded(straight):
    """Value = steps saved / price, from the groups of the steps in which the guide would be used."""
    root = straight["all pairs"]
    (entry,) = [one for one in saved_scores(root) if one["step"] == 2]
    log = RolloutLog(open_run(root).rollouts_path("main"))
    # every group is eligible, 4 a step; the guide is used in the first half of 2 steps
    groups = log.read_step(1)
    num_correct, tokens_per_step = (sum(getattr(one, name) for one in groups) for name in ("num_correct", "num_tokens"))
    saved = 1 * 4 * max(0.0, entry["quality_net"]) / max(1, num_correct)
    assert entry["steps_saved"] == pytest.approx(saved)
    scoring = sum(rollout.num_tokens for found in store_of(root).read().values() for rollout in found.rollouts)
    # 2 steps are thrown away; the guide's tokens are at least one sample per prompt
    assert entry["price"] > 2 + scoring / tokens_per_step
    assert entry["value"] == pytest.approx(entry["steps_saved"] / entry["price"])


def test_score_refuses_a_budget_below_one_prompt_per_candidate(line, tmp_path):
    with pytest.raises(NpoError, match=r"scoring\.budget is 3, but 4 candidates in 2 rounds need at least 8"):
        score(copy_run(line, tmp_path / "run"), *LENIENT, "scoring.budget=3")


def test_score_refuses_a_learner_that_solves_everything(line, tmp_path):
    """One easy addition, which the base solves in one of 4 samples: a gate of 0 helps only where none is right."""
    root = copy_run(line, tmp_path / "run")
    with pytest.raises(
        NpoError, match=r"solves all 1 prompts above guide\.inject\.max_accuracy=0\.0: no guide can help"
    ):
        score(root, *QUICK, "guide.inject.max_accuracy=0.0", "scoring.num_prompts=1", sources=[4])


def test_score_refuses_earlier_checkpoints(line):
    with pytest.raises(NpoError, match="step 2 is not later than the learner's step 2"):
        score(line, *QUICK, at=2, sources=[2, 3])
    with pytest.raises(NpoError, match="main has no checkpoint later than step 4"):
        score(line, *QUICK, at=4)


def test_score_reports_the_number_of_failed_prompts(line, tmp_path):
    root = copy_run(line, tmp_path / "run")
    records = score_records(root, *LENIENT, sources=[4])
    notices = [record.message for record in records if isinstance(record, Notice)]
    assert notices[0] == "16 of 16 prompts have an accuracy <= 1.0 at step 0"


# Other sources

SECOND_EPOCH = (*QUICK, "guide.inject.max_accuracy=1.0")


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory) -> Path:
    """8 steps over a pool of 16, twice: checkpoints 2, 4, 6 and 8; at step 4 every prompt has a past."""
    root = tmp_path_factory.mktemp("epochs") / "run"
    train(root, "train.num_steps=8", "train.lr=1e-3", "guide.inject.max_accuracy=1.0")
    return root


@pytest.fixture(scope="module")
def other_vocabulary(tmp_path_factory) -> Path:
    return save_with_other_vocabulary(tmp_path_factory.mktemp("teacher") / "model")


def score_by_name(
    root: Path, *sources: str, overrides: tuple[str, ...] = (), **options: Any
) -> dict[str, CandidateScore]:
    """Scores of these SPECs for step 4."""
    scores = score_with_none(root, *SECOND_EPOCH, *overrides, sources=sources, **({"at": 4} | options))
    return {one.candidate: one for one in scores}


def test_score_of_self_and_later_checkpoints_on_the_same_prompts(two_epochs, tmp_path):
    found = score_by_name(copy_run(two_epochs, tmp_path / "run"), "8", "self", "6")
    assert {name: (one.source, one.step, one.distance) for name, one in found.items()} == {
        "none": ("none", None, 0),
        "self": ("self", 4, 0),
        "checkpoint:6": ("checkpoint", 6, 2),
        "checkpoint:8": ("checkpoint", 8, 4),
    }
    assert {(one.num_prompts, one.num_samples) for one in found.values()} == {(16, 64)}
    assert sum(one.p_best for one in found.values()) == pytest.approx(1)
    assert sum(one.is_selected for one in found.values()) == 1


def test_score_of_self_has_variance_one(two_epochs, tmp_path):
    itself = score_by_name(copy_run(two_epochs, tmp_path / "run"), "self")["self"]
    assert itself.variance == pytest.approx(1)
    assert itself.quality_net == pytest.approx(0)
    assert itself.kl_per_token == pytest.approx(0, abs=1e-9)


def test_score_of_self_is_the_control_and_sampled_once(two_epochs, tmp_path):
    root = copy_run(two_epochs, tmp_path / "run")
    score_by_name(root, "self", "8")
    sampled = [(candidate, samples.prompt_id) for _, candidate, samples in store_of(root).iter_samples()]
    assert len(sampled) == len(set(sampled)) == 3 * 16


def test_score_of_an_external_model_with_the_learners_tokens_has_a_variance(two_epochs, tmp_path):
    """Step 8 as a checkpoint and as an outside model: the same weights, so the same law, and other samples."""
    root = copy_run(two_epochs, tmp_path / "run")
    folder = find_checkpoint(open_run(root), "main", 8).path
    found = score_by_name(root, "8", f"model:{folder}", overrides=("scoring.samples_per_prompt=32",))
    inside, outside = found["checkpoint:8"], found[f"model:{folder}"]
    assert outside.num_samples == inside.num_samples == 16 * 32
    # pass@1 over 512 samples: a standard error below 0.022 each
    assert outside.pass_at_1 == pytest.approx(inside.pass_at_1, abs=4 * 0.022 * 2**0.5)
    assert outside.variance == pytest.approx(inside.variance, rel=0.5)
    assert outside.variance > 1
    assert outside.distance is None
    responses = {candidate: set() for candidate in found}
    for (candidate, _), samples in store_of(root).read().items():
        responses.get(candidate, set()).update(rollout.response_ids for rollout in samples.rollouts)
    assert responses["checkpoint:8"] != responses[f"model:{folder}"]


def test_score_without_log_probabilities_has_only_a_quality(two_epochs, other_vocabulary, tmp_path):
    found = score_by_name(copy_run(two_epochs, tmp_path / "run"), "8", f"model:{other_vocabulary}")
    one = found[f"model:{other_vocabulary}"]
    assert 0 <= one.quality_low <= one.quality <= one.quality_high <= 1
    assert (one.variance, one.signal, one.p_best, one.p_best_by_variance_kind, one.best_for_variance_kinds) == (
        None,
        None,
        None,
        {},
        (),
    )
    assert one.note == NO_LOGPROBS_NOTE
    assert sum(each.p_best for each in found.values() if each.p_best is not None) == pytest.approx(1)


def test_score_of_the_past_uses_recorded_rollouts(two_epochs, tmp_path):
    root = copy_run(two_epochs, tmp_path / "run")
    past = score_by_name(root, "8", "past")["past"]
    solved, tries = Counter(), Counter()
    log = RolloutLog(open_run(root).rollouts_path("main"))
    for step in range(1, 5):
        for group in log.read_step(step):
            tries[group.prompt.prompt_id] += len(group.rollouts)
            solved[group.prompt.prompt_id] += sum(
                rollout.verdict == "correct" and rollout.finished for rollout in group.rollouts
            )
    assert past.quality == pytest.approx(sum(count > 0 for count in solved.values()) / 16)
    assert past.pass_at_1 == pytest.approx(solved.total() / tries.total())
    assert (past.num_samples, past.samples_per_prompt) == (tries.total(), 4)
    assert past.signal is not None
    assert past.note.startswith(RECORDED_NOTE)
    assert {candidate for candidate, _ in store_of(root).read()} == {SCREENING, "self", "checkpoint:8"}


def test_score_of_a_file_and_of_an_endpoint(two_epochs, tmp_path):
    root = copy_run(two_epochs, tmp_path / "run")
    prompts = open_session_at(root, 4).task.train
    by_text = {prompt.text: prompt for prompt in prompts}
    half = write_traces(tmp_path / "traces.jsonl", correct_rows(prompts[:8]))

    def say(body: dict) -> dict:
        return {"text": correct_response(by_text[body["prompt"]]), "finish_reason": "stop"}

    with run_server(say) as served:
        found = score_by_name(root, "8", f"file:{half}", f"endpoint:{served.url}#teacher")
    brought, served_one = found[f"file:{half}"], found[f"endpoint:{served.url}#teacher"]
    # 8 of the 16 prompts have a row, and all rows are right; the others count as failed
    assert (brought.quality, brought.num_samples, brought.pass_at_1) == (0.5, 8, 0.5)
    assert (served_one.quality, served_one.num_samples) == (1.0, 64)
    assert brought.signal is served_one.signal is None


def test_score_of_earlier_checkpoints_has_a_negative_distance(two_epochs, tmp_path):
    found = score_by_name(copy_run(two_epochs, tmp_path / "run"), "base", "earlier:2", "8")
    assert {name: (one.step, one.distance) for name, one in found.items()} == {
        "none": (None, 0),
        "base": (0, -4),
        "earlier:2": (2, -2),
        "checkpoint:8": (8, 4),
    }


def test_score_names_the_best_candidate_under_each_variance_kind(two_epochs, tmp_path):
    scores = score_by_name(copy_run(two_epochs, tmp_path / "run"), "self", "6", "8", "past").values()
    for kind in VARIANCE_ESTIMATORS:
        assert sum(one.p_best_by_variance_kind[kind] for one in scores) == pytest.approx(1)
        assert sum(kind in one.best_for_variance_kinds for one in scores) == 1
    assert sum(one.is_selected for one in scores) == 1


@pytest.mark.parametrize("share", [0.3, pytest.param(0.95, marks=pytest.mark.slow)])
def test_score_of_other_sources_continues_after_a_kill(two_epochs, other_vocabulary, tmp_path, share):
    sources = ("8", "past", f"model:{other_vocabulary}")
    straight, broken = (copy_run(two_epochs, tmp_path / name) for name in ("straight", "broken"))
    score_by_name(straight, *sources)
    leave_unfinished(straight, broken, share)
    score_by_name(broken, *sources)
    assert_same_scores(*([without_shares(row) for row in saved_scores(root)] for root in (broken, straight)))


def without_shares(row: dict) -> dict:
    """Without the shares of only 50 resamples."""
    return {name: value for name, value in row.items() if name not in ("p_best_by_variance_kind", "p_best")}


def test_score_repeated_samples_nothing_new_from_other_sources(two_epochs, other_vocabulary, tmp_path):
    root = copy_run(two_epochs, tmp_path / "run")
    sources = ("8", f"model:{other_vocabulary}")
    first = score_by_name(root, *sources)
    before = store_of(root).read()
    assert score_by_name(root, *sources) == first
    assert store_of(root).read() == before


def test_score_with_a_budget_refuses_other_sources(two_epochs, tmp_path):
    with pytest.raises(NpoError, match=r"scoring\.budget is only available if all candidates are checkpoints"):
        score_by_name(copy_run(two_epochs, tmp_path / "run"), "8", "past", overrides=("scoring.budget=64",))


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_score_figure_is_saved(two_epochs, other_vocabulary, tmp_path, suffix):
    path = tmp_path / "figures" / f"scores.{suffix}"
    root = copy_run(two_epochs, tmp_path / "run")
    sources = ["8", "past", f"model:{other_vocabulary}"]
    records = list(score_records(root, *SECOND_EPOCH, sources=sources, at=4, figure=path))
    assert path.stat().st_size > 10_000
    assert f"figure: {path}" in [record.message for record in records if isinstance(record, Notice)]


@pytest.mark.parametrize(
    ("sources", "options", "message"),
    [
        (("8", "model:./nowhere"), {}, "nowhere"),
        (("file:no.jsonl",), {}, "no.jsonl"),
        (("base",), {"at": 0}, "the learner at step 0 is the base itself"),
        (("past",), {"at": 0}, "step 0"),
        ((), {"at": 8}, "has no checkpoint later than step 8"),
        (("self",), {"at": 8}, "step 8 is the run's last"),
        (("4",), {}, "step 4 is not later than the learner's step 4"),
        (("earlier:4",), {}, "step 4 is not earlier than the learner's step 4"),
        (("earlier:1",), {}, "no complete checkpoint of step 1"),
        (("earlier:x",), {}, "earlier:x: the step must be a whole number"),
    ],
)
def test_score_refuses_an_unusable_candidate_before_sampling(two_epochs, tmp_path, sources, options, message):
    root = copy_run(two_epochs, tmp_path / "run")
    before = sorted(root.rglob("*"))
    with pytest.raises(NpoError, match=message.replace(".", r"\.")):
        score_by_name(root, *sources, **options)
    assert sorted(root.rglob("*")) == before


def test_weights_of_a_candidate_are_read_and_hashed_once(line, tmp_path, monkeypatch):
    root, reads, hashed = copy_run(line, tmp_path / "run"), Counter(), Counter()
    load_file, hash_file = weights_io.load_file, checkpoints.hash_file
    monkeypatch.setattr(weights_io, "load_file", lambda path: reads.update([path]) or load_file(path))
    monkeypatch.setattr(checkpoints, "hash_file", lambda path: hashed.update([path]) or hash_file(path))
    # 4 candidates in 2 rounds; the learner's weights are needed before and after each.
    score(root, *QUICK, "scoring.budget=8", at=0)
    weights = [root / f"branches/main/checkpoints/step_{step:06d}/model.safetensors" for step in range(5)]
    assert reads == Counter(weights)
    assert {path: count for path, count in hashed.items() if path in weights} == dict.fromkeys(weights, 1)


def test_scores_with_the_engines_logprobs_are_those_of_the_trainer_up_to_rounding(line, tmp_path, monkeypatch):
    passes, score_rows = [], Policy.score
    monkeypatch.setattr(Policy, "score", lambda self, *args, **kw: passes.append(1) or score_rows(self, *args, **kw))
    found, counts = {}, {}
    for reuse in ("false", "true"):
        root = copy_run(line, tmp_path / reuse)
        passes.clear()
        found[reuse] = score(root, *QUICK, f"engine.reuse_logprobs={reuse}", at=0, sources=[2, 4])
        counts[reuse] = len(passes)
    for computed, reused in zip(found["false"], found["true"], strict=True):
        assert reused.quality == computed.quality
        assert reused.variance == pytest.approx(computed.variance, rel=1e-4)
    assert counts["true"] < counts["false"]


# A thread that samples ahead


def score_on_cores(num_cores: int, root: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> set[str]:
    """Score on a machine with so many cores, one of which is torch's; returns the names of the threads that sampled."""
    names, generate = set(), TransformersEngine.generate

    def watch(self, *args, **options):
        names.add(threading.current_thread().name)
        return generate(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda _: set(range(num_cores)))
        patch.setattr(TransformersEngine, "generate", watch)
        score(root, *LENIENT, *overrides)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("scoring sampler")]
    return names


@pytest.mark.parametrize(
    "overrides",
    [("scoring.budget=64",), *(pytest.param(every, marks=pytest.mark.slow) for every in ((), ("model.lora.rank=2",)))],
)
def test_score_with_a_sampler_thread_is_that_without_bit_for_bit(line, tmp_path, monkeypatch, overrides):
    start = line
    if "model.lora.rank=2" in overrides:
        start, overrides = tmp_path / "lora", ()
        train(start, "train.save_every=1", "guide.inject.max_accuracy=1.0", "model.lora.rank=2")
    roots = {num_cores: copy_run(start, tmp_path / str(num_cores)) for num_cores in (1, 2)}
    alone, beside = (score_on_cores(num_cores, root, monkeypatch, *overrides) for num_cores, root in roots.items())
    assert alone == {threading.current_thread().name}
    assert beside == {"scoring sampler_0"}
    assert store_of(roots[1]).path.read_bytes() == store_of(roots[2]).path.read_bytes()
    assert saved_scores(roots[1]) == saved_scores(roots[2])


@pytest.mark.slow
def test_score_reports_an_error_of_the_sampler_thread_and_continues_later(line, straight, tmp_path, monkeypatch):
    root, generate, calls = copy_run(line, tmp_path / "run"), TransformersEngine.generate, []

    def fail(self, *args, **options):
        calls.append(threading.current_thread().name)
        if len(calls) == 4:
            raise RunFailed("the engine is gone")
        return generate(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
        patch.setattr(TransformersEngine, "generate", fail)
        with pytest.raises(RunFailed, match="the engine is gone"):
            score(root, *LENIENT)
    assert set(calls) == {"scoring sampler_0"}
    # screening, control and the first candidate are written
    assert list(prompts_by_candidate(root)) == [SCREENING, "self", "checkpoint:1"]
    score(root, *LENIENT)
    assert_same_scores(saved_scores(root), saved_scores(straight["all pairs"]))
