"""Time the decode loop of the transformers engine against one call of transformers' `generate` per batch.

    python recipes/bench_sampling.py [--cases micro,smollm2,long] [--engines generate,loop,compiled] [--turns 3]
                                     [--device cpu] [--out FILE.json]

Both sample the same requests with the same seeds: `micro` 128 responses of 18 tokens, `smollm2` 32 of 20 tokens, `long`
forced log-normal lengths (mean 1,035, at most 4,096), four times as many responses as rows, with a tiny model.
`generate` computes a batch until its longest response ends. Each is measured in processes of its own, the engines in
turn, after a first call, which compiles under `compiled` (engine.compile); the table has medians. A
row-step is one row of one forward pass. Peak memory is that above the loaded model.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from scipy.optimize import brentq
from scipy.stats import lognorm
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from npo_cli.config.engine import EngineSettings
from npo_cli.config.loading import load_recipe
from npo_cli.inference.base import ModelHandle, Sample, SampleRequest
from npo_cli.inference.decoding import SamplingCost, find_cache_argument
from npo_cli.inference.transformers_engine import TransformersEngine
from npo_cli.policy.model import load_policy, load_tokenizer
from npo_cli.seeds import derive_seed
from npo_cli.session.session import make_model_handle, open_task

CASES = {"micro": 15, "smollm2": 3, "long": 1}
"""Timed calls per process."""
MEAN_LENGTH, LONGEST, SPREAD = 1035, 4096, 1.0
LONG_ROWS, LONG_VOCABULARY = 16, 512


class SeededSampler(LogitsProcessor):
    """Chooses a token per row and step by inverting the cumulative distribution, and masks all others."""

    def __init__(self, seeds: Sequence[int], *, num_tokens: int, temperature: float, device: torch.device) -> None:
        draws = [numpy.random.Generator(numpy.random.Philox(key=seed)).random(num_tokens) for seed in seeds]
        self.uniform_NT = torch.from_numpy(numpy.stack(draws)).to(device)
        self.temperature = temperature
        self.logps: list[Tensor] = []
        self.entropies: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logps_NW = torch.log_softmax(scores.float() / self.temperature, dim=-1)
        probs_NW = logps_NW.exp()
        cumulative_NW = probs_NW.double().cumsum(dim=-1)
        place = len(self.logps)
        threshold_N1 = self.uniform_NT[:, place : place + 1] * cumulative_NW[:, -1:]
        chosen_N1 = torch.searchsorted(cumulative_NW, threshold_N1, right=True).clamp(max=scores.shape[1] - 1)
        self.logps.append(logps_NW.gather(1, chosen_N1)[:, 0])
        self.entropies.append(-torch.nan_to_num(probs_NW * logps_NW).sum(-1))
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen_N1, 0.0)


class GenerateEngine(TransformersEngine):
    """One call of `generate` per batch, with one prefill per prompt: what the engine was before it had a loop."""

    @torch.no_grad()
    def generate(self, requests: Sequence[SampleRequest], *, temperature: float, max_new_tokens: int) -> list[Sample]:
        """Batch by batch."""
        samples = []
        for start in range(0, len(requests), self.settings.max_num_seqs):
            batch = requests[start : start + self.settings.max_num_seqs]
            ids_NL, mask_NL, cache = self._prefill(batch)
            seeds = [request.seed for request in batch]
            sampler = SeededSampler(seeds, num_tokens=max_new_tokens, temperature=temperature, device=self.model.device)
            config = GenerationConfig(
                do_sample=False,
                max_new_tokens=max_new_tokens,
                eos_token_id=list(self.handle.eos_ids),
                pad_token_id=self.handle.pad_id,
                suppress_tokens=list(self.handle.vision.suppressed_ids) if self.handle.vision else None,
            )
            own, self.model.generation_config = self.model.generation_config, GenerationConfig()
            with self._precision():
                output_NX = self.model.generate(
                    ids_NL,
                    attention_mask=mask_NL,
                    logits_processor=LogitsProcessorList([sampler]),
                    generation_config=config,
                    **{find_cache_argument(self.model): cache},
                )
            self.model.generation_config = own
            samples += self._collect(batch, output_NX[:, ids_NL.shape[1] :], sampler)
        return samples

    def _prefill(self, batch: Sequence[SampleRequest]) -> tuple[Tensor, Tensor, DynamicCache]:
        """Left-padded ids and mask of all rows, and the KV cache of all prompt tokens but the last."""
        distinct = list(dict.fromkeys((request.prompt_ids, request.images) for request in batch))
        width = max(len(ids) for ids, _ in distinct)
        gaps = [width - len(ids) for ids, _ in distinct]
        padded = [[self.handle.pad_id] * gap + list(ids) for gap, (ids, _) in zip(gaps, distinct, strict=True)]
        ids_PL = torch.tensor(padded, device=self.model.device)
        mask_PL = torch.tensor([[0] * gap + [1] * (width - gap) for gap in gaps], device=self.model.device)
        cache = DynamicCache(config=self.model.config)
        place = {prompt: index for index, prompt in enumerate(distinct)}
        rows = torch.tensor([place[request.prompt_ids, request.images] for request in batch], device=self.model.device)
        images: dict[str, Tensor] = {}
        if self.handle.vision is not None:
            images = self.handle.vision.build_inputs(ids_PL[:, :-1], [images for _, images in distinct])
        if width > 1:
            with self._precision():
                self.model.base_model(
                    input_ids=ids_PL[:, :-1],
                    attention_mask=mask_PL[:, :-1] if any(gaps) or images else None,
                    position_ids=None if images else (mask_PL.cumsum(-1) - 1).clamp(min=0)[:, :-1],
                    use_cache=True,
                    **{find_cache_argument(self.model): cache},
                    **images,
                )
            cache.batch_select_indices(rows)
        if self.handle.vision is not None:
            base = self.model.base_model
            base.rope_deltas = base.rope_deltas[rows] if images else torch.zeros_like(rows)[:, None]
        return ids_PL[rows], mask_PL[rows], cache

    def _collect(self, batch: Sequence[SampleRequest], response_NT: Tensor, sampler: SeededSampler) -> list[Sample]:
        logps_NT = torch.stack(sampler.logps, dim=1).cpu().numpy()
        entropies_NT = torch.stack(sampler.entropies, dim=1).cpu().numpy()
        samples = []
        for row, (request, ids) in enumerate(zip(batch, response_NT.tolist(), strict=True)):
            length = next((place + 1 for place, token in enumerate(ids) if token in self.handle.eos_ids), len(ids))
            finished = ids[length - 1] in self.handle.eos_ids
            self.cost.tokens, self.cost.row_steps = self.cost.tokens + length, self.cost.row_steps + len(ids)
            samples.append(
                Sample(
                    prompt_id=request.prompt_id,
                    slot=request.slot,
                    response_ids=tuple(ids[:length]),
                    logps=tuple(logps_NT[row, :length].tolist()),
                    mean_entropy=float(entropies_NT[row, :length].mean(dtype="float64")),
                    text=self.handle.tokenizer.decode(ids[: length - finished]),
                    finished=finished,
                )
            )
        self.cost.passes += response_NT.shape[1]
        return samples


class LogNormalModel(Qwen3ForCausalLM):
    """A model of random weights whose responses have log-normal lengths: it ends with the law's hazard per position."""

    def set_lengths(self, *, num_prompt_tokens: int) -> None:
        """Mean MEAN_LENGTH where responses are cut at LONGEST, and a standard deviation of the logarithm of SPREAD."""
        lengths_T = numpy.arange(LONGEST + 1)

        def survival(scale: float) -> numpy.ndarray:
            return lognorm.sf(lengths_T, SPREAD, scale=scale)

        # E min(X, c) = sum of P(X > t) for t < c
        scale = brentq(lambda scale: survival(scale)[:-1].sum() - MEAN_LENGTH, 1.0, 1e5)
        survival_T = torch.from_numpy(survival(scale))
        self.hazard_logits_T = torch.log(survival_T[:-1] - survival_T[1:]) - torch.log(survival_T[1:])
        self.num_prompt_tokens = num_prompt_tokens

    def forward(self, *, position_ids: Tensor, **inputs: Any) -> Any:
        """The last token of the vocabulary is the end token."""
        output = super().forward(position_ids=position_ids, **inputs)
        others, places = output.logits[..., :-1].logsumexp(-1), position_ids - self.num_prompt_tokens + 1
        output.logits[..., -1] = others + self.hazard_logits_T.to(others.device, others.dtype)[places]
        return output


def make_long_case(device: str) -> tuple[ModelHandle, list[SampleRequest], int, int]:
    """Forced lengths: 4 responses to each of LONG_ROWS prompts of 16 tokens."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen3Config(vocab_size=LONG_VOCABULARY, max_position_embeddings=2 * LONGEST, **sizes, **heads)
    model = LogNormalModel(config).eval().to(device)
    model.set_lengths(num_prompt_tokens=16)
    handle = ModelHandle(
        model=model,
        tokenizer=load_tokenizer("micro-base"),
        eos_ids=(LONG_VOCABULARY - 1,),
        pad_id=0,
        max_model_len=LONGEST + 16,
        dtype=torch.float32,
    )
    prompts = [tuple(range(first, first + 16)) for first in range(LONG_ROWS)]
    requests = [
        SampleRequest(prompt_id=str(ids[0]), prompt_ids=ids, slot=slot, seed=derive_seed(0, ids[0], slot))
        for ids in prompts
        for slot in range(4)
    ]
    return handle, requests, LONG_ROWS, LONGEST


def make_recipe_case(name: str, device: str, num_prompts: int, group_size: int) -> tuple[Any, ...]:
    """A recipe's model, its first prompts, all responses at a time."""
    recipe = load_recipe(name, [f"model.device={device}"])
    policy, task = load_policy(recipe.model), open_task(recipe)
    requests = [
        SampleRequest(
            prompt_id=prompt.prompt_id,
            prompt_ids=policy.encode(prompt),
            slot=slot,
            seed=derive_seed(0, prompt.prompt_id, slot),
        )
        for prompt in task.train[:num_prompts]
        for slot in range(group_size)
    ]
    return make_model_handle(policy, recipe), requests, len(requests), recipe.sampling.max_new_tokens


def make_case(name: str, device: str) -> tuple[ModelHandle, list[SampleRequest], int, int]:
    """The model, the requests, the number of rows, and the limit of a response."""
    if name == "long":
        return make_long_case(device)
    return make_recipe_case(*{"micro": ("micro", device, 16, 8), "smollm2": ("smollm2-135m", device, 4, 8)}[name])


ENGINES = {"generate": GenerateEngine, "loop": TransformersEngine, "compiled": TransformersEngine}


def measure(case: str, engine_name: str, device: str) -> dict[str, float]:
    """Medians over calls, after one of two tokens per response."""
    handle, requests, max_rows, num_tokens = make_case(case, device)
    settings = EngineSettings(max_num_seqs=max_rows, compile=engine_name == "compiled")
    engine = ENGINES[engine_name](settings, handle)
    began = time.process_time()
    engine.generate(requests, temperature=1.0, max_new_tokens=min(18, num_tokens))
    first = time.process_time() - began
    engine.cost = SamplingCost()
    reset_peak(device)
    before, seconds, cpu_seconds = read_memory(device), [], []
    for _ in range(CASES[case]):
        began, began_cpu = time.perf_counter(), time.process_time()
        engine.generate(requests, temperature=1.0, max_new_tokens=num_tokens)
        seconds.append(time.perf_counter() - began)
        cpu_seconds.append(time.process_time() - began_cpu)
    cost, calls = engine.cost, len(seconds)
    return {
        "tokens": cost.tokens / calls,
        "seconds": statistics.median(seconds),
        "cpu_seconds": statistics.median(cpu_seconds),
        "row_steps": cost.row_steps / calls,
        "passes": cost.passes / calls,
        "peak_bytes": read_peak(device) - before,
        "first_cpu_seconds": first,
    }


def reset_peak(device: str) -> None:
    """Forget the peak of memory so far."""
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")
    else:
        torch.cuda.reset_peak_memory_stats()


def read_memory(device: str) -> int:
    """Bytes in use now."""
    return read_status("VmRSS") if device == "cpu" else torch.cuda.memory_allocated()


def read_peak(device: str) -> int:
    """Most bytes in use since `reset_peak`."""
    return read_status("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated()


def read_status(name: str) -> int:
    """A size in bytes from Linux's table of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def run_turns(case: str, engines: Sequence[str], device: str, turns: int) -> dict[str, dict[str, float]]:
    """Medians of the engines, each measured in a process of its own, in turn."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
    for _ in range(turns):
        for name, rows in found.items():
            command = [sys.executable, __file__, "--measure", case, name, "--device", device]
            rows.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
    return {name: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for name, rows in found.items()}


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--engines", default="generate,loop")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(*given.measure, given.device)))
        return
    table = {}
    print("| case | engine | ms per token | CPU ms per token | row-steps per token | passes | peak memory MB |")
    print("|---|---|---|---|---|---|---|")
    for case in given.cases.split(","):
        table[case] = run_turns(case, given.engines.split(","), given.device, given.turns)
        for name, row in table[case].items():
            tokens = row["tokens"]
            cells = (
                f"{1000 * row['seconds'] / tokens:.3f}",
                f"{1000 * row['cpu_seconds'] / tokens:.3f}",
                f"{row['row_steps'] / tokens:.2f}",
                f"{row['passes']:,.0f}",
                f"{row['peak_bytes'] / 1e6:,.0f}",
            )
            print(f"| {case} | {name} | {' | '.join(cells)} |", flush=True)
    if given.out:
        given.out.write_text(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
