"""--dry-run: the checks and errors of the real command, what it would cost, and nothing written."""

import json
import shlex
import shutil
from types import SimpleNamespace

import pytest

from npo_cli.training import disk
from tests.helpers.cli_errors import SMALL, assert_refused, folder_digests, json_rows, npo

BENCH = ("micro-bench", "--methods", "grpo,npo", "--seeds", "2", "--jobs", "1")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 4 steps with checkpoints at 0, 2 and 4."""
    root = tmp_path_factory.mktemp("dry") / "run"
    assert npo("train", "micro", root, *SMALL).code == 0
    return root


def dry(*args: object) -> list[dict]:
    result = npo(*args, "--dry-run", "--json")
    assert result.code == 0, result.err or result.out
    return json_rows(result.out)


def commands(run) -> dict[str, tuple[object, ...]]:
    return {
        "train": ("train", "micro", run.parent / "new", *SMALL),
        "resume": ("resume", run, "train.num_steps=8"),
        "fork": ("resume", run, "--at", "2", "--no-guide"),
        "sample-guide": ("sample-guide", run, "--at", "2", "--source", "4"),
        "score-checkpoints": ("score-checkpoints", run, "--at", "2"),
        "replay": ("replay", run, "--at", "2"),
        "scout": ("scout", run, "--at", "2", "--steps", "2", "scout.group_size=6"),
        "bench": ("bench", *BENCH, "--out", run.parent / "bench"),
    }


@pytest.mark.parametrize(
    "name", ["train", "resume", "fork", "sample-guide", "score-checkpoints", "replay", "scout", "bench"]
)
def test_dry_run_writes_nothing_and_fits_80_columns(run, name):
    before = folder_digests(run.parent)
    works = dry(*commands(run)[name])
    assert {work["record"] for work in works} == {"planned_work"}
    result = npo(*commands(run)[name], "--dry-run")
    assert result.code == 0
    *lines, last = result.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert last == f"next: npo {shlex.join(map(str, commands(run)[name]))}"
    assert folder_digests(run.parent) == before


def test_dry_run_ends_in_the_sum_of_its_rows(tmp_path):
    result = npo("train", "micro", tmp_path / "new", *SMALL, "eval.every=2", "--dry-run", "--json")
    *works, conclusion = map(json.loads, result.out.splitlines())
    samples = 4 * 4 * 4 + 3 * 4 * 2  # 4 steps of 4 x 4 rollouts; at steps 0, 2 and 4 two responses to 4 prompts
    assert sum(work["samples"] or 0 for work in works) == samples
    assert f"at most {samples} responses of {samples * 18:,} tokens" in conclusion["sentence"]


def test_dry_run_of_train_counts_prompts_samples_tokens_and_disk(run, tmp_path):
    train, checkpoints, logs = dry("train", "micro", tmp_path / "new", *SMALL)
    assert (train["steps"], train["prompts"]) == ("1-4", 16)  # 4 steps x 4 prompts, a pool of 16
    assert train["samples"] == 4 * 4 * 4
    assert train["max_tokens"] == train["samples"] * 18
    assert checkpoints["work"] == "checkpoints: 3"
    on_disk = sum(path.stat().st_size for path in run.rglob("*.safetensors"))
    assert checkpoints["num_bytes"] == pytest.approx(on_disk, rel=0.02)
    assert logs["num_bytes"] > 0


def test_dry_run_of_resume_estimates_from_the_recorded_steps(run):
    (main, *_) = dry("resume", run, "train.num_steps=8")
    rows = [json.loads(line) for line in (run / "branches/main/metrics.jsonl").read_text().splitlines()]
    assert (main["steps"], main["samples"]) == ("5-8", 64)
    assert main["recorded_tokens"] == round(sum(row["tokens"] for row in rows))  # 4 recorded steps, 4 to come
    assert main["recorded_seconds"] > 0


def test_dry_run_of_a_guide_and_of_a_scoring_counts_what_may_be_sampled(run):
    (guide,) = dry("sample-guide", run, "--at", "2", "--source", "4", "guide.cache.prompts=all")
    assert (guide["work"], guide["steps"], guide["prompts"]) == ("sample checkpoint:4", "3-3", 4)
    works = dry("score-checkpoints", run, "--at", "2", "scoring.num_prompts=6", "scoring.samples_per_prompt=3")
    assert [work["samples"] for work in works] == [18, 18, 18]  # screening, control, checkpoint:4


def test_dry_run_of_replay_counts_the_stages_that_are_left(tmp_path, run):
    root = shutil.copytree(run, tmp_path / "run")
    setting = "guide.cache.prompts=all"
    command = ("replay", root, "--at", "2", setting)
    works = [work["work"] for work in dry(*command)]
    assert works[:4] == [
        *("screen the prompts", "sample the learner again", "sample checkpoint:4"),
        "sample the chosen guide",
    ]
    assert works[4] == "train replay-2"
    assert npo("sample-guide", root, "--at", "2", "--source", "4", "--name", "replay-2", setting).code == 0
    train, inject, *_ = dry(*command)
    assert (train["work"], train["steps"], train["samples"]) == ("train replay-2", "3-4", 2 * 4 * 4)
    assert inject["work"] == "inject guide replay-2"
    assert npo(*command).code == 0
    assert dry(*command) == []


def test_dry_run_of_bench_counts_the_runs_that_are_left(tmp_path):
    rows = {row["work"]: row for row in dry("bench", *BENCH, "--out", tmp_path / "bench")}
    parts = ("train 2 of 2 runs", "evaluate", "sample guides")
    assert list(rows) == [f"matched-{name}: {part}" for name in ("grpo", "npo") for part in parts][:2] + [
        f"matched-npo: {part}" for part in parts
    ]
    grpo = rows["matched-grpo: train 2 of 2 runs"]
    assert (grpo["num_steps"], grpo["samples"]) == (2 * 260, 2 * 260 * 16 * 8)
    assert grpo["max_tokens"] == grpo["samples"] * 18


def test_dry_run_of_bench_counts_windows_fine_tuning_and_continued_prefixes(tmp_path):
    """4 steps of 4 prompts in groups of 4. The scout has 2 steps; the replay runs from 2 to 6, the guide to 4."""
    settings = (*SMALL, "train.num_steps=6", "guide.replay.at_step=2", "guide.replay.guide_step=4", "eval.every=6")
    settings += ("autonpo.early.scout_steps=2", "autonpo.early.replay_steps=4")
    args = ("bench", "micro", "--methods", "prefix,distill,sft-then-grpo", "--seeds", "2", "--out", tmp_path / "bench")
    samples = {row["work"].partition("-")[2]: row["samples"] for row in dry(*args, *settings)}
    group, steps_to_guide, steps_again = 4 * 4, 4, 4
    assert samples["prefix: train 2 of 2 runs"] == 2 * (steps_to_guide + steps_again) * group
    # Coverage 0.5: the guide is there for one of two steps, with one slot per prompt.
    assert samples["prefix: continue prefixes"] == 2 * 1 * 4
    # 15 steps from the fork on have two rollouts per prompt.
    assert samples["distill: train 2 of 2 runs"] == 2 * (steps_to_guide * group + steps_again * 4 * 2)
    # Fine-tuning for 2 steps samples nothing.
    assert samples["sft-then-grpo: train 2 of 2 runs"] == 2 * (2 + 4) * group


@pytest.mark.slow
def test_dry_run_of_bench_counts_what_its_runs_then_do(tmp_path):
    """A scout of 2 steps, then 4 steps from step 0; the guide cache covers half of the 2 steps with the guide."""
    args = ("micro", "--methods", "npo-early", "--seeds", "1", "--out", tmp_path / "bench", *SMALL, "eval.every=2")
    args += ("autonpo.early.scout_steps=2", "autonpo.early.replay_steps=2", "guide.cache.prompts=all")
    train, evaluate, guide = dry("bench", *args, "guide.cache.samples_per_prompt=8")
    assert npo("bench", *args, "guide.cache.samples_per_prompt=8").code == 0
    run = tmp_path / "bench/runs/matched-npo-early/as-it-is/seed-0/run"
    num_steps = sum(len(path.read_text().splitlines()) for path in run.glob("branches/*/metrics.jsonl"))
    assert train["num_steps"] == num_steps == 2 + 4
    assert train["samples"] == num_steps * 4 * 4
    checkpoints = sum(path.stat().st_size for path in run.rglob("*.safetensors"))
    assert checkpoints < train["num_bytes"] < 2 * checkpoints
    evals = sum(len(path.read_text().splitlines()) for path in run.glob("branches/*/evals.jsonl"))
    assert evaluate["samples"] >= evals * 4 * 2
    (info,) = [json.loads(path.read_text()) for path in run.glob("guides/*/guide.json")]
    assert guide["samples"] == info["num_prompts"] * 8 == 1 * 4 * 8
    assert [row["num_steps"] for row in dry("bench", *args, "guide.cache.samples_per_prompt=8")] == [0]


def test_dry_run_of_autonpo_names_what_an_intervention_may_add(tmp_path):
    works = [work["work"] for work in dry("train", "micro-auto", tmp_path / "auto", "--autonpo")]
    assert works[0] == "train main"
    assert [work.partition(": ")[0] for work in works[-3:]] == ["an intervention"] * 3
    assert (
        max(map(len, npo("train", "micro-auto", tmp_path / "auto", "--autonpo", "--dry-run").out.splitlines()[:-1]))
        <= 80
    )


@pytest.mark.parametrize(
    "args",
    [
        ("train", "micro", "{run}"),
        ("train", "micro", "{new}", "train.lrr=1"),
        ("train", "micro", "{new}", "--until", "999", *SMALL),
        ("train", "micro", "{new}", "model.path=./nowhere"),
        ("train", "micro", "{new}", "--autonpo", *SMALL),
        ("resume", "{run}"),
        ("resume", "{run}", "--at", "3", "--no-guide"),
        ("resume", "{run}", "--at", "2"),
        ("resume", "{run}", "--at", "2", "--guide", "none"),
        ("sample-guide", "{run}", "--at", "2", "--source", "3"),
        ("sample-guide", "{run}", "--at", "4", "--source", "2"),
        ("score-checkpoints", "{run}", "--at", "4"),
        ("score-checkpoints", "{run}", "--at", "2", "--candidates", "3"),
        ("replay", "{run}", "--at", "3"),
        ("bench", "micro", "--methods", "grpo,npo", "--seeds", "2", "--out", "{new}"),
        ("bench", *BENCH, "--out", "{run}"),
    ],
)
def test_dry_run_is_refused_with_the_error_of_the_real_command(run, args):
    given = [str(arg).format(run=run, new=run.parent / "new") for arg in args]
    before, real = folder_digests(run.parent), npo(*given)
    again = npo(*given, "--dry-run")
    assert (again.code, again.out, again.err) == (2, "", real.err)
    assert folder_digests(run.parent) == before


def test_train_prints_the_disk_that_it_will_take_before_the_first_step(tmp_path):
    lines = npo("train", "micro", tmp_path / "r", *SMALL).err.splitlines()
    (place,) = [at for at, line in enumerate(lines) if line.startswith("disk: at most ")]
    assert place < next(at for at, line in enumerate(lines) if line.startswith("training"))


@pytest.mark.parametrize("option", [[], ["--dry-run"]])
def test_run_whose_checkpoints_do_not_fit_is_refused(tmp_path, monkeypatch, option):
    monkeypatch.setattr(disk, "shutil", SimpleNamespace(disk_usage=lambda folder: SimpleNamespace(free=2_000_000)))
    result = assert_refused("train", "micro", tmp_path / "r", *SMALL, *option, beside=tmp_path)
    assert "its 3 checkpoints take" in result.message
    assert "2.0 MB are free" in result.message
