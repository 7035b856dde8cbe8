"""What each setting is: for `npo config`, for the reference page, and as a JSON schema for editors.

All of it is read from the settings classes, so a new setting needs nothing here.
"""

import difflib
import inspect
import json
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from npo_cli.config.applies import REGISTRIES, describe_conditions
from npo_cli.config.base import MARKS, Settings, list_settings, walk_fields
from npo_cli.config.loading import EXTENDS_KEY, load_recipe, read_method_values
from npo_cli.config.locate import list_method_names, list_recipe_names
from npo_cli.config.messages import OLD_KEYS, describe_allowed, describe_type, find_nearest_key, list_known_keys
from npo_cli.config.recipe import Recipe
from npo_cli.errors import NpoError
from npo_cli.registry import VERIFIERS
from npo_cli.types.views import SectionView, SettingView

DESCRIBED_VALUES = {VERIFIERS.setting: ("auto", "FILE.py:FUNCTION")}
"""Values beside the registered names."""
ITEM = "0"
"""Stands for the number of an item in a dotted prefix."""
SCHEMA_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def list_sections(section: type[Settings] = Recipe, prefix: str = "") -> Iterator[tuple[str, type[Settings]]]:
    """Dotted prefix (`guide.inject.`) and class of every section that has settings of its own, depth first.

    The items of a list have the prefix `task.datasets.0.`.
    """
    if any(True for _ in list_settings(section)):
        yield prefix, section
    for name, field in section.model_fields.items():
        if inspect.isclass(field.annotation) and issubclass(field.annotation, Settings):
            yield from list_sections(field.annotation, f"{prefix}{name}.")
        for item in typing.get_args(field.annotation):
            if inspect.isclass(item) and issubclass(item, Settings):
                yield from list_sections(item, f"{prefix}{name}.{ITEM}.")


def describe_config(key: str | None) -> list[SectionView | SettingView]:
    """All sections; the settings and subsections of the section `key`; or the setting `key`.

    An unknown key is an error that names the nearest one.
    """
    sections = {_without_item(prefix): section for prefix, section in list_sections()}
    if key is None:
        return list(_describe_sections(sections, within=""))
    settings = {f"{prefix}{name}": (prefix, section) for prefix, section in list_sections() for name in _names(section)}
    found = {_without_item(dotted): (dotted, *where) for dotted, where in settings.items()}
    if key in found:
        dotted, prefix, section = found[key]
        return [_describe_setting(dotted, prefix, section, with_recipes=True)]
    inside = f"{key}."
    own = [
        _describe_setting(dotted, prefix, section)
        for dotted, prefix, section in found.values()
        if _without_item(prefix) == inside
    ]
    return [*own, *_describe_sections(sections, within=inside)] or _refuse_key(key)


def build_schema() -> dict[str, Any]:
    """The JSON schema of a recipe file, for editors that complete and check YAML.

    Names that a plug-in may add are suggested and not enforced.
    """
    schema = Recipe.model_json_schema()
    for prefix, section in list_sections():
        definition = schema if not prefix else schema["$defs"][section.__name__]
        for name, _, marks in list_settings(section):
            field = definition["properties"][name]
            for mark in MARKS:
                field.pop(mark, None)
            registry = REGISTRIES.get(f"{prefix}{name}")
            if registry is not None:
                values = [*registry.names(), *DESCRIBED_VALUES.get(f"{prefix}{name}", ())]
                for kind in tuple(field.get("anyOf", (field,))):  # a text, a list of texts, or either
                    text = kind.get("items", kind)
                    text.pop("type")
                    text["anyOf"] = [{"enum": values}, {"type": "string"}]
            field["description"] += f" Change: {CHANGES[marks.get('on_resume', 'never')]}."
    for definition in (schema, *schema["$defs"].values()):
        for mark in MARKS:
            definition.pop(mark, None)
    parent = {"type": "string", "description": "Recipe that this file changes: a shipped one, or a file beside it."}
    schema["properties"] = {EXTENDS_KEY: parent, **schema["properties"]}
    return {"$schema": SCHEMA_DIALECT, **schema, "title": "npo recipe"}


CHANGES: Mapping[str, str] = {
    "free": "at any resume",
    "fork": "at a fork (npo resume --at STEP)",
    "never": "never within a run",
}
"""When a setting may change, by its mark `on_resume`."""
COMPARISON: Mapping[str, str] = {
    "must_match": "must be equal in all methods",
    "ignored": "does not affect what a run learns",
    "method": "part of the method",
}
"""What a difference means in `npo compare`, by the mark `comparison`."""


def _describe_sections(sections: Mapping[str, type[Settings]], *, within: str) -> Iterator[SectionView]:
    for prefix, section in sections.items():
        if prefix and prefix.startswith(within) and prefix != within:
            count = sum(1 for _ in list_settings(section))
            name = prefix.removesuffix(".")
            yield SectionView(section=name, num_settings=count, description=_first_sentence(section))


def _describe_setting(dotted: str, prefix: str, section: type[Settings], *, with_recipes: bool = False) -> SettingView:
    """One setting; a search of all recipes only for a setting that is shown alone."""
    name = dotted.removeprefix(prefix)
    field, marks = next((field, marks) for each, field, marks in list_settings(section) if each == name)
    key, location = _without_item(dotted), [int(part) if part == ITEM else part for part in dotted.split(".")]
    if f".{ITEM}." in prefix:  # an item has the marks of its list
        list_prefix, _, list_name = prefix.removesuffix(f".{ITEM}.").rpartition(".")
        holder = dict(list_sections())[f"{list_prefix}."]
        marks = next(marks for each, _, marks in list_settings(holder) if each == list_name)
    registry = REGISTRIES.get(key)
    allowed = describe_allowed(location)
    if registry is not None:
        allowed = ", ".join([*registry.names(), *DESCRIBED_VALUES.get(key, ())])
    return SettingView(
        key=key,
        description=field.description or "",
        type=describe_type(location),
        allowed=allowed,
        default=_default(field),
        is_required=field.is_required(),
        change=CHANGES[marks.get("on_resume", "never")],
        comparison=COMPARISON[marks.get("comparison", "method")],
        applies_when=describe_conditions(marks.get("applies_when", {})),
        recipes=dict(_find_recipes(key)) if with_recipes else {},
    )


def _find_recipes(key: str) -> Iterator[tuple[str, Any]]:
    """(name, value) of the shipped recipes and methods with another value than the default."""
    default = {name: value for name, value, _ in walk_fields(Recipe())}
    for name in list_recipe_names():
        values = {each: value for each, value, _ in walk_fields(load_recipe(name))}
        if key in values and values[key] != default[key]:
            yield name, _plain(values[key])
    for name in list_method_names():
        value: Any = read_method_values(name)
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None and key in default and value != _plain(default[key]):
            yield f"--method {name}", value


def _plain(value: Any) -> Any:
    """The value as JSON has it."""
    return json.loads(json.dumps(value, default=lambda part: part.model_dump(mode="json")))


def _default(field: FieldInfo) -> Any:
    return None if field.default is PydanticUndefined else _plain(field.default)


def _names(section: type[Settings]) -> list[str]:
    return [name for name, _, _ in list_settings(section)]


def _first_sentence(section: type[Settings]) -> str:
    paragraph = " ".join(inspect.cleandoc(section.__doc__ or "").split("\n\n")[0].split())
    first = paragraph.partition(". ")[0]
    return first if first.endswith((".", "?")) else f"{first}."


def _without_item(dotted: str) -> str:
    return dotted.replace(f".{ITEM}.", ".")


def _refuse_key(key: str) -> typing.NoReturn:
    if key in OLD_KEYS:
        raise NpoError(f"unknown key {key}: it is now {OLD_KEYS[key]}", f"npo config {OLD_KEYS[key]}")
    sections = [each.removesuffix(".") for prefix, _ in list_sections() if (each := _without_item(prefix))]
    near = difflib.get_close_matches(key, sections, n=1, cutoff=0.75)
    exact = [known for known in list_known_keys() if known.endswith(f".{key}")]
    best = exact[0] if exact else near[0] if near else find_nearest_key(key)
    raise NpoError(f"{key} is not a setting", f"npo config {best}" if best else "npo config   # lists the sections")
