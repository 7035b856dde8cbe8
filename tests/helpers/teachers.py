"""Teachers for the micro task: a file of right scratchpads, and the micro base in another vocabulary."""

import json
import random
from collections.abc import Iterable
from pathlib import Path

import torch

from npo_cli.config.recipe import ModelSettings
from npo_cli.policy.model import load_policy
from npo_cli.tasks.micro import noisy_response
from npo_cli.types.rollouts import Prompt
from tests.helpers.guide_trajectories import EXACT


def correct_response(prompt: Prompt) -> str:
    """The exact calculation."""
    a, b = map(int, prompt.prompt_id.split("/")[1].split("+"))
    return noisy_response(a, b, len(str(a)), noise=EXACT, wrong={}, rng=random.Random(0))


def write_traces(path: Path, rows: Iterable[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def correct_rows(prompts: Iterable[Prompt]) -> list[dict]:
    return [{"prompt_id": prompt.prompt_id, "response": correct_response(prompt)} for prompt in prompts]


@torch.no_grad()
def save_with_other_vocabulary(folder: Path) -> Path:
    """The micro base with `0` and `7` in each other's place of the vocabulary: the same policy in other tokens."""
    policy = load_policy(ModelSettings(threads=1))
    rows = policy.model.get_input_embeddings().weight
    rows[[0, 7]] = rows[[7, 0]]
    policy.save(folder)
    spelled = json.loads((folder / "tokenizer.json").read_text())
    spelled["model"]["vocab"] |= {"0": 7, "7": 0}
    (folder / "tokenizer.json").write_text(json.dumps(spelled))
    return folder
