"""Every command, setting and choice that the circles use, by a neutral name: the place to edit after a rename.

`COMMANDS` holds the argv of each command, with braces for what a circle fills in. `SETTINGS` maps a neutral name to
today's dotted key and `CHOICES` a neutral value to today's spelling of it; a value that is not in `CHOICES` is passed
as it is. Circles and baseline know neutral names only, so that neither changes in a rename.
"""

import json
from collections.abc import Mapping

PACKAGE = "npo_cli"
"""Started as `python -m PACKAGE ARGV`."""

COMMANDS = {
    "train": ["train", "{recipe}", "{run}"],
    "train with AutoNPO": ["train", "{recipe}", "{run}", "--autonpo"],
    "resume": ["resume", "{run}"],
    "sample a guide": ["sample-guide", "{run}", "--source", "{guide_step}", "--at", "{at}", "--name", "{name}"],
    "fork": ["resume", "{run}", "--at", "{at}", "--guide", "{name}", "--new-branch", "{branch}"],
    "score checkpoints": ["score-checkpoints", "{run}", "--at", "{at}"],
    "score sources": [
        "score-checkpoints",
        "{run}",
        "--at",
        "{at}",
        "--candidates",
        "6,8",
        "--source",
        "self",
        "--source",
        "past",
    ],
    "show costs": ["show", "{run}", "costs", "--json"],
    "compare": ["compare", "grpo={run}:main", "npo={run}:{branch}", "--json"],
}

RECIPES = {"micro": "micro", "shapes": "shapes"}

TINY_VL = ["recipes/tiny_vl.py", "{out}", "--steps", "30"]
"""Script and arguments that make the tiny vision-language model."""

SETTINGS = {
    "steps": "train.num_steps",
    "save every": "train.save_every",
    "prompts per step": "train.prompts_per_step",
    "group size": "train.group_size",
    "learning rate": "train.lr",
    "seed": "train.seed",
    "pool size": "task.pool_size",
    "held-out size": "task.heldout_size",
    "kind of task": "task.kind",
    "evaluate every": "eval.every",
    "model": "model.path",
    "threads": "model.threads",
    "LoRA rank": "model.lora.rank",
    "largest accuracy of a guided group": "guide.inject.max_accuracy",
    "importance ratio": "guide.inject.ratio",
    "shape of the ratio": "guide.inject.ratio_shaping",
    "clip guided rows": "guide.inject.clip_off_policy",
    "guide samples per prompt": "guide.cache.samples_per_prompt",
    "guide samples per round": "guide.cache.samples_per_round",
    "guided prompts": "guide.cache.prompts",
    "guided part of the replay": "guide.cache.coverage",
    "least yield": "guide.cache.min_yield",
    "replayed share": "guide.experience.replay_fraction",
    "replay start": "guide.experience.start_accuracy",
    "score prompts": "scoring.num_prompts",
    "score samples": "scoring.samples_per_prompt",
    "score resamples": "scoring.bootstrap_resamples",
    "score budget": "scoring.budget",
    "trigger warmup": "autonpo.trigger.warmup_steps",
    "trigger window": "autonpo.trigger.window",
    "trigger patience": "autonpo.trigger.patience",
    "trigger reward factor": "autonpo.trigger.max_reward_gain_se",
    "trigger entropy drop": "autonpo.trigger.min_entropy_drop",
    "trigger entropy factor": "autonpo.trigger.min_entropy_drop_se",
    "cooldown": "autonpo.trigger.cooldown_steps",
    "rollback distances": "autonpo.rollback.distances",
    "least quality": "autonpo.probe.min_quality",
    "least value": "autonpo.rollback.min_value",
    "distance rule": "autonpo.rollback.selection_rule",
    "subtracted from Q": "scoring.quality_baseline",
    "least mistakes": "autonpo.rollback.min_failed_prompts",
    "most interventions": "autonpo.max_interventions",
    "probe prompts": "autonpo.probe.num_prompts",
    "test the replay": "autonpo.replay.acceptance_test",
    "early intervention": "autonpo.early.enabled",
    "scout steps": "autonpo.early.scout_steps",
    "early window": "autonpo.early.replay_steps",
}

CHOICES = {
    "exact": "exact",
    "proximal": "proximal",
    "no ratio": "none",
    "nothing": "none",
    "decoupled": "decoupled",
    "soft": "soft",
    "any addition": "any",
}


def setting_arguments(settings: Mapping[str, object]) -> list[str]:
    """`KEY=VALUE` arguments for settings by their neutral names."""
    return [f"{SETTINGS[name]}={_spell(value)}" for name, value in settings.items()]


def fill(argv: list[str], **blanks: object) -> list[str]:
    """A command with its braces filled in."""
    return [part.format(**blanks) for part in argv]


def _spell(value: object) -> str:
    if isinstance(value, str):
        return CHOICES.get(value, value)
    return json.dumps(value)
