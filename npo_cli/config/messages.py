"""Error messages about settings: the key, what is allowed, what was given, the nearest known key.

All of it is derived from the JSON schema of the recipe, so new settings need nothing here.
"""

import difflib
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic_core import ErrorDetails

from npo_cli.config.recipe import Recipe


def describe_problems(problems: Sequence[ErrorDetails], *, locations: Mapping[str, str], source: str) -> str:
    """All problems in one line, each with the location of its setting (`source` if unknown)."""
    lines = [f"{_describe(problem)} ({_locate(problem, locations, source=source)})" for problem in problems]
    return "; ".join(lines[:6] + ([f"and {len(lines) - 6} more"] if len(lines) > 6 else []))


def _locate(problem: ErrorDetails, locations: Mapping[str, str], *, source: str) -> str:
    """Location of the setting, else of the nearest section around it or key in it."""
    parts = [str(part) for part in problem["loc"]]
    around = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    within = [key for key in locations if around and key.startswith(around[0] + ".")]
    return next((locations[key] for key in around + within if key in locations), source)


def _describe(problem: ErrorDetails) -> str:
    """One problem: the key, what is allowed, what was given."""
    key = _dotted(problem["loc"])
    match problem["type"]:
        case "extra_forbidden":
            return f"{key} is not a setting"
        case "missing":
            return f"{key} is missing"
        case "json_invalid":
            return f"the settings cannot be read: {problem['msg']}"
        case "value_error":
            return str(problem["ctx"]["error"])
        case _:
            got = json.dumps(problem["input"], ensure_ascii=False)
            got = got if len(got) <= 60 else got[:57] + "..."
            return f"{key} must be {describe_allowed(problem['loc'])}, got {got}"


def _dotted(loc: Sequence[str | int]) -> str:
    return ".".join(map(str, loc))


def suggest_fix(problems: Sequence[ErrorDetails]) -> str:
    """A hint: the nearest key of the first unknown key, else where to see what is allowed."""
    unknown = [problem["loc"] for problem in problems if problem["type"] == "extra_forbidden"]
    if not unknown:
        return "npo docs settings   # lists every setting"
    key = ".".join(part for part in unknown[0] if isinstance(part, str))
    near = find_nearest_key(key)
    if near:
        return f"write {near} instead of {key}"
    section = key.rpartition(".")[0]
    names = _schema(unknown[0][:-1])["properties"]
    return f"{section or 'a recipe'} has the settings {', '.join(names)}"


def find_nearest_key(key: str) -> str | None:
    """The most similar known key, or None; the last name counts most, so that `lr` means `train.lr`."""
    section, _, name = key.rpartition(".")

    def similarity(known: str) -> float:
        known_section, _, known_name = known.rpartition(".")
        return _ratio(name, known_name) + 0.2 * _ratio(section, known_section)

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
