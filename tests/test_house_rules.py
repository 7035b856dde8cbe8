"""The rules of the house, read off its source: who may import whom, how long things are, what is said where."""

import ast
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path

import pytest
import yaml

from npo_cli.config import Recipe, Settings
from npo_cli.loading import EXTENDS, load_recipe, recipe_dict, recipe_names, recipe_path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "npo_cli"
SOURCES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted((ROOT / "recipes").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))

LEAF_ROOMS = {"guide", "objective", "policy", "engines", "tasks", "run_dir", "report"}
ROOMS_BELOW = {"cli": {"stages", *LEAF_ROOMS}, "stages": LEAF_ROOMS}
GROUND_FLOOR = {
    "__init__": set(),
    "errors": set(),
    "records": set(),
    "seeds": set(),
    "config": set(),
    "explain": {"config"},
    "loading": {"config", "errors", "explain"},
}
KNOWN_ONLY_TO = {
    "typer": {"cli"},
    "rich": {"cli"},
    "matplotlib": {"report"},
    "torch": {"objective", "policy", "engines", "stages"},
    "transformers": {"policy", "engines"},
    "safetensors": {"policy", "engines"},
    "peft": {"policy"},
    "accelerate": {"policy"},
    "vllm": {"engines"},
    "reasoning_gym": {"tasks"},
    "math_verify": {"tasks"},
    "pyarrow": {"tasks"},
    "pydantic": {"config", "loading"},
    "pydantic_core": {"explain"},
    "yaml": {"loading"},
}
NEVER_IMPORTED = {"click", "pickle", "shelve", "dill", "joblib", "cloudpickle", "trl", "pytest"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def nodes(path: Path, *kinds: type[ast.AST]) -> Iterator[ast.AST]:
    return (node for node in ast.walk(tree_of(path)) if isinstance(node, kinds))


def room_of(path: Path) -> str:
    """`guide` for npo_cli/guide/mix.py, `records` for npo_cli/records.py."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path: Path) -> Iterator[str]:
    """Dotted names of the modules that a file imports, wherever in it."""
    for node in nodes(path, ast.Import, ast.ImportFrom):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif node.module == "npo_cli":
            yield from (f"npo_cli.{alias.name}" for alias in node.names)
        else:
            yield "." * node.level + (node.module or "")


def place(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno} {getattr(node, 'name', '')}".rstrip()


def size(node: Function) -> int:
    return node.end_lineno - node.lineno + 1


# Who may import whom


def test_imports_only_point_down_and_leaf_rooms_do_not_know_each_other():
    upward = []
    for path in SOURCES:
        room = room_of(path)
        allowed = GROUND_FLOOR.get(room, {room, *GROUND_FLOOR, *ROOMS_BELOW.get(room, ())})
        ours = [name for name in imported(path) if name.startswith("npo_cli.")]
        upward += [f"{path.relative_to(ROOT)} imports {name}" for name in ours if name.split(".")[1] not in allowed]
    assert upward == []


def test_every_room_is_one_of_the_plan():
    assert {room_of(path) for path in SOURCES} == {"cli", "stages", *LEAF_ROOMS, *GROUND_FLOOR}


def test_imports_are_absolute():
    assert [path for path in SOURCES for name in imported(path) if name.startswith(".")] == []


def test_a_library_is_known_only_to_its_room():
    strangers = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in SOURCES
        for name in imported(path)
        for library in [name.split(".")[0]]
        if library in NEVER_IMPORTED or room_of(path) not in KNOWN_ONLY_TO.get(library, {room_of(path)})
    ]
    assert strangers == []


def test_nothing_heavy_is_imported_at_the_head_of_a_door():
    heavy = {"torch", "transformers", "numpy", "scipy", "matplotlib", "yaml"}
    early = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in SOURCES
        if room_of(path) == "cli"
        for node in tree_of(path).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for module in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module])
        if module.split(".")[0] in heavy or module.startswith(("npo_cli.stages", "npo_cli.loading", "npo_cli.config"))
    ]
    assert early == []


# What nobody does


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    return ((ast.unparse(node.func), node) for node in nodes(path, ast.Call))


def test_only_the_cli_prints():
    talkers = [
        place(path, call)
        for path in SOURCES
        if room_of(path) != "cli"
        for name, call in calls(path)
        if name in {"print", "Console"} or name.startswith(("sys.stdout.write", "sys.stderr.write"))
    ]
    assert talkers == []


def test_tensors_are_never_pickled():
    pickled = [
        place(path, call) for path in SOURCES for name, call in calls(path) if name in {"torch.save", "torch.load"}
    ]
    assert pickled == []


def test_no_error_is_swallowed_unseen():
    swallowed = [
        place(path, node)
        for path in SOURCES
        for node in nodes(path, ast.ExceptHandler)
        if node.type is None or (ast.unparse(node.type) == "BaseException" and not isinstance(node.body[-1], ast.Raise))
    ]
    assert swallowed == []


def test_nothing_names_a_place_of_one_machine():
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    private = re.compile(rb"(?<![\w.])/(?:work|root|home|Users|tmp/w)/")
    files = [ROOT / name for name in listed.stdout.splitlines()]
    texts = [path for path in files if path.is_file() and path.suffix not in {".pyc", ".safetensors", ".png"}]
    assert [path.name for path in texts if private.search(path.read_bytes())] == []


# How long, how many, how well said


@pytest.mark.parametrize("path", [*SOURCES, *SCRIPTS, *TESTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 300
    long = [place(path, node) for node in nodes(path, ast.FunctionDef, ast.AsyncFunctionDef) if size(node) > limit(node)]
    assert long == []


def limit(function: Function) -> int:
    """Forty lines, sixty for a function that is a loop."""
    return 60 if any(isinstance(node, ast.For | ast.While) for node in function.body) else 40


def arguments(function: Function) -> list[ast.arg]:
    every = function.args
    named = [*every.posonlyargs, *every.args]
    extra = [argument for argument in (every.vararg, every.kwarg) if argument]
    return [argument for argument in [*named, *every.kwonlyargs, *extra] if argument.arg not in {"self", "cls"}]


@pytest.mark.parametrize("path", [*SOURCES, *SCRIPTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_signatures_are_short_and_annotated(path):
    found = list(nodes(path, ast.FunctionDef, ast.AsyncFunctionDef))
    keywords = {function: {argument.arg for argument in function.args.kwonlyargs} for function in found}
    crowded = [
        place(path, function)
        for function in found
        if sum(argument.arg not in keywords[function] for argument in arguments(function)) > 3
    ]
    bare = [
        place(path, function)
        for function in found
        if function.returns is None or any(argument.annotation is None for argument in arguments(function))
    ]
    assert (crowded, bare) == ([], [])


@pytest.mark.parametrize("path", [*SOURCES, *SCRIPTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_everything_public_says_what_it_is_for(path):
    public = [tree_of(path)] if tree_of(path).body else []
    for node in tree_of(path).body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            public.append(node)
    silent = [getattr(node, "name", "the file") for node in public if not ast.get_docstring(node)]
    assert silent == []


# Settings and recipes


def leaves(settings: type[Settings]) -> Iterator[str]:
    for name, field in settings.model_fields.items():
        inner = field.annotation
        yield from leaves(inner) if isinstance(inner, type) and issubclass(inner, Settings) else [name]


def defaults_of(path: Path) -> Iterator[tuple[str, ast.expr, ast.AST]]:
    """Name, default and place of each parameter and class field that has one."""
    for function in nodes(path, ast.FunctionDef, ast.AsyncFunctionDef):
        named = [*function.args.posonlyargs, *function.args.args]
        given = zip(named[len(named) - len(function.args.defaults) :], function.args.defaults, strict=True)
        for argument, value in chain(given, zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)):
            if value is not None:
                yield argument.arg, value, function
    for owner in nodes(path, ast.ClassDef):
        for node in owner.body:
            if isinstance(node, ast.AnnAssign) and node.value is not None:
                yield ast.unparse(node.target), node.value, node


def test_a_default_of_a_setting_lives_on_its_field_alone():
    known = set(leaves(Recipe))
    again = [
        f"{place(path, node)} {name}={ast.unparse(value)}"
        for path in SOURCES
        if room_of(path) != "config"
        for name, value, node in defaults_of(path)
        if name in known and isinstance(value, ast.Constant) and value.value not in (None, False, "")
    ]
    assert again == []


def keys_in(values: dict, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in values.items():
        yield from keys_in(value, (*prefix, key)) if isinstance(value, dict) else [(*prefix, key)]


def without(values: dict, key: tuple[str, ...]) -> dict:
    head, *rest = key
    kept = values | {head: without(values[head], tuple(rest))} if rest else {k: v for k, v in values.items() if k != head}
    return {k: v for k, v in kept.items() if v != {}}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_holds_only_what_differs(path, tmp_path):
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    whole = recipe_dict(load_recipe(str(path)))
    idle = []
    for key in keys_in(values):
        if key == (EXTENDS,) or key[0] == "name":
            continue
        (tmp_path / "less.yaml").write_text(yaml.safe_dump(without(values, key)), encoding="utf-8")
        try:
            if recipe_dict(load_recipe(str(tmp_path / "less.yaml"))) == whole:
                idle.append(".".join(key))
        except Exception:  # it cannot do without
            continue
    assert idle == []


def test_every_recipe_loads_and_is_known_by_its_file():
    assert [load_recipe(name).name for name in recipe_names()] == [path.stem for path in RECIPES]
    assert all(load_recipe(name).description for name in recipe_names())
    assert all(recipe_path(name).is_file() for name in recipe_names())
