"""Settings without an effect under the other settings. A user who wrote one is told; one that was inherited is not.

The conditions are the mark `applies_when` of the fields (`npo_cli.config.base`). A value from a plug-in is never a
reason: what it reads is not known here.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from npo_cli.config.base import IS_SET, Settings, walk_fields
from npo_cli.registry import ENGINES, IMPORTANCE_RATIOS, MIX_STRATEGIES, RUNGS, TARGETS, TASKS, TRACKERS, VERIFIERS

REGISTRIES = {
    each.setting: each
    for each in (ENGINES, IMPORTANCE_RATIOS, MIX_STRATEGIES, RUNGS, TARGETS, TASKS, TRACKERS, VERIFIERS)
}
"""Settings whose values are names that a plug-in may add."""
Conditions = Mapping[str, Any]
"""Dotted key -> the values that it needs (one of a list, for a setting that holds a list), or `IS_SET`."""


def find_idle_settings(settings: Settings, written: Mapping[str, int]) -> Iterator[tuple[str, str, str]]:
    """(key, what makes it idle, what to set instead) of every written setting without an effect.

    `written` has the rank of the file or command line where a user wrote a key, the highest last. What a later one
    switched off is not reported: `npo train my.yaml task.source=micro` needs no other my.yaml.
    """
    fields = {key: (value, marks) for key, value, marks in walk_fields(settings)}
    for key, (_, marks) in fields.items():
        for other, needed in marks.get("applies_when", {}).items() if key in written else ():
            value = fields[other][0]
            if not _holds(other, value, needed) and written.get(other, -1) <= written[key]:
                yield key, _describe_reason(other, value, needed), _suggest(other, value, needed)
                break


def describe_conditions(conditions: Conditions) -> str:
    """`task.source=file`, `task.image_column set`; empty without one."""
    return " and ".join(
        f"{key} set" if needed == IS_SET else f"{key}={' or '.join(map(_format, needed))}"
        for key, needed in conditions.items()
    )


def _holds(key: str, value: Any, needed: Any) -> bool:
    if needed == IS_SET:
        return bool(value)
    values = value if isinstance(value, tuple) else (value,)
    return any(each in needed or (key in REGISTRIES and each not in REGISTRIES[key].built_in) for each in values)


def _describe_reason(key: str, value: Any, needed: Any) -> str:
    return f"without {key}" if needed == IS_SET else f"with {key}={_format(value)}"


def _suggest(key: str, value: Any, needed: Any) -> str:
    form = "{}=[{}]" if isinstance(value, tuple) else "{}={}"
    return "set " + (key if needed == IS_SET else " or ".join(form.format(key, _format(each)) for each in needed))


def _format(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
