"""Several processes at length: LoRA, penalties and guides as with one, a hung rank, a signal, a server."""

import json
import os
import signal
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from npo_cli.config.loading import load_recipe
from npo_cli.policy.model import load_policy
from npo_cli.policy.model_folder import MICRO_BASE_FOLDER
from npo_cli.policy.packing import TokenRow
from npo_cli.session.logprob_pass import run_logprob_pass
from npo_cli.session.weight_sync import build_check_rows
from npo_cli.storage.autonpo_log import read_transitions
from npo_cli.storage.checkpoints import find_resume_checkpoint, list_checkpoints
from npo_cli.storage.cost_sums import compute_run_costs
from npo_cli.storage.evals import read_evals
from npo_cli.storage.guide_cache import load_guide
from npo_cli.storage.layout import RunDir, open_run
from npo_cli.storage.lineage import list_branches
from npo_cli.storage.metrics import read_metrics
from npo_cli.training.scout import scout_run
from npo_cli.training.train import train_run
from npo_cli.types.guides import ScoutRequest
from tests.autonpo.test_ladder_run import ladder
from tests.distributed.test_two_processes import assert_same_metrics, metrics, responses
from tests.helpers.autonpo_runs import EAGER
from tests.helpers.cli_errors import npo
from tests.helpers.images import load_vision_policy, mixed_prompts
from tests.helpers.runs import LORA, TINY, copy_run, resume, sample, tiny_recipe, train
from tests.helpers.scoring_worker import REQUESTS
from tests.helpers.torchrun import is_gone, launch_job, pid_of, run, wait_until
from tests.helpers.warm_process import num_lines
from tests.session.test_producer import find_children, is_running
from tests.training.test_image_runs import SMALL

pytestmark = pytest.mark.slow
PENALTIES = ("loss.kl_coef=0.05", "loss.entropy_coef=0.01", "train.num_updates=2", "train.micro_batch_tokens=200")
"""Every row is needed, a frozen reference is scored, and ranks need different numbers of passes."""


@pytest.mark.parametrize("overrides", [PENALTIES, (*LORA, *PENALTIES), ("model.gradient_checkpointing=true",)])
def test_two_processes_equal_one_with_lora_penalties_and_checkpointing(overrides, tmp_path):
    train(tmp_path / "single", *overrides)
    arguments = ["train", "micro", str(tmp_path / "double"), *TINY, *overrides]
    run(*arguments, log=tmp_path / "log")
    assert_same_metrics(metrics(tmp_path / "double"), metrics(tmp_path / "single"))
    # One process resumes sharded adapters and moments.
    more = "train.num_steps=6"
    resume(tmp_path / "single", more)
    resume(tmp_path / "double", more)
    assert_same_metrics(metrics(tmp_path / "double"), metrics(tmp_path / "single"))


@pytest.mark.parametrize("lora", [(), LORA], ids=["full", "lora"])
def test_dense_targets_of_two_processes_equal_one(lora, tmp_path):
    # Few wrong rollouts and small passes: ranks need different numbers of passes, and of the teacher's.
    train(tmp_path / "single", *lora, "train.micro_batch_tokens=90", "train.logit_chunk_tokens=20")
    root = copy_run(tmp_path / "single", tmp_path / "double")
    for name, overrides in {
        "later": ("target.kind=distribution", "target.teacher=checkpoint:4", "target.group_size=3"),
        "weights": ("target.kind=token_weight", "target.teacher=checkpoint:4"),
        "shown": ("target.kind=distribution", "target.teacher=checkpoint:4", "target.privileged=answer"),
        "itself": ("target.kind=token_weight", "target.teacher=policy", "target.privileged=answer"),
        "ahead": ("target.kind=distribution", "target.teacher=extrapolated:weights,k=2,a=0.5"),
    }.items():
        run("resume", str(root), "--at", "2", "--no-guide", "--new-branch", name, *overrides, log=tmp_path / "log")
        resume(tmp_path / "single", *overrides, at=2, new_branch=name)
        double, single = (
            [json.loads(line) for line in RunDir(one).metrics_path(name).read_text().splitlines()]
            for one in (root, tmp_path / "single")
        )
        assert_same_metrics(double, single)
        assert all(row["target/rollouts"] > 0 for row in double)


@pytest.mark.parametrize("lora", [(), ("scout.lora.rank=4",)], ids=["full", "adapters"])
def test_scout_of_two_processes_equals_one_and_teaches(lora, tmp_path):
    train(tmp_path / "single")
    root = copy_run(tmp_path / "single", tmp_path / "double")
    settings = ("scout.num_updates=2", *lora)
    arguments = ("--at", "2", "--steps", "2", "--name", "s", *settings)
    run("scout", str(root), *arguments, log=tmp_path / "log")
    request = ScoutRequest(at=2, branch="main", steps=2, name="s", overrides=settings)
    list(scout_run(tmp_path / "single", request))
    assert_same_metrics(*(list(read_metrics(RunDir(one), "s")) for one in (root, tmp_path / "single")))
    target = ("target.kind=distribution", "target.teacher=scout:s", "target.num_steps=2")
    run("resume", str(root), "--at", "2", "--no-guide", "--new-branch", "taught", *target, log=tmp_path / "log")
    resume(tmp_path / "single", *target, at=2, new_branch="taught")
    assert_same_metrics(*(list(read_metrics(RunDir(one), "taught")) for one in (root, tmp_path / "single")))
    assert list_checkpoints(RunDir(root), "s") == []


def score_with_two_processes(*arguments: str, log: Path) -> list[list[float]]:
    run(*arguments, log=log, module="tests.helpers.scoring_worker")
    return json.loads(next(line for line in log.read_text().splitlines() if line.startswith("[[")))


def test_split_engine_logprobs_equal_one_process(tmp_path):
    answers = score_with_two_processes(log=tmp_path / "log")
    rows = [TokenRow(prompt_ids=each.prompt_ids, response_ids=each.response_ids) for each in REQUESTS]
    single = run_logprob_pass(load_policy(tiny_recipe().model), tiny_recipe(), rows, temperature=1.0)
    for found, expected in zip(answers, single, strict=True):
        assert found == pytest.approx(expected.logps_T.tolist(), abs=1e-5)


def test_sync_check_rows_with_images_use_the_full_vocabulary_on_every_rank(untaught_vl: Path, tmp_path: Path):
    answers = score_with_two_processes(str(untaught_vl), log=tmp_path / "log")
    policy = load_vision_policy(untaught_vl)
    rows = build_check_rows(policy, mixed_prompts())
    whole, restrained = (
        run_logprob_pass(policy, tiny_recipe(), rows, temperature=1.0, uses_full_vocabulary=wanted)
        for wanted in (True, False)
    )
    for found, expected, never in zip(answers, whole, restrained, strict=True):
        assert found == pytest.approx(expected.logps_T.tolist(), abs=1e-5)
        # The two suppressed tokens of 30 have some probability.
        assert max(abs(expected.logps_T - never.logps_T)) > 0.01


@pytest.mark.parametrize("staleness", [0, 1])
def test_autonpo_decisions_of_two_processes_equal_one(staleness, tmp_path):
    recipe = "micro-sparse-auto"
    early = ("autonpo.early.scout_steps=40", "autonpo.early.replay_steps=10")  # an earlier scout is rejected
    settings = ["--autonpo", "train.num_steps=50", *early, "model.threads=1", "eval.every=0"]
    settings.append(f"train.staleness={staleness}")
    assert npo("train", recipe, tmp_path / "single", *settings).code == 0
    run("train", recipe, str(tmp_path / "double"), *settings, log=tmp_path / "log")
    single, double = (read_transitions(open_run(tmp_path / name)) for name in ("single", "double"))
    assert [(move.event, move.state.branch, move.step) for move in double] == [
        (move.event, move.state.branch, move.step) for move in single
    ]
    # The first steps became a guide, and the base was trained again with it.
    assert "replay_done" in {move.event for move in double}
    tokens = [compute_run_costs(open_run(tmp_path / name), "early").tokens for name in ("single", "double")]
    # Sums in another order differ by rounding, which over 50 steps changes a token here and there.
    assert tokens[0] == pytest.approx(tokens[1], rel=1e-3)


def decisions(root: Path) -> list[tuple[str, str | None, str, int]]:
    return [(move.event, move.state.rung, move.state.branch, move.step) for move in read_transitions(open_run(root))]


@pytest.mark.parametrize("staleness", [0, 1])
def test_ladder_of_two_processes_decides_as_one(staleness, tmp_path):
    rungs = ("mistakes", "token_weight", *(() if staleness else ("scout",)), "dense")
    more = ("autonpo.rungs.num_steps=2", "autonpo.trigger.cooldown_steps=2", f"train.staleness={staleness}")
    settings = (*EAGER, *ladder(*rungs, limit=len(rungs), steps=28), *more, "--autonpo")
    assert npo("train", "micro", tmp_path / "single", *settings).code == 0
    run("train", "micro", str(tmp_path / "double"), *settings, log=tmp_path / "log")
    assert decisions(tmp_path / "double") == decisions(tmp_path / "single")
    made = [rung for event, rung, _, _ in decisions(tmp_path / "double") if event == "rung_applied"]
    if staleness == 0:
        assert made == list(rungs)
    assert len(made) >= 2
    for branch in list_branches(open_run(tmp_path / "single")):
        both = (list(read_metrics(open_run(tmp_path / name), branch)) for name in ("double", "single"))
        assert_same_metrics(*both)


def test_rung_with_a_guide_is_unavailable_to_two_processes_and_the_next_one_is_taken(tmp_path):
    settings = (*EAGER, *ladder("guide", "mistakes", steps=10), "--autonpo")
    run("train", "micro", str(tmp_path / "double"), *settings, log=tmp_path / "log")
    moves = read_transitions(open_run(tmp_path / "double"))
    (refused,) = (move.evidence for move in moves if move.event == "rung_refused")
    assert (refused["rung"], refused["basis"], refused["reason"]) == (
        "guide",
        "unavailable",
        "a guide is sampled while training by one process",
    )
    assert next(move.evidence["rung"] for move in moves if move.event == "rung_applied") == "mistakes"


STALE = (
    ("train.staleness=1", "eval.every=4"),
    (*LORA, "train.staleness=2", "sampling.dynamic=true", "sampling.max_gen_batches=3"),
)


@pytest.mark.parametrize("overrides", STALE, ids=["staleness 1", "lora, staleness 2, dynamic sampling"])
def test_asynchronous_sampling_of_two_processes_equals_one(overrides, tmp_path):
    """One producer, of rank 0, samples for both."""
    settings = ("train.num_steps=8", *overrides)
    train(tmp_path / "single", *settings)
    run("train", "micro", str(tmp_path / "double"), *TINY, *settings, log=tmp_path / "log")
    assert len(metrics(tmp_path / "double")) == 8
    assert responses(tmp_path / "double") == responses(tmp_path / "single")
    assert_same_metrics(metrics(tmp_path / "double"), metrics(tmp_path / "single"))
    evals = [read_evals(open_run(tmp_path / name)) for name in ("double", "single")]
    assert [(one.step, one.accuracy) for one in evals[0]] == [(one.step, one.accuracy) for one in evals[1]]
    # One process continues with what two had sampled ahead.
    more = "train.num_steps=10"
    resume(tmp_path / "single", more)
    resume(tmp_path / "double", more)
    assert_same_metrics(metrics(tmp_path / "double"), metrics(tmp_path / "single"))


@pytest.mark.parametrize("victim", ["rank 0", "rank 1", "producer"])
def test_killed_job_with_a_producer_leaves_none_and_is_resumed(victim, tmp_path):
    root, log = tmp_path / "run", tmp_path / "log"
    settings = ("train.staleness=1", "train.save_every=3")
    long = (*settings, "train.num_steps=10000")
    with launch_job("train", "micro", str(root), *TINY, *long, log=log) as job:
        wait_until(lambda: num_lines(RunDir(root).metrics_path("main")) >= 5, job, log)
        ranks = [pid_of(job, 0), pid_of(job, 1)]
        (producer,) = find_children(ranks[0])
        assert not find_children(ranks[1])
        os.kill({"rank 0": ranks[0], "rank 1": ranks[1], "producer": producer}[victim], signal.SIGKILL)
        assert job.wait(60) == 1
    if victim == "producer":
        assert "error: the producer (train.staleness=1) was killed by SIGKILL" in log.read_text()
    deadline = time.monotonic() + 30
    while is_running(producer):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    num_steps = 3 + num_lines(RunDir(root).metrics_path("main"))
    run("resume", str(root), f"train.num_steps={num_steps}", log=log)
    train(tmp_path / "single", *settings, f"train.num_steps={num_steps}")
    assert responses(root) == responses(tmp_path / "single")
    assert_same_metrics(metrics(root), metrics(tmp_path / "single"))


def test_mixed_precision_of_two_processes_differs_by_rounding_only(tmp_path):
    mixed = "model.compute_dtype=bfloat16"
    train(tmp_path / "single", mixed)
    run("train", "micro", str(tmp_path / "double"), *TINY, mixed, log=tmp_path / "log")
    # The first step has the same weights; bfloat16 has 8 bits, and a norm sums many rounding errors.
    first = [metrics(tmp_path / name)[0] for name in ("double", "single")]
    assert first[0]["grad_norm"] == pytest.approx(first[1]["grad_norm"], rel=0.1)
    assert all(row["mismatch/abs_log_w_p99"] < 0.2 for row in metrics(tmp_path / "double"))


def response_ids(guide) -> dict[str, list[tuple[int, ...]]]:
    return {prompt_id: [rollout.response_ids for rollout in samples.rollouts] for prompt_id, samples in guide.items()}


def test_score_sample_guide_and_resume_with_two_processes_equal_one(tmp_path):
    train(tmp_path / "single")
    root = copy_run(tmp_path / "single", tmp_path / "double")
    outside = f"model:{MICRO_BASE_FOLDER}"
    run(
        "score-checkpoints",
        str(root),
        "--at",
        "2",
        "scoring.num_prompts=4",
        "scoring.samples_per_prompt=2",
        log=tmp_path / "score",
    )
    run("sample-guide", str(root), "--source", "4", "--at", "2", "--name", "near", log=tmp_path / "sample")
    run("sample-guide", str(root), "--source", outside, "--at", "2", "--name", "outside", log=tmp_path / "outside")
    run("resume", str(root), "--at", "2", "--guide", "near", log=tmp_path / "resume")
    sample(tmp_path / "single")
    sample(tmp_path / "single", source=outside, name="outside")
    resume(tmp_path / "single", at=2, guide="near")
    curves = [RunDir(one).metrics_path("near") for one in (root, tmp_path / "single")]
    assert [num_lines(path) for path in curves] == [2, 2]
    for name in ("near", "outside"):
        double, single = (load_guide(open_run(one), name)[1] for one in (root, tmp_path / "single"))
        assert response_ids(double) == response_ids(single) != {}
    assert "Q" in (tmp_path / "score").read_text()


def test_a_hung_rank_ends_the_job_at_the_deadline(tmp_path):
    root, log = tmp_path / "run", tmp_path / "log"
    limits = ("train.num_steps=10000", "train.save_every=5", "distributed.timeout=15")
    with launch_job("train", "micro", str(root), *TINY, *limits, log=log) as job:
        wait_until(lambda: num_lines(RunDir(root).metrics_path("main")) >= 6, job, log)
        ranks = [pid_of(job, 0), pid_of(job, 1)]
        os.kill(ranks[1], signal.SIGSTOP)
        stopped = time.monotonic()
        assert job.wait(120) == 1
        # Not before the deadline; then a few seconds for the ranks' reports and torchrun's shutdown.
        assert time.monotonic() - stopped >= 15
    assert "error: rank 1 did not finish `" in log.read_text()
    assert "within 15 s" in log.read_text()
    assert all(map(is_gone, ranks))


def test_a_signal_to_rank_0_ends_the_step_and_saves_it(tmp_path):
    root, log = tmp_path / "run", tmp_path / "log"
    with launch_job("train", "micro", str(root), *TINY, "train.num_steps=10000", log=log) as job:
        wait_until(lambda: num_lines(RunDir(root).metrics_path("main")) >= 3, job, log)
        ranks = [pid_of(job, 0), pid_of(job, 1)]
        os.kill(ranks[0], signal.SIGTERM)
        job.wait(60)
    assert "stopped by SIGTERM after step" in log.read_text()
    assert all(map(is_gone, ranks))
    assert find_resume_checkpoint(open_run(root), "main").step == num_lines(RunDir(root).metrics_path("main"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("engine.kind=vllm",), "engine.kind=vllm samples in one process, and there are 2"),
        (("train.prompts_per_step=0",), "train.prompts_per_step"),
        (("model.path=no/such/model/here",), "model.path"),
    ],
)
def test_bad_input_is_reported_once_and_nothing_is_written(overrides, message, tmp_path):
    root, log = tmp_path / "run", tmp_path / "log"
    with launch_job("train", "micro", str(root), *TINY, *overrides, log=log) as job:
        assert job.wait(120) == 1
    assert [message in line for line in log.read_text().splitlines() if line.startswith("error:")] == [True]
    assert not root.exists()


@pytest.mark.skipif(find_spec("vllm") is None, reason="needs vllm")
@pytest.mark.vllm
def test_a_vllm_server_receives_the_gathered_weights(tmp_path: Path):
    engine = ("engine.kind=vllm_server", "model.dtype=float32")
    run("train", "micro", str(tmp_path / "run"), *TINY, *engine, log=tmp_path / "log")
    # Each sync was verified: trainer and server score the check rows equally, or the run ends.
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2, 3, 4]


@pytest.mark.skipif(find_spec("vllm") is None, reason="needs vllm")
@pytest.mark.vllm
def test_a_vllm_producer_receives_the_gathered_weights(tmp_path: Path):
    settings = ("engine.kind=vllm_server", "train.staleness=1", "train.num_steps=6", "eval.every=3")
    train(tmp_path / "single", *settings)
    run("train", "micro", str(tmp_path / "double"), *TINY, *settings, log=tmp_path / "log")
    assert responses(tmp_path / "double") == responses(tmp_path / "single")
    assert_same_metrics(metrics(tmp_path / "double"), metrics(tmp_path / "single"))


@pytest.mark.skipif(find_spec("torchvision") is None, reason="vLLM reads pictures with torchvision")
@pytest.mark.vllm
def test_a_vllm_server_with_two_processes_sees_images_as_one(taught_vl: Path, tmp_path: Path):
    settings = (f"model.path={taught_vl}", *SMALL, "train.num_steps=2")
    single = load_recipe("shapes", [*settings, "engine.kind=vllm"])
    list(train_run(tmp_path / "single", single))
    double = tmp_path / "double"
    run("train", "shapes", str(double), *settings, "engine.kind=vllm_server", log=tmp_path / "log")
    assert_same_metrics(metrics(double), metrics(tmp_path / "single"))
