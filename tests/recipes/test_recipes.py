from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from npo_cli.config.loading import load_recipe
from npo_cli.config.locate import list_recipe_names
from npo_cli.config.recipe import Recipe
from npo_cli.errors import NpoError

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def keys_in(values: dict[str, Any], *outer: str) -> Iterator[tuple[str, ...]]:
    for key, value in values.items():
        yield from keys_in(value, *outer, key) if isinstance(value, dict) else [(*outer, key)]


def without(values: dict[str, Any], key: str, *inner: str) -> dict[str, Any]:
    rest = {other: value for other, value in values.items() if other != key}
    left = without(values[key], *inner) if inner else {}
    return values | {key: left} if left else rest


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_files_hold_only_what_differs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the paths of both the shipped file and its copy begin

    def resolved(values: dict[str, Any]) -> Recipe | None:
        copy = Path("copy.yaml")
        copy.write_text(yaml.safe_dump(values), encoding="utf-8")
        try:
            return load_recipe(f"./{copy}")
        except NpoError:
            return None  # it cannot do without this key

    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    whole = resolved(values)
    assert whole == load_recipe(str(path))
    assert [".".join(key) for key in keys_in(values) if resolved(without(values, *key)) == whole] == []


def test_recipe_names_equal_their_files():
    for name in list_recipe_names():
        recipe = load_recipe(name)
        assert (recipe.name, bool(recipe.description)) == (name, True)
    assert set(list_recipe_names()) == {path.stem for path in RECIPES}
