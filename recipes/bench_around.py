"""Time what surrounds a step's sampling and update, in two checkouts of npo by turns.

    python recipes/bench_around.py --before OTHER_CHECKOUT [--cases write_micro,write_long] [--turns 5]
                                   [--out FILE.json]

Each measurement is a process of its own whose code comes from one checkout; processes of both alternate, and a ratio
is that of a pair. The table has medians. Cases:

- write_micro, write_long: record a step's rollouts, 16 x 8 x 18 and 4 x 8 x 1,035 tokens; seconds and bytes of a step.
- prompts: what a step of 16 x 8 asks of the tokenizer once its prompts have been seen.
- save: for how long a save stops the training, in a run of micro that saves every second step.
- step: a run of micro: seconds of a step, and of its waiting for the thread that writes rollouts.
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
from pathlib import Path

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

    def encode() -> None:
        policy.encode_all(prompts)
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
        recipe = load_recipe(str(HERE / "recipes/micro.yaml"), ["train.num_steps=12", "eval.every=0"])
        reports = [record for record in train_run(Path(folder) / "run", recipe) if isinstance(record, StepReport)]
    steps = [report.timings for report in reports[2:]]
    waited = statistics.median(step.get("seconds/write", 0.0) for step in steps)
    seconds = statistics.median(step["seconds"] for step in steps)
    return {"seconds": seconds, "waited": waited}


def timed(work: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


CASES: dict[str, Callable[[], Figures]] = {
    "write_micro": lambda: write_groups(16, 18, repeats=15),
    "write_long": lambda: write_groups(4, 1035, repeats=7),
    "prompts": encode_prompts,
    "save": save_micro,
    "step": run_micro,
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
