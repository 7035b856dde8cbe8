"""What other trainers leave, with real weights: checkpoints of a tiny run of npo under their names for folders."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from npo_cli.policy.model_folder import MICRO_BASE_FOLDER

STATE = Path(__file__).parents[1] / "data" / "trl_trainer_state.json"
"""What TRL 1.16 wrote after 4 steps of GRPO on the embedded base; its numbers are its own."""


def hf_folder(folder: Path, *, scale: float = 1.0) -> Path:
    """The embedded base as transformers saves a model, its weights scaled so that steps differ."""
    shutil.copytree(MICRO_BASE_FOLDER, folder)
    weights = folder / "model.safetensors"
    save_file({name: tensor * scale for name, tensor in load_file(weights).items()}, weights, metadata={"format": "pt"})
    return folder


def trl_output(home: Path, *, history: list[Mapping[str, Any]] | None = None) -> Path:
    """`checkpoint-2` and `checkpoint-4`, with the state of TRL's trainer and an optimiser that nobody opens."""
    for step, scale in ((2, 1.0), (4, 0.95)):
        folder = hf_folder(home / f"checkpoint-{step}", scale=scale)
        state = json.loads(STATE.read_text())
        kept = [row for row in (state["log_history"] if history is None else history) if row["step"] <= step]
        (folder / "trainer_state.json").write_text(json.dumps(state | {"global_step": step, "log_history": kept}))
        (folder / "optimizer.pt").write_bytes(b"\x80\x02not for us")
    return home
