"""The rules of the house, read off its source: who may import whom, how long things are, what is said where."""

import ast
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path

import pytest

from npo_cli.config.base import Settings
from npo_cli.config.recipe import Recipe

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "npo_cli"
SOURCES = sorted(PACKAGE.rglob("*.py"))
OURS = [*SOURCES, *sorted((ROOT / "recipes").rglob("*.py"))]
TESTS = sorted((ROOT / "tests").rglob("*.py"))

LEAF_ROOMS = {"guide", "objective", "policy", "engines", "tasks", "run_dir", "report"}
ROOMS_BELOW = {"cli": {"stages", *LEAF_ROOMS}, "stages": LEAF_ROOMS}
SECTIONS = {
    f"{name}_settings" for name in ("auto", "engine", "extrapolate", "inject", "lora", "parallel", "score", "track")
}
GROUND_FLOOR = {
    "__init__": set(),
    "errors": set(),
    "records": set(),
    "auto_records": set(),
    "compare_records": set(),
    "plan_records": set(),
    "guide_records": {"records"},
    "images": {"errors", "records"},
    "costs": set(),
    "seeds": set(),
    "settings": set(),
    **{section: {"settings"} for section in SECTIONS},
    "config": {"settings", *SECTIONS},
    "launched": {"errors"},
    "__main__": {"cli"},
    "explain": {"config"},
    "recipe_files": {"errors"},
    "loading": {"config", "errors", "explain", "recipe_files", "settings"},
}
KNOWN_ONLY_TO = {
    "typer": {"cli"},
    "rich": {"cli"},
    "matplotlib": {"report"},
    "jinja2": {"report"},
    "markupsafe": {"report"},
    "torch": {"objective", "policy", "engines", "stages"},
    "transformers": {"policy", "engines", "npo_cli/cli/environment_checks.py"},
    "safetensors": {"policy", "engines"},
    "peft": {"policy"},
    "accelerate": {"policy"},
    "vllm": {"engines"},
    **{tracker: {"report"} for tracker in ("tensorboard", "wandb", "trackio")},
    "reasoning_gym": {"tasks"},
    "math_verify": {"tasks"},
    "PIL": {"images", "npo_cli/tasks/shapes.py"},
    "pyarrow": {"tasks", "images"},
    "pydantic": {"config", "settings", "loading", *SECTIONS},
    "pydantic_core": {"explain"},
    "yaml": {"loading", "run_dir"},
}
NEVER_IMPORTED = {"click", "pickle", "shelve", "dill", "joblib", "cloudpickle", "trl", "pytest"}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def nodes(path: Path, *kinds: type[ast.AST]) -> Iterator[ast.AST]:
    return (node for node in ast.walk(tree_of(path)) if isinstance(node, kinds))


def room_of(path: Path) -> str:
    """`guide` for npo_cli/rollout/mixing.py, `records` for npo_cli/types/rollouts.py."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path: Path) -> Iterator[str]:
    """Dotted names of the modules that a file imports, wherever in it."""
    for node in nodes(path, ast.Import, ast.ImportFrom):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif node.module == "npo_cli":
            rooms = ("__init__" if alias.name.startswith("_") else alias.name for alias in node.names)
            yield from (f"npo_cli.{room}" for room in rooms)
        else:
            yield "." * node.level + (node.module or "")


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    return nodes(path, ast.FunctionDef)


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def place(path: Path, node: ast.AST) -> str:
    return f"{named(path)}:{node.lineno} {getattr(node, 'name', '')}".rstrip()


# Who may import whom


def test_imports_only_point_down_and_leaf_rooms_do_not_know_each_other():
    upward = []
    for path in SOURCES:
        room = room_of(path)
        allowed = GROUND_FLOOR.get(room, {room, *GROUND_FLOOR, *ROOMS_BELOW.get(room, ())})
        ours = [name for name in imported(path) if name.startswith("npo_cli.")]
        upward += [f"{named(path)} imports {name}" for name in ours if name.split(".")[1] not in allowed]
    assert upward == []


def test_every_room_is_one_of_the_plan():
    assert {room_of(path) for path in SOURCES} == {"cli", "stages", *LEAF_ROOMS, *GROUND_FLOOR}


def test_imports_are_absolute():
    assert [named(path) for path in SOURCES for name in imported(path) if name.startswith(".")] == []


def test_a_library_is_known_only_to_its_room():
    strangers = [
        f"{named(path)} imports {name}"
        for path in SOURCES
        for name in imported(path)
        for library in [name.split(".")[0]]
        if library in NEVER_IMPORTED
        or (library in KNOWN_ONLY_TO and not {room_of(path), named(path)} & KNOWN_ONLY_TO[library])
    ]
    assert strangers == []


def test_nothing_heavy_is_imported_at_the_head_of_a_door():
    heavy = {"torch", "transformers", "numpy", "scipy", "matplotlib", "yaml"}
    rooms = ("stages", "loading", "config", *(LEAF_ROOMS - {"report"}))
    early = [
        place(path, node)
        for path in SOURCES
        if room_of(path) == "cli"
        for node in tree_of(path).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for module in [getattr(node, "module", None) or node.names[0].name]
        if module.split(".")[0] in heavy or module.startswith(tuple(f"npo_cli.{room}" for room in rooms))
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


def test_functions_are_short():
    """Forty lines at most, sixty for one that is a loop."""
    long = [
        f"{place(path, function)}: {length} lines"
        for path in [*OURS, *TESTS]
        for function in functions(path)
        for length in [function.end_lineno - function.lineno + 1]
        if length > (60 if any(isinstance(node, ast.For | ast.While) for node in function.body) else 40)
    ]
    assert long == []


def without_owner(arguments: list[ast.arg]) -> list[ast.arg]:
    return [argument for argument in arguments if argument.arg not in ("self", "cls")]


def test_at_most_three_arguments_go_by_place():
    crowded = [
        place(path, function)
        for path in OURS
        for function in functions(path)
        if len(without_owner([*function.args.posonlyargs, *function.args.args])) > 3
    ]
    assert crowded == []


def test_every_argument_and_return_is_annotated():
    bare = []
    for path in OURS:
        for function in functions(path):
            given = function.args
            extra = [argument for argument in (given.vararg, given.kwarg) if argument]
            every = without_owner([*given.posonlyargs, *given.args, *given.kwonlyargs, *extra])
            unsaid = [argument.arg for argument in every if argument.annotation is None]
            bare += [f"{place(path, function)}: {unsaid}"] if unsaid or function.returns is None else []
    assert bare == []


def test_everything_public_says_what_it_is_for():
    silent = []
    for path in OURS:
        tree = tree_of(path)
        public = [
            node
            for node in tree.body
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        ]
        silent += [place(path, node) for node in public if not ast.get_docstring(node)]
        silent += [f"{named(path)}: no header"] if tree.body and not ast.get_docstring(tree) else []
    assert silent == []


# Where a default lives


def defaults_in(settings: type[Settings]) -> Iterator[tuple[str, object]]:
    for name, field in settings.model_fields.items():
        if isinstance(field.default, Settings):
            yield from defaults_in(type(field.default))
        else:
            yield name, field.default


def defaults_beside(path: Path) -> Iterator[tuple[str, ast.expr, ast.AST]]:
    """Name, default and place of each parameter and class field that has one."""
    for function in functions(path):
        given = function.args
        by_place = [*given.posonlyargs, *given.args]
        tail = zip(by_place[len(by_place) - len(given.defaults) :], given.defaults, strict=True)
        for argument, value in chain(tail, zip(given.kwonlyargs, given.kw_defaults, strict=True)):
            yield argument.arg, value, function
    for owner in nodes(path, ast.ClassDef):
        for node in owner.body:
            if isinstance(node, ast.AnnAssign):
                yield ast.unparse(node.target), node.value, node


def test_the_default_of_a_setting_lives_on_its_field_alone():
    """A name and a value that both agree with a setting's; nothing, no and zero are too common to tell."""
    known = {(name, default) for name, default in defaults_in(Recipe) if isinstance(default, str | float | int)}
    again = [
        f"{place(path, node)}: {name}={value.value!r}"
        for path in SOURCES
        if room_of(path) not in {"config", "settings", *SECTIONS}
        for name, value, node in defaults_beside(path)
        if isinstance(value, ast.Constant) and value.value and (name, value.value) in known
    ]
    assert again == []
