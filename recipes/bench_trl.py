"""npo and TRL side by side: the same model, prompts, sampling law, loss, batch and learning rate, on one thread.

    pip install trl
    python recipes/bench_trl.py                                      # all works, 3 pairs each: hours
    python recipes/bench_trl.py micro --pairs 5 --steps 20 60 --out OUT
    python recipes/bench_trl.py --quick                              # one pair of a few micro steps

Each measurement is a whole process, and the time of a step is the difference of two of them, a long and a short one, so
that start-up, compilation and work moved out of the steps cancel. Processes of npo and TRL alternate, the first of a
pair in turn; a ratio is that of one pair. Memory is the largest sum of resident memory over a process and its children.

Both sides sample at temperature 1 without truncation, take the GRPO loss (clip 0.2, no KL term, advantages divided by
the group's standard deviation, mean over tokens and then over responses), AdamW at the recipe's constant rate without
weight decay, a gradient clipped at 1, and float32. Prompts come in the order of the recipe's data and are verified by
its verifier. Neither saves checkpoints between its steps, evaluates, or logs to a tracker; npo writes its run
directory. TRL has its fastest settings for one device: no logging, no gradient checkpointing, one generation batch per
step. Response tokens of the counted steps are printed for both; in `long` lengths are given, so that they are equal.
"""

import argparse
import csv
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy

Side = Literal["npo", "trl"]
SIDES: tuple[Side, ...] = ("npo", "trl")
MEMORY_INTERVAL = 0.05
"""Seconds between two readings of resident memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What both sides do."""

    recipe: str
    overrides: tuple[str, ...] = ()
    steps: tuple[int, int] = (20, 60)
    """Steps of the short process and of the long one."""
    trl_micro_batch: int | None = None
    """Rows of one of TRL's forward and backward passes; None: all."""
    lengths: tuple[float, float] | None = None
    """Mean and standard deviation of the logarithm of given response lengths; None: the model ends its responses."""


SMOLLM2 = (
    "task.datasets=[{name: chain_sum, config: {min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}}]",
    "task.pool_size=96",  # there are 200 such sums
    "train.prompts_per_step=4",
    "train.group_size=8",
)
WORKS = {
    "micro": Work(recipe="micro"),
    "smollm2": Work(recipe="smollm2-135m", overrides=SMOLLM2, steps=(2, 6)),
    "long": Work(
        recipe="smollm2-135m",
        overrides=(*SMOLLM2, "sampling.max_new_tokens=512"),
        steps=(1, 3),
        trl_micro_batch=8,
        lengths=(4.35, 1.0),
    ),
}
"""16 x 8 x 18 tokens of the embedded model; 4 x 8 x 20 of SmolLM2-135M; the same with log-normal lengths of mean 128,
at most 512."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Process:
    """One measured process."""

    side: Side
    num_steps: int
    seconds: float
    """Wall clock from start to end."""
    peak_mb: float
    tokens: int
    """Response tokens of all steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One side of one pair."""

    work: str
    pair: int
    side: Side
    seconds_per_step: float
    tokens_per_step: float
    """Response tokens of the counted steps."""
    peak_mb: float


# The parent: processes, pairs, the table


def measure_process(side: Side, name: str, num_steps: int, *, overrides: Sequence[str], folder: Path) -> Process:
    """Run one side for that many steps."""
    command = [sys.executable, __file__, name, "--side", side, "--child-steps", str(num_steps), "--out", str(folder)]
    command += ["--overrides", *overrides]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    settings = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    log = folder / "log.txt"
    began = time.perf_counter()
    with log.open("w", encoding="utf-8") as output:
        child = subprocess.Popen(command, env=os.environ | threads | settings, stdout=output, stderr=output)
        peak = watch_memory(child)
    seconds = time.perf_counter() - began
    if child.returncode:
        raise SystemExit(f"{side} ended with {child.returncode}:\n{log.read_text(encoding='utf-8')[-4000:]}")
    tokens = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))
    return Process(side=side, num_steps=num_steps, seconds=seconds, peak_mb=peak, tokens=tokens)


def watch_memory(child: subprocess.Popen[bytes]) -> float:
    """Wait for a process; the largest resident memory of it and its descendants together, in MB."""
    peak = 0
    while child.poll() is None:
        peak = max(peak, sum(map(resident_bytes, list_descendants(child.pid))))
        time.sleep(MEMORY_INTERVAL)
    return peak / 1e6


def list_descendants(pid: int) -> Iterator[int]:
    """A process and all below it."""
    yield pid
    try:
        children = [
            int(each) for path in Path(f"/proc/{pid}/task").glob("*/children") for each in path.read_text().split()
        ]
    except OSError:  # it has just ended
        return
    for each in children:
        yield from list_descendants(each)


def resident_bytes(pid: int) -> int:
    """Resident memory of one process; 0 if it has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def measure_pair(name: str, steps: Sequence[int], *, pair: int, overrides: Sequence[str]) -> list[Measurement]:
    """Both sides, a short and a long process each, in turn."""
    order = SIDES if pair % 2 == 0 else SIDES[::-1]
    found: dict[tuple[Side, int], Process] = {}
    for num_steps in steps:
        for side in order:
            with tempfile.TemporaryDirectory() as folder:
                done = measure_process(side, name, num_steps, overrides=overrides, folder=Path(folder))
            what = f"{name}, pair {pair + 1}, {side}, {num_steps} steps"
            print(f"{what}: {done.seconds:.1f} s, {done.peak_mb:,.0f} MB, {done.tokens:,} tokens", file=sys.stderr)
            found[side, num_steps] = done
    short, long = steps
    return [
        Measurement(
            work=name,
            pair=pair,
            side=side,
            seconds_per_step=(found[side, long].seconds - found[side, short].seconds) / (long - short),
            tokens_per_step=(found[side, long].tokens - found[side, short].tokens) / (long - short),
            peak_mb=found[side, long].peak_mb,
        )
        for side in SIDES
    ]


def summarize(found: Sequence[Measurement]) -> dict[str, Any]:
    """Medians of one work, and the ratios TRL / npo of its pairs with their range."""
    sides = {side: [each for each in found if each.side == side] for side in SIDES}
    row: dict[str, Any] = {"work": found[0].work, "pairs": len(sides["npo"])}
    for side, own in sides.items():
        row[f"{side}_seconds_per_step"] = statistics.median(each.seconds_per_step for each in own)
        row[f"{side}_tokens_per_step"] = statistics.median(each.tokens_per_step for each in own)
        row[f"{side}_peak_mb"] = statistics.median(each.peak_mb for each in own)
    both = list(zip(sides["npo"], sides["trl"], strict=True))
    speed = [trl.seconds_per_step / npo.seconds_per_step for npo, trl in both]
    memory = [npo.peak_mb / trl.peak_mb for npo, trl in both]
    for name, ratios in (("speed", speed), ("memory", memory)):
        row |= {f"{name}": statistics.median(ratios), f"{name}_low": min(ratios), f"{name}_high": max(ratios)}
    return row


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """As Markdown. `speed` above 1: npo is faster; `memory` below 1: npo takes less."""
    columns = ("work", "pairs", "npo, s per step", "TRL, s per step", "speed", "npo, tokens per step")
    columns += ("TRL, tokens per step", "npo, MB", "TRL, MB", "memory")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        cells = [row["work"], str(row["pairs"])]
        cells += [f"{row[f'{side}_seconds_per_step']:.3g}" for side in SIDES]
        cells += [f"{row['speed']:.2f}x ({row['speed_low']:.2f} to {row['speed_high']:.2f})"]
        cells += [f"{row[f'{side}_tokens_per_step']:,.0f}" for side in SIDES]
        cells += [f"{row[f'{side}_peak_mb']:,.0f}" for side in SIDES]
        cells += [f"{row['memory']:.2f}x ({row['memory_low']:.2f} to {row['memory_high']:.2f})"]
        print(f"| {' | '.join(cells)} |")


# A child: one side


def load_work(work: Work, num_steps: int) -> Any:
    """The recipe of both sides: one thread, no evaluation, no checkpoint between the first step and the last."""
    from npo_cli.config.loading import load_recipe

    fixed = (f"train.num_steps={num_steps}", f"train.save_every={num_steps}", "eval.every=0", "model.threads=1")
    return load_recipe(work.recipe, [*work.overrides, *fixed, "loss.adv_eps=1e-4", "mismatch.mode=off"])


def draw_lengths(work: Work, recipe: Any, step: int) -> list[int]:
    """The given lengths of a step's responses, the same on both sides: prompt by prompt, slot by slot."""
    assert work.lengths is not None
    count = recipe.train.prompts_per_step * recipe.train.group_size
    drawn = numpy.random.default_rng([recipe.train.seed, step]).lognormal(*work.lengths, size=count)
    return numpy.clip(drawn.round().astype(int), 1, recipe.sampling.max_new_tokens).tolist()


def run_npo(work: Work, num_steps: int, folder: Path) -> int:
    """Train with npo; response tokens of all steps."""
    import npo_cli as npo
    from npo_cli.storage.layout import open_run
    from npo_cli.storage.metrics import read_metrics

    recipe = load_work(work, num_steps)
    if work.lengths is not None:
        give_npo_lengths(work, recipe)
    npo.train(recipe, folder / "run")
    return int(sum(row["tokens"] for row in read_metrics(open_run(folder / "run"), "main")))


def give_npo_lengths(work: Work, recipe: Any) -> None:
    """Let each response of the engine end at its given length."""
    from npo_cli.inference import decoding, transformers_engine

    steps = itertools.count()

    class GivenLengths(decoding.Decoding):
        def __init__(self, requests: Any, handle: Any, *, combine: Callable[..., Any], **options: Any) -> None:
            lengths = numpy.array(draw_lengths(work, recipe, next(steps)))

            def combine_and_end(logits: Any) -> Any:
                scores_NW = combine(logits)
                num_rows = len(scores_NW)
                end_here_N = self.length_N[:num_rows] + 1 == lengths[self.request_N[:num_rows]]
                return end_responses(scores_NW, end_here_N, handle.eos_ids)

            super().__init__(requests, handle, combine=combine_and_end, **options)

    transformers_engine.Decoding = GivenLengths


def end_responses(scores_NW: Any, end_here_N: numpy.ndarray, eos_ids: Sequence[int]) -> Any:
    """The logits, where the marked rows can only end and the others cannot end."""
    rows = end_here_N.nonzero()[0].tolist()
    scores_NW[:, list(eos_ids)] = -numpy.inf
    scores_NW[rows] = -numpy.inf
    scores_NW[rows, eos_ids[0]] = 0.0
    return scores_NW


def run_trl(work: Work, num_steps: int, folder: Path) -> int:
    """Train with TRL; response tokens of all steps."""
    import torch
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from npo_cli.policy.model import load_policy
    from npo_cli.session.session import open_task
    from npo_cli.tasks.task import DataOrder

    torch.set_num_threads(1)
    recipe = load_work(work, num_steps)
    task, policy = open_task(recipe), load_policy(recipe.model)
    train, sampling = recipe.train, recipe.sampling
    order = DataOrder(num_prompts=len(task.train), seed=train.seed)
    prompts = [task.train[index] for index in order.indices(0, num_steps * train.prompts_per_step)]
    tokens = 0

    def reward(completions: list[Any], completion_ids: list[list[int]], number: list[int], **_rest: Any) -> list[float]:
        nonlocal tokens
        tokens += sum(map(len, completion_ids))
        texts = [each if isinstance(each, str) else each[0]["content"] for each in completions]
        finished = [ids[-1] in policy.eos_ids for ids in completion_ids]
        graded = task.grade([prompts[place] for place in number], texts, finished=finished)
        return [result.reward for result in graded]

    rows = train.prompts_per_step * train.group_size
    micro_batch = work.trl_micro_batch or rows
    trainer = GRPOTrainer(
        model=policy.model,
        processing_class=policy.tokenizer,
        reward_funcs=reward,
        train_dataset=Dataset.from_list(
            [{"prompt": chat_or_text(prompt), "number": place} for place, prompt in enumerate(prompts)]
        ),
        args=GRPOConfig(
            output_dir=str(folder / "trl"),
            max_steps=num_steps,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=rows // micro_batch,
            num_generations=train.group_size,
            max_completion_length=sampling.max_new_tokens,
            temperature=sampling.temperature,
            loss_type="grpo",
            beta=0.0,
            epsilon=recipe.loss.clip_low,
            scale_rewards="group",
            learning_rate=train.lr,
            lr_scheduler_type="constant",
            adam_beta1=train.betas[0],
            adam_beta2=train.betas[1],
            weight_decay=train.weight_decay,
            max_grad_norm=train.grad_clip,
            shuffle_dataset=False,
            bf16=False,
            gradient_checkpointing=False,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
            use_cpu=True,
        ),
    )
    if work.lengths is not None:
        give_trl_lengths(work, recipe, policy)
    trainer.train()
    task.close()
    return tokens


def give_trl_lengths(work: Work, recipe: Any, policy: Any) -> None:
    """Let each response of `generate` end at its given length."""
    from transformers import LogitsProcessor

    steps, generate = itertools.count(), policy.model.generate

    class GivenLengths(LogitsProcessor):
        def __init__(self, num_prompt_tokens: int) -> None:
            self.start, self.lengths = num_prompt_tokens, numpy.array(draw_lengths(work, recipe, next(steps)))

        def __call__(self, input_ids: Any, scores: Any) -> Any:
            return end_responses(scores, self.lengths == input_ids.shape[1] - self.start + 1, policy.eos_ids)

    def generate_given(*, input_ids: Any, **options: Any) -> Any:
        return generate(input_ids=input_ids, logits_processor=[GivenLengths(input_ids.shape[1])], **options)

    policy.model.generate = generate_given


def chat_or_text(prompt: Any) -> str | list[dict[str, str]]:
    """A prompt as TRL's data sets hold it."""
    if prompt.text is not None:
        return prompt.text
    return [{"role": message.role, "content": message.content} for message in prompt.messages]


def main() -> None:
    """Measure the works, or be one of the processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("works", nargs="*", metavar="WORK", help=f"{', '.join(WORKS)} (default: all)")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, nargs=2, metavar=("SHORT", "LONG"), help="default: by work")
    parser.add_argument("--quick", action="store_true", help="one pair of micro, 1 and 3 steps: does it run?")
    parser.add_argument("--out", type=Path, default=Path("bench-trl"), help="folder of pairs.csv and summary.json")
    parser.add_argument("--overrides", nargs="*", default=[], metavar="KEY=VALUE", help="further settings, both sides")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--child-steps", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        (name,) = given.works
        work = replace(WORKS[name], overrides=(*WORKS[name].overrides, *given.overrides))
        run = {"npo": run_npo, "trl": run_trl}[given.side]
        tokens = run(work, given.child_steps, given.out)
        (given.out / "tokens.json").write_text(json.dumps(tokens), encoding="utf-8")
        return
    unknown = [name for name in given.works if name not in WORKS]
    if unknown:
        parser.error(f"no work {unknown[0]!r}; there are {', '.join(WORKS)}")
    names = ["micro"] if given.quick else given.works or list(WORKS)
    pairs, steps = (1, (1, 3)) if given.quick else (given.pairs, given.steps)
    given.out.mkdir(parents=True, exist_ok=True)
    found: list[Measurement] = []
    for name in names:
        for pair in range(pairs):
            found += measure_pair(name, steps or WORKS[name].steps, pair=pair, overrides=given.overrides)
            write_results(found, given.out)
    print_table([summarize([each for each in found if each.work == name]) for name in names])


def write_results(found: Sequence[Measurement], folder: Path) -> None:
    """pairs.csv, and summary.json with the medians and ratios of each work."""
    with (folder / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(asdict(found[0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(each) for each in found)
    works = dict.fromkeys(each.work for each in found)
    rows = [summarize([each for each in found if each.work == name]) for name in works]
    (folder / "summary.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
