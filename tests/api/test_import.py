"""`import npo_cli as npo` is light and complete."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import npo_cli as npo

PACKAGE = Path(npo.__file__).parent
HEAVY = ("torch", "transformers", "pandas", "matplotlib", "numpy", "pydantic", "scipy", "rich", "typer")
LIST_LOADED = f"import json, sys; print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"


def loaded_after(code: str) -> list[str]:
    """The heavy libraries that a new process has loaded after this code."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", f"{code}\n{LIST_LOADED}"]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


def test_import_loads_no_library():
    assert loaded_after("import npo_cli as npo; npo.__version__; dir(npo)") == []


def test_naming_the_functions_and_classes_loads_no_library():
    names = [name for name in npo.__all__ if name != "Recipe"]
    assert loaded_after(f"import npo_cli as npo; [getattr(npo, name) for name in {names!r}]") == []


def test_a_recipe_loads_neither_torch_nor_pandas():
    loaded = loaded_after("import npo_cli as npo; npo.Recipe.load('micro', train={'lr': 1e-4})")
    assert not {"torch", "transformers", "pandas", "matplotlib"} & set(loaded)


def test_every_public_name_exists_and_is_typed():
    assert sorted(npo.__all__) == list(npo.__all__)
    assert {name for name in npo.__all__ if getattr(npo, name) is None} == set()
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    typed = [alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted({*typed} - {"import_module", "TYPE_CHECKING", "Any"}) == list(npo.__all__)
    assert set(npo.__all__) <= set(dir(npo))
    assert (PACKAGE / "py.typed").exists()


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(AttributeError, match=r"no attribute 'trian'; it has .*train"):
        _ = npo.trian
