"""`npo calibrate` on a real tiny run: replays against branches that `npo resume` makes, kills, costs, refusals."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from npo_cli.experiments.calibrate import calibrate_run, resample_gains
from npo_cli.storage.calibrations import Calibration, Replay
from npo_cli.storage.cost_sums import compute_run_costs, cost_at, costs_by_activity
from npo_cli.storage.costs import read_cost_lines
from npo_cli.storage.evals import read_prompt_results
from npo_cli.storage.layout import open_run
from npo_cli.types.calibration import CandidateGain, RuleResult
from npo_cli.types.rollouts import Notice
from tests.helpers.cli_errors import assert_refused, npo
from tests.helpers.runs import copy_run, file_digests, resume, sample, train
from tests.helpers.warm_process import ForkServer, num_lines, wait_until

FEW = ("scoring.num_prompts=8", "scoring.samples_per_prompt=2", "scoring.bootstrap_resamples=50")
OPTIONS = ("--at", "2", "--candidates", "self,+2", "--seeds", "2", "--steps", "4")
NUM_REPLAYS = 2 * 3


@pytest.fixture(scope="module")
def line(tmp_path_factory) -> Path:
    """Checkpoints 0, 2 and 4; 8 held-out prompts; so large a rate that 4 steps change the policy."""
    root = tmp_path_factory.mktemp("line") / "run"
    train(root, "task.heldout_size=8", "train.lr=1e-3")
    return root


@pytest.fixture(scope="module")
def calibrated(line, tmp_path_factory) -> Path:
    """Calibrated without interruption; its output is beside it."""
    root = copy_run(line, tmp_path_factory.mktemp("calibrated") / "run")
    result = npo("calibrate", root, *OPTIONS, *FEW, "--json", "--figure", root.parent / "gain.svg")
    assert result.code == 0, result.err
    (root.parent / "out.jsonl").write_text(result.out)
    return root


def folder_of(root: Path) -> Path:
    (folder,) = (root / "calibrations").iterdir()
    return folder


def rows_of(out: str) -> list[dict[str, Any]]:
    return [json.loads(row) for row in out.splitlines()]


def replays_of(root: Path) -> dict[tuple[str | None, int], Replay]:
    return Calibration(folder_of(root)).read_replays()


def test_calibrate_replays_every_candidate_with_every_seed(calibrated):
    found = replays_of(calibrated)
    names = {guide for guide, _ in found}
    assert len(found) == NUM_REPLAYS
    assert {None, "self", "checkpoint"} == {name and name.partition("-")[0] for name in names}
    assert {one.eval_steps for one in found.values()} == {(3, 4, 5, 6)}
    assert {(len(one.prompt_keys), np.shape(one.num_correct)) for one in found.values()} == {(8, (4, 8))}
    assert all((one.num_injected > 0) == (one.guide is not None) for one in found.values())
    # Seeds and guides make a difference.
    assert len({one.num_correct for one in found.values()}) > 1


def test_calibrate_prints_paired_gains_and_rules(calibrated):
    rows = rows_of((calibrated.parent / "out.jsonl").read_text())
    candidates = [row for row in rows if row["record"] == "candidate_gain"]
    rules = {row["rule"]: row for row in rows if row["record"] == "rule_result"}
    assert [row["candidate"] for row in candidates] == ["self", "checkpoint:4"]
    found = replays_of(calibrated)
    accuracy = {key: np.mean(one.num_correct) / one.num_samples for key, one in found.items()}
    for row in candidates:
        (name,) = {guide for guide, _ in found if guide and guide.startswith(row["candidate"].partition(":")[0])}
        gains = [accuracy[name, seed] - accuracy[None, seed] for seed in range(2)]
        assert row["gains_by_seed"] == pytest.approx(gains)
        assert row["gain"] == pytest.approx(np.mean(gains))
        assert row["gain_low"] <= row["gain"] <= row["gain_high"]
        tokens_per_step = np.mean([found[None, seed].num_tokens for seed in range(2)]) / 4
        assert row["price"] == pytest.approx(row["steps_thrown_away"] + row["guide_tokens"] / tokens_per_step)
    assert [row["steps_thrown_away"] for row in candidates] == [0, 2]
    assert candidates[0]["quality_net"] == pytest.approx(0, abs=1e-12)
    assert {"farthest", "Q", "Q_net", "Q/kl_exp", "Q_net/group2", "Q_net/kl_exp/price"} < set(rules)
    assert rules["farthest"]["learners"][0]["choice"] == "checkpoint:4"
    assert (calibrated.parent / "gain.svg").stat().st_size > 1000


def test_replay_is_the_branch_that_resume_makes(line, calibrated, tmp_path):
    """The branch's name enters the sampling seeds: one named like the replay's seed is the replay, prompt by prompt."""
    root = copy_run(line, tmp_path / "run")
    defaults = ("guide.cache.prompts=failed", "guide.cache.samples_per_round=1", "guide.cache.min_yield=0.05")
    sample(root, "guide.replay.num_steps=4", *defaults, source="4", at=2, name="near")
    replays = {
        guide and guide.partition("-")[0]: one for (guide, seed), one in replays_of(calibrated).items() if seed == 1
    }
    for guide, kind in (("near", "checkpoint"), (None, None)):
        again = copy_run(root, tmp_path / str(kind))
        resume(again, "train.num_steps=6", "eval.every=1", at=2, guide=guide, new_branch="calibration-1")
        results = [one for one in read_prompt_results(open_run(again)) if one.branch == "calibration-1"]
        assert tuple(one.num_correct for one in results) == replays[kind].num_correct


def test_calibrate_leaves_the_run_as_it_was(line, calibrated):
    """But its own folder, and the ledger."""
    before, after = file_digests(line), file_digests(calibrated)
    changed = {name for name in after if before.get(name) != after[name]}
    assert {name for name in changed if not name.startswith("calibrations/")} == {"costs.jsonl"}
    assert {path.name for path in folder_of(calibrated).iterdir()} == {
        "settings.json",
        "replays.jsonl",
        "replays.jsonl.head",
        "scores",
        "guides",
    }


def test_calibration_is_in_the_run_costs_and_charged_to_no_branch(line, calibrated, tmp_path):
    root = copy_run(calibrated, tmp_path / "run")
    run = open_run(root)
    lines = [one for one in read_cost_lines(run) if one.kind == "calibration"]
    tokens = sum(one.tokens for one in lines)
    kinds, old = ({one.kind for one in read_cost_lines(open_run(root))} for root in (calibrated, line))
    assert kinds == {*old, "calibration"}
    assert sum(one.updates for one in lines) == NUM_REPLAYS * 4
    assert tokens > sum(one.num_tokens for one in replays_of(calibrated).values())
    costs, before = compute_run_costs(run, "main"), compute_run_costs(open_run(line), "main")
    assert (costs.calibration_tokens, costs.tokens - before.tokens) == (tokens, tokens)
    assert {one.activity: one.tokens for one in costs_by_activity(run, "main")}["calibration"] == tokens
    assert cost_at(run, "main", 4) == cost_at(open_run(line), "main", 4)
    # Nor to a branch that is forked from the calibrated learner: it pays for the line up to its guide, and the guide.
    guide = sample(root, name="near")
    resume(root, at=2, guide="near", new_branch="guided")
    (own,) = (one.tokens for one in read_cost_lines(run) if (one.kind, one.branch, one.step) == ("train", "guided", 3))
    assert cost_at(run, "guided", 3).tokens == cost_at(run, "main", 4).tokens + guide.num_tokens + own


@pytest.mark.slow
def test_calibrate_continues_after_a_kill_to_the_same_result(line, calibrated, tmp_path, warm: ForkServer):
    root = copy_run(line, tmp_path / "run")
    args = ("calibrate", str(root), *OPTIONS, *FEW, "--json")
    process = warm.npo(*args, err=tmp_path / "err.txt")
    folder = root / "calibrations"
    wait_until(lambda: any(num_lines(path) >= 2 for path in folder.glob("*/replays.jsonl")))
    wait_until(lambda: any(folder.glob("*/.replay-*")))
    process.kill()
    assert process.wait() == -9
    assert any(folder.glob("*/.replay-*"))
    assert 2 <= len(replays_of(root)) < NUM_REPLAYS
    again = npo(*args)
    assert again.code == 0, again.err
    assert (folder_of(root) / "replays.jsonl").read_bytes() == (folder_of(calibrated) / "replays.jsonl").read_bytes()
    for row, straight in zip(rows_of(again.out), rows_of((calibrated.parent / "out.jsonl").read_text()), strict=True):
        # Log-probabilities that were read back may round otherwise in their last digit.
        assert row.pop("variances", {}) == pytest.approx(straight.pop("variances", {}), rel=1e-6)
        assert row.pop("scores", {}) == pytest.approx(straight.pop("scores", {}), rel=1e-6)
        assert row == straight
    assert not any(folder.glob("*/.replay-*"))
    pieces = Counter(one.piece for one in read_cost_lines(open_run(root)) if " seed " in one.piece)
    assert len(pieces) == NUM_REPLAYS
    assert sum(pieces.values()) <= NUM_REPLAYS + 1


def test_calibrate_adds_seeds_and_candidates_to_what_is_there(calibrated, tmp_path):
    root = copy_run(calibrated, tmp_path / "run")
    before = (folder_of(root) / "replays.jsonl").read_bytes()
    options = {"num_seeds": 2, "num_steps": 4, "branch": None, "overrides": FEW}
    records = list(calibrate_run(root, at=[2], candidates=["+2", "base"], **options))
    after = (folder_of(root) / "replays.jsonl").read_bytes()
    assert after.startswith(before)
    assert after.count(b"\n") == NUM_REPLAYS + 2
    assert {one.candidate for one in records if isinstance(one, CandidateGain)} == {"checkpoint:4", "base"}
    assert {one.num_seeds for one in records if isinstance(one, RuleResult)} == {2}


@pytest.mark.slow
def test_candidate_that_one_learner_lacks_is_left_out_there(line, tmp_path):
    root = copy_run(line, tmp_path / "run")
    options = {"num_seeds": 1, "num_steps": 4, "branch": None, "overrides": FEW}
    records = list(calibrate_run(root, at=[0, 2], candidates=["self", "+4"], **options))
    warnings = [one.message for one in records if isinstance(one, Notice) and one.level == "warning"]
    assert any("step 2: candidate +4 is left out" in message for message in warnings)
    found = [(one.learner_step, one.candidate) for one in records if isinstance(one, CandidateGain)]
    assert found == [(0, "self"), (0, "checkpoint:4"), (2, "self")]
    assert {one.num_learners for one in records if isinstance(one, RuleResult)} == {2}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--at", "2"), "no candidates"),
        (("--at", "two", "--candidates", "self"), "--at"),
        (("--at", "3", "--candidates", "self"), "step 3"),
        (("--at", "2", "--candidates", "self", "--steps", "6"), "multiple of 4"),
        (("--at", "2", "--candidates", "+x"), "+x"),
        (("--at", "2", "--candidates", "+0"), "+0"),
        (("--at", "2", "--candidates", "+400"), "402"),
        (("--at", "2", "--candidates", "nonsense"), "nonsense"),
        (("--at", "2", "--candidates", "self", "--seeds", "0"), "seeds"),
        (("--at", "2", "--candidates", "self", "--branch", "none"), "none"),
        (("--at", "2", "--candidates", "self", "--figure", "gain.txt"), "gain.txt"),
        (("--at", "2", "--candidates", "self", "train.nonsense=3"), "train.nonsense"),
    ],
)
def test_calibrate_refuses_nonsense_before_writing(line, args, words):
    assert words in assert_refused("calibrate", line, *args, beside=line.parent).err


def test_calibrate_refuses_a_learner_with_weights_only(tmp_path):
    root = tmp_path / "run"
    train(root, "train.keep_full_checkpoints=1")
    refused = assert_refused("calibrate", root, "--at", "2", "--candidates", "self", beside=tmp_path)
    assert "weights only" in refused.message
    assert "among 4" in refused.hint or "among 0, 4" in refused.hint


def replay(guide: str | None, seed: int, *correct: int) -> Replay:
    """One evaluation of two samples per prompt."""
    return Replay(
        guide=guide,
        seed=seed,
        eval_steps=(4,),
        prompt_keys=tuple(f"p{place}" for place in range(len(correct))),
        num_samples=2,
        num_correct=(correct,),
        num_tokens=1,
        num_injected=0,
    )


def test_gains_are_paired_by_seed_and_prompt():
    """Seeds differ by the same on both sides, so the gain has no spread: +1/2 on every prompt with both seeds."""
    unguided = [replay(None, 0, 0, 1, 0, 1), replay(None, 1, 1, 1, 1, 0)]
    guided = [replay("g", 0, 1, 2, 1, 2), replay("g", 1, 2, 2, 2, 1)]
    worse = [replay("h", 0, 0, 1, 0, 1), replay("h", 1, 0, 1, 1, 0)]
    gains_BA = resample_gains([guided, worse], unguided)
    assert gains_BA[:, 0] == pytest.approx(0.5)
    # One of 8 pairs of a prompt is worse by 1/2.
    assert gains_BA[0, 1] == pytest.approx(-1 / 16)
    assert np.ptp(gains_BA[:, 1]) > 0
