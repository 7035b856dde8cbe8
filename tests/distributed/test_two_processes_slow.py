"""Several processes, at length: adapters, penalties and guides as with one, a rank that hangs, a signal, a server."""

import json
import os
import signal
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from npo_cli.config.loading import load_recipe
from npo_cli.policy.logprobs import TokenRow
from npo_cli.policy.model import load_policy
from npo_cli.session.logprob_pass import run_logprob_pass
from npo_cli.session.weight_sync import build_check_rows
from npo_cli.storage.autonpo_log import read_transitions
from npo_cli.storage.checkpoints import find_resume_checkpoint
from npo_cli.storage.cost_sums import compute_run_costs
from npo_cli.storage.layout import RunDir, open_run
from npo_cli.training.train import train_run
from tests.distributed.test_two_processes import assert_same_curve, metrics
from tests.helpers.cli_errors import npo
from tests.helpers.images import load_vision_policy, mixed_prompts
from tests.helpers.runs import LORA, TINY, copy_run, resume, sample, tiny_recipe, train
from tests.helpers.scoring_worker import REQUESTS
from tests.helpers.torchrun import is_gone, launch_job, pid_of, run, wait_until
from tests.helpers.warm_process import num_lines
from tests.training.test_image_runs import SMALL

pytestmark = pytest.mark.slow
PENALTIES = ("loss.kl_coef=0.05", "loss.entropy_coef=0.01", "train.num_updates=2", "train.micro_batch_tokens=200")
"""Every row is needed, a frozen base is scored beside the policy, and processes differ in how many passes they need."""


@pytest.mark.parametrize("overrides", [PENALTIES, (*LORA, *PENALTIES), ("model.gradient_checkpointing=true",)])
def test_every_kind_of_update_is_that_of_one_process(overrides, tmp_path):
    train(tmp_path / "alone", *overrides)
    arguments = ["train", "micro", *TINY, *overrides, "--run", str(tmp_path / "together")]
    run(*arguments, log=tmp_path / "log")
    assert_same_curve(metrics(tmp_path / "together"), metrics(tmp_path / "alone"))
    # Adapters and moments in shards go on in one process.
    more = "train.num_steps=6"
    resume(tmp_path / "alone", more)
    resume(tmp_path / "together", more)
    assert_same_curve(metrics(tmp_path / "together"), metrics(tmp_path / "alone"))


def scored_together(*arguments: str, log: Path) -> list[list[float]]:
    run(*arguments, log=log, module="tests.helpers.scoring_worker")
    return json.loads(next(line for line in log.read_text().splitlines() if line.startswith("[[")))


def test_the_shared_engine_scores_as_one_process_does(tmp_path):
    answers = scored_together(log=tmp_path / "log")
    rows = [TokenRow(prompt_ids=each.prompt_ids, response_ids=each.response_ids) for each in REQUESTS]
    alone = run_logprob_pass(load_policy(tiny_recipe().model), tiny_recipe(), rows, temperature=1.0)
    for found, expected in zip(answers, alone, strict=True):
        assert found == pytest.approx(expected.logps_T.tolist(), abs=1e-5)


def test_a_probe_with_pictures_is_scored_over_the_whole_vocabulary_by_every_process(untaught_vl: Path, tmp_path: Path):
    answers = scored_together(str(untaught_vl), log=tmp_path / "log")
    policy = load_vision_policy(untaught_vl)
    rows = build_check_rows(policy, mixed_prompts())
    whole, restrained = (
        run_logprob_pass(policy, tiny_recipe(), rows, temperature=1.0, uses_full_vocabulary=wanted)
        for wanted in (True, False)
    )
    for found, expected, never in zip(answers, whole, restrained, strict=True):
        assert found == pytest.approx(expected.logps_T.tolist(), abs=1e-5)
        # of 30 tokens the two that are never written have some part of the law
        assert max(abs(expected.logps_T - never.logps_T)) > 0.01


def test_autonpo_decides_as_in_one_process(tmp_path):
    settings = ["micro-sparse-auto", "--autonpo", "train.num_steps=40", "model.threads=1", "eval.every=0"]
    assert npo("train", *settings, "--run", tmp_path / "alone").code == 0
    run("train", *settings, "--run", str(tmp_path / "together"), log=tmp_path / "log")
    alone, together = (read_transitions(open_run(tmp_path / name)) for name in ("alone", "together"))
    assert [(move.event, move.state.branch, move.step) for move in together] == [
        (move.event, move.state.branch, move.step) for move in alone
    ]
    # The scout's answers were taken as a guide, and the base was trained again with them.
    assert "replayed" in {move.event for move in together}
    tokens = [compute_run_costs(open_run(tmp_path / name), "early").tokens for name in ("alone", "together")]
    assert tokens[0] == tokens[1] > 0


def test_mixed_precision_differs_by_its_rounding_alone(tmp_path):
    mixed = "model.compute_dtype=bfloat16"
    train(tmp_path / "alone", mixed)
    run("train", "micro", *TINY, mixed, "--run", str(tmp_path / "together"), log=tmp_path / "log")
    # The first step has the same weights; bfloat16 keeps 8 bits, and a norm adds up what many of them cut off.
    first = [metrics(tmp_path / name)[0] for name in ("together", "alone")]
    assert first[0]["grad_norm"] == pytest.approx(first[1]["grad_norm"], rel=0.1)
    assert all(row["mismatch/abs_log_w_p99"] < 0.2 for row in metrics(tmp_path / "together"))


def test_a_circle_by_two_processes_is_that_of_one(tmp_path):
    train(tmp_path / "alone")
    root = copy_run(tmp_path / "alone", tmp_path / "together")
    asked = ("--guide", "4", "--at", "2", "--name", "near")
    run(
        "score-checkpoints",
        str(root),
        "--at",
        "2",
        "scoring.num_prompts=4",
        "scoring.samples_per_prompt=2",
        log=tmp_path / "score",
    )
    run("sample-guide", str(root), *asked, log=tmp_path / "sample")
    run("resume", str(root), "--at", "2", "--guide", "near", log=tmp_path / "resume")
    sample(tmp_path / "alone")
    resume(tmp_path / "alone", at=2, guide="near")
    curves = [RunDir(one).metrics_path("near") for one in (root, tmp_path / "alone")]
    assert [num_lines(path) for path in curves] == [2, 2]
    kept = [RunDir(one).root / "guides" / "near" / "trajectories.jsonl" for one in (root, tmp_path / "alone")]
    assert num_lines(kept[0]) == num_lines(kept[1])
    assert "Q" in (tmp_path / "score").read_text()


def test_a_rank_that_hangs_ends_the_job_when_the_deadline_is_over(tmp_path):
    root, log = tmp_path / "run", tmp_path / "log"
    limits = ("train.num_steps=100000", "train.save_every=5", "distributed.timeout=15")
    with launch_job("train", "micro", *TINY, *limits, "--run", str(root), log=log) as job:
        wait_until(lambda: num_lines(RunDir(root).metrics_path("main")) >= 6, job, log)
        ranks = [pid_of(job, 0), pid_of(job, 1)]
        os.kill(ranks[1], signal.SIGSTOP)
        stopped = time.monotonic()
        assert job.wait(120) == 1
        # Not before the deadline; then a few seconds of asking around and of torchrun's patience.
        assert time.monotonic() - stopped >= 15
    assert "error: rank 1 did not finish `" in log.read_text()
    assert "within 15 s" in log.read_text()
    assert all(map(is_gone, ranks))


def test_a_signal_to_the_job_ends_the_step_and_saves_it(tmp_path):
    root, log = tmp_path / "run", tmp_path / "log"
    with launch_job("train", "micro", *TINY, "train.num_steps=100000", "--run", str(root), log=log) as job:
        wait_until(lambda: num_lines(RunDir(root).metrics_path("main")) >= 3, job, log)
        ranks = [pid_of(job, 0), pid_of(job, 1)]
        os.kill(ranks[0], signal.SIGTERM)
        job.wait(60)
    assert "stopped by SIGTERM after step" in log.read_text()
    assert all(map(is_gone, ranks))
    assert find_resume_checkpoint(open_run(root), "main").step == num_lines(RunDir(root).metrics_path("main"))


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("engine.kind=vllm",), "engine.kind=vllm samples in this process, and there are 2"),
        (("train.prompts_per_step=0",), "train.prompts_per_step"),
        (("model.path=no/such/model/here",), "model.path"),
    ],
)
def test_bad_input_is_told_once_and_nothing_is_written(overrides, told, tmp_path):
    root, log = tmp_path / "run", tmp_path / "log"
    with launch_job("train", "micro", *TINY, *overrides, "--run", str(root), log=log) as job:
        assert job.wait(120) == 1
    assert [told in line for line in log.read_text().splitlines() if line.startswith("error:")] == [True]
    assert not root.exists()


@pytest.mark.skipif(find_spec("vllm") is None, reason="needs vllm")
@pytest.mark.vllm
def test_a_server_is_sent_what_the_processes_hold(tmp_path: Path):
    engine = ("engine.kind=vllm_server", "model.dtype=float32")
    run("train", "micro", *TINY, *engine, "--run", str(tmp_path / "run"), log=tmp_path / "log")
    # Each sync was proved: trainer and server score one probe alike, or the run ends.
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2, 3, 4]


@pytest.mark.skipif(find_spec("torchvision") is None, reason="vLLM reads pictures with torchvision")
@pytest.mark.vllm
def test_a_server_beside_two_processes_is_shown_pictures_as_the_engine_in_one(taught_vl: Path, tmp_path: Path):
    settings = (f"model.path={taught_vl}", *SMALL, "train.num_steps=2")
    alone = load_recipe("shapes", [*settings, "engine.kind=vllm"])
    list(train_run(tmp_path / "alone", alone))
    together = tmp_path / "together"
    run("train", "shapes", *settings, "engine.kind=vllm_server", "--run", str(together), log=tmp_path / "log")
    assert_same_curve(metrics(together), metrics(tmp_path / "alone"))
