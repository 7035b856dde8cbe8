"""Held-out accuracy: measured once, with the same random numbers for every checkpoint."""

import pytest

from npo_cli.session.session import open_task
from npo_cli.storage.evals import hash_prompt, read_evals, read_prompt_results
from npo_cli.storage.layout import open_run
from npo_cli.storage.log_head import rewrite_head
from npo_cli.training.evaluate import evaluate_policy, evaluate_run, summarize_eval
from npo_cli.types.rollouts import EvalReport, Prompt, Rollout
from npo_cli.types.rollouts import Group as Answered
from tests.helpers.runs import copy_run, open_session_at, tiny_recipe, train


def evaluated(root, **options) -> list[EvalReport]:
    arguments = {"step": None, "every_step": False, "branch": None, "overrides": ()} | options
    records = evaluate_run(root, **arguments)
    return [record for record in records if isinstance(record, EvalReport)]


def answered(name: str, *verdicts: str) -> Answered:
    rollouts = tuple(
        Rollout(
            prompt_id=name,
            slot=slot,
            response_ids=(1,) * (slot + 1),
            behavior_logps=(),
            text="",
            finished=verdict == "correct",
            sampler_step=0,
            verdict=verdict,
        )
        for slot, verdict in enumerate(verdicts)
    )
    return Answered(prompt=Prompt(prompt_id=name, answer="", text=""), rollouts=rollouts)


def test_eval_accuracy_is_the_mean_and_pass_at_k_the_solved_fraction():
    groups = [answered("a", "correct", "wrong"), answered("b", "correct", "correct"), answered("c", "wrong", "timeout")]
    report = summarize_eval(groups, branch="main", step=3, seed=0)
    assert report.accuracy == pytest.approx((0.5 + 1 + 0) / 3)
    assert report.pass_at_k == pytest.approx(2 / 3)
    assert report.accuracy_low <= report.accuracy <= report.accuracy_high
    # 1 and 2 tokens per prompt; the three responses that are not correct were truncated
    assert (report.num_tokens, report.mean_length, report.truncated_fraction) == (9, 1.5, 0.5)
    assert (report.num_prompts, report.num_samples) == (3, 2)


def test_eval_every_steps_in_training_and_not_again_on_resume(tmp_path):
    root = tmp_path / "run"
    train(root, "eval.every=2")
    assert [report.step for report in read_evals(open_run(root))] == [0, 2, 4]
    before = (root / "evals.jsonl").read_bytes()
    assert [report.step for report in evaluated(root, every_step=True)] == [0, 2, 4]
    assert (root / "evals.jsonl").read_bytes() == before


def test_eval_is_also_done_at_the_last_step_where_its_interval_does_not_divide_num_steps(tmp_path):
    train(tmp_path / "run", "eval.every=3")
    assert [report.step for report in read_evals(open_run(tmp_path / "run"))] == [0, 3, 4]


def test_eval_results_per_prompt_sum_to_the_report(tmp_path):
    root = tmp_path / "run"
    train(root, "eval.every=2", "task.heldout_size=8")
    run = open_run(root)
    kept = read_prompt_results(run)
    assert [one.step for one in kept] == [0, 2, 4]
    # 8 prompts twice; all evaluations ask the same
    assert [sum(one.num_correct) / 16 for one in kept] == [report.accuracy for report in read_evals(run)]
    assert {one.prompt_keys for one in kept} == {
        tuple(map(hash_prompt, open_task(tiny_recipe("task.heldout_size=8")).heldout))
    }


def test_eval_without_results_per_prompt_is_repeated_without_a_second_report(tmp_path):
    root = tmp_path / "run"
    train(root, "eval.every=2")
    before, reports = (root / "prompt_results.jsonl").read_bytes(), (root / "evals.jsonl").read_bytes()
    for path in root.glob("prompt_results.jsonl*"):
        path.unlink()
    evaluated(root, every_step=True)
    assert (root / "prompt_results.jsonl").read_bytes() == before
    assert (root / "evals.jsonl").read_bytes() == reports


def test_eval_killed_between_its_two_lines_is_repeated_equally(tmp_path):
    root = tmp_path / "run"
    train(root, "eval.every=2")
    before = [(root / name).read_bytes() for name in ("prompt_results.jsonl", "evals.jsonl")]
    (root / "evals.jsonl").write_bytes(b"".join(before[1].splitlines(keepends=True)[:-1]))
    rewrite_head(root / "evals.jsonl")  # the head of before the killed command
    evaluated(root, step=4)
    assert [(root / name).read_bytes() for name in ("prompt_results.jsonl", "evals.jsonl")] == before


def test_eval_of_a_checkpoint_equals_the_one_in_training(scout, tmp_path):
    train(tmp_path / "run", "eval.every=2")
    during = {report.step: report for report in read_evals(open_run(tmp_path / "run"))}
    later = copy_run(scout, tmp_path / "later")
    for report in evaluated(later, every_step=True):
        assert report == during[report.step]


def test_eval_with_more_samples_is_another_evaluation(scout, tmp_path):
    root = copy_run(scout, tmp_path / "run")
    (two,) = evaluated(root, step=2)
    (five,) = evaluated(root, step=2, overrides=("eval.samples_per_prompt=5",))
    assert (two.num_samples, five.num_samples) == (2, 5)
    assert read_evals(open_run(root)) == [two, five]


def test_eval_uses_common_random_numbers_at_all_steps(scout):
    """The same weights under another step's name get the same answers."""
    session = open_session_at(scout, 2)
    first, second = (evaluate_policy(session, branch="b", step=step) for step in (7, 8))
    assert (first.accuracy, first.num_tokens) == (second.accuracy, second.num_tokens)
