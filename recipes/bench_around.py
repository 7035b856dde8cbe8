"""Time the hot paths of training and scoring, in two checkouts of npo by turns.

    python recipes/bench_around.py --before OTHER_CHECKOUT [--cases write_micro,write_long] [--turns 5]
                                   [--out FILE.json]

Each measurement is a process of its own whose code comes from one checkout; processes of both alternate, and a ratio
is that of a pair. The table has medians; `cpu` is the process's CPU time, which other work on the machine changes
least. The decode loop beside transformers' `generate` has a script of its own, `bench_sampling.py`. Cases:

- step: a run of micro: seconds of a step, of its rollouts and update, and of its waiting for the thread that writes.
- sampler: choose a token in each of 64 rows of 49,152 logits.
- padding: padded tokens of an update per real one, 32 groups of 8 of log-normal lengths (mean 1,035, cap 4,096).
- rows_micro, rows_smollm2: one pass that scores 16 x 8 x 18, or 4 x 8 x 20 tokens (no gradients); `columns`: with
  entropies and collision sums; `apart`: with a prompt per response. It is what a response costs whose log-probabilities
  of sampling are not reused.
- prompts: what a step of 16 x 8 asks of the tokenizer once its prompts have been seen.
- write_micro, write_long: record a step's rollouts, 16 x 8 x 18 and 4 x 8 x 1,035 tokens; seconds and bytes of a step.
- save: for how long a save stops the training, in a run of micro that saves every second step.
- weights: SmolLM2-135M takes the weights of a checkpoint that it has had before.
- scoring, scoring_reuse: four checkpoints of micro on 64 prompts, 8 responses each, in a process that has scored
  before; the latter takes the log-probabilities of sampling (engine.reuse_logprobs), where the checkout can.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
Figures = dict[str, float]


def write_groups(prompts: int, tokens: int, *, repeats: int) -> Figures:
    """Seconds and bytes of one step in rollouts.jsonl, in the thread that writes."""
    from npo_cli.storage.rollout_log import RolloutLog
    from npo_cli.types.rollouts import Group, Prompt, Rollout

    logps = tuple(-((7 * place) % 13) / 17 for place in range(tokens))
    groups = [
        Group(
            prompt=Prompt(prompt_id=f"p{place}", answer="7", text="3+4="),
            rollouts=tuple(
                Rollout(
                    prompt_id=f"p{place}",
                    slot=slot,
                    response_ids=tuple(range(100, 100 + tokens)),
                    behavior_logps=logps,
                    text="7 " * tokens,
                    finished=True,
                    sampler_step=0,
                    mean_entropy=0.3,
                    verdict="correct",
                    reward=1.0,
                )
                for slot in range(8)
            ),
        )
        for place in range(prompts)
    ]
    with tempfile.TemporaryDirectory() as folder:
        log = RolloutLog(Path(folder) / "rollouts.jsonl")
        log.write_step(1, groups)
        size = log.path.stat().st_size
        times = [timed(lambda step=step: log.write_step(step, groups)) for step in range(2, 2 + repeats)]
    return {"seconds": statistics.median(times), "bytes": size}


def encode_prompts() -> Figures:
    """Seconds of the prompts of a step's requests and of its rows, from the second time on."""
    from npo_cli.config.loading import load_recipe
    from npo_cli.policy.model import load_policy
    from npo_cli.types.rollouts import Prompt

    policy = load_policy(load_recipe("micro", []).model)
    prompts = [Prompt(prompt_id=f"p{place}", answer="7", text=f"{place}+4=") for place in range(16)]

    encode_all = getattr(policy, "encode_all", lambda prompts: [policy.encode(prompt) for prompt in prompts])

    def encode() -> None:
        encode_all(prompts)
        for prompt in prompts:
            for _ in range(8):
                policy.row(prompt, (5, 6))

    encode()
    return {"seconds": statistics.median(timed(encode) for _ in range(15))}


def save_micro() -> Figures:
    """Seconds of the saves that are not the first or the last of a run."""
    from npo_cli.config.loading import load_recipe
    from npo_cli.training.train import train_run

    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        recipe = load_recipe("micro", ["train.num_steps=12", "train.save_every=2", "eval.every=0"])
        for _ in train_run(run, recipe):
            pass
        costs = [json.loads(line) for line in (run / "costs.jsonl").read_text().splitlines()]
    return {"seconds": statistics.median([cost["seconds"] for cost in costs if cost["kind"] == "save"][1:-1])}


def run_micro() -> Figures:
    """A run of 12 steps of the micro recipe: time of the steps, and of the waiting for files in them."""
    from npo_cli.config.loading import load_recipe
    from npo_cli.training.train import train_run
    from npo_cli.types.rollouts import StepReport

    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe("micro", ["train.num_steps=12", "eval.every=0"])
        reports = [record for record in train_run(Path(folder) / "run", recipe) if isinstance(record, StepReport)]
    steps = [report.timings for report in reports[2:]]
    names = {
        "seconds": "seconds",
        "rollouts": "seconds/rollouts",
        "update": "seconds/update",
        "waited": "seconds/write",
    }
    return {figure: statistics.median(step.get(name, 0.0) for step in steps) for figure, name in names.items()}


def choose_tokens() -> Figures:
    """CPU seconds of a decode step's sampler."""
    import torch

    logits_NW = torch.randn(64, 49_152)
    try:
        from npo_cli.inference.token_sampler import choose_tokens as choose

        uniform_N = torch.rand(64, dtype=torch.float64)

        def sample() -> object:
            return choose(logits_NW.clone(), uniform_N, temperature=1.0)
    except ImportError:
        from npo_cli.inference.transformers_engine import SeededSampler

        ids_N1 = torch.zeros(64, 1, dtype=torch.long)

        def sample() -> object:
            device = torch.device("cpu")
            return SeededSampler(range(64), num_tokens=1, temperature=1.0, device=device)(ids_N1, logits_NW)

    sample()
    return {"cpu": statistics.median(timed_cpu(sample) for _ in range(15))}


def count_padding() -> Figures:
    """Padded tokens of an update per real one."""
    import numpy

    lengths = numpy.random.default_rng(0).lognormal(numpy.log(1035) - 0.5, 1.0, size=256).clip(1, 4096).astype(int)
    rows = [
        make_row(tuple(range(prompt, prompt + 16)), int(length))
        for prompt, group in enumerate(lengths.reshape(32, 8))
        for length in group
    ]
    try:
        from npo_cli.policy.packing import plan_passes

        batches = [batch.indices for batch in plan_passes(rows, max_tokens=16_384, costs=None)]
    except ImportError:
        from npo_cli.policy.logprobs import micro_batches

        batches = micro_batches(rows, max_tokens=16_384)
    padded = sum(len(batch) * max(rows[index].num_tokens for index in batch) for batch in batches)
    return {"padded": padded / sum(row.num_tokens for row in rows)}


def make_row(prompt_ids: tuple[int, ...], length: int) -> Any:
    """A row of whichever checkout."""
    try:
        from npo_cli.policy.packing import TokenRow
    except ImportError:
        from npo_cli.policy.logprobs import TokenRow
    return TokenRow(prompt_ids=prompt_ids, response_ids=tuple(3 + place % 9 for place in range(length)))


def score_rows(recipe_name: str, num_prompts: int, *, prompt_tokens: int, tokens: int, repeats: int) -> Figures:
    """CPU seconds of one pass over a step's rows."""
    from npo_cli.config.loading import load_recipe
    from npo_cli.errors import NpoError
    from npo_cli.policy.model import load_policy
    from npo_cli.session.logprob_pass import run_logprob_pass

    recipe = load_recipe(recipe_name, ["model.threads=1"])
    policy = load_policy(recipe.model)
    prompts = [tuple(3 + (place + prompt) % 9 for place in range(prompt_tokens)) for prompt in range(num_prompts)]
    rows = [make_row(ids, tokens) for ids in prompts for _ in range(8)]
    try:
        apart = load_recipe(recipe_name, ["model.threads=1", "train.share_prompts=false"])
    except NpoError:
        apart = recipe
    columns = {"columns": ("entropies", "collisions")}
    try:
        run_logprob_pass(policy, recipe, rows, **columns)
    except TypeError:
        columns = {}
    ways = {
        "cpu": lambda: run_logprob_pass(policy, recipe, rows),
        "columns": lambda: run_logprob_pass(policy, recipe, rows, **columns),
        "apart": lambda: run_logprob_pass(policy, apart, rows),
    }
    return {name: statistics.median(timed_cpu(way) for _ in range(repeats)) for name, way in ways.items()}


def load_candidate() -> Figures:
    """CPU seconds until a model has the weights of a candidate, from the second time on."""
    from npo_cli.config.loading import load_recipe
    from npo_cli.policy import weights_io
    from npo_cli.policy.model import load_policy

    policy = load_policy(load_recipe("smollm2-135m", ["model.threads=1"]).model)
    held = getattr(weights_io, "hold_weights", nullcontext)
    with tempfile.TemporaryDirectory() as folder, held():
        policy.save(Path(folder))
        policy.load(Path(folder))
        return {"cpu": statistics.median(timed_cpu(lambda: policy.load(Path(folder))) for _ in range(5))}


def score_micro(*overrides: str) -> Figures:
    """Seconds and CPU seconds of a scoring in a process that has scored before."""
    from npo_cli.config.loading import load_recipe
    from npo_cli.errors import NpoError
    from npo_cli.guides.score import score_run
    from npo_cli.training.train import train_run

    try:
        load_recipe("micro", overrides)
    except NpoError:  # a checkout without these settings
        overrides = ()
    chosen = ["scoring.num_prompts=64", "guide.inject.max_accuracy=1.0", *overrides]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        steps = ["train.num_steps=4", "train.save_every=1", "eval.every=0"]
        recipe = load_recipe("micro", steps)
        for _ in train_run(run, recipe):
            pass

        def score(*more: str) -> None:
            for _ in score_run(run, at=0, sources=None, branch=None, overrides=[*chosen, *more]):
                pass

        score("scoring.num_prompts=8")  # in a folder of its own
        began, began_cpu = time.perf_counter(), time.process_time()
        score()
        return {"seconds": time.perf_counter() - began, "cpu": time.process_time() - began_cpu}


def timed_cpu(work: Callable[[], object]) -> float:
    """CPU seconds that a call takes, all threads together."""
    began = time.process_time()
    work()
    return time.process_time() - began


def timed(work: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


CASES: dict[str, Callable[[], Figures]] = {
    "step": run_micro,
    "sampler": choose_tokens,
    "padding": count_padding,
    "rows_micro": lambda: score_rows("micro", 16, prompt_tokens=12, tokens=18, repeats=15),
    "rows_smollm2": lambda: score_rows("smollm2-135m", 4, prompt_tokens=40, tokens=20, repeats=3),
    "prompts": encode_prompts,
    "write_micro": lambda: write_groups(16, 18, repeats=15),
    "write_long": lambda: write_groups(4, 1035, repeats=7),
    "save": save_micro,
    "weights": load_candidate,
    "scoring": score_micro,
    "scoring_reuse": lambda: score_micro("engine.reuse_logprobs=true"),
}


def measure(case: str, checkout: Path) -> Figures:
    """A case in a process of its own, with the code of a checkout."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--measure", case]
    printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, cwd=checkout).stdout
    return json.loads(printed.splitlines()[-1])


def compare(case: str, before: Path, *, turns: int) -> dict[str, dict[str, float]]:
    """Medians of both checkouts, and of the ratio of pairs, by figure."""
    pairs = [(measure(case, before), measure(case, HERE)) for _ in range(turns)]
    return {
        name: {
            "before": statistics.median(old[name] for old, _ in pairs),
            "after": statistics.median(new[name] for _, new in pairs),
            "ratio": statistics.median(new[name] / old[name] if old[name] else float("nan") for old, new in pairs),
        }
        for name in pairs[0][1]
        if name in pairs[0][0]
    }


def main(arguments: Sequence[str]) -> None:
    """Compare the checkouts, or measure one case in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="another checkout of npo")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", choices=sorted(CASES), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        print(json.dumps(CASES[options.measure]()))
        return
    if options.before is None:
        parser.error("--before is missing")
    found = {}
    print("| case | figure | before | after | after / before |\n|---|---|---|---|---|")
    for case in options.cases.split(","):
        found[case] = compare(case, options.before.resolve(), turns=options.turns)
        for name, row in found[case].items():
            print(f"| {case} | {name} | {row['before']:.4g} | {row['after']:.4g} | {row['ratio']:.2f} |", flush=True)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
