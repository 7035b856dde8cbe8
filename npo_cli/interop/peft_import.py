"""Adapters that another program trained through peft: what kind they are, and into a policy of ours.

npo has plain LoRA only. What would make them another function (DoRA, rank-stabilised scale, biases, ranks by layer) is
refused; what only matters while training (dropout, start values) is not looked at.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from npo_cli.errors import NpoError
from npo_cli.policy.lora import CONFIG_FILE, IGNORED_CONFIG_KEYS, TENSORS_FILE, adapter_tensors
from npo_cli.policy.model import Policy
from npo_cli.policy.weights_io import check_tensors, copy_tensors, read_tensors

TRAINING_ONLY_KEYS = frozenset({"lora_dropout", "init_lora_weights", "task_type", "auto_mapping", "r", "lora_alpha"})
"""Entries that do not change the function, and those that the settings took over."""
SUPPORTED_INITS = (True, False, "gaussian")
"""Start values that leave the base as it was."""
MERGE_HINT = "merge them into their base (peft: merge_and_unload, save_pretrained) and import that folder"


def read_lora_settings(folder: Path) -> list[str]:
    """`KEY=VALUE` settings under which a policy has the adapters of this folder."""
    said = read_adapter_config(folder)
    rank, alpha, targets = (said.get(name) for name in ("r", "lora_alpha", "target_modules"))
    if said.get("peft_type") != "LORA" or not isinstance(rank, int) or not isinstance(alpha, int | float):
        raise NpoError(f"{folder}: these adapters are {said.get('peft_type')}, and npo reads LoRA only", MERGE_HINT)
    if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        raise NpoError(f"{folder}: target_modules is {targets!r}, not a list of layers' names", MERGE_HINT)
    if said.get("init_lora_weights", True) not in SUPPORTED_INITS:
        raise NpoError(f"{folder}: init_lora_weights={said['init_lora_weights']} changed the base itself", MERGE_HINT)
    settings = [f"model.lora.rank={rank}", f"model.lora.alpha={alpha}", f"model.lora.targets={json.dumps(targets)}"]
    base = said.get("base_model_name_or_path")
    return [*settings, f"model.path={json.dumps(base)}"] if isinstance(base, str) and base else settings


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """peft's adapter_config.json."""
    path = folder / CONFIG_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NpoError(f"{path} cannot be read: {error}", "let its trainer write it again") from error
    if not isinstance(found, dict):
        raise NpoError(f"{path} is no JSON object", "let its trainer write it again")
    return found


def import_adapters(policy: Policy, folder: Path) -> None:
    """Copy a folder's adapters into the policy's; refused where they are another function or do not fit."""
    assert policy.adapters is not None, "a policy without adapters takes none"
    check_adapter_config(policy.adapters.config, folder)
    tensors, own = read_tensors(folder, TENSORS_FILE), adapter_tensors(policy.model)
    check_tensors(own, tensors, folder)
    copy_tensors(own, tensors)
    policy.mark_weights_changed()


def check_adapter_config(ours: Mapping[str, Any], folder: Path) -> None:
    """Whatever both programs write into a config must be the same, training aside."""
    said = read_adapter_config(folder)
    same = {name: sorted(map(str, value)) if isinstance(value, list) else value for name, value in said.items()}
    compared = sorted((ours.keys() & same.keys()) - IGNORED_CONFIG_KEYS - TRAINING_ONLY_KEYS)
    differing = [f"{name} {same[name]}" for name in compared if same[name] != ours[name]]
    if (said.get("r"), said.get("lora_alpha")) != (ours["r"], ours["lora_alpha"]):
        differing.append(f"rank {said.get('r')} and alpha {said.get('lora_alpha')}")
    if differing:
        raise NpoError(f"{folder}: npo has no such adapters: {', '.join(differing[:3])}", MERGE_HINT)
