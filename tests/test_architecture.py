"""Rules that hold for the whole package. Which package may import which is a contract of import-linter in
pyproject.toml."""

import ast
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "npo_cli"
SOURCES = sorted(PACKAGE.rglob("*.py"))
ALL_SOURCES = [*SOURCES, *sorted((ROOT / "recipes").rglob("*.py"))]
NEVER_IMPORTED = {"click", "pickle", "shelve", "dill", "joblib", "cloudpickle", "trl", "pytest"}
PICKLE_READER = PACKAGE / "interop" / "sharded_weights.py"
"""Other trainers' shards are pickles: this module alone reads them, so that none of them runs code."""
HEAVY = {"torch", "transformers", "numpy", "scipy", "matplotlib", "yaml"}
LIGHT_PACKAGES = {"cli", "api", "errors", "activity", "types", "report", "distributed"}
LIGHT_MODULES = {"npo_cli.guides.source", "npo_cli.session.startup", "npo_cli.session.stop_signal"}
"""Names and the grammar of guide sources; the sources themselves are imported when one is opened."""


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def nodes(path: Path, *kinds: type[ast.AST]) -> Iterator[ast.AST]:
    return (node for node in ast.walk(parse(path)) if isinstance(node, kinds))


def package_of(path: Path) -> str:
    """`rollout` for npo_cli/rollout/mixing.py, `errors` for npo_cli/errors.py."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_modules(path: Path) -> Iterator[str]:
    """Dotted names of the modules that a file imports, at any depth of it."""
    for node in nodes(path, ast.Import, ast.ImportFrom):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        else:
            yield "." * node.level + (node.module or "")


def locate(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT).as_posix()}:{node.lineno} {getattr(node, 'name', '')}".rstrip()


def test_imports_are_absolute():
    assert [path.name for path in SOURCES for name in imported_modules(path) if name.startswith(".")] == []


def test_some_libraries_are_never_imported():
    found = [(path, name) for path in SOURCES for name in imported_modules(path)]
    unwanted = [(path, name) for path, name in found if name.split(".")[0] in NEVER_IMPORTED]
    assert unwanted == [(PICKLE_READER, "pickle")]


def test_commands_import_nothing_heavy_at_the_top():
    early = [
        locate(path, node)
        for path in SOURCES
        if package_of(path) in ("cli", "api") and path.name != "environment_checks.py"
        for node in parse(path).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for module in [getattr(node, "module", None) or node.names[0].name]
        if module.split(".")[0] in HEAVY
        or (module.startswith("npo_cli.") and module.split(".")[1] not in LIGHT_PACKAGES)
        if module not in LIGHT_MODULES
    ]
    assert early == []


def test_pure_packages_import_no_torch():
    """Records, settings, statistics and the storage format are tested without torch installed."""
    pure = {"types", "config", "scoring", "storage", "errors", "seeds", "activity"}
    found = [locate(path, node) for path in SOURCES if package_of(path) in pure for node in nodes(path, ast.Import)]
    assert [line for line in found if line.endswith(" torch")] == []


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    return ((ast.unparse(node.func), node) for node in nodes(path, ast.Call))


def test_only_the_cli_prints():
    found = [
        locate(path, call)
        for path in SOURCES
        if package_of(path) != "cli"
        for name, call in calls(path)
        if name in {"print", "Console"} or name.startswith(("sys.stdout.write", "sys.stderr.write"))
    ]
    assert found == []


def test_tensors_are_never_pickled():
    found = [(path, call) for path in SOURCES for name, call in calls(path) if name in {"torch.save", "torch.load"}]
    assert [path for path, _ in found] == [PICKLE_READER]
    assert all("weights_only=True" in ast.unparse(call) for _, call in found)


def test_pickles_are_read_by_an_unpickler_that_lists_its_classes():
    used = {
        ast.unparse(node) for node in nodes(PICKLE_READER, ast.Attribute) if ast.unparse(node).startswith("pickle.")
    }
    assert used == {"pickle.Unpickler", "pickle.UnpicklingError"}
    (unpickler,) = [
        node
        for node in nodes(PICKLE_READER, ast.ClassDef)
        if any(ast.unparse(base) == "pickle.Unpickler" for base in node.bases)
    ]
    assert [node.name for node in unpickler.body if isinstance(node, ast.FunctionDef)] == ["find_class"]


def test_no_exception_is_swallowed_silently():
    found = [
        locate(path, node)
        for path in SOURCES
        for node in nodes(path, ast.ExceptHandler)
        if node.type is None or (ast.unparse(node.type) == "BaseException" and not isinstance(node.body[-1], ast.Raise))
    ]
    assert found == []


def test_no_file_names_a_path_of_one_machine():
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    private = re.compile(rb"(?<![\w.])/(?:work|root|home|Users|tmp/w)/")
    files = [ROOT / name for name in listed.stdout.splitlines()]
    texts = [path for path in files if path.is_file() and path.suffix not in {".pyc", ".safetensors", ".png"}]
    assert [path.name for path in texts if private.search(path.read_bytes())] == []


def test_every_argument_and_return_is_annotated():
    bare = []
    for path in ALL_SOURCES:
        for function in nodes(path, ast.FunctionDef):
            given = function.args
            extra = [argument for argument in (given.vararg, given.kwarg) if argument]
            every = [*given.posonlyargs, *given.args, *given.kwonlyargs, *extra]
            missing = [one.arg for one in every if one.annotation is None and one.arg not in ("self", "cls")]
            bare += [f"{locate(path, function)}: {missing}"] if missing or function.returns is None else []
    assert bare == []


def test_everything_public_has_a_docstring():
    missing = []
    for path in ALL_SOURCES:
        tree = parse(path)
        public = [
            node
            for node in tree.body
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        ]
        missing += [locate(path, node) for node in public if not ast.get_docstring(node)]
        missing += [f"{path.name}: no module docstring"] if tree.body and not ast.get_docstring(tree) else []
    assert missing == []
