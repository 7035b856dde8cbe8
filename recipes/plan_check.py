"""`npo plan`'s estimate of one GPU beside what a real step takes, with models made on the spot.

    python recipes/plan_check.py OUT [--only NAME,NAME] [--device cuda] [--json]

Each case is a process of its own. It loads a model as a run does, takes one update so that the moments are there, and
then looks at the highest memory of a second update, one row of which is a guide's, and of sampling: resident memory
on a CPU, what torch allocated on a GPU. What was held before the model was loaded is taken off. On a CPU it needs
Linux, which can forget an old peak.
"""

import argparse
import ctypes
import gc
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from npo_cli.config.loading import load_recipe
from npo_cli.config.recipe import Recipe
from npo_cli.inference.base import SampleRequest, open_engine
from npo_cli.memory.footprint import estimate_footprint
from npo_cli.memory.model_shape import model_shape
from npo_cli.memory.planner import sum_bytes
from npo_cli.policy.model import Policy, load_policy
from npo_cli.policy.model_folder import MICRO_BASE_FOLDER
from npo_cli.policy.optimizer import build_optimizer
from npo_cli.policy.packing import TokenRow
from npo_cli.session.session import make_model_handle
from npo_cli.training.update import TrainingSample, Updater
from npo_cli.types.memory import Hardware
from npo_cli.types.rollouts import TokenSpan

PROMPT, RESPONSE, ROWS = 64, 192, 8
MB = 10**6
COMMON = (
    *(f"task.max_prompt_tokens={PROMPT}", f"sampling.max_new_tokens={RESPONSE}", "model.threads=1"),
    *(f"train.micro_batch_tokens={ROWS * (PROMPT + RESPONSE)}", "train.logit_chunk_tokens=512"),
    *("train.prompts_per_step=2", f"train.group_size={ROWS // 2}"),
)
CASES = {
    "llama": ("llama",),
    "llama + checkpointing": ("llama", "model.gradient_checkpointing=true"),
    "qwen3": ("qwen3",),
    "qwen3 + checkpointing": ("qwen3", "model.gradient_checkpointing=true"),
    "qwen3 + checkpointing + adafactor": ("qwen3", "model.gradient_checkpointing=true", "train.optimizer=adafactor"),
    "qwen3 + checkpointing + LoRA": ("qwen3", "model.gradient_checkpointing=true", "model.lora.rank=16"),
    "qwen3 + checkpointing + mixed": ("qwen3", "model.gradient_checkpointing=true", "model.compute_dtype=bfloat16"),
    "qwen3 deep + checkpointing": ("deep", "model.gradient_checkpointing=true"),
}
LARGE_CASES = {
    "qwen3 large + checkpointing + mixed": (
        *("large", "model.gradient_checkpointing=true", "model.compute_dtype=bfloat16"),
    ),
}
"""0.23 billion parameters; too slow for a CPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Peaks:
    """Bytes."""

    held: int
    """Weights and moments, between two steps."""
    update: int
    sampling: int


def make_model(kind: str) -> PreTrainedModel:
    """Random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "intermediate_size": 1152, "num_attention_heads": 6, "num_key_value_heads": 2}
    common = sizes | {"vocab_size": 8192, "eos_token_id": 15, "pad_token_id": 16, "bos_token_id": None}
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**common, num_hidden_layers=6))
    if kind == "large":
        common |= {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "vocab_size": 32768}
    layers = 6 if kind == "qwen3" else 16
    return Qwen3ForCausalLM(Qwen3Config(**common, num_hidden_layers=layers, head_dim=64))


def save_model(kind: str, folder: Path) -> None:
    """As a folder that a recipe can name, with the tokenizer of the micro base."""
    make_model(kind).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(MICRO_BASE_FOLDER / name, folder / name)


def resident_bytes(name: str) -> int:
    """Bytes of this process in memory: now (`VmRSS`), or at most (`VmHWM`) since the peak was last forgotten."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def peak_bytes(device: torch.device) -> int:
    """The largest use since `settle_memory`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_bytes("VmHWM")


def settle_memory(device: torch.device) -> int:
    """What is held once garbage is gone and freed pages are given back; the peak is forgotten."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident_bytes("VmRSS")


def make_rows() -> list[TrainingSample]:
    """A full micro-batch of own rows and one of a guide's, of the longest prompt and answer."""
    ids = torch.randint(20, 8000, (ROWS + 1, PROMPT + RESPONSE)).tolist()
    return [
        TrainingSample(
            tokens=TokenRow(prompt_ids=tuple(row[:PROMPT]), response_ids=tuple(row[PROMPT:])),
            behavior_logps=(-9.0,) * RESPONSE,
            advantage=1.0 if number % 2 else -1.0,
            spans=(TokenSpan(start=0, end=RESPONSE, source="guide" if number == ROWS else "own"),),
        )
        for number, row in enumerate(ids)
    ]


def sample(policy: Policy, recipe: Recipe) -> None:
    """One batch by the engine that samples with the trainer's own weights."""
    engine = open_engine(recipe.engine, make_model_handle(policy, recipe))
    prompts = torch.randint(20, 8000, (ROWS, PROMPT)).tolist()
    prompts = [
        SampleRequest(prompt_id=str(slot), prompt_ids=tuple(ids), slot=slot, seed=slot, version="0")
        for slot, ids in enumerate(prompts)
    ]
    engine.update_weights(policy.model, version="0")
    engine.generate(prompts, temperature=1.0, max_new_tokens=RESPONSE)


def measure_peaks(recipe: Recipe) -> Peaks:
    """In a process that did nothing before."""
    # A small model first, so that what torch sets up once is not charged to the large one.
    tiny = load_recipe("micro", [f"model.device={recipe.model.device}"])
    small = load_policy(tiny.model)
    Updater(small, build_optimizer(small.model, recipe.train), tiny).take_step([], lr=1e-6)
    device = small.device
    del small
    before = settle_memory(device)
    policy = load_policy(recipe.model)
    updater = Updater(policy, build_optimizer(policy.model, recipe.train), recipe)
    updater.take_step(make_rows(), lr=1e-6)
    held = settle_memory(device)
    updater.take_step(make_rows(), lr=1e-6)
    update = peak_bytes(device)
    settle_memory(device)
    sample(policy, recipe)
    return Peaks(held=held - before, update=update - before, sampling=peak_bytes(device) - before)


def estimate_peaks(recipe: Recipe) -> Peaks:
    """The same by `npo plan`, without CUDA."""
    shape = model_shape(recipe.model)
    footprint = estimate_footprint(recipe, shape, Hardware(num_gpus=1, gpu_bytes=0))
    needs = [each for each in footprint if each.location == "gpu" and "CUDA" not in each.label]
    always = sum_bytes(needs, "always")
    return Peaks(
        held=always, update=always + sum_bytes(needs, "update"), sampling=always + sum_bytes(needs, "sampling")
    )


def run_case(name: str, out: Path, device: str) -> dict[str, dict[str, int]]:
    """Both, the measurement in a process of its own."""
    kind, *settings = (CASES | LARGE_CASES)[name]
    folder = out / kind
    if not folder.is_dir():
        save_model(kind, folder)
    settings = [*COMMON, f"model.device={device}", f"model.path={folder}", *settings]
    # Large blocks are mapped and given back at once, so that resident memory is what is in use.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    child = [sys.executable, __file__, "--child", str(out), *settings]
    found = subprocess.run(child, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    estimate = estimate_peaks(load_recipe("micro", settings))
    return {"measured": json.loads(found.splitlines()[-1]), "estimated": as_dict(estimate)}


def as_dict(peaks: Peaks) -> dict[str, int]:
    """For JSON."""
    return {"held": peaks.held, "update": peaks.update, "sampling": peaks.sampling}


def main() -> None:
    """A table in Markdown or JSON lines, a line as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("settings", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--only", default=",".join(CASES), help="names of cases, with commas between them")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="bytes, a JSON line per case")
    args = parser.parse_args()
    if args.child:
        print(json.dumps(as_dict(measure_peaks(load_recipe("micro", args.settings)))))
        return
    if not args.json:
        print(
            "| case | " + " | ".join(f"{what}, MB" for what in ("held", "update", "sampling")) + " |\n|---|---|---|---|"
        )
    for name in args.only.split(","):
        found = run_case(name, args.out, args.device)
        if args.json:
            print(json.dumps({"case": name, **found}), flush=True)
            continue
        cells = [
            f"{found['estimated'][what] / MB:,.0f} / {found['measured'][what] / MB:,.0f} = "
            f"{found['estimated'][what] / found['measured'][what]:.2f}"
            for what in ("held", "update", "sampling")
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
