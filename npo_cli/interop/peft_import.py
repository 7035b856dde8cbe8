"""Import of adapters that another program trained with peft.

npo supports plain LoRA only. Options that change the function (DoRA, rank-stabilized scale, biases, ranks per layer)
are refused; options that only affect training (dropout, initialization) are ignored.
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
"""Entries that do not change the function, and those that became settings."""
SUPPORTED_INITS = (True, False, "gaussian")
"""Initializations that do not change the base."""
MERGE_HINT = "merge them into their base (peft: merge_and_unload, save_pretrained) and import that folder"


def read_lora_settings(folder: Path) -> list[str]:
    """`KEY=VALUE` settings of a policy with the adapters of this folder."""
    config = read_adapter_config(folder)
    rank, alpha, targets = (config.get(name) for name in ("r", "lora_alpha", "target_modules"))
    if config.get("peft_type") != "LORA" or not isinstance(rank, int) or not isinstance(alpha, int | float):
        raise NpoError(f"{folder}: adapters of type {config.get('peft_type')} are not supported, only LoRA", MERGE_HINT)
    if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        raise NpoError(f"{folder}: target_modules is {targets!r}, not a list of layer names", MERGE_HINT)
    if config.get("init_lora_weights", True) not in SUPPORTED_INITS:
        raise NpoError(f"{folder}: init_lora_weights={config['init_lora_weights']} changes the base model", MERGE_HINT)
    settings = [f"model.lora.rank={rank}", f"model.lora.alpha={alpha}", f"model.lora.targets={json.dumps(targets)}"]
    base = config.get("base_model_name_or_path")
    return [*settings, f"model.path={json.dumps(base)}"] if isinstance(base, str) and base else settings


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """peft's adapter_config.json."""
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NpoError(f"{path} cannot be read: {error}", "export the adapters again") from error
    if not isinstance(config, dict):
        raise NpoError(f"{path} is not a JSON object", "export the adapters again")
    return config


def import_adapters(policy: Policy, folder: Path) -> None:
    """Copy the folder's adapters into the policy; refuse those of another kind or shape."""
    assert policy.adapters is not None, "the policy has no adapters"
    check_adapter_config(policy.adapters.config, folder)
    tensors, own = read_tensors(folder, TENSORS_FILE), adapter_tensors(policy.model)
    check_tensors(own, tensors, folder)
    copy_tensors(own, tensors)
    policy.mark_weights_changed()


def check_adapter_config(ours: Mapping[str, Any], folder: Path) -> None:
    """Entries that both configs have must be equal, except those that only affect training."""
    config = read_adapter_config(folder)
    same = {name: sorted(map(str, value)) if isinstance(value, list) else value for name, value in config.items()}
    compared = sorted((ours.keys() & same.keys()) - IGNORED_CONFIG_KEYS - TRAINING_ONLY_KEYS)
    differing = [f"{name} {same[name]}" for name in compared if same[name] != ours[name]]
    if (config.get("r"), config.get("lora_alpha")) != (ours["r"], ours["lora_alpha"]):
        differing.append(f"rank {config.get('r')} and alpha {config.get('lora_alpha')}")
    if differing:
        raise NpoError(f"{folder}: adapters with {', '.join(differing[:3])} are not supported", MERGE_HINT)
