"""What an arm had cost, on a run written by hand: round numbers of steps, tokens and seconds.

main: 6 steps of 100 tokens and 4 s. `near` left it at step 2 with a guide from step 5 (70 tokens and 5 s of samples,
after a scoring of 30 tokens and 3 s) and did 3 steps of 10 tokens and 2 s. `bare` left main at step 4 without a guide:
2 steps of 1 token, whose seconds nobody wrote down.
"""

import json

import pytest

from npo_cli.storage.autonpo_log import acceptance_test_folder, append_transitions, open_probe
from npo_cli.storage.costs import Cost, cost_at, cost_at_steps, cost_to_threshold, learning_curve
from npo_cli.storage.guide_cache import finish_guide_cache, open_guide_cache
from npo_cli.storage.jsonl import JsonlLog
from npo_cli.storage.layout import RunDir
from npo_cli.storage.lineage import append_segment
from npo_cli.storage.metrics import append_sampling_time
from npo_cli.storage.sample_store import SampleStore, append_eval, open_sample_store, save_scores
from npo_cli.types.autonpo import AutoNPOState, Transition
from npo_cli.types.costs import CurvePoint
from npo_cli.types.rollouts import Segment
from tests.storage.builders import RECIPE, evaluation, group, guide_info, new_run


def did(run: RunDir, branch: str, steps: range, *, tokens: int, seconds: float | None = None) -> None:
    journal = JsonlLog(run.metrics_path(branch))
    for step in steps:
        journal.append({"step": step, "branch": branch, "tokens": tokens, "entropy": step / 10})
        if seconds is not None:
            took(run, branch, step, seconds)


def took(run: RunDir, branch: str, step: int, seconds: float) -> None:
    JsonlLog(run.timings_path(branch)).append({"step": step, "branch": branch, "time": "", "seconds": seconds})


def left(run: RunDir, branch: str, *, at: int, guide: str | None = None) -> None:
    run.save_recipe(branch, RECIPE)
    append_segment(run, Segment(branch=branch, parent="main", fork_step=at, guide_cache=guide, guide_until=5))


@pytest.fixture
def run(tmp_path) -> RunDir:
    made = new_run(tmp_path)
    did(made, "main", range(1, 7), tokens=100, seconds=4.0)
    scoring = open_sample_store(made, "main", 2, candidates=[5], settings={"k": 1})
    scoring.samples.extend([{"candidate": 5, "response_ids": [1] * 20}, {"candidate": 5, "response_ids": [1] * 10}])
    append_sampling_time(scoring.folder, 2.0, num_tokens=30)
    append_sampling_time(scoring.folder, 1.0, num_tokens=0)
    save_scores(scoring, [])
    # Another learner's scoring is not this arm's to pay.
    other = open_sample_store(made, "main", 1, candidates=[5], settings={"k": 1})
    other.samples.append({"candidate": 5, "response_ids": [1] * 999})
    append_sampling_time(other.folder, 999.0, num_tokens=999)
    save_scores(other, [])
    info = guide_info(made, name="near", learner_step=2, guide_step=5, num_steps=3)
    store = open_guide_cache(made, info)
    for prompt_id in ("a", "b"):
        store.add_queried_prompt({"prompt_id": prompt_id, "num_sampled": 1, "num_correct": 0, "num_tokens": 35})
    append_sampling_time(made.guide_folder("near"), 5.0, num_tokens=70)
    finish_guide_cache(made, info)
    left(made, "near", at=2, guide="near")
    did(made, "near", range(3, 6), tokens=10, seconds=2.0)
    left(made, "bare", at=4)
    did(made, "bare", range(5, 7), tokens=1)
    return made


def saved(scoring: SampleStore, *, when: str) -> None:
    """Branches and scorings are told apart by their times, and the fixture's branch is born already."""
    save_scores(scoring, [])
    answer = json.loads(scoring.scores_path.read_text())
    scoring.scores_path.write_text(json.dumps(answer | {"saved": when}))


def cost(steps: int, tokens: int, seconds: float) -> Cost:
    return Cost(steps=steps, tokens=tokens, seconds=seconds)


def test_the_first_branch_pays_for_its_own_steps(run):
    assert [cost_at(run, "main", step) for step in (0, 4, 6)] == [cost(0, 0, 0), cost(4, 400, 16), cost(6, 600, 24)]


def test_a_replay_pays_for_scout_scoring_guide_and_its_own_steps(run):
    # scout: 5 steps, 500 tokens, 20 s; scoring 30 and 3 s; guide 70 and 5 s; then 10 and 2 s a step
    assert cost_at(run, "near", 3) == cost(6, 610, 30)
    assert cost_at(run, "near", 5) == cost(8, 630, 34)
    # At and before the fork it is its parent.
    assert cost_at(run, "near", 2) == cost(2, 200, 8)
    assert cost_at_steps(run, "near")[2] == [cost(2, 200, 8), cost(5, 600, 28)]


def test_a_step_executed_again_after_a_kill_took_both_its_times(run):
    took(run, "main", 2, 16.0)
    # 4 x 4 s and the second execution of step 2; its tokens were read back, not generated again
    assert cost_at(run, "main", 4) == cost(4, 400, 32)
    assert cost_at(run, "main", 1) == cost(1, 100, 4)


def test_a_scoring_after_the_replay_cannot_have_cost_it_anything(run):
    later = open_sample_store(run, "main", 2, candidates=[6], settings={"k": 1})
    later.samples.append({"candidate": 5, "response_ids": [1] * 999})
    append_sampling_time(later.folder, 999.0, num_tokens=999)
    saved(later, when="2999-01-01T00:00:00.000000+00:00")
    assert cost_at(run, "near", 3) == cost(6, 610, 30)


def test_candidates_that_were_scored_are_scouts_too(run):
    earlier = open_sample_store(run, "main", 2, candidates=[5, 6], settings={"k": 1})
    saved(earlier, when="2000-01-01T00:00:00.000000+00:00")
    # the scout went on to step 6: one step, 100 tokens and 4 s more
    assert cost_at(run, "near", 3) == cost(7, 710, 34)


def test_a_fork_without_a_guide_pays_up_to_the_fork(run):
    assert cost_at(run, "bare", 6) == cost(6, 402, 16)
    assert cost_at_steps(run, "bare")[4] == [cost(4, 400, 16), cost(4, 400, 16)]


def test_a_replay_of_a_replay_pays_for_the_whole_line(run):
    run.save_recipe("third", RECIPE)
    append_segment(run, Segment(branch="third", parent="near", fork_step=4, guide_cache=None, guide_until=None))
    did(run, "third", range(5, 6), tokens=3, seconds=0.5)
    # near up to 4: 5 + 2 steps, 600 + 20 tokens, 28 + 4 s
    assert cost_at(run, "third", 5) == cost(8, 623, 32.5)


def probed(run: RunDir, branch: str, step: int, *, seconds: float) -> None:
    """Two answers of two tokens each."""
    probe = open_probe(run, branch, step, settings={"k": 2})
    append_sampling_time(probe.folder, seconds, num_tokens=4)
    probe.rollouts.write_step(0, [group("p0")])


def test_a_probe_is_paid_by_the_branch_that_was_probed_from_that_step_on(run):
    probed(run, "main", 5, seconds=6.0)
    assert cost_at(run, "main", 4) == cost(4, 400, 16)
    assert cost_at(run, "main", 5) == cost(5, 504, 26)
    assert cost_at(run, "main", 6) == cost(6, 604, 30)
    # bare left main at step 4 and needed no probe of step 5
    assert cost_at(run, "bare", 6) == cost(6, 402, 16)


def test_a_replay_pays_for_the_probe_of_its_guide_and_for_its_own(run):
    # the guide is main at step 5
    probed(run, "main", 5, seconds=6.0)
    assert cost_at(run, "near", 3) == cost(6, 614, 36)
    # a probe at step 4 of the replay: 8 tokens and 7 s in all
    probed(run, "near", 4, seconds=1.0)
    assert cost_at(run, "near", 3) == cost(6, 614, 36)
    assert cost_at(run, "near", 5) == cost(8, 638, 41)


def test_a_replay_taken_back_is_paid_by_the_branch_that_goes_on_instead(run):
    replayed = AutoNPOState(branch="near", step=5, phase="JUDGE")
    reverted = AutoNPOState(branch="main", step=5, phase="COOLDOWN")
    moves = [
        Transition(step=5, event="replayed", phase_before="REPLAY", state=replayed),
        Transition(step=5, event="reverted", phase_before="JUDGE", state=reverted, evidence={"num_tokens": 40}),
    ]
    append_transitions(run, moves)
    append_sampling_time(acceptance_test_folder(run, "near", 5), 0.5, num_tokens=40)
    assert cost_at(run, "main", 5) == cost(5, 500, 20)
    # from there on: near's 3 steps of 10 tokens and 2 s, its guide's 70 tokens and 5 s, the test; then step 6 itself
    assert cost_at(run, "main", 6) == cost(9, 740, 35.5)
    # the replay itself is charged as before
    assert cost_at(run, "near", 5) == cost(8, 630, 34)


def test_a_replay_that_is_kept_pays_for_the_test_from_then_on(run):
    replayed = AutoNPOState(branch="near", step=4, phase="JUDGE")
    kept = AutoNPOState(branch="near", step=4, phase="COOLDOWN")
    before = cost_at(run, "near", 4), cost_at(run, "near", 5)
    moves = [
        Transition(step=4, event="replayed", phase_before="REPLAY", state=replayed),
        Transition(step=4, event="kept", phase_before="JUDGE", state=kept, evidence={"num_tokens": 40}),
    ]
    append_transitions(run, moves)
    assert cost_at(run, "near", 4) == before[0]
    assert cost_at(run, "near", 5) == before[1] + cost(0, 40, 0)


def points(run: RunDir, branch: str) -> list[tuple[int, int, int, float, float, float | None]]:
    return [
        (each.step, each.total_steps, each.total_tokens, each.total_seconds, each.accuracy, each.entropy)
        for each in learning_curve(run, branch, name="x")
    ]


def test_a_curve_follows_the_line_of_descent(run):
    for branch, step, accuracy in (("main", 0, 0.1), ("main", 2, 0.2), ("main", 4, 0.3), ("near", 4, 0.9)):
        append_eval(run, evaluation(step, branch=branch, accuracy=accuracy))
    assert points(run, "main") == [(0, 0, 0, 0, 0.1, None), (2, 2, 200, 8, 0.2, 0.2), (4, 4, 400, 16, 0.3, 0.4)]
    # At the fork it stands twice: as it was, and with everything paid and nothing learned yet.
    assert points(run, "near") == [
        (0, 0, 0, 0, 0.1, None),
        (2, 2, 200, 8, 0.2, 0.2),
        (2, 5, 600, 28, 0.2, 0.2),
        (4, 7, 620, 32, 0.9, 0.4),
    ]


def test_the_evaluation_with_most_samples_is_the_one_quoted(run):
    append_eval(run, evaluation(4, accuracy=0.25, num_samples=8))
    append_eval(run, evaluation(4, accuracy=0.75, num_samples=2))
    assert [accuracy for *_, accuracy, _ in points(run, "main")] == [0.25]


def arm(*accuracies: float) -> list[CurvePoint]:
    return [
        CurvePoint(
            name="x",
            step=10 * place,
            total_steps=20 * place,
            total_tokens=place,
            total_seconds=1.5 * place,
            accuracy=accuracy,
        )
        for place, accuracy in enumerate(accuracies)
    ]


def test_a_threshold_is_crossed_by_the_mean_of_three_evaluations():
    # means: 0.05, 0.3, 0.3, 0.5, 0.6
    found = cost_to_threshold(arm(0.0, 0.1, 0.8, 0.0, 0.7), 0.3)
    assert (found.step, found.total_steps, found.total_tokens, found.total_seconds) == (10, 20, 1, 1.5)
    # 0.8 at step 20 alone is luck: (0.1 + 0.8 + 0.0) / 3
    assert cost_to_threshold(arm(0.0, 0.1, 0.8, 0.0, 0.0), 0.4).step is None


def test_a_threshold_never_reached_is_censored_and_the_ends_have_one_neighbour():
    found = cost_to_threshold(arm(0.1, 0.2), 0.5)
    assert (found.name, found.step) == ("x", None)
    assert (found.total_steps, found.total_tokens, found.total_seconds) == (None, None, None)
    assert cost_to_threshold(arm(0.4, 0.6), 0.5).step == 0
    assert cost_to_threshold([], 0.5).step is None
