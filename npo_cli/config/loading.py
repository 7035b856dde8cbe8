"""Recipes from YAML: read, extend, override, validate, compare.

Plain YAML 1.2: `3e-4` is a number, `yes` and `010` are text, aliases and repeated keys are refused. Values are checked
strictly: text is never converted to a number, nor 1 to true.
"""

import copy
import inspect
import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from npo_cli.config.applies import find_idle_settings
from npo_cli.config.base import Settings, is_dataset_id, is_hub_id, walk_fields
from npo_cli.config.locate import find_method, find_recipe, is_shipped
from npo_cli.config.messages import COMMAND_LINE, describe_problems, shorten, suggest_fix
from npo_cli.config.recipe import BUNDLED_MODELS, Recipe
from npo_cli.errors import NpoError, quote_path

AnySettings = TypeVar("AnySettings", bound=Settings)
RECIPE_CHECKSUM = "# checksum: "
"""Begins the last line of a recipe that a run saved."""
EXTENDS_KEY = "extends"
FORK_HINT = "fork a new branch: add --at STEP and --guide NAME or --no-guide to the command"
Purpose = Literal["resume", "fork", "measure"]
"""What changed settings are for: the same branch, a new one, or a command that samples and trains nothing."""
MAX_DEPTH = 20
"""Parts of a dotted key; settings have at most five."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SettingsLayer:
    """Settings from one file or override, and where each dotted key was written."""

    values: dict[str, Any]
    locations: dict[str, str]
    """Dotted key -> `file:line` or `command line`."""
    origin: Literal["command line", "file", "shipped", "saved"] = "saved"
    """A shipped recipe, a saved one and a default were not written by the user."""


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2, without aliases and repeated keys."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - defined by yaml

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="aliases are not part of a recipe", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be plain text", problem_mark=key.start_mark)
            if key.value in keys:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {shorten(key.value)} is given twice", problem_mark=key.start_mark
                )
            keys.add(key.value)
        return {key.value: self.construct_object(value, deep=deep) for key, value in node.value}


class _Dumper(yaml.SafeDumper):
    """SafeDumper that also quotes text which YAML 1.2 reads as a number, such as 0E0."""


_FLOAT = r"[-+]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.inf|\.Inf|\.INF)|\.nan|\.NaN|\.NAN"
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"(?:~|null|Null|NULL|)$"), [*"~nN", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), [*"tTfF"])
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(?:0|[1-9]\d*)$"), [*"-+0123456789"])
for _reader in (_Loader, _Dumper):
    _reader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(rf"(?:{_FLOAT})$"), [*"-+.0123456789"])


# Reading


def load_recipe(name_or_path: str, overrides: Sequence[str] = (), *, method: str | None = None) -> Recipe:
    """Merge defaults, the chain of `extends`, the file, the method and the overrides; later ones win."""
    layers = _read_layers(name_or_path, method=method)
    return _validate([*layers, *map(_parse_override, overrides)], source=name_or_path)


def _read_layers(name_or_path: str, *, method: str | None) -> list[SettingsLayer]:
    """The files that a recipe consists of, with its method on top."""
    return [*_read_chain(find_recipe(name_or_path)), *([] if method is None else _read_chain(find_method(method)))]


def find_replaced_settings(method: str, overrides: Sequence[str]) -> dict[str, tuple[Any, Any]]:
    """Settings of a method's file that overrides replace: by dotted key the method's value and the override's."""
    own, _ = _merge_layers(_read_chain(find_method(method)))
    given, given_keys = _merge_layers([_parse_override(text) for text in overrides])
    pairs = {key: (_find_value(own, key), _find_value(given, key)) for key in given_keys}
    return {key: (old, new) for key, (old, new) in pairs.items() if old not in (None, new) and type(old) is not dict}


def _find_value(values: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key; None without one."""
    value: Any = values
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def load_usable_recipe(
    name_or_path: str, overrides: Sequence[str] = (), *, method: str | None = None
) -> tuple[Recipe, list[NpoError]]:
    """The recipe without its faulty settings, and an error for each of them; raises if a file cannot be read."""
    layers, faults = _read_layers(name_or_path, method=method), _Faults()
    for text in overrides:
        try:
            layers.append(_parse_override(text))
        except NpoError as error:
            faults.add(error)
    values, locations = _merge_layers(layers)
    while True:
        try:
            recipe = _validate_values(values)
            return recipe, [*faults.found, *_find_idle(recipe, layers)]
        except ValidationError as error:
            problems = error.errors(include_url=False)
        of_settings = [problem for problem in problems if not _is_section(problem["loc"])]
        for problem in of_settings or [problem for problem in problems if problem["loc"]]:
            faults.add(_to_fault([problem], locations, source=name_or_path))
        if not of_settings:  # what is left are settings that do not fit each other
            return _construct_recipe(values, faults, source=name_or_path), faults.found
        for problem in of_settings:
            _remove_setting(values, problem["loc"])
        faults.removed += [".".join(map(str, problem["loc"])) for problem in of_settings]


def _is_section(loc: Sequence[str | int]) -> bool:
    """Whether a place is a section, whose settings do not fit each other, or the whole recipe."""
    section: Any = Recipe
    for part in loc:
        section = section.model_fields[part].annotation if part in getattr(section, "model_fields", {}) else None
    return inspect.isclass(section) and issubclass(section, Settings)


@dataclass(kw_only=True, slots=True)
class _Faults:
    """Faults of a recipe, without those that follow from another one."""

    found: list[NpoError] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    """Settings and sections that were found to be wrong, and have their default now."""

    def add(self, fault: NpoError) -> None:
        if not any(re.search(rf"(?<![\w.]){re.escape(key)}(?!\w)", fault.message) for key in self.removed):
            self.found.append(fault)


def _construct_recipe(values: Mapping[str, Any], faults: _Faults, *, source: str) -> Recipe:
    """A recipe of valid settings that do not fit each other; adds the faults between its sections."""
    recipe = _construct_section(Recipe, values)
    for validator in Recipe.__pydantic_decorators__.model_validators.values():
        try:
            validator.func(recipe)
        except ValueError as error:
            faults.add(NpoError(f"{error} ({source})", "npo config   # explains the settings"))
    return recipe


def _construct_section(section: type[AnySettings], values: Mapping[str, Any]) -> AnySettings:
    """A section without the checks between its settings."""
    found = {}
    for name, value in values.items():
        field = section.model_fields[name]
        if inspect.isclass(field.annotation) and issubclass(field.annotation, Settings):
            found[name] = _construct_section(field.annotation, value)
        else:
            kind = TypeAdapter(field.rebuild_annotation())
            found[name] = kind.validate_json(json.dumps(value, default=str), strict=True)
    return section.model_construct(**found)


def _remove_setting(values: dict[str, Any], loc: Sequence[str | int]) -> None:
    """Remove the setting at a place, or the innermost one around it that was given."""
    inner: Any = values
    for part in loc[:-1]:
        if not isinstance(inner.get(part), dict):
            inner.pop(part, None)
            return
        inner = inner[part]
    inner.pop(loc[-1], None)


def read_method_values(name: str) -> dict[str, Any]:
    """The settings that a method's files hold, unchecked."""
    values: dict[str, Any] = {}
    for layer in _read_chain(find_method(name)):
        values = _merge(values, layer.values)
    return values


def apply_method(recipe: Recipe, method: str) -> Recipe:
    """The recipe with a method's settings on top."""
    base = SettingsLayer(values=recipe_to_dict(recipe), locations={})
    return _validate([base, *_read_chain(find_method(method))], source="the recipe")


def format_override(key: str, value: Any) -> str:
    """`KEY=VALUE` of a setting or section, whose value is plain data or a path."""
    try:
        return f"{key}={json.dumps(value, ensure_ascii=False, allow_nan=False, default=_to_plain)}"
    except (TypeError, ValueError) as error:
        raise NpoError(f"{key} cannot be set to {value!r}", f"{key} takes text, a number, a list or a dict") from error


def _to_plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Settings):
        return value.model_dump(mode="json")
    raise TypeError(f"{type(value).__name__} is no setting")


def apply_overrides(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """The recipe with KEY=VALUE settings on top."""
    base = SettingsLayer(values=recipe_to_dict(recipe), locations={})
    return _validate([base, *map(_parse_override, overrides)], source="the run's recipe")


def replace_values(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Plain data of a recipe with other values at dotted keys."""
    changed = copy.deepcopy(dict(values))
    for key, value in changes.items():
        *sections, name = key.split(".")
        section = changed
        for part in sections:
            section = section[part]
        section[name] = value
    return changed


def override_saved_recipe(
    saved: Mapping[str, Any], overrides: Sequence[str], *, path: Path, purpose: Purpose
) -> Recipe:
    """The recipe that a run saved in `path` with overrides, refused if completed steps depend on them."""
    old = recipe_from_dict(saved, source=str(path))
    recipe = apply_overrides(old, overrides)
    check_frozen_settings(old, recipe, purpose=purpose, path=path)
    return recipe


def recipe_from_dict(values: Mapping[str, Any], *, source: str = "the saved recipe") -> Recipe:
    """A recipe from plain data, validated like one from a file."""
    return _validate([SettingsLayer(values=dict(values), locations={})], source=source)


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Every setting as JSON-compatible data."""
    return recipe.model_dump(mode="json")


def recipe_to_yaml(recipe: Recipe) -> str:
    """Every setting as YAML; `load_recipe` reads the same recipe from it."""
    return dump_yaml(recipe_to_dict(recipe), width=100)


def dump_yaml(values: Mapping[str, Any], *, width: int) -> str:
    """Plain data as YAML that readers of YAML 1.1 and 1.2 understand alike, keys in the given order."""
    # Non-ASCII characters are escaped: yaml folds a raw U+0085 into a space, and some control the terminal.
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=False, width=width)


def _read_chain(path: Path) -> list[SettingsLayer]:
    """The files that this one extends, outermost first, then the file itself."""
    layers: list[SettingsLayer] = []
    visited: list[Path] = []
    while True:
        if path.resolve() in visited:
            names = " -> ".join(step.name for step in [*visited, path])
            raise NpoError(
                f"recipes extend each other in a cycle: {names}", f"remove `{EXTENDS_KEY}` from {visited[0]}"
            )
        visited.append(path.resolve())
        layer = _read_file(path)
        layers.insert(0, layer)
        parent = layer.values.pop(EXTENDS_KEY, None)
        if parent is None:
            return layers
        if not isinstance(parent, str):
            raise NpoError(
                f"{layer.locations[EXTENDS_KEY]}: {EXTENDS_KEY} must be the name of a recipe", f"{EXTENDS_KEY}: micro"
            )
        path = find_recipe(parent, beside=path.parent)


def _read_file(path: Path) -> SettingsLayer:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise NpoError(f"{path} cannot be read: {error.strerror}", "check its permissions") from error
    except UnicodeDecodeError as error:
        raise NpoError(f"{path} is not UTF-8 text (byte {error.start})", "save it as UTF-8") from error
    node, values = parse_yaml(text, source=str(path))
    if node is None:
        raise NpoError(f"{path} is empty", "npo recipes micro   # prints an example")
    if not isinstance(node, yaml.MappingNode):
        raise NpoError(f"{path} holds no settings (KEY: VALUE)", "npo recipes micro   # prints an example")
    locations = {key: f"{path.name}:{line}" for key, line in _list_lines(node, prefix="")}
    if RECIPE_CHECKSUM in text:
        return SettingsLayer(values=values, locations=locations, origin="saved")
    if is_shipped(path):
        return SettingsLayer(values=values, locations=locations, origin="shipped")
    return SettingsLayer(values=resolve_paths(values, folder=path.parent), locations=locations, origin="file")


def resolve_paths(values: Mapping[str, Any], *, folder: Path) -> dict[str, Any]:
    """The settings of a recipe file with their relative paths beginning at its folder.

    A model's name stays a name where there is no such folder beside the recipe. A shipped recipe has no data beside it:
    its paths, like those on the command line, are relative to the current folder.
    """
    resolved = dict(values)
    for key, _, marks in walk_fields(Recipe()):
        section, _, name = key.rpartition(".")
        given = values.get(section)
        if "path" not in marks or not isinstance(given, dict):
            continue
        value, resolve = given.get(name), partial(_resolve_path, folder=folder, kind=marks["path"])
        if isinstance(value, str):
            resolved[section] = {**resolved[section], name: resolve(value)}
        elif isinstance(value, list):  # of verifiers
            paths = [resolve(each) if isinstance(each, str) else each for each in value]
            resolved[section] = {**resolved[section], name: paths}
    return resolved


def _resolve_path(path: str, *, folder: Path, kind: str) -> str:
    """A missing model folder stays a path with a dot, so that it is not taken for a hub id."""
    file, colon, function = path.rpartition(":") if kind == "code" else (path, "", "")
    if not file or file.startswith("~") or (kind == "code" and not file.endswith(".py")):
        return path
    beside = folder / file
    if kind == "data" and is_dataset_id(file) and not beside.exists():
        return path
    if kind != "model":
        return f"{beside}{colon}{function}"
    is_name = file in BUNDLED_MODELS or (is_hub_id(file) and not beside.is_dir() and not Path(file).is_dir())
    return path if is_name else os.path.join(".", beside)  # a Path would drop the dot


def parse_yaml(text: str, *, source: str) -> tuple[yaml.Node | None, Any]:
    """The syntax tree and the plain data of a recipe's text; `NpoError` names the line."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return node, None if node is None else loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        location = f"{source}:{mark.line + 1}" if mark else source
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise NpoError(
            f"{location}: {shorten(problem, 200)}", "settings are written KEY: VALUE, nested by two spaces"
        ) from error
    except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
        # yaml's constructors of `!!int`, `!!timestamp`, ... raise whatever an unsuitable scalar leads to
        detail = f": {shorten(str(error))}" if isinstance(error, ValueError | KeyError) else ""
        raise NpoError(f"{source}: a value does not fit its !!tag{detail}", "leave out the !!tag") from error
    except RecursionError as error:
        raise NpoError(
            f"{source}: nested too deeply", "settings are written KEY: VALUE, nested by two spaces"
        ) from error


def _list_lines(node: yaml.MappingNode, *, prefix: str) -> Iterator[tuple[str, int]]:
    for key, value in node.value:
        dotted = f"{prefix}{key.value}"
        yield dotted, key.start_mark.line + 1
        if isinstance(value, yaml.MappingNode):
            yield from _list_lines(value, prefix=f"{dotted}.")


def _parse_override(text: str) -> SettingsLayer:
    """KEY=VALUE with a dotted key and a YAML value, in which a # at the start begins no comment."""
    dotted, equals, value = text.partition("=")
    parts = dotted.split(".")
    if not equals or not all(parts) or len(parts) > MAX_DEPTH:
        raise NpoError(f"{shorten(text)!r} is not a setting: write KEY=VALUE", "train.lr=3e-4   # for example")
    value = json.dumps(value) if value.startswith("#") else value
    node, values = parse_yaml(value, source=f"the value of {shorten(dotted)}")
    inner = _list_lines(node, prefix=f"{dotted}.") if isinstance(node, yaml.MappingNode) else ()
    for part in reversed(parts):
        values = {part: values}
    keys = [dotted, *(key for key, _ in inner)]
    return SettingsLayer(values=values, locations=dict.fromkeys(keys, COMMAND_LINE), origin=COMMAND_LINE)


def _merge(lower: dict[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings merge key by key, everything else is replaced."""
    merged = dict(lower)
    for key, value in upper.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _merge_layers(layers: Sequence[SettingsLayer]) -> tuple[dict[str, Any], dict[str, str]]:
    """The values of all layers, later ones on top, and where each was written."""
    values: dict[str, Any] = {}
    locations: dict[str, str] = {}
    for layer in layers:
        values = _merge(values, layer.values)
        locations |= layer.locations
    return values, locations


def _validate(layers: Sequence[SettingsLayer], *, source: str) -> Recipe:
    values, locations = _merge_layers(layers)
    try:
        recipe = _validate_values(values)
    except ValidationError as error:
        raise _to_fault(error.errors(include_url=False), locations, source=source) from error
    idle = _find_idle(recipe, layers)
    if idle:
        raise NpoError("; ".join(each.message for each in idle[:6]), idle[0].hint)
    return recipe


def _find_idle(recipe: Recipe, layers: Sequence[SettingsLayer]) -> list[NpoError]:
    """An error for each setting that the user wrote without an effect under the others; all KEY=VALUE have one rank.

    A default in a file is no mistake: `npo recipes` prints files with all of them.
    """
    ranks = [len(layers) if layer.origin == COMMAND_LINE else rank for rank, layer in enumerate(layers)]
    written = {key: rank for rank, layer in zip(ranks, layers, strict=True) for key in layer.locations}
    locations = {key: where for layer in layers for key, where in layer.locations.items()}
    changed = {key for key, _, _ in diff_recipes(Recipe(), recipe)}
    by_user = {key for layer in layers if layer.origin == "file" for key in layer.locations if key in changed}
    by_user |= {key for layer in layers if layer.origin == COMMAND_LINE for key in layer.locations}
    return [
        NpoError(f"{key} has no effect {reason} ({locations[key]})", f"remove {key}, or {instead}")
        for key, reason, instead in find_idle_settings(recipe, written)
        if key in by_user
    ]


def _validate_values(values: Mapping[str, Any]) -> Recipe:
    # JSON mode accepts lists for tuples and converts nothing else.
    return Recipe.model_validate_json(json.dumps(values, default=str), strict=True)


def _to_fault(problems: Sequence[ErrorDetails], locations: Mapping[str, str], *, source: str) -> NpoError:
    return NpoError(describe_problems(problems, locations=locations, source=source), suggest_fix(problems))


# Comparing


def diff_recipes(old: Recipe, new: Recipe) -> list[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) of every setting that differs, in the order of the recipe."""
    pairs = zip(walk_fields(old), walk_fields(new), strict=True)
    return [(key, before, after) for (key, before, _), (_, after, _) in pairs if before != after]


def has_last_setting(values: Mapping[str, Any]) -> bool:
    """Whether saved values have the setting that a recipe ends with: not, where the end of the file is lost."""
    *_, (key, _, _) = walk_fields(Recipe())
    inner: Any = values
    for part in key.split("."):
        if not isinstance(inner, Mapping) or part not in inner:
            return False
        inner = inner[part]
    return True


def check_frozen_settings(old: Recipe, new: Recipe, *, purpose: Purpose, path: Path | None = None) -> None:
    """Refuse changes of settings that completed steps depend on; `path` is the file of the old recipe.

    `free` settings may always change, `fork` settings not within a branch, all others never. num_steps may
    change within a branch only with a constant schedule: a decaying learning rate depends on it at every step.
    """
    marks = {key: each for key, _, each in walk_fields(old)}
    for key, before, after in diff_recipes(old, new):
        change = f"{key} cannot change from {before} to {after}"
        if key == "model.path" and old.model.lora.rank is not None:
            continue  # adapters identify their base by its weights
        new_run = f"npo train {quote_path(path) if path else 'RECIPE'} NEW_RUN {_as_override(key, after)}"
        if key == "train.num_steps" and old.train.schedule != "constant" and purpose != "fork":
            reason = f"the {old.train.schedule} schedule of the completed steps was computed for {before} steps"
            raise NpoError(f"{change} within a branch: {reason}", FORK_HINT)
        when = marks[key].get("on_resume", "never")
        if when == "fork" and purpose == "resume":
            raise NpoError(f"{change} within a branch, only when forking", FORK_HINT)
        if when == "fork" and purpose == "measure" and marks[key].get("used_by") == "training":
            raise NpoError(
                f"{change}: this command trains nothing", "set it where a branch is forked, in npo resume --at"
            )
        if when == "never":
            raise NpoError(f"{change}: completed steps depend on it", new_run)


def _as_override(key: str, value: Any) -> str:
    """A setting as written on the command line."""
    text = value if isinstance(value, str) else json.dumps(value, default=lambda part: part.model_dump(mode="json"))
    return shlex.quote(f"{key}={text}")
