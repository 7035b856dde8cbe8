"""The metrics line of real steps."""

import json
import math
from pathlib import Path

from npo_cli.storage.jsonl import JsonlLog
from npo_cli.storage.layout import open_run
from npo_cli.storage.rollout_log import RolloutLog
from npo_cli.training.loop import update_running_metrics
from tests.helpers.runs import copy_run, resume, train


def metrics_of(root: Path, branch: str) -> list[dict]:
    return list(JsonlLog(open_run(root).metrics_path(branch)).iter_rows())


def test_step_metrics_of_a_step_with_a_guide(scout, tmp_path):
    root = copy_run(scout, tmp_path / "run")
    reports = resume(root, at=2, guide="near")
    rollout_log = RolloutLog(open_run(root).rollouts_path("near"))
    for report in reports:
        metrics, mixes = report.metrics, [group.injection_status for group in rollout_log.read_step(report.step)]
        assert metrics["inject/slots"] == mixes.count("injected") > 0
        assert metrics["inject/no_guide"] == mixes.count("no_guide")
        assert metrics["inject/gate_closed"] == mixes.count("gate_closed")
        assert metrics["inject/eligible"] == metrics["inject/slots"] + metrics["inject/no_guide"]
        assert 0 < metrics["inject/grad_norm_fraction"] < 1
        # micro's ratio mode `none` clips nothing
        assert metrics["inject/tokens_with_gradient"] == 1
        assert 0 < metrics["inject/ratio_min"] <= metrics["inject/ratio_mean"] <= metrics["inject/ratio_max"]


def test_guides_fraction_of_the_gradient_is_measured_every_n_steps(scout, tmp_path):
    reports = resume(copy_run(scout, tmp_path / "run"), "guide.inject.measure_every=2", at=2, guide="near")
    assert [(one.step, "inject/grad_norm_fraction" in one.metrics) for one in reports] == [(3, False), (4, True)]


def test_step_metrics_are_those_of_the_rollouts(scout):
    (first, *_), rollout_log = metrics_of(scout, "main"), RolloutLog(open_run(scout).rollouts_path("main"))
    rollouts = [rollout for group in rollout_log.read_step(1) for rollout in group.rollouts]
    assert first["reward"] == sum(rollout.reward for rollout in rollouts) / 16
    assert first["tokens"] == sum(len(rollout.response_ids) for rollout in rollouts)
    assert first["completions/mean_length"] == first["tokens"] / 16
    assert first["data_position"] == 4
    weighted = sum(rollout.mean_entropy * len(rollout.response_ids) for rollout in rollouts)
    assert math.isclose(first["entropy"], weighted / first["tokens"])
    assert not any(name.startswith("inject/") for name in first)


def test_step_metric_tokens_total_continues_through_a_fork(scout, tmp_path):
    root = copy_run(scout, tmp_path / "run")
    resume(root, at=2, guide="near")
    before = metrics_of(root, "main")[1]["tokens_total"]
    first = metrics_of(root, "near")[0]
    # The guide's on-policy tokens were paid for when its cache was made.
    assert first["tokens_total"] == before + first["tokens"]


def test_step_metric_averages_are_bias_corrected():
    once = update_running_metrics({}, {"tokens": 5, "reward": 0.5, "entropy": 2.0})
    assert (once["tokens_total"], once["reward_ema"], once["entropy_ema"]) == (5, 0.5, 2.0)
    twice = update_running_metrics(once, {"tokens": 7, "reward": 0.0, "entropy": 2.0})
    # weights 0.1 * 0.9 and 0.1: (0.09 * 0.5 + 0.1 * 0) / 0.19
    assert math.isclose(twice["reward_ema"], 0.045 / 0.19)
    assert (twice["tokens_total"], round(twice["entropy_ema"], 12)) == (12, 2.0)


def test_step_metrics_do_not_depend_on_time(tmp_path):
    roots = [tmp_path / "a", tmp_path / "b"]
    for root in roots:
        train(root, "train.num_steps=2")
    first, second = ((root / "branches/main/metrics.jsonl").read_bytes() for root in roots)
    assert first == second
    assert "time" in json.loads((roots[0] / "branches/main/timings.jsonl").read_text().splitlines()[0])
