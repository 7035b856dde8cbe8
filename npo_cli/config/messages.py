"""Error messages about settings: the key, what is allowed, what was given, the nearest known key.

All of it is derived from the JSON schema of the recipe, so new settings need nothing here.
"""

import difflib
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic_core import ErrorDetails

from npo_cli.config.recipe import Recipe

COMMAND_LINE: Literal["command line"] = "command line"
"""Location of a setting that is no line of a file."""
MAX_ECHO = 60
"""Characters of a user's text that a message shows."""

OLD_KEYS: Mapping[str, str] = {
    # Sections
    "auto": "autonpo",
    "pool": "autonpo.pool",
    "probe": "autonpo.probe",
    "rollback": "autonpo.rollback",
    "replay": "autonpo.replay",
    "early": "autonpo.early",
    "late": "autonpo.replay",
    "inject": "guide.inject",
    "experience": "guide.experience",
    "intervention": "guide.replay",
    "extrapolate": "extrapolation",
    "parallel": "distributed",
    "track": "tracking",
    "score": "scoring",
    # Settings
    "auto.ema": "autonpo.trigger.ema_decay",
    "auto.window": "autonpo.trigger.window",
    "auto.patience": "autonpo.trigger.patience",
    "auto.c_r": "autonpo.trigger.max_reward_gain_se",
    "auto.d_H": "autonpo.trigger.min_entropy_drop",
    "auto.c_H": "autonpo.trigger.min_entropy_drop_se",
    "auto.warmup": "autonpo.trigger.warmup_steps",
    "auto.cooldown": "autonpo.trigger.cooldown_steps",
    "auto.max": "autonpo.max_interventions",
    "auto.q_min": "autonpo.probe.min_quality",
    "auto.pool_min": "autonpo.rollback.min_failed_prompts",
    "auto.deltas": "autonpo.rollback.distances",
    "auto.early": "autonpo.early.enabled",
    "pool.tau": "autonpo.pool.max_accuracy",
    "pool.size": "autonpo.pool.max_size",
    "probe.prompts": "autonpo.probe.num_prompts",
    "probe.k": "autonpo.probe.samples_per_prompt",
    "probe.direction": "autonpo.probe.variance_samples",
    "rollback.optimizer": "autonpo.rollback.optimizer",
    "rollback.data": "autonpo.rollback.data",
    "rollback.seed": "autonpo.rollback.seed",
    "replay.after": "autonpo.replay.after",
    "replay.accept_test": "autonpo.replay.acceptance_test",
    "early.scout": "autonpo.early.scout_steps",
    "early.window": "autonpo.early.replay_steps",
    "late.delta": "autonpo.replay.suggested_steps",
    "inject.gate": "guide.inject.max_accuracy",
    "inject.slots": "guide.inject.slots",
    "inject.compose": "guide.inject.mode",
    "inject.baseline": "guide.inject.baseline",
    "inject.ratio": "guide.inject.ratio",
    "inject.decoupled_cap": "guide.inject.decoupled_cap",
    "inject.shape": "guide.inject.ratio_shaping",
    "inject.gamma": "guide.inject.shaping_gamma",
    "inject.clip": "guide.inject.clip_off_policy",
    "inject.clip_own": "guide.inject.clip_on_policy",
    "guide.k": "guide.cache.samples_per_prompt",
    "guide.round": "guide.cache.samples_per_round",
    "guide.temperature": "guide.cache.temperature",
    "guide.select": "guide.cache.select",
    "guide.per_prompt": "guide.cache.max_responses_per_prompt",
    "guide.min_correct": "guide.cache.min_correct",
    "guide.keep": "guide.cache.keep",
    "guide.concurrency": "guide.endpoint.concurrency",
    "guide.timeout": "guide.endpoint.timeout",
    "guide.retries": "guide.endpoint.max_retries",
    "experience.share": "guide.experience.replay_fraction",
    "experience.start": "guide.experience.start_accuracy",
    "experience.bucket_units": "guide.experience.bucket_units",
    "experience.bucket_sigma": "guide.experience.bucket_sigma",
    "experience.select": "guide.experience.select",
    "experience.retire": "guide.experience.retire_solved",
    "intervention.at": "guide.replay.at_step",
    "intervention.guide": "guide.replay.guide_step",
    "intervention.steps": "guide.replay.num_steps",
    "extrapolate.space": "extrapolation.space",
    "extrapolate.k": "extrapolation.k",
    "extrapolate.a": "extrapolation.a",
    "extrapolate.seat": "extrapolation.mode",
    "extrapolate.samples": "extrapolation.samples_per_group",
    "extrapolate.seats": "extrapolation.slots",
    "engine.max_rows": "engine.max_num_seqs",
    "engine.tolerance": "engine.sync_tolerance",
    "engine.devices": "engine.vllm.devices",
    "engine.tensor_parallel": "engine.vllm.tensor_parallel_size",
    "engine.data_parallel": "engine.vllm.data_parallel_size",
    "engine.memory_share": "engine.vllm.gpu_memory_utilization",
    "engine.kv_cache_gb": "engine.vllm.cpu_kv_cache_gb",
    "engine.graphs": "engine.vllm.cuda_graphs",
    "engine.max_adapters": "engine.vllm.max_loras",
    "engine.sleep": "engine.vllm.enable_sleep_mode",
    "engine.transport": "engine.vllm.weight_transfer",
    "engine.start_timeout": "engine.vllm.start_timeout",
    "engine.deadline": "engine.vllm.timeout",
    "parallel.reshard_after_forward": "distributed.reshard_after_forward",
    "parallel.deadline": "distributed.timeout",
    "track.to": "tracking.report_to",
    "track.project": "tracking.project",
    "score.prompts": "scoring.num_prompts",
    "score.k": "scoring.samples_per_prompt",
    "score.quality": "scoring.quality",
    "score.variance": "scoring.variance",
    "score.kappa": "scoring.kl_scale",
    "score.cap": "scoring.weight_cap",
    "score.average": "scoring.kl_average",
    "score.alpha": "scoring.variance_exponent",
    "score.rule": "scoring.selection_rule",
    "score.budget": "scoring.budget",
    "score.resamples": "scoring.bootstrap_resamples",
    "train.min_lr_share": "train.min_lr_ratio",
    "train.keep_anchors": "train.keep_full_checkpoints",
    "train.keep_guides": "train.keep_weights_only",
    "eval.samples": "eval.samples_per_prompt",
    "method.plan": "method.commands",
    "method.stretch": "method.repeat_every",
}
"""Dotted key of version 0.1 -> the key that replaces it."""


def describe_problems(problems: Sequence[ErrorDetails], *, locations: Mapping[str, str], source: str) -> str:
    """All problems in one line, each with the location of its setting (`source` if unknown)."""
    lines = [f"{_describe(problem)} ({_locate(problem, locations, source=source)})" for problem in problems]
    return "; ".join(lines[:6] + ([f"and {len(lines) - 6} more"] if len(lines) > 6 else []))


def _locate(problem: ErrorDetails, locations: Mapping[str, str], *, source: str) -> str:
    """Location of the setting, else of the nearest section around it or key in it; of a section with a key on the
    command line, that."""
    parts = [str(part) for part in problem["loc"]]
    around = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    within = [key for key in locations if around and key.startswith(around[0] + ".")]
    if any(locations[key] == COMMAND_LINE for key in within):
        return COMMAND_LINE
    return next((locations[key] for key in around + within if key in locations), source)


def _describe(problem: ErrorDetails) -> str:
    """One problem: the key, what is allowed, what was given."""
    key = _dotted(problem["loc"])
    match problem["type"]:
        case "extra_forbidden":
            return "; ".join(_unknown(each) for each in _unknown_keys(problem))
        case "missing":
            return f"{key} is missing"
        case "json_invalid":
            return f"the settings cannot be read: {problem['msg']}"
        case "value_error":
            return str(problem["ctx"]["error"])
        case _:
            got = shorten(json.dumps(problem["input"], ensure_ascii=False))
            return f"{key} must be {describe_allowed(problem['loc'])}, got {got}"


def _unknown_keys(problem: ErrorDetails) -> list[str]:
    """The unknown key of a problem; for a renamed section, the keys given in it."""
    key = _dotted(problem["loc"])
    if key in OLD_KEYS and isinstance(problem["input"], dict) and problem["input"]:
        return [f"{key}.{name}" for name in problem["input"]]
    return [key]


def _unknown(key: str) -> str:
    """`unknown key inject.gate: it is now guide.inject.max_accuracy`, or that it is not a setting."""
    return f"unknown key {key}: it is now {OLD_KEYS[key]}" if key in OLD_KEYS else f"{shorten(key)} is not a setting"


def shorten(text: str, length: int = MAX_ECHO) -> str:
    """At most `length` characters of what a user gave, for a message."""
    return text if len(text) <= length else text[: length - 3] + "..."


def _dotted(loc: Sequence[str | int]) -> str:
    return ".".join(map(str, loc))


def suggest_fix(problems: Sequence[ErrorDetails]) -> str:
    """A hint: the new name or the nearest key of the first unknown key, else where to see what is allowed."""
    unknown = [problem for problem in problems if problem["type"] == "extra_forbidden"]
    if not unknown:
        key = ".".join(part for part in problems[0]["loc"] if isinstance(part, str))
        return f"npo config {key}   # explains it" if key else "npo config   # explains the settings"
    loc = unknown[0]["loc"]
    first = _unknown_keys(unknown[0])[0]
    key = first if first != _dotted(loc) else ".".join(part for part in loc if isinstance(part, str))
    near = OLD_KEYS.get(key) or find_nearest_key(key)
    if near:
        return f"write {near} instead of {key}"
    section = key.rpartition(".")[0]
    names = _schema(loc[:-1])["properties"]
    return f"{section or 'a recipe'} has the settings {', '.join(names)}"


def find_nearest_key(key: str) -> str | None:
    """The most similar known key, or None; the last name counts most, so that `lr` means `train.lr`."""
    if len(key) > MAX_ECHO:
        return None  # longer than any key, and slow to compare
    section, _, name = key.rpartition(".")

    def similarity(known: str) -> float:
        known_section, _, known_name = known.rpartition(".")
        # A scout's settings have the names of the run's, which are meant more often.
        is_scout = known_section.startswith("scout") and not section.startswith("sc")
        return _ratio(name, known_name) + 0.2 * _ratio(section, known_section) - 0.1 * is_scout

    best = max(list_known_keys(), key=similarity)
    return best if _ratio(name, best.rpartition(".")[2]) >= 0.65 else None


def _ratio(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def list_known_keys() -> tuple[str, ...]:
    """Every dotted key of a recipe, sections included; settings of list items without the index."""

    def walk(schema: Mapping[str, Any], prefix: str) -> Iterator[str]:
        for name, field in schema.get("properties", {}).items():
            yield prefix + name
            yield from walk(_follow(field.get("items", field)), f"{prefix}{name}.")

    return tuple(walk(_schema(()), ""))


@functools.cache
def _root() -> dict[str, Any]:
    return Recipe.model_json_schema()


def _follow(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    return _root()["$defs"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema


def _schema(loc: Sequence[str | int]) -> Mapping[str, Any]:
    """JSON schema of one setting: names index sections, numbers index lists."""
    schema: Mapping[str, Any] = _root()
    for part in loc:
        if isinstance(part, str):
            schema = schema["properties"][part]
        else:
            schema = schema["prefixItems"][part] if "prefixItems" in schema else schema["items"]
        schema = _follow(schema)
    return schema


_KINDS = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "string": "text",
    "null": "null",
}


def describe_allowed(loc: Sequence[str | int]) -> str:
    """What a setting may be: `a number above 0`, `one of trl, verl`."""
    schema = _schema(loc)
    return " or ".join(map(_described, schema.get("anyOf", [schema])))


def describe_type(loc: Sequence[str | int]) -> str:
    """The type of a setting, without its bounds: `number`, `integer or null`, `list`."""
    schema = _schema(loc)
    kinds = [each.get("type", "string") for each in schema.get("anyOf", [schema])]
    names = {"array": "list", "object": "group"}
    return " or ".join(dict.fromkeys(names.get(kind, kind) for kind in kinds))


def _described(schema: Mapping[str, Any]) -> str:
    if "enum" in schema or "const" in schema:
        return "one of " + ", ".join(schema.get("enum", [schema.get("const")]))
    if schema["type"] == "array":
        return f"a list of {schema['minItems']} numbers" if "minItems" in schema else "a list"
    if schema["type"] == "object":
        return "a group of settings (KEY: VALUE)"
    words = {"exclusiveMinimum": "above", "minimum": "at least", "maximum": "at most", "exclusiveMaximum": "below"}
    bounds = " and ".join(f"{word} {schema[name]}" for name, word in words.items() if name in schema)
    return f"{_KINDS[schema['type']]} {bounds}".strip()
