"""Ranking guides: who is asked what, an interruption that changes nothing, and the floor of D = 0."""

import json
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from npo_cli.errors import NpoError
from npo_cli.guides.score import open_scoring_state, rank_round, score_run
from npo_cli.session.learner import find_learner
from npo_cli.session.session import build_session, open_policy, open_task
from npo_cli.storage.checkpoints import find_checkpoint
from npo_cli.storage.layout import open_run
from npo_cli.storage.sample_store import SCREENING_INDEX, find_latest_scores, list_sample_stores
from npo_cli.types.rollouts import Notice
from tests.helpers.runs import copy_run, score, train

QUICK = ("scoring.samples_per_prompt=4", "scoring.bootstrap_resamples=50")
LENIENT = (*QUICK, "guide.inject.max_accuracy=1.0")
"""Every prompt counts as hard, so that it is known who is asked."""


@pytest.fixture(scope="module")
def line(tmp_path_factory) -> Path:
    """A run with candidates 1 to 4 for the learner at step 0."""
    root = tmp_path_factory.mktemp("line") / "run"
    train(root, "train.save_every=1", "guide.inject.max_accuracy=1.0")
    return root


def samples_of(root: Path) -> list[dict]:
    (scoring,) = list_sample_stores(open_run(root))
    return list(scoring.samples.iter_rows())


def asked(root: Path) -> dict[int, list[str]]:
    """Prompts put to each arm, in order; every one of them the same number of times."""
    counts = Counter((row["candidate"], row["prompt_id"]) for row in samples_of(root))
    assert set(counts.values()) == {4}
    found = defaultdict(list)
    for arm, prompt_id in counts:
        found[arm].append(prompt_id)
    return dict(found)


def answer_of(root: Path) -> list[dict]:
    (scoring,) = list_sample_stores(open_run(root))
    return json.loads(scoring.scores_path.read_text())["scores"]


def test_probe_control_and_candidates_are_asked_the_prompts_ahead(line, tmp_path):
    root = copy_run(line, tmp_path / "run")
    scores = score(root, *LENIENT)
    found = asked(root)
    assert [entry.step for entry in scores] == [entry.distance for entry in scores] == [1, 2, 3, 4]
    assert list(found) == [SCREENING_INDEX, 0, 1, 2, 3, 4]
    assert len(set(map(tuple, found.values()))) == 1
    assert len(found[SCREENING_INDEX]) == 16
    assert sum(entry.is_selected for entry in scores) == 1
    assert sum(entry.p_best for entry in scores) == pytest.approx(1)
    assert {(entry.num_prompts, entry.num_samples) for entry in scores} == {(16, 64)}
    assert find_latest_scores(open_run(root)).scores == tuple(scores)


def test_hard_prompts_are_those_the_first_look_finds_below_the_gate(line, tmp_path):
    root = copy_run(line, tmp_path / "run")
    score(root, *QUICK, "guide.inject.max_accuracy=0.0", candidates=[4])
    right = Counter(
        row["prompt_id"] for row in samples_of(root) if row["candidate"] == SCREENING_INDEX and row["is_correct"]
    )
    found = asked(root)
    hard = [prompt_id for prompt_id in found[SCREENING_INDEX] if not right[prompt_id]]
    assert 0 < len(hard) < 16
    assert found[0] == found[4] == hard


def test_the_learner_measured_against_itself_is_at_the_floor(line, tmp_path):
    """D = 0: its fresh samples, charged to itself, are at a KL of nothing and a V of the floor."""
    root = copy_run(line, tmp_path / "run")
    score(root, *LENIENT, candidates=[4])
    run = open_run(root)
    learner = find_learner(run, at=0, branch=None, overrides=LENIENT)
    task = open_task(learner.recipe)
    session = build_session(
        run, learner.recipe, task=task, policy=open_policy(learner.recipe, task, learner.checkpoint)
    )
    contest = open_scoring_state(session, learner, [find_checkpoint(run, "main", 4)])
    for key in list(contest.samples):
        # The learner's second answers, under the name of a candidate.
        if key[0] == 0:
            contest.samples[4, key[1]] = contest.samples[key]
    prompts = session.task.train
    step = rank_round(contest, {0: prompts, 4: prompts})
    try:
        while True:
            next(step)
    except StopIteration as stopped:
        (itself,) = stopped.value
    assert itself.kl_per_token == pytest.approx(0, abs=1e-6)
    assert itself.kl_per_sequence == pytest.approx(0, abs=1e-5)
    assert itself.variance == pytest.approx(1, abs=1e-4)
    assert itself.variances["seq2"] == pytest.approx(1, abs=1e-4)
    assert itself.quality_net == pytest.approx(0, abs=1e-12)
    assert itself.ess_fraction == pytest.approx(1, abs=1e-4)


BUDGETS = {"everybody everything": (), "halving": ("scoring.budget=64",)}


@pytest.fixture(scope="module")
def straight(line, tmp_path_factory) -> dict[str, Path]:
    """The scoring nobody interrupted, of each kind."""
    roots = {kind: copy_run(line, tmp_path_factory.mktemp("straight") / "run") for kind in BUDGETS}
    for kind, root in roots.items():
        score(root, *LENIENT, *BUDGETS[kind])
    return roots


@pytest.mark.parametrize(
    ("kind", "share"),
    [("everybody everything", 0.1), ("everybody everything", 0.95), ("halving", 0.5), ("halving", 0.95)],
)
def test_an_interrupted_scoring_ends_with_the_same_answer(line, straight, tmp_path, kind, share):
    """The leftover of a kill: the first part of the samples, the last line torn, in the middle of a prompt's four."""
    root = copy_run(line, tmp_path / "run")
    (scoring,) = list_sample_stores(open_run(straight[kind]))
    folder = root / "scores" / scoring.folder.name
    shutil.copytree(scoring.folder, folder)
    (folder / "scores.json").unlink()
    data = (folder / "samples.jsonl").read_bytes()
    (folder / "samples.jsonl").write_bytes(data[: round(share * len(data))])
    score(root, *LENIENT, *BUDGETS[kind])
    assert_same_answer(answer_of(root), answer_of(straight[kind]))


def assert_same_answer(found: list[dict], expected: list[dict]) -> None:
    """Equal but for rounding: a prompt asked again alone may differ from its batch in the last digit."""
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            assert one[name] == (pytest.approx(value, rel=1e-3, abs=1e-5) if isinstance(value, float) else value), name


def test_a_scoring_asked_again_samples_nothing_new(straight, tmp_path):
    root = copy_run(straight["everybody everything"], tmp_path / "run")
    first = find_latest_scores(open_run(root)).scores
    before = samples_of(root)
    assert tuple(score(root, *LENIENT)) == first
    assert samples_of(root) == before


def test_a_budget_asks_the_better_half_more(straight):
    counts = {arm: len(prompts) for arm, prompts in asked(straight["halving"]).items()}
    # 64 pairs in 2 rounds: 4 candidates x 8 prompts, then the better 2 x 16, of which only 8 are left
    assert (counts[SCREENING_INDEX], counts[0]) == (16, 16)
    assert sorted(counts[step] for step in (1, 2, 3, 4)) == [8, 8, 16, 16]
    told = {entry["step"]: entry["num_prompts"] for entry in answer_of(straight["halving"])}
    assert told == {step: counts[step] for step in (1, 2, 3, 4)}


def test_samples_of_later_rounds_do_not_decide_earlier_ones(straight, tmp_path):
    """First everything is asked; the budget's own race over the same samples is what it would have been alone."""
    root = copy_run(straight["everybody everything"], tmp_path / "run")
    score(root, *LENIENT, "scoring.budget=64")
    assert_same_answer(answer_of(root), answer_of(straight["halving"]))


def test_the_cautious_rule_takes_the_nearest_within_one_standard_error(straight, tmp_path):
    root = copy_run(straight["everybody everything"], tmp_path / "run")
    greedy = score(root, *LENIENT)
    cautious = score(root, *LENIENT, "scoring.selection_rule=one_se")
    (nearest,) = [entry.step for entry in cautious if entry.is_selected]
    (largest,) = [entry.step for entry in greedy if entry.is_selected]
    assert nearest <= largest
    assert {entry.selection_by_profile["one_se"] for entry in (*greedy, *cautious)} == {nearest}
    assert largest == max(greedy, key=lambda entry: entry.signal).step


def test_a_budget_too_small_for_a_race_says_what_it_needs(line, tmp_path):
    with pytest.raises(NpoError, match=r"scoring\.budget is 3, but 4 candidates in 2 rounds need at least 8"):
        score(copy_run(line, tmp_path / "run"), *LENIENT, "scoring.budget=3")


def test_a_learner_that_solves_everything_is_told_so(line, tmp_path):
    """One easy addition, which the base solves in one of 4 samples: a gate of 0 helps only where none is right."""
    root = copy_run(line, tmp_path / "run")
    with pytest.raises(NpoError, match=r"solves all 1 prompts above the gate 0\.0: no guide can help"):
        score(root, *QUICK, "guide.inject.max_accuracy=0.0", "scoring.num_prompts=1", candidates=[4])


def test_a_candidate_must_lie_ahead(line):
    with pytest.raises(NpoError, match="step 2 is not later than the learner's step 2"):
        score(line, *QUICK, at=2, candidates=[2, 3])
    with pytest.raises(NpoError, match="main has no checkpoint later than step 4"):
        score(line, *QUICK, at=4)


def test_the_number_of_hard_prompts_is_told(line, tmp_path):
    root = copy_run(line, tmp_path / "run")
    records = score_run(root, at=0, candidates=[4], branch=None, overrides=LENIENT)
    notices = [record.message for record in records if isinstance(record, Notice)]
    assert notices[0] == "16 of 16 prompts are hard for step 0 (accuracy <= 1.0)"
