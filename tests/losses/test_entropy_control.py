"""The adapted coefficient of the entropy bonus, step by step by hand, and in a run."""

import pytest

from npo_cli.config.recipe import LossSettings
from npo_cli.losses.entropy_control import adapt_entropy_coef
from tests.helpers.runs import copy_run, reproducible_digests, resume, start_resume, stop_after, train


def test_entropy_coefficient_rises_below_the_target_and_falls_above_it():
    settings = LossSettings(entropy_target=0.5, entropy_coef_delta=0.25, entropy_coef_max=0.5)
    coefficient, applied = settings.entropy_coef, []
    for entropy in (0.9, 0.4, 0.5, 0.3, 0.2, 0.6, 0.1):
        used, coefficient = adapt_entropy_coef(settings, coefficient, entropy)
        applied.append((used, coefficient))
    # 0 stays 0 above the target; .25 and .5 at or below it, at most .5; not applied above it, and lower afterwards
    assert applied == [(0.0, 0.0), (0.0, 0.25), (0.25, 0.5), (0.5, 0.5), (0.5, 0.5), (0.0, 0.25), (0.25, 0.5)]


ALWAYS_LOW = ("loss.entropy_target=9", "loss.entropy_coef_delta=0.01", "loss.entropy_coef=0.02")


def test_entropy_coefficient_of_a_run_is_part_of_its_state(tmp_path):
    root = tmp_path / "straight"
    reports = train(root, *ALWAYS_LOW, "train.num_steps=4", until=2)
    copy = copy_run(root, tmp_path / "dropped")
    reports += resume(root)
    assert [report.metrics["entropy_bonus"] for report in reports] == pytest.approx([0.02, 0.03, 0.04, 0.05])
    assert [report.metrics["entropy_coef"] for report in reports] == pytest.approx([0.03, 0.04, 0.05, 0.06])
    # Step 3 is recorded, step 2 is the newest checkpoint.
    stop_after(start_resume(copy), 3)
    resume(copy)
    assert reproducible_digests(copy) == reproducible_digests(root)
    # The first step has the gradient of a constant bonus.
    constant = train(tmp_path / "constant", "loss.entropy_coef=0.02", "train.num_steps=1")
    assert constant[0].metrics["grad_norm"] == reports[0].metrics["grad_norm"]


def test_entropy_above_the_target_has_no_bonus(tmp_path):
    high = train(tmp_path / "high", "loss.entropy_target=1e-6", "loss.entropy_coef=0.01", "train.num_steps=2")
    plain = train(tmp_path / "plain", "train.num_steps=2")
    assert [report.metrics["entropy_bonus"] for report in high] == [0.0, 0.0]
    assert [report.metrics["grad_norm"] for report in high] == [report.metrics["grad_norm"] for report in plain]
