"""Hand-made pieces of a run directory."""

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from npo_cli.storage.checkpoints import create_checkpoint
from npo_cli.storage.evals import PromptResults
from npo_cli.storage.layout import RunDir, create_run
from npo_cli.storage.lineage import append_segment
from npo_cli.types.guides import GuideCacheInfo, SourceSpec
from npo_cli.types.rollouts import EvalReport, Group, Prompt, PromptSamples, Rollout, Segment
from npo_cli.types.scores import CandidateScore

RECIPE = {"name": "tiny", "train": {"seed": 0, "num_steps": 4}}


def new_run(folder: Path) -> RunDir:
    """A run with its first branch and no checkpoint."""
    run = create_run(folder / "run", recipe=RECIPE, npo_version="0.1.0")
    append_segment(run, main_segment())
    return run


def main_segment() -> Segment:
    return Segment(branch="main", parent=None, fork_step=0, guide_cache=None, guide_until=None)


def fork(run: RunDir, branch: str, *, parent: str, at: int) -> None:
    """A branch without a guide."""
    run.save_recipe(branch, RECIPE)
    append_segment(run, Segment(branch=branch, parent=parent, fork_step=at, guide_cache=None, guide_until=None))


def safetensors_bytes(tensors: Mapping[str, tuple[str, Sequence[int], bytes]]) -> bytes:
    """A safetensors file, spelled by hand: name -> (dtype, shape, data)."""
    header, data = {}, b""
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    head = json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + data


def f32(*numbers: float) -> bytes:
    return np.asarray(numbers, dtype="<f4").tobytes()


def write_checkpoint(
    run: RunDir, step: int, *, branch: str = "main", anchor: bool = True, weight: float | None = None
) -> Path:
    """A checkpoint of one number."""
    with create_checkpoint(run, branch, step) as folder:
        number = float(step) if weight is None else weight
        (folder / "model.safetensors").write_bytes(safetensors_bytes({"w": ("F32", [1], f32(number))}))
        (folder / "config.json").write_text("{}\n")
        if anchor:
            (folder / "training_state").mkdir()
            (folder / "training_state" / "state.json").write_text(f'{{"step": {step}}}\n')
    return run.checkpoint_folder(branch, step)


def rollout(slot: int, *, prompt_id: str = "p0", logps: Sequence[float] = (-0.5, -0.25)) -> Rollout:
    return Rollout(
        prompt_id=prompt_id,
        slot=slot,
        response_ids=(7, 1),
        behavior_logps=tuple(np.asarray(logps, dtype=np.float32).tolist()),
        text="7",
        finished=True,
        sampler_step=0,
        verdict="correct",
        reward=1.0,
    )


def group(prompt_id: str) -> Group:
    prompt = Prompt(prompt_id=prompt_id, answer="7", text="3+4=")
    return Group(
        prompt=prompt,
        rollouts=(rollout(0, prompt_id=prompt_id), rollout(1, prompt_id=prompt_id)),
        injection_status="gate_closed",
        on_policy_accuracy=1.0,
    )


def guide_info(run: RunDir, **changes: object) -> GuideCacheInfo:
    fields: dict[str, object] = {
        "name": "g",
        "run_id": run.run_id,
        "branch": "main",
        "learner_step": 20,
        "source": SourceSpec(name="checkpoint", options={"step": 40}, text="checkpoint:40"),
        "guide_step": 40,
        "guide_digest": "d",
        "num_steps": 20,
        "tokenizer_digest": "t",
        "sampling": "8 by 2, random",
        "num_prompts": 0,
        "num_prompts_with_rollouts": 0,
        "num_samples": 0,
        "num_tokens": 0,
    }
    return GuideCacheInfo(**(fields | changes))  # type: ignore[arg-type]


def guide_samples(prompt_id: str, num_correct: int = 1) -> PromptSamples:
    """Four samples of a guide, of 12 tokens; one is kept if any is correct."""
    kept = replace(rollout(0, prompt_id=prompt_id, logps=(-0.1, -1.2345678)), sampler_step=40, source="guide")
    return PromptSamples(
        prompt_id=prompt_id,
        num_sampled=4,
        num_correct=num_correct,
        num_tokens=12,
        rollouts=(kept,) if num_correct else (),
    )


def score(step: int, **changes: object) -> CandidateScore:
    numbers = (
        "quality quality_low quality_high pass_at_1 pass_at_k quality_self quality_net quality_net_low "
        "quality_net_high quality_net_split steps_saved price value value_low value_high variance variance_low "
        "variance_high signal signal_low signal_high p_best kl_per_token kl_per_sequence mean_length ess_fraction"
    )
    fields: dict[str, object] = dict.fromkeys(numbers.split(), 0.5)
    fields |= {"candidate": f"checkpoint:{step}", "source": "checkpoint", "step": step, "distance": step}
    fields |= {"quality_kind": "pass@k", "variance_kind": "group2"}
    fields |= {
        "variances": {"tok2": 1.5},
        "num_prompts": 8,
        "num_samples": 64,
        "is_unreliable": False,
        "is_selected": False,
    }
    return CandidateScore(**(fields | changes))  # type: ignore[arg-type]


def evaluation(step: int, *, branch: str = "main", accuracy: float = 0.5, num_samples: int = 2) -> EvalReport:
    return EvalReport(
        branch=branch,
        step=step,
        num_prompts=4,
        num_samples=num_samples,
        accuracy=accuracy,
        accuracy_low=0.25,
        accuracy_high=0.75,
        pass_at_k=0.5,
        pass_at_k_low=0.25,
        pass_at_k_high=0.75,
        mean_length=2.0,
        truncated_fraction=0.0,
        num_tokens=16,
    )


def make_eval_results(step: int, *, num_correct: tuple[int, ...] = (2, 1, 0, 1)) -> PromptResults:
    """Those behind `evaluation(step)`."""
    prompts = ("0a", "0b", "0c", "0d")
    return PromptResults(branch="main", step=step, num_samples=2, prompt_keys=prompts, num_correct=num_correct)
